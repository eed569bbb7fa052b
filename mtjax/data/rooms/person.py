"""A room with a person of capsules in random poses: parts and saliency, the stand-in for PASCAL-Context.

A limb hangs along -y at rest. Swung forward by f and outwards by a, its direction is (s sin a, -cos a cos f,
cos a sin f), s = -1 or 1 for its side; elbows bend forward and knees backward, so that the lower limb has f + e or
f - k instead of f. The lowest point of the body stands on the floor.
"""

from typing import Any

import jax.numpy as jnp

from mtjax.data.rooms import grammar, scene
from mtjax.data.rooms.config import PERSON_CLASSES
from mtjax.data.rooms.scene import Array, Primitives, Scene, Uniforms

_FURNITURE = scene.MAX_OBJECTS - 1
_PERSON = PERSON_CLASSES.index("person")
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)
# Part, material (skin, shirt, trousers) and radius in metres of the capsules, in the order of `_bones`.
_CAPSULES = (
    (HEAD, 0, 0.12),
    (TORSO, 1, 0.15),
    (TORSO, 1, 0.085),
    *((UPPER_ARM, 1, 0.055), (UPPER_ARM, 1, 0.055)),
    *((LOWER_ARM, 0, 0.045), (LOWER_ARM, 0, 0.045)),
    *((UPPER_LEG, 2, 0.085), (UPPER_LEG, 2, 0.085)),
    *((LOWER_LEG, 2, 0.06), (LOWER_LEG, 2, 0.06)),
)
_SIDES = (-1.0, 1.0)


def _directions(swing: Array, spread: Array) -> Array:
    """Unit vectors f32[2, 3] of the left and the right limb for angles f32[2]."""
    return jnp.stack(
        [jnp.array(_SIDES) * jnp.sin(spread), -jnp.cos(spread) * jnp.cos(swing), jnp.cos(spread) * jnp.sin(swing)], 1
    )


def _bones(draw: Uniforms) -> tuple[Array, Array]:
    """Both ends f32[11, 3] of the capsules of a random pose, the hips at the origin, facing +z."""
    angle = lambda low, high, *shape: jnp.radians(draw.between(low, high, *shape))  # noqa: E731
    lean, tilt = angle(-10.0, 30.0), angle(-12.0, 12.0)
    spine = jnp.stack([jnp.sin(tilt), jnp.cos(tilt) * jnp.cos(lean), jnp.cos(tilt) * jnp.sin(lean)])
    sides = jnp.array(_SIDES)[:, None]
    across = jnp.array([[1.0, 0.0, 0.0]])
    neck = 0.46 * spine
    head = jnp.stack([neck + 0.19 * spine, neck + 0.25 * spine])
    torso = jnp.stack([0.06 * spine, neck - 0.08 * spine])
    shoulders = neck[None] + sides * 0.19 * across
    hips = sides * 0.1 * across
    arm_swing, arm_spread = angle(-50.0, 130.0, 2), angle(8.0, 90.0, 2)
    elbows = shoulders + 0.29 * _directions(arm_swing, arm_spread)
    hands = elbows + 0.29 * _directions(arm_swing + angle(0.0, 120.0, 2), arm_spread)
    leg_swing, leg_spread = angle(-25.0, 75.0, 2), angle(2.0, 25.0, 2)
    knees = hips + 0.44 * _directions(leg_swing, leg_spread)
    feet = knees + 0.46 * _directions(leg_swing - angle(0.0, 80.0, 2), leg_spread)
    starts = jnp.concatenate([head[:1], torso[:1], shoulders[:1], shoulders, elbows, hips, knees])
    ends = jnp.concatenate([head[1:], torso[1:], shoulders[1:], elbows, hands, knees, feet])
    return starts, ends


def _along(direction: Array) -> Array:
    """Rotations f32[n, 3, 3] whose second column is a unit vector f32[n, 3]."""
    # Any vector that is not parallel spans the rest: a capsule is round.
    other = jnp.where(jnp.abs(direction[:, :1]) < 0.7, jnp.array([[1.0, 0, 0]]), jnp.array([[0, 0, 1.0]]))
    first = jnp.cross(direction, other)
    first /= jnp.linalg.norm(first, axis=1, keepdims=True)
    return jnp.stack([first, direction, jnp.cross(first, direction)], 2)


def body(draw: Uniforms, ground: Array, first_material: int, instance: int) -> tuple[Primitives, Array]:
    """A person at f32[2] on the floor, and the height of the middle of the body."""
    scale, yaw = draw.between(0.85, 1.1), draw() * 2 * jnp.pi
    starts, ends = _bones(draw)
    radii = scale * jnp.array([radius for _, _, radius in _CAPSULES])
    turn = scene.turned(yaw)
    starts, ends = scale * starts @ turn.T, scale * ends @ turn.T
    lowest = jnp.min(jnp.minimum(starts[:, 1], ends[:, 1]) - radii)
    base = jnp.stack([ground[0], -lowest, ground[1]])[None]
    length = jnp.linalg.norm(ends - starts, axis=1)
    count = len(_CAPSULES)
    capsules = Primitives(
        shape=jnp.full(count, grammar.CAPSULE),
        centre=base + (starts + ends) / 2,
        rotation=_along((ends - starts) / length[:, None]),
        half=jnp.stack([radii, length / 2, radii], 1),
        label=jnp.full(count, _PERSON),
        instance=jnp.full(count, instance),
        part=jnp.array([part for part, _, _ in _CAPSULES]),
        material=first_material + jnp.array([material for _, material, _ in _CAPSULES]),
    )
    return capsules, 0.25 * scale - lowest


def room_with_person(draw: Uniforms, style: dict[str, Any]) -> Scene:
    """A room with a person and up to 6 objects; the camera looks roughly at the person."""
    half = scene.room_extents(draw)
    camera, light = scene.ring_camera(draw, style, half), scene.room_light(draw, style, half)
    # Across the middle from the camera, where there is room for a whole body.
    away = -camera.position[::2] / (jnp.linalg.norm(camera.position[::2]) + 1e-6)
    ground = jnp.clip(away * draw.between(0.0, 0.5) + draw.between(-0.4, 0.4, 2), 0.6 - half[::2], half[::2] - 0.6)
    solid, middle = body(draw, ground, 3 + 2 * _FURNITURE, scene.MAX_OBJECTS)
    goal = jnp.stack([ground[0], middle, ground[1]])
    jitter = jnp.radians(style["yaw"]) * jnp.array([0.35, 0.2]) * draw.between(-1.0, 1.0, 2)
    roll = jnp.radians(style["roll"] * draw.between(-1.0, 1.0))
    turned = scene.aimed(camera, goal, jnp.ones(()), jitter, roll)
    camera = turned._replace(focal=jnp.clip(turned.focal * draw.between(0.6, 1.1), 0.7, 2.0))

    classes = scene.object_classes(draw, _FURNITURE, jnp.asarray(grammar.FREQUENCY))
    furniture = grammar.build(classes, draw(_FURNITURE, 5))
    placed = scene.place(draw, half, furniture.extents, classes, camera.position, 2 + jnp.floor(draw() * 5))
    # What stands in the person or in the way is taken out.
    to_person = (
        jnp.linalg.norm(placed.ground - ground[None], axis=1) - jnp.linalg.norm(furniture.extents[:, ::2], axis=1) / 2
    )
    high = classes == grammar.PICTURE
    placed = placed._replace(present=placed.present & (high | (to_person > 0.25)))
    solids = scene.furniture_primitives(
        furniture, placed, classes, scene.lifts(draw, half, furniture.extents, classes), 3
    )
    everything = Primitives(*(jnp.concatenate(pair) for pair in zip(solids, solid, strict=True)))
    kinds = jnp.concatenate([jnp.arange(3), jnp.repeat(classes, 2), jnp.full(3, _PERSON)])
    surfaces = scene.materials(draw, style, kinds)
    return Scene(everything, scene.room_faces(half), surfaces, camera, light, jnp.full((), _PERSON))
