"""Weighted sums: given weights and their errors; uncertainty weighting against its objective and its fixed point.

Letters: K tasks.
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

ROWS = jnp.array([[1.0, 2.0], [-3.0, 0.5], [0.0, 4.0]])
LOSSES = jnp.array([0.5, 2.0, 10.0])


def update(method, losses=LOSSES, rows=ROWS):
    return method.update(rows, method.init(None), losses=losses)


# Fixed weights.


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("sum", [1.0, 1.0, 1.0]),
        ("mean", [1 / 3, 1 / 3, 1 / 3]),
        ([2.0, 0.0, -1.0], [2.0, 0.0, -1.0]),
        ((0, 1, 0), [0.0, 1.0, 0.0]),  # single-task training as a method
        (np.array([0.25, 0.5, 0.25]), [0.25, 0.5, 0.25]),
    ],
)
def test_linear_weights(weights, expected):
    gradient, state = update(optim.linear(weights))
    np.testing.assert_allclose(state.weights, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.array(expected) @ np.asarray(ROWS), rtol=1e-6)
    assert jax.tree.leaves(state.inner) == []


def test_linear_is_the_gradient_of_the_weighted_loss():
    def loss_fn(params):
        return {"b": (params**2).sum(), "a": jnp.sin(params).sum()}

    params, weights = jnp.array([0.3, -1.2]), [0.7, 2.0]
    method = optim.linear(weights)
    _, gradient, _ = mtjax.value_and_weighted_grad(loss_fn, method)(params, method.init(params))
    expected = jax.grad(lambda p: 0.7 * loss_fn(p)["b"] + 2.0 * loss_fn(p)["a"])(params)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_errors_of_linear():
    with pytest.raises(ValueError) as error:
        optim.linear("median")
    assert str(error.value) == "weights must be 'sum', 'mean' or a sequence of numbers, got 'median'"
    for run in (
        update,
        lambda method: mtjax.value_and_weighted_grad(lambda p: p, method)(jnp.ones(3), method.init(None)),
    ):
        with pytest.raises(ValueError) as error:
            run(optim.linear([1.0, 2.0]))
        assert str(error.value) == "linear got 2 weights for 3 tasks"


# Uncertainty weighting.


def objective(scale, log_variance, losses):
    """Kendall et al.: sum_k scale_k exp(-s_k) L_k + s_k / 2."""
    return jnp.sum(jnp.asarray(scale) * jnp.exp(-log_variance) * losses + log_variance / 2)


@pytest.mark.parametrize("scale", [0.5, 1.0, [0.5, 1.0, 2.0]])
@pytest.mark.parametrize("start", [0.0, -0.5])
def test_uncertainty_weights_then_steps_down_its_objective(scale, start):
    """With plain gradient descent as its optimiser: w = scale exp(-s), s <- s - rate d objective / ds."""
    method = optim.uncertainty(optax.sgd(0.1), init_log_variance=start, scale=scale)
    gradient, state = update(method)
    log_variance = jnp.full(3, start)
    np.testing.assert_allclose(state.weights, jnp.asarray(scale) * jnp.exp(-log_variance), rtol=1e-6)
    np.testing.assert_allclose(gradient, state.weights @ ROWS, rtol=1e-5)
    slope = jax.grad(lambda s: objective(scale, s, LOSSES))(log_variance)
    np.testing.assert_allclose(state.inner.log_variance, log_variance - 0.1 * slope, rtol=1e-6)


@functools.cache
def long_run(scale):
    """jitted: losses -> state after 1500 updates with the same losses."""
    method = optim.uncertainty(optax.adam(optax.cosine_decay_schedule(0.1, 1500), b2=0.9), scale=scale)
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
    tx = optax.chain(optim.uncertainty(optax.sgd(0.05)), optax.sgd(0.05))
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
        optax.chain(optim.uncertainty(optax.sgd(0.1)), optimizer)
        for optimizer in (optax.sgd(0.1), optax.adamw(0.1, weight_decay=1.0))
    )
    params = jnp.ones(2)
    states = [tx.update(ROWS, tx.init(params), params, losses=LOSSES)[1] for tx in (plain, decayed)]
    assert states[0][0].inner.log_variance.tolist() == states[1][0].inner.log_variance.tolist()


def test_uncertainty_checks_the_number_of_scales():
    with pytest.raises(ValueError) as error:
        update(optim.uncertainty(scale=[0.5, 1.0]))
    assert str(error.value) == "uncertainty got 2 scales for 3 tasks"
