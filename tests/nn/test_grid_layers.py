"""Layers on grids: the spectral convolution against numpy's Fourier transform, the order of nodes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.grid_layers import Conv3, ConvBlock, SpectralConv, flat_outputs, grid_inputs

RNG = np.random.default_rng(0)


def random_params(module, x):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda s: jnp.asarray(RNG.normal(size=s.shape), s.dtype), shapes)


def spectral_by_loop(p, x, modes):
    """The sum over the kept modes, one by one."""
    grid = x.shape[1:-1]
    weight = np.asarray(p["real"]) + 1j * np.asarray(p["imag"])
    spectrum = np.fft.rfftn(x, axes=range(1, 1 + len(grid)))
    kept = np.zeros((*spectrum.shape[:-1], weight.shape[-1]), complex)
    for k in np.ndindex(weight.shape[: len(grid)]):
        # Rows m .. 2m - 1 of an axis are the modes -m .. -1.
        place = tuple(i if i < m else i - 2 * m for i, m in zip(k, modes, strict=True))
        kept[(slice(None), *place)] = spectrum[(slice(None), *place)] @ weight[k]
    return np.fft.irfftn(kept, s=grid, axes=range(1, 1 + len(grid)))


@pytest.mark.parametrize(("grid", "modes"), [((9,), (3,)), ((8, 6), (3, 2)), ((4, 5, 6), (2, 1, 3))])
def test_spectral_convolution_equals_a_loop_over_modes(grid, modes):
    x = jnp.asarray(RNG.normal(size=(2, *grid, 3)), jnp.float32)
    module = SpectralConv(2, modes)
    params = random_params(module, x)
    assert params["params"]["real"].shape == (*(2 * m for m in modes[:-1]), modes[-1], 3, 2)
    y = jax.jit(module.apply)(params, x)
    np.testing.assert_allclose(y, spectral_by_loop(params["params"], np.asarray(x, float), modes), atol=2e-4)


def test_spectral_convolution_commutes_with_translation():
    x = jnp.asarray(RNG.normal(size=(1, 8, 8, 2)), jnp.float32)
    module = SpectralConv(3, (3, 3))
    params = random_params(module, x)
    run = jax.jit(lambda x: module.apply(params, x))
    moved = run(jnp.roll(x, (2, 5), axis=(1, 2)))
    np.testing.assert_allclose(moved, jnp.roll(run(x), (2, 5), axis=(1, 2)), atol=1e-4)


def test_spectral_convolution_keeps_the_energy_of_its_modes_at_the_start():
    # Only kept modes, 64 channels: the energy of the output is that of the input to about sqrt(1 / 64).
    n = 16
    phase = np.arange(n) / n * 2 * np.pi
    waves = np.stack([np.cos(k * phase) for k in (1, 2, 3)] + [np.sin(k * phase) for k in (1, 2, 3)])
    x = jnp.asarray(np.einsum("kn,bkc->bnc", waves, RNG.normal(size=(4, 6, 64))), jnp.float32)
    y = jax.jit(lambda x: SpectralConv(64, (4,)).init_with_output(jax.random.key(0), x)[0])(x)
    assert abs(float(jnp.mean(y**2) / jnp.mean(x**2)) - 1) < 0.2


@pytest.mark.parametrize(
    ("modes", "words"),
    [((3,), "an entry for each axis of the grid .8, 6."), ((3, 4), "1 to half of the grid"), ((0, 2), "got .0, 2.")],
)
def test_wrong_modes(modes, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(SpectralConv(2, modes).init, jax.random.key(0), jnp.zeros((1, 8, 6, 3)))


def test_nodes_and_fields_have_the_order_of_the_flattened_image():
    image = jnp.arange(2 * 3 * 4 * 1.0).reshape(2, 3, 4, 1)
    nodes = np.stack(np.meshgrid(np.arange(3.0), np.arange(4.0), indexing="ij"), -1).reshape(12, 2)
    for points in (nodes, np.broadcast_to(nodes, (2, 12, 2))):
        x = grid_inputs({"inputs": image, "points": jnp.asarray(points)}, coordinates=True)
        assert x.shape == (2, 3, 4, 3)
        assert x[1, 2, 3].tolist() == [23.0, 2.0, 3.0]
    assert grid_inputs({"inputs": image}, coordinates=False) is image
    assert flat_outputs(image)[1].tolist() == list(range(12, 24))
    assert flat_outputs(x).shape == (2, 12, 3)
    with pytest.raises(ValueError, match=r"the 12 nodes of the inputs' grid \(3, 4\), got 11 points"):
        grid_inputs({"inputs": image, "points": jnp.zeros((11, 2))}, coordinates=True)


def test_conv_block_normalises_groups_that_divide_its_channels():
    x = jnp.asarray(RNG.normal(size=(2, 6, 6, 3)), jnp.float32)
    module = ConvBlock(12, groups=8, activation=lambda x: x)
    params = jax.jit(module.init)(jax.random.key(0, impl="rbg"), x)
    y = np.asarray(jax.jit(module.apply)(params, 100 * x)).reshape(2, 36, 4, 3)  # gcd(8, 12) = 4 groups of 3 channels
    np.testing.assert_allclose(y.mean((1, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((1, 3)), 1, atol=1e-3)


@pytest.mark.parametrize("grid", [(5,), (4, 6), (3, 4, 5)])
def test_a_convolution_as_a_product_is_that_of_flax(grid):
    """The same parameters, the same function, and no grouped convolution in a stack of networks."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *grid, 3)), jnp.float32)
    params = Conv3(4).init(jax.random.key(0), x)
    theirs = nn.Conv(4, (3,) * len(grid), padding="SAME")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, theirs.init(jax.random.key(0), x))
    np.testing.assert_allclose(Conv3(4).apply(params, x), theirs.apply(params, x), rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    text = jax.jit(jax.vmap(Conv3(4).apply, in_axes=(0, None))).lower(stacked, x).as_text()
    assert "convolution" not in text
