"""What the studies of dense vision tasks do alike: the recipe, arms trained at equal budgets, Delta_m, verdicts.

An *arm* is one model. Its learning rate is chosen on validation images with the first seed and a shorter budget, the
same candidates and budget for every arm; then all seeds are trained at once, as lanes of one program. The parameters
are those after the last step, as the learning rate has fallen to zero.

Letters: K tasks, S seeds, R learning rates.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from mtjax.delta import delta_m, delta_table
from mtjax.optim.base import Method
from mtjax.sharding import to_host
from mtjax.train import Problem, TrainConfig, fit_problem, report
from mtjax.train.compare import mean_and_se, verdict
from mtjax.train.evaluate import Results, main_scores, num_rows
from mtjax.train.state import OptimizerFactory
from mtjax.train.study import Found, Interrupted
from mtjax.train.study import main as run_any_study

PyTree = Any
RESULTS = pathlib.Path(__file__).resolve().parent.parent / "results"
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an arm is trained: AdamW, gradients clipped, a linear warm-up, then a cosine to zero.

    Attributes:
      steps: updates.
      batch_size: images per step.
      learning_rates: candidates.
      tuning_steps: updates with each candidate, on the first seed, by which the rate is chosen; with one candidate
        there is nothing to choose.
      warmup: share of the steps in which the rate rises.
      weight_decay: of AdamW.
    """

    steps: int = 1000
    batch_size: int = 8
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    tuning_steps: int = 250
    warmup: float = 0.05
    weight_decay: float = 1e-4

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.tuning_steps) < 1:
            raise ValueError(
                "steps, batch_size and tuning_steps must be >= 1, got "
                f"{self.steps}, {self.batch_size} and {self.tuning_steps}"
            )
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates must be at least one number > 0, got {self.learning_rates}")

    def optimizer(self, steps: int) -> OptimizerFactory:
        """`learning_rate -> AdamW` whose rate ends at zero after that many steps."""
        warmup = min(max(1, round(self.warmup * steps)), max(1, steps - 1))
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(steps, warmup + 1))

        def make(rate):
            return optax.adamw(lambda count: rate * shape(count), weight_decay=self.weight_decay)

        return make

    def budget(self, steps: int, rows: int) -> tuple[TrainConfig, int]:
        """Configuration of the loop, and the number of steps (whole epochs)."""
        per_epoch = max(1, rows // min(self.batch_size, rows))
        epochs = math.ceil(steps / per_epoch)
        config = TrainConfig(
            batch_size=self.batch_size,
            max_epochs=epochs,
            evals_per_epoch=min(1.0, 2 / epochs),
            patience=10**6,
            steps_per_dispatch=16,
        )
        return config, epochs * per_epoch


@dataclasses.dataclass(frozen=True)
class Arm:
    """What an arm came to.

    Attributes:
      name: of the arm.
      tasks: its tasks.
      test: {task: {metric: f64[S]}} on test images.
      validation: likewise.
      params: leaves [S, ...].
      carry: what its losses carried at the end, leaves [S, ...].
      model: the module.
      learning_rate: chosen.
      num_parameters: of one seed.
      steps: updates.
      images_per_s: training images per second of all lanes, after compilation.
      compile_s: seconds of the first dispatch.
    """

    name: str
    tasks: Sequence[Any]
    test: Results
    validation: Results
    params: PyTree
    carry: PyTree
    model: Any
    learning_rate: float
    num_parameters: int
    steps: int
    images_per_s: float
    compile_s: float

    @property
    def main(self) -> Results:
        """{task: {main metric: f64[S]}} on test images: what Delta_m is made of."""
        return main_results(self.tasks, self.test)

    def of_seed(self, seed: int) -> PyTree:
        """The parameters of one seed."""
        return jax.tree.map(lambda leaf: leaf[seed], self.params)

    def cost(self) -> dict[str, Any]:
        """What report rows carry beside the numbers."""
        return {
            "params": self.num_parameters,
            "steps": self.steps,
            "rows_per_s": self.images_per_s,
            "compile_s": self.compile_s,
            "learning_rate": self.learning_rate,
        }


def main_results(tasks: Sequence[Any], results: Results) -> Results:
    """The main metric of every task."""
    return {task.name: {task.main_metric.name: results[task.name][task.main_metric.name]} for task in tasks}


def scale_free_score(tasks: Sequence[Any], results: Results) -> np.ndarray:
    """f64[L]: mean over tasks of the logarithm of the main metric, signed: a ratio counts alike in all units."""
    scores = main_scores(tasks, results)
    return (np.where(scores < 0, -1.0, 1.0) * np.log(np.maximum(np.abs(scores), 1e-6))).mean(axis=1)


def train_arm(
    name: str,
    model: Any,
    problem: Problem,
    test: Mapping[str, Any],
    recipe: Recipe,
    seeds: Sequence[int],
    directory: pathlib.Path,
    *,
    resume: bool,
    method: Method | None = None,
    start: PyTree | None = None,
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] | None = None,
    judge: Callable[[PyTree], tuple[Sequence[Any], Callable[..., Results]]] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Arm:
    """Chooses the learning rate of an arm, trains all its seeds at once, and evaluates on test images.

    Args:
      name: of the arm; also of its directory.
      model: what the problem trains, kept in the result.
      problem: data and losses.
      test: the split to report on.
      recipe: how to train.
      seeds: the seeds.
      directory: for checkpoints.
      resume: go on from them.
      method: multi-objective method; None: the sum of the losses.
      start: parameters to begin with, leaves [S, ...].
      wrap: what to make of the optimiser, such as freezing parameters.
      judge: `params -> (tasks, evaluate)`, how the trained parameters are judged in the end; None: as in training.
      record: checked on resume.

    Raises:
      Interrupted: if a signal ended it.
    """

    def fit(steps, seeds, rates, begin, folder, title):
        config, steps = recipe.budget(steps, num_rows(problem.train))
        factory = recipe.optimizer(steps)
        fitted = fit_problem(
            problem,
            config=config,
            method=method,
            optimizer=factory if wrap is None else lambda rate: wrap(factory(rate)),
            seeds=seeds,
            learning_rates=rates,
            start=begin,
            directory=directory / slug(name) / folder,
            resume=resume,
            record={"arm": name, "recipe": dataclasses.asdict(recipe), **dict(record or {})},
            title=title,
        )
        if fitted.interrupted:
            raise Interrupted
        return fitted, steps

    evaluate, rates = problem.evaluator(False), list(recipe.learning_rates)
    if len(rates) > 1:
        begin = None if start is None else jax.tree.map(lambda leaf: np.stack([leaf[0]] * len(rates)), start)
        tried, _ = fit(recipe.tuning_steps, [seeds[0]] * len(rates), rates, begin, "tuning", f"{name}, learning rate")
        scores = scale_free_score(problem.tasks, evaluate(tried.state.params, problem.validation))
        rates = [rates[int(np.argmax(np.where(np.isnan(scores), -np.inf, scores)))]]
    fitted, steps = fit(recipe.steps, list(seeds), rates * len(seeds), start, "seeds", name)
    params = to_host(fitted.state.params)
    tasks, evaluate = (tuple(problem.tasks), evaluate) if judge is None else judge(params)
    arm = Arm(
        name=name,
        tasks=tasks,
        test=evaluate(params, test),
        validation=evaluate(params, problem.validation),
        params=params,
        carry=to_host(fitted.state.carry),
        model=model,
        learning_rate=rates[0],
        num_parameters=fitted.num_parameters,
        steps=steps,
        images_per_s=fitted.rows_per_s,
        compile_s=fitted.compile_s,
    )
    shown = ", ".join(f"{task} {next(iter(m.values())).mean():.3f}" for task, m in arm.main.items())
    print(f"{name}: {shown}; rate {rates[0]:g}, {steps} steps, {arm.images_per_s:.0f} images/s", flush=True)
    return arm


def arm_rows(arms: Sequence[Arm], baseline: str, no_learning: Mapping[str, Results] | None = None) -> list[report.Row]:
    """Report rows: every metric of every arm, what it costs, Delta_m over the baseline, and the no-learning baselines.

    Args:
      arms: the arms.
      baseline: name of the arm that Delta_m refers to.
      no_learning: name -> {task: {metric: value}}.
    """
    rows = []
    tasks = arms[0].tasks
    ways = {task.name: {m.name: m.higher_is_better for m in task.metrics} for task in tasks}
    for name, results in (no_learning or {}).items():
        rows += report.result_rows(name, results)
    for arm in arms:
        rows += report.result_rows(arm.name, arm.test, baseline=baseline, **arm.cost())
    for row in rows:
        way = ways.get(row["task"], {}).get(row["metric"])
        if way is not None:
            row["higher_is_better"] = way
    if baseline in {arm.name for arm in arms}:
        gains = delta_table({arm.name: arm.main for arm in arms}, baseline, tasks, warn_above=math.inf, near_zero=0.0)
        rows += [row | {"higher_is_better": True} for row in report.delta_rows(gains, baseline)]
    return rows


def gain(ours: Results, theirs: Results, tasks: Sequence[Any]) -> tuple[float, float, int]:
    """Delta_m of one over the other over paired seeds: mean, standard error and number of seeds."""
    delta = delta_m(ours, theirs, tasks, warn_above=math.inf, near_zero=0.0)
    return delta.mean, delta.stderr, delta.n


def gain_by_seed(ours: Results, theirs: Results, tasks: Sequence[Any]) -> np.ndarray:
    """f64[S]: Delta_m in percent of every seed."""
    of_seed = [
        [
            {task: {name: values[seed] for name, values in metrics.items()} for task, metrics in results.items()}
            for results in (ours, theirs)
        ]
        for seed in range(len(next(iter(next(iter(ours.values())).values()))))
    ]
    return np.array([gain(*pair, tasks)[0] for pair in of_seed])


def beats(claim: str, ours: Arm, other: Arm) -> report.Finding:
    """The finding that Delta_m of `ours` over `other` is positive, by a paired t-test over seeds."""
    delta = delta_m(ours.main, other.main, ours.tasks, warn_above=math.inf, near_zero=0.0)
    tasks = ", ".join(f"{task} {mean:+.1f} ± {se:.1f}" for task, (mean, se) in delta.per_task.items())
    reason = f"Delta_m over '{other.name}' {delta.mean:+.2f} ± {delta.stderr:.2f} % (by task: {tasks})"
    held = verdict(delta.mean, delta.stderr, delta.n)
    return report.Finding(
        claim, other.name, f"{ours.name}: {report.format_mean(delta.mean, delta.stderr)} %", held, reason
    )


def measured(claim: str, baseline: str, values: np.ndarray, *, above: float, unit: str = "") -> report.Finding:
    """The finding that a number measured for each seed, f64[S], lies above a bound, by a t-test."""
    values = np.asarray(values, np.float64)
    mean, se = mean_and_se(values)
    held = verdict(mean - above, se, values.size) if se > 0 else bool(mean > above)
    ours = f"{report.format_mean(mean, se)}{unit}"
    return report.Finding(claim, baseline, ours, held, f"{ours}, to be above {above:g}{unit}")


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def run_study(
    argv: Sequence[str] | None,
    description: str,
    system: str,
    presets: Mapping[str, Any],
    body: Callable[[Any, pathlib.Path, bool], Found],
) -> int:
    """A script of this family."""
    return run_any_study(argv, description, system, presets, body, RESULTS)
