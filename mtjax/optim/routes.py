r"""From a loss function and a method to an update, by the cheapest way that the method allows.

`value_and_update(loss_fn, method)` is all that a training loop needs. Behind it there are

* the *weighted* route of methods that are weightings: the Gramian, then the gradient with the method's weights. The
  Jacobian never exists as a whole: rows of dense layers are not even formed (`mtjax.layer_rows`), other leaves are
  reduced to K x K and dropped one after the other, or, with `chunk_size=c`, a column of the Gramian is the derivative
  of all losses along g_k (one backward and one forward-mode pass), with c gradients in memory at a time;
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
from mtjax.layer_rows import losses_and_rows
from mtjax.optim import base, sharing

PyTree = Any
MOSTLY_COMPRESSED = 0.25
"""Share of the parameters whose rows may be kept in memory until the weights are known."""


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
    """All rows, then the method's update. A method that leaves out bad tasks gets each row from a pass of its own."""
    separate = getattr(method, "nonfinite", "propagate") == "drop_task"
    jacobian_fn = gradients.value_and_jacobian(loss_fn, has_aux, chunk_size, separate=separate)

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
    if transform.nonfinite == "drop_task":
        return jacobian_route(loss_fn, transform, has_aux=has_aux, chunk_size=chunk_size)
    weighting, watchful = transform.weighting, transform.nonfinite == "skip_step"

    def value_and_weighted_grad_fn(params, state, *args, **kwargs):
        stacked = gradients.stacked_loss(loss_fn, has_aux, args, kwargs)
        shared = sharing.shared_leaves(transform.is_shared, params)
        looks = weighting.needs_gramian or watchful or shared is None
        combine = None
        if not looks or chunk_size is not None:
            losses, pullback, push, aux = linearized(stacked, params, forward_mode=looks)
        else:
            losses, pullback, rows_fn, aux, written_out = losses_and_rows(stacked, params)
        num_tasks = losses.shape[0]
        old = base.MethodState.wrap(state, num_tasks) if bare else base.materialize(state, num_tasks, params)

        def measure():
            if chunk_size is not None:
                return *_gramian_by_columns(pullback, push, losses, shared, transform, chunk_size), None
            rows = rows_fn()
            flags = sharing.shared_leaves(None, None, rows.left) if shared is None else shared
            gram = _symmetric(sharing.shared_gramian(rows.left, flags, rows.right))
            # What is in memory anyway gives the gradient without another backward pass.
            stored = rows.combine if written_out <= MOSTLY_COMPRESSED else None
            return gram, base.admitted(transform, losses, rows.left), flags, stored

        gram, present = None, jnp.ones((num_tasks,), bool)
        if looks and (weighting.due is None or watchful or shared is None):
            gram, present, shared, combine = measure()
        elif looks:
            last = (old.gramian, present)
            gram, present = jax.lax.cond(weighting.due(old.inner), lambda: measure()[:2], lambda: last)
        new = base.weigh(weighting, gram if weighting.needs_gramian else None, losses, old, present)

        pull = combine or pullback
        gradient = pull(new.weights.astype(losses.dtype))
        if not sharing.all_shared(shared):
            # Unused halves of the two passes are dead code: the trunk is walked back once for shared leaves only.
            gradient = sharing.select_shared(shared, gradient, pull(jnp.ones_like(losses)))
        if watchful:
            gradient, new = base.skip(present, gradient, new, old)
        return ((losses, aux) if has_aux else losses), gradient, (new.inner if bare else new)

    return value_and_weighted_grad_fn


def linearized(stacked: Callable, params: PyTree, *, forward_mode: bool):
    """losses, pull-back, push-forward (None unless asked for) and aux, from one forward pass."""
    if not forward_mode:
        losses, pullback, aux = jax.vjp(stacked, params, has_aux=True)
        return losses, lambda cotangent: pullback(cotangent)[0], None, aux
    losses, push, aux = jax.linearize(stacked, params, has_aux=True)
    transpose = jax.linear_transpose(push, params)
    return losses, lambda cotangent: transpose(cotangent)[0], push, aux


def _symmetric(gram: jax.Array) -> jax.Array:
    """The two sides of an inner product are rounded apart; rules rely on symmetry and on squares >= 0."""
    gram = 0.5 * (gram + gram.T)
    return gram + jnp.diag(jnp.maximum(-jnp.diagonal(gram), 0.0))


def _gramian_by_columns(pullback, push, losses, shared, method, chunk_size):
    """Gramian, tasks that take part, and shared leaves, with `chunk_size` gradients in memory.

    Column k is the derivative of all losses along g_k.
    """
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
    return _symmetric(gram), present, shared


def careful(pullback: Callable, present: jax.Array) -> Callable:
    """A pull-back without the tasks that are not present: 0 times infinity would be NaN in a joint backward pass."""

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
    cut = jax.tree.map(lambda leaf: leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:]), batch)
    return [jax.tree.map(lambda leaf: leaf[index], cut) for index in range(parts)]  # noqa: B023
