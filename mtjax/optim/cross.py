r"""Gradients at several points or on several batches, and their inner products.

Routes of methods on independent samples (`stochastic.py`) and of bilevel methods (`bilevel.py`, `forum.py`) compare
gradients g_k^a = grad L_k(theta_a; batch a) and g_k^b = grad L_k(theta_b; batch b). What they need of them is the cross
Gramian, C_ij = <g_i^a, g_j^b>, which is neither symmetric nor positive semidefinite. No K x P Jacobian is kept for it:
leaves are reduced to K x K one after the other, or, with `chunk_size`, a column is one backward and one forward-mode
pass, as in `routes.py`. Only methods that leave out bad tasks ('drop_task') keep all rows, each from a pass of its own.

Letters: K tasks, P parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax import gradients
from mtjax.optim import base, routes, sharing
from mtjax.optim.base import Method, MethodState

PyTree = Any


class Point(NamedTuple):
    """Losses at one point on one batch, and their derivative there.

    Attributes:
      losses: f[K].
      pull: cotangent f[K] -> gradient of sum_k cotangent_k L_k.
      push: direction (like the parameters) -> f[K], <g_k, direction>; None unless asked for.
      aux: what the loss function returned beside the losses.
      rows: all g_k, if they are kept; else None.
    """

    losses: jax.Array
    pull: Callable[[jax.Array], PyTree]
    push: Callable[[PyTree], jax.Array] | None
    aux: Any
    rows: PyTree | None = None


def visit(
    loss_fn: Callable,
    has_aux: bool,
    params: PyTree,
    args: tuple,
    *,
    forward_mode: bool = False,
    separate: bool = False,
) -> Point:
    """One forward pass.

    Args:
      loss_fn, has_aux: as for `mtjax.value_and_update`.
      params: the point.
      args: the batch, and what else the loss function takes.
      forward_mode: with `push`, which layers that only have a backward pass do not support.
      separate: with all rows, which NaN and infinity in one task's loss leave as they are in the others'. Then
        `forward_mode` is ignored.
    """
    if separate:
        losses, pullbacks, aux = gradients.separate_pullbacks(loss_fn, has_aux, params, args, {})
        rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[pullback() for pullback in pullbacks])
        return Point(losses, lambda cotangent: gradients.combine(rows, cotangent), None, aux, rows)
    stacked = gradients.stacked_loss(loss_fn, has_aux, args, {})
    return Point(*routes.linearized(stacked, params, forward_mode=forward_mode))


def over_tasks(point: Point, function: Callable[[jax.Array, PyTree], Any], chunk_size: int | None) -> Any:
    """`function(k, g_k)` for all tasks, stacked; `chunk_size` of them at a time."""
    num_tasks = point.losses.shape[0]
    tasks = jnp.arange(num_tasks)
    if point.rows is not None:
        return jax.vmap(function)(tasks, point.rows)

    def one(task):
        return function(task, point.pull(jax.nn.one_hot(task, num_tasks, dtype=point.losses.dtype)))

    if chunk_size is None or chunk_size >= num_tasks:
        return jax.vmap(one)(tasks)
    return jax.lax.map(one, tasks, batch_size=None if chunk_size == 1 else chunk_size)


def shared_at(method: Method, params: PyTree, point: Point, chunk_size: int | None) -> PyTree:
    """Which leaves the method sees (`on_shared`), found out from the gradients at this point if need be."""
    shared = sharing.shared_leaves(method.is_shared, params)
    if shared is not None:
        return shared
    used = over_tasks(point, lambda _, gradient: jax.tree.map(lambda g: jnp.any(g != 0), gradient), chunk_size)
    return jax.tree.map(sharing.several_rows, used)


def takes_part(method: Method, point: Point, chunk_size: int | None) -> jax.Array:
    """bool[K]: tasks that the method's policy on NaN admits, by their losses and gradients at this point."""
    if method.nonfinite == "propagate":
        return jnp.ones(point.losses.shape, bool)

    def alone(task, gradient):
        return base.admitted(method, point.losses[task][None], jax.tree.map(lambda g: g[None], gradient))[0]

    return over_tasks(point, alone, chunk_size)


def where_shared(shared: PyTree, tree: PyTree) -> PyTree:
    """The tree with zeros on leaves that are not shared."""
    return jax.tree.map(
        lambda flag, leaf: leaf if flag is True else jnp.where(flag, leaf, jnp.zeros_like(leaf)), shared, tree
    )


def inner(left: PyTree, right: PyTree) -> jax.Array:
    """f[], the inner product of two gradients."""
    left, right = (jax.tree.map(lambda leaf: leaf[None], gradient) for gradient in (left, right))
    return gradients.gramian(left, right)[0, 0]


def cross_gramian(
    left: Point, right: Point, shared: PyTree, chunk_size: int | None, present: jax.Array | None = None
) -> jax.Array:
    """f[K, K], <g_i at `left`, g_j at `right`> on shared leaves, by columns where `left` has `push`.

    Tasks that are not `present` have zeros; None: all are.
    """
    if left.push is not None:
        return over_tasks(right, lambda _, gradient: left.push(where_shared(shared, gradient)), chunk_size).T
    rows, columns = (over_tasks(point, lambda _, gradient: gradient, None) for point in (left, right))
    if present is not None:
        rows, columns = base.drop_rows(rows, present), base.drop_rows(columns, present)
    return sharing.shared_gramian(rows, shared, columns)


def combined(point: Point, weights: jax.Array, shared: PyTree, present: jax.Array | None = None) -> PyTree:
    """sum_k w_k g_k on shared leaves, sum_k g_k on others.

    Tasks that are not `present` cannot spoil it (`point` must have been visited with `separate`); None: all are.
    """
    if present is None:
        pull = point.pull
    else:
        kept = base.drop_rows(point.rows, present)
        pull = lambda cotangent: gradients.combine(kept, cotangent)  # noqa: E731
    gradient = pull(weights.astype(point.losses.dtype))
    if sharing.all_shared(shared):
        return gradient
    return sharing.select_shared(shared, gradient, pull(jnp.ones_like(point.losses)))


def stepped(params: PyTree, gradient: PyTree, learning_rate: float) -> PyTree:
    """theta - learning_rate g, in the parameters' dtypes."""
    return jax.tree.map(lambda p, g: (p - learning_rate * g).astype(p.dtype), params, gradient)


def if_due(method: Method, state: MethodState, measure: Callable[[], Any], otherwise: Any) -> Any:
    """`measure()`, unless the method will not look at it this time (`Weighting.due`)."""
    if method.weighting.due is None:
        return measure()
    kept = base.like(otherwise, jax.eval_shape(measure))
    return jax.lax.cond(method.weighting.due(state.inner), measure, lambda: kept)
