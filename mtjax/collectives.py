"""The collectives of a compiled program: what devices send each other, read from the text of the program.

    compiled = jax.jit(step).lower(state, batch).compile()
    collectives(compiled.as_text())

Bytes are those of the operand on one device. What a device sends per collective over a group of P devices is, for
the usual ring algorithms, `Collective.sent`:

    all-reduce 2 (P - 1) / P n     all-gather (P - 1) n     reduce-scatter, all-to-all (P - 1) / P n     permute n

A collective inside of a loop appears once in the text.

Reference: Thakur et al., "Optimization of Collective Communication Operations in MPICH", IJHPCA 2005, section 4.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# `%name = type kind(operands), ...`: the asynchronous form is a pair, of which the start is counted.
_LINE = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (?P<type>\([^=]*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*(?:e\d+m\d+\w*)?)\[(?P<shape>[\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: of `KINDS`.
      shapes: (dtype, shape) of every result on one device.
      bytes: of the results on one device.
      group_size: devices that take part together; 0 if the text does not say: all of them.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    group_size: int

    @property
    def sent(self) -> float:
        """Bytes that one device sends."""
        p = max(self.group_size, 1)
        share = {"all-reduce": 2 * (p - 1) / p, "all-gather": (p - 1) / p, "reduce-scatter": p - 1}
        return self.bytes * share.get(self.kind, (p - 1) / p if self.kind == "all-to-all" else 1.0)


def itemsize(dtype: str) -> float:
    """Bytes of a number of the compiler's type names ('f32', 'bf16', 's8', 'pred').

    >>> itemsize("bf16"), itemsize("pred"), itemsize("c64")
    (2.0, 1.0, 8.0)
    """
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits.group(1)) / 8 if digits else 1.0


def collectives(text: str) -> list[Collective]:
    """All collectives in the text of a compiled program, in order.

    Args:
      text: `compiled.as_text()`.

    >>> line = "  %all-reduce.1 = f32[4,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add"
    >>> collectives(line)
    [Collective(kind='all-reduce', shapes=(('f32', (4, 4)),), bytes=64, group_size=2)]
    """
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        arrays = [
            (m["dtype"], tuple(int(n) for n in m["shape"].split(",") if n)) for m in _ARRAY.finditer(match["type"])
        ]
        if match["start"] and len(arrays) > 1:  # (operands, results) of an asynchronous start
            arrays = arrays[len(arrays) // 2 :]
        listed, iota = _LISTED.search(line), _IOTA.search(line)
        group = len(listed.group(1).split(",")) if listed else int(iota.group(2)) if iota else 0
        if match["kind"] == "collective-permute":
            group = 2
        size = sum(math.prod(shape) * itemsize(dtype) for dtype, shape in arrays)
        found.append(Collective(match["kind"], tuple(arrays), int(size), group))
    return found


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """{kind: (number, bytes on one device)} of the kinds that occur."""
    result: dict[str, tuple[int, int]] = {}
    for one in found:
        number, size = result.get(one.kind, (0, 0))
        result[one.kind] = (number + 1, size + one.bytes)
    return result
