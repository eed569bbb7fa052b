r"""Small convex problems on K x K matrices, as lax loops: they jit, vmap and stay on the device.

The quadratic programmes here are all argmin_{x >= 0} 1/2 x^T A x - b^T x, A the cosines of the gradients or a bordered
form of them:

    min_norm_weights    shortest vector in the convex hull of the gradients (MGDA)
    cone_projection     nearest vector that hurts no task (UPGrad, GEM)

and `nonnegative_qp` solves them by an active-set method, a rank-one update for each step. The Gramian sets the
accuracy: its entries are known to eps n_i n_j, so that a direction d = sum_k w_k g_k is known to about
sqrt(eps) sum_k |w_k| n_k at worst, and to eps of it where gradients are well apart.

Letters: K tasks; g_k gradients, n_k = |g_k|; eps the spacing of the dtype at 1 (1.2e-7 in float32).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Accelerators round the operands of float32 products to fewer bits unless told otherwise.
HIGHEST = jax.lax.Precision.HIGHEST


def row_normalized(gramian: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Norms n_k and cosines G_ij / (n_i n_j): what the conditioning of a problem depends on, whatever the scales.

    Args:
      gramian: f[K, K].

    Returns:
      Norms f[K] and cosines f[K, K] in [-1, 1]; rows and columns of zero gradients are zero, the diagonal too. All NaN
      if the Gramian is not finite.

    >>> import jax.numpy as jnp
    >>> norm, cosine = row_normalized(jnp.array([[4.0, -3.0], [-3.0, 9.0]]))
    >>> norm.tolist(), cosine.tolist()
    ([2.0, 3.0], [[1.0, -0.5], [-0.5, 1.0]])
    """
    norm = jnp.sqrt(jnp.diagonal(gramian))
    inverse = reciprocal(norm)
    # One after the other: the product of two inverse norms may leave float32's range where the cosine does not.
    cosine = jnp.clip(gramian * inverse[:, None] * inverse[None, :], -1.0, 1.0)
    cosine = jnp.where(jnp.eye(len(norm), dtype=bool), jnp.where(norm > 0, 1.0, 0.0), cosine)
    finite = jnp.all(jnp.isfinite(gramian))
    return jnp.where(finite, norm, jnp.nan), jnp.where(finite, cosine, jnp.nan)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x, and 0 where x is 0."""
    return jnp.where(x == 0, 0.0, 1.0 / jnp.where(x == 0, 1.0, x))


def nonnegative_qp(a: jax.Array, b: jax.Array, *, tolerance: float = 8.0, ridge: float = 4.0) -> jax.Array:
    r"""argmin_{x >= 0} 1/2 x^T A x - b^T x for a positive semidefinite A with A_kk of order one (or a zero row).

    An active-set method: the coordinate with the largest multiplier enters, and those whose x it drives to zero leave
    on its way. The objective falls at every step, so it ends, after about K steps. A is swept (inverted in place) on
    one coordinate at a time, K^2 operations a step and no linear system: K problems with one A go side by side under
    `jax.vmap`. If the optimality conditions then hold to rounding, as they nearly always do, that is all. If rounding
    has spoilt the sweeps (A_SS nearly singular on the way), more steps are made from there, each by a linear system.

    Args:
      a: f[K, K].
      b: f[K].
      tolerance: multipliers below this many eps of max |b| + sum_k x_k count as zero.
      ridge: where A's curvature along the way of an entering coordinate is below this many eps of the squared length of
        the way, which is what rounding A has cost, it is lifted to that. Without it, coordinates that are opposite or
        collinear to rounding go anywhere. If the problem is unbounded, x is large (1 / eps) along such a way.

    Returns:
      f[K], elementwise >= 0; NaN if A or b is not finite.

    >>> import jax.numpy as jnp
    >>> print(nonnegative_qp(jnp.array([[1.0, 0.5], [0.5, 1.0]]), jnp.array([1.0, -1.0])).round(4))
    [1. 0.]

    Reference: Lawson and Hanson, "Solving Least Squares Problems", 1974, algorithm NNLS (23.10); on the dual it is
      Goldfarb and Idnani, "A numerically stable dual method for solving strictly convex quadratic programs", Math.
      Programming 1983. Goodnight, "A Tutorial on the SWEEP Operator", Am. Statistician 1979.
    """
    eps = jnp.finfo(a.dtype).eps
    largest = jnp.max(jnp.abs(b))

    def threshold(x):
        return tolerance * eps * (largest + jnp.sum(x))

    x = _by_solves(a, b, *_by_sweeps(a, b, threshold, ridge * eps), threshold, ridge * eps)
    return jnp.where(jnp.all(jnp.isfinite(a)) & jnp.all(jnp.isfinite(b)), x, jnp.nan)


class _Tableau(NamedTuple):
    """Of the sets S (passive: x may be positive) and N (the others), with the solution of A_SS x_S = b_S.

    Attributes:
      table: f[K, K], A swept on S: -A_SS^-1 on S x S, A_SS^-1 A_SN on S x N, A_NN - A_NS A_SS^-1 A_SN on N x N.
      value: f[K]: x on S; what is left of b - A x on N.
      passive: bool[K].
      entering: i[], the coordinate on its way into S.
      entered: f[], its x so far.
      pending: bool[]: it has not arrived yet.
      done: bool[].
      step: i32[].
    """

    table: jax.Array
    value: jax.Array
    passive: jax.Array
    entering: jax.Array
    entered: jax.Array
    pending: jax.Array
    done: jax.Array
    step: jax.Array


def _by_sweeps(a, b, threshold, ridge):
    """x f[K] and the passive set bool[K]."""
    size = b.shape[0]
    index = jnp.arange(size)

    def first(mask):
        # argmin and argmax take several times as long on CPU as a minimum and a comparison with it.
        return jnp.min(jnp.where(mask, index, size - 1))

    def body(s: _Tableau) -> _Tableau:
        multiplier = jnp.where(s.passive, -jnp.inf, s.value)
        top = jnp.max(multiplier)
        entering = jnp.where(s.pending, s.entering, first(multiplier == top))
        done = ~s.pending & ~(top > threshold(jnp.where(s.passive, s.value, 0.0)))  # ~(>) also catches NaN

        # Raising x_entering by t moves the values by -t column, and the objective by -t value + t^2 curvature / 2.
        column = s.table[entering]
        drop = jnp.where(s.passive, column, 0.0)
        curvature = jnp.maximum(column[entering], ridge * (1.0 + jnp.sum(drop * drop)))
        column = jnp.where(index == entering, curvature, column)
        full = s.value[entering] / curvature
        ratio = jnp.where(drop > 0, s.value / jnp.where(drop > 0, drop, 1.0), jnp.inf)
        partial = jnp.min(ratio)
        arrives = full <= partial
        leaving = first(ratio == partial)
        t = jnp.where(done, 0.0, jnp.minimum(full, partial))
        entered = jnp.where(s.pending, s.entered, 0.0) + t

        # Sweep on the coordinate that enters, or back on the one that leaves; on none when done.
        at = index == jnp.where(arrives, entering, leaving)
        pivot = jnp.where(arrives, curvature, s.table[leaving, leaving])
        other = jnp.where(at | done, 0.0, jnp.where(arrives, column, s.table[leaving]))
        row = jnp.where(at, -1.0 / pivot, other / jnp.abs(pivot))
        at = at & ~done
        table = s.table - other[:, None] * (other / pivot)[None, :]
        table = jnp.where(at[:, None], row[None, :], jnp.where(at[None, :], row[:, None], table))

        value = jnp.where(at, jnp.where(arrives, entered, 0.0), s.value - t * column)
        passive = jnp.where(at, arrives, s.passive)
        return _Tableau(table, value, passive, entering, entered, ~arrives & ~done, done, s.step + 1)

    false = jnp.zeros((), bool)
    start = _Tableau(a, b, jnp.zeros(size, bool), index[0], jnp.zeros((), a.dtype), false, false, jnp.int32(0))
    # The bound only guards against cycling at rounding level.
    end = jax.lax.while_loop(lambda s: ~s.done & (s.step < 4 * size + 16), body, start)
    passive = end.passive | (end.pending & (index == end.entering))
    x = jnp.where(end.passive, jnp.maximum(end.value, 0.0), jnp.where(passive, end.entered, 0.0))
    return x, passive


class _ActiveSet(NamedTuple):
    """x f[K]: feasible point; passive bool[K]: coordinates allowed to be positive; done bool[]; step i32[]."""

    x: jax.Array
    passive: jax.Array
    done: jax.Array
    step: jax.Array


def _by_solves(a, b, x, passive, threshold, ridge):
    """x f[K] that satisfies the optimality conditions to rounding: what is given, if it does."""
    size = b.shape[0]
    eye = jnp.eye(size, dtype=a.dtype)
    lifted = a + ridge * eye

    def body(s: _ActiveSet) -> _ActiveSet:
        both = s.passive[:, None] & s.passive[None, :]
        target = jnp.linalg.solve(jnp.where(both, lifted, eye), jnp.where(s.passive, b, 0.0))
        blocking = s.passive & ~(target > 0)
        feasible = ~jnp.any(blocking)

        # Feasible: move there, then let the coordinate with the largest multiplier in, if there is one.
        x = jnp.where(feasible, target, s.x)
        multiplier = jnp.where(s.passive, -jnp.inf, b - jnp.matmul(a, x, precision=HIGHEST))
        entering = jnp.argmax(multiplier)
        optimal = feasible & ~(multiplier[entering] > threshold(x))

        # Infeasible: go as far as the sign constraints allow, and drop the coordinates that stop us.
        gap = s.x - target
        ratio = jnp.where(blocking & (gap > 0), s.x / jnp.where(gap > 0, gap, 1.0), 0.0)
        ratio = jnp.where(blocking, ratio, jnp.inf)
        alpha = jnp.min(ratio)
        moved = jnp.maximum(s.x + jnp.minimum(alpha, 1.0) * (target - s.x), 0.0)
        kept = s.passive & ~(blocking & (ratio <= alpha))

        x = jnp.where(feasible, x, jnp.where(kept, moved, 0.0))
        entered = s.passive | ((jnp.arange(size) == entering) & ~optimal)
        return _ActiveSet(x, jnp.where(feasible, entered, kept), optimal, s.step + 1)

    rest = b - jnp.matmul(a, x, precision=HIGHEST)
    violation = jnp.max(jnp.where(passive, jnp.abs(rest), rest))
    start = _ActiveSet(x, passive, ~(violation > 2 * threshold(x)), jnp.int32(0))
    return jax.lax.while_loop(lambda s: ~s.done & (s.step < 2 * size + 16), body, start).x


def min_norm_weights(gramian: jax.Array, present: jax.Array | None = None) -> jax.Array:
    r"""argmin_{w in simplex} w^T G w: the weights of the shortest vector d in the convex hull of the gradients.

    The simplex constraint goes by homogenisation: for any s > 0, if u >= 0 minimises
    1/2 u^T (R + c c^T) u - c^T u, with R the cosine matrix and c_k = s / n_k, then
    w = (u / n) / sum_k (u_k / n_k). Rows of R + c c^T are scaled to a unit diagonal.

    In exact arithmetic s does not matter. In floating point R and c c^T drown one another unless
    |d| <= s <= sum_k w_k n_k; as |d| <= min_k n_k <= sum_k w_k n_k, s = min_k n_k always serves.

    The Gramian itself sets the accuracy: inner products known to eps n_i n_j leave |d|^2 undetermined by about
    eps (sum_k w_k n_k)^2. The result satisfies, with w* and d* the exact solution and C < 16 (measured: 11),
    |d| <= |d*| + sqrt(C eps a (a + a*)),  a = sum_k w_k n_k,  a* = sum_k w*_k n_k.

    Args:
      gramian: f[K, K].
      present: bool[K], the gradients that take part; all if not given. Rows and columns of the others are zero.

    Returns:
      f[K], non-negative, summing to one; 0 for absent gradients, and all 0 if none is present. If gradients are exactly
      zero they share all the weight (the minimum is then zero); NaN if the Gramian is not finite.

    >>> import jax.numpy as jnp
    >>> [round(weight, 4) for weight in min_norm_weights(jnp.array([[1.0, 0.0], [0.0, 4.0]])).tolist()]
    [0.8, 0.2]
    """
    norm, cosine = row_normalized(gramian)
    present = jnp.ones(norm.shape, bool) if present is None else present
    zero = present & (norm == 0)
    # c = 0 leaves out both absent gradients and zero ones, which are dealt with below.
    shortest = jnp.min(jnp.where(norm > 0, norm, jnp.inf))
    c = jnp.where(norm > 0, shortest, 0.0) * reciprocal(norm)
    unit = jax.lax.rsqrt(1.0 + c * c)
    u = unit * nonnegative_qp((cosine + jnp.outer(c, c)) * jnp.outer(unit, unit), c * unit, tolerance=4.0)
    # c in the place of 1 / n: the ratio of the two is common to all weights and goes with the normalisation.
    w = jnp.where(jnp.any(zero), zero.astype(u.dtype), u * c)
    total = jnp.sum(w)
    w = w / jnp.where(total == 0, 1.0, total)
    return jnp.where(jnp.isnan(norm[0]), jnp.nan, w)


def cone_projection(gramian: jax.Array, u: jax.Array) -> jax.Array:
    r"""argmin_{v >= u} v^T G v: J^T v is the vector nearest to J^T u that hurts no task, min_d |d - J^T u|, J d >= 0.

    With v_k n_k = u_k n_k + s x_k, s = max_k |u_k| n_k, this is argmin_{x >= 0} 1/2 x^T R x + x^T R (u n / s), R the
    cosine matrix. Take `jax.vmap` over several u: the cosines are computed once.

    Args:
      gramian: f[K, K]. Absent tasks have zero rows and columns.
      u: f[K], weights of the vector to project.

    Returns:
      f[K], elementwise >= u; equal to u for zero gradients; NaN if the Gramian is not finite.

    >>> import jax.numpy as jnp
    >>> gramian = jnp.array([[4.0, -2.0], [-2.0, 2.0]])  # of (2, 0) and (-1, 1)
    >>> print(cone_projection(gramian, jnp.array([1.0, 0.0])).round(4))  # (2, 0) becomes (1, 1)
    [1. 1.]

    Reference: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, proposition 1.
    """
    norm, cosine = row_normalized(gramian)
    along = u * norm
    size = jnp.max(jnp.abs(along))
    b = -jnp.matmul(cosine, along * reciprocal(size), precision=HIGHEST)
    return u + size * nonnegative_qp(cosine, b) * reciprocal(norm)


def simplex_projection(v: jax.Array, present: jax.Array | None = None) -> jax.Array:
    r"""argmin_{w in simplex} |w - v|: w_k = max(v_k - theta, 0) with theta such that the weights sum to one.

    Args:
      v: f[K].
      present: bool[K], the coordinates that take part; all if not given.

    Returns:
      f[K], non-negative, summing to one; 0 for absent coordinates, and all 0 if none is present. NaN if a present
      coordinate is not finite.

    >>> import jax.numpy as jnp
    >>> [round(weight, 4) for weight in simplex_projection(jnp.array([0.9, 0.5, -1.0])).tolist()]
    [0.7, 0.3, 0.0]

    Reference: Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions", ICML 2008,
      figure 1.
    """
    present = jnp.ones(v.shape, bool) if present is None else present
    # Only differences matter, and coordinates more than 1 below the largest have weight 0.
    gap = jnp.where(present, v - jnp.max(jnp.where(present, v, -jnp.inf)), -2.0)
    ordered = jnp.sort(gap, descending=True)
    excess = jnp.cumsum(jnp.maximum(ordered, -2.0)) - 1.0
    count = jnp.arange(1, len(v) + 1)
    rho = jnp.sum(ordered * count > excess)
    theta = excess[rho - 1] / rho
    w = jnp.where(present, jnp.maximum(gap - theta, 0.0), 0.0)
    return jnp.where(jnp.all(jnp.isfinite(v) | ~present), w, jnp.nan)
