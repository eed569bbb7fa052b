r"""Conjugate gradients for batches of finite-difference systems of diffusion, preconditioned by a multigrid cycle.

A system is a sparse symmetric matrix on a regular grid, held as conductances: c_a(i) joins node i to the next node
along axis a, and b(i) joins node i to a boundary of known value,

    (A u)(i) = sum over neighbours j of c(i, j) (u(i) - u(j)) + b(i) u(i).

Nodes that are not part of the domain have no conductance at all and keep u = 0. Nothing here knows what the domain is,
or which PDE it was.

One iteration of plain (diagonally scaled) conjugate gradients lets information move by one node, so their number grows
with the number of nodes along an axis: about 200 at 64 nodes and 300 at 100 for a relative residual of 1e-6. A V-cycle
over grids of half, quarter, ... as many nodes as a preconditioner needs about 10.

*Coarse grids* join 2^d nodes into one, until an axis has at most 9 nodes. Residuals are summed and corrections copied
(piecewise constant transfer), the conductance between two coarse nodes is half the sum of those that it replaces (their
distance doubled), b is summed.
*Smoothing* is two steps of damped Jacobi, factors 1.2 and 0.6, before and in reverse order after the coarse correction:
the cycle is symmetric, and positive definite as |(1 - 1.2 x) (1 - 0.6 x)| < 1 for the eigenvalues 0 < x <= 2 of D^-1 A.

Arrays have the batch as *last* axis, [*grid, B]: shifts along the grid then move whole vectors of numbers.

Letters: B systems in the batch, *grid the numbers of nodes along the d axes.

Reference: Notay, "An aggregation-based algebraic multigrid method", ETNA 37, 2010 (conjugate gradients around cycles
over aggregates); Braess, "Towards algebraic multigrid for elliptic problems of second order", Computing 55, 1995 (the
factor on the coarse matrix, there 1/1.8). Built here: fixed 2^d blocks instead of aggregates chosen from the matrix,
and the factor on conductances between nodes only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_DAMPING = (1.2, 0.6)
_COARSEST = 9
_COARSEST_SWEEPS = 6
_COARSEST_DAMPING = 0.8


class System(NamedTuple):
    """A batch of matrices.

    Attributes:
      links: for each axis a, f[*grid, B]: conductance to the next node along a, 0 where there is no link.
      boundary: f[*grid, B]: sum of the node's conductances to places of known value.
      diagonal: f[*grid, B]: sum of all conductances of the node.
      inverse: f[*grid, B]: 1 / diagonal, and 0 where the node has no conductance.
    """

    links: tuple[jax.Array, ...]
    boundary: jax.Array
    diagonal: jax.Array
    inverse: jax.Array


class Result(NamedTuple):
    """What `solve` returns.

    Attributes:
      solution: u f[*grid, B].
      iterations: i32[], the same for the whole batch.
      residual: f[B]: |(f - A u) / diagonal| / |f / diagonal|, as the iteration keeps it.
    """

    solution: jax.Array
    iterations: jax.Array
    residual: jax.Array


def system(links: Sequence[jax.Array], boundary: jax.Array) -> System:
    """The matrices of given conductances: f[*grid, B] for each axis, and f[*grid, B]; all non-negative."""
    diagonal = boundary
    for axis, link in enumerate(links):
        diagonal = diagonal + link + _previous(link, axis)
    inverse = jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1), 0)
    return System(tuple(links), boundary, diagonal, inverse)


def apply(matrix: System, u: jax.Array) -> jax.Array:
    """A u, f[*grid, B].

    >>> rod = system([jnp.array([[2.0], [0.0]])], jnp.array([[1.0], [0.0]]))  # boundary -1- node -2- node
    >>> apply(rod, jnp.array([[10.0], [20.0]])).ravel().tolist()
    [-10.0, 20.0]
    """
    result = matrix.diagonal * u
    for axis, link in enumerate(matrix.links):
        result = result - link * _next(u, axis) - _previous(link * u, axis)
    return result


def solve(
    matrix: System,
    right_hand_side: jax.Array,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    multigrid: bool = True,
) -> Result:
    """Solves A u = f for all systems of the batch at once, until the last of them has converged.

    Args:
      matrix: the systems.
      right_hand_side: f[*grid, B]; 0 at nodes without equation. Its dtype is the one computed in.
      tolerance: bound on the norm of the residual, relative to that of the right-hand side, both divided by the
        diagonal: a boundary that is very close to a node has a conductance without limit, and such rows would drown the
        others. In float32, about 1e-6 is what the solution resolves.
      max_iterations: bound on the iterations; `residual` tells whether it was met.
      multigrid: False preconditions with the diagonal alone (Jacobi).

    Returns:
      Solutions, iterations and residuals. Systems that have converged keep their solution while others go on.
    """
    grids = _hierarchy(matrix) if multigrid else ()

    def precondition(r: jax.Array) -> jax.Array:
        return _cycle(grids, r) if multigrid else r * matrix.inverse

    def inner(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, axis=tuple(range(a.ndim - 1)))

    def squared_norm(r: jax.Array) -> jax.Array:
        return jnp.sum((r * matrix.inverse) ** 2, axis=tuple(range(r.ndim - 1)))

    scale = squared_norm(right_hand_side)
    goal = tolerance**2 * scale
    z = precondition(right_hand_side)
    start = (0, jnp.zeros_like(right_hand_side), right_hand_side, z, inner(right_hand_side, z), scale)

    def unfinished(state: tuple) -> jax.Array:
        return (state[0] < max_iterations) & jnp.any(state[-1] > goal)

    def step(state: tuple) -> tuple:
        iteration, u, r, p, rz, squared = state
        product = apply(matrix, p)
        curvature = inner(p, product)
        # A system that is done takes no more steps: its residual must not be divided by until it underflows.
        going = (squared > goal) & (curvature > 0)
        length = jnp.where(going, rz / jnp.where(going, curvature, 1), 0)
        u, r = u + _wide(length, p) * p, r - _wide(length, p) * product
        z = precondition(r)
        new = inner(r, z)
        turn = jnp.where(going, new / jnp.where(going, rz, 1), 0)
        return iteration + 1, u, r, z + _wide(turn, p) * p, jnp.where(going, new, rz), squared_norm(r)

    iterations, u, _, _, _, squared = jax.lax.while_loop(unfinished, step, start)
    return Result(u, iterations, jnp.sqrt(squared / jnp.where(scale > 0, scale, 1)))


def _wide(per_system: jax.Array, like: jax.Array) -> jax.Array:
    """f[B] with the rank of f[*grid, B]."""
    return per_system.reshape((1,) * (like.ndim - 1) + (-1,))


def _next(u: jax.Array, axis: int) -> jax.Array:
    """The value of the next node along an axis, 0 behind the last."""
    width = [(0, 0)] * u.ndim
    width[axis] = (0, 1)
    return jnp.pad(jax.lax.slice_in_dim(u, 1, None, axis=axis), width)


def _previous(u: jax.Array, axis: int) -> jax.Array:
    """The value of the previous node along an axis, 0 before the first."""
    width = [(0, 0)] * u.ndim
    width[axis] = (1, 0)
    return jnp.pad(jax.lax.slice_in_dim(u, 0, -1, axis=axis), width)


def _hierarchy(matrix: System) -> tuple[System, ...]:
    """The matrix and its coarse versions, finest first."""
    grids = [matrix]
    while axes := _long_axes(grids[-1].diagonal):
        grids.append(_coarsen(grids[-1], axes))
    return tuple(grids)


def _long_axes(u: jax.Array) -> list[int]:
    """The axes along which the next grid is coarser than that of u f[*grid, B]."""
    return [axis for axis, nodes in enumerate(u.shape[:-1]) if nodes > _COARSEST]


def _coarsen(fine: System, axes: Sequence[int]) -> System:
    links = list(fine.links)
    for axis in axes:
        # Of the two links of a pair of nodes, the second leaves the block; doubling its length halves its conductance.
        links[axis] = 0.5 * jax.lax.slice_in_dim(_even(links[axis], axis), 1, None, stride=2, axis=axis)
    links = [_sum_blocks(link, [other for other in axes if other != axis]) for axis, link in enumerate(links)]
    return system(links, _sum_blocks(fine.boundary, axes))


def _even(u: jax.Array, axis: int) -> jax.Array:
    """u with an empty node added if their number along the axis is odd."""
    width = [(0, 0)] * u.ndim
    width[axis] = (0, u.shape[axis] % 2)
    return jnp.pad(u, width)


def _sum_blocks(u: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Sums of blocks of two nodes along each of the axes."""
    for axis in axes:
        u = _even(u, axis)
        u = u.reshape(*u.shape[:axis], -1, 2, *u.shape[axis + 1 :]).sum(axis + 1)
    return u


def _cycle(grids: tuple[System, ...], residual: jax.Array) -> jax.Array:
    """An approximate solution of A u = residual by one symmetric V-cycle that starts at u = 0."""
    grid, *coarser = grids
    if not coarser:
        return _smooth(grid, residual, jnp.zeros_like(residual), (_COARSEST_DAMPING,) * _COARSEST_SWEEPS)
    u = _smooth(grid, residual, jnp.zeros_like(residual), _DAMPING)
    axes = _long_axes(residual)
    correction = _cycle(tuple(coarser), _sum_blocks(residual - apply(grid, u), axes))
    for axis in axes:
        correction = jnp.repeat(correction, 2, axis=axis)
    correction = correction[tuple(slice(n) for n in residual.shape[:-1])]
    # A block of which only a part lies in the domain has a correction; the nodes of the other part keep the value 0.
    u = u + jnp.where(grid.inverse > 0, correction, 0)
    return _smooth(grid, residual, u, _DAMPING[::-1])


def _smooth(grid: System, residual: jax.Array, u: jax.Array, dampings: Sequence[float]) -> jax.Array:
    """Damped Jacobi steps from u."""

    def step(u: jax.Array, damping: jax.Array) -> tuple[jax.Array, None]:
        return u + damping * grid.inverse * (residual - apply(grid, u)), None

    # A loop, though it is short: XLA would fuse the steps and evaluate u again for each neighbour that reads it.
    return jax.lax.scan(step, u, np.asarray(dampings, residual.dtype))[0]
