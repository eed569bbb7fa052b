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

The NTK's weights are published with the mean of its diagonal, which takes gradients of single errors: `on_residuals`
estimates it from random combinations of them. `ntk_balance` on gradients of losses sees the kernel in the direction of
the errors instead. What is left of a loss lies where the kernel is weak, so that the loss which is trained best looks
slow and can be given more weight. GradNorm goes by losses relative to the first: that of a network which is nearly
constant, and so nearly solves the equation, which then seems to lag.

All arms have the same steps and candidates of the learning rate, chosen on validation functions with solutions. (At
twice the larger rate the residual diverges.)
"""

import dataclasses
import functools
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
from training import MAIN, Arm, Recipe, run_study, say, train_arm

import mtjax
from mtjax import optim, physics, plots_operators
from mtjax.data.pde import fisher
from mtjax.models.deeponet import DeepONet
from mtjax.models.mt_deeponet import with_code
from mtjax.nn.embeddings import PeriodicEmbedding
from mtjax.nn.operator_layers import MLP
from mtjax.optim import base as optim_base
from mtjax.optim.base import Method
from mtjax.sharding import to_host
from mtjax.train import Problem, report
from mtjax.train.fields import Domain, field_problem, make_field_evaluate
from mtjax.train.study import Found, plain

PyTree = Any
SYSTEM = "operators_physics"
FIXED_WEIGHT = 20.0
SUM, FIXED = "sum", f"initial x {FIXED_WEIGHT:g}"
NTK, EQUAL_NORMS = "ntk_balance, diagonal", "gradnorm, alpha 0"
# Balances renew their weights after each hundredth of the steps; in jaxpi after 1,000 of 100,000 or more.
METHODS: dict[str, Callable[[int, int], Method]] = {  # name -> (number of losses, steps) -> method
    SUM: lambda num, steps: optim.linear("sum"),
    FIXED: lambda num, steps: optim.linear([1.0, *[FIXED_WEIGHT] * (num - 1)]),
    NTK: lambda num, steps: optim.ntk_balance("residuals", every=max(1, steps // 100)),  # with rows of `on_residuals`
    "ntk_balance": lambda num, steps: optim.ntk_balance(every=max(1, steps // 100)),
    "norm_balance": lambda num, steps: optim.norm_balance(every=max(1, steps // 100)),
    "gradnorm": lambda num, steps: optim.gradnorm(),
    EQUAL_NORMS: lambda num, steps: optim.gradnorm(0.0),
    "uncertainty": lambda num, steps: optim.uncertainty(),
    "pcgrad": lambda num, steps: optim.pcgrad(),
    "fairgrad": lambda num, steps: optim.fairgrad(1.0),
}
PROBED = (8, 32)
"""Functions of a batch, and random points, by which the kernel's diagonal is estimated."""
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
      branch, trunk: widths; the last is the number of basis functions.
      harmonics: of x, before the trunk.
      activation: of both.
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
    branch: tuple[int, ...] = (128, 128, 64)
    trunk: tuple[int, ...] = (64, 64, 64)
    harmonics: int = 6
    activation: Literal["gelu", "tanh"] = "gelu"
    recipe: Recipe = Recipe(steps=1600, points_per_step=128, learning_rates=(2e-3, 5e-3), loss="mse")  # noqa: RUF009
    methods: tuple[str, ...] = tuple(name for name in METHODS if name != "fairgrad")
    with_data: str = "norm_balance"
    data_seed: int = 0
    seeds: int = 3

    def __post_init__(self):
        training.check_names("methods", self.methods, METHODS, required=(SUM,))
        training.check_names("with_data", (self.with_data,), METHODS)
        if self.recipe.points_per_step is None:
            raise ValueError("recipe.points_per_step must be a number: collocation points are drawn, there is no 'all'")
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
    branch=(4,),
    trunk=(4, 4),
    activation="tanh",
    recipe=Recipe(steps=4, batch_size=6, points_per_step=8, learning_rates=(5e-3,), loss="mse"),
    methods=(SUM,),
    with_data=NTK,
    seeds=2,
)
DEMO = dataclasses.replace(
    STUDY,
    recipe=dataclasses.replace(STUDY.recipe, steps=1200, learning_rates=(5e-3,)),
    methods=(SUM, FIXED, NTK, "norm_balance"),
)
PAPER = Config(
    train_per_form=5000,
    validation_per_form=200,
    test_per_form=1000,
    branch=(50,) * 5,
    trunk=(50,) * 5,
    harmonics=1,
    activation="tanh",
    recipe=Recipe(steps=120_000, batch_size=100, points_per_step=100, learning_rates=(1e-3,), loss="mse"),
    methods=tuple(METHODS),
)
PRESETS = {"smoke": SMOKE, "demo": DEMO, "study": STUDY, "paper": PAPER}


# The network and its losses.


def network(config: Config) -> DeepONet:
    """Branch: code and initial field; trunk: t as it is, x by its harmonics, so that every field has the period 1."""
    activation = {"gelu": nn.gelu, "tanh": nn.tanh}[config.activation]
    periodic = PeriodicEmbedding((None, 1.0), config.harmonics)
    return DeepONet(MLP(config.branch, activation), MLP(config.trunk, activation, embed=periodic))


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
        "inputs": np.asarray(with_code(initial - 0.5, code)),
        "initial": initial,
        "coefficients": a[:, None] * patterns[split["task"]],
        "damping": b,
        "task": split["task"],
    }
    return rows | ({"values": split["values"]} if labelled else {})


@dataclasses.dataclass(frozen=True)
class Losses:
    """The losses of the equation, and of data where there are labelled functions.

    Attributes:
      model: the operator network.
      config: of the equation.
      num_points: random points per step, the same for all functions: f[N, 2] in the unit square, and of the grid of
        the labelled fields.
      labelled: rows with 'values'; all of them are in every step.
    """

    model: Any
    config: fisher.FisherConfig
    num_points: int
    labelled: Mapping[str, Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return ("residual", "initial", *(() if self.labelled is None else ("data",)))

    def __call__(self, params: PyTree, rows: Mapping[str, jax.Array], rng: jax.Array) -> dict[str, jax.Array]:
        """Mean squares of the errors."""
        return physics.physics_losses(self._apply, equation(self.config))(params, self._batch(rows, rng))

    def residuals(self, params: PyTree, rows: Mapping[str, jax.Array], rng: jax.Array) -> dict[str, jax.Array]:
        r"""One random combination of the errors r_i of each loss, sum_i v_i r_i / sqrt(n), with signs v_i.

        The square of its gradient has the expectation (1 / n) sum_i |grad r_i|^2, the mean of the NTK's diagonal. Of
        a few functions and points: they stand for all.
        """
        key_batch, key_signs = jax.random.split(rng)
        few = {name: column[: PROBED[0]] for name, column in rows.items()}
        batch = dataclasses.replace(self, num_points=min(self.num_points, PROBED[1]))._batch(few, key_batch)
        sums = {}
        for name, key in zip(self.names, jax.random.split(key_signs, 3), strict=False):
            part = batch[name]
            u = physics.field_of(self._apply, params, {"inputs": batch["inputs"], **part})
            error = equation(self.config)(u, part) if name == "residual" else u(part["points"]) - part["values"]
            sums[name] = jnp.sum(jax.random.rademacher(key, error.shape, error.dtype) * error) / error.size**0.5
        return sums

    def _apply(self, params, batch):
        return self.model.apply({"params": params}, batch)

    def _batch(self, rows, rng):
        key_inside, key_grid = jax.random.split(rng)
        grid = jnp.asarray(self.config.points())
        source = {name: rows[name] for name in ("coefficients", "damping")}
        batch = {
            "inputs": rows["inputs"],
            "residual": {"points": jax.random.uniform(key_inside, (self.num_points, 2)), **source},
            "initial": {"points": grid[: self.config.num_nodes], "values": rows["initial"]},
        }
        if self.labelled is not None:
            where = jax.random.randint(key_grid, (self.num_points,), 0, len(grid))
            batch["data"] = {
                "inputs": jnp.asarray(self.labelled["inputs"]),  # other functions than those of the other parts
                "points": grid[where],
                "values": jnp.asarray(self.labelled["values"])[:, where],
            }
        return batch


def on_residuals(method: Method, losses: Losses) -> Method:
    """A weighting whose Gramian is that of `Losses.residuals`; the weights are still those of the losses."""

    def route(loss_fn, method, *, has_aux, chunk_size):
        del has_aux
        rows_fn = mtjax.value_and_jacobian(losses.residuals, chunk_size=chunk_size)

        def update(params, state, batch, rng):
            values, pullback = jax.vjp(lambda params: mtjax.gradients.stack_losses(loss_fn(params, batch, rng)), params)
            # In every step, though it is not always looked at: over lanes a condition computes both sides anyway.
            gramian = mtjax.gradients.gramian(rows_fn(params, batch, rng)[1])
            state = optim_base.weigh(method.weighting, gramian, values, state)
            return values, pullback(state.weights)[0], state

        return update

    return method.rerouted(route)


def method_of(name: str, losses: Losses, steps: int) -> Method:
    """The method of that name for these losses."""
    method = METHODS[name](len(losses.names), steps)
    return on_residuals(method, losses) if name == NTK else method


def physics_problem(
    losses: Losses, tasks: Sequence[mtjax.Task], train: Mapping[str, Any], validation: Mapping[str, Any]
) -> Problem:
    """What `fit_problem` trains: the losses of the equation; evaluated as fields, form by form."""
    model, domain = losses.model, Domain(losses.config.points())

    def init_params(key):
        batch = {"inputs": jnp.asarray(train["inputs"][:2]), "points": jnp.asarray(domain.points)}
        return model.init(key, batch)["params"]

    @functools.cache  # one program for all arms on the problem
    def evaluator(per_task):
        return make_field_evaluate(model, tasks, domain, per_task=per_task)

    return Problem(tasks, train, validation, losses, init_params, evaluator, losses.names)


# The study.


def first_of_each(rows: Mapping[str, Any], num_tasks: int, count: int) -> dict[str, Any]:
    """The first rows of every task."""
    kept = np.concatenate([np.flatnonzero(rows["task"] == k)[:count] for k in range(num_tasks)])
    return {name: column[kept] for name, column in rows.items()}


def study(config: Config, run: pathlib.Path, resume: bool) -> Found:
    """All arms at one budget, what their losses came to on test functions, and the claims."""
    sizes = {f"{name}_per_form": getattr(config, f"{name}_per_form") for name in ("train", "validation", "test")}
    data = fisher.load(config.data, seed=config.data_seed, **sizes)
    tasks = training.tasks_named(form.name for form in config.data.forms)
    train = rows_of(config.data, data["train"], labelled=False)
    validation, test = (rows_of(config.data, data[name], labelled=True) for name in ("validation", "test"))
    few = first_of_each(rows_of(config.data, data["train"], labelled=True), len(tasks), config.labelled_per_form)
    record = {"config": plain(config)}
    steps = config.recipe.budget(len(train["task"]))[1]
    losses = Losses(network(config), config.data, config.recipe.points_per_step)
    arms: dict[str, Arm] = {}

    def arm(name, problem, method=None):
        seeds = range(config.seeds)
        arms[name] = train_arm(
            name, problem, test, config.recipe, seeds, run, resume=resume, method=method, record=record
        )
        say(arms[name])

    problem = physics_problem(losses, tasks, train, validation)
    for name in config.methods:
        arm(name, problem, method_of(name, losses, steps))
    if config.labelled_per_form:
        options = {"loss": "mse", "points_per_step": config.recipe.points_per_step}
        alone = field_problem(losses.model, tasks, Domain(config.data.points()), few, validation, **options)
        all_three = dataclasses.replace(losses, labelled=few)
        both = physics_problem(all_three, tasks, train, validation)
        # The model and the rows are the same: one program evaluates all arms.
        alone, both = (dataclasses.replace(each, evaluator=problem.evaluator) for each in (alone, both))
        arm(DATA_ALONE, alone)
        arm(WITH_DATA, both, method_of(config.with_data, all_three, steps))

    rows = report.result_rows("mean training field", training.mean_field_error(tasks, data["train"], data["test"]))
    for name, found in arms.items():
        worst = {WORST: {MAIN: np.max([of[MAIN] for of in found.test.values()], axis=0)}}
        rows += report.result_rows(name, {**found.test, **worst}, baseline=SUM, **found.cost())
    of_test = losses_on(losses, arms, test)
    return Found(
        (*tasks, *training.tasks_named([WORST])),
        training.findings(claims(config), arms),
        rows,
        lambda folder: draw(config, test, arms, folder),
        {"losses_on_test": of_test},
    )


def claims(config: Config) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(claim, arm, other arm, options)."""
    few = config.labelled_per_form
    return [
        ("a published fixed weight on the initial condition beats the plain sum", FIXED, SUM, {}),
        ("balancing the diagonal of the neural tangent kernel beats the plain sum", NTK, SUM, {}),
        ("balancing the norms of the gradients beats the plain sum", "norm_balance", SUM, {}),
        ("the kernel in the direction of the errors, which costs no more gradients, will do", "ntk_balance", SUM, {}),
        ("so will GradNorm", "gradnorm", SUM, {}),
        ("a conflict-averse method, which knows nothing of equations, beats the plain sum too", "pcgrad", SUM, {}),
        (f"the equation beside {few} solutions per form beats these solutions alone", WITH_DATA, DATA_ALONE, {}),
        ("and the equation alone", WITH_DATA, config.with_data, {}),
    ]


def losses_on(losses: Losses, arms: Mapping[str, Arm], rows: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Arm -> {'residual', 'initial'}: root mean squares over functions and random points, mean over seeds."""
    rows = {name: jnp.asarray(column) for name, column in rows.items()}
    measure = jax.jit(jax.vmap(lambda params: losses(params, rows, jax.random.key(0))))
    return {
        name: {part: float(np.sqrt(values).mean()) for part, values in to_host(measure(arm.params)).items()}
        for name, arm in arms.items()
    }


def draw(config: Config, test: Mapping[str, Any], arms: Mapping[str, Arm], folder: pathlib.Path) -> list[pathlib.Path]:
    """Truth, prediction and error of one test function per form (the best arm), and the error against time."""
    model, points = network(config), jnp.asarray(config.data.points())
    batch = {"inputs": jnp.asarray(test["inputs"]), "points": points}
    predict = jax.jit(jax.vmap(lambda params: model.apply({"params": params}, batch)["u"]))  # f[S, n, N]
    shape = (config.data.num_times, config.data.num_nodes)
    truth = test["values"].reshape(-1, *shape)
    fields, curves = {}, {}
    for name, arm in arms.items():
        fields[name] = to_host(predict(arm.params)).reshape(-1, *truth.shape)
        error = np.linalg.norm(fields[name] - truth[None], axis=3) / np.linalg.norm(truth, axis=2)[None]
        curves[name] = 100 * error.mean((0, 1))
    best = min((name for name in arms if name in METHODS), key=lambda name: arms[name].mean().mean())
    first = [int(np.flatnonzero(test["task"] == k)[0]) for k in range(len(config.data.forms))]
    panels = {form.name: (truth[i], fields[best][0, i]) for form, i in zip(config.data.forms, first, strict=True)}
    title = f"u from the equation alone ({best}): the first test function of each form"
    picture = plots_operators.compare_fields(panels, xlabel="x / L", ylabel="t / T", title=title)
    times = np.linspace(0, config.data.horizon, config.data.num_times)
    return [
        plots_operators.save_small(picture, folder / "fields.png"),
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
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("t")
    axes.set_ylabel("relative L2 error at t, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(argv, __doc__, SYSTEM, PRESETS, study)


if __name__ == "__main__":
    sys.exit(main())
