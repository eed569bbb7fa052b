r"""FAMO: every loss falls by the same factor, learned from what each step has done to the losses.

Fast adaptive multitask optimisation descends the logarithms of the losses, weighted by z = softmax(xi). How fast they
fell is known once the parameters have moved: the losses of the same batch are computed again, and xi takes a step
towards the tasks that fell least. This costs one backward pass and one more forward pass for any number of tasks.

The second evaluation is the training loop's: where `mtjax.optim.observes(method)`, it calls
`mtjax.optim.observe(method, state, losses)` after the step. Without that call xi never changes.

Letters: K tasks; L_k the loss of task k, b_k a lower bound of it; g_k its gradient, w_k its weight.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtjax.optim import base
from mtjax.optim.base import Method, Weighting, from_weighting
from mtjax.optim.learned_weights import step_present
from mtjax.optim.scalarization import non_negative, settle


class FamoState(NamedTuple):
    """State of `famo`.

    Attributes:
      logits: f[K], xi; z = softmax(xi).
      before: f[K], log(L_k - b_k) at the last update.
      waiting: bool[K], tasks whose losses after that update have yet to be observed.
      optimizer_state: state of the optimiser of xi.
    """

    logits: jax.Array
    before: jax.Array
    waiting: jax.Array
    optimizer_state: Any


def famo(
    learning_rate: float = 0.025, *, weight_decay: float = 1e-3, min_losses: float | Sequence[float] = 0.0
) -> Method:
    r"""Fast adaptive multitask optimisation: equal rates of decrease of all log-losses, at the cost of one task.

    w_k = c z_k / (L_k - b_k),  z = softmax(xi),  c such that sum_k w_k = 1;
    after the step, xi <- Adam on  J_softmax(xi)^T delta + weight_decay xi,
    delta_k = log(L_k - b_k) before - log(L_k - b_k) after, on the same batch.

    Args:
      learning_rate: of xi.
      weight_decay: gamma of the paper, which draws z back to uniform.
      min_losses: b, one number or one for each task.

    Returns:
      A `Method`; `update` needs `losses=`, and `mtjax.optim.observe` the losses after the step. Until it is called xi
      stays at 0, where w is proportional to 1 / (L_k - b_k). Weights are not negative and sum to 1; with K = 1, d = g.
      Units of the losses do not matter, and method(s J) = s method(J) at given losses. A loss of exactly b_k counts as
      the smallest normal number, which is the limit: it takes all the weight, so that a task which is solved, or has no
      labels in the batch, stops the others for this step (`nonfinite(famo(), 'drop_task', drop_zero=True)` leaves it
      out, at the price of K gradients). A loss below b_k makes all weights NaN.

    Raises:
      ValueError: for a negative number, or (when the number of tasks is known) a wrong number of bounds.

    >>> import jax.numpy as jnp, mtjax
    >>> method = famo()
    >>> _, state = method.update(jnp.eye(2), method.init(None), losses=jnp.array([1.0, 3.0]))
    >>> [round(weight, 3) for weight in state.weights.tolist()]
    [0.75, 0.25]
    >>> state = mtjax.optim.observe(method, state, jnp.array([0.5, 3.0]))  # the first fell, the second did not
    >>> [round(logit, 3) for logit in state.inner.logits.tolist()]
    [-0.025, 0.025]

    Reference: Liu, Feng, Stone and Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, algorithm 2. The
      authors' scripts set weight_decay to 1e-3 on NYU-v2, CelebA and QM9 and to 1e-2 on Cityscapes (the defaults of the
      two classes in their code are 1e-5 and 1e-2), and clip the norm of the update to 1, which is left to optax here.
      They, LibMTL and TorchJD add 1e-8 to L_k - b_k, so that smaller losses count as 1e-8; nothing is added here.
    """
    if not (learning_rate >= 0 and weight_decay >= 0):
        raise ValueError(f"learning_rate and weight_decay must be >= 0, got {learning_rate} and {weight_decay}")
    optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))

    def log_gap(losses):
        bounds = jnp.asarray(min_losses, losses.dtype)
        if bounds.shape not in ((), losses.shape):
            raise ValueError(f"famo got {bounds.size} min_losses for {losses.size} tasks")
        gap = losses - bounds
        return jnp.log(jnp.where(non_negative(gap), jnp.maximum(gap, jnp.finfo(gap.dtype).tiny), jnp.nan))

    def init(num_tasks):
        zeros = jnp.zeros((num_tasks,))
        return FamoState(zeros, zeros, jnp.zeros((num_tasks,), bool), optimizer.init(zeros))

    def weigh(gramian, losses, state, present):
        del gramian
        before = log_gap(losses)
        weights = jax.nn.softmax(state.logits - before, where=present)
        state = state._replace(before=jnp.where(present, before, state.before), waiting=present)
        return settle(weights, present, ~jnp.isnan(before)), state

    def observe(losses, state, present):
        told = state.waiting & present
        delta = jnp.where(told, state.before - log_gap(losses), 0.0)
        z = jnp.where(told, jax.nn.softmax(state.logits, where=told), 0.0)
        slope = z * (delta - jnp.sum(z * delta))
        logits, optimizer_state = step_present(optimizer, slope, state.optimizer_state, state.logits, told)
        new = FamoState(logits, state.before, jnp.zeros_like(told), optimizer_state)
        return base.choose(jnp.any(told), new, state)

    return from_weighting(Weighting(init, weigh, needs_gramian=False, needs_losses=True, masked=True, observe=observe))
