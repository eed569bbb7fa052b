"""A small linear programme over the simplex, as a fixed number of interior-point steps: it jits, vmaps, and stays put.

Letters: K variables, M constraints.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtjax.optim.solvers import HIGHEST


class _Iterate(NamedTuple):
    """x f[K] with multipliers z; slacks t f[M] with multipliers y; violations s f[M] with multipliers v; lam f[]."""

    x: jax.Array
    z: jax.Array
    t: jax.Array
    y: jax.Array
    s: jax.Array
    v: jax.Array
    lam: jax.Array


def simplex_lp(
    objective: jax.Array,
    matrix: jax.Array,
    bound: jax.Array,
    active: jax.Array,
    *,
    steps: int = 40,
    penalty: float = 1e3,
) -> jax.Array:
    r"""argmax_{x in simplex} c^T x - penalty sum_m max(0, b_m - (A x)_m), over the constraints that are active.

    The elastic form: where A x >= b can be met it is met (the penalty is exact for multipliers below it, in units of
    the largest |c|), and where it cannot, the sum of violations is small instead of there being no answer.

    Args:
      objective: c f[K].
      matrix: A f[M, K].
      bound: b f[M].
      active: bool[M]; the others are no constraints.
      steps: interior-point iterations.
      penalty: of a unit of violation, constraints being scaled to rows of size one.

    Returns:
      f[K] in the simplex; among several maximisers, a point between them. NaN if the input is not finite.

    >>> import jax.numpy as jnp
    >>> c, a = jnp.array([3.0, 1.0]), jnp.array([[-1.0, 1.0]])
    >>> print(simplex_lp(c, a, jnp.zeros(1), jnp.array([True])).round(3))  # x_2 >= x_1
    [0.5 0.5]

    Reference: Wright, "Primal-Dual Interior-Point Methods", 1997, chapter 10 (a path-following step with a fixed
      reduction of the gap).
    """
    num_variables, num_constraints = objective.size, bound.size
    finite = jnp.isfinite(objective).all() & jnp.where(active[:, None], jnp.isfinite(matrix), True).all()
    matrix = jnp.where(active[:, None], matrix, 0.0)
    size = jnp.maximum(jnp.max(jnp.abs(matrix), axis=1), jnp.where(active, jnp.abs(bound), 0.0))
    size = jnp.where(size > 0, size, 1.0)
    a = matrix / size[:, None]
    b = jnp.where(active, bound, -1.0) / jnp.where(active, size, 1.0)
    scale = jnp.max(jnp.abs(objective))
    c = objective / jnp.where(scale > 0, scale, 1.0)
    ones = jnp.ones_like(c)

    def product(m, x):
        return jnp.matmul(m, x, precision=HIGHEST)

    def step(it: _Iterate, _):
        gap = product(it.x, it.z) + product(it.t, it.y) + product(it.s, it.v)
        mu = 0.1 * gap / (num_variables + 2 * num_constraints)
        # Residuals of A x + s - t = b, of c + A^T y + lam + z = 0, of sum x = 1.
        primal = b - product(a, it.x) - it.s + it.t
        dual = -(c + product(a.T, it.y) + it.lam * ones + it.z)
        # s and t out (dv = -dy, as y + v = penalty): A dx + w dy = q.
        w = it.s / it.v + it.t / it.y
        q = primal - (mu / it.v - it.s) + (mu / it.y - it.t)
        # z out, then dy: (z/x + A^T w^-1 A) dx - dlam 1 = r.
        r = -dual + mu / it.x - it.z + product(a.T, q / w)
        normal = jnp.diag(it.z / it.x) + product(a.T, a / w[:, None])
        system = jnp.block([[normal, -ones[:, None]], [ones[None], jnp.zeros((1, 1), c.dtype)]])
        solution = jnp.linalg.solve(system, jnp.append(r, 1.0 - jnp.sum(it.x)))
        dx, dlam = solution[:-1], solution[-1]
        dy = (q - product(a, dx)) / w
        move = _Iterate(
            dx,
            mu / it.x - it.z - it.z / it.x * dx,
            mu / it.y - it.t - it.t / it.y * dy,
            dy,
            mu / it.v - it.s + it.s / it.v * dy,
            -dy,
            dlam,
        )
        # As far as everything but lam stays positive; a step that is not a number (rounding, at the end) is not taken.
        ratios = [
            jnp.min(jnp.where(d < 0, -value / jnp.where(d < 0, d, -1.0), jnp.inf))
            for value, d in zip(it[:-1], move[:-1], strict=True)
        ]
        length = jnp.minimum(1.0, 0.95 * jnp.min(jnp.stack(ratios)))
        usable = jnp.stack([jnp.isfinite(d).all() for d in move]).all()
        new = jax.tree.map(lambda value, d: jnp.where(usable, value + length * d, value), it, move)
        return new, None

    uniform = ones / num_variables
    t = jnp.maximum(product(a, uniform) - b, 1.0)
    y = jnp.ones_like(b)
    start = _Iterate(
        uniform, 1.0 + jnp.max(jnp.abs(c)) * ones, t, y, jnp.ones_like(b), penalty - y, jnp.zeros((), c.dtype)
    )
    x = jnp.maximum(jax.lax.scan(step, start, None, length=steps)[0].x, 0.0)
    return jnp.where(finite, x / jnp.sum(x), jnp.nan)
