"""Layers on a mesh: the numbers of one device, and no more communication than their axes need.

`data=2,expert=4` and the like are 8 fake devices; collectives are counted in the compiled programs.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import gradients, sharding
from mtjax.collectives import collectives, totals
from mtjax.nn.attention import FeedForward, in_row_chunks
from mtjax.nn.moe import Dispatch
from mtjax.nn.moe_attention import MoEAttention
from mtjax.nn.moe_layer import MoEMlp
from mtjax.nn.routers import RouterConfig
from mtjax.nn.vit import Block

T, B, N, D, E, K = 2, 8, 3, 16, 8, 2
ROUTER = RouterConfig("multi_gate", E, K)
LAYERS = {
    "mlp": MoEMlp(ROUTER, hidden=32, num_tasks=T),
    "capacity": MoEMlp(ROUTER, hidden=32, num_tasks=T, dispatch=Dispatch("sort_capacity", capacity_factor=8.0)),
    "heads": MoEAttention(ROUTER, head_dim=8, num_tasks=T),
    "block": Block(num_heads=4),
}
# Losses per task stream, and what belongs to none, so that a Jacobian has rows that differ.
X = np.random.default_rng(0).normal(size=(T, B, N, D)).astype(np.float32)


@functools.cache
def parameters(name):
    layer = LAYERS[name]
    how = {} if name == "block" else {"tasks": (0, 1)}
    shapes = jax.eval_shape(functools.partial(layer.init, **how), jax.random.key(0), X)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


def forward(name, params, x):
    """y, and a balancing loss of the statistics of all tokens."""
    params = sharding.constrain(params)
    if name == "block":
        return LAYERS[name].apply({"params": params}, x), 0.0
    y, stats = LAYERS[name].apply({"params": params}, x, tasks=(0, 1))
    return y, jnp.sum(stats.importance**2) + jnp.sum(stats.load * stats.probability)


def losses(name, params, x):
    y, balance = forward(name, params, x)
    rows = jnp.mean(jnp.sin(y), axis=(1, 2, 3))
    return jnp.concatenate([rows, 1e-3 * jnp.reshape(balance, (1,))])


def gradient(name, params, x):
    return jax.value_and_grad(lambda both: jnp.sum(losses(name, *both)))((params, x))


def jacobian(name, params, x):
    return gradients.value_and_jacobian(lambda both: losses(name, *both))((params, x))


def two_lanes(params):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 0.7 * leaf]), params)


def lanes(name, params, x):
    """Two seeds at once, their Jacobians too."""
    return jax.vmap(functools.partial(jacobian, name), (0, None))(two_lanes(params), x)


WHAT = {"forward": lambda *a: forward(*a)[0], "gradient": gradient, "jacobian": jacobian, "lanes": lanes}


@functools.cache
def one_device(what, name):
    """From Jacobians on one device, by one program for everything."""
    program = one_device_program(name)
    if what == "lanes":
        both = two_lanes(parameters(name))
        runs = [program(jax.tree.map(lambda leaf, i=i: leaf[i], both), X) for i in range(2)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *runs)
    rows = program(parameters(name), X)
    return rows if what == "jacobian" else jax.tree.map(lambda leaf: np.sum(leaf, axis=0), rows)


@functools.cache
def one_device_program(name):
    return jax.jit(functools.partial(jacobian, name))


@functools.cache
def on_mesh(what, name, spec):
    """The result on a mesh and the collectives of the program."""
    mesh = sharding.make_mesh(spec)
    with jax.set_mesh(mesh):
        inputs = sharding.place_state(parameters(name), mesh), sharding.place_rows(X, mesh, axis=1)
        program = jax.jit(functools.partial(WHAT[what], name)).lower(*inputs).compile()
        return program(*inputs), collectives(program.as_text())


def counts_of(what, name, spec):
    return {kind: number for kind, (number, _) in totals(on_mesh(what, name, spec)[1]).items()}


def check(what, name, spec):
    """The result is that of one device; returns {kind: number} of its collectives."""
    found, _ = on_mesh(what, name, spec)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(one_device(what, name)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
    return counts_of(what, name, spec)


def test_experts_on_other_devices_cost_two_exchanges_forward_and_two_backward():
    """Neither tokens nor experts are gathered; statistics are of all tokens."""
    assert counts_of("forward", "mlp", "data=2,expert=4") == {"all-to-all": 2}
    counts = check("gradient", "mlp", "data=2,expert=4")
    assert counts["all-to-all"] == 4 and set(counts) == {"all-to-all", "all-reduce"}


def test_a_batch_that_is_split_keeps_its_dispatch_on_its_devices():
    """Without the axis 'expert' too, where the compiler would gather all tokens to sort them."""
    assert set(check("gradient", "mlp", "data=8")) == {"all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "capacity"])
def test_both_kinds_of_dispatch_exchange_alike(name):
    assert check("gradient", name, "expert=8")["all-to-all"] == 4


def test_fsdp_and_tensor_split_the_kernels_of_experts():
    """Kernels of own experts are gathered over 'fsdp', gradients scattered; one sum over 'tensor' each way."""
    found, sent = on_mesh("gradient", "mlp", "fsdp=2,expert=2,tensor=2")
    counts = check("gradient", "mlp", "fsdp=2,expert=2,tensor=2")
    assert (counts["all-to-all"], counts["all-gather"], counts["reduce-scatter"]) == (4, 2, 2)
    assert {shape for one in sent if one.kind == "all-gather" for _, shape in one.shapes} == {(E // 2, D, 32 // 2)}
    own_tokens = (T * B // 4 * N, D)
    assert sum(own_tokens in [shape for _, shape in one.shapes] for one in sent if one.kind == "all-reduce") == 2
    assert found[1][0]["kernel_in"].sharding.spec == jax.P("expert", "fsdp", "tensor")


def test_jacobians_and_seeds_under_vmap_stay_where_the_experts_are():
    found, sent = on_mesh("lanes", "mlp", "fsdp=2,expert=4")
    check("lanes", "mlp", "fsdp=2,expert=4")
    assert totals(sent)["all-to-all"][0] <= 4
    own = (E // 4, D, 32)
    assert all(
        shape[-3:] == own or shape[-3:] == (own[0], 32, D)
        for o in sent
        if o.kind == "all-gather"
        for _, shape in o.shapes
    )
    assert found[1][0]["kernel_in"].sharding.spec == jax.P(None, None, "expert", "fsdp")


def test_heads_that_are_experts_make_two_round_trips():
    assert counts_of("forward", "heads", "data=2,expert=4") == {"all-to-all": 4}


@pytest.mark.slow
def test_heads_that_are_experts_under_fsdp():
    counts = check("gradient", "heads", "fsdp=2,expert=4")
    assert counts["all-to-all"] == 8 and counts["all-gather"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["data=8", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("what", ["gradient", "jacobian", "lanes"])
def test_heads_on_other_meshes(what, spec):
    assert "all-to-all" not in check(what, "heads", spec)


def test_a_batch_that_devices_do_not_divide_is_computed_all_the_same():
    mesh, params = sharding.make_mesh("data=2,expert=4"), parameters("mlp")
    x = X[:, :3]
    with jax.set_mesh(mesh):
        placed = sharding.place_state(params, mesh), sharding.place_rows(x, mesh, axis=1)
        found = jax.jit(functools.partial(forward, "mlp"))(*placed)
    expected = jax.jit(functools.partial(forward, "mlp"))(params, x)
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["data=4,tensor=2", pytest.param("data=2,tensor=4", marks=pytest.mark.slow)])
def test_a_transformer_block_over_tensor_is_summed_once_per_half_and_direction(spec):
    """Megatron's count: one all-reduce of activations after attention and MLP forward, one before each backward."""
    counts, (_, sent) = check("gradient", "block", spec), on_mesh("gradient", "block", spec)
    assert set(counts) == {"all-reduce"}
    own = (T, B // (8 // int(spec[-1])) * N, D)
    assert sum([shape for _, shape in one.shapes] == [own] for one in sent) == 4
    assert counts["all-reduce"] == 5  # and the gradients of all parameters, over 'data'


def test_a_block_over_three_axes():
    """Where XLA needs its activations pinned, not to be fast but to be right (`mtjax.nn.local_rows`)."""
    counts = check("jacobian", "block", "data=2,fsdp=2,tensor=2")
    assert not {"all-to-all", "collective-permute"} & set(counts)


def test_fsdp_gathers_parameters_and_nothing_else_for_a_jacobian_and_its_gramian():
    """Activations stay with their rows, Jacobians with their slices; what is reduced of them is K x K."""
    mesh, params = sharding.make_mesh("fsdp=8"), parameters("block")

    def gramian(params, x):
        rows = gradients.value_and_jacobian(lambda p: losses("block", p, x))(params)[1]
        return gradients.gramian(rows), rows

    with jax.set_mesh(mesh):
        inputs = sharding.place_state(params, mesh), sharding.place_rows(X, mesh, axis=1)
        program = jax.jit(gramian).lower(*inputs).compile()
        found, rows = program(*inputs)
    expected = jax.jit(gramian)(params, X)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    for leaf, own in zip(jax.tree.leaves(rows), jax.tree.leaves(sharding.shardings(params, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P(None, *own.spec)), leaf.ndim)
    sent = collectives(program.as_text())
    whole = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    assert sorted(shape for o in sent if o.kind == "all-gather" for _, shape in o.shapes) == sorted(
        shape for shape in whole if shape != (3, D)
    )
    assert {o.kind for o in sent} <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Of the Gramian K x K numbers travel, once for all leaves that are split.
    reduced = [shape for o in sent if o.kind != "all-gather" for _, shape in o.shapes]
    assert sum(bool(own.spec) for own in jax.tree.leaves(sharding.shardings(params, mesh))) == 4
    assert reduced.count((T + 1, T + 1)) == 1


class Chunked(nn.Module):
    rows: int

    @nn.compact
    def __call__(self, x):
        layer = Wide(name="layer")
        return in_row_chunks(layer, x, None, self.rows, train=False)


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x, mask, *, train):
        return x + FeedForward(32, name="ff")(x, train=train)


@pytest.mark.parametrize("batch", [40, pytest.param(12, marks=pytest.mark.slow)])
def test_chunks_of_rows_are_chunks_of_what_a_device_has(batch):
    x, mesh = np.random.default_rng(0).normal(size=(batch, N, D)).astype(np.float32), sharding.make_mesh("data=8")
    params = Chunked(2).init(jax.random.key(0), x)
    expected = Chunked(batch).apply(params, x)
    with jax.set_mesh(mesh):
        rows = sharding.place_rows(x, mesh)
        program = jax.jit(Chunked(2).apply).lower(params, rows).compile()
        np.testing.assert_allclose(program(params, rows), expected, atol=1e-6)
    if batch == 40:
        assert not collectives(program.as_text())
