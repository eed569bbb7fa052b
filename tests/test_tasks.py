"""Tasks: losses against a naive loop, missing labels that leave no trace, scaling that no result depends on, errors.

Letters: B batch, C classes.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax import losses, metrics
from mtjax.tasks import Task, head_sizes, labels_and_weights, predictions, task_losses

B = 6
TASKS = (  # names out of alphabetical order: results must follow the order given here
    Task("weather", "multiclass", num_classes=3),
    Task("delay", "regression").fit(np.array([10.0, np.nan, 30.0, 50.0])),
    Task("cancelled", "binary"),
    Task("bags", "count"),
    Task("air_time", "regression", scaling="log1p"),
    Task("altitude", "regression", scaling="none"),
)
NAMES = [task.name for task in TASKS]
jitted_losses = jax.jit(lambda outputs, batch: task_losses(TASKS, outputs, batch))
jitted_gradient = jax.jit(jax.grad(lambda outputs, batch: sum(task_losses(TASKS, outputs, batch).values())))


def random_outputs(rng):
    return {
        task.name: jnp.asarray(rng.normal(size=(B, 3) if task.kind == "multiclass" else (B,)), jnp.float32)
        for task in TASKS
    }


def random_labels(rng, task):
    return {
        "binary": rng.integers(0, 2, B),
        "multiclass": rng.integers(0, 3, B),
        "regression": rng.uniform(0.0, 60.0, B),
        "count": rng.poisson(3.0, B),
    }[task.kind].astype(np.float32)


def random_batch(rng, missing=0.4):
    labels = {task.name: random_labels(rng, task) for task in TASKS}
    for values in labels.values():
        values[rng.random(B) < missing] = np.nan
    mask = {name: rng.random(B) > missing / 2 for name in ("delay", "weather")}
    return {"labels": labels, "mask": mask, "weight": rng.uniform(0.0, 2.0, B).astype(np.float32).round(1)}


def naive_loss(task, output, label):
    """One example in Python floats."""
    z = [float(v) for v in np.atleast_1d(output)]
    if task.kind == "binary":
        p = 1 / (1 + math.exp(-z[0]))
        return -math.log(p if label == 1 else 1 - p)
    if task.kind == "multiclass":
        return math.log(sum(math.exp(v) for v in z)) - z[int(label)]
    if task.kind == "count":
        return math.exp(z[0]) - label * z[0]
    encoded = {
        "none": label,
        "log1p": math.log(1 + label),
        "standardise": (label - task.offset) / task.scale,
    }[task.scaling]
    return (z[0] - encoded) ** 2


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), missing=st.sampled_from([0.0, 0.4, 0.8, 1.0]))
def test_losses_are_weighted_means_over_labelled_rows(seed, missing):
    rng = np.random.default_rng(seed)
    outputs, batch = random_outputs(rng), random_batch(rng, missing)
    result = jitted_losses(outputs, batch)
    for task in TASKS:
        total = weights = 0.0
        for row in range(B):
            label, weight = batch["labels"][task.name][row], batch["weight"][row]
            if math.isnan(label) or not batch["mask"].get(task.name, np.ones(B, bool))[row]:
                continue
            total += weight * naive_loss(task, outputs[task.name][row], float(label))
            weights += weight
        np.testing.assert_allclose(result[task.name], total / weights if weights > 0 else 0.0, rtol=2e-5, atol=1e-6)


def test_losses_keep_the_order_of_the_tasks(rng):
    assert list(task_losses(TASKS, random_outputs(rng), random_batch(rng))) == NAMES


def test_losses_need_neither_mask_nor_weight():
    task = Task("y", "regression", scaling="none")
    batch = {"labels": {"y": jnp.array([1.0, jnp.nan, 3.0])}}
    # ((2 - 1)^2 + (0 - 3)^2) / 2
    assert task_losses([task], {"y": jnp.array([2.0, 7.0, 0.0])}, batch)["y"] == 5.0


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_weight_two_is_a_row_twice_and_weight_zero_is_no_row(seed):
    rng = np.random.default_rng(seed)
    outputs, batch = random_outputs(rng), random_batch(rng)
    rows = rng.integers(0, B, B)
    weighted = jitted_losses(outputs, batch | {"weight": np.bincount(rows, minlength=B).astype(np.float32)})
    repeated = jax.tree.map(lambda values: values[rows], batch | {"weight": np.ones(B, np.float32)})
    expected = jitted_losses(jax.tree.map(lambda values: values[rows], outputs), repeated)
    for name in NAMES:
        np.testing.assert_allclose(weighted[name], expected[name], rtol=1e-5, atol=1e-6)


def test_only_ratios_of_weights_matter(rng):
    outputs, batch = random_outputs(rng), random_batch(rng)
    scaled = batch | {"weight": batch["weight"] * 8}
    first, second = jitted_losses(outputs, batch), jitted_losses(outputs, scaled)
    assert jax.tree.map(float, first) == jax.tree.map(float, second)


def test_masked_is_nan_is_weightless(rng):
    outputs = random_outputs(rng)
    labels = {task.name: random_labels(rng, task) for task in TASKS}
    hidden = np.array([True, False, False, True, False, False])
    by_nan = {"labels": {name: np.where(hidden, np.nan, values) for name, values in labels.items()}}
    by_mask = {"labels": labels, "mask": {name: ~hidden for name in NAMES}}
    by_weight = {"labels": labels, "weight": (~hidden).astype(np.float32)}
    for function in (jitted_losses, jitted_gradient):
        expected = function(outputs, by_nan)
        for batch in (by_mask, by_weight):
            for name, values in function(outputs, batch).items():
                np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-7)


# Missing labels leave no trace: not in the value, not in the gradient, whatever the outputs are.


def batch_without(task, how):
    label = jnp.full((B,), jnp.nan) if how == "nan" else jnp.ones((B,))
    return {"labels": {task.name: label}} | {
        "nan": {},
        "mask": {"mask": {task.name: jnp.zeros((B,), bool)}},
        "weight": {"weight": jnp.zeros((B,))},
    }[how]


@pytest.mark.parametrize("how", ["nan", "mask", "weight"])
@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_a_task_without_labels_has_loss_and_gradient_exactly_zero(task, how):
    batch = batch_without(task, how)
    for bad in (jnp.inf, -jnp.inf, jnp.nan, 1e38):
        output = jnp.full((B, 3) if task.kind == "multiclass" else (B,), bad)
        loss, gradient = jax.value_and_grad(lambda z: task_losses([task], {task.name: z}, batch)[task.name])(output)
        assert loss == 0.0
        assert (gradient == 0.0).all()


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_unlabelled_rows_have_no_gradient_even_if_their_outputs_are_not_finite(task, rng):
    label = random_labels(rng, task)
    label[::2] = np.nan
    output = np.array(random_outputs(rng)[task.name])
    clean = output.copy()
    output[0], output[2], output[4] = np.nan, np.inf, -np.inf

    def loss_fn(z):
        return task_losses([task], {task.name: z}, {"labels": {task.name: label}})[task.name]

    loss, gradient = jax.value_and_grad(loss_fn)(jnp.asarray(output))
    clean_loss, clean_gradient = jax.value_and_grad(loss_fn)(jnp.asarray(clean))
    assert loss == clean_loss
    np.testing.assert_array_equal(gradient, clean_gradient)
    assert (gradient[::2] == 0).all()
    assert (gradient[1::2] != 0).any()


def test_no_label_means_no_gradient_of_parameters(rng):
    """End to end through a linear model, with labels of a log1p task that could not be encoded."""
    task = Task("y", "regression", scaling="log1p")
    batch = {"labels": {"y": jnp.full((B,), -7.0)}, "mask": {"y": jnp.zeros((B,), bool)}}
    features = jnp.asarray(rng.normal(size=(B, 4)), jnp.float32)
    gradient = jax.grad(lambda w: task_losses([task], {"y": features @ w}, batch)["y"])(jnp.ones(4))
    assert (gradient == 0).all()


def test_outputs_in_half_precision_give_float32_losses(rng):
    outputs, batch = random_outputs(rng), random_batch(rng)
    half = jax.tree.map(lambda values: values.astype(jnp.bfloat16), outputs)
    for loss in task_losses(TASKS, half, batch).values():
        assert loss.dtype == jnp.float32
    exact = jitted_losses(jax.tree.map(lambda values: values.astype(jnp.float32), half), batch)
    for name, loss in task_losses(TASKS, half, batch).items():
        np.testing.assert_allclose(loss, exact[name], rtol=1e-5, atol=1e-6)


def test_integer_labels():
    task = Task("y", "binary")
    outputs = {"y": jnp.array([0.0, 1.0])}
    whole = task_losses([task], outputs, {"labels": {"y": jnp.array([0, 1])}})["y"]
    assert whole == task_losses([task], outputs, {"labels": {"y": jnp.array([0.0, 1.0])}})["y"]


def test_labels_and_weights():
    batch = {"labels": {"y": jnp.array([1.0, jnp.nan, 3.0, 4.0])}, "weight": jnp.array([1.0, 2.0, 3.0, 0.0])}
    batch["mask"] = {"y": jnp.array([True, True, False, True])}
    label, weight = labels_and_weights(Task("y", "count"), batch)
    assert label.tolist() == [1.0, 0.0, 0.0, 4.0]
    assert weight.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_loss_of_ones_own():
    task = Task("y", "regression", scaling="none", loss=losses.absolute_error)
    batch = {"labels": {"y": jnp.array([1.0, 5.0])}}
    assert task_losses([task], {"y": jnp.array([4.0, 4.0])}, batch)["y"] == 2.0


# Scaling.


def fitted(scaling, offset, scale):
    return dataclasses.replace(Task("y", "regression", scaling=scaling), offset=offset, scale=scale)


@settings(deadline=None, max_examples=60)
@given(
    scaling=st.sampled_from(["none", "standardise", "log1p"]),
    offset=st.floats(-1e3, 1e3),
    scale=st.floats(1e-3, 1e3),
    label=st.lists(st.floats(-0.9, 1e4), min_size=3, max_size=3),
)
def test_predict_undoes_encode(scaling, offset, scale, label):
    task, label = fitted(scaling, offset, scale), np.float32(label)
    decoded = task.predict(task.encode(jnp.asarray(label)))
    # Rounding of the sum with the offset, and of the exponential of a number up to log(1e4) = 9.2.
    np.testing.assert_allclose(decoded, label, rtol=2e-6, atol=2**-22 * (abs(offset) + 1))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), unit=st.floats(1e-3, 1e3), zero=st.floats(-100.0, 100.0))
def test_standardised_losses_do_not_depend_on_units(seed, unit, zero):
    """Minutes or seconds, Celsius or Fahrenheit: the same loss; predictions change with the unit."""
    rng = np.random.default_rng(seed)
    label, output = rng.normal(size=20), jnp.asarray(rng.normal(size=20), jnp.float32)
    task, other = Task("y", "regression").fit(label), Task("y", "regression").fit(zero + unit * label)
    loss = task_losses([task], {"y": output}, {"labels": {"y": jnp.asarray(label, jnp.float32)}})["y"]
    moved = {"labels": {"y": jnp.asarray(zero + unit * label, jnp.float32)}}
    # float32 labels of size |zero| carry an error of eps |zero| / (unit std) after encoding.
    tolerance = 1e-5 + 2**-20 * abs(zero) / unit
    np.testing.assert_allclose(task_losses([other], {"y": output}, moved)["y"], loss, rtol=tolerance)
    np.testing.assert_allclose(
        other.predict(output), zero + unit * task.predict(output), rtol=1e-5, atol=1e-5 * (abs(zero) + unit)
    )


def test_fit_by_hand():
    task = Task("y", "regression").fit(np.array([1.0, np.nan, 3.0, 5.0]))
    assert task.offset == 3.0
    assert task.scale == pytest.approx(math.sqrt(8 / 3))
    encoded = task.encode(jnp.array([1.0, 3.0, 5.0]))
    assert float(encoded.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(encoded.std()) == pytest.approx(1.0, abs=1e-6)


def test_fit_sees_the_training_rows_only():
    train, test = np.array([1.0, 3.0]), np.array([1e6, -1e6])
    task = Task("y", "regression").fit(train)
    assert (task.offset, task.scale) == (2.0, 1.0)
    # Values of other rows are encoded with the same numbers, whatever they are.
    assert task.encode(jnp.asarray(test)).tolist() == [1e6 - 2.0, -1e6 - 2.0]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.1, -3.3])
def test_a_constant_target_is_centred_but_not_scaled(value):
    """Not even by the deviation of 1e-17 that rounding gives the mean of three times 0.1."""
    task = Task("y", "regression").fit(np.full(3, value))
    assert task.scale == 1.0
    assert task.offset == pytest.approx(value)
    assert Task("y", "regression").fit(np.array([value])).scale == 1.0


@pytest.mark.parametrize("task", [t for t in TASKS if t.scaling != "standardise"], ids=lambda t: t.name)
def test_fit_leaves_other_tasks_as_they_are(task, rng):
    assert task.fit(random_labels(rng, task)) == task


def test_fit_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match=r"^Task 'y' has no labelled training row$"):
        Task("y", "binary").fit(np.array([np.nan, np.nan]))
    with pytest.raises(ValueError, match=r"^Task 'y' has no labelled training row$"):
        Task("y", "regression").fit(np.array([]))
    with pytest.raises(ValueError, match="is binary but its labels hold"):
        Task("y", "binary").fit(np.array([0.0, 2.0]))


# Kinds, predictions and names.


@pytest.mark.parametrize(
    ("task", "size", "loss", "main", "higher"),
    [
        (Task("y", "binary"), 1, losses.binary_cross_entropy, "auroc", True),
        (Task("y", "multiclass", num_classes=4), 4, losses.cross_entropy, "auroc_ovr", True),
        (Task("y", "regression"), 1, losses.squared_error, "explained_variance", True),
        (Task("y", "count"), 1, losses.poisson, "poisson_deviance", False),
    ],
    ids=lambda value: value.kind if isinstance(value, Task) else "",
)
def test_a_kind_fixes_head_loss_and_metrics(task, size, loss, main, higher):
    assert task.output_size == size
    assert task.loss is loss
    assert task.main_metric.name == main
    assert task.main_metric.higher_is_better is higher


def test_the_first_metric_is_the_main_one():
    task = Task("y", "binary", metrics=(metrics.log_loss(), metrics.accuracy()))
    assert task.main_metric.name == "log_loss"
    assert not task.main_metric.higher_is_better


def test_default_scaling():
    assert Task("y", "regression").scaling == "standardise"
    assert {task.scaling for task in TASKS if task.kind != "regression"} == {"none"}


def test_predictions_are_in_original_units():
    outputs = {
        "weather": jnp.log(jnp.array([[1.0, 2.0, 5.0]])),
        "delay": jnp.array([2.0]),
        "cancelled": jnp.array([math.log(3.0)]),
        "bags": jnp.array([math.log(2.5)]),
        "air_time": jnp.array([math.log(91.0)]),
        "unknown": jnp.array([1.0]),
    }
    result = predictions(TASKS, outputs)
    assert list(result) == NAMES[:5]  # neither 'altitude', which has no output, nor 'unknown', which is no task
    np.testing.assert_allclose(result["weather"], [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-6)
    # Labels 10, 30, 50: mean 30, deviation sqrt(800 / 3).
    np.testing.assert_allclose(result["delay"], [30 + 2 * math.sqrt(800 / 3)], rtol=1e-6)
    np.testing.assert_allclose(result["cancelled"], [0.75], rtol=1e-6)
    np.testing.assert_allclose(result["bags"], [2.5], rtol=1e-6)
    np.testing.assert_allclose(result["air_time"], [90.0], rtol=1e-5)


def test_head_sizes():
    assert list(head_sizes(TASKS).items()) == [
        ("weather", 3),
        ("delay", 1),
        ("cancelled", 1),
        ("bags", 1),
        ("air_time", 1),
        ("altitude", 1),
    ]
    with pytest.raises(ValueError, match=r"^Task names must be unique, got a, b, a$"):
        head_sizes([Task("a", "binary"), Task("b", "binary"), Task("a", "count")])


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_json_round_trip(task):
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


# Errors, word for word.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "ordinal"},
            "Task 'y' has kind 'ordinal'; expected one of binary, multiclass, regression, count",
        ),
        (
            {"kind": "multiclass"},
            "Task 'y' is multiclass with num_classes=None; a multiclass task needs num_classes, other kinds take none",
        ),
        (
            {"kind": "binary", "num_classes": 2},
            "Task 'y' is binary with num_classes=2; a multiclass task needs num_classes, other kinds take none",
        ),
        ({"kind": "multiclass", "num_classes": 1}, "Task 'y' needs num_classes >= 2, got 1"),
        (
            {"kind": "regression", "scaling": "minmax"},
            "Task 'y' has scaling 'minmax'; expected one of none, standardise, log1p",
        ),
        (
            {"kind": "count", "scaling": "log1p"},
            "Task 'y' is count: only regression targets are scaled, got 'log1p'",
        ),
        ({"kind": "binary", "metrics": ()}, "Task 'y' has an empty tuple of metrics; give at least one"),
    ],
)
def test_errors_of_the_constructor(arguments, message):
    with pytest.raises(ValueError) as error:
        Task("y", **arguments)
    assert str(error.value) == message


BINARY, COUNT, CLASSES = Task("cancelled", "binary"), Task("bags", "count"), Task("w", "multiclass", num_classes=3)


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        (
            BINARY,
            [0, 1, 7, np.nan],
            "Task 'cancelled' is binary but its labels hold 3 values (0, 1, 7); use kind='multiclass'",
        ),
        (
            BINARY,
            range(10),
            "Task 'cancelled' is binary but its labels hold 10 values (0, 1, 2, 3, 4, 5, ...); use kind='multiclass'",
        ),
        (BINARY, [1, 2], "Task 'cancelled' is binary but its labels hold 2 values (1, 2); encode them as 0 and 1"),
        (BINARY, [0, np.inf], "Task 'cancelled' has infinite labels; replace them or mark them missing (NaN)"),
        (COUNT, [0.5, 2.0], "Task 'bags' is count: expected integers >= 0, got (0.5, 2)"),
        (COUNT, [-1.0, 2.0], "Task 'bags' is count: expected integers >= 0, got (-1, 2)"),
        (CLASSES, [0, 1.5], "Task 'w' is multiclass: expected integers >= 0, got (0, 1.5)"),
        (CLASSES, [0, 1, 2, 3], "Task 'w' has num_classes=3 but its labels reach class 3"),
        (
            Task("t", "regression", scaling="log1p"),
            [5.0, -1.0],
            "Task 't' is scaled by log1p but has a label of -1 <= -1",
        ),
        (Task("t", "regression"), [-np.inf], "Task 't' has infinite labels; replace them or mark them missing (NaN)"),
    ],
)
def test_errors_of_check_labels(task, labels, message):
    with pytest.raises(ValueError) as error:
        task.check_labels(np.array(list(labels), np.float64))
    assert str(error.value) == message


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_check_labels_accepts_what_belongs_there(task, rng):
    label = random_labels(rng, task)
    task.check_labels(label)
    label[1] = np.nan
    task.check_labels(label)
    task.check_labels(np.full(3, np.nan))  # all missing: for `fit` to refuse
