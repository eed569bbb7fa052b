"""Delta_m: hand-computed values, invariances, warnings and errors."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax import metrics
from mtjax.delta import DeltaM, delta_m, delta_table

DIRECTIONS = {"a": {"auroc": True, "log_loss": False}, "b": {"rmse": False}, "c": {"r2": True}}
positive = st.floats(0.5, 2.0)
# Within 50 % of each other: no warning about a baseline near zero.
close_results = st.integers(1, 4).flatmap(
    lambda n: st.fixed_dictionaries(
        {
            task: st.fixed_dictionaries({m: st.lists(st.floats(1.0, 1.4), min_size=n, max_size=n) for m in of})
            for task, of in DIRECTIONS.items()
        }
    )
)


def like(results, value):
    return {task: {m: value(task, m, np.asarray(v)) for m, v in of.items()} for task, of in results.items()}


def test_one_metric_per_task_is_the_published_formula():
    results = {"a": {"auroc": 0.88}, "b": {"rmse": 1.8}}
    baseline = {"a": {"auroc": 0.80}, "b": {"rmse": 2.0}}
    gain = delta_m(results, baseline, DIRECTIONS)
    assert gain.mean == pytest.approx(100 * (0.08 / 0.80 + 0.2 / 2.0) / 2)
    assert gain.per_task["a"][0] == pytest.approx(10.0) and gain.per_task["b"][0] == pytest.approx(10.0)
    assert gain.n == 1 and math.isnan(gain.stderr) and math.isnan(gain.per_task["a"][1])
    assert gain.warnings == ()


def test_metrics_of_a_task_are_averaged_before_tasks():
    # Task a: +10 % and -20 % -> -5 %. Task b: +40 %. Mean over tasks 17.5, not (10 - 20 + 40) / 3 = 10.
    results = {"a": {"auroc": 1.1, "log_loss": 1.2}, "b": {"rmse": 0.6}}
    baseline = {"a": {"auroc": 1.0, "log_loss": 1.0}, "b": {"rmse": 1.0}}
    gain = delta_m(results, baseline, DIRECTIONS)
    assert gain.per_task["a"][0] == pytest.approx(-5.0)
    assert gain.mean == pytest.approx(17.5)


def test_standard_error_is_over_paired_seeds():
    # Seeds differ a lot, the paired gain little: 10, 20 and 12 %.
    baseline = {"c": {"r2": np.array([0.1, 0.5, 1.0])}}
    results = {"c": {"r2": np.array([0.11, 0.6, 1.12])}}
    gain = delta_m(results, baseline, DIRECTIONS)
    assert gain.mean == pytest.approx(14.0)
    assert gain.stderr == pytest.approx(math.sqrt((16 + 36 + 4) / 2) / math.sqrt(3))
    assert gain.per_task["c"] == pytest.approx((gain.mean, gain.stderr)) and gain.n == 3
    assert str(gain) == "+14.00 ± 3.06 % (3 seeds)"


def test_a_negative_baseline_keeps_its_sign():
    better = delta_m({"c": {"r2": -0.9}}, {"c": {"r2": -1.0}}, DIRECTIONS)
    assert better.mean == pytest.approx(10.0)


@settings(max_examples=30, deadline=None)
@given(results=close_results, baseline_scale=st.floats(0.9, 1.1))
def test_baseline_against_itself_is_zero_and_better_is_positive(results, baseline_scale):
    assert delta_m(results, results, DIRECTIONS).mean == 0.0

    def improved(task, metric, values):
        return values * (1.1 if DIRECTIONS[task][metric] else 0.9)

    better = delta_m(like(results, improved), results, DIRECTIONS)
    assert better.mean == pytest.approx(10.0)
    assert all(mean == pytest.approx(10.0) for mean, _ in better.per_task.values())


@settings(max_examples=30, deadline=None)
@given(results=close_results, data=st.data())
def test_units_and_order_change_nothing(results, data):
    baseline = like(results, lambda task, metric, values: values[::-1] * 0.97)
    gain = delta_m(results, baseline, DIRECTIONS)
    unit = {(t, m): data.draw(st.floats(1e-3, 1e6)) for t in DIRECTIONS for m in DIRECTIONS[t]}

    def rescaled(task, metric, values):
        return values * unit[task, metric]

    order = data.draw(st.permutations(list(DIRECTIONS)))
    scaled = [like({t: values[t] for t in order}, rescaled) for values in (results, baseline)]
    other = delta_m(*scaled, DIRECTIONS, near_zero=0.0)  # a score in other units may look near zero
    assert (other.mean, other.stderr) == pytest.approx((gain.mean, gain.stderr), nan_ok=True, rel=1e-6, abs=1e-9)
    for task in DIRECTIONS:
        assert other.per_task[task] == pytest.approx(gain.per_task[task], nan_ok=True, rel=1e-6, abs=1e-9)


def test_near_zero_baseline_warns_with_task_and_metric():
    with pytest.warns(UserWarning, match=r"Task 'c', metric 'r2': the baseline \(0.01\) is near zero.*\+0.03.*\+300 %"):
        gain = delta_m({"c": {"r2": 0.04}, "b": {"rmse": 1.0}}, {"c": {"r2": 0.01}, "b": {"rmse": 1.0}}, DIRECTIONS)
    assert gain.mean == pytest.approx(150.0)
    assert len(gain.warnings) == 1 and "Task 'c'" in gain.warnings[0]


def test_a_small_score_is_near_zero_but_a_small_error_is_not():
    """An explained variance of 0.02 has the scale of 1; an RMSE of 0.02 has a unit, and may be large."""
    with pytest.warns(UserWarning, match=r"Task 'c', metric 'r2': the baseline \(0.02\) is near zero"):
        delta_m({"c": {"r2": 0.021}}, {"c": {"r2": 0.02}}, DIRECTIONS)
    assert delta_m({"c": {"r2": 0.02}}, {"c": {"r2": 0.02}}, DIRECTIONS).warnings == ()
    assert delta_m({"b": {"rmse": 0.021}}, {"b": {"rmse": 0.02}}, DIRECTIONS).warnings == ()
    assert delta_m({"c": {"r2": 0.021}}, {"c": {"r2": 0.02}}, DIRECTIONS, near_zero=0.01).warnings == ()


def test_a_single_noisy_seed_is_enough_for_the_warning():
    baseline, results = [0.10, 0.02, 0.11], [0.11, 0.10, 0.12]
    with pytest.warns(UserWarning, match="near zero"):
        delta_m({"c": {"r2": results}}, {"c": {"r2": baseline}}, DIRECTIONS)
    assert delta_m({"c": {"r2": 0.25}}, {"c": {"r2": 0.1}}, DIRECTIONS, warn_above=200).warnings == ()


def test_zero_baseline():
    assert delta_m({"c": {"r2": [0.0, 0.0]}}, {"c": {"r2": [0.0, 0.0]}}, DIRECTIONS).mean == 0.0
    with pytest.warns(UserWarning, match="near zero"):
        gain = delta_m({"c": {"r2": [0.1, 0.1]}}, {"c": {"r2": [0.0, 0.1]}}, DIRECTIONS)
    assert gain.mean == math.inf and math.isnan(gain.stderr)


def test_nan_stays_nan():
    gain = delta_m(
        {"a": {"auroc": math.nan}, "b": {"rmse": 0.9}}, {"a": {"auroc": 0.5}, "b": {"rmse": 1.0}}, DIRECTIONS
    )
    assert math.isnan(gain.mean) and gain.per_task["b"][0] == pytest.approx(10.0)


def test_directions_may_be_the_tasks():
    class WithMetrics:
        name = "b"
        metrics = (metrics.rmse(), metrics.r2())

    gain = delta_m({"b": {"rmse": 0.9, "r2": 0.55}}, {"b": {"rmse": 1.0, "r2": 0.5}}, [WithMetrics])
    assert gain.mean == pytest.approx(10.0)


def test_table_against_a_named_baseline():
    models = {
        "single-task MLP": {"b": {"rmse": [1.0, 2.0]}},
        "shared bottom": {"b": {"rmse": [0.9, 1.8]}},
        "MMoE": {"b": {"rmse": [1.1, 2.2]}},
    }
    table = delta_table(models, "single-task MLP", DIRECTIONS)
    assert list(table) == list(models)
    assert table["single-task MLP"] == DeltaM(0.0, 0.0, {"b": (0.0, 0.0)}, 2)
    assert table["shared bottom"].mean == pytest.approx(10.0)
    assert table["MMoE"].mean == pytest.approx(-10.0)
    with pytest.raises(
        ValueError, match=r"Baseline 'STL' is not among the models: single-task MLP, shared bottom, MMoE"
    ):
        delta_table(models, "STL", DIRECTIONS)
    models["MMoE"] = {"b": {"rmse": [1.0]}}
    with pytest.raises(ValueError, match=r"Model 'MMoE' against 'single-task MLP': .*1 seeds and the baseline 2"):
        delta_table(models, "single-task MLP", DIRECTIONS)


@pytest.mark.parametrize(
    ("results", "baseline", "message"),
    [
        ({"a": {"auroc": 1.0}}, {"b": {"rmse": 1.0}}, "the same tasks; got a and b"),
        ({"a": {"auroc": 1.0}}, {"a": {"log_loss": 1.0}}, "the same metrics of task 'a'; got auroc and log_loss"),
        ({"a": {}}, {"a": {}}, "Task 'a' has no metric"),
        ({}, {}, "at least one task"),
        ({"a": {"f1": 1.0}}, {"a": {"f1": 1.0}}, "No direction is given for metric 'f1' of task 'a'"),
        ({"d": {"f1": 1.0}}, {"d": {"f1": 1.0}}, "No direction is given for metric 'f1' of task 'd'"),
        ({"a": {"auroc": [1.0, 2.0]}}, {"a": {"auroc": 1.0}}, "2 seeds and the baseline 1; they are compared pair by"),
        ({"a": {"auroc": [[1.0]]}}, {"a": {"auroc": [[1.0]]}}, r"got an array of shape \(1, 1\)"),
        ({"a": {"auroc": []}}, {"a": {"auroc": []}}, r"got an array of shape \(0,\)"),
        (
            {"a": {"auroc": [1.0, 1.0]}, "b": {"rmse": 1.0}},
            {"a": {"auroc": [1.0, 1.0]}, "b": {"rmse": 1.0}},
            r"from the same seeds, but the tasks hold \[1, 2\] seeds",
        ),
    ],
)
def test_errors_are_sentences(results, baseline, message):
    with pytest.raises(ValueError, match=message):
        delta_m(results, baseline, DIRECTIONS)
