r"""Per-task losses and gradients: the Jacobian of a vector of losses, its Gramian, and how much its rows conflict.

With K losses and parameters theta, row k of the Jacobian J is the gradient g_k of the k-th task. It is kept as a pytree
like `params`, every leaf with a leading axis K. What there is to be had, and what it costs beside the gradient of the
summed loss (one forward and one backward pass):

* `value_and_jacobian`: all rows, K backward passes;
* `value_and_disjoint_jacobian`: all rows where every task has examples of its own: hardly more than one pass over them;
* `directional_derivatives`: <g_k, v> of every task for one direction v, one forward-mode pass;
* `gramian`, `combine`, `conflict`: what most methods and diagnostics need of a Jacobian, as K x K arrays.

Updates without a K x P Jacobian in memory are in `mtjax.optim.routes`.

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

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax import sharding

PyTree = Any
HIGHEST = jax.lax.Precision.HIGHEST
SLICE = 65_536  # numbers of all rows together in a slice of `sliced_gramian`: a quarter of a megabyte


def stack_losses(losses: Mapping[str, jax.Array] | jax.Array) -> jax.Array:
    """A dict of K scalars (in insertion order) or an f[K] -> f[K], in float32 (float64 under x64).

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
        return jnp.stack([jnp.asarray(loss, float) for loss in losses.values()])
    losses = jnp.asarray(losses, float)
    if losses.ndim != 1:
        raise ValueError(f"loss_fn must return a dict of scalars or an array f32[K], got shape {losses.shape}")
    return losses


def stacked_loss(loss_fn: Callable, has_aux: bool, args: tuple, kwargs: dict) -> Callable:
    """`params -> (losses f[K], aux)`, with None for aux without it; checks what `loss_fn` returns."""

    def stacked(params):
        result = loss_fn(params, *args, **kwargs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"With has_aux=True loss_fn must return (losses, aux), got a {type(result).__name__}")
        if not has_aux and isinstance(result, tuple):
            raise ValueError("loss_fn returned a tuple where losses were expected; for (losses, aux) pass has_aux=True")
        losses, aux = result if has_aux else (result, None)
        return stack_losses(losses), aux

    return stacked


def losses_and_vjp(loss_fn: Callable, has_aux: bool, params: PyTree, args: tuple, kwargs: dict):
    """Runs the forward pass once; returns losses f[K], the pull-back f[K] -> gradient, and aux (None without)."""
    losses, pullback, aux = jax.vjp(stacked_loss(loss_fn, has_aux, args, kwargs), params, has_aux=True)
    return losses, lambda cotangent: pullback(cotangent)[0], aux


def rows_of(pullback: Callable, num_tasks: int, chunk_size: int | None) -> PyTree:
    """The rows of the Jacobian, `chunk_size` backward passes at a time."""
    cotangents = jnp.eye(num_tasks)
    if chunk_size is None or chunk_size >= num_tasks:
        return jax.vmap(pullback)(cotangents)
    if chunk_size == 1:  # no vmap at all: some operations (ragged_dot) have no general batching rule
        return jax.lax.map(pullback, cotangents)
    return jax.lax.map(pullback, cotangents, batch_size=chunk_size)


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be None or >= 1, got {chunk_size}")


def value_and_jacobian(
    loss_fn: Callable, has_aux: bool = False, chunk_size: int | None = None, *, separate: bool = False
) -> Callable:
    """Like `jax.value_and_grad`, for a vector of losses.

    Args:
      loss_fn: `(params, *args) -> losses`, or `(losses, aux)` with `has_aux`; losses are an insertion-ordered dict of
        scalars or f32[K]. Not itself wrapped in `jax.jit` or `jax.checkpoint`: these return dicts with sorted names,
        and row k would no longer be the k-th task. Wrap the function that comes out of here, or the model inside.
      has_aux: whether `loss_fn` returns `(losses, aux)`.
      chunk_size: how many of the K backward passes run at once; bounds memory. None: all. 1: one by one, without vmap,
        for layers that have no batching rule.
      separate: every task's row comes from a backward pass of its own loss alone. In a common one the other losses take
        part with cotangent 0, and 0 times infinity is NaN: a single bad task spoils every row. Needs losses as a dict;
        K backward passes are compiled instead of one.

    Returns:
      A function `(params, *args) -> (losses f32[K], jacobian)`, or `((losses, aux), jacobian)` with `has_aux`.
      `jacobian` is a pytree like `params` whose leaves have a leading axis K. The forward pass runs once.

    Raises:
      ValueError: if `loss_fn` returns something else, or `chunk_size` is less than 1.
    """
    check_chunk_size(chunk_size)

    def value_and_jacobian_fn(params, *args, **kwargs):
        if separate:
            losses, pullbacks, aux = separate_pullbacks(loss_fn, has_aux, params, args, kwargs)
            rows = [pullback() for pullback in pullbacks]
            jacobian = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        else:
            losses, pullback, aux = losses_and_vjp(loss_fn, has_aux, params, args, kwargs)
            jacobian = rows_of(pullback, losses.shape[0], chunk_size)
        return ((losses, aux) if has_aux else losses), jacobian

    return value_and_jacobian_fn


def separate_pullbacks(loss_fn: Callable, has_aux: bool, params: PyTree, args: tuple, kwargs: dict):
    """losses f[K], one function `() -> gradient` per task that sees no other task's loss, and aux.

    Raises:
      ValueError: if the losses are an array: a task's part of it cannot be told from the others'.
    """

    def losses_and_aux(params):
        result = loss_fn(params, *args, **kwargs)
        return result if has_aux else (result, None)

    losses, aux = losses_and_aux(params)
    if not isinstance(losses, Mapping):
        raise ValueError(
            "Leaving out tasks whose loss is not finite needs the losses as a dict of scalars: in an array f[K] all "
            f"tasks share one backward pass, in which NaN reaches every row; got an array of shape {jnp.shape(losses)}"
        )

    def pullback_of(name):
        # XLA computes what these forward passes have in common once.
        return lambda: jax.grad(lambda p: stack_losses({name: losses_and_aux(p)[0][name]})[0])(params)

    return stack_losses(losses), [pullback_of(name) for name in losses], aux


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


def leaf_gramian(rows: jax.Array, columns: jax.Array | None = None) -> jax.Array:
    """[K, ...] -> f[K, K] inner products of the rows of one leaf, with those of another one if given.

    Accumulated in float32, or float64 for float64 leaves.
    """
    columns = rows if columns is None else columns
    large = rows.ndim > 2 and rows.size > 4 * SLICE and rows[0, 0].size <= SLICE
    if large and jax.default_backend() == "cpu" and jax.device_count() == 1:
        return sliced_gramian(rows, columns)
    # Contracted as it is: flattened, a leaf that a mesh shards along a minor axis would be gathered first.
    trailing = tuple(range(1, rows.ndim))
    wide = jnp.promote_types(jnp.float32, rows.dtype)
    return jnp.tensordot(rows, columns, axes=(trailing, trailing), precision=HIGHEST, preferred_element_type=wide)


def sliced_gramian(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """`leaf_gramian` of leaves [K, n, ...] slice by slice along n: on a CPU several times faster than one contraction.

    XLA copies the operands of the latter, and streams them through memory; slices stay in the cache.
    """
    num_tasks, size = rows.shape[:2]
    step = min(size, max(1, SLICE // (num_tasks * rows[0, 0].size)))
    wide = jnp.promote_types(jnp.float32, rows.dtype)

    def product(start, length):
        a, b = (
            jax.lax.dynamic_slice_in_dim(leaf, start, length, axis=1).reshape(num_tasks, -1) for leaf in (rows, columns)
        )
        return jnp.matmul(a, b.T, precision=HIGHEST, preferred_element_type=wide)

    whole, rest = divmod(size, step)
    total = jax.lax.fori_loop(
        0, whole, lambda i, total: total + product(i * step, step), jnp.zeros((num_tasks, num_tasks), wide)
    )
    return total + product(whole * step, rest) if rest else total


def gramian(jacobian: PyTree, other: PyTree | None = None, counted: PyTree = True) -> jax.Array:
    """G = J J^T as f[K, K]: all inner products of per-task gradients.

    On an ambient mesh of `mtjax.sharding` every device sums over its own part of the split leaves, and one all-reduce
    of K x K numbers follows for all of them together.

    Args:
      jacobian: leaves [K, ...], of parameters.
      other: another Jacobian in the place of the second factor.
      counted: bool, or one bool per leaf (a Python bool, or traced): what takes part.
    """
    num_tasks = num_rows(jacobian)
    leaves = jax.tree_util.tree_leaves_with_path(jacobian)
    others = [None] * len(leaves) if other is None else jax.tree.leaves(other)
    flags = [counted] * len(leaves) if isinstance(counted, bool) else jax.tree.leaves(counted)
    mesh = sharding.auto_mesh()
    whole, split = [], []
    for (keys, rows), columns, flag in zip(leaves, others, flags, strict=True):
        spec = () if mesh is None else sharding.spec_of_rows(keys, rows.shape, mesh)
        if flag is not False:
            (split if any(spec) else whole).append((rows, columns, flag, spec))
    total = sum((_gram(*leaf[:3]) for leaf in whole), jnp.zeros((num_tasks, num_tasks)))
    return total + _split_gramian(split, mesh) if split else total


def _gram(rows: jax.Array, columns: jax.Array | None, flag: Any) -> jax.Array:
    gram = leaf_gramian(rows, columns)
    return gram if flag is True else jnp.where(flag, gram, 0.0)


def _split_gramian(leaves: list[tuple], mesh: Any) -> jax.Array:
    """The part of a Gramian of leaves (rows, columns, flag, partition) that a mesh splits, with one all-reduce."""
    specs = [spec for *_, spec in leaves]
    axes = tuple(name for name in mesh.axis_names if any(name in spec for spec in specs))
    # A leaf that is split over some of these axes only is summed by each of its copies.
    copies = [math.prod(mesh.shape[name] for name in axes if name not in spec) for spec in specs]

    def on_device(operands):
        grams = [_gram(*operand) / count for operand, count in zip(operands, copies, strict=True)]
        return jax.lax.psum(sum(grams), axes)

    operands = [(rows, columns, jnp.asarray(flag)) for rows, columns, flag, _ in leaves]
    in_specs = [(spec, None if columns is None else spec, sharding.P()) for _, columns, _, spec in leaves]
    return jax.shard_map(on_device, mesh=mesh, in_specs=(in_specs,), out_specs=sharding.P())(operands)


def combine(jacobian: PyTree, weights: jax.Array) -> PyTree:
    """d = sum_k weights_k g_k, a pytree of parameter shape and dtype. weights: f[K]."""

    def of_leaf(rows):
        wide = jnp.promote_types(weights.dtype, rows.dtype)
        return jnp.tensordot(weights, rows, axes=1, precision=HIGHEST, preferred_element_type=wide).astype(rows.dtype)

    return jax.tree.map(of_leaf, jacobian)


def value_and_disjoint_jacobian(loss_fn: Callable, *, chunk_size: int | None = None) -> Callable:
    """Per-task gradients where every task has examples of its own: one pass over all of them, no K-fold backward.

    On one batch that all tasks share, the trunk is walked back once per task. With separate examples each task's
    gradient only needs its own, so K tasks of B/K examples cost about what one batch of B does.

    Args:
      loss_fn: `(params, batch, task, *args) -> scalar loss` of the task with index `task` (i32[], traced), on a batch
        of that task.
      chunk_size: tasks at once; None: all.

    Returns:
      A function `(params, batches, *args) -> (losses f[K], jacobian)`; the leaves of `batches` have a leading axis K.
      `args` (a key, for example) are the same for every task.

    Raises:
      ValueError: if the leaves of `batches` do not share a leading axis, or `chunk_size` is less than 1.

    >>> def loss_fn(params, x, task):
    ...     return jnp.mean((x @ params["trunk"] * params["gain"][task]) ** 2)
    >>> params = {"trunk": jnp.ones(3), "gain": jnp.array([1.0, 2.0])}
    >>> losses, jacobian = value_and_disjoint_jacobian(loss_fn)(params, jnp.ones((2, 5, 3)))
    >>> losses.tolist(), jacobian["gain"].tolist()
    ([9.0, 36.0], [[18.0, 0.0], [0.0, 36.0]])
    """
    check_chunk_size(chunk_size)

    def value_and_disjoint_jacobian_fn(params, batches, *args):
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(f"The leaves of `batches` need one leading axis of tasks, got {sorted(map(str, sizes))}")
        num_tasks = sizes.pop()[0]

        def one(task_and_batch):
            task, batch = task_and_batch
            loss, gradient = jax.value_and_grad(loss_fn)(params, batch, task, *args)
            return stack_losses({f"{task}": loss})[0], gradient

        inputs = (jnp.arange(num_tasks), batches)
        if chunk_size is None or chunk_size >= num_tasks:
            return jax.vmap(one)(inputs)
        return jax.lax.map(one, inputs, batch_size=None if chunk_size == 1 else chunk_size)

    return value_and_disjoint_jacobian_fn


def directional_derivatives(loss_fn: Callable, has_aux: bool = False) -> Callable:
    """<g_k, v> for all tasks and one direction v, by one forward-mode pass: no per-task gradient is computed.

    Args:
      loss_fn: as for `value_and_jacobian`.
      has_aux: likewise.

    Returns:
      A function `(params, direction, *args) -> (losses f[K], derivatives f[K])`, with `(losses, aux)` in the place of
      `losses` under `has_aux`; `direction` is a pytree like `params`. Layers with a hand-written backward pass only
      (`jax.custom_vjp`) have no forward mode: JAX raises a TypeError.

    >>> import jax.numpy as jnp
    >>> fn = directional_derivatives(lambda p: {"a": p[0] * p[1], "b": p[0] - p[1]})
    >>> [value.tolist() for value in fn(jnp.array([2.0, 3.0]), jnp.array([1.0, 1.0]))]
    [[6.0, -1.0], [5.0, 0.0]]
    """

    def directional_derivatives_fn(params, direction, *args, **kwargs):
        stacked = stacked_loss(loss_fn, has_aux, args, kwargs)
        losses, derivatives, aux = jax.jvp(stacked, (params,), (direction,), has_aux=True)
        return ((losses, aux) if has_aux else losses), derivatives

    return directional_derivatives_fn


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
    gram = jnp.asarray(x, float) if is_gramian else gramian(x)
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
