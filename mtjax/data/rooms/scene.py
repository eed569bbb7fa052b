"""A scene as arrays: primitives with materials inside a box of six faces, a camera and a light; and how rooms are made.

Everything random about a scene comes from one vector of uniform numbers: drawing random bits is what takes longest to
compile. World coordinates are metres, x and z along the floor, y up from it. A room has 3 to 7 objects; each tries
several places and takes the first where it overlaps nothing and is 1 m away from the camera, or is left out.

Letters: P primitives, O objects, J parts of an object, M materials, K tried places.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax.data.rooms import grammar

Array = jax.Array
TRIED_PLACES = 12
MAX_OBJECTS = 7
_GOLDEN = 0.61803398875


class Primitives(NamedTuple):
    """Boxes, cylinders and capsules (along their own y axis)."""

    shape: Array  # i32[P], of grammar's constants; NONE is never hit
    centre: Array  # f32[P, 3]
    rotation: Array  # f32[P, 3, 3], columns are the primitive's axes
    half: Array  # f32[P, 3]
    label: Array  # i32[P], segmentation class
    instance: Array  # i32[P], 0 for what has none
    part: Array  # i32[P], part of a person
    material: Array  # i32[P]


class Materials(NamedTuple):
    """Surfaces: two colours, mixed by a solid texture."""

    colours: Array  # f32[M, 2, 3]
    texture: Array  # i32[M], of NONE, CHECKER, STRIPES, NOISE in render
    frequency: Array  # f32[M], 1/m
    phase: Array  # f32[M, 3]
    axis: Array  # f32[M, 3], direction of stripes


class Camera(NamedTuple):
    """A pinhole camera; its frame has x to the right, y down and z forward."""

    position: Array  # f32[3]
    rotation: Array  # f32[3, 3], columns are its axes in the world
    focal: Array  # f32[], half widths of the image


class Light(NamedTuple):
    """A point light and what comes from everywhere."""

    position: Array  # f32[3]
    strength: Array  # f32[], irradiance times squared metres
    ambient: Array  # f32[]


class Faces(NamedTuple):
    """The six insides of a box: -x, +x, floor, ceiling, -z, +z."""

    half: Array  # f32[3]; the floor is y = 0, so the middle is at (0, half[1], 0)
    label: Array  # i32[6]
    material: Array  # i32[6]


class Scene(NamedTuple):
    """What is rendered."""

    primitives: Primitives
    faces: Faces
    materials: Materials
    camera: Camera
    light: Light
    target: Array  # i32[], class of the first object


class Uniforms:
    """Hands out a vector of uniform numbers in [0, 1) in order."""

    def __init__(self, values: Array):
        self._values, self._used = values, 0

    def __call__(self, *shape: int) -> Array:
        count = math.prod(shape)
        if self._used + count > self._values.size:
            raise ValueError(f"A scene used more than its {self._values.size} random numbers")
        part = jax.lax.slice(self._values, (self._used,), (self._used + count,))
        self._used += count
        return part.reshape(shape)

    def between(self, low: Any, high: Any, *shape: int) -> Array:
        return low + self(*shape) * (high - low)


def materials(draw: Uniforms, style: dict[str, Any], classes: Array) -> Materials:
    """Random surfaces; with probability `colour_correlation` the hue is that of the class."""
    count = classes.size
    by_class = (classes * _GOLDEN) % 1.0 + 0.03 * draw(count)
    first = jnp.where(draw(count) < style["colour_correlation"], by_class, draw(count))
    hue = jnp.stack([first, first + draw.between(-0.15, 0.15, count)], 1)
    saturation = draw.between(*style["saturation"], count)[:, None]
    value = draw.between(0.35, 1.0, count)
    value = jnp.stack([value, jnp.where(value > 0.65, value - 0.4, value + 0.4)], 1)
    spread = jnp.abs((hue[..., None] * 6 + jnp.array([0.0, 4.0, 2.0])[None, None]) % 6 - 3) - 1
    colours = value[..., None] * (1 - saturation[..., None] * (1 - jnp.clip(spread, 0, 1)))
    # The texture mixes by `contrast` towards the second colour, so its own amplitude is part of the material.
    colours = jnp.stack([colours[:, 0], colours[:, 0] + style["contrast"] * (colours[:, 1] - colours[:, 0])], 1)
    edges = jnp.cumsum(jnp.stack(style["textures"]))
    texture = jnp.sum(draw(count)[:, None] * edges[-1] >= edges[None, :3], 1)
    axis = draw.between(-1.0, 1.0, count, 3)
    axis /= jnp.linalg.norm(axis, axis=1, keepdims=True) + 1e-6
    return Materials(colours, texture, jnp.exp2(draw.between(0.0, 2.5, count)), draw(count, 3) * 7.0, axis)


def turned(yaw: Array) -> Array:
    """Rotations f32[..., 3, 3] about the vertical; the third column, the front, is (sin yaw, 0, cos yaw)."""
    cos, sin, zero = jnp.cos(yaw), jnp.sin(yaw), jnp.zeros_like(yaw)
    rows = ([cos, zero, sin], [zero, zero + 1, zero], [-sin, zero, cos])
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def look(yaw: Array, pitch: Array, roll: Array) -> Array:
    """The axes right, down, forward as columns f32[3, 3] of a camera that looks along yaw and pitch (radians)."""
    zero = jnp.zeros_like(yaw)
    forward = jnp.stack([jnp.sin(yaw) * jnp.cos(pitch), jnp.sin(pitch), jnp.cos(yaw) * jnp.cos(pitch)])
    level = jnp.stack([-jnp.cos(yaw), zero, jnp.sin(yaw)])
    down = jnp.cross(forward, level)
    right = jnp.cos(roll) * level + jnp.sin(roll) * down
    return jnp.stack([right, jnp.cos(roll) * down - jnp.sin(roll) * level, forward], 1)


def ring_camera(draw: Uniforms, style: dict[str, Any], room: Array) -> Camera:
    """A camera on an ellipse around the middle that looks inwards: any wall may be ahead, at any angle."""
    angle, radius = draw() * (2 * jnp.pi), draw.between(0.65, 0.92)
    ground = radius * room[::2] * jnp.stack([jnp.sin(angle), jnp.cos(angle)])
    position = jnp.stack([ground[0], 2 * room[1] * draw.between(*style["height"]), ground[1]])
    yaw = jnp.arctan2(-ground[0], -ground[1]) + jnp.radians(style["yaw"] * draw.between(-1.0, 1.0))
    pitch = jnp.radians(draw.between(*style["pitch"]))
    roll = jnp.radians(style["roll"] * draw.between(-1.0, 1.0))
    return Camera(position, look(yaw, pitch, roll), draw.between(*style["focal"]))


def aimed(camera: Camera, goal: Array, reach: Array, jitter: Array, roll: Array) -> Camera:
    """The camera turned to a goal, off by `jitter` radians f32[2]; a ball of radius `reach` there fills the frame."""
    way = goal - camera.position
    flat = jnp.hypot(way[0], way[2])
    rotation = look(jnp.arctan2(way[0], way[2]) + jitter[0], jnp.arctan2(way[1], flat) + jitter[1], roll)
    return Camera(camera.position, rotation, jnp.clip(jnp.hypot(flat, way[1]) / reach, 0.6, 4.0))


def room_light(draw: Uniforms, style: dict[str, Any], room: Array) -> Light:
    """A lamp somewhere under the ceiling."""
    ground = draw.between(-0.7, 0.7, 2) * room[::2]
    position = jnp.stack([ground[0], 2 * room[1] - draw.between(0.1, 0.5), ground[1]])
    return Light(position, draw.between(1.5, 3.5), draw.between(*style["ambient"]))


def _gap(ground: Array, half: Array, rotation: Array, others: tuple[Array, Array, Array]) -> Array:
    """Largest separation of an upright box and O others along their axes f32[O]; positive where they do not overlap."""
    other_ground, other_half, other_rotation = others
    mine = rotation[::2, ::2].T  # rows: the two horizontal axes
    theirs = jnp.swapaxes(other_rotation[:, ::2, ::2], 1, 2)
    axes = jnp.concatenate([jnp.broadcast_to(mine[None], theirs.shape), theirs], 1)  # [O, 4, 2]
    reach = jnp.einsum("oai,bi->oab", axes, mine)
    other_reach = jnp.einsum("oai,obi->oab", axes, theirs)
    apart = jnp.abs(jnp.einsum("oai,oi->oa", axes, other_ground - ground[None]))
    spans = jnp.sum(jnp.abs(reach) * half[None, None], -1) + jnp.sum(jnp.abs(other_reach) * other_half[:, None], -1)
    return jnp.max(apart - spans, 1)


class Placed(NamedTuple):
    """Where objects stand; those that are not `present` are left out."""

    ground: Array  # f32[O, 2]
    rotation: Array  # f32[O, 3, 3]
    present: Array  # bool[O]


def place(
    draw: Uniforms, room: Array, extents: Array, classes: Array, camera: Array, limit: Array, *, facing: bool = False
) -> Placed:
    """Puts objects against walls or anywhere, one after the other, without overlap.

    Args:
      draw: random numbers.
      room: f32[3], half extents of the room.
      extents: f32[O, 3], width, height and depth of the objects.
      classes: i32[O].
      camera: f32[3], its position; objects on the floor keep 1 m from it.
      limit: i32[], most objects that are kept.
      facing: take only places where the camera is in front of the object.
    """
    count = classes.size
    half = extents[:, ::2] / 2
    row = classes - grammar.FIRST_OBJECT
    side = jnp.floor(draw(count, TRIED_PLACES) * 4)
    free = draw(count)[:, None] >= jnp.asarray(grammar.AT_WALL)[row][:, None]
    yaw = jnp.where(free, draw(count, TRIED_PLACES) * 2 * jnp.pi, side * (jnp.pi / 2))
    rotation = turned(yaw)
    front, across = rotation[..., ::2, 2], rotation[..., ::2, 0]
    along = draw.between(-1.0, 1.0, count, TRIED_PLACES, 2)
    # A wall's place: back to it, anywhere along it.
    distance = jnp.sum(jnp.abs(front) * room[None, None, ::2], -1) - half[:, 1][:, None] - 0.01
    slack = jnp.sum(jnp.abs(across) * room[None, None, ::2], -1) - half[:, 0][:, None]
    wall = -front * distance[..., None] + across * (along[..., 0] * slack)[..., None]
    box = jnp.abs(rotation[..., ::2, ::2]) @ half[:, None, :, None]
    open_floor = along * jnp.maximum(room[None, None, ::2] - box[..., 0], 0.0)
    ground = jnp.where(free[..., None], open_floor, wall)
    high = classes == grammar.PICTURE
    view = camera[None, None, ::2] - ground
    allowed = high[:, None] | (jnp.linalg.norm(view, axis=-1) > 1.0)
    if facing:
        allowed &= jnp.sum(view * front, -1) > 0.3 * jnp.linalg.norm(view, axis=-1)

    def step(placed: Placed, i: Array) -> tuple[Placed, None]:
        def gaps(k_ground: Array, k_rotation: Array) -> Array:
            gap = _gap(k_ground, half[i], k_rotation, (placed.ground, half, placed.rotation))
            # Pictures hang above the furniture but not on a door.
            apart = high ^ high[i]
            matters = placed.present & ~(apart & ~((classes == grammar.DOOR) | (classes[i] == grammar.DOOR)))
            return jnp.min(jnp.where(matters, gap, jnp.inf))

        fits = allowed[i] & (jax.vmap(gaps)(ground[i], rotation[i]) > 0.0)
        best = jnp.argmax(fits)  # the first that fits
        present = fits[best] & (jnp.sum(placed.present) < limit)
        return Placed(
            placed.ground.at[i].set(ground[i, best]),
            placed.rotation.at[i].set(rotation[i, best]),
            placed.present.at[i].set(present),
        ), None

    empty = Placed(jnp.zeros((count, 2)), jnp.zeros((count, 3, 3)), jnp.zeros(count, bool))
    return jax.lax.scan(step, empty, jnp.arange(count))[0]


def furniture_primitives(
    furniture: grammar.Furniture, placed: Placed, classes: Array, lift: Array, first_material: int
) -> Primitives:
    """The parts of all objects in the world, [O J] of them; object o is instance o + 1."""
    count, parts = furniture.shape.shape
    base = jnp.stack([placed.ground[:, 0], lift, placed.ground[:, 1]], 1)
    centre = base[:, None] + jnp.einsum("oij,opj->opi", placed.rotation, furniture.centre)
    number = jnp.broadcast_to(jnp.arange(count)[:, None], (count, parts))
    columns = (
        jnp.where(placed.present[:, None], furniture.shape, grammar.NONE),
        centre,
        jnp.broadcast_to(placed.rotation[:, None], (count, parts, 3, 3)),
        furniture.half,
        jnp.broadcast_to(classes[:, None], (count, parts)),
        number + 1,
        jnp.zeros((count, parts), jnp.int32),
        first_material + 2 * number + furniture.material,
    )
    return Primitives(*(column.reshape(count * parts, *column.shape[2:]) for column in columns))


def object_classes(draw: Uniforms, count: int, weights: Array) -> Array:
    """Random classes i32[O] of objects with the given weights f32[10]."""
    edges = jnp.cumsum(weights)
    return grammar.FIRST_OBJECT + jnp.sum(draw(count)[:, None] * edges[-1] >= edges[None, :-1], 1)


def room_faces(room: Array) -> Faces:
    """Four walls, a floor and a ceiling of materials 0, 1 and 2."""
    kinds = jnp.array([0, 0, 1, 2, 0, 0])
    return Faces(room, kinds, kinds)


def room_extents(draw: Uniforms) -> Array:
    """Half extents of a room, metres."""
    return draw.between(jnp.array([1.5, 1.2, 1.8]), jnp.array([2.4, 1.5, 2.8]), 3)


def lifts(draw: Uniforms, room: Array, extents: Array, classes: Array) -> Array:
    """Height of the objects' feet: pictures hang around eye level."""
    middle = jnp.minimum(draw.between(1.3, 1.7, classes.size), 2 * room[1] - 0.05 - extents[:, 1] / 2)
    return jnp.where(classes == grammar.PICTURE, middle - extents[:, 1] / 2, 0.0)


def room(draw: Uniforms, style: dict[str, Any]) -> Scene:
    """A room with 3 to 7 objects, seen from a wide camera on a ring."""
    half = room_extents(draw)
    camera, light = ring_camera(draw, style, half), room_light(draw, style, half)
    classes = object_classes(draw, MAX_OBJECTS, jnp.asarray(grammar.FREQUENCY))
    furniture = grammar.build(classes, draw(MAX_OBJECTS, 5))
    limit = 7 - jnp.floor(draw() ** 2 * 5)  # 3 to 7, rather more: some do not fit or are not seen
    placed = place(draw, half, furniture.extents, classes, camera.position, limit)
    solids = furniture_primitives(furniture, placed, classes, lifts(draw, half, furniture.extents, classes), 3)
    surfaces = materials(draw, style, jnp.concatenate([jnp.arange(3), jnp.repeat(classes, 2)]))
    return Scene(solids, room_faces(half), surfaces, camera, light, classes[0])


def single_object(draw: Uniforms, style: dict[str, Any]) -> Scene:
    """One object of a uniformly random class that fills the frame, the background being a room."""
    half = room_extents(draw)
    camera, light = ring_camera(draw, style, half), room_light(draw, style, half)
    classes = object_classes(draw, 1, jnp.ones(len(grammar.FREQUENCY)))
    furniture = grammar.build(classes, draw(1, 5))
    placed = place(draw, half, furniture.extents, classes, camera.position, jnp.ones(()), facing=True)
    placed = placed._replace(present=jnp.ones(1, bool))  # where it stands last, if it fits nowhere
    lift = lifts(draw, half, furniture.extents, classes)
    solids = furniture_primitives(furniture, placed, classes, lift, 3)
    size = furniture.extents[0]
    goal = jnp.stack([placed.ground[0, 0], lift[0] + size[1] / 2, placed.ground[0, 1]])
    reach = jnp.linalg.norm(size) / 2 * draw.between(0.9, 1.4)
    roll = jnp.radians(style["roll"] * draw.between(-1.0, 1.0))
    camera = aimed(camera, goal, reach, draw.between(-0.08, 0.08, 2), roll)
    surfaces = materials(draw, style, jnp.concatenate([jnp.arange(3), jnp.repeat(classes, 2)]))
    return Scene(solids, room_faces(half), surfaces, camera, light, classes[0])
