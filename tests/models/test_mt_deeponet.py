"""MT-DeepONet: the published sizes, the three ways of carrying the task, the small recipe."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax.models.mt_deeponet import (
    branch_penalty,
    darcy_deeponet,
    fisher_deeponet,
    heat3d_deeponet,
    scaled_design,
    small_deeponet,
    with_code,
    with_mask_channel,
)
from mtjax.models.mt_deeponet_training import small_optimizer
from mtjax.nn.operator_layers import FixedNorm

RNG = np.random.default_rng(0)


def parameters(model, batch):
    return jax.eval_shape(model.init, jax.random.key(0), batch)["params"]


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def dense(*widths):
    return sum(n * m + m for n, m in itertools.pairwise(widths))


FISHER = {"inputs": jnp.zeros((1, 68)), "points": jnp.zeros((3, 2))}
DARCY = {"inputs": jnp.zeros((1, 100, 100, 2)), "points": jnp.zeros((3, 2)), "mask": jnp.ones((1, 3), bool)}
PLATE = {"inputs": jnp.zeros((1, 2)), "points": jnp.zeros((3, 3)), "mask": jnp.ones((1, 3), bool)}


def test_published_size_for_fisher():
    p = parameters(fisher_deeponet(), FISHER)
    assert size(p["branch"]) == dense(68, 128, 128, 300) + 2 * 2 * 128  # scales and biases of two layer norms
    assert size(p["trunk"]) == dense(2, 128, 128, 128, 300)
    assert size(p) == 136_664 and "bias" not in p


def test_published_size_for_darcy():
    p = parameters(darcy_deeponet(), DARCY)
    convolutions = sum(25 * n * m + m for n, m in ((2, 16), (16, 32), (32, 64), (64, 64)))
    assert size(p["branch"]) == convolutions + dense(6 * 6 * 64, 128, 128, 150)
    assert size(p["trunk"]) == dense(2, 64, 128, 128, 128, 150)
    assert size(p) == 559_164 and "bias" not in p


def test_published_size_for_the_plate():
    normalised = 32 + 64 + 128 + 128 + (32 + 3 * 64 + 5 * 128)
    projections = dense(32, 64) + dense(64, 64) + 2 * dense(64, 128) + 3 * dense(128, 128)
    fixed, layer = (parameters(heat3d_deeponet(**options), PLATE) for options in ({"norm": FixedNorm}, {}))
    assert size(fixed) == 240_880
    assert size(layer) == 240_880 - 2 * normalised == 238_448  # without the moments
    trunk = dense(3, 32, 64, 64, 64, *[128] * 5, 200) + projections + 4 * (normalised - 352)
    assert size(fixed["trunk"]) == trunk


def test_initial_weights_are_as_published():
    key = jax.random.key(0, impl="rbg")  # compiles faster; only the arrays that are looked at are computed
    kernel, bias, projection = jax.jit(
        lambda: (
            fisher_deeponet().init(key, FISHER)["params"]["branch"]["dense_1"]["kernel"],
            fisher_deeponet().init(key, FISHER)["params"]["branch"]["out"]["bias"],
            heat3d_deeponet().init(key, PLATE)["params"]["trunk"]["proj_8"]["kernel"],
        )
    )()
    assert abs(np.std(kernel) / np.sqrt(2 / 256) - 1) < 0.05  # Glorot normal
    assert abs(np.std(bias) / 0.01 - 1) < 0.25
    assert abs(np.std(projection) / 1e-3 - 1) < 0.05


def random_run(model, batch, **options):
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    params = jax.tree.map(lambda s: jnp.asarray(RNG.normal(size=s.shape) ** 2 / 4, s.dtype), shapes)
    return jax.jit(lambda batch: model.apply(params, batch, **options)["u"])


def test_the_mask_multiplies_the_prediction_and_is_read_by_the_branch():
    model = darcy_deeponet(num_basis=4, channels=(2, 2), branch_hidden=(5,), trunk_hidden=(5,))
    field = jnp.asarray(RNG.normal(size=(2, 8, 8)), jnp.float32)
    mask = jnp.asarray(RNG.random((2, 8, 8)) < 0.6)
    nodes = jnp.asarray(np.stack(np.meshgrid(*[np.linspace(-1, 1, 8)] * 2, indexing="ij"), -1), jnp.float32)
    batch = {
        "inputs": with_mask_channel(field, mask),
        "points": nodes.reshape(64, 2),
        "mask": mask.reshape(2, 64),
    }
    run = random_run(model, batch)
    u = run(batch)
    np.testing.assert_array_equal(u == 0, ~np.asarray(batch["mask"]))
    blind = run({**batch, "inputs": with_mask_channel(field, mask, zeroed=True)})
    assert np.abs(u - blind).max() > 1e-3


def test_channels_and_codes():
    field, mask = jnp.ones((2, 3, 3)), jnp.eye(3, dtype=bool)
    image = with_mask_channel(field, mask)
    assert image.shape == (2, 3, 3, 2)
    np.testing.assert_array_equal(image[1, ..., 1], np.eye(3))
    assert not with_mask_channel(field, mask, zeroed=True)[..., 1].any()
    code, sensors = jnp.full((2, 4), 5.0), jnp.ones((2, 6))
    np.testing.assert_array_equal(with_code(sensors, code), [[5.0] * 4 + [1.0] * 6] * 2)
    np.testing.assert_array_equal(with_code(sensors, code, zeroed=True), [[0.0] * 4 + [1.0] * 6] * 2)
    with pytest.raises(ValueError, match="Every design parameter must vary"):
        scaled_design(jnp.ones((2, 2)), [0.0, 1.0], [1.0, 1.0])


def test_branch_of_the_plate_ends_in_selu():
    """SELU is bounded below by -1.0507 * 1.6733: coefficients cannot be less."""
    model = heat3d_deeponet(num_basis=50, branch_hidden=(4,), trunk_hidden=(4, 4, 4), transforms=())
    batch = {"inputs": jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32), "points": jnp.zeros((3, 3))}
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    params = jax.tree.map(lambda s: jnp.asarray(9 * RNG.normal(size=s.shape), s.dtype), shapes)
    b = np.asarray(model.apply(params, batch, method="encode"))
    assert -1.7582 < b.min() < -1.75 and b.max() > 5


def test_small_recipe_reads_vectors_or_sampled_images():
    vector = small_deeponet(num_basis=7, branch_hidden=(5,), trunk_hidden=(6,), num_frequencies=4)
    p = parameters(vector, {"inputs": jnp.zeros((2, 9)), "points": jnp.zeros((3, 2))})
    assert size(p) == dense(9, 5, 7) + dense(8, 6, 7)  # frequencies are no parameters
    image = small_deeponet(image_stride=2)
    p = parameters(image, {"inputs": jnp.zeros((2, 32, 32, 2)), "points": jnp.zeros((3, 2))})
    assert size(p) == dense(16 * 16 * 2, 128, 128, 100) + dense(64, 128, 128, 128, 100)


def test_small_recipe_learns_a_linear_operator():
    """The antiderivative of sums of sines, on functions that were held out: error below a tenth of the mean field's."""
    x = np.linspace(0, 1, 30)
    waves = np.arange(1, 5)
    a = RNG.normal(size=(250, 4)) / waves
    functions = a @ np.sin(np.pi * waves[:, None] * x)
    integrals = a @ ((1 - np.cos(np.pi * waves[:, None] * x)) / (np.pi * waves[:, None]))
    f, u, points = (jnp.asarray(array, jnp.float32) for array in (functions, integrals, x[:, None]))
    model = small_deeponet(num_basis=16, branch_hidden=(32,), trunk_hidden=(32, 32), num_frequencies=8)
    tx = small_optimizer(300, 1e-2, warmup=30)

    def error(params, rows):
        predicted = model.apply(params, {"inputs": f[rows], "points": points})["u"]
        return jnp.mean(jnp.sum((predicted - u[rows]) ** 2, axis=1) / jnp.sum(u[rows] ** 2, axis=1))

    def train(key):
        params = model.init(key, {"inputs": f[:1], "points": points})

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(error)(params, slice(0, 200)), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=300)
        return error(params, slice(200, 250))

    squared = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 2))  # two seeds
    mean_field = np.mean(((u[:200].mean(0)[None] - u[200:]) ** 2).sum(1) / (u[200:] ** 2).sum(1))
    assert np.sqrt(squared).max() < 0.1 * np.sqrt(mean_field)


def test_branch_penalty_is_on_kernels_of_the_branch():
    model = fisher_deeponet(num_basis=3, branch_hidden=(4,), trunk_hidden=(4,))
    shapes = jax.eval_shape(model.init, jax.random.key(0), FISHER)
    params = jax.tree.map(lambda s: jnp.full(s.shape, 2.0), shapes)
    kernels = 68 * 4 + 4 * 3
    np.testing.assert_allclose(branch_penalty(params), 1e-3 * 4 * kernels, rtol=1e-6)
    np.testing.assert_allclose(branch_penalty(params["params"], 0.5), 0.5 * 4 * kernels, rtol=1e-6)
