"""What every operator network promises: jit, seeds by vmap, per-task Jacobians, a mesh, a batch it does not mix."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.models.deeponet import DeepONet
from mtjax.models.fno import FNO
from mtjax.models.mionet import mionet
from mtjax.models.mt_deeponet import darcy_deeponet, fisher_deeponet, heat3d_deeponet, small_deeponet
from mtjax.models.pod_deeponet import PODDeepONet
from mtjax.models.separable_deeponet import SeparableDeepONet, SeparableTrunk
from mtjax.models.unet import UNet
from mtjax.nn.embeddings import PeriodicEmbedding
from mtjax.nn.operator_layers import MLP, ModifiedMLP, StackedBranch

B, SIDE, SEEDS, P = 8, 8, 2, 4
N = SIDE * SIDE
RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


LINE = jnp.linspace(0.0, 1.0, SIDE)
NODES = jnp.stack(jnp.meshgrid(LINE, LINE, indexing="ij"), axis=-1).reshape(N, 2)
COMMON = {
    "points": NODES,
    "values": draw(B, N),
    "mask": jnp.asarray(RNG.random((B, N)) < 0.8),
    "task": jnp.arange(B, dtype=jnp.int32) % 2,
}
VECTOR, IMAGE = COMMON | {"inputs": draw(B, 5)}, COMMON | {"inputs": draw(B, SIDE, SIDE, 2)}


def net(width):
    return MLP((5, width))


MODELS = {
    "task branches": (DeepONet(net(P), net(P), tasks=("a", "b")), VECTOR),
    "stacked, modified": (
        DeepONet(StackedBranch(P, (5,)), ModifiedMLP((5, 5, P), embed=PeriodicEmbedding((1.0, None)))),
        VECTOR,
    ),
    "fisher": (fisher_deeponet(num_basis=P, branch_hidden=(5,), trunk_hidden=(5,)), VECTOR),
    "darcy": (darcy_deeponet(num_basis=P, channels=(2,), branch_hidden=(5,), trunk_hidden=(5,)), IMAGE),
    "heat3d": (heat3d_deeponet(num_basis=P, branch_hidden=(5,), trunk_hidden=(5, 5, 5)), VECTOR),
    "small": (small_deeponet(num_basis=P, branch_hidden=(5,), trunk_hidden=(5,), image_stride=2), IMAGE),
    "mionet": (
        mionet({"f": net(P), "g": net(P)}, net(P)),
        COMMON | {"inputs": {"f": draw(B, 3), "g": draw(B, 6)}},
    ),
    "pod": (PODDeepONet(net(3 + P), net(P)), VECTOR | {"basis": draw(N, 3), "output_mean": draw(N)}),
    "separable": (SeparableDeepONet(net(P), SeparableTrunk((net(P), net(P)), 2)), VECTOR | {"axes": (LINE, LINE)}),
    "fno": (FNO((2, 2), width=4, num_layers=2, projection=5), IMAGE),
    "unet": (UNet((2, 4)), IMAGE),
}
OF_FUNCTIONS = ("inputs", "values", "mask", "task")


def losses_of(model, params, batch):
    error = jnp.where(batch["mask"], model.apply(params, batch)["u"] - batch["values"], 0.0) ** 2
    return {
        name: jnp.sum(jnp.where((batch["task"] == k)[:, None], error, 0.0)) for k, name in enumerate(("one", "two"))
    }


@pytest.mark.parametrize("name", MODELS)
def test_seeds_jacobians_and_meshes(name):
    model, batch = MODELS[name]
    options = {"xla_backend_optimization_level": 0}
    keys = jax.random.split(jax.random.key(0), SEEDS)
    seeds = jax.jit(jax.vmap(model.init, in_axes=(0, None)), compiler_options=options)(keys, batch)
    assert all(leaf.shape[0] == SEEDS for leaf in jax.tree.leaves(seeds))
    assert set(seeds) == {"params"}  # no state

    def run(params, batch):
        losses, jacobian = mtjax.value_and_jacobian(lambda p: losses_of(model, p, batch))(params)
        summed = jax.grad(lambda p: sum(losses_of(model, p, batch).values()))(params)
        return model.apply(params, batch)["u"], losses, jacobian, summed

    u, losses, jacobian, summed = jax.jit(jax.vmap(run, in_axes=(0, None)), compiler_options=options)(seeds, batch)
    assert u.shape == (SEEDS, B, N) and u.dtype == jnp.float32 and losses.shape == (SEEDS, 2)
    assert np.abs(u[0] - u[1]).max() > 0  # seeds differ
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(summed))
    jax.tree.map(
        lambda rows, leaf: np.testing.assert_allclose(rows.sum(1), leaf, rtol=1e-3, atol=1e-5 * scale), jacobian, summed
    )

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    params = jax.tree.map(lambda leaf: jax.device_put(leaf[0], whole), seeds)
    sharded = {
        column: jax.device_put(values, split if column in OF_FUNCTIONS else whole) for column, values in batch.items()
    }
    on_mesh = jax.jit(model.apply, compiler_options=options)(params, sharded)["u"]
    assert len(on_mesh.sharding.device_set) == 8
    np.testing.assert_allclose(on_mesh, u[0], rtol=1e-3, atol=1e-4 * float(jnp.abs(u[0]).max()))


@pytest.mark.parametrize("name", MODELS)
def test_models_are_values(name):
    """Equal constructions are equal and hash alike, so that a model may be a static argument."""
    model, _ = MODELS[name]
    assert hash(model) == hash(model.clone()) and model == model.clone()
    assert isinstance(model, nn.Module)
