"""Methods that need only the Gramian G = J J^T of per-task gradients: MGDA and PCGrad.

Letters: K tasks; g_k the gradient of task k; d the update direction.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from mtjax.optim import solvers
from mtjax.optim.base import Method, Weighting, from_weighting


def mgda(normalize: Literal["none", "l2", "loss", "loss+"] = "none") -> Method:
    r"""Multiple-gradient descent: the shortest convex combination of the gradients.

    w = argmin_{w in simplex} | sum_k w_k g_k |,  d = sum_k w_k g_k. d is zero exactly at Pareto-stationary points, and
    <d, g_k> >= |d|^2 for every k: it never increases a loss to first order. The quadratic programme is solved exactly.

    Args:
      normalize: what the gradients are divided by before the weights are computed: nothing, their norm ('l2'), their
        loss ('loss') or both ('loss+'). The weights are then applied to the gradients as they are, as in the authors'
        code.

    Returns:
      A `Method`. Zero gradients take all the weight (d = 0: such a point is stationary), also that of a task without
      any label in the batch. Gradients whose divisor is zero count as zero, and take it too.

    Raises:
      ValueError: for another `normalize`.

    Reference: Desideri, "Multiple-gradient descent algorithm", C. R. Math. 2012; Sener and Koltun, "Multi-Task Learning
      as Multi-Objective Optimization", NeurIPS 2018. TorchJD stops Frank-Wolfe early and LibMTL keeps 1e-3 of a
      dominated task's weight; neither is done here.
    """
    if normalize not in ("none", "l2", "loss", "loss+"):
        raise ValueError(f"normalize must be 'none', 'l2', 'loss' or 'loss+', got {normalize!r}")

    def weigh(gramian, losses, state):
        norm = jnp.sqrt(jnp.diagonal(gramian))
        divisor = {"none": jnp.ones_like(norm), "l2": norm, "loss": losses, "loss+": losses * norm}[normalize]
        inverse = jnp.where(divisor == 0, 0.0, 1.0 / jnp.where(divisor == 0, 1.0, divisor))
        return solvers.min_norm_weights(gramian * inverse[:, None] * inverse[None, :]), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, needs_losses=normalize in ("loss", "loss+")))


def pcgrad(seed: int = 0, *, reduction: Literal["sum", "mean"] = "sum") -> Method:
    r"""Projecting conflicting gradients (gradient surgery).

    For each task i, walk over the other tasks j in random order: where <g_i', g_j> < 0, set
    g_i' <- g_i' - <g_i', g_j> / |g_j|^2 g_j. Then d = sum_i g_i'.

    Every g_i' is a combination of the g_j, so the walk is done on K x K coefficients; the gradients are touched once.

    Args:
      seed: of the random orders; the key is part of the state.
      reduction: 'sum' as in the paper's algorithm 1, or 'mean'.

    Returns:
      A `Method`. Zero gradients are left out of projections.

    Raises:
      ValueError: for another `reduction`.

    Reference: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1. The published code (and
      LibMTL) also visits j = i, which changes results when g_i' has come to point against g_i, and adds 1e-8 to
      |g_j|^2, which breaks small gradients; the paper has neither.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")

    def weigh(gramian, losses, key):
        del losses
        num_tasks = gramian.shape[0]
        key, order_key = jax.random.split(key)
        squared = jnp.diagonal(gramian)
        inverse = jnp.where(squared > 0, 1.0 / jnp.where(squared > 0, squared, 1.0), 0.0)

        def surgery(task, task_key):
            """Coefficients f32[K] of g_i' for i = task."""

            def project(coefficients, other):
                dot = jnp.matmul(coefficients, gramian[:, other], precision=solvers.HIGHEST)
                step = jnp.where((dot < 0) & (other != task), dot * inverse[other], 0.0)
                return coefficients.at[other].add(-step), None

            start = jax.nn.one_hot(task, num_tasks, dtype=gramian.dtype)
            return jax.lax.scan(project, start, jax.random.permutation(task_key, num_tasks))[0]

        coefficients = jax.vmap(surgery)(jnp.arange(num_tasks), jax.random.split(order_key, num_tasks))
        weights = coefficients.sum(0)
        return (weights if reduction == "sum" else weights / num_tasks), key

    return from_weighting(Weighting(lambda num_tasks: jax.random.key(seed), weigh))
