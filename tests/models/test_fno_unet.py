"""The peers on grids: FNO's independence of the discretisation, U-Net on odd grids, the batch contract of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.models.fno import FNO
from mtjax.models.unet import UNet
from mtjax.nn.output_transforms import apply_mask

RNG = np.random.default_rng(0)


def random_params(model, batch, scale=1.0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes)


def wave(n, dimensions):
    """A sum of waves of one or no cycle, sampled at n nodes an axis, and the nodes."""
    x = np.arange(n) / n
    nodes = np.stack(np.meshgrid(*[x] * dimensions, indexing="ij"), axis=-1)
    phase = 2 * np.pi * nodes
    a = np.random.default_rng(2).normal(size=(2, dimensions, 2))
    field = sum(
        a[:, i, 0].reshape(2, *[1] * dimensions) * np.cos(phase[..., i])
        + a[:, i, 1].reshape(2, *[1] * dimensions) * np.sin(phase[..., i])
        for i in range(dimensions)
    )
    return {
        "inputs": jnp.asarray(field[..., None], jnp.float32),
        "points": jnp.asarray(nodes.reshape(-1, dimensions), jnp.float32),
    }


@pytest.mark.parametrize("dimensions", [1, 2])
def test_fno_does_not_depend_on_the_grid(dimensions):
    """The same network on a grid four times as fine gives the same field at the common nodes.

    Exactly so for a band-limited function: the activation is a square, so that the frequencies are 1, 2, 4 after the
    layers, below the coarse grid's highest of 6.
    """
    model = FNO((3,) * dimensions, 6, num_layers=3, projection=5, coordinates=False, activation=lambda x: x**2)
    coarse, fine = wave(12, dimensions), wave(48, dimensions)
    params = random_params(model, coarse, 0.3)
    u, v = (jax.jit(model.apply)(params, batch)["u"] for batch in (coarse, fine))
    v = v.reshape(2, *[48] * dimensions)[(slice(None), *[slice(None, None, 4)] * dimensions)].reshape(2, -1)
    np.testing.assert_allclose(u, v, rtol=1e-3, atol=1e-3 * float(jnp.abs(u).max()))


def test_fno_with_coordinates_padding_and_mask():
    batch = {**wave(8, 2), "mask": jnp.arange(64) % 3 > 0}
    model = FNO((3, 3), 6, num_layers=2, projection=5, padding=0.25, transforms=(apply_mask,))
    params = random_params(model, batch, 0.3)
    assert params["params"]["lift"]["kernel"].shape == (1 + 2, 6)
    u = jax.jit(model.apply)(params, batch)["u"]
    assert u.shape == (2, 64)
    np.testing.assert_array_equal(u == 0, np.broadcast_to(~np.asarray(batch["mask"]), (2, 64)))
    own = {**batch, "points": jnp.broadcast_to(batch["points"], (2, 64, 2))}
    np.testing.assert_allclose(jax.jit(model.apply)(params, own)["u"], u, rtol=1e-4, atol=1e-5)


def test_fno_reads_one_function_at_a_time():
    batch = wave(8, 1)
    model = FNO((3,), 6, num_layers=2, projection=5)
    params = random_params(model, batch, 0.3)
    run = jax.jit(lambda inputs: model.apply(params, {**batch, "inputs": inputs})["u"])
    np.testing.assert_allclose(run(batch["inputs"][::-1]), run(batch["inputs"])[::-1], rtol=1e-5, atol=1e-5)


def test_fno_and_unet_with_several_outputs():
    batch = wave(8, 2)
    for model in (FNO((2, 2), 4, num_layers=1, projection=4, num_outputs=3), UNet((4, 4), num_outputs=3)):
        assert jax.eval_shape(model.init_with_output, jax.random.key(0), batch)[0]["u"].shape == (2, 64, 3)


@functools.cache
def unet_run():
    model = UNet((4, 6, 8), groups=2, coordinates=True)
    batch = {
        "inputs": jnp.asarray(RNG.normal(size=(2, 7, 5, 1)), jnp.float32),
        "points": jnp.asarray(RNG.normal(size=(35, 2)), jnp.float32),
    }
    params = random_params(model, batch, 0.5)
    return batch, params, jax.jit(lambda inputs: model.apply(params, {**batch, "inputs": inputs})["u"])


def test_unet_on_a_grid_of_odd_size():
    batch, params, run = unet_run()
    u = run(batch["inputs"])
    assert u.shape == (2, 35) and np.all(np.isfinite(u))
    assert set(params["params"]) == {"down_0", "down_1", "down_2", "up_0", "up_1", "out"}
    assert params["params"]["up_1"]["conv_0"]["kernel"].shape == (3, 3, 8 + 6, 6)
    np.testing.assert_allclose(run(batch["inputs"][::-1]), u[::-1], rtol=1e-4, atol=1e-4)


def test_unet_carries_a_far_pixel_to_every_node():
    batch, _, run = unet_run()
    moved = run(batch["inputs"].at[:, 0, 0].add(1.0))
    assert np.abs(moved - run(batch["inputs"])).min() > 0


def test_unet_of_a_line():
    batch = {"inputs": jnp.zeros((2, 10, 3))}
    assert jax.eval_shape(UNet((4, 8)).init_with_output, jax.random.key(0), batch)[0]["u"].shape == (2, 10)
