r"""Streaming metrics: a metric is data and three pure functions, `compute(merge(statistic(.), statistic(.)))`.

`statistic(prediction, label, weight)` reduces one batch to a state, `merge` joins two states, `compute` turns a
state into a number. Any partition of the examples into batches or shards, merged in any order, gives the value that
scikit-learn gives on the concatenation:

    compute(merge(statistic(A), statistic(B))) = compute(statistic(A followed by B))

Predictions are what `Task.predict` gives, in original units: a probability of class 1 `f32[B]`, probabilities
`f32[B, C]`, or a value `f32[B]`. A row whose weight is 0 or whose label is NaN does not count, whatever its
prediction. A NaN prediction on a row that counts makes the metric NaN. Without any row that counts every metric is NaN.

>>> import jax.numpy as jnp
>>> metric = auroc()
>>> probability, label = jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0.0, 0.0, 1.0, 1.0])
>>> halves = metric.statistic(probability[:2], label[:2]), metric.statistic(probability[2:], label[2:])
>>> float(metric.compute(metric.merge(*halves)))
0.75
>>> values = evaluate((mae(), rmse()), jnp.array([1.0, 2.0]), jnp.array([4.0, jnp.nan]))
>>> {name: float(value) for name, value in values.items()}
{'mae': 3.0, 'rmse': 3.0}

Where things run. `statistic` is JAX: jit it, vmap it over seeds, feed it a batch sharded over a mesh. `merge` and
`compute` work on JAX arrays or on NumPy arrays and take any leading axes (seeds): `to_host(state)` gives float64
NumPy leaves, which is how long streams stay exact (float32 counts are exact up to 2^24 rows) and how states whose
size grows (`auroc()`, `auroc_ovr()`: they keep every example along the last axis) are joined without recompiling.
States of all other metrics have a fixed size and can also be merged inside a `lax.scan`.

Letters: B batch, C classes, N examples merged so far, w weight, y label, p prediction.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import _streaming as streaming
from mtjax import losses
from mtjax._streaming import State


@dataclasses.dataclass(frozen=True)
class Metric:
    """A streaming metric.

    Attributes:
      name: key of the metric in results.
      higher_is_better: its direction, as `delta_m` and early stopping read it.
      statistic: `(prediction, label f32[B], weight f32[B] or bool[B] or None) -> state`; None means weight 1.
      merge: `(state, state) -> state`, associative and commutative up to rounding.
      compute: `state -> scalar`, or one value per leading axis of the state.
    """

    name: str
    higher_is_better: bool
    statistic: Callable[..., State]
    merge: Callable[[State, State], State]
    compute: Callable[[State], jax.Array]


def evaluate(
    metrics: Iterable[Metric], prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Values of several metrics on one batch: `{metric.name: compute(statistic(prediction, label, weight))}`."""
    return {m.name: m.compute(m.statistic(prediction, label, weight)) for m in metrics}


def to_host(state: State) -> State:
    """The state with float64 NumPy leaves, on which `merge` and `compute` run on the host in double precision."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(state))


def weighted_mean(
    name: str,
    score: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    higher_is_better: bool,
    class_axis: bool | None = None,
    finish: Callable[[ModuleType, jax.Array], jax.Array] | None = None,
) -> Metric:
    """A metric that is `finish(sum_i w_i score(p_i, y_i) / sum_i w_i)`: the way to add one of your own.

    Args:
      name: of the metric.
      score: `(prediction [..., B] or [..., B, C], label [..., B]) -> f32[..., B]`.
      higher_is_better: its direction.
      class_axis: True if predictions have an axis C, False if not, None if both are taken.
      finish: `(numpy or jax.numpy, mean) -> value`, by default the mean itself.

    Returns:
      The metric.
    """

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> streaming.Mean:
        prediction, label, weight = streaming.rows(name, prediction, label, weight, class_axis)
        # where, not only the product: a score may be infinite on the zeros that stand for rows without a label.
        total = jnp.where(weight == 0, 0.0, weight * score(prediction, label)).sum(-1)
        return streaming.Mean(total, weight.sum(-1))

    def compute(state: streaming.Mean) -> jax.Array:
        xp = streaming.namespace(state)
        mean = state.total / xp.where(state.weight == 0, xp.nan, state.weight)
        return finish(xp, mean) if finish else mean

    return Metric(name, higher_is_better, statistic, streaming.add, compute)


@functools.cache
def accuracy(threshold: float = 0.5) -> Metric:
    """Share of right classes: `p > threshold` for a probability [B], the first argmax for probabilities [B, C]."""

    def score(prediction: jax.Array, label: jax.Array) -> jax.Array:
        if prediction.ndim == label.ndim:
            return (prediction > threshold) == (label == 1)
        return prediction.argmax(-1) == label

    return weighted_mean("accuracy", score, higher_is_better=True)


@functools.cache
def log_loss() -> Metric:
    """Mean negative log-probability of the label, in nats.

    As in scikit-learn, probabilities are clipped to [eps, 1 - eps] with the machine epsilon of their type; ours are
    float32, so a row costs at most -log(1.2e-7) = 15.9. The unclipped likelihood is a loss (`binary_cross_entropy`).
    """
    eps = float(np.finfo(np.float32).eps)

    def score(prediction: jax.Array, label: jax.Array) -> jax.Array:
        if prediction.ndim == label.ndim:
            of_one, of_zero = jnp.clip(prediction, eps, 1 - eps), jnp.clip(1 - prediction, eps, 1 - eps)
            return -label * jnp.log(of_one) - (1 - label) * jnp.log(of_zero)
        log_probability = jnp.log(jnp.clip(prediction, eps, 1 - eps))
        return -jnp.where(streaming.one_hot(label, prediction.shape[-1]), log_probability, 0.0).sum(-1)

    return weighted_mean("log_loss", score, higher_is_better=False)


@functools.cache
def expected_calibration_error(bins: int = 15) -> Metric:
    r"""Gap between confidence and accuracy, "ECE": how far predicted probabilities are from the frequencies they claim.

        ECE = sum_b W_b / W |acc_b - conf_b| = sum_b |sum_{i in b} w_i (c_i - h_i)| / sum_i w_i

    c is the probability of the predicted class (its *confidence*), h is 1 where that class is right; bin b of M holds
    the rows with (b - 1) / M < c <= b / M. A probability [B] is one of two classes, so its confidence is max(p, 1 - p):
    the value is that of the two columns (1 - p, p). The second form is what is kept: one number per bin, which sums
    over batches and shards.

    Args:
      bins: M, equally wide.

    Raises:
      ValueError: if bins is less than 1.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3 (and 15 bins).
    """
    if bins < 1:
        raise ValueError(f"expected_calibration_error needs at least 1 bin, got {bins}")
    inner = np.arange(1, bins, dtype=np.float32) / np.float32(bins)

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> streaming.Mean:
        prediction, label, weight = streaming.rows("expected_calibration_error", prediction, label, weight)
        if prediction.ndim == label.ndim:
            confidence, hit = jnp.maximum(prediction, 1 - prediction), (prediction > 0.5) == (label == 1)
        else:
            confidence, hit = prediction.max(-1), prediction.argmax(-1) == label
        gap = weight * (confidence - hit)
        # The number of edges below c is the number of its bin.
        bin_of = (confidence[..., None] > inner.reshape((1,) * confidence.ndim + (-1,))).sum(-1)
        return streaming.Mean((gap[..., None] * streaming.one_hot(bin_of, bins)).sum(-2), weight.sum(-1))

    def compute(state: streaming.Mean) -> jax.Array:
        xp = streaming.namespace(state)
        return xp.abs(state.total).sum(-1) / xp.where(state.weight == 0, xp.nan, state.weight)

    return Metric("expected_calibration_error", False, statistic, streaming.add, compute)


@functools.cache
def mae() -> Metric:
    """Mean absolute error, `mean |y - p|`."""
    return weighted_mean("mae", lambda p, y: jnp.abs(y - p), higher_is_better=False, class_axis=False)


@functools.cache
def mse() -> Metric:
    """Mean squared error, `mean (y - p)^2`."""
    return weighted_mean("mse", lambda p, y: (y - p) ** 2, higher_is_better=False, class_axis=False)


@functools.cache
def rmse() -> Metric:
    """Root of the mean squared error; the root is taken once, of the mean over all examples."""

    def finish(xp: ModuleType, mean: jax.Array) -> jax.Array:
        return xp.sqrt(mean)

    return weighted_mean("rmse", lambda p, y: (y - p) ** 2, higher_is_better=False, class_axis=False, finish=finish)


@functools.cache
def poisson_deviance() -> Metric:
    """Mean Poisson deviance `2 mean(y log(y / p) - (y - p))` of counts y >= 0 and rates p > 0.

    Written as `2 y (r - log(1 + r))` with r = (p - y) / y, which does not cancel when rate and count are large and
    close. A rate of 0 (or below) is raised to the smallest normal float32, where scikit-learn raises an error.
    """

    def score(prediction: jax.Array, label: jax.Array) -> jax.Array:
        rate = jnp.maximum(prediction, float(np.finfo(np.float32).tiny))
        count = jnp.where(label > 0, label, 1.0)
        ratio = (rate - count) / count
        # log(p) - log(y) where p << y: 1 + r would round to 0 there.
        log_ratio = jnp.where(ratio < -0.5, jnp.log(rate) - jnp.log(count), jnp.log1p(ratio))
        return 2 * jnp.where(label > 0, count * (ratio - log_ratio), rate)

    return weighted_mean("poisson_deviance", score, higher_is_better=False, class_axis=False)


@functools.cache
def f1(threshold: float = 0.5) -> Metric:
    """F1 of class 1 for a probability [B] (predicted where p > threshold); macro F1 for probabilities [B, C].

    `2 hit / (predicted + actual)` per class, averaged over the classes that occur among the labels or the
    predictions, as scikit-learn does. Without a positive in either, binary F1 is 0.
    """

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> streaming.Counts:
        prediction, label, weight = streaming.rows("f1", prediction, label, weight)
        if prediction.ndim == label.ndim:
            predicted, actual = (prediction > threshold)[..., None], (label == 1)[..., None]
        else:
            num_classes = prediction.shape[-1]
            predicted = streaming.one_hot(prediction.argmax(-1).astype(label.dtype), num_classes)
            actual = streaming.one_hot(label, num_classes)

        def total(event: jax.Array) -> jax.Array:
            return (event * weight[..., None]).sum(-2)

        return streaming.Counts(total(predicted & actual), total(predicted), total(actual), weight.sum(-1))

    def compute(state: streaming.Counts) -> jax.Array:
        xp = streaming.namespace(state)
        size = state.predicted + state.actual
        occurs = size > 0
        per_class = xp.where(occurs, 2 * state.hit / xp.where(occurs, size, 1.0), 0.0)
        value = per_class.sum(-1) / xp.maximum(occurs.sum(-1), 1)
        return xp.where(state.weight > 0, value, xp.nan)

    return Metric("f1", True, statistic, streaming.add, compute)


@functools.cache
def auroc(bins: int | None = None) -> Metric:
    """Area under the ROC curve: the weighted share of (positive, negative) pairs in the right order, ties one half.

    NaN unless both classes occur.

    Args:
      bins: None keeps all examples and is exact. A number gives the state the fixed size 2 x bins: a histogram per
        class, which sums over batches and shards, named 'auroc_binned'. The bins are equally wide in log-odds
        between -16 and 16, so that they resolve rare classes too (AUROC does not change under monotone maps). Pairs
        that share a bin count one half, hence with P_b, N_b the shares of positives and negatives in bin b

            |binned - exact| <= 1/2 sum_b P_b N_b <= 1/2 max_b P_b .

        For scores spread over 4 units of log-odds and 1024 bins this is below 0.004.

    Raises:
      ValueError: if bins is less than 2.
    """
    if bins is not None:
        return _binned_auroc(bins)

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> streaming.Examples:
        return streaming.Examples(*streaming.rows("auroc", prediction, label, weight, class_axis=False))

    def compute(state: streaming.Examples) -> jax.Array:
        xp = streaming.namespace(state)
        positive = state.label == 1
        return streaming.area_under_roc(xp, state.score, state.weight * positive, state.weight * ~positive)

    return Metric("auroc", True, statistic, streaming.concatenate, compute)


def _binned_auroc(bins: int, limit: float = 16.0) -> Metric:
    if bins < 2:
        raise ValueError(f"auroc needs at least 2 bins (or bins=None for the exact value), got {bins}")

    @functools.partial(jnp.vectorize, signature="(n),(n)->(b)")
    def histogram(index: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.zeros(bins, weight.dtype).at[index].add(weight)

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> streaming.Histogram:
        prediction, label, weight = streaming.rows("auroc_binned", prediction, label, weight, class_axis=False)
        log_odds = jnp.clip(jnp.log(prediction) - jnp.log1p(-prediction), -limit, limit)
        index = jnp.floor((log_odds + limit) * (bins / (2 * limit)))
        # A NaN prediction has a NaN weight: any bin will do.
        index = jnp.clip(jnp.nan_to_num(index), 0, bins - 1).astype(jnp.int32)
        positive = label == 1
        return streaming.Histogram(histogram(index, weight * positive), histogram(index, weight * ~positive))

    def compute(state: streaming.Histogram) -> jax.Array:
        xp = streaming.namespace(state)
        below = xp.cumsum(state.negative, -1) - state.negative / 2
        return streaming.share_of_pairs(
            xp, (state.positive * below).sum(-1), state.positive.sum(-1), state.negative.sum(-1)
        )

    return Metric("auroc_binned", True, statistic, streaming.add, compute)


@functools.cache
def auroc_ovr() -> Metric:
    """One-vs-rest AUROC: the exact AUROC of each class against all others, averaged over classes (macro).

    A class without positives or without negatives has no AUROC and is left out of the average, where scikit-learn
    raises an error; NaN if that leaves none.
    """

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> streaming.Examples:
        prediction, label, weight = streaming.rows("auroc_ovr", prediction, label, weight, class_axis=True)
        return streaming.Examples(jnp.moveaxis(prediction, -1, -2), label, weight)

    def compute(state: streaming.Examples) -> jax.Array:
        xp = streaming.namespace(state)
        classes = xp.arange(state.score.shape[-2]).reshape((1,) * (state.label.ndim - 1) + (-1, 1))
        positive = state.label[..., None, :] == classes
        weight = state.weight[..., None, :]
        per_class = streaming.area_under_roc(xp, state.score, weight * positive, weight * ~positive)
        defined = ~xp.isnan(per_class)
        mean = xp.where(defined, per_class, 0.0).sum(-1) / xp.maximum(defined.sum(-1), 1)
        return xp.where(defined.any(-1), mean, xp.nan)

    return Metric("auroc_ovr", True, statistic, streaming.concatenate, compute)


@functools.cache
def explained_variance() -> Metric:
    """`1 - Var(y - p) / Var(y)`: like R2, but a constant offset of the predictions costs nothing.

    For a constant target 1 if the error is constant too, else 0 (scikit-learn's `force_finite`).
    """

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> streaming.Moments:
        return streaming.moments("explained_variance", prediction, label, weight)

    def compute(state: streaming.Moments) -> jax.Array:
        xp = streaming.namespace(state)
        value = streaming.share_explained(xp, state.spread[..., 1], state.spread[..., 0])
        return xp.where(state.weight > 0, value, xp.nan)

    return Metric("explained_variance", True, statistic, streaming.merge_moments, compute)


@functools.cache
def r2() -> Metric:
    """Coefficient of determination, `1 - sum w (y - p)^2 / sum w (y - mean y)^2`.

    For a constant target 1 if predictions are exact, else 0 (scikit-learn's `force_finite`); NaN for a single row.
    """

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> streaming.Moments:
        return streaming.moments("r2", prediction, label, weight)

    def compute(state: streaming.Moments) -> jax.Array:
        xp = streaming.namespace(state)
        bias = state.anchor[..., 1] + state.mean[..., 1]
        value = streaming.share_explained(xp, state.spread[..., 1] + state.weight * bias**2, state.spread[..., 0])
        return xp.where((state.weight > 0) & (state.count > 1), value, xp.nan)

    return Metric("r2", True, statistic, streaming.merge_moments, compute)


@functools.cache
def relative_l2(above: Literal["zero", "minimum"] = "zero") -> Metric:
    """Mean over functions of `|u - v|_2 / |v|_2`, each over the points where v has a value (NaN: none).

    Predictions and labels are fields f[B, N]. A field with a large offset flatters this number: `above="minimum"`
    compares u and v after the minimum of v has been subtracted from both, |u - v| / |v - min v|.
    """
    if above not in ("zero", "minimum"):
        raise ValueError(f"above must be 'zero' or 'minimum', got {above!r}")
    name = "relative_l2" if above == "zero" else "relative_l2_above_minimum"

    def statistic(prediction: jax.Array, label: jax.Array, weight: jax.Array | None = None) -> streaming.Mean:
        weight = jnp.ones(label.shape[:-1]) if weight is None else weight
        if above == "minimum":
            base = jnp.nanmin(jnp.where(jnp.isnan(label).all(-1, keepdims=True), 0.0, label), axis=-1, keepdims=True)
            prediction, label = prediction - base, label - base
        total = jnp.where(weight == 0, 0.0, weight * losses.relative_l2(prediction, label)).sum(-1)
        return streaming.Mean(total, weight.sum(-1))

    def compute(state: streaming.Mean) -> jax.Array:
        xp = streaming.namespace(state)
        return state.total / xp.where(state.weight == 0, xp.nan, state.weight)

    return Metric(name, False, statistic, streaming.add, compute)
