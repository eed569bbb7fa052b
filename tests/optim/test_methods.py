"""The battery that every method passes: one table, one test for each property.

To add a method, add a line to METHODS, and to VARIANTS one for each option that changes what it computes.
Letters: K tasks; g_k rows of the Jacobian J, n_k their norms; d the update.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtjax
from mtjax import optim

# name -> the method for K tasks
METHODS = {
    "linear": lambda k: optim.linear(),
    "uncertainty": lambda k: optim.uncertainty(),
    "mgda": lambda k: optim.mgda(),
    "pcgrad": lambda k: optim.pcgrad(),
}
VARIANTS = {
    "linear mean": lambda k: optim.linear("mean"),
    "linear given": lambda k: optim.linear(np.linspace(0.5, 2.0, k).tolist()),
    "uncertainty scales": lambda k: optim.uncertainty(scale=[0.5] * (k - 1) + [1.0]),
    "mgda l2": lambda k: optim.mgda("l2"),
    "mgda loss": lambda k: optim.mgda("loss"),
    "mgda loss+": lambda k: optim.mgda("loss+"),
    "pcgrad mean": lambda k: optim.pcgrad(reduction="mean"),
}
TABLE = METHODS | VARIANTS
# Those that treat tasks differently: weights by position, an order drawn for each task.
ORDERED = ("linear given", "uncertainty scales", "pcgrad", "pcgrad mean")

EVERY = pytest.mark.parametrize("name", TABLE)
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
K = 4


@functools.cache
def method_of(name, num_tasks=K):
    return TABLE[name](num_tasks)


@functools.cache
def updater(name, num_tasks=K):
    """jitted (matrix [K, P], losses) -> (direction [P], state after the first update)."""
    method = method_of(name, num_tasks)
    return jax.jit(lambda rows, losses: method.update(rows, method.init(None), losses=losses))


def random_rows(seed, num_tasks=K, num_params=6):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_tasks, num_params)) * 10 ** rng.uniform(-1, 1, (num_tasks, 1))
    return jnp.asarray(rows, jnp.float32), jnp.asarray(rng.uniform(0.2, 3.0, num_tasks), jnp.float32)


def assert_directions_close(ours, reference, rows, weights, tolerance=1e-5):
    """Within `tolerance` of sum_k |w_k| n_k: what cancels in d has been rounded at that size."""
    size = np.abs(weights) @ np.linalg.norm(np.asarray(rows, np.float64), axis=1)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * size + 1e-37)


@EVERY
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_update_is_the_weighted_sum_of_the_rows(name, seed):
    rows, losses = random_rows(seed)
    direction, state = updater(name)(rows, losses)
    expected = np.asarray(state.weights, np.float64) @ np.asarray(rows, np.float64)
    assert_directions_close(direction, expected, rows, state.weights)
    np.testing.assert_allclose(state.gramian, mtjax.gramian(rows), rtol=1e-5, atol=1e-5)
    assert state.conflicts == sum(state.gramian[i, j] < 0 for i in range(K) for j in range(i))


# The two routes.

X = jax.random.normal(jax.random.key(0), (8, 3))
PARAMS = {"trunk": jax.random.normal(jax.random.key(1), (3, 5)), "heads": jax.random.normal(jax.random.key(2), (5, K))}


def loss_fn(params, x):
    """Positive losses of very different size."""
    outputs = jnp.tanh(x @ params["trunk"]) @ params["heads"]
    return {f"task {k}": 10.0 ** (k - 2) * jnp.mean((outputs[:, k] - 1) ** 2) for k in range(K)}


@pytest.mark.parametrize(
    ("name", "shared_only"), [(name, False) for name in TABLE] + [(name, True) for name in METHODS]
)
def test_both_routes_give_the_same_update(name, shared_only):
    """Contract 4: with and without the Jacobian in memory, step after step. (More of `on_shared`: test_base.py.)"""
    method = optim.on_shared(method_of(name)) if shared_only else method_of(name)

    @jax.jit
    def both(params, state):
        losses, jacobian = mtjax.value_and_jacobian(loss_fn)(params, X)
        expected = method.update(jacobian, state, params, losses=losses)
        ours = mtjax.value_and_weighted_grad(loss_fn, method)(params, state, X)
        return ours, expected, jacobian, losses

    params, state = PARAMS, optim.init(method, PARAMS, num_tasks=K)
    for _ in range(3):
        (losses, gradient, weighted_state), (expected, state), jacobian, expected_losses = both(params, state)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
        flat = np.concatenate([np.reshape(leaf, (K, -1)) for leaf in jax.tree.leaves(jacobian)], 1)
        for leaf, reference in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            assert_directions_close(leaf, reference, flat, np.maximum(1, np.abs(state.weights)))
        np.testing.assert_allclose(weighted_state.weights, state.weights, rtol=1e-3, atol=1e-5)
        assert jax.tree.structure(weighted_state) == jax.tree.structure(state)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, expected)


# Symmetries.


@EVERY
@pytest.mark.parametrize("power", [-30, -8, 8, 30])
def test_scale_equivariance(name, power):
    """method(s J) = s method(J), exactly for powers of two: nothing absolute is compared with the data."""
    rows, losses = random_rows(1)
    direction, state = updater(name)(rows, losses)
    scaled, scaled_state = updater(name)(rows * 2.0**power, losses)
    np.testing.assert_array_equal(scaled, direction * 2.0**power)
    np.testing.assert_array_equal(scaled_state.weights, state.weights)


@pytest.mark.parametrize("name", [name for name in TABLE if name not in ORDERED])
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(K)))
def test_permutation_equivariance(name, seed, order):
    rows, losses = random_rows(seed)
    order = np.array(order)
    direction, state = updater(name)(rows, losses)
    permuted, permuted_state = updater(name)(rows[order], losses[order])
    assert_directions_close(permuted, direction, rows, state.weights, 1e-4)
    norm = np.linalg.norm(rows, axis=1)
    terms = np.asarray(state.weights) * norm
    np.testing.assert_allclose(permuted_state.weights * norm[order], terms[order], atol=1e-3 * np.abs(terms).sum())


@EVERY
def test_one_task_is_plain_descent(name):
    rows, losses = random_rows(2, num_tasks=1)
    direction, state = updater(name, 1)(rows, losses)
    # Uncertainty keeps the 1/2 of its Gaussian likelihood: w = scale exp(-0).
    weight = {"linear given": 0.5, "uncertainty": 0.5}.get(name, 1.0)
    np.testing.assert_allclose(state.weights, [weight], rtol=1e-6)
    np.testing.assert_allclose(direction, weight * rows[0], rtol=1e-6)


# Inputs that break solvers.

BASE = np.random.default_rng(0).normal(size=(K, 6))
DEGENERATE = {
    "a zero row": BASE * np.array([[1.0], [0.0], [1.0], [1.0]]),
    "all zero": 0 * BASE,
    "identical rows": np.repeat(BASE[:1], K, axis=0),
    "opposite rows": BASE[:1] * np.array([[1.0], [-1.0], [1.0], [-1.0]]),
    "opposite, 1 to 3": BASE[:1] * np.array([[1.0], [-3.0], [1.0], [-3.0]]),
    "collinear rows": BASE[:1] * np.array([[1.0], [2.0], [0.5], [7.0]]),
    "rank one less": np.concatenate([BASE[:3], BASE[:1] - BASE[1:2]]),
    "one parameter": BASE[:, :1],
    "row norms 1e-8 to 1e8": BASE * 10.0 ** np.array([[-8.0], [0.0], [3.0], [8.0]]),
    "scale 1e-10": 1e-10 * BASE,
    "scale 1e10": 1e10 * BASE,
}


@EVERY
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_gradients_give_finite_updates(name, case):
    rows = jnp.asarray(DEGENERATE[case], jnp.float32)
    direction, state = updater(name)(rows, jnp.array([1.0, 0.5, 2.0, 0.1]))
    assert jnp.isfinite(direction).all()
    assert jnp.isfinite(state.weights).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.inner) if leaf.dtype == jnp.float32)
    if case == "all zero":
        assert (direction == 0).all()
    assert jnp.linalg.norm(direction) <= 32 * np.linalg.norm(np.asarray(rows, np.float64), axis=1).sum()


@EVERY_METHOD
def test_many_tasks(name):
    rows, losses = random_rows(5, num_tasks=64, num_params=40)
    direction, state = updater(name, 64)(rows, losses)
    assert state.weights.shape == (64,)
    assert jnp.isfinite(direction).all()


@EVERY
def test_a_task_without_labels_stops_mgda_only(name):
    """Its loss and gradient are 0. Weighted sums go on; MGDA stops, as a zero row means a Pareto-stationary point."""
    rows, losses = random_rows(3)
    direction, _ = updater(name)(rows.at[1].set(0.0), losses.at[1].set(0.0))
    assert jnp.isfinite(direction).all()
    assert (jnp.linalg.norm(direction) > 0) == (not name.startswith("mgda"))


# Transformations and state.


@EVERY_METHOD
def test_under_vmap_it_is_the_loop(name):
    method = method_of(name)
    batch = [random_rows(seed) for seed in range(3)]
    rows, losses = (jnp.stack(part) for part in zip(*batch, strict=True))
    update = jax.jit(jax.vmap(lambda *args: method.update(args[0], method.init(None), losses=args[1])))
    directions, states = update(rows, losses)
    for index, (single_rows, single_losses) in enumerate(batch):
        expected, state = updater(name)(single_rows, single_losses)
        assert_directions_close(directions[index], expected, single_rows, state.weights, 1e-4)
        np.testing.assert_allclose(states.weights[index], state.weights, rtol=1e-3, atol=1e-4)


@EVERY_METHOD
def test_a_jitted_loop_is_a_scan_and_traces_twice(name):
    method, traces = method_of(name), []

    @jax.jit
    def step(state, rows, losses):
        traces.append(1)
        direction, state = method.update(rows, state, losses=losses)
        return state, direction

    batch = [random_rows(seed) for seed in range(4)]
    state, directions = method.init(None), []
    for rows, losses in batch:
        state, direction = step(state, rows, losses)
        directions.append(direction)
    assert len(traces) == 2  # the deferred state, then arrays

    inputs = tuple(jnp.stack(part) for part in zip(*batch, strict=True))
    ready = optim.init(method, None, num_tasks=K)
    final, scanned = jax.jit(lambda s, xs: jax.lax.scan(lambda c, x: step(c, *x), s, xs))(ready, inputs)
    for ours, expected, (rows, _) in zip(scanned, directions, batch, strict=True):
        assert_directions_close(ours, expected, rows, np.ones(K), 1e-4)
    assert jax.tree.structure(final) == jax.tree.structure(state) == jax.tree.structure(ready)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), s) for s in (final, state, ready)]
    assert shapes[0] == shapes[1] == shapes[2]


@EVERY_METHOD
def test_updates_keep_structure_and_dtype(name):
    params = {"b": jnp.ones((2, 3), jnp.bfloat16), "a": (jnp.ones(()), [jnp.ones((4,), jnp.float16)])}
    rng = np.random.default_rng(0)
    jacobian = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(K, *p.shape)), p.dtype), params)
    method = method_of(name)
    gradient, state = method.update(jacobian, method.init(params), params, losses=jnp.ones(K))
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    for leaf, param in zip(jax.tree.leaves(gradient), jax.tree.leaves(params), strict=True):
        assert (leaf.shape, leaf.dtype) == (param.shape, param.dtype)
        assert jnp.isfinite(leaf).all()
    assert state.weights.dtype == state.gramian.dtype == jnp.float32


@EVERY
def test_non_finite_rows_propagate(name):
    """The default policy: a NaN is never turned into a silent other update."""
    rows, losses = random_rows(4)
    direction, _ = updater(name)(rows.at[0, 0].set(jnp.nan), losses)
    assert jnp.isnan(direction[0])
