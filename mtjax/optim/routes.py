r"""From a loss function and a method to an update, by the cheapest way that the method allows.

`value_and_update(loss_fn, method)` is all that a training loop needs. Behind it there are

* the *weighted* route of methods that are weightings: the Gramian, then one backward pass with the method's weights as
  cotangent. The Jacobian never exists as a whole: its leaves are reduced to K x K and dropped one after the other, or,
  with `chunk_size=c`, a column of the Gramian is the derivative of all losses along g_k (one backward and one
  forward-mode pass), with c gradients in memory at a time;
* the *Jacobian* route of all others;
* the route that a method brings (`Method.route`): several batches, perturbed parameters, representations.

All routes of a method give the same update to rounding.

Letters: K tasks, P parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtjax import gradients
from mtjax.optim import base, sharing

PyTree = Any


def value_and_update(loss_fn: Callable, method: Any, has_aux: bool = False, chunk_size: int | None = None) -> Callable:
    """Losses, the method's gradient and its next state, by the cheapest route that the method allows.

    Args:
      loss_fn: `(params, batch, *rest) -> losses` or `(losses, aux)`; see `mtjax.value_and_jacobian`. Methods on several
        batches split `batch` along its leading axis; others take any arguments.
      method: a method of `mtjax.optim`, or any optax Aggregator.
      has_aux: whether `loss_fn` returns `(losses, aux)`.
      chunk_size: how many tasks' backward passes run at once; bounds memory. None: all.

    Returns:
      A function `(params, state, *args) -> (losses f[K], gradient, state)`, with `(losses, aux)` in the place of
      `losses` under `has_aux`. Where `observes(method)`, call `observe` after the parameters have moved.

    >>> import mtjax, optax
    >>> method, adam = mtjax.optim.mgda(), optax.adam(0.1)
    >>> update = value_and_update(lambda p: {"a": (p - 1) ** 2, "b": (p + 1) ** 2}, method)
    >>> losses, gradient, state = update(jnp.array(3.0), method.init(None))
    >>> losses.tolist(), gradient.item()
    ([4.0, 16.0], 4.0)
    """
    gradients.check_chunk_size(chunk_size)
    route = getattr(method, "route", None)
    if route is not None:
        return route(loss_fn, method, has_aux=has_aux, chunk_size=chunk_size)
    if getattr(method, "weighting", None) is not None:
        return value_and_weighted_grad(loss_fn, method, has_aux, chunk_size)
    return jacobian_route(loss_fn, method, has_aux=has_aux, chunk_size=chunk_size)


def jacobian_route(loss_fn: Callable, method: Any, *, has_aux: bool, chunk_size: int | None) -> Callable:
    """All rows, then the method's update."""
    jacobian_fn = gradients.value_and_jacobian(loss_fn, has_aux, chunk_size)

    def jacobian_route_fn(params, state, *args, **kwargs):
        result, jacobian = jacobian_fn(params, *args, **kwargs)
        losses = result[0] if has_aux else result
        gradient, state = method.update(jacobian, state, params, losses=losses)
        return result, gradient, state

    return jacobian_route_fn


def value_and_weighted_grad(
    loss_fn: Callable, method: Any, has_aux: bool = False, chunk_size: int | None = None
) -> Callable:
    """The update of a Gramian or loss method without a K x P Jacobian.

    Args:
      loss_fn: as for `mtjax.value_and_jacobian`.
      method: a transform of `mtjax.optim` that is derived from a `Weighting`, or a `Weighting`.
      has_aux: whether `loss_fn` returns `(losses, aux)`.
      chunk_size: None: all K backward passes run at once, and each leaf's rows are dropped as soon as they are summed.
        Otherwise this many columns of the Gramian at once, each by a backward and a forward-mode pass; no more than
        `chunk_size` gradients are in memory. Methods that look at the losses only need one backward pass either way.

    Returns:
      A function `(params, state, *args) -> (losses f[K], gradient, state)`, with `(losses, aux)` in the place of
      `losses` under `has_aux`. `state` is `method.init(params)` for a transform, `weighting.init(K)` for a weighting.

    Raises:
      ValueError: if the method needs more of the Jacobian than its Gramian; as for `mtjax.value_and_jacobian`.
    """
    gradients.check_chunk_size(chunk_size)
    bare = isinstance(method, base.Weighting)
    transform = base.from_weighting(method) if bare else method
    if getattr(transform, "weighting", None) is None or transform.route is not None:
        raise ValueError(
            "value_and_weighted_grad takes a method that is a Weighting (it needs the Gramian or the losses only); "
            "this one needs the Jacobian itself, or gradients elsewhere: use value_and_update"
        )
    weighting, policy = transform.weighting, transform.nonfinite

    def value_and_weighted_grad_fn(params, state, *args, **kwargs):
        stacked = gradients.stacked_loss(loss_fn, has_aux, args, kwargs)
        losses, pullback, push, aux = _linearized(stacked, params, forward_mode=chunk_size is not None)
        num_tasks = losses.shape[0]
        old = base.MethodState.wrap(state, num_tasks) if bare else base.materialize(state, num_tasks, params)

        shared = sharing.shared_leaves(transform.is_shared, params)
        needs_rows = policy != "propagate" or shared is None
        gram, present = None, None
        if weighting.needs_gramian or needs_rows:
            gramian_fn = _gramian_by_rows if push is None else _gramian_by_columns
            measure = lambda: gramian_fn(pullback, push, losses, shared, transform, chunk_size)  # noqa: E731
            if weighting.due is None or needs_rows:
                gram, present, shared = measure()
            else:
                last = (old.gramian, jnp.ones((num_tasks,), bool))
                gram, present = jax.lax.cond(weighting.due(old.inner), lambda: measure()[:2], lambda: last)
        admitted = losses if policy == "propagate" else jnp.where(present, losses, 0.0)
        new = base.weigh(weighting, gram if weighting.needs_gramian else None, admitted, old, present)

        pull = pullback if policy == "propagate" else careful(pullback, present)
        gradient = pull(new.weights.astype(losses.dtype))
        if not sharing.all_shared(shared):
            # Unused halves of the two passes are dead code: the trunk is walked back once for shared leaves only.
            gradient = sharing.select_shared(shared, gradient, pull(jnp.ones_like(losses)))
        if policy == "skip_step":
            gradient, new = base.skip(present, gradient, new, old)
        return ((losses, aux) if has_aux else losses), gradient, (new.inner if bare else new)

    return value_and_weighted_grad_fn


def _linearized(stacked: Callable, params: PyTree, *, forward_mode: bool):
    """losses, pull-back, push-forward (None unless asked for) and aux, from one forward pass."""
    if not forward_mode:
        losses, pullback, aux = jax.vjp(stacked, params, has_aux=True)
        return losses, lambda cotangent: pullback(cotangent)[0], None, aux
    losses, push, aux = jax.linearize(stacked, params, has_aux=True)
    transpose = jax.linear_transpose(push, params)
    return losses, lambda cotangent: transpose(cotangent)[0], push, aux


def _gramian_by_rows(pullback, push, losses, shared, method, chunk_size):
    """Gramian, tasks that take part, and shared leaves, from all K rows at once."""
    del push, chunk_size
    rows = gradients.rows_of(pullback, losses.shape[0], None)
    present = base.admitted(method, losses, rows)
    if method.nonfinite == "drop_task":
        rows = base.drop_rows(rows, present)
    shared = sharing.shared_leaves(None, None, rows) if shared is None else shared
    return sharing.shared_gramian(rows, shared), present, shared


def _gramian_by_columns(pullback, push, losses, shared, method, chunk_size):
    """The same with `chunk_size` gradients in memory: column k is the derivative of all losses along g_k."""
    num_tasks = losses.shape[0]

    def gradient_of(task):
        return pullback(jax.nn.one_hot(task, num_tasks, dtype=losses.dtype))

    def over_tasks(function):
        return jax.lax.map(function, jnp.arange(num_tasks), batch_size=None if chunk_size == 1 else chunk_size)

    if shared is None:  # a pass of its own: what is shared is known when all tasks have been seen
        used = over_tasks(lambda task: jax.tree.map(lambda g: jnp.any(g != 0), gradient_of(task)))
        shared = jax.tree.map(sharing.several_rows, used)

    def column(task):
        gradient = gradient_of(task)
        present = base.admitted(method, losses[task][None], jax.tree.map(lambda g: g[None], gradient))[0]
        # Zero where it is not shared: what is left are inner products of the shared parts.
        along = jax.tree.map(lambda flag, g: g if flag is True else jnp.where(flag, g, 0), shared, gradient)
        return push(along), present

    gram, present = over_tasks(column)
    gram = 0.5 * (gram + gram.T)  # rows and columns agree to rounding; methods rely on symmetry
    if method.nonfinite == "drop_task":
        gram = jnp.where(present[:, None] & present[None, :], gram, 0.0)
    return gram, present, shared


def careful(pullback: Callable, present: jax.Array) -> Callable:
    """A pull-back that tasks which are not present cannot spoil: 0 times infinity is NaN in a joint backward pass."""

    def one_by_one(cotangent):
        def add(total, task):
            mine = pullback(jnp.where(jnp.arange(present.size) == task, cotangent, 0.0))
            return jax.tree.map(lambda t, g: t + jnp.where(present[task], g, jnp.zeros_like(g)), total, mine), None

        shapes = jax.eval_shape(pullback, cotangent)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, jnp.arange(present.size))[0]

    return lambda cotangent: jax.lax.cond(present.all(), pullback, one_by_one, cotangent)


# Losses after the step.


def observes(method: Any) -> bool:
    """Whether a method wants the losses at the updated parameters (`Weighting.observe`)."""
    weighting = getattr(method, "weighting", None)
    return getattr(method, "observer", None) is not None or (weighting is not None and weighting.observe is not None)


def observe(method: Any, state: PyTree, losses: Any) -> PyTree:
    """Tells a method the losses of the same batch after the parameters have moved; for others nothing changes.

    Args:
      method: the method.
      state: its state, or that of an optimiser which contains it.
      losses: f[K] or a dict of scalars: `loss_fn` at the updated parameters on the same batch.

    Returns:
      The state with the method's part updated.
    """
    if not observes(method):
        return state
    losses = gradients.stack_losses(losses)
    present = jnp.isfinite(losses) if method.nonfinite != "propagate" else jnp.ones(losses.shape, bool)
    usable = jnp.where(present, losses, 0.0) if method.nonfinite == "drop_task" else losses

    def told(node):
        if not base.is_method_state(node):
            return node
        if method.observer is not None:
            return method.observer(node, losses, present)
        inner = method.weighting.observe(usable, node.inner, present)
        new = base.record(node, inner, *node[1:])
        return base.choose(present.all(), new, node) if method.nonfinite == "skip_step" else new

    return jax.tree.map(told, state, is_leaf=base.is_method_state)


def split_batch(batch: PyTree, parts: int) -> list[PyTree]:
    """A batch cut along the leading axis of its leaves into equal parts, for methods on independent samples.

    Raises:
      ValueError: if the leading axes do not divide.
    """

    def check(path, leaf):
        if leaf.ndim == 0 or leaf.shape[0] % parts or leaf.shape[0] == 0:
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "batch"
            raise ValueError(
                f"This method needs {parts} independent batches and cuts the one it is given into {parts} equal parts; "
                f"'{name}' has shape {leaf.shape}"
            )

    jax.tree_util.tree_map_with_path(check, batch)
    cut = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
    return [jax.tree.map(lambda leaf: leaf[index], cut) for index in range(parts)]  # noqa: B023
