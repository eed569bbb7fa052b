"""Heat in a plate against closed forms and a manufactured solution, the maximum principle, the data set's columns."""

import functools

import jax
import numpy as np
import pytest

from mtjax.data.pde import heat3d
from mtjax.data.pde.geometry import difference, discretize, disk

BOX = ((-2.0, -2.0), (2.0, 2.0))


def solve_one(equations):
    with jax.enable_x64(True):
        return heat3d.solve([equations], tolerance=1e-11, dtype=np.float64)[0]


def relative_error(t, reference, mask):
    return np.linalg.norm((t - reference)[mask]) / np.linalg.norm(reference[mask])


@functools.cache
def section(size, holes=3, radius=1.2):
    return discretize(heat3d.HeatConfig().section(holes, radius), size, box=BOX)


def plate_of(size, layers, thickness, **problem):
    heights = np.linspace(0, thickness, layers)
    grid = section(size)
    points = heat3d._columns(grid.points, heights)
    return grid, points, solve_one(heat3d.conductances(grid, heights, **problem))


def test_manufactured_solution_converges_with_second_order():
    """T = sin(x + 1) e^(y/2) (2 + cos(pi z / H)): its slope is 0 on top and bottom, so that the coolant has its T."""
    thickness = 0.8
    wave = np.pi / thickness

    def exact(p):
        return np.sin(p[..., 0] + 1) * np.exp(p[..., 1] / 2) * (2 + np.cos(wave * p[..., 2]))

    def source(p):
        plane = np.sin(p[..., 0] + 1) * np.exp(p[..., 1] / 2)
        bend = np.cos(wave * p[..., 2])
        return plane * (0.75 * (2 + bend) + wave**2 * bend)

    errors = []
    for size, layers in ((25, 7), (49, 13)):
        grid, points, t = plate_of(
            size,
            layers,
            thickness,
            wall=exact,
            film=lambda p: 3 + p[..., 0],
            ambient=lambda p: exact(np.concatenate([p, np.zeros_like(p[..., :1])], -1)),
            source=source,
        )
        errors.append(relative_error(t, exact(points), grid.mask))
    assert errors[1] < 2e-3 and 1.7 < np.log2(errors[0] / errors[1]) < 2.6


def test_slab_that_the_coolant_cools_from_below_is_exact():
    """Heated by q inside and insulated on top: T = T_c + q H / s + q (H z - z^2 / 2), a parabola, on any section."""
    q, s, coolant, thickness = 2.0, 1.5, 7.0, 0.8

    def exact(p):
        return coolant + q * thickness / s + q * (thickness * p[..., 2] - p[..., 2] ** 2 / 2)

    problem = {"wall": exact, "film": lambda p: np.full(p.shape[:-1], s), "ambient": coolant, "source": q}
    grid, points, t = plate_of(25, 7, thickness, **problem)
    np.testing.assert_allclose(t[grid.mask], exact(points)[grid.mask], rtol=1e-8)
    assert (t[~grid.mask] == 0).all()


def test_ring_between_two_temperatures_is_logarithmic():
    """A plate with one hole of radius a in its middle, insulated: T = log(R / rho) / log(R / a)."""
    inner, errors = 0.75, []
    for size, layers in ((25, 7), (49, 13)):
        ring = difference(disk((0, 0), 2.0), disk((0, 0), inner), name="ring")
        grid = discretize(ring, size, box=BOX)
        equations = heat3d.conductances(
            grid,
            np.linspace(0, 0.8, layers),
            wall=lambda p: np.where(np.hypot(p[..., 0], p[..., 1]) > 1.4, 0.0, 1.0),
            film=lambda p: np.zeros(p.shape[:-1]),
            ambient=5.0,
        )
        t = solve_one(equations)
        radius = np.where(grid.mask, np.linalg.norm(grid.points, axis=-1), 1.0)
        exact = np.log(2 / radius) / np.log(2 / inner)
        errors.append(relative_error(t, np.broadcast_to(exact[..., None], t.shape), grid.mask))
    assert errors[1] < 2e-3 and 1.7 < np.log2(errors[0] / errors[1]) < 2.6


SMALL = heat3d.HeatConfig(holes=(2, 4), train_radii=(0.9, 1.6), test_radii=(1.2, 1.3), size=21, layers=4)


@functools.cache
def small():
    seen = []
    data = heat3d.generate(SMALL, progress=lambda *counts: seen.append(counts))
    assert seen == [(4, 8), (8, 8)]
    return data


def test_columns_of_the_data_set():
    data = small()
    assert list(data) == ["train", "test"]
    nodes = 21 * 21 * 4
    assert {key: value.shape for key, value in data["test"].items()} == {
        "inputs": (4, 2),
        "points": (nodes, 3),
        "values": (4, nodes),
        "mask": (4, nodes),
        "minimum": (4,),
        "task": (4,),
        "design": (4, 2),
    }
    np.testing.assert_allclose(data["train"]["inputs"], [[0, 0], [0, 1], [1, 0], [1, 1]], atol=1e-6)
    np.testing.assert_allclose(data["test"]["inputs"][:2], [[0, 3 / 7], [0, 4 / 7]], atol=1e-6)
    assert data["test"]["design"].tolist() == pytest.approx(np.array([[2, 1.2], [2, 1.3], [4, 1.2], [4, 1.3]]))
    assert data["test"]["task"].tolist() == [0, 0, 1, 1]
    points = data["train"]["points"]
    assert points.min(0).tolist() == [-2, -2, 0] and points.max(0).tolist() == [2, 2, 0.5]
    assert points[1].tolist() == pytest.approx([-2, -2, 0.5 / 3])


def test_temperatures_stay_between_rim_and_bolts_and_peak_beside_the_bolts():
    for batch in small().values():
        for row, (holes, radius) in enumerate(batch["design"]):
            inside = batch["mask"][row]
            t, points = batch["values"][row][inside], batch["points"][inside]
            assert t.min() > 300 and t.max() < 400 and batch["minimum"][row] == t.min()
            assert (batch["values"][row][~inside] == 0).all()
            angles = 2 * np.pi * np.arange(round(float(holes))) / holes
            bolts = radius * np.stack([np.cos(angles), np.sin(angles)], -1)
            distance = np.linalg.norm(points[:, None, :2] - bolts, axis=-1).min(1)
            assert distance.min() > 0.2 and distance[t.argmax()] < 0.45
            distance_to_center = np.linalg.norm(points[:, :2], axis=-1)
            assert distance_to_center[t.argmin()] > 1.8
            # Under the film the bottom is colder than the top.
            middle = distance_to_center < 0.5
            top, bottom = points[:, 2] > 0.49, points[:, 2] < 0.01
            assert t[middle & bottom].mean() < t[middle & top].mean() - 1


def test_field_has_the_symmetry_of_its_holes():
    values = small()["train"]["values"].reshape(4, 21, 21, 4)
    np.testing.assert_allclose(values, values[:, :, ::-1], atol=2e-3)
    np.testing.assert_allclose(values[2:], values[2:].transpose(0, 2, 1, 3), atol=2e-3)


def test_stored_data_are_the_generated_ones(tmp_path):
    for _ in range(2):
        stored = heat3d.load(SMALL, folder=tmp_path)
        for split, batch in small().items():
            for column, values in batch.items():
                np.testing.assert_array_equal(stored[split][column], values)
    assert len(list(tmp_path.iterdir())) == 1


def test_published_designs_and_sizes():
    config = heat3d.PAPER
    assert len(config.designs("train")) == 24 and len(config.designs("test")) == 40
    assert config.size**2 * config.layers == 10**6 and config.holes == tuple(range(2, 10))
    assert heat3d.HeatConfig().designs("train")[:2] == [(2, 0.9), (2, 1.2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holes": ()}, "needs holes"),
        ({"test_radii": (0.9,)}, "none of these"),
        ({"train_radii": (1.9,)}, "meet each other or the edge"),
        ({"hole_radius": 0.31}, "9 holes"),
        ({"size": 4}, "size >= 8"),
        ({"thickness": 0.0}, "thickness must be positive"),
        ({"film": -1.0}, "must not be negative"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        heat3d.HeatConfig(**change)
