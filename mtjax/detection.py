r"""Detection of objects as points: targets, loss and decoding of a centre heatmap (CenterNet), and average precision.

    heatmap    Y_yxc = max over objects of class c of exp(-((y - cy)^2 + (x - cx)^2) / (2 sigma^2)),  1 at their centres
    focal      -1/N sum  (1 - p)^2 log p  at centres,   (1 - Y)^4 p^2 log(1 - p)  elsewhere
    box        centre = cell + offset,  size = (height, width), all in cells; L1 at the centres

A label is {'boxes': f[B, M, 4] (y0, x0, y1, x1 in pixels), 'classes': i32[B, M]} with class -1 for padding. An image
without objects is labelled (its heatmap is empty); class -2 anywhere marks an image without labels, which is left out.
An output is f[B, h, w, C + 4]: C logits, height, width, offset y, offset x, in cells of `stride` pixels. A prediction
is {'boxes': f[B, D, 4] in pixels, 'scores': f[B, D], 'classes': i32[B, D]}.

Reference: Zhou, Wang, Krähenbühl, "Objects as Points", 2019, equations 1 to 4 (weights 1, 0.1 and 1). The radius of the
Gaussians is the one that keeps an overlap of 0.7 (CornerNet, ECCV 2018); its three roots are solved as they should be,
not as in the published code, whose first two lack a division (by recollection, unverified here).

Letters: B images, M objects, C classes, h x w cells, D detections, T thresholds of overlap.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import _streaming as streaming
from mtjax.dense_losses import Loss, PixelSum
from mtjax.metrics import Metric

Label = Mapping[str, jax.Array]


class Targets(NamedTuple):
    """What the output should be.

    Attributes:
      heatmap: f[B, h, w, C], 1 at centres.
      cell: i32[B, M], number of the cell of each centre.
      size: f[B, M, 2], height and width in cells.
      offset: f[B, M, 2], of the centre in its cell, 0 to 1.
      present: bool[B, M], which objects are none of the padding.
    """

    heatmap: jax.Array
    cell: jax.Array
    size: jax.Array
    offset: jax.Array
    present: jax.Array


def gaussian_radius(height: jax.Array, width: jax.Array, overlap: float = 0.7) -> jax.Array:
    """How far both corners of a box may be off, in cells, with an intersection over union of at least `overlap`.

    The smallest of three cases: the box is shifted, shrunk, or grown by r on every side.
    """
    total, area = height + width, height * width
    shifted = (total - jnp.sqrt(total**2 - 4 * area * (1 - overlap) / (1 + overlap))) / 2
    shrunk = (total - jnp.sqrt(total**2 - 4 * area * (1 - overlap))) / 4
    grown = (jnp.sqrt(total**2 + 4 * area * (1 - overlap) / overlap) - total) / 4
    return jnp.minimum(shifted, jnp.minimum(shrunk, grown))


def _arrays(label: Label) -> tuple[jax.Array, jax.Array]:
    """Boxes f32[B, M, 4] and classes i32[B, M], however they are stored."""
    return jnp.asarray(label["boxes"]).astype(jnp.float32), jnp.asarray(label["classes"]).astype(jnp.int32)


def targets(label: Label, grid: tuple[int, int], *, stride: int, num_classes: int) -> Targets:
    """Targets of labelled objects.

    Args:
      label: boxes and classes.
      grid: (h, w) of the output.
      stride: pixels per cell.
      num_classes: C.

    Returns:
      The targets. Two objects of one class with their centres in one cell share its peak, and both ask for their size.
    """
    h, w = grid
    boxes, classes = _arrays(label)
    present = classes >= 0
    boxes = jnp.where(present[..., None], boxes, 0.0) / stride
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., 2:] + boxes[..., :2]) / 2
    last = jnp.array([h - 1, w - 1], jnp.float32).reshape(1, 1, 2)
    cell = jnp.clip(jnp.floor(centre), 0.0, last)
    radius = jnp.floor(jnp.maximum(gaussian_radius(size[..., 0], size[..., 1]), 0.0))
    sigma = (2 * radius + 1) / 6
    distance = []
    for axis, n in enumerate(grid):
        d = jnp.arange(n, dtype=jnp.float32).reshape(1, 1, n) - cell[..., axis, None]
        falloff = jnp.exp(-(d**2) / (2 * sigma[..., None] ** 2))
        distance.append(jnp.where(jnp.abs(d) <= radius[..., None], falloff, 0.0))
    bump = distance[0][..., :, None] * distance[1][..., None, :]  # [B, M, h, w]
    of_class = streaming.one_hot(classes, num_classes)
    heatmap = jnp.where(of_class[:, :, None, None, :], bump[..., None], 0.0).max(1)
    index = cell.astype(jnp.int32)
    return Targets(heatmap, index[..., 0] * w + index[..., 1], size, centre - cell, present)


@functools.cache
def centre_loss(num_classes: int, *, stride: int, size_weight: float = 0.1, offset_weight: float = 1.0) -> Loss:
    """Focal loss of the heatmap and L1 of sizes and offsets at the centres, per object.

    Args:
      num_classes: C.
      stride: pixels per cell of the output.
      size_weight, offset_weight: of the two L1 terms.

    Returns:
      `(output f[B, h, w, C + 4], label) -> PixelSum` whose count is the number of objects.
    """

    def loss(output: jax.Array, label: Label) -> PixelSum:
        labelled = (jnp.asarray(label["classes"]) >= -1).all(-1)
        output = jnp.where(labelled[:, None, None, None], output.astype(jnp.float32), 0.0)
        goal = targets(label, output.shape[1:3], stride=stride, num_classes=num_classes)
        logit, box = output[..., :num_classes], output[..., num_classes:]
        log_p, log_q = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        of_cell = jnp.where(goal.heatmap == 1, q**2 * log_p, (1 - goal.heatmap) ** 4 * p**2 * log_q)
        focal = -of_cell.sum((1, 2, 3))
        flat = box.reshape(box.shape[0], -1, 4)
        at_centre = jnp.take_along_axis(flat, goal.cell[..., None], axis=1)  # [B, M, 4]
        error = jnp.abs(at_centre - jnp.concatenate([goal.size, goal.offset], -1))
        of_object = size_weight * error[..., :2].sum(-1) + offset_weight * error[..., 2:].sum(-1)
        boxes = jnp.where(goal.present, of_object, 0.0).sum(-1)
        count = goal.present.sum(-1).astype(jnp.float32)
        return PixelSum(jnp.where(labelled, focal + boxes, 0.0), jnp.where(labelled, count, 0.0))

    return loss


def decode(output: jax.Array, *, stride: int, max_detections: int = 20) -> dict[str, jax.Array]:
    """Peaks of the heatmap (largest of their 3 x 3 neighbours) as boxes, the best first.

    Args:
      output: f[B, h, w, C + 4].
      stride: pixels per cell.
      max_detections: D, at most the number of cells times classes.

    Returns:
      {'boxes': f[B, D, 4] in pixels, clipped to the image, 'scores': f[B, D], 'classes': i32[B, D]}; where there are
      fewer peaks the rest has a score of 0 and class -1. The scores of an image with a NaN are NaN.
    """
    num_classes = output.shape[-1] - 4
    batch, h, w = output.shape[:3]
    score = jax.nn.sigmoid(output[..., :num_classes].astype(jnp.float32))
    padded = jnp.pad(score, ((0, 0), (1, 1), (1, 1), (0, 0)))
    around = functools.reduce(jnp.maximum, (padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)))
    peaks = jnp.where(score == around, score, 0.0).reshape(batch, -1)
    best, index = jax.lax.top_k(peaks, min(max_detections, peaks.shape[1]))
    cell, kind = index // num_classes, index % num_classes
    box = jnp.take_along_axis(output[..., num_classes:].reshape(batch, -1, 4), cell[..., None], axis=1)
    corner = jnp.stack([cell // w, cell % w], -1).astype(jnp.float32)
    centre, half = corner + box[..., 2:], jnp.maximum(box[..., :2], 0.0) / 2
    limit = jnp.array([h, w, h, w], jnp.float32).reshape(1, 1, 4)
    boxes = jnp.clip(jnp.concatenate([centre - half, centre + half], -1), 0.0, limit) * stride
    # A NaN would be no peak, and so hide.
    undefined = jnp.isnan(output).any((1, 2, 3))[:, None]
    return {
        "boxes": boxes,
        "scores": jnp.where(undefined, jnp.nan, best),
        "classes": jnp.where(best > 0, kind, -1),
    }


def box_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of boxes f[..., D, 4] and f[..., M, 4], f[..., D, M]; 0 for two empty boxes."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    inside = jnp.maximum(jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]), 0.0)
    overlap = inside[..., 0] * inside[..., 1]
    area_a, area_b = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b))
    union = area_a + area_b - overlap
    return overlap / jnp.where(union > 0, union, 1.0)


class Detections(NamedTuple):
    """State of average precision: every detection, along the last axis, and the number of objects.

    Attributes:
      score: [..., N].
      kind: [..., N] class; -1 for none.
      weight: [..., N] of its image.
      hit: [..., T, N], 1 where it found an object at that threshold.
      objects: [..., C] weight of the objects of each class.
    """

    score: jax.Array
    kind: jax.Array
    weight: jax.Array
    hit: jax.Array
    objects: jax.Array


def _match(prediction: Label, boxes: jax.Array, classes: jax.Array, thresholds: jax.Array) -> jax.Array:
    """bool[D, T] for one image: detections in the order of their score take the best free object of their class."""
    iou = box_iou(prediction["boxes"], boxes)
    same = (prediction["classes"][:, None] == classes[None, :]) & (classes >= 0)[None, :]
    iou = jnp.where(same, iou, -1.0)
    order = jnp.argsort(-prediction["scores"], stable=True)

    def take(free, row):
        overlap = jnp.where(free, row[None, :], -1.0)  # [T, M]
        best = overlap.argmax(-1)
        found = overlap.max(-1) >= thresholds
        taken = found[:, None] & (best[:, None] == jnp.arange(free.shape[1])[None, :])
        return free & ~taken, found

    free = jnp.ones((thresholds.shape[0], iou.shape[1]), bool)
    return jnp.zeros((iou.shape[0], thresholds.shape[0]), bool).at[order].set(jax.lax.scan(take, free, iou[order])[1])


COCO = tuple(0.5 + 0.05 * i for i in range(10))
"""Thresholds of overlap .5:.05:.95."""


@functools.cache
def average_precision(num_classes: int, *, overlaps: tuple[float, ...] = COCO, points: int = 101) -> Metric:
    """Mean average precision: area under precision over recall, mean over thresholds of overlap and over classes.

    In the order of their scores the detections of an image each take the object of their class with which they overlap
    most among those still free (COCO's rule); from `overlap` on that is a hit. Precision at a recall is the best at
    that recall or more; it is averaged over evenly spread recalls 0 .. 1. A class without objects is left out.

    Args:
      num_classes: C.
      overlaps: thresholds; `(0.5,)` is AP50, named so.
      points: recalls, 101 (COCO) or 11 (PASCAL VOC 2007).

    Returns:
      The metric. Its state grows with the examples; `compute` runs on the host.
    """
    name = "ap50" if overlaps == (0.5,) else "ap"

    def statistic(prediction: Label, label: Label, weight: jax.Array | None = None) -> Detections:
        boxes, classes = _arrays(label)
        labelled = (classes >= -1).all(-1)
        weight = jnp.ones(labelled.shape) if weight is None else jnp.asarray(weight, jnp.float32)
        weight = jnp.where(labelled, weight, 0.0)
        limits = jnp.asarray(overlaps, jnp.float32) - 1e-6  # a box that overlaps by exactly a threshold is a hit
        hit = jax.vmap(_match, in_axes=(0, 0, 0, None))(prediction, boxes, classes, limits)
        score = prediction["scores"]
        objects = streaming.one_hot(classes, num_classes) * weight[:, None, None]
        undefined = jnp.isnan(score) | jnp.isnan(prediction["boxes"]).any(-1)
        each = jnp.where(undefined & (weight != 0)[:, None], jnp.nan, jnp.broadcast_to(weight[:, None], score.shape))
        return Detections(
            score.reshape(-1),
            prediction["classes"].reshape(-1).astype(jnp.float32),
            each.reshape(-1),
            jnp.moveaxis(hit, -1, 0).reshape(len(overlaps), -1).astype(jnp.float32),
            objects.sum((0, 1)),
        )

    def merge(a: Detections, b: Detections) -> Detections:
        xp = streaming.namespace((a, b))
        joined = (xp.concatenate([x, y], axis=-1) for x, y in zip(a[:4], b[:4], strict=True))
        return Detections(*joined, a.objects + b.objects)

    def compute(state: Detections) -> Any:
        leaves = [np.asarray(leaf, np.float64) for leaf in state]
        lanes = leaves[0].shape[:-1]
        flat = [leaf.reshape(-1, *leaf.shape[len(lanes) :]) for leaf in leaves]
        values = [_mean_ap(*(leaf[lane] for leaf in flat), points) for lane in range(flat[0].shape[0])]
        return np.asarray(values).reshape(lanes)

    return Metric(name, True, statistic, merge, compute)


def _mean_ap(score, kind, weight, hit, objects, points) -> float:
    """Mean over classes and thresholds, from the leaves of one lane's state."""
    if np.isnan(weight).any() or not (objects > 0).any():
        return float("nan")
    levels = np.linspace(0, 1, points)
    found = []
    for c in np.flatnonzero(objects > 0):
        own = np.flatnonzero((kind == c) & (weight > 0))
        own = own[np.argsort(-score[own], kind="stable")]
        true = np.cumsum(hit[:, own] * weight[own], axis=-1)
        total = np.cumsum(weight[own])
        recall, precision = true / objects[c], true / total
        best_later = np.maximum.accumulate(precision[:, ::-1], axis=-1)[:, ::-1]
        for row, best in zip(recall, best_later, strict=True):
            # A recall of exactly a level counts, also when the division left it a rounding below.
            index = np.searchsorted(row, levels - 1e-9)
            found.append(np.append(best, 0.0)[index].mean())
    return float(np.mean(found))
