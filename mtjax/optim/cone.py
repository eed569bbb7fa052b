r"""Directions in a cone that hurts no task: UPGrad, the projection of the mean (GEM), priority-constrained descent.

    C = {d : <g_k, d> >= 0 for all k},  proj_C(g) = argmin_{d in C} |d - g|
    UPGrad      d = sum_i p_i proj_C(g_i)                                  (Quinton and Rey, 2024)
    DualProj    d = proj_C(sum_i p_i g_i)                                  (Lopez-Paz and Ranzato, 2017)
    PCD         d ~ the vector nearest to g_1 with <g_j, d> >= tau |g_j|^2 for the others (Varam and AlHajri, 2026)

Each projection is g plus a non-negative combination of gradients, found by a quadratic programme on their cosines.

Letters: K tasks; g_k the gradient of task k, n_k its norm; p preferences; d the update direction.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.optim import solvers
from mtjax.optim.base import Method, Weighting, from_weighting


def upgrad(preference: Sequence[float] | None = None) -> Method:
    r"""Unconflicting projection of gradients: the mean of each task's gradient made harmless to all others.

    d = sum_i p_i proj_C(g_i), C = {d : <g_k, d> >= 0 for all k}, p = 1/K each. d is in C, zero only where no task can
    be improved without hurting another, and linear in the length of each gradient: stretching g_i stretches its part.

    Args:
      preference: p, K numbers >= 0.

    Returns:
      A `Method`, scale equivariant. One task: its gradient. Zero gradients constrain nothing and add nothing. Under
      `nonfinite` with "drop_task" the mean is over the tasks that are present; a given p is used as it is.

    Raises:
      ValueError: if `preference` is not a vector of numbers >= 0, or (at the update) not of length K.

    >>> import jax.numpy as jnp
    >>> method = upgrad()
    >>> gradient, _ = method.update(jnp.array([[2.0, 0.0], [-1.0, 1.0]]), method.init(None))
    >>> print(gradient.round(4))  # the mean of (1, 1) and (0, 1)
    [0.5 1. ]

    Reference: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, definition 3. TorchJD (and
      LibMTL) add 1e-4 to the diagonal of the normalised Gramian, and take the plain mean where its trace is below 1e-4;
      neither is done here.
    """
    preference = _preference(preference)

    def weigh(gramian, losses, state, present):
        del losses
        u = _shares(preference, gramian, present)
        projected = jax.vmap(solvers.cone_projection, (None, 0))(gramian, jnp.diag(u))
        return projected.sum(0), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, masked=True))


def dual_proj(preference: Sequence[float] | None = None) -> Method:
    r"""The mean gradient, made harmless to all tasks: its projection on the dual cone of the gradients.

    d = proj_C(sum_i p_i g_i), C = {d : <g_k, d> >= 0 for all k}, p = 1/K each. It is the mean itself unless that
    conflicts with a task.

    Args:
      preference: p, K numbers >= 0.

    Returns:
      A `Method`, scale equivariant. One task: its gradient. Zero gradients constrain nothing and add nothing. Under
      `nonfinite` with "drop_task" the mean is over the tasks that are present; a given p is used as it is.

    Raises:
      ValueError: if `preference` is not a vector of numbers >= 0, or (at the update) not of length K.

    >>> import jax.numpy as jnp
    >>> method = dual_proj()
    >>> gradient, _ = method.update(jnp.array([[4.0, 0.0], [-1.0, 1.0]]), method.init(None))
    >>> print(gradient.round(4))  # the mean (1.5, 0.5) conflicts with the second
    [1. 1.]

    Reference: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, equation 11, with
      the mean in the place of the current task's gradient, as in TorchJD (whose 1e-4 on the diagonal is left out).
    """
    preference = _preference(preference)

    def weigh(gramian, losses, state, present):
        del losses
        return solvers.cone_projection(gramian, _shares(preference, gramian, present)), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, masked=True))


def _preference(preference):
    """f64[K] on the host, checked, or None."""
    if preference is None:
        return None
    vector = np.asarray(preference, np.float64)
    if vector.ndim != 1 or not (np.isfinite(vector).all() and (vector >= 0).all()):
        raise ValueError(f"preference must be a vector of finite numbers >= 0, got {preference!r}")
    return vector


def _shares(preference, gramian, present):
    """f[K]: the preference of the tasks that are present, or one part of the whole each."""
    if preference is None:
        return present / jnp.maximum(jnp.sum(present), 1).astype(gramian.dtype)
    if preference.shape != present.shape:
        raise ValueError(f"preference has {len(preference)} entries, but there are {len(present)} tasks")
    return jnp.where(present, jnp.asarray(preference, gramian.dtype), 0.0)


class PCDState(NamedTuple):
    """State of `pcd`.

    Attributes:
      squared: f[K], bias-corrected moving average of |g_k|^2.
      count: i32[K], how many gradients it has seen.
    """

    squared: jax.Array
    count: jax.Array


def pcd(tau: float = 0.02, *, decay: float = 0.999, primary: int = 0) -> Method:
    r"""Priority-constrained descent: follow one task, and let the others have a fixed share of their progress.

    With g~_k = g_k / sqrt(v_k), v_k the moving average of |g_k|^2,
    d~ = argmin_d 1/2 |d - g~_1|^2  subject to  <g~_j, d> >= tau |g~_j|^2 for all j > 1,  d = |g_1| d~ / |d~|.

    Args:
      tau: in [0, 1], the share of what a step along its own normalised gradient would give a secondary task.
      decay: in [0, 1), of the moving average.
      primary: index of the task that is followed.

    Returns:
      A `Method`, scale equivariant over a whole run. Its state is a `PCDState`. One task: its gradient. d = 0 if the
      primary gradient is zero, or if d~ is (to the rounding of the Gramian). If the constraints contradict one another
      (two opposite secondary gradients, say), they are dropped: d = g_1. Zero secondary gradients constrain nothing.
      If the Gramian is not finite the weights are NaN and the averages stay as they were; if the primary task is absent
      under `nonfinite` with "drop_task", d = 0.

    Raises:
      ValueError: if `tau`, `decay` or (at the update) `primary` is out of range.

    >>> import jax.numpy as jnp
    >>> method = pcd(tau=0.0)
    >>> gradient, _ = method.update(jnp.array([[3.0, 4.0], [-1.0, 0.0]]), method.init(None))
    >>> print(gradient.round(4))
    [0. 5.]

    Reference: Varam and AlHajri, "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
      Multi-Objective Optimization", TMLR 2026, algorithm 1. The paper and TorchJD add 1e-8 to v_k, which leaves
      gradients shorter than 1e-4 unnormalised; here nothing is added. `tau` is one number, as in the paper.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be in [0, 1], got {tau!r}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay!r}")
    log_decay = math.log(decay) if decay > 0 else -math.inf

    def init(num_tasks):
        return PCDState(jnp.zeros((num_tasks,)), jnp.zeros((num_tasks,), jnp.int32))

    def average(state, squared, seen):
        # v <- v + (1 - decay) / (1 - decay^t) (x - v) is the bias-corrected average, and at t = 1 it is x.
        count = state.count + seen
        gain = (1 - decay) / -jnp.expm1(log_decay * jnp.maximum(count, 1).astype(squared.dtype))
        moved = state.squared + jnp.where(count == 1, 1.0, gain) * (squared - state.squared)
        return PCDState(jnp.where(seen, moved, state.squared).astype(state.squared.dtype), count)

    def weigh(gramian, losses, state, present):
        del losses
        num_tasks = len(present)
        if not 0 <= primary < num_tasks:
            raise ValueError(f"primary must be a task index below {num_tasks}, got {primary!r}")
        first = jnp.arange(num_tasks) == primary
        finite = jnp.all(jnp.isfinite(gramian))
        squared = jnp.diagonal(gramian)
        state = average(state, squared, present & finite)

        norm, cosine = solvers.row_normalized(gramian)
        # In units of |g~_1|: nothing but cosines and the ratios |g~_j| / |g~_1| is left.
        size = jnp.sqrt(squared * solvers.reciprocal(state.squared.astype(gramian.dtype)))
        bound = tau * size * solvers.reciprocal(size[primary])
        others = ~first & (norm > 0)
        a = jnp.where(others[:, None] & others[None, :], cosine, 0.0)
        b = jnp.where(others, bound - cosine[primary], 0.0)
        x = solvers.nonnegative_qp(a, b)

        # The objective is b.x / 2. If the constraints contradict one another, most of it comes from the solver's ridge.
        rest = b - jnp.matmul(a, x, precision=solvers.HIGHEST)
        contradictory = 2 * jnp.sum(rest * x) > jnp.sum(b * x)
        v = jnp.where(contradictory, 0.0, x) + first
        # |d~|^2, zero if no more than what rounding the cosines leaves. (For tau = 0 only it can be zero exactly.)
        length = jnp.sum(v * jnp.matmul(cosine, v, precision=solvers.HIGHEST))
        left = length > (2 if tau > 0 else 16) * jnp.finfo(length.dtype).eps * jnp.sum(v) ** 2
        factor = jnp.where(left & (norm[primary] > 0), jax.lax.rsqrt(jnp.where(left, length, 1.0)), 0.0)
        weights = factor * v * jnp.where(first, 1.0, norm[primary] * solvers.reciprocal(norm))
        return jnp.where(finite, weights, jnp.nan), state

    return from_weighting(Weighting(init, weigh, masked=True))
