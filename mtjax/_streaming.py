r"""Sufficient statistics that merge: the arithmetic under `mtjax.metrics`.

Three kinds of state. Sums (`Mean`, `Counts`, `Histogram`) are added. `Moments` are merged pairwise (Chan, Golub,
LeVeque 1979), because sums of squares in float32 lose everything once the mean is large against the spread.
`Examples` are concatenated along the last axis.

Functions take JAX or NumPy arrays with any leading axes; `namespace` says which of the two libraries to call.

Letters: B batch, C classes, N examples merged so far, w weight, y label, p prediction.
"""

import operator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

State = Any
"""A pytree of arrays; the type is the metric's own."""


def namespace(state: State) -> ModuleType:
    """jax.numpy if any leaf is a JAX array or tracer, else numpy."""
    return jnp if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state)) else np


def rows(
    name: str, prediction: jax.Array, label: jax.Array, weight: jax.Array | None, class_axis: bool | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Float32 (prediction, label, weight); rows that do not count are zero in all three.

    Args:
      name: of the metric, for the message.
      prediction: [..., B] or [..., B, C].
      label: [..., B], NaN = missing.
      weight: [..., B] or broadcastable to it, or None.
      class_axis: whether the metric needs the axis C; None takes both.

    Raises:
      ValueError: if the shapes do not fit.
    """
    prediction, label = jnp.asarray(prediction, jnp.float32), jnp.asarray(label, jnp.float32)
    has_classes = prediction.ndim == label.ndim + 1
    fits = prediction.shape[: label.ndim] == label.shape and label.ndim > 0 and prediction.ndim - label.ndim in (0, 1)
    if not fits or (class_axis is not None and has_classes != class_axis):
        wanted = {True: "[B, C]", False: "[B]", None: "[B] or [B, C]"}[class_axis]
        raise ValueError(
            f"Metric '{name}' takes predictions of shape {wanted} and labels of shape [B]; got predictions of shape "
            f"{prediction.shape} and labels of shape {label.shape}"
        )
    weight = jnp.ones_like(label) if weight is None else jnp.asarray(weight, jnp.float32)
    weight = jnp.where(jnp.isnan(label), 0.0, jnp.broadcast_to(weight, label.shape))
    counts = weight != 0
    undefined = jnp.isnan(prediction).any(-1) if has_classes else jnp.isnan(prediction)
    # A NaN weight spreads to every sum, and so to the value; comparisons with a NaN prediction would hide it.
    weight = jnp.where(counts & undefined, jnp.nan, weight)
    prediction = jnp.where(counts[..., None] if has_classes else counts, prediction, 0.0)
    return prediction, jnp.where(counts, label, 0.0), weight


def add(a: State, b: State) -> State:
    """Merge of states that are sums."""
    return jax.tree.map(operator.add, a, b)


def one_hot(label: jax.Array, num_classes: int) -> jax.Array:
    """bool[..., B, C]."""
    return label[..., None] == jnp.arange(num_classes, dtype=label.dtype).reshape((1,) * label.ndim + (-1,))


class Mean(NamedTuple):
    """State of a weighted mean.

    Attributes:
      total: sum_i w_i score_i.
      weight: sum_i w_i.
    """

    total: jax.Array
    weight: jax.Array


class Counts(NamedTuple):
    """State of F1. C is 1 (the positive class) for binary predictions.

    Attributes:
      hit: [..., C] weight of examples of class c that were predicted as c.
      predicted: [..., C] weight of examples predicted as c.
      actual: [..., C] weight of examples of class c.
      weight: [...] weight of all examples.
    """

    hit: jax.Array
    predicted: jax.Array
    actual: jax.Array
    weight: jax.Array


class Histogram(NamedTuple):
    """State of the binned AUROC.

    Attributes:
      positive: [..., bins] weight of the positive examples in each bin.
      negative: [..., bins] weight of the negative examples in each bin.
    """

    positive: jax.Array
    negative: jax.Array


class Examples(NamedTuple):
    """State that keeps every example, along the last axis.

    Attributes:
      score: [..., N], or [..., C, N] for one-vs-rest.
      label: [..., N].
      weight: [..., N].
    """

    score: jax.Array
    label: jax.Array
    weight: jax.Array


def concatenate(a: Examples, b: Examples) -> Examples:
    """Merge of states that keep every example."""
    xp = namespace((a, b))
    return jax.tree.map(lambda x, y: xp.concatenate([x, y], axis=-1), a, b)


def _cumulative(xp: ModuleType, x: jax.Array, largest: bool) -> jax.Array:
    """Running maximum from the left, or running minimum from the right, along the last axis."""
    if xp is np:
        return np.maximum.accumulate(x, -1) if largest else np.minimum.accumulate(x[..., ::-1], -1)[..., ::-1]
    axis = x.ndim - 1
    return jax.lax.cummax(x, axis) if largest else jax.lax.cummin(x, axis, reverse=True)


def area_under_roc(xp: ModuleType, score: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
    """Exact area under the ROC curve from weights [..., N] of positives and negatives at each score [..., N]."""
    order = xp.argsort(score, axis=-1)
    score, positive, negative = (xp.take_along_axis(x, order, -1) for x in (score, positive, negative))
    up_to = xp.cumsum(negative, -1)
    below = xp.concatenate([xp.zeros_like(up_to[..., :1]), up_to[..., :-1]], -1)
    step = score[..., 1:] != score[..., :-1]
    edge = xp.ones_like(step, shape=(*score.shape[:-1], min(1, score.shape[-1])))
    # Tied scores share what lies below their first and up to their last member; a positive beats the weight of the
    # negatives below its tie and half of those inside.
    below = _cumulative(xp, xp.where(xp.concatenate([edge, step], -1), below, 0.0), largest=True)
    up_to = _cumulative(xp, xp.where(xp.concatenate([step, edge], -1), up_to, xp.inf), largest=False)
    return share_of_pairs(xp, (positive * (below + up_to) / 2).sum(-1), positive.sum(-1), negative.sum(-1))


def share_of_pairs(xp: ModuleType, wins: jax.Array, positives: jax.Array, negatives: jax.Array) -> jax.Array:
    """wins / (positives * negatives), NaN where a class is missing."""
    defined = (positives > 0) & (negatives > 0)
    return xp.where(defined, wins / xp.where(defined, positives, 1) / xp.where(defined, negatives, 1), xp.nan)


class Moments(NamedTuple):
    """Weighted moments of (label y, error y - p), which are the last axis of the vectors.

    Attributes:
      count: [...] number of examples with a weight.
      weight: [...] sum of weights W.
      anchor: [..., 2] a value near the data; means are kept as offsets from it.
      mean: [..., 2] weighted mean minus anchor.
      spread: [..., 2] sum_i w_i (x_i - mean)^2.
    """

    count: jax.Array
    weight: jax.Array
    anchor: jax.Array
    mean: jax.Array
    spread: jax.Array


def moments(name: str, prediction: jax.Array, label: jax.Array, weight: jax.Array | None) -> Moments:
    """Moments of one batch: two passes around a value of the data, so that a large mean costs no digits."""
    prediction, label, weight = rows(name, prediction, label, weight, class_axis=False)
    counts = weight != 0
    total = weight.sum(-1)
    safe = jnp.where(total == 0, 1.0, total)[..., None]
    value = jnp.stack([label, label - prediction], -2)  # [..., 2, B]
    # The first row that counts is the anchor: a constant target then has a spread of exactly 0.
    first = jnp.argmax(counts, -1)[..., None, None]
    anchor = jnp.take_along_axis(value, jnp.broadcast_to(first, (*value.shape[:-1], 1)), -1)
    offset = jnp.where(counts[..., None, :], value - anchor, 0.0)
    w = weight[..., None, :]
    mean = (w * offset).sum(-1) / safe
    residual = offset - mean[..., None]
    # What is left of the residuals' sum is the rounding of the mean; subtracting it corrects the spread.
    spread = (w * residual**2).sum(-1) - (w * residual).sum(-1) ** 2 / safe
    return Moments(counts.sum(-1).astype(jnp.float32), total, anchor[..., 0], mean, jnp.maximum(spread, 0.0))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Pairwise update of Chan, Golub and LeVeque (1979), with means relative to the heavier side's anchor."""
    xp = namespace((a, b))
    total = a.weight + b.weight
    share = (b.weight / xp.where(total == 0, 1.0, total))[..., None]
    anchor = xp.where((a.weight >= b.weight)[..., None], a.anchor, b.anchor)
    mean_a, mean_b = a.mean + (a.anchor - anchor), b.mean + (b.anchor - anchor)
    delta = mean_b - mean_a
    return Moments(
        count=a.count + b.count,
        weight=total,
        anchor=anchor,
        mean=mean_a + delta * share,
        spread=a.spread + b.spread + delta**2 * a.weight[..., None] * share,
    )


def share_explained(xp: ModuleType, unexplained: jax.Array, total: jax.Array) -> jax.Array:
    """1 - unexplained / total; of a constant target 1 if nothing is unexplained, else 0 (NaN stays NaN)."""
    of_constant = xp.where(unexplained == 0, 1.0, xp.where(unexplained > 0, 0.0, xp.nan))
    return xp.where(total > 0, 1 - unexplained / xp.where(total > 0, total, 1.0), of_constant)
