"""A street: road, sidewalks, buildings, poles, trees, cars and sky, the stand-in for Cityscapes.

The street runs along z and bends: its middle is at x(z) = c (z - z0)^2 with the camera at z0. The ground is the floor
of a box of 120 m whose other faces are the sky. The road polygon is a strip along that curve in straight pieces, and
sometimes a second one across it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from mtjax.data.rooms import scene
from mtjax.data.rooms.config import STREET_CLASSES
from mtjax.data.rooms.grammar import BOX, CAPSULE, CYLINDER, NONE
from mtjax.data.rooms.scene import Array, Camera, Faces, Light, Primitives, Scene, Uniforms

ROAD, SIDEWALK, BUILDING, POLE, TREE, CAR, SKY = range(len(STREET_CLASSES))
_HALF = (60.0, 30.0, 60.0)
_PIECES, _BUILDINGS, _POLES, _TREES, _CARS = 7, 10, 4, 4, 5
_START = -50.0
"""Where the camera stands along the street, metres."""
# Classes of the materials, in order; cars have two each.
_SURFACES = (ROAD, SIDEWALK, SKY, *(BUILDING,) * _BUILDINGS, POLE, POLE, TREE, TREE, *(CAR,) * (2 * _CARS))
_FACADE, _METAL, _WOOD, _PAINT = (_SURFACES.index(kind) for kind in (BUILDING, POLE, TREE, CAR))


def _column(values: Any, count: int) -> Array:
    return jnp.broadcast_to(jnp.asarray(values), (count,))


def _solids(shape, centre, yaw, half, label, instance, material) -> Primitives:
    """Upright primitives; centre and half are triples of f32[n] or numbers, the rest f32[n] or numbers."""
    count = max(jnp.size(value) for value in (*centre, *half, yaw))
    return Primitives(
        shape=_column(shape, count),
        centre=jnp.stack([_column(value, count) for value in centre], 1).astype(jnp.float32),
        rotation=scene.turned(_column(yaw, count).astype(jnp.float32)),
        half=jnp.stack([_column(value, count) for value in half], 1).astype(jnp.float32),
        label=_column(label, count),
        instance=_column(instance, count),
        part=jnp.zeros(count, jnp.int32),
        material=_column(material, count),
    )


class _Way(NamedTuple):
    """The middle of the road."""

    bend: Array  # f32[], 1/m
    width: Array  # f32[], half width, metres

    def middle(self, z: Array) -> Array:
        return self.bend * (z - _START) ** 2

    def heading(self, z: Array) -> Array:
        return jnp.arctan(2 * self.bend * (z - _START))


def _sides(count: int) -> Array:
    """Right and left in turn, f32[count]."""
    return jnp.where(jnp.arange(count) % 2 == 0, 1.0, -1.0)


def _roads(draw: Uniforms, way: _Way) -> list[Primitives]:
    """Overlapping straight pieces, a few centimetres above the ground, and sometimes a crossing."""
    z = _START + jnp.arange(_PIECES) * 9.0
    along = _solids(BOX, (way.middle(z), 0.0, z), way.heading(z), (way.width, 0.03, 5.2), ROAD, 0, 0)
    z = draw.between(-36.0, -10.0)
    shape = jnp.where(draw() < 0.35, BOX, NONE)
    across = _solids(shape, (way.middle(z), 0.0, z), way.heading(z), (40.0, 0.03, 3.0), ROAD, 0, 0)
    return [along, across]


def _buildings(draw: Uniforms, way: _Way) -> list[Primitives]:
    """A row of boxes on each side, with gaps."""
    row = jnp.arange(_BUILDINGS) // 2
    z = _START + 6 + row * 12.0 + draw.between(-2.0, 2.0, _BUILDINGS)
    half = tuple(draw.between(low, high, _BUILDINGS) for low, high in ((3.0, 6.0), (2.5, 9.0), (3.5, 6.5)))
    x = way.middle(z) + _sides(_BUILDINGS) * (way.width + draw.between(2.0, 6.5, _BUILDINGS) + half[0])
    shape = jnp.where(draw(_BUILDINGS) < 0.8, BOX, NONE)
    return [_solids(shape, (x, half[1], z), way.heading(z), half, BUILDING, 0, _FACADE + jnp.arange(_BUILDINGS))]


def _poles(draw: Uniforms, way: _Way) -> list[Primitives]:
    """Posts with a sign at the edge of the road."""
    z = _START + 4 + draw(_POLES) * 26
    x, half = way.middle(z) + _sides(_POLES) * (way.width + 0.6), draw.between(1.3, 2.6, _POLES)
    posts = _solids(CYLINDER, (x, half, z), 0.0, (0.09, half, 0.09), POLE, 0, _METAL)
    signs = _solids(BOX, (x, 2 * half - 0.3, z - 0.1), 0.0, (0.35, 0.3, 0.03), POLE, 0, _METAL + 1)
    return [posts, signs]


def _trees(draw: Uniforms, way: _Way) -> list[Primitives]:
    """Trunks with a round crown."""
    z = _START + 5 + draw(_TREES) * 36
    x, half = way.middle(z) - _sides(_TREES) * (way.width + 1.1), draw.between(1.0, 1.8, _TREES)
    crown, there = draw.between(0.9, 1.8, _TREES), draw(_TREES) < 0.75
    shape, size = jnp.where(there, CYLINDER, NONE), (0.18, half, 0.18)
    trunks = _solids(shape, (x, half, z), 0.0, size, TREE, 0, _WOOD)
    shape, size = jnp.where(there, CAPSULE, NONE), (crown, 0.4 * crown, crown)
    crowns = _solids(shape, (x, 2 * half + crown, z), 0.0, size, TREE, 0, _WOOD + 1)
    return [trunks, crowns]


def _cars(draw: Uniforms, way: _Way) -> list[Primitives]:
    """Body, cabin and four wheels; car i is instance i + 1."""
    number = jnp.arange(_CARS)
    z = _START + 6.5 + number * 6.5 + draw.between(-1.5, 1.5, _CARS)
    lane = jnp.where(draw(_CARS) < 0.6, 0.5, 0.82) * jnp.where(draw(_CARS) < 0.5, 1.0, -1.0)
    x = way.middle(z) + lane * (way.width - 0.9)
    yaw = way.heading(z) + draw.between(-0.08, 0.08, _CARS)
    length, tall = draw.between(1.8, 2.5, _CARS), draw.between(0.33, 0.5, _CARS)
    there, paint = draw(_CARS) < 0.65, _PAINT + 2 * number
    front, side = (jnp.sin(yaw), jnp.cos(yaw)), (jnp.cos(yaw), -jnp.sin(yaw))

    def part(shape: int, forward: Array, right: float, up: Array, half: tuple, material: Array) -> Primitives:
        place = (x + forward * front[0] + right * side[0], up, z + forward * front[1] + right * side[1])
        return _solids(jnp.where(there, shape, NONE), place, yaw, half, CAR, number + 1, material)

    body = part(BOX, 0 * length, 0.0, 0.3 + tall, (0.9, tall, length), paint)
    cabin = part(BOX, -0.15 * length, 0.0, 0.58 + 2 * tall, (0.78, 0.28, 0.55 * length), paint + 1)
    wheels = [
        part(CYLINDER, i * 0.62 * length, j * 0.8, jnp.array(0.33), (0.3, 0.12, 0.3), paint + 1)
        for i in (-1, 1)
        for j in (-1, 1)
    ]
    # An axle, a cylinder's y, lies across the car.
    lying = [w.rotation for w in wheels]
    lying = [jnp.stack([axes[..., 1], axes[..., 0], -axes[..., 2]], -1) for axes in lying]
    return [body, cabin, *(w._replace(rotation=axes) for w, axes in zip(wheels, lying, strict=True))]


def street(draw: Uniforms, style: dict[str, Any]) -> Scene:
    """A street seen from somewhere on its right half, or from the sidewalk."""
    way = _Way(draw.between(-0.004, 0.004), draw.between(3.2, 5.5))
    groups = [group for make in (_roads, _buildings, _poles, _trees, _cars) for group in make(draw, way)]
    solids = Primitives(*(jnp.concatenate(parts) for parts in zip(*groups, strict=True)))

    start = jnp.full((), _START)
    position = jnp.stack([way.width * draw.between(-1.2, 0.3), draw.between(1.0, 2.6), start])
    turn = jnp.radians(style["yaw"] * 0.5 * draw.between(-1.0, 1.0))
    pitch, roll = jnp.radians(draw.between(-14.0, 10.0)), jnp.radians(0.3 * style["roll"] * draw.between(-1.0, 1.0))
    camera = Camera(position, scene.look(turn, pitch, roll), draw.between(*style["focal"]))
    sun = jnp.stack([draw.between(-40.0, 40.0), draw.between(45.0, 58.0), draw.between(-58.0, 20.0)])
    # So far away the light hardly falls off: its strength is set by the irradiance at the camera.
    light = Light(sun, jnp.sum((sun - position) ** 2) * draw.between(0.5, 1.1), draw.between(*style["ambient"]))
    surfaces = scene.materials(draw, style, jnp.array(_SURFACES))
    # Metres matter less here than in a room: coarser textures.
    surfaces = surfaces._replace(frequency=surfaces.frequency * 0.3)
    faces = Faces(jnp.array(_HALF), jnp.array([SKY, SKY, SIDEWALK, SKY, SKY, SKY]), jnp.array([2, 2, 1, 2, 2, 2]))
    return Scene(solids, faces, surfaces, camera, light, jnp.full((), CAR))
