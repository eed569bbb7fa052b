r"""Streaming metrics of maps of probabilities that are judged over thresholds: edges and saliency.

| metric                | state        | value                                                                      |
|-----------------------|--------------|----------------------------------------------------------------------------|
| `edge_odsf`           | 3 x f[T + 1] | max over thresholds of F, from tolerant precision and recall               |
| `edge_f(threshold)`   | the same     | that F at a threshold fixed before, on validation images                   |
| `edge_ods_threshold`  | the same     | the threshold at which `edge_odsf` is reached                              |
| `max_f`               | 2 x f[T + 1] | max over thresholds of F with beta^2 = 0.3                                 |
| `saliency_iou`        | f[15]        | max over thresholds of the mean over images of the intersection over union |

All thresholds come from one pass over the pixels: a histogram of how many thresholds each probability reaches, summed
from above. A pixel is predicted at a threshold t if its probability is at least t. `mtjax.dense_metrics` says what all
metrics of dense tasks have in common: pixels labelled 255 and images of weight 0 do not count, NaN spreads.

Letters: B images, H x W pixels, T thresholds, P precision, R recall.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import _streaming as streaming
from mtjax.dense_metrics import histogram, pixel_weights
from mtjax.metrics import Metric


def grid_thresholds(count: int) -> np.ndarray:
    """The thresholds k / (count + 1), k = 1 .. count: f32[count]."""
    return (np.arange(1, count + 1) / (count + 1)).astype(np.float32)


def _reached(probability: jax.Array, thresholds: np.ndarray) -> jax.Array:
    """How many thresholds are at or below each probability, i32; these are the ones at which it is predicted."""
    return jnp.searchsorted(jnp.asarray(thresholds), probability, side="right").astype(jnp.int32)


def _at_thresholds(xp: Any, histogram: jax.Array) -> jax.Array:
    """Histogram [..., T + 1] of thresholds reached -> counts [..., T] of what reaches each."""
    return xp.flip(xp.cumsum(xp.flip(histogram, -1), -1), -1)[..., 1:]


def _f_score(xp: Any, precision: jax.Array, recall: jax.Array, beta2: float) -> jax.Array:
    """(1 + beta^2) P R / (beta^2 P + R), 0 where both are 0; NaN stays NaN."""
    below = beta2 * precision + recall
    return (1 + beta2) * precision * recall / xp.where(below == 0, 1.0, below)


def _share(xp: Any, part: jax.Array, whole: jax.Array) -> jax.Array:
    return part / xp.where(whole == 0, 1.0, whole)


def dilate(x: jax.Array, radius: float) -> jax.Array:
    """Largest value within `radius` pixels (a disk) of each pixel, f[B, H, W].

    Row by row: the widths of a disk shrink away from its middle, so that 4 `radius` maxima do for pi `radius`^2 pixels.
    """
    reach = int(radius)
    widths = [int((radius**2 - dy**2) ** 0.5) for dy in range(reach + 1)]
    padded = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach)), constant_values=-jnp.inf)
    h, w = x.shape[1:]

    def columns(dx: int) -> jax.Array:
        return padded[:, :, reach + dx : reach + dx + w]

    rows = [columns(0)]  # rows[k]: the largest within k columns
    for k in range(1, reach + 1):
        rows.append(jnp.maximum(rows[-1], jnp.maximum(columns(-k), columns(k))))
    shifts = [(dy, rows[widths[abs(dy)]]) for dy in range(-reach, reach + 1)]
    return functools.reduce(jnp.maximum, (row[:, reach + dy : reach + dy + h] for dy, row in shifts))


class EdgeCounts(NamedTuple):
    """State of the edge metrics: histograms over the thresholds that are reached, [..., T + 1].

    Attributes:
      predicted: of the probabilities of all pixels.
      right: of the probabilities of pixels with a true edge in reach.
      found: of the largest probability in reach of each true edge pixel.
      true: [...] weight of true edge pixels.
    """

    predicted: jax.Array
    right: jax.Array
    found: jax.Array
    true: jax.Array


def _edge_statistic(max_distance: float, thresholds: int, ignore: int) -> Callable:
    grid = grid_thresholds(thresholds)

    def statistic(probability: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> EdgeCounts:
        label = jnp.asarray(label)
        radius = max_distance * (label.shape[1] ** 2 + label.shape[2] ** 2) ** 0.5
        valid = label != ignore
        w = pixel_weights(valid, jnp.isnan(probability), weight)
        p = jnp.where(valid, probability, -jnp.inf)  # pixels that do not count match nothing
        true = (label == 1).astype(jnp.float32)
        near = dilate(true, radius)
        reached, best = _reached(p, grid), _reached(dilate(p, radius), grid)
        return EdgeCounts(
            histogram(reached, w, thresholds + 1).sum(0),
            histogram(reached, w * near, thresholds + 1).sum(0),
            histogram(best, w * true, thresholds + 1).sum(0),
            (w * true).sum(),
        )

    return statistic


def _edge_scores(state: EdgeCounts) -> jax.Array:
    """F [..., T], NaN without a true edge."""
    xp = streaming.namespace(state)
    predicted, right, found = (_at_thresholds(xp, leaf) for leaf in state[:3])
    true = state.true[..., None]
    score = _f_score(xp, _share(xp, right, predicted), _share(xp, found, true), 1.0)
    return xp.where(true == 0, xp.nan, score)


@functools.cache
def edge_odsf(*, max_distance: float = 0.011, thresholds: int = 99, ignore: int = 255) -> Metric:
    r"""F of edges at the best threshold of the whole set ("optimal dataset scale"), with a tolerance of some pixels.

        precision = share of predicted pixels with a true edge in reach
        recall    = share of true edge pixels with a predicted pixel in reach
        ODS-F     = max over t of 2 P R / (P + R),          reach = max_distance * diagonal of the image

    Thresholds are k / (T + 1); a pixel is predicted at t if its probability is at least t. All thresholds come from one
    pass: a true edge is found at t exactly if the largest probability in its reach is at least t.

    Args:
      max_distance: tolerance as a share of the diagonal: 0.011 NYUD-v2, 0.0075 PASCAL-Context.
      thresholds: T, 99 in the published evaluation.
      ignore: label of pixels that do not count.

    SEISM and the BSDS benchmark match predicted and true pixels **one to one** (an assignment), after thinning; here a
    pixel may serve several others (dilation), and probabilities are **not** thinned by non-maximum suppression. Thick
    predictions therefore score higher here: compare values of this function with each other, not with published ones.

    Reference: Martin, Fowlkes, Malik, "Learning to Detect Natural Image Boundaries Using Local Brightness, Color, and
    Texture Cues", PAMI 2004, section 3 (precision, recall, F); Pont-Tuset and Marques, "Supervised Evaluation of Image
    Segmentation and Object Proposal Techniques", PAMI 2016 (SEISM).
    """

    def compute(state: EdgeCounts) -> jax.Array:
        return _edge_scores(state).max(-1)

    return Metric("odsf", True, _edge_statistic(max_distance, thresholds, ignore), streaming.add, compute)


@functools.cache
def edge_ods_threshold(*, max_distance: float = 0.011, thresholds: int = 99, ignore: int = 255) -> Metric:
    """The threshold at which `edge_odsf` is reached, the smallest of several: a setting, not a score."""
    grid = grid_thresholds(thresholds)

    def compute(state: EdgeCounts) -> jax.Array:
        xp = streaming.namespace(state)
        score = _edge_scores(state)
        best = xp.asarray(grid)[xp.argmax(score, -1)]
        return xp.where(xp.isnan(score).any(-1), xp.nan, best)

    return Metric("ods_threshold", True, _edge_statistic(max_distance, thresholds, ignore), streaming.add, compute)


@functools.cache
def edge_f(
    threshold: float | tuple[float, ...],
    *,
    max_distance: float = 0.011,
    thresholds: int = 99,
    ignore: int = 255,
) -> Metric:
    """F of edges, as in `edge_odsf`, at a threshold that was fixed before, on validation images.

    Args:
      threshold: one, or one for each lane (the leading axis of a merged state). Rounded to the nearest k / (T + 1).
      max_distance, thresholds, ignore: as for `edge_odsf`.

    Raises:
      ValueError: if a threshold is not between 0 and 1.
    """
    values = np.atleast_1d(np.asarray(threshold, np.float64))
    if not ((values > 0) & (values < 1)).all():
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
    index = np.clip(np.round(values * (thresholds + 1)).astype(int) - 1, 0, thresholds - 1)

    def compute(state: EdgeCounts) -> jax.Array:
        xp = streaming.namespace(state)
        score = _edge_scores(state)
        if index.size == 1:
            return score[..., int(index[0])]
        if score.shape[:-1] != index.shape:
            raise ValueError(f"edge_f has thresholds for {index.size} lanes, got a state of lanes {score.shape[:-1]}")
        return xp.take_along_axis(score, xp.asarray(index)[:, None], -1)[:, 0]

    return Metric("edge_f", True, _edge_statistic(max_distance, thresholds, ignore), streaming.add, compute)


def edge_threshold(
    probability: jax.Array, label: jax.Array, *, max_distance: float = 0.011, thresholds: int = 99, ignore: int = 255
) -> float:
    """The best threshold for edges on these (validation) images, f[B, H, W] and u8[B, H, W]; see `edge_ods_threshold`.

    `mtjax.train.images.fix_edge_threshold` does it for the lanes of a fit.
    """
    metric = edge_ods_threshold(max_distance=max_distance, thresholds=thresholds, ignore=ignore)
    return float(metric.compute(metric.statistic(jnp.asarray(probability), jnp.asarray(label))))


class BinaryCounts(NamedTuple):
    """State of `max_f`: histograms [..., T + 1] over the thresholds that are reached.

    Attributes:
      predicted: of all pixels.
      hit: of the positive pixels.
    """

    predicted: jax.Array
    hit: jax.Array


def _binary_histograms(probability, label, weight, grid, ignore) -> tuple[BinaryCounts, jax.Array]:
    """Image by image: histograms f[B, T + 1]."""
    label = jnp.asarray(label)
    w = pixel_weights(label != ignore, jnp.isnan(probability), weight)
    reached = _reached(probability, grid)
    bins = len(grid) + 1
    return BinaryCounts(histogram(reached, w, bins), histogram(reached, w * (label == 1), bins)), w


@functools.cache
def max_f(*, beta2: float = 0.3, thresholds: int = 255, ignore: int = 255) -> Metric:
    """Best F over thresholds of a saliency map, from pixel counts of the whole set.

        F = (1 + beta^2) P R / (beta^2 P + R),    beta^2 = 0.3 weighs precision more

    Args:
      beta2: beta^2.
      thresholds: T, at k / (T + 1); 255 are the levels of an 8-bit map (the TaskPrompter line takes coarser steps).
      ignore: label of pixels that do not count.

    Reference: Achanta et al., "Frequency-tuned Salient Region Detection", CVPR 2009, equation 6.
    """
    grid = grid_thresholds(thresholds)

    def statistic(probability: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> BinaryCounts:
        return jax.tree.map(lambda leaf: leaf.sum(0), _binary_histograms(probability, label, weight, grid, ignore)[0])

    def compute(state: BinaryCounts) -> jax.Array:
        xp = streaming.namespace(state)
        predicted, hit = (_at_thresholds(xp, leaf) for leaf in state)
        true = state.hit.sum(-1, keepdims=True)
        score = _f_score(xp, _share(xp, hit, predicted), _share(xp, hit, true), beta2)
        return xp.where(true == 0, xp.nan, score).max(-1)

    return Metric("max_f", True, statistic, streaming.add, compute)


@functools.cache
def saliency_iou(*, ignore: int = 255) -> Metric:
    """Saliency by the older protocol: mean over images of the salient region's IoU, at the best of 15 thresholds.

    Thresholds are 0.2, 0.25, .. 0.9 (ASTMT's, by recollection, unverified). An image with nothing salient, predicted
    nor true, counts 1.
    """
    grid = np.linspace(0.2, 0.9, 15).astype(np.float32)

    def statistic(probability: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> streaming.Mean:
        counts, w = _binary_histograms(probability, label, None, grid, ignore)
        predicted, hit = (_at_thresholds(jnp, leaf) for leaf in counts)
        union = predicted + counts.hit.sum(-1)[:, None] - hit
        iou = jnp.where(union == 0, 1.0, hit / jnp.where(union == 0, 1.0, union))
        labelled = ~(w == 0).all((1, 2))
        each = jnp.ones(w.shape[0]) if weight is None else jnp.asarray(weight, jnp.float32)
        each = jnp.where(labelled, each, 0.0)
        return streaming.Mean(jnp.where(each[:, None] == 0, 0.0, each[:, None] * iou).sum(0), each.sum())

    def compute(state: streaming.Mean) -> jax.Array:
        xp = streaming.namespace(state)
        weight = state.weight[..., None]
        return (state.total / xp.where(weight == 0, xp.nan, weight)).max(-1)

    return Metric("saliency_iou", True, statistic, streaming.add, compute)
