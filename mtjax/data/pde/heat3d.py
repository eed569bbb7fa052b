r"""Steady heat conduction in a round plate with a circle of bolts: a family of solids with two design parameters.

The plate is a disk of radius R and thickness H in which n round holes sit evenly on a circle of radius r,

    -div(grad T) = q,

    T = T_bolt                      on the walls of the holes: hot bolts,
    T = T_rim                       on the outer edge: clamped in a cooled ring,
    dT/dn + s (T - T_coolant) = 0   on the disk of radius R_c in the middle of the bottom: cooled by a flow,
    dT/dn = 0                       on the rest of the bottom and on the top: insulated,

so that T is highest at the bolts and lowest at the outer edge and in the middle of the bottom, as it is in the
published data, whose boundary conditions are not published. Lengths are in the published units, T in kelvin.

*Discretisation.* As in two dimensions (`darcy`): the section of the plate is cut out of a square grid with the exact
distances to its boundary; along z there are nodes on both faces, of which the cells have half the height. The film
coefficient s acts on the part of a bottom cell that lies within R_c. Second order in the spacings.

T is close to the same number everywhere, so that a relative error of T says little; `minimum` is there to subtract.

Letters: B designs, N query points, *grid = (m, m, k) nodes of the solver.

Reference: Kumar, Goswami, Kontolati, Shields, Karniadakis, "Synergistic learning with multi-task DeepONet for efficient
PDE problem solving", Neural Networks 184, 2025, third study (n and r, their training and test values, and the width of
the plate are the published ones; boundary conditions, thickness and radii are chosen here).
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mtjax.data.pde import conjugate_gradient, store
from mtjax.data.pde.geometry import Geometry, Grid, difference, discretize, disk

PointFunction = Callable[[np.ndarray], np.ndarray]
Conductances = tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class HeatConfig:
    """A data set of plates.

    Attributes:
      holes: numbers of holes n; all of them are in every split.
      train_radii, test_radii: radii r of the circle of holes.
      size: nodes along x and along y, over [-R, R].
      layers: nodes along z, over [0, H].
      refinement: how many times finer the solver's grid is, along all axes.
      plate_radius, thickness, hole_radius, cooled_radius: R, H, radius of a hole, R_c.
      film: s, heat transfer coefficient of the coolant over the conductivity of the plate, 1 / length.
      bolt, rim, coolant: temperatures in kelvin.
    """

    holes: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9)
    train_radii: tuple[float, ...] = (0.9, 1.2, 1.6)
    test_radii: tuple[float, ...] = (1.0, 1.1, 1.3, 1.4, 1.5)
    size: int = 32
    layers: int = 9
    refinement: int = 2
    plate_radius: float = 2.0
    thickness: float = 0.5
    hole_radius: float = 0.2
    cooled_radius: float = 0.7
    film: float = 8.0
    bolt: float = 400.0
    rim: float = 300.0
    coolant: float = 300.0

    def __post_init__(self):
        if not self.holes or not self.train_radii or set(self.train_radii) & set(self.test_radii):
            raise ValueError(
                "HeatConfig needs holes, train_radii, and test_radii that are none of these, got "
                f"{self.holes}, {self.train_radii}, {self.test_radii}"
            )
        if self.size < 8 or self.layers < 3 or self.refinement < 1:
            raise ValueError(
                f"HeatConfig needs size >= 8, layers >= 3 and refinement >= 1, got {self.size}, {self.layers} and "
                f"{self.refinement}"
            )
        for field in ("plate_radius", "thickness", "hole_radius"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")
        if self.cooled_radius < 0 or self.film < 0:
            raise ValueError(f"cooled_radius and film must not be negative, got {self.cooled_radius} and {self.film}")
        for radius in self.train_radii + self.test_radii:
            for number in self.holes:
                self.section(number, radius)

    def section(self, holes: int, radius: float) -> Geometry:
        """The plate seen from above; raises ValueError if holes meet each other or the edge."""
        reach, gap = radius + self.hole_radius, 2 * radius * np.sin(np.pi / holes)
        if holes < 1 or radius < 0 or reach >= self.plate_radius or (holes > 1 and gap <= 2 * self.hole_radius):
            raise ValueError(
                f"{holes} holes of radius {self.hole_radius} on a circle of radius {radius} meet each other or the "
                f"edge of the plate of radius {self.plate_radius}"
            )
        angles = 2 * np.pi * np.arange(holes) / holes
        centers = radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        plate = disk((0.0, 0.0), self.plate_radius)
        return difference(plate, *(disk(c, self.hole_radius) for c in centers), name=f"{holes} holes at {radius:g}")

    def designs(self, split: str) -> list[tuple[int, float]]:
        """(n, r) of the split 'train' or 'test', r running fastest."""
        radii = {"train": self.train_radii, "test": self.test_radii}[split]
        return [(number, radius) for number in self.holes for radius in radii]


# A million points in the box of the plate, as published; the grid is fine enough to solve on.
PAPER = HeatConfig(size=100, layers=100, refinement=1)


def conductances(
    section: Grid,
    heights: np.ndarray,
    *,
    wall: PointFunction,
    film: PointFunction,
    ambient: PointFunction | float,
    source: PointFunction | float = 0.0,
) -> Conductances:
    """The equations of one plate, for conductivity 1 and in float64.

    Args:
      section: the plate seen from above on m x m nodes.
      heights: z f[k], evenly spaced, of the bottom, ..., of the top.
      wall: T on the vertical walls, a function of points f[..., 3].
      film: s on the bottom, a function of points f[..., 2].
      ambient: T of the coolant, a number or a function of points f[..., 2].
      source: q, a number or a function of points f[..., 3].

    Returns:
      Links along x, y, z f[*grid] each, conductances to the walls and the coolant f[*grid], right-hand side f[*grid].
    """
    mask, spacing, step = section.mask[:, :, None], section.spacing[0], heights[1] - heights[0]
    height = np.full(len(heights), step)
    height[[0, -1]] = step / 2
    shape = (*section.mask.shape, len(heights))
    links, boundary = [], np.zeros(shape)
    volume = spacing**2 * height * mask
    right_hand_side = volume * _evaluate(source, _columns(section.points, heights))
    for row, ends in enumerate(section.crossings()):
        axis, side = divmod(row, 2)
        joined = section.mask & np.roll(section.mask, 1 if side == 0 else -1, axis)
        cut = ((section.mask & ~joined) / section.theta[row])[:, :, None] * height
        boundary += cut
        right_hand_side += cut * _evaluate(wall, _columns(ends, heights))
        if side == 1:
            links.append(joined[:, :, None] * height)
    upwards = np.zeros(shape)
    upwards[:, :, :-1] = mask * (spacing**2 / step)
    cooled = section.mask * spacing**2 * _evaluate(film, section.points)
    boundary[:, :, 0] += cooled
    right_hand_side[:, :, 0] += cooled * _evaluate(ambient, section.points)
    return (*links, upwards), boundary, right_hand_side


def _columns(points: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Points f[m, m, k, 3] above points f[m, m, 2]."""
    shape = (*points.shape[:-1], len(heights))
    flat = np.broadcast_to(points[:, :, None, :], (*shape, 2))
    return np.concatenate([flat, np.broadcast_to(heights, shape)[..., None]], axis=-1)


def _evaluate(value: PointFunction | float, points: np.ndarray) -> np.ndarray:
    values = np.asarray(value(points) if callable(value) else value, np.float64)
    return np.broadcast_to(values, points.shape[:-1])


def solve(plates: Sequence[Conductances], *, tolerance: float = 1e-6, dtype: Any = np.float32) -> np.ndarray:
    """T f[B, *grid] of several plates on the same grid, 0 outside.

    Args:
      plates: their equations, of `conductances`.
      tolerance: of the residual's norm, relative to the right-hand side's.
      dtype: to compute in; float64 inside `jax.enable_x64` only.

    Raises:
      RuntimeError: if the iteration does not reach the tolerance.
    """
    links = tuple(np.stack([plate[0][axis] for plate in plates], -1).astype(dtype) for axis in range(3))
    boundary, right_hand_side = (np.stack([plate[i] for plate in plates], -1).astype(dtype) for i in (1, 2))
    result = _solve(links, boundary, right_hand_side, dtype(tolerance))
    worst = float(result.residual.max())
    if not worst <= tolerance:
        raise RuntimeError(f"Conjugate gradients reached a relative residual of {worst:.1e}, not {tolerance:g}")
    return np.moveaxis(np.asarray(result.solution), -1, 0)


@jax.jit
def _solve(
    links: tuple[jax.Array, ...], boundary: jax.Array, right_hand_side: jax.Array, tolerance: jax.Array
) -> conjugate_gradient.Result:
    matrix = conjugate_gradient.system(links, boundary)
    return conjugate_gradient.solve(matrix, right_hand_side, tolerance=tolerance, max_iterations=200)


def plate(config: HeatConfig, holes: int, radius: float) -> tuple[Grid, np.ndarray, Conductances]:
    """The section on the solver's grid, the heights f[k] and the equations of a design, for T - T_rim in kelvin."""
    edge = config.plate_radius
    section = discretize(
        config.section(holes, radius), (config.size - 1) * config.refinement + 1, box=((-edge, -edge), (edge, edge))
    )
    heights = np.linspace(0.0, config.thickness, (config.layers - 1) * config.refinement + 1)
    between = (radius + config.hole_radius + edge) / 2

    def wall(points: np.ndarray) -> np.ndarray:
        return np.where(np.hypot(points[..., 0], points[..., 1]) > between, 0.0, config.bolt - config.rim)

    def film(points: np.ndarray) -> np.ndarray:
        depth = (config.cooled_radius - np.hypot(points[..., 0], points[..., 1])) / section.spacing[0]
        return config.film * np.clip(0.5 + depth, 0.0, 1.0)

    return section, heights, conductances(section, heights, wall=wall, film=film, ambient=config.coolant - config.rim)


def generate(config: HeatConfig, *, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Solves for all designs.

    Args:
      config: what to generate; nothing in it is random.
      progress: is called with the number of plates done and their total.

    Returns:
      For 'train' and (if there are test radii) 'test' a batch:
        'inputs': f32[B, 2], n and r, each scaled to [0, 1] over all designs;
        'points': f32[N, 3], x, y, z, the same for all designs;
        'values': f32[B, N], T in kelvin, 0 outside the solid;
        'mask': bool[B, N], whether the point is in the solid;
        'minimum': f32[B], least T in the solid, so that T - T_min can be scored;
        'task': i32[B], index of n in `config.holes`;
        'design': f32[B, 2], n and r as they are.
    """
    radii = config.train_radii + config.test_radii
    lowest = np.array([min(config.holes), min(radii)])
    extent = np.array([max(config.holes), max(radii)]) - lowest
    total = len(config.holes) * len(radii)
    every = slice(None, None, config.refinement)
    # 8 and 2 divide the published numbers of designs, 24 and 40, so that one program serves all; 2 fit a million nodes.
    chunk = 8 if config.size**2 * config.layers * config.refinement**3 < 10**6 else 2
    data: dict[str, Any] = {}
    done = 0
    for split in ("train", "test"):
        designs = config.designs(split)
        values, masks = [], []
        for start in range(0, len(designs), chunk):
            plates = [plate(config, *design) for design in designs[start : start + chunk]]
            solved = solve([equations for _, _, equations in plates])[:, every, every, every]
            inside = np.stack([section.mask[every, every] for section, _, _ in plates])[..., None]
            masks.append(np.broadcast_to(inside, solved.shape).reshape(len(plates), -1))
            values.append(np.where(inside, solved + np.float32(config.rim), 0).reshape(len(plates), -1))
            done += len(plates)
            if progress is not None:
                progress(done, total)
        if not designs:
            continue
        section, heights, _ = plates[0]
        value, mask = np.concatenate(values), np.concatenate(masks)
        design = np.array(designs)
        data[split] = {
            "inputs": ((design - lowest) / np.where(extent > 0, extent, 1)).astype(np.float32),
            "points": _columns(section.points[every, every], heights[every]).reshape(-1, 3).astype(np.float32),
            "values": value,
            "mask": mask,
            "minimum": np.min(value, axis=1, where=mask, initial=np.inf).astype(np.float32),
            "task": np.array([config.holes.index(number) for number, _ in designs], np.int32),
            "design": design.astype(np.float32),
        }
    return data


def load(config: HeatConfig = HeatConfig(), *, folder: str | os.PathLike | None = None) -> dict[str, Any]:
    """`generate` with its result kept on disk (`store.cached`); folder: where, None: the default of the library."""
    return store.cached("heat3d", config, functools.partial(_generate_with, config), folder=folder)


def _generate_with(config: HeatConfig, progress: Callable[[int, int], None]) -> dict[str, Any]:
    return generate(config, progress=progress)
