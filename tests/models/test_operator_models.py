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
from mtjax.models.mt_deeponet import darcy_deeponet, heat3d_deeponet
from mtjax.models.pod_deeponet import PODDeepONet
from mtjax.models.separable_deeponet import SeparableDeepONet, SeparableTrunk
from mtjax.models.unet import UNet
from mtjax.nn.embeddings import PeriodicEmbedding
from mtjax.nn.operator_layers import MLP, ModifiedMLP, StackedBranch

B, SIDE, SEEDS, P = 8, 4, 2, 4
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
    "darcy": (darcy_deeponet(num_basis=P, channels=(2,), branch_hidden=(5,), trunk_hidden=(5,)), IMAGE),
    "heat3d": (heat3d_deeponet(num_basis=P, branch_hidden=(5,), trunk_hidden=(5, 5, 5)), VECTOR),
    "mionet": (
        mionet({"f": net(P), "g": net(P)}, net(P)),
        COMMON | {"inputs": {"f": draw(B, 3), "g": draw(B, 6)}},
    ),
    "pod": (PODDeepONet(net(3 + P), net(P)), VECTOR | {"basis": draw(N, 3), "output_mean": draw(N)}),
    "separable": (
        SeparableDeepONet(net(P), SeparableTrunk((net(2 * P), net(2 * P)), 2)),
        VECTOR | {"axes": (LINE, LINE)},
    ),
    "fno": (FNO((2, 2), width=4, num_layers=1, projection=5), IMAGE),
    "unet": (UNet((2, 2)), IMAGE),
}
OF_FUNCTIONS = ("inputs", "values", "mask", "task")


def losses_of(model, params, batch):
    error = jnp.where(batch["mask"], model.apply(params, batch)["u"] - batch["values"], 0.0) ** 2
    return {
        name: jnp.sum(jnp.where((batch["task"] == k)[:, None], error, 0.0)) for k, name in enumerate(("one", "two"))
    }


def quick_jit(f):
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def random_seeds(model, batch):
    """Parameters of several seeds, of the shapes of a vmapped init."""
    keys = jax.random.split(jax.random.key(0), SEEDS)
    shapes = jax.eval_shape(jax.vmap(model.init, in_axes=(0, None)), keys, batch)
    assert set(shapes) == {"params"}  # no state
    return jax.tree.map(lambda s: jnp.asarray(RNG.normal(size=s.shape) / 2, s.dtype), shapes)


@pytest.mark.parametrize("name", MODELS)
def test_jacobians_of_seeds_on_a_mesh(name):
    """Seeds by vmap, per-task rows and the mesh in one program, against the field of one seed on one device."""
    model, batch = MODELS[name]
    seeds = random_seeds(model, batch)

    def run(params, batch):
        losses, jacobian = mtjax.value_and_jacobian(lambda p: losses_of(model, p, batch))(params)
        return model.apply(params, batch)["u"], losses, jacobian

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    sharded = {
        column: jax.device_put(values, split if column in OF_FUNCTIONS else whole) for column, values in batch.items()
    }
    on_mesh = quick_jit(jax.vmap(run, in_axes=(0, None)))(jax.device_put(seeds, whole), sharded)
    u, losses, jacobian = jax.device_get(on_mesh)
    assert len(on_mesh[0].sharding.device_set) == 8
    assert u.shape == (SEEDS, B, N) and u.dtype == jnp.float32 and losses.shape == (SEEDS, 2)

    one = jax.tree.map(lambda leaf: leaf[1], seeds)
    # Along its own parameters: the rows' products with them, by forward mode.
    alone, slope = quick_jit(lambda p: jax.jvp(lambda p: losses_of(model, p, batch), (p,), (p,)))(one)
    np.testing.assert_allclose(losses[1], list(alone.values()), rtol=1e-3)
    rows = jax.tree.map(lambda row, leaf: (row[1] * leaf[None]).reshape(2, -1).sum(1), jacobian, one)
    np.testing.assert_allclose(sum(jax.tree.leaves(rows)), list(slope.values()), rtol=2e-3, atol=1e-4 * losses[1].max())


@pytest.mark.parametrize("name", ["task branches", "heat3d"])
def test_seeds_by_vmap_of_init(name):
    model, batch = MODELS[name]
    keys = jax.random.split(jax.random.key(0), SEEDS)
    seeds = quick_jit(jax.vmap(model.init, in_axes=(0, None)))(keys, batch)
    kernel = seeds["params"]["trunk"]["out"]["kernel"]
    assert kernel.shape[0] == SEEDS and np.abs(kernel[0] - kernel[1]).min() > 0


@pytest.mark.parametrize("name", MODELS)
def test_models_are_values(name):
    """Equal constructions are equal and hash alike, so that a model may be a static argument."""
    model, _ = MODELS[name]
    assert hash(model) == hash(model.clone()) and model == model.clone()
    assert isinstance(model, nn.Module)
