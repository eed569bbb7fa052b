"""Stacks of convolutions: equal to flax's convolution one by one, shared or own inputs, parts of a stack; the heads."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.decoders import ConvHead, resize_bilinear
from mtjax.nn.stacked_convs import DenseHeads, StackedConv, StackedConvBlock, neighbours

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 2, 4, 5, 6)), jnp.float32)  # [N, B, h, w, C]


def random_params(module, *args):
    shapes = jax.eval_shape(lambda key, x: module.init(key, x, *args[1:]), jax.random.key(0), args[0])
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


@functools.cache
def reference(side):
    """flax's own convolution with the n-th parameters, on the n-th map."""
    conv = StackedConv(3, 7, side)
    params = random_params(conv, X)
    one = jax.jit(lambda p, x: nn.Conv(7, (side, side)).apply({"params": p}, x))
    return params, [one(jax.tree.map(lambda leaf, n=n: leaf[n], params["params"]), X[n]) for n in range(3)]


@pytest.mark.parametrize("side", [1, 3])
def test_equals_convolutions_one_by_one(side):
    conv, (params, expected) = StackedConv(3, 7, side), reference(side)
    np.testing.assert_allclose(conv.apply(params, X), jnp.stack(expected), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        conv.apply(params, X[jnp.array([2, 0])], (2, 0)), jnp.stack([expected[2], expected[0]]), rtol=1e-4, atol=1e-4
    )


def test_a_shared_map_equals_a_repeated_one():
    block = StackedConvBlock(3, 7)
    params = random_params(block, X)
    run = jax.jit(block.apply)
    shared, repeated = run(params, X[0]), run(params, jnp.broadcast_to(X[:1], X.shape))
    np.testing.assert_allclose(shared, repeated, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(block.apply(params, X[0], (1,))[0], shared[1], rtol=1e-4, atol=1e-4)


def test_block_is_convolution_norm_gelu():
    block = StackedConvBlock(3, 7)
    params = random_params(block, X)
    conv = np.asarray(StackedConv(3, 7).apply({"params": params["params"]["conv"]}, X))
    normed = (conv - conv.mean(-1, keepdims=True)) / np.sqrt(conv.var(-1, keepdims=True) + 1e-5)
    norm = {key: np.asarray(value)[:, None, None, None] for key, value in params["params"]["norm"].items()}
    expected = nn.gelu(normed * norm["scale"] + norm["bias"])
    np.testing.assert_allclose(jax.jit(block.apply)(params, X), expected, rtol=1e-3, atol=1e-4)


def test_neighbours_of_any_leading_axes():
    x = jnp.arange(2 * 3 * 4.0).reshape(2, 3, 4, 1)
    around = neighbours(x, 3)
    assert around.shape == (2, 3, 4, 9) and neighbours(x, 1) is x
    np.testing.assert_array_equal(around[..., 4], x[..., 0])
    np.testing.assert_array_equal(around[1, 1, 1].reshape(3, 3), x[1, :3, :3, 0])
    with pytest.raises(ValueError, match="side must be odd"):
        jax.eval_shape(StackedConv(3, 7, 2).init, jax.random.key(0), X)


@pytest.mark.parametrize(("upsample", "grid"), [(2, (8, 10)), (4, (9, 15))])
def test_dense_heads_upsample_at_most_to_the_image(upsample, grid):
    heads, size = {"segmentation": 4, "edge": 1, "depth": 1}, (9, 15)
    module = DenseHeads(heads, 8, upsample)
    params = random_params(module, X, size)
    outputs = jax.jit(lambda params: module.apply(params, X, size))(params)
    alone = jax.jit(lambda params: module.apply(params, X[1:2], size, task="edge"))(params)
    assert {name: y.shape for name, y in outputs.items()} == {name: (2, 9, 15, c) for name, c in heads.items()}
    head = ConvHead(1, 8)
    expected = head.apply({"params": params["params"]["edge"]}, resize_bilinear(X[1], grid), size)
    np.testing.assert_allclose(outputs["edge"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(alone["edge"], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a map for each of the tasks edge, got 3"):
        module.apply(params, X, size, task="edge")
