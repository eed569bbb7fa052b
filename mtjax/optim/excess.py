r"""ExcessMTL: weights that grow with what each loss can still lose.

A task whose labels are noisy has a large loss for ever. Weights that grow with the loss go to it; weights that grow
with the excess risk, the loss minus the least value that it can have, do not. A second-order expansion, with the
diagonal of the Hessian estimated as AdaGrad does, gives the excess risk from gradients alone:

    S_k = sum over updates of g_k^2,    e_k = sum_p g_kp^2 / sqrt(S_kp).

e_k needs the entries of the Jacobian and S is as large as it; the update is a weighted sum of gradients.

Letters: K tasks, P parameters; g_k the gradient of task k, L_k its loss, w_k its weight.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtjax import gradients
from mtjax.optim.base import Combination, Method, from_combination
from mtjax.optim.buffers import wide, zero_rows
from mtjax.optim.scalarization import count

PyTree = Any


class ExcessMtlState(NamedTuple):
    """State of `excess_mtl`.

    Attributes:
      root: pytree [K, ...], square root of the sum of squared gradients so far.
      log_weights: f[K], logarithms of the weights before they are made to sum to K.
      baseline: f[K], mean excess risk of each task in its warm-up; 0 before.
      observed: i32[K], how many excess risks `baseline` averages.
    """

    root: PyTree
    log_weights: jax.Array
    baseline: jax.Array
    observed: jax.Array


def excess_mtl(eta: float = 1e-2, *, warmup: int = 1, total: Literal["tasks", "one"] = "tasks") -> Method:
    r"""Weights that grow with excess risk, the part of a loss that training can still remove: robust to label noise.

        S_k <- S_k + g_k^2                        entry by entry
        e_k = sum_p g_kp^2 / sqrt(S_kp)           estimates L_k minus its least value
        w_k <- w_k exp(eta e_k / e_k(0)),         rescaled to sum_k w_k = K

    Weights are kept as logarithms and S as its root: neither leaves the range of floats. 0 / sqrt(0) counts as 0.

    Args:
      eta: step size of the weights.
      warmup: e_k(0) is the mean of each task's first `warmup` excess risks, during which its weight rests. 1 is the
        authors' code; the paper averages over three epochs.
      total: what the weights sum to: 'tasks' (K: the authors, LibMTL) or 'one' (TorchJD).

    Returns:
      A `Method`. Weights are equal at first; with K = 1, w = 1. An excess risk of exactly 0 does not count for e_k(0):
      a task whose gradient is zero at first starts its warm-up when it is not, and until then its weight does not grow.
      Weights do not depend on the scale of the losses, so that a run on s J is s times the run on J.

    Raises:
      ValueError: for arguments out of range, and for a state without parameters.

    Reference: He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024, equations 6, 7 and 9. Excess risks
      are those of the leaves that the method sees; the weights of LibMTL also apply to heads (here, with `on_shared`,
      heads get plain sums). TorchJD starts at 1/K, has eta = 1 and at its first update uses e_k undivided; both add
      1e-7 to S, and to e_k(0) (TorchJD) or divide by zero (LibMTL).

    >>> method = excess_mtl(1.0)
    >>> _, state = method.update(jnp.eye(2), method.init(None))
    >>> _, state = method.update(jnp.diag(jnp.array([1.0, 2.0])), state)  # the second gradient has grown
    >>> bool(state.weights[1] > state.weights[0])
    True
    """
    if not eta >= 0:
        raise ValueError(f"eta must be >= 0, got {eta}")
    if not (isinstance(warmup, int) and warmup >= 1):
        raise ValueError(f"warmup must be a number of updates >= 1, got {warmup!r}")
    if total not in ("tasks", "one"):
        raise ValueError(f"total must be 'tasks' or 'one', got {total!r}")

    def init(num_tasks, params):
        rows = zero_rows(num_tasks, params, "excess_mtl")
        return ExcessMtlState(
            rows, jnp.zeros((num_tasks,)), jnp.zeros((num_tasks,)), jnp.zeros((num_tasks,), jnp.int32)
        )

    def combine(jacobian, losses, state, present):
        rows = wide(jacobian)
        root = jax.tree.map(jnp.hypot, state.root, rows)  # rows of absent tasks are zero: theirs stay

        def of_leaf(g, h):
            share = jnp.where(h == 0, 0.0, jnp.abs(g) / jnp.where(h == 0, 1.0, h))
            return jnp.sum(share * jnp.abs(g), axis=tuple(range(1, g.ndim)))

        excess = sum(jax.tree.leaves(jax.tree.map(of_leaf, rows, root))).astype(losses.dtype)
        warming = state.observed < warmup
        counts = present & warming & (excess != 0)
        observed = state.observed + counts
        baseline = state.baseline + jnp.where(counts, (excess - state.baseline) / jnp.maximum(observed, 1), 0.0)

        # The largest float in the place of infinity: all weight then goes to that task, and none becomes NaN.
        relative = jnp.minimum(excess / jnp.where(warming, 1.0, baseline), jnp.finfo(excess.dtype).max)
        growth = jnp.where(present & ~warming, eta * relative, jnp.where(excess == excess, 0.0, jnp.nan))
        moved = state.log_weights + growth
        weights = jax.nn.softmax(moved, where=present) * (count(present) if total == "tasks" else 1)
        weights = jnp.where(present, weights, 0.0)
        # Only differences matter.
        moved = jnp.maximum(moved - jnp.max(moved), jnp.finfo(moved.dtype).min / 2)
        return gradients.combine(jacobian, weights), weights, ExcessMtlState(root, moved, baseline, observed)

    return from_combination(Combination(init, combine))
