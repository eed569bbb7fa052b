"""MGDA against its definition, PCGrad against a dense implementation with the same permutations.

Letters: K tasks, P parameters; g_k rows of the Jacobian, n_k their norms; d the update. (The quadratic programme behind
MGDA is tested in test_solvers.py.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax import optim
from mtjax.optim.solvers import min_norm_weights

K, P = 4, 6
NORMALIZATIONS = ("none", "l2", "loss", "loss+")


@functools.cache
def jitted(method_name, *args, **kwargs):
    method = getattr(optim, method_name)(*args, **dict(kwargs))
    return jax.jit(lambda rows, losses: method.update(rows, method.init(None), losses=losses))


def mgda(rows, losses=None, normalize="none"):
    rows = jnp.asarray(rows, jnp.float32)
    losses = jnp.ones(len(rows)) if losses is None else losses
    direction, state = jitted("mgda", normalize)(rows, losses)
    return np.asarray(direction, np.float64), np.asarray(state.weights, np.float64)


def random_rows(seed, num_tasks=K, num_params=P):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_tasks, num_params)) * 10 ** rng.uniform(-1, 1, (num_tasks, 1))
    return rows.astype(np.float32), rng.uniform(0.2, 3.0, num_tasks).astype(np.float32)


# MGDA.


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_mgda_increases_no_loss(seed):
    """<g_k, d> >= |d|^2 >= 0 for every task, and d is in the convex hull."""
    rows, _ = random_rows(seed)
    direction, weights = mgda(rows)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    norm = np.linalg.norm(rows, axis=1)
    assert (rows @ direction >= direction @ direction - 1e-5 * norm * (weights @ norm)).all()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), normalize=st.sampled_from(NORMALIZATIONS))
def test_mgda_normalizes_for_the_weights_only(seed, normalize):
    rows, losses = random_rows(seed)
    norm = np.linalg.norm(rows, axis=1)
    divisor = {"none": np.ones(K), "l2": norm, "loss": losses, "loss+": losses * norm}[normalize]
    scaled = (rows / divisor[:, None]).astype(np.float64)
    expected = np.asarray(jax.jit(min_norm_weights)(jnp.asarray(scaled @ scaled.T, jnp.float32)))
    direction, weights = mgda(rows, losses, normalize)
    terms = weights * norm / divisor
    np.testing.assert_allclose(terms, expected * norm / divisor, atol=1e-3 * terms.sum())
    np.testing.assert_allclose(direction, weights @ rows, atol=1e-5 * (weights @ norm))


@pytest.mark.parametrize("factors", [[1.0, 10.0, 0.1, 1.0], [1e-4, 1.0, 1e4, 7.0]])
def test_mgda_l2_weights_do_not_depend_on_the_length_of_a_row(factors):
    rows, _ = random_rows(0)
    _, weights = mgda(rows, normalize="l2")
    _, scaled = mgda(rows * np.array(factors)[:, None], normalize="l2")
    np.testing.assert_allclose(scaled, weights, atol=1e-4)


def test_mgda_of_two_tasks_by_hand():
    # d is the foot of the perpendicular from the origin to the line through (3, 0) and (0, 4): length 3 * 4 / 5.
    direction, weights = mgda([[3.0, 0.0], [0.0, 4.0]])
    np.testing.assert_allclose(weights, [16 / 25, 9 / 25], rtol=1e-5)
    np.testing.assert_allclose(direction, [48 / 25, 36 / 25], rtol=1e-5)
    # 'l2': unit rows are orthogonal, hence equal weights, which are applied to the rows as they are.
    direction, weights = mgda([[3.0, 0.0], [0.0, 4.0]], normalize="l2")
    np.testing.assert_allclose(weights, [0.5, 0.5], rtol=1e-5)
    np.testing.assert_allclose(direction, [1.5, 2.0], rtol=1e-5)
    # 'loss' with losses (3, 1): rows (1, 0) and (0, 4), so that w is proportional to (16, 1).
    _, weights = mgda([[3.0, 0.0], [0.0, 4.0]], jnp.array([3.0, 1.0]), "loss")
    np.testing.assert_allclose(weights, [16 / 17, 1 / 17], rtol=1e-5)
    # 'loss+': rows (1/3, 0) and (0, 1), so that w is proportional to (9, 1).
    _, weights = mgda([[3.0, 0.0], [0.0, 4.0]], jnp.array([3.0, 1.0]), "loss+")
    np.testing.assert_allclose(weights, [0.9, 0.1], rtol=1e-5)
    # A dominated task keeps no weight at all (LibMTL: 1e-3 of it).
    assert mgda([[1.0, 0.0], [3.0, 1.0]])[1].tolist() == [1.0, 0.0]


G = np.array([1.0, -2.0, 2.0])  # of length 3


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1.0, 1e5, 1e10])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([G], G),
        ([G, G, G], G),
        ([G, -G], 0 * G),
        ([G, -3 * G], 0 * G),
        ([2 * G, G, 5 * G], G),
        ([G, 0 * G, 2 * G], 0 * G),
        ([0 * G, 0 * G], 0 * G),
        ([G, 1e8 * G], G),
    ],
    ids=["one task", "identical", "opposite", "opposite 1:3", "collinear", "zero row", "all zero", "ratio 1e8"],
)
def test_mgda_of_degenerate_rows(rows, expected, scale):
    direction, _ = mgda(scale * np.array(rows))
    np.testing.assert_allclose(direction, scale * expected, atol=1e-5 * scale)


def test_mgda_gives_zero_divisors_all_the_weight():
    """A zero row under 'l2', a zero loss under 'loss': there is nothing shorter than a zero row."""
    rows = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    assert mgda(rows, normalize="l2")[1].tolist() == [0.0, 1.0, 0.0]
    assert mgda(np.eye(3), jnp.array([1.0, 0.0, 2.0]), "loss")[1].tolist() == [0.0, 1.0, 0.0]


def test_mgda_refuses_another_normalization():
    with pytest.raises(ValueError) as error:
        optim.mgda("mean")
    assert str(error.value) == "normalize must be 'none', 'l2', 'loss' or 'loss+', got 'mean'"


# PCGrad.


def permutations(key, num_tasks):
    """The orders that the method draws with this key, and the key that it leaves behind."""
    key, order_key = jax.random.split(key)
    return [np.asarray(jax.random.permutation(k, num_tasks)) for k in jax.random.split(order_key, num_tasks)], key


def dense_pcgrad(rows, orders):
    """Algorithm 1 of Yu et al. (2020) on the gradients themselves, in float64."""
    rows = np.asarray(rows, np.float64)
    projected = rows.copy()
    for i, order in enumerate(orders):
        for j in order:
            dot = projected[i] @ rows[j]
            if i != j and dot < 0:
                projected[i] -= dot / (rows[j] @ rows[j]) * rows[j]
    return projected


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-8, 1.0, 1e8]))
def test_pcgrad_equals_the_dense_algorithm(seed, scale):
    rows = scale * random_rows(seed)[0]
    direction, _ = jitted("pcgrad", 0)(jnp.asarray(rows), jnp.ones(K))
    expected = dense_pcgrad(rows, permutations(jax.random.key(0), K)[0]).sum(0)
    np.testing.assert_allclose(direction, expected, atol=1e-4 * np.linalg.norm(rows, axis=1).sum())


def test_pcgrad_equals_the_dense_algorithm_for_many_tasks_step_after_step():
    method = optim.pcgrad(seed=5)
    update = jax.jit(method.update)
    state, key = method.init(None), jax.random.key(5)
    for step in range(3):
        rows, _ = random_rows(step, num_tasks=24, num_params=12)
        direction, state = update(jnp.asarray(rows), state)
        orders, key = permutations(key, 24)
        expected = dense_pcgrad(rows, orders).sum(0)
        np.testing.assert_allclose(direction, expected, atol=1e-4 * np.linalg.norm(rows, axis=1).sum())
        assert jax.random.key_data(state.inner).tolist() == jax.random.key_data(key).tolist()


def test_pcgrad_draws_new_orders_at_every_step_and_for_every_seed():
    rows, _ = random_rows(11, num_tasks=8)
    seen = set()
    for seed in range(3):
        method = optim.pcgrad(seed)
        state = method.init(None)
        for _ in range(2):
            direction, state = method.update(jnp.asarray(rows), state)
            seen.add(tuple(np.asarray(direction).tolist()))
    assert len(seen) > 3
    # The same seed gives the same orders.
    first, second = (optim.pcgrad(1), optim.pcgrad(1))
    np.testing.assert_array_equal(
        first.update(jnp.asarray(rows), first.init(None))[0], second.update(jnp.asarray(rows), second.init(None))[0]
    )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_pcgrad_of_two_tasks_conflicts_with_neither(seed):
    rows, _ = random_rows(seed, num_tasks=2)
    direction, _ = jitted("pcgrad")(jnp.asarray(rows), jnp.ones(2))
    norm = np.linalg.norm(rows, axis=1)
    assert (rows @ np.asarray(direction) >= -1e-5 * norm * norm.sum()).all()


def test_pcgrad_of_two_tasks_by_hand():
    # <g_1, g_2> = -2: g_1' = (2, 0) + 2/2 (-1, 1) = (1, 1), g_2' = (-1, 1) + 2/4 (2, 0) = (0, 1).
    direction, state = jitted("pcgrad")(jnp.array([[2.0, 0.0], [-1.0, 1.0]]), jnp.ones(2))
    np.testing.assert_allclose(direction, [1.0, 2.0], atol=1e-6)
    np.testing.assert_allclose(state.weights, [1.5, 2.0], atol=1e-6)
    assert state.conflicts == 1


def test_pcgrad_leaves_agreeing_gradients_alone():
    rows = np.abs(random_rows(0)[0])
    direction, state = jitted("pcgrad")(jnp.asarray(rows), jnp.ones(K))
    assert state.weights.tolist() == [1.0] * K
    np.testing.assert_allclose(direction, rows.sum(0), rtol=1e-6)


def test_pcgrad_mean_is_the_sum_over_k():
    rows, _ = random_rows(7)
    total, mean = (optim.pcgrad(reduction=reduction) for reduction in ("sum", "mean"))
    np.testing.assert_allclose(
        K * mean.update(jnp.asarray(rows), mean.init(None))[0],
        total.update(jnp.asarray(rows), total.init(None))[0],
        rtol=1e-6,
        atol=1e-6,
    )


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
        # One parameter: every gradient meets one of the other sign, and is projected to nothing.
        ([G[:1], -2 * G[:1], 3 * G[:1]], 0 * G[:1]),
    ],
    ids=["one task", "identical", "opposite", "opposite 1:3", "collinear", "zero row", "all zero", "one parameter"],
)
def test_pcgrad_of_degenerate_rows(rows, expected, scale):
    direction, _ = jitted("pcgrad")(jnp.asarray(scale * np.array(rows), jnp.float32), jnp.ones(len(rows)))
    np.testing.assert_allclose(direction, scale * expected, atol=1e-5 * scale)


def test_pcgrad_projects_small_gradients_as_fully_as_large_ones():
    """An epsilon of 1e-8 in the denominator, as elsewhere, would leave nine tenths of this conflict in place."""
    rows = 1e-5 * np.array([[2.0, 0.0], [-1.0, 1.0]])
    direction, _ = jitted("pcgrad")(jnp.asarray(rows, jnp.float32), jnp.ones(2))
    np.testing.assert_allclose(direction, [1e-5, 2e-5], rtol=1e-5)


def test_pcgrad_refuses_another_reduction():
    with pytest.raises(ValueError) as error:
        optim.pcgrad(reduction="max")
    assert str(error.value) == "reduction must be 'sum' or 'mean', got 'max'"
