"""Auto-Lambda and MOML against derivatives through the inner step, by automatic and by finite differences.

Letters: K tasks; w weights, lambda those of Auto-Lambda; eta the inner learning rate.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtjax
from mtjax import optim
from mtjax.optim.bilevel import auto_lambda, moml

from . import reference

K, ETA = 3, 0.05
PARAMS = {
    "trunk": jax.random.normal(jax.random.key(1), (3, 4)),
    "heads": tuple(jax.random.normal(jax.random.key(2 + k), (4,)) for k in range(K)),
}
IS_SHARED = {"trunk": True, "heads": False}
BATCH = jax.random.normal(jax.random.key(0), (8, 3))
TRAIN, VAL = BATCH[:4], BATCH[4:]
SGD = optax.sgd(0.01)


def loss_fn(params, x):
    z = jnp.tanh(x @ params["trunk"])
    return {f"task {k}": 2.0 ** (k - 1) * jnp.mean((z @ head - 1) ** 2) for k, head in enumerate(params["heads"])}


def stacked(params, x):
    return jnp.stack(list(loss_fn(params, x).values()))


def looked_ahead(weights, eta=ETA, is_shared=True):
    """f[K], losses on val after one step on train, written with jax.grad; heads take the plain sum if not shared."""
    weighted = jax.grad(lambda p: weights @ stacked(p, TRAIN))(PARAMS)
    if is_shared is not True:
        weighted["heads"] = jax.grad(lambda p: stacked(p, TRAIN).sum())(PARAMS)["heads"]
    return stacked(jax.tree.map(lambda p, g: p - eta * g, PARAMS, weighted), VAL)


def assert_trees_close(ours, expected, tolerance=2e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), ours, expected)


@functools.cache
def step(method, chunk_size=None):
    """The method's route on the two halves, once."""
    route = jax.jit(mtjax.value_and_update(loss_fn, method, chunk_size=chunk_size))
    return route(PARAMS, optim.init(method, PARAMS, num_tasks=K), BATCH)


def slope_of(state, start=0.1):
    """-<v, g_k> up to the positive unit in which it was measured, from one SGD step with learning rate 0.01."""
    return (start - np.asarray(state.inner.task_weights)) / 0.01 * np.asarray(state.inner.unit)


# Auto-Lambda.


@pytest.mark.parametrize("primary", [None, 0, (0, 2)])
@pytest.mark.parametrize("is_shared", [True, IS_SHARED], ids=["all", "trunk"])
def test_the_slope_is_the_derivative_through_the_inner_step(primary, is_shared):
    method = optim.on_shared(auto_lambda(primary, SGD, inner_learning_rate=ETA), is_shared)
    losses, gradient, state = step(method)
    counts = jnp.ones(K) if primary is None else jnp.zeros(K).at[jnp.array(primary)].set(1.0)
    upper = jax.jit(lambda w: counts @ looked_ahead(w, is_shared=is_shared))
    start = jnp.full(K, 0.1)
    np.testing.assert_allclose(ETA * slope_of(state), jax.grad(upper)(start), rtol=2e-3, atol=1e-4)
    finite = [(upper(start + 0.5 * e) - upper(start - 0.5 * e)) for e in jnp.eye(K)]
    np.testing.assert_allclose(ETA * slope_of(state), finite, rtol=0.1, atol=0.02)

    # The parameters then follow the new weights on the train half; heads of their own follow the plain sum.
    weights = state.inner.task_weights
    np.testing.assert_array_equal(state.weights, weights)
    expected = jax.grad(lambda p: weights @ stacked(p, TRAIN))(PARAMS)
    if is_shared is not True:
        expected["heads"] = jax.grad(lambda p: stacked(p, TRAIN).sum())(PARAMS)["heads"]
    assert_trees_close(gradient, expected)
    np.testing.assert_allclose(losses, stacked(PARAMS, TRAIN), rtol=1e-5)
    assert jnp.isnan(state.gramian).all()
    assert state.conflicts == -1


def test_auto_lambda_by_hand():
    """L = (theta^2 / 2, -theta, 3 theta) at theta = 2: g = (2, -1, 3). By hand the slope for task 0 as the only primary
    is -2 g = (-4, 2, -6); in the unit 6 and with SGD of 0.3, lambda = 0.1 + 0.3 (4, -2, 6) / 6 = (0.3, 0, 0.4)."""
    method = auto_lambda(0, optax.sgd(0.3))
    direction, state = method.update(jnp.array([[2.0], [-1.0], [3.0]]), method.init(None))
    np.testing.assert_allclose(state.weights, [0.3, 0.0, 0.4], atol=1e-7)
    np.testing.assert_allclose(direction, [0.6 + 0.0 + 1.2], rtol=1e-6)
    # Two Jacobians: rows of the first are those on val.
    _, other = method.update(
        jnp.array([[2.0], [-1.0], [3.0]]),
        method.init(None),
        independent=(jnp.array([[-1.0], [9.0], [9.0]]), jnp.array([[2.0], [-1.0], [3.0]])),
    )
    np.testing.assert_allclose(other.weights, [0.1 - 0.2, 0.1 + 0.1, 0.1 - 0.3], atol=1e-7)


def test_by_hand_is_the_limit_of_a_short_look_ahead():
    for make in (functools.partial(auto_lambda, 1, SGD), functools.partial(moml, SGD)):
        method = make(inner_learning_rate=1e-6)
        route = mtjax.value_and_update(loss_fn, method)
        _, gradient, state = route(PARAMS, method.init(PARAMS), jnp.concatenate([TRAIN, TRAIN]))
        jacobian = mtjax.value_and_jacobian(loss_fn)(PARAMS, TRAIN)[1]
        expected, expected_state = make().update(jacobian, make().init(PARAMS), PARAMS)
        assert_trees_close((gradient, state.inner), (expected, expected_state.inner), 1e-3)


def test_a_harmful_auxiliary_task_is_turned_off_and_a_helpful_one_kept():
    """One linear model for three regressions: the primary's few noisy labels, many clean ones of the same function, and
    many of its opposite. Weights of the primary's own choice beat equal weights on held-out data."""
    keys = jax.random.split(jax.random.key(0), 4)
    truth = jax.random.normal(keys[0], (20,))

    def regression(theta, batch):
        x, noise = batch
        error = x @ theta[None, :].T - (x @ truth)[:, None] * jnp.array([1.0, 1.0, -1.0])[None, :] - noise
        return jnp.mean(error**2, axis=0)

    def draw(key):
        parts = jax.random.split(key)
        scale = jnp.array([3.0, 0.1, 0.1])
        return jax.random.normal(parts[0], (32, 20)), scale[None, :] * jax.random.normal(parts[1], (32, 3))

    def train(method):
        update = mtjax.value_and_update(regression, method)

        def body(carry, key):
            theta, state = carry
            _, gradient, state = update(theta, state, draw(key))
            return (theta - 0.02 * gradient, state), state.weights

        start = (jnp.zeros(20), optim.init(method, jnp.zeros(20), num_tasks=3))
        (theta, _), weights = jax.lax.scan(body, start, jax.random.split(keys[1], 1500))
        return jnp.sum((theta - truth) ** 2), weights

    method = optim.clip_weights(auto_lambda(0, optax.adam(3e-3), init=1 / 3, inner_learning_rate=0.02), 0.0)
    error, weights = jax.jit(lambda: train(method))()
    equal, _ = jax.jit(lambda: train(optim.linear("mean")))()
    assert weights[-1, 2] == 0.0
    assert weights[-1, 1] > 0.3
    assert error < 0.1 * equal


def test_a_wrapped_rule_still_looks_ahead():
    """`every` skips the look-ahead, `ema` averages weights, `clip_weights` bounds them."""
    method = optim.every(auto_lambda(0, optax.sgd(0.3), inner_learning_rate=ETA), 2)
    route, state, weights = jax.jit(mtjax.value_and_update(loss_fn, method)), method.init(PARAMS), []
    for _ in range(3):
        _, _, state = route(PARAMS, state, BATCH)
        weights.append(state.weights)
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[1] != weights[2]).any()
    _, _, clipped = step(optim.ema(optim.clip_weights(auto_lambda(0, optax.sgd(0.3), inner_learning_rate=ETA), 0.2)))
    np.testing.assert_allclose(clipped.weights, np.maximum(weights[0], 0.2), rtol=1e-5)


# MOML.


def upper_slopes(logits, is_shared=True):
    """a_j of MOML, f64[K, K], by reverse-mode differentiation through softmax and the inner step."""
    jacobian = jax.jit(jax.jacrev(lambda a: looked_ahead(jax.nn.softmax(a), is_shared=is_shared)))(logits)
    return np.asarray(jacobian, np.float64)


@pytest.mark.parametrize(
    ("chunk_size", "is_shared"), [(None, True), (2, IS_SHARED), (1, None)], ids=["rows", "columns", "one by one"]
)
def test_moml_descends_the_shortest_combination_of_the_upper_slopes(chunk_size, is_shared):
    method = optim.on_shared(moml(SGD, inner_learning_rate=ETA), is_shared)
    losses, gradient, state = step(method, chunk_size)
    slopes = upper_slopes(jnp.zeros(K), is_shared)
    expected = reference.mgda(slopes / np.linalg.norm(slopes, axis=1)[:, None]).d
    np.testing.assert_allclose(state.inner.logits, -0.01 * expected, rtol=1e-3, atol=1e-6)
    weights = jax.nn.softmax(state.inner.logits)
    np.testing.assert_allclose(state.weights, weights, rtol=1e-6)
    expected = jax.grad(lambda p: weights @ stacked(p, TRAIN))(PARAMS)
    if is_shared is not True:
        expected["heads"] = jax.grad(lambda p: stacked(p, TRAIN).sum())(PARAMS)["heads"]
    assert_trees_close(gradient, expected)
    np.testing.assert_allclose(losses, stacked(PARAMS, TRAIN), rtol=1e-5)


def test_moml_by_hand():
    """Train gradients (1, 3), val gradients (1, -1): C = ((1, 3), (-1, -3)). With w = (1/2, 1/2) the a_j are in
    proportion to -C_jk + mean C_j: (1, -1) and (-1, 1), opposite: the upper level is stationary. Two val gradients of
    one sign give (1, -1) twice, of unit length (1, -1) / sqrt 2, and SGD of sqrt 2 moves alpha to (-1, 1)."""
    method = moml(optax.sgd(2.0**0.5))
    rows = jnp.array([[1.0], [3.0]])
    _, state = method.update(rows, method.init(None), independent=(jnp.array([[1.0], [-1.0]]), rows))
    np.testing.assert_allclose(state.inner.logits, [0, 0], atol=1e-6)
    _, state = method.update(rows, method.init(None), independent=(jnp.array([[1.0], [4.0]]), rows))
    np.testing.assert_allclose(state.inner.logits, [-1.0, 1.0], rtol=1e-5)


def test_moml_leaves_weights_alone_where_gradients_are_the_same():
    rows = jnp.tile(jnp.array([[0.3, -0.7, 0.1]]), (4, 1))
    method = moml(optax.sgd(1.0))
    _, state = method.update(rows, method.init(None))
    np.testing.assert_array_equal(state.weights, np.full(4, 0.25, np.float32))


# Both.

BOTH = {
    "auto_lambda": functools.partial(auto_lambda, 0, init=0.5),
    "moml": moml,
}
EVERY = pytest.mark.parametrize("name", BOTH)


@functools.cache
def updater(name):
    method = BOTH[name]()
    return jax.jit(method.update), optim.init(method, None, num_tasks=K)


@EVERY
@pytest.mark.parametrize("power", [-30, 30])
def test_scale_equivariance(name, power):
    update, start = updater(name)
    rows = jax.random.normal(jax.random.key(0), (K, 5))
    direction, state = update(rows, start)
    scaled, scaled_state = update(2.0**power * rows, start)
    np.testing.assert_array_equal(scaled, 2.0**power * direction)
    np.testing.assert_array_equal(scaled_state.weights, state.weights)


@EVERY
@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    factors=st.sampled_from([(0, 0, 0), (0, 1, 1), (1e-8, 1, 1e8), (1e10, 1e10, 1e10), (1e-10, 1e-10, 1e-10)]),
    rank=st.sampled_from([1, 3]),
)
def test_degenerate_matrices_give_finite_updates(name, seed, factors, rank):
    update, state = updater(name)
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(K, rank)) @ rng.normal(size=(rank, 5)) * np.array(factors, float)[:, None]
    for _ in range(3):
        direction, state = update(jnp.asarray(rows, jnp.float32), state)
        assert jnp.isfinite(direction).all()
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.inner))


@EVERY
def test_gradients_may_grow_by_any_factor(name):
    update, state = updater(name)
    rows = jax.random.normal(jax.random.key(0), (K, 5))
    for scale in (1e-10, 1.0, 1e10):
        direction, state = update(scale * rows, state)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((direction, state.inner)))


@EVERY
def test_one_task(name):
    method, rows = BOTH[name](), jnp.array([[3.0, -4.0]])
    direction, state = method.update(rows, method.init(None))
    np.testing.assert_allclose(direction, state.weights * rows[0], rtol=1e-6)
    np.testing.assert_allclose(state.weights, {"auto_lambda": 0.5, "moml": 1.0}[name], atol=2e-4)


@EVERY
def test_nan_is_not_hidden(name):
    update, start = updater(name)
    _, state = update(jnp.ones((K, 2)).at[0, 0].set(jnp.nan), start)
    assert jnp.isnan(state.weights).all()


@EVERY
def test_a_task_that_is_left_out_changes_nothing_for_the_others(name):
    whole, part = (optim.nonfinite(BOTH[name](), "drop_task") for _ in range(2))
    rng, keep = np.random.default_rng(0), np.array([0, 2])
    state, alone = whole.init(None), part.init(None)
    for _ in range(2):
        rows = jnp.asarray(rng.normal(size=(K, 5)), jnp.float32)
        gradient, state = whole.update(rows.at[1].set(jnp.inf), state)
        expected, alone = part.update(rows[keep], alone)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.weights, [alone.weights[0], 0.0, alone.weights[1]], rtol=1e-5)


def broken(params, x):
    """The second task's loss is infinite, and its gradient NaN, on batches whose first entry is large."""
    losses = loss_fn(params, jnp.minimum(x, 10.0))
    return losses | {"task 1": jnp.where(x[0, 0] > 100.0, jnp.inf, 1.0) * losses["task 1"]}


@EVERY
@pytest.mark.parametrize("half", [0, 1])
def test_a_step_that_breaks_on_one_half_is_skipped(name, half):
    method = optim.nonfinite(auto_lambda(1) if name == "auto_lambda" else moml(), "skip_step")
    start = optim.init(method, PARAMS, num_tasks=K)
    route = jax.jit(mtjax.value_and_update(broken, method))
    _, gradient, state = route(PARAMS, start, BATCH.at[4 * half, 0].set(1000.0))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    jax.tree.map(np.testing.assert_array_equal, state._replace(present=start.present), start)
    assert not state.present[1]


@pytest.mark.parametrize("half", [0, 1])
def test_moml_leaves_out_a_task_that_breaks_on_one_half(half):
    method = optim.nonfinite(moml(SGD, inner_learning_rate=ETA), "drop_task")
    route = jax.jit(mtjax.value_and_update(broken, method))
    _, gradient, state = route(PARAMS, method.init(PARAMS), BATCH.at[4 * half, 0].set(1000.0))
    assert state.present.tolist() == [True, False, True]
    assert state.weights[1] == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, state)))
    assert (gradient["heads"][1] == 0).all()
    np.testing.assert_allclose(state.weights[0] + state.weights[2], 1.0, rtol=1e-6)


def test_aux_is_that_of_the_train_half():
    def with_aux(params, x):
        return loss_fn(params, x), x.sum()

    for make in BOTH.values():
        method = make()
        (losses, aux), _, _ = mtjax.value_and_update(with_aux, method, has_aux=True)(PARAMS, method.init(PARAMS), BATCH)
        np.testing.assert_allclose(aux, TRAIN.sum(), rtol=1e-5)
        np.testing.assert_allclose(losses, stacked(PARAMS, TRAIN), rtol=1e-5)


def test_wrong_arguments():
    dropping = optim.nonfinite(auto_lambda(), "drop_task")
    for make, message in (
        (lambda: auto_lambda(-1), "primary must be positions >= 0"),
        (lambda: auto_lambda([]), "at least one"),
        (lambda: auto_lambda(3).update(jnp.eye(3), auto_lambda(3).init(None)), "primary task 3, but there are 3 tasks"),
        (lambda: auto_lambda(inner_learning_rate=0.0), "inner_learning_rate must be > 0, got 0.0"),
        (lambda: moml(inner_learning_rate=-1.0), "inner_learning_rate must be > 0"),
        (lambda: mtjax.value_and_update(loss_fn, dropping), "never computes a task's own gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
