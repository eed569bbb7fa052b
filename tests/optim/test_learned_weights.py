"""Weights learned from the losses: against their objectives, their fixed points, and gradient descent on both.

Letters: K tasks; s_k the learned number of task k.
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
from mtjax.optim.learned_weights import imtl_l, uncertainty

ROWS = jnp.array([[1.0, 2.0], [-3.0, 0.5], [0.0, 4.0]])
LOSSES = jnp.array([0.5, 2.0, 10.0])


def update(method, losses=LOSSES, rows=ROWS):
    return method.update(rows, method.init(None), losses=losses)


# Uncertainty weighting.


def objective(scale, log_variance, losses):
    """Kendall et al.: sum_k scale_k exp(-s_k) L_k + s_k / 2."""
    return jnp.sum(jnp.asarray(scale) * jnp.exp(-log_variance) * losses + log_variance / 2)


@pytest.mark.parametrize("scale", [0.5, 1.0, [0.5, 1.0, 2.0]])
@pytest.mark.parametrize("start", [0.0, -0.5])
def test_uncertainty_weights_then_steps_down_its_objective(scale, start):
    """With plain gradient descent as its optimiser: w = scale exp(-s), s <- s - rate d objective / ds."""
    method = uncertainty(optax.sgd(0.1), init_log_variance=start, scale=scale)
    gradient, state = update(method)
    log_variance = jnp.full(3, start)
    np.testing.assert_allclose(state.weights, jnp.asarray(scale) * jnp.exp(-log_variance), rtol=1e-6)
    np.testing.assert_allclose(gradient, state.weights @ ROWS, rtol=1e-5)
    slope = jax.grad(lambda s: objective(scale, s, LOSSES))(log_variance)
    np.testing.assert_allclose(state.inner.log_variance, log_variance - 0.1 * slope, rtol=1e-6)


@functools.cache
def long_run(scale):
    """jitted: losses -> state after 1500 updates with the same losses."""
    method = uncertainty(optax.adam(optax.cosine_decay_schedule(0.1, 1500), b2=0.9), scale=scale)
    start = optim.init(method, None, num_tasks=3)

    def run(losses):
        return jax.lax.scan(lambda s, _: (method.update(ROWS, s, losses=losses)[1], None), start, length=1500)[0]

    return jax.jit(run)


@settings(deadline=None, max_examples=10)
@given(
    losses=st.lists(st.floats(0.01, 100.0), min_size=3, max_size=3).map(np.float32),
    scale=st.sampled_from([0.5, 1.0]),
)
def test_uncertainty_converges_to_the_logarithm_of_the_loss(losses, scale):
    """d objective / ds_k = 1/2 - scale_k exp(-s_k) L_k = 0: s_k = log(2 scale_k L_k), w_k = 1 / (2 L_k)."""
    state = long_run(scale)(losses)
    np.testing.assert_allclose(state.inner.log_variance, np.log(2 * scale * losses), atol=1e-3)
    np.testing.assert_allclose(state.weights, 0.5 / losses, rtol=1e-3)


def test_uncertainty_is_joint_descent_on_parameters_and_variances():
    """One chain of (uncertainty by SGD, SGD) is plain gradient descent on the objective over (theta, s)."""

    def loss_fn(params):
        return {"b": (params["w"] ** 2).sum(), "a": ((params["w"] - 2) ** 2).sum() * params["v"] ** 2}

    def joint(variables):
        params, log_variance = variables
        return objective(0.5, log_variance, jnp.stack(list(loss_fn(params).values())))

    params = {"w": jnp.array([1.0, -0.5]), "v": jnp.array(0.7)}
    tx = optax.chain(uncertainty(optax.sgd(0.05)), optax.sgd(0.05))
    state = optim.init(tx, params, num_tasks=2)
    expected = (params, jnp.zeros(2))
    for _ in range(5):
        losses, jacobian = mtjax.value_and_jacobian(loss_fn)(params)
        updates, state = tx.update(jacobian, state, params, losses=losses)
        params = optax.apply_updates(params, updates)
        expected = jax.tree.map(lambda x, g: x - 0.05 * g, expected, jax.grad(joint)(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected[0])
    np.testing.assert_allclose(state[0].inner.log_variance, expected[1], rtol=1e-5)


def test_weight_decay_of_the_model_does_not_touch_the_variances():
    plain, decayed = (
        optax.chain(uncertainty(optax.sgd(0.1)), optimizer)
        for optimizer in (optax.sgd(0.1), optax.adamw(0.1, weight_decay=1.0))
    )
    params = jnp.ones(2)
    states = [tx.update(ROWS, tx.init(params), params, losses=LOSSES)[1] for tx in (plain, decayed)]
    assert states[0][0].inner.log_variance.tolist() == states[1][0].inner.log_variance.tolist()


def test_uncertainty_checks_the_number_of_scales():
    with pytest.raises(ValueError) as error:
        update(uncertainty(scale=[0.5, 1.0]))
    assert str(error.value) == "uncertainty got 2 scales for 3 tasks"


# IMTL-L.


def test_imtl_l_by_hand():
    method = imtl_l(optax.sgd(0.5))
    state = method.init(None)
    # s = 0, so w = 1; s <- 0 - 0.5 (L - 1) = (-0.5, 0.25); then w = e^s.
    for expected in ([1.0, 1.0], [np.exp(-0.5), np.exp(0.25)]):
        _, state = method.update(jnp.eye(2), state, losses=jnp.array([2.0, 0.5]))
        np.testing.assert_allclose(state.weights, expected, rtol=1e-6)


def test_imtl_l_is_uncertainty_weighting_in_other_letters():
    """sum e^s L - s = 2 (sum e^s L / 2 - s / 2): w is twice as large, and s = -log variance moves half as fast."""
    ours, theirs = imtl_l(optax.sgd(0.05)), uncertainty(optax.sgd(0.1))
    a, b = ours.init(None), theirs.init(None)
    for scale in (1.0, 0.3, 2.0):
        _, a = ours.update(ROWS, a, losses=scale * LOSSES)
        _, b = theirs.update(ROWS, b, losses=scale * LOSSES)
        np.testing.assert_allclose(a.weights, 2 * b.weights, rtol=1e-6)
        np.testing.assert_allclose(a.inner.log_scale, -b.inner.log_variance, rtol=1e-6)


@functools.cache
def long_run_of_imtl_l():
    method = imtl_l(optax.adam(optax.cosine_decay_schedule(0.1, 1500), b2=0.9))
    start = optim.init(method, None, num_tasks=3)

    def run(losses):
        return jax.lax.scan(lambda s, _: (method.update(ROWS, s, losses=losses)[1], None), start, length=1500)[0]

    return jax.jit(run)


@settings(deadline=None, max_examples=5)
@given(losses=st.lists(st.floats(0.01, 100.0), min_size=3, max_size=3).map(np.float32))
def test_imtl_l_brings_every_loss_to_one(losses):
    np.testing.assert_allclose(long_run_of_imtl_l()(losses).weights * losses, 1.0, rtol=1e-3)


# Both.


@pytest.mark.parametrize("method", [uncertainty(), imtl_l()])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_losses_that_are_not_finite_spoil_all_weights(method, bad):
    assert np.isnan(update(method, LOSSES.at[1].set(bad))[1].weights).all()


@pytest.mark.parametrize("method", [uncertainty(optax.sgd(100.0)), imtl_l(optax.sgd(100.0))])
def test_the_weight_of_a_loss_that_stays_at_zero_stays_finite(method):
    """s goes to infinity, where it belongs; e^s must not: infinity times the gradient 0 is NaN."""
    state = method.init(None)
    for _ in range(4):
        gradient, state = method.update(jnp.array([[0.0], [1.0]]), state, losses=jnp.array([0.0, 1.0]))
        assert np.isfinite(state.weights).all() and gradient == state.weights[1]
    assert state.weights[0] == jnp.finfo(jnp.float32).max


@pytest.mark.parametrize("make", [lambda scale: uncertainty(scale=scale), lambda scale: imtl_l()])
def test_those_who_stay_do_as_they_would_alone(make, rng):
    """Three steps of four tasks, then two without the second: its weight is 0, its s and its moments stay."""
    kept = np.array([True, False, True, True])
    scale = np.array([0.5, 1.0, 0.5, 1.0])
    four, three = make(scale).weighting, make(scale[kept]).weighting
    mine = lambda state: jax.tree.map(lambda x: x[kept] if x.shape == (4,) else x, state)  # noqa: E731
    state = four.init(4)
    for step in range(5):
        losses = jnp.asarray(rng.uniform(0.2, 3.0, 4), jnp.float32)
        if step < 3:
            _, state = four.weigh(None, losses, state, jnp.ones(4, bool))
            continue
        before = state
        expected, rest = three.weigh(None, losses[kept], mine(state), jnp.ones(3, bool))
        weights, state = four.weigh(None, jnp.where(kept, losses, 0.0), state, jnp.asarray(kept))
        assert weights[1] == 0
        np.testing.assert_allclose(weights[kept], expected, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mine(state), rest)
        jax.tree.map(lambda new, old: new.shape == () or np.testing.assert_equal(new[1], old[1]), state, before)
