"""Methods that need only the losses: a weighted sum, whose weights are fixed or learned from the losses.

They cost one backward pass (`value_and_weighted_grad` knows) and never look at a per-task gradient.

Letters: K tasks.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtjax.optim.base import Method, Weighting, from_weighting


def linear(weights: Literal["sum", "mean"] | Sequence[float] = "sum") -> Method:
    """Fixed weights: the sum of the losses, their mean, or given weights (linear scalarization).

    Args:
      weights: 'sum' (w_k = 1, what LibMTL calls EW), 'mean' (w_k = 1/K), or K numbers; a one-hot vector trains one
        task.

    Returns:
      A `Method` whose state holds no arrays of its own.

    Raises:
      ValueError: for another string, or (when the number of tasks is known) a wrong number of weights.

    >>> linear([1.0, 0.5]).weighting.weigh(None, jnp.ones(2), ())[0].tolist()
    [1.0, 0.5]
    """
    if isinstance(weights, str) and weights not in ("sum", "mean"):
        raise ValueError(f"weights must be 'sum', 'mean' or a sequence of numbers, got {weights!r}")

    def weigh(gramian, losses, state):
        del gramian
        num_tasks = losses.shape[0]
        if isinstance(weights, str):
            return jnp.full((num_tasks,), 1.0 if weights == "sum" else 1.0 / num_tasks), state
        given = jnp.asarray(weights, jnp.float32)
        if given.shape != (num_tasks,):
            raise ValueError(f"linear got {given.size} weights for {num_tasks} tasks")
        return given, state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, needs_gramian=False))


class UncertaintyState(NamedTuple):
    """State of `uncertainty`.

    Attributes:
      log_variance: f32[K], s_k = log sigma_k^2.
      optimizer_state: state of the optimiser of s.
    """

    log_variance: jax.Array
    optimizer_state: Any


def uncertainty(
    optimizer: optax.GradientTransformation | None = None,
    *,
    init_log_variance: float = 0.0,
    scale: float | Sequence[float] = 0.5,
) -> Method:
    r"""Uncertainty weighting: learned homoscedastic noise of each task.

    minimise over theta and s: sum_k ( scale_k e^{-s_k} L_k + s_k / 2 ),  hence w_k = scale_k e^{-s_k}.

    The s_k are learned by an optimiser of their own, never by the model's, whose weight decay would pull them to 0
    (as happens in LibMTL). Each update weighs with the current s and then takes one step on s.

    Args:
      optimizer: optimiser of s; by default `optax.adam(1e-3)`. The paper uses the model's: pass the same learning rate.
      init_log_variance: s at the start: 0 (TorchJD); LibMTL uses -0.5.
      scale: 1/2 for Gaussian likelihoods (the form that LibMTL and TorchJD use for all losses); the paper takes 1 for
        softmax classification. One number, or one for each task.

    Returns:
      A `Method`; `update` needs `losses=`. For constant losses s_k converges to log(2 scale_k L_k), w_k to 1 / (2 L_k).

    Raises:
      ValueError: when the number of tasks is known and that of the scales is another.

    Reference: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
      Semantics", CVPR 2018, equations 7 and 10.
    """
    optimizer = optimizer or optax.adam(1e-3)

    def init(num_tasks):
        log_variance = jnp.full((num_tasks,), init_log_variance, jnp.float32)
        return UncertaintyState(log_variance, optimizer.init(log_variance))

    def weigh(gramian, losses, state):
        del gramian
        given = jnp.asarray(scale, jnp.float32)
        if given.shape not in ((), losses.shape):
            raise ValueError(f"uncertainty got {given.size} scales for {losses.shape[0]} tasks")
        weights = given * jnp.exp(-state.log_variance)
        gradient = 0.5 - weights * losses
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.log_variance)
        return weights, UncertaintyState(state.log_variance + updates, optimizer_state)

    return from_weighting(Weighting(init, weigh, needs_gramian=False, needs_losses=True))
