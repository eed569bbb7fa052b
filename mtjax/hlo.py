r"""The text of a compiled program, read as far as costs need it: instructions, and how often each of them runs.

    program = parse(compiled.as_text())
    {name: computation.times for name, computation in program.computations.items()}

A program is a list of computations, called by one another: bodies of loops, branches, fusions. Loops say how many turns
they make where the compiler knows (`known_trip_count`, as for `lax.scan`); a loop whose end depends on the data counts
as one turn and is marked. Of a branch every side counts: an upper bound.

Reference: XLA's operation semantics, https://openxla.org/xla/operation_semantics
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*(?:e\d+m\d+\w*)?)\[(?P<shape>[\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
_CONTRACTED = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")
_WINDOW = re.compile(r"\bwindow=\{[^}]*?\bsize=([\dx]+)")
_DILATED = re.compile(r"\bwindow=\{[^}]*?\blhs_dilate=([\dx]+)")
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all")
_LABELS = re.compile(r"\bdim_labels=\w+_(\w+)->")


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: of the result.
      type: of the result, an array or a tuple of them.
      opcode: what is done.
      operands: names of the operands.
      attributes: the rest of the line.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


class Computation(NamedTuple):
    """A list of instructions.

    Attributes:
      instructions: by name, in order.
      times: how often the computation runs in one run of the program.
      known: False inside of a loop whose number of turns the text does not say.
    """

    instructions: Mapping[str, Instruction]
    times: int
    known: bool


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      num_devices: that it runs on.
      computations: by name.
    """

    num_devices: int
    computations: Mapping[str, Computation]

    def instructions(self) -> Iterator[tuple[Instruction, Computation]]:
        """Every instruction with the computation that it is in."""
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                yield instruction, computation


def itemsize(dtype: str) -> float:
    """Bytes of a number of the compiler's type names ('f32', 'bf16', 's8', 'pred').

    >>> itemsize("bf16"), itemsize("pred"), itemsize("c64"), itemsize("token")
    (2.0, 1.0, 8.0, 0.0)
    """
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits.group(1)) / 8 if digits else float(dtype != "token")


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array of a type.

    >>> arrays("(f32[2,3]{1,0}, /*index=1*/u32[])")
    [('f32', (2, 3)), ('u32', ())]
    """
    return [
        (m["dtype"], tuple(int(n.lstrip("<=")) for n in m["shape"].split(",") if n)) for m in _ARRAY.finditer(type_)
    ]


def parse(text: str) -> Program:
    """Reads the text of a compiled program, `compiled.as_text()`."""
    bodies: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    devices = 1
    for line in text.splitlines():
        if line.startswith("HloModule"):
            devices = math.prod(int(n) for n in _DEVICES.findall(line))
        elif line[:1] not in (" ", "}", "") and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            current = bodies.setdefault(name, {})
        elif (instruction := parse_line(line)) is not None:
            current[instruction.name] = instruction
    if not bodies:
        bodies[""] = current
    return Program(devices, _counted(bodies))


def parse_line(line: str) -> Instruction | None:
    """An instruction, or None for other lines.

    >>> parse_line("  ROOT %d.1 = f32[4,8]{1,0} dot(%a, %b.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}")[:4]
    ('d.1', 'f32[4,8]{1,0}', 'dot', ('a', 'b.2'))
    """
    left, equals, right = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals or " " in left:
        return None
    end = _closing(right, 0) if right.startswith("(") else right.find(" ")
    type_, rest = right[:end], right[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket or " " in opcode:
        return None
    end = _closing(rest, len(opcode))
    operands = tuple(_NAME.findall(rest[len(opcode) : end]))
    return Instruction(left.lstrip("%"), type_, opcode, operands, rest[end:])


def _closing(text: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    return len(text)


def _counted(bodies: Mapping[str, Mapping[str, Instruction]]) -> dict[str, Computation]:
    """How often each computation runs: callers are printed after what they call."""
    times, known = dict.fromkeys(bodies, 0), dict.fromkeys(bodies, True)
    if bodies:
        times[next(reversed(bodies))] = 1  # the entry is printed last
    for caller in reversed(bodies):
        for instruction in bodies[caller].values():
            called = _CALLS.findall(instruction.attributes)
            for branches in _BRANCHES.findall(instruction.attributes):
                called += [name.strip().lstrip("%") for name in branches.split(",")]
            trips = _TRIPS.search(instruction.attributes)
            turns = int(trips.group(1)) if trips else 1
            for name in called:
                if name in times:
                    times[name] += times[caller] * turns
                    known[name] &= known[caller] and (instruction.opcode != "while" or trips is not None)
    return {name: Computation(body, times[name], known[name]) for name, body in bodies.items()}


def has_loops(program: Program) -> bool:
    """Whether anything runs more than once, or nobody knows how often."""
    return any(instruction.opcode == "while" for instruction, _ in program.instructions())


def repeated_flops(program: Program) -> float:
    """Floating-point operations of products and convolutions in the turns of loops after the first.

    The compiler's own count, `compiled.cost_analysis()`, takes every loop as one turn: this is what is missing in it.
    """
    total = 0.0
    for instruction, computation in program.instructions():
        if computation.times > 1:
            total += (computation.times - 1) * product_flops(instruction, computation)
    return total


def repeated_bytes(program: Program) -> float:
    """Bytes from and to memory in the turns of loops after the first, missing in `cost_analysis()` likewise.

    Every instruction that is not inside of a fusion reads its operands and writes its result. What only takes a slice
    of an operand, or writes one, moves that slice.
    """
    inside = set()
    for one, _ in program.instructions():
        if one.opcode not in ("while", "conditional", "call"):
            inside.update(_CALLS.findall(one.attributes))
    total = 0.0
    for name, computation in program.computations.items():
        if computation.times > 1 and name not in inside:
            moved = sum(moved_bytes(one, computation, program) for one in computation.instructions.values())
            total += (computation.times - 1) * moved
    return total


def moved_bytes(one: Instruction, computation: Computation, program: Program) -> float:
    """Bytes that an instruction outside of fusions reads and writes."""
    if one.opcode in _FREE:
        return 0.0
    called = _CALLS.search(one.attributes) if one.opcode == "fusion" else None
    body = program.computations.get(called.group(1)) if called else None
    if body is None:
        types = [computation.instructions[name].type for name in one.operands if name in computation.instructions]
        if one.opcode == "dynamic-slice":
            return 2.0 * type_bytes(one.type)
        if one.opcode == "dynamic-update-slice":
            return 2.0 * type_bytes(types[1])
        return type_bytes(one.type) + sum(map(type_bytes, types))
    total, users = 0.0, {}
    for inner in body.instructions.values():
        for position, name in enumerate(inner.operands):
            users.setdefault(name, []).append((inner, position))
    for inner in body.instructions.values():
        if inner.opcode != "parameter":
            continue
        used = users.get(inner.name, [])
        if used and all(user.opcode == "dynamic-slice" and position == 0 for user, position in used):
            total += sum(type_bytes(user.type) for user, _ in used)
        elif not (used and all(user.opcode == "dynamic-update-slice" and position == 0 for user, position in used)):
            total += type_bytes(inner.type)
    updates = [inner for inner in body.instructions.values() if inner.opcode == "dynamic-update-slice"]
    if updates and type_bytes(updates[-1].type) == type_bytes(one.type):
        return total + type_bytes(body.instructions[updates[-1].operands[1]].type)
    return total + type_bytes(one.type)


def type_bytes(type_: str) -> float:
    """Bytes of all arrays of a type.

    >>> type_bytes("(f32[2,3]{1,0}, pred[])")
    25.0
    """
    return sum(math.prod(shape) * itemsize(dtype) for dtype, shape in arrays(type_))


def product_flops(instruction: Instruction, computation: Computation) -> float:
    """Floating-point operations of a product or a convolution, two for each multiply-add; 0 for all else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    ((_, result),) = arrays(instruction.type)
    shapes = [arrays(computation.instructions[name].type)[0][1] for name in instruction.operands]
    if instruction.opcode == "dot":
        found = _CONTRACTED.search(instruction.attributes)
        contracted = [int(axis) for axis in found.group(1).split(",") if axis] if found else []
        return 2.0 * math.prod(result) * math.prod(shapes[0][axis] for axis in contracted)
    window, dilated, labels = (p.search(instruction.attributes) for p in (_WINDOW, _DILATED, _LABELS))
    inputs = shapes[1][labels.group(1).index("i")] if labels else 1
    per_output = math.prod(map(int, window.group(1).split("x"))) * inputs if window else inputs
    zeros = math.prod(map(int, dilated.group(1).split("x"))) if dilated else 1  # between the entries of the input
    return 2.0 * math.prod(result) * per_output / zeros
