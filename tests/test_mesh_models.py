"""One training step of every model on meshes of 8 fake devices is the step of one device.

By default a model of every kind runs on one mesh with the sum of its losses, and either route of a Gramian method once;
the rest of the table, every model on every mesh, is slow.
"""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax import models as m
from mtjax import sharding
from mtjax.models.separable_deeponet import SeparableTrunk
from mtjax.nn.decoders import LinearUnpatch
from mtjax.nn.moe import Dispatch
from mtjax.nn.operator_layers import MLP
from mtjax.nn.vit import ViTConfig
from mtjax.optim.routes import jacobian_route, value_and_update
from mtjax.train import make_train_step
from mtjax.train.state import TrainState
from mtjax.train.step import pinned

SPECS = ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "expert=4,data=2")
B, SIDE, P = 16, 4, 8
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


HEADS = {"a": 1, "b": 1, "c": 1}
COLUMNS = {"cardinalities": (5, 3), "num_numeric": 2}
ROWS = {"categorical": RNG.integers(0, 3, (B, 2)).astype(np.int32), "numeric": draw(B, 2)}
TRANSFORMER = {"width": 16, "num_heads": 4, "ff_width": 32, "num_blocks": 2, "head_hidden": (8,)}
MLPS = COLUMNS | {"features": ((16,), (16,))}
IMAGES = {"image": draw(B, 8, 8, 3)}
VIT = ViTConfig(patch=4, width=16, depth=2, num_heads=4)
MAPS = {"a": 1, "b": 2, "c": 1}
LINE = np.linspace(0.0, 1.0, SIDE, dtype=np.float32)
POINTS = np.stack(np.meshgrid(LINE, LINE, indexing="ij"), axis=-1).reshape(-1, 2)
# What all rows share: nodes, axes, a basis.
SHARED = {
    "mask": np.ones(SIDE**2, bool),
    "points": POINTS,
    "axes": (LINE, LINE),
    "basis": draw(SIDE**2, 3),
    "output_mean": draw(SIDE**2),
}
VECTORS = {"inputs": draw(B, 5)} | SHARED
FIELDS = {"inputs": draw(B, SIDE, SIDE, 2)} | SHARED
SEVERAL = {"inputs": {"f": draw(B, 3), "g": draw(B, 6)}} | SHARED


def net(width):
    return MLP((16, width))


MODELS = {
    "multitab": (lambda: m.MultiTabNet(HEADS, **COLUMNS, **TRANSFORMER), ROWS),
    "multitab, rows attend": (
        lambda: m.MultiTabNet(HEADS, **COLUMNS, **TRANSFORMER, row_mixing="flat_attention"),
        ROWS,
    ),
    "m3vit": (
        lambda: m.M3ViT(MAPS, m.M3ViTConfig(VIT, experts=4, top_k=2, expert_ratio=2.0, task_dim=4), LinearUnpatch),
        IMAGES,
    ),
    "mod_squad": (
        lambda: m.ModSquad(
            m.ModSquadConfig(
                VIT, num_experts=4, top_k=2, attention_experts=4, attention_top_k=2, dispatch=Dispatch("all_experts")
            ),
            MAPS,
            LinearUnpatch,
        ),
        IMAGES,
    ),
    "taskexpert": (lambda: m.TaskExpert(MAPS, m.TaskExpertConfig(VIT, num_experts=4, width=8, upsample=1)), IMAGES),
    "multitask_vit": (lambda: m.MultitaskViT(MAPS, VIT), IMAGES),
    "single_task_vit": (lambda: m.SingleTaskViT(MAPS, VIT, LinearUnpatch), IMAGES),
    "cross_stitch": (lambda: m.CrossStitchViT(MAPS, VIT, LinearUnpatch), IMAGES),
    "mtan": (lambda: m.MTAN(MAPS, m.MTANConfig(VIT, layers=(0, 1), hidden=8, head_width=8)), IMAGES),
    "pad_net": (lambda: m.PadNet(MAPS, m.PadNetConfig(VIT, width=8)), IMAGES),
    "static": (lambda: m.StaticViT(MAPS, m.StaticConfig(VIT, width=8)), IMAGES),
    "ft_transformer": (lambda: m.single_task_ft_transformer(HEADS, **COLUMNS, **TRANSFORMER), ROWS),
    "saint": (lambda: m.single_task_saint(HEADS, **COLUMNS, **TRANSFORMER), ROWS),
    "tab_transformer": (lambda: m.single_task_tab_transformer(HEADS, **COLUMNS, **TRANSFORMER), ROWS),
    "single_task": (lambda: m.single_task(HEADS, **COLUMNS), ROWS),
    "shared_bottom": (lambda: m.shared_bottom(HEADS, **COLUMNS), ROWS),
    "omoe": (lambda: m.omoe(HEADS, **COLUMNS), ROWS),
    "mmoe": (lambda: m.mmoe(HEADS, **COLUMNS), ROWS),
    "cgc": (lambda: m.cgc(HEADS, **COLUMNS), ROWS),
    "ple": (lambda: m.ple(HEADS, **MLPS), ROWS),
    "stem": (lambda: m.stem(HEADS, **COLUMNS), ROWS),
    "adatt": (lambda: m.adatt(HEADS, **COLUMNS), ROWS),
    "esmm": (lambda: m.ESMM({"a": 1, "b": 1}, **COLUMNS, tower=(16, 16), width=8), ROWS),
    "aitm": (lambda: m.AITM(HEADS, **COLUMNS, features=(16,), width=8), ROWS),
    "deeponet": (lambda: m.DeepONet(net(P), net(P)), VECTORS),
    "mt_deeponet": (
        lambda: m.darcy_deeponet(num_basis=P, channels=(4,), branch_hidden=(16,), trunk_hidden=(16,)),
        FIELDS,
    ),
    "fno": (lambda: m.FNO((2, 2), width=8, num_layers=2, projection=16), FIELDS),
    "unet": (lambda: m.UNet((8, 8)), FIELDS),
    "mionet": (lambda: m.mionet({"f": net(P), "g": net(P)}, net(P)), SEVERAL),
    "pod_deeponet": (lambda: m.PODDeepONet(net(3 + P), net(P)), VECTORS),
    "separable": (lambda: m.SeparableDeepONet(net(P), SeparableTrunk((net(2 * P), net(2 * P)), 2)), VECTORS),
}
QUICK = ("multitab", "m3vit", "mod_squad", "taskexpert", "ple", "mt_deeponet", "fno")
WITH_AUX = ("m3vit", "mod_squad")
METHODS = {"sum": mtjax.optim.linear("sum"), "pcgrad": mtjax.optim.pcgrad(), "mgda": mtjax.optim.mgda()}


@functools.cache
def problem(name):
    """Loss function, batch, initial parameters."""
    make, batch = MODELS[name]
    model, aux = make(), {"with_aux": True} if name in WITH_AUX else {}

    def loss_fn(params, batch, rng):
        outputs = model.apply({"params": params}, batch, train=True, rngs={"dropout": rng, "gate": rng}, **aux)
        stats = {}
        if aux:  # balance counts all tokens of the batch, wherever they are
            outputs, stats = outputs
        balance = 1e-4 * sum(jnp.sum(s.importance**2 + s.load * s.probability) for s in stats.values())
        if set(outputs) == {"u"}:  # an operator: two things to ask of its field
            return {"fit": jnp.mean((outputs["u"] - 1) ** 2), "size": jnp.mean(jnp.sin(outputs["u"]))}
        return {task: jnp.mean((y - 0.5 * k) ** 2) + balance for k, (task, y) in enumerate(outputs.items())}

    rng = np.random.default_rng(1)
    rngs = {name: jax.random.key(0) for name in ("params", "dropout", "gate")}
    shapes = jax.eval_shape(functools.partial(model.init, train=True), rngs, batch)["params"]

    def random(path, leaf):  # of the size of an initialisation: in steep networks rounding would grow past 1e-5
        scale = min(0.3, max(leaf.shape[-2:], default=1) ** -0.5)
        return (scale * rng.normal(size=leaf.shape) + (path[-1].key == "scale")).astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(random, shapes)
    return loss_fn, batch, params


def place_batch(batch, mesh):
    shared = {name: jax.device_put(value, sharding.replicated(mesh)) for name, value in batch.items() if name in SHARED}
    return shared | sharding.place_rows({k: v for k, v in batch.items() if k not in SHARED}, mesh)


def make_step(name, method, route):
    """The library's step, or one that takes the Jacobian even where the method does without."""
    loss_fn, _, _ = problem(name)
    if route is None:
        return make_train_step(loss_fn, METHODS[method], optax.sgd)
    kind = {"weighted": value_and_update, "jacobian": functools.partial(jacobian_route, has_aux=False, chunk_size=None)}
    gradient_fn = kind[route](pinned(loss_fn), METHODS[method])

    def step(state, batch):
        losses, gradient, method_state = gradient_fn(state.params, state.method_state, batch, state.rng)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
        return state.replace(params=params, method_state=method_state), losses

    return step


def first_state(name, method):
    loss_fn, batch, params = problem(name)
    num_tasks = len(jax.eval_shape(loss_fn, params, batch, jax.random.key(0)))
    return TrainState.create(lambda key: params, METHODS[method], optax.sgd, 0, 0.1, num_tasks=num_tasks)


@functools.cache
def one_device(name, method, route):
    state, metrics = jax.jit(make_step(name, method, route))(first_state(name, method), problem(name)[1])
    return sharding.to_host((state.params, getattr(metrics, "losses", metrics)))


def check(name, spec, method="sum", route=None):
    expected, mesh = one_device(name, method, route), sharding.make_mesh(spec)
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small models: dimensions that a rule does not divide
        state = sharding.place_state(first_state(name, method), mesh)
        state, metrics = jax.jit(make_step(name, method, route))(state, place_batch(problem(name)[1], mesh))
    found = sharding.to_host((state.params, getattr(metrics, "losses", metrics)))
    for (path, mine), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5, err_msg=sharding.path_of(path))
    before, after = jax.tree.leaves(problem(name)[2]), jax.tree.leaves(expected[0])
    assert sum(np.abs(a - b).max() > 1e-5 for a, b in zip(before, after, strict=True)) > len(before) / 2


TURN = dict(zip(MODELS, itertools.cycle(SPECS))) | dict(zip(QUICK, itertools.cycle((SPECS[2], SPECS[3]))))
TURN |= {"ple": SPECS[1], "fno": SPECS[0], "mod_squad": SPECS[2]}


def test_the_table_has_every_model_of_the_library():
    made = {name for name in m.__all__ if isinstance(getattr(m, name), type) and hasattr(getattr(m, name), "apply")}
    models = [make() for make, _ in MODELS.values()]
    assert made == {type(part).__name__ for model in models for part in (model, getattr(model, "body", model))}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_every_model_on_one_mesh(name):
    check(name, TURN[name])


def test_a_gramian_method_by_its_jacobian():
    check("multitab", SPECS[1], "mgda", "jacobian")


def test_a_gramian_method_by_its_weights():
    check("multitab", SPECS[2], "pcgrad", "weighted")


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_on_every_mesh(name, spec):
    check(name, spec)


BY_ROUTE = (("pcgrad", "jacobian"), ("pcgrad", "weighted"), ("mgda", "jacobian"), ("mgda", "weighted"))


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("method", "route"), BY_ROUTE)
@pytest.mark.parametrize("name", MODELS)
def test_gramian_methods_by_both_routes_on_every_mesh(name, method, route, spec):
    check(name, spec, method, route)
