r"""Quadratic programmes on the simplex, as a lax loop: argmin 1/2 x^T A x - b^T x over x >= 0, sum_k x_k = 1.

An active-set method: coordinates enter one at a time by the largest multiplier and leave by a ratio test, as in
`solvers.nonnegative_qp`, with the sum kept at 1 by a multiplier of its own. It ends in the exact solution of the final
linear system.

Letters: K tasks; eps the spacing of the dtype at 1 (1.2e-7 in float32).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtjax.optim.solvers import HIGHEST


class _ActiveSet(NamedTuple):
    """x f[K]: a point of the simplex; passive bool[K]: coordinates that may be positive; done bool[]; step i32[]."""

    x: jax.Array
    passive: jax.Array
    done: jax.Array
    step: jax.Array


def simplex_qp(a: jax.Array, b: jax.Array, present: jax.Array, *, ridge: float = 4.0) -> jax.Array:
    r"""argmin 1/2 x^T A x - b^T x over x >= 0, sum x = 1, and x_k = 0 where not `present`.

    Args:
      a: f[K, K], positive semidefinite, with entries of order one.
      b: f[K], of order one.
      present: bool[K].
      ridge: this many eps are added to the diagonal, about what rounding A has cost: without it, coordinates that are
        collinear to rounding would go in and out for ever.

    Returns:
      f[K]; zeros if no task is present.

    >>> import jax.numpy as jnp
    >>> x = simplex_qp(jnp.diag(jnp.array([1.0, 4.0])), jnp.zeros(2), jnp.array([True, True]))
    >>> [round(share, 4) for share in x.tolist()]
    [0.8, 0.2]

    Reference: Nocedal and Wright, "Numerical Optimization", 2006, algorithm 16.3.
    """
    size = a.shape[0]
    eye = jnp.eye(size, dtype=a.dtype)
    eps = jnp.finfo(a.dtype).eps
    a = a + ridge * eps * eye
    threshold = 8 * eps * (jnp.max(jnp.abs(a)) + jnp.max(jnp.abs(b)))

    def solve(passive):
        """x on the passive coordinates and the multiplier tau of the sum: A x + tau = b, sum x = 1."""
        both = passive[:, None] & passive[None, :]
        one = passive.astype(a.dtype)
        system = jnp.block([[jnp.where(both, a, eye), one[:, None]], [one[None, :], jnp.zeros((1, 1), a.dtype)]])
        solution = jnp.linalg.solve(system, jnp.append(jnp.where(passive, b, 0.0), 1.0))
        return solution[:-1], solution[-1]

    def body(state: _ActiveSet) -> _ActiveSet:
        target, tau = solve(state.passive)
        blocking = state.passive & ~(target > 0)  # ~(>) also catches NaN
        feasible = ~jnp.any(blocking)

        # Feasible: move there, then let the coordinate with the largest multiplier in, if there is one.
        x = jnp.where(feasible, target, state.x)
        multiplier = jnp.where(state.passive | ~present, -jnp.inf, b - tau - jnp.matmul(a, x, precision=HIGHEST))
        entering = jnp.argmax(multiplier)
        optimal = feasible & ~(multiplier[entering] > threshold)

        # Infeasible: go as far as the sign constraints allow, and drop the coordinates that stop us.
        gap = state.x - target
        ratio = jnp.where(blocking & (gap > 0), state.x / jnp.where(gap > 0, gap, 1.0), 0.0)
        ratio = jnp.where(blocking, ratio, jnp.inf)
        alpha = jnp.min(ratio)
        moved = jnp.maximum(state.x + jnp.minimum(alpha, 1.0) * (target - state.x), 0.0)
        kept = state.passive & ~(blocking & (ratio <= alpha))

        x = jnp.where(feasible, x, jnp.where(kept, moved, 0.0))
        entered = state.passive | ((jnp.arange(size) == entering) & ~optimal)
        return _ActiveSet(x, jnp.where(feasible, entered, kept), optimal, state.step + 1)

    first = jnp.argmin(jnp.where(present, 0.5 * jnp.diagonal(a) - b, jnp.inf))
    corner = (jnp.arange(size) == first) & present
    start = _ActiveSet(corner.astype(a.dtype), corner, ~jnp.any(present), jnp.array(0))
    # In practice about K passes; the bound only guards against cycling at rounding level.
    x = jax.lax.while_loop(lambda s: ~s.done & (s.step < 8 * size + 16), body, start).x
    total = jnp.sum(x)
    return x / jnp.where(total > 0, total, 1.0)
