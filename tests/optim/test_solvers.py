"""Solvers: optimality conditions and independent float64 solutions, on random, degenerate and badly scaled matrices.

Letters: K tasks, P parameters; g_k the rows of J, n_k their norms; eps = 2^-23.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from mtjax.optim import solvers

from . import padded, reference
from .cases import CASES

EPS = 2.0**-23
SIZES = (1, 2, 3, 5, 8)  # few, because every K compiles anew

min_norm = jax.jit(solvers.min_norm_weights)
qp = jax.jit(solvers.nonnegative_qp)
cone = jax.jit(solvers.cone_projection)
many = jax.jit(jax.vmap(solvers.nonnegative_qp, (None, 0)))
project = jax.jit(solvers.simplex_projection)


def gram32(matrix):
    """The Gramian as the solver gets it: exact inner products, rounded to float32."""
    return jnp.asarray(matrix @ matrix.T, jnp.float32)


def exact_min_norm(matrix):
    """Simplex weights by float64 NNLS on the rows themselves (the Gramian would square the condition number).

    min_{u >= 0} |[N^-1 J]^T u|^2 + (s/n . u - 1)^2, then w = (u / n) / sum: exact for any s. The best of several is
    kept, as scipy's solver is not reliable for all of them.
    """
    norm = np.linalg.norm(matrix, axis=1)
    best, best_length = None, np.inf
    for s in np.geomspace(norm.min(), norm.max(), 9):
        rows = np.column_stack([matrix / norm[:, None], s / norm])
        size = np.linalg.norm(rows, axis=1)
        try:
            u, _ = nnls((rows / size[:, None]).T, np.r_[np.zeros(matrix.shape[1]), 1.0], maxiter=100 * len(matrix))
        except RuntimeError:  # scipy: too many iterations
            continue
        w = u / size / norm
        length = np.linalg.norm(matrix.T @ w) / w.sum()
        if length < best_length:
            best, best_length = w / w.sum(), length
    return best


def optimality_gap(matrix, weights):
    """Largest violation of <g_k, d> >= |d|^2, in units of eps a max(n_k, a) with a = sum_k w_k n_k.

    The units are those of the rounding of G: |d|^2 is known to eps a^2, <g_k, d> to eps n_k a.
    """
    norm = np.linalg.norm(matrix, axis=1)
    direction, arm = matrix.T @ weights, weights @ norm
    return np.max((direction @ direction - matrix @ direction) / (arm * np.maximum(norm, arm))) / EPS


def _camps(rng, matrix):
    return np.vstack([matrix[:1], -rng.uniform(0.1, 3.0, (len(matrix) - 1, 1)) * matrix[:1] + 1e-4 * matrix[1:]])


def _stationary(rng, matrix):
    """Rows whose convex hull holds the origin: they are centred on a random point of it."""
    return matrix - rng.dirichlet(np.ones(len(matrix))) @ matrix


def _opposite(rng, matrix):
    matrix = matrix * 10 ** rng.uniform(-3, 3, (len(matrix), 1))
    return np.vstack([matrix[:-1], -3 * matrix[:1]])


FAMILIES = {
    "normal": lambda rng, m: m,
    "row norms over six orders": lambda rng, m: m * 10 ** rng.uniform(-3, 3, (len(m), 1)),
    "and two exactly opposite rows": _opposite,
    "all entries positive": lambda rng, m: np.abs(m) + 1e-3,
    "rank two": lambda rng, m: rng.normal(size=(len(m), 2)) @ rng.normal(size=(2, m.shape[1])),
    "two camps": _camps,
    "stationary": _stationary,
    "nearly equal": lambda rng, m: m[:1] + 1e-3 * m,
    "collinear": lambda rng, m: np.repeat(m, 3, axis=0)[: len(m)] * rng.uniform(0.5, 2.0, (len(m), 1)),
    "orthogonal, norms over eight orders": lambda rng, m: np.eye(len(m), 9) * 10 ** rng.uniform(-4, 4, (len(m), 1)),
    "decaying columns": lambda rng, m: m * np.logspace(0, -8, m.shape[1]),
}


def sample(family, seed, num_tasks):
    rng = np.random.default_rng(seed)
    matrix = FAMILIES[family](rng, rng.normal(size=(num_tasks, int(rng.integers(1, 20)))))
    return matrix.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), num_tasks=st.sampled_from(SIZES[1:]))
def test_min_norm_is_optimal_to_the_rounding_of_the_gramian(family, seed, num_tasks):
    matrix = sample(family, seed, num_tasks)
    weights = np.asarray(min_norm(gram32(matrix)), np.float64)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    assert optimality_gap(matrix, weights) < 16

    # What follows from it: |d|^2 <= <d, d*> + 16 eps a (a + a*).
    exact = exact_min_norm(matrix)
    norm = np.linalg.norm(matrix, axis=1)
    arm, exact_arm = weights @ norm, exact @ norm
    excess = np.linalg.norm(matrix.T @ weights) - np.linalg.norm(matrix.T @ exact)
    assert excess <= np.sqrt(16 * EPS * arm * (arm + exact_arm))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), num_tasks=st.sampled_from(SIZES[1:]))
def test_min_norm_of_well_separated_rows_is_accurate_to_rounding(seed, num_tasks):
    """Where d* is not small beside the rows, |d| is right to eps rather than to its root."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(num_tasks, 12)) + 2 * np.ones(12)
    weights = np.asarray(min_norm(gram32(matrix)), np.float64)
    np.testing.assert_allclose(
        np.linalg.norm(matrix.T @ weights), np.linalg.norm(matrix.T @ exact_min_norm(matrix)), rtol=1e-6
    )


@settings(deadline=None, max_examples=30)
@given(
    norms=st.tuples(st.floats(0.01, 100.0), st.floats(0.01, 100.0)),
    angle=st.floats(0.05, np.pi - 0.05),
)
def test_two_tasks_have_a_closed_form(norms, angle):
    """w_1 = clip(<g_2, g_2 - g_1> / |g_1 - g_2|^2, 0, 1)."""
    matrix = np.array([[norms[0], 0.0], [norms[1] * np.cos(angle), norms[1] * np.sin(angle)]])
    first, second = matrix
    expected = np.clip(second @ (second - first) / ((first - second) @ (first - second)), 0.0, 1.0)
    weights = np.asarray(min_norm(gram32(matrix)), np.float64)
    # Compared as lengths of the two terms, w_k n_k: that is what float32 inner products determine.
    np.testing.assert_allclose(
        weights * norms, np.array([expected, 1 - expected]) * norms, atol=2e-4 * (weights @ np.array(norms))
    )


def test_two_tasks_by_hand():
    # (1, 0) and (0, 2): d = (4/5, 2/5) is orthogonal to g_1 - g_2 = (1, -2).
    np.testing.assert_allclose(min_norm(jnp.array([[1.0, 0.0], [0.0, 4.0]])), [0.8, 0.2], atol=1e-6)
    # (1, 0) and (3, 1): g_1 is the shortest point of the segment, as <g_1, g_2> = 3 > 1 = |g_1|^2.
    assert min_norm(jnp.array([[1.0, 3.0], [3.0, 10.0]])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("power", [-40, -10, 10, 40])
@pytest.mark.parametrize("family", ["normal", "row norms over six orders", "two camps"])
def test_min_norm_does_not_see_the_global_scale(family, power):
    """Exactly so for powers of two, hence G from 1e-24 to 1e24: no absolute epsilon anywhere."""
    matrix = sample(family, 3, 5)
    gramian = gram32(matrix)
    assert min_norm(gramian * 2.0 ** (2 * (power // 2))).tolist() == min_norm(gramian).tolist()


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1.0, 1e5, 1e10])
def test_min_norm_at_extreme_scales(scale):
    matrix = sample("stationary", 1, 8)
    weights = np.asarray(min_norm(gram32(scale * matrix)), np.float64)
    assert optimality_gap(matrix, weights) < 16


@pytest.mark.parametrize("ratio", [1e-8, 1e-4, 1.0, 1e4, 1e8])
def test_min_norm_of_two_orthogonal_rows_of_any_ratio(ratio):
    """w is proportional to 1 / n_k^2 for orthogonal rows; right to rounding in the terms w_k n_k of d."""
    norm = np.array([1.0, ratio])
    expected = norm[::-1] ** 2 / (norm @ norm)
    weights = np.asarray(min_norm(gram32(np.diag(norm))), np.float64)
    np.testing.assert_allclose(weights * norm, expected * norm, atol=16 * EPS * (expected @ norm))


def test_min_norm_of_rows_over_sixteen_orders_stays_on_the_shortest():
    norms = 10.0 ** np.linspace(-8, 8, 9)
    rng = np.random.default_rng(0)
    matrix = norms[:, None] * np.abs(rng.normal(size=(9, 20)))
    weights = np.asarray(min_norm(gram32(matrix)), np.float64)
    assert weights[0] == pytest.approx(1.0, abs=1e-6)
    assert np.linalg.norm(matrix.T @ weights) <= norms[0] * np.linalg.norm(matrix[0] / norms[0]) * (1 + 1e-6)


@pytest.mark.parametrize("num_params", [1, 5, 40, 200])
def test_min_norm_of_sixty_four_tasks(num_params):
    matrix = np.random.default_rng(num_params).normal(size=(64, num_params))
    weights = np.asarray(min_norm(gram32(matrix)), np.float64)
    assert optimality_gap(matrix, weights) < 16
    if num_params <= 5:  # the hull of so many points around the origin holds it
        assert np.linalg.norm(matrix.T @ weights) < 1e-3 * (weights @ np.linalg.norm(matrix, axis=1))


DEGENERATE = {
    # rows, norm of the shortest vector
    "one task": ([[3.0, 4.0]], 5.0),
    "identical": ([[1.0, 2.0, 2.0]] * 4, 3.0),
    "opposite": ([[1.0, 2.0], [-1.0, -2.0]], 0.0),
    "opposite, 1 to 3": ([[1.0, 2.0], [-3.0, -6.0]], 0.0),
    "collinear": ([[2.0, 0.0], [1.0, 0.0], [5.0, 0.0]], 1.0),
    "a zero row": ([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]], 0.0),
    "all zero": ([[0.0, 0.0]] * 3, 0.0),
    "one parameter, agreeing": ([[3.0], [2.0], [7.0]], 2.0),
    "one parameter, conflicting": ([[3.0], [-2.0], [7.0]], 0.0),
    "a triangle around the origin": ([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], 0.0),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_min_norm_of_degenerate_rows(case, scale):
    rows, length = DEGENERATE[case]
    matrix = scale * np.array(rows)
    weights = np.asarray(min_norm(gram32(matrix)), np.float64)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    size = scale * max(np.linalg.norm(rows, axis=1))
    assert np.linalg.norm(matrix.T @ weights) == pytest.approx(scale * length, abs=2e-6 * size)


def test_zero_rows_share_the_weight():
    assert min_norm(jnp.diag(jnp.array([0.0, 2.0, 0.0, 1.0]))).tolist() == [0.5, 0.0, 0.5, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_min_norm_of_a_gramian_that_is_not_finite_is_nan(bad):
    assert jnp.isnan(min_norm(jnp.eye(3).at[0, 1].set(bad))).all()
    assert jnp.isnan(min_norm(jnp.eye(3).at[2, 2].set(bad))).all()


def test_min_norm_under_vmap_is_the_loop():
    gramians = jnp.stack([gram32(sample(family, 7, 5)) for family in FAMILIES])
    batched = jax.jit(jax.vmap(solvers.min_norm_weights))(gramians)
    looped = jnp.stack([min_norm(gramian) for gramian in gramians])
    # The batched linear solver may round differently, which a stationary Gramian amplifies: compare the objective.
    norm = jnp.sqrt(jnp.diagonal(gramians, axis1=1, axis2=2))
    for weights in (batched, looped):
        objective = jnp.einsum("bi,bij,bj->b", weights, gramians, weights)
        reference = jnp.einsum("bi,bij,bj->b", looped, gramians, looped)
        arm = jnp.sum(weights * norm, 1)
        np.testing.assert_array_less(np.abs(objective - reference), 32 * EPS * arm**2)


def brute_force_qp(a, b):
    """min over x >= 0 of 1/2 x^T A x - b^T x for positive definite A: the best feasible one of all 2^K faces."""
    best = np.zeros(len(b))
    value = 0.0
    for size in range(1, len(b) + 1):
        for face in map(list, itertools.combinations(range(len(b)), size)):
            x = np.zeros(len(b))
            x[face] = np.linalg.solve(a[np.ix_(face, face)], b[face])
            if (x >= 0).all() and 0.5 * x @ a @ x - b @ x < value:
                best, value = x, 0.5 * x @ a @ x - b @ x
    return best


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from((1, 3, 8)), dtype=st.sampled_from(list(padded.DTYPES)))
def test_nonnegative_qp_equals_brute_force_over_faces(seed, size, dtype):
    rng, kind = np.random.default_rng(seed), padded.DTYPES[dtype][0]
    root = rng.normal(size=(size, size + 3))
    root /= np.linalg.norm(root, axis=1, keepdims=True)
    a, b = root @ root.T, rng.normal(size=size)
    expected = brute_force_qp(a, b)
    # An error of eps in A moves x by eps |A^-1| |x|.
    bound = 32 * np.finfo(kind).eps * np.linalg.cond(a) * (1 + np.abs(expected).sum())
    with padded.precision(dtype):
        x = qp(jnp.asarray(a, kind), jnp.asarray(b, kind))
    np.testing.assert_allclose(x, expected, atol=bound)


@pytest.mark.parametrize("dtype", padded.DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_nonnegative_qps_of_one_matrix_side_by_side(family, dtype):
    """The projections of all rows, against the best d* of a solver on the rows.

    |d - d*|^2 <= |d|^2 - |d*|^2, which the cosines leave undetermined by eps a (a + a*), a = 1 + sum_k x_k.
    """
    kind = padded.DTYPES[dtype][0]
    for seed, num_tasks in ((0, 8), (1, 8), (2, 8)):
        matrix = sample(family, seed, num_tasks)
        unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        with padded.precision(dtype):
            cosine = jnp.asarray(unit @ unit.T, kind)
            x = np.asarray(many(cosine, -cosine), np.float64)
        assert (x >= 0).all()
        direction, arm = unit + x @ unit, 1 + x.sum(1)
        assert (np.linalg.norm(direction, axis=1) <= 1 + 1e-3).all()
        for row, d, a in zip(unit, direction, arm, strict=True):
            best, multipliers = reference.project_on_cone(unit, row)
            assert d @ d - best @ best <= 16 * np.finfo(kind).eps * a * (a + 1 + multipliers.sum())


SLOW = pytest.mark.slow


@pytest.mark.parametrize("num_params", [1, *(pytest.param(n, marks=SLOW) for n in (20, 40, 64, 200))])
def test_nonnegative_qps_of_sixty_four_coordinates_are_optimal(num_params):
    """b - A x is zero where x is positive and at most zero elsewhere, to rounding; both for float32 and float64."""
    unit = np.random.default_rng(num_params).normal(size=(64, num_params))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for dtype, (kind, _) in padded.DTYPES.items():
        with padded.precision(dtype):
            cosine = np.asarray(unit @ unit.T, kind)
            x = np.asarray(many(cosine, -cosine), np.float64)
        rest = (-cosine - x @ cosine) / (1 + x.sum(1, keepdims=True)) / np.finfo(kind).eps
        assert rest.max() < 32
        assert np.abs(np.where(x > 0, rest, 0.0)).max() < 32


def test_nonnegative_qp_of_an_unbounded_problem_is_large_and_finite():
    """x_1 = x_2 = t costs nothing and gains t."""
    x = qp(jnp.array([[1.0, -1.0], [-1.0, 1.0]]), jnp.array([1.0, 0.0]))
    assert (jnp.isfinite(x) & (x > 1e4)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonnegative_qp_of_what_is_not_finite_is_nan(bad):
    assert jnp.isnan(qp(jnp.eye(3).at[0, 1].set(bad), jnp.ones(3))).all()
    assert jnp.isnan(qp(jnp.eye(3), jnp.ones(3).at[1].set(bad))).all()


def test_nonnegative_qp_is_zero_where_nothing_pays():
    assert qp(jnp.eye(3), jnp.array([-1.0, 0.0, -2.0])).tolist() == [0.0, 0.0, 0.0]


def test_nonnegative_qp_by_hand():
    # Unconstrained: x = (4, -2) / 3; the second is cut off, and x_1 = b_1 / a_11.
    np.testing.assert_allclose(qp(jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([2.0, 0.0])), [1.0, 0.0], atol=1e-6)


def test_nonnegative_qp_leaves_no_cycle_on_opposite_coordinates():
    """Rows 0 and 2 are opposite and a thousand times longer than row 1: the case that used to run into the bound."""
    matrix = np.array([[1e3, 2e3], [1e-1, 1e-1], [-3e3, -6e3]])
    weights = np.asarray(min_norm(gram32(matrix)), np.float64)
    assert optimality_gap(matrix, weights) < 16


# Tasks that are left out, and float64.


def test_min_norm_of_the_rows_that_are_present_is_as_without_the_others():
    masked = jax.jit(solvers.min_norm_weights)
    for seed, family in enumerate(FAMILIES):
        matrix = sample(family, seed, 5)
        at = np.sort(np.random.default_rng(seed).choice(8, 5, replace=False))
        gramian = np.zeros((8, 8), np.float32)
        gramian[np.ix_(at, at)] = gram32(matrix)
        weights = np.asarray(masked(gramian, jnp.zeros(8, bool).at[at].set(True)), np.float64)
        assert weights.sum() == pytest.approx(1.0, abs=1e-6)
        assert (np.delete(weights, at) == 0).all()
        assert optimality_gap(matrix, weights[at]) < 16
    assert masked(jnp.zeros((8, 8)), jnp.zeros(8, bool)).tolist() == [0.0] * 8
    # A zero row that is present takes all the weight, absent ones none.
    gramian = jnp.zeros((8, 8)).at[1, 1].set(4.0)
    assert masked(gramian, jnp.arange(8) < 2).tolist() == [1.0] + [0.0] * 7
    assert masked(gramian, jnp.arange(8) == 1).tolist() == [0.0, 1.0] + [0.0] * 6


@pytest.mark.parametrize("family", FAMILIES)
def test_min_norm_in_float64(family):
    for seed in range(3):
        matrix = sample(family, seed, 8)
        with jax.enable_x64(True):
            weights = min_norm(jnp.asarray(matrix @ matrix.T))
            assert weights.dtype == jnp.float64
            weights = np.asarray(weights)
        assert optimality_gap(matrix, weights) < 16 * 2.0**-29  # in units of float32's eps


# Cosines and cones.


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_row_normalized_gives_cosines_at_any_scale(scale):
    matrix = sample("row norms over six orders", 0, 5)
    matrix[3] = 0
    norm, cosine = jax.jit(solvers.row_normalized)(gram32(scale * matrix))
    exact = np.linalg.norm(matrix, axis=1)
    unit = matrix / np.where(exact > 0, exact, 1.0)[:, None]
    np.testing.assert_allclose(norm, scale * exact, rtol=1e-6)
    np.testing.assert_allclose(cosine, unit @ unit.T, atol=4 * EPS)
    assert jnp.diagonal(cosine).tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_row_normalized_does_not_hide_what_is_not_finite(bad):
    for entry in ((0, 1), (1, 1)):
        norm, cosine = solvers.row_normalized(jnp.eye(2).at[entry].set(bad))
        assert jnp.isnan(norm).all()
        assert jnp.isnan(cosine).all()


@pytest.mark.parametrize("dtype", padded.DTYPES)
def test_cone_projection_is_that_of_the_rows(dtype):
    rng = np.random.default_rng(0)
    kind = padded.DTYPES[dtype][0]
    errors = {}
    for case, (matrix, _, _) in CASES.items():
        size = 10 if len(matrix) <= 10 else 64
        rows, u = np.zeros((size, matrix.shape[1])), np.zeros(size)
        rows[: len(matrix)], u[: len(matrix)] = matrix, rng.integers(-4, 8, len(matrix)) / 4
        with padded.precision(dtype):
            v = cone(jnp.asarray(rows.astype(kind) @ rows.T.astype(kind)), jnp.asarray(u, kind))
        v = np.asarray(v, np.float64)
        assert (v >= u).all()
        target = rows.T @ u
        if np.linalg.norm(target) <= 1e-13 * (np.abs(u) @ np.linalg.norm(rows, axis=1)):
            target = 0 * target
        y, multipliers = reference.project_on_cone(rows, target)
        scale = (np.abs(u) + multipliers) @ np.linalg.norm(rows, axis=1)
        errors[case] = padded.error(rows, v, reference.Reference(y, scale), dtype)
    assert max(errors.values()) < 1, errors


def test_cone_projection_by_hand():
    # (2, 0) hurts (-1, 1): <., .> = -2, and + 2/2 (-1, 1) makes it (1, 1). (0.5, 1.5) hurts neither.
    gramian = gram32(np.array([[2.0, 0.0], [-1.0, 1.0]]))
    np.testing.assert_allclose(cone(gramian, jnp.array([1.0, 0.0])), [1.0, 1.0], atol=1e-6)
    assert cone(gramian, jnp.array([1.0, 1.5])).tolist() == [1.0, 1.5]
    assert cone(gramian, jnp.zeros(2)).tolist() == [0.0, 0.0]


# The simplex.


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from((1, 3, 8)),
    spread=st.sampled_from([1e-6, 0.1, 1.0, 10.0, 1e6, 1e30]),
    dtype=st.sampled_from(list(padded.DTYPES)),
)
def test_simplex_projection_is_the_nearest_point(seed, size, spread, dtype):
    """<v - w, e_k - w> <= 0 for every corner e_k of the simplex."""
    kind = padded.DTYPES[dtype][0]
    v = (spread * np.random.default_rng(seed).normal(size=size)).astype(kind)
    with padded.precision(dtype):
        w = np.asarray(project(jnp.asarray(v)), np.float64)
    v = v.astype(np.float64)
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1.0, abs=8 * float(np.finfo(kind).eps))
    difference = v - w
    assert (difference - difference @ w).max() <= 8 * np.finfo(kind).eps * (1 + np.abs(v).max())


def test_simplex_projection_by_hand():
    # theta = (0.9 + 0.5 - 1) / 2 = 0.2 leaves 0.7 and 0.3, and -1 is below it.
    np.testing.assert_allclose(project(jnp.array([0.9, -1.0, 0.5])), [0.7, 0.0, 0.3], atol=1e-6)
    assert project(jnp.array([0.25, 0.5, 0.25])).tolist() == [0.25, 0.5, 0.25]
    assert project(jnp.array([5.0, 1.0, 4.5])).tolist() == [0.75, 0.0, 0.25]
    np.testing.assert_allclose(project(jnp.full(3, 7.0)), np.full(3, 1 / 3), rtol=1e-6)
    assert project(jnp.array([1e30, 0.0, -1e30])).tolist() == [1.0, 0.0, 0.0]


def test_simplex_projection_of_what_is_present():
    v, present = jnp.array([9.0, 0.9, np.nan, -1.0, 0.5]), jnp.array([False, True, False, True, True])
    np.testing.assert_allclose(project(v, present), [0.0, 0.7, 0.0, 0.0, 0.3], atol=1e-6)
    assert project(v, jnp.zeros(5, bool)).tolist() == [0.0] * 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_simplex_projection_of_what_is_not_finite_is_nan(bad):
    assert jnp.isnan(project(jnp.array([0.0, bad, 1.0]))).all()
