r"""Streaming metrics of dense tasks: `statistic(prediction, label, weight f[B] or None) -> state`, then merge, compute.

These are `mtjax.metrics.Metric` objects: the same three functions, states of a fixed size that are sums, so that images
can be joined in any order, over batches, shards and (leading axes of the state) lanes. What is counted is pixels: all
metrics are of the whole set, not means over images, except where said. Predictions are what `DenseTask.predict` gives.

| metric                | prediction            | state        | value                                                 |
|-----------------------|-----------------------|--------------|-------------------------------------------------------|
| `mean_iou(C)`         | class i[B, H, W]      | f[C, C]      | mean over classes of hit / (predicted or true)        |
| `pixel_accuracy`      | class                 | Mean         | share of right pixels                                 |
| `depth_rmse`          | metres f[B, H, W]     | Mean         | root of the mean squared error                        |
| `absolute_relative`   | metres                | Mean         | mean abs(p - y) / y                                   |
| `within_factor(1.25)` | metres                | Mean         | share with max(p / y, y / p) < 1.25                   |
| `mean_angle`          | unit f[B, H, W, 3]    | Mean         | mean angle in degrees, 2 atan2(abs(p - g), abs(p + g))|
| `median_angle`        | unit                  | f[1800]      | median angle, from a histogram of 0.1 degree          |
| `within_angle(30)`    | unit                  | Mean         | share of angles below 30 degrees                      |

Edges and saliency, which are judged over thresholds, are in `mtjax.threshold_metrics`, detection in `mtjax.detection`.

Pixels without a label (255 or NaN) and images of weight 0 do not count, whatever their prediction; a NaN prediction on
a pixel that counts makes the metric NaN, and so does having nothing to count. Counts are exact up to 2^24 pixels per
batch (float32), merged on the host in double precision.

Letters: B images, H x W pixels, C classes, w weight, p prediction, y or g label.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtjax import _streaming as streaming
from mtjax.metrics import Metric


def pixel_weights(valid: jax.Array, undefined: jax.Array, weight: jax.Array | None) -> jax.Array:
    """f[B, H, W]: the image's weight f[B] where there is a label, NaN where the prediction there is undefined.

    A NaN weight spreads to every sum, and so to the value; a comparison with a NaN prediction would hide it.
    """
    ones = jnp.ones(valid.shape[:1]) if weight is None else jnp.asarray(weight, jnp.float32)
    ones = ones.reshape(-1, *([1] * (valid.ndim - 1)))
    each = jnp.where(valid, jnp.broadcast_to(ones, valid.shape), 0.0)
    return jnp.where((each != 0) & undefined, jnp.nan, each)


def _mean_of(name: str, higher: bool, score: Callable, finish: Callable | None = None) -> Metric:
    """`finish(sum w score / sum w)`; `score(prediction, label) -> (value, valid, undefined)`, all [B, H, W]."""

    def statistic(prediction: Any, label: jax.Array, weight: jax.Array | None = None) -> streaming.Mean:
        value, valid, undefined = score(prediction, label)
        w = pixel_weights(valid, undefined, weight)
        return streaming.Mean(jnp.where(w == 0, 0.0, w * value).sum(), w.sum())

    def compute(state: streaming.Mean) -> jax.Array:
        xp = streaming.namespace(state)
        mean = state.total / xp.where(state.weight == 0, xp.nan, state.weight)
        return finish(xp, mean) if finish else mean

    return Metric(name, higher, statistic, streaming.add, compute)


def histogram(index: jax.Array, weight: jax.Array, bins: int) -> jax.Array:
    """Weights f[B, ...] summed by bin i32[B, ...], image by image: f[B, bins]."""

    def of_image(index: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.zeros(bins, jnp.float32).at[index.reshape(-1)].add(weight.reshape(-1))

    return jax.vmap(of_image)(index, weight)


# Segmentation


@functools.cache
def mean_iou(num_classes: int, *, ignore: int = 255) -> Metric:
    """Mean intersection over union of the classes, from the confusion matrix of all pixels.

        IoU_c = N_cc / (sum_j N_cj + sum_i N_ic - N_cc)          N_yp: pixels of class y predicted as p

    A class that is neither predicted nor true is left out of the mean.

    Args:
      num_classes: C.
      ignore: class of pixels without a label.
    """

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        label = jnp.asarray(label).astype(jnp.int32)
        w = pixel_weights((label != ignore) & (label >= 0), prediction < 0, weight)
        flat = (label.shape[0], -1)
        true = streaming.one_hot(label.reshape(flat), num_classes) * w.reshape(flat)[..., None]
        guess = streaming.one_hot(prediction.astype(jnp.int32).reshape(flat), num_classes).astype(jnp.float32)
        # A product of one-hot matrices rather than a scatter: it stays fast under vmap and on accelerators.
        return jnp.einsum("bny,bnp->yp", true, guess, precision=jax.lax.Precision.HIGHEST)

    def compute(state: jax.Array) -> jax.Array:
        xp = streaming.namespace(state)
        hit = xp.diagonal(state, axis1=-2, axis2=-1)
        union = state.sum(-1) + state.sum(-2) - hit
        present = union != 0
        each = xp.where(present, hit / xp.where(present, union, 1.0), 0.0)
        count = present.sum(-1)
        return xp.where(count > 0, each.sum(-1) / xp.maximum(count, 1), xp.nan)

    return Metric("mean_iou", True, statistic, streaming.add, compute)


@functools.cache
def pixel_accuracy(*, ignore: int = 255) -> Metric:
    """Share of labelled pixels whose class is right."""

    def score(prediction, label):
        label = jnp.asarray(label).astype(jnp.int32)
        return prediction == label, (label != ignore) & (label >= 0), prediction < 0

    return _mean_of("pixel_accuracy", True, score)


# Depth


def _depths(prediction: jax.Array, label: jax.Array, positive: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Label with 1 where there is none, valid, undefined."""
    label = jnp.asarray(label).astype(jnp.float32)
    valid = label > 0 if positive else ~jnp.isnan(label)
    return jnp.where(valid, label, 1.0), valid, jnp.isnan(prediction)


@functools.cache
def depth_rmse() -> Metric:
    """Root of the mean squared error over all labelled pixels of the set (one root, not one per image)."""

    def score(prediction, label):
        y, valid, undefined = _depths(prediction, label, positive=False)
        return (prediction - y) ** 2, valid, undefined

    return _mean_of("rmse", False, score, lambda xp, mean: xp.sqrt(mean))


@functools.cache
def absolute_relative() -> Metric:
    """Mean of `|p - y| / y` over pixels with a depth above 0."""

    def score(prediction, label):
        y, valid, undefined = _depths(prediction, label, positive=True)
        return jnp.abs(prediction - y) / y, valid, undefined

    return _mean_of("absolute_relative", False, score)


@functools.cache
def within_factor(factor: float = 1.25) -> Metric:
    """Share of pixels with `max(p / y, y / p) < factor` ("delta"), a prediction of 0 or less being none of them."""

    def score(prediction, label):
        y, valid, undefined = _depths(prediction, label, positive=True)
        return (prediction < factor * y) & (y < factor * prediction), valid, undefined

    return _mean_of(f"within_{factor:g}", True, score)


# Normals


def normalise(vector: jax.Array) -> jax.Array:
    """Unit vectors f[..., 3]; a zero vector stays zero. For predictions; losses use the smooth `dense_losses.unit`."""
    length = jnp.sqrt((vector**2).sum(-1, keepdims=True))
    return vector / jnp.where(length > 0, length, 1.0)


def angle(prediction: jax.Array, label: jax.Array) -> jax.Array:
    """Angle between vectors f[..., 3] in degrees, `2 atan2(|p - g|, |p + g|)` of their unit vectors.

    Unlike acos(p . g) it keeps its digits near 0 and 180 degrees. A zero prediction is 90 degrees off.

    Reference: Kahan, "How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?", 2006,
    section 12.
    """
    p, g = normalise(prediction), normalise(label)
    difference, total = (jnp.sqrt((x**2).sum(-1)) for x in (p - g, p + g))
    return jnp.degrees(2 * jnp.arctan2(difference, total))


def _angles(prediction: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Angles [B, H, W] (0 where there is no label), valid, undefined."""
    label = jnp.asarray(label).astype(jnp.float32)
    valid = ~jnp.isnan(label).any(-1)
    label = jnp.where(valid[..., None], label, 1.0)
    return angle(prediction, label), valid, jnp.isnan(prediction).any(-1)


@functools.cache
def mean_angle() -> Metric:
    """Mean angular error in degrees over all labelled pixels."""
    return _mean_of("mean_angle", False, _angles)


@functools.cache
def within_angle(degrees: float) -> Metric:
    """Share of pixels whose angular error is below `degrees` (11.25, 22.5 and 30 are usual)."""

    def score(prediction, label):
        off, valid, undefined = _angles(prediction, label)
        return off < degrees, valid, undefined

    return _mean_of(f"within_{degrees:g}", True, score)


@functools.cache
def median_angle(bins: int = 1800) -> Metric:
    """Median angular error in degrees, from a histogram with `bins` bins of 0 to 180; linear inside of a bin."""

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        off, valid, undefined = _angles(prediction, label)
        w = pixel_weights(valid, undefined, weight)
        index = jnp.floor(jnp.where(w > 0, off, 0.0) * (bins / 180))
        return histogram(jnp.clip(index, 0, bins - 1).astype(jnp.int32), w, bins).sum(0)

    def compute(state: jax.Array) -> jax.Array:
        xp = streaming.namespace(state)
        up_to = xp.cumsum(state, axis=-1)
        half = up_to[..., -1:] / 2
        at = xp.argmax(up_to >= half, axis=-1)[..., None]
        inside = xp.take_along_axis(state, at, -1)
        below = xp.take_along_axis(up_to, at, -1) - inside
        share = (half - below) / xp.where(inside > 0, inside, 1.0)
        return xp.where(half > 0, (at + share) * (180 / bins), xp.nan)[..., 0]

    return Metric("median_angle", False, statistic, streaming.add, compute)


@functools.cache
def labelled(metric: Metric) -> Metric:
    """A metric of `mtjax.metrics` for classes i32[B] of which -1 means no label."""

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> Any:
        label = jnp.asarray(label)
        return metric.statistic(prediction, jnp.where(label < 0, jnp.nan, label.astype(jnp.float32)), weight)

    return Metric(metric.name, metric.higher_is_better, statistic, metric.merge, metric.compute)
