"""Images as training data: losses and rows, stored types, augmentation, evaluation of lanes and single-task models."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax import dense_tasks as dt
from mtjax import metrics
from mtjax.train import TrainConfig, fit_problem
from mtjax.train.images import (
    Augment,
    fix_edge_threshold,
    image_loss,
    image_losses,
    image_problem,
    make_image_evaluate,
    normalise_image,
    predict_images,
)

S, N = 8, 12
TASKS = (
    dt.segmentation(num_classes=3),
    dt.depth(),
    dt.normals(),
    dt.edge(max_distance=0.1),
    dt.detection(num_classes=2),
)
PIXEL = tuple(dataclasses.replace(task, metrics=task.metrics[:1]) for task in TASKS[:2])


class Tiny(nn.Module):
    """A linear map of every pixel, one per task (of cells of 4 x 4 for detection); gives a number to regularise."""

    tasks: tuple = PIXEL
    auxiliary: bool = False

    @nn.compact
    def __call__(self, batch, *, task=None, train=False, with_aux=False):
        outputs = {}
        for spec in self.tasks:
            if task in (None, spec.name) or self.is_initializing():
                x = batch["image"]
                x = x[:, 2::4, 2::4] if spec.kind == "detection" else x
                outputs[spec.name] = nn.Dense(spec.channels, name=spec.name)(x)
        if self.auxiliary and train:
            outputs["depth/middle"] = 0.5 * outputs["depth"]
        outputs = {name: y for name, y in outputs.items() if task is None or name == task}
        return (outputs, {"layer": outputs["depth"].mean()}) if with_aux else outputs


@pytest.fixture(scope="module")
def split():
    """Bright pixels are of class 1 and near."""
    rng = np.random.default_rng(0)
    bright = np.kron(rng.integers(0, 2, (N, 2, 2)), np.ones((1, 4, 4), int))
    image = np.clip(60 + 120 * bright[..., None] + rng.integers(-20, 20, (N, S, S, 3)), 0, 255).astype(np.uint8)
    normals = np.stack([np.where(bright, 0.6, -0.6), 0 * bright, 0 * bright + 0.8], -1).astype(np.float16)
    depth = np.where(rng.random(bright.shape) < 0.1, np.nan, 3.0 - 2 * bright).astype(np.float16)
    boxes = np.tile(np.array([[[0, 0, 4, 3.0]]], np.float32), (N, 1, 1))
    labels = {
        "segmentation": np.where(rng.random(bright.shape) < 0.1, 255, bright).astype(np.uint8),
        "depth": depth,
        "normals": normals,
        "edge": (rng.random(bright.shape) < 0.2).astype(np.uint8),
        "detection": {"boxes": boxes, "classes": np.zeros((N, 1), np.int32)},
        "unused": np.zeros(N),
    }
    return {"image": image, "labels": labels, "instances": bright}


def rows_of(split, tasks, rows=slice(None)):
    columns = {"image": split["image"], "labels": {task.name: split["labels"][task.name] for task in tasks}}
    return jax.tree.map(lambda column: column[rows], columns)


def test_bytes_become_numbers_around_zero():
    image = normalise_image(np.array([0, 51, 255], np.uint8))
    np.testing.assert_allclose(image, [-1, -0.6, 1], atol=1e-6)
    np.testing.assert_array_equal(normalise_image(image), image)


def test_a_fit_learns_and_evaluates_every_lane(split):
    problem = image_problem(Tiny(), PIXEL, split, split, augment=Augment(), eval_batch_size=5)
    config = TrainConfig(batch_size=6, max_epochs=80, evals_per_epoch=0.05, weight_decay=0.0)
    fitted = fit_problem(problem, config=config, seeds=(0, 1), learning_rates=3e-2, progress=False)
    first, last = (np.array(fitted.history[i]["losses"]) for i in (0, -1))
    assert (last.mean(0) < 0.8 * first.mean(0)).all()
    results = fitted.evaluate(split)
    assert (results["segmentation"]["mean_iou"] > 0.9).all() and (results["depth"]["rmse"] < 0.5).all()
    # The same from the predictions of a lane on all rows at once.
    params = jax.tree.map(lambda leaf: leaf[1], fitted.best_params)
    predicted = predict_images(Tiny(), params, PIXEL, {"image": split["image"]}, batch_size=7)
    assert predicted["segmentation"].dtype == np.int32 and predicted["depth"].shape == (N, S, S)
    judge = jax.jit(
        lambda p, y: {task.name: metrics.evaluate(task.metrics, p[task.name], y[task.name]) for task in PIXEL}
    )
    again = judge(predicted, rows_of(split, PIXEL)["labels"])
    for name, values in again.items():
        assert {m: float(v) for m, v in values.items()} == pytest.approx(
            {m: v[1] for m, v in results[name].items()}, rel=1e-4
        )


def test_losses_are_weighted_rows_of_the_jacobian(split):
    tasks = (TASKS[4], TASKS[1])  # not in the order of their names
    problem = image_problem(Tiny(tasks), tasks, split, split)
    params = jax.jit(problem.init_params)(jax.random.key(0))
    rows = rows_of(split, tasks, slice(6))
    rows["labels"]["depth"] = np.full_like(rows["labels"]["depth"], np.nan)

    def run(params, rows, rng):
        outputs = Tiny(tasks).apply({"params": params}, {"image": normalise_image(rows["image"])})
        expected = [task.weight * task.loss(outputs[task.name], rows["labels"][task.name]) for task in tasks]
        return *mtjax.value_and_jacobian(problem.loss_fn)(params, rows, rng), jnp.stack(expected)

    values, jacobian, expected = jax.jit(run)(params, rows, jax.random.key(1))
    assert problem.loss_names == ("detection", "depth")
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert values[1] == 0  # no label of depth in this batch
    for name, tree in jacobian.items():
        for leaf in jax.tree.leaves(tree):
            moved = [bool((row != 0).any()) for row in leaf]
            assert all(not m for m, task in zip(moved, tasks, strict=True) if task.name != name or name == "depth")


def test_auxiliary_predictions_add_to_their_task(split):
    rows, order = rows_of(split, PIXEL), []

    def run(rows):
        batch = {"image": normalise_image(rows["image"])}
        outputs, variables = Tiny().init_with_output(jax.random.key(0), batch)
        depth, label = outputs["depth"], rows["labels"]["depth"]
        losses = image_loss(Tiny(auxiliary=True), PIXEL)(variables["params"], rows, jax.random.key(0))
        order.extend(losses)
        return losses, PIXEL[1].loss(depth, label) + PIXEL[1].loss(depth / 2, label)

    found, expected = jax.jit(run)(rows)
    assert order == ["segmentation", "depth"]
    assert float(found["depth"]) == pytest.approx(float(expected), rel=1e-5)


def test_regularizers_add_to_tasks_or_make_rows(split):
    def regularizer(aux, tasks):
        return {tasks[0].name: 2.0 + 0 * aux["layer"], "modularity": aux["layer"]}

    problem = image_problem(Tiny(), PIXEL, split, split, regularizer=regularizer)
    assert problem.losses == ("segmentation", "depth", "modularity")
    plain = image_problem(Tiny(), PIXEL, split, split)
    assert plain.losses is None

    def run(rows, key):
        params = problem.init_params(key)
        return problem.loss_fn(params, rows, key), plain.loss_fn(params, rows, key)

    with_it, without = jax.jit(run)(rows_of(split, PIXEL), jax.random.key(0))
    assert set(with_it) - set(without) == {"modularity"}
    assert float(with_it["segmentation"]) == pytest.approx(float(without["segmentation"]) + 2, rel=1e-6)
    assert float(with_it["depth"]) == pytest.approx(float(without["depth"]), rel=1e-6)
    only_tasks = image_problem(Tiny(), PIXEL, split, split, regularizer=lambda aux, tasks: {"depth": aux["layer"]})
    assert only_tasks.losses is None


def test_flips_take_the_labels_along(split):
    batch = rows_of(split, TASKS)
    batch["image"] = normalise_image(batch["image"])
    plain = jax.jit(lambda key: Augment(1.0, 0, 0, 0)(key, batch, TASKS))(jax.random.key(0))
    np.testing.assert_allclose(plain["image"], batch["image"][:, :, ::-1], atol=1e-6)
    for task in TASKS:
        expected = task.mirror(jax.tree.map(jnp.asarray, batch["labels"][task.name]), S)
        assert jax.tree.all(
            jax.tree.map(
                lambda a, b: np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), plain["labels"][task.name], expected
            )
        )
    assert plain["labels"]["normals"][0, 0, 0, 0] == -batch["labels"]["normals"][0, 0, -1, 0]
    assert plain["labels"]["detection"]["boxes"][0, 0].tolist() == [0, 5, 4, 8]
    # Half of the images on average, image and label together; colours change within their bounds.
    some = jax.jit(lambda key: Augment(0.5, 0.2, 0.2, 0.2)(key, batch, TASKS[2:4]))(jax.random.key(3))
    flipped = np.array(
        [
            np.array_equal(a, b[:, ::-1])
            for a, b in zip(some["labels"]["normals"][..., 2:], batch["labels"]["normals"][..., 2:], strict=True)
        ]
    )
    edges = np.array(
        [np.array_equal(a, b[:, ::-1]) for a, b in zip(some["labels"]["edge"], batch["labels"]["edge"], strict=True)]
    )
    kept = np.array(
        [np.array_equal(a, b) for a, b in zip(some["labels"]["edge"], batch["labels"]["edge"], strict=True)]
    )
    assert flipped.all() and (edges != kept).all() and 0 < edges.sum() < N
    for i in range(N):
        original = np.asarray(batch["image"][i, :, ::-1] if edges[i] else batch["image"][i]).ravel()
        changed = np.asarray(some["image"][i]).ravel()
        assert np.corrcoef(original, changed)[0, 1] > 0.98 and np.abs(original - changed).max() > 1e-3
    assert np.abs(some["image"]).max() <= 1
    with pytest.raises(ValueError, match=r"Augment\.flip must be between 0 and 1, got 2"):
        Augment(flip=2)


def test_single_task_models_are_asked_for_their_task(split):
    keys = jax.random.split(jax.random.key(0), 2)
    image = {"image": normalise_image(split["image"][:1])}
    sets = jax.jit(jax.vmap(lambda key: Tiny().init(key, image)["params"]))(keys)
    lanes = jax.tree.map(lambda leaf: leaf[None], sets)  # one lane of K = 2 networks
    results = make_image_evaluate(Tiny(), PIXEL, batch_size=8, per_task=True)(lanes, split)
    alone = make_image_evaluate(Tiny(), PIXEL, batch_size=8)(sets, split)
    for k, task in enumerate(PIXEL):
        for name, value in results[task.name].items():
            assert value.shape == (1,) and float(value[0]) == pytest.approx(float(alone[task.name][name][k]), rel=1e-5)


def test_edge_thresholds_are_fixed_on_validation_for_each_lane(split):
    tasks, image = (TASKS[3],), {"image": normalise_image(split["image"][:1])}
    params = jax.jit(jax.vmap(lambda key: Tiny(tasks).init(key, image)["params"]))(
        jax.random.split(jax.random.key(0), 2)
    )
    (fixed,) = fix_edge_threshold(Tiny(tasks), params, tasks, split)
    assert fixed.main_metric.name == "edge_f" and len(fixed.option("threshold")) == 2
    evaluate = make_image_evaluate(Tiny(tasks), (fixed,))
    results = evaluate(params, split)["edge"]
    # On the images that fixed it, it is the best.
    np.testing.assert_allclose(results["edge_f"], results["odsf"])
    other = {**split, "image": split["image"][::-1]}
    elsewhere = evaluate(params, other)["edge"]
    assert (elsewhere["edge_f"] <= elsewhere["odsf"]).all()
    assert fix_edge_threshold(Tiny(), params, PIXEL, split) == PIXEL


def test_data_and_outputs_that_do_not_fit(split):
    without = {**split, "labels": {"depth": split["labels"]["depth"]}}
    with pytest.raises(ValueError, match="Task 'segmentation' has no labels in validation: its labels are depth"):
        image_problem(Tiny(), PIXEL, split, without)
    with pytest.raises(ValueError, match="train must have the columns 'image' and 'labels', got image"):
        image_problem(Tiny(), PIXEL, {"image": split["image"]}, split)
    smaller = {**split, "image": split["image"][:, :4]}
    with pytest.raises(ValueError, match=r"train: Task 'segmentation' needs labels of shape \[12, 4, 8\]"):
        image_problem(Tiny(), PIXEL, smaller, split)
    fewer = {**split, "image": split["image"][:5]}
    with pytest.raises(ValueError, match="train has 5 images, but 12 labels of task 'segmentation'"):
        image_problem(Tiny(), PIXEL, fewer, split)
    with pytest.raises(ValueError, match=r"output 'depth' must have shape \[12, 8, 8, 1\], got \[12, 8, 8\]"):
        image_losses(PIXEL[1:], {"depth": jnp.zeros((12, 8, 8))}, split["labels"])
    with pytest.raises(ValueError, match="The model has no output 'depth'; its outputs are edge"):
        image_losses(PIXEL[1:], {"edge": jnp.zeros((12, 8, 8, 1))}, split["labels"])
    strided = dt.detection(num_classes=2, stride=2)
    params = Tiny((strided,)).init(jax.random.key(0), {"image": jnp.zeros((1, S, S, 3))})["params"]
    with pytest.raises(
        ValueError, match="cells of stride=2 pixels, but the model gives 2 x 2 cells for images of 8 x 8"
    ):
        jax.eval_shape(image_loss(Tiny((strided,)), (strided,)), params, rows_of(split, TASKS), jax.random.key(0))
