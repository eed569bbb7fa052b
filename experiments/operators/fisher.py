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
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

# jax 0.10.1 prints a harmless E-level message of XLA whenever it finds a compiled program in its cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import training
import transfer
from training import Arm, Recipe, run_study, train_arm

import mtjax
from mtjax import plots_operators
from mtjax.data.pde import fisher
from mtjax.models.mt_deeponet import fisher_deeponet, small_deeponet, with_code
from mtjax.train import report
from mtjax.train.fields import Domain, field_problem, predict_fields
from mtjax.train.study import Found, plain

DATA, RECIPE = fisher.FisherConfig(), Recipe(learning_rates=(5e-3,))
SYSTEM = "operators_fisher"
JOINT, SEPARATE, SHORTER, ZEROED = "joint", "separate", "separate, same total", "joint, code zeroed"
ARMS = (JOINT, SEPARATE, SHORTER, ZEROED)
NO_LEARNING = "mean training field"
# Not among the training forms: between two of them, and with a power that none of them has.
MIXED = fisher.Form("mixed", (1, -0.5, -0.5))
QUARTIC = fisher.Form("quartic", (1, 0, 0, -1))


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and budgets. `--set recipe.steps=500` overrides any field.

    Attributes:
      data: the equation and the laws of its inputs.
      train_per_form, validation_per_form, test_per_form: functions.
      network: 'small' (GELU, Fourier features; trains in seconds) or 'published' (the paper's sizes).
      recipe: how every arm is trained.
      arms: what to train, of `ARMS`.
      methods: multi-objective methods to train the joint network with, beside the sum.
      examples: numbers of examples of an unseen form to fine-tune with.
      transfer_steps: updates of fine-tuning, and of training from scratch.
      tuned_rates: learning rates of fine-tuning.
      data_seed: of the data.
      seeds: number of seeds.
    """

    data: fisher.FisherConfig = DATA
    train_per_form: int = 100
    validation_per_form: int = 50
    test_per_form: int = 200
    network: Literal["small", "published"] = "small"
    recipe: Recipe = RECIPE
    arms: tuple[str, ...] = ARMS
    methods: tuple[str, ...] = ()
    examples: tuple[int, ...] = (5, 20, 50, 100)
    transfer_steps: int = 1000
    tuned_rates: tuple[float, ...] = (1e-4, 5e-4, 2e-3)
    data_seed: int = 0
    seeds: int = 3

    def __post_init__(self):
        training.check_names("methods", self.methods, training.METHODS)
        training.check_names("arms", self.arms, ARMS, required=(JOINT, SEPARATE))


STUDY = Config(recipe=Recipe(), methods=("uncertainty", "pcgrad", "fairgrad"))
SMOKE = Config(
    data=fisher.FisherConfig(num_nodes=16, num_times=5),
    train_per_form=8,
    validation_per_form=4,
    test_per_form=4,
    recipe=Recipe(steps=4, batch_size=8, points_per_step=32, learning_rates=(5e-3,)),
    arms=(JOINT, SEPARATE, ZEROED),
    examples=(2,),
    transfer_steps=2,
    tuned_rates=(1e-3,),
    seeds=2,
)
DEMO = dataclasses.replace(
    STUDY,
    recipe=dataclasses.replace(RECIPE, steps=1500),
    methods=(),
    examples=(20, 100),
    transfer_steps=400,
    tuned_rates=(5e-4,),
)
PAPER = Config(
    train_per_form=1000,
    validation_per_form=200,
    test_per_form=200,
    network="published",
    recipe=Recipe(steps=100_000, batch_size=200, points_per_step=None, learning_rates=(1e-3,), loss="mse"),
    transfer_steps=5000,
)
PRESETS = {"smoke": SMOKE, "demo": DEMO, "study": STUDY, "paper": PAPER}


def network(config: Config) -> Any:
    """The operator network: its branch reads the code and the initial field."""
    return small_deeponet() if config.network == "small" else fisher_deeponet()


def rows_of(split: Mapping[str, Any], *, zeroed: bool = False) -> dict[str, Any]:
    """A split as the network reads it: the code (or zeros) before the initial field, which is centred at 1/2."""
    code, initial = split["inputs"]["code"], split["inputs"]["initial"]
    inputs = np.asarray(with_code(initial - 0.5, code, zeroed=zeroed))
    return {"inputs": inputs, "values": split["values"], "task": split["task"]}


def tasks_of(config: fisher.FisherConfig) -> tuple[mtjax.Task, ...]:
    return training.tasks_named(form.name for form in config.forms)


def load(config: Config, forms: Sequence[fisher.Form], seed: int) -> dict[str, Any]:
    data = dataclasses.replace(config.data, forms=tuple(forms))
    sizes = {f"{name}_per_form": getattr(config, f"{name}_per_form") for name in ("train", "validation", "test")}
    return fisher.load(data, seed=seed, **sizes)


def train_arms(config: Config, data: Mapping[str, Any], run: pathlib.Path, resume: bool) -> dict[str, Arm]:
    """Joint and separate networks, the control without a code, and other objective methods."""
    model, tasks, seeds = network(config), tasks_of(config.data), range(config.seeds)
    domain = Domain(data["train"]["points"])
    options = {"loss": config.recipe.loss, "points_per_step": config.recipe.points_per_step}
    record = {"config": plain(config)}

    def arm(name, *, zeroed=False, recipe=config.recipe, **more):
        train, validation, test = (rows_of(data[s], zeroed=zeroed) for s in ("train", "validation", "test"))
        problem = field_problem(model, tasks, domain, train, validation, **options)
        return train_arm(name, problem, test, recipe, seeds, run, resume=resume, record=record, **more)

    how = {
        JOINT: {},
        SEPARATE: {"separate": True},
        SHORTER: {"separate": True, "recipe": config.recipe.shared_among(len(tasks))},
        ZEROED: {"zeroed": True},
    }
    return training.train_arms(arm, config.arms, how, config.methods, JOINT)


def study(config: Config, run: pathlib.Path, resume: bool) -> Found:
    """All arms, and the transfer to forms that were not trained on."""
    data = load(config, config.data.forms, config.data_seed)
    tasks = tasks_of(config.data)
    arms = train_arms(config, data, run, resume)
    moved, moved_rows, curves = study_transfer(config, arms[JOINT], run, resume)
    twice = {"factor": 2.0, "better": False}
    asked = (
        ("one network for all forms beats a network per form, each trained as long", JOINT, SEPARATE, {}),
        ("and a network per form with the same total of steps", JOINT, SHORTER, {}),
        ("the code carries it: without, the error is more than twice as large", ZEROED, JOINT, twice),
    )
    claims = training.findings(asked, arms)
    rows = report.result_rows(NO_LEARNING, training.mean_field_error(tasks, data["train"], data["test"]))
    rows += training.arm_rows(arms, SEPARATE)
    return Found(
        tasks,
        [*claims, *moved],
        [*rows, *moved_rows],
        lambda folder: draw(config, data["test"], arms[JOINT], curves, folder),
    )


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
    how = {"tuned": config.tuned_rates, "resume": resume}
    return transfer.move(target, joint, recipe, config.examples, range(config.seeds), run / "transfer", **how)


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
    return run_study(argv, __doc__, SYSTEM, PRESETS, study)


if __name__ == "__main__":
    sys.exit(main())
