"""The runs of `flat_regions.py`: a method alone, with more epochs, with SAM, over flat regions; and what they come to.

One training gives two results: the parameters after the last epoch, which is how the paper trains, and those of the
epoch with the best validation score ("early stopping"). Learning rate and radius are chosen for each by itself.

Letters: K tasks, S seeds, R learning rates, L = R x S lanes, P parameters.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import methods
import numpy as np
from flax import linen as nn

import mtjax
from mtjax import metrics, optim
from mtjax.data import digits
from mtjax.models import mlp_baselines
from mtjax.train import evaluate, loop, select
from mtjax.train.step import supervised_loss

PyTree = Any
Variant = Literal["", ", more epochs", " + SAM", " + flat regions"]
PLAIN, LONGER, SAM, FLAT = VARIANTS = ("", ", more epochs", " + SAM", " + flat regions")
"""What follows the name of a method in tables."""
STOPS = ("last epoch", "early stopping")
SINGLE = "single task"
ECE, SHARPNESS = "expected_calibration_error", "sharpness"


def _overconfidence(prediction: jax.Array, label: jax.Array) -> jax.Array:
    """Probability of the predicted class, minus 1 where it is right."""
    if prediction.ndim == label.ndim:
        return jnp.maximum(prediction, 1 - prediction) - ((prediction > 0.5) == (label == 1))
    return prediction.max(-1) - (prediction.argmax(-1) == label)


OVERCONFIDENCE = metrics.weighted_mean("overconfidence", _overconfidence, higher_is_better=False)
"""Mean confidence minus accuracy: which way a calibration error goes. Below 0: right more often than it claims."""
# Fewer than the task has: the areas under ROC curves of these runs would take longer than the runs.
OF_CLASSES = (metrics.accuracy(), metrics.log_loss(), metrics.expected_calibration_error(), OVERCONFIDENCE)
OF_VALUES = (metrics.explained_variance(), metrics.rmse())

TRAIN = loop.TrainConfig(batch_size=25, max_epochs=60, patience=10_000)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and budgets. `--set train_rows=100 train.max_epochs=40` overrides any field.

    Attributes:
      methods: methods to wrap.
      label_noise: shares of wrong labels, each a comparison of its own.
      train_rows: training rows; 300 and 600 validate and test, with true labels.
      tasks: of the digits, at least one of them with classes.
      data_seed: which rows these are, and which labels are wrong.
      hidden: hidden widths; heads are linear.
      learning_rates: of AdamW; chosen on validation rows, as are the
      radii: of the perturbations, the same candidates for SAM and flat regions.
      sharpness_radius: of the perturbation by which sharpness is measured, the same for all.
      seeds: number of seeds.
      train: see `TrainConfig`.
    """

    methods: tuple[str, ...] = ("Sum", "PCGrad", "CAGrad", "IMTL-G", "Nash-MTL")
    label_noise: tuple[float, ...] = (0.0, 0.3)
    train_rows: int = 200
    tasks: tuple[str, ...] = tuple(task.name for task in digits.TASKS)
    data_seed: int = 0
    hidden: tuple[int, ...] = (128,)
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    radii: tuple[float, ...] = (0.01, 0.03, 0.1)
    sharpness_radius: float = 0.05
    seeds: int = 5
    train: loop.TrainConfig = TRAIN

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {self.seeds}")
        for name in ("methods", "label_noise", "tasks", "learning_rates", "radii"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold at least one value and none twice, got {values}")
        if not set(self.tasks) & set(digits.CLASSES):
            raise ValueError(f"tasks must hold one of {', '.join(digits.CLASSES)}, got {', '.join(self.tasks)}")
        if min(*self.learning_rates, *self.radii, self.sharpness_radius) <= 0:
            raise ValueError(
                f"learning_rates, radii and sharpness_radius must be > 0, got {self.learning_rates}, {self.radii} and "
                f"{self.sharpness_radius}"
            )


PAPER = Config()
DEMO = dataclasses.replace(
    PAPER, methods=("Sum", "PCGrad"), label_noise=(0.3,), learning_rates=(1e-3, 3e-3), radii=(0.01, 0.1), seeds=5
)
SMOKE = Config(
    methods=("Sum",),
    label_noise=(0.3,),
    train_rows=60,
    tasks=("odd", "ink"),
    hidden=(8,),
    learning_rates=(3e-3,),
    radii=(0.05,),
    seeds=2,
    train=loop.TrainConfig(batch_size=20, max_epochs=2, patience=10_000),
)
PRESETS = {"smoke": SMOKE, "demo": DEMO, "paper": PAPER}


def load(config: Config, label_noise: float) -> Any:
    """The digits, with the metrics of this experiment."""
    data = digits.load(config.train_rows, label_noise=label_noise, seed=config.data_seed, tasks=config.tasks)
    tasks = tuple(
        dataclasses.replace(task, metrics=OF_VALUES if task.kind == "regression" else OF_CLASSES) for task in data.tasks
    )
    return dataclasses.replace(data, tasks=tasks)


# Methods, and what their steps cost.


def is_shared(path: str) -> bool:
    """Whether the parameter at a "/"-joined path belongs to several tasks: all but the heads."""
    return "heads" not in path.split("/")


def base_method(name: str) -> optim.Method:
    """The method on the shared parameters, as in the paper; heads follow their own tasks."""
    return optim.on_shared(methods.METHODS[name].make(), is_shared)


def build(name: str, variant: Variant, rho: float | None) -> optim.Method:
    """A variant of a method; the radius counts for SAM and flat regions only."""
    method = base_method(name)
    if variant == SAM:
        return optim.sam(method, rho)
    return optim.flat_regions(method, rho) if variant == FLAT else method


def passes(name: str, variant: Variant, num_tasks: int) -> int:
    """What a step costs in forward passes, a backward pass counting as two; K tasks.

    One forward and one backward pass, K more backward passes if the method reads gradients; SAM one of each more; flat
    regions K backward passes here, and one of each at K perturbed points.

    >>> [passes("Sum", variant, num_tasks=6) for variant in (PLAIN, SAM, FLAT)]
    [3, 6, 31]
    """
    if variant == FLAT:
        return 1 + 2 * num_tasks + 3 * num_tasks
    weighting = base_method(name).weighting
    reads_gradients = weighting is None or weighting.needs_gramian
    return 3 + 2 * num_tasks * reads_gradients + 3 * (variant == SAM)


def epochs(name: str, variant: Variant, config: Config, num_tasks: int) -> int:
    """Those of the configuration; with more epochs as many as cost what flat regions cost in these."""
    times = passes(name, FLAT, num_tasks) / passes(name, PLAIN, num_tasks) if variant == LONGER else 1.0
    return round(config.train.max_epochs * times)


# Training and measuring.


@dataclasses.dataclass(frozen=True)
class Stop:
    """What a setting came to at one of the two stops.

    Attributes:
      validation_score: mean over seeds and tasks of the main metric on validation rows, larger is better.
      learning_rates: chosen, of each task (all alike unless these are single-task models).
      rho: radius of the perturbation, None without.
      epoch: f64[S], mean number of epochs.
      test: metrics f64[S] on test rows; `sharpness` is that of the training loss.
    """

    validation_score: float
    learning_rates: list[float]
    rho: float | None
    epoch: np.ndarray
    test: dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one training came to, for all seeds.

    Attributes:
      stops: by the names of `STOPS`.
      params: scalars in the parameters.
      rows_per_s: training rows per second of all lanes together.
      wall_s: seconds of everything.
    """

    stops: dict[str, Stop]
    params: int
    rows_per_s: float
    wall_s: float

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=np.ndarray.tolist)

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        fields = json.loads(text)
        stops = {}
        for stop, of in fields["stops"].items():
            test = {task: {name: np.asarray(v) for name, v in of_task.items()} for task, of_task in of["test"].items()}
            stops[stop] = Stop(**of | {"test": test, "epoch": np.asarray(of["epoch"])})
        return cls(**fields | {"stops": stops})


@functools.cache
def model_of(single: bool, heads: tuple[tuple[str, int], ...], num_numeric: int, hidden: tuple[int, ...]) -> nn.Module:
    """The shared bottom, or one MLP of the same widths per task. Embeddings of width 1 that start as the identity."""
    preset = mlp_baselines.single_task if single else mlp_baselines.shared_bottom
    return preset(dict(heads), (), num_numeric, features=hidden, tower=(), width=1, embedding_init=nn.initializers.ones)


@functools.cache
def evaluation(model: nn.Module, tasks: tuple[mtjax.Task, ...], per_task: bool):
    """One program for all variants of all methods."""
    return evaluate.make_evaluate(model, tasks, per_task=per_task)


@functools.cache
def make_sharpness(model: nn.Module, tasks: tuple[mtjax.Task, ...], radius: float):
    """`(params [L, ...], batch) -> f32[L, K]`: L_k(theta + radius g_k / |g_k|) - L_k(theta), over all parameters.

    0 for a task whose gradient is zero.
    """
    loss_fn = supervised_loss(model, tasks)

    def sharpness(params, batch):
        def losses(p):
            return jnp.stack(list(loss_fn(p, batch, jax.random.key(0)).values()))

        here, pullback = jax.vjp(losses, params)

        def of_task(cotangent):
            gradient = pullback(cotangent)[0]
            norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
            scale = radius / jnp.where(norm > 0, norm, 1.0)
            away = jax.tree.map(lambda p, g: p + scale * g, params, gradient)
            return jnp.vdot(cotangent, losses(away) - here)

        return jax.vmap(of_task)(jnp.eye(len(tasks)))

    return jax.jit(jax.vmap(sharpness, in_axes=(0, None)))


def measure(name: str, variant: Variant, rho: float | None, data: Any, config: Config, title: str) -> Outcome | None:
    """Trains every learning rate and seed at once, and evaluates at both stops; None if a signal interrupted it."""
    began = time.perf_counter()
    single, tasks = name == SINGLE, tuple(data.tasks)
    model = model_of(single, tuple(mtjax.head_sizes(tasks).items()), data.num_numeric, config.hidden)
    lanes = [(seed, rate) for rate in config.learning_rates for seed in range(config.seeds)]
    max_epochs = config.train.max_epochs if single else epochs(name, variant, config, len(tasks))
    fitted = loop.fit(
        model,
        tasks,
        data.train,
        data.validation,
        config=dataclasses.replace(config.train, max_epochs=max_epochs),
        method=optim.linear() if single else build(name, variant, rho),
        seeds=[seed for seed, _ in lanes],
        learning_rates=[rate for _, rate in lanes],
        per_task=single,
        title=title,
    )
    if fitted.interrupted:
        return None
    steps = {STOPS[0]: np.asarray(fitted.state.step)[:, None], STOPS[1]: np.asarray(fitted.state.best.step)}
    steps_per_epoch = fitted.history[-1]["step"] / fitted.history[-1]["epoch"]
    stops = {}
    for stop, params in zip(STOPS, (fitted.state.params, fitted.best_params), strict=True):
        per_task = single and stop == STOPS[1]
        at_stop = functools.partial(evaluation(model, tasks, per_task), params)
        choice = select.choose_learning_rate(tasks, fitted, at_stop(data.validation))
        results = at_stop(data.test)
        if not single:
            split = jax.tree.map(jnp.asarray, dict(data.train))
            values = np.asarray(make_sharpness(model, tasks, config.sharpness_radius)(params, split), np.float64)
            for k, task in enumerate(tasks):
                results[task.name][SHARPNESS] = values[:, k]
        epoch = np.broadcast_to(steps[stop], (len(lanes), len(tasks)))[choice.lanes, np.arange(len(tasks))[:, None]]
        stops[stop] = Stop(
            choice.validation_score,
            list(choice.learning_rates),
            rho,
            epoch.mean(axis=0) / steps_per_epoch,
            choice.results(results),
        )
    wall_s = time.perf_counter() - began
    return Outcome(stops, fitted.num_parameters, fitted.rows_per_s, wall_s)


def choose_radius(candidates: Sequence[Outcome]) -> Mapping[str, Stop]:
    """For each stop the candidate with the best validation score."""
    return {stop: max((of.stops[stop] for of in candidates), key=lambda s: s.validation_score) for stop in STOPS}
