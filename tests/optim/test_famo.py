"""FAMO against its equations, written out in NumPy, and its limits.

Letters: K tasks; L_k losses, b_k lower bounds; xi logits, z = softmax(xi).
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
from mtjax.optim.famo import famo

K = 3
ROWS = jnp.array([[1.0, 2.0], [-3.0, 0.5], [0.0, 4.0]])


@functools.cache
def steps(method=None, num_tasks=K):
    """jitted: losses before [T, K] and after [T, K] -> weights [T, K] and logits [T, K] after each step."""
    method = method or famo(0.1, weight_decay=0.5)
    rows = jnp.eye(num_tasks)

    def body(state, pair):
        _, state = method.update(rows, state, losses=pair[0])
        seen = optim.observe(method, state, pair[1])
        return seen, (state.weights, seen.inner.logits)

    start = optim.init(method, None, num_tasks=num_tasks)
    return jax.jit(lambda before, after: jax.lax.scan(body, start, (before, after))[1])


def numpy_famo(before, after, rate, decay, epsilon=0.0):
    """The authors' loop in float64: the weighted logarithms, then Adam with L2 regularisation on J^T delta."""
    xi, first, second = np.zeros(before.shape[1]), 0.0, 0.0
    weights, logits = [], []
    for t, (old, new) in enumerate(zip(before, after, strict=True), 1):
        z = np.exp(xi) / np.exp(xi).sum()
        share = z / (old + epsilon)
        weights.append(share / share.sum())
        delta = np.log(old + epsilon) - np.log(new + epsilon)
        slope = (np.diag(z) - np.outer(z, z)) @ delta + decay * xi
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        xi = xi - rate * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        logits.append(xi)
    return np.array(weights), np.array(logits)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_it_is_the_authors_loop(seed):
    rng = np.random.default_rng(seed)
    before, after = 10 ** rng.uniform(-3, 3, (2, 6, K))
    ours = steps()(jnp.asarray(before, jnp.float32), jnp.asarray(after, jnp.float32))
    weights, logits = numpy_famo(before, after, rate=0.1, decay=0.5)
    np.testing.assert_allclose(ours[0], weights, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(ours[1], logits, rtol=2e-3, atol=2e-4)


def test_by_hand():
    """L = (1, 3): w = (1, 1/3) / (4/3) = (0.75, 0.25). The first halves, the second stays: delta = (log 2, 0),
    J^T delta = z (delta - z delta) = 0.5 (log 2 / 2, -log 2 / 2), and Adam's first step is the learning rate."""
    method = famo(0.025)
    gradient, state = method.update(ROWS[:2], method.init(None), losses=jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(state.weights, [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.75 * ROWS[0] + 0.25 * ROWS[1], rtol=1e-6, atol=1e-6)
    state = optim.observe(method, state, {"a": jnp.array(0.5), "b": jnp.array(3.0)})
    np.testing.assert_allclose(state.inner.logits, [-0.025, 0.025], rtol=1e-5)
    first_moment = state.inner.optimizer_state[1][0].mu
    np.testing.assert_allclose(first_moment, 0.1 * np.array([0.25, -0.25]) * np.log(2), rtol=1e-5)


def test_the_direction_descends_the_weighted_logarithms():
    """d is the gradient of c sum_k z_k log(L_k - b_k), with c and z held fixed."""
    bounds, logits = jnp.array([0.1, 0.0, -1.0]), jnp.array([0.3, -0.2, 0.5])
    method = famo(min_losses=bounds.tolist())

    def loss_fn(theta):
        return jnp.stack([jnp.sum(theta**2) + 1.0, jnp.exp(theta[0]), 0.5 + jnp.cos(theta[1])])

    theta = jnp.array([0.4, -0.7])
    state = optim.init(method, theta, num_tasks=K)
    state = state._replace(inner=state.inner._replace(logits=logits))
    losses, gradient, _ = mtjax.value_and_update(loss_fn, method)(theta, state)
    z = jax.nn.softmax(logits)
    c = 1 / jnp.sum(z / (losses - bounds))
    expected = jax.grad(lambda p: c * jnp.sum(z * jnp.log(loss_fn(p) - bounds)))(theta)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_units_of_losses_do_not_matter():
    """Losses in other units have other gradients: w_k s_k, and what is learned, stay in proportion."""
    rng = np.random.default_rng(0)
    before, after = rng.uniform(0.5, 2.0, (2, 4, K))
    units = np.array([2.0**-20, 1.0, 2.0**30])
    weights, logits = steps()(jnp.asarray(before, jnp.float32), jnp.asarray(after, jnp.float32))
    other, other_logits = steps()(jnp.asarray(before * units, jnp.float32), jnp.asarray(after * units, jnp.float32))
    np.testing.assert_allclose(other_logits, logits, atol=1e-4)
    share = np.asarray(other) * units
    np.testing.assert_allclose(share / share.sum(1, keepdims=True), weights, rtol=1e-3)


# Limits.


def weights_of(losses, **options):
    method = famo(**options)
    rows = jnp.ones((len(losses), 1))
    return method.update(rows, method.init(None), losses=jnp.asarray(losses))[1].weights


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.0, 1.0], [1.0, 0.0]),
        ([1e-30, 1.0], [1.0, 1e-30]),  # an epsilon of 1e-8 would say (1, 1e-8)
        ([0.0, 0.0, 5.0], [0.5, 0.5, 0.0]),
        ([0.0, 0.0], [0.5, 0.5]),
        ([1e30, 1e-30], [0.0, 1.0]),
        ([1e10], [1.0]),
    ],
)
def test_small_and_zero_losses_are_a_limit(losses, expected):
    np.testing.assert_allclose(weights_of(losses), expected, rtol=1e-4, atol=1e-37)


def test_a_bound_is_where_a_loss_counts_as_zero():
    np.testing.assert_allclose(weights_of([1.5, 3.0], min_losses=[0.5, 1.0]), [2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(weights_of([0.5, 3.0], min_losses=0.5), [1.0, 0.0], atol=1e-30)


def test_a_loss_that_comes_to_zero_and_goes_from_it_leaves_finite_logits():
    before, after = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0]]), jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    weights, logits = steps()(before, after)
    assert jnp.isfinite(weights).all()
    assert jnp.isfinite(logits).all()


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_what_is_not_a_loss_gives_nan(bad):
    assert jnp.isnan(weights_of([1.0, bad, 2.0])).all()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="learning_rate and weight_decay must be >= 0, got -1"):
        famo(-1.0)
    with pytest.raises(ValueError, match="famo got 2 min_losses for 3 tasks"):
        weights_of([1.0, 1.0, 1.0], min_losses=[0.0, 0.0])


# Observation.


def test_without_an_observation_nothing_is_learned():
    method = famo()
    state = method.init(None)
    for losses in ([1.0, 2.0, 4.0], [0.1, 2.0, 4.0]):
        _, state = method.update(ROWS, state, losses=jnp.array(losses))
        assert (state.inner.logits == 0).all()
    np.testing.assert_allclose(state.weights, np.array([40, 2, 1]) / 43, rtol=1e-5)


def test_an_observation_counts_once_and_only_after_an_update():
    method = famo()
    fresh = optim.init(method, None, num_tasks=K)
    jax.tree.map(np.testing.assert_array_equal, optim.observe(method, fresh, jnp.ones(K)), fresh)
    _, state = method.update(ROWS, fresh, losses=jnp.array([1.0, 2.0, 3.0]))
    once = optim.observe(method, state, jnp.array([0.5, 2.0, 3.0]))
    assert (once.inner.logits != 0).any()
    jax.tree.map(np.testing.assert_array_equal, optim.observe(method, once, jnp.ones(K)), once)


def test_a_skipped_step_is_not_observed():
    method = optim.nonfinite(famo(), "skip_step")
    _, state = method.update(ROWS, method.init(None), losses=jnp.array([1.0, 2.0, 3.0]))
    state = optim.observe(method, state, jnp.array([0.5, 2.0, 3.0]))
    gradient, skipped = method.update(ROWS.at[0].set(jnp.nan), state, losses=jnp.array([1.0, 2.0, 3.0]))
    assert (gradient == 0).all()
    after = optim.observe(method, skipped, jnp.array([9.0, 9.0, 9.0]))
    jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)


def test_a_task_that_is_left_out_changes_nothing_for_the_others():
    """Two updates; the middle task drops out in the second one, in `update` or only in what is observed."""
    whole, part = (optim.nonfinite(famo(0.1, weight_decay=0.1), "drop_task") for _ in range(2))
    keep = np.array([0, 2])
    first, second, third = jnp.array([1.0, 5.0, 3.0]), jnp.array([0.5, 2.0, 3.0]), jnp.array([0.4, 9.0, 1.0])
    _, state = whole.update(ROWS, whole.init(None), losses=first)
    state = optim.observe(whole, state, second.at[1].set(jnp.nan))
    _, alone = part.update(ROWS[keep], part.init(None), losses=first[keep])
    alone = optim.observe(part, alone, second[keep])
    np.testing.assert_allclose(state.inner.logits[keep], alone.inner.logits, rtol=1e-6)
    assert state.inner.logits[1] == 0

    gradient, state = whole.update(ROWS.at[1].set(jnp.inf), state, losses=second.at[1].set(jnp.nan))
    expected, alone = part.update(ROWS[keep], alone, losses=second[keep])
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(state.weights, [alone.weights[0], 0.0, alone.weights[1]], rtol=1e-6)
    state, alone = optim.observe(whole, state, third), optim.observe(part, alone, third[keep])
    np.testing.assert_allclose(state.inner.logits[keep], alone.inner.logits, rtol=1e-5)
    assert state.inner.logits[1] == 0


def test_it_evens_out_what_is_gained():
    """Two quadratics of one parameter, started nearer to one minimum: equal weights of log-losses go on to that minimum
    and let the other loss rise. What FAMO learns keeps the worse of the two better, for three starts under vmap."""

    def loss_fn(theta):
        return 0.5 * jnp.array([1.0, 0.02]) * (theta - jnp.array([2.0, -1.0])) ** 2

    def train(rate, start):
        method = famo(rate, weight_decay=0.0)
        update = mtjax.value_and_update(lambda p: loss_fn(p[0]), method)

        def body(carry, _):
            theta, state = carry
            _, gradient, state = update(theta, state)
            theta = theta - 0.2 * gradient
            return (theta, optim.observe(method, state, loss_fn(theta[0]))), None

        (theta, state), _ = jax.lax.scan(body, (start, optim.init(method, start, num_tasks=2)), length=400)
        return loss_fn(theta[0]), state.inner.logits

    starts = jnp.array([[0.1], [-0.3], [1.2]])
    plain, _ = jax.jit(jax.vmap(functools.partial(train, 0.0)))(starts)
    losses, logits = jax.jit(jax.vmap(functools.partial(train, 0.025)))(starts)
    begin = jax.vmap(lambda s: loss_fn(s[0]))(starts)
    gain, plain_gain = jnp.log(begin / losses), jnp.log(begin / plain)
    assert (gain.min(1) > plain_gain.min(1)).all()
    assert (logits != 0).all()
