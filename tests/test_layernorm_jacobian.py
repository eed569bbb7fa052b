"""Per-task gradients through layer norm at the size where jaxlib 0.10.2 gets them wrong on CPU (jax-ml/jax#39103).

That release fuses the reductions of `vmap(vjp)` wrongly: every row of the Jacobian but the first is off by 20-30 % at
8 tasks, 512 tokens, width 192, and right at half of it; nothing is raised, and small tests pass. This test must stay
large and stay on every backend: it is about what this library does all day.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax

K, TOKENS, WIDTH = 8, 512, 192


def layer_norm_by_hand(x, scale):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale[None, :]


def rms_norm_by_hand(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * scale[None, :]


# With a scale of its own flax happens to dodge the faulty fusion; without it, it is hit.
def flax_layer_norm(x, scale):
    return nn.LayerNorm(use_scale=False, use_bias=False).apply({}, x) * scale[None, :]


def flax_rms_norm(x, scale):
    return nn.RMSNorm(use_scale=False).apply({}, x) * scale[None, :]


@pytest.mark.parametrize("norm", [layer_norm_by_hand, rms_norm_by_hand, flax_layer_norm, flax_rms_norm])
def test_jacobian_equals_a_loop_of_backward_passes(norm):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH), jnp.float32),
        "scale": jnp.asarray(rng.uniform(0.5, 1.5, WIDTH), jnp.float32),
    }
    readout = jnp.asarray(rng.normal(size=(K, TOKENS, WIDTH)), jnp.float32)

    def losses(params):
        return jnp.einsum("ktd,td->k", readout, jnp.tanh(norm(x @ params["kernel"], params["scale"])))

    _, jacobian = jax.jit(mtjax.value_and_jacobian(losses))(params)
    gradient = jax.jit(lambda params, cotangent: jax.vjp(losses, params)[1](cotangent)[0])
    for k in range(K):
        expected = gradient(params, jnp.eye(K)[k])
        for name, leaf in jacobian.items():
            size = np.abs(expected[name]).max()
            np.testing.assert_allclose(leaf[k], expected[name], atol=1e-5 * size, err_msg=f"task {k}, {name}")
