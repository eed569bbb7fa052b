"""Rendered rooms as the studies of dense vision tasks use them: data, tasks, no-learning baselines, figures, timing.

Letters: K tasks, S seeds, E experts, n images.
"""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from training import Arm

from mtjax import dense_tasks, plots_vision
from mtjax.data import rooms
from mtjax.dense_tasks import DenseTask
from mtjax.plots_objectives import save_small
from mtjax.sharding import to_host
from mtjax.train.evaluate import padded_batches
from mtjax.train.images import fix_edge_threshold, make_image_evaluate, normalise_image

PyTree = Any
TASKS = ("segmentation", "depth", "normals", "edge")


def make_tasks(names: Sequence[str]) -> tuple[DenseTask, ...]:
    """The tasks with the weights of their losses that the published multitask decoders use (1, 1, 10, 50)."""
    made = {
        "segmentation": lambda: dense_tasks.segmentation(num_classes=len(rooms.ROOM_CLASSES)),
        "depth": dense_tasks.depth,
        "normals": dense_tasks.normals,
        # A fifth of the pixels is edge at this size, where 5 % of a photograph's are.
        "edge": lambda: dense_tasks.edge(positive_weight=0.8),
    }
    unknown = [name for name in names if name not in made]
    if unknown or not names:
        raise ValueError(f"tasks must be among {', '.join(made)}, got {', '.join(names) or 'none'}")
    return tuple(made[name]() for name in names)


def head_sizes(tasks: Sequence[DenseTask]) -> dict[str, int]:
    return {task.name: task.channels for task in tasks}


def no_learning(tasks: Sequence[DenseTask], data: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """What predictors reach that never look at the image, {name: {task: {main metric: value}}}."""
    found = rooms.baselines(data["train"], data["test"])
    names = {"constant": "no learning, constant", "per_pixel": "no learning, per pixel"}
    return {
        name: {task.name: {task.main_metric.name: found[task.name][key]} for task in tasks if key in found[task.name]}
        for key, name in names.items()
    }


def judged(model: Any, tasks: Sequence[DenseTask], validation: Mapping[str, Any]) -> Callable[[PyTree], Any]:
    """`params -> (tasks, evaluate)` with the thresholds of edges fixed on validation images, seed by seed."""

    def judge(params):
        fixed = fix_edge_threshold(model, params, tasks, validation)
        return fixed, make_image_evaluate(model, fixed)

    return judge


def collect_stats(model: Any, params: PyTree, split: Mapping[str, Any], *, batch_size: int = 64) -> dict[str, Any]:
    """What the model's layers report on a split, as means over its images weighted by batch: {layer: pytree}.

    Args:
      model: a model that takes `with_aux`.
      params: leaves [S, ...].
      split: 'image' of n images; those after the last whole batch are left out.
      batch_size: images per dispatch.

    Returns:
      {layer: statistics whose leaves have a leading axis S}.
    """

    @jax.jit
    def run(params, image):
        batch = {"image": normalise_image(image)}
        return jax.vmap(lambda own: model.apply({"params": own}, batch, with_aux=True)[1])(params)

    found, count = None, 0
    for rows, real in padded_batches({"image": split["image"]}, min(batch_size, len(split["image"]))):
        if real == len(rows["image"]):
            new = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), to_host(run(params, rows["image"])))
            found = new if found is None else jax.tree.map(np.add, found, new)
            count += 1
    return jax.tree.map(lambda leaf: leaf / count, found)


def seconds_per_image(apply: Callable[[PyTree, Any], Any], params: PyTree, images: np.ndarray, repeats: int) -> float:
    """The shortest of several timed runs of a compiled model, per image."""
    run = jax.jit(apply)
    jax.block_until_ready(run(params, images))
    best = np.inf
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(params, images))
        best = min(best, time.perf_counter() - began)
    return float(best / len(images))


def draw_predictions(
    arms: Mapping[str, Arm], split: Mapping[str, Any], folder: pathlib.Path, count: int
) -> pathlib.Path:
    """Input, truth and the predictions of some arms' first seed, side by side; arms by their heading."""
    images, tasks = split["image"][:count], next(iter(arms.values())).tasks
    batch = {"image": normalise_image(images)}
    outputs = {name: to_host(jax.jit(arm.model.apply)({"params": arm.of_seed(0)}, batch)) for name, arm in arms.items()}
    figure = plots_vision.prediction_grid(
        images,
        {task.name: split["labels"][task.name][:count] for task in tasks},
        outputs,
        tasks,
        classes={"segmentation": rooms.ROOM_CLASSES},
    )
    return save_small(figure, folder / "predictions.png")
