"""Collectives of compiled programs, and the three ways in which their text names groups of devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import hlo
from mtjax.collectives import Collective, collectives, first_group, totals

P = jax.sharding.PartitionSpec
D, OVER_X = 8, P("x")


def compiled(function, *arguments, sizes=(D,), names=("x",), in_specs=OVER_X, out_specs=OVER_X) -> str:
    """The text of a function of one device's part, compiled for fake devices."""
    mesh = jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def everything(x):
    """One collective of each kind, on a part of 8 f32: 32 bytes."""
    swap = [(i, (i + 1) % D) for i in range(D)]
    gathered = jax.lax.all_gather(x, "x", tiled=True)
    return (
        jax.lax.psum(x, "x")
        + jax.lax.all_to_all(x, "x", 0, 0, tiled=True)
        + jax.lax.ppermute(x, "x", swap)
        + jax.lax.psum_scatter(jnp.tanh(gathered), "x", tiled=True)
    )


@pytest.fixture(scope="module")
def every_kind():
    return collectives(compiled(everything, jax.ShapeDtypeStruct((64,), jnp.float32)))


def test_all_kinds_of_a_compiled_program(every_kind):
    found = totals(every_kind)
    # 8 numbers on a device; of the gathered 64 the reduce-scatter leaves 8.
    assert found == {
        "all-reduce": (1, 32),
        "all-to-all": (1, 32),
        "collective-permute": (1, 32),
        "all-gather": (1, 256),
        "reduce-scatter": (1, 32),
    }
    sent = {one.kind: one.sent for one in every_kind}
    assert sent == {
        "all-reduce": 2 * 7 / 8 * 32,
        "all-to-all": 7 / 8 * 32,
        "collective-permute": 32,
        "all-gather": 7 / 8 * 256,
        "reduce-scatter": 7 * 32,
    }
    assert {one.group_size for one in every_kind if one.kind != "collective-permute"} == {8}


@pytest.mark.parametrize("axes", [("a",), ("b",), ("c",), ("a", "c"), ("a", "b"), ("b", "c"), ("a", "b", "c")])
def test_groups_are_those_of_the_mesh(axes):
    names = ("a", "b", "c")
    text = compiled(
        lambda x: jax.lax.psum(x, axes),
        jax.ShapeDtypeStruct((8, 4), jnp.float32),
        sizes=(2, 2, 2),
        names=names,
        in_specs=P(names),
        out_specs=P(names),
    )
    (one,) = collectives(text)
    ids = np.arange(8).reshape(2, 2, 2)[tuple(slice(None) if name in axes else 0 for name in names)]
    assert sorted(one.group) == ids.ravel().tolist() and one.group_size == 2 ** len(axes)


def test_loops_count_by_their_turns():
    def loops(x, times):
        x = jax.lax.scan(lambda c, _: (jnp.sin(jax.lax.psum(c, "x")), None), x, None, length=3)[0]
        nested = lambda c, _: jax.lax.scan(lambda d, _: (jax.lax.all_gather(d, "x")[0], None), c, None, length=2)  # noqa: E731
        x = jax.lax.scan(nested, x, None, length=5)[0]
        return jax.lax.fori_loop(0, times, lambda _, c: jnp.cos(jax.lax.ppermute(c, "x", [(0, 1)])), x)

    text = compiled(
        loops,
        jax.ShapeDtypeStruct((64,), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.int32),
        in_specs=(P("x"), P()),
    )
    found = collectives(text)
    assert {one.kind: (one.times, one.known) for one in found} == {
        "all-reduce": (3, True),
        "all-gather": (10, True),
        "collective-permute": (1, False),
    }
    assert totals(found)["all-gather"] == (10, 10 * 256)


def test_tuples_and_asynchronous_starts():
    tuples = "\n".join(
        [
            "HloModule m, num_partitions=16",
            "ENTRY %main (x: f32[2]) -> f32[2] {",
            "  %a = (f32[2]{0}, bf16[3,2]{1,0}, /*index=2*/f32[]) all-reduce(%x, %y, %z), replica_groups={}",
            "  %b = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[4,4]<=[16], dimensions={0}",
            "  %c = f32[8]{0} all-gather-done(%b)",
            "  %d = (f32[2]{0}, f32[4]{0}) all-reduce-start(%x, %y), replica_groups=[2,8]<=[8,2]T(1,0), to_apply=%s",
            "  %e = (f32[2], f32[2], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,0},{3,5}}",
            "  %f = ((f32[8]{0}), f32[2]{0}, s32[]) reduce-scatter-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}",
            "}",
        ]
    )
    found = {one.kind + str(index): one for index, one in enumerate(collectives(tuples))}
    sizes = {name: (one.bytes, one.group) for name, one in found.items()}
    assert sizes == {
        "all-reduce0": (8 + 12 + 4, tuple(range(16))),
        "all-gather1": (32, (0, 1, 2, 3)),
        "all-reduce2": (8 + 16, (0, 2, 4, 6, 8, 10, 12, 14)),
        "collective-permute3": (8, (3, 5)),
        "reduce-scatter4": (8, (0, 1, 2, 3)),
    }


def test_ways_to_write_the_same_groups():
    """A mesh of 4 x 2 x 2 devices, of which groups take two axes, in the three notations."""
    ids = np.arange(16).reshape(4, 2, 2)
    for axes in itertools.combinations(range(3), 2):
        rest = [axis for axis in range(3) if axis not in axes]
        groups = ids.transpose(*rest, *axes).reshape(-1, np.prod([ids.shape[a] for a in axes]))
        listed = "{" + ",".join("{" + ",".join(map(str, g)) + "}" for g in groups) + "}"
        order = ",".join(map(str, (*rest, *axes)))
        iota = f"[{groups.shape[0]},{groups.shape[1]}]<=[4,2,2]T({order})"
        mesh = "mesh['a'=4,'b'=2,'c'=2] {" + ",".join(f"'{'abc'[a]}'" for a in axes) + "}"
        for text in (listed, iota, mesh):
            assert first_group(f"channel_id=1, replica_groups={text}, dimensions={{0}}", 16) == tuple(groups[0])


def test_axes_of_a_reordered_mesh_and_parts_of_axes():
    reordered = "replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}, to_apply=%s"
    assert first_group(reordered, 16) == tuple(range(8))
    # The inner factor of an axis of 8 = 2 x 4, and its outer one.
    assert first_group("replica_groups=mesh['a'=8] {'a':(2)4}", 8) == (0, 1, 2, 3)
    assert first_group("replica_groups=mesh['a'=8] {'a':(1)2}", 8) == (0, 4)


def test_nothing_is_sent_to_oneself():
    alone = [Collective(kind, (), 64, 1) for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")]
    assert [one.sent for one in alone] == [0, 0, 0, 0]


def test_operations_in_loops():
    """XLA counts a loop as one turn; products of the others are added."""

    def repeated(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=7)[0]

    w = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    program = jax.jit(repeated).lower(w, w).compile()
    missing = hlo.repeated_flops(hlo.parse(program.as_text()))
    assert missing == 6 * 2 * 16**3
    assert program.cost_analysis()["flops"] < 2 * 2 * 16**3


def test_bytes_in_loops_take_slices():
    """A turn reads its own layer of the stack, and not the stack."""

    def repeated(x, w):
        return jax.lax.scan(lambda c, layer: (jnp.tanh(c @ layer), None), x, w)[0]

    x, w = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((9, 64, 64), jnp.float32)
    program = hlo.parse(jax.jit(repeated).lower(x, w).compile().as_text())
    of_a_turn = hlo.repeated_bytes(program) / 8
    layer = 4 * 64 * 64
    assert 3 * layer <= of_a_turn < 9 * layer


def test_operations_of_a_convolution():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    args = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)
    program = hlo.parse(jax.jit(convolve).lower(*args).compile().as_text())
    flops = [hlo.product_flops(*pair) for pair in program.instructions()]
    assert sum(flops) == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
