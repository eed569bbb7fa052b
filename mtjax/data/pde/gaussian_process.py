r"""Gaussian random fields with a given covariance, drawn in three ways as pure functions of a key.

    g ~ N(0, C),   C_ij = std^2 rho(x_i - x_j)

| way                | where                                   | covariance of the draws         | cost of a field   |
|--------------------|-----------------------------------------|---------------------------------|-------------------|
| `cholesky`         | any N points                            | C (+ jitter)                    | N^2               |
| `karhunen_loeve`   | a grid of 1 to 3 axes, M largest terms  | sum_{m <= M} l_m phi_m phi_m^T  | see below         |
| `spectral`         | a uniform periodic grid                 | C                               | n log n, n nodes  |

With x-differences scaled by the length, r^2 = sum_i (dx_i / length_i)^2, the correlations rho are

    squared_exponential  exp(-r^2 / 2)              exponential  exp(-r)
    matern32             (1 + sqrt(3) r) exp(-sqrt(3) r)
    matern52             (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r)
    spher                1 - sum_i |dx_i| / (2 c) + sum_i |dx_i|^3 / (54 c),  below 0.01: 0,   c = length

The last is the law of the TL-DeepONet data sets as their script has it: a sum over the axes, not the spherical model of
geostatistics, and not positive definite; only its leading Karhunen-Loeve terms are of use, and these hold somewhat more
than the whole variance, because the negative terms are missing.

`period` bends each axis to a circle: dx is replaced by the chord (period / pi) sin(pi dx / period), which keeps every
kernel positive definite and agrees with the plain one where dx is small. For the squared exponential this is MacKay's
periodic kernel exp(-2 sin^2(pi dx / period) / l^2) with l = 2 pi length / period.

`separable` multiplies the one-dimensional correlations of the axes instead of taking one of the distance (the squared
exponential is the same in both forms). Then C is a Kronecker product, its eigenvectors are products, and the expansion
on n_1 x n_2 nodes costs eigenproblems of sizes n_1 and n_2 instead of n_1 n_2.

A sampler is a pytree that is called with a key and returns one field; batches are `jax.vmap(sampler)(keys)`.

>>> kernel = Kernel("matern52", length=0.2, std=0.5)
>>> sampler = karhunen_loeve(kernel, (np.linspace(0, 1, 8), np.linspace(0, 1, 8)), terms=20)
>>> jax.vmap(sampler)(jax.random.split(jax.random.key(0), 3)).shape
(3, 8, 8)
>>> bool(0.8 < sampler.captured < 1)
True

Letters: N points, d coordinates, n_i nodes of axis i, M terms.

References: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, section 4.2 (kernels); MacKay,
"Introduction to Gaussian processes", 1998 (periodic kernel); Lord, Powell, Shardlow, "An Introduction to Computational
Stochastic PDEs", 2014, chapters 6 and 7 (circulant embedding, Karhunen-Loeve); katiana22/TL-DeepONet on GitHub (spher).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

KernelName = Literal["squared_exponential", "exponential", "matern32", "matern52", "spher"]
# Above this number of nodes the leading terms of a kernel that is not separable come from Lanczos iterations.
_DENSE_NODES = 1200
# Accelerators would otherwise multiply float32 with fewer bits, and fields would differ from those of a CPU.
_PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Stationary covariance std^2 rho(dx); see the module for the correlations.

    Attributes:
      name: 'squared_exponential', 'exponential', 'matern32', 'matern52' or 'spher'.
      length: length scale in the units of the coordinates, one or one per axis.
      std: pointwise standard deviation.
      period: makes every axis a circle of this length, one or one per axis; None: a line.
      separable: product of one-dimensional correlations instead of a function of the distance.

    Raises:
      ValueError: for an unknown name, or for lengths, periods or a std that are not positive.
    """

    name: KernelName
    length: float | tuple[float, ...]
    std: float = 1.0
    period: float | tuple[float, ...] | None = None
    separable: bool = False

    def __post_init__(self):
        if self.name not in get_args(KernelName):
            raise ValueError(f"Kernel {self.name!r} is unknown; expected one of {', '.join(get_args(KernelName))}")
        for field in ("length", "std", "period"):
            value = getattr(self, field)
            if value is None and field == "period":
                continue
            if field != "std" and np.ndim(value) == 1:
                object.__setattr__(self, field, tuple(float(v) for v in value))
            if np.ndim(value) > (field != "std") or not np.all(np.isfinite(value)) or np.min(value) <= 0:
                raise ValueError(f"{field}={value!r} of the {self.name} kernel must be positive and finite")
        if self.name == "spher" and (self.separable or self.period is not None or np.ndim(self.length)):
            raise ValueError("The spher law has one length and no separable or periodic form")

    def __call__(self, differences: np.ndarray) -> np.ndarray:
        """Covariance of points that differ by `differences` f[..., d]: float64[...]."""
        dx = np.abs(np.asarray(differences, np.float64))
        if self.name == "spher":
            rho = 1.0 - dx.sum(-1) / (2 * self.length) + (dx**3).sum(-1) / (54 * self.length)
            return self.std**2 * np.where(rho < 0.01, 0.0, rho)
        if self.period is not None:
            period = _per_axis("period", self.period, dx.shape[-1])
            dx = period / np.pi * np.abs(np.sin(np.pi * dx / period))
        r = dx / _per_axis("length", self.length, dx.shape[-1])
        if self.separable:
            return self.std**2 * _correlation(self.name, r).prod(-1)
        return self.std**2 * _correlation(self.name, np.sqrt((r**2).sum(-1)))

    def is_product(self, num_axes: int) -> bool:
        """Whether the covariance is a product over the axes."""
        return num_axes == 1 or self.separable or self.name == "squared_exponential"

    def axis(self, index: int, num_axes: int) -> "Kernel":
        """The one-dimensional kernel of an axis, with std = 1."""
        period = None if self.period is None else float(_per_axis("period", self.period, num_axes)[index])
        length = float(_per_axis("length", self.length, num_axes)[index])
        return dataclasses.replace(self, length=length, std=1.0, period=period, separable=False)

    def matrix(self, points: np.ndarray) -> np.ndarray:
        """Covariance float64[N, N] of points f[N, d]."""
        points = _checked_points(points)
        return self(points[:, None, :] - points[None, :, :])


def _correlation(name: str, r: np.ndarray) -> np.ndarray:
    if name == "squared_exponential":
        return np.exp(-0.5 * r**2)
    if name == "exponential":
        return np.exp(-r)
    s = math.sqrt(3.0 if name == "matern32" else 5.0) * r
    return (1.0 + s if name == "matern32" else 1.0 + s + s**2 / 3.0) * np.exp(-s)


@struct.dataclass
class Cholesky:
    """g = L z. Attributes: factor f[N, N], the lower triangle L."""

    factor: jax.Array

    def __call__(self, key: jax.Array) -> jax.Array:
        """One field f[N]."""
        noise = jax.random.normal(key, self.factor.shape[:1], self.factor.dtype)
        return jnp.matmul(self.factor, noise, precision=_PRECISION)


def cholesky(kernel: Kernel, points: np.ndarray, *, jitter: float = 1e-8, dtype=np.float32) -> Cholesky:
    """Sampler at any points: C + jitter std^2 I = L L^T, factored once in float64.

    Args:
      kernel: the covariance.
      points: f[N, d], or f[N] on a line.
      jitter: variance of the white noise added, relative to std^2: covariances of smooth fields are singular to
        rounding.
      dtype: of the fields.

    Returns:
      A sampler of fields f[N].

    Raises:
      ValueError: for points that are not finite, or a covariance that is not positive definite with this jitter.
    """
    covariance = kernel.matrix(points)
    covariance[np.diag_indices_from(covariance)] += jitter * kernel.std**2
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"The {kernel.name} covariance of the {len(covariance)} points is not positive definite with "
            f"jitter={jitter:g}; raise jitter, or use karhunen_loeve"
        ) from error
    return Cholesky(jnp.asarray(factor, dtype))


@struct.dataclass
class KarhunenLoeve:
    """g = sum_m sqrt(l_m) z_m phi_m, with phi_m products of axis vectors or, for one flat basis, vectors on the grid.

    Attributes:
      bases: per axis f[n_i, m_i] with orthonormal columns; of a kernel that is no product one f[n_1 ... n_d, M].
      scales: f[m_1, ..., m_d] or f[M]: sqrt(l), 0 for terms that are cut.
      captured: f[], share of the variance, averaged over the grid, that the kept terms hold.
      shape: (n_1, ..., n_d).
    """

    bases: tuple[jax.Array, ...]
    scales: jax.Array
    captured: jax.Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    def __call__(self, key: jax.Array) -> jax.Array:
        """One field f[n_1, ..., n_d]."""
        return self.field(jax.random.normal(key, self.scales.shape, self.scales.dtype))

    def field(self, coefficients: jax.Array) -> jax.Array:
        """The field f[n_1, ..., n_d] of standard normal coefficients, shaped like `scales`."""
        return self._expand(self.scales * coefficients, self.bases)

    def std(self) -> jax.Array:
        """Pointwise standard deviation f[n_1, ..., n_d]: below the kernel's, by what truncation cuts."""
        return jnp.sqrt(self._expand(self.scales**2, tuple(basis**2 for basis in self.bases)))

    def _expand(self, terms: jax.Array, bases: tuple[jax.Array, ...]) -> jax.Array:
        for basis in bases:  # the first axis is contracted and comes back as the last, so d rounds restore the order
            terms = jnp.tensordot(terms, basis, axes=(0, 1), precision=_PRECISION)
        return terms.reshape(self.shape)


def karhunen_loeve(kernel: Kernel, axes: Sequence[np.ndarray], *, terms: int | None, dtype=np.float32) -> KarhunenLoeve:
    """Sampler on a grid: the M largest terms of the eigen-expansion of the grid's covariance matrix.

    The discrete expansion: eigenvectors of C on the nodes, all weighted alike. Product kernels take an eigenproblem per
    axis; others one of the whole grid, which above some 1,000 nodes is solved for M terms by Lanczos iterations with
    products by FFT (equal eigenvalues then come with an arbitrary basis of their space).

    Args:
      kernel: the covariance.
      axes: coordinates f[n_i] of the nodes along each axis; uniform where Lanczos iterations are used.
      terms: M; None keeps all.
      dtype: of the fields.

    Returns:
      A sampler of fields f[n_1, ..., n_d].

    Raises:
      ValueError: for axes that are not finite vectors, or more terms than nodes.
    """
    axes = [_checked_axis(axis, index) for index, axis in enumerate(axes)]
    if not axes:
        raise ValueError("axes is empty; give the coordinates of the nodes along 1 to 3 axes")
    shape = tuple(len(axis) for axis in axes)
    nodes = math.prod(shape)
    terms = nodes if terms is None else terms
    if not 1 <= terms <= nodes:
        raise ValueError(f"terms={terms} must be between 1 and the number of nodes, {nodes}")
    if kernel.is_product(len(axes)):
        pairs = [np.linalg.eigh(kernel.axis(i, len(axes)).matrix(axis)) for i, axis in enumerate(axes)]
        vectors = [vector[:, ::-1] for _, vector in pairs]  # largest first
        values = functools.reduce(np.multiply.outer, [np.maximum(value[::-1], 0.0) for value, _ in pairs])
        values = kernel.std**2 * values
        kept = np.zeros(nodes, bool)
        kept[np.argsort(-values.ravel(), kind="stable")[:terms]] = True
        values = np.where(kept.reshape(shape), values, 0.0)
        # Only the leading vectors of an axis occur in kept terms: 100 terms of a 100 x 100 grid use some 15 of each.
        used = [np.flatnonzero(values.any(axis=tuple(set(range(len(axes))) - {i})))[-1] + 1 for i in range(len(axes))]
        values = values[tuple(slice(size) for size in used)]
        vectors = [vector[:, :size] for vector, size in zip(vectors, used, strict=True)]
    else:
        values, vector = _leading_pairs(kernel, axes, terms)
        values, vectors = np.maximum(values, 0.0), [vector]
    return KarhunenLoeve(
        bases=tuple(jnp.asarray(_signed(vector), dtype) for vector in vectors),
        scales=jnp.asarray(np.sqrt(values), dtype),
        captured=jnp.asarray(values.sum() / (kernel.std**2 * nodes), dtype),
        shape=shape,
    )


def _leading_pairs(kernel: Kernel, axes: Sequence[np.ndarray], terms: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues, falling, and eigenvectors f[N, M] of the covariance on a grid."""
    shape = tuple(len(axis) for axis in axes)
    nodes = math.prod(shape)
    if nodes <= _DENSE_NODES or terms > nodes // 3:
        values, vectors = np.linalg.eigh(kernel.matrix(_grid(axes)))
        return values[::-1][:terms], vectors[:, ::-1][:, :terms]
    from scipy.sparse import linalg

    for index, axis in enumerate(axes):
        if not np.allclose(np.diff(axis), axis[1] - axis[0], rtol=1e-6):
            raise ValueError(f"Axis {index} is not uniform, which {nodes} nodes of a kernel that is no product need")
    # A stationary covariance on a uniform grid is a corner of a circulant one of twice the size.
    lags = [(axis[1] - axis[0]) * np.fft.fftfreq(2 * len(axis), 1 / (2 * len(axis))) for axis in axes]
    doubled = tuple(2 * size for size in shape)
    spectrum = np.fft.rfftn(kernel(_grid(lags)).reshape(doubled))
    corner = tuple(slice(size) for size in shape)

    def product(vector: np.ndarray) -> np.ndarray:
        transformed = np.fft.rfftn(vector.reshape(shape), doubled, axes=range(len(shape)))
        return np.fft.irfftn(transformed * spectrum, doubled, axes=range(len(shape)))[corner].ravel()

    operator = linalg.LinearOperator((nodes, nodes), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(nodes)  # fixed: the same terms in every run
    values, vectors = linalg.eigsh(operator, k=terms, which="LA", v0=start)
    order = np.argsort(-values)
    return values[order], vectors[:, order]


@struct.dataclass
class Spectral:
    """g = F^-1 sqrt(S) F w, with w white noise and S the transform of the first row of a circulant covariance.

    Attributes:
      root: f[n_1, ..., n_d // 2 + 1], sqrt(S).
      shape: (n_1, ..., n_d).
    """

    root: jax.Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    def __call__(self, key: jax.Array) -> jax.Array:
        """One field f[n_1, ..., n_d]."""
        noise = jax.random.normal(key, self.shape, self.root.dtype)
        # White noise in, so that the transform has the symmetry of a real field, and its variances, without any cases.
        return jnp.fft.irfftn(jnp.fft.rfftn(noise) * self.root, self.shape)


def spectral(kernel: Kernel, shape: Sequence[int], *, dtype=np.float32) -> Spectral:
    """Sampler on the periodic grid x_j = period j / n, j < n, of 1 to 3 axes: exact, by fast Fourier transforms.

    Args:
      kernel: the covariance; its `period` is the size of the box.
      shape: nodes (n_1, ..., n_d).
      dtype: of the fields.

    Returns:
      A sampler of fields f[n_1, ..., n_d].

    Raises:
      ValueError: for a kernel without a period, or a shape that is not 1 to 3 positive numbers.
    """
    shape = tuple(int(size) for size in shape)
    if not 1 <= len(shape) <= 3 or min(shape) < 1:
        raise ValueError(f"shape={shape} must be 1 to 3 positive numbers of nodes")
    if kernel.period is None:
        raise ValueError("Spectral sampling is periodic: give the kernel a period, the size of the box")
    periods = _per_axis("period", kernel.period, len(shape))
    lags = [period * np.arange(size) / size for period, size in zip(periods, shape, strict=True)]
    spectrum = np.fft.rfftn(kernel(_grid(lags)).reshape(shape)).real
    return Spectral(jnp.asarray(np.sqrt(np.maximum(spectrum, 0.0)), dtype), shape)


def _grid(axes: Sequence[np.ndarray]) -> np.ndarray:
    """Points f[n_1 ... n_d, d] of a grid, the last axis running fastest."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def _signed(vectors: np.ndarray) -> np.ndarray:
    """Columns with a positive first large entry: libraries of linear algebra return either sign."""
    large = np.argmax(np.abs(vectors) > 0.5 * np.abs(vectors).max(0), axis=0)
    return vectors * np.where(vectors[large, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)


def _per_axis(field: str, value: float | tuple[float, ...], num_axes: int) -> np.ndarray:
    if np.ndim(value) and len(value) != num_axes:
        raise ValueError(f"{field}={value} has {len(value)} values but there are {num_axes} coordinates")
    return np.broadcast_to(np.asarray(value, np.float64), (num_axes,))


def _checked_points(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, np.float64)
    points = points[:, None] if points.ndim == 1 else points
    if points.ndim != 2 or not points.size or not np.isfinite(points).all():
        raise ValueError(f"points must be finite and of shape [N, d] or [N], got shape {points.shape}")
    return points


def _checked_axis(axis: np.ndarray, index: int) -> np.ndarray:
    axis = np.asarray(axis, np.float64)
    if axis.ndim != 1 or not axis.size or not np.isfinite(axis).all():
        raise ValueError(f"Axis {index} must be a vector of finite coordinates, got shape {axis.shape}")
    return axis
