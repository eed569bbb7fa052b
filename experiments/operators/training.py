"""What the studies of operator learning do alike: the recipe, arms trained at equal budgets, choosing a learning rate.

An *arm* is one way to train: jointly on all tasks, separately, without the task's code, from given parameters. All
seeds and learning rates of an arm are lanes of one program; the rate is chosen on validation functions, by the mean
over tasks for a joint network, by each task for separate ones. The parameters are those after the last step, as the
learning rate has fallen to zero.

Letters: K tasks, S seeds, R learning rates, L lanes.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

import mtjax
from mtjax import dryrun, optim
from mtjax.metrics import Metric, relative_l2
from mtjax.models.mt_deeponet_training import small_optimizer
from mtjax.optim.base import Method
from mtjax.sharding import to_host
from mtjax.train import Problem, TrainConfig, fit_problem, report
from mtjax.train.compare import mean_and_se, verdict
from mtjax.train.evaluate import num_rows
from mtjax.train.state import OptimizerFactory
from mtjax.train.study import Found, Interrupted
from mtjax.train.study import main as run_any_study

PyTree = Any
MAIN = "relative_l2"
RESULTS = pathlib.Path(__file__).resolve().parent.parent / "results"


METHODS: dict[str, Callable[[], Method]] = {
    "uncertainty": optim.uncertainty,
    "pcgrad": optim.pcgrad,
    "fairgrad": lambda: optim.fairgrad(1.0),
    "nash_mtl": optim.nash_mtl,
    "upgrad": optim.upgrad,
}
"""Methods over tasks that a joint network can be trained with, beside the sum."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an arm is trained: Adam, a linear warm-up, then a cosine to zero.

    Attributes:
      steps: updates of every network.
      batch_size: functions per step.
      points_per_step: random query points per step, the same for all functions of a batch; None: all points.
      learning_rates: candidates, chosen on validation functions.
      warmup: share of the steps in which the rate rises.
      loss: 'relative_l2' of each function, or 'mse'.
    """

    steps: int = 3000
    batch_size: int = 64
    points_per_step: int | None = 256
    learning_rates: tuple[float, ...] = (2e-3, 5e-3)
    warmup: float = 0.07
    loss: str = "relative_l2"

    def __post_init__(self):
        if min(self.steps, self.batch_size) < 1:
            raise ValueError(f"steps and batch_size must be >= 1, got {self.steps} and {self.batch_size}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates must be at least one number > 0, got {self.learning_rates}")

    def shared_among(self, num_networks: int) -> "Recipe":
        """The same total of steps for several networks."""
        return dataclasses.replace(self, steps=max(1, self.steps // num_networks))

    def optimizer(self, steps: int) -> OptimizerFactory:
        """`learning_rate -> Adam` whose rate ends at zero after that many steps."""
        warmup = min(max(1, round(self.warmup * steps)), steps - 1)
        return lambda rate: small_optimizer(steps, rate, warmup)

    def budget(self, rows: int) -> tuple[TrainConfig, int]:
        """Configuration of the loop for a lane with that many rows, and its number of steps (whole epochs)."""
        per_epoch = max(1, rows // min(self.batch_size, rows))
        epochs = math.ceil(self.steps / per_epoch)
        config = TrainConfig(
            batch_size=self.batch_size,
            max_epochs=epochs,
            evals_per_epoch=min(1.0, 5 / epochs),
            patience=10**6,
            steps_per_dispatch=64,
        )
        return config, epochs * per_epoch


@dataclasses.dataclass(frozen=True)
class Arm:
    """What an arm came to.

    Attributes:
      name: of the arm.
      test: {task: {metric: f64[S]}} on test functions.
      validation: likewise.
      params: leaves [S, ...], or [S, K, ...] for separate networks.
      separate: whether each task has a network of its own.
      learning_rates: chosen, one per task.
      num_parameters: of all networks of one seed.
      steps: updates of all networks of one seed.
      functions_per_s: training functions per second of all lanes, after compilation.
      compile_s: seconds of the first dispatch.
    """

    name: str
    test: dict[str, dict[str, np.ndarray]]
    validation: dict[str, dict[str, np.ndarray]]
    params: PyTree
    separate: bool
    learning_rates: tuple[float, ...]
    num_parameters: int
    steps: int
    functions_per_s: float
    compile_s: float

    def mean(self, metric: str = MAIN) -> np.ndarray:
        """f64[S], mean over tasks of a metric on test functions."""
        return np.mean([metrics[metric] for metrics in self.test.values()], axis=0)

    def cost(self) -> dict[str, Any]:
        """What report rows carry beside the numbers."""
        return {
            "params": self.num_parameters,
            "steps": self.steps,
            "rows_per_s": self.functions_per_s,
            "compile_s": self.compile_s,
            "learning_rate": list(self.learning_rates),
        }

    def of_seed(self, seed: int, task: int) -> PyTree:
        """The parameters of a seed that predict a task."""
        return jax.tree.map(lambda leaf: leaf[seed, task] if self.separate else leaf[seed], self.params)


def train_arm(
    name: str,
    problem: Problem,
    test: Mapping[str, Any],
    recipe: Recipe,
    seeds: Sequence[int],
    directory: pathlib.Path,
    *,
    resume: bool,
    separate: bool = False,
    method: Method | None = None,
    start: PyTree | None = None,
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Arm:
    """Trains all seeds and learning rates of an arm at once, chooses the rate, and evaluates on test functions.

    Args:
      name: of the arm; also of its directory.
      problem: data and losses.
      test: the split to report on.
      recipe: how to train.
      seeds: the seeds.
      directory: for checkpoints.
      resume: go on from them.
      separate: one network for each task, on the rows of that task alone, each with `recipe.steps`.
      method: multi-objective method; None: the sum of the tasks' losses.
      start: parameters to begin with, leaves [S, ...].
      wrap: what to make of the optimiser, such as freezing parameters.
      record: checked on resume.

    Raises:
      Interrupted: if a signal ended it.
      ValueError: if `separate` is asked of tasks with unequal numbers of rows.
    """
    num_tasks, num_seeds = len(problem.tasks), len(seeds)
    rows = num_rows(problem.train)
    lane_rows, owners = None, [0]
    if separate:
        of_task = [np.flatnonzero(np.asarray(problem.train["task"]) == k) for k in range(num_tasks)]
        if len({len(of) for of in of_task}) > 1:
            raise ValueError(f"Separate networks need equal numbers of rows, got {[len(of) for of in of_task]}")
        rows, owners = len(of_task[0]), list(range(num_tasks))
    lanes = list(itertools.product(recipe.learning_rates, range(num_seeds), owners))
    if separate:
        lane_rows = np.stack([of_task[k] for _, _, k in lanes])
    config, steps = recipe.budget(rows)
    factory = recipe.optimizer(steps)
    fitted = fit_problem(
        problem,
        config=config,
        method=method,
        optimizer=factory if wrap is None else lambda rate: wrap(factory(rate)),
        seeds=[seeds[s] for _, s, _ in lanes],
        learning_rates=[rate for rate, _, _ in lanes],
        lane_rows=lane_rows,
        start=None if start is None else jax.tree.map(lambda leaf: np.stack([leaf[s] for _, s, _ in lanes]), start),
        directory=directory / slug(name),
        resume=resume,
        record={"arm": name, "recipe": dataclasses.asdict(recipe), **dict(record or {})},
        title=name,
    )
    if fitted.interrupted:
        raise Interrupted
    evaluate = problem.evaluator(False)
    params = to_host(fitted.state.params)
    shape = (len(recipe.learning_rates), num_seeds, len(owners))
    splits = [_reshaped(evaluate(params, split), shape) for split in (problem.validation, test)]
    own = (lambda k: k) if separate else (lambda k: 0)
    scores = np.stack(  # [R, K], mean over seeds
        [splits[0][task.name][MAIN][..., own(k)].mean(1) for k, task in enumerate(problem.tasks)], axis=1
    )
    chosen = scores.argmin(0) if separate else np.full(num_tasks, scores.mean(1).argmin())

    def choose(results):
        return {
            task.name: {name: values[chosen[k], :, own(k)] for name, values in results[task.name].items()}
            for k, task in enumerate(problem.tasks)
        }

    def of_chosen(leaf):
        leaf = leaf.reshape(*shape, *leaf.shape[1:])
        return np.stack([leaf[chosen[k], :, k] for k in range(num_tasks)], 1) if separate else leaf[chosen[0], :, 0]

    return Arm(
        name=name,
        test=choose(splits[1]),
        validation=choose(splits[0]),
        params=jax.tree.map(of_chosen, params),
        separate=separate,
        learning_rates=tuple(recipe.learning_rates[r] for r in (chosen if separate else chosen[:1])),
        num_parameters=fitted.num_parameters * len(owners),
        steps=steps * len(owners),
        functions_per_s=fitted.rows_per_s,
        compile_s=fitted.compile_s,
    )


def tasks_named(names: Iterable[str], measured: Sequence[Metric] = (relative_l2(),)) -> tuple[mtjax.Task, ...]:
    """Tasks of fields, judged by their relative error."""
    return tuple(mtjax.Task(name, "regression", metrics=tuple(measured)) for name in names)


def train_arms(
    arm: Callable[..., Arm],
    names: Sequence[str],
    how: Mapping[str, Mapping[str, Any]],
    methods: Sequence[str],
    joint: str,
) -> dict[str, Arm]:
    """Trains arms, then the joint one with other methods, and says what each came to.

    Args:
      arm: `(name, **options) -> Arm`.
      names: of the arms.
      how: options by name.
      methods: names in `METHODS`.
      joint: name of the joint arm.
    """
    wanted = {name: how[name] for name in names} | {f"{joint}, {name}": {"method": METHODS[name]()} for name in methods}

    def train(name: str) -> Arm:
        trained = arm(name, **wanted[name])
        say(trained)
        return trained

    return dryrun.each(list(wanted), train)


def arm_rows(arms: Mapping[str, Arm], baseline: str) -> list[report.Row]:
    """Report rows of the test errors of all arms, with what they cost."""
    return [
        row for name, arm in arms.items() for row in report.result_rows(name, arm.test, baseline=baseline, **arm.cost())
    ]


def _reshaped(results: Mapping[str, Mapping[str, np.ndarray]], shape: tuple[int, ...]):
    return {task: {name: v.reshape(shape) for name, v in metrics.items()} for task, metrics in results.items()}


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def say(arm: Arm) -> None:
    """One line on an arm."""
    errors = ", ".join(f"{task} {100 * metrics[MAIN].mean():.2f}" for task, metrics in arm.test.items())
    rates = ", ".join(f"{rate:g}" for rate in sorted(set(arm.learning_rates)))
    print(f"{arm.name}: test error in %: {errors}; rate {rates}, {arm.steps} steps", flush=True)


def mean_field_error(tasks: Sequence[mtjax.Task], train: Mapping[str, Any], test: Mapping[str, Any], mask=None):
    """{task: {'relative_l2': f64[1]}} of predicting the mean training field of the task: no learning."""
    results = {}
    for k, task in enumerate(tasks):
        mean = np.asarray(train["values"], np.float64)[train["task"] == k].mean(0)
        fields = np.asarray(test["values"], np.float64)[test["task"] == k]
        inside = slice(None) if mask is None else mask[k]
        error = np.linalg.norm((fields - mean)[:, inside], axis=1) / np.linalg.norm(fields[:, inside], axis=1)
        results[task.name] = {MAIN: np.array([error.mean()])}
    return results


def against(
    claim: str, ours: Arm, other: Arm, *, factor: float = 1.0, better: bool = True, metric: str = MAIN
) -> report.Finding:
    """The finding that the mean error of `ours` is below `factor` times that of `other` (or above, if not `better`).

    By a paired t-test over seeds on the mean over tasks; a claim that does not hold for the mean of every task is open.
    """
    difference = 100 * (factor * other.mean(metric) - ours.mean(metric)) * (1 if better else -1)
    mean, se = mean_and_se(difference)
    holds = verdict(mean, se, difference.size)
    pairs = {task: (ours.test[task][metric].mean(), other.test[task][metric].mean()) for task in ours.test}
    if holds and any((a < factor * b) != better for a, b in pairs.values()):
        holds = None
    shown = ", ".join(f"{task} {100 * a:.2f} against {100 * b:.2f}" for task, (a, b) in pairs.items())
    times = "" if factor == 1 else f" (with {factor:g} x the other's)"
    reason = f"error in %: {shown}; difference of the means{times} {mean:+.2f} ± {se:.2f}"
    theirs, mine = (
        f"{arm.name}: {report.format_mean(*mean_and_se(100 * arm.mean(metric)))} %" for arm in (other, ours)
    )
    return report.Finding(claim, theirs, mine, holds, reason)


def findings(asked: Sequence[tuple[str, str, str, Mapping[str, Any]]], arms: Mapping[str, Arm]) -> list[report.Finding]:
    """`against` for every (claim, arm, other arm, options) whose arms were trained."""
    return [against(claim, arms[a], arms[b], **how) for claim, a, b, how in asked if {a, b} <= arms.keys()]


def check_names(field: str, names: Sequence[str], known: Sequence[str], required: Sequence[str] = ()) -> None:
    """Raises a ValueError if a name is unknown, or a required one is missing."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{field}: there is no '{unknown[0]}'; choose among {', '.join(known)}")
    missing = [name for name in required if name not in names]
    if missing:
        raise ValueError(f"{field} must hold '{missing[0]}', got {', '.join(names) or 'none'}")


def run_study(
    argv: Sequence[str] | None,
    description: str,
    system: str,
    presets: Mapping[str, Any],
    body: Callable[[Any, pathlib.Path, bool], Found],
) -> int:
    """A script of this family: its numbers are errors."""
    return run_any_study(argv, description, system, presets, body, RESULTS, {"higher_is_better": False})
