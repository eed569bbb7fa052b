r"""Gradient surgery: each gradient is turned away from its conflicts with the others, one by one, and all are added up.

For each task i, walk over the other tasks j in random order with g_i' = g_i at first:

    PCGrad    if <g_i', g_j> < 0:                    g_i' <- g_i' - <g_i', g_j> / |g_j|^2 g_j         (Yu et al., 2020)
    GradVac   if cos(g_i', g_j) < p = target_ij:     turn g_i' towards g_j until the cosine is p    (Wang et al., 2021)

and d = sum_i g_i'. Every g_i' is a combination of gradients, so that the walk is done on K coefficients, of unit
gradients; the gradients themselves are touched once.

Letters: K tasks; g_k the gradient of task k, n_k its norm; d the update direction.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtjax.optim import solvers
from mtjax.optim.base import Method, Weighting, from_weighting

Reduction = Literal["sum", "mean"]


def pcgrad(seed: int = 0, *, reduction: Reduction = "sum") -> Method:
    r"""Projecting conflicting gradients (gradient surgery).

    For each task i, walk over the other tasks j in random order: where <g_i', g_j> < 0, set
    g_i' <- g_i' - <g_i', g_j> / |g_j|^2 g_j. Then d = sum_i g_i'.

    Args:
      seed: of the random orders; the key is part of the state.
      reduction: 'sum' as in the paper's algorithm 1, or 'mean'.

    Returns:
      A `Method`, scale equivariant. One task: its gradient. Zero gradients are left out of projections. NaN if the
      Gramian is not finite.

    Raises:
      ValueError: for another `reduction`.

    >>> import jax.numpy as jnp
    >>> method = pcgrad()
    >>> gradient, _ = method.update(jnp.array([[2.0, 0.0], [-1.0, 1.0]]), method.init(None))
    >>> print(gradient.round(4))  # (1, 1) + (0, 1)
    [1. 2.]

    Reference: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1. The published code (and
      LibMTL) also visits j = i, which changes results when g_i' has come to point against g_i, and adds 1e-8 to
      |g_j|^2, which breaks small gradients; the paper has neither.
    """
    _check(reduction)

    def visit(products, length, other, state):
        del length
        return jnp.maximum(-products[other], 0.0), state

    def weigh(gramian, losses, key, present):
        del losses
        key, order_key = jax.random.split(key)
        norm, cosine = solvers.row_normalized(gramian)
        none = jnp.zeros((len(present), 0), gramian.dtype)
        coefficients, _ = _walk(cosine, _orders(order_key, present), none, visit)
        return _weights(norm, coefficients, present, reduction), key

    return from_weighting(Weighting(lambda num_tasks: jax.random.key(seed), weigh, masked=True))


class GradVacState(NamedTuple):
    """State of `gradvac`.

    Attributes:
      target: f[K, K], target_ij of the cosine between g_i' and g_j; 0 at first.
      key: of the next step's random orders.
    """

    target: jax.Array
    key: jax.Array


def gradvac(seed: int = 0, *, beta: float = 1e-2, reduction: Reduction = "sum") -> Method:
    r"""Gradient vaccine: PCGrad towards the cosines that pairs of tasks have had so far, in the place of 0.

    For each task i, walk over the other tasks j in random order. With c = cos(g_i', g_j) and p = target_ij: if c < p,
    g_i' <- g_i' + |g_i'| (p sqrt(1 - c^2) - c sqrt(1 - p^2)) / (|g_j| sqrt(1 - p^2)) g_j, which makes the cosine p; and
    in any case target_ij <- (1 - beta) p + beta c. Then d = sum_i g_i'. Targets are 0 at first: the first step is
    PCGrad's.

    This is the whole-model granularity of the paper: one Gramian for all parameters.

    Args:
      seed: of the random orders; the key is part of the state.
      beta: in [0, 1], of the moving average of cosines.
      reduction: 'sum' as in the paper, or 'mean'.

    Returns:
      A `Method`, scale equivariant. Its state is a `GradVacState`. One task: its gradient. A zero gradient, or a g_i'
      that has been removed to rounding, has no cosine: nothing is done and no target moves. Targets count as
      1 - 8 eps at most, as no combination can reach 1. If the Gramian is not finite, the weights are NaN and the
      targets stay as they were.

    Raises:
      ValueError: for a `beta` out of range or another `reduction`.

    >>> import jax.numpy as jnp
    >>> method = gradvac(beta=0.5)
    >>> _, state = method.update(jnp.array([[1.0, 0.0], [1.0, 0.0]]), method.init(None))
    >>> state.inner.target.tolist()
    [[0.0, 0.5], [0.5, 0.0]]

    Reference: Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
      Multilingual Models", ICLR 2021, algorithm 1. LibMTL and TorchJD have beta = 0.5; LibMTL does not clamp cosines,
      and returns NaN for exactly opposite gradients.
    """
    _check(reduction)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta!r}")

    def visit(products, length, other, target):
        known = length > 0
        cosine = jnp.clip(products[other] / jnp.where(known, length, 1.0), -1.0, 1.0)
        aim = jnp.minimum(target[other], 1 - 8 * jnp.finfo(products.dtype).eps)
        # Where cosine < aim, both roots are of numbers > 0 or aim is; elsewhere the result is not used.
        sines = jnp.sqrt((1 - cosine**2) / jnp.where(cosine < aim, 1 - aim**2, 1.0))
        step = jnp.where(cosine < aim, length * (aim * sines - cosine), 0.0)
        moved = target.at[other].set((1 - beta) * target[other] + beta * cosine)
        return step, jnp.where(known, moved, target)

    def weigh(gramian, losses, state, present):
        del losses
        key, order_key = jax.random.split(state.key)
        norm, cosine = solvers.row_normalized(gramian)
        coefficients, target = _walk(cosine, _orders(order_key, present), state.target.astype(gramian.dtype), visit)
        target = jnp.where(jnp.all(jnp.isfinite(gramian)), target, state.target).astype(state.target.dtype)
        return _weights(norm, coefficients, present, reduction), GradVacState(target, key)

    def init(num_tasks):
        return GradVacState(jnp.zeros((num_tasks, num_tasks)), jax.random.key(seed))

    return from_weighting(Weighting(init, weigh, masked=True))


def _check(reduction):
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")


def _orders(key: jax.Array, present: jax.Array) -> jax.Array:
    """i32[K, K]: for each task a random order of all tasks, those that are not present last.

    The r-th of the tasks that are present draws what it would draw if there were no others.
    """
    num_tasks = len(present)
    rank = jnp.cumsum(present) - 1
    draws = jax.vmap(lambda k: jax.random.bits(k, (num_tasks,), jnp.uint32))(jax.random.split(key, num_tasks))[rank][
        :, rank
    ]
    return jnp.lexsort((draws, jnp.broadcast_to(~present[None, :], draws.shape)), axis=-1)


def _walk(cosine: jax.Array, orders: jax.Array, states: jax.Array, visit: Callable) -> tuple[jax.Array, jax.Array]:
    """The walks of all tasks, on unit gradients.

    Args:
      cosine: f[K, K], zero in the rows and columns of zero gradients, which are passed over.
      orders: i32[K, K].
      states: [K, ...], one state for each walk.
      visit: `(products f[K], length, other, state) -> (step, state)`: from <g_i', u_j> for all j and |g_i'|, how much
        of u_other is added.

    Returns:
      Coefficients f[K, K], g_i' = n_i sum_k c_ik u_k, and the new states.
    """
    eps = jnp.finfo(cosine.dtype).eps

    def walk(task, order, state):
        def move(carry, other):
            c, products, state = carry
            squared = jnp.sum(c * products)
            # What is left of a gradient that was removed altogether is rounding.
            length = jnp.where(squared > 8 * eps * jnp.sum(jnp.abs(c)) ** 2, jnp.sqrt(jnp.maximum(squared, 0.0)), 0.0)
            step, new = visit(products, length, other, state)
            skip = (other == task) | (cosine[other, other] == 0)
            step = jnp.where(skip, 0.0, step)
            state = jnp.where(skip, state, new)
            return (c.at[other].add(step), products + step * cosine[other], state), None

        start = (jnp.arange(len(cosine)) == task).astype(cosine.dtype)
        (c, _, state), _ = jax.lax.scan(move, (start, cosine[task], state), order)
        return c, state

    return jax.vmap(walk)(jnp.arange(len(cosine)), orders, states)


def _weights(norm, coefficients, present, reduction):
    """f[K]: w_k = sum_i n_i c_ik / n_k over the tasks i that are present; a zero gradient keeps its own c_ii = 1."""
    ratio = jnp.where(jnp.eye(len(norm), dtype=bool), 1.0, norm[:, None] * solvers.reciprocal(norm)[None, :])
    weights = jnp.sum(jnp.where(present[:, None], ratio * coefficients, 0.0), axis=0)
    return weights if reduction == "sum" else weights / jnp.maximum(jnp.sum(present), 1)
