"""Metrics: equal to scikit-learn on the concatenation, for any partition, merge order, mask, seed axis and mesh."""

import functools
import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mtjax import metrics

N, C = 24, 4


class Case(NamedTuple):
    metric: metrics.Metric
    kind: str
    reference: Callable  # (prediction, label, weight) -> float, scikit-learn


def sk_auroc(p, y, w):
    return sk.roc_auc_score(y, p, sample_weight=w) if len(np.unique(y)) == 2 else np.nan


def sk_auroc_ovr(p, y, w):
    per_class = [sk_auroc(p[:, c], (y == c).astype(float), w) for c in range(C)]
    return np.nan if np.isnan(per_class).all() else np.nanmean(per_class)


def sk_r2(p, y, w):
    return sk.r2_score(y, p, sample_weight=w) if len(y) > 1 else np.nan


def calibration_error(p, y, w, bins=15):
    """Guo et al. (2017), equation 3, bin by bin: W_b / W |acc_b - conf_b|; scikit-learn does not have it."""
    p = np.stack([1 - p, p], -1) if p.ndim == 1 else p
    confidence, hit = p.max(-1), p.argmax(-1) == y
    edges = np.arange(bins + 1, dtype=np.float32) / np.float32(bins)
    error = 0.0
    for lower, upper in itertools.pairwise(edges):
        inside = (confidence > lower) & (confidence <= upper)
        if inside.any():
            of_bin = w[inside]
            gap = (of_bin * hit[inside]).sum() / of_bin.sum() - (of_bin * confidence[inside]).sum() / of_bin.sum()
            error += of_bin.sum() / w.sum() * abs(gap)
    return error


CASES = {
    "accuracy": Case(metrics.accuracy(), "binary", lambda p, y, w: sk.accuracy_score(y, p > 0.5, sample_weight=w)),
    "accuracy_multiclass": Case(
        metrics.accuracy(), "multiclass", lambda p, y, w: sk.accuracy_score(y, p.argmax(-1), sample_weight=w)
    ),
    "f1": Case(metrics.f1(), "binary", lambda p, y, w: sk.f1_score(y, p > 0.5, sample_weight=w, zero_division=0)),
    "f1_macro": Case(
        metrics.f1(),
        "multiclass",
        lambda p, y, w: sk.f1_score(y, p.argmax(-1), sample_weight=w, average="macro", zero_division=0),
    ),
    "log_loss": Case(
        metrics.log_loss(), "binary", lambda p, y, w: sk.log_loss(y, p, sample_weight=w, labels=[0.0, 1.0])
    ),
    "log_loss_multiclass": Case(
        metrics.log_loss(),
        "multiclass",
        lambda p, y, w: sk.log_loss(y, p, sample_weight=w, labels=np.arange(C, dtype=float)),
    ),
    "calibration": Case(metrics.expected_calibration_error(), "binary", calibration_error),
    "calibration_multiclass": Case(metrics.expected_calibration_error(), "multiclass", calibration_error),
    "auroc": Case(metrics.auroc(), "binary", sk_auroc),
    "auroc_ovr": Case(metrics.auroc_ovr(), "multiclass", sk_auroc_ovr),
    "explained_variance": Case(
        metrics.explained_variance(), "regression", lambda p, y, w: sk.explained_variance_score(y, p, sample_weight=w)
    ),
    "r2": Case(metrics.r2(), "regression", sk_r2),
    "mae": Case(metrics.mae(), "regression", lambda p, y, w: sk.mean_absolute_error(y, p, sample_weight=w)),
    "mse": Case(metrics.mse(), "regression", lambda p, y, w: sk.mean_squared_error(y, p, sample_weight=w)),
    "rmse": Case(metrics.rmse(), "regression", lambda p, y, w: sk.root_mean_squared_error(y, p, sample_weight=w)),
    "poisson_deviance": Case(
        metrics.poisson_deviance(), "count", lambda p, y, w: sk.mean_poisson_deviance(y, p, sample_weight=w)
    ),
}
all_metrics = pytest.mark.parametrize("name", CASES)


def example(kind: str, seed: int, n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions with ties, labels of which some are missing, weights of which some are 0; all float32."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 4, n) / 2
    if kind == "binary":
        label = rng.integers(0, 2, n).astype(float)
        prediction = np.clip(np.round(0.3 * label + 0.7 * rng.random(n), 1), 0, 1)
    elif kind == "multiclass":
        label = rng.integers(0, C, n).astype(float)
        logits = np.round(rng.normal(size=(n, C)), 1)
        prediction = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    elif kind == "regression":
        label = 1e4 + rng.normal(size=n)
        prediction = label + rng.normal(size=n)
    else:
        label = rng.poisson(3.0, n).astype(float)
        prediction = rng.gamma(2.0, 1.5, n) + 0.01
    label[rng.random(n) < 0.2] = np.nan
    return tuple(x.astype(np.float32) for x in (prediction, label, weight))


def expected(case: Case, prediction, label, weight) -> float:
    counts = (weight > 0) & ~np.isnan(label)
    if not counts.any():
        return np.nan
    return case.reference(prediction[counts], label[counts].astype(float), weight[counts].astype(float))


@functools.cache
def jitted(metric: metrics.Metric) -> Callable:
    return jax.jit(metric.statistic)


@all_metrics
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch_of=st.lists(st.integers(0, 3), min_size=N, max_size=N),
    order=st.randoms(use_true_random=False),
)
def test_any_partition_in_any_merge_order_equals_scikit_learn(
    name: str, seed: int, batch_of: list[int], order: random.Random
):
    case = CASES[name]
    prediction, label, weight = example(case.kind, seed)
    # A batch is the rows that have a weight in it: fixed shapes, and batches without any row come for free.
    states = [
        metrics.to_host(jitted(case.metric)(prediction, label, np.where(np.array(batch_of) == b, weight, 0)))
        for b in range(4)
    ]
    while len(states) > 1:
        a, b = (states.pop(order.randrange(len(states))) for _ in range(2))
        states.append(case.metric.merge(a, b))
    value = case.metric.compute(states[0])
    np.testing.assert_allclose(value, expected(case, prediction, label, weight), rtol=2e-5, atol=1e-6)


@all_metrics
def test_batches_of_different_length_on_device(name: str):
    case = CASES[name]
    prediction, label, weight = example(case.kind, 1)

    @jax.jit
    def in_three_batches(*arrays):
        states = [case.metric.statistic(*(x[i:j] for x in arrays)) for i, j in ((0, 3), (3, 16), (16, N))]
        return case.metric.compute(functools.reduce(case.metric.merge, states))

    value = in_three_batches(prediction, label, weight)
    assert value.shape == ()
    np.testing.assert_allclose(value, expected(case, prediction, label, weight), rtol=5e-5, atol=1e-6)


@all_metrics
def test_merge_is_commutative_and_an_empty_batch_changes_nothing(name: str):
    metric, kind, _ = CASES[name]
    a, b = (metrics.to_host(jitted(metric)(*example(kind, seed))) for seed in (2, 3))
    prediction, label, weight = example(kind, 4)
    empty = metrics.to_host(jitted(metric)(prediction, label, 0 * weight))
    assert np.isnan(metric.compute(empty))
    np.testing.assert_allclose(metric.compute(metric.merge(a, b)), metric.compute(metric.merge(b, a)), rtol=1e-9)
    for joined in (metric.merge(a, empty), metric.merge(empty, a)):
        np.testing.assert_allclose(metric.compute(joined), metric.compute(a), rtol=1e-9)


@all_metrics
def test_missing_labels_and_masked_rows_never_poison(name: str):
    metric, kind, _ = CASES[name]
    prediction, label, weight = example(kind, 5)
    weight[:4] = 0
    label[4:8] = np.nan
    clean = metric.compute(metrics.to_host(jitted(metric)(prediction, label, weight)))
    prediction[:4], prediction[4:8] = np.nan, np.inf
    label[:2] = np.inf
    assert metric.compute(metrics.to_host(jitted(metric)(prediction, label, weight))) == clean
    prediction[10], label[10], weight[10] = np.nan, 1.0, 1.0
    assert np.isnan(metric.compute(metrics.to_host(jitted(metric)(prediction, label, weight))))


@all_metrics
def test_unweighted_is_weight_one_and_a_mask_is_a_weight(name: str):
    metric, kind, _ = CASES[name]
    prediction, label, _ = example(kind, 6)
    ones = metric.compute(metrics.to_host(jitted(metric)(prediction, label, np.ones(N, np.float32))))
    for weight in (None, np.ones(N, bool)):
        value = metric.compute(metrics.to_host(jitted(metric)(prediction, label, weight)))
        np.testing.assert_allclose(value, ones, rtol=2e-6)


@all_metrics
def test_seeds_axis(name: str):
    metric, kind, _ = CASES[name]
    halves = [[example(kind, seed + s) for s in range(3)] for seed in (10, 20)]
    first, second = ([np.stack(x) for x in zip(*half, strict=True)] for half in halves)
    over_seeds = jax.jit(jax.vmap(metric.statistic))
    state = metric.merge(over_seeds(*first), over_seeds(*second))
    values, host_values = jax.jit(metric.compute)(state), metric.compute(metrics.to_host(state))
    assert values.shape == host_values.shape == (3,)
    for s in range(3):
        one = [metrics.to_host(jitted(metric)(*half[s])) for half in halves]
        reference = metric.compute(metric.merge(*one))
        np.testing.assert_allclose(host_values[s], reference, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(values[s], reference, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(metric.compute))(state), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression", "count"])
def test_batch_sharded_over_a_mesh(kind: str):
    cases = [case for case in CASES.values() if case.kind == kind]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    arrays = example(kind, 7, n=48)
    sharded = [jax.device_put(x, sharding) for x in arrays]
    assert len(sharded[0].sharding.device_set) == 8
    values = jax.jit(functools.partial(metrics.evaluate, [case.metric for case in cases]))(*sharded)
    for case in cases:
        np.testing.assert_allclose(values[case.metric.name], expected(case, *arrays), rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("metric", [metrics.explained_variance(), metrics.r2()], ids=lambda m: m.name)
def test_moments_survive_a_large_mean(metric: metrics.Metric):
    rng = np.random.default_rng(0)
    label = (1e4 + rng.normal(size=(64, 256))).astype(np.float32)
    prediction = (label + 0.3 + 0.5 * rng.normal(size=label.shape)).astype(np.float32)
    reference = getattr(sk, metric.name + "_score")(label.ravel().astype(float), prediction.ravel().astype(float))
    assert 0.5 < reference < 0.8

    def step(state, batch):
        return metric.merge(state, metric.statistic(*batch)), None

    start = metric.statistic(prediction[0], label[0])
    in_scan, _ = jax.jit(lambda *batches: jax.lax.scan(step, start, batches))(prediction[1:], label[1:])
    np.testing.assert_allclose(metric.compute(in_scan), reference, rtol=1e-5)
    whole = metric.statistic(prediction.ravel(), label.ravel())
    np.testing.assert_allclose(metric.compute(whole), reference, rtol=1e-5)


def test_auroc_ovr_equals_scikit_learn_with_every_class_present():
    rng = np.random.default_rng(0)
    label = np.concatenate([np.arange(C), rng.integers(0, C, 40)]).astype(float)
    probability = rng.dirichlet(np.ones(C), 44)
    reference = sk.roc_auc_score(label, probability, multi_class="ovr", average="macro")
    value = metrics.evaluate([metrics.auroc_ovr()], jnp.asarray(probability), jnp.asarray(label))["auroc_ovr"]
    np.testing.assert_allclose(value, reference, rtol=1e-6)


def test_auroc_counts_ties_as_one_half():
    label = jnp.array([1.0, 0.0, 1.0, 0.0, 1.0])
    assert metrics.evaluate([metrics.auroc()], jnp.full(5, 0.3), label)["auroc"] == 0.5
    # pairs: 0.9 beats both negatives, one 0.5 ties one negative and beats the other, 0.1 ties that one.
    value = metrics.evaluate([metrics.auroc()], jnp.array([0.9, 0.5, 0.5, 0.1, 0.1]), label)["auroc"]
    np.testing.assert_allclose(value, (2 + 1.5 + 0.5) / 6, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.1, 4.0), shift=st.floats(-9.0, 9.0))
def test_binned_auroc_stays_within_its_bound(seed: int, spread: float, shift: float):
    rng = np.random.default_rng(seed)
    label = (rng.random(64) < 0.3).astype(np.float32)
    label[:2] = 0, 1
    score = (1 / (1 + np.exp(-(shift + spread * (rng.normal(size=64) + label))))).astype(np.float32)
    weight = rng.random(64).astype(np.float32)
    binned, exact = metrics.auroc(bins=256), metrics.auroc()
    state = metrics.to_host(jitted(binned)(score, label, weight))
    positive, negative = state.positive / state.positive.sum(), state.negative / state.negative.sum()
    bound = (positive * negative).sum() / 2
    assert bound <= positive.max() / 2 + 1e-12
    error = abs(binned.compute(state) - exact.compute(metrics.to_host(jitted(exact)(score, label, weight))))
    assert error <= bound + 1e-6


def test_binned_auroc_states_sum_over_shards():
    metric = metrics.auroc(bins=256)
    parts = [metrics.to_host(jitted(metric)(*example("binary", seed))) for seed in range(8)]
    summed = jax.tree.map(lambda *x: np.sum(x, axis=0), *parts)
    assert metric.compute(summed) == metric.compute(functools.reduce(metric.merge, parts))
    # Probabilities 0 and 1 fall into the outer bins.
    edge = metric.statistic(jnp.array([0.0, 1.0, 0.5]), jnp.array([0.0, 1.0, jnp.nan]))
    assert metric.compute(edge) == 1.0 and edge.positive.shape == (256,)
    assert np.isnan(metric.compute(metric.statistic(jnp.array([0.2, jnp.nan]), jnp.array([0.0, 1.0]))))
    with pytest.raises(ValueError, match="at least 2 bins"):
        metrics.auroc(bins=1)


def test_calibration_error_by_hand():
    """Two bins, (0, 0.5] and (0.5, 1]: in the first 0.4 and 0.5, one right; in the second 0.9 and 0.6, both wrong.

    |1 - 0.9| + |0 - 1.5|, over 4 rows: (0.1 + 1.5) / 4 = 0.4.
    """
    probability = [[0.4, 0.3, 0.3], [0.5, 0.25, 0.25], [0.9, 0.1, 0.0], [0.2, 0.2, 0.6]]
    value = values_of([metrics.expected_calibration_error(2)], probability, [0.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(value, 0.4, rtol=1e-6)


def test_calibration_error_of_two_classes_is_that_of_two_columns(rng):
    label = rng.integers(0, 2, 200)
    p = rng.random(200).astype(np.float32)
    for bins in (1, 7, 15):
        metric = metrics.expected_calibration_error(bins)
        one = values_of([metric], p, label)
        np.testing.assert_allclose(one, values_of([metric], np.stack([1 - p, p], -1), label), rtol=1e-5)
        np.testing.assert_allclose(one, calibration_error(p, label, np.ones(200), bins), rtol=1e-5)
    with pytest.raises(ValueError, match="at least 1 bin, got 0"):
        metrics.expected_calibration_error(0)


def test_calibrated_predictions_have_a_small_error_and_overconfident_ones_a_known_one(rng):
    p = rng.random(20_000).astype(np.float32)
    label = (rng.random(20_000) < p).astype(np.float32)
    # 8 bins of 2,500 rows: the noise of a bin's accuracy is below 0.01.
    assert values_of([metrics.expected_calibration_error()], p, label)[0] < 0.015
    # Always certain, right half of the time.
    coin = rng.integers(0, 2, 20_000)
    certain = np.ones(20_000, np.float32)
    error = values_of([metrics.expected_calibration_error()], certain, coin)[0]
    np.testing.assert_allclose(error, 1 - coin.mean(), rtol=1e-5)


def values_of(metric_list, prediction, label):
    values = metrics.evaluate(metric_list, jnp.array(prediction), jnp.array(label))
    return [float(value) for value in values.values()]


def test_degenerate_cases():
    nan = float("nan")
    # AUROC of one class.
    assert np.isnan(values_of([metrics.auroc(), metrics.auroc(bins=8)], [0.1, 0.9], [1.0, 1.0])).all()
    assert np.isnan(values_of([metrics.auroc_ovr()], [[0.4, 0.6], [0.1, 0.9]], [1.0, 1.0])).all()
    # F1 without positives among labels and predictions.
    assert values_of([metrics.f1()], [0.1, 0.2], [0.0, 0.0]) == [0.0]
    # A constant target: 1 for what explains it, 0 for what does not.
    both = [metrics.explained_variance(), metrics.r2()]
    assert values_of(both, [3.3, 3.3, 3.3], [3.3, 3.3, 3.3]) == [1.0, 1.0]
    assert values_of(both, [3.4, 3.4, 3.4], [3.3, 3.3, 3.3]) == [1.0, 0.0]
    assert values_of(both, [1.0, 2.0, 3.0], [3.3, 3.3, 3.3]) == [0.0, 0.0]
    assert np.isnan(values_of(both, [1.0, nan, 3.0], [3.3, 3.3, 3.3])).all()
    # One row.
    assert np.isnan(values_of([metrics.r2()], [1.0, 5.0], [2.0, nan])).all()
    # No labelled row.
    every = [case.metric for case in CASES.values() if case.kind == "binary"]
    assert np.isnan(values_of(every, [0.5, 0.5], [nan, nan])).all()


def test_confident_mistakes_stay_finite():
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(values_of([metrics.log_loss()], [0.0, 1.0], [1.0, 0.0]), -np.log(eps), rtol=1e-6)
    assert np.isfinite(values_of([metrics.poisson_deviance()], [0.0, 2.0], [3.0, 0.0])).all()


def test_poisson_deviance_does_not_cancel():
    count, rate = np.float32([1e4, 1e6, 5.0, 0.0]), np.float32([1e4 + 20, 1e6 - 500, 0.01, 7.0])
    for y, p in zip(count, rate, strict=True):
        reference = sk.mean_poisson_deviance([float(y)], [float(p)])
        np.testing.assert_allclose(values_of([metrics.poisson_deviance()], [p], [y]), reference, rtol=1e-3)


def test_directions_names_and_identity():
    better = {case.metric.name for case in CASES.values() if case.metric.higher_is_better}
    assert better == {"accuracy", "f1", "auroc", "auroc_ovr", "explained_variance", "r2"}
    # A Task compares by its fields: the same metric must be the same object.
    assert metrics.auroc() is metrics.auroc() and metrics.auroc() != metrics.auroc(bins=8)


def test_a_metric_of_your_own():
    within = metrics.weighted_mean("within_2", lambda p, y: jnp.abs(p - y) <= 2, higher_is_better=True)
    assert values_of([within], [1.0, 9.0, 0.0], [2.0, 5.0, np.nan]) == [0.5]


@pytest.mark.parametrize(
    ("metric", "shape", "message"),
    [
        (metrics.auroc(), (5, 3), r"'auroc' takes predictions of shape \[B\].*got predictions of shape \(5, 3\)"),
        (metrics.auroc_ovr(), (5,), r"'auroc_ovr' takes predictions of shape \[B, C\].*got.*\(5,\)"),
        (metrics.accuracy(), (4,), r"'accuracy' takes predictions of shape \[B\] or \[B, C\].*got.*\(4,\)"),
        (metrics.r2(), (5, 1), r"'r2'.*got predictions of shape \(5, 1\) and labels of shape \(5,\)"),
    ],
)
def test_shapes_that_do_not_fit(metric: metrics.Metric, shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        metric.statistic(jnp.zeros(shape), jnp.zeros(5))
