"""Decoders: interpolation as in jax.image, shapes, any leading axes, patches in their place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.decoders import PUP, ConvHead, HeatmapHead, LinearUnpatch, interpolation_matrix, resize_bilinear

SIZE = (8, 12)
DECODERS = {
    "pup": (PUP(3, width=8), SIZE),
    "conv": (ConvHead(3, width=8), SIZE),
    "linear": (LinearUnpatch(3), SIZE),
    "heatmap": (HeatmapHead(6), (2, 3)),
    "heatmap_twice": (HeatmapHead(6, upsample=2), (4, 6)),
}


def tokens(*leading):
    return jax.random.normal(jax.random.key(1), (*leading, 2, 3, 8))


@functools.cache
def params(name):
    return jax.jit(lambda key: DECODERS[name][0].init(key, tokens(1), SIZE))(jax.random.key(0))


@functools.cache
def program(name):
    return jax.jit(lambda variables, x: DECODERS[name][0].apply(variables, x, SIZE))


def run(name, x, variables=None):
    return program(name)(params(name) if variables is None else variables, x)


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (3, 4), (2, 9)])
def test_resize_equals_jax_image(size):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    expected = jax.image.resize(x, (2, *size, 5), "bilinear", antialias=False)
    np.testing.assert_allclose(resize_bilinear(x, size), expected, atol=1e-5)


def test_interpolation_keeps_constants_and_lines():
    for size, source in ((7, 3), (12, 4), (3, 8)):
        weights = interpolation_matrix(size, source)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
        assert (weights >= 0).all() and ((weights > 0).sum(1) <= 2).all()
        position = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
        np.testing.assert_allclose(weights @ np.arange(source), position, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_leading_axes_are_images_of_their_own(name):
    decoder, size = DECODERS[name]
    x = tokens(2, 3)
    stacked = run(name, x)
    assert stacked.shape == (2, 3, *size, decoder.channels)
    # One image alone gives the same numbers: nothing is normalised over a batch.
    alone = run(name, x[1, 2])
    np.testing.assert_allclose(stacked[1, 2], alone, atol=2e-5)


@pytest.mark.parametrize("name", ["conv", "linear"])
def test_a_stack_of_seeds(name):
    keys = jax.random.split(jax.random.key(0), 2)
    many = jax.jit(jax.vmap(lambda key: DECODERS[name][0].init(key, tokens(1), SIZE)))(keys)
    together = jax.jit(jax.vmap(program(name), in_axes=(0, None)))(many, tokens(2))
    second = run(name, tokens(2), jax.tree.map(lambda leaf: leaf[1], many))
    np.testing.assert_allclose(together[1], second, atol=2e-5)


def test_unpatch_puts_every_token_where_it_is():
    x = tokens(1)
    kernel = params("linear")["params"]["conv"]["kernel"]
    centre = jnp.zeros_like(kernel).at[1, 1].set(kernel[1, 1])  # a convolution that looks at its own token only
    local = {"params": {**params("linear")["params"], "conv": {**params("linear")["params"]["conv"], "kernel": centre}}}
    before, after = (run("linear", z, local) for z in (x, x.at[0, 1, 2].add(1.0)))
    moved = np.asarray((before != after).any(-1))[0]
    expected = np.zeros(SIZE, bool)
    expected[4:8, 8:12] = True
    np.testing.assert_array_equal(moved, expected)
    # Rows and columns within the patch: the linear map's outputs in the order (row, column, channel).
    bias = jnp.arange(4 * 4 * 3, dtype=jnp.float32)
    zero = jax.tree.map(jnp.zeros_like, local["params"])
    painted = run("linear", x, {"params": {**zero, "out": {"dense": {**zero["out"]["dense"], "bias": bias}}}})
    np.testing.assert_array_equal(painted[0, 4:8, 8:12], bias.reshape(4, 4, 3))
    with pytest.raises(ValueError, match=r"whole patches on a grid of \(2, 3\) tokens, got \(9, 12\)"):
        LinearUnpatch(3).init(jax.random.key(0), x, (9, 12))


def test_pup_has_a_stage_per_doubling_and_gives_its_features():
    def shapes(size, **options):
        decoder = PUP(5, width=8, **options)
        x = jnp.zeros((2, 1, 2, 2, 8))
        made = jax.eval_shape(lambda key: decoder.init_with_output(key, x, size, with_features=True), jax.random.key(0))
        (output, features), variables = made
        return output.shape, [leaf.shape for leaf in features], sorted(variables["params"])

    output, features, names = shapes((32, 32))  # patches of 16: four convolutions, features after stages 0, 1 and 2
    assert output == (2, 1, 32, 32, 5)
    assert features == [(2, 1, 4, 4, 8), (2, 1, 8, 8, 8), (2, 1, 16, 16, 8)]
    assert names == [*(f"conv_{i}" for i in range(4)), "norm", *(f"norm_{i}" for i in range(4)), "out"]
    assert len(shapes((28, 28))[1]) == 3  # patches of 14 too
    assert shapes((2, 2))[:2] == ((2, 1, 2, 2, 5), [])
    assert len(shapes((32, 32), stages=2)[1]) == 1


def test_heatmaps_start_from_their_prior():
    zero = jnp.zeros((1, 2, 3, 8))
    output = run("heatmap", zero)
    np.testing.assert_allclose(jax.nn.sigmoid(output[..., :2]), 0.1, rtol=1e-5)
    np.testing.assert_array_equal(output[..., 2:], 0)
    with pytest.raises(ValueError, match="at least 5, got 4"):
        HeatmapHead(4).init(jax.random.key(0), zero)
    with pytest.raises(ValueError, match="by 1 or 2, got 3"):
        HeatmapHead(6, upsample=3).init(jax.random.key(0), zero)
