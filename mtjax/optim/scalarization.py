r"""Methods whose weights are given, drawn, or a formula of the losses: linear, single, scale_invariant, gls, rlw, dwa.

They scalarize: d = sum_k w_k g_k is the gradient of one function of the losses (with what `rlw` draws and `dwa`
remembers held fixed). They cost one backward pass and never look at a per-task gradient, so that
method(s J) = s method(J) for every s > 0 at given losses.

Letters: K tasks; L_k the loss of task k; w_k its weight.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtjax.optim.base import Method, Weighting, from_weighting

# What methods on losses share.


def settle(weights: jax.Array, present: jax.Array, valid: jax.Array) -> jax.Array:
    """The weights as a method hands them out: 0 for tasks that are left out, and NaN for all others if one is invalid.

    Args:
      weights: f[K].
      present: bool[K].
      valid: bool[K], whether what the method has read of each task is within its definition.

    Returns:
      f[K].
    """
    return jnp.where(present, jnp.where(jnp.all(valid | ~present), weights, jnp.nan), 0.0)


def count(present: jax.Array) -> jax.Array:
    """i32[], how many tasks take part; at least 1, to divide by."""
    return jnp.maximum(jnp.sum(present), 1)


def non_negative(losses: jax.Array) -> jax.Array:
    """bool[K]: finite and not negative, the domain of methods that take ratios or logarithms of losses."""
    return jnp.isfinite(losses) & (losses >= 0)


def solved(losses: jax.Array) -> jax.Array:
    """bool[K]: losses of 0. (Subnormal ones count as 0, as they do on most devices; their inverse is infinite.)"""
    return losses < jnp.finfo(losses.dtype).tiny


# Fixed weights.


def linear(weights: Literal["sum", "mean"] | Sequence[float] = "sum") -> Method:
    """Fixed weights: the sum of the losses, their mean, or given weights (linear scalarization).

    Args:
      weights: 'sum' (w_k = 1, what LibMTL calls EW), 'mean' (w_k = 1/K), or K numbers.

    Returns:
      A `Method` whose state holds no arrays of its own.

    Raises:
      ValueError: for another string, or (when the number of tasks is known) a wrong number of weights.

    >>> method = linear([1.0, 0.5])
    >>> method.update(jnp.array([[2.0, 0.0], [0.0, 4.0]]), method.init(None))[0].tolist()
    [2.0, 2.0]
    """
    if isinstance(weights, str) and weights not in ("sum", "mean"):
        raise ValueError(f"weights must be 'sum', 'mean' or a sequence of numbers, got {weights!r}")

    def weigh(gramian, losses, state, present):
        del gramian
        if isinstance(weights, str):
            given = jnp.ones_like(losses) / (1 if weights == "sum" else count(present))
        else:
            given = jnp.asarray(weights, losses.dtype)
        if given.shape != losses.shape:
            raise ValueError(f"linear got {given.size} weights for {losses.size} tasks")
        return jnp.where(present, given, 0.0), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, needs_gramian=False, masked=True))


def single(task: int) -> Method:
    """Trains one task and leaves the others alone (single-task learning): w is one-hot.

    Args:
      task: its position among the losses.

    Returns:
      A `Method` whose state holds no arrays of its own.

    Raises:
      ValueError: for a negative position, or (when the number of tasks is known) one that is too large.

    >>> method = single(1)
    >>> method.update(jnp.array([[2.0, 0.0], [0.0, 4.0]]), method.init(None))[0].tolist()
    [0.0, 4.0]
    """
    if task < 0:
        raise ValueError(f"task must be a position >= 0, got {task}")

    def weigh(gramian, losses, state, present):
        del gramian
        if task >= losses.size:
            raise ValueError(f"single got task {task}, but there are {losses.size} tasks (the first is 0)")
        return jnp.where(present, jax.nn.one_hot(task, losses.size, dtype=losses.dtype), 0.0), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, needs_gramian=False, masked=True))


# Formulas of the losses of this step.


def scale_invariant() -> Method:
    r"""The sum of the logarithms of the losses, which no choice of their units can change.

    minimise sum_k log L_k,  hence w_k = 1 / L_k.

    Returns:
      A `Method`; `update` needs `losses=`. With K = 1, d = g / L. Defined for losses >= 0: a loss of exactly 0 is a
      solved task and gets weight 0 (near 0 weights grow without bound); a negative loss makes all weights NaN.

    >>> method = scale_invariant()
    >>> method.update(jnp.eye(2), method.init(None), losses=jnp.array([2.0, 0.5]))[0].tolist()
    [0.5, 2.0]

    Reference: the baseline SI of Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022. Their code does
      not guard L <= 0.
    """

    def weigh(gramian, losses, state, present):
        del gramian
        zero = solved(losses)
        weights = jnp.where(zero, 0.0, 1.0 / jnp.where(zero, 1.0, losses))
        return settle(weights, present, non_negative(losses)), state

    weighting = Weighting(lambda num_tasks: (), weigh, needs_gramian=False, needs_losses=True, masked=True)
    return from_weighting(weighting)


def gls() -> Method:
    r"""Geometric loss strategy: the geometric mean of the losses.

    minimise GM = (prod_k L_k)^{1/K},  hence w_k = GM / (K L_k) = exp(mean_j log L_j - log L_k) / K.

    Computed by logarithms: a product of many losses leaves the range of floating point, their mean logarithm does not.

    Returns:
      A `Method`; `update` needs `losses=`. With K = 1, d = g. Defined for losses >= 0: if one of K > 1 losses is
      exactly 0, so is GM, its minimum, and all weights are 0; a negative loss makes all weights NaN. Multiplying a loss
      by s multiplies d by s^{1/K} and leaves its direction.

    >>> method = gls()
    >>> print(method.update(jnp.eye(2), method.init(None), losses=jnp.array([1.0, 4.0]))[0].round(4))
    [1.   0.25]

    Reference: Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for
      Multi-Task Learning", CVPR Workshops 2019. TorchJD's GeometricMean is the same except at 0, where its gradient is
      NaN; LibMTL multiplies the losses, which underflows (40 losses of 0.01 give NaN in float32).
    """

    def weigh(gramian, losses, state, present):
        del gramian
        zero, num_present = present & solved(losses), count(present)
        logarithm = jnp.log(jnp.where(present & ~zero, losses, 1.0))
        weights = jnp.exp(jnp.sum(logarithm) / num_present - logarithm) / num_present
        weights = jnp.where(jnp.any(zero) & (num_present > 1), 0.0, weights)
        return settle(weights, present, non_negative(losses)), state

    weighting = Weighting(lambda num_tasks: (), weigh, needs_gramian=False, needs_losses=True, masked=True)
    return from_weighting(weighting)


# Random weights.


def rlw(seed: int = 0) -> Method:
    r"""Random loss weighting: new weights at each step, w = softmax(z) with z_k ~ N(0, 1).

    A control: a method that does no better than this one has not been shown to do anything.

    Args:
      seed: of the weights; the key is the state.

    Returns:
      A `Method`. Weights are positive and sum to 1; with K = 1, d = g. See `mtjax.optim.rgw` for heads that are not
      weighted.

    Reference: Lin, Ye, Zhang and Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
      Learning", TMLR 2022. LibMTL (RLW) and TorchJD (Random) are the same.
    """

    def weigh(gramian, losses, key, present):
        del gramian
        key, draw = jax.random.split(key)
        # The j-th task that takes part gets the j-th number: what it would get if there were no others.
        z = jax.random.normal(draw, losses.shape, losses.dtype)[jnp.cumsum(present) - 1]
        return jax.nn.softmax(z, where=present), key

    return from_weighting(Weighting(lambda num_tasks: jax.random.key(seed), weigh, needs_gramian=False, masked=True))


# A formula of the losses of earlier steps.


class DwaState(NamedTuple):
    """State of `dwa`.

    Attributes:
      total: f[K], sum of each task's losses in the current window.
      observed: i32[K], how many losses `total` adds up.
      last: f[K], mean loss of each task in its last complete window.
      before: f[K], that of the window before.
      windows: i32[K], how many complete windows each task has been seen in.
      step: i32[], steps made in the current window.
    """

    total: jax.Array
    observed: jax.Array
    last: jax.Array
    before: jax.Array
    windows: jax.Array
    step: jax.Array


def dwa(temperature: float = 2.0, *, window: int = 1) -> Method:
    r"""Dynamic weight average: tasks whose loss falls more slowly get more weight.

    w_k = K softmax_k(r_k / T),  r_k = mean of L_k over the last window / mean of L_k over the window before.

    Args:
      temperature: T; the larger, the more uniform.
      window: steps of one window. The paper averages over epochs: pass the number of steps of an epoch.

    Returns:
      A `Method`; `update` needs `losses=`. Weights are positive and sum to K; with K = 1, d = g. They are uniform
      during the first two windows, and r_k = 1 for a task that has not been seen in two. 0 / 0 counts as r_k = 1; a
      loss that comes back from exactly 0 has the largest r_k there is, and takes all the weight. Meant for losses > 0:
      for negative ones the result is finite, but r_k < 1 then says that the loss has risen.

    Raises:
      ValueError: if `temperature` <= 0 or `window` < 1.

    Reference: Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, "Dynamic Weight
      Average". LibMTL and TorchJD are the same (both are told when an epoch ends). The code of Nash-MTL compares two
      halves of the last 2 x 25 steps anew at each step, and starts from losses of 1.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if window < 1:
        raise ValueError(f"window must be a number of steps >= 1, got {window}")

    def init(num_tasks):
        zeros, none = jnp.zeros((num_tasks,)), jnp.zeros((num_tasks,), jnp.int32)
        return DwaState(zeros, none, zeros, zeros, none, jnp.zeros((), jnp.int32))

    def weigh(gramian, losses, state, present):
        del gramian
        unknown = (state.windows < 2) | ((state.last == 0) & (state.before == 0))
        rate = jnp.where(unknown, 1.0, state.last) / jnp.where(unknown, 1.0, state.before) / temperature
        largest = jnp.finfo(rate.dtype).max
        share = jax.nn.softmax(jnp.clip(rate, -largest, largest), where=present)

        # Roll over at the end of a window; a task that was absent all along keeps its history.
        total = state.total + jnp.where(present, losses, 0.0)
        observed = state.observed + present
        step = (state.step + 1) % window
        ended = step == 0
        rolls = ended & (observed > 0)
        state = DwaState(
            jnp.where(ended, 0.0, total),
            jnp.where(ended, 0, observed),
            jnp.where(rolls, total / jnp.maximum(observed, 1), state.last),
            jnp.where(rolls, state.last, state.before),
            state.windows + rolls,
            step,
        )
        return settle(count(present) * share, present, jnp.isfinite(losses)), state

    return from_weighting(Weighting(init, weigh, needs_gramian=False, needs_losses=True, masked=True))
