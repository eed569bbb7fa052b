"""Edges and saliency: equal to a loop over thresholds and images with scipy's dilation or scikit-learn's F."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn import metrics as sk

from mtjax import metrics
from mtjax import threshold_metrics as tm

B, H, W, T = 4, 9, 12, 9
TOLERANCES = {0: 0.01, 1: 0.07, 2.3: 2.3 / 15.0}  # the diagonal of 9 x 12 is 15


def example(seed=0):
    """Probabilities that know something of the edges; some pixels do not count, and some sit on a threshold."""
    rng = np.random.default_rng(seed)
    label = (rng.random((B, H, W)) < 0.15).astype(np.uint8)
    probability = np.clip(
        0.35 * ndimage.uniform_filter(label.astype(float), (0, 3, 3)) * 5 + rng.random(label.shape) / 2, 0, 1
    ).astype(np.float32)
    probability[rng.random(label.shape) < 0.1] = tm.grid_thresholds(T)[4]
    label[rng.random(label.shape) < 0.1] = 255
    return probability, label


def disk(radius):
    reach = np.arange(-int(radius), int(radius) + 1)
    return reach[:, None] ** 2 + reach**2 <= radius**2


def naive_edges(probability, label, radius):
    """F at every threshold: dilate, match, count."""
    scores = []
    for t in tm.grid_thresholds(T):
        predicted_count = right = true_count = found = 0
        for p, y in zip(probability, label, strict=True):
            predicted, true = (p >= t) & (y != 255), y == 1
            near_true = ndimage.binary_dilation(true, disk(radius))
            near_predicted = ndimage.binary_dilation(predicted, disk(radius))
            predicted_count, right = predicted_count + predicted.sum(), right + (predicted & near_true).sum()
            true_count, found = true_count + true.sum(), found + (true & near_predicted).sum()
        precision, recall = right / max(predicted_count, 1), found / true_count
        scores.append(2 * precision * recall / max(precision + recall, 1e-12))
    return np.array(scores)


@functools.cache
def edge_statistic(radius):
    metric = tm.edge_odsf(max_distance=TOLERANCES[radius], thresholds=T)
    return metric, jax.jit(metric.statistic)


@pytest.mark.parametrize("radius", [1, 2.3, 5])
def test_dilation_is_a_disk(radius):
    x = np.random.default_rng(0).normal(size=(2, H, W)).astype(np.float32)
    expected = [ndimage.grey_dilation(image, footprint=disk(radius), mode="constant", cval=-np.inf) for image in x]
    np.testing.assert_array_equal(tm.dilate(jnp.asarray(x), radius), expected)


@pytest.mark.parametrize("radius", TOLERANCES)
@settings(max_examples=5)
@given(st.integers(0, 100), st.permutations(range(B)))
def test_edges_as_in_a_loop_over_thresholds(radius, seed, order):
    probability, label = example(seed)
    metric, statistic = edge_statistic(radius)
    state = metrics.to_host(statistic(probability, label))
    expected = naive_edges(probability, label, radius)
    assert float(metric.compute(state)) == pytest.approx(expected.max(), rel=1e-6)
    where = tm.edge_ods_threshold(max_distance=TOLERANCES[radius], thresholds=T).compute(state)
    assert float(where) == pytest.approx(float(tm.grid_thresholds(T)[expected.argmax()]))
    for t in (0.3, 0.5):
        fixed = tm.edge_f(t, max_distance=TOLERANCES[radius], thresholds=T)
        assert float(fixed.compute(state)) == pytest.approx(expected[round(t * (T + 1)) - 1], rel=1e-6)
    # Two at a time, in another order.
    parts = [metrics.to_host(statistic(probability[rows], label[rows])) for rows in np.reshape(order, (2, 2))]
    for whole, joined in zip(state, metric.merge(*parts), strict=True):
        np.testing.assert_allclose(joined, whole)


def test_more_tolerance_never_scores_lower():
    probability, label = example()
    values = [float(metric.compute(run(probability, label))) for metric, run in map(edge_statistic, TOLERANCES)]
    assert values == sorted(values) and values[0] < values[-1]


def test_an_edge_that_is_off_by_one_pixel():
    label = np.zeros((1, H, W), np.uint8)
    label[0, 4] = 1
    moved = np.roll(label, 1, axis=1).astype(np.float32)
    for radius, expected in ((0, 0.0), (1, 1.0)):
        metric, run = edge_statistic(radius)
        assert float(metric.compute(run(moved, label))) == expected


def test_weights_nan_and_nothing_to_find():
    probability, label = example()
    metric = edge_statistic(1)[0]
    run = jax.jit(jax.vmap(metric.statistic, in_axes=(0, None, None)))
    broken = probability.copy()
    broken[0, 0, 0], label[0, 0, 0] = np.nan, 0
    ignored = np.where(label == 255, np.nan, probability)
    lanes = np.stack([probability, broken, ignored])
    weight = np.array([1.0, 1, 0, 1], np.float32)
    values = metric.compute(run(lanes, label, weight))
    expected = naive_edges(probability[weight > 0], label[weight > 0], 1).max()
    np.testing.assert_allclose(values[jnp.array([0, 2])], expected, rtol=1e-6)
    assert np.isnan(values[1])
    assert np.isnan(metric.compute(run(lanes, label, 0 * weight))).all()
    assert np.isnan(metric.compute(run(lanes, 0 * label, weight))[0])


def test_threshold_of_each_lane():
    probability, label = example()
    lanes = np.stack([probability, probability**2])
    metric = edge_statistic(1)[0]
    state = metrics.to_host(jax.jit(jax.vmap(metric.statistic, in_axes=(0, None)))(lanes, label))
    options = {"max_distance": TOLERANCES[1], "thresholds": T}
    best = tm.edge_ods_threshold(**options).compute(state)
    fixed = tm.edge_f(tuple(float(t) for t in best), **options)
    np.testing.assert_allclose(fixed.compute(state), metric.compute(state))
    assert tm.edge_threshold(lanes[1], label, **options) == pytest.approx(best[1])
    with pytest.raises(ValueError, match="thresholds for 2 lanes, got a state of lanes \\(\\)"):
        fixed.compute(jax.tree.map(lambda leaf: leaf[0], state))
    with pytest.raises(ValueError, match="threshold must be between 0 and 1, got 1"):
        tm.edge_f(1)


def test_max_f_as_in_scikit_learn():
    probability, label = example()
    metric = tm.max_f(thresholds=T)
    state = metrics.to_host(jax.jit(metric.statistic)(probability, label))
    p, y = probability[label != 255], label[label != 255]
    expected = [sk.fbeta_score(y, p >= t, beta=0.3**0.5, zero_division=0) for t in tm.grid_thresholds(T)]
    assert float(metric.compute(state)) == pytest.approx(max(expected), rel=1e-6)
    half = [metrics.to_host(metric.statistic(jnp.asarray(probability[i]), label[i])) for i in (slice(2), slice(2, 4))]
    assert float(metric.compute(metric.merge(*half))) == pytest.approx(max(expected), rel=1e-6)


def test_saliency_iou_as_in_a_loop():
    probability, label = example()
    label[3] = 255  # no label at all
    metric = tm.saliency_iou()
    values = []
    for t in np.linspace(0.2, 0.9, 15).astype(np.float32):
        pairs = [(p[y != 255] >= t, y[y != 255]) for p, y in zip(probability[:3], label[:3], strict=True)]
        values.append(np.mean([sk.jaccard_score(y, p, zero_division=1) for p, y in pairs]))
    assert float(metric.compute(jax.jit(metric.statistic)(probability, label))) == pytest.approx(max(values), rel=1e-6)
