"""Comparing models that were trained with equal budgets: rows of the report, Delta_m, and verdicts on claims.

Letters: S seeds (paired: entry s of every model comes from the same seed), K tasks.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtjax.delta import DeltaM, delta_table
from mtjax.tasks import Task
from mtjax.train.evaluate import Results, main_scores
from mtjax.train.loop import Fit
from mtjax.train.report import Finding, Row, delta_rows, format_mean, result_rows
from mtjax.train.select import Choice

MEAN_CELL = ("mean over tasks", "main metric")
"""Task and metric of the rows that hold the mean over tasks of the main metric (signed: larger is better)."""


@dataclasses.dataclass
class Outcome:
    """What one model came to.

    Attributes:
      test: metrics f64[S] on test rows.
      choice: the chosen learning rate.
      fitted: the fit.
      model: the Linen module.
    """

    test: Results
    choice: Choice
    fitted: Fit
    model: Any

    def score(self, tasks: Sequence[Task]) -> np.ndarray:
        """f64[S]: mean over tasks of the main metric on test rows, signed so that larger is better."""
        return main_scores(tasks, self.test).mean(axis=1)


def outcome_rows(
    tasks: Sequence[Task], outcomes: Mapping[str, Outcome], baseline: str, note: str = ""
) -> tuple[list[Row], dict[str, DeltaM]]:
    """Report rows of all metrics, of their mean over tasks and of Delta_m on the main metrics; Delta_m of every model.

    Args:
      tasks: the tasks.
      outcomes: model -> outcome.
      baseline: the model that Delta_m refers to; without it in `outcomes` there is no Delta_m.
      note: appended to the names of models.

    Returns:
      The rows and model -> Delta_m (whose `warnings` name baselines near zero; none is issued).
    """
    directions = {task.name: {m.name: m.higher_is_better for m in task.metrics} for task in tasks}
    rows = []
    for name, outcome in outcomes.items():
        extra = {
            "params": outcome.fitted.num_parameters,
            "rows_per_s": outcome.fitted.rows_per_s,
            "compile_s": outcome.fitted.compile_s,
            "learning_rate": list(outcome.choice.learning_rates),
        }
        for row in result_rows(name + note, outcome.test, baseline=baseline + note, **extra):
            rows.append(row | {"higher_is_better": directions[row["task"]][row["metric"]]})
        mean = {MEAN_CELL[0]: {MEAN_CELL[1]: outcome.score(tasks)}}
        rows += [row | {"higher_is_better": True} for row in result_rows(name + note, mean, baseline=baseline + note)]
    if baseline not in outcomes:
        return rows, {}
    main = {task.name: task.main_metric for task in tasks}
    results = {
        name + note: {task: {metric.name: outcome.test[task][metric.name]} for task, metric in main.items()}
        for name, outcome in outcomes.items()
    }
    ways = {task: {metric.name: metric.higher_is_better} for task, metric in main.items()}
    with warnings.catch_warnings():  # the sentences are in the gains; a report prints them once
        warnings.simplefilter("ignore", UserWarning)
        gains = delta_table(results, baseline + note, ways)
    return rows + delta_rows(gains, baseline + note), gains


def mean_and_se(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error over seeds; NaN error with one seed."""
    spread = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.nan
    return float(values.mean()), float(spread)


def verdict(mean: float, se: float, n: int, confidence: float = 0.95) -> bool | None:
    """Whether a paired difference over n seeds is positive, by a two-sided t-test.

    Returns:
      True or False if the mean differs from zero at that confidence, None if this run cannot tell (always with one
      seed). With few seeds that takes more than "two standard errors": 4.3 of them with three seeds.
    """
    from scipy import stats

    if n < 2 or not abs(mean) > stats.t.ppf((1 + confidence) / 2, n - 1) * se:
        return None
    return mean > 0


def beats(
    claim: str, tasks: Sequence[Task], outcomes: Mapping[str, Outcome], better: str, other: str, where: str
) -> Finding:
    """The finding on "`better` scores higher than `other`", by their paired difference in the mean main metric."""
    ours, theirs = outcomes[better].score(tasks), outcomes[other].score(tasks)
    mean, se = mean_and_se(ours - theirs)
    reason = f"{where}: mean main metric differs by {mean:+.4f} ± {se:.4f} over paired seeds"
    baseline = f"{other}: {format_mean(*mean_and_se(theirs))}"
    return Finding(claim, baseline, format_mean(*mean_and_se(ours)), verdict(mean, se, ours.size), reason)
