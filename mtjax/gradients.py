r"""Per-task losses and gradients: the Jacobian of a vector of losses, its Gramian, and how much its rows conflict.

With K losses and parameters theta, row k of the Jacobian J is the gradient g_k of the k-th task. It is kept as a pytree
like `params`, every leaf with a leading axis K. Nearly every multi-objective method needs no more of it than the
Gramian G = J J^T (K x K), and there are two routes to its update d = sum_k w_k g_k, equal to rounding:

* `value_and_jacobian`, then an `mtjax.optim` transform: every row is in memory, anything may be done with it;
* `value_and_weighted_grad`: the Gramian is summed leaf by leaf while the K backward passes run, each leaf's rows being
  dropped at once, and one more backward pass gives the weighted gradient. The K x P rows never exist together (unless
  `chunk_size` asks for the backward passes one after the other: inner products need all rows of a leaf).

Letters: K tasks, P parameters.

>>> import jax.numpy as jnp
>>> def loss_fn(params, x):
...     return {"a": (params["w"] * x).sum(), "b": -(params["w"] ** 2).sum()}
>>> losses, jacobian = value_and_jacobian(loss_fn)({"w": jnp.array([1.0, 2.0])}, jnp.array([3.0, 4.0]))
>>> losses.tolist(), jacobian["w"].tolist()
([11.0, -5.0], [[3.0, 4.0], [-2.0, -4.0]])
>>> conflict(jacobian).share.item()
1.0
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
HIGHEST = jax.lax.Precision.HIGHEST


def stack_losses(losses: Mapping[str, jax.Array] | jax.Array) -> jax.Array:
    """A dict of K scalars (in insertion order) or an f32[K] -> f32[K].

    Raises:
      ValueError: if a loss of the dict is not a scalar, or the array is not one-dimensional.
    """
    if isinstance(losses, Mapping):
        for name, loss in losses.items():
            if jnp.shape(loss) != ():
                raise ValueError(f"The loss of task '{name}' must be a scalar, got shape {jnp.shape(loss)}")
        if not losses:
            raise ValueError("loss_fn returned an empty dict: expected one scalar loss for each task")
        # Rows follow the insertion order. (`jax.tree.leaves` would sort the names.)
        return jnp.stack([jnp.asarray(loss, jnp.float32) for loss in losses.values()])
    losses = jnp.asarray(losses, jnp.float32)
    if losses.ndim != 1:
        raise ValueError(f"loss_fn must return a dict of scalars or an array f32[K], got shape {losses.shape}")
    return losses


def _losses_and_vjp(loss_fn: Callable, has_aux: bool, params: PyTree, args: tuple, kwargs: dict):
    """Runs the forward pass once; returns losses f32[K], the pull-back f32[K] -> gradient, and aux (None without)."""

    def stacked(params):
        result = loss_fn(params, *args, **kwargs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"With has_aux=True loss_fn must return (losses, aux), got a {type(result).__name__}")
        if not has_aux and isinstance(result, tuple):
            raise ValueError("loss_fn returned a tuple where losses were expected; for (losses, aux) pass has_aux=True")
        losses, aux = result if has_aux else (result, None)
        return stack_losses(losses), aux

    losses, pullback, aux = jax.vjp(stacked, params, has_aux=True)
    return losses, lambda cotangent: pullback(cotangent)[0], aux


def _rows(pullback: Callable, num_tasks: int, chunk_size: int | None) -> PyTree:
    """The rows of the Jacobian, `chunk_size` backward passes at a time."""
    cotangents = jnp.eye(num_tasks, dtype=jnp.float32)
    if chunk_size is None or chunk_size >= num_tasks:
        return jax.vmap(pullback)(cotangents)
    if chunk_size == 1:  # no vmap at all: some operations (ragged_dot) have no general batching rule
        return jax.lax.map(pullback, cotangents)
    return jax.lax.map(pullback, cotangents, batch_size=chunk_size)


def _check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be None or >= 1, got {chunk_size}")


def value_and_jacobian(loss_fn: Callable, has_aux: bool = False, chunk_size: int | None = None) -> Callable:
    """Like `jax.value_and_grad`, for a vector of losses.

    Args:
      loss_fn: `(params, *args) -> losses`, or `(losses, aux)` with `has_aux`; losses are an insertion-ordered dict of
        scalars or f32[K]. Not itself wrapped in `jax.jit` or `jax.checkpoint`: these return dicts with sorted names,
        and row k would no longer be the k-th task. Wrap the function that comes out of here, or the model inside.
      has_aux: whether `loss_fn` returns `(losses, aux)`.
      chunk_size: how many of the K backward passes run at once; bounds memory. None: all. 1: one by one, without vmap,
        for layers that have no batching rule.

    Returns:
      A function `(params, *args) -> (losses f32[K], jacobian)`, or `((losses, aux), jacobian)` with `has_aux`.
      `jacobian` is a pytree like `params` whose leaves have a leading axis K. The forward pass runs once.

    Raises:
      ValueError: if `loss_fn` returns something else, or `chunk_size` is less than 1.
    """
    _check_chunk_size(chunk_size)

    def value_and_jacobian_fn(params, *args, **kwargs):
        losses, pullback, aux = _losses_and_vjp(loss_fn, has_aux, params, args, kwargs)
        jacobian = _rows(pullback, losses.shape[0], chunk_size)
        return ((losses, aux) if has_aux else losses), jacobian

    return value_and_jacobian_fn


def num_rows(jacobian: PyTree) -> int:
    """K, after checking that every leaf has the same leading axis."""
    leaves = jax.tree.leaves(jacobian)
    if not leaves:
        raise ValueError("The Jacobian has no leaves: nothing to aggregate")
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            "Every leaf of a Jacobian must have the same leading task axis; the leading axes here are "
            f"{sorted(map(str, sizes))}. Use value_and_jacobian, not jax.grad, to get per-task gradients"
        )
    return sizes.pop()


def leaf_gramian(rows: jax.Array) -> jax.Array:
    """[K, ...] -> f32[K, K] inner products of the rows of one leaf, accumulated in float32."""
    # Contracted as it is: flattened, a leaf that a mesh shards along a minor axis would be gathered first.
    trailing = tuple(range(1, rows.ndim))
    return jnp.tensordot(rows, rows, axes=(trailing, trailing), precision=HIGHEST, preferred_element_type=jnp.float32)


def gramian(jacobian: PyTree) -> jax.Array:
    """G = J J^T as f32[K, K]: all inner products of per-task gradients."""
    num_rows(jacobian)
    return sum(leaf_gramian(leaf) for leaf in jax.tree.leaves(jacobian))


def combine(jacobian: PyTree, weights: jax.Array) -> PyTree:
    """d = sum_k weights_k g_k, a pytree of parameter shape and dtype. weights: f32[K]."""
    return jax.tree.map(
        lambda rows: jnp.tensordot(weights, rows, axes=1, precision=HIGHEST, preferred_element_type=jnp.float32).astype(
            rows.dtype
        ),
        jacobian,
    )


def value_and_weighted_grad(
    loss_fn: Callable, method: Any, has_aux: bool = False, chunk_size: int | None = None
) -> Callable:
    """The update of a Gramian or loss method without a K x P Jacobian.

    The Gramian is reduced leaf by leaf while the backward passes run; then one backward pass with the method's weights
    as cotangent gives the gradient. Methods that look at the losses only skip the Gramian and cost one backward pass.

    Args:
      loss_fn: as for `value_and_jacobian`.
      method: a transform of `mtjax.optim` that is derived from a `Weighting`, or a `Weighting`.
      has_aux: whether `loss_fn` returns `(losses, aux)`.
      chunk_size: backward passes at once while the Gramian is computed. None: all K, and each leaf's rows are dropped
        as soon as they are summed. Otherwise fewer passes are alive at a time, but the rows of all K are kept.

    Returns:
      A function `(params, state, *args) -> (losses f32[K], gradient, state)`, with `(losses, aux)` in the place of
      `losses` under `has_aux`. `state` is `method.init(params)` for a transform, `weighting.init(K)` for a weighting.

    Raises:
      ValueError: if the method needs more of the Jacobian than its Gramian; as for `value_and_jacobian`.
    """
    from mtjax.optim import base  # the transform contract stands on this module

    _check_chunk_size(chunk_size)
    bare = isinstance(method, base.Weighting)
    transform = base.from_weighting(method) if bare else method
    if getattr(transform, "weighting", None) is None:
        raise ValueError(
            "value_and_weighted_grad takes a method that is a Weighting (it needs the Gramian or the losses only); "
            "this one needs the Jacobian itself: use value_and_jacobian and the method's update"
        )
    weighting = transform.weighting

    def value_and_weighted_grad_fn(params, state, *args, **kwargs):
        losses, pullback, aux = _losses_and_vjp(loss_fn, has_aux, params, args, kwargs)
        num_tasks = losses.shape[0]
        state = base.MethodState.wrap(state, num_tasks) if bare else base.materialize(state, num_tasks)

        shared = base.shared_leaves(transform.is_shared, params)
        gram = None
        if weighting.needs_gramian:
            rows = _rows(pullback, num_tasks, chunk_size)
            shared = base.shared_leaves(transform.is_shared, params, rows)
            gram = base.shared_gramian(rows, shared)
        elif shared is None:
            rows = _rows(pullback, num_tasks, chunk_size)
            shared = base.shared_leaves(transform.is_shared, params, rows)
        state = base.weigh(weighting, gram, losses, state)
        gradient = pullback(state.weights)
        if not base.all_shared(shared):
            # Unused halves of the two passes are dead code: the trunk is walked back once for shared leaves only.
            gradient = base.select_shared(shared, gradient, pullback(jnp.ones_like(state.weights)))
        return ((losses, aux) if has_aux else losses), gradient, (state.inner if bare else state)

    return value_and_weighted_grad_fn


class Conflict(NamedTuple):
    """How much per-task gradients disagree.

    Attributes:
      cosine: f32[K, K], cos(g_i, g_j); 0 where a gradient is zero, except for 1 on the diagonal.
      magnitude_similarity: f32[K, K], 2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2) (Yu et al. 2020, definition 2); 1 for equal
        norms, 0 if exactly one of the two is zero.
      share: f32[], share of the K (K - 1) / 2 pairs with a negative cosine; 0 for K = 1.
    """

    cosine: jax.Array
    magnitude_similarity: jax.Array
    share: jax.Array


def conflict(jacobian_or_gramian: PyTree) -> Conflict:
    """Cosines, magnitude similarities and the share of conflicting pairs of per-task gradients.

    Args:
      jacobian_or_gramian: a Jacobian pytree (leaves with a leading axis K), or a Gramian: a bare array f32[K, K]. (A
        Jacobian that is a bare square array is therefore to be wrapped: `conflict({"w": jacobian})`.)

    Returns:
      A `Conflict`.

    Reference: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, definitions 1 and 2.
    """
    x = jacobian_or_gramian
    is_gramian = hasattr(x, "shape") and len(x.shape) == 2 and x.shape[0] == x.shape[1]
    gram = jnp.asarray(x, jnp.float32) if is_gramian else gramian(x)
    num_tasks = gram.shape[0]
    norm = jnp.sqrt(jnp.diagonal(gram))
    # Norms are divided one after the other: their product may leave float32's range where the ratio does not.
    inverse = jnp.where(norm > 0, 1.0 / jnp.where(norm > 0, norm, 1.0), 0.0)
    eye = jnp.eye(num_tasks, dtype=bool)
    cosine = jnp.where(eye, 1.0, jnp.clip(gram * inverse[:, None] * inverse[None, :], -1.0, 1.0))
    larger = jnp.maximum(norm[:, None], norm[None, :])
    ratio = jnp.minimum(norm[:, None], norm[None, :]) / jnp.where(larger > 0, larger, 1.0)
    similarity = jnp.where(larger > 0, 2 * ratio / (1 + ratio**2), 1.0)
    pairs = num_tasks * (num_tasks - 1) // 2
    return Conflict(cosine, similarity, jnp.sum(jnp.triu(gram < 0, 1)) / max(pairs, 1))
