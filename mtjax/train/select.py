"""Choosing among the lanes of a fit: the learning rate by validation score, equally for every model of a comparison.

A multitask model has one learning rate, the best for the mean over tasks of the main metric. Single-task models are
separate runs that share a program, so each task takes its own best rate (and, by `fit(per_task=True)`, its own epoch).

Letters: L lanes = R learning rates x S seeds, K tasks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mtjax import sharding
from mtjax.tasks import Task
from mtjax.train.evaluate import Results, main_scores, undefined_scores
from mtjax.train.loop import Fit

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen learning rate.

    Attributes:
      lanes: i[K, S], for each task the lanes of its chosen rate, one per seed. Equal rows for a multitask model.
      learning_rates: K chosen rates.
      per_task: whether the tasks chose apart.
      validation_score: mean over seeds and tasks of the main metric (signed: larger is better) on validation rows.
    """

    lanes: np.ndarray
    learning_rates: tuple[float, ...]
    per_task: bool
    validation_score: float

    def results(self, results: Results) -> Results:
        """Metrics f64[S] of the chosen lanes out of metrics f64[L]."""
        return {
            task: {name: values[lanes] for name, values in metrics.items()}
            for (task, metrics), lanes in zip(results.items(), self.lanes, strict=True)
        }

    def params(self, fitted: Fit) -> PyTree:
        """Best parameters of the chosen lanes: leaves [S, ...], or [S, K, ...] if chosen per task."""
        if not self.per_task:
            return jax.tree.map(lambda leaf: leaf[self.lanes[0]], sharding.to_host(fitted.best_params))

        def pick(leaf):
            return np.stack([leaf[lanes, k] for k, lanes in enumerate(self.lanes)], axis=1)

        return jax.tree.map(pick, sharding.to_host(fitted.best_params))


def choose_learning_rate(tasks: Sequence[Task], fitted: Fit, validation: Results) -> Choice:
    """Picks the learning rate of a fit whose lanes are the product of rates and seeds.

    Args:
      tasks: the tasks.
      fitted: the fit.
      validation: metrics f64[L] of its best parameters on validation rows.

    Returns:
      The choice. Tasks without a score (no validation labels) are left out of means; a rate under which a lane has no
      score where others have one is not chosen.
    """
    rates = list(dict.fromkeys(fitted.learning_rates))
    lanes_of = [np.flatnonzero(np.asarray(fitted.learning_rates) == rate) for rate in rates]
    scores = main_scores(tasks, validation)
    defined = ~undefined_scores(tasks, validation)
    by_rate = np.stack([scores[lanes].mean(axis=0) for lanes in lanes_of])  # [R, K]
    if fitted.per_task:
        picked = np.argmax(np.where(np.isnan(by_rate), -np.inf, by_rate), axis=0)
    else:
        means = by_rate[:, defined].mean(axis=1) if defined.any() else by_rate[:, 0]
        picked = np.full(len(tasks), np.argmax(np.where(np.isnan(means), -np.inf, means)))
    best = by_rate[picked, np.arange(len(tasks))][defined]
    return Choice(
        lanes=np.stack([lanes_of[r] for r in picked]),
        learning_rates=tuple(rates[r] for r in picked),
        per_task=fitted.per_task,
        validation_score=float(best.mean()) if defined.any() else float("nan"),
    )
