r"""Sets of solutions: many trade-offs at once, one network for each preference vector.

One update minimises one compromise. To see the whole front, train N copies, each with a preference r_n over the tasks,
in one vmapped program:

* scalarizations know where to go by their preference: `linear(r)`, `tchebycheff(r)`, `stch(r)`, `cosmos(r)`, `pbi(r)`;
* `epo` looks for the point where r_k L_k is the same for all tasks, exactly on the preference's ray;
* `pmtl` keeps each copy in the sector of the loss space that is nearest to its preference vector;
* `hypervolume_weights` needs no preferences: the copies spread by maximising the volume that they dominate together.

`value_and_set_update` runs the first three kinds, `value_and_hypervolume_update` the last; `hypervolume` measures sets.

Letters: N solutions, K tasks.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mtjax import gradients
from mtjax.optim import solvers
from mtjax.optim.base import Method, Weighting, from_weighting
from mtjax.optim.linear_program import simplex_lp
from mtjax.optim.routes import value_and_update

PyTree = Any


def preference_vectors(num_tasks: int, divisions: int) -> np.ndarray:
    """All preference vectors on a regular grid of the simplex: C(divisions + K - 1, K - 1) of them.

    Args:
      num_tasks: K.
      divisions: steps along each edge of the simplex, >= 1.

    Returns:
      f64[N, K], rows >= 0 that sum to one, in lexicographic order.

    Raises:
      ValueError: for sizes below 1.

    >>> preference_vectors(2, 4).tolist()
    [[0.0, 1.0], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]

    Reference: Das and Dennis, "Normal-Boundary Intersection", SIAM J. Optim. 1998.
    """
    if num_tasks < 1 or divisions < 1:
        raise ValueError(f"num_tasks and divisions must be >= 1, got {num_tasks} and {divisions}")
    # Stars and bars: K - 1 bars among divisions + K - 1 places; the stars between two bars are one component.
    places = divisions + num_tasks - 1
    bars = itertools.combinations(range(places), num_tasks - 1)
    return np.array([np.diff((-1, *chosen, places)) - 1 for chosen in bars]) / divisions


def _checked_preference(preference: ArrayLike, name: str) -> jax.Array:
    """f[K]; values are checked if they are known."""
    if not isinstance(preference, jax.core.Tracer):
        values = np.asarray(preference)
        if values.ndim != 1 or not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
            raise ValueError(f"{name} takes one number >= 0 for each task, not all of them 0; got {values.tolist()}")
    return jnp.asarray(preference, float)


def epo(preference: ArrayLike, *, tolerance: float = 1e-3) -> Method:
    r"""Exact Pareto optimal search: the Pareto optimal point with r_1 L_1 = ... = r_K L_K.

    With l_hat = r L / sum(r L), non-uniformity mu = sum l_hat log(K l_hat) and the anchoring direction
    a = r (log(K l_hat) - mu), G a is how fast each loss falls along J^T a. While mu > tolerance, weights are the LP
    argmax_{w in simplex} w^T G a that lets no loss fall slower than along J^T a (balance; the largest r_k L_k may not
    rise); after that argmax sum(G w) with G w >= 0 and the balance kept (descent).

    Args:
      preference: r f[K] >= 0; may be traced, to vmap over a set.
      tolerance: of mu below which the losses count as balanced.

    Returns:
      A `Method`; `update` needs `losses=`, which must be >= 0 (NaN otherwise). Scale equivariant in J. K = 1: g. With
      all r_k L_k zero it descends.

    Raises:
      ValueError: if the preference is not one number >= 0 for each task.

    Reference: Mahapatra and Rajan, "Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent
      in Pareto Optimization", ICML 2020, section 4 (algorithm 1 with the LP of equation 24). The authors call GLPK;
      here `simplex_lp` solves the same programme, elastically where it has no solution.
    """
    preference = _checked_preference(preference, "epo")

    def weigh(gramian, losses, state, present):
        count = jnp.sum(present)
        r = jnp.where(present, preference, 0.0)
        rl = r * losses
        total = jnp.sum(rl)
        share = rl / jnp.where(total > 0, total, 1.0)
        positive = share > 0
        log = jnp.where(positive, jnp.log(jnp.where(positive, count * share, 1.0)), 0.0)
        mu = jnp.sum(share * log)
        # A solved task has log 0 = -inf; any very negative number says the same: it can wait.
        eps = jnp.finfo(losses.dtype).eps
        anchor = r * (jnp.where(positive, log, jnp.log(eps)) - mu)
        scale = jnp.max(jnp.diagonal(gramian))
        gram = gramian / jnp.where(scale > 0, scale, 1.0)
        rise = jnp.matmul(gram, anchor, precision=solvers.HIGHEST)

        largest = rl >= jnp.max(rl) * (1 - 4 * eps)
        anyone = jnp.any((rise > 0) & present)
        bound = jnp.where(anyone, jnp.where(largest, 0.0, rise), 0.0)
        kept = jnp.where(anyone, largest | ~(rise > 0), True) & present
        barred = jnp.where(present, 0.0, -2 * jnp.max(jnp.abs(rise)) - 1.0)  # absent tasks: never worth a weight
        balance = simplex_lp(rise + barred, gram, bound, kept)

        gain = jnp.sum(gram, axis=0)
        barred = jnp.where(present, 0.0, -2 * jnp.max(jnp.abs(gain)) - 1.0)
        rows = jnp.concatenate([gram, rise[None]])
        bounds = jnp.append(jnp.zeros_like(rise), jnp.minimum(jnp.max(jnp.where(present, rise, -jnp.inf)), 0.0))
        descent = simplex_lp(gain + barred, rows, bounds, jnp.append(present, True))

        weights = jnp.where(present, jnp.where(mu > tolerance, balance, descent), 0.0)
        weights = weights / jnp.where(jnp.any(present), jnp.sum(weights), 1.0)
        valid = jnp.isfinite(losses).all() & (losses >= 0).all() & jnp.isfinite(gramian).all()
        return jnp.where(valid, weights, jnp.nan), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, needs_losses=True, masked=True))


class PmtlState(NamedTuple):
    """State of `pmtl`: found bool[], whether the losses have been in the sector (the first stage is over)."""

    found: jax.Array


def pmtl(preferences: ArrayLike, index: int | jax.Array) -> Method:
    r"""Pareto multi-task learning: a solution in the sector of preference vector u_i.

    The sector holds the loss vectors L with u_i . L >= u_j . L for all j (unit vectors). Constraints that are violated
    or active, (u_j - u_i) . L >= 0, count as objectives: in the first stage alone, until the losses are in the sector,
    then beside the tasks. d is the shortest vector in the convex hull of their gradients, hence weights on the tasks.

    Args:
      preferences: u f[N, K] >= 0, the vectors that cut the loss space into sectors.
      index: i, which of them is this solution's; may be traced.

    Returns:
      A `Method`; `update` needs `losses=`. Scale equivariant in J. Weights may be negative (a constraint's gradient is
      a difference of tasks' gradients).

    Raises:
      ValueError: if `preferences` is not [N, K].

    Reference: Lin, Zhen, Li, Zhang and Kwong, "Pareto Multi-Task Learning", NeurIPS 2019, equations 9-14. The authors
      run the first stage for a number of epochs; here it ends when its aim is reached.
    """
    preferences = jnp.asarray(preferences, float)
    if preferences.ndim != 2:
        raise ValueError(f"preferences must be an array [N, K] of N vectors, got shape {preferences.shape}")

    def weigh(gramian, losses, state, present):
        unit = jnp.where(present[None], preferences, 0.0)
        norm = jnp.linalg.norm(unit, axis=1, keepdims=True)
        unit = unit / jnp.where(norm > 0, norm, 1.0)
        others = unit - unit[index][None]  # [N, K]; the row of i itself is zero
        excess = jnp.where(jnp.any(others != 0, axis=1), jnp.matmul(others, losses, precision=solvers.HIGHEST), -1.0)
        found = state.found | ~jnp.any(excess > 0)
        taking_part = jnp.concatenate([present & found, excess >= 0])
        rows = jnp.concatenate([jnp.eye(losses.size, dtype=gramian.dtype), others])
        rows = jnp.where(taking_part[:, None], rows, 0.0)
        extended = jnp.matmul(jnp.matmul(rows, gramian, precision=solvers.HIGHEST), rows.T, precision=solvers.HIGHEST)
        mixture = solvers.min_norm_weights(0.5 * (extended + extended.T), taking_part)
        weights = jnp.where(present, jnp.matmul(rows.T, mixture, precision=solvers.HIGHEST), 0.0)
        return jnp.where(jnp.isfinite(losses).all(), weights, jnp.nan), PmtlState(found)

    return from_weighting(
        Weighting(lambda num_tasks: PmtlState(jnp.array(False)), weigh, needs_losses=True, masked=True)
    )


def hypervolume(losses: ArrayLike, reference: ArrayLike, present: ArrayLike | None = None) -> jax.Array:
    r"""Volume of the losses that at least one solution dominates, up to a reference point: more is better.

    By slicing: the points are sorted along the last objective, and between two neighbours the volume is the width of
    the slab times the (K-1)-dimensional volume of the points so far. Exact, differentiable almost everywhere, and of
    order N^K in work: meant for sets of tens of solutions and up to four objectives.

    Args:
      losses: f[N, K].
      reference: f[K], the worst losses of interest; solutions beyond it in any objective count for nothing.
      present: bool[N], the solutions to count; by default all.

    Returns:
      f[].

    Raises:
      ValueError: for shapes that do not fit.

    >>> hypervolume(jnp.array([[1.0, 3.0], [2.0, 1.0], [2.5, 2.5]]), jnp.array([4.0, 4.0])).item()
    7.0
    """
    losses, reference = jnp.asarray(losses, float), jnp.asarray(reference, float)
    if losses.ndim != 2 or reference.shape != losses.shape[1:]:
        raise ValueError(
            f"hypervolume takes losses [N, K] and a reference [K], got {losses.shape} and {reference.shape}"
        )
    inside = jnp.all(losses < reference[None], axis=1)
    inside = inside if present is None else inside & jnp.asarray(present)
    return _sliced(jnp.minimum(losses, reference[None]), reference, inside)


def _sliced(points: jax.Array, reference: jax.Array, present: jax.Array) -> jax.Array:
    last = jnp.where(present, points[:, -1], reference[-1])
    if points.shape[1] == 1:
        return reference[0] - jnp.min(last)
    order = jnp.argsort(last)
    points, present, last = points[order], present[order], last[order]
    widths = jnp.append(last[1:], reference[-1]) - last
    so_far = present[None] & (jnp.arange(len(last))[None] <= jnp.arange(len(last))[:, None])
    volumes = jax.vmap(lambda those: _sliced(points[:, :-1], reference[:-1], those))(so_far)
    return jnp.sum(widths * volumes)


def hypervolume_weights(losses: jax.Array, reference: ArrayLike) -> jax.Array:
    r"""Weights w_nk = - d HV / d L_nk of a set of solutions, dominated ones included, each row of length one.

    The gradient of the hypervolume is zero for dominated solutions. They are therefore sorted into fronts (those that
    nobody dominates, then the same without these, ...), and every front has its own volume.

    Args:
      losses: f[N, K].
      reference: f[K]; losses beyond it are first brought back by the plain sum.

    Returns:
      f[N, K], rows of Euclidean length one, >= 0.

    Reference: Deist, Grewal, Dankers, Alderliesten and Bosman, "Multi-Objective Learning to Predict Pareto Fronts Using
      Hypervolume Maximization", 2021; Wang et al., "Hypervolume Indicator Gradient Ascent", EMO 2017.
    """
    losses, reference = jnp.asarray(losses, float), jnp.asarray(reference, float)
    number = len(losses)
    below = jnp.all(losses[:, None] <= losses[None], axis=2) & jnp.any(losses[:, None] < losses[None], axis=2)

    def peel(carry, index):
        left, front = carry
        best = left & ~jnp.any(below & left[:, None], axis=0)
        return (left & ~best, jnp.where(best, index, front)), None

    start = (jnp.ones((number,), bool), jnp.zeros((number,), jnp.int32))
    (_, front), _ = jax.lax.scan(peel, start, jnp.arange(number, dtype=jnp.int32))

    def volume(points):
        fronts = front[None] == jnp.arange(number)[:, None]
        return jnp.sum(jax.vmap(lambda those: hypervolume(points, reference, those))(fronts))

    weights = -jax.grad(volume)(losses)
    outside = ~jnp.all(losses < reference[None], axis=1) | (jnp.sum(weights, axis=1) == 0)
    weights = jnp.where(outside[:, None], 1.0, weights)
    return weights / jnp.linalg.norm(weights, axis=1, keepdims=True)


def value_and_set_update(loss_fn: Callable, method_of: Callable[[jax.Array], Method]) -> Callable:
    """`mtjax.value_and_update` for N solutions at once, each with its own preference.

    Args:
      loss_fn: as for `mtjax.value_and_update`.
      method_of: preference f[K] (traced) -> method, e.g. `mtjax.optim.epo` or `lambda r: mtjax.optim.stch(r)`.

    Returns:
      A function `(params, states, preferences f[N, K], *args) -> (losses f[N, K], gradients, states)`; parameters,
      states and gradients have a leading axis N, `args` are the same for all. States come from
      `jax.vmap(lambda p, r: mtjax.optim.init(method_of(r), p, num_tasks=K))(params, preferences)`.
    """

    def set_update(params, states, preferences, *args):
        def one(params, state, preference):
            return value_and_update(loss_fn, method_of(preference))(params, state, *args)

        return jax.vmap(one)(params, states, jnp.asarray(preferences, float))

    return set_update


def value_and_hypervolume_update(loss_fn: Callable, reference: ArrayLike) -> Callable:
    """Losses and the gradients that spread N solutions over the front by maximising their common hypervolume.

    Args:
      loss_fn: `(params, *args) -> losses`.
      reference: f[K], see `hypervolume`.

    Returns:
      A function `(params, *args) -> (losses f[N, K], gradients)`; parameters and gradients have a leading axis N. One
      forward and one backward pass of each solution.
    """

    def set_update(params, *args):
        def all_losses(params):
            return jax.vmap(lambda p: gradients.stack_losses(loss_fn(p, *args)))(params)

        losses, pullback = jax.vjp(all_losses, params)
        return losses, pullback(hypervolume_weights(losses, reference))[0]

    return set_update
