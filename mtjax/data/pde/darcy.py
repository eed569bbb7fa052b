r"""Darcy flow through a random medium on many plane domains: an accurate batched solver and the data sets made with it.

    -div(K grad u) = f in Omega,     u = g on its boundary,     K = exp(Y) > 0.

Y is given at the nodes of a grid and is bilinear between them, so that the permeability is a definite function.

*Discretisation.* Five points, with the distance theta h to the boundary where it cuts a link (`geometry.discretize`):

    sum over the four links of K(middle of the link) (u - u_end) / (theta h^2) = f,

where u_end is the neighbour (theta = 1) or the value g at the crossing. The matrix is symmetric, u is accurate to
second order on domains with smooth or convex boundary, and to order 4/3 where a right angle is re-entrant (the solution
is singular there). A staircase boundary would be accurate to first order. K in the middle of a link is the geometric
mean of its ends where theta = 1. The grid may be finer than that of Y, which makes u more accurate at the same nodes.

*Solution*: conjugate gradients with a multigrid cycle (`conjugate_gradient`), in chunks of systems that fit in the
cache.

*Data*: fields drawn from a Gaussian process (`gaussian_process.karhunen_loeve`), the same law on every geometry; the
operator network reads (Y, mask) as an image of two channels and returns u.

Letters: B fields, n nodes along an axis of Y, N = n^2 query points, m nodes along an axis of the solver's grid,
G geometries.

References: Gibou, Fedkiw, Cheng, Kang, "A second-order-accurate symmetric discretization of the Poisson equation on
irregular domains", J. Comput. Phys. 176, 2002 (there with K given at the faces); Kumar,
Goswami, Kontolati, Shields, Karniadakis, "Synergistic learning with multi-task DeepONet for efficient PDE problem
solving", Neural Networks 184, 2025 (the study; its data come from finite elements).
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.data.pde import conjugate_gradient, gaussian_process, store
from mtjax.data.pde.geometry import Geometry, Grid, discretize, named, volume_fraction

PointFunction = Callable[[np.ndarray], np.ndarray]


class Solution(NamedTuple):
    """What `solve` returns.

    Attributes:
      values: u f[B, n, n], 0 outside.
      iterations: the most that a chunk needed.
      residual: f[B], relative to the right-hand side.
    """

    values: np.ndarray
    iterations: int
    residual: np.ndarray


def solve(
    permeability: np.ndarray,
    grid: Grid,
    *,
    source: float | PointFunction = 1.0,
    boundary: float | PointFunction = 0.0,
    chunk: int = 16,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
    multigrid: bool = True,
) -> Solution:
    """Solves -div(K grad u) = f with u = g on the boundary for many K on one domain.

    Args:
      permeability: K f[B, n, n] at the nodes, "ij" order; also outside the domain, where the links next to the boundary
        still read it. float64 is computed in float64 (inside `jax.enable_x64`), all else in float32.
      grid: the domain on m x m nodes, m - 1 a multiple of n - 1: m = n, or a finer grid, between whose nodes log K is
        then interpolated.
      source: f, a number or a function of points f[..., 2].
      boundary: g, a number or a function of points on the boundary.
      chunk: number of systems solved at a time.
      tolerance: of the residual's norm, relative to the right-hand side's.
      max_iterations: of conjugate gradients.
      multigrid: False: preconditioned by the diagonal only.

    Returns:
      u at the nodes of K, and how the iteration went.

    Raises:
      ValueError: for K that is not finite and positive, or shapes that do not fit.
      RuntimeError: if the iteration does not reach the tolerance.

    >>> grid = discretize(named("disk"), 17)
    >>> u = solve(np.ones((1, 17, 17)), grid).values  # exact: (1/4 - r^2) / 4
    >>> bool(abs(u[0, 8, 8] - 1 / 16) < 2e-4)
    True
    """
    permeability = np.asarray(permeability)
    refinement = _check(permeability, grid)
    dtype = np.float64 if permeability.dtype == np.float64 and jax.config.jax_enable_x64 else np.float32
    forcing = _evaluate(source, grid.points, "source") * np.where(grid.mask, grid.spacing[0] ** 2, 0.0)
    values = _evaluate(boundary, grid.crossings(), "boundary")
    domain = [jnp.asarray(part, dtype) for part in (grid.theta, forcing, values)]
    static = {"refinement": refinement, "max_iterations": max_iterations, "multigrid": multigrid}
    count = len(permeability)
    # A chunk is filled up with copies of the last field, so that few programs are compiled.
    chunk = min(chunk, 1 << (count - 1).bit_length())
    filled = np.concatenate([permeability, np.repeat(permeability[-1:], -count % chunk, axis=0)]).astype(dtype)
    mask, wide = jnp.asarray(grid.mask), jax.config.jax_enable_x64

    def run(start: int) -> list[np.ndarray]:
        with jax.enable_x64(wide):  # a thread does not inherit it
            solved = _solve_chunk(filled[start : start + chunk], mask, *domain, dtype(tolerance), **static)
            return [np.asarray(part) for part in solved]

    # A chunk is too small for XLA to share among cores, so each core takes chunks; the first one compiles.
    parts = [run(0)]
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        parts += pool.map(run, range(chunk, count, chunk))
    u, residual = (np.concatenate([part[index] for part in parts])[:count] for index in (0, 2))
    iterations = np.array([part[1] for part in parts])
    if not (residual <= tolerance).all():
        raise RuntimeError(
            f"Conjugate gradients reached a relative residual of {residual.max():.1e} in {iterations.max()} "
            f"iterations, not tolerance={tolerance:g}; raise max_iterations or, in float32, the tolerance"
        )
    return Solution(u, int(iterations.max()), residual)


def _check(permeability: np.ndarray, grid: Grid) -> int:
    """Raises for a permeability that is none; returns the refinement of the grid."""
    shape = permeability.shape
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] < 3 or shape[0] < 1:
        raise ValueError(f"permeability must be f[B, n, n] with B >= 1 and n >= 3, got shape {shape}")
    if not np.isfinite(permeability).all():
        raise ValueError("permeability must be finite, it holds infinite values or NaN")
    if not permeability.min() > 0:
        raise ValueError(f"permeability must be positive, its least value is {permeability.min():.3g}")
    nodes = grid.mask.shape
    if len(nodes) != 2 or nodes[0] != nodes[1] or not np.allclose(grid.spacing[0], grid.spacing[1]):
        raise ValueError(f"grid must be square with m x m nodes, got {nodes} with spacing {grid.spacing.tolist()}")
    if (nodes[0] - 1) % (shape[1] - 1):
        raise ValueError(
            f"A grid of {nodes[0]} nodes along an axis does not contain the {shape[1]} nodes of permeability; expected "
            f"k * {shape[1] - 1} + 1 nodes"
        )
    return (nodes[0] - 1) // (shape[1] - 1)


def _evaluate(value: float | PointFunction, points: np.ndarray, argument: str) -> np.ndarray:
    """f64[...] of a number or a function at points f[..., 2]."""
    values = np.asarray(value(points) if callable(value) else value, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{argument} must be finite")
    return np.broadcast_to(values, points.shape[:-1])


@functools.partial(jax.jit, static_argnames=("refinement", "max_iterations", "multigrid"))
def _solve_chunk(
    permeability: jax.Array,
    mask: jax.Array,
    theta: jax.Array,
    forcing: jax.Array,
    boundary_values: jax.Array,
    tolerance: jax.Array,
    *,
    refinement: int,
    max_iterations: int,
    multigrid: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """u f[B, n, n], the number of iterations and the residuals f[B] of K f[B, n, n]."""
    log_k = interpolate(jnp.moveaxis(jnp.log(permeability), 0, -1), refinement)
    matrix, right_hand_side = assemble(log_k, theta, mask, boundary_values)
    result = conjugate_gradient.solve(
        matrix,
        right_hand_side + forcing[:, :, None],
        tolerance=tolerance,
        max_iterations=max_iterations,
        multigrid=multigrid,
    )
    values = jnp.moveaxis(result.solution[::refinement, ::refinement], -1, 0)
    return values, result.iterations, result.residual


def interpolate(field: jax.Array, refinement: int) -> jax.Array:
    """A field f[n, n, B] at the nodes of a finer grid, bilinear between the given ones: f[m, m, B].

    >>> interpolate(jnp.array([[0.0, 2.0], [4.0, 6.0]])[:, :, None], 2)[:, :, 0].tolist()
    [[0.0, 1.0, 2.0], [2.0, 3.0, 4.0], [4.0, 5.0, 6.0]]
    """
    for axis in (0, 1):
        low = jax.lax.slice_in_dim(field, 0, -1, axis=axis)
        high = jax.lax.slice_in_dim(field, 1, None, axis=axis)
        parts = [low + (high - low) * (step / refinement) for step in range(refinement)]
        between = jnp.stack(parts, axis=axis + 1)
        between = between.reshape(*field.shape[:axis], -1, *field.shape[axis + 1 :])
        field = jnp.concatenate([between, jax.lax.slice_in_dim(field, -1, None, axis=axis)], axis=axis)
    return field


def assemble(
    log_k: jax.Array, theta: jax.Array, mask: jax.Array, boundary_values: jax.Array
) -> tuple[conjugate_gradient.System, jax.Array]:
    """The matrices, multiplied by h^2, and what the boundary values add to their right-hand sides.

    Args:
      log_k: log K f[m, m, B].
      theta: f[4, m, m], see `geometry.Grid`.
      mask: bool[m, m].
      boundary_values: g at the ends of the links f[4, m, m]; only those that end on the boundary are read.

    Returns:
      The systems and f[m, m, B].
    """
    links, cut_sum, right_hand_side = [], jnp.zeros_like(log_k), jnp.zeros_like(log_k)
    for axis in (0, 1):
        for side, shift in enumerate((1, -1)):
            row = 2 * axis + side
            # What a roll wraps around belongs to nodes on the faces of the box, which are never inside.
            part = theta[row][:, :, None]
            middle = jnp.exp(log_k + (0.5 * part) * (jnp.roll(log_k, shift, axis) - log_k))
            joined = mask & jnp.roll(mask, shift, axis)
            cut = jnp.where((mask & ~joined)[:, :, None], middle / part, 0)
            cut_sum = cut_sum + cut
            right_hand_side = right_hand_side + cut * boundary_values[row][:, :, None]
            if side == 1:
                links.append(jnp.where(joined[:, :, None], middle, 0))
    return conjugate_gradient.system(links, cut_sum), right_hand_side


# Short and weak, the kind of field that the paper's released network answers to (log K of standard deviation 0.55).
FIELD = gaussian_process.Kernel("exponential", 0.2, std=0.6, separable=True)


@dataclasses.dataclass(frozen=True)
class DarcyConfig:
    """A data set of Darcy flow: f = 1, u = 0 on the boundary.

    Attributes:
      sources: names of the geometries to train on (`geometry.named`, or the name of a geometry given to `generate`).
      targets: names of the geometries held out, for transfer.
      size: n, nodes along an axis of K and u.
      refinement: how many times finer the solver's grid is.
      kernel: covariance of Y = log K.
      terms: number of terms of its Karhunen-Loeve expansion; None: all.
      train, validation, test: numbers of fields for each source geometry.
      target_train, target_test: numbers of fields for each target geometry.
      input_stride: every how many-th node the input image has.
      input_scale: what Y is divided by in the input image.
    """

    sources: tuple[str, ...] = ("square", "disk", "triangle")
    targets: tuple[str, ...] = ("hexagon", "right_triangle", "plus")
    size: int = 32
    refinement: int = 4
    kernel: gaussian_process.Kernel = FIELD
    terms: int | None = 100
    train: int = 300
    validation: int = 50
    test: int = 100
    target_train: int = 100
    target_test: int = 100
    input_stride: int = 2
    input_scale: float = 0.6

    def __post_init__(self):
        names = self.sources + self.targets
        if not self.sources or len(set(names)) < len(names):
            raise ValueError(f"sources and targets must name at least one geometry, each once, got {names}")
        for field, least in (("size", 8), ("refinement", 1), ("train", 1), ("input_stride", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")
        for field in ("validation", "test", "target_train", "target_test"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is a number of fields, got {getattr(self, field)}")
        if not self.input_scale > 0:
            raise ValueError(f"input_scale must be positive, got {self.input_scale}")

    @property
    def geometries(self) -> tuple[str, ...]:
        """Names of all geometries; `task` in the data counts in this order."""
        return self.sources + self.targets

    def counts(self) -> dict[str, tuple[tuple[str, ...], int]]:
        """For each split, its geometries and the number of fields for each of them."""
        return {
            "train": (self.sources, self.train),
            "validation": (self.sources, self.validation),
            "test": (self.sources, self.test),
            "target_train": (self.targets, self.target_train),
            "target_test": (self.targets, self.target_test),
        }


# The published sizes (1,800 of 2,000 fields train) and the law of the group's script; the image is read whole.
PAPER = DarcyConfig(
    size=100,
    refinement=2,
    kernel=gaussian_process.Kernel("spher", 0.25, std=1.0),
    train=1800,
    validation=200,
    test=100,
    target_train=100,
    target_test=600,
    input_stride=1,
    input_scale=1.0,
)


def generate(
    config: DarcyConfig,
    seed: int = 0,
    *,
    geometries: Sequence[Geometry] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draws the fields and solves for them.

    Fields of different splits and geometries come from different keys, so that no field is in two of them. More fields
    for a geometry do not change the first ones.

    Args:
      config: what to generate.
      seed: seed of the fields.
      geometries: domains that the configuration names and `geometry.named` does not know: a user's own.
      progress: is called with the number of fields done and their total.

    Returns:
      For each split that is not empty ('train', 'validation', 'test', 'target_train', 'target_test') a batch:
        'inputs': f32[B, h, w, 2], Y / input_scale and the mask, at every `input_stride`-th node;
        'points': f32[N, 2], all nodes, x first, both in [0, 1];
        'values': f32[B, N], u, 0 outside;
        'mask': bool[B, N], whether the point is inside;
        'task': i32[B], index into `config.geometries`; `domains` describes them.

    Raises:
      ValueError: for a geometry that is unknown, empty or leaves the unit square.
    """
    shapes = _shapes(config, geometries)
    fine = [discretize(shape, (config.size - 1) * config.refinement + 1) for shape in shapes]
    every = slice(None, None, config.refinement)
    ticks = np.linspace(0.0, 1.0, config.size)
    sampler = gaussian_process.karhunen_loeve(config.kernel, (ticks, ticks), terms=config.terms)
    draw = jax.jit(jax.vmap(lambda key, index: sampler(jax.random.fold_in(key, index)), in_axes=(None, 0)))
    splits = {split: part for split, part in config.counts().items() if part[0] and part[1]}
    total, done = sum(len(names) * count for names, count in splits.values()), 0
    masks = np.stack([grid.mask[every, every] for grid in fine])
    data: dict[str, Any] = {}
    for split, (names, count) in splits.items():
        parts = []
        for name in names:
            task = config.geometries.index(name)
            key = jax.random.fold_in(jax.random.key(seed), list(config.counts()).index(split) * 1000 + task)
            log_k = np.asarray(draw(key, np.arange(count)))
            values = solve(np.exp(log_k), fine[task], tolerance=1e-5).values
            parts.append((_image(log_k, masks[task], config), values, np.full(count, task, np.int32)))
            done += count
            if progress is not None:
                progress(done, total)
        inputs, values, tasks = (np.concatenate(column) for column in zip(*parts, strict=True))
        data[split] = {
            "inputs": inputs,
            "points": fine[0].points[every, every].reshape(-1, 2).astype(np.float32),
            "values": values.reshape(len(values), -1),
            "mask": masks.reshape(len(masks), -1)[tasks],
            "task": tasks,
        }
    return data


def domains(config: DarcyConfig, *, geometries: Sequence[Geometry] = ()) -> dict[str, np.ndarray]:
    """The geometries of a data set at its query points, row by row as 'task' counts.

    Args:
      config: of the data set.
      geometries: as given to `generate`.

    Returns:
      'name': str[G];
      'mask': bool[G, N];
      'distance': f32[G, N], signed distance to the boundary, negative inside: u = -distance times a network vanishes on
        the boundary;
      'area': f32[G].
    """
    shapes = _shapes(config, geometries)
    grids = [discretize(shape, config.size) for shape in shapes]
    return {
        "name": np.array(config.geometries),
        "mask": np.stack([grid.mask.ravel() for grid in grids]),
        "distance": np.stack([grid.distance.ravel() for grid in grids]).astype(np.float32),
        "area": np.array([volume_fraction(shape, samples=256) for shape in shapes], np.float32),
    }


def _shapes(config: DarcyConfig, geometries: Sequence[Geometry]) -> list[Geometry]:
    own = {shape.name: shape for shape in geometries}
    return [own[name] if name in own else named(name) for name in config.geometries]


def _image(log_k: np.ndarray, mask: np.ndarray, config: DarcyConfig) -> np.ndarray:
    """The two channels f32[B, h, w, 2] that the branch reads."""
    channels = np.stack([log_k / config.input_scale, np.broadcast_to(mask, log_k.shape)], axis=-1)
    return channels[:, :: config.input_stride, :: config.input_stride].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Request:
    config: DarcyConfig
    seed: int


def load(
    config: DarcyConfig = DarcyConfig(), *, seed: int = 0, folder: str | os.PathLike | None = None
) -> dict[str, Any]:
    """`generate` with its result kept on disk (`store.cached`); for geometries that have a name.

    Args:
      config: what to generate.
      seed: seed of the fields.
      folder: where to keep the file; None: the default of the library.
    """
    request = _Request(config, seed)
    return store.cached("darcy", request, lambda progress: generate(config, seed, progress=progress), folder=folder)
