r"""IMTL-G, Aligned-MTL and ConFIG: closed forms that treat all gradients alike, whatever their length or angle.

All three are spectral: a pseudo-inverse or an inverse square root of the Gramian G, or of the cosine matrix C. So they
have to decide which eigenvalues are zero: those below K eps of the largest are. Where gradients are dependent, or
nearly so, the result jumps with this decision: that is in the definitions and no accuracy can mend it.

Letters: K tasks; g_k gradients, n_k = |g_k|, u_k = g_k / n_k; d the direction; eps the spacing of the dtype at 1.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from mtjax.optim import solvers
from mtjax.optim.base import Method, Weighting, from_weighting


def imtl_g() -> Method:
    r"""IMTL-G: the direction with equal projections on all gradients.

    <u_1, d> = ... = <u_K, d> and sum_k w_k = 1, hence w_k = v_k / n_k / sum_j (v_j / n_j) with v = C^+ 1.

    Returns:
      A `Method`, scale equivariant; one task gives its gradient. Weights may be negative, and are unbounded: d is the
      point of the affine, not of the convex, hull of the gradients, and may be longer than all of them. If gradients
      are dependent, v is the shortest of all solutions (identical gradients: equal weights), or, if there is none, of
      all least-squares ones. Tasks with a zero gradient have weight 0. d = 0 if v = 0 or the sum of v_j / n_j vanishes,
      as for opposite gradients.

    >>> method = imtl_g()
    >>> d, state = method.update(jnp.array([[3.0, 0.0], [0.0, 1.0]]), method.init(None))
    >>> print(d.round(2), state.weights.round(2))
    [0.75 0.75] [0.25 0.75]

    Reference: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, equations 4 to 6. For independent
      gradients this is their closed form, which fails on dependent or zero ones (and so does LibMTL). TorchJD takes
      v / n = G^+ n: the same for independent gradients, while for dependent ones longer gradients weigh more.
    """

    def weigh(gramian, losses, state, present):
        del losses, present  # rows of absent tasks are zero
        norm, cosine = solvers.row_normalized(gramian)
        active = norm > 0
        tolerance = _tolerance(active, norm.dtype)
        shares, _ = _pseudo_inverse(cosine, active.astype(norm.dtype), tolerance)
        weights = shares * solvers.reciprocal(norm * solvers.reciprocal(jnp.max(norm)))
        total = jnp.sum(weights)
        total = jnp.where(jnp.abs(total) <= tolerance * jnp.sum(jnp.abs(weights)), 0.0, total)
        return weights * solvers.reciprocal(total), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, masked=True))


def config(*, preference: Sequence[float] | None = None) -> Method:
    r"""ConFIG: the direction at equal angles to all gradients, as long as their projections on it together.

    x = U^+ p with rows u_k of U and p = 1, hence <u_k, x> = p_k;  d = (sum_k <g_k, x>) x / |x|^2. As U^+ = U^T C^+, the
    Gramian is all it takes: w_k = v_k / n_k (sum_j n_j (C v)_j) / (p^T v) with v = C^+ p.

    Args:
      preference: p, one number for each task: the cosines of d and the gradients are in these proportions.

    Returns:
      A `Method`, scale equivariant; one task gives its gradient. If gradients are dependent and cannot have all the
      cosines that they should, x is the least-squares solution; d = 0 if that is zero, as for opposite gradients. Tasks
      with a zero gradient have weight 0.

    Raises:
      ValueError: when the number of tasks is known and that of preferences is another.

    >>> method = config()
    >>> d, _ = method.update(jnp.array([[3.0, 0.0], [0.0, 1.0]]), method.init(None))
    >>> print(d.round(3))
    [2. 2.]

    Reference: Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR
      2025, equations 2 and 3, of which equal preferences are the default. Their package and TorchJD compute U^+ on the
      K x P matrix itself.
    """

    def weigh(gramian, losses, state, present):
        del losses
        norm, cosine = solvers.row_normalized(gramian)
        active = norm > 0
        target = jnp.where(active, _given("config", preference, present), 0.0)
        shares, squared = _pseudo_inverse(cosine, target, _tolerance(active, norm.dtype))
        relative = norm * solvers.reciprocal(jnp.max(norm))
        length = jnp.sum(relative * jnp.matmul(cosine, shares, precision=solvers.HIGHEST))
        return shares * solvers.reciprocal(relative) * length * solvers.reciprocal(squared), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, masked=True))


def aligned_mtl(
    scale_mode: Literal["min", "median", "rmse"] = "min",
    *,
    preference: Literal["sum", "mean"] | Sequence[float] = "sum",
) -> Method:
    r"""Aligned-MTL: gradients are replaced by the nearest orthogonal ones, all of one length.

    With the singular value decomposition J = V diag(sigma) W^T, d = s W V^T p, hence w = s V diag(1 / sigma) V^T p.

    Args:
      scale_mode: s is the least singular value that is not zero ('min'), the median of these (the lower of two) or
        their root mean square ('rmse').
      preference: p: 'sum' for ones, 'mean' for 1 / K, or K numbers.

    Returns:
      A `Method`, scale equivariant; one task gives its gradient. It is discontinuous: singular values below
      sqrt(K eps) of the largest (in float32, for K = 4: 7e-4) count as zero. With 'min' s is the least that does not,
      and d jumps when one crosses this line: three gradients that are dependent but for 1e-6 of their length give
      d of that size if the dtype sees it, and of the size of the second singular value if not. Lengths of gradients
      that differ by more than the line put the short ones below it. Zero gradients give d = 0 or change nothing.

    Raises:
      ValueError: for another `scale_mode` or string; when the number of tasks is known and that of preferences is
        another.

    >>> method = aligned_mtl()
    >>> d, _ = method.update(jnp.array([[3.0, 0.0], [0.0, 1.0]]), method.init(None))
    >>> print(d.round(3))
    [1. 1.]

    Reference: Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, algorithm 1. As
      the authors' code and LibMTL have it, p = 1; TorchJD's default is the mean. The line is theirs.
    """
    if scale_mode not in ("min", "median", "rmse"):
        raise ValueError(f"scale_mode must be 'min', 'median' or 'rmse', got {scale_mode!r}")
    if isinstance(preference, str) and preference not in ("sum", "mean"):
        raise ValueError(f"preference must be 'sum', 'mean' or a sequence of numbers, got {preference!r}")

    def weigh(gramian, losses, state, present):
        del losses
        norm, cosine = solvers.row_normalized(gramian)
        relative = norm * solvers.reciprocal(jnp.max(norm))
        value, vector = jnp.linalg.eigh(cosine * relative[:, None] * relative[None, :])
        kept = value > _tolerance(present, norm.dtype) * jnp.max(value)
        rank = jnp.sum(kept)
        # Ascending: those kept are the last ones.
        at = {"min": 0, "median": (rank - 1) // 2, "rmse": 0}[scale_mode]
        squared = jnp.take(value, jnp.clip(value.size - rank + at, 0, value.size - 1))
        if scale_mode == "rmse":
            squared = jnp.sum(jnp.where(kept, value, 0.0)) / jnp.maximum(rank, 1)
        ratio = jnp.where(kept, jnp.sqrt(jnp.where(kept, squared / jnp.where(kept, value, 1.0), 0.0)), 0.0)

        target = _given("aligned_mtl", None if isinstance(preference, str) else preference, present)
        if isinstance(preference, str) and preference == "mean":
            target = target / jnp.maximum(jnp.sum(present), 1)
        shares = ratio * jnp.matmul(target, vector, precision=solvers.HIGHEST)
        weights = jnp.matmul(vector, shares, precision=solvers.HIGHEST)
        return jnp.where(present, weights, 0.0) + 0 * norm, state  # NaN if the Gramian is

    return from_weighting(Weighting(lambda num_tasks: (), weigh, masked=True))


def _tolerance(active: jax.Array, dtype) -> jax.Array:
    """f[]: K eps, what counts as zero relative to the largest eigenvalue or to terms that cancel."""
    return jnp.sum(active) * jnp.finfo(dtype).eps


def _given(name: str, preference: Sequence[float] | None, present: jax.Array) -> jax.Array:
    """f[K]: the preference of tasks that are present, ones by default."""
    given = jnp.ones(present.shape) if preference is None else jnp.asarray(preference, float)
    if given.shape != present.shape:
        raise ValueError(f"{name} got {given.size} preferences for {present.size} tasks")
    return jnp.where(present, given, 0.0)


def _pseudo_inverse(matrix: jax.Array, right: jax.Array, tolerance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A^+ b f[K] and b^T A^+ b f[] for A positive semidefinite; both 0 if what A^+ sees of b is rounding."""
    value, vector = jnp.linalg.eigh(matrix)
    kept = value > tolerance * jnp.max(value)
    seen = jnp.where(kept, jnp.matmul(right, vector, precision=solvers.HIGHEST), 0.0)
    seen = jnp.where(jnp.sum(seen**2) > tolerance**2 * jnp.sum(right**2), seen, 0.0)
    solved = seen / jnp.where(kept, value, 1.0)
    return jnp.matmul(vector, solved, precision=solvers.HIGHEST), jnp.sum(seen * solved)
