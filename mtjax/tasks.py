r"""Tasks: what a multitask model predicts, how each prediction is trained, and how it is judged.

A `Task` is data. Its kind fixes, unless you say otherwise, the loss, the metrics and the size of the head:

| kind         | output of the model     | loss                          | main metric        |
|--------------|-------------------------|-------------------------------|--------------------|
| `binary`     | logit `f32[B]`          | binary cross-entropy          | AUROC              |
| `multiclass` | logits `f32[B, C]`      | cross-entropy                 | AUROC, one-vs-rest |
| `regression` | scaled value `f32[B]`   | squared error                 | explained variance |
| `count`      | log-rate `f32[B]`       | Poisson negative log-likelihood | Poisson deviance |

Labels are kept in their original units everywhere; a regression target is scaled (`none`, `standardise`, `log1p`)
inside the loss, and unscaled in predictions and metrics, so that no result depends on how a target was scaled.
A label is missing when it is NaN or when its mask is False: it then contributes neither loss nor gradient.

Letters: B batch, K tasks, C classes.

>>> import jax.numpy as jnp
>>> tasks = (Task("churn", "binary"), Task("price", "regression").fit(np.array([10.0, 30.0, np.nan])))
>>> tasks[1].offset, tasks[1].scale
(20.0, 10.0)
>>> batch = {"labels": {"churn": jnp.array([1.0, jnp.nan]), "price": jnp.array([jnp.nan, jnp.nan])}}
>>> outputs = {"churn": jnp.array([0.0, 5.0]), "price": jnp.array([1.0, 2.0])}
>>> {name: round(float(loss), 4) for name, loss in task_losses(tasks, outputs, batch).items()}
{'churn': 0.6931, 'price': 0.0}
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import losses, metrics
from mtjax.metrics import Metric

Kind = Literal["binary", "multiclass", "regression", "count"]
Scaling = Literal["none", "standardise", "log1p"]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def _default_metrics(kind: Kind) -> tuple[Metric, ...]:
    """Metrics of a kind; the first one is the main metric."""
    return {
        "binary": (metrics.auroc(), metrics.accuracy(), metrics.f1(), metrics.log_loss()),
        "multiclass": (metrics.auroc_ovr(), metrics.accuracy(), metrics.f1(), metrics.log_loss()),
        "regression": (metrics.explained_variance(), metrics.r2(), metrics.mae(), metrics.rmse()),
        "count": (metrics.poisson_deviance(), metrics.mae(), metrics.rmse()),
    }[kind]


_LOSSES: Mapping[str, Loss] = {
    "binary": losses.binary_cross_entropy,
    "multiclass": losses.cross_entropy,
    "regression": losses.squared_error,
    "count": losses.poisson,
}
_SCALINGS = ("none", "standardise", "log1p")


@dataclasses.dataclass(frozen=True)
class Task:
    """One target of a multitask model.

    Attributes:
      name: key of the task in outputs, labels, losses and results.
      kind: 'binary', 'multiclass', 'regression' or 'count'.
      num_classes: number of classes C of a multiclass task.
      scaling: how a regression target is scaled inside the loss: 'standardise' (default: zero mean, unit variance over
        the training rows), 'log1p' or 'none'. Other kinds take 'none' only.
      offset: mean subtracted by 'standardise', set by `fit`; original units.
      scale: standard deviation divided by, set by `fit`; original units.
      loss: per-example loss `(output, encoded label f32[B]) -> f32[B]`; by default that of the kind.
      metrics: metrics in original units; the first is the main one. By default those of the kind.

    Raises:
      ValueError: for an unknown kind or scaling, or a number of classes that does not fit the kind.
    """

    name: str
    kind: Kind
    _: dataclasses.KW_ONLY
    num_classes: int | None = None
    scaling: Scaling | None = None
    offset: float = 0.0
    scale: float = 1.0
    loss: Loss | None = None
    metrics: tuple[Metric, ...] | None = None

    def __post_init__(self):
        if self.kind not in _LOSSES:
            raise ValueError(f"Task '{self.name}' has kind {self.kind!r}; expected one of {', '.join(_LOSSES)}")
        if (self.kind == "multiclass") != (self.num_classes is not None):
            raise ValueError(
                f"Task '{self.name}' is {self.kind} with num_classes={self.num_classes}; a multiclass task needs "
                "num_classes, other kinds take none"
            )
        if self.kind == "multiclass" and self.num_classes < 2:
            raise ValueError(f"Task '{self.name}' needs num_classes >= 2, got {self.num_classes}")
        scaling = self.scaling or ("standardise" if self.kind == "regression" else "none")
        if scaling not in _SCALINGS:
            raise ValueError(f"Task '{self.name}' has scaling {scaling!r}; expected one of {', '.join(_SCALINGS)}")
        if scaling != "none" and self.kind != "regression":
            raise ValueError(f"Task '{self.name}' is {self.kind}: only regression targets are scaled, got {scaling!r}")
        object.__setattr__(self, "scaling", scaling)
        object.__setattr__(self, "loss", self.loss or _LOSSES[self.kind])
        # A tuple, so that a task is hashable: it is a static argument of compiled functions.
        object.__setattr__(
            self, "metrics", tuple(_default_metrics(self.kind) if self.metrics is None else self.metrics)
        )
        if not self.metrics:
            raise ValueError(f"Task '{self.name}' has an empty tuple of metrics; give at least one")

    @property
    def output_size(self) -> int:
        """Numbers that the head emits per example: C for multiclass, else 1."""
        return self.num_classes or 1

    @property
    def main_metric(self) -> Metric:
        """The metric that model selection looks at."""
        return self.metrics[0]

    def check_labels(self, labels: np.ndarray) -> None:
        """Raises a ValueError that says which labels (NaN = missing) cannot belong to this kind of task."""
        values = np.asarray(labels, np.float64)
        values = values[~np.isnan(values)]
        if np.isinf(values).any():
            raise ValueError(f"Task '{self.name}' has infinite labels; replace them or mark them missing (NaN)")
        if self.kind == "regression":
            if self.scaling == "log1p" and (values <= -1).any():
                raise ValueError(f"Task '{self.name}' is scaled by log1p but has a label of {values.min():g} <= -1")
            return
        unique = np.unique(values)
        shown = ", ".join(f"{v:g}" for v in unique[:6]) + (", ..." if unique.size > 6 else "")
        if self.kind == "binary" and not np.isin(unique, (0, 1)).all():
            hint = "; use kind='multiclass'" if unique.size > 2 else "; encode them as 0 and 1"
            raise ValueError(f"Task '{self.name}' is binary but its labels hold {unique.size} values ({shown}){hint}")
        if (unique != np.round(unique)).any() or (unique < 0).any():
            raise ValueError(f"Task '{self.name}' is {self.kind}: expected integers >= 0, got ({shown})")
        if self.kind == "multiclass" and (unique >= self.num_classes).any():
            raise ValueError(
                f"Task '{self.name}' has num_classes={self.num_classes} but its labels reach class {unique.max():g}"
            )

    def fit(self, labels: np.ndarray) -> "Task":
        """Returns the task with its target scaling fitted on `labels` f[N] of the *training* rows (NaN = missing).

        Raises:
          ValueError: if no label is present, or the labels do not fit the kind.
        """
        self.check_labels(labels)
        values = np.asarray(labels, np.float64)
        values = values[~np.isnan(values)]
        if values.size == 0:
            raise ValueError(f"Task '{self.name}' has no labelled training row")
        if self.scaling != "standardise":
            return self
        # A constant target stays unscaled rather than being divided by zero, or by a deviation that is only rounding.
        scale = float(values.std()) if values.min() < values.max() else 1.0
        return dataclasses.replace(self, offset=float(values.mean()), scale=scale)

    def encode(self, label: jax.Array) -> jax.Array:
        """Label in original units -> the space of the model's output (identity for all kinds but regression)."""
        if self.scaling == "log1p":
            return jnp.log1p(label)
        return (label - self.offset) / self.scale if self.scaling == "standardise" else label

    def predict(self, output: jax.Array) -> jax.Array:
        """Output of the model -> prediction in original units.

        Returns:
          Probability f32[B] of class 1 (binary), probabilities f32[B, C] (multiclass), value (regression) or rate
          (count) f32[B].
        """
        match self.kind:
            case "binary":
                return jax.nn.sigmoid(output)
            case "multiclass":
                return jax.nn.softmax(output, axis=-1)
            case "count":
                return jnp.exp(output)
        if self.scaling == "log1p":
            return jnp.expm1(output)
        return output * self.scale + self.offset if self.scaling == "standardise" else output

    def to_json(self) -> dict[str, Any]:
        """The fields that a run stores (a custom loss or metric is code and stays in code)."""
        keys = ("name", "kind", "num_classes", "scaling", "offset", "scale")
        return {key: getattr(self, key) for key in keys}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Task":
        """Inverse of `to_json`."""
        return cls(**fields)


def head_sizes(tasks: Sequence[Task]) -> dict[str, int]:
    """Task name -> output size, the `heads` argument of every model."""
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"Task names must be unique, got {', '.join(names)}")
    return {task.name: task.output_size for task in tasks}


def labels_and_weights(task: Task, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Labels f32[B] with missing ones replaced by 0, and weights f32[B] that are 0 where the label is missing."""
    label = jnp.asarray(batch["labels"][task.name])
    present = ~jnp.isnan(label)
    if task.name in batch.get("mask", {}):
        present &= batch["mask"][task.name].astype(bool)
    weight = batch.get("weight")
    weight = jnp.ones_like(label) if weight is None else weight
    return jnp.where(present, label, 0.0), jnp.where(present, weight, 0.0)


def task_losses(
    tasks: Sequence[Task], outputs: Mapping[str, jax.Array], batch: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Weighted mean loss of each task over its labelled examples.

    A task without any label in the batch has loss 0 and a gradient that is exactly 0, whatever its outputs are.

    Args:
      tasks: the tasks, in the order of the result.
      outputs: task name -> f32[B] or f32[B, C].
      batch: `labels` {name: f32[B], NaN = missing}, optionally `mask` {name: bool[B]} and `weight` f32[B].

    Returns:
      task name -> f32[]: sum_b w_b l_b / sum_b w_b.
    """
    result = {}
    # The tasks differ in kind, so this is a loop at trace time; each pass is elementwise on [B].
    for task in tasks:
        label, weight = labels_and_weights(task, batch)
        output = outputs[task.name]
        present = weight > 0
        # Outputs of unlabelled rows are replaced before the loss: 0 * inf would still be NaN in the gradient.
        output = jnp.where(present if output.ndim == 1 else present[:, None], output, 0.0)
        loss = jnp.where(present, task.loss(output, task.encode(label)), 0.0)
        total = weight.sum()
        result[task.name] = (weight * loss).sum() / jnp.where(total > 0, total, 1.0)
    return result


def predictions(tasks: Sequence[Task], outputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Predictions in original units for every task that is in `outputs`."""
    return {task.name: task.predict(outputs[task.name]) for task in tasks if task.name in outputs}
