r"""Methods whose weights are learned from the losses by an optimiser of their own: uncertainty weighting and IMTL-L.

Each has one number s_k per task and an objective in (theta, s); d is its gradient in theta. An update weighs with the
current s, then takes one step on s. The optimiser is the method's, never the model's, whose weight decay would pull s
to 0 (as happens in LibMTL). One backward pass; at given losses method(s J) = s method(J) for every s > 0.

Letters: K tasks; L_k the loss of task k; w_k its weight.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtjax.optim.base import Method, Weighting, from_weighting
from mtjax.optim.scalarization import settle


def step_present(
    optimizer: optax.GradientTransformation,
    gradient: jax.Array,
    optimizer_state: Any,
    variable: jax.Array,
    present: jax.Array,
) -> tuple[jax.Array, Any]:
    """One step on a vector f[K] with a number for each task, which leaves those of absent tasks as they are.

    Args:
      optimizer: any optax optimiser.
      gradient: f[K].
      optimizer_state: its state; leaves of shape [K] are taken to be per task (moments), others to be common (counts).
      variable: f[K].
      present: bool[K].

    Returns:
      The variable and the optimiser's state after the step.
    """
    updates, stepped = optimizer.update(jnp.where(present, gradient, 0.0), optimizer_state, variable)

    def keep(new, old):
        return jnp.where(present, new, old) if jnp.shape(new) == present.shape else new

    return keep(variable + updates, variable), jax.tree.map(keep, stepped, optimizer_state)


def _bounded(weights: jax.Array) -> jax.Array:
    """At most the largest number: infinity times the gradient 0 of a task whose loss stays at 0 would be NaN."""
    return jnp.minimum(weights, jnp.finfo(weights.dtype).max)


class UncertaintyState(NamedTuple):
    """State of `uncertainty`.

    Attributes:
      log_variance: f[K], s_k = log sigma_k^2.
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

    Args:
      optimizer: optimiser of s; by default `optax.adam(1e-3)`. The paper uses the model's: pass the same learning rate.
      init_log_variance: s at the start: 0 (TorchJD); LibMTL uses -0.5.
      scale: 1/2 for Gaussian likelihoods (the form that LibMTL and TorchJD use for all losses); the paper takes 1 for
        softmax classification. One number, or one for each task.

    Returns:
      A `Method`; `update` needs `losses=`. For constant losses s_k converges to log(2 scale_k L_k), w_k to 1 / (2 L_k);
      for K = 1 too, so that d is not the plain gradient. The weight of a loss that stays at 0 grows up to the largest
      number of the dtype; that of a negative loss, which has no optimum, grows ever faster.

    Raises:
      ValueError: when the number of tasks is known and that of the scales is another.

    Reference: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
      Semantics", CVPR 2018, equations 7 and 10.
    """
    optimizer = optimizer or optax.adam(1e-3)

    def init(num_tasks):
        log_variance = jnp.zeros((num_tasks,)) + init_log_variance
        return UncertaintyState(log_variance, optimizer.init(log_variance))

    def weigh(gramian, losses, state, present):
        del gramian
        given = jnp.asarray(scale, losses.dtype)
        if given.shape not in ((), losses.shape):
            raise ValueError(f"uncertainty got {given.size} scales for {losses.size} tasks")
        weights = _bounded(given * jnp.exp(-state.log_variance))
        stepped = step_present(optimizer, 0.5 - weights * losses, state.optimizer_state, state.log_variance, present)
        return settle(weights, present, jnp.isfinite(losses)), UncertaintyState(*stepped)

    return from_weighting(Weighting(init, weigh, needs_gramian=False, needs_losses=True, masked=True))


class ImtlLState(NamedTuple):
    """State of `imtl_l`.

    Attributes:
      log_scale: f[K], s_k, logarithm of the weight.
      optimizer_state: state of the optimiser of s.
    """

    log_scale: jax.Array
    optimizer_state: Any


def imtl_l(optimizer: optax.GradientTransformation | None = None) -> Method:
    r"""The loss-balancing half of impartial multi-task learning: learned scales that bring every loss to 1.

    minimise over theta and s: sum_k ( e^{s_k} L_k - s_k ),  hence w_k = e^{s_k}.

    It is `uncertainty` with -s for s and twice the objective. (The method's other half, IMTL-G, balances gradients.)

    Args:
      optimizer: optimiser of s; by default `optax.adam(1e-3)`. The paper uses the model's: pass the same learning rate.

    Returns:
      A `Method`; `update` needs `losses=`. s starts at 0. For constant losses w_k converges to 1 / L_k; for K = 1 too,
      so that d is not the plain gradient. The weight of a loss that stays at 0 grows up to the largest number of the
      dtype; that of a negative loss, which has no optimum, grows ever faster.

    Reference: Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, "loss balance". TorchJD's IMTLL is the
      same with s among the model's parameters; LibMTL has it only joined to IMTL-G.
    """
    optimizer = optimizer or optax.adam(1e-3)

    def init(num_tasks):
        log_scale = jnp.zeros((num_tasks,))
        return ImtlLState(log_scale, optimizer.init(log_scale))

    def weigh(gramian, losses, state, present):
        del gramian
        weights = _bounded(jnp.exp(state.log_scale))
        stepped = step_present(optimizer, weights * losses - 1.0, state.optimizer_state, state.log_scale, present)
        return settle(weights, present, jnp.isfinite(losses)), ImtlLState(*stepped)

    return from_weighting(Weighting(init, weigh, needs_gramian=False, needs_losses=True, masked=True))
