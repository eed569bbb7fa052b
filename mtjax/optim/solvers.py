r"""Small convex problems on K x K matrices, as lax loops: they jit, vmap and stay on the device.

Letters: K tasks; eps the spacing of the dtype at 1 (1.2e-7 in float32).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Accelerators round the operands of float32 products to fewer bits unless told otherwise.
HIGHEST = jax.lax.Precision.HIGHEST


class _ActiveSet(NamedTuple):
    """x f32[K]: feasible point; passive bool[K]: coordinates allowed to be positive; done bool[]; step i32[]."""

    x: jax.Array
    passive: jax.Array
    done: jax.Array
    step: jax.Array


def nonnegative_qp(a: jax.Array, b: jax.Array, *, tolerance: float = 8.0, ridge: float = 4.0) -> jax.Array:
    r"""argmin_{x >= 0} 1/2 x^T A x - b^T x for a positive semidefinite A f32[K, K] with A_kk of order one.

    The active-set method of Lawson and Hanson: coordinates enter one at a time by the largest positive multiplier and
    leave by a ratio test. It ends in the exact solution of the final linear system, not in an iterate near it.

    Args:
      a: f32[K, K].
      b: f32[K].
      tolerance: multipliers below this many eps of max |b| count as zero.
      ridge: this many eps are added to the diagonal, about what rounding A has cost: without it, coordinates that are
        opposite or collinear to rounding make an indefinite system, whose solution sends them in and out for ever.

    Returns:
      f32[K], elementwise >= 0.

    >>> import jax.numpy as jnp
    >>> print(nonnegative_qp(jnp.array([[1.0, 0.5], [0.5, 1.0]]), jnp.array([1.0, -1.0])).round(4))
    [1. 0.]

    Reference: Lawson and Hanson, "Solving Least Squares Problems", 1974, algorithm NNLS (23.10).
    """
    size = a.shape[0]
    eye = jnp.eye(size, dtype=a.dtype)
    eps = jnp.finfo(a.dtype).eps
    a = a + ridge * eps * eye
    threshold = tolerance * eps * jnp.max(jnp.abs(b))

    def solve(passive):
        both = passive[:, None] & passive[None, :]
        return jnp.linalg.solve(jnp.where(both, a, eye), jnp.where(passive, b, 0.0))

    def body(state: _ActiveSet) -> _ActiveSet:
        target = solve(state.passive)
        blocking = state.passive & ~(target > 0)  # ~(>) also catches NaN
        feasible = ~jnp.any(blocking)

        # Feasible: move there, then let the coordinate with the largest multiplier in, if there is one.
        x = jnp.where(feasible, target, state.x)
        multiplier = jnp.where(state.passive, -jnp.inf, b - jnp.matmul(a, x, precision=HIGHEST))
        entering = jnp.argmax(multiplier)
        optimal = feasible & ~(multiplier[entering] > threshold)

        # Infeasible: go as far as the sign constraints allow, and drop the coordinates that stop us.
        gap = state.x - target
        ratio = jnp.where(blocking & (gap > 0), state.x / jnp.where(gap > 0, gap, 1.0), 0.0)
        ratio = jnp.where(blocking, ratio, jnp.inf)
        alpha = jnp.min(ratio)
        moved = jnp.maximum(state.x + jnp.minimum(alpha, 1.0) * (target - state.x), 0.0)
        leaving = blocking & (ratio <= alpha)
        kept = state.passive & ~leaving

        x = jnp.where(feasible, x, jnp.where(kept, moved, 0.0))
        entered = state.passive | ((jnp.arange(size) == entering) & ~optimal)
        return _ActiveSet(x, jnp.where(feasible, entered, kept), optimal, state.step + 1)

    start = _ActiveSet(jnp.zeros_like(b), jnp.zeros((size,), bool), jnp.array(False), jnp.array(0))
    # In practice about K passes; the bound only guards against cycling at rounding level.
    end = jax.lax.while_loop(lambda s: ~s.done & (s.step < 8 * size + 16), body, start)
    return end.x


def min_norm_weights(gramian: jax.Array) -> jax.Array:
    r"""argmin_{w in simplex} w^T G w: the weights of the shortest vector d in the convex hull of the gradients.

    The simplex constraint goes by homogenisation: for any s > 0, if u >= 0 minimises
    1/2 u^T (R + c c^T) u - c^T u, with R the cosine matrix, n_k = |g_k| and c_k = s / n_k, then
    w = (u / n) / sum_k (u_k / n_k). Rows of R + c c^T are scaled to a unit diagonal.

    In exact arithmetic s does not matter. In floating point R and c c^T drown one another unless
    |d| <= s <= sum_k w_k n_k; as |d| <= min_k n_k <= sum_k w_k n_k, s = min_k n_k always serves.

    The Gramian itself sets the accuracy: inner products known to eps n_i n_j leave |d|^2 undetermined by about
    eps (sum_k w_k n_k)^2. The result satisfies, with w* and d* the exact solution and C < 16 (measured: 6),
    |d| <= |d*| + sqrt(C eps a (a + a*)),  a = sum_k w_k n_k,  a* = sum_k w*_k n_k.

    Args:
      gramian: f32[K, K].

    Returns:
      f32[K], non-negative, summing to one. If gradients are exactly zero they share all the weight (the minimum is
      then zero); NaN if the Gramian is not finite.

    >>> import jax.numpy as jnp
    >>> [round(weight, 4) for weight in min_norm_weights(jnp.array([[1.0, 0.0], [0.0, 4.0]])).tolist()]
    [0.8, 0.2]
    """
    norm = jnp.sqrt(jnp.diagonal(gramian))
    zero = norm == 0
    safe = jnp.where(zero, jnp.max(norm), norm)
    safe = jnp.where(safe > 0, safe, 1.0)
    cosine = gramian / safe[:, None] / safe[None, :]

    c = jnp.min(safe) / safe
    unit = jax.lax.rsqrt(1.0 + c * c)
    u = unit * nonnegative_qp((cosine + jnp.outer(c, c)) * jnp.outer(unit, unit), c * unit)
    # c in the place of 1 / n: the ratio of the two is common to all weights and goes with the normalisation.
    w = jnp.where(jnp.any(zero), zero.astype(u.dtype), u * c)
    w = w / jnp.sum(w)
    return jnp.where(jnp.all(jnp.isfinite(gramian)), w, jnp.nan)
