"""An operator learned from its equation alone, without solutions: how should residual and initial condition be weighed?

Paper:   Wang, Yu, Perdikaris, "When and Why PINNs Fail to Train: A Neural Tangent Kernel Perspective", Journal of
         Computational Physics 449, 2022 (NTK); Wang, Teng, Perdikaris, "Understanding and Mitigating Gradient Flow
         Pathologies in Physics-informed Neural Networks", SIAM Journal on Scientific Computing 43, 2021 (norms of
         gradients); Wang, Wang, Perdikaris, "Learning the Solution Operator of Parametric Partial Differential
         Equations with Physics-informed DeepONets", Science Advances 7, 2021 (the network; 20 as the weight of the
         initial condition of Burgers' equation).
Claims:  weights that balance the NTK, or the norms of the gradients, beat the plain sum of the losses; the equation
         beside a few solutions beats these solutions alone.
Data:    u_t = D u_xx + f(u), three forms of f (`mtjax.data.pde.fisher`). Training reads the inputs only (code and
         initial field), validation and test compare with the solver's fields.
Command: python experiments/operators/physics.py            # about two minutes on two CPU cores
Results: experiments/results/operators_physics.json, experiments/results/figures/operators_physics_*.png

In the unit coordinates tau = t / T and xi = x / L the losses are, for one DeepONet G that is periodic by construction,

    residual   mean (G_tau - (D T / L^2) G_xixi - T f(G))^2     at random points, new ones in every step
    initial    mean (G(0, .) - u_0)^2                           at the nodes of u_0
    data       mean (G - u)^2                                   at random grid points of a few labelled functions

"Plain sum" depends on units: in t and x the first would be T^2 = 16 times smaller, which is an initial condition that
weighs 16 times as much (to Adam, a common factor is none). The unit coordinates are what the network reads.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

# jax 0.10.1 prints a harmless E-level message of XLA whenever it finds a compiled program in its cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import training
from study import Found
from study import main as run_study
from training import MAIN, Arm, Recipe, say, train_arm

import mtjax
from mtjax import metrics, optim, physics, plots_operators
from mtjax.data.pde import fisher
from mtjax.models.deeponet import DeepONet
from mtjax.nn.embeddings import PeriodicEmbedding
from mtjax.nn.operator_layers import MLP
from mtjax.optim.base import Method
from mtjax.train import Problem, report
from mtjax.train.fields import Domain, field_problem, make_field_evaluate, predict_fields

PyTree = Any
SYSTEM = "operators_physics"
FIXED_WEIGHT = 20.0
SUM, FIXED = "sum", f"initial x {FIXED_WEIGHT:g}"
# The balances smooth their weights and renew them each time a hundredth of the steps is done, as published.
METHODS: dict[str, Callable[[int, int], Method]] = {  # name -> (number of losses, steps) -> method
    SUM: lambda num, steps: optim.linear("sum"),
    FIXED: lambda num, steps: optim.linear([1.0, *[FIXED_WEIGHT] * (num - 1)]),
    "ntk_balance": lambda num, steps: optim.ntk_balance(every=max(1, steps // 100)),
    "norm_balance": lambda num, steps: optim.norm_balance(every=max(1, steps // 100)),
    "gradnorm": lambda num, steps: optim.gradnorm(),
    "uncertainty": lambda num, steps: optim.uncertainty(),
    "pcgrad": lambda num, steps: optim.pcgrad(),
    "fairgrad": lambda num, steps: optim.fairgrad(1.0),
}
DATA_ALONE, WITH_DATA = "data alone", "data and equation"
WORST = "worst form"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and budgets. `--set recipe.steps=500` overrides any field.

    Attributes:
      data: the equation and the laws of its inputs.
      train_per_form: functions of which the inputs are known; those of the labelled ones, the first, the fields too.
      labelled_per_form: functions with fields, for the arms with data; 0: no such arms.
      validation_per_form, test_per_form: functions.
      network: 'small' (GELU, several harmonics) or 'published' (tanh, five layers of 50, the first harmonic).
      recipe: how every arm is trained; `points_per_step` collocation points, and as many of the labelled fields.
      methods: how to weigh residual and initial condition, of `METHODS`.
      with_data: how to weigh them and the data.
      data_seed: of the data.
      seeds: number of seeds.
    """

    data: fisher.FisherConfig = fisher.FisherConfig()  # noqa: RUF009
    train_per_form: int = 1000
    labelled_per_form: int = 10
    validation_per_form: int = 50
    test_per_form: int = 100
    network: Literal["small", "published"] = "small"
    recipe: Recipe = Recipe(steps=2000, points_per_step=128, learning_rates=(2e-3, 5e-3), loss="mse")  # noqa: RUF009
    methods: tuple[str, ...] = (SUM, FIXED, "ntk_balance", "norm_balance", "gradnorm", "uncertainty", "pcgrad")
    with_data: str = FIXED
    data_seed: int = 0
    seeds: int = 3

    def __post_init__(self):
        training.check_names("methods", self.methods, METHODS, required=(SUM,))
        training.check_names("with_data", (self.with_data,), METHODS)
        if not 0 <= self.labelled_per_form <= self.train_per_form:
            raise ValueError(
                f"labelled_per_form must be 0 to train_per_form={self.train_per_form}, got {self.labelled_per_form}"
            )


STUDY = Config()
SMOKE = Config(
    data=fisher.FisherConfig(num_nodes=16, num_times=5),
    train_per_form=6,
    labelled_per_form=2,
    validation_per_form=2,
    test_per_form=2,
    recipe=Recipe(steps=4, batch_size=6, points_per_step=8, learning_rates=(5e-3,), loss="mse"),
    methods=(SUM, FIXED, "ntk_balance"),
    seeds=2,
)
DEMO = dataclasses.replace(
    STUDY,
    recipe=dataclasses.replace(STUDY.recipe, steps=1200, learning_rates=(5e-3,)),
    methods=(SUM, FIXED, "ntk_balance", "norm_balance"),
)
PAPER = Config(
    train_per_form=5000,
    validation_per_form=200,
    test_per_form=1000,
    network="published",
    recipe=Recipe(steps=120_000, batch_size=100, points_per_step=100, learning_rates=(1e-3,), loss="mse"),
    methods=tuple(METHODS),
)
PRESETS = {"smoke": SMOKE, "demo": DEMO, "study": STUDY, "paper": PAPER}


# The network and its losses.


def network(config: Config) -> DeepONet:
    """Branch: code and initial field; trunk: t as it is, x by its harmonics, so that every field has the period 1."""
    if config.network == "published":
        widths = (50,) * 5
        return DeepONet(MLP(widths, nn.tanh), MLP(widths, nn.tanh, embed=PeriodicEmbedding((None, 1.0))))
    trunk = MLP((64, 64, 64), embed=PeriodicEmbedding((None, 1.0), harmonics=6))
    return DeepONet(MLP((128, 128, 64)), trunk)


def equation(config: fisher.FisherConfig) -> physics.Residual:
    """The residual in unit coordinates; it reads 'coefficients' f[B, q] and 'damping' f[B] of each function's source.

    The source of a damped form is the exact one, though the code that the network reads is its Taylor polynomial.
    """

    def reaction(u, part):
        return config.horizon * fisher.source(u, part["coefficients"], part["damping"])

    return physics.diffusion_reaction(config.diffusion * config.horizon / config.length**2, reaction=reaction)


def rows_of(config: fisher.FisherConfig, split: Mapping[str, Any], *, labelled: bool) -> dict[str, Any]:
    """A split as the network and the losses read it; the solver's fields only if it is labelled."""
    a, b = split["parameters"]["a"], split["parameters"]["b"]
    patterns = np.zeros((len(config.forms), config.code_size), np.float32)
    for k, form in enumerate(config.forms):
        patterns[k, : len(form.pattern)] = form.pattern
    code, initial = split["inputs"]["code"], split["inputs"]["initial"]
    rows = {
        "inputs": np.concatenate([code, initial - 0.5], axis=1),
        "initial": initial,
        "coefficients": a[:, None] * patterns[split["task"]],
        "damping": b,
        "task": split["task"],
    }
    return rows | ({"values": split["values"]} if labelled else {})


def loss_function(
    model: Any, config: fisher.FisherConfig, num_points: int, labelled: Mapping[str, Any] | None = None
) -> Callable:
    """The losses of the equation, and of data where there are labelled functions.

    Args:
      model: the operator network.
      config: of the equation.
      num_points: random points per step, the same for all functions: f[N, 2] in the unit square, and of the grid of
        the labelled fields.
      labelled: rows with 'values'; all of them are in every step.

    Returns:
      `loss_fn(params, rows, rng) -> {'residual', 'initial' (, 'data')}`.
    """
    losses = physics.physics_losses(lambda params, batch: model.apply({"params": params}, batch), equation(config))
    grid = config.points()
    at_start = grid[: config.num_nodes]

    def loss_fn(params, rows, rng):
        key_inside, key_grid = jax.random.split(rng)
        source = {name: rows[name] for name in ("coefficients", "damping")}
        batch = {
            "inputs": rows["inputs"],
            "residual": {"points": jax.random.uniform(key_inside, (num_points, 2)), **source},
            "initial": {"points": jnp.asarray(at_start), "values": rows["initial"]},
        }
        if labelled is not None:
            where = jax.random.randint(key_grid, (num_points,), 0, len(grid))
            batch["data"] = {
                "inputs": jnp.asarray(labelled["inputs"]),  # other functions than those of the other parts
                "points": jnp.asarray(grid)[where],
                "values": jnp.asarray(labelled["values"])[:, where],
            }
        return losses(params, batch)

    return loss_fn


def physics_problem(
    config: Config,
    tasks: Sequence[mtjax.Task],
    train: Mapping[str, Any],
    validation: Mapping[str, Any],
    labelled: Mapping[str, Any] | None = None,
) -> Problem:
    """What `fit_problem` trains: the losses of the equation; evaluated as fields, form by form."""
    model, domain = network(config), Domain(config.data.points())

    def init_params(key):
        return model.init(key, {"inputs": jnp.asarray(train["inputs"][:2]), "points": jnp.asarray(domain.points)})[
            "params"
        ]

    return Problem(
        tasks,
        train,
        validation,
        loss_function(model, config.data, config.recipe.points_per_step, labelled),
        init_params,
        lambda per_task: make_field_evaluate(model, tasks, domain, per_task=per_task),
        losses=("residual", "initial", *([] if labelled is None else ["data"])),
    )


# The study.


def first_of_each(rows: Mapping[str, Any], num_tasks: int, count: int) -> dict[str, Any]:
    """The first rows of every task."""
    kept = np.concatenate([np.flatnonzero(rows["task"] == k)[:count] for k in range(num_tasks)])
    return {name: column[kept] for name, column in rows.items()}


def study(config: Config, run: pathlib.Path, resume: bool) -> Found:
    """All arms at one budget, what their losses came to on test functions, and the claims."""
    sizes = {f"{name}_per_form": getattr(config, f"{name}_per_form") for name in ("train", "validation", "test")}
    data = fisher.load(config.data, seed=config.data_seed, **sizes)
    tasks = tuple(mtjax.Task(form.name, "regression", metrics=(metrics.relative_l2(),)) for form in config.data.forms)
    train = rows_of(config.data, data["train"], labelled=False)
    validation, test = (rows_of(config.data, data[name], labelled=True) for name in ("validation", "test"))
    few = first_of_each(rows_of(config.data, data["train"], labelled=True), len(tasks), config.labelled_per_form)
    record = {"config": json.loads(json.dumps(dataclasses.asdict(config)))}
    steps, arms = config.recipe.budget(len(train["task"]))[1], {}

    def arm(name, problem, method=None):
        seeds = range(config.seeds)
        arms[name] = train_arm(
            name, problem, test, config.recipe, seeds, run, resume=resume, method=method, record=record
        )
        say(arms[name])

    problem = physics_problem(config, tasks, train, validation)
    for name in config.methods:
        arm(name, problem, METHODS[name](2, steps))
    if config.labelled_per_form:
        options = {"loss": "mse", "points_per_step": config.recipe.points_per_step}
        arm(DATA_ALONE, field_problem(network(config), tasks, Domain(config.data.points()), few, validation, **options))
        both = physics_problem(config, tasks, train, validation, few)
        arm(WITH_DATA, both, METHODS[config.with_data](3, steps))

    rows = report.result_rows("mean training field", training.mean_field_error(tasks, data["train"], data["test"]))
    for name, found in arms.items():
        worst = {WORST: {MAIN: np.max([of[MAIN] for of in found.test.values()], axis=0)}}
        rows += report.result_rows(name, {**found.test, **worst}, baseline=SUM, **found.cost())
    of_test = losses_on(config, problem, arms, test)
    return Found(
        (*tasks, mtjax.Task(WORST, "regression")),
        training.findings(claims(config), arms),
        rows,
        lambda folder: draw(config, test, arms, folder),
        {"losses_on_test": of_test},
    )


def claims(config: Config) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(claim, arm, other arm, options)."""
    return [
        ("a published fixed weight on the initial condition beats the plain sum", FIXED, SUM, {}),
        ("balancing the neural tangent kernel beats the plain sum", "ntk_balance", SUM, {}),
        ("balancing the norms of the gradients beats the plain sum", "norm_balance", SUM, {}),
        ("and so does GradNorm", "gradnorm", SUM, {}),
        (
            f"the equation beside {config.labelled_per_form} solutions per form beats these solutions alone",
            WITH_DATA,
            DATA_ALONE,
            {},
        ),
    ]


def losses_on(
    config: Config, problem: Problem, arms: Mapping[str, Arm], rows: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Arm -> {'residual', 'initial'}: root mean squares over functions and random points, mean over seeds."""
    rows = {name: jnp.asarray(column) for name, column in rows.items()}

    @jax.jit
    def measure(params):
        return jax.vmap(lambda params: problem.loss_fn(params, rows, jax.random.key(0)))(params)

    return {
        name: {part: float(np.sqrt(values).mean()) for part, values in measure(arm.params).items()}
        for name, arm in arms.items()
    }


def draw(config: Config, test: Mapping[str, Any], arms: Mapping[str, Arm], folder: pathlib.Path) -> list[pathlib.Path]:
    """Truth, prediction and error of one test function per form (the best arm), and the error against time."""
    shape = (config.data.num_times, config.data.num_nodes)
    model, domain, panels = network(config), Domain(config.data.points()), {}
    best = min((arm for name, arm in arms.items() if name in METHODS), key=lambda arm: arm.mean().mean())
    for k, form in enumerate(config.data.forms):
        first = {key: value[test["task"] == k][:1] for key, value in test.items()}
        predicted = predict_fields(model, best.of_seed(0, k), domain, first)
        panels[form.name] = (first["values"].reshape(shape), predicted.reshape(shape))
    title = f"u(t, x) from the equation alone ({best.name}): the first test function"
    fields = plots_operators.compare_fields(panels, xlabel="x", ylabel="t", title=title)
    truth = test["values"].reshape(-1, *shape)
    curves = {}
    for name, arm in arms.items():
        predicted = predict_fields(model, arm.of_seed(0, 0), domain, test).reshape(truth.shape)
        error = np.linalg.norm(predicted - truth, axis=2) / np.linalg.norm(truth, axis=2)
        curves[name] = 100 * error.mean(0)
    times = np.linspace(0, config.data.horizon, config.data.num_times)
    return [
        plots_operators.save_small(fields, folder / "fields.png"),
        plots_operators.save_small(error_in_time(times, curves), folder / "time.png"),
    ]


def error_in_time(times: np.ndarray, curves: Mapping[str, np.ndarray]) -> Any:
    """Relative error at each time, a line for each arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, error), style in zip(curves.items(), ("-", "--", ":", "-.") * len(curves), strict=False):
        axes.plot(times, error, style, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("t")
    axes.set_ylabel("relative L2 error at t, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(argv, __doc__, SYSTEM, PRESETS, study)


if __name__ == "__main__":
    sys.exit(main())
