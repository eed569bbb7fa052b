"""The references solve what the definitions say: optimality conditions, values by hand, other routes to the same.

And the cases are what their labels say.

Letters: K tasks, P parameters; g_k the rows of J, n_k their norms, u_k = g_k / n_k.
"""

import itertools

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from . import cases, reference
from .cases import CASES
from .reference import REFERENCES

EVERY_CASE = pytest.mark.parametrize("case", CASES)
SAMPLERS = {
    "normal": cases.normal,
    "strong": cases.strongly_stationary,
    "weak": cases.weakly_stationary,
    "none": cases.non_stationary,
}
TIGHT = 1e-10


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More of them only get in one another's way on matrices of this size. (Comes with scikit-learn.)"""
    with threadpoolctl.threadpool_limits(1):
        yield


def norms(matrix):
    return np.linalg.norm(matrix, axis=1)


def units(matrix):
    norm = norms(matrix)
    return matrix / np.where(norm > 0, norm, 1.0)[:, None]


def samples(max_tasks=6):
    """Matrices of every sampler, their rows over four orders of magnitude where that keeps them exact."""

    def draw(kind, num_tasks, num_params, seed):
        rng = np.random.default_rng(seed)
        matrix = SAMPLERS[kind](rng, num_tasks, num_params)
        return matrix * 2.0 ** rng.integers(-6, 7, (num_tasks, 1))

    return st.builds(
        draw, st.sampled_from(list(SAMPLERS)), st.integers(3, max_tasks), st.integers(2, 8), st.integers(0, 2**32 - 1)
    )


# The cases.


def kind_of(matrix):
    """By linear programming: the largest t such that some v >= t has U^T v = 0 and sum_k v_k = 1."""
    num_tasks, num_params = matrix.shape
    equal = np.block([[units(matrix).T, np.zeros((num_params, 1))], [np.ones((1, num_tasks)), np.zeros((1, 1))]])
    result = linprog(
        np.r_[np.zeros(num_tasks), -1.0],
        A_ub=np.column_stack([-np.eye(num_tasks), np.ones(num_tasks)]),
        b_ub=np.zeros(num_tasks),
        A_eq=equal,
        b_eq=np.r_[np.zeros(num_params), 1.0],
        bounds=[(0, None)] * num_tasks + [(None, None)],
    )
    return "none" if result.status == 2 else ("strong" if -result.fun > 1e-5 else "weak")


@EVERY_CASE
def test_cases_are_exact_in_float32_and_of_the_kind_they_say(case):
    matrix, kind, _ = CASES[case]
    np.testing.assert_array_equal(matrix, matrix.astype(np.float32).astype(np.float64))
    assert kind_of(matrix) == kind
    held = reference.stuck(matrix)
    assert kind == ("strong" if held.all() else "weak" if held.any() else "none")


def test_the_table_is_deterministic():
    for case, again in zip(CASES.values(), cases._table().values(), strict=True):
        np.testing.assert_array_equal(case.matrix, again.matrix)


@pytest.mark.parametrize("kind", ["strong", "weak", "none"])
@settings(deadline=None, max_examples=15)
@given(num_tasks=st.integers(3, 12), num_params=st.integers(2, 40), seed=st.integers(0, 2**32 - 1))
def test_samplers_give_the_kind_they_say(kind, num_tasks, num_params, seed):
    matrix = SAMPLERS[kind](np.random.default_rng(seed), num_tasks, num_params)
    assert matrix.shape == (num_tasks, num_params)
    np.testing.assert_array_equal(matrix, matrix.astype(np.float32).astype(np.float64))
    assert kind_of(matrix) == kind


@pytest.mark.parametrize("rank", range(5))
def test_normal_has_the_rank_asked_for(rank, rng):
    assert np.linalg.matrix_rank(cases.normal(rng, 6, 4, rank)) == rank


# All references.


@pytest.mark.parametrize("name", REFERENCES)
def test_directions_are_finite_and_combine_the_rows(name):
    for case, (matrix, _, _) in CASES.items():
        if name == "krum" and len(matrix) < 3:
            continue
        ours = REFERENCES[name](matrix)
        assert ours.d.shape == matrix.shape[1:]
        assert np.isfinite(ours.d).all(), case
        assert np.linalg.norm(ours.d) <= ours.scale * (1 + 1e-12), case
        if ours.weights is not None:
            combined = matrix.T @ ours.weights
            np.testing.assert_allclose(combined, ours.d, rtol=0, atol=1e-12 * ours.scale, err_msg=case)


@pytest.mark.parametrize("case", ["normal 5x5", "weakly stationary 4x6", "strongly stationary 4x6", "two camps"])
@pytest.mark.parametrize("name", REFERENCES)
def test_scale_equivariance(name, case):
    """Nash-MTL and FairGrad with alpha = 1 do not depend on the scale, the others are proportional to it."""
    matrix, factor = CASES[case].matrix, 1.0 if name in ("nash", "fairgrad") else 2.0**-40
    ours, scaled = REFERENCES[name](matrix), REFERENCES[name](2.0**-40 * matrix)
    np.testing.assert_allclose(scaled.d, factor * ours.d, rtol=0, atol=1e-12 * factor * ours.scale)
    assert scaled.scale == pytest.approx(factor * ours.scale)


# Projections on cones and minimum-norm problems.


def by_enumeration(rows, x):
    """Projection on {y: rows y >= 0}: the nearest feasible one of the projections on the orthogonal complements."""
    rows, best = units(rows), None
    for size in range(len(rows) + 1):
        for active in itertools.combinations(range(len(rows)), size):
            chosen = rows[list(active)]
            y = x - np.linalg.pinv(chosen, rcond=1e-9) @ (chosen @ x)
            nearer = best is None or np.linalg.norm(y - x) < np.linalg.norm(best - x)
            if nearer and (rows @ y >= -1e-9 * np.linalg.norm(x)).all():
                best = y
    return best


@settings(deadline=None, max_examples=25)
@given(samples(), st.integers(0, 2**32 - 1))
def test_projection_by_enumeration_of_active_sets(matrix, seed):
    x = np.random.default_rng(seed).normal(size=matrix.shape[1])
    y, v = reference.project_on_cone(matrix, x)
    np.testing.assert_allclose(y, by_enumeration(matrix, x), atol=1e-9)
    assert (v >= 0).all()
    np.testing.assert_allclose(y, x + v @ matrix, atol=1e-11)


@EVERY_CASE
def test_dual_proj_satisfies_its_optimality_conditions(case):
    """d = g_0 + J^T v with v >= 0, J d >= 0 and v_k <g_k, d> = 0."""
    matrix = CASES[case].matrix
    ours = reference.dual_proj(matrix)
    slack, push = units(matrix) @ ours.d, (ours.weights - 1 / len(matrix)) * norms(matrix)
    assert slack.min() >= -1e-13 * ours.scale
    assert push.min() >= -1e-13 * ours.scale
    assert np.abs(slack * push).max() <= 1e-13 * ours.scale**2


@EVERY_CASE
def test_upgrad_hurts_no_task_and_is_the_mean_of_projections(case):
    matrix, kind, _ = CASES[case]
    ours = reference.upgrad(matrix)
    assert (units(matrix) @ ours.d).min() >= -1e-13 * ours.scale
    assert (ours.d == 0).all() == (kind == "strong")
    if len(matrix) <= 5 and "nearly" not in case:  # where the enumeration cannot tell which candidates are feasible
        expected = np.mean([by_enumeration(matrix, row) for row in matrix], 0)
        np.testing.assert_allclose(ours.d, expected, rtol=0, atol=1e-9 * norms(matrix).max())


@EVERY_CASE
def test_mgda_satisfies_its_optimality_conditions(case):
    """w in the simplex and <g_k, d> >= |d|^2 for all k; d = 0 exactly where J is stationary."""
    matrix, kind, _ = CASES[case]
    ours = reference.mgda(matrix)
    assert (ours.weights >= 0).all()
    assert ours.weights.sum() == pytest.approx(1, rel=1e-12)
    length = np.linalg.norm(ours.d)
    assert (matrix @ ours.d - length**2 >= -TIGHT * length * norms(matrix)).all()
    assert (length == 0) == (kind != "none")


@settings(deadline=None, max_examples=25)
@given(samples(max_tasks=12))
def test_mgda_on_samples(matrix):
    ours = reference.mgda(matrix)
    length = np.linalg.norm(ours.d)
    assert (ours.weights >= 0).all()
    np.testing.assert_allclose(matrix.T @ ours.weights, ours.d, rtol=0, atol=1e-12 * ours.scale)
    assert (matrix @ ours.d - length**2 >= -TIGHT * length * norms(matrix)).all()
    assert (length == 0) == reference.stuck(matrix).any()


@EVERY_CASE
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.9])
def test_pcd_satisfies_its_optimality_conditions(case, tau):
    """d ~ u_1 + sum_k v_k u_k with v >= 0, <u_k, d> >= tau and v_k (<u_k, d> - tau) = 0 for k > 1, before rescaling."""
    matrix = CASES[case].matrix
    ours = reference.pcd(matrix, tau)
    norm, unit = norms(matrix), units(matrix)
    if norm[0] == 0:
        assert (ours.d == 0).all()
    elif "contradictory" in ours.note:
        np.testing.assert_array_equal(ours.d, matrix[0])
        # min t with <u_k, d> + t >= tau is above 0.
        others = unit[1:][norm[1:] > 0]
        slack = linprog(
            np.r_[np.zeros(matrix.shape[1]), 1.0],
            A_ub=-np.column_stack([others, np.ones(len(others))]),
            b_ub=np.full(len(others), -tau),
            bounds=(None, None),
        )
        assert slack.fun > 1e-3 * tau
    elif ours.d.any():
        factor = ours.weights[0] * norm[0]
        d, push = ours.d / factor, ours.weights[1:] * norm[1:] / factor
        slack = (unit[1:] @ d - tau)[norm[1:] > 0]
        assert np.linalg.norm(ours.d) == pytest.approx(norm[0], rel=1e-12)
        assert slack.min(initial=0) >= -1e-11 * (1 + push.sum())
        assert push.min(initial=0) >= 0
        assert np.abs(push[norm[1:] > 0] * slack).max(initial=0) <= 1e-11 * (1 + push.sum())


@EVERY_CASE
@pytest.mark.parametrize("c", [0.0, 0.2, 0.5, 1.0, 2.0])
def test_cagrad_satisfies_its_optimality_conditions(case, c):
    """A saddle point: d = g_0 + c |g_0| g_w / |g_w|, and w only where <g_k, d> is least; or 0 where g_w = 0."""
    matrix = CASES[case].matrix
    mean, norm = matrix.mean(0), norms(matrix)
    ours = reference.cagrad(matrix, c)
    radius = c * np.linalg.norm(mean)
    step = np.linalg.norm(ours.d - mean)
    assert step <= radius + 1e-12 * ours.scale
    if "zero" in ours.note or c == 0:
        return
    if not ours.unique:
        assert reference.stuck(matrix).any()
        assert (units(matrix) @ ours.d).min() >= -1e-13 * ours.scale
        return
    assert step == pytest.approx(radius, rel=TIGHT)
    w = ours.weights - 1 / len(matrix)
    assert (w >= -1e-15 * w.max()).all()
    worst = (matrix @ ours.d).min()
    held = w * norm > TIGHT * (w @ norm)
    slack = (matrix @ ours.d - worst)[held] / norm[held]
    assert slack.max() <= TIGHT * step + 1e-13 * ours.scale
    along = w @ matrix / np.linalg.norm(w @ matrix) * step
    np.testing.assert_allclose(along, ours.d - mean, rtol=0, atol=TIGHT * step + 1e-13 * ours.scale)


# Nash-MTL and FairGrad.


@EVERY_CASE
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_solves_its_equations(case, alpha):
    """d = sum_k <g_k, d>^-alpha g_k: exact up to a change of <u_k, d> by rounding, 1e-15 |d|."""
    matrix, kind, _ = CASES[case]
    ours = reference.fairgrad(matrix, alpha)
    assert ours.limit == (kind != "none")
    if kind == "strong":
        assert (ours.d == 0).all()
    elif kind == "none":
        progress = matrix @ ours.d
        assert (progress > 0).all()
        terms = progress**-alpha * norms(matrix)
        doubt = alpha * 1e-15 * np.linalg.norm(ours.d) * norms(matrix) / progress
        residual = np.linalg.norm(terms @ units(matrix) - ours.d)
        assert residual <= terms @ (1e-12 + doubt)
        np.testing.assert_allclose(ours.weights, progress**-alpha, rtol=1e-10 + 10 * doubt.max())
        if alpha == 1:
            assert np.linalg.norm(ours.d) == pytest.approx(np.sqrt(len(matrix)), rel=TIGHT)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].kind == "weak"])
def test_the_limit_of_fairgrad_is_that_of_a_ridge(case, alpha):
    """G + eps diag(n^2) is the Gramian of [J, sqrt(eps) diag(n)], which has a solution; zero rows are left out."""
    matrix = CASES[case].matrix
    limit = reference.fairgrad(matrix, alpha)
    kept = matrix[norms(matrix) > 0]
    errors = []
    for root in (1e-2, 1e-4, 1e-6):
        ridge = reference.fairgrad(np.column_stack([kept, root * np.diag(norms(kept))]), alpha)
        errors.append(np.linalg.norm(ridge.d[: matrix.shape[1]] - limit.d) / limit.scale)
    # The error falls as eps^(1 / (1 + alpha)).
    assert errors[2] <= 3 * 1e-6 ** (2 / (1 + alpha)) + 1e-9
    assert errors[2] <= 0.5 * errors[0] + 1e-9


def test_nash_clips():
    exact = reference.nash(CASES["normal 4x6"].matrix)
    clipped = reference.nash(CASES["normal 4x6"].matrix, max_norm=1.0)
    np.testing.assert_allclose(clipped.d, exact.d / 2)
    np.testing.assert_allclose(clipped.weights, exact.weights / 2)


# Linear algebra.


@EVERY_CASE
def test_imtl_g_projects_equally_on_all_unit_gradients(case):
    matrix = CASES[case].matrix
    ours = reference.imtl_g(matrix)
    if ours.unique and not ours.limit:
        assert ours.weights.sum() == pytest.approx(1, abs=1e-9 * np.abs(ours.weights).sum())
        norm = norms(matrix)
        if norm.max() < 1e10 * norm[norm > 0].min():  # else G^+ of unnormalised rows loses their rank
            other = reference.imtl_g(matrix, "gramian")
            np.testing.assert_allclose(other.d, ours.d, rtol=0, atol=1e-9 * max(ours.scale, other.scale))
        assert np.ptp(units(matrix)[norm > 0] @ ours.d) <= TIGHT * np.linalg.norm(ours.d) + 1e-14 * ours.scale


@pytest.mark.parametrize("case", ["normal 4x6", "normal 4x6 of rank 2", "collinear", "one parameter, conflicting"])
def test_imtl_g_by_the_pseudo_inverse(case):
    matrix = CASES[case].matrix
    gram, norm = matrix @ matrix.T, norms(matrix)
    for pinv, v in (
        ("cosine", np.linalg.pinv(gram / np.outer(norm, norm), 1e-9, hermitian=True).sum(1) / norm),
        ("gramian", np.linalg.pinv(gram, 1e-9, hermitian=True) @ norm),
    ):
        np.testing.assert_allclose(reference.imtl_g(matrix, pinv).weights, v / v.sum(), rtol=1e-8)


@EVERY_CASE
@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_aligned_mtl_combines_orthogonal_directions_of_one_length(case, mode):
    """Over all w, d = A w with A^T A = s^2 x a projection of the rank of J, and d = s J^T G^(-1/2) w."""
    matrix = CASES[case].matrix
    if not matrix.any() or len(matrix) > 20:
        return
    columns = [reference.aligned_mtl(matrix, mode, one) for one in np.eye(len(matrix))]
    aligned = np.array([column.d for column in columns])
    values = np.linalg.svd(aligned, compute_uv=False)
    rank = int((values > 1e-3 * values[0]).sum())
    np.testing.assert_allclose(values[:rank], values[0], rtol=TIGHT)
    np.testing.assert_allclose(values[rank:], 0, atol=TIGHT * values[0])
    sigma = np.linalg.svd(matrix, compute_uv=False)[:rank]
    lower_median = sigma[rank // 2]
    expected = {"min": sigma[-1], "median": lower_median, "rmse": np.sqrt((sigma**2).mean())}[mode]
    assert values[0] == pytest.approx(expected, rel=TIGHT)
    # Of all such A it is the polar factor of J: A J^T is symmetric and positive semidefinite.
    product = aligned @ matrix.T
    np.testing.assert_allclose(product, product.T, atol=1e-12 * np.abs(product).max())
    assert np.linalg.eigvalsh(product).min() >= -1e-12 * np.abs(product).max()


@EVERY_CASE
def test_config_has_equal_cosines_and_the_summed_length(case):
    matrix = CASES[case].matrix
    ours = reference.config(matrix)
    length = np.linalg.norm(ours.d)
    if length > 1e-12 * ours.scale:
        towards = ours.d / length
        assert abs((matrix @ towards).sum()) == pytest.approx(length, rel=TIGHT, abs=1e-12 * norms(matrix).sum())
        if np.linalg.matrix_rank(units(matrix)) == len(matrix):
            assert np.ptp(units(matrix) @ towards) <= TIGHT


# Surgery and selection.


def test_gradvac_reaches_its_target_cosine(rng):
    """Two tasks: each ends at the target angle from the other, with its part orthogonal to the other unchanged."""
    matrix = np.array([[3.0, 0.0], [-1.0, 1.0]])
    ours, targets = reference.gradvac(matrix, targets=np.full((2, 2), 0.6), beta=0.25)
    # g_1 against g_2: its part orthogonal to u_2 is (1.5, 1.5), of length 4.5^(1/2); at cosine 0.6 the part along u_2
    # is 3/4 of that length. g_2 against u_1 = (1, 0): orthogonal part (0, 1), along 3/4.
    first = np.array([1.5, 1.5]) + 0.75 * np.sqrt(4.5) * np.array([-1.0, 1.0]) / np.sqrt(2)
    second = np.array([0.75, 1.0])
    np.testing.assert_allclose(ours.d, first + second, rtol=1e-12)
    expected = 0.75 * 0.6 + 0.25 * -np.sqrt(0.5)
    np.testing.assert_allclose(targets, [[0.6, expected], [expected, 0.6]], rtol=1e-12)


def test_pcgrad_follows_its_order():
    """For three tasks in the plane the result depends on the order, by arithmetic."""
    matrix = np.array([[1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0]])
    # Task 1, then 2: g_1' = (1, 0) + 1/2 (-1, 1) = (1/2, 1/2); <g_1', g_3> = -3/2, |g_3|^2 = 5: + 3/10 (-1, -2)
    #   = (1/5, -1/10).  Then 2 after 3: <g_1, g_3> = -1: (1, 0) + 1/5 (-1, -2) = (4/5, -2/5);
    #   <., g_2> = -6/5: + 3/5 (-1, 1) = (1/5, 1/5).
    # Task 2: with 1: (-1, 1) + (1, 0) = (0, 1); with 3: -2 < 0: + 2/5 (-1, -2) = (-2/5, 1/5).
    # Task 3: with 1: (-1, -2) + (1, 0) = (0, -2); with 2: -2: + (-1, 1) = (-1, -1).
    rest = np.array([-2 / 5 - 1, 1 / 5 - 1])
    ours = reference.pcgrad(matrix, [(0, 1, 2), (0, 1, 2), (0, 1, 2)])
    np.testing.assert_allclose(ours.d, np.array([1 / 5, -1 / 10]) + rest, rtol=1e-12)
    ours = reference.pcgrad(matrix, [(2, 1, 0), (0, 1, 2), (0, 1, 2)])
    np.testing.assert_allclose(ours.d, np.array([1 / 5, 1 / 5]) + rest, rtol=1e-12)


def test_krum_takes_the_row_in_the_densest_place():
    matrix = np.array([[0.0], [1.0], [2.0], [10.0], [2.5]])
    # One byzantine: sums over the 2 nearest, squared: 0: 1 + 4; 1: 1 + 1; 2: 1/4 + 1; 10: 56.25 + 64; 2.5: 1/4 + 2.25.
    assert reference.krum(matrix, 1).d == 2.0
    assert reference.krum(matrix, 1, num_selected=2).d == pytest.approx(1.5)
    # Without the squares: 1 + 2, 1 + 1, 1/2 + 1, ..., 1/2 + 3/2: 1 and 2.5 tie for the second place.
    assert reference.krum(matrix, 1, squared=False).unique
    assert not reference.krum(matrix, 1, num_selected=2, squared=False).unique
    with pytest.raises(ValueError, match="needs num_byzantine"):
        reference.krum(matrix, 3)


# By hand, for two tasks.

ORTHOGONAL = np.array([[1.0, 0.0], [0.0, 2.0]])
CONFLICT = np.array([[1.0, 0.0], [-1.0, 1.0]])
PYTHAGORAS = np.array([[1.0, 0.0], [-3.0, 4.0]])
HAND = {
    # w ~ 1 / n^2
    "mgda": (ORTHOGONAL, {}, [0.8, 0.4]),
    # g_1 + 1/2 g_2 = (1/2, 1/2) and g_2 + g_1 = (0, 1), halved
    "upgrad": (CONFLICT, {}, [0.25, 0.75]),
    # the mean (-1, 2) has -1 along g_1
    "dual_proj": (PYTHAGORAS, {}, [0.0, 2.0]),
    # a_k (a_k - a_j / 2^(1/2)) = 1 for both: a^2 = 2 / (2 - 2^(1/2)), d = a (u_1 + u_2)
    "nash": (CONFLICT, {}, np.sqrt(2 / (2 - 2**0.5)) * np.array([1 - 0.5**0.5, 0.5**0.5])),
    # n_k^2 w_k = w_k^(-1/2): w = n^(-4/3), d_k = n^(-1/3)
    "fairgrad": (ORTHOGONAL, {"alpha": 2.0}, [1.0, 2 ** (-1 / 3)]),
    # g_0 = (1/2, 1/2), and so is g_w for equal weights, by symmetry
    "cagrad": (np.eye(2), {"c": 0.4}, [0.7, 0.7]),
    # equal projections t, weights t and t/2
    "imtl_g": (ORTHOGONAL, {}, [2 / 3, 2 / 3]),
    # both axes with the lesser singular value
    "aligned_mtl": (ORTHOGONAL, {}, [1.0, 1.0]),
    # x = (1, 1), of which the gradients have 1 + 2
    "config": (ORTHOGONAL, {}, [1.5, 1.5]),
    # each loses its part along the other: (1/2, 1/2) + (0, 1)
    "pcgrad": (CONFLICT, {}, [0.5, 1.5]),
    # <u_2, u_1> = -0.6: u_1 + 0.62 (-0.6, 0.8) = (0.628, 0.496), rescaled to 1
    "pcd": (PYTHAGORAS, {}, np.array([0.628, 0.496]) / np.hypot(0.628, 0.496)),
}


@pytest.mark.parametrize("name", HAND)
def test_hand_worked_values(name):
    matrix, hyper, expected = HAND[name]
    np.testing.assert_allclose(REFERENCES[name](matrix, **hyper).d, expected, rtol=1e-12, atol=1e-15)


# Said explicitly: no solution, or several.


def test_where_there_is_no_solution_or_more_than_one_it_is_said():
    opposite, zero_row = CASES["opposite, 1 to 3"].matrix, CASES["a zero row"].matrix
    assert reference.nash(opposite).limit
    assert "2 of 2" in reference.nash(opposite).note
    # The others go on without the zero row.
    np.testing.assert_allclose(reference.nash(zero_row).d, reference.nash(zero_row[[0, 2, 3]]).d, rtol=1e-9)
    # Equal projections on u and -u are zero, whatever the weights: the pseudo-inverse gives none.
    assert reference.imtl_g(opposite).limit
    assert not reference.imtl_g(CASES["collinear"].matrix).unique
    # CAGrad with a zero row that takes all of w: every direction of the ball that hurts no task.
    assert not reference.cagrad(zero_row).unique
    # Three secondaries, two of them opposite.
    assert "contradictory" in reference.pcd(CASES["opposite, two against two"].matrix).note
    assert not reference.krum(CASES["identical"].matrix).unique
