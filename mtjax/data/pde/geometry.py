r"""Domains given by a level set phi, and how far every grid node is from their boundary along the grid lines.

    Omega = {x : phi(x) < 0} inside a box (by default the unit square),

with phi(x) = 0 on the boundary. Whether a node is inside, a mask, describes Omega only to a grid spacing: a solver that
knows no more has a staircase for a boundary and is percents off. `discretize` therefore also returns, for each node
inside and each of the 2 d directions, the part theta in (0, 1] of the way to the neighbour that lies inside, found by
bisection of phi in float64:

    theta h = distance to the boundary along the grid line,     theta = 1 where the neighbour is inside.

A boundary that crosses the line between two neighbours an even number of times is finer than the grid and is not seen.

Ready-made shapes are polygons (`square`, `equilateral_triangle`, `right_triangle`, `hexagon`, `l_shape`, `plus`),
`disk`, `ellipse`, `square_with_holes`, `random_star`. A user's own domain is a function (`Geometry(name, phi)`) or a
binary image (`from_image`); `difference` cuts holes into any of them.

Arrays are in "ij" order: the first grid axis is x, the second is y.

Letters: d dimensions, *grid the numbers of nodes along the axes, M points, V vertices.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

Box = tuple[tuple[float, ...], tuple[float, ...]]
UNIT_SQUARE: Box = ((0.0, 0.0), (1.0, 1.0))
# Nodes closer to the boundary than this part of the box count as lying on it: rounding must not make slivers.
_ON_BOUNDARY = 1e-12
_BISECTIONS = 54


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
    """A domain.

    Attributes:
      name: its name in data sets, tables and figures.
      level_set: phi, f[..., d] -> f[...], negative inside; NumPy or jax.numpy (called with float64 enabled).
      is_distance: whether phi is the signed distance to the boundary.

    >>> drop = Geometry("drop", lambda x: ((x - 0.5) ** 2).sum(-1) - 0.1)
    >>> drop(np.array([[0.5, 0.5], [1.0, 1.0]])).tolist()
    [-0.1, 0.4]
    """

    name: str
    level_set: Callable[[np.ndarray], np.ndarray]
    is_distance: bool = False

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """phi at points f[..., d], as f64[...]; raises ValueError if a value is not finite or the shape is wrong."""
        points = np.asarray(points, np.float64)
        with jax.enable_x64(True):
            values = np.asarray(self.level_set(points), np.float64)
        if values.shape != points.shape[:-1]:
            raise ValueError(
                f"The level set of geometry '{self.name}' must map points of shape {points.shape} to values of shape "
                f"{points.shape[:-1]}, got {values.shape}"
            )
        if not np.isfinite(values).all():
            where = points[~np.isfinite(values)][0]
            raise ValueError(f"The level set of geometry '{self.name}' must be finite, it is not at {where.tolist()}")
        return values

    def signed_distance(self, points: np.ndarray) -> np.ndarray:
        r"""Signed distance to the boundary at points f[..., d], as f64[...], for hard boundary conditions.

        Exact where phi is a distance. Otherwise phi / sqrt(|grad phi|^2 + phi^2), which has the value 0 and a slope of
        1 on the boundary and is as smooth as phi inside: an approximation that is good near the boundary only.

        Reference: Rvachev and Sheiko, "R-functions in boundary value problems in mechanics", 1995: normalisation to
        first order.
        """
        points, values = np.asarray(points, np.float64), self(points)
        if self.is_distance:
            return values
        step, squares = 1e-6, np.zeros_like(values)
        for axis in range(points.shape[-1]):
            offset = step * np.eye(points.shape[-1])[axis]
            squares += ((self(points + offset) - self(points - offset)) / (2 * step)) ** 2
        scale = np.sqrt(squares + values**2)
        return values / np.where(scale > 0, scale, 1.0)


class Grid(NamedTuple):
    """A domain on a grid of nodes.

    Attributes:
      points: coordinates f64[*grid, d].
      mask: bool[*grid], whether the node is inside (nodes on the boundary are not).
      theta: f64[2 d, *grid]: part of the way to the neighbour that is inside, in (0, 1]; 1 at nodes outside. Row 2 a
        looks to the previous node along axis a, row 2 a + 1 to the next.
      distance: signed distance f64[*grid], see `Geometry.signed_distance`.
      spacing: f64[d], distance of neighbouring nodes.
    """

    points: np.ndarray
    mask: np.ndarray
    theta: np.ndarray
    distance: np.ndarray
    spacing: np.ndarray

    def crossings(self) -> np.ndarray:
        """Where the links from each node end, f64[2 d, *grid, d]: on the boundary, or at the neighbour."""
        result = np.repeat(self.points[None], len(self.theta), axis=0)
        for axis, step in enumerate(self.spacing):
            result[2 * axis, ..., axis] -= self.theta[2 * axis] * step
            result[2 * axis + 1, ..., axis] += self.theta[2 * axis + 1] * step
        return result


def discretize(geometry: Geometry, shape: int | Sequence[int], *, box: Box = UNIT_SQUARE) -> Grid:
    """Nodes, mask and distances to the boundary on a regular grid that includes the faces of the box.

    Args:
      geometry: the domain.
      shape: number of nodes along all axes, or along each.
      box: lower and upper corner.

    Raises:
      ValueError: if no node lies inside, if the domain leaves the box, or if the level set is not finite.

    >>> grid = discretize(disk(), 5)
    >>> grid.mask.astype(int).tolist()
    [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    >>> np.round(grid.theta[:, 1, 2], 4).tolist(), np.round(grid.theta[:, 1, 1], 4).tolist()
    ([1.0, 1.0, 1.0, 1.0], [0.7321, 1.0, 0.7321, 1.0])
    """
    lower, upper = (np.asarray(corner, np.float64) for corner in box)
    shape = (shape,) * len(lower) if isinstance(shape, int) else tuple(shape)
    if len(shape) != len(lower) or min(shape) < 3:
        raise ValueError(f"The grid needs at least 3 nodes along each of the {len(lower)} axes, got shape={shape}")
    axes = [np.linspace(a, b, n) for a, b, n in zip(lower, upper, shape, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    spacing = (upper - lower) / (np.array(shape) - 1)
    values = geometry(points)
    tolerance = _ON_BOUNDARY * max(np.abs(values).max(), 1e-300)
    _check_inside_box(geometry, lower, upper, tolerance)
    mask = values < -tolerance
    if not mask.any():
        raise ValueError(
            f"Geometry '{geometry.name}' is empty on a grid of {' x '.join(map(str, shape))} nodes: no level-set value "
            f"is negative, the least is {values.min():.3g}"
        )
    theta = np.ones((2 * len(shape), *shape))
    for axis in range(len(shape)):
        for side, sign in enumerate((-1, 1)):
            # Nodes on the faces of the box are outside, so that what `roll` wraps around is never used.
            cut = mask & ~np.roll(mask, -sign, axis)
            direction = sign * spacing[axis] * np.eye(len(shape))[axis]
            theta[2 * axis + side][cut] = _first_crossing(geometry, points[cut], direction)
    return Grid(points, mask, theta, geometry.signed_distance(points), spacing)


def _first_crossing(geometry: Geometry, start: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The t in (0, 1] with phi(start + t direction) = 0, from phi(start) < 0, by bisection: f64[M]."""
    low, high = np.zeros(len(start)), np.ones(len(start))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        inside = geometry(start + middle[:, None] * direction) < 0
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return high


def _check_inside_box(geometry: Geometry, lower: np.ndarray, upper: np.ndarray, tolerance: float) -> None:
    """Raises ValueError if phi is negative somewhere on the faces of the box."""
    dimensions = len(lower)
    ticks = np.linspace(0.0, 1.0, 1001 if dimensions == 2 else 65)
    for axis in range(dimensions):
        for side in (0.0, 1.0):
            free = np.meshgrid(*[ticks] * (dimensions - 1), indexing="ij")
            face = np.insert(np.stack(free, axis=-1).reshape(-1, dimensions - 1), axis, side, axis=1)
            values = geometry(lower + face * (upper - lower))
            if values.min() < -tolerance:
                where = lower + face[values.argmin()] * (upper - lower)
                raise ValueError(
                    f"Geometry '{geometry.name}' leaves the box from {lower.tolist()} to {upper.tolist()}: its level "
                    f"set is negative at {where.tolist()} on a face; scale or shift it"
                )


def volume_fraction(geometry: Geometry, *, samples: int = 512, box: Box = UNIT_SQUARE) -> float:
    """Share of the box (in 2D, of its area) that is inside, by `samples` midpoints along each axis.

    >>> round(volume_fraction(disk()), 4), round(np.pi / 4, 4)
    (0.7854, 0.7854)
    """
    lower, upper = (np.asarray(corner, np.float64) for corner in box)
    width = (upper - lower) / samples
    ticks = [low + step * (np.arange(samples) + 0.5) for low, step in zip(lower, width, strict=True)]
    # A cell that the boundary cuts counts by its part, to first order.
    depth = geometry.signed_distance(np.stack(np.meshgrid(*ticks, indexing="ij"), axis=-1)) / width.mean()
    return float(np.clip(0.5 - depth, 0.0, 1.0).mean())


def polygon(vertices: Sequence[Sequence[float]], *, name: str = "polygon") -> Geometry:
    """The inside (by the even-odd rule) of a polygon, convex or not; phi is the signed distance.

    Args:
      vertices: corners f[V, 2] in order.
      name: name of the geometry.

    Raises:
      ValueError: for fewer than three vertices, or coordinates that are not finite.
    """
    corners = np.asarray(vertices, np.float64)
    if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 3 or not np.isfinite(corners).all():
        raise ValueError(f"vertices of '{name}' must be at least 3 finite pairs (x, y), got shape {corners.shape}")

    def level_set(points: np.ndarray) -> np.ndarray:
        squares = np.full(points.shape[:-1], np.inf)
        inside = np.zeros(points.shape[:-1], bool)
        x, y = points[..., 0], points[..., 1]
        for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            edge = b - a
            along = ((x - a[0]) * edge[0] + (y - a[1]) * edge[1]) / max(edge @ edge, 1e-300)
            along = np.clip(along, 0.0, 1.0)
            squares = np.minimum(squares, (x - a[0] - along * edge[0]) ** 2 + (y - a[1] - along * edge[1]) ** 2)
            if edge[1]:
                inside ^= ((a[1] > y) != (b[1] > y)) & (x < a[0] + (y - a[1]) * (edge[0] / edge[1]))
        return np.where(inside, -1.0, 1.0) * np.sqrt(squares)

    return Geometry(name, level_set, is_distance=True)


def square() -> Geometry:
    """The unit square."""
    return polygon([(0, 0), (1, 0), (1, 1), (0, 1)], name="square")


def equilateral_triangle() -> Geometry:
    """(0, 0), (1, 0), (1/2, sqrt(3)/2): a source geometry of the published study."""
    return polygon([(0, 0), (1, 0), (0.5, math.sqrt(3) / 2)], name="triangle")


def right_triangle() -> Geometry:
    """(0, 0), (1/2, 0), (1/2, sqrt(3)/2): half of the equilateral triangle."""
    return polygon([(0, 0), (0.5, 0), (0.5, math.sqrt(3) / 2)], name="right_triangle")


def hexagon() -> Geometry:
    """The regular hexagon with circumradius 1/2 about the centre, two corners on the left and right edges."""
    angles = np.arange(6) * np.pi / 3
    # 1/2 + cos / 2 rounds to at most 1; the corners at angle pi may round below 0 by an ulp.
    corners = np.clip(0.5 + 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=-1), 0.0, 1.0)
    return polygon(corners, name="hexagon")


def l_shape() -> Geometry:
    """The unit square without its upper right quarter: one re-entrant corner."""
    return polygon([(0, 0), (1, 0), (1, 0.5), (0.5, 0.5), (0.5, 1), (0, 1)], name="l_shape")


def plus(width: float = 0.4) -> Geometry:
    """Two crossing bars of the given width: four re-entrant corners."""
    if not 0 < width < 1:
        raise ValueError(f"The arms of the plus need a width between 0 and 1, got {width}")
    a, b = 0.5 - width / 2, 0.5 + width / 2
    outline = [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    return polygon(outline, name="plus")


def disk(center: Sequence[float] = (0.5, 0.5), radius: float = 0.5, *, name: str = "disk") -> Geometry:
    """The disk (in d dimensions, the ball) about a centre f[d]; phi is the signed distance."""
    middle = np.asarray(center, np.float64)
    if not radius > 0:
        raise ValueError(f"The radius of '{name}' must be positive, got {radius}")
    return Geometry(name, lambda x: np.sqrt(((x - middle) ** 2).sum(-1)) - radius, is_distance=True)


def ellipse(center: Sequence[float] = (0.5, 0.5), semi_axes: Sequence[float] = (0.5, 0.3)) -> Geometry:
    """The ellipse with axes along x and y; phi = (|(x - c) / a|^2 - 1) min(a) / 2."""
    middle, axes = np.asarray(center, np.float64), np.asarray(semi_axes, np.float64)
    if not (axes > 0).all():
        raise ValueError(f"The semi-axes of the ellipse must be positive, got {axes.tolist()}")
    return Geometry("ellipse", lambda x: ((((x - middle) / axes) ** 2).sum(-1) - 1) * axes.min() / 2)


def difference(body: Geometry, *holes: Geometry, name: str | None = None) -> Geometry:
    """`body` without the holes: phi = max(phi_body, -phi_hole, ...)."""

    def level_set(points: np.ndarray) -> np.ndarray:
        return np.max([body(points), *(-hole(points) for hole in holes)], axis=0)

    exact = all(part.is_distance for part in (body, *holes))
    return Geometry(name or f"{body.name} with {len(holes)} holes", level_set, is_distance=exact)


def square_with_holes(
    centers: Sequence[Sequence[float]] = ((0.5, 0.5),), radius: float = 0.2, *, name: str = "square_with_hole"
) -> Geometry:
    """The unit square without disks of one radius about the centres f[V, 2]."""
    return difference(square(), *(disk(center, radius) for center in centers), name=name)


def random_star(key: jax.Array, *, modes: int = 5, roughness: float = 0.35, name: str = "star") -> Geometry:
    r"""A random smooth domain that its centre sees whole, with outline

        R(t) = c (1 + sum_{k=2..modes} (a_k cos k t + b_k sin k t) / k),     phi = (r^2 / R(t)^2 - 1) mean(R) / 2,

    a_k, b_k normal and scaled so that the sum stays within +- `roughness`, c so that the largest R is 0.48.

    Args:
      key: random key.
      modes: highest number of bumps, at least 2.
      roughness: largest relative deviation from the circle, in [0, 1).
      name: name of the geometry.
    """
    if modes < 2 or not 0 <= roughness < 1:
        raise ValueError(f"A star needs modes >= 2 and roughness in [0, 1), got {modes} and {roughness}")
    order = np.arange(2, modes + 1)
    waves = np.asarray(jax.random.normal(key, (2, modes - 1)), np.float64) / order

    def bumps(angle: np.ndarray) -> np.ndarray:
        phase = angle[..., None] * order
        return np.cos(phase) @ waves[0] + np.sin(phase) @ waves[1]

    shape = bumps(np.linspace(0.0, 2 * np.pi, 4096))
    scale = roughness / np.abs(shape).max()
    size = 0.48 / (1 + scale * shape.max())

    def level_set(points: np.ndarray) -> np.ndarray:
        x, y = points[..., 0] - 0.5, points[..., 1] - 0.5
        outline = size * (1 + scale * bumps(np.arctan2(y, x)))
        return ((x**2 + y**2) / outline**2 - 1) * size / 2

    return Geometry(name, level_set)


def from_image(image: np.ndarray, *, smoothing: float = 1.0, name: str = "image") -> Geometry:
    """The domain that a binary picture shows, stretched over the unit square.

    phi is the signed distance to the outline of the pixels, smoothed by a Gaussian and interpolated by cubic splines,
    so that the boundary runs through the pixels' steps instead of along them. Corners are rounded by about a pixel, but
    not those on the edge of the picture.

    Args:
      image: bool[rows, columns], or numbers 0 and 1; True is inside. As in any picture, the first row is the top:
        x grows with the column, y against the row.
      smoothing: standard deviation of the Gaussian, pixels.
      name: name of the geometry.

    Raises:
      ValueError: for an image that is not two-dimensional, is not binary, has fewer than 4 pixels along an axis, or
        shows no domain.

    >>> round(volume_fraction(from_image(np.ones((16, 16), bool))), 3)
    1.0
    """
    from scipy import ndimage

    image = np.asarray(image)
    if image.ndim != 2 or min(image.shape) < 4:
        raise ValueError(f"image of '{name}' must be [rows, columns] with at least 4 pixels each, got {image.shape}")
    if image.dtype != bool:
        if image.dtype.kind not in "iuf" or not np.isin(image, (0, 1)).all():
            raise ValueError(
                f"image of '{name}' must be boolean or hold 0 and 1 only, got {image.dtype} with "
                f"{len(np.unique(image))} values; compare it with a threshold first"
            )
        image = image == 1
    if not image.any():
        raise ValueError(f"image of '{name}' is empty: no pixel is inside")
    frame = square()
    if image.all():
        return dataclasses.replace(frame, name=name)
    margin = max(4, math.ceil(4 * smoothing))
    # [x, y] order, y upwards. A domain that touches the edge of the picture goes on behind it, and the frame cuts it.
    pixels = np.pad(image.T[:, ::-1], margin, mode="edge")
    size = 1.0 / np.array(image.T.shape)
    half = size.mean() / 2
    outside = ndimage.distance_transform_edt(~pixels, sampling=size)
    inside = ndimage.distance_transform_edt(pixels, sampling=size)
    distance = np.where(pixels, half - inside, outside - half)
    coefficients = ndimage.spline_filter(ndimage.gaussian_filter(distance, smoothing, mode="nearest"), mode="nearest")

    def level_set(points: np.ndarray) -> np.ndarray:
        index = np.moveaxis(points / size + margin - 0.5, -1, 0)
        values = ndimage.map_coordinates(coefficients, index, order=3, prefilter=False, mode="nearest")
        return np.maximum(values, frame(points))

    return Geometry(name, level_set)


def named(name: str) -> Geometry:
    """A ready-made geometry by name: those of `NAMES`, or `star-7` for the random star of key 7.

    >>> named("l_shape").name, named("star-7").name
    ('l_shape', 'star-7')
    """
    if name.startswith("star-") and name[5:].isdigit():
        return random_star(jax.random.key(int(name[5:])), name=name)
    shapes = (
        *(square(), disk(), equilateral_triangle(), right_triangle(), hexagon(), ellipse(), l_shape(), plus()),
        square_with_holes(),
        square_with_holes(((0.3, 0.3), (0.7, 0.7)), 0.15, name="square_with_holes"),
    )
    table = {shape.name: shape for shape in shapes}
    if name not in table:
        raise ValueError(f"There is no geometry '{name}'; there are {', '.join(table)} and star-0, star-1, ...")
    return table[name]


NAMES = (
    *("square", "disk", "triangle", "right_triangle", "hexagon", "ellipse", "l_shape", "plus"),
    *("square_with_hole", "square_with_holes"),
)
