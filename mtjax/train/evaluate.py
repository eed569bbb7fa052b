"""Evaluation and prediction over a split, in batches of one fixed shape, for a stack of runs at once.

Letters: L lanes, G selection groups, K tasks, B batch, N rows.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import metrics, sharding
from mtjax.tasks import Task, labels_and_weights, predictions

PyTree = Any
_LABELS = ("labels", "mask", "weight")
Results = dict[str, dict[str, np.ndarray]]


def num_rows(split: PyTree) -> int:
    """N, the leading axis of the columns of a split."""
    return int(np.shape(jax.tree.leaves(split)[0])[0])


def padded_batches(split: Mapping[str, Any], batch_size: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Batches of exactly `batch_size` rows and the number of real rows; the rows that pad the last have weight 0.

    On the ambient mesh a batch is split over the devices.
    """
    mesh = sharding.current_mesh()
    total = num_rows(dict(split))
    if total == 0:
        raise ValueError("There are no rows to evaluate or predict")
    size = min(batch_size, total)
    for start in range(0, total, size):
        rows = np.arange(start, start + size)
        real = rows < total
        batch = jax.tree.map(lambda column: column[np.minimum(rows, total - 1)], dict(split))  # noqa: B023
        batch["weight"] = np.where(real, batch.get("weight", np.ones(size)), 0.0).astype(np.float32)
        yield batch if mesh is None else sharding.place_rows(batch, mesh), int(real.sum())


def outputs_of(model: Any, tasks: Sequence[Task], per_task: bool, params: PyTree, batch: Mapping[str, Any]) -> PyTree:
    """task name -> output of one lane; with `per_task` the k-th set of parameters is the k-th task's."""
    if not per_task:
        return model.apply({"params": params}, batch)
    outputs = {}
    for k, task in enumerate(tasks):
        own = jax.tree.map(lambda leaf: leaf[k], params)  # noqa: B023
        outputs |= model.apply({"params": own}, batch, task=task.name)
    return outputs


@functools.partial(jax.jit, static_argnums=0)
def _statistics(tasks: tuple[Task, ...], outputs: PyTree, labels: Mapping[str, Any]) -> PyTree:
    """Metric states of all lanes. Apart from the model: the models of a comparison share this program."""

    def measure(task, output):
        label, weight = labels_and_weights(task, labels)
        return {metric.name: metric.statistic(task.predict(output), label, weight) for metric in task.metrics}

    return jax.vmap(lambda outputs: {task.name: measure(task, outputs[task.name]) for task in tasks})(outputs)


def merge_statistics(tasks: Sequence[Task], batches: Iterable[Mapping[str, Mapping[str, Any]]]) -> Results:
    """Metrics {task: {metric: f64[L]}} from their states on every batch, merged on the host in double precision."""
    states: dict[str, dict[str, Any]] = {task.name: {} for task in tasks}
    for new in map(sharding.to_host, batches):
        for task in tasks:
            merged = states[task.name]
            for metric in task.metrics:
                state = metrics.to_host(new[task.name][metric.name])
                merged[metric.name] = metric.merge(merged[metric.name], state) if metric.name in merged else state
    return {
        task.name: {m.name: np.atleast_1d(np.asarray(m.compute(states[task.name][m.name]))) for m in task.metrics}
        for task in tasks
    }


def make_evaluate(model: Any, tasks: Sequence[Task], *, batch_size: int = 4096, per_task: bool = False) -> Callable:
    """Builds the evaluation of stacked parameters on a split.

    Args:
      model: a Linen model (contract 7).
      tasks: tasks with their metrics.
      batch_size: rows per dispatch.
      per_task: parameters have two leading axes [L, K]: task k is evaluated with the k-th set.

    Returns:
      `(params, split, context=None) -> {task: {metric: f64[L]}}`; params with a leading axis L (and K if `per_task`).
    """

    run = jax.jit(jax.vmap(functools.partial(outputs_of, model, tasks, per_task), in_axes=(0, None)))

    def statistics(params, split, context):
        for batch, _ in padded_batches(split, batch_size):
            if context is not None:
                batch["context"] = context
            inputs = {key: batch[key] for key in batch if key not in _LABELS}
            labels = {key: batch[key] for key in _LABELS if key in batch}
            yield _statistics(tuple(tasks), run(params, inputs), labels)

    def evaluate(params: PyTree, split: Mapping[str, Any], context: Mapping[str, Any] | None = None) -> Results:
        return merge_statistics(tasks, statistics(params, split, context))

    return evaluate


def main_scores(tasks: Sequence[Task], results: Results) -> np.ndarray:
    """f64[L, K] main metrics, signed so that larger is better."""
    columns = [
        (1.0 if task.main_metric.higher_is_better else -1.0)
        * np.asarray(results[task.name][task.main_metric.name], np.float64)
        for task in tasks
    ]
    return np.stack(columns, axis=-1)


def undefined_scores(tasks: Sequence[Task], results: Results) -> np.ndarray:
    """bool[K]: tasks whose main metric has no value in any lane: no labels, or labels all alike."""
    return np.isnan(main_scores(tasks, results)).all(axis=0)


def selection_scores(scores: np.ndarray, undefined: np.ndarray, *, per_task: bool, step: int) -> np.ndarray:
    """What the best parameters are chosen by: for every task its score, or the mean over tasks.

    Args:
      scores: f64[L, K] of an evaluation, larger is better.
      undefined: bool[K], tasks without a score; they take no part in the mean.
      per_task: whether tasks choose apart.
      step: of the evaluation. It stands in where there is no score at all: the best parameters are then the latest.

    Returns:
      f64[L, G], G = K if `per_task`, else 1.

    >>> selection_scores(np.array([[0.5, np.nan]]), np.array([False, True]), per_task=False, step=7).tolist()
    [[0.5]]
    >>> selection_scores(np.array([[0.5, np.nan]]), np.array([False, True]), per_task=True, step=7).tolist()
    [[0.5, 7.0]]
    """
    if not per_task:
        scores = scores[:, ~undefined].mean(axis=1, keepdims=True) if not undefined.all() else scores[:, :1]
        undefined = undefined.all(keepdims=True)
    return np.where(undefined, float(step), scores)


def predict(
    model: Any,
    params: PyTree,
    tasks: Sequence[Task],
    split: Mapping[str, Any],
    *,
    context: Mapping[str, Any] | None = None,
    batch_size: int = 4096,
    per_task: bool = False,
) -> dict[str, np.ndarray]:
    """Predictions in original units on new rows, averaged over the lanes of `params` (an ensemble over seeds).

    Args:
      model, tasks: what was trained.
      params: leaves with a leading axis L (L, K if `per_task`).
      split: 'categorical' and 'numeric' columns of N rows.
      context: rows to attend to, for models with attention across rows.
      batch_size: rows per dispatch.
      per_task: as for `make_evaluate`.

    Returns:
      task name -> f32[N], or f32[N, C] for multiclass.
    """

    def of_lane(params, batch):
        return predictions(tasks, outputs_of(model, tasks, per_task, params, batch))

    @jax.jit
    def run(params, batch):
        return jax.tree.map(lambda p: jnp.mean(p, axis=0), jax.vmap(of_lane, in_axes=(0, None))(params, batch))

    pieces = []
    inputs = {key: split[key] for key in ("categorical", "numeric")}
    for batch, num_real in padded_batches(inputs, batch_size):
        if context is not None:
            batch["context"] = context
        pieces.append(jax.tree.map(lambda p: p[:num_real], sharding.to_host(run(params, batch))))  # noqa: B023
    return {task.name: np.concatenate([piece[task.name] for piece in pieces]) for task in tasks}
