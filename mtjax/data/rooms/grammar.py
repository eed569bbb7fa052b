"""Furniture as grammars: a class is a rule that turns three extents and a proportion into at most six primitives.

A coordinate of a part is r D + s q D + m, where D is half the width, the height or half the depth of the object, q its
free proportion (the height of a seat, the fill of a shelf) and m is in metres: legs stay thin on a large table. Part
frames have x to the right, y up from the floor and z to the front. All rules together are one constant table, so that a
program that builds scenes only gathers and multiplies.

Letters: O objects, J = 6 parts of an object, G = 2 rules of a class.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.data.rooms.config import OBJECT_CLASSES, ROOM_CLASSES

NONE, BOX, CYLINDER, CAPSULE = range(4)
"""Shapes of primitives; a sphere is a capsule without length."""
PARTS_PER_OBJECT = 6

Coordinate = float | tuple[float, float, float]


class Part(NamedTuple):
    """A primitive of a rule; a cylinder's half extents are (radius, half length, unused)."""

    shape: int
    material: int  # 0 or 1: an object has two materials
    centre: tuple[Coordinate, Coordinate, Coordinate]
    half: tuple[Coordinate, Coordinate, Coordinate]


class Rule(NamedTuple):
    """A class of objects: ranges of its width, height, depth in metres and of q, and its parts in two designs."""

    extents: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    proportion: tuple[float, float]
    designs: tuple[tuple[Part, ...], tuple[Part, ...]]
    frequency: float  # share of the objects, before some are removed
    at_wall: float  # probability of standing with its back to a wall


def _box(material: int, centre, half) -> Part:
    return Part(BOX, material, centre, half)


def _cylinder(material: int, centre, radius: Coordinate, half_length: Coordinate) -> Part:
    return Part(CYLINDER, material, centre, (radius, half_length, radius))


def _ball(material: int, centre, radius: Coordinate) -> Part:
    return Part(CAPSULE, material, centre, (radius, 0.0, radius))


def _legs(top: Coordinate, half_top: Coordinate, thick: float) -> tuple[Part, ...]:
    """Four legs in the corners, from the floor to `top`."""
    return tuple(
        _box(1, ((x, 0, -x * thick), half_top, (z, 0, -z * thick)), ((0, 0, thick), half_top, (0, 0, thick)))
        for x in (-1, 1)
        for z in (-1, 1)
    )


def _bed(*pillows: float) -> tuple[Part, ...]:
    return (
        _box(1, (0, (0, 0.3, 0), 0), (1, (0, 0.3, 0), 1)),  # frame
        _box(0, (0, (0, 0.8, 0), 0), ((1, 0, -0.03), (0, 0.2, 0), (1, 0, -0.03))),  # mattress
        _box(1, (0, 0.5, (-1, 0, 0.03)), (1, 0.5, (0, 0, 0.03))),  # headboard
        *(_box(0, (x, (0, 1, 0.06), (-1, 0, 0.28)), (0.4, (0, 0, 0.06), (0, 0, 0.18))) for x in pillows),
    )


_TABLE = (_box(0, (0, (1, 0, -0.02), 0), (1, (0, 0, 0.02), 1)), *_legs(0.5, 0.5, 0.035))
_ROUND_TABLE = (
    _cylinder(0, (0, (1, 0, -0.02), 0), 0.9, (0, 0, 0.02)),
    _cylinder(1, (0, 0.5, 0), (0, 0, 0.05), 0.5),
    _cylinder(1, (0, (0, 0, 0.015), 0), 0.45, (0, 0, 0.015)),
)
_SEAT = (
    _box(0, (0, (0, 1, -0.03), 0), (1, (0, 0, 0.03), 1)),
    _box(0, (0, (0.5, 0.5, 0), (-1, 0, 0.025)), (1, (0.5, -0.5, 0), (0, 0, 0.025))),
)
_CHAIR = (*_SEAT, *_legs((0, 0.5, 0), (0, 0.5, 0), 0.02))
_SWIVEL_CHAIR = (
    *_SEAT,
    _cylinder(1, (0, (0, 0.5, 0), 0), (0, 0, 0.03), (0, 0.5, 0)),
    _cylinder(1, (0, (0, 0, 0.02), 0), 0.9, (0, 0, 0.02)),
)
_ARMS = tuple(_box(1, ((x, 0, -x * 0.09), (0, 0.75, 0), (0, 0, 0.0)), ((0, 0, 0.09), (0, 0.75, 0), 1)) for x in (-1, 1))
_SOFA_BODY = (
    _box(1, (0, (0, 0.4, 0), 0), ((1, 0, -0.1), (0, 0.4, 0), 1)),
    _box(1, (0, 0.5, (-1, 0, 0.1)), ((1, 0, -0.1), 0.5, (0, 0, 0.1))),
)
_SOFA = (
    *(*_SOFA_BODY, *_ARMS),
    *(_box(0, (x, (0, 0.9, 0), 0.1), ((0.5, 0, -0.11), (0, 0.12, 0.02), 0.85)) for x in (-0.45, 0.45)),
)
_SOFA_ONE_CUSHION = (*_SOFA_BODY, *_ARMS, _box(0, (0, (0, 0.9, 0), 0.1), ((1, 0, -0.19), (0, 0.12, 0.02), 0.85)))
_CABINET_DOORS = (
    _box(1, (0, (0, 0, 0.04), (0, 0, -0.02)), ((1, 0, -0.04), (0, 0, 0.04), (1, 0, -0.05))),
    _box(0, (0, (0.5, 0, 0.03), 0), (1, (0.5, 0, -0.03), (1, 0, -0.02))),
    *(
        _box(1, (x, (0.5, 0, 0.03), (1, 0, -0.01)), ((0.5, 0, -0.015), (0.5, 0, -0.08), (0, 0, 0.015)))
        for x in (-0.5, 0.5)
    ),
    *(_ball(0, (x, 0.55, (1, 0, 0.02)), (0, 0, 0.025)) for x in (-0.12, 0.12)),
)
_CABINET_SHELVES = (
    *(_box(0, (x, 0.5, 0), ((0, 0, 0.02), 0.5, 1)) for x in ((-1, 0, 0.02), (1, 0, -0.02))),
    *(_box(1, (0, (y, 0, 0.02 - 0.04 * y), 0), ((1, 0, -0.02), (0, 0, 0.02), 1)) for y in (0.0, 0.5, 1.0)),
    _box(1, (0, 0.5, (-1, 0, 0.01)), ((1, 0, -0.02), 0.5, (0, 0, 0.01))),
)
_LAMP_FOOT = (
    _cylinder(1, (0, (0, 0, 0.015), 0), 0.7, (0, 0, 0.015)),
    _cylinder(1, (0, 0.45, 0), (0, 0, 0.02), 0.45),
)
_LAMP = (*_LAMP_FOOT, _cylinder(0, (0, (0.5, 0.5, 0), 0), 1, (0.5, -0.5, 0)))
_GLOBE_LAMP = (*_LAMP_FOOT, _ball(0, (0, (1, 0, -0.15), 0), (0.85, 0, 0)))
_BIN = (_cylinder(0, (0, 0.5, 0), 0.9, 0.5), _cylinder(1, (0, (1, 0, -0.02), 0), 1, (0, 0, 0.02)))
_PEDAL_BIN = (
    _cylinder(0, (0, (0.45, 0, 0), 0), 1, 0.45),
    Part(CAPSULE, 1, (0, 0.75, 0), (0.95, 0, 0.95)),
    _box(1, (0, (0, 0, 0.03), (1, 0, 0.03)), ((0, 0, 0.04), (0, 0, 0.015), (0, 0, 0.04))),
)
_FRAME = _box(1, (0, 0.5, 0), (1, 0.5, (1, 0, -0.01)))
_PICTURE = (_FRAME, _box(0, (0, 0.5, 0.2), ((1, 0, -0.06), (0.5, 0, -0.06), 0.8)))
_TWO_PICTURES = tuple(
    part
    for x in (-0.53, 0.53)
    for part in (
        _box(1, (x, 0.5, 0), (0.47, 0.5, (1, 0, -0.01))),
        _box(0, (x, 0.5, 0.2), ((0.47, 0, -0.05), (0.5, 0, -0.05), 0.8)),
    )
)
_DOOR_FRAME = (
    *(_box(1, (x, 0.5, 0), ((0, 0, 0.05), 0.5, 1)) for x in ((-1, 0, 0.05), (1, 0, -0.05))),
    _box(1, (0, (1, 0, -0.05), 0), ((1, 0, -0.1), (0, 0, 0.05), 1)),
    _box(0, (0, (0.5, 0, -0.05), -0.4), ((1, 0, -0.1), (0.5, 0, -0.05), 0.3)),
)
_DOOR = (*_DOOR_FRAME, _ball(1, (0.7, 0.48, 0.2), (0, 0, 0.045)))
_PANEL_DOOR = (*_DOOR_FRAME, *(_box(1, (0, y, -0.1), (0.6, 0.18, 0.15)) for y in (0.25, 0.7)))
_CARTON = (
    _box(0, (0, 0.5, 0), ((1, 0, -0.01), 0.5, (1, 0, -0.01))),
    _box(1, (0, (1, 0, -0.04), 0), (1, (0, 0, 0.04), 1)),
)
_STACK = (
    _box(0, (0, (0, 0.5, 0), 0), (1, (0, 0.5, 0), 1)),
    _box(1, (0.15, (0.5, 0.5, 0), -0.1), (0.7, (0.5, -0.5, 0), 0.75)),
)

RULES = {
    "bed": Rule(((1.0, 1.7), (0.75, 1.1), (1.85, 2.1)), (0.42, 0.58), (_bed(-0.5, 0.5), _bed(0.0)), 0.14, 0.85),
    "table": Rule(((0.8, 1.5), (0.6, 0.8), (0.6, 0.95)), (0.5, 0.5), (_TABLE, _ROUND_TABLE), 0.18, 0.15),
    "chair": Rule(((0.4, 0.52), (0.8, 1.05), (0.4, 0.52)), (0.42, 0.54), (_CHAIR, _SWIVEL_CHAIR), 0.13, 0.0),
    "sofa": Rule(((1.4, 2.1), (0.7, 0.95), (0.8, 1.0)), (0.42, 0.52), (_SOFA, _SOFA_ONE_CUSHION), 0.14, 0.75),
    "cabinet": Rule(((0.6, 1.3), (0.8, 2.0), (0.35, 0.6)), (0.5, 0.5), (_CABINET_DOORS, _CABINET_SHELVES), 0.24, 1.0),
    "lamp": Rule(((0.32, 0.5), (1.2, 1.75), (0.32, 0.5)), (0.72, 0.82), (_LAMP, _GLOBE_LAMP), 0.09, 0.3),
    "bin": Rule(((0.26, 0.42), (0.3, 0.65), (0.26, 0.42)), (0.5, 0.5), (_BIN, _PEDAL_BIN), 0.03, 0.4),
    "picture": Rule(((0.4, 1.1), (0.35, 0.8), (0.04, 0.06)), (0.5, 0.5), (_PICTURE, _TWO_PICTURES), 0.05, 1.0),
    "door": Rule(((0.85, 1.05), (1.95, 2.15), (0.12, 0.16)), (0.5, 0.5), (_DOOR, _PANEL_DOOR), 0.09, 1.0),
    "box": Rule(((0.3, 0.6), (0.25, 0.55), (0.3, 0.6)), (0.45, 0.65), (_CARTON, _STACK), 0.04, 0.1),
}
PICTURE, DOOR = ROOM_CLASSES.index("picture"), ROOM_CLASSES.index("door")
FIRST_OBJECT = ROOM_CLASSES.index(OBJECT_CLASSES[0])


def _triple(coordinate: Coordinate) -> tuple[float, float, float]:
    return coordinate if isinstance(coordinate, tuple) else (coordinate, 0.0, 0.0)


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rules as arrays.

    Returns:
      shape and material i32[class, G, J, 2]; coefficients (r, s, m) f32[class, G, J, (centre, half), xyz, 3]; ranges of
      the three extents and of the proportion f32[class, 4, 2].
    """
    count = len(OBJECT_CLASSES)
    kinds = np.zeros((count, 2, PARTS_PER_OBJECT, 2), np.int32)
    coefficients = np.zeros((count, 2, PARTS_PER_OBJECT, 2, 3, 3), np.float32)
    for row, name in enumerate(OBJECT_CLASSES):
        for design, parts in enumerate(RULES[name].designs):
            for place, part in enumerate(parts):
                kinds[row, design, place] = part.shape, part.material
                coefficients[row, design, place] = [[_triple(x) for x in group] for group in (part.centre, part.half)]
    ranges = np.array([(*RULES[name].extents, RULES[name].proportion) for name in OBJECT_CLASSES], np.float32)
    return kinds, coefficients, ranges


_KINDS, _COEFFICIENTS, _RANGES = _tables()
FREQUENCY = np.array([RULES[name].frequency for name in OBJECT_CLASSES], np.float32)
AT_WALL = np.array([RULES[name].at_wall for name in OBJECT_CLASSES], np.float32)


class Furniture(NamedTuple):
    """Objects in their own frames."""

    extents: jax.Array  # f32[O, 3], width, height, depth in metres
    shape: jax.Array  # i32[O, J]
    material: jax.Array  # i32[O, J], 0 or 1
    centre: jax.Array  # f32[O, J, 3]
    half: jax.Array  # f32[O, J, 3]


def build(classes: jax.Array, uniforms: jax.Array) -> Furniture:
    """Objects of given classes with random extents, proportion and design.

    Args:
      classes: i32[O], indices in ROOM_CLASSES, of objects (3 or more).
      uniforms: f32[O, 5] in [0, 1): three extents, the proportion, the design.
    """
    row = classes - FIRST_OBJECT
    ranges = jnp.asarray(_RANGES)[row]
    sizes = ranges[:, :, 0] + uniforms[:, :4] * (ranges[:, :, 1] - ranges[:, :, 0])
    design = (uniforms[:, 4] >= 0.5).astype(jnp.int32)
    kinds = jnp.asarray(_KINDS)[row, design]
    relative, proportional, metres = jnp.moveaxis(jnp.asarray(_COEFFICIENTS)[row, design], -1, 0)
    reach = (sizes[:, :3] * jnp.array([[0.5, 1.0, 0.5]]))[:, None, None, :]
    coordinates = (relative + proportional * sizes[:, 3][:, None, None, None]) * reach + metres
    return Furniture(sizes[:, :3], kinds[..., 0], kinds[..., 1], coordinates[:, :, 0], coordinates[:, :, 1])
