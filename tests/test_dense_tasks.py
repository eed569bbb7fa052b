"""Dense tasks: what trainer and reports read of a task, predictions, mirrored labels, labels that do not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import dense_tasks as dt
from mtjax import metrics
from mtjax.delta import delta_m
from mtjax.tasks import head_sizes
from mtjax.train.evaluate import main_scores

ALL = (
    dt.segmentation(num_classes=5),
    dt.parts(),
    dt.depth(),
    dt.disparity(),
    dt.normals(),
    dt.edge(),
    dt.saliency(),
    dt.detection(num_classes=3),
    dt.classification(num_classes=4),
)


def test_published_weights_and_channels():
    expected = {
        "segmentation": (5, 1, "mean_iou"),
        "parts": (7, 2, "mean_iou"),
        "depth": (1, 1, "rmse"),
        "disparity": (1, 1, "rmse"),
        "normals": (3, 10, "mean_angle"),
        "edge": (1, 50, "odsf"),
        "saliency": (1, 5, "max_f"),
        "detection": (7, 1, "ap"),
        "classification": (4, 1, "accuracy"),
    }
    assert {task.name: (task.channels, task.weight, task.main_metric.name) for task in ALL} == expected
    assert head_sizes(ALL) == {name: channels for name, (channels, _, _) in expected.items()}
    assert dt.edge().option("positive_weight") == 0.95


def test_tasks_are_values():
    # Equal and hashable, so that they can be static arguments; what a run stores is JSON.
    again = (dt.segmentation(num_classes=5), dt.normals(loss="l1"), dt.edge(), dt.detection(num_classes=3))
    assert set(again) <= set(ALL)
    assert dt.normals(loss="cosine") not in ALL and dt.edge(max_distance=0.0075) not in ALL
    for task in ALL:
        stored = json.loads(json.dumps(task.to_json()))
        assert stored["name"] == task.name and stored["metrics"][0] == task.main_metric.name


def test_directions_reach_selection_and_delta():
    results = {task.name: {metric.name: np.array([2.0]) for metric in task.metrics} for task in ALL}
    better = {name: {metric: value + 1 for metric, value in values.items()} for name, values in results.items()}
    signs = np.array([-1.0 if task.name in ("depth", "disparity", "normals") else 1.0 for task in ALL])
    np.testing.assert_array_equal(main_scores(ALL, results)[0], 2 * signs)
    main = {task.name: {task.main_metric.name: better[task.name][task.main_metric.name]} for task in ALL}
    base = {task.name: {task.main_metric.name: results[task.name][task.main_metric.name]} for task in ALL}
    gain = delta_m(main, base, ALL)
    assert [round(mean) for mean, _ in gain.per_task.values()] == [round(50 * sign) for sign in signs]


@pytest.mark.parametrize("task", ALL[:7], ids=lambda task: task.name)
def test_perfect_outputs_score_perfectly(task):
    rng = np.random.default_rng(0)
    shape = (2, 8, 8)
    match task.kind:
        case "segmentation":
            label = rng.integers(0, task.channels, shape).astype(np.uint8)
            output = 9.0 * jax.nn.one_hot(label, task.channels)
        case "depth":
            label = rng.uniform(1, 4, shape).astype(np.float16)
            output = label[..., None].astype(np.float32)
        case "normals":
            label = rng.normal(size=(*shape, 3)).astype(np.float32)
            label /= np.linalg.norm(label, axis=-1, keepdims=True)
            output = 4 * label  # any length
        case _:
            label = (rng.random(shape) < 0.3).astype(np.uint8)
            output = 18.0 * label[..., None] - 9.0
    output = jnp.asarray(output)
    judge = jax.jit(lambda z, y: (metrics.evaluate(task.metrics, task.predict(z), y), task.loss(z, y)))
    values, loss = judge(output, label)
    best = {metric.name: 1.0 if metric.higher_is_better else 0.0 for metric in task.metrics}
    found = {name: float(value) for name, value in values.items()}
    assert found == pytest.approx(best, abs=0.06)  # the median angle is that of the middle of a bin of 0.1 degree
    assert float(loss) < float(judge(output[:, ::-1], label)[1])


def test_predictions_hide_no_nan():
    output = jnp.array([0.0, 1.0, jnp.nan, 2.0]).reshape(1, 1, 2, 2)
    assert ALL[0].predict(output).tolist() == [[[1, -1]]]
    assert np.isnan(dt.edge().predict(jnp.full((1, 1, 1, 1), jnp.nan))).all()


def test_mirrored_labels():
    label = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
    np.testing.assert_array_equal(dt.segmentation().mirror(label, 4), label[:, :, ::-1])
    # A wall to the left that faces right becomes one to the right that faces left.
    wall = np.full((1, 1, 4, 3), np.nan, np.float16)
    wall[0, 0, 0] = (1, 0.5, -0.25)
    mirrored = np.asarray(dt.normals().mirror(jnp.asarray(wall), 4))
    assert mirrored.dtype == np.float16 and mirrored[0, 0, 3].tolist() == [-1, 0.5, -0.25]
    assert np.isnan(mirrored[0, 0, :3]).all()
    boxes = {"boxes": jnp.array([[[1.0, 2.0, 3.0, 5.0]]]), "classes": jnp.array([[1]])}
    task = dt.detection(num_classes=3)
    once = task.mirror(boxes, 16)
    assert once["boxes"].tolist() == [[[1.0, 11.0, 3.0, 14.0]]] and once["classes"].tolist() == [[1]]
    assert task.mirror(once, 16)["boxes"].tolist() == boxes["boxes"].tolist()
    assert dt.classification().mirror(label, 4) is label


def test_labels_that_do_not_fit():
    image = (4, 4)
    for task, label, message in (
        (
            dt.segmentation(num_classes=5),
            np.full((2, 4, 4), 5, np.uint8),
            "has 5 classes, but its labels reach class 5",
        ),
        (dt.edge(), np.full((2, 4, 4), 2, np.uint8), "has 2 classes, but its labels reach class 2"),
        (dt.depth(), np.ones((2, 4, 4), np.uint8), "needs floating labels"),
        (dt.depth(), np.ones((2, 4, 8), np.float16), r"needs labels of shape \[2, 4, 4\], got \[2, 4, 8\]"),
        (dt.normals(), np.ones((2, 4, 4), np.float16), "needs labels of shape"),
        (dt.detection(num_classes=2), np.ones((2, 3, 4)), "needs the labels {'boxes', 'classes'}"),
        (dt.detection(num_classes=2), {"boxes": np.ones((1, 1, 4)), "classes": np.array([[2]])}, "reach class 2"),
        (dt.classification(num_classes=2), np.array([0, 2]), "reach class 2"),
    ):
        with pytest.raises(ValueError, match=message):
            task.check_labels(label, image)
    dt.segmentation(num_classes=5).check_labels(np.array([[[4, 255]]], np.uint8), (1, 2))
    dt.classification(num_classes=2).check_labels(np.array([-1, 1]))
    with pytest.raises(ValueError, match="loss must be 'l1' or 'cosine', got 'l2'"):
        dt.normals(loss="l2")
    with pytest.raises(ValueError, match="needs a weight >= 0, got -1"):
        dt.depth(weight=-1)
    with pytest.raises(ValueError, match="has kind 'flow'"):
        dt.DenseTask("flow", "flow", channels=2, per_image=ALL[0].per_image, metrics=ALL[0].metrics)
