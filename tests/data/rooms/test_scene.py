"""Furniture stays within its extents and on the floor; placed objects do not overlap and keep away from the camera."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.data.rooms import grammar, person, scene
from mtjax.data.rooms.config import OBJECT_CLASSES


@functools.cache
def furniture():
    """Every class four times with random extents, in both designs."""
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(3, 13), 4)
    uniforms = rng.random((len(classes), 5))
    uniforms[:, 4] = np.tile([0.1, 0.2, 0.7, 0.9], 10)
    return classes, jax.tree.map(np.asarray, jax.jit(grammar.build)(classes, uniforms.astype(np.float32)))


def test_parts_lie_within_the_extents_and_touch_the_floor():
    classes, found = furniture()
    round_end = (found.shape == grammar.CAPSULE)[..., None] * np.array([0, 1, 0]) * found.half[..., :1]
    reach = found.half + round_end
    real = found.shape != grammar.NONE
    low = np.where(real[..., None], found.centre - reach, np.inf).min(1)
    high = np.where(real[..., None], found.centre + reach, -np.inf).max(1)
    half = found.extents * np.array([0.5, 1.0, 0.5])
    # Handles, pedals and crowns may stick out a little.
    assert np.all(low >= -half * np.array([1, 0, 1]) - 0.03)
    assert np.all(high <= half + 0.1 * found.extents[:, :1] + 0.08)
    np.testing.assert_allclose(low[:, 1], 0, atol=0.02)
    np.testing.assert_allclose(high[:, 0] - low[:, 0], found.extents[:, 0], rtol=0.15)
    names = np.array(OBJECT_CLASSES)[classes - 3]
    for name in OBJECT_CLASSES:
        ranges = np.array(grammar.RULES[name].extents)
        sizes = found.extents[names == name]
        assert np.all(sizes >= ranges[:, 0] - 1e-5) and np.all(sizes <= ranges[:, 1] + 1e-5)
    assert np.all(found.half[real] >= 0) and np.all(np.where(found.shape == grammar.BOX, found.half.min(-1), 1) > 0)


def test_designs_differ_and_have_at_most_six_parts():
    for rule in grammar.RULES.values():
        assert rule.designs[0] != rule.designs[1]
        assert all(1 <= len(design) <= grammar.PARTS_PER_OBJECT for design in rule.designs)


@functools.cache
def rooms():
    """64 rooms: half extents, camera, classes, extents, placements."""

    @jax.jit
    @jax.vmap
    def make(key):
        draw = scene.Uniforms(jax.random.uniform(key, (512,)))
        half = scene.room_extents(draw)
        camera = draw.between(-1.0, 1.0, 3) * half
        classes = scene.object_classes(draw, 7, jnp.ones(10))
        extents = grammar.build(classes, draw(7, 5)).extents
        return half, camera, classes, extents, scene.place(draw, half, extents, classes, camera, jnp.asarray(5.0))

    return jax.tree.map(np.asarray, make(jax.random.split(jax.random.key(1), 64)))


def test_objects_are_in_the_room_and_away_from_the_camera():
    half, camera, classes, extents, placed = rooms()
    spread = np.abs(placed.rotation[..., ::2, ::2]) @ (extents[..., ::2, None] / 2)
    inside = np.abs(placed.ground) + spread[..., 0] <= half[:, None, ::2] + 1e-4
    assert inside.all(-1)[placed.present].all()
    distance = np.linalg.norm(placed.ground - camera[:, None, ::2], axis=-1)
    assert np.all(distance[placed.present & (classes != grammar.PICTURE)] > 1)
    count = placed.present.sum(1)
    assert count.max() == 5 and count.mean() > 4
    # What hangs or stands at a wall has its back to it.
    at_wall = placed.present & np.isin(classes, [grammar.PICTURE, grammar.DOOR])
    front = placed.rotation[..., ::2, 2]
    back = np.sum(-front * placed.ground, -1) + extents[..., 2] / 2
    wall = np.sum(np.abs(front) * half[:, None, ::2], -1)
    np.testing.assert_allclose(back[at_wall], wall[at_wall] - 0.01, atol=1e-4)


def test_objects_do_not_overlap():
    """No point of a grid in one footprint lies in another; pictures may hang above what is not a door."""
    _, _, classes, extents, placed = rooms()
    grid = np.stack(np.meshgrid(np.linspace(-0.98, 0.98, 15), np.linspace(-0.98, 0.98, 15)), -1).reshape(-1, 2)
    for room in range(len(classes)):
        present = np.flatnonzero(placed.present[room])
        for a in present:
            points = grid * extents[room, a, ::2] / 2 @ placed.rotation[room, a, ::2, ::2].T + placed.ground[room, a]
            for b in present:
                kinds = {classes[room, a], classes[room, b]}
                above = grammar.PICTURE in kinds and len(kinds) == 2 and grammar.DOOR not in kinds
                if a == b or above:
                    continue
                local = np.abs((points - placed.ground[room, b]) @ placed.rotation[room, b, ::2, ::2])
                assert not np.any(np.all(local < extents[room, b, ::2] / 2, 1)), (room, a, b)


def test_cameras_have_right_handed_orthonormal_frames_and_roll_about_the_view(rng):
    look = jax.jit(scene.look)
    for yaw, pitch, roll in rng.uniform(-1.2, 1.2, (4, 3)):
        frame = np.asarray(look(yaw, pitch, roll))
        np.testing.assert_allclose(frame.T @ frame, np.eye(3), atol=1e-5)
        assert np.linalg.det(frame) == pytest.approx(1, abs=1e-5)
        forward = [np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)]
        np.testing.assert_allclose(frame[:, 2], forward, atol=1e-5)
    level = np.asarray(look(0.3, -0.5, 0.0))
    assert level[1, 0] == pytest.approx(0, abs=1e-6) and level[1, 1] < 0  # right is level, down is down


def test_bodies_stand_on_the_floor_and_hang_together(rng):
    body = jax.jit(lambda uniforms: person.body(scene.Uniforms(uniforms), jnp.array([0.4, -0.2]), 0, 7))
    for uniforms in rng.random((8, 64), np.float32):
        solid, middle = jax.tree.map(np.asarray, body(uniforms))
        along = solid.rotation[:, :, 1] * solid.half[:, 1:2]
        ends = np.stack([solid.centre - along, solid.centre + along])
        assert (ends[..., 1] - solid.half[None, :, 0]).min() == pytest.approx(0, abs=1e-5)
        assert 0.3 < middle < 1.5
        squared = solid.rotation @ np.swapaxes(solid.rotation, 1, 2)
        np.testing.assert_allclose(squared, np.broadcast_to(np.eye(3), squared.shape), atol=1e-5)
        # Elbows and knees: a lower limb begins where the upper one ends.
        for upper, lower in ((3, 5), (4, 6), (7, 9), (8, 10)):
            assert np.linalg.norm(ends[1, upper] - ends[0, lower]) < 1e-5
        assert set(solid.part.tolist()) == set(range(1, 7))
