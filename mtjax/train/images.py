r"""Training on images: an image in, one map per dense task out.

A split holds one row per image: 'image' u8[n, H, W, 3] and 'labels' {task: [n, ...]} as they are stored (u8, float16);
both are decoded in the step, so that a data set takes a few bytes per pixel on the device. The loss of a task is its
weight times the mean over the labelled pixels of the batch (`mtjax.dense_losses`). A model may return auxiliary
predictions under '<task>/<anything>' (deep supervision): they get the loss of their task, which is added to it.

A mixture of experts adds its own losses through `regularizer`, which reads what the routers did.

Letters: n rows, B batch, H x W pixels, K tasks, L lanes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import sharding, threshold_metrics
from mtjax.dense_tasks import DenseTask, edge
from mtjax.train.evaluate import Results, merge_statistics, num_rows, outputs_of, padded_batches
from mtjax.train.feed import first_rows
from mtjax.train.problem import Evaluator, Problem

PyTree = Any
Regularizer = Callable[[Mapping[str, Any], Sequence[DenseTask]], Mapping[str, jax.Array]]
_LUMA = (0.299, 0.587, 0.114)


def normalise_image(image: jax.Array) -> jax.Array:
    """Bytes u8[..., 3] -> f32[..., 3] in [-1, 1], `2 (x / 255 - 1/2)`; floating images are taken as normalised.

    The statistics of ImageNet would do the same up to an affine map of each channel, which the first layer can learn.
    """
    image = jnp.asarray(image)
    return (image.astype(jnp.float32) / 255.0 - 0.5) * 2.0 if image.dtype == jnp.uint8 else image.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes of training images, drawn for each image from the rng of the step.

    Attributes:
      flip: probability of mirroring left to right, labels included (the x of normals changes its sign).
      brightness: b: the image is multiplied with a number from 1 - b to 1 + b.
      contrast: c: its distance to its mean, likewise.
      saturation: s: its distance to its grey version, likewise.

    Raises:
      ValueError: if a setting is not between 0 and 1.
    """

    flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise ValueError(f"Augment.{field.name} must be between 0 and 1, got {getattr(self, field.name)}")

    def __call__(self, rng: jax.Array, batch: Mapping[str, Any], tasks: Sequence[DenseTask]) -> dict[str, Any]:
        """The batch {'image' f32[B, H, W, 3] in [-1, 1], 'labels'}, both changed; colours are clipped to [-1, 1]."""
        image = batch["image"]
        size, width = image.shape[0], image.shape[2]
        key_flip, key_colour = jax.random.split(rng)
        flipped = jax.random.uniform(key_flip, (size,)) < self.flip

        def either(mirrored, as_it_is):
            chosen = flipped.reshape(-1, *([1] * (as_it_is.ndim - 1)))
            return jnp.where(chosen, mirrored, as_it_is)

        image = either(jnp.flip(image, axis=2), image)
        labels = dict(batch["labels"])
        for task in tasks:
            label = jax.tree.map(jnp.asarray, labels[task.name])
            labels[task.name] = jax.tree.map(either, task.mirror(label, width), label)
        bounds = jnp.array([self.brightness, self.contrast, self.saturation]).reshape(3, 1)
        factors = 1.0 + bounds * jax.random.uniform(key_colour, (3, size), minval=-1.0, maxval=1.0)
        brighter, contrast, saturation = factors.reshape(3, size, 1, 1, 1)
        colour = (image + 1.0) / 2.0 * brighter
        mean = colour.mean((1, 2, 3), keepdims=True)
        colour = mean + contrast * (colour - mean)
        grey = (colour * jnp.array(_LUMA).reshape(1, 1, 1, 3)).sum(-1, keepdims=True)
        colour = grey + saturation * (colour - grey)
        return {**batch, "image": jnp.clip(colour, 0.0, 1.0) * 2.0 - 1.0, "labels": labels}


def image_losses(
    tasks: Sequence[DenseTask], outputs: Mapping[str, jax.Array], labels: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Weighted loss of each task, `weight * mean over labelled pixels`, auxiliary predictions '<task>/...' included."""
    losses = {}
    for task in tasks:  # tasks differ in kind and shape: a loop at trace time
        label = labels[task.name]
        _check_output(task, outputs, label)
        own = [name for name in outputs if name == task.name or name.startswith(f"{task.name}/")]
        losses[task.name] = task.weight * sum(task.loss(outputs[name], label) for name in own)
    return losses


def _check_output(task: DenseTask, outputs: Mapping[str, jax.Array], label: Any) -> None:
    if task.name not in outputs:
        raise ValueError(f"The model has no output '{task.name}'; its outputs are {', '.join(outputs) or 'none'}")
    shape = outputs[task.name].shape
    if task.kind == "detection":
        fits, expected = len(shape) == 4 and shape[-1] == task.channels, ["B", "h", "w", task.channels]
    else:
        rows = label.shape[:-1] if task.kind == "normals" else label.shape
        fits, expected = shape == (*rows, task.channels), [*rows, task.channels]
    if not fits:
        raise ValueError(f"The output '{task.name}' must have shape {expected}, got {list(shape)}")


def image_loss(
    model: Any,
    tasks: Sequence[DenseTask],
    *,
    regularizer: Regularizer | None = None,
    augment: Augment | None = None,
) -> Callable:
    """The loss function of a Linen model on labelled images (contract 1): one loss per task.

    Args:
      model: `apply({'params': params}, batch, train=True, rngs=...) -> {task: f[B, H, W, channels]}`; with a
        regularizer it is called with `with_aux=True` and returns (outputs, {layer: RouterStats}).
      tasks: order of the losses.
      regularizer: `(aux, tasks) -> {name: f[]}`. What is named as a task is added to its loss; other names are rows of
        their own, after the tasks.
      augment: random changes of the images; any `(rng, batch, tasks) -> batch`.

    Returns:
      `loss_fn(params, batch, rng) -> dict[str, f32[]]`; batch: rows of a split.
    """

    def loss_fn(params, rows, rng):
        key_augment, key_dropout, key_gate = jax.random.split(rng, 3)
        batch = {**rows, "image": normalise_image(rows["image"])}
        if augment is not None:
            batch = augment(key_augment, batch, tasks)
        extra = {} if regularizer is None else {"with_aux": True}
        rngs = {"dropout": key_dropout, "gate": key_gate}
        result = model.apply({"params": params}, batch, train=True, rngs=rngs, **extra)
        outputs, aux = result if regularizer is not None else (result, None)
        _check_grid(tasks, outputs, batch["image"])
        losses = image_losses(tasks, outputs, batch["labels"])
        if regularizer is not None:
            for name, value in regularizer(aux, tasks).items():
                losses[name] = losses[name] + value if name in losses else value
        return losses

    return loss_fn


def _check_grid(tasks: Sequence[DenseTask], outputs: Mapping[str, jax.Array], image: jax.Array) -> None:
    """That the cells of a detection output have the size that its task says."""
    for task in tasks:
        if task.kind == "detection" and task.name in outputs:
            grid, stride = outputs[task.name].shape[1:3], task.option("stride")
            if tuple(n * stride for n in grid) != image.shape[1:3]:
                raise ValueError(
                    f"Task '{task.name}' has cells of stride={stride} pixels, but the model gives {grid[0]} x "
                    f"{grid[1]} cells for images of {image.shape[1]} x {image.shape[2]}"
                )


def make_image_evaluate(
    model: Any, tasks: Sequence[DenseTask], *, batch_size: int = 64, per_task: bool = False
) -> Evaluator:
    """Builds the evaluation of stacked parameters on a split.

    Args:
      model: a Linen model (contract 7).
      tasks: tasks with their metrics.
      batch_size: images per dispatch.
      per_task: parameters have leading axes [L, K]: task k is evaluated with the k-th set, and `task=` its name.

    Returns:
      `(params, split) -> {task: {metric: f64[L]}}`.
    """

    def of_lane(params, rows, weight):
        batch = {**rows, "image": normalise_image(rows["image"])}
        outputs = outputs_of(model, tasks, per_task, params, batch)
        _check_grid(tasks, outputs, batch["image"])
        states = {}
        for task in tasks:
            label = batch["labels"][task.name]
            _check_output(task, outputs, label)
            prediction = task.predict(outputs[task.name])
            states[task.name] = {m.name: m.statistic(prediction, label, weight) for m in task.metrics}
        return states

    run = jax.jit(jax.vmap(of_lane, in_axes=(0, None, None)))

    def statistics(params, split):
        for rows, _ in padded_batches(_columns(split, tasks), batch_size):
            yield run(params, rows, rows.pop("weight"))

    def evaluate(params: PyTree, split: Mapping[str, Any]) -> Results:
        _check_columns("the split", split, tasks)
        return merge_statistics(tasks, statistics(params, split))

    return evaluate


def _columns(split: Mapping[str, Any], tasks: Sequence[DenseTask]) -> dict[str, Any]:
    """Image and the labels of the tasks: other columns and labels of a split are not moved to the device."""
    return {"image": split["image"], "labels": {task.name: split["labels"][task.name] for task in tasks}}


def image_problem(
    model: Any,
    tasks: Sequence[DenseTask],
    train: Mapping[str, Any],
    validation: Mapping[str, Any],
    *,
    regularizer: Regularizer | None = None,
    augment: Augment | None = None,
    eval_batch_size: int = 64,
    loss_rows: Sequence[str] | None = None,
) -> Problem:
    """What `fit_problem` trains: a model of dense tasks on the images of a split.

    Args:
      model: a Linen model (contract 7); `with_aux` is passed only if there is a regularizer.
      tasks: in the order of the losses.
      train, validation: splits: 'image' u8[n, H, W, 3] and 'labels' {task: [n, ...]}; what else they hold is ignored.
        `train` may be a stream of such rows, of which the first batch is checked.
      regularizer: `(aux: {layer: RouterStats}, tasks) -> {name: f[]}`, see `image_loss`.
      augment: changes of the training images.
      eval_batch_size: images per dispatch at evaluation.
      loss_rows: names of the losses in their order, where the regularizer has rows of its own. None finds them by an
        abstract run of the loss (no computation).

    Raises:
      ValueError: if a task has no labels in a split, or labels do not fit it.
    """
    tasks = tuple(tasks)
    in_memory = isinstance(train, Mapping)
    example = _columns(first_rows(train, 2), tasks) if not in_memory else None
    for name, split in (("train", train if in_memory else example), ("validation", validation)):
        _check(name, split, tasks)
    train, validation = _columns(train, tasks) if in_memory else train, _columns(validation, tasks)
    example = first_rows(train, 2) if in_memory else example

    def init_params(key):
        rows = jax.tree.map(jnp.asarray, example)
        batch = {**rows, "image": normalise_image(rows["image"])}
        rngs = dict(zip(("params", "dropout", "gate"), jax.random.split(key, 3), strict=True))
        # In training mode: what only training runs (auxiliary branches) has parameters too.
        return model.init(rngs, batch, train=True)["params"]

    @functools.cache  # one program, however often it is asked for
    def evaluator(per_task: bool) -> Evaluator:
        return make_image_evaluate(model, tasks, batch_size=eval_batch_size, per_task=per_task)

    loss_fn = image_loss(model, tasks, regularizer=regularizer, augment=augment)
    if regularizer is not None and loss_rows is None:
        rows = jax.tree.map(lambda column: jax.ShapeDtypeStruct(column.shape, column.dtype), example)
        key = jax.random.key(0)
        # Keys of a dictionary that leaves a transformation are sorted: the order is read inside.
        order = []
        jax.eval_shape(lambda *args: order.extend(loss_fn(*args)), jax.eval_shape(init_params, key), rows, key)
        loss_rows = tuple(order)
    if loss_rows is not None and tuple(loss_rows) == tuple(task.name for task in tasks):
        loss_rows = None
    return Problem(tasks, train, validation, loss_fn, init_params, evaluator, loss_rows)


def _check_columns(name: str, split: Mapping[str, Any], tasks: Sequence[DenseTask]) -> None:
    if {"image", "labels"} - split.keys():
        raise ValueError(f"{name} must have the columns 'image' and 'labels', got {', '.join(split) or 'none'}")
    for task in tasks:
        if task.name not in split["labels"]:
            known = ", ".join(split["labels"]) or "none"
            raise ValueError(f"Task '{task.name}' has no labels in {name}: its labels are {known}")


def _check(name: str, split: Mapping[str, Any], tasks: Sequence[DenseTask]) -> None:
    """Once before training: this reads all labels."""
    _check_columns(name, split, tasks)
    image, labels = np.shape(split["image"]), split["labels"]
    if len(image) != 4:
        raise ValueError(f"{name}['image'] must have shape [n, H, W, channels], got {list(image)}")
    for task in tasks:
        try:
            task.check_labels(labels[task.name], tuple(image[1:3]))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        rows = num_rows(labels[task.name])
        if rows != image[0]:
            raise ValueError(f"{name} has {image[0]} images, but {rows} labels of task '{task.name}'")


def predict_images(
    model: Any,
    params: PyTree,
    tasks: Sequence[DenseTask],
    split: Mapping[str, Any],
    *,
    batch_size: int = 64,
    per_task: bool = False,
) -> dict[str, Any]:
    """Predictions in original units for all images of a split.

    Args:
      model: a Linen model.
      params: of one lane; leaves with a leading axis K if `per_task`.
      tasks: what to predict.
      split: 'image' of n images.
      batch_size: images per dispatch.
      per_task: task k has the k-th set of parameters.

    Returns:
      {task: array of n rows, as `DenseTask.predict` gives it}.
    """

    @jax.jit
    def run(params, image):
        outputs = outputs_of(model, tasks, per_task, params, {"image": normalise_image(image)})
        return {task.name: task.predict(outputs[task.name]) for task in tasks}

    pieces = [
        jax.tree.map(lambda leaf: leaf[:real], sharding.to_host(run(params, rows["image"])))  # noqa: B023
        for rows, real in padded_batches({"image": split["image"]}, batch_size)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)


def fix_edge_threshold(
    model: Any,
    params: PyTree,
    tasks: Sequence[DenseTask],
    validation: Mapping[str, Any],
    *,
    batch_size: int = 64,
    per_task: bool = False,
) -> tuple[DenseTask, ...]:
    """The tasks with the threshold of each edge task fixed on validation images, one for each lane of the parameters.

    Args:
      model: a Linen model.
      params: leaves with a leading axis L (L, K if `per_task`).
      tasks: all tasks of the model, in their order.
      validation: a split.
      batch_size, per_task: as for `make_image_evaluate`.

    Returns:
      The same tasks; edge tasks judge by F at their threshold (`edge_f`) first. Use them to evaluate the same lanes.
    """

    def search(task):
        distance = task.option("max_distance")
        metric = threshold_metrics.edge_ods_threshold(max_distance=distance, ignore=task.ignore)
        return dataclasses.replace(task, metrics=(metric,))

    if not any(task.kind == "edge" for task in tasks):
        return tuple(tasks)
    searched = tuple(search(task) if task.kind == "edge" else task for task in tasks)
    evaluate = make_image_evaluate(model, searched, batch_size=batch_size, per_task=per_task)
    results = evaluate(params, validation)

    def fixed(task):
        if task.kind != "edge":
            return task
        return edge(
            task.name,
            weight=task.weight,
            positive_weight=task.option("positive_weight"),
            threshold=tuple(float(t) for t in results[task.name]["ods_threshold"]),
            max_distance=task.option("max_distance"),
            ignore=task.ignore,
        )

    return tuple(fixed(task) for task in tasks)
