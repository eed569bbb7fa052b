"""Comparisons: rows, Delta_m, paired verdicts, against numbers worked out by hand."""

import types
import warnings

import numpy as np
import pytest
from scipy import stats

import mtjax
from mtjax.train.compare import MEAN_CELL, Outcome, beats, mean_and_se, outcome_rows, verdict

TASKS = (mtjax.Task("sold", "binary"), mtjax.Task("price", "regression"))


def outcome(auroc, explained, **fitted) -> Outcome:
    test = {
        "sold": {"auroc": np.array(auroc), "log_loss": np.array(auroc) / 2},
        "price": {"explained_variance": np.array(explained), "rmse": np.array(explained) * 10},
    }
    numbers = {"num_parameters": 100, "rows_per_s": 5e3, "compile_s": 1.5} | fitted
    choice = types.SimpleNamespace(learning_rates=(0.1, 0.1))
    return Outcome(test, choice, types.SimpleNamespace(**numbers), None)


OURS = outcome([0.8, 0.9, 0.85], [0.5, 0.6, 0.4], num_parameters=70)
THEIRS = outcome([0.7, 0.85, 0.8], [0.5, 0.5, 0.5])


def test_mean_and_standard_error():
    mean, se = mean_and_se(np.array([1.0, 2.0, 6.0]))
    assert mean == 3.0 and se == pytest.approx(np.sqrt((4 + 1 + 9) / 2 / 3))
    mean, se = mean_and_se(np.array([2.0]))
    assert mean == 2.0 and np.isnan(se)


def test_verdict_is_a_two_sided_t_test():
    """Three seeds, two degrees of freedom: 4.303 standard errors."""
    assert verdict(4.31, 1.0, 3) is True and verdict(-4.31, 1.0, 3) is False
    assert verdict(4.29, 1.0, 3) is None and verdict(0.0, 1.0, 3) is None
    assert verdict(5.0, float("nan"), 1) is None and verdict(5.0, 0.0, 1) is None
    assert verdict(0.0, 0.0, 3) is None, "two models that are equal on every seed"
    assert verdict(1e-9, 0.0, 3) is True
    assert verdict(float("nan"), 1.0, 3) is None
    # The same as scipy's paired test on data.
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.5, 2.0):
        difference = rng.normal(shift, 1.0, 6)
        p = stats.ttest_1samp(difference, 0.0).pvalue
        assert (verdict(*mean_and_se(difference), 6) is not None) == (p < 0.05)


def test_score_is_the_signed_mean_over_tasks():
    np.testing.assert_allclose(OURS.score(TASKS), [0.65, 0.75, 0.625])
    count = (*TASKS, mtjax.Task("visits", "count"))
    with_count = Outcome(OURS.test | {"visits": {"poisson_deviance": np.array([1.0, 1, 1])}}, None, None, None)
    np.testing.assert_allclose(with_count.score(count), [0.1, 0.5 / 3, 0.25 / 3])


def test_beats():
    """Paired differences of the scores: 0.05, 0.075, -0.025."""
    finding = beats("ours is better", TASKS, {"ours": OURS, "theirs": THEIRS}, "ours", "theirs", "2 tasks")
    mean, se = 0.1 / 3, np.std([0.05, 0.075, -0.025], ddof=1) / np.sqrt(3)
    assert finding.claim == "ours is better" and finding.holds is None
    assert finding.reason == f"2 tasks: mean main metric differs by +{mean:.4f} ± {se:.4f} over paired seeds"
    assert finding.baseline.startswith("theirs: 0.64") and finding.ours.startswith("0.675 ± 0.038")
    clear = outcome([0.9, 1.05, 1.0], [0.7, 0.7, 0.7])  # 0.2 above on each task and seed, but for rounding
    assert beats("c", TASKS, {"a": clear, "b": THEIRS}, "a", "b", "").holds is True
    assert beats("c", TASKS, {"a": clear, "b": THEIRS}, "b", "a", "").holds is False


def test_rows_and_delta_m():
    rows, gains = outcome_rows(TASKS, {"theirs": THEIRS, "ours": OURS}, "theirs", note=" (T=2)")
    cells = {(row["model"], row["task"], row["metric"]): row for row in rows}
    assert len(cells) == len(rows) == 2 * (2 + 2 + 1 + 1), "per model: four metrics, their mean, Delta_m"
    row = cells["ours (T=2)", "sold", "auroc"]
    assert row["mean"] == pytest.approx(0.85) and row["n"] == 3 and row["baseline"] == "theirs (T=2)"
    assert (row["params"], row["rows_per_s"], row["compile_s"], row["learning_rate"]) == (70, 5e3, 1.5, [0.1, 0.1])
    assert row["higher_is_better"] is True and cells["ours (T=2)", "price", "rmse"]["higher_is_better"] is False
    assert cells["ours (T=2)", *MEAN_CELL]["mean"] == pytest.approx(0.675)
    # Delta_m of a seed: percent of the baseline of that seed, main metrics only, mean over the two tasks.
    per_seed = [
        50 * ((0.8 - 0.7) / 0.7 + (0.5 - 0.5) / 0.5),
        50 * ((0.9 - 0.85) / 0.85 + (0.6 - 0.5) / 0.5),
        50 * ((0.85 - 0.8) / 0.8 + (0.4 - 0.5) / 0.5),
    ]
    gain = gains["ours (T=2)"]
    assert gain.mean == pytest.approx(np.mean(per_seed)) and gain.n == 3
    assert cells["ours (T=2)", "all", "delta_m"]["mean"] == pytest.approx(gain.mean)
    assert gains["theirs (T=2)"].mean == 0.0


def test_without_the_baseline_there_is_no_delta_m():
    rows, gains = outcome_rows(TASKS, {"ours": OURS}, "theirs")
    assert gains == {} and not any(row["metric"] == "delta_m" for row in rows)


def test_baselines_near_zero_are_named_in_the_gains_not_warned_about():
    near = outcome([0.7, 0.8, 0.8], [0.001, 0.002, 0.001])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, gains = outcome_rows(TASKS, {"base": near, "ours": OURS}, "base")
    assert any("near zero" in sentence and "'price'" in sentence for sentence in gains["ours"].warnings)
