r"""Dense tasks: what is predicted for every pixel, how it is trained, and how it is judged.

| task             | output          | label                       | loss (weight)             | main metric        |
|------------------|-----------------|-----------------------------|---------------------------|--------------------|
| `segmentation`   | C logits        | u8[B, H, W], 255 = none     | cross-entropy (1)         | mean IoU           |
| `parts`          | 7 logits        | u8[B, H, W], 255 = none     | cross-entropy (2)         | mean IoU           |
| `depth`          | metres          | f[B, H, W], NaN = none      | L1 (1)                    | RMSE               |
| `normals`        | 3 components    | f[B, H, W, 3], NaN = none   | L1 or cosine (10)         | mean angle, degrees|
| `edge`           | logit           | u8[B, H, W] 0/1, 255 = none | balanced BCE, 0.95 (50)   | ODS-F, tolerant    |
| `saliency`       | logit           | u8[B, H, W] 0/1, 255 = none | balanced BCE (5)          | maxF               |
| `detection`      | C + 4 (heatmap) | {'boxes', 'classes'}        | focal + L1 (1)            | AP, overlap .5-.95 |
| `classification` | C logits [B, C] | i32[B], -1 = none           | cross-entropy (1)         | accuracy           |

Weights, losses and metrics are those of the M3ViT, TaskPrompter and MLoRE line on NYUD-v2 and PASCAL-Context. Outputs
of models are f32[B, H, W, channels] at image resolution, except for classification and for detection, whose output
stays on the grid of its decoder.

A `DenseTask` has all that training, selection and reports need of `mtjax.tasks.Task` (name, metrics, main metric,
`predict`, `output_size`, `to_json`); labels stay in their own units everywhere.

>>> tasks = (segmentation(num_classes=13), depth(), normals())
>>> [(task.name, task.channels, task.weight, task.main_metric.name) for task in tasks]
[('segmentation', 13, 1.0, 'mean_iou'), ('depth', 1, 1.0, 'rmse'), ('normals', 3, 10.0, 'mean_angle')]

Letters: B images, H x W pixels, C classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import dense_losses, dense_metrics, metrics, threshold_metrics
from mtjax import detection as objects
from mtjax.dense_losses import batch_mean
from mtjax.metrics import Metric

Kind = Literal["segmentation", "depth", "normals", "edge", "saliency", "detection", "classification"]
Label = Any
"""An array, or {'boxes': f[B, M, 4], 'classes': i32[B, M]} for detection."""

_RANKS = {"segmentation": 3, "depth": 3, "normals": 4, "edge": 3, "saliency": 3, "classification": 1}


@dataclasses.dataclass(frozen=True)
class DenseTask:
    """One target of a dense multitask model; made by the functions below.

    Attributes:
      name: key of the task in outputs, labels, losses and results.
      kind: what the label is.
      channels: of the output.
      weight: what the loss is multiplied with in a sum over tasks.
      per_image: `(output, label) -> PixelSum`, the loss image by image (`mtjax.dense_losses`).
      metrics: metrics in original units; the first is the main one.
      ignore: class of pixels without a label.
      options: more settings, as (name, value) pairs: they make a run's record complete and the task hashable.

    Raises:
      ValueError: for an unknown kind, no channel, a negative weight, or no metric.
    """

    name: str
    kind: Kind
    _: dataclasses.KW_ONLY
    channels: int
    per_image: dense_losses.Loss
    metrics: tuple[Metric, ...]
    weight: float = 1.0
    ignore: int = 255
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        if self.kind not in (*_RANKS, "detection"):
            raise ValueError(
                f"Task '{self.name}' has kind {self.kind!r}; expected one of {', '.join((*_RANKS, 'detection'))}"
            )
        if self.channels < 1:
            raise ValueError(f"Task '{self.name}' needs at least one channel, got {self.channels}")
        if not self.weight >= 0:
            raise ValueError(f"Task '{self.name}' needs a weight >= 0, got {self.weight}")
        if not self.metrics:
            raise ValueError(f"Task '{self.name}' has an empty tuple of metrics; give at least one")
        object.__setattr__(self, "metrics", tuple(self.metrics))

    @property
    def output_size(self) -> int:
        """Channels of the output."""
        return self.channels

    @property
    def main_metric(self) -> Metric:
        """The metric that model selection looks at."""
        return self.metrics[0]

    def option(self, name: str) -> Any:
        """One of `options`."""
        return dict(self.options)[name]

    def loss(self, output: jax.Array, label: Label) -> jax.Array:
        """Mean over the labelled pixels of the batch, f[], without the weight; 0 where there is none.

        Args:
          output: f[B, H, W, channels].
          label: as stored (u8, float16, ...).
        """
        return batch_mean(self.per_image(output, label))

    def predict(self, output: jax.Array) -> Any:
        """Output of the model -> prediction in original units.

        Returns:
          i32[B, H, W] classes (segmentation; -1 where an output is NaN), f[B, H, W] metres (depth), unit vectors
          f[B, H, W, 3] (normals), probabilities f[B, H, W] (edge, saliency) or f[B, C] (classification), or boxes,
          scores and classes (detection).
        """
        match self.kind:
            case "segmentation":
                best = jnp.argmax(output, axis=-1).astype(jnp.int32)
                return jnp.where(jnp.isnan(output).any(-1), -1, best)
            case "depth":
                return output[..., 0].astype(jnp.float32)
            case "normals":
                return dense_metrics.normalise(output.astype(jnp.float32))
            case "edge" | "saliency":
                return jax.nn.sigmoid(output[..., 0].astype(jnp.float32))
            case "classification":
                return jax.nn.softmax(output.astype(jnp.float32), axis=-1)
        stride, most = self.option("stride"), self.option("max_detections")
        return objects.decode(output, stride=stride, max_detections=most)

    def mirror(self, label: Label, width: int) -> Label:
        """Labels [B, ...] of the images mirrored left to right; `width` W in pixels.

        The x component of a normal changes its sign and boxes change sides; everything else moves with its pixel.
        """
        if self.kind == "classification":
            return label
        if self.kind == "detection":
            boxes = label["boxes"]
            mirrored = jnp.stack([boxes[..., 0], width - boxes[..., 3], boxes[..., 2], width - boxes[..., 1]], -1)
            return {**label, "boxes": mirrored}
        label = jnp.flip(label, axis=2)
        if self.kind == "normals":
            return label * jnp.array([-1, 1, 1], label.dtype).reshape(1, 1, 1, 3)
        return label

    def check_labels(self, labels: Label, size: tuple[int, int] | None = None) -> None:
        """Raises a ValueError that says which labels [n, ...] of images of `size` (H, W) cannot belong to this task."""
        if self.kind == "detection":
            if not isinstance(labels, Mapping) or {"boxes", "classes"} - labels.keys():
                raise ValueError(f"Task '{self.name}' needs the labels {{'boxes', 'classes'}}")
            classes, most = np.asarray(labels["classes"]), self.channels - 4
            if classes.size and not -2 <= classes.min() <= classes.max() < most:
                raise ValueError(f"Task '{self.name}' has {most} classes, but its labels reach class {classes.max()}")
            return
        shape = np.shape(labels)
        expected = (*shape[:1], *(size or shape[1:3]), *((3,) if self.kind == "normals" else ()))
        if self.kind == "classification":
            expected = shape[:1]
        if len(shape) != _RANKS[self.kind] or shape != expected:
            raise ValueError(f"Task '{self.name}' needs labels of shape {list(expected)}, got {list(shape)}")
        if self.kind in ("depth", "normals"):
            if np.asarray(labels).dtype.kind != "f":
                raise ValueError(
                    f"Task '{self.name}' needs floating labels (NaN = none), got {np.asarray(labels).dtype}"
                )
            return
        values = np.asarray(labels)
        present = values[values >= 0 if self.kind == "classification" else values != self.ignore]
        most = 2 if self.kind in ("edge", "saliency") else self.channels
        if present.size and (present.min() < 0 or present.max() >= most):
            raise ValueError(
                f"Task '{self.name}' has {most} classes, but its labels reach class {present.max()} "
                f"({self.ignore} marks what has no label)"
            )

    def to_json(self) -> dict[str, Any]:
        """The fields that a run stores (losses and metrics are code and stay in code)."""
        fields = {key: getattr(self, key) for key in ("name", "kind", "channels", "weight", "ignore")}
        return {**fields, **dict(self.options), "metrics": [metric.name for metric in self.metrics]}


def segmentation(
    name: str = "segmentation", num_classes: int = 13, *, weight: float = 1.0, ignore: int = 255
) -> DenseTask:
    """Semantic segmentation: cross-entropy, mean IoU, pixel accuracy.

    Args:
      name: of the task.
      num_classes: C: 13 RoomScenes, 40 NYUD-v2, 21 PASCAL, 19 Cityscapes.
      weight: of the loss (100 on Cityscapes-3D).
      ignore: class of pixels without a label.
    """
    return DenseTask(
        name,
        "segmentation",
        channels=num_classes,
        weight=weight,
        ignore=ignore,
        per_image=dense_losses.cross_entropy(ignore),
        metrics=(dense_metrics.mean_iou(num_classes, ignore=ignore), dense_metrics.pixel_accuracy(ignore=ignore)),
    )


def parts(name: str = "parts", num_classes: int = 7, *, weight: float = 2.0, ignore: int = 255) -> DenseTask:
    """Human parts: segmentation into six parts and background, weight 2."""
    return segmentation(name, num_classes, weight=weight, ignore=ignore)


def depth(name: str = "depth", *, weight: float = 1.0) -> DenseTask:
    """Depth in metres: L1 on pixels with a label; RMSE, absolute relative error, share within a factor of 1.25."""
    judged = (dense_metrics.depth_rmse(), dense_metrics.absolute_relative(), dense_metrics.within_factor(1.25))
    return DenseTask(name, "depth", channels=1, weight=weight, per_image=dense_losses.l1, metrics=judged)


def disparity(name: str = "disparity", *, weight: float = 1.0) -> DenseTask:
    """Disparity or inverse depth: L1 and RMSE on pixels with a label."""
    return DenseTask(
        name, "depth", channels=1, weight=weight, per_image=dense_losses.l1, metrics=(dense_metrics.depth_rmse(),)
    )


def normals(name: str = "normals", *, weight: float = 10.0, loss: Literal["l1", "cosine"] = "l1") -> DenseTask:
    """Surface normals: mean angular error, its median, and the shares within 11.25, 22.5 and 30 degrees.

    Args:
      name: of the task.
      weight: of the loss.
      loss: 'l1' of the unit-normalised prediction (the published one) or 'cosine'.
    """
    ways = {"l1": dense_losses.normals_l1, "cosine": dense_losses.normals_cosine}
    if loss not in ways:
        raise ValueError(f"loss must be 'l1' or 'cosine', got {loss!r}")
    shares = tuple(dense_metrics.within_angle(degrees) for degrees in (11.25, 22.5, 30.0))
    judged = (dense_metrics.mean_angle(), dense_metrics.median_angle(), *shares)
    options = (("loss", loss),)
    return DenseTask(name, "normals", channels=3, weight=weight, per_image=ways[loss], metrics=judged, options=options)


def edge(
    name: str = "edge",
    *,
    weight: float = 50.0,
    positive_weight: float | None = 0.95,
    threshold: float | Sequence[float] | None = None,
    max_distance: float = 0.011,
    ignore: int = 255,
) -> DenseTask:
    """Edges: balanced binary cross-entropy; ODS-F with tolerance.

    Args:
      name: of the task.
      weight: of the loss.
      positive_weight: weight of edge pixels (0.95 TaskPrompter; 0.88 NYUD, 0.925 PASCAL in MLoRE); None balances.
      threshold: where given, the main metric is F at this threshold (one, or one per lane), to be fixed on validation
        images (`threshold_metrics.edge_threshold`, `mtjax.train.images.fix_edge_threshold`). ODS-F picks the best
        threshold on the images it judges: right for validation, optimistic on a test set.
      max_distance: tolerance as a share of the diagonal: 0.011 NYUD, 0.0075 PASCAL. Below one pixel (64 x 64 and less,
        with the default) only the same pixel matches.
      ignore: label of pixels that do not count.
    """
    judged = (threshold_metrics.edge_odsf(max_distance=max_distance, ignore=ignore),)
    if threshold is not None:
        threshold = tuple(float(t) for t in threshold) if isinstance(threshold, Sequence) else float(threshold)
        judged = (threshold_metrics.edge_f(threshold, max_distance=max_distance, ignore=ignore), *judged)
    options = (("positive_weight", positive_weight), ("threshold", threshold), ("max_distance", max_distance))
    return DenseTask(
        name,
        "edge",
        channels=1,
        weight=weight,
        ignore=ignore,
        per_image=dense_losses.balanced_bce(positive_weight, ignore=ignore),
        metrics=judged,
        options=options,
    )


def saliency(
    name: str = "saliency", *, weight: float = 5.0, positive_weight: float | None = None, ignore: int = 255
) -> DenseTask:
    """Saliency, one logit: binary cross-entropy balanced by image; maxF (beta^2 = 0.3) and the older protocol's mIoU.

    The published networks have two channels and a softmax; their difference is this logit.
    """
    return DenseTask(
        name,
        "saliency",
        channels=1,
        weight=weight,
        ignore=ignore,
        per_image=dense_losses.balanced_bce(positive_weight, ignore=ignore),
        metrics=(threshold_metrics.max_f(ignore=ignore), threshold_metrics.saliency_iou(ignore=ignore)),
        options=(("positive_weight", positive_weight),),
    )


def detection(
    name: str = "detection",
    num_classes: int = 10,
    *,
    weight: float = 1.0,
    stride: int = 4,
    max_detections: int = 20,
) -> DenseTask:
    """Objects as points (CenterNet): centre heatmap, size and offset; AP at overlaps .5 to .95, and at .5.

    Args:
      name: of the task.
      num_classes: C; the output has C + 4 channels.
      weight: of the loss.
      stride: pixels per cell of the output: the patch side, or half of it where the head upsamples.
      max_detections: boxes that are kept per image.
    """
    return DenseTask(
        name,
        "detection",
        channels=num_classes + 4,
        weight=weight,
        ignore=-1,
        per_image=objects.centre_loss(num_classes, stride=stride),
        metrics=(objects.average_precision(num_classes), objects.average_precision(num_classes, overlaps=(0.5,))),
        options=(("stride", stride), ("max_detections", max_detections)),
    )


def classification(name: str = "classification", num_classes: int = 10, *, weight: float = 1.0) -> DenseTask:
    """One class per image: cross-entropy, accuracy, log-loss."""
    return DenseTask(
        name,
        "classification",
        channels=num_classes,
        weight=weight,
        ignore=-1,
        per_image=dense_losses.cross_entropy(-1),
        metrics=(dense_metrics.labelled(metrics.accuracy()), dense_metrics.labelled(metrics.log_loss())),
    )
