"""Networks of operator learning against loops in numpy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.embeddings import RandomFourierFeatures
from mtjax.nn.operator_layers import CNN, MLP, FixedNorm, ModifiedMLP, ResidualMLP, StackedBranch, rate_of

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)


def random_params(module, *args, seed=0, **kwargs):
    shapes = jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, s.dtype), shapes)


def apply(module, variables, *args, **kwargs):
    run = jax.jit(
        lambda v, *args: module.apply(v, *args, **kwargs), compiler_options={"xla_backend_optimization_level": 0}
    )
    return np.asarray(run(variables, *args))


def affine(p, x):
    return x @ np.asarray(p["kernel"]) + np.asarray(p["bias"])


def layer_norm(p, x, epsilon):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * np.asarray(p["scale"]) + np.asarray(p["bias"])


def test_mlp_equals_a_loop():
    features = RandomFourierFeatures(2)
    module = MLP((4, 6, 2), nn.tanh, nn.relu, norm=functools.partial(nn.LayerNorm, epsilon=1e-2), embed=features)
    variables = random_params(module, X)
    p = variables["params"]
    assert set(p) == {"dense_0", "norm_0", "dense_1", "norm_1", "out"}
    x = np.asarray(features(X))
    for layer in range(2):
        x = np.tanh(layer_norm(p[f"norm_{layer}"], affine(p[f"dense_{layer}"], x), 1e-2))
    expected = np.maximum(affine(p["out"], x), 0)
    np.testing.assert_allclose(apply(module, variables, X), expected, atol=1e-5)
    np.testing.assert_allclose(apply(module, variables, X[:, None])[:, 0], expected, atol=1e-5)  # any leading axes


def test_dropout_by_layer_and_in_training_only():
    assert [rate_of((0.1, 0.2), layer) for layer in range(3)] == [0.1, 0.2, 0.0]
    assert rate_of(0.3, 7) == 0.3
    module = MLP((200, 1), jnp.ones_like, dropout=(0.5,))
    variables = {"params": {"dense_0": {"kernel": jnp.ones((3, 200)), "bias": jnp.zeros(200)},
                            "out": {"kernel": jnp.ones((200, 1)), "bias": jnp.zeros(1)}}}  # fmt: skip
    np.testing.assert_array_equal(apply(module, variables, X), 200.0)
    drawn = apply(module, variables, X, train=True, rngs={"dropout": jax.random.key(0)})
    # Twice a binomial of 200 tosses: mean 200, standard deviation 14.
    assert np.all(np.abs(drawn - 200) < 70) and len(np.unique(drawn)) > 1


def test_modified_mlp_equals_a_loop():
    module = ModifiedMLP((4, 4, 2))
    variables = random_params(module, X)
    p, x = variables["params"], np.asarray(X)
    u, v = np.tanh(affine(p["encoder_u"], x)), np.tanh(affine(p["encoder_v"], x))
    for layer in range(2):
        z = np.tanh(affine(p[f"dense_{layer}"], x))
        x = z * u + (1 - z) * v
    np.testing.assert_allclose(apply(module, variables, X), affine(p["out"], x), atol=1e-5)
    with pytest.raises(ValueError, match=r"hidden layers of one width, got features=\(4, 5, 2\)"):
        ModifiedMLP((4, 5, 2))


def test_residual_mlp_equals_a_loop():
    module = ResidualMLP((4, 5, 6, 3, 2), nn.tanh)
    variables = random_params(module, X)
    p = variables["params"]
    h1 = np.tanh(affine(p["dense_0"], np.asarray(X)))
    h2 = np.tanh(affine(p["dense_1"], h1))
    h3 = np.tanh(affine(p["dense_2"], h2)) + affine(p["proj_2"], h1)
    h4 = np.tanh(affine(p["dense_3"], h3)) + affine(p["proj_3"], h2)
    np.testing.assert_allclose(apply(module, variables, X), affine(p["out"], h4), atol=1e-5)


def test_fixed_norm_starts_as_batch_normalization_and_keeps_its_moments():
    module = FixedNorm(epsilon=1e-2)
    x = X * 3.0 + 1.0
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    moments = np.asarray(x).mean(0), np.asarray(x).var(0)
    np.testing.assert_allclose(y, (np.asarray(x) - moments[0]) / np.sqrt(moments[1] + 1e-2), atol=1e-5)
    other = apply(module, variables, x + 1.0)  # of another batch: the same affine map
    np.testing.assert_allclose(other - y, np.broadcast_to(1 / np.sqrt(moments[1] + 1e-2), y.shape), atol=1e-4)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, x) ** 3)))(variables)["params"]
    assert not np.any(gradient["mean"]) and not np.any(gradient["var"])
    assert np.any(gradient["scale"]) and np.any(gradient["bias"])


def test_stacked_branch_is_p_separate_networks():
    module = StackedBranch(6, (4, 5), nn.tanh)
    variables = random_params(module, X)
    y = apply(module, variables, X)
    assert y.shape == (5, 6)
    single = MLP((4, 5, 1), nn.tanh)
    p = variables["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(p)) == 6 * ((3 * 4 + 4) + (4 * 5 + 5) + (5 * 1 + 1))
    for k in range(6):
        own = jax.tree.map(lambda leaf, k=k: leaf[k], {**p["hidden"], "out": p["out"]})
        np.testing.assert_allclose(y[:, k], single.apply({"params": own}, X)[:, 0], atol=1e-5)


def test_stacked_branch_starts_like_separate_networks():
    variables = jax.jit(StackedBranch(50, (30,)).init)(jax.random.key(0, impl="rbg"), jnp.zeros((2, 20)))
    kernel = variables["params"]["hidden"]["dense_0"]["kernel"]
    assert kernel.shape == (50, 20, 30)
    assert abs(np.std(kernel) * np.sqrt((20 + 30) / 2) - 1) < 0.05  # Glorot: variance 2 / (fan-in + fan-out)


def test_cnn_pools_and_flattens():
    image = jnp.asarray(RNG.normal(size=(2, 9, 8, 2)), jnp.float32)
    module = CNN((3, 4), MLP((5,), nn.tanh))
    variables = random_params(module, image)
    p = variables["params"]
    assert jax.tree.map(jnp.shape, p["conv_1"]) == {"bias": (4,), "kernel": (5, 5, 3, 4)}
    assert p["head"]["out"]["kernel"].shape == (2 * 2 * 4, 5)  # 9 x 8 -> 4 x 4 -> 2 x 2
    x = np.asarray(image)
    for layer in range(2):
        kernel, bias = np.asarray(p[f"conv_{layer}"]["kernel"]), np.asarray(p[f"conv_{layer}"]["bias"])
        padded = np.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)])
        height, width = x.shape[1:3]
        full = sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(5) for j in range(5))
        full = np.maximum(full + bias, 0)[:, : height // 2 * 2, : width // 2 * 2]
        x = full.reshape(2, height // 2, 2, width // 2, 2, -1).mean((2, 4))
    np.testing.assert_allclose(
        apply(module, variables, image), affine(p["head"]["out"], x.reshape(2, -1)), rtol=1e-4, atol=1e-4
    )


def test_cnn_refuses_an_image_that_pooling_uses_up():
    with pytest.raises(ValueError, match=r"Convolution 2 of 3 leaves an image of \(1, 1\), too small"):
        jax.eval_shape(CNN((1, 1, 1), MLP((2,))).init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)))


def test_cnn_of_a_line_without_pooling():
    line = jnp.zeros((2, 12, 1))
    module = CNN((3,), MLP((4,)), pool=1, conv=functools.partial(nn.Conv, kernel_size=(3,), strides=2))
    shapes = jax.eval_shape(module.init, jax.random.key(0), line)
    assert shapes["params"]["head"]["out"]["kernel"].shape == (6 * 3, 4)
