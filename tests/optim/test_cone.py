"""Projections on the cone that hurts no task, against least squares on the rows in float64; priorities of PCD.

Letters: K tasks, P parameters; g_k rows of the Jacobian J, n_k their norms; d the update; C = {d : J d >= 0}.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.optim.cone import dual_proj, pcd, upgrad

from . import padded, reference
from .cases import CASES

UPGRAD, DUAL_PROJ, PCD, PCD_ZERO = upgrad(), dual_proj(), pcd(), pcd(0.0)
METHODS = {"upgrad": UPGRAD, "dual_proj": DUAL_PROJ, "pcd": PCD}
EVERY_DTYPE = pytest.mark.parametrize("dtype", padded.DTYPES)
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
K, P = 5, 7


def run(method, rows, dtype="float32", **rest):
    """d of the first step."""
    rows = np.asarray(rows, np.float64)
    return padded.weights_of(method.weighting, rows, dtype=dtype, **rest)[0] @ rows


def random_rows(seed, num_tasks=K, num_params=P, spread=1.0):
    """Gradients that conflict in more than half of all pairs."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_tasks, num_params)) - 0.3 * rng.normal(size=num_params) * np.arange(num_tasks)[:, None]
    return rows * 10 ** rng.uniform(-spread, spread, (num_tasks, 1))


# All of them.


@EVERY_DTYPE
@EVERY_METHOD
def test_direction_is_that_of_the_reference_on_every_case(name, dtype):
    errors = {}
    for case, (matrix, _, _) in CASES.items():
        expected = reference.REFERENCES[name](matrix)
        weights, _ = padded.weights_of(METHODS[name].weighting, matrix, dtype=dtype)
        errors[case] = padded.error(matrix, weights, expected, dtype)
    # |d~|^2 is 5 eps of what cancels in it: float32 knows its direction to a percent, and only just that it is not 0.
    if name == "pcd" and dtype == "float32":
        assert errors.pop("strongly stationary, weights 1 to 1000") < 30
    assert max(errors.values()) < 1, errors


@EVERY_METHOD
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-30, 30))
def test_scale_equivariance(name, seed, power):
    """Exactly so for powers of two: there is no absolute number anywhere."""
    rows = random_rows(seed).astype(np.float32)
    scaled = padded.weights_of(METHODS[name].weighting, 2.0**power * rows)[0]
    np.testing.assert_array_equal(scaled, padded.weights_of(METHODS[name].weighting, rows)[0])


@pytest.mark.parametrize("name", ["upgrad", "dual_proj"])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_order_of_tasks_does_not_matter(name, seed):
    rows = random_rows(seed)
    order = np.random.default_rng(seed).permutation(K)
    direction = run(METHODS[name], rows)
    size = np.linalg.norm(rows, axis=1).sum()
    np.testing.assert_allclose(run(METHODS[name], rows[order]), direction, atol=1e-5 * size)


@EVERY_METHOD
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_tasks_that_are_present_get_what_they_would_get_alone(name, seed):
    rows = random_rows(seed)
    # The primary task of PCD stays the first.
    rest = np.random.default_rng(seed).choice(np.arange(1, 10), K - 1, replace=False)
    at = np.r_[0, np.sort(rest)]
    alone, _ = padded.weights_of(METHODS[name].weighting, rows, size=K)
    among, _ = padded.weights_of(METHODS[name].weighting, rows, at=at)
    norm = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(among * norm, alone * norm, atol=1e-5 * (alone @ norm))


@EVERY_METHOD
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gramian_that_is_not_finite_gives_nan(name, bad):
    weighting, present = METHODS[name].weighting, jnp.ones(10, bool)
    for entry in ((0, 1), (2, 2)):
        gramian = jnp.eye(10).at[entry].set(bad)
        weights, _ = padded.jitted(weighting.weigh)(gramian, jnp.ones(10), weighting.init(10), present)
        assert jnp.isnan(weights).all()


@EVERY_METHOD
def test_no_task_present_is_no_update(name):
    weighting = METHODS[name].weighting
    gramian, absent = jnp.zeros((10, 10)), jnp.zeros(10, bool)
    weights, _ = padded.jitted(weighting.weigh)(gramian, jnp.zeros(10), weighting.init(10), absent)
    assert weights.tolist() == [0.0] * 10


G = np.array([1.0, -2.0, 2.0])  # of length 3


@EVERY_METHOD
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize(
    ("rows", "upgrad", "dual_proj", "pcd"),
    [
        ([G], G, G, G),
        ([G, G, G], G, G, G),
        ([G, -G], 0 * G, 0 * G, -G),  # PCD: tau = 0.02 of the second's progress, rescaled
        ([G, -3 * G], 0 * G, 0 * G, -G),
        ([2 * G, G, 5 * G], 8 / 3 * G, 8 / 3 * G, 2 * G),
        ([G, 0 * G, 2 * G], G, G, G),
        ([0 * G, G], G / 2, G / 2, 0 * G),
        ([0 * G, 0 * G], 0 * G, 0 * G, 0 * G),
    ],
    ids=["one task", "identical", "opposite", "opposite 1:3", "collinear", "zero row", "zero first", "all zero"],
)
def test_degenerate_rows(name, rows, upgrad, dual_proj, pcd, scale):
    expected = {"upgrad": upgrad, "dual_proj": dual_proj, "pcd": pcd}[name]
    direction = run(METHODS[name], scale * np.array(rows))
    # PCD of opposite rows: d~ is what is left of 1 - 1.02, so that its square is known to 1e-3.
    rtol, atol = (1e-3 if name == "pcd" else 0.0), 2e-6 * scale * np.linalg.norm(rows, axis=1).sum()
    np.testing.assert_allclose(direction, scale * expected, rtol=rtol, atol=atol)


# UPGrad and the projection of the mean.


@pytest.mark.parametrize("name", ["upgrad", "dual_proj"])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_task_is_hurt(name, seed):
    rows = random_rows(seed, num_tasks=9)
    weights, _ = padded.weights_of(METHODS[name].weighting, rows)
    norm = np.linalg.norm(rows, axis=1)
    assert (rows @ (weights @ rows) >= -1e-5 * norm * (weights @ norm)).all()
    assert (weights >= (1 - 1e-6) / 9).all()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_upgrad_is_linear_in_the_lengths_of_the_gradients(seed):
    """A(diag(a c + b e) J) = a A(diag(c) J) + b A(diag(e) J) for positive a, b, c, e."""
    rng = np.random.default_rng(seed)
    rows, (c, e), (a, b) = random_rows(seed, spread=0), rng.uniform(0.1, 3.0, (2, K, 1)), rng.uniform(0.1, 3.0, 2)
    total, first, second = (run(UPGRAD, factor * rows, "float64") for factor in (a * c + b * e, c, e))
    np.testing.assert_allclose(total, a * first + b * second, atol=1e-9 * np.linalg.norm(total))


def test_two_tasks_by_hand():
    # <g_1, g_2> = -2: g_1 becomes (2, 0) + 2/2 (-1, 1) = (1, 1), and g_2 becomes (-1, 1) + 2/4 (2, 0) = (0, 1).
    rows = np.array([[2.0, 0.0], [-1.0, 1.0]])
    np.testing.assert_allclose(run(UPGRAD, rows), [0.5, 1.0], atol=1e-6)
    # The mean (1/2, 1/2) hurts neither task.
    np.testing.assert_allclose(run(DUAL_PROJ, rows), [0.5, 0.5], atol=1e-6)
    # Of (4, 0) and (-1, 1) the mean (3/2, 1/2) hurts the second: <., g_2> = -1, hence + 1/2 (-1, 1).
    np.testing.assert_allclose(run(DUAL_PROJ, [[4.0, 0.0], [-1.0, 1.0]]), [1.0, 1.0], atol=1e-6)


@pytest.mark.parametrize(("make", "name"), [(upgrad, "upgrad"), (dual_proj, "dual_proj")])
def test_preference_weighs_the_gradients(make, name):
    rows, preference = random_rows(3), np.array([0.5, 2.0, 0.0, 1.0, 0.25])
    weighting = make(preference).weighting
    weights, _ = padded.weights_of(weighting, rows, size=K)
    assert padded.error(rows, weights, reference.REFERENCES[name](rows, preference), "float32") < 1
    # It is used as it is for the tasks that are present.
    at = np.array([0, 1, 2, 4])
    weights, _ = padded.weights_of(weighting, rows[at], at=at, size=K)
    assert padded.error(rows[at], weights, reference.REFERENCES[name](rows[at], preference[at]), "float32") < 1


@pytest.mark.parametrize("make", [upgrad, dual_proj])
def test_preference_is_checked(make):
    for bad in ([1.0, -1.0], [1.0, np.nan], [[1.0]]):
        with pytest.raises(ValueError, match=r"^preference must be a vector of finite numbers >= 0, got "):
            make(bad)
    method = make([1.0, 2.0])
    with pytest.raises(ValueError) as error:
        method.update(jnp.eye(3), method.init(None))
    assert str(error.value) == "preference has 2 entries, but there are 3 tasks"


# Priority-constrained descent.


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_pcd_has_the_length_of_the_first_and_serves_the_others(seed):
    """<g~_j, d~> >= tau |g~_j|^2: at the first step all g~ have length 1, and <u_j, d / |d|> |d~| >= tau."""
    rows = random_rows(seed)
    direction, unit = run(PCD, rows), rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(direction), np.linalg.norm(rows[0]), rtol=1e-3)
    assert (unit[1:] @ direction > 0).all()
    # d = g_1 where that serves the others already.
    served = rows * np.where(unit @ rows[0] < 0.02 * np.linalg.norm(rows[0]), -1, 1)[:, None]
    served = served[np.abs(unit @ unit[0]) > 0.021]
    np.testing.assert_allclose(run(PCD, served), served[0], rtol=1e-6)


def test_pcd_by_hand():
    # g_1 = (3, 4), g_2 = (-1, 0), tau = 0: the part along g_2 goes, (0, 4), and the length is brought back to 5.
    np.testing.assert_allclose(run(PCD_ZERO, [[3.0, 4.0], [-1.0, 0.0]]), [0.0, 5.0], atol=1e-6)
    # tau = 0.02: unit rows (0.6, 0.8) and (-1, 0), <u_2, d~> = 0.02 makes d~ = (-0.02, 0.8).
    direction = run(PCD, [[3.0, 4.0], [-1.0, 0.0]])
    np.testing.assert_allclose(direction, 5 / np.hypot(0.02, 0.8) * np.array([-0.02, 0.8]), rtol=1e-5)
    # Exactly against the first, and tau = 0: no direction is left.
    assert run(PCD_ZERO, [[3.0, 4.0], [-3.0, -4.0]]).tolist() == [0.0, 0.0]


def test_pcd_drops_constraints_that_contradict_one_another():
    for dtype in padded.DTYPES:
        for others in ([[1.0, 0.0, 0.0], [-2.0, 0.0, 0.0]], [[1.0, 0, 0], [-1.0, 1, 0], [0.0, -2, 0]]):
            rows = np.vstack([[1.0, 2.0, 3.0], others])
            np.testing.assert_allclose(run(PCD, rows, dtype), rows[0], rtol=1e-6)
    # With tau = 0 they do not: d is orthogonal to the two.
    rows = [[1.0, 2.0, 3.0], [1.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]
    np.testing.assert_allclose(run(PCD_ZERO, rows), np.sqrt(14 / 13) * np.array([0.0, 2.0, 3.0]), atol=1e-5)


@EVERY_DTYPE
def test_pcd_normalizes_by_the_moving_average(dtype):
    """v = 0.999 v + 0.001 |g|^2 over 1 - 0.999^t, by a loop in float64; one task is absent at step 2."""
    method, size = pcd(0.5, decay=0.9), 10
    state, average, count = None, np.zeros(3), np.zeros(3)
    for step in range(5):
        rows = random_rows(step, num_tasks=3)
        at = np.array([0, 1]) if step == 2 else np.arange(3)
        rows = rows[at]
        squared = (rows**2).sum(1)
        average[at], count[at] = 0.9 * average[at] + 0.1 * squared, count[at] + 1
        norms = np.sqrt(average[at] / (1 - 0.9 ** count[at]))
        with padded.precision(dtype):
            weights, state = padded.weights_of(method.weighting, rows, None, state, dtype, at=at, size=size)
            np.testing.assert_allclose(state.squared[at], norms**2, rtol=1e-5)
            assert state.count[:3].tolist() == count.tolist()
            assert (state.count[3:] == 0).all()
        expected = reference.pcd(rows, 0.5, norms=norms)
        assert padded.error(rows, weights, expected, dtype) < 1


def test_pcd_keeps_its_averages_when_the_gramian_is_not_finite():
    weighting, present = PCD.weighting, jnp.ones(3, bool)
    weigh = padded.jitted(weighting.weigh)
    _, state = weigh(jnp.diag(jnp.array([1.0, 4.0, 9.0])), jnp.ones(3), weighting.init(3), present)
    weights, after = weigh(jnp.eye(3).at[0, 1].set(jnp.nan), jnp.ones(3), state, present)
    assert jnp.isnan(weights).all()
    assert after.squared.tolist() == state.squared.tolist() == [1.0, 4.0, 9.0]
    assert after.count.tolist() == state.count.tolist() == [1, 1, 1]


def test_pcd_without_its_primary_task_takes_no_step():
    rows = random_rows(0)
    assert (padded.weights_of(PCD.weighting, rows, at=np.arange(1, K + 1))[0] == 0).all()


def test_pcd_follows_the_task_that_is_named():
    rows = random_rows(1)
    order = [2, 0, 1, 3, 4]
    np.testing.assert_allclose(run(pcd(primary=2), rows), run(PCD, rows[order]), rtol=1e-4)


def test_pcd_checks_its_arguments():
    for make, message in (
        (lambda: pcd(1.5), "tau must be in [0, 1], got 1.5"),
        (lambda: pcd(decay=1.0), "decay must be in [0, 1), got 1.0"),
        (lambda: pcd(primary=3).update(jnp.eye(3), pcd().init(None)), "primary must be a task index below 3, got 3"),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert str(error.value) == message
