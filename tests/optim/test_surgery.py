"""PCGrad and GradVac against dense implementations in float64 with the same random orders.

Letters: K tasks, P parameters; g_k rows of the Jacobian, n_k their norms; d the update.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.optim.surgery import gradvac, pcgrad

from . import padded, reference
from .cases import CASES

K, P = 4, 6
PCGRAD, GRADVAC = pcgrad(), gradvac(beta=0.3)
METHODS = {"pcgrad": PCGRAD, "gradvac": GRADVAC}
EVERY_DTYPE = pytest.mark.parametrize("dtype", padded.DTYPES)
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
G = np.array([1.0, -2.0, 2.0])  # of length 3


@functools.cache
def jitted(method):
    """d and the weighting's state after the first step."""
    return jax.jit(lambda rows: method.update(rows, method.init(None)))


@jax.jit
def draws_of(key):
    key, order_key = jax.random.split(key)
    return jax.vmap(lambda k: jax.random.bits(k, (64,), jnp.uint32))(jax.random.split(order_key, 64)), key


def orders_of(key, num_tasks):
    """The orders that the methods draw with this key, and the key that they leave behind.

    Fewer tasks draw the first of the numbers that more would draw.
    """
    draws, key = draws_of(key)
    return np.argsort(draws[:num_tasks, :num_tasks], axis=1), key


def random_rows(seed, num_tasks=K, num_params=P):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_tasks, num_params)) * 10 ** rng.uniform(-1, 1, (num_tasks, 1))
    return rows.astype(np.float32).astype(np.float64)


def camps(seed, num_tasks=K):
    """Rows that nearly all conflict or nearly all agree: their cosines are far from zero."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (num_tasks, 1))
    return signs * rng.uniform(0.5, 2.0, (num_tasks, 1)) * (rng.normal(size=P) + 0.5 * rng.normal(size=(num_tasks, P)))


# Both.


@EVERY_DTYPE
@EVERY_METHOD
def test_direction_is_that_of_the_dense_algorithm_on_every_case(name, dtype):
    errors = {}
    for case, (matrix, _, _) in CASES.items():
        orders, _ = orders_of(jax.random.key(0), len(matrix))
        weights, _ = padded.weights_of(METHODS[name].weighting, matrix, dtype=dtype)
        errors[case] = padded.error(matrix, weights, reference.pcgrad(matrix, orders), dtype)
    assert max(errors.values()) < 1, errors


@EVERY_METHOD
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-30, 30))
def test_scale_equivariance(name, seed, power):
    """Exactly so for powers of two: there is no absolute number anywhere."""
    rows = random_rows(seed)
    scaled = padded.weights_of(METHODS[name].weighting, 2.0**power * rows)[0]
    np.testing.assert_array_equal(scaled, padded.weights_of(METHODS[name].weighting, rows)[0])


@EVERY_METHOD
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_tasks_that_are_present_get_what_they_would_get_alone(name, seed):
    """Their random orders too."""
    at = np.sort(np.random.default_rng(seed).choice(10, K, replace=False))
    weighting, rows = METHODS[name].weighting, camps(seed)
    alone, _ = padded.weights_of(weighting, rows)
    among, state = padded.weights_of(weighting, rows, at=at)
    np.testing.assert_allclose(among, alone, rtol=1e-4, atol=1e-4)
    if name == "gradvac":
        others = np.setdiff1d(np.arange(10), at)
        assert (state.target[others] == 0).all()
        assert (state.target[:, others] == 0).all()


@EVERY_METHOD
def test_new_orders_at_every_step_and_for_every_seed(name):
    make = {"pcgrad": pcgrad, "gradvac": gradvac}[name]
    rows = camps(11, num_tasks=8)
    seen = []
    for seed in (0, 1, 1):
        state = make(seed).weighting.init(10)
        for _ in range(2):
            weights, state = padded.weights_of(METHODS[name].weighting, rows, state=state)
            seen.append(tuple(weights))
    assert len(set(seen[:4])) == 4
    assert seen[2:4] == seen[4:]


@EVERY_METHOD
def test_agreeing_gradients_are_left_alone(name):
    rows = np.abs(random_rows(0))
    direction, state = jitted(METHODS[name])(jnp.asarray(rows, jnp.float32))
    assert state.weights.tolist() == [1.0] * K
    np.testing.assert_allclose(direction, rows.sum(0), rtol=1e-6)


@pytest.mark.parametrize("make", [pcgrad, gradvac])
def test_mean_is_the_sum_over_k(make):
    total, mean = (make(reduction=reduction).weighting for reduction in ("sum", "mean"))
    for rows in (random_rows(7), random_rows(8)[:3]):  # of the tasks that are present
        np.testing.assert_allclose(
            len(rows) * padded.weights_of(mean, rows, size=K)[0], padded.weights_of(total, rows, size=K)[0], rtol=1e-6
        )


@EVERY_METHOD
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([G], G),
        ([G, G, G], 3 * G),
        ([G, -G], 0 * G),
        ([G, -3 * G], 0 * G),
        ([2 * G, G, 5 * G], 8 * G),
        ([G, 0 * G, 2 * G], 3 * G),
        ([0 * G, 0 * G], 0 * G),
        # One line: every gradient meets one of the other sign, and is projected to nothing.
        ([G, -2 * G, 4 * G], 0 * G),
    ],
    ids=["one task", "identical", "opposite", "opposite 1:3", "collinear", "zero row", "all zero", "both ways"],
)
def test_degenerate_rows(name, rows, expected, scale):
    rows = scale * np.array(rows)
    weights, _ = padded.weights_of(METHODS[name].weighting, rows)
    np.testing.assert_allclose(weights @ rows, scale * expected, atol=1e-5 * scale)


@EVERY_METHOD
def test_small_gradients_are_projected_as_fully_as_large_ones(name):
    """An epsilon of 1e-8 in the denominator, as elsewhere, would leave nine tenths of this conflict in place."""
    rows = 1e-5 * np.array([[2.0, 0.0], [-1.0, 1.0]])
    weights, _ = padded.weights_of(METHODS[name].weighting, rows)
    np.testing.assert_allclose(weights @ rows, [1e-5, 2e-5], rtol=1e-5)


@EVERY_METHOD
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gramian_that_is_not_finite_gives_nan(name, bad):
    weighting, present = METHODS[name].weighting, jnp.ones(3, bool)
    weigh = padded.jitted(weighting.weigh)
    _, state = weigh(jnp.ones((3, 3)), jnp.ones(3), weighting.init(3), present)
    for entry in ((0, 1), (2, 2)):
        weights, after = weigh(jnp.eye(3).at[entry].set(bad), jnp.ones(3), state, present)
        assert jnp.isnan(weights).all()
        if name == "gradvac":
            assert after.target.tolist() == state.target.tolist()


@pytest.mark.parametrize("make", [pcgrad, gradvac])
def test_another_reduction_is_refused(make):
    with pytest.raises(ValueError) as error:
        make(reduction="max")
    assert str(error.value) == "reduction must be 'sum' or 'mean', got 'max'"


# PCGrad.


def test_pcgrad_equals_the_dense_algorithm_for_many_tasks_step_after_step():
    state, key = PCGRAD.weighting.init(64), jax.random.key(0)
    for step in range(3):
        rows = random_rows(step, num_tasks=24, num_params=12)
        weights, state = padded.weights_of(PCGRAD.weighting, rows, state=state)
        orders, key = orders_of(key, 24)
        assert padded.error(rows, weights, reference.pcgrad(rows, orders), "float32") < 1
        assert jax.random.key_data(state).tolist() == jax.random.key_data(key).tolist()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_pcgrad_of_two_tasks_conflicts_with_neither(seed):
    rows = random_rows(seed, num_tasks=2)
    weights, _ = padded.weights_of(PCGRAD.weighting, rows)
    norm = np.linalg.norm(rows, axis=1)
    assert (rows @ (weights @ rows) >= -1e-5 * norm * norm.sum()).all()


def test_pcgrad_of_two_tasks_by_hand():
    # <g_1, g_2> = -2: g_1' = (2, 0) + 2/2 (-1, 1) = (1, 1), g_2' = (-1, 1) + 2/4 (2, 0) = (0, 1).
    direction, state = jitted(PCGRAD)(jnp.array([[2.0, 0.0], [-1.0, 1.0]]))
    np.testing.assert_allclose(direction, [1.0, 2.0], atol=1e-6)
    np.testing.assert_allclose(state.weights, [1.5, 2.0], atol=1e-6)
    assert state.conflicts == 1


# GradVac.


@EVERY_DTYPE
def test_gradvac_equals_the_dense_algorithm_step_after_step(dtype):
    state, key, target = None, jax.random.key(0), None
    for step in range(6):
        rows = camps(step)
        with padded.precision(dtype):
            weights, state = padded.weights_of(GRADVAC.weighting, rows, state=state, dtype=dtype)
            assert state.target.dtype == padded.DTYPES[dtype][0]
        orders, key = orders_of(key, K)
        expected, target = reference.gradvac(rows, orders, target, beta=0.3)
        assert padded.error(rows, weights, expected, dtype) < 1
        np.testing.assert_allclose(state.target[:K, :K], target, atol=0.1 * padded.DTYPES[dtype][1])


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_gradvac_is_pcgrad_at_first(seed):
    rows = camps(seed)
    first, _ = padded.weights_of(GRADVAC.weighting, rows)
    np.testing.assert_allclose(first, padded.weights_of(PCGRAD.weighting, rows)[0], rtol=1e-4, atol=1e-4)


def test_gradvac_by_hand():
    # Orthogonal unit gradients with a target of 0.6 turn towards one another: g_1' = (1, 0) + 0.6/0.8 (0, 1), and its
    # cosine with (0, 1) is 0.75 / sqrt(1 + 0.75^2) = 0.6. Both are turned, and beta = 0.3 of the cosine 0 enters 0.6.
    state = GRADVAC.weighting.init(10)
    state = state._replace(target=jnp.full((10, 10), 0.6))
    weights, state = padded.weights_of(GRADVAC.weighting, np.eye(2), state=state)
    np.testing.assert_allclose(weights, [1.75, 1.75], rtol=1e-6)
    np.testing.assert_allclose(state.target[:2, :2], [[0.6, 0.42], [0.42, 0.6]], rtol=1e-6)


@EVERY_DTYPE
def test_gradvac_stays_finite_after_any_history(dtype):
    """Targets of exactly 1 after a run of identical gradients; then all that follows, opposite ones too."""
    method = gradvac(beta=1.0)
    kind = padded.DTYPES[dtype][0]
    with padded.precision(dtype):
        _, state = padded.weights_of(method.weighting, np.array([G, G, 2 * G]), dtype=dtype)
        np.testing.assert_allclose(state.target[:3, :3], 1 - np.eye(3), atol=8 * np.finfo(kind).eps)
        weights, state = padded.weights_of(method.weighting, np.array([G, G, 2 * G]), state=state, dtype=dtype)
        np.testing.assert_allclose(weights, [1.0, 1.0, 1.0], rtol=1e-3)
        for rows in (np.array([G, -G, 2 * G]), np.eye(3), np.array([G, -G, 0 * G]), -np.ones((3, 1))):
            weights, after = padded.weights_of(method.weighting, rows, state=state, dtype=dtype)
            assert np.isfinite(weights).all()
            assert jnp.isfinite(after.target).all()
            # A cosine of 1 - 8 eps at most is asked for, once for each of the other tasks.
            assert np.abs(weights).max() < np.finfo(kind).eps ** -1.0
            assert (jnp.abs(after.target) <= 1).all()


def test_gradvac_checks_its_beta():
    with pytest.raises(ValueError) as error:
        gradvac(beta=-0.1)
    assert str(error.value) == "beta must be in [0, 1], got -0.1"
