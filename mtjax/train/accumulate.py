r"""Gradient accumulation that is exact for every multi-objective method: one loss function of many micro-batches.

A method needs the per-task gradients of the *whole* batch: weights from micro-batches, averaged, are other weights. So
nothing here knows of gradients. The loss of task k over M micro-batches is

    L_k = sum_m n_km L_km / sum_m n_km          n_km: labelled examples of task k in micro-batch m

computed by a loop that keeps no activations: on the way back each micro-batch is run again. By linearity of the
derivative, whatever asks this function for a Jacobian, a Gramian, a weighted gradient or a loss gets that of the whole
batch, with the activations of one micro-batch in memory.

Not the same as on the whole batch: what is no sum over examples. Attention across rows sees the rows of a micro-batch;
a balance loss of a router becomes the mean of those of the micro-batches; capacity is that of a micro-batch; dropout
and augmentation draw from one key per micro-batch.

Cost: a second forward pass. The rows of the Jacobian are summed over micro-batches, so `Gramian first` has no layers
without rows (`mtjax.layer_rows`) and all K in memory; with `chunk_size=c` it is c.

Letters: K tasks, B rows of a batch, M micro-batches.

>>> def loss_fn(params, batch, rng):
...     return {"price": ((params * batch["x"] - batch["labels"]["price"]) ** 2).mean()}
>>> batch = {"x": jnp.arange(4.0), "labels": {"price": jnp.ones(4)}}
>>> accumulate(loss_fn, 2)(jnp.array(2.0), batch, jax.random.key(0))["price"].item()
9.0
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtjax.dense_tasks import DenseTask
from mtjax.gradients import stack_losses
from mtjax.tasks import Task, labels_and_weights

PyTree = Any
Counts = Callable[[PyTree], jax.Array | Mapping[str, jax.Array]]


def accumulate(loss_fn: Callable, steps: int, *, counts: Counts | None = None) -> Callable:
    """The losses of a batch from those of `steps` micro-batches, one after the other.

    Args:
      loss_fn: `(params, batch, rng) -> losses` (contract 1), a mean over labelled examples for each task.
      steps: M, micro-batches; must divide B.
      counts: `batch -> n`, over how many examples each loss is a mean: f[K], or {name: f[]}, in which losses f[K] find
        theirs by position, and named ones by name; those that are not named count all rows. `labelled(tasks)` is made
        for this. None: rows with a label, for losses named like batch['labels'] (NaN, 'mask' and 'weight' as in
        `mtjax.tasks`); all rows for others.

    Returns:
      `(params, batch, rng=None) -> losses`, in the form and order in which `loss_fn` has them. Every leaf of `batch`
      has a leading axis B.

    Raises:
      ValueError: if `steps` < 1; later, if it does not divide B, or losses and counts do not fit, or `loss_fn` returns
        more than losses.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if steps == 1:
        return loss_fn

    def accumulated(params, batch, rng=None):
        micro_batches = split_rows(batch, steps)
        form = []  # what `loss_fn` returns; in the order of the tasks, which a dictionary loses under `checkpoint`

        @jax.checkpoint
        def sums(params, rows, index):
            losses = loss_fn(params, rows, None if rng is None else jax.random.fold_in(rng, index))
            if isinstance(losses, tuple):
                raise ValueError(
                    "accumulate takes a loss function that returns losses only, got a tuple: what losses carry from "
                    "step to step, or return beside them, is not defined for a part of a batch"
                )
            names = list(losses) if isinstance(losses, Mapping) else None
            form[:] = [names]
            values = list(stack_losses(losses)) if names is None else list(losses.values())
            counted = _by_name(rows, names) if counts is None else counts(rows)
            examples = _counted(names, len(values), rows, counted)
            totals = [jnp.asarray(v, float) * _at_least_one(n) for v, n in zip(values, examples, strict=True)]
            return totals, examples

        def add(total, step):
            # Lists of scalars, not arrays f[K]: a task that is left out for a bad loss must not reach the others.
            return jax.tree.map(jnp.add, total, sums(params, *step)), None

        first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
        shapes = jax.eval_shape(sums, params, first, jnp.asarray(0))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (losses, examples), _ = jax.lax.scan(add, zeros, (micro_batches, jnp.arange(steps)))
        losses = [loss / _at_least_one(n) for loss, n in zip(losses, examples, strict=True)]
        return jnp.stack(losses) if form[0] is None else dict(zip(form[0], losses, strict=True))

    return accumulated


def _at_least_one(count: jax.Array) -> jax.Array:
    """What a mean over `count` divides by: 1 for none, as the losses here do. (Images without objects have a loss.)"""
    return jnp.where(count > 0, count, 1.0)


def labelled(tasks: Sequence[Task | DenseTask]) -> Counts:
    """Counts for `accumulate`: the sum of the weights of a task's labelled rows, or its labelled pixels (or objects).

    Args:
      tasks: of a table (`labels_and_weights`), of images (as their losses count them), or of fields: rows then have a
        column 'task', positions in `tasks`.

    Returns:
      `batch -> {task name: f[]}`.
    """

    def counts(batch):
        if "labels" not in batch and "task" in batch:
            return {task.name: (batch["task"] == k).sum().astype(float) for k, task in enumerate(tasks)}
        return {task.name: _labelled_of(task, batch) for task in tasks}

    return counts


def _labelled_of(task: Task | DenseTask, batch: Mapping[str, Any]) -> jax.Array:
    if isinstance(task, Task):
        return labels_and_weights(task, batch)[1].sum()
    label = batch["labels"][task.name]
    if task.kind == "detection":
        stride = task.option("stride")
        height, width = batch["image"].shape[1:3]
        shape = (len(batch["image"]), height // stride, width // stride)
    else:
        shape = label.shape[:-1] if task.kind == "normals" else label.shape
    # As the loss itself counts; the loss of zeros beside it is dead code.
    return task.per_image(jnp.zeros((*shape, task.channels)), label).count.sum()


def _by_name(batch: PyTree, names: list[str] | None) -> dict[str, jax.Array]:
    """Labelled rows of all labels of a batch, which have to be f[B]."""
    labels = batch.get("labels", {}) if isinstance(batch, Mapping) else {}
    if labels and names is None:  # jit sorts the labels
        raise ValueError(
            f"The losses are an array f[K], so their names do not tell which of the labels {', '.join(labels)} each of "
            "them is a mean over: pass counts=labelled(tasks)"
        )
    for name, label in labels.items():
        if not hasattr(label, "dtype") or label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.floating):
            raise ValueError(
                f"The label of task '{name}' is no array f[B], so how many examples have one is not known to "
                "accumulate: pass counts=labelled(tasks)"
            )
    return {name: labels_and_weights(Task(name, "count"), batch)[1].sum() for name in labels}


def _counted(names: list[str] | None, num_tasks: int, batch: PyTree, counts: Any) -> list[jax.Array]:
    """One number per loss."""
    if isinstance(counts, Mapping) and (names is not None or not counts):
        all_rows = jnp.asarray(len(jax.tree.leaves(batch)[0]), float)
        return [jnp.asarray(counts.get(name, all_rows), float) for name in names or [None] * num_tasks]
    counts = list(counts.values()) if isinstance(counts, Mapping) else counts
    if len(counts) != num_tasks:
        raise ValueError(f"counts must return one number for each of {num_tasks} losses, got {len(counts)}")
    return [jnp.asarray(n, float) for n in counts]


def split_rows(batch: PyTree, steps: int) -> PyTree:
    """Leaves [B, ...] -> [steps, B / steps, ...]; micro-batch m has the rows m, m + steps, ...

    In strides, so that a batch whose rows are spread over the devices of a mesh has micro-batches that are: none has to
    move.

    Raises:
      ValueError: if a leaf has no leading axis B, or `steps` does not divide it.
    """
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(f"Every leaf of a batch must have the same leading axis, got {sorted(map(str, sizes))}")
    (rows,) = sizes
    if rows % steps:
        raise ValueError(f"A batch of {rows} rows cannot be cut into steps={steps} micro-batches of the same size")
    return jax.tree.map(lambda leaf: leaf.reshape(rows // steps, steps, *leaf.shape[1:]).swapaxes(0, 1), batch)
