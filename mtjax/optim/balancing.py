r"""Methods that balance the magnitudes of per-task gradients and leave their directions alone.

GradNorm learns weights that bring gradient norms to a common size, larger for tasks that lag behind. `norm_balance` and
`ntk_balance`, from physics-informed networks, set weights by a formula and smooth them over time. `rgw` draws them. All
others read the diagonal of the Gramian, G_kk = n_k^2. For every s > 0, method(s J) = s method(J).

Letters: K tasks; g_k the gradient of task k, n_k its norm, L_k its loss, w_k its weight.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtjax.optim.base import Method, Weighting, from_weighting
from mtjax.optim.learned_weights import step_present
from mtjax.optim.scalarization import count, non_negative, rlw, settle, solved
from mtjax.optim.wrappers import on_shared


def _mean(x: jax.Array, present: jax.Array) -> jax.Array:
    """f[], mean over the tasks that take part."""
    return jnp.sum(jnp.where(present, x, 0.0)) / count(present)


def _divide(x: jax.Array, y: jax.Array, otherwise: float) -> jax.Array:
    """x / y, and `otherwise` where y is 0."""
    return jnp.where(y == 0, otherwise, x / jnp.where(y == 0, 1.0, y))


class GradNormState(NamedTuple):
    """State of `gradnorm`.

    Attributes:
      task_weights: f[K], weights of the next step; of sum K.
      initial_losses: f[K], L_k(0): the first loss of each task that was not 0; 0 before.
      unit: f[], mean gradient norm of the first step, in which norms are measured; 0 before.
      optimizer_state: state of the optimiser of the weights.
    """

    task_weights: jax.Array
    initial_losses: jax.Array
    unit: jax.Array
    optimizer_state: Any


def gradnorm(alpha: float = 1.5, optimizer: optax.GradientTransformation | None = None) -> Method:
    r"""GradNorm: learned weights that give tasks which lag behind the larger gradients.

    With G_k = w_k n_k, their mean G, and r_k = (L_k / L_k(0)) / mean_j (L_j / L_j(0)): after each step, w takes one
    step on  sum_k | G_k - G r_k^alpha |,  where G r_k^alpha is held constant, and is rescaled to sum_k w_k = K.

    n_k is the norm of g_k over all leaves that the method sees. The paper takes the last layer that the tasks share:
    name the leaves that count by `mtjax.optim.on_shared`, or use `mtjax.optim.at_representation`.

    Args:
      alpha: how strongly rates of training are pulled together; 0 equalises the norms. 1.5 is the paper's on NYUv2.
      optimizer: of w; by default `optax.adam(0.025)`, as in the paper. Norms are measured in the unit of their first
        mean, which Adam does not notice; learning rates of plain SGD thus do not depend on the scale of the gradients.

    Returns:
      A `Method`; `update` needs `losses=`. w starts at 1 and never becomes negative (the step ends at 0, as it must for
      G_k to be a norm). With K = 1, d = g. A zero gradient does not move its own weight, but counts in G. Defined for
      losses >= 0: a negative one makes all weights NaN. r_k = 0 for a loss of 0; if all are 0, r_k = 1.

    Raises:
      ValueError: if `alpha` < 0.

    Reference: Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
      ICML 2018, algorithm 1. LibMTL learns the logits of w = K softmax in the place of rescaling, by the model's
      optimiser, takes the mean loss of a first unweighted epoch for L_k(0), and the norm over all shared parameters.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha must be >= 0, got {alpha}")
    optimizer = optimizer or optax.adam(0.025)

    def init(num_tasks):
        ones = jnp.ones((num_tasks,))
        return GradNormState(ones, jnp.zeros((num_tasks,)), jnp.zeros(()), optimizer.init(ones))

    def weigh(gramian, losses, state, present):
        norm = jnp.sqrt(jnp.diagonal(gramian))
        w = state.task_weights
        unit = jnp.where(state.unit == 0, _mean(norm, present), state.unit)
        initial = jnp.where(present & (state.initial_losses == 0), losses, state.initial_losses)
        progress = _divide(losses, initial, otherwise=0.0)
        rate = _divide(progress, _mean(progress, present), otherwise=1.0)

        size = w * norm
        slope = jnp.sign(size - _mean(size, present) * rate**alpha) * _divide(norm, unit, otherwise=0.0)
        moved, optimizer_state = step_present(optimizer, slope, state.optimizer_state, w, present)
        moved = jnp.maximum(moved, 0.0)
        # Tasks that take part keep their joint weight (K if all do): those that do not keep theirs.
        ratio = _divide(_mean(w, present), _mean(moved, present), otherwise=0.0)
        moved = jnp.where(present & (ratio > 0), moved * ratio, w)
        valid = jnp.isfinite(norm) & non_negative(losses)
        return settle(w, present, valid), GradNormState(moved, initial, unit, optimizer_state)

    return from_weighting(Weighting(init, weigh, needs_losses=True, masked=True))


class BalanceState(NamedTuple):
    """State of `norm_balance` and `ntk_balance`.

    Attributes:
      task_weights: f[K], the smoothed weights.
      step: i32[], steps made.
    """

    task_weights: jax.Array
    step: jax.Array


def _balance(size: Callable, power: int, decay: float, every: int, needs_losses: bool) -> Method:
    """w_k moves towards mean_j(s_j^power) / s_k^power, (s, valid) = size(gramian, losses), at every `every`-th step."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    if every < 1:
        raise ValueError(f"every must be a number of steps >= 1, got {every}")

    def init(num_tasks):
        return BalanceState(jnp.ones((num_tasks,)), jnp.zeros((), jnp.int32))

    def due(state):
        return state.step % every == 0

    def weigh(gramian, losses, state, present):
        s, valid = size(gramian, losses)
        # Relative to the largest: powers of s itself may leave the dtype's range.
        relative = _divide(s, jnp.max(s, where=present, initial=0.0), otherwise=0.0)
        used = due(state) & present & (relative > 0) & jnp.all(valid | ~present)
        target = _mean(relative**power, present) * (1.0 / jnp.where(used, relative, 1.0)) ** power
        target = jnp.minimum(target, jnp.finfo(target.dtype).max)
        w = state.task_weights
        w = jnp.where(used, w + (1.0 - decay) * (target - w), w)
        return settle(w, present, valid | ~due(state)), BalanceState(w, state.step + 1)

    only_when_due = None if every == 1 else due
    return from_weighting(Weighting(init, weigh, needs_losses=needs_losses, masked=True, due=only_when_due))


def norm_balance(*, decay: float = 0.9, every: int = 1000) -> Method:
    r"""Equal gradient norms: every |w_k g_k| tends to the mean norm.

    At steps 0, `every`, 2 `every`, ...:  w_k <- decay w_k + (1 - decay) mean_j(n_j) / n_k.

    Args:
      decay: of the moving average, which starts at w = 1; 0 for none.
      every: steps between two updates of w. In between, `mtjax.value_and_update` does not compute the Gramian.

    Returns:
      A `Method`. A task whose gradient is zero keeps its weight (and counts in the mean). With K = 1, d = g.

    Raises:
      ValueError: if `decay` is not in [0, 1), or `every` < 1.

    Reference: Wang, Sankaran, Wang and Perdikaris, "An Expert's Guide to Training Physics-informed Neural Networks",
      2023 (arXiv 2308.08468), algorithm 1; 'grad_norm' of their library jaxpi, which updates w after the step.
    """

    def size(gramian, losses):
        del losses
        norm = jnp.sqrt(jnp.diagonal(gramian))
        return norm, jnp.isfinite(norm)

    return _balance(size, 1, decay, every, needs_losses=False)


def ntk_balance(rows: Literal["losses", "residuals"] = "losses", *, decay: float = 0.9, every: int = 1000) -> Method:
    r"""Equal rates of convergence, as the neural tangent kernel (NTK) predicts them.

    At steps 0, `every`, 2 `every`, ...:  w_k <- decay w_k + (1 - decay) mean_j(c_j) / c_k,  c_k the rate of task k.

    The rate is, by theory, the mean of the NTK's diagonal, |grad r|^2 over the residuals r of task k: gradients of each
    residual, which a Gramian of K losses does not hold. What it holds is

    * for rows that are gradients of losses, c_k = G_kk / L_k. It is the rate -d log L_k / dt of the gradient flow on
      L_k alone; for L_k = mean r^2 over N residuals it is (4 / N) r^T NTK_k r / |r|^2, the kernel in the direction of
      the residuals, where theory takes the mean over all directions;
    * for rows that are gradients of residuals, one for each task, c_k = G_kk, the NTK's diagonal itself.

    Args:
      rows: 'losses' or 'residuals', what the rows of the Jacobian are gradients of.
      decay: of the moving average, which starts at w = 1; 0 for none.
      every: steps between two updates of w. In between, `mtjax.value_and_update` does not compute the Gramian.

    Returns:
      A `Method`; `update` needs `losses=` if `rows` is 'losses'. A task whose gradient or loss is zero keeps its weight
      (and counts in the mean with c_k = 0). With K = 1, d = g. With 'losses', a negative loss makes all weights NaN
      at a step that updates them.

    Raises:
      ValueError: for other `rows`; if `decay` is not in [0, 1), or `every` < 1.

    Reference: Wang, Yu and Perdikaris, "When and why PINNs fail to train: A neural tangent kernel perspective", Journal
      of Computational Physics 2022; 'ntk' of jaxpi, which takes the mean diagonal from the gradients of all residuals,
      and updates w after the step.
    """
    if rows not in ("losses", "residuals"):
        raise ValueError(f"rows must be 'losses' or 'residuals', got {rows!r}")

    def size(gramian, losses):
        norm = jnp.sqrt(jnp.diagonal(gramian))
        if rows == "residuals":
            return norm, jnp.isfinite(norm)
        zero = solved(losses)
        root = jnp.where(zero, 0.0, norm / jnp.sqrt(jnp.where(zero, 1.0, losses)))
        return root, jnp.isfinite(norm) & non_negative(losses)

    return _balance(size, 2, decay, every, needs_losses=rows == "losses")


def rgw(seed: int = 0, *, is_shared: Any = True) -> Method:
    r"""Random gradient weighting: the weights of `rlw`, on the gradients of shared parameters.

    d = sum_k w_k g_k is the gradient of the randomly weighted loss: on parameters that all tasks share, `rgw` and `rlw`
    are one method. On task-specific ones `rlw` weighs the only gradient that there is; `rgw` leaves it as it is.

    Args:
      seed: of the weights; the key is the state.
      is_shared: which leaves are shared, as for `mtjax.optim.on_shared`; all of them by default.

    Returns:
      A `Method`. Weights are positive and sum to 1; with K = 1, d = g.

    Reference: Lin, Ye, Zhang and Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
      Learning", TMLR 2022. TorchJD has it as an aggregator (Random).
    """
    return on_shared(rlw(seed), is_shared)
