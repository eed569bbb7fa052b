r"""Nash-MTL and FairGrad: the weights of a bargain in which every task has a say, (G w)_k = w_k^(-1/alpha), w > 0.

With d = sum_k w_k g_k the left side is <g_k, d>, what task k gains to first order. The equation is the optimality
condition of max_d sum_k u(<g_k, d>) - |d|^2 / 2 with u(s) = s^(1 - alpha) / (1 - alpha), or log s if alpha = 1, which
is Nash's bargaining solution. As alpha grows from 0 to infinity, d goes from the sum of the gradients to the direction
of the greatest least gain.

*Solver.* In shares b_k = w_k n_k, with the cosine matrix C, the equation is C b = y, b_k y_k^alpha = n_k^(1 - alpha).
Every task lies on its own curve b_k = b0_k e^x_k, y_k = b0_k e^(-x_k / alpha), where b0_k = n_k^((1 - alpha) /
(1 + alpha)) is the solution for orthogonal gradients, x = 0. Newton's method on C b(x) = y(x) makes its step linear in
whichever of b_k and y_k grows. For one task the residual is then such that no step passes the solution; for several
this is what makes a search along the line unnecessary (about 6 steps, also at ratios of norms of 1e16 and for
alpha from 0.01 to 100; 64 at most). Norms appear as logarithms only.

*Where there is no solution.* Some tasks cannot be improved without hurting others: they are in a subset S with
sum_{k in S} v_k g_k = 0 for some v > 0, and would get infinite weights. They are *held*: d is orthogonal to them and is
the bargain of the rest, with gradients projected accordingly. This is the limit of the solution for G + r I, r -> 0.
A convex combination of the u_k = g_k / n_k counts as zero if its square is below 8 eps, which is what rounding of the
Gramian can make of zero: in float32, if it is shorter than 1e-3.

Letters: K tasks; g_k gradients, n_k = |g_k|; G their Gramian; d the direction; eps the spacing of the dtype at 1.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtjax.optim import solvers
from mtjax.optim.base import Method, Weighting, from_weighting


def nash_mtl(*, max_norm: float | None = 1.0) -> Method:
    r"""Nash-MTL: multi-task learning as a bargaining game.

    (G w)_k = 1 / w_k, w > 0, hence <g_k, d> w_k = 1 for all tasks and |d|^2 = K; then |d| is clipped to `max_norm`.

    Args:
      max_norm: bound of |d|; None to leave |d| = sqrt(K).

    Returns:
      A `Method`. |d| does not depend on the length of any gradient: one task gives g / |g|, at any scale, and the
      learning rate alone decides how far a step goes. Tasks with a zero gradient (K then counts the others) and tasks
      that no direction improves without hurting another have no say: see the head of this module. If no task has one,
      as at strongly stationary points, d = 0.

    Raises:
      ValueError: if `max_norm` is not positive.

    >>> method = nash_mtl(max_norm=None)
    >>> d, state = method.update(jnp.diag(jnp.array([2.0, 4.0])), method.init(None))
    >>> print(d.round(3), state.weights.round(3))
    [1. 1.] [0.5  0.25]

    Reference: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, claim 3.1 and algorithm 1. The
      authors solve a sequence of convex programmes from the last weights, which stops far from the solution or falls
      back on equal weights for ill-scaled gradients (and so do LibMTL and TorchJD). Here the solution is exact and
      there is no state. To update weights every few steps only, wrap the method in `every`.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive or None, got {max_norm}")

    def weigh(gramian, losses, state, present):
        del losses, present  # rows of absent tasks are zero
        weights, free = _bargain(gramian, 1.0)
        # sum_k w_k <g_k, d> = 1 for each task that is free; sums of the Gramian could cancel.
        length = jnp.sqrt(jnp.maximum(jnp.sum(free), 1).astype(weights.dtype))
        return (weights if max_norm is None else weights * jnp.minimum(1.0, max_norm / length)), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, masked=True))


def fairgrad(alpha: float = 1.0, *, factor: Literal["one", "tasks"] = "one") -> Method:
    r"""FairGrad: gradients are combined so that gains are alpha-fair.

    (G w)_k = w_k^(-1/alpha), w > 0. alpha = 1 is proportional fairness (`nash_mtl` without the clipping), 2 the least
    delay; towards 0 it is the sum of the gradients, towards infinity the best of the least gains.

    Args:
      alpha: how much the tasks that gain least count.
      factor: what d is multiplied by: 1 as in the paper, or the number of 'tasks' as in the authors' code.

    Returns:
      A `Method`. It is not scale equivariant: gradients s times as long make d s^((1 - alpha) / (1 + alpha)) times as
      long, so that for alpha > 1 steps grow while gradients vanish. One task gives g / |g|^(2 alpha / (1 + alpha)).
      Tasks with a zero gradient and tasks that no direction improves without hurting another have no say: see the head
      of this module. If no task has one, as at strongly stationary points, d = 0.

    Raises:
      ValueError: if `alpha` is not positive and finite, or for another `factor`.

    >>> method = fairgrad(3.0)
    >>> d, state = method.update(jnp.diag(jnp.array([4.0, 16.0])), method.init(None))
    >>> print(d.round(3))
    [0.5  0.25]

    Reference: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, algorithm 1. Their class takes
      alpha = 1 by default and their scripts 2. They hand the equation to a bounded least-squares solver, which stops
      early for short gradients (and so do LibMTL and TorchJD).
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if factor not in ("one", "tasks"):
        raise ValueError(f"factor must be 'one' or 'tasks', got {factor!r}")

    def weigh(gramian, losses, state, present):
        del losses
        weights, _ = _bargain(gramian, alpha)
        return (weights if factor == "one" else weights * jnp.sum(present)), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, masked=True))


class _Bargain(NamedTuple):
    """held bool[K]; shares f[K] of the gradients' unit vectors; done bool[]; step i32[]."""

    held: jax.Array
    shares: jax.Array
    done: jax.Array
    step: jax.Array


def _bargain(gramian: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Weights f[K] of the bargain and bool[K]: the tasks that have a say in it."""
    norm, cosine = solvers.row_normalized(gramian)
    active = norm > 0
    log_norm = jnp.log(jnp.where(active, norm, 1.0))
    shortest = jnp.min(log_norm, initial=jnp.inf, where=active)
    longest = jnp.max(log_norm, initial=-jnp.inf, where=active)
    centre = jnp.where(jnp.any(active), (shortest + longest) / 2, 0.0)
    relative = jnp.where(active, log_norm - centre, 0.0)

    def body(state: _Bargain) -> _Bargain:
        held, rest, size, completion = jax.lax.cond(jnp.any(state.held), _project, _whole, cosine, active, state.held)
        free = active & ~held
        shares = _solve(rest, relative + jnp.log(size), free, alpha)
        found = _stationary(rest, shares, free)
        shares = shares / size
        shares = shares - jnp.matmul(completion, shares, precision=solvers.HIGHEST)
        return _Bargain(held | found, shares, ~jnp.any(found), state.step + 1)

    start = _Bargain(jnp.zeros_like(active), jnp.zeros_like(norm), jnp.array(False), jnp.array(0))
    # Each pass but the last holds at least one more task.
    end = jax.lax.while_loop(lambda s: ~s.done & (s.step <= gramian.shape[0]), body, start)
    free = active & ~end.held
    # With norms relative to m = e^centre, w is m^(-2 alpha / (1 + alpha)) times what it would be.
    weights = end.shares * jnp.exp(-relative - 2 * alpha / (1 + alpha) * centre)
    weights = jnp.where(active & jnp.any(free), weights, 0.0)
    return weights + 0 * norm, free  # NaN if the Gramian is


def _solve(cosine: jax.Array, log_norm: jax.Array, free: jax.Array, alpha: float) -> jax.Array:
    """f[K]: b > 0 with C b = y, b_k y_k^alpha = n_k^(1 - alpha) for free tasks, 0 for others. See the module's head."""
    eps = jnp.finfo(cosine.dtype).eps
    eye = jnp.eye(cosine.shape[0], dtype=cosine.dtype)
    # 4 eps is what rounding C may have cost: C then stays positive, and b finite.
    cosine = jnp.where(free[:, None] & free[None, :], cosine, eye) + 4 * eps * eye
    log_start = jnp.where(free, (1 - alpha) / (1 + alpha) * log_norm, 0.0)
    limit = 0.9 * math.log(jnp.finfo(cosine.dtype).max)

    def curve(x):
        return tuple(jnp.exp(jnp.clip(log_start + slope * x, -limit, limit)) for slope in (1.0, -1 / alpha))

    def body(state):
        x, _, step = state
        b, y = curve(x)
        residual = y - jnp.matmul(cosine, b, precision=solvers.HIGHEST)
        # (C diag(b) + diag(y) / alpha) dx = residual, its columns scaled by b + y / alpha: safe from overflow.
        scale = b + y / alpha
        system = cosine * (b / scale)[None, :] + eye * (y / alpha / scale)[None, :]
        dx = jnp.linalg.solve(system, residual) / scale
        dx = jnp.where(jnp.all(jnp.isfinite(dx)), dx, 0.0)  # singular to rounding: ends here
        # b (1 + dx) or y (1 - dx / alpha), whichever of them grows.
        x += jnp.where(dx > 0, jnp.log1p(jnp.maximum(dx, 0.0)), -alpha * jnp.log1p(jnp.maximum(-dx / alpha, 0.0)))
        # Where the residual is rounding, this was the last step.
        more = jnp.max(jnp.where(free, jnp.abs(residual), 0.0)) > 4 * eps * jnp.sum(jnp.where(free, b, 0.0))
        more &= jnp.any(dx != 0)
        return x, more, step + 1

    x, _, _ = jax.lax.while_loop(
        lambda state: state[1] & (state[2] < 64), body, (jnp.zeros_like(log_start), jnp.array(True), jnp.array(0))
    )
    return jnp.where(free, curve(x)[0], 0.0)


# Tasks without a say.


def _stationary(cosine: jax.Array, shares: jax.Array, free: jax.Array) -> jax.Array:
    """bool[K]: free tasks with weight in a convex combination of unit gradients that is zero to rounding, if any."""
    eps = jnp.finfo(cosine.dtype).eps
    gain = jnp.matmul(cosine, shares, precision=solvers.HIGHEST)
    # Gordan: no such combination exists if all gain. Nearly always the bargain itself shows it.
    certain = jnp.all(jnp.where(free, gain > 64 * eps * jnp.sum(shares), True))

    def combination():
        weights = solvers.min_norm_weights(jnp.where(free[:, None] & free[None, :], cosine, 0.0), free)
        squared = jnp.sum(weights * jnp.matmul(cosine, weights, precision=solvers.HIGHEST))
        # Rounding leaves up to 6 eps of |d|^2 (see `min_norm_weights`), and to tasks without a part in it weights of
        # eps / r^2, r being their distance from the span of the others.
        return (weights > jnp.sqrt(eps)) & (squared <= 8 * eps)

    return jax.lax.cond(certain, lambda: jnp.zeros_like(free), combination)


def _whole(cosine, active, held):
    """What `_project` gives if no task is held."""
    return held, cosine, jnp.ones_like(cosine[0]), jnp.zeros_like(cosine)


def _project(cosine: jax.Array, active: jax.Array, held: jax.Array):
    """Unit gradients of free tasks without their components along held ones.

    Returns:
      held bool[K], now with the tasks of which nothing is left; f[K, K] cosines of what is left of the others, and
      f[K] its length; f[K, K], minus which times the shares of free tasks are the shares of held ones in d.
    """
    eps = jnp.finfo(cosine.dtype).eps
    value, vector = jnp.linalg.eigh(jnp.where(held[:, None] & held[None, :], cosine, 0.0))
    kept = value > 8 * cosine.shape[0] * eps * jnp.max(value)
    root = vector * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, value, 1.0)), 0.0)[None, :]
    along = jnp.matmul(root.T, jnp.where(held[:, None], cosine, 0.0), precision=solvers.HIGHEST)
    rest = cosine - jnp.matmul(along.T, along, precision=solvers.HIGHEST)
    # Held tasks span all directions, both ways, of the space that they are in: what is in it is held as well.
    squared = jnp.diagonal(rest)
    held = held | (active & ~(squared > jnp.sqrt(eps)))
    size = jnp.sqrt(jnp.where(active & ~held, squared, 1.0))
    completion = jnp.where(~held[None, :], jnp.matmul(root, along, precision=solvers.HIGHEST), 0.0)
    return held, rest / size[:, None] / size[None, :], size, completion
