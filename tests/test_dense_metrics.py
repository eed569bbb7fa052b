"""Dense metrics: equal to scikit-learn or a loop on all labelled pixels, for any partition of the images, any lane."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mtjax import dense_metrics as dm
from mtjax import metrics

B, S, C = 6, 5, 4


def classes(prediction, label):
    """Labelled pixels only."""
    return prediction[label != 255], label[label != 255]


def sk_mean_iou(p, y):
    p, y = classes(p, y)
    return sk.jaccard_score(y, p, labels=np.union1d(p, y), average="macro") if y.size else np.nan


def sk_accuracy(p, y):
    p, y = classes(p, y)
    return sk.accuracy_score(y, p) if y.size else np.nan


def degrees(p, g):
    p, g = p.astype(np.float64), g.astype(np.float64)
    known = ~np.isnan(g).any(-1)
    cosine = (p * g).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(g, axis=-1)
    return np.degrees(np.arccos(np.clip(cosine[known], -1, 1)))


def on_depth(score):
    return lambda p, y: score(p[~np.isnan(y)].astype(float), y[~np.isnan(y)].astype(float))


CASES = {
    "mean_iou": (dm.mean_iou(C), "classes", sk_mean_iou),
    "pixel_accuracy": (dm.pixel_accuracy(), "classes", sk_accuracy),
    "rmse": (dm.depth_rmse(), "depth", on_depth(lambda p, y: np.sqrt(((p - y) ** 2).mean()))),
    "absolute_relative": (dm.absolute_relative(), "depth", on_depth(lambda p, y: (np.abs(p - y) / y).mean())),
    "within_1.25": (
        dm.within_factor(1.25),
        "depth",
        on_depth(lambda p, y: ((p > 0) & (np.maximum(p / y, y / p) < 1.25)).mean()),
    ),
    "mean_angle": (dm.mean_angle(), "normals", lambda p, y: degrees(p, y).mean()),
    "within_30": (dm.within_angle(30.0), "normals", lambda p, y: (degrees(p, y) < 30).mean()),
}


def example(kind, seed=0):
    """Predictions and labels of B images; a third of the pixels has no label."""
    rng = np.random.default_rng(seed)
    known = rng.random((B, S, S)) < 0.7
    if kind == "classes":
        label = np.where(known, rng.integers(0, C - 1, known.shape), 255).astype(np.uint8)  # class C - 1 is not there
        return np.where(rng.random(known.shape) < 0.5, label, rng.integers(0, C - 1, known.shape)) % C, label
    if kind == "depth":
        label = rng.uniform(0.5, 3, known.shape)
        prediction = label * rng.uniform(0.6, 1.5, known.shape) * np.sign(rng.random(known.shape) - 0.1)
        return prediction.astype(np.float32), np.where(known, label, np.nan).astype(np.float16)
    label = rng.normal(size=(B, S, S, 3))
    label /= np.linalg.norm(label, axis=-1, keepdims=True)
    prediction = label + rng.normal(size=label.shape) * rng.uniform(0, 1, (B, S, S, 1))
    prediction /= np.linalg.norm(prediction, axis=-1, keepdims=True)
    return prediction.astype(np.float32), np.where(known[..., None], label, np.nan).astype(np.float16)


@functools.cache
def statistic(name):
    """Images one at a time: any partition is then a matter of merging, and there is one program."""
    return jax.jit(jax.vmap(lambda p, y, w: CASES[name][0].statistic(p[None], y[None], w[None])))


def merged(metric, states, rows):
    """One state out of those of single images."""
    parts = [jax.tree.map(lambda leaf: leaf[row], states) for row in rows]  # noqa: B023
    return functools.reduce(metric.merge, parts)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8)
@given(st.data())
def test_equal_to_the_reference_on_any_images_in_any_order(name, data):
    metric, kind, reference = CASES[name]
    prediction, label = example(kind, data.draw(st.integers(0, 3)))
    weight = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=B, max_size=B)), np.float32)
    order = data.draw(st.permutations(range(B)))
    states = metrics.to_host(statistic(name)(prediction, label, weight))
    value = metric.compute(merged(metric, states, order))
    if not weight.any():
        assert np.isnan(value)
        return
    expected = reference(prediction[weight > 0], label[weight > 0])
    assert float(value) == pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_batches_lanes_and_nan(name):
    metric, kind, reference = CASES[name]
    prediction, label = example(kind)
    unlabelled = np.isnan(label).any(-1) if kind == "normals" else np.isnan(label) if kind == "depth" else label == 255
    wrong = -1 if kind == "classes" else np.nan  # `DenseTask.predict` turns a NaN into class -1
    spoiled = np.where(unlabelled[..., None] if kind == "normals" else unlabelled, wrong, prediction)
    broken = np.where(~unlabelled[..., None] if kind == "normals" else ~unlabelled, wrong, prediction)
    lanes = np.stack([prediction, spoiled, broken]).astype(prediction.dtype)
    run = jax.jit(jax.vmap(metric.statistic, in_axes=(0, None)))
    values = metric.compute(run(lanes, label))
    np.testing.assert_allclose(values[:2], reference(prediction, label), rtol=2e-5)
    assert np.isnan(values[2])


def test_angles_keep_their_digits():
    # A rotation by a known angle about z; acos of a float32 cosine knows nothing below 0.02 degrees.
    expected = np.array([0.0, 1e-4, 1e-2, 30.0, 179.99, 180.0])
    turned = np.stack([np.cos(np.radians(expected)), np.sin(np.radians(expected)), 0 * expected], -1)
    fixed = np.broadcast_to([1.0, 0, 0], turned.shape)
    found = dm.angle(jnp.asarray(3 * turned, jnp.float32), jnp.asarray(fixed, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert float(dm.angle(jnp.zeros(3), jnp.array([0.0, 1, 0]))) == pytest.approx(90)


def test_median_angle_is_within_a_bin():
    prediction, label = example("normals")
    metric = dm.median_angle()
    state = metrics.to_host(jax.jit(metric.statistic)(prediction, label))
    assert abs(metric.compute(state) - np.median(degrees(prediction, label))) < 1.0  # few pixels: between neighbours
    assert state.sum() == (~np.isnan(label).any(-1)).sum()
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 90, 20000)
    counts = np.histogram(angles, 1800, (0, 180))[0]
    assert metric.compute(counts.astype(float)) == pytest.approx(np.median(angles), abs=0.01)
    assert np.isnan(metric.compute(0.0 * counts))


def test_labelled_leaves_out_images_without_a_class():
    probability = jnp.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    metric = dm.labelled(metrics.accuracy())
    assert float(metric.compute(metric.statistic(probability, jnp.array([0, -1, 1])))) == 0.5
    assert metric is dm.labelled(metrics.accuracy()) and hash(metric) == hash(dm.labelled(metrics.accuracy()))
