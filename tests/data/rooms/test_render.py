"""Ray casting against signed distances: a ray stops on the surface it says, and nothing lies before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.data.rooms import render
from mtjax.data.rooms.grammar import BOX, CAPSULE, CYLINDER, NONE
from mtjax.data.rooms.scene import Primitives, turned


def signed_distance(shape, half, points):
    """Distance of points f64[N, 3] in the frame of a primitive to its surface, negative inside."""
    if shape == BOX:
        apart = np.abs(points) - half
        return np.linalg.norm(np.maximum(apart, 0), axis=1) + np.minimum(apart.max(1), 0)
    radius, length = half[:2]
    if shape == CAPSULE:
        axis = np.clip(points[:, 1], -length, length)[:, None] * np.array([[0, 1, 0]])
        return np.linalg.norm(points - axis, axis=1) - radius
    apart = np.stack([np.hypot(points[:, 0], points[:, 2]) - radius, np.abs(points[:, 1]) - length], 1)
    return np.linalg.norm(np.maximum(apart, 0), axis=1) + np.minimum(apart.max(1), 0)


@functools.cache
def hit():
    def distance(origin, way, shape, half):
        return render._hit(list(origin), list(way), jnp.sum(way * way, 0), shape, half)

    return jax.jit(distance)


@pytest.mark.parametrize("shape", [BOX, CYLINDER, CAPSULE])
@pytest.mark.parametrize("half", [(0.5, 0.7, 0.5), (0.3, 0.0, 0.3), (0.05, 1.0, 0.05)])
def test_a_ray_stops_at_the_first_point_of_the_surface(rng, shape, half):
    if shape != CAPSULE and half[1] == 0:
        half = (half[0], 0.01, half[2])
    count = 400
    origin = rng.normal(size=(count, 3))
    origin *= (rng.uniform(1.8, 4, count) / np.linalg.norm(origin, axis=1))[:, None]
    goal = rng.uniform(-1.2, 1.2, (count, 3)) * np.array(half)
    way = goal - origin
    way[:3] = -origin[:3]  # straight at the middle, where caps and sides meet nothing but themselves
    distance = np.asarray(hit()(*(v.T.astype(np.float32) for v in (origin, way)), shape, np.float32(half)))
    met = distance < 1e8
    assert met[:3].all()
    end = signed_distance(shape, np.array(half), origin[met] + distance[met, None] * way[met])
    # Rounding of |o|^2 (at most 16 m^2) against r^2 moves a round surface by eps |o|^2 / r.
    rounding = 1e-5 + 3 * np.finfo(np.float32).eps / 2 * 16 / half[0]
    np.testing.assert_allclose(end, 0, atol=rounding)
    share = np.linspace(0, 0.999, 60)[:, None, None]
    before = origin[met] + share * distance[met, None] * way[met]
    assert signed_distance(shape, np.array(half), before.reshape(-1, 3)).min() > -rounding
    passed = origin[~met] + np.linspace(0, 3, 400)[:, None, None] * way[~met]
    assert passed.size == 0 or signed_distance(shape, np.array(half), passed.reshape(-1, 3)).min() > -1e-3


def solids(shapes, centres, yaws, halves):
    count = len(shapes)
    zeros = jnp.zeros(count, jnp.int32)
    rotation = turned(jnp.asarray(yaws, jnp.float32))
    return Primitives(
        jnp.asarray(shapes), jnp.asarray(centres, jnp.float32), rotation, jnp.asarray(halves), *(zeros,) * 4
    )


def test_the_nearest_of_several_wins_and_none_is_never_hit():
    row = solids(
        [NONE, BOX, CAPSULE, CYLINDER],
        [[0, 0, 1], [0, 0, 5], [0, 0, 3], [2, 0, 4]],
        [0.0, 0.0, 0.0, 0.7],
        [[0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0.5, 0.0, 0.5], [0.5, 1.0, 0.5]],
    )
    way = jnp.array([[0.0, 0.9 / 4, 2 / 4, -1.0], [0.0, 0, 0, 0], [1.0, 1.0, 1.0, 1.0]])
    distance, index = jax.jit(render._nearest)(jnp.zeros(3), way, row)
    # Ball at 3 - .5; past it, the front of the box at 4; the round side of the cylinder; nothing.
    np.testing.assert_array_equal(index[:3], [2, 1, 3])
    np.testing.assert_allclose(distance[:2], [2.5, 4.0], rtol=1e-5)
    point = np.asarray(way[:, 2] * distance[2])
    assert np.hypot(point[0] - 2, point[2] - 4) == pytest.approx(0.5, abs=1e-4)
    assert distance[3] > 1e8
    dark = jax.jit(render._shadowed)(jnp.zeros((3, 4)), way * 3.5, row)
    np.testing.assert_array_equal(dark, [True, False, distance[2] < 3.5, False])


def test_pixels_are_square_and_the_middle_is_straight_ahead():
    way = np.asarray(jax.jit(render.rays, static_argnums=0)((5, 9), 2.0)).reshape(3, 5, 9)
    np.testing.assert_allclose(way[:, 2, 4], [0, 0, 1], atol=1e-7)
    np.testing.assert_allclose(way[0, 0, 1:] - way[0, 0, :-1], 2 / 9 / 2, rtol=1e-5)
    np.testing.assert_allclose(way[1, 1:, 0] - way[1, :-1, 0], 2 / 9 / 2, rtol=1e-5)
    assert way[0, 0, -1] == pytest.approx((1 - 1 / 9) / 2)
