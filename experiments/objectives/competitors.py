"""Who competes in `compare.py`, on which data, and with what budget.

The methods are those of `methods.py`, and one more: the *tuned sum*, a weighted sum whose weights are chosen on
validation rows. Everyone trains the same shared-bottom MLP; the baseline is one MLP per task.

Letters: K tasks.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import methods
import numpy as np
from flax import linen as nn
from methods import Entry

import mtjax
from mtjax import data as sources
from mtjax import optim
from mtjax.data import digits
from mtjax.models import mlp_baselines

SINGLE, SUM, TUNED = "single task", "Sum", "tuned sum"


class FixedWeights(NamedTuple):
    """State of `fixed_weights`; numbers that vary are state, so that all candidates share one compiled step.

    Attributes:
      factors: f[K], c.
      power: f[], p.
      initial: f[K], losses at the first update; 0 before.
    """

    factors: jax.Array
    power: jax.Array
    initial: jax.Array


def fixed_weights(draw: int | None = None, power: float = 0.0) -> optim.Method:
    """A weighted sum, w_k = c_k L_k(0)^-p: the plain sum for p = 0, equal relative losses for p = 1.

    Args:
      draw: c is uniform on the simplex, times K, from this seed; None: c_k = 1.
      power: p.
    """

    def init(num_tasks):
        factors = np.ones(num_tasks)
        if draw is not None:
            factors = num_tasks * np.random.default_rng(draw).dirichlet(factors)
        return FixedWeights(jnp.asarray(factors), jnp.asarray(power), jnp.zeros(num_tasks))

    def weigh(gramian, losses, state, present):
        del gramian
        initial = jnp.where(state.initial > 0, state.initial, losses)
        weights = state.factors * jnp.where(initial > 0, initial, 1.0) ** -state.power
        return jnp.where(present, weights, 0.0), state._replace(initial=initial)

    weighting = optim.Weighting(init, weigh, needs_gramian=False, needs_losses=True, masked=True)
    return optim.from_weighting(weighting)


TABLE: dict[str, Entry] = methods.METHODS | {
    TUNED: Entry(fixed_weights, "losses", {"draw": (None, 0, 1), "power": (0.0, 0.5, 1.0)})
}


@dataclasses.dataclass(frozen=True)
class Source:
    """One data set and the budget of a run on it.

    Attributes:
      rows: train, validation and test rows (digits: the last two are 300 and 600).
      batch_size: rows per step, a multiple of 6, since some methods cut a batch into two or three parts.
      epochs: passes over the training rows; there is an evaluation after each, and the best one counts.
    """

    rows: tuple[int, ...]
    batch_size: int
    epochs: int

    def __post_init__(self):
        if len(self.rows) != 3 or min(*self.rows, self.epochs) < 1:
            raise ValueError(f"rows must be (train, validation, test) and epochs >= 1, got {self.rows}, {self.epochs}")
        if self.batch_size < 6 or self.batch_size % 6 or self.batch_size > self.rows[0]:
            raise ValueError(
                f"batch_size must be a multiple of 6 (some methods cut a batch into 2 or 3 parts) and at most the "
                f"number of training rows, {self.rows[0]}, got {self.batch_size}"
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and budgets. `--set width=8 digits.epochs=10` overrides any field.

    Attributes:
      methods: their names; the plain sum and the single-task models always run.
      data: names of data sets.
      flights, digits, bench: see `Source`.
      width: of the embedding of a column.
      mlp: hidden widths; heads are linear.
      learning_rates: of AdamW; the better one on validation rows is taken.
      seeds: number of seeds.
      fixed_weights: candidates of the tuned weighted sum, of nine.
      tune: whether each method's own hyper-parameter is tuned on validation rows too (two to three times as long).
      conflict_rows: rows on which conflicts are counted at each evaluation, in the first lane.
      steps_per_dispatch: steps in one compiled call.
    """

    methods: tuple[str, ...]
    data: tuple[str, ...] = ("flights", "digits", "bench")
    flights: Source = Source((8192, 4096, 8192), 192, 10)
    digits: Source = Source((897, 300, 600), 96, 45)
    bench: Source = Source((2048, 1024, 2048), 192, 40)
    width: int = 4
    mlp: tuple[int, ...] = (32, 16)
    learning_rates: tuple[float, ...] = (5e-3, 2e-2)
    seeds: int = 5
    fixed_weights: int = 9
    tune: bool = False
    conflict_rows: int = 256
    steps_per_dispatch: int = 8

    def __post_init__(self):
        if min(self.seeds, self.fixed_weights, self.conflict_rows, self.steps_per_dispatch) < 1:
            raise ValueError(
                f"seeds, fixed_weights, conflict_rows and steps_per_dispatch must be >= 1, got {self.seeds}, "
                f"{self.fixed_weights}, {self.conflict_rows} and {self.steps_per_dispatch}"
            )
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates must hold at least one number > 0, got {self.learning_rates}")


PAPER = Config(methods=tuple(TABLE))
REPRESENTATIVE = (SUM, TUNED, "UW", "IMTL-L", "FAMO", "MGDA", "PCGrad", "CAGrad", "Nash-MTL")
DEMO = dataclasses.replace(
    PAPER,
    methods=REPRESENTATIVE,
    data=("digits", "bench"),
    digits=Source((897, 300, 600), 96, 20),
    bench=Source((2048, 1024, 2048), 192, 20),
    seeds=3,
    fixed_weights=3,
)
SMOKE = Config(
    methods=(SUM, TUNED, "UW", "PCGrad"),
    data=("bench",),
    flights=Source((192, 96, 96), 48, 3),
    digits=Source((192, 300, 600), 48, 3),
    bench=Source((192, 96, 96), 48, 3),
    width=2,
    mlp=(8,),
    learning_rates=(1e-2,),
    seeds=2,
    fixed_weights=2,
    conflict_rows=48,
    steps_per_dispatch=2,
)
PRESETS = {"smoke": SMOKE, "demo": DEMO, "paper": PAPER}


# Data, model, methods.


def load_flights(source: Source) -> Any:
    return sources.flights.load(rows=source.rows)


def load_digits(source: Source) -> Any:
    return digits.load(source.rows[0])


def load_bench(source: Source) -> Any:
    side = np.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    cosines = 0.5 * np.outer(side, side) + 0.5 * np.eye(6)
    bench = sources.MultiTabBench(
        num_tasks=6,
        num_features=16,
        correlation=tuple(map(tuple, cosines.tolist())),
        degrees=(1, 2, 3, 4, 1, 2),
        noise=0.5,
        standardize=False,
    )
    return bench.dataset(*source.rows)


DATA = {"flights": load_flights, "digits": load_digits, "bench": load_bench}


def is_shared(path: str) -> bool:
    """Whether the parameter at a "/"-joined path belongs to several tasks: all but the heads."""
    return "heads" not in path.split("/")


def left_out(name: str, num_tasks: int) -> str | None:
    """Why a method has no place in this comparison; None if it has one."""
    entry = TABLE[name]
    if entry.features:
        return (
            "it acts on the features of a trunk, which the model here has no seam to give, and rotates them in use too"
        )
    return f"needs {entry.min_tasks} tasks" if num_tasks < entry.min_tasks else None


def build(name: str, setting: Mapping[str, Any]) -> optim.Method:
    """A method on shared parameters.

    Flat regions ("F-" and the name of a method) pass this on to the method inside. (A)SAM perturb all parameters, as
    one network; what they then sum are plain gradients, for which it makes no difference.
    """
    if name.startswith("F-"):
        return methods.flat(functools.partial(build, name.removeprefix("F-"), {}))(**setting)
    made = TABLE[name].make(**setting)
    return made if TABLE[name].family == "flatness" else optim.on_shared(made, is_shared)


def settings(name: str, config: Config) -> list[dict[str, Any]]:
    """Hyper-parameters to try for a method."""
    if name == TUNED:
        return TABLE[name].settings()[: config.fixed_weights]
    return TABLE[name].settings() if config.tune and name != SINGLE else [{}]


def make_model(name: str, data: Any, config: Config) -> Any:
    """The shared bottom, or for the baseline one MLP of the same widths per task."""
    preset = mlp_baselines.single_task if name == SINGLE else mlp_baselines.shared_bottom
    shape = mtjax.head_sizes(data.tasks), tuple(data.cardinalities), data.num_numeric
    # A few hundred steps are too few to grow from the usual 0.01.
    init = nn.initializers.normal(0.1)
    return preset(*shape, features=config.mlp, tower=(), width=config.width, embedding_init=init)
