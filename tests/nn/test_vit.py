import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.vit import (
    Block,
    PatchEmbed,
    ViT,
    ViTConfig,
    drop_path,
    interpolate_positions,
    patch_grid,
    stack_layers,
    to_map,
    unstack_layers,
)

CONFIG = ViTConfig(patch=4, width=8, depth=3, num_heads=2, cls_token=True)
NAMES = {"blocks": ["block_0", "block_1", "block_2"]}


@functools.cache
def images():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)


def random_like(shapes):
    """Random numbers in every parameter: no compilation of an initialisation."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


@functools.cache
def params():
    return random_like(jax.eval_shape(ViT(CONFIG).init, jax.random.key(1), images())["params"])


@functools.cache
def features():
    return jax.jit(ViT(CONFIG).apply)({"params": params()}, images())


def test_patch_embedding_is_an_affine_map_of_each_patch():
    x = images()
    embed = PatchEmbed(4, 8, cls_token=True)
    variables = random_like(jax.eval_shape(embed.init, jax.random.key(0), x))
    tokens, p = jax.jit(embed.apply)(variables, x), variables["params"]
    assert set(p) == {"kernel", "bias", "positions", "cls"} and tokens.shape == (2, 7, 8)
    patch = np.asarray(x)[1, 4:8, 8:12].reshape(-1)  # second row, third column: token 1 + 3 + 2
    np.testing.assert_allclose(tokens[1, 6], patch @ p["kernel"] + p["bias"] + p["positions"][6], atol=1e-5)
    np.testing.assert_allclose(tokens[0, 0], p["cls"][0] + p["positions"][0], atol=1e-6)


def test_block_is_attention_then_mlp_on_normed_residuals():
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    block = Block(num_heads=2, mlp_ratio=2.0)
    variables = random_like(jax.eval_shape(block.init, jax.random.key(1), x))
    p = variables["params"]

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    qkv = p["attention"]["qkv"]
    heads = np.einsum("bnd,dif->bnif", norm(x, p["norm_1"]), qkv["kernel"]) + qkv["bias"]
    heads = heads.reshape(2, 5, 3, 2, 4)
    attended = np.zeros((2, 5, 2, 4))
    for b in range(2):
        for h in range(2):
            q, k, v = heads[b, :, 0, h], heads[b, :, 1, h], heads[b, :, 2, h]
            scores = np.exp(q @ k.T / 2.0)
            attended[b, :, h] = scores / scores.sum(-1, keepdims=True) @ v
    u = x + dense(attended.reshape(2, 5, 8), p["attention"]["out"])
    hidden = jax.nn.gelu(dense(norm(u, p["norm_2"]), p["feed_forward"]["in"]), approximate=False)
    expected = u + dense(np.asarray(hidden), p["feed_forward"]["out"])
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x), expected, atol=1e-5)


def test_trunk_returns_every_block_without_the_class_token():
    assert [f.shape for f in features()] == [(2, 6, 8)] * 3
    norm, last = params()["norm"], np.asarray(features()[-1])
    unscaled = (last - norm["bias"]) / norm["scale"]  # the last is normed, the others are not
    np.testing.assert_allclose(unscaled.mean(-1), 0.0, atol=1e-4)
    np.testing.assert_allclose(unscaled.std(-1), 1.0, atol=1e-3)
    assert abs(np.asarray(features()[0]).mean(-1)).max() > 1e-2


def test_scanned_and_unrolled_trunk_agree():
    scanned = ViT(dataclasses.replace(CONFIG, scan=True, remat="dots"))
    stacked = stack_layers(params(), NAMES)
    expected_tree = jax.eval_shape(scanned.init, jax.random.key(0), images())["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, expected_tree)

    def energy(model, params):
        return sum(jnp.mean(f * jnp.sin(f)) for f in model.apply({"params": params}, images()))

    # Gradients of all parameters: what is stacked, in which order, and the recomputation.
    unrolled = jax.jit(jax.value_and_grad(functools.partial(energy, ViT(CONFIG))))(params())
    value, gradient = jax.jit(jax.value_and_grad(functools.partial(energy, scanned)))(stacked)
    np.testing.assert_allclose(value, unrolled[0], rtol=1e-5)
    for path, leaf in jax.tree.leaves_with_path(unstack_layers(gradient, NAMES)):
        expected = functools.reduce(lambda tree, key: tree[key.key], path, unrolled[1])
        np.testing.assert_allclose(leaf, expected, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_what_is_kept_for_the_way_back():
    def kept(remat, scan):
        model = ViT(dataclasses.replace(CONFIG, remat=remat, scan=scan))
        shapes = jax.eval_shape(model.init, jax.random.key(0), images())["params"]
        pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply({"params": p}, images()), p)[1], shapes)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    for scan in (False, True):
        sizes = [kept(remat, scan) for remat in ("none", "dots", "full")]
        assert sizes[0] > 1.2 * sizes[1] > 1.2**2 * sizes[2], sizes
    assert [kept(False, scan=True), kept(True, scan=True)] == [sizes[0], sizes[2]]


def test_unstacking_reverses_stacking():
    tree = {"a": 1, "x_0": {"k": jnp.arange(2.0)}, "x_1": {"k": jnp.arange(2.0) + 5}, "y_0": {"k": jnp.ones(3)}}
    groups = {"groups/x": ["x_0", "x_1"], "groups/y": ["y_0"]}
    stacked = stack_layers(tree, groups)
    assert set(stacked) == {"a", "groups"} and stacked["groups"]["x"]["k"].shape == (2, 2)
    back = unstack_layers(stacked, groups)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    x = jnp.ones((4000, 2, 3))
    y = np.asarray(drop_path(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert (y == y[:, :1, :1]).all()
    np.testing.assert_allclose(y.mean(), 1.0, atol=4 * np.sqrt(0.25 / 0.75 / 4000))


def test_dropout_and_drop_path_act_in_training_only():
    noisy = ViT(dataclasses.replace(CONFIG, dropout=0.5, drop_path=0.5, scan=True))
    variables = {"params": stack_layers(params(), NAMES)}

    @jax.jit
    def train(key):
        return noisy.apply(variables, images(), train=True, rngs={"dropout": key})[-1]

    assert not np.allclose(train(jax.random.key(0)), train(jax.random.key(1)))
    np.testing.assert_array_equal(train(jax.random.key(0)), train(jax.random.key(0)))
    np.testing.assert_allclose(jax.jit(noisy.apply)(variables, images())[-1], features()[-1], atol=1e-4)
    assert ViTConfig(depth=3, drop_path=0.5).drop_path_rates == (0.0, 0.25, 0.5)


def test_positions_of_another_grid():
    positions = jax.random.normal(jax.random.key(0), (7, 8))
    np.testing.assert_allclose(interpolate_positions(positions, (2, 3), (2, 3)), positions, atol=1e-6)
    flat = jnp.ones((6, 8))
    np.testing.assert_allclose(interpolate_positions(flat, (2, 3), (5, 4)), np.ones((20, 8)), atol=1e-5)
    larger = interpolate_positions(positions, (2, 3), (4, 6))
    assert larger.shape == (25, 8)
    np.testing.assert_array_equal(larger[0], positions[0])  # the class token's
    with pytest.raises(ValueError, match="2 x 2 has 4 positions"):
        interpolate_positions(positions, (2, 2), (4, 4))


def test_maps_are_in_row_order():
    tokens = jnp.arange(6.0)[None, :, None]
    np.testing.assert_array_equal(to_map(tokens, (2, 3))[0, :, :, 0], [[0, 1, 2], [3, 4, 5]])
    assert patch_grid((8, 12), 4) == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViTConfig(width=10, num_heads=4), "num_heads=4 must divide width=10"),
        (lambda: ViTConfig(depth=0), "depth must be positive"),
        (lambda: ViTConfig(remat="some"), "remat must be a bool or one of none, dots, full, got 'some'"),
        (lambda: ViTConfig(drop_path=1.0), r"drop_path must lie in \[0, 1\)"),
        (lambda: patch_grid((10, 8), 4), "patch=4 must divide"),
        (lambda: to_map(jnp.zeros((1, 5, 2)), (2, 3)), "needs 6 tokens, got 5"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
