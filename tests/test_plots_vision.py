"""Figures of vision: panels hold the pixels they should, scales are shared, nothing sticks out of the page."""

import math

import numpy as np
import pytest

from mtjax import dense_tasks
from mtjax import plots_vision as pv

SIZE = (6, 8)
TASKS = (dense_tasks.segmentation(num_classes=4), dense_tasks.depth(), dense_tasks.normals(), dense_tasks.edge())
NAMES = [task.name for task in TASKS]


def overflow(figure) -> float:
    """How far, in inches, anything sticks out of the page before `save` trims it."""
    figure.draw_without_rendering()
    box, page = figure.get_tightbbox(), figure.get_size_inches()
    return max(-box.x0, -box.y0, box.x1 - page[0], box.y1 - page[1])


def scenes(rng, n=2):
    images = rng.integers(0, 256, (n, *SIZE, 3)).astype(np.uint8)
    normals = rng.normal(size=(n, *SIZE, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    labels = {
        "segmentation": rng.integers(0, 3, (n, *SIZE)).astype(np.uint8),
        "depth": rng.uniform(1, 4, (n, *SIZE)).astype(np.float16),
        "normals": normals.astype(np.float16),
        "edge": rng.integers(0, 2, (n, *SIZE)).astype(np.uint8),
    }
    labels["segmentation"][:, 0, 0] = labels["edge"][:, 0, 0] = 255
    labels["depth"][:, 0, 0] = labels["normals"][:, 0, 0] = np.nan
    outputs = {task.name: rng.normal(size=(n, *SIZE, task.channels)).astype(np.float32) for task in TASKS}
    return images, labels, outputs


def test_prediction_grid_shows_truth_beside_predictions(rng):
    images, labels, outputs = scenes(rng)
    partial = {key: value for key, value in outputs.items() if key != "edge"}
    classes = {"segmentation": ["wall", "floor", "bed", "box"]}
    figure = pv.prediction_grid(images, labels, {"MoE": outputs, "dense": partial}, TASKS, classes=classes, title="t")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    expected = [entry for name in NAMES[:3] for entry in (f"{name}\ntruth", "MoE", "dense")]
    assert titles == ["image", *expected, "edge\ntruth", "MoE"]
    panels = [axes.images[0] for axes in figure.axes if axes.images and axes.get_subplotspec() is not None]
    columns = {}
    for image in panels:
        columns.setdefault(image.axes.get_subplotspec().colspan.start, []).append(np.asarray(image.get_array()))
    columns = [columns[key] for key in sorted(columns)]
    assert [len(column) for column in columns] == [2] * 12  # two images; the bar of depth has no image of its own
    np.testing.assert_array_equal(columns[0][1], images[1])
    # Segmentation: the colours of the classes, white without a label.
    colors = pv.class_colors(4)
    np.testing.assert_array_equal(columns[1][0][0, 0], [1, 1, 1])
    np.testing.assert_allclose(columns[1][0][1, 2], colors[labels["segmentation"][0, 1, 2]])
    np.testing.assert_allclose(columns[2][0], colors[outputs["segmentation"][0].argmax(-1)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == classes["segmentation"]
    # Depth: one scale, that of the truth.
    depth = [image for image in panels if image.axes.get_subplotspec().colspan.start in (6, 7, 8)]
    limits = (float(np.nanmin(labels["depth"])), float(np.nanmax(labels["depth"])))
    assert len(depth) == 6 and {image.get_clim() for image in depth} == {limits}
    assert np.ma.getmaskarray(depth[0].get_array())[0, 0]
    np.testing.assert_allclose(depth[2].get_array(), outputs["depth"][0, ..., 0], rtol=1e-6)
    assert [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()] == ["depth in m"]
    # Normals: RGB; the prediction is a unit vector.
    np.testing.assert_allclose(columns[7][1][2, 3], labels["normals"][1, 2, 3].astype(float) / 2 + 0.5, rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(2 * columns[8][1] - 1, axis=-1), 1.0, rtol=1e-4)
    # Edges: probabilities from 0 to 1, pixels without a label below the scale.
    np.testing.assert_allclose(columns[11][0], 1 / (1 + np.exp(-outputs["edge"][0, ..., 0])), rtol=1e-4)
    assert columns[10][0][0, 0] < 0 and columns[10][0].max() == 1
    assert overflow(figure) < 0.05


def test_prediction_grid_aligns_its_rows(rng):
    images, labels, outputs = scenes(rng)
    figure = pv.prediction_grid(images, labels, {"MoE": outputs}, TASKS[:2])
    figure.draw_without_rendering()
    tops = {round(axes.get_position().y1, 4) for axes in figure.axes if axes.get_title()}
    assert len(tops) == 1


def test_prediction_grid_draws_boxes(rng):
    task = dense_tasks.detection(num_classes=2, stride=2, max_detections=3)
    labels = {"detection": {"boxes": np.array([[[1, 2, 4, 7], [0, 0, 0, 0]]], float), "classes": np.array([[1, -1]])}}
    output = np.full((1, 3, 4, 6), -9.0, np.float32)
    output[0, 1, 2] = [5, -9, 2, 3, 0.5, 0.5]  # class 0, 2 x 3 cells of 2 pixels, in the middle of cell (1, 2)
    figure = pv.prediction_grid(scenes(rng)[0][:1], labels, {"MoE": {"detection": output}}, [task])
    truth, predicted = (axes.patches for axes in figure.axes if axes.patches)
    (box,), (found,) = truth, predicted
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (1.5, 0.5, 5.0, 3.0)
    np.testing.assert_allclose((found.get_x(), found.get_y()), (1.5, 0.5), atol=1e-5)
    np.testing.assert_allclose((found.get_width(), found.get_height()), (6.0, 4.0), atol=1e-5)
    np.testing.assert_allclose(found.get_edgecolor()[:3], pv.class_colors(2)[0])


def test_class_colors_are_fixed_and_differ():
    colors = pv.class_colors(60)
    np.testing.assert_array_equal(colors[:7], pv.class_colors(7))
    assert colors.shape == (60, 3) and colors.min() >= 0 and colors.max() <= 1
    distance = np.abs(colors[:, None] - colors[None]).max(-1) + np.eye(60)
    assert distance[:20, :20].min() > 0.08 and distance.min() > 0.01


def test_expert_use_heatmap_shows_shares_and_counts(rng):
    counts = {"block 1": rng.integers(1, 50, (4, 5)).astype(float), "block 3": np.eye(4, 6)}
    counts["block 3"][3] = 0  # a task without a token
    figure = pv.expert_use_heatmap(counts, NAMES, used=0.1, title="MI")
    first, second = figure.axes[:2]
    shares = counts["block 1"] / counts["block 1"].sum(1, keepdims=True)
    np.testing.assert_allclose(first.images[0].get_array(), shares)
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0.0, 1.0)
    assert [label.get_text() for label in first.get_yticklabels()] == NAMES
    assert [axes.get_title() for axes in (first, second)] == ["block 1", "block 3"]
    used = [text.get_text() for text in first.texts[-4:]]
    assert sorted(used) == sorted(str(n) for n in (shares >= 0.1).sum(1))
    assert len(first.lines) == (shares < 0.1).sum() and len(second.lines) == 4 * 6 - 3
    assert overflow(figure) < 0.05
    assert np.asarray(counts["block 1"]).max() > 1, "the caller's array stays as it was"


def test_pruning_curve_has_means_and_errors_over_seeds(rng):
    x, removed, y = np.array([50.0, 0.0, 75.0]), rng.uniform(0, 90, (4, 3)), rng.normal(size=(4, 3))
    figure = pv.pruning_curve({"MI": (removed, y), "balance": (x, y), "one seed": (x, y[0])}, ylabel="loss")
    (axes,) = figure.axes
    lines = [container.lines[0] for container in axes.containers]
    order = removed.mean(0).argsort()
    np.testing.assert_allclose(lines[0].get_xdata(), removed.mean(0)[order])
    np.testing.assert_allclose(lines[1].get_xdata(), [0, 50, 75])
    np.testing.assert_allclose(lines[1].get_ydata(), y.mean(0)[[1, 0, 2]])
    bars = axes.containers[1].lines[2][0].get_segments()
    half = y.std(0, ddof=1)[[1, 0, 2]] / 2  # sqrt(4) seeds
    np.testing.assert_allclose([(bar[1, 1] - bar[0, 1]) / 2 for bar in bars], half)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["MI", "balance", "one seed"]
    assert axes.get_ylabel() == "loss" and overflow(figure) < 0.05


def test_gate_figure_shows_spread_and_entropy(rng):
    gates = {"block 0": rng.dirichlet(np.ones(3), (4, 9)), "block 1": rng.dirichlet(np.ones(4), (4, 9))}
    figure = pv.gate_figure(gates, NAMES)
    above, below = figure.axes[:2], figure.axes[2:4]
    np.testing.assert_allclose(above[1].images[0].get_array(), gates["block 1"].mean(1))
    cell = gates["block 0"][0, :, 0]
    assert above[0].texts[0].get_text() == f"{100 * cell.mean():.0f}\n±{100 * cell.std():.0f}"
    assert [label.get_text() for label in above[0].get_xticklabels()] == ["0", "1", "2"]
    assert [label.get_text() for label in above[1].get_xticklabels()] == ["0", "1", "2", "M"]
    entropy = -(gates["block 1"] * np.log(gates["block 1"])).sum(-1)
    medians = [line.get_xdata()[0] for line in below[1].lines if line.get_color() == "#D55E00"]
    np.testing.assert_allclose(medians, np.median(entropy, 1))
    assert any(np.allclose(line.get_xdata(), math.log(4)) for line in below[1].lines)
    assert overflow(figure) < 0.05


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: pv.prediction_grid(np.zeros((0, 4, 4, 3)), {}, {}, TASKS), r"images \[n, H, W, 3\] and tasks"),
        (lambda: pv.prediction_grid(np.zeros((1, 4, 4, 3)), {}, {}, TASKS[:1]), "must hold the task 'segmentation'"),
        (
            lambda: pv.prediction_grid(np.zeros((1, 4, 4, 3)), {}, {}, [dense_tasks.classification()]),
            "'classification' is a classification",
        ),
        (
            lambda: pv.prediction_grid(np.zeros((2, 4, 4, 3)), {"depth": np.zeros((1, 4, 4))}, {}, TASKS[1:2]),
            "'truth' of task 'depth' must hold 2 images",
        ),
        (lambda: pv.expert_use_heatmap({}, NAMES), "at least one layer"),
        (lambda: pv.expert_use_heatmap({"b": np.ones((3, 2))}, NAMES), r"usage\['b'\] must be \[T, E\] for the 4"),
        (lambda: pv.pruning_curve({}), "at least one arm"),
        (lambda: pv.pruning_curve({"MI": ([0, 1], np.ones((2, 3)))}), r"points\['MI'\] must be x \[n\] or \[S, n\]"),
        (lambda: pv.gate_figure({}, NAMES), "at least one layer"),
        (lambda: pv.gate_figure({"b": np.ones((4, 3))}, NAMES), r"gates\['b'\] must be \[T, n, N\]"),
    ],
)
def test_errors_are_sentences(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
