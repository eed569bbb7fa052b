"""One method on one data set: training at every learning rate and seed at once, and what came of it, on file.

Letters: S seeds, K tasks.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from competitors import SINGLE, Config, Source, build, make_model

import mtjax
from mtjax import optim
from mtjax.train import loop, select
from mtjax.train.evaluate import main_scores


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a method came to on a data set; letters: S seeds, K tasks.

    Attributes:
      test: metrics f64[S] on test rows; NaN if it diverged at every learning rate.
      validation_score: mean over seeds and tasks of the main metric.
      learning_rates: chosen, of each task.
      setting: hyper-parameters that were chosen; those left out are the paper's.
      diverged: learning rates at which a loss or a parameter became NaN or infinite.
      conflicts: share of the pairs of tasks whose gradients oppose each other, over the evaluations of the first lane.
      params: scalars in the parameters.
      rows_per_s: training rows per second of all seeds and rates together.
      compile_s: seconds of the first dispatch.
      wall_s: seconds of everything, all settings together.
    """

    test: dict[str, dict[str, np.ndarray]]
    validation_score: float
    learning_rates: list[float]
    setting: dict[str, Any]
    diverged: list[float]
    conflicts: float
    params: int
    rows_per_s: float
    compile_s: float
    wall_s: float

    def score(self, tasks: Sequence[mtjax.Task]) -> np.ndarray:
        """f64[S]: mean over tasks of the main metric, larger is better."""
        return main_scores(tasks, self.test).mean(axis=1)

    def main(self, tasks: Sequence[mtjax.Task]) -> dict[str, dict[str, np.ndarray]]:
        """The main metric of each task alone."""
        return {task.name: {task.main_metric.name: self.test[task.name][task.main_metric.name]} for task in tasks}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=np.ndarray.tolist)

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        fields = json.loads(text)
        test = {task: {name: np.asarray(v) for name, v in of.items()} for task, of in fields["test"].items()}
        return cls(**fields | {"test": test})


def measure(name: str, data: Any, config: Config, source: Source, setting: Mapping[str, Any]) -> Outcome | None:
    """Trains a method at every rate and seed at once, chooses the rate, evaluates; None if a signal interrupted it."""
    began = time.perf_counter()
    train = loop.TrainConfig(
        batch_size=source.batch_size,
        max_epochs=source.epochs,
        patience=source.epochs + 1,  # equal budgets: no run stops early
        steps_per_dispatch=config.steps_per_dispatch,
        conflict_rows=config.conflict_rows,
    )
    rates, diverged, fitted = sorted(config.learning_rates), [], None
    while rates and fitted is None:
        lanes = [(seed, rate) for rate in rates for seed in range(config.seeds)]
        try:
            fitted = loop.fit(
                make_model(name, data, config),
                data.tasks,
                data.train,
                data.validation,
                config=train,
                method=optim.linear() if name == SINGLE else build(name, setting),
                seeds=[seed for seed, _ in lanes],
                learning_rates=[rate for _, rate in lanes],
                per_task=name == SINGLE,
                progress=False,
            )
        except loop.NonFiniteLossError as error:
            print(f"  {name}: {error}", flush=True)
            diverged.append(rates.pop())
    if fitted is None:
        nothing = np.full(config.seeds, np.nan)
        test = {task.name: {metric.name: nothing for metric in task.metrics} for task in data.tasks}
        unknown = dict.fromkeys(("validation_score", "conflicts", "rows_per_s", "compile_s"), math.nan)
        wall = time.perf_counter() - began
        return Outcome(test, learning_rates=[], setting=setting, diverged=diverged, params=0, wall_s=wall, **unknown)
    if fitted.interrupted:
        return None
    choice = select.choose_learning_rate(data.tasks, fitted, fitted.evaluate(data.validation))
    pairs = np.triu_indices(len(data.tasks), 1)
    cosines = np.asarray([np.asarray(entry["cosine"])[pairs] for entry in fitted.history])
    return Outcome(
        test=choice.results(fitted.evaluate(data.test)),
        validation_score=choice.validation_score,
        learning_rates=list(choice.learning_rates),
        setting=dict(setting),
        diverged=diverged,
        conflicts=float((cosines < 0).mean()),
        params=fitted.num_parameters,
        rows_per_s=fitted.rows_per_s,
        compile_s=fitted.compile_s,
        wall_s=time.perf_counter() - began,
    )


def best(candidates: Sequence[Outcome]) -> Outcome:
    """The candidate with the best validation score, with the time of all of them."""
    scores = [-math.inf if math.isnan(of.validation_score) else of.validation_score for of in candidates]
    return dataclasses.replace(candidates[int(np.argmax(scores))], wall_s=sum(of.wall_s for of in candidates))
