"""No-learning baselines against scikit-learn and hand-made cases, and the metrics of the library against these."""

import numpy as np
import pytest
from sklearn import metrics

from mtjax import dense_metrics
from mtjax.data import rooms
from mtjax.data.rooms.baselines import angular_error, f_score, mean_iou


def test_scores_are_scikit_learns(rng):
    label, guess = rng.integers(0, 4, (2, 3, 5, 5))
    assert mean_iou(guess, label) == pytest.approx(metrics.jaccard_score(label.ravel(), guess.ravel(), average="macro"))
    holes = np.where(rng.random(label.shape) < 0.2, 255, label)
    kept = holes != 255
    expected = metrics.jaccard_score(label[kept], guess[kept], average="macro")
    assert mean_iou(guess, holes) == pytest.approx(expected)
    mask, found = label > 1, guess > 1
    assert f_score(found, mask.astype(np.uint8)) == pytest.approx(metrics.f1_score(mask.ravel(), found.ravel()))
    ignored = np.where(kept, mask, 255).astype(np.uint8)
    assert f_score(found, ignored) == pytest.approx(metrics.f1_score(mask[kept], found[kept]))


def test_the_librarys_streaming_metrics_agree(rng):
    label = rng.integers(0, 4, (3, 5, 5)).astype(np.uint8)
    guess = rng.integers(0, 4, (3, 5, 5))
    metric = dense_metrics.mean_iou(4)
    assert float(metric.compute(metric.statistic(guess, label))) == pytest.approx(mean_iou(guess, label), rel=1e-5)
    normals = rng.normal(size=(2, 3, 5, 5, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    metric = dense_metrics.mean_angle()
    value = float(metric.compute(metric.statistic(normals[0], normals[1])))
    assert value == pytest.approx(angular_error(normals[0], normals[1]), rel=1e-4)


def test_each_kind_by_hand():
    # Two images of two pixels: class 0 is the most frequent, and the most frequent on the left; class 1 on the right.
    train = {
        "segmentation": np.array([[[0, 1]], [[0, 1]], [[0, 0]], [[0, 255]]], np.uint8),
        "depth": np.array([[[1, 3]], [[3, np.nan]]], np.float16),
        "normals": np.array([[[[0, 0, -1], [1, 0, 0]]]] * 2, np.float16),
        "edge": np.array([[[1, 0]], [[1, 0]]], np.uint8),
        "classification": np.array([2, 2, 1], np.int32),
        "contour": np.zeros((2, 1, 2)),  # not a task
    }
    test = {
        "segmentation": np.array([[[0, 1]]], np.uint8),
        "depth": np.array([[[np.nan, 5]]], np.float16),
        "normals": np.array([[[[0, 0, -1], [0, 1, 0]]]], np.float16),
        "edge": np.array([[[1, 1]]], np.uint8),
        "classification": np.array([2, 0], np.int32),
        "contour": np.zeros((1, 1, 2)),
    }
    found = rooms.baselines({"labels": train}, {"labels": test})
    assert found["segmentation"] == {"metric": "mIoU", "constant": 0.25, "per_pixel": 1.0}
    # The mean is 7 / 3; the right pixel's mean is 3.
    assert found["depth"]["constant"] == pytest.approx(5 - 7 / 3) and found["depth"]["per_pixel"] == pytest.approx(2.0)
    # The mean direction is (1, 0, -1): 45 degrees from the one, 90 from the other.
    assert found["normals"]["constant"] == pytest.approx((45 + 90) / 2)
    assert found["normals"]["per_pixel"] == pytest.approx(90 / 2)
    assert found["edge"] == {"metric": "F", "constant": 1.0, "per_pixel": pytest.approx(2 / 3)}
    assert found["classification"] == {"metric": "accuracy", "constant": 0.5}
    assert "contour" not in found


def test_the_edge_threshold_is_chosen_on_the_training_split():
    train = np.zeros((4, 1, 4), np.uint8)
    train[:, 0, 0], train[:3, 0, 1], train[:1, 0, 2] = 1, 1, 1  # priors 1, .75, .25, 0
    # F of marking 1, 2, 3, all: 8 / 12, 14 / 16, 16 / 20, 16 / 24: two pixels are marked.
    test = np.array([[[0, 0, 1, 1]]], np.uint8)
    assert rooms.baselines({"edge": train}, {"edge": test})["edge"]["per_pixel"] == 0.0
    assert rooms.baselines({"edge": train}, {"edge": train})["edge"]["per_pixel"] == pytest.approx(14 / 16)
