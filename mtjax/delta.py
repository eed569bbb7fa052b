r"""Multitask gain Delta_m: how much better than a baseline, in percent, averaged over tasks; positive is better.

    Delta_m = 100 / T  sum_t  1 / |M_t|  sum_{m in M_t}  s_m (value_m - baseline_m) / |baseline_m|

with s_m = +1 if higher is better and -1 if lower is better. Metrics of one task are averaged first, so that a task
with four metrics weighs as much as a task with one. Results and baseline come with S paired seeds: Delta_m is taken
seed by seed, and its standard error is that of the mean of these S numbers.

Reference: Maninis, Radosavovic, Kokkinos, Attentive Single-Tasking of Multiple Tasks (CVPR 2019), eq. 4. The published
formula divides by the baseline itself, not by its absolute value; for a baseline below zero (R2 of a bad model) that
turns an improvement into a loss. It also knows one metric per task only. For positive baselines and one metric both
agree. Some libraries report the opposite sign (lower is better); here positive is better.

A relative change says little where the baseline is near zero: from an explained variance of 0.01 to 0.02 is +100 %.
Such a cell dominates the mean, hence a warning names it; read the metric itself beside Delta_m.

>>> directions = {"price": {"rmse": False}, "churn": {"auroc": True}}
>>> single = {"price": {"rmse": [10.0, 12.0]}, "churn": {"auroc": [0.80, 0.80]}}
>>> shared = {"price": {"rmse": [9.0, 11.4]}, "churn": {"auroc": [0.84, 0.80]}}
>>> gain = delta_m(shared, single, directions)
>>> print(gain)
+5.00 ± 2.50 % (2 seeds)
>>> {task: f"{mean:+.2f}" for task, (mean, stderr) in gain.per_task.items()}
{'price': '+7.50', 'churn': '+2.50'}

Letters: S seeds, T tasks.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from mtjax.tasks import Task

Results = Mapping[str, Mapping[str, ArrayLike]]
"""Task name -> metric name -> a number, or one number per seed [S]."""

Directions = Mapping[str, Mapping[str, bool]]
"""Task name -> metric name -> whether higher is better."""


@dataclasses.dataclass(frozen=True)
class DeltaM:
    """A multitask gain in percent; positive is better.

    Attributes:
      mean: Delta_m, averaged over seeds.
      stderr: its standard error over the paired seeds (ddof 1), NaN with one seed.
      per_task: task name -> (mean, standard error) of the gain of that task.
      n: number of seeds.
      warnings: sentences about baseline values near zero.
    """

    mean: float
    stderr: float
    per_task: dict[str, tuple[float, float]]
    n: int
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        spread = "" if math.isnan(self.stderr) else f" ± {self.stderr:.2f}"
        return f"{self.mean:+.2f}{spread} % ({self.n} seed{'s' * (self.n != 1)})"


def delta_m(
    results: Results,
    baseline: Results,
    directions: "Directions | Sequence[Task]",
    *,
    warn_above: float = 50.0,
    near_zero: float = 0.05,
) -> DeltaM:
    """Gain of `results` over `baseline` in percent, averaged over metrics, then tasks, then seeds.

    Args:
      results: task -> metric -> number or [S]; entry s of every array comes from seed s.
      baseline: the same tasks and metrics, entry s from the same seed as entry s of the results. To compare with one
        published number repeat it: `np.full(S, 0.82)`.
      directions: task -> metric -> higher_is_better, or the tasks themselves, whose metrics know their direction. May
        hold more tasks and metrics than the results.
      warn_above: a relative change beyond this many percent in any seed is reported as a baseline near zero.
      near_zero: so is a baseline below this value, for metrics of which more is better: these are scores whose best
        value is 1 (AUROC, explained variance, ...), while errors have units and no such scale.

    Returns:
      The gain. Metrics that do not differ gain 0, also where the baseline is 0; any other change from a baseline of 0
      is infinite, and NaN values give a NaN gain.

    Raises:
      ValueError: if tasks, metrics or numbers of seeds do not match, or a direction is missing.

    Warns:
      UserWarning: if the baseline of a metric is near zero beside the difference; once per task and metric.
    """
    directions = _directions(directions)
    _same_keys("tasks", results, baseline)
    if not results:
        raise ValueError("delta_m needs at least one task, got results without any")
    gains: dict[str, np.ndarray] = {}
    sentences: list[str] = []
    for task, metrics in results.items():
        _same_keys(f"metrics of task '{task}'", metrics, baseline[task])
        if not metrics:
            raise ValueError(f"Task '{task}' has no metric in the results; give at least one or leave the task out")
        relative = []
        for metric, values in metrics.items():
            sign = 1.0 if _direction(directions, task, metric) else -1.0
            new, old = _seeds(task, metric, values, "results"), _seeds(task, metric, baseline[task][metric], "baseline")
            if new.shape != old.shape:
                raise ValueError(
                    f"Task '{task}', metric '{metric}': results hold {new.size} seeds and the baseline {old.size}; "
                    "they are compared pair by pair, so give both for the same seeds"
                )
            change = _relative_change(new, old)
            relative.append(100 * sign * change)
            tiny_score = sign > 0 and abs(old.mean()) < near_zero and (change != 0).any()
            if tiny_score or (np.abs(change) * 100 > warn_above).any():
                sentences.append(
                    f"Task '{task}', metric '{metric}': the baseline ({old.mean():.4g}) is near zero beside the "
                    f"difference to it ({(new - old).mean():+.4g}), so the relative change "
                    f"({100 * sign * change.mean():+.0f} %) is unstable and may dominate Delta_m; compare the values"
                )
        gains[task] = _stack(relative, f"the metrics of task '{task}'").mean(axis=0)
    for sentence in sentences:
        warnings.warn(sentence, UserWarning, stacklevel=2)
    overall = _stack(list(gains.values()), "the tasks").mean(axis=0)
    return DeltaM(
        *_mean_and_stderr(overall),
        per_task={task: _mean_and_stderr(gain) for task, gain in gains.items()},
        n=overall.size,
        warnings=tuple(sentences),
    )


def delta_table(
    models: Mapping[str, Results],
    baseline: str,
    directions: "Directions | Sequence[Task]",
    *,
    warn_above: float = 50.0,
    near_zero: float = 0.05,
) -> dict[str, DeltaM]:
    """Gain of every model over one of them, named: `delta_table({...}, "single-task MLP", tasks)`.

    Args:
      models: model name -> its results, as in `delta_m`.
      baseline: name of the model that the others are compared with; its own gain is 0.
      directions: as in `delta_m`.
      warn_above, near_zero: as in `delta_m`.

    Returns:
      Model name -> gain, in the order of `models`.

    Raises:
      ValueError: if the baseline is not among the models, or as in `delta_m`.
    """
    if baseline not in models:
        raise ValueError(f"Baseline '{baseline}' is not among the models: {', '.join(models)}")
    table = {}
    for name, results in models.items():
        try:
            table[name] = delta_m(results, models[baseline], directions, warn_above=warn_above, near_zero=near_zero)
        except ValueError as error:
            raise ValueError(f"Model '{name}' against '{baseline}': {error}") from error
    return table


def _directions(directions: "Directions | Sequence[Task]") -> Directions:
    if isinstance(directions, Mapping):
        return directions
    return {task.name: {metric.name: metric.higher_is_better for metric in task.metrics} for task in directions}


def _direction(directions: Directions, task: str, metric: str) -> bool:
    if metric not in directions.get(task, {}):
        raise ValueError(
            f"No direction is given for metric '{metric}' of task '{task}'; "
            f"add directions['{task}']['{metric}'] = True if higher is better, else False"
        )
    return directions[task][metric]


def _same_keys(what: str, results: Mapping, baseline: Mapping) -> None:
    if results.keys() != baseline.keys():
        raise ValueError(
            f"Results and baseline must hold the same {what}; got {', '.join(results) or 'none'} "
            f"and {', '.join(baseline) or 'none'}"
        )


def _seeds(task: str, metric: str, values: ArrayLike, where: str) -> np.ndarray:
    """Values as float64 [S]."""
    array = np.atleast_1d(np.asarray(values, np.float64))
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"Task '{task}', metric '{metric}': expected a number or one number per seed in the {where}, "
            f"got an array of shape {array.shape}"
        )
    return array


def _stack(gains: list[np.ndarray], what: str) -> np.ndarray:
    counts = {gain.size for gain in gains}
    if len(counts) > 1:
        raise ValueError(f"All values must come from the same seeds, but {what} hold {sorted(counts)} seeds")
    return np.stack(gains)


def _relative_change(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """(new - old) / |old|, with 0 / 0 = 0 and x / 0 = +-inf."""
    difference = new - old
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / np.abs(old))


def _mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    if values.size == 1:
        return float(values[0]), math.nan
    with np.errstate(invalid="ignore"):  # Infinite gains have no spread.
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size))
