"""One DeepONet for several source terms of Fisher's equation, beside one network per source term.

Paper:   "Synergistic Learning with Multi-Task DeepONet for Efficient PDE Problem Solving", Neural Networks 184, 2025
         (arXiv 2408.02198), first study. Its tables of errors are not public in text; the released networks' errors and
         ours are not on the same data.
Claims:  one concurrent training over several functional forms beats a training per form, at a lower total cost; the
         code of the form in the branch is what carries this; the network moves to forms it has not seen.
Data:    u_t = D u_xx + f(u), solved here (`mtjax.data.pde.fisher`): 100 training fields per form; every initial
         condition is met in one split only.
Command: python experiments/operators/fisher.py            # about two minutes on two CPU cores
Results: experiments/results/operators_fisher.json, experiments/results/figures/operators_fisher_*.png
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

# jax 0.10.1 prints a harmless E-level message of XLA whenever it finds a compiled program in its cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import training
import transfer
from training import MAIN, Arm, Recipe, say, train_arm

import mtjax
from mtjax import metrics, optim, plots_operators
from mtjax.data.pde import fisher
from mtjax.models.mt_deeponet import fisher_deeponet, small_deeponet
from mtjax.train import command, report, tables
from mtjax.train.compare import mean_and_se, verdict
from mtjax.train.config import override
from mtjax.train.fields import Domain, field_problem, predict_fields

DATA, RECIPE = fisher.FisherConfig(), Recipe(steps=2000)
ROOT = pathlib.Path(__file__).resolve().parent.parent
SYSTEM = "operators_fisher"
JOINT, SEPARATE, SHORTER, ZEROED = "joint", "separate", "separate, same total", "joint, code zeroed"
NO_LEARNING = "mean training field"
# Not among the training forms: between two of them, and with a power that none of them has.
MIXED = fisher.Form("mixed", (1, -0.5, -0.5))
QUARTIC = fisher.Form("quartic", (1, 0, 0, -1))
METHODS = {
    "uncertainty": optim.uncertainty,
    "pcgrad": optim.pcgrad,
    "fairgrad": lambda: optim.fairgrad(1.0),
    "nash_mtl": optim.nash_mtl,
    "upgrad": optim.upgrad,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and budgets. `--set recipe.steps=500` overrides any field.

    Attributes:
      data: the equation and the laws of its inputs.
      train_per_form, validation_per_form, test_per_form: functions.
      network: 'small' (GELU, Fourier features; trains in seconds) or 'published' (the paper's sizes).
      recipe: how every arm is trained.
      methods: multi-objective methods to train the joint network with, beside the sum.
      examples: numbers of examples of an unseen form to fine-tune with.
      transfer_steps: updates of fine-tuning, and of training from scratch.
      data_seed: of the data.
      seeds: number of seeds.
    """

    data: fisher.FisherConfig = DATA
    train_per_form: int = 100
    validation_per_form: int = 50
    test_per_form: int = 200
    network: Literal["small", "published"] = "small"
    recipe: Recipe = RECIPE
    methods: tuple[str, ...] = ()
    examples: tuple[int, ...] = (5, 20, 50, 100)
    transfer_steps: int = 600
    data_seed: int = 0
    seeds: int = 3

    def __post_init__(self):
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods: there is no '{unknown[0]}'; choose among {', '.join(METHODS)}")


SMOKE = Config(
    data=fisher.FisherConfig(num_nodes=16, num_times=5),
    train_per_form=8,
    validation_per_form=4,
    test_per_form=4,
    recipe=Recipe(steps=4, batch_size=8, points_per_step=32, learning_rates=(5e-3,)),
    examples=(2, 4),
    transfer_steps=2,
    seeds=2,
)
PAPER = Config(
    train_per_form=1000,
    validation_per_form=200,
    test_per_form=200,
    network="published",
    recipe=Recipe(steps=100_000, batch_size=200, points_per_step=None, learning_rates=(1e-3,), loss="mse"),
    transfer_steps=5000,
)
PRESETS = {"smoke": SMOKE, "demo": Config(), "paper": PAPER}


@dataclasses.dataclass
class Arguments:
    """Train one operator network on several source terms of Fisher's equation, and one network per source term."""

    preset: Literal["smoke", "demo", "paper"] = "demo"
    """smoke: seconds. demo: about two minutes on two CPU cores. paper: published sizes, for an accelerator."""
    seeds: int | None = None
    """Number of seeds (at least 3 for a standard error that means something)."""
    methods: tuple[str, ...] = ()
    """Multi-objective methods to train the joint network with, e.g. --methods pcgrad uncertainty."""
    run: pathlib.Path | None = None
    """Run directory; by default a new one under runs/operators_fisher."""
    resume: bool = False
    """Go on with an interrupted run, with the options that it was started with."""
    set: Annotated[tuple[str, ...], "FIELD=VALUE"] = ()
    """Override configuration fields, e.g. --set recipe.steps=500 train_per_form=50."""


def network(config: Config) -> Any:
    """The operator network: its branch reads the code and the initial field."""
    return small_deeponet() if config.network == "small" else fisher_deeponet()


def rows_of(split: Mapping[str, Any], *, zeroed: bool = False) -> dict[str, Any]:
    """A split as the network reads it: the code (or zeros) before the initial field, which is centred at 1/2."""
    code, initial = split["inputs"]["code"], split["inputs"]["initial"]
    inputs = np.concatenate([0 * code if zeroed else code, initial - 0.5], axis=1)
    return {"inputs": inputs.astype(np.float32), "values": split["values"], "task": split["task"]}


def tasks_of(config: fisher.FisherConfig) -> tuple[mtjax.Task, ...]:
    return tuple(mtjax.Task(form.name, "regression", metrics=(metrics.relative_l2(),)) for form in config.forms)


def load(config: Config, forms: Sequence[fisher.Form], seed: int) -> dict[str, Any]:
    data = dataclasses.replace(config.data, forms=tuple(forms))
    sizes = {f"{name}_per_form": getattr(config, f"{name}_per_form") for name in ("train", "validation", "test")}
    return fisher.load(data, seed=seed, **sizes)


def train_arms(config: Config, data: Mapping[str, Any], run: pathlib.Path, resume: bool) -> dict[str, Arm]:
    """Joint and separate networks, the control without a code, and other objective methods."""
    model, tasks, seeds = network(config), tasks_of(config.data), range(config.seeds)
    domain = Domain(data["train"]["points"])
    options = {"loss": config.recipe.loss, "points_per_step": config.recipe.points_per_step}
    record = {"config": json.loads(json.dumps(dataclasses.asdict(config)))}

    def arm(name, *, zeroed=False, recipe=config.recipe, **more):
        train, validation, test = (rows_of(data[s], zeroed=zeroed) for s in ("train", "validation", "test"))
        problem = field_problem(model, tasks, domain, train, validation, **options)
        arms[name] = train_arm(name, problem, test, recipe, seeds, run, resume=resume, record=record, **more)
        say(arms[name])

    arms: dict[str, Arm] = {}
    arm(JOINT)
    arm(SEPARATE, separate=True)
    shorter = dataclasses.replace(config.recipe, steps=max(1, config.recipe.steps // len(tasks)))
    arm(SHORTER, separate=True, recipe=shorter)
    arm(ZEROED, zeroed=True)
    for name in config.methods:
        arm(f"{JOINT}, {name}", method=METHODS[name]())
    return arms


# What was found.


def against(
    claim: str, ours: Arm, other: Arm, *, factor: float = 1.0, better: bool = True, every: bool = True
) -> report.Finding:
    """The finding that the mean error of `ours` is below `factor` times that of `other` (or above, not `better`).

    By a paired t-test over seeds on the mean over tasks; with `every`, the means over seeds must agree for each task.
    """
    difference = factor * other.mean() - ours.mean()
    mean, se = mean_and_se(100 * (difference if better else -difference))
    holds = verdict(mean, se, difference.size)
    pairs = {task: (ours.test[task][MAIN].mean(), other.test[task][MAIN].mean()) for task in ours.test}
    right = sum((a < factor * b) == better for a, b in pairs.values())
    if holds and every and right < len(pairs):
        holds = None
    shown = ", ".join(f"{task} {100 * a:.1f} against {100 * b:.1f}" for task, (a, b) in pairs.items())
    times = "" if factor == 1 else f" (against {factor:g} x the other's)"
    reason = f"error in %: {shown}; difference of the means{times} {mean:+.2f} ± {se:.2f}"
    names = (f"{arm.name}: {report.format_mean(*mean_and_se(100 * arm.mean()))} %" for arm in (other, ours))
    return report.Finding(claim, *names, holds, reason)


def findings(arms: Mapping[str, Arm], moved: Sequence[report.Finding]) -> list[report.Finding]:
    """The paper's claims, by what was measured."""
    found = [
        against(
            "one network for all forms beats a network per form, each trained as long", arms[JOINT], arms[SEPARATE]
        ),
        against("and a network per form with the same total of steps", arms[JOINT], arms[SHORTER]),
        against(
            "the code carries it: without, the error is more than twice as large",
            arms[ZEROED],
            arms[JOINT],
            factor=2.0,
            better=False,
        ),
    ]
    return [*found, *moved]


def experiment(args: Arguments) -> int:
    """Runs the experiment; returns the exit status."""
    began = time.perf_counter()
    args, run = command.settle_run(args, pathlib.Path("runs") / SYSTEM)
    config = override(PRESETS[args.preset], args.set)
    config = dataclasses.replace(
        config,
        seeds=config.seeds if args.seeds is None else args.seeds,
        methods=args.methods or config.methods,
    )
    where = report.provenance(outputs=[run, ROOT / "results"])
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    command.write_run(run, args, config=settings)
    data = load(config, config.data.forms, config.data_seed)
    tasks = tasks_of(config.data)
    try:
        arms = train_arms(config, data, run, args.resume)
        moved, moved_rows, curves = study_transfer(config, arms[JOINT], run, args.resume)
    except training.Interrupted:
        return command.interrupted(run)

    baseline = training.mean_field_error(tasks, data["train"], data["test"])
    rows = report.result_rows(NO_LEARNING, baseline)
    for name, arm in arms.items():
        rows += report.result_rows(name, arm.test, baseline=SEPARATE, **arm.cost())
    result = report.from_findings(
        SYSTEM,
        findings(arms, moved),
        preset=args.preset,
        seeds=range(config.seeds),
        wall_s=round(time.perf_counter() - began, 1),
        rows=[row | {"higher_is_better": False} for row in [*rows, *moved_rows]],
        provenance=where,
        details={"config": settings},
    )
    tables.print_report(result, metrics=dict.fromkeys((task.name for task in tasks), MAIN))
    pictures = draw(config, data["test"], arms[JOINT], curves, run / "figures")
    kept = args.preset == "demo" and (args.seeds, args.methods, args.set) == (None, (), ())
    command.publish(result, run, pictures, ROOT / "results" if kept else None)
    return 0


def study_transfer(config: Config, joint: Arm, run: pathlib.Path, resume: bool):
    """Forms that were not trained on: zero-shot, and with a few examples."""
    forms = (MIXED, QUARTIC)
    data = load(config, forms, config.data_seed + 1)
    splits = {name: rows_of(data[name]) for name in ("train", "validation", "test")}
    target = transfer.Target(
        model=network(config),
        domain=Domain(data["train"]["points"]),
        names=tuple(form.name for form in forms),
        splits=splits,
        options={"loss": config.recipe.loss, "points_per_step": config.recipe.points_per_step},
    )
    recipe = dataclasses.replace(config.recipe, steps=config.transfer_steps)
    return transfer.study(target, joint, recipe, config.examples, range(config.seeds), run / "transfer", resume=resume)


def draw(
    config: Config, test: Mapping[str, Any], joint: Arm, curves: Mapping[str, Any], folder: pathlib.Path
) -> list[pathlib.Path]:
    """Truth, prediction and error of one test function per form, and error against number of examples."""
    shape = (config.data.num_times, config.data.num_nodes)
    domain, rows = Domain(test["points"]), rows_of(test)
    panels = {}
    for k, form in enumerate(config.data.forms):
        first = {key: value[test["task"] == k][:1] for key, value in rows.items()}
        predicted = predict_fields(network(config), joint.of_seed(0, k), domain, first)
        panels[form.name] = (first["values"].reshape(shape), predicted.reshape(shape))
    fields = plots_operators.compare_fields(panels, xlabel="x", ylabel="t", title="u(t, x): the first test function")
    paths = [plots_operators.save_small(fields, folder / "fields.png")]
    picture = plots_operators.error_curves(curves, xlabel="examples of the unseen form", ylabel="relative L2 error, %")
    return [*paths, plots_operators.save_small(picture, folder / "transfer.png")]


def main(argv: Sequence[str] | None = None) -> int:
    import tyro

    arguments = tyro.cli(Arguments, args=list(sys.argv[1:] if argv is None else argv), prog="fisher.py")
    return command.run_command(lambda: experiment(arguments))


if __name__ == "__main__":
    sys.exit(main())
