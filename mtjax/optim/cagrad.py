r"""CAGrad: the direction near the mean gradient that improves the worst task most.

d = argmax_d min_k <g_k, d> over the ball |d - g_0| <= c |g_0| about the mean gradient g_0. By duality

    w = argmin_{w in simplex} <g_w, g_0> + c |g_0| |g_w|,  g_w = sum_k w_k g_k,    d = g_0 + c |g_0| g_w / |g_w|.

*Solver.* A primal-dual interior-point method for this second-order cone programme. It works on unit gradients: with
shares v_k proportional to w_k n_k, a_k the cosine of g_k and g_0, C the cosine matrix and q_k = min_j n_j / n_k, in
units in which |g_0| = 1,

    minimise a^T v + c t  over v >= 0, q^T v = 1, t >= (v^T C v)^{1/2}.

With b = c v / t, so that d = g_0 + |g_0| sum_k b_k u_k, the conditions are y = C b + a - nu q >= 0, v y = 0 and
b^T C b = c^2, where nu is the least gain min_k <g_k, d> in units of |g_0| min_j n_j. All is done on K x K matrices; 10
to 20 iterations, each with one linear system.

*Stationary points.* If g_w = 0 for some w, the least gain cannot be positive. If the ball reaches the directions that
hurt no task, all of these in the ball are optimal and g_w / |g_w| has no meaning. The nearest to g_0 is taken: what d
converges to as c grows until the ball just reaches them, and where it then stays. Since a Gramian shows |g_w| only if
it is above rounding, t is kept above eps^0.4 sum_k v_k, which does just that. (The ball reaches no such direction at
strongly stationary points if c < 1: d vanishes with the mean gradient only. If c >= 1 it is zero at all of them, to
3e-3 of sum_k |w_k| n_k in float32.)

Letters: K tasks; g_k gradients, n_k = |g_k|, u_k = g_k / n_k; d the direction; eps the spacing of the dtype at 1.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtjax.optim import solvers
from mtjax.optim.base import Method, Weighting, from_weighting


def cagrad(c: float = 0.5, *, rescale: Literal[0, 1, 2] = 0, reduction: Literal["mean", "sum"] = "mean") -> Method:
    r"""Conflict-averse gradient descent.

    d = argmax_d min_k <g_k, d> over |d - g_0| <= c |g_0|, with g_0 the mean gradient.

    Args:
      c: radius of the ball, relative to |g_0|. 0 is gradient descent on the mean loss; below 1 it converges to
        stationary points of the mean loss, and towards infinity d turns to the direction of `mgda`.
      rescale: 0 leaves d; 1 divides it by 1 + c^2, 2 by 1 + c.
      reduction: 'mean' as in the paper; 'sum' multiplies d by the number of tasks, to match the sum of the losses.

    Returns:
      A `Method`, scale equivariant. One task gives (1 + c) g, divided as `rescale` says. A zero gradient counts: no
      direction improves it, and d is the nearest to g_0 that hurts no task if the ball reaches one. The same holds for
      other stationary points: see the head of this module. A mean gradient that is zero (to rounding, relative to the
      mean length of the gradients) gives d = 0.

    Raises:
      ValueError: if `c` is negative or not finite, or for another `rescale` or `reduction`.

    >>> method = cagrad(0.6)
    >>> d, _ = method.update(jnp.array([[2.0, 0.0], [0.0, 2.0]]), method.init(None))
    >>> print(d.round(3))
    [1.6 1.6]

    Reference: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, equation 3 and
      algorithm 1. It has neither factor; the authors' experiments use rescale = 1 and the sum, with c = 0.4 on NYUv2.
      LibMTL: rescale = 1 and the mean, SLSQP with 1e-8 inside the roots. TorchJD: no rescaling; 0 if |g_w| or |J| is
      small.
    """
    if not (c >= 0 and math.isfinite(c)):
        raise ValueError(f"c must be at least 0 and finite, got {c}")
    if rescale not in (0, 1, 2):
        raise ValueError(f"rescale must be 0, 1 or 2, got {rescale!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    divisor = {0: 1.0, 1: 1 + c**2, 2: 1 + c}[rescale]

    def weigh(gramian, losses, state, present):
        del losses
        num_present = jnp.maximum(jnp.sum(present), 1).astype(gramian.dtype)
        weights = present / num_present
        if c > 0:
            weights = _conflict_averse(gramian, present, weights, c)
        factor = (num_present if reduction == "sum" else 1.0) / divisor
        return factor * weights + 0 * jnp.sum(gramian), state  # NaN if the Gramian is not finite

    return from_weighting(Weighting(lambda num_tasks: (), weigh, masked=True))


def _conflict_averse(gramian: jax.Array, present: jax.Array, mean: jax.Array, c: float) -> jax.Array:
    """f[K]: weights of d; `mean` f[K] are those of g_0."""
    norm, cosine = solvers.row_normalized(gramian)
    longest, shortest = jnp.max(norm), jnp.min(jnp.where(norm > 0, norm, jnp.inf))
    shares = mean * norm * solvers.reciprocal(longest)
    gain = jnp.matmul(cosine, shares, precision=solvers.HIGHEST)
    squared = jnp.sum(shares * gain)
    # Inner products known to eps n_i n_j leave |g_0|^2 undetermined by about eps (sum_k n_k / K)^2.
    vanishes = ~(squared > 4 * jnp.finfo(norm.dtype).eps * jnp.sum(shares) ** 2)
    size = jnp.sqrt(jnp.where(vanishes, 1.0, squared))
    # A zero gradient can be of any length here: no gain is possible either way. Squares must not underflow.
    shorter = jnp.where(norm > 0, shortest * solvers.reciprocal(norm), 1.0)
    push = _solve(cosine, gain / size, jnp.maximum(shorter, jnp.finfo(norm.dtype).tiny ** 0.45), present, c)
    weights = mean + push * size * longest * solvers.reciprocal(norm)
    return jnp.where(present & ~vanishes, weights, 0.0)


class _Point(NamedTuple):
    """A point on the way.

    Attributes:
      shares: v f[K].
      slack: y f[K], by how much each gain exceeds the least.
      excess: s f[], by how much t exceeds its bound.
      multiplier: z f[], of that bound.
      level: nu f[].
      more: bool[], whether to go on.
      step: i32[].
    """

    shares: jax.Array
    slack: jax.Array
    excess: jax.Array
    multiplier: jax.Array
    level: jax.Array
    more: jax.Array
    step: jax.Array


def _solve(cosine: jax.Array, a: jax.Array, q: jax.Array, present: jax.Array, c: float) -> jax.Array:
    """b f[K] of the module's head: the part of d beside g_0, in unit gradients and units of |g_0|; 0 for the absent.

    Args:
      cosine: C f[K, K], with zero rows and columns of zero gradients and absent tasks.
      a: f[K], cosines of the gradients and their mean.
      q: f[K], lengths of the shortest gradient relative to each; any positive value if absent.
      present: bool[K].
      c: radius of the ball.
    """
    eps = jnp.finfo(cosine.dtype).eps
    least = eps**0.4
    count = jnp.sum(present) + 1
    eye = jnp.eye(cosine.shape[0], dtype=cosine.dtype)
    cosine = cosine + 4 * eps * eye  # about what rounding has cost

    def dot(x, y):
        return jnp.sum(jnp.where(present, x * y, 0.0))

    def product(v):
        return jnp.matmul(cosine, jnp.where(present, v, 0.0), precision=solvers.HIGHEST)

    def bound(v):
        return least * dot(v, 1.0)

    def start():
        level = jnp.min((a - c) / q, initial=jnp.inf, where=present)
        slack = jnp.where(present, a - level * q, 1.0)
        shares = jnp.where(present, 1 / slack, 0.0)
        shares = shares / dot(q, shares)
        mu = dot(shares, slack) / (count - 1)
        t = mu / c + jnp.sqrt((mu / c) ** 2 + dot(shares, product(shares)))
        excess = jnp.maximum(t - bound(shares), bound(shares))
        return _Point(shares, slack, excess, mu / excess, level, jnp.array(True), jnp.array(0))

    def body(point: _Point) -> _Point:
        v, y, s, z, level, _, step = point
        t = s + bound(v)
        b = c * v / t
        push = product(b)
        residual = jnp.where(present, y - push - a - least * z + level * q, 0.0)
        target = jnp.maximum(0.1 * (dot(v, y) + s * z) / count, 1e-4 * eps * t / c)

        # The Newton step in (1 + dv) v, (1 + dy) y, (1 + dt) t, (1 + dz) z and level + dl; with x = dv - dt it is
        # (C diag(b) + diag(y)) x = residual + (target / v - y) - y dt + q dl - least z dz, here scaled by columns.
        scale = b + y
        system = cosine * (b / scale)[None, :] + eye * (y / scale)[None, :]
        right = [residual + target / jnp.where(present, v, 1.0) - y, -y, q, jnp.full_like(y, -least)]
        columns = jnp.linalg.solve(system, jnp.where(present[:, None], jnp.stack(right, 1), 0.0)) / scale[:, None]
        # Three more equations in dt, dl and z dz: the cone, q^T v = 1, and the bound of t with its multiplier.
        rows = jnp.where(present, jnp.stack([push * b, q * v, v]), 0.0)
        moment, mass, total = jnp.sum(rows, 1)
        on_moment, on_mass, on_total = jnp.matmul(rows, columns, precision=solvers.HIGHEST)
        unit = jnp.eye(3, dtype=t.dtype)
        small = jnp.stack(
            [
                on_moment[1:] + c * unit[2],
                on_mass[1:] + mass * unit[0],
                z / s * (t * unit[0] - least * (on_total[1:] + total * unit[0])) + unit[2],
            ]
        )
        values = [
            (c * c - moment) / 2 - c * z - on_moment[0],
            1 - mass - on_mass[0],
            target / s - z + z / s * least * on_total[0],
        ]
        dt, dl, zdz = jnp.linalg.solve(small, jnp.stack(values))
        dv = jnp.matmul(columns, jnp.stack([jnp.ones_like(dt), dt, dl, zdz]), precision=solvers.HIGHEST) + dt
        dv = jnp.where(present, dv, 0.0)
        dy = jnp.where(present, target / jnp.where(present, v * y, 1.0) - 1 - dv, 0.0)
        dz = zdz / z
        ds = target / (s * z) - 1 - dz

        # Nine tenths of the way to where something becomes negative.
        steepest = jnp.max(jnp.concatenate([-dv, -dy, jnp.stack([-ds, -dz])]))
        length = 0.9 / jnp.maximum(steepest, 0.9)
        v, y, s, z = v * (1 + length * dv), y * (1 + length * dy), s * (1 + length * ds), z * (1 + length * dz)
        # Back into the cone, should t have fallen faster than the length that it bounds.
        s = jnp.maximum(s, jnp.sqrt(jnp.maximum(dot(v, product(v)), 0.0)) - bound(v))
        more = (jnp.max(b * y) > 0.01 * eps) | (jnp.max(jnp.abs(residual)) > 32 * eps * dot(b, 1.0))
        new = _Point(v, y, s, z, level + length * dl, more, step + 1)
        # A system that is singular to rounding ends the search where it is.
        finite = jnp.all(jnp.isfinite(v) & jnp.isfinite(y)) & jnp.isfinite(s) & jnp.isfinite(z)
        return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, point._replace(more=False))

    end = jax.lax.while_loop(lambda point: point.more & (point.step < 80), body, start())
    return jnp.where(present, c * end.shares / (end.excess + bound(end.shares)), 0.0)
