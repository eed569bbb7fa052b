r"""MGDA: the shortest vector in the convex hull of the gradients, d = J^T argmin_{w in simplex} |J^T w|.

It is zero exactly at Pareto-stationary points, and elsewhere its negative is a direction in which every loss falls.
Desideri, 2012; Sener and Koltun, 2018.

Letters: K tasks; g_k the gradient of task k; d the update direction.
"""

from typing import Literal

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
      A `Method`, scale equivariant. Zero gradients take all the weight (d = 0: such a point is stationary), also that
      of a task without any label in the batch. Gradients whose divisor is zero count as zero, and take it too. NaN if
      the Gramian, or a loss that is divided by, is not finite.

    Raises:
      ValueError: for another `normalize`.

    >>> import jax.numpy as jnp
    >>> method = mgda()
    >>> gradient, _ = method.update(jnp.array([[3.0, 0.0], [0.0, 4.0]]), method.init(None))
    >>> [round(entry, 4) for entry in gradient.tolist()]
    [1.92, 1.44]

    Reference: Desideri, "Multiple-gradient descent algorithm", C. R. Math. 2012; Sener and Koltun, "Multi-Task Learning
      as Multi-Objective Optimization", NeurIPS 2018. TorchJD stops Frank-Wolfe early and LibMTL keeps 1e-3 of a
      dominated task's weight; neither is done here.
    """
    if normalize not in ("none", "l2", "loss", "loss+"):
        raise ValueError(f"normalize must be 'none', 'l2', 'loss' or 'loss+', got {normalize!r}")
    by_loss = normalize in ("loss", "loss+")

    def weigh(gramian, losses, state, present):
        norm = jnp.sqrt(jnp.diagonal(gramian))
        divisor = losses if by_loss else jnp.ones_like(norm)
        if normalize in ("l2", "loss+"):
            divisor = divisor * norm
        # In the middle of their range, as only ratios matter: squares of the largest and the smallest are floats then.
        positive = divisor > 0
        smallest = jnp.min(jnp.where(positive, divisor, jnp.inf))
        middle = jnp.sqrt(jnp.where(jnp.any(positive), smallest, 1.0)) * jnp.sqrt(
            jnp.max(jnp.where(positive, divisor, 0.0))
        )
        inverse = solvers.reciprocal(divisor / jnp.where(middle > 0, middle, 1.0)).astype(gramian.dtype)
        weights = solvers.min_norm_weights(gramian * inverse[:, None] * inverse[None, :], present)
        # An infinite loss would otherwise make its gradient count as zero, and an infinite norm too.
        known = jnp.all(jnp.isfinite(gramian)) & jnp.all(jnp.isfinite(losses) | (not by_loss))
        return jnp.where(known, weights, jnp.nan), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, needs_losses=by_loss, masked=True))
