import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.macs import jaxprs_in_params
from mtjax.models.deeponet import DeepONet
from mtjax.models.m3vit import M3ViT, M3ViTConfig
from mtjax.models.multitab import MultiTabNet
from mtjax.models.multitask_vit import MultitaskViT
from mtjax.nn.operator_layers import MLP
from mtjax.nn.vit import ViTConfig
from mtjax.train.precision import cast_params, compute_in
from mtjax.train.state import TrainState
from mtjax.train.step import make_train_step

KEY = jax.random.key(0)
HALF, FULL = "bfloat16", "float32"


def dots(jaxpr, scope="", times=1):
    """(name scope, dtype, multiply-accumulates) of every product and convolution; mixed operands count as the wider."""
    for equation in jaxpr.eqns:
        name, inside = equation.primitive.name, f"{scope}/{equation.source_info.name_stack}"
        repeats = times * (equation.params["length"] if name == "scan" else 1)
        if name in ("dot_general", "conv_general_dilated"):
            left, right = (var.aval for var in equation.invars)
            if name == "dot_general":
                per_output = math.prod(left.shape[axis] for axis in equation.params["dimension_numbers"][0][0])
            else:
                per_output = math.prod(right.shape) // right.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            work = times * per_output * math.prod(equation.outvars[0].aval.shape)
            yield inside, jnp.promote_types(left.dtype, right.dtype).name, work
        for inner in jaxprs_in_params(equation.params):
            yield from dots(inner, inside, repeats)


def dot_dtypes(function, *args):
    """dtype -> share of the multiply-accumulates of a program; nothing is run."""
    found = list(dots(jax.make_jaxpr(function)(*args).jaxpr))
    total = sum(work for *_, work in found)
    return {kind: sum(work for _, dtype, work in found if dtype == kind) / total for kind in {d for _, d, _ in found}}


def energies(outputs):
    return {name: jnp.mean(jnp.square(y.astype(jnp.float32))) for name, y in outputs.items()}


@functools.cache
def case(name):
    """Loss function, shapes of parameters and batch."""
    vit = ViTConfig(patch=4, width=64, depth=4, num_heads=2, drop_path=0.1, scan=True)
    rng = np.random.default_rng(0)
    image = {"image": rng.normal(size=(2, 16, 16, 3)).astype(np.float32)}
    table = {"categorical": np.zeros((32, 4), np.int32), "numeric": rng.normal(size=(32, 6)).astype(np.float32)}
    field = {"inputs": rng.normal(size=(16, 32)).astype(np.float32), "points": rng.random((50, 2)).astype(np.float32)}
    heads = {"a": 1, "b": 3}
    model, batch = {
        "multitab": (MultiTabNet(heads, (3,) * 4, 6), table),
        "multitab across rows": (MultiTabNet(heads, (3,) * 4, 6, row_mixing="axial_attention"), table),
        "vit": (MultitaskViT(heads, vit), image),
        "m3vit": (M3ViT(heads, M3ViTConfig(vit=vit)), image),
        "deeponet": (DeepONet(branch=MLP((64, 64, 32)), trunk=MLP((64, 64, 32)), transforms=()), field),
    }[name]
    params = jax.eval_shape(lambda key: model.init({"params": key, "dropout": key}, batch, train=True), KEY)["params"]

    def loss_fn(params, batch):
        outputs = model.apply({"params": params}, batch, train=True, rngs={"dropout": KEY, "gate": KEY})
        if "u" in outputs:  # every other function is a task's
            outputs = {"a": outputs["u"][::2], "b": outputs["u"][1::2]}
        return energies(outputs)

    return loss_fn, params, batch


@pytest.mark.parametrize("name", ["multitab", "multitab across rows", "vit", "m3vit", "deeponet"])
def test_the_work_of_all_passes_is_in_half_precision(name):
    loss_fn, params, batch = case(name)
    share = dot_dtypes(mtjax.value_and_jacobian(compute_in(loss_fn)), params, batch)
    assert share[HALF] > (0.95 if name == "deeponet" else 0.99), share
    assert dot_dtypes(loss_fn, params, batch) == {FULL: 1.0}


def test_routers_compute_in_float32_and_experts_do_not():
    loss_fn, params, batch = case("m3vit")
    found = list(dots(jax.make_jaxpr(compute_in(loss_fn))(params, batch).jaxpr))
    assert {dtype for scope, dtype, _ in found if "router" in scope} == {FULL}
    assert {dtype for scope, dtype, _ in found if "experts" in scope and "router" not in scope} == {HALF}


def test_what_stays_as_it_is():
    _, params, _ = case("m3vit")
    cast = jax.eval_shape(cast_params, params)
    kept = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree.leaves_with_path(cast)
        if leaf.dtype == jnp.float32
    }
    assert {"trunk/norm/scale", "head_a/out/dense/kernel", "head_a/norm_0/bias"} < kept
    assert any("router/kernel" in name for name in kept)
    assert not any("attention" in name or "patch_embed" in name or "kernel_in" in name for name in kept)
    everything = jax.eval_shape(functools.partial(cast_params, keep=""), params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(everything)} == {HALF}
    counter = cast_params({"step": jnp.zeros((), jnp.int32), "dense": {"kernel": jnp.ones((2, 64))}})
    assert counter["step"].dtype == jnp.int32 and counter["dense"]["kernel"].dtype == jnp.float32  # two coordinates


def test_labels_stay_and_arrays_follow_the_parameters_of_the_module_that_reads_them():
    seen = {}

    class Model(nn.Module):
        @nn.compact
        def __call__(self, batch):
            x = nn.LayerNorm(name="norm")(batch["x"])
            seen["normed"] = x.dtype.name
            seen["hidden"] = (h := nn.Dense(16, name="hidden")(x)).dtype.name
            return nn.Dense(1, name="head_out")(h)[:, 0]

    def loss_fn(params, batch, rng):
        seen["label"], seen["kernel"] = batch["y"].dtype.name, params["hidden"]["kernel"].dtype.name
        return {"y": jnp.mean((Model().apply({"params": params}, batch) - batch["y"]) ** 2)}, {"rng": rng}

    batch = {"x": jnp.ones((4, 8)), "y": jnp.ones(4)}
    params = jax.eval_shape(Model().init, KEY, batch)["params"]
    (losses, aux), rows = jax.eval_shape(
        mtjax.value_and_jacobian(compute_in(loss_fn), has_aux=True), params, batch, KEY
    )
    assert seen == {"normed": FULL, "hidden": HALF, "label": FULL, "kernel": HALF}
    assert losses.dtype == jnp.float32 and set(aux) == {"rng"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rows)} == {FULL}


def test_small_integers_give_the_very_same_rows():
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
    rng = np.random.default_rng(0)
    batch = rng.integers(-2, 3, size=(4, 8)).astype(np.float32)
    shapes = jax.eval_shape(model.init, KEY, batch)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.integers(-1, 2, size=s.shape), jnp.float32), shapes)

    def loss_fn(params, batch):
        return model.apply({"params": params}, batch).astype(jnp.float32).sum(0)

    exact = mtjax.value_and_jacobian(loss_fn)(params, batch)
    jax.tree.map(np.testing.assert_array_equal, mtjax.value_and_jacobian(compute_in(loss_fn))(params, batch), exact)


def test_losses_rows_and_weights_are_near_those_of_float32():
    loss_fn, shapes, batch = case("deeponet")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / s.shape[0] ** 0.5, s.dtype), shapes)
    methods = (mtjax.optim.pcgrad(), mtjax.optim.mgda())

    @jax.jit
    def measure(params, batch):
        found = []
        for f in (loss_fn, compute_in(loss_fn)):
            losses, rows = mtjax.value_and_jacobian(f)(params, batch)
            weights = [method.update(rows, method.init(params), params)[1].weights for method in methods]
            found.append((losses, rows, weights))
        return found

    (losses, rows, weights), (half_losses, half_rows, half_weights) = measure(params, batch)
    np.testing.assert_allclose(half_losses, losses, rtol=2**-6)
    np.testing.assert_allclose(half_weights, weights, atol=0.03)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half_rows)} == {FULL}
    for task in range(2):
        squared = lambda tree: sum(float(jnp.sum(leaf[task] ** 2)) for leaf in jax.tree.leaves(tree))  # noqa: B023, E731
        error = squared(jax.tree.map(jnp.subtract, rows, half_rows)) / squared(rows)
        assert 0 < error < (2**-5) ** 2


def test_parameters_and_momenta_stay_float32():
    loss_fn, shapes, batch = case("deeponet")
    method = mtjax.optim.pcgrad()
    step = make_train_step(compute_in(lambda params, batch, rng: loss_fn(params, batch)), method, optax.adamw)
    create = functools.partial(TrainState.create, lambda key: shapes, method, optax.adamw, num_tasks=2)

    def two_steps():
        params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        state = create(jnp.asarray(0), jnp.asarray(1e-3), start=params)
        return step(step(state, batch)[0], batch)[0]

    state = jax.eval_shape(two_steps)
    for tree in (state.params, state.opt_state):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} <= {FULL, "int32"}


def test_losses_keep_their_order_and_become_float32():
    def loss_fn(params):
        return {"z": params.sum(), "a": params.mean()}

    params = jnp.arange(8.0)
    losses = compute_in(loss_fn)(params)
    assert list(losses) == ["z", "a"]  # not sorted: row k is the k-th task
    assert {loss.dtype.name for loss in losses.values()} == {FULL}
    array = compute_in(lambda params: jnp.stack(list(loss_fn(params).values())))(params)
    assert array.dtype == jnp.float32 and array.tolist() == [float(loss) for loss in losses.values()] == [28.0, 3.5]


def test_only_what_can_be_computed_without_scaling_losses():
    assert compute_in(energies, "float32") is energies
    with pytest.raises(ValueError, match=r"bfloat16 or float32 .* got float16"):
        compute_in(energies, jnp.float16)
