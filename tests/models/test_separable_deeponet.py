"""Separable DeepONet: the einsum over axes equals the product at all points of the grid."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.models.deeponet import DeepONet
from mtjax.models.separable_deeponet import SeparableDeepONet, SeparableTrunk
from mtjax.nn.embeddings import PeriodicEmbedding
from mtjax.nn.operator_layers import MLP
from mtjax.nn.output_transforms import apply_mask

B, R, P = 3, 2, 4
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(B, 5)), jnp.float32)
SIZES = (4, 3, 2, 3)


def net(width, **options):
    return MLP((6, width), nn.tanh, **options)


def grid(dimensions):
    axes = tuple(jnp.asarray(RNG.normal(size=n), jnp.float32) for n in SIZES[:dimensions])
    nodes = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, dimensions)
    return axes, nodes


def random_params(model, batch):
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    return jax.tree.map(lambda s: jnp.asarray(RNG.normal(size=s.shape), s.dtype), shapes)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_grid_equals_the_full_product(dimensions):
    axes, nodes = grid(dimensions)
    nets = tuple(net(R * P) for _ in axes)
    model = SeparableDeepONet(net(P), SeparableTrunk(nets, R))
    params = random_params(model, {"inputs": INPUTS, "axes": axes})
    p = params["params"]
    b = np.asarray(net(P).apply({"params": p["branch"]}, INPUTS))
    factors = [
        np.asarray(net(R * P).apply({"params": p["trunk"][f"nets_{i}"]}, x[:, None])).reshape(len(x), R, P)
        for i, x in enumerate(axes)
    ]
    expected = np.zeros((B, *(len(x) for x in axes)))
    for node in np.ndindex(expected.shape[1:]):
        product = np.prod([factor[i] for factor, i in zip(factors, node, strict=True)], axis=0)  # [r, p]
        expected[(slice(None), *node)] = b @ product.sum(0) + np.asarray(p["bias"])

    def both(params):
        pointwise = jnp.broadcast_to(nodes, (B, *nodes.shape))
        batches = ({"axes": axes}, {"points": nodes}, {"points": pointwise})
        return [model.apply(params, {"inputs": INPUTS, **batch})["u"] for batch in batches]

    for u in jax.jit(both)(params):
        assert u.shape == (B, len(nodes))
        np.testing.assert_allclose(u, expected.reshape(B, -1), rtol=1e-3, atol=1e-4)


def test_a_separable_trunk_is_a_trunk():
    axes, nodes = grid(2)
    trunk = SeparableTrunk((net(R * P), net(R * P, embed=PeriodicEmbedding((1.0,)))), R)
    model = SeparableDeepONet(net(P), trunk, transforms=(apply_mask,))
    batch = {"inputs": INPUTS, "axes": axes, "points": nodes, "mask": jnp.arange(len(nodes)) > 3}
    params = random_params(model, batch)
    plain = DeepONet(net(P), trunk, transforms=(apply_mask,))
    u, same, shifted = jax.jit(
        lambda p: (
            model.apply(p, batch)["u"],
            plain.apply(p, batch)["u"],
            model.apply(p, {**batch, "axes": (axes[0], axes[1] + 1.0)})["u"],
        )
    )(params)
    np.testing.assert_allclose(u, same, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(u, shifted, rtol=1e-3, atol=1e-4)  # the second coordinate has period 1
    assert not np.any(u[:, :4]) and np.all(u[:, 4:] != 0)


def test_networks_run_on_the_axes_only():
    """The cost of the trunk is that of n_1 + .. + n_d points."""
    nets = tuple(MLP((64, 64, R * P)) for _ in range(2))
    model = SeparableDeepONet(net(P), SeparableTrunk(nets, R))
    axes = (jnp.zeros(30), jnp.zeros(30))
    params = jax.eval_shape(model.init, jax.random.key(0), {"inputs": INPUTS, "axes": axes})
    separable, scattered = (
        jax.jit(model.apply).lower(params, {"inputs": INPUTS, **place}).compile().cost_analysis()["flops"]
        for place in ({"axes": axes}, {"points": jnp.zeros((900, 2))})
    )
    assert separable < 0.1 * scattered


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: SeparableTrunk((), 2), "1 to 4 coordinates, got 0"),
        (lambda: SeparableTrunk((net(4),), 0), "rank must be >= 1, got 0"),
        (lambda: run(SeparableTrunk((net(4),), 3), 1), "Net 0 must end in a multiple of rank=3, got 4"),
        (lambda: run(SeparableTrunk((net(4),), 2), 2), "nets for 1 coordinates, got 2"),
        (lambda: on_axes(SeparableDeepONet(net(4), SeparableTrunk((net(4),), 2))), "got 4 and 2 . 2"),
    ],
)
def test_wrong_arguments(act, words):
    with pytest.raises(ValueError, match=words):
        act()


def on_axes(model):
    return jax.eval_shape(model.init, jax.random.key(0), {"inputs": INPUTS, "axes": (jnp.zeros(3),)})


def run(trunk, dimensions):
    return jax.eval_shape(trunk.init, jax.random.key(0), jnp.zeros((3, dimensions)))
