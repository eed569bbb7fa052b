"""The collectives of a compiled program: what devices send each other, read from the text of the program.

    compiled = jax.jit(step).lower(state, batch).compile()
    collectives(compiled.as_text())

Bytes are those of the result on one device. What a device sends per collective over a group of P devices is, for the
usual ring algorithms and a result of n bytes, `Collective.sent`:

    all-reduce 2 (P - 1) / P n     all-gather, all-to-all (P - 1) / P n     reduce-scatter (P - 1) n     permute n

A collective inside of a loop appears once in the text; `Collective.times` says how often it runs.

Reference: Thakur et al., "Optimization of Collective Communication Operations in MPICH", IJHPCA 2005, section 4.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from mtjax.hlo import Instruction, arrays, itemsize, parse

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=@?\w*mesh\w*\[([^\]]*)\]")
_ORDER = re.compile(r"device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\)")
_AXES = re.compile(r"\{((?:\s*'[^']*'(?::\(\d+\)\d+)?\s*,?)*)\}")
_PAIRS = re.compile(r"\{(\d+),(\d+)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: of `KINDS`.
      shapes: (dtype, shape) of every result on one device.
      bytes: of the results on one device.
      group_size: devices that take part together.
      group: numbers of these devices, of the first group.
      times: how often it runs in one run of the program.
      known: False if it is in a loop whose number of turns depends on the data, and which counts as one.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    group_size: int
    group: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    times: int = 1
    known: bool = dataclasses.field(default=True, repr=False)

    @property
    def sent(self) -> float:
        """Bytes that one device sends, each time."""
        p = max(self.group_size, 1)
        if self.kind == "collective-permute":
            return float(self.bytes)
        return self.bytes * {"all-reduce": 2 * (p - 1) / p, "reduce-scatter": p - 1}.get(self.kind, (p - 1) / p)


def collectives(text: str) -> list[Collective]:
    """All collectives in the text of a compiled program, in order.

    Args:
      text: `compiled.as_text()`.

    >>> line = "  %all-reduce.1 = f32[4,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add"
    >>> collectives(line)
    [Collective(kind='all-reduce', shapes=(('f32', (4, 4)),), bytes=64, group_size=2, times=1)]
    """
    program = parse(text)
    found = []
    for instruction, computation in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        results = _results(instruction, kind)
        size = sum(math.prod(shape) * itemsize(dtype) for dtype, shape in results)
        group = first_group(instruction.attributes, program.num_devices, kind)
        found.append(
            Collective(kind, tuple(results), int(size), len(group), group, max(computation.times, 1), computation.known)
        )
    return found


def _results(instruction: Instruction, kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """Results only: most asynchronous starts return (operands, results, and numbers that belong to the runtime)."""
    found = arrays(instruction.type)
    if not instruction.opcode.endswith("-start") or kind == "all-reduce":
        return found
    while len(found) > 2 and found[-1] in (("u32", ()), ("s32", ())):
        found.pop()
    return found[len(found) // 2 :] if len(found) > 1 else found


def first_group(attributes: str, num_devices: int, kind: str = "all-reduce") -> tuple[int, ...]:
    """Numbers of the devices that exchange data, of the first group, from the attributes of a collective.

    Groups are written out, as a reshaped and transposed range, or as axes of a mesh; of a permutation the first pair.

    >>> first_group("replica_groups={{0,2},{1,3}}", 4), first_group("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (0, 2))
    >>> first_group("replica_groups=mesh['a'=2,'b'=2] {'a'}", 4), first_group("replica_groups={}", 4)
    ((0, 2), (0, 1, 2, 3))
    """
    if kind == "collective-permute":
        pairs = _PAIRS.findall(attributes.partition("source_target_pairs=")[2].split("}}")[0] + "}")
        moved = [(int(a), int(b)) for a, b in pairs if a != b]
        return moved[0] if moved else (0,)
    if listed := _LISTED.search(attributes):
        return _numbers(listed[1])
    if iota := _IOTA.search(attributes):
        ids = _range(_numbers(iota[2]), iota[3])
        return tuple(ids.reshape(_numbers(iota[1])).reshape(-1, _numbers(iota[1])[-1])[0].tolist())
    if mesh := _MESH.search(attributes):
        names, sizes = zip(*(part.split("=") for part in mesh[1].split(",")), strict=True)
        sizes = tuple(map(int, sizes))
        rest = attributes[mesh.end() :]
        order = _ORDER.match(rest.lstrip(", "))
        ids = np.arange(math.prod(sizes))
        if order:
            ids = np.array(_numbers(order[3])) if order[3] else _range(_numbers(order[1]), order[2])
        axes = re.findall(r"('[^']*')(?::\((\d+)\)(\d+))?", _AXES.search(rest)[1])
        ids, chosen = ids.reshape(sizes), [slice(0, 1)] * len(sizes)
        for name, before, size in axes:  # 'axis', or a factor of it: 'axis':(product of the factors before)size
            axis = names.index(name)
            step = 1 if not size else sizes[axis] // (int(before) * int(size))
            count = sizes[axis] if not size else int(size)
            chosen[axis] = slice(0, step * count, step)
        return tuple(ids[tuple(chosen)].ravel().tolist())
    return tuple(range(num_devices))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _range(sizes: tuple[int, ...], order: str | None) -> np.ndarray:
    """0, 1, 2, ... in this shape, then transposed."""
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(order)) if order else ids


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """{kind: (number, bytes of the results on one device)} of the kinds that occur, each as often as it runs."""
    result: dict[str, tuple[int, int]] = {}
    for one in found:
        number, size = result.get(one.kind, (0, 0))
        result[one.kind] = (number + one.times, size + one.times * one.bytes)
    return result
