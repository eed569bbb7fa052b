"""One DeepONet for heat in plates with a circle of bolts: designs that it has not seen, from their two parameters.

Paper:   "Synergistic Learning with Multi-Task DeepONet for Efficient PDE Problem Solving", Neural Networks 184, 2025
         (arXiv 2408.02198), third study. Its error tables are not public in text.
Claims:  one network trained on 24 designs (2 to 9 holes, three radii) predicts the temperature of 40 unseen ones (the
         same numbers of holes, five radii between); joint training beats a network per number of holes.
Data:    steady heat conduction in three dimensions (`mtjax.data.pde.heat3d`; the plate is the published one, boundary
         conditions are ours). Nothing in it is random: seeds are those of the networks.
Note:    T is close to 320 K everywhere, which flatters its relative error: T - T_min is reported beside it, and two
         baselines without learning, of which the interpolation of training fields in the radius is the one to beat.
Command: python experiments/operators/heat3d.py            # about two minutes on two CPU cores
Results: experiments/results/operators_heat3d.json, experiments/results/figures/operators_heat3d_*.png (--preset study)
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

# jax 0.10.1 prints a harmless E-level message of XLA whenever it finds a compiled program in its cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax.numpy as jnp
import numpy as np
import training
from training import Arm, Recipe, run_study, train_arm

import mtjax
from mtjax import metrics, plots_operators
from mtjax.data.pde import heat3d
from mtjax.models.mt_deeponet import heat3d_deeponet, small_deeponet
from mtjax.nn.output_transforms import apply_mask, standardised
from mtjax.train import report
from mtjax.train.compare import mean_and_se, verdict
from mtjax.train.fields import Domain, field_problem, predict_fields
from mtjax.train.study import Found, plain

SYSTEM = "operators_heat3d"
ABOVE = "relative_l2_above_minimum"
JOINT, ZEROED = "joint", "joint, design zeroed"
SEPARATE, SHORTER = "a network per number of holes", "a network per number of holes, same total"
METHODS = ("uncertainty", "pcgrad", "fairgrad")
ARMS = (JOINT, SEPARATE, SHORTER, ZEROED)
MEAN_FIELD, INTERPOLATED = "mean training field", "interpolation in the radius"
PLATES = heat3d.HeatConfig()


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and budgets. `--set recipe.steps=500` overrides any field.

    Attributes:
      data: designs, grid and physics.
      network: 'small' (GELU, Fourier features; trains in seconds) or 'published' (the paper's, with layer norm).
      sigma: of the small network's Fourier features, in cycles per half width of the plate.
      recipe: how every arm is trained.
      arms: what to train, of `ARMS`.
      methods: multi-objective methods over the numbers of holes to train the joint network with, beside the sum.
      seeds: number of seeds.
    """

    data: heat3d.HeatConfig = PLATES
    network: Literal["small", "published"] = "small"
    sigma: float = 1.0
    recipe: Recipe = Recipe(batch_size=24, points_per_step=512, learning_rates=(2e-3, 5e-3, 1e-2))  # noqa: RUF009
    arms: tuple[str, ...] = ARMS
    methods: tuple[str, ...] = ("uncertainty", "fairgrad")
    seeds: int = 3

    def __post_init__(self):
        training.check_names("methods", self.methods, METHODS)
        training.check_names("arms", self.arms, ARMS, required=(JOINT,))


STUDY = Config()
DEMO = dataclasses.replace(
    STUDY, recipe=dataclasses.replace(STUDY.recipe, steps=2000, learning_rates=(5e-3,)), methods=()
)
SMOKE = Config(
    data=heat3d.HeatConfig(holes=(2, 3), train_radii=(0.9, 1.6), test_radii=(1.2,), size=12, layers=4, refinement=1),
    recipe=Recipe(steps=4, batch_size=4, points_per_step=32, learning_rates=(2e-3,)),
    arms=(JOINT, SEPARATE),
    methods=(),
    seeds=2,
)
PAPER = Config(
    data=heat3d.PAPER,
    network="published",
    recipe=Recipe(steps=20_000, batch_size=24, points_per_step=None, learning_rates=(1e-3,), loss="mse"),
    methods=(),
)
PRESETS = {"smoke": SMOKE, "demo": DEMO, "study": STUDY, "paper": PAPER}


def network(config: Config) -> Any:
    """The operator network, which predicts kelvin: the temperature of the rim plus a share of the bolts' excess."""
    plate = config.data

    def everywhere(value):
        return lambda batch: jnp.full(batch["points"].shape[-2], value)

    kelvin = standardised(everywhere(plate.rim), everywhere(plate.bolt - plate.rim))
    if config.network == "published":
        return heat3d_deeponet(transforms=(kelvin, apply_mask))
    return small_deeponet(sigma=config.sigma, transforms=(kelvin, apply_mask))


def tasks_of(config: Config) -> tuple[mtjax.Task, ...]:
    measured = (metrics.relative_l2(), metrics.relative_l2("minimum"))
    return training.tasks_named((f"{n} holes" for n in config.data.holes), measured)


def rows_of(split: Mapping[str, Any], *, zeroed: bool = False) -> dict[str, Any]:
    """A split as the network reads it: the design (or zeros), and the solid of each as a mask."""
    inputs = 0 * split["inputs"] if zeroed else split["inputs"]
    return {"inputs": inputs, "values": split["values"], "task": split["task"], "mask": split["mask"]}


def domain_of(data: Mapping[str, Any], config: Config) -> Domain:
    """The points; those of the small network are in half widths of the plate."""
    points = data["train"]["points"]
    return Domain(points if config.network == "published" else points / np.float32(config.data.plate_radius))


def baselines(data: Mapping[str, Any], tasks: Sequence[mtjax.Task]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Errors without learning: the mean training field of the same number of holes, and linear interpolation in r.

    A point in a hole of a training design has no temperature there; the other designs answer for it.
    """
    train, test = data["train"], data["test"]
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {MEAN_FIELD: {}, INTERPOLATED: {}}
    for k, task in enumerate(tasks):
        of = train["task"] == k
        order = np.argsort(train["design"][of][:, 1])
        radii = train["design"][of][order, 1]
        fields = np.where(train["mask"][of], train["values"][of].astype(np.float64), np.nan)[order]
        known = ~np.isnan(fields)
        mean = np.where(known, fields, 0.0).sum(0) / np.maximum(known.sum(0), 1)
        errors: dict[str, list] = {MEAN_FIELD: [], INTERPOLATED: []}
        for row in np.flatnonzero(test["task"] == k):
            radius, inside = test["design"][row, 1], test["mask"][row]
            right = int(np.clip(np.searchsorted(radii, radius), 1, len(radii) - 1))
            share = (radius - radii[right - 1]) / (radii[right] - radii[right - 1])
            between = (1 - share) * fields[right - 1] + share * fields[right]
            truth = test["values"][row][inside].astype(np.float64)
            for name, field in ((MEAN_FIELD, mean), (INTERPOLATED, np.where(np.isnan(between), mean, between))):
                error, above = np.linalg.norm(field[inside] - truth), truth - truth.min()
                errors[name].append((error / np.linalg.norm(truth), error / np.linalg.norm(above)))
        for name, pairs in errors.items():
            means = np.mean(pairs, axis=0)
            found[name][task.name] = {training.MAIN: means[:1], ABOVE: means[1:]}
    return found


def study(config: Config, run: pathlib.Path, resume: bool) -> Found:
    """All arms, beside predictions without learning."""
    data, tasks = heat3d.load(config.data), tasks_of(config)
    model, domain, seeds = network(config), domain_of(data, config), range(config.seeds)
    record = {"config": plain(config)}
    options = {"loss": config.recipe.loss, "points_per_step": config.recipe.points_per_step}

    def arm(name, *, zeroed=False, recipe=config.recipe, **more):
        train, test = (rows_of(data[split], zeroed=zeroed) for split in ("train", "test"))
        # There are 24 designs to train on and none to spare: rates are chosen on the training designs.
        problem = field_problem(model, tasks, domain, train, train, eval_batch_size=8, **options)
        return train_arm(name, problem, test, recipe, seeds, run, resume=resume, record=record, **more)

    how = {
        JOINT: {},
        SEPARATE: {"separate": True},
        SHORTER: {"separate": True, "recipe": config.recipe.shared_among(len(tasks))},
        ZEROED: {"zeroed": True},
    }
    arms = training.train_arms(arm, config.arms, how, config.methods, JOINT)

    twice = {"factor": 2.0, "better": False, "metric": ABOVE}
    asked = (
        ("one network beats a network per number of holes, each trained as long", JOINT, SEPARATE, {"metric": ABOVE}),
        ("and a network per number of holes with the same total of steps", JOINT, SHORTER, {"metric": ABOVE}),
        ("the design in the branch matters: twice the error of T - T_min without", ZEROED, JOINT, twice),
    )
    nothing = baselines(data, tasks)
    claims = [*training.findings(asked, arms), against_interpolation(arms[JOINT], nothing[INTERPOLATED])]
    rows = [row for name, results in nothing.items() for row in report.result_rows(name, results)]
    rows += training.arm_rows(arms, INTERPOLATED)

    def draw(folder: pathlib.Path) -> list[pathlib.Path]:
        figure = slices(config, data["test"], domain, arms[JOINT])
        return [plots_operators.save_small(figure, folder / "fields.png")]

    return Found(tasks, claims, rows, draw)


def against_interpolation(joint: Arm, results: Mapping[str, Mapping[str, np.ndarray]]) -> report.Finding:
    """Whether the network is more accurate than interpolating the training fields, in T - T_min."""
    theirs = 100 * float(np.mean([values[ABOVE][0] for values in results.values()]))
    ours = 100 * joint.mean(ABOVE)
    mean, se = mean_and_se(theirs - ours)
    reason = f"error of T - T_min in %: difference {mean:+.2f} ± {se:.2f}"
    shown = f"{INTERPOLATED}: {theirs:.2f} %", f"{joint.name}: {report.format_mean(*mean_and_se(ours))} %"
    claim = "unseen radii are predicted better than by interpolating the training fields"
    return report.Finding(claim, *shown, verdict(mean, se, ours.size), reason)


def slices(config: Config, test: Mapping[str, Any], domain: Domain, joint: Arm) -> Any:
    """The middle layer of an unseen design for the least, a middle and the greatest number of holes."""
    plate, rows = config.data, rows_of(test)
    shape, panels = (plate.size, plate.size, plate.layers), {}
    for k in sorted({0, len(plate.holes) // 2, len(plate.holes) - 1}):
        of = np.flatnonzero(test["task"] == k)
        row = of[len(of) // 2]
        one = {key: value[[row]] for key, value in rows.items()}
        predicted = predict_fields(network(config), joint.of_seed(0, k), domain, one)[0]
        truth = np.where(one["mask"][0], one["values"][0], np.nan)
        n, r = test["design"][row]
        middle = plate.layers // 2
        panels[f"n = {n:.0f}, r = {r:g}"] = tuple(f.reshape(shape)[:, :, middle].T for f in (truth, predicted))
    width = plate.plate_radius
    title = "T in kelvin half way up the plate, designs that were not trained on"
    return plots_operators.compare_fields(panels, extent=(-width, width, -width, width), title=title)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(argv, __doc__, SYSTEM, PRESETS, study)


if __name__ == "__main__":
    sys.exit(main())
