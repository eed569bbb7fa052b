r"""FORUM: learned weights without hypergradients, by a constraint that training must have converged.

As in `bilevel.py`, weights w = softmax(alpha) define a training loss f(alpha, theta) = sum_k w_k L_k(theta; train), and
what counts are the losses F_k = L_k(theta; val) of all tasks on other examples. That theta minimises f is written as

    q(alpha, theta) = f(alpha, theta) - f(alpha, theta_T) <= 0,   theta_T: T steps of SGD on f from theta, held fixed.

Each update moves z = (alpha, theta) by -d: down all F_k as fast as possible, while q falls at a given rate,

    min_d  max_k <grad F_k / |grad F_k|, d'> + |d'|^2 / 2   subject to   <grad q, d'> <= -phi |grad q|^2,   d' = -d.

Its solution is d = sum_k lambda_k grad F_k / |grad F_k| + nu grad q for the multipliers of the dual problem,

    min 1/2 | sum_k lambda_k u_k + nu grad q |^2 - nu phi |grad q|^2   over lambda in the simplex, nu >= 0.

Letters: K tasks; u_k = grad F_k / |grad F_k|; w weights; s_k = <u_k, grad q> / |grad q|; b = phi |grad q|.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtjax.optim import base, cross, routes, sharing, solvers
from mtjax.optim.base import Method, Weighting, from_weighting
from mtjax.optim.bilevel import check_rate, in_first_unit, softmax
from mtjax.optim.learned_weights import step_present
from mtjax.optim.scalarization import settle
from mtjax.optim.simplex import simplex_qp


class ForumState(NamedTuple):
    """State of `forum`.

    Attributes:
      logits: f[K], alpha; w = softmax(alpha).
      multipliers: f[K], moving average of lambda; 0 before the first update.
      unit: f[], size of the first slope of alpha, in which slopes are measured; 0 before.
      optimizer_state: state of the optimiser of alpha.
      step: i32[], updates so far.
    """

    logits: jax.Array
    multipliers: jax.Array
    unit: jax.Array
    optimizer_state: Any
    step: jax.Array


class Constraint(NamedTuple):
    """The gradient of q, by what the solver needs of it.

    Attributes:
      along: f[K], <grad F_k, grad q>.
      squared: f[], squared norm of its part for theta.
      logits: f[K], its part for alpha.
    """

    along: jax.Array
    squared: jax.Array
    logits: jax.Array


def forum(
    phi: float = 0.1,
    optimizer: optax.GradientTransformation | None = None,
    *,
    inner_learning_rate: float = 0.1,
    inner_steps: int = 5,
    window: int = 1,
) -> Method:
    r"""First-order multi-gradient method for multi-objective bilevel problems (see the module's docstring).

    With (lambda, nu) of the dual problem: lambda~ <- lambda~ + beta (lambda - lambda~), beta = (n + 1)^(-3/4) in the
    n-th window of updates; nu = max(sum_k lambda~_k (phi - <u_k, grad q> / |grad q|^2), 0);
    d = sum_k lambda~_k u_k + nu grad_theta q,  alpha <- optimizer on nu grad_alpha q.

    `mtjax.value_and_update` cuts the batch into two equal halves, train and val, and makes T + K + 2 backward passes.
    Losses are reported on the train half; parameters that the method does not see (`on_shared`) follow their plain sum
    there. By hand, `update` with one Jacobian takes it for both halves and L(theta) - L(theta_T) to first order, as
    eta T G w; then d is the weighted sum with lambda~_k / |g_k| + nu w_k.

    Args:
      phi: rate at which q has to fall.
      optimizer: of alpha; by default `optax.adam(1e-3)`. Slopes are measured in the unit of the first, which Adam does
        not notice.
      inner_learning_rate: eta, of the T steps. If one overshoots, the best of their points stands for theta_T.
      inner_steps: T.
      window: updates for which beta stays the same: pass the number of steps of an epoch for the authors' schedule.

    Returns:
      A `Method`. Not scale-equivariant: u_k has length 1 and grad q has the size of the gradients. With K = 1, d is g
      over |g|, or phi g if that is longer. If a gradient is zero on val and descending q hurts no task, only q is
      descended, d = phi grad q. Where grad q is zero, d is the shortest vector in the convex hull of the u_k. Through
      the route there are no weights for rows (NaN), and wrappers that change weights do not apply;
      `nonfinite(..., 'drop_task')` works by hand only.

    Raises:
      ValueError: for a number outside its range.

    Reference: Ye, Lin, Cao, Zhang and Tsang, "A First-Order Multi-Gradient Algorithm for Multi-Objective Bi-Level
      Optimization", ECAI 2024 (arXiv 2401.09257). Built from the authors' code, with its defaults; the constraint is
      that of Liu et al., "BOME!", NeurIPS 2022. The dual problem is the one derived from the primal above: the code
      leaves out its factor 1/2, which we could not compare with the paper. The code (and LibMTL) adds 1e-8 to norms,
      stops the inner steps at losses of 1e5, and moves beta by epochs.
    """
    if not phi >= 0:
        raise ValueError(f"phi must be >= 0, got {phi}")
    check_rate(inner_learning_rate)
    if inner_steps < 1 or window < 1:
        raise ValueError(f"inner_steps and window must be >= 1, got {inner_steps} and {window}")
    optimizer = optimizer or optax.adam(1e-3)

    def init(num_tasks):
        zeros = jnp.zeros((num_tasks,))
        return ForumState(zeros, zeros, jnp.zeros(()), optimizer.init(zeros), jnp.zeros((), jnp.int32))

    def advance(outer, constraint, state, present):
        """lambda~_k / |grad F_k|, nu and the next state. outer f[K, K]: Gramian of the F_k."""
        inverse, cosine, along, norm = _normalized(outer, constraint)
        lam = _multipliers(cosine, along, phi * norm, present)
        rate = (1.0 + state.step // window) ** -0.75
        lam = jnp.where(present, state.multipliers + rate * (lam - state.multipliers), 0.0)
        nu = jnp.maximum(phi * norm * jnp.sum(lam) - jnp.dot(lam, along, precision=solvers.HIGHEST), 0.0)
        nu = nu * solvers.reciprocal(norm)
        slope, unit = in_first_unit(nu * constraint.logits, state.unit)
        logits, optimizer_state = step_present(optimizer, slope, state.optimizer_state, state.logits, present)
        lam_kept = jnp.where(present, lam, state.multipliers)
        return lam * inverse, nu, ForumState(logits, lam_kept, unit, optimizer_state, state.step + 1)

    def weigh(gramian, losses, state, present):
        del losses
        w = softmax(state.logits, present)
        along = jnp.matmul(gramian, w, precision=solvers.HIGHEST)
        falls = inner_learning_rate * inner_steps * along
        squared = jnp.maximum(jnp.dot(w, along, precision=solvers.HIGHEST), 0.0)
        constraint = Constraint(along, squared, w * (falls - jnp.sum(w * falls)))
        share, nu, state = advance(gramian, constraint, state, present)
        return settle(share + nu * w, present, jnp.isfinite(gramian).all(axis=1)), state

    weighting = Weighting(init, weigh, masked=True)

    def route(loss_fn, method, *, has_aux, chunk_size):
        if method.weighting is not weighting:
            raise ValueError("forum takes no wrapper that changes weights: from a loss function it has none for rows")
        if method.nonfinite == "drop_task":
            raise ValueError("forum cannot leave a task out of its inner steps: use nonfinite(..., 'skip_step')")

        def forum_fn(params, state, batch, *rest):
            train, val = routes.split_batch(batch, 2)
            here = cross.visit(loss_fn, has_aux, params, (train, *rest))
            num_tasks = here.losses.shape[0]
            old = base.materialize(state, num_tasks, params)
            shared = cross.shared_at(method, params, here, chunk_size)
            present = jnp.ones((num_tasks,), bool)
            w = softmax(old.inner.logits, present)

            def at(point_params):
                return cross.visit(loss_fn, has_aux, point_params, (train, *rest))

            def descend(point_params, point):
                return cross.stepped(point_params, cross.combined(point, w, shared), inner_learning_rate)

            def better(best, losses):
                return jnp.where(jnp.dot(w, losses) < jnp.dot(w, best), losses, best)

            def inner_step(carry, _):
                point_params, best = carry
                point = at(point_params)
                return (descend(point_params, point), better(best, point.losses)), None

            start = (descend(params, here), here.losses)
            (last, best), _ = jax.lax.scan(inner_step, start, length=inner_steps - 1)
            falls = here.losses - better(best, at(last).losses)

            there = cross.visit(loss_fn, has_aux, params, (val, *rest), forward_mode=chunk_size is not None)
            outer = cross.cross_gramian(there, there, shared, chunk_size)
            down = cross.where_shared(shared, here.pull(w.astype(here.losses.dtype)))
            along = cross.over_tasks(there, lambda _, gradient: cross.inner(gradient, down), chunk_size)
            constraint = Constraint(along, cross.inner(down, down), w * (falls - jnp.sum(w * falls)))
            share, nu, new_inner = advance(outer, constraint, old.inner, present)

            gradient = jax.tree.map(
                lambda a, b: a + (nu * b).astype(a.dtype), there.pull(share.astype(there.losses.dtype)), down
            )
            if not sharing.all_shared(shared):
                own = here.pull(jnp.ones_like(here.losses))
                gradient = sharing.select_shared(shared, gradient, own)
            unknown = jnp.full((num_tasks,), jnp.nan)
            conflicts = jnp.sum(jnp.triu(outer < 0, 1), dtype=jnp.int32)
            new = base.record(old, new_inner, unknown, outer, conflicts, present)
            if method.nonfinite == "skip_step":
                finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, new_inner))]
                usable = jnp.isfinite(here.losses) & jnp.isfinite(there.losses) & jnp.stack(finite).all()
                gradient, new = base.skip(usable, gradient, new, old)
            return ((here.losses, here.aux) if has_aux else here.losses), gradient, new

        return forum_fn

    return from_weighting(weighting, route=route)


def _normalized(outer: jax.Array, constraint: Constraint):
    """1 / |grad F_k| (0 for zero gradients), cosines of the F_k, s f[K] and |grad q| f[]."""
    size, cosine = solvers.row_normalized(outer)
    inverse = solvers.reciprocal(size)
    # The parts for theta and alpha are of any size, and their squares may leave the range of floats.
    root = jnp.sqrt(constraint.squared)
    largest = jnp.maximum(root, jnp.max(jnp.abs(constraint.logits)))
    safe = jnp.where(largest > 0, largest, 1.0)
    norm = largest * jnp.sqrt((root / safe) ** 2 + jnp.sum((constraint.logits / safe) ** 2))
    along = jnp.clip(constraint.along * inverse * solvers.reciprocal(norm), -1.0, 1.0)
    return inverse, cosine, along, norm


def _multipliers(cosine: jax.Array, along: jax.Array, bound: jax.Array, present: jax.Array) -> jax.Array:
    """lambda f[K] of the dual problem, for unit vectors u_k with Gram matrix `cosine`, s = `along` and b = `bound`.

    The best nu for lambda is max(b - s lambda, 0) / |grad q|. If the shortest vector of the hull has s lambda >= b, it
    fulfils the constraint, nu = 0, and lambda is its weights. Otherwise s lambda < b at the solution, and what remains
    is 1/2 lambda (R - s s^T) lambda + b s lambda, with R the cosines.
    """
    free = solvers.min_norm_weights(cosine, present)
    unit = jnp.maximum(bound, 1.0)
    bent = simplex_qp((cosine - jnp.outer(along, along)) / unit, -(bound / unit) * along, present)
    return jnp.where(jnp.dot(along, free, precision=solvers.HIGHEST) >= bound, free, bent)
