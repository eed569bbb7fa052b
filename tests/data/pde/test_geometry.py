"""Domains: areas and distances in closed form, the normalised level set, a user's functions and images, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.data.pde import geometry

AREAS = {
    "square": 1.0,
    "disk": np.pi / 4,
    "triangle": np.sqrt(3) / 4,
    "right_triangle": np.sqrt(3) / 8,
    "hexagon": 3 * np.sqrt(3) / 8,
    "ellipse": np.pi * 0.5 * 0.3,
    "l_shape": 0.75,
    "plus": 0.4 + 0.4 - 0.16,
    "square_with_hole": 1 - np.pi * 0.2**2,
    "square_with_holes": 1 - 2 * np.pi * 0.15**2,
}


@pytest.mark.parametrize("name", geometry.NAMES)
def test_area_of_ready_made_shapes(name):
    assert geometry.volume_fraction(geometry.named(name), samples=256) == pytest.approx(AREAS[name], abs=2e-4)
    assert geometry.named(name).name == name


@pytest.mark.parametrize("name", [*geometry.NAMES, "star-0"])
def test_links_are_whole_between_nodes_inside_and_end_on_the_boundary_elsewhere(name):
    shape = geometry.named(name)
    grid = geometry.discretize(shape, 33)
    assert grid.theta.min() > 0 and grid.theta.max() == 1
    assert not grid.mask[[0, -1]].any() and not grid.mask[:, [0, -1]].any()
    ends = grid.crossings()
    for axis in range(2):
        for side, sign in enumerate((-1, 1)):
            row, joined = 2 * axis + side, grid.mask & np.roll(grid.mask, -sign, axis)
            assert (grid.theta[row][joined] == 1).all()
            cut = grid.mask & ~joined
            assert cut.any()
            np.testing.assert_allclose(shape(ends[row][cut]), 0, atol=1e-14)


def half_planes_exit(normals, offsets, start, direction):
    """Where rays from inside a convex polygon {x : n.x < c for all sides} leave it, in multiples of their direction."""
    speed = normals @ direction
    times = np.where(speed > 0, (offsets - start @ normals.T) / np.where(speed > 0, speed, 1), np.inf)
    return times.min(-1)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(3, 9))
def test_distances_of_convex_polygons_are_those_to_half_planes(seed, corners):
    rng = np.random.default_rng(seed)
    angles = np.sort(2 * np.pi * (np.arange(corners) + rng.uniform(0.1, 0.9, corners)) / corners)
    vertices = 0.5 + 0.5 * np.stack([np.cos(angles), np.sin(angles)], -1)
    edges = np.roll(vertices, -1, 0) - vertices
    normals = np.stack([edges[:, 1], -edges[:, 0]], -1)
    offsets = (normals * vertices).sum(-1)
    grid = geometry.discretize(geometry.polygon(vertices), 20)
    np.testing.assert_array_equal(grid.mask, (grid.points @ normals.T < offsets - 1e-12).all(-1))
    for row, direction in enumerate([(-1, 0), (1, 0), (0, -1), (0, 1)]):
        step = np.array(direction) * grid.spacing
        exact = np.minimum(half_planes_exit(normals, offsets, grid.points[grid.mask], step), 1)
        # A crossing that falls on the neighbour itself may round to either side of it.
        np.testing.assert_allclose(grid.theta[row][grid.mask], exact, atol=1e-10)


def test_distances_of_disk_and_ellipse_in_closed_form():
    for shape, (a, b) in ((geometry.disk(), (0.5, 0.5)), (geometry.ellipse(), (0.5, 0.3))):
        grid = geometry.discretize(shape, 41)
        x, y = (grid.points[grid.mask] - 0.5).T
        exact = np.minimum((a * np.sqrt(1 - (y / b) ** 2) - x) / grid.spacing[0], 1)
        np.testing.assert_allclose(grid.theta[1][grid.mask], exact, atol=1e-12)
        exact = np.minimum((b * np.sqrt(1 - (x / a) ** 2) + y) / grid.spacing[1], 1)
        np.testing.assert_allclose(grid.theta[2][grid.mask], exact, atol=1e-12)


def test_ball_in_three_dimensions_and_another_box():
    ball = geometry.disk((1.0, 0.0, 0.0), 0.9, name="ball")
    grid = geometry.discretize(ball, (13, 15, 17), box=((0, -1, -1), (2, 1, 1)))
    assert grid.points.shape == (13, 15, 17, 3) and grid.theta.shape == (6, 13, 15, 17)
    x, y, z = (grid.points[grid.mask] - [1, 0, 0]).T
    exact = np.minimum((np.sqrt(0.81 - x**2 - y**2) - z) / grid.spacing[2], 1)
    np.testing.assert_allclose(grid.theta[5][grid.mask], exact, atol=1e-12)
    volume = geometry.volume_fraction(ball, samples=48, box=((0, -1, -1), (2, 1, 1)))
    assert volume == pytest.approx(4 / 3 * np.pi * 0.9**3 / 8, abs=1e-3)


@pytest.mark.parametrize("name", ["l_shape", "plus", "triangle"])
def test_level_set_of_a_polygon_is_the_distance_to_its_outline(name, rng):
    shape = geometry.named(name)
    ticks = np.linspace(0, 1, 401)
    corners = {
        "l_shape": [(0, 0), (1, 0), (1, 0.5), (0.5, 0.5), (0.5, 1), (0, 1)],
        "triangle": [(0, 0), (1, 0), (0.5, np.sqrt(3) / 2)],
        "plus": [
            *[(0.3, 0), (0.7, 0), (0.7, 0.3), (1, 0.3), (1, 0.7), (0.7, 0.7)],
            *[(0.7, 1), (0.3, 1), (0.3, 0.7), (0, 0.7), (0, 0.3), (0.3, 0.3)],
        ],
    }[name]
    corners = np.array(corners, float)
    outline = corners[:, None] + ticks[:, None] * (np.roll(corners, -1, 0) - corners)[:, None]
    points = rng.uniform(size=(200, 2))
    nearest = np.linalg.norm(points[:, None] - outline.reshape(-1, 2), axis=-1).min(1)
    np.testing.assert_allclose(np.abs(shape.signed_distance(points)), nearest, atol=2e-3)


@pytest.mark.parametrize("name", ["ellipse", "star-3"])
def test_normalised_level_set_has_unit_slope_on_the_boundary(name):
    shape = geometry.named(name)
    grid = geometry.discretize(shape, 33)
    cut = (grid.theta[1] < 1) & (grid.theta[1] > 0)
    edge = grid.crossings()[1][cut]
    gradient = np.stack(
        [
            (shape.signed_distance(edge + offset) - shape.signed_distance(edge - offset)) / 2e-5
            for offset in 1e-5 * np.eye(2)
        ],
        -1,
    )
    np.testing.assert_allclose(shape.signed_distance(edge), 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(gradient, axis=-1), 1, atol=1e-3)
    inside = shape.signed_distance(grid.points)[grid.mask]
    assert np.isfinite(inside).all() and (inside < 0).all()


def test_star_depends_on_its_key_and_fills_the_box():
    same, other = (geometry.named(name) for name in ("star-5", "star-6"))
    points = np.random.default_rng(0).uniform(size=(50, 2))
    np.testing.assert_array_equal(same(points), geometry.random_star(jax.random.key(5))(points))
    assert np.abs(same(points) - other(points)).max() > 0.01
    angles = np.linspace(0, 2 * np.pi, 3000)
    rays = 0.5 + 0.485 * np.stack([np.cos(angles), np.sin(angles)], -1)
    assert (same(rays) > 0).all() and (same(0.5 + (rays - 0.5) * 0.475 / 0.485) < 0).any()


def test_function_of_jax_numpy_is_called_in_float64():
    own = geometry.Geometry("own", lambda x: jnp.sqrt(((x - 0.5) ** 2).sum(-1)) - 0.4)
    ours, exact = geometry.discretize(own, 21), geometry.discretize(geometry.disk(radius=0.4), 21)
    np.testing.assert_array_equal(ours.mask, exact.mask)
    np.testing.assert_allclose(ours.theta, exact.theta, atol=1e-12)


def test_difference_cuts_a_hole():
    ring = geometry.difference(geometry.disk(), geometry.disk(radius=0.2), name="ring")
    points = np.array([[0.5, 0.5], [0.8, 0.5], [0.5, 0.99], [0.0, 0.0]])
    np.testing.assert_allclose(ring(points), [0.2, -0.1, -0.01, np.sqrt(0.5) - 0.5], atol=1e-12)


def test_image_of_a_disk_is_the_disk_to_a_part_of_a_pixel():
    pixels = 64
    centers = (np.arange(pixels) + 0.5) / pixels - 0.5
    image = np.hypot(centers[:, None], centers) < 0.4
    shape = geometry.from_image(image)
    band = geometry.discretize(geometry.disk(radius=0.4), 64)
    near = np.abs(band.distance) < 0.03
    error = (shape.signed_distance(band.points) - band.distance)[near] * pixels
    assert np.sqrt((error**2).mean()) < 0.25 and np.abs(error).max() < 0.6
    assert geometry.volume_fraction(shape, samples=256) == pytest.approx(np.pi * 0.16, abs=0.004)


def test_image_has_its_first_row_on_top():
    image = np.zeros((20, 30), np.uint8)
    image[:10, :10] = 1
    shape = geometry.from_image(image)
    inside = shape(np.array([[0.15, 0.75], [0.15, 0.25], [0.75, 0.75]])) < 0
    assert inside.tolist() == [True, False, False]
    assert shape(np.array([[0.0, 0.75], [0.15, 1.0], [1 / 3, 0.75], [0.15, 0.5]])) == pytest.approx(0, abs=0.004)


def square_of(values):
    return geometry.Geometry("bad", lambda x: np.full(x.shape[:-1], values))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: geometry.discretize(square_of(1.0), 9), "is empty"),
        (lambda: geometry.discretize(geometry.disk((0.5, 0.5), 0.01), 8), "is empty"),
        (lambda: geometry.discretize(geometry.disk((0.5, 0.8), 0.4), 9), "leaves the box"),
        (lambda: geometry.discretize(square_of(np.nan), 9), "must be finite"),
        (lambda: geometry.discretize(geometry.Geometry("bad", lambda x: x), 9), "must map points"),
        (lambda: geometry.discretize(geometry.disk(), 2), "at least 3 nodes"),
        (lambda: geometry.polygon([(0, 0), (1, 1)]), "at least 3 finite pairs"),
        (lambda: geometry.disk(radius=-1.0), "must be positive"),
        (lambda: geometry.ellipse(semi_axes=(0.0, 0.5)), "must be positive"),
        (lambda: geometry.plus(1.5), "between 0 and 1"),
        (lambda: geometry.random_star(jax.random.key(0), roughness=1.0), "roughness"),
        (lambda: geometry.named("cube"), "no geometry 'cube'"),
        (lambda: geometry.from_image(np.ones((8, 8, 3), bool)), r"\[rows, columns\]"),
        (lambda: geometry.from_image(np.linspace(0, 1, 64).reshape(8, 8)), "boolean or hold 0 and 1"),
        (lambda: geometry.from_image(np.array([["x"] * 4] * 4)), "boolean or hold 0 and 1"),
        (lambda: geometry.from_image(np.zeros((8, 8), bool)), "no pixel is inside"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
