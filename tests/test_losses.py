"""Losses: hand-computed values, finite gradients for extreme outputs, true derivatives."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import losses

SCALAR_LOSSES = {
    "binary_cross_entropy": losses.binary_cross_entropy,
    "squared_error": losses.squared_error,
    "absolute_error": losses.absolute_error,
    "huber": losses.huber(0.7),
    "poisson": losses.poisson,
    "poisson_full": functools.partial(losses.poisson, full=True),
}
EXTREME = (0.0, 30.0, -30.0, 88.0, -104.0, 1e4, -1e4, 1e18, -1e18)


def test_binary_cross_entropy_by_hand():
    loss = losses.binary_cross_entropy(jnp.array([0.0, 2.0, 2.0]), jnp.array([1.0, 0.0, 0.25]))
    p = 1 / (1 + math.exp(-2.0))
    expected = [math.log(2.0), -math.log(1 - p), -0.25 * math.log(p) - 0.75 * math.log(1 - p)]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_cross_entropy_by_hand(dtype):
    logits = jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 1e4]])
    loss = losses.cross_entropy(logits, jnp.array([0, 2], dtype))
    total = math.exp(1.0) + math.exp(2.0) + math.exp(3.0)
    np.testing.assert_allclose(loss, [math.log(total) - 1.0, 0.0], rtol=1e-6)


def test_regression_losses_by_hand():
    output, label = jnp.array([1.0, 5.0, -2.0]), jnp.array([1.5, 1.0, -2.0])
    np.testing.assert_allclose(losses.squared_error(output, label), [0.25, 16.0, 0.0])
    np.testing.assert_allclose(losses.absolute_error(output, label), [0.5, 4.0, 0.0])
    np.testing.assert_allclose(losses.huber(1.0)(output, label), [0.125, 1.0 * (4.0 - 0.5), 0.0])
    np.testing.assert_allclose(losses.huber(10.0)(output, label), 0.5 * losses.squared_error(output, label))


def test_poisson_is_the_negative_log_likelihood():
    log_rate, count = jnp.array([0.0, 1.0, 3.0]), jnp.array([0.0, 2.0, 19.0])
    expected = [math.exp(z) - y * z for z, y in zip(log_rate.tolist(), count.tolist(), strict=True)]
    np.testing.assert_allclose(losses.poisson(log_rate, count), expected, rtol=1e-5)
    full = [e + math.lgamma(y + 1) for e, y in zip(expected, count.tolist(), strict=True)]
    np.testing.assert_allclose(losses.poisson(log_rate, count, full=True), full, rtol=1e-5)


def test_poisson_continues_smoothly_above_the_largest_rate():
    def loss(z):
        return losses.poisson(jnp.array([z]), jnp.array([0.0]))[0]

    value, slope = jax.vmap(jax.value_and_grad(loss))(jnp.array([29.999, 30.0, 30.001, 31.0]))
    np.testing.assert_allclose(value[:3], [math.exp(29.999), math.exp(30.0), math.exp(30.001)], rtol=1e-5)
    assert (jnp.diff(value) > 0).all()
    np.testing.assert_allclose(slope, math.exp(30.0), rtol=2e-3)


@pytest.mark.parametrize("name", SCALAR_LOSSES)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_gradients_stay_finite_for_extreme_outputs(name, label):
    output = jnp.array(EXTREME)
    gradient = jax.grad(lambda z: SCALAR_LOSSES[name](z, jnp.full_like(z, label)).sum())(output)
    assert gradient.shape == output.shape and gradient.dtype == jnp.float32
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("label", [0, 1])
def test_cross_entropy_gradient_stays_finite(label):
    logits = jnp.stack([jnp.array(EXTREME), jnp.zeros(len(EXTREME))], axis=-1)
    gradient = jax.grad(lambda z: losses.cross_entropy(z, jnp.full(len(EXTREME), label)).sum())(logits)
    assert jnp.isfinite(gradient).all()
    np.testing.assert_allclose(gradient.sum(-1), 0.0, atol=1e-6)


@pytest.mark.parametrize("name", SCALAR_LOSSES)
def test_one_number_per_example_and_true_derivative(name):
    loss = SCALAR_LOSSES[name]
    output, label = jnp.array([-1.3, 0.4, 2.1]), jnp.array([0.0, 1.0, 1.0])
    value, tangent = jax.jvp(lambda z: loss(z, label), (output,), (jnp.ones(3),))
    assert value.shape == (3,) and value.dtype == jnp.float32
    step = 1e-2
    numeric = (loss(output + step, label) - loss(output - step, label)) / (2 * step)
    np.testing.assert_allclose(tangent, numeric, atol=2e-3)


def test_two_classes_agree_with_the_binary_loss():
    logit, label = jnp.array([-3.0, 0.2, 7.0]), jnp.array([0.0, 1.0, 0.0])
    two = jnp.stack([jnp.zeros(3), logit], axis=-1)
    np.testing.assert_allclose(
        losses.cross_entropy(two, label), losses.binary_cross_entropy(logit, label), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", SCALAR_LOSSES)
def test_half_precision_outputs_are_computed_in_float32(name):
    output = jnp.array([0.5, 3.0], jnp.bfloat16)
    assert SCALAR_LOSSES[name](output, jnp.array([1.0, 0.0])).dtype == jnp.float32


def test_huber_rejects_a_useless_delta():
    with pytest.raises(ValueError, match=r"delta > 0.*got 0"):
        losses.huber(0.0)
