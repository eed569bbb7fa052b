"""Training on fields: functions in, values at points out, one task per functional form or geometry.

A split holds one row per function: 'inputs' (what the branch reads), 'values' f[n, N] (or f[n, N, C]), 'task' i[n].
What all functions share is given once: 'points' f[N, d], and tables by task such as the mask of a geometry, bool[K, N].
Where every function has a geometry of its own, 'mask' and 'distance' [n, N] are columns of the split instead.

Letters: n rows, B batch, N points, d coordinates, C outputs, K tasks, L lanes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import losses, sharding
from mtjax.tasks import Task
from mtjax.train.evaluate import Results, merge_statistics, padded_batches
from mtjax.train.feed import first_rows
from mtjax.train.problem import Evaluator, Problem

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Domain:
    """What the functions of a data set share.

    Attributes:
      points: f[N, d], where values are given.
      mask: bool[K, N], which points belong to the domain of each task; None: all.
      distance: f[K, N], distance to the boundary (0 on it) for models with a hard boundary condition; None: none.
    """

    points: np.ndarray
    mask: np.ndarray | None = None
    distance: np.ndarray | None = None

    def batch(self, rows: Mapping[str, Any], where: jax.Array | None = None) -> dict[str, Any]:
        """The batch of some rows, at all points or at those numbered i[M]: their columns with those of their tasks."""
        take = (lambda leaf, axis: leaf) if where is None else functools.partial(jnp.take, indices=where)
        batch = {**rows, "points": take(jnp.asarray(self.points), axis=0)}
        if "values" in rows:
            batch["values"] = take(rows["values"], axis=1)
        for name in ("mask", "distance"):
            table = getattr(self, name)
            if name in rows:
                batch[name] = take(rows[name], axis=1)
            elif table is not None:
                batch[name] = take(jnp.asarray(table), axis=1)[rows["task"]]
        return batch


def flat_targets(output: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Output and target as f[B, M], M all points and outputs; the target is NaN at points outside of the domain."""
    values = batch["values"]
    if "mask" in batch:
        mask = batch["mask"].astype(bool)
        values = jnp.where(mask if values.ndim == 2 else mask[:, :, None], values, jnp.nan)
    return output.reshape(len(values), -1), values.reshape(len(values), -1)


def field_loss(
    model: Any,
    num_tasks: int,
    domain: Domain,
    *,
    loss: Literal["relative_l2", "mse"] = "relative_l2",
    inside: bool = True,
    points_per_step: int | None = None,
) -> Callable:
    """The loss function of an operator network (contract 1): one loss per task, the mean over its functions.

    Args:
      model: `apply({'params': params}, batch, train=True, rngs=...) -> {'u': f[B, N]}`.
      num_tasks: K; a task without functions in a batch has loss 0 and no gradient.
      domain: points and masks.
      loss: |u - v|_2 / |v|_2 of each function, or its mean squared error.
      inside: whether points outside of the domain are left out of the loss. Otherwise their target counts.
      points_per_step: that many random points for each step, the same for all its functions; None: all.

    Returns:
      `loss_fn(params, batch, rng) -> f32[K]`; batch: 'inputs', 'values', 'task'.
    """
    per_function = {"relative_l2": losses.relative_l2, "mse": losses.field_mse}[loss]
    num_points = len(domain.points)

    def loss_fn(params, rows, rng):
        key_points, key_dropout = jax.random.split(rng)
        where = None
        if points_per_step is not None and points_per_step < num_points:
            where = jax.random.randint(key_points, (points_per_step,), 0, num_points)
        batch = domain.batch(rows, where)
        output = model.apply({"params": params}, batch, train=True, rngs={"dropout": key_dropout})["u"]
        target = batch if inside else {key: value for key, value in batch.items() if key != "mask"}
        errors = per_function(*flat_targets(output, target))
        member = jax.nn.one_hot(rows["task"], num_tasks, dtype=errors.dtype)
        count = member.sum(0)
        return (member * errors[:, None]).sum(0) / jnp.where(count > 0, count, 1.0)

    return loss_fn


def make_field_evaluate(
    model: Any, tasks: Sequence[Task], domain: Domain, *, batch_size: int = 256, per_task: bool = False
) -> Evaluator:
    """Builds the evaluation of stacked parameters on a split, at all points.

    Args:
      model: an operator network.
      tasks: their metrics compare fields f[B, N]: see `mtjax.metrics.relative_l2`.
      domain: points and masks.
      batch_size: functions per dispatch.
      per_task: parameters have leading axes [L, K]: task k is evaluated with the k-th set.

    Returns:
      `(params, split) -> {task: {metric: f64[L]}}`; NaN for a task without functions in the split.
    """

    def of_lane(params, rows, weight):
        batch = domain.batch(rows)
        states = {}
        for k, task in enumerate(tasks):
            own = jax.tree.map(lambda leaf: leaf[k], params) if per_task else params  # noqa: B023
            if k == 0 or per_task:
                output = model.apply({"params": own}, batch)["u"]
                fields = flat_targets(output, batch)
            of_task = weight * (rows["task"] == k)
            states[task.name] = {metric.name: metric.statistic(*fields, of_task) for metric in task.metrics}
        return states

    run = jax.jit(jax.vmap(of_lane, in_axes=(0, None, None)))

    def statistics(params, split):
        for rows, _ in padded_batches(split, batch_size):
            yield run(params, rows, rows.pop("weight"))

    def evaluate(params: PyTree, split: Mapping[str, Any]) -> Results:
        return merge_statistics(tasks, statistics(params, split))

    return evaluate


def field_problem(
    model: Any,
    tasks: Sequence[Task],
    domain: Domain,
    train: Mapping[str, Any],
    validation: Mapping[str, Any],
    *,
    eval_batch_size: int = 256,
    **loss_options: Any,
) -> Problem:
    """What `fit_problem` trains: an operator network on the functions of a split.

    Args:
      model: an operator network.
      tasks: one per functional form or geometry, in the order of the column 'task'.
      domain: what the functions share.
      train, validation: splits; `train` may be a stream of rows, of which the first batch is checked.
      eval_batch_size: functions per dispatch at evaluation.
      **loss_options: see `field_loss`.

    Raises:
      ValueError: if a column does not fit the others.
    """
    in_memory = isinstance(train, Mapping)
    for name, split in (("train", train if in_memory else first_rows(train, 2)), ("validation", validation)):
        _check(name, split, tasks, domain)

    def init_params(key):
        rows = jax.tree.map(jnp.asarray, first_rows(train, 2))
        # Parameters do not depend on the points, but a grid of points has to be whole.
        return model.init({"params": key, "dropout": key}, domain.batch(rows))["params"]

    @functools.cache  # one program, however often it is asked for
    def evaluator(per_task: bool) -> Evaluator:
        return make_field_evaluate(model, tasks, domain, batch_size=eval_batch_size, per_task=per_task)

    loss_fn = field_loss(model, len(tasks), domain, **loss_options)
    return Problem(tasks, train, validation, loss_fn, init_params, evaluator)


def _check(name: str, split: Mapping[str, Any], tasks: Sequence[Task], domain: Domain) -> None:
    missing = {"inputs", "values", "task"} - split.keys()
    if missing:
        raise ValueError(f"{name} lacks the columns {', '.join(sorted(missing))}")
    values, task = np.shape(split["values"]), np.asarray(split["task"])
    if len(values) not in (2, 3) or values[1] != len(domain.points):
        raise ValueError(f"{name}['values'] must have shape [n, {len(domain.points)}] or [n, N, C], got {values}")
    sizes = {int(np.shape(leaf)[0]) for leaf in jax.tree.leaves(dict(split))}
    if len(sizes) > 1:
        raise ValueError(f"The columns of {name} must have one row per function, got {sorted(sizes)} rows")
    if task.size and not 0 <= task.min() <= task.max() < len(tasks):
        raise ValueError(f"{name}['task'] must lie in [0, {len(tasks)}), got {task.min()} to {task.max()}")
    for table in ("mask", "distance"):
        shape, expected = np.shape(getattr(domain, table)), (len(tasks), len(domain.points))
        if getattr(domain, table) is not None and shape != expected:
            raise ValueError(f"domain.{table} must have shape {list(expected)}, got {list(shape)}")


def predict_fields(
    model: Any, params: PyTree, domain: Domain, split: Mapping[str, Any], *, batch_size: int = 256
) -> np.ndarray:
    """Predictions f32[n, N] (or f32[n, N, C]) at all points, NaN outside of the domain.

    Args:
      model: an operator network.
      params: of one lane.
      domain: points and masks.
      split: 'inputs' and 'task' of n functions, and 'mask' or 'distance' if they are columns.
      batch_size: functions per dispatch.
    """

    @jax.jit
    def run(params, rows):
        batch = domain.batch(rows)
        output = model.apply({"params": params}, batch)["u"]
        if "mask" not in batch:
            return output
        mask = batch["mask"].astype(bool)
        return jnp.where(mask if output.ndim == 2 else mask[:, :, None], output, jnp.nan)

    rows = {key: split[key] for key in ("inputs", "task", "mask", "distance") if key in split}
    batches = padded_batches(rows, batch_size)
    return np.concatenate([sharding.to_host(run(params, batch))[:num_real] for batch, num_real in batches])
