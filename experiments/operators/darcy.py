"""One DeepONet for Darcy flow in several geometries, beside one network per geometry, and moved to new geometries.

Paper:   "Synergistic Learning with Multi-Task DeepONet for Efficient PDE Problem Solving", Neural Networks 184, 2025
         (arXiv 2408.02198), second study. Its error tables are not public in text; the released source network, run on
         fields drawn anew, is 4.3-4.4 % off on the square, 4.7 % on the disk, 7-9 % on the triangle (5,400 training
         fields on a 100 x 100 grid; here 900 on 32 x 32).
Claims:  one network for several geometries beats a network per geometry; the binary mask in the branch and in the loss
         improves convergence and generalisation; fine-tuning a subset of the weights moves it to new geometries.
Data:    -div(K grad u) = 1, u = 0 on the boundary, log K a Gaussian field (`mtjax.data.pde.darcy`; exact boundaries,
         not a staircase). Hexagon, right triangle and plus are not trained on.
Command: python experiments/operators/darcy.py            # about two minutes on two CPU cores
Results: experiments/results/operators_darcy.json, experiments/results/figures/operators_darcy_*.png (--preset study)
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
from training import MAIN, Arm, Recipe, run_study, train_arm

from mtjax import plots_operators
from mtjax.data.pde import darcy
from mtjax.models.fno import FNO
from mtjax.models.mt_deeponet import darcy_deeponet, small_deeponet
from mtjax.models.unet import UNet
from mtjax.nn.output_transforms import apply_mask, hard_boundary
from mtjax.train import report
from mtjax.train.compare import mean_and_se
from mtjax.train.fields import Domain, field_problem, predict_fields
from mtjax.train.study import Found, plain

SYSTEM = "operators_darcy"
JOINT, SEPARATE, SHORTER = "joint", "separate", "separate, same total"
BRANCH_ONLY, LOSS_ONLY, NO_MASK = "mask in the branch only", "mask in the loss only", "no mask"
HARD, FNO_PEER, UNET_PEER = "joint, hard boundary", "joint, FNO", "joint, U-Net"
METHODS = ("uncertainty", "pcgrad", "fairgrad")
ARMS = (JOINT, SEPARATE, SHORTER, BRANCH_ONLY, LOSS_ONLY, NO_MASK, HARD, FNO_PEER, UNET_PEER)
NO_LEARNING = "mean training field"
# The image is read whole by the peers on the grid; the small DeepONet reads every other pixel.
FIELDS = darcy.DarcyConfig(target_train=150, input_stride=1)
DEVELOPED = 50
"""Of the fields of each target geometry these are kept to choose learning rates by."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and budgets. `--set recipe.steps=500` overrides any field.

    Attributes:
      data: geometries, grid and law of the fields.
      network: 'small' (GELU, Fourier features; trains in seconds) or 'published' (the paper's CNN).
      recipe: how DeepONets are trained.
      arms: what to train, of `ARMS`.
      peer_steps: updates of the peers on the grid, FNO and U-Net; on a CPU they take about the same time.
      peer_rates: their learning rates.
      methods: multi-objective methods to train the joint network with, beside the sum.
      examples: numbers of examples of an unseen geometry to fine-tune with.
      transfer_steps: updates of fine-tuning, and of training from scratch.
      tuned_rates: learning rates of fine-tuning.
      data_seed: of the fields.
      seeds: number of seeds.
    """

    data: darcy.DarcyConfig = FIELDS
    network: Literal["small", "published"] = "small"
    recipe: Recipe = Recipe()  # noqa: RUF009
    arms: tuple[str, ...] = ARMS
    peer_steps: tuple[int, int] = (1000, 400)
    peer_rates: tuple[float, ...] = (3e-3,)
    methods: tuple[str, ...] = ("uncertainty", "fairgrad")
    examples: tuple[int, ...] = (5, 20, 50, 100)
    transfer_steps: int = 1000
    tuned_rates: tuple[float, ...] = (1e-4, 5e-4, 2e-3)
    data_seed: int = 0
    seeds: int = 3

    def __post_init__(self):
        training.check_names("methods", self.methods, METHODS)
        training.check_names("arms", self.arms, ARMS, required=(JOINT, SEPARATE))
        if max(self.examples, default=0) > self.data.target_train - DEVELOPED and self.data.target_train > DEVELOPED:
            raise ValueError(
                f"examples may be at most data.target_train - {DEVELOPED} = {self.data.target_train - DEVELOPED}, got "
                f"{max(self.examples)}"
            )


STUDY = Config()
DEMO = dataclasses.replace(
    STUDY,
    recipe=Recipe(steps=1200, learning_rates=(5e-3,)),
    arms=ARMS[:6],
    methods=(),
    examples=(20, 100),
    transfer_steps=300,
    tuned_rates=(1e-3,),
)
SMOKE = Config(
    data=darcy.DarcyConfig(
        sources=("square", "disk"),
        targets=("hexagon",),
        size=16,
        refinement=1,
        train=8,
        validation=4,
        test=4,
        target_train=8,
        target_test=4,
        input_stride=1,
    ),
    recipe=Recipe(steps=4, batch_size=8, points_per_step=32, learning_rates=(5e-3,)),
    arms=(JOINT, SEPARATE, LOSS_ONLY),
    methods=(),
    examples=(2,),
    transfer_steps=2,
    tuned_rates=(1e-3,),
    seeds=2,
)
PAPER = Config(
    data=dataclasses.replace(darcy.PAPER, target_train=150),
    network="published",
    recipe=Recipe(steps=30_000, batch_size=1000, points_per_step=None, learning_rates=(1e-3,), loss="mse"),
    peer_steps=(10_000, 10_000),
    methods=(),
    transfer_steps=5000,
)
PRESETS = {"smoke": SMOKE, "demo": DEMO, "study": STUDY, "paper": PAPER}


def network(config: Config, *, masked: bool = True, hard: bool = False) -> Any:
    """The operator network; its prediction is multiplied by the mask, or by the distance to the boundary."""
    transforms = ((hard_boundary(),) if hard else ()) + ((apply_mask,) if masked else ())
    if config.network == "published":
        return darcy_deeponet(transforms=transforms)
    return small_deeponet(image_stride=2, transforms=transforms)


def rows_of(split: Mapping[str, Any], *, with_mask: bool = True, first_task: int = 0) -> dict[str, Any]:
    """A split as the network reads it: log K and the mask (or zeros) as channels of an image."""
    inputs = split["inputs"] if with_mask else split["inputs"] * np.array([1, 0], np.float32)
    # Published too: 10 u is of order one, as what an untrained network predicts.
    return {"inputs": inputs, "values": 10.0 * split["values"], "task": split["task"] - np.int32(first_task)}


def domain_of(config: Config, data: Mapping[str, Any], names: Sequence[str]) -> Domain:
    """Masks, and distances to the boundary of these geometries (0 outside, in units of the box, times 4: order one)."""
    described = darcy.domains(config.data)
    of = [list(config.data.geometries).index(name) for name in names]
    distance = 4.0 * np.maximum(0.0, -described["distance"][of])
    return Domain(data["train"]["points"], described["mask"][of], distance.astype(np.float32))


def train_arms(
    config: Config, data: Mapping[str, Any], domain: Domain, run: pathlib.Path, resume: bool
) -> dict[str, Arm]:
    """Joint and separate networks, the mask in and out, peers on the grid, other objective methods."""
    tasks, seeds = training.tasks_named(config.data.sources), range(config.seeds)
    record = {"config": plain(config)}
    sampled = config.recipe.points_per_step

    def arm(name, *, in_branch=True, in_loss=True, model=None, recipe=config.recipe, points=sampled, **more):
        model = network(config, masked=in_loss) if model is None else model
        train, validation, test = (rows_of(data[s], with_mask=in_branch) for s in ("train", "validation", "test"))
        options = {"loss": recipe.loss, "points_per_step": points, "inside": in_loss}
        problem = field_problem(model, tasks, domain, train, validation, **options)
        return train_arm(name, problem, test, recipe, seeds, run, resume=resume, record=record, **more)

    fno_recipe, unet_recipe = (
        dataclasses.replace(config.recipe, steps=steps, batch_size=32, learning_rates=config.peer_rates)
        for steps in config.peer_steps
    )
    fno = FNO(modes=(6, 6), width=16, num_layers=4, projection=32, padding=0.1, transforms=(apply_mask,))
    unet = UNet(channels=(8, 16, 32), coordinates=True, transforms=(apply_mask,))
    how = {
        JOINT: {},
        SEPARATE: {"separate": True},
        SHORTER: {"separate": True, "recipe": config.recipe.shared_among(len(tasks))},
        BRANCH_ONLY: {"in_loss": False},
        LOSS_ONLY: {"in_branch": False},
        NO_MASK: {"in_branch": False, "in_loss": False},
        HARD: {"model": network(config, hard=True)},
        FNO_PEER: {"model": fno, "recipe": fno_recipe, "points": None},
        UNET_PEER: {"model": unet, "recipe": unet_recipe, "points": None},
    }
    return training.train_arms(arm, config.arms, how, config.methods, JOINT)


def claims(arms: Mapping[str, Arm]) -> list[report.Finding]:
    """The paper's claims on source geometries, as far as the arms are there."""
    twice = {"factor": 2.0, "better": False}
    asked = (
        ("one network beats a network per geometry, each trained as long", JOINT, SEPARATE, {}),
        ("and a network per geometry with the same total of steps", JOINT, SHORTER, {}),
        ("the mask in the branch matters: without, the error is more than twice as large", LOSS_ONLY, JOINT, twice),
        ("the mask in the loss helps", JOINT, BRANCH_ONLY, {}),
    )
    return training.findings(asked, arms)


def study(config: Config, run: pathlib.Path, resume: bool) -> Found:
    """All arms, and the transfer to geometries that were not trained on."""
    data = darcy.load(config.data, seed=config.data_seed)
    tasks, domain = training.tasks_named(config.data.sources), domain_of(config, data, config.data.sources)
    arms = train_arms(config, data, domain, run, resume)

    targets = rows_of(data["target_train"], first_task=len(tasks))
    of_target = np.bincount(targets["task"]).min()
    kept = of_target - DEVELOPED if of_target > DEVELOPED else of_target // 2
    number = np.concatenate([np.arange(count) for count in np.bincount(targets["task"])])
    split = {"train": number < kept, "validation": number >= kept}
    splits = {name: {key: column[rows] for key, column in targets.items()} for name, rows in split.items()}
    target = transfer.Target(
        model=network(config),
        domain=domain_of(config, data, config.data.targets),
        names=config.data.targets,
        splits=splits | {"test": rows_of(data["target_test"], first_task=len(tasks))},
        options={"loss": "relative_l2", "points_per_step": config.recipe.points_per_step},
    )
    recipe = dataclasses.replace(config.recipe, steps=config.transfer_steps)
    moved, moved_rows, curves = transfer.move(
        target,
        arms[JOINT],
        recipe,
        config.examples,
        range(config.seeds),
        run / "transfer",
        tuned=config.tuned_rates,
        resume=resume,
    )

    nothing = training.mean_field_error(tasks, data["train"], data["test"], mask=domain.mask)
    rows = report.result_rows(NO_LEARNING, nothing)
    rows += training.arm_rows(arms, SEPARATE)

    def draw(folder: pathlib.Path) -> list[pathlib.Path]:
        return [
            plots_operators.save_small(fields(config, data, domain, arms[JOINT]), folder / "fields.png"),
            plots_operators.save_small(
                plots_operators.error_curves(curves, xlabel="examples of the unseen geometry"), folder / "transfer.png"
            ),
        ]

    ratio = arms[JOINT].mean() / arms[SEPARATE].mean()
    details = {"joint over separate": dict(zip(("mean", "se"), mean_and_se(ratio), strict=True)), "metric": MAIN}
    return Found(tasks, [*claims(arms), *moved], [*rows, *moved_rows], draw, details)


def fields(config: Config, data: Mapping[str, Any], domain: Domain, joint: Arm) -> Any:
    """Truth, prediction and error of the first test field of each geometry."""
    size, test = config.data.size, rows_of(data["test"])
    panels = {}
    for k, name in enumerate(config.data.sources):
        first = {key: value[test["task"] == k][:1] for key, value in test.items()}
        predicted = predict_fields(network(config), joint.of_seed(0, k), domain, first)
        truth = np.where(domain.mask[k], first["values"][0], np.nan)
        # The first axis is x; a picture has it to the right.
        panels[name] = (truth.reshape(size, size).T, predicted.reshape(size, size).T)
    return plots_operators.compare_fields(panels, title="u: the first test field of each geometry")


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(argv, __doc__, SYSTEM, PRESETS, study)


if __name__ == "__main__":
    sys.exit(main())
