"""Detection: targets invert to boxes, the focal loss as in a loop, average precision as in a naive evaluator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax import detection, metrics
from mtjax.dense_losses import batch_mean

STRIDE, GRID, C, M = 4, (8, 8), 3, 5


TARGETS = jax.jit(functools.partial(detection.targets, grid=GRID, stride=STRIDE, num_classes=C))


def iou(a, b):
    inside = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
    return inside / union if union > 0 else 0.0


def scene(seed, images=3, objects=M):
    """Boxes of which some are padding."""
    rng = np.random.default_rng(seed)
    corner, size = rng.uniform(0, 20, (images, objects, 2)), rng.uniform(3, 12, (images, objects, 2))
    classes = rng.integers(-1, C, (images, objects)).astype(np.int32)
    boxes = np.concatenate([corner, corner + size], -1).astype(np.float32)
    return {"boxes": np.where(classes[..., None] >= 0, boxes, -1), "classes": classes}


def apart():
    """Two images with objects that share no cell: one image with two, one with none."""
    boxes = np.full((2, M, 4), -1, np.float32)
    classes = np.full((2, M), -1, np.int32)
    boxes[0, :2] = [[2, 3, 11, 9], [14, 10, 30, 29]]
    classes[0, :2] = [0, 2]
    return {"boxes": boxes, "classes": classes}


def perfect_output(label):
    """The output whose loss is nearly 0."""
    goal = jax.tree.map(np.asarray, TARGETS(label))
    # Logits may be anything between the peaks; far below zero is what the loss asks for where nothing is.
    heat = np.where(goal.heatmap == 1, 12.0, -12.0)
    box = np.zeros((len(heat), GRID[0] * GRID[1], 4), np.float32)
    for image, objects in enumerate(goal.present):
        for m in np.flatnonzero(objects):
            box[image, goal.cell[image, m]] = [*goal.size[image, m], *goal.offset[image, m]]
    return jnp.asarray(np.concatenate([heat, box.reshape(*heat.shape[:3], 4)], -1), jnp.float32)


def test_targets_decode_to_the_boxes():
    label = apart()
    output = perfect_output(label)
    found = jax.jit(functools.partial(detection.decode, stride=STRIDE, max_detections=4))(output)
    assert np.asarray(found["scores"] > 0.5).sum(1).tolist() == [2, 0]
    for box, kind in zip(found["boxes"][0, :2], found["classes"][0, :2].tolist(), strict=True):
        expected = label["boxes"][0][label["classes"][0] == kind][0]
        np.testing.assert_allclose(box, expected, atol=1e-4)
    loss = detection.centre_loss(C, stride=STRIDE)
    value, gradient = jax.jit(jax.value_and_grad(lambda z: batch_mean(loss(z, label))))(output)
    assert float(value) < 1e-3 and np.isfinite(gradient).all()


def test_a_box_within_the_radius_overlaps_enough():
    rng = np.random.default_rng(0)
    sides = rng.uniform(1, 60, (200, 2)).astype(np.float32)
    for (h, w), r in zip(sides, np.asarray(detection.gaussian_radius(*jnp.asarray(sides.T))), strict=True):
        box = (0, 0, h, w)
        moved = [(r, r, h + r, w + r), (r, r, h - r, w - r), (-r, -r, h + r, w + r)]
        overlaps = [iou(box, other) for other in moved]
        assert min(overlaps) == pytest.approx(0.7, abs=1e-3)


def naive_heatmap(boxes, classes, grid):
    """Object by object, cell by cell: a Gaussian in a window of the radius, the largest where several meet."""
    heatmap = np.zeros((*grid, C))
    for box, kind in zip(boxes, classes, strict=True):
        if kind < 0:
            continue
        radius = int(detection.gaussian_radius(*jnp.asarray(box[2:] - box[:2])))
        cy, cx = np.floor((box[:2] + box[2:]) / 2).astype(int)
        for y in range(max(0, cy - radius), min(grid[0], cy + radius + 1)):
            for x in range(max(0, cx - radius), min(grid[1], cx + radius + 1)):
                value = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * ((2 * radius + 1) / 6) ** 2))
                heatmap[y, x, kind] = max(heatmap[y, x, kind], value)
    return heatmap


def test_loss_as_in_a_loop_and_blind_to_images_without_labels():
    grid, label = (30, 34), scene(1)  # a cell per pixel
    label["boxes"] = np.where(label["classes"][..., None] >= 0, label["boxes"] + np.float32([-8, -8, 8, 8]), -1)
    label["boxes"] = np.clip(label["boxes"], -1, 30)
    label["classes"][2] = -2  # not labelled at all
    rng = np.random.default_rng(0)
    output = rng.normal(size=(3, *grid, C + 4)).astype(np.float32)
    total, count = 0.0, 0
    for image in range(2):
        heatmap = naive_heatmap(label["boxes"][image], label["classes"][image], grid)
        assert ((heatmap > 0.01) & (heatmap < 1)).sum() > 10
        for index in np.ndindex(*grid, C):
            p = 1 / (1 + np.exp(-float(output[(image, *index)])))
            y = heatmap[index]
            total -= (1 - p) ** 2 * np.log(p) if y == 1 else (1 - y) ** 4 * p**2 * np.log(1 - p)
        for box, kind in zip(label["boxes"][image], label["classes"][image], strict=True):
            if kind < 0:
                continue
            centre = (box[:2] + box[2:]) / 2
            cell = np.floor(centre).astype(int)
            z = output[image, cell[0], cell[1], C:]
            total += 0.1 * np.abs(z[:2] - (box[2:] - box[:2])).sum() + np.abs(z[2:] - (centre - cell)).sum()
            count += 1
    loss = detection.centre_loss(C, stride=1)
    run = jax.jit(jax.value_and_grad(lambda z: batch_mean(loss(z, label))))
    value, gradient = run(output)
    assert float(value) == pytest.approx(total / count, rel=1e-5)
    output[2] = np.nan
    again, gradient_again = run(output)
    assert float(again) == pytest.approx(float(value), rel=1e-6) and (np.asarray(gradient_again[2]) == 0).all()
    np.testing.assert_allclose(gradient_again, gradient, rtol=1e-5, atol=1e-8)


def naive_ap(predictions, label, overlap, points):
    """One threshold: match image by image in the order of scores, then the best precision at each recall."""
    values = []
    for c in range(C):
        rows, objects = [], 0
        for boxes, scores, kinds, true_boxes, true_kinds in zip(
            *(predictions[k] for k in ("boxes", "scores", "classes")), label["boxes"], label["classes"], strict=True
        ):
            truth = [box for box, kind in zip(true_boxes, true_kinds, strict=True) if kind == c]
            objects += len(truth)
            mine = sorted((-s, i) for i, (s, kind) in enumerate(zip(scores, kinds, strict=True)) if kind == c)
            for negative, i in mine:
                overlaps = [iou(boxes[i], box) for box in truth]
                best = int(np.argmax(overlaps)) if overlaps else -1
                hit = best >= 0 and overlaps[best] >= overlap
                if hit:
                    truth.pop(best)
                rows.append((negative, hit))
        if not objects:
            continue
        rows.sort(key=lambda row: row[0])
        true = np.cumsum([hit for _, hit in rows]) if rows else np.zeros(0)
        recall, precision = true / objects, true / np.arange(1, len(rows) + 1)
        levels = np.linspace(0, 1, points)
        values.append(
            np.mean(
                [
                    max([p for p, r in zip(precision, recall, strict=True) if r >= level - 1e-9], default=0)
                    for level in levels
                ]
            )
        )
    return np.mean(values) if values else np.nan


def guesses(label, seed, most=8):
    """Jittered objects, wrong classes and boxes at random; scores all differ."""
    rng = np.random.default_rng(seed)
    images = len(label["classes"])
    boxes = np.concatenate(
        [label["boxes"] + rng.normal(0, 1, label["boxes"].shape), scene(seed + 1, images, 3)["boxes"]], 1
    )
    classes = np.concatenate([label["classes"], rng.integers(0, C, (images, 3))], 1)
    classes[:, 0] = rng.integers(0, C, images)
    scores = rng.permutation(images * most).reshape(images, most) / (images * most)
    return {"boxes": boxes.astype(np.float32), "scores": scores.astype(np.float32), "classes": classes.astype(np.int32)}


@functools.cache
def ap_statistic(overlaps):
    metric = detection.average_precision(C, overlaps=overlaps)
    return metric, jax.jit(metric.statistic)


@pytest.mark.parametrize("points", [101, 11])
@settings(max_examples=6)
@given(st.integers(0, 200))
def test_average_precision_as_in_a_naive_evaluator(points, seed):
    label = scene(seed)
    prediction = guesses(label, seed)
    metric = detection.average_precision(C, points=points)
    state = metrics.to_host(ap_statistic(detection.COCO)[1](prediction, label))
    expected = np.mean([naive_ap(prediction, label, overlap, points) for overlap in detection.COCO])
    assert float(metric.compute(state)) == pytest.approx(expected, abs=1e-6)


def test_average_precision_streams_and_takes_lanes():
    label, metric = scene(3, images=4), ap_statistic((0.5,))[0]
    predictions = [guesses(label, seed) for seed in (3, 4)]
    lanes = jax.tree.map(lambda *leaves: np.stack(leaves), *predictions)
    run = jax.jit(jax.vmap(metric.statistic, in_axes=(0, None, None)))
    weight = np.ones(2, np.float32)

    def rows(tree, start, axis):
        return jax.tree.map(lambda leaf: leaf[:, start : start + 2] if axis else leaf[start : start + 2], tree)

    parts = [metrics.to_host(run(rows(lanes, s, 1), rows(label, s, 0), weight)) for s in (2, 0)]
    expected = [naive_ap(prediction, label, 0.5, 101) for prediction in predictions]
    np.testing.assert_allclose(metric.compute(metric.merge(*parts)), expected, atol=1e-6)
    assert metric.name == "ap50"
    # An image of weight 0, or one without labels, does not count.
    half = metrics.to_host(run(rows(lanes, 0, 1), rows(label, 0, 0), np.array([1.0, 0], np.float32)))
    first = [naive_ap(*(jax.tree.map(lambda leaf: leaf[:1], x) for x in (p, label)), 0.5, 101) for p in predictions]
    np.testing.assert_allclose(metric.compute(half), first, atol=1e-6)
    assert np.isnan(metric.compute(run(rows(lanes, 0, 1), rows(label, 0, 0), 0 * weight))).all()


def test_each_object_is_found_once():
    label = {"boxes": np.array([[[0, 0, 8, 8]]], np.float32), "classes": np.array([[1]])}
    twice = {
        "boxes": np.array([[[0, 0, 8, 8], [0, 0, 8, 8]]], np.float32),
        "scores": np.array([[0.3, 0.9]], np.float32),
        "classes": np.array([[1, 1]]),
    }
    state = ap_statistic(detection.COCO)[1](twice, label)
    assert state.hit[:, 1].tolist() == [1] * 10 and state.hit[:, 0].tolist() == [0] * 10
    assert float(detection.average_precision(C).compute(state)) == 1.0  # the second comes after full recall


def test_a_nan_reaches_the_metric():
    label, output = apart(), np.array(perfect_output(apart()))
    run = jax.jit(lambda z, w: metric.statistic(detection.decode(z, stride=STRIDE, max_detections=4), label, w))
    metric = detection.average_precision(C, overlaps=(0.5,))
    assert float(metric.compute(run(output, np.ones(2, np.float32)))) == 1.0
    output[1, 0, 0, 0] = np.nan
    assert np.isnan(metric.compute(run(output, np.ones(2, np.float32))))
    assert float(metric.compute(run(output, np.array([1, 0], np.float32)))) == 1.0
