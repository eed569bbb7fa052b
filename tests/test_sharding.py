"""Meshes, rules by path, placement, and what is said when a rule does not fit."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax import sharding
from mtjax.collectives import collectives, totals

P = jax.sharding.PartitionSpec


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh("data=2,fsdp=2,tensor=2")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    sizes = {"qkv": {"kernel": (64, 3, 64), "bias": (3, 64)}, "out": {"kernel": (64, 64), "bias": (64,)}}
    block = jax.tree.map(lambda s: rng.normal(size=s).astype("f"), sizes, is_leaf=lambda x: isinstance(x, tuple))
    return {"block_0": {"attention": block}, "map": rng.normal(size=(32, 64)).astype("f")}


@pytest.mark.parametrize(
    "spec, sizes",
    [
        ("data=8", (8, 1, 1, 1)),
        ("data=-1", (8, 1, 1, 1)),
        ("expert=4, data=2", (2, 1, 4, 1)),
        ("fsdp=2,tensor=-1", (1, 2, 1, 4)),
    ],
)
def test_sizes_are_read_and_inferred(spec, sizes):
    mesh = sharding.make_mesh(spec)
    assert mesh.axis_names == sharding.AXES
    assert mesh.devices.shape == sizes


@pytest.mark.parametrize(
    "spec, message",
    [
        ("model=8", "'model' is no axis; axes are data, fsdp, expert, tensor"),
        ("data=2,data=4", "'data' is given twice"),
        ("data=x", "data needs a size"),
        ("data", "data needs a size"),
        ("data=-1,fsdp=-1", "only one size can be -1"),
        ("data=3", "has 3 devices, but there are 8 devices"),
        ("data=-1,tensor=3", "has 3 devices or a multiple, but there are 8 devices"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_a_sentence(spec, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(spec)


def test_without_a_mesh_nothing_changes(params):
    assert sharding.current_mesh() is None
    assert sharding.constrain(params) is params
    with jax.set_mesh(sharding.make_mesh("data=1", jax.devices()[:1])):
        assert sharding.current_mesh() is None


def test_the_ambient_mesh_is_seen_inside_and_outside_of_jit(mesh):
    with jax.set_mesh(mesh):
        assert sharding.current_mesh() == mesh
        seen = []
        jax.jit(lambda x: seen.append(dict(sharding.current_mesh().shape)) or x)(1.0)
        assert seen == [dict(mesh.shape)]


def test_momenta_and_jacobians_follow_their_parameter(mesh, params):
    import optax

    own = sharding.shardings(params, mesh)["block_0"]["attention"]["qkv"]["kernel"].spec
    assert own == P("fsdp", None, "tensor")
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    assert sharding.shardings(state, mesh)[0].mu["block_0"]["attention"]["qkv"]["kernel"].spec == own
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((5, *leaf.shape), leaf.dtype), params)
    assert sharding.shardings(rows, mesh)["block_0"]["attention"]["qkv"]["kernel"].spec == P(None, *own)
    assert sharding.shardings(state, mesh)[0].count.spec == P()


def test_a_dimension_that_is_not_divided_stays_whole_and_is_named(mesh):
    odd = {"attention": {"qkv": {"kernel": jax.ShapeDtypeStruct((63, 3, 64), "float32")}}}
    with pytest.warns(UserWarning, match=r"attention/qkv/kernel \[63, 3, 64\].*'embed' of 63.*fsdp=2"):
        found = sharding.shardings(odd, mesh)
    assert found["attention"]["qkv"]["kernel"].spec == P(None, None, "tensor")


def test_a_large_parameter_without_a_rule_is_split_over_fsdp_and_a_small_one_is_whole(mesh):
    tree = {"large": jax.ShapeDtypeStruct((32, 64), "f"), "small": jax.ShapeDtypeStruct((4, 4), "f")}
    found = sharding.shardings(tree, mesh)
    assert found["large"].spec == P(None, "fsdp") and found["small"].spec == P()


def test_describe_counts_the_bytes_that_devices_hold(mesh, params):
    placed = sharding.place_state(params, mesh)
    for leaf, place in zip(jax.tree.leaves(placed), sharding.places(params, mesh), strict=True):
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {place.bytes_per_device}
    text = sharding.describe(placed)
    total = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert "block_0/attention/qkv/kernel    64 x 3 x 64    float32    fsdp, -, tensor" in text
    assert text.splitlines()[-1].split() == ["total", f"{total:,}"]


def test_take_rows_reads_only_what_devices_need(mesh):
    class Column:
        """Records which rows are read."""

        shape, read = (100, 3), []

        def __getitem__(self, rows):
            self.read.append(rows)
            return np.repeat(rows[..., None], 3, axis=-1).astype(np.float32)

    rows = np.random.default_rng(0).permutation(100)[:48].reshape(2, 3, 8)
    column = Column()
    taken = sharding.take_rows({"x": column}, rows, mesh)["x"]
    assert taken.sharding.spec == P(None, None, ("data", "fsdp"))
    assert {read.shape for read in column.read} == {(2, 3, 2)}  # a device's share of every batch
    np.testing.assert_array_equal(np.asarray(taken)[..., 0], rows)


@pytest.mark.parametrize("rows, axes", [(8, ("data", "fsdp")), (6, ("data",)), (7, ()), (2, ("data",))])
def test_a_batch_is_split_over_the_axes_that_divide_it(mesh, rows, axes):
    assert sharding.batch_axes(rows, mesh) == axes
    placed = sharding.place_rows({"x": np.arange(rows * 2.0).reshape(rows, 2)}, mesh)["x"]
    np.testing.assert_array_equal(sharding.to_host(placed), np.arange(rows * 2.0).reshape(rows, 2))


def test_constrain_keeps_jacobians_sliced_and_reduces_only_the_gramian(params):
    """Of fsdp=8 every device holds an eighth of the Jacobian; between them goes K x K, and no row is gathered."""
    mesh = sharding.make_mesh("fsdp=8")
    x = np.random.default_rng(0).normal(size=(16, 64)).astype("f")

    def losses(params, x):
        attention = params["block_0"]["attention"]
        h = jnp.tanh(jnp.einsum("bd,dif->bif", x, attention["qkv"]["kernel"]))
        return {f"t{k}": jnp.mean(jnp.square(h[:, k])) * (k + 1) for k in range(3)}

    def gramian(params, x):
        jacobian = mtjax.value_and_jacobian(lambda p, x: losses(sharding.constrain(p), x))(params, x)[1]
        return mtjax.gramian(jacobian), jacobian

    expected, _ = jax.jit(gramian)(params, x)
    with jax.set_mesh(mesh):
        placed, rows = sharding.place_state(params, mesh), sharding.place_rows(x, mesh)
        compiled = jax.jit(gramian).lower(placed, rows).compile()
        found, jacobian = compiled(placed, rows)
    np.testing.assert_allclose(sharding.to_host(found), expected, rtol=1e-5)
    kernel = jacobian["block_0"]["attention"]["qkv"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp")
    sizes = [one.shapes for one in collectives(compiled.as_text()) if one.kind == "all-reduce"]
    assert sizes.count((("f32", (3, 3)),)) == 1
    gathered = [one for one in collectives(compiled.as_text()) if one.kind == "all-gather"]
    assert all(shape[0] != 3 for one in gathered for _, shape in one.shapes), totals(gathered)


@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=2,tensor=2", "expert=4,tensor=2"])
@pytest.mark.parametrize("flags", ["all", "known", "traced"])
def test_a_gramian_of_many_leaves_is_reduced_once(spec, flags):
    """Whatever the axes over which leaves are split, 3 x 3 numbers travel, once; whole leaves are everyone's own."""
    mesh = sharding.make_mesh(spec)
    rng = np.random.default_rng(0)
    shapes = {
        "attention": {"qkv": {"kernel": (32, 3, 64), "bias": (3, 64)}, "out": {"kernel": (64, 32)}},
        "moe": {"kernel_in": (4, 32, 16), "bias_out": (4, 32)},
        "head": {"kernel": (33, 31), "bias": (31,)},  # nothing divides it
    }
    left, right = (
        jax.tree.map(lambda shape: rng.normal(size=(3, *shape)).astype("f"), shapes, is_leaf=lambda s: type(s) is tuple)
        for _ in range(2)
    )
    some = jax.tree.map(lambda rows: rows.shape[1] % 4 == 0, left)
    if flags == "traced":
        some = jax.tree.map(jnp.asarray, some)

    def gramian(left, right, some):
        return mtjax.gramian(left), mtjax.gradients.gramian(left, right, True if flags == "all" else some)

    def run(left, right):
        if flags == "traced":
            return jax.jit(gramian).lower(left, right, some)
        return jax.jit(lambda left, right: gramian(left, right, some)).lower(left, right)

    traced = (some,) if flags == "traced" else ()
    expected = run(left, right).compile()(left, right, *traced)
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        placed = [
            jax.tree.map(
                lambda leaf, own: jax.device_put(leaf, jax.NamedSharding(mesh, P(None, *own.spec))),
                tree,
                sharding.shardings(jax.tree.map(lambda leaf: leaf[0], tree), mesh),
            )
            for tree in (left, right)
        ]
        compiled = run(*placed).compile()
        found = compiled(*placed, *traced)
    for own, one in zip(found, expected, strict=True):
        np.testing.assert_allclose(sharding.to_host(own), one, rtol=1e-5, atol=1e-3)
    sent = collectives(compiled.as_text())
    assert [(one.kind, one.times) for one in sent] == [("all-reduce", 1)] * len(sent), totals(sent)
    assert [shape for one in sent for shape in one.shapes] == [("f32", (3, 3))] * 2


def test_keys_and_counters_can_be_placed(mesh):
    tree = {"rng": jax.random.key(0), "count": jnp.zeros((), jnp.int32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        placed = sharding.place_state(tree, mesh)
    assert placed["rng"].sharding.is_fully_replicated
