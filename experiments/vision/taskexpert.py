"""TaskExpert on rendered rooms: what gates per image and a memory of features add to a decoder.

Paper:   "TaskExpert: Dynamically Assembling Multi-Task Representations with Memorial Mixture-of-Experts", ICCV 2023. No
         code was found; what is built and what is unverified is in `mtjax.models.taskexpert`.
Claims:  assembling task features from shared experts, dynamically, beats static decoders per task; the memory that is
         carried from layer to layer adds to it (the paper reports the best results on all nine metrics of two sets).
Data:    RoomScenes 32 x 32 (`mtjax.data.rooms`): segmentation, depth, normals, edges.
Setting: one dense trunk for every arm; decoders of equal numbers of parameters.
Command: python experiments/vision/taskexpert.py          # about two minutes on two CPU cores
Results: experiments/results/vision_taskexpert.json, experiments/results/figures/vision_taskexpert_*.png
"""

import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# jax 0.10.1 prints a harmless E-level message of XLA whenever it finds a compiled program in its cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import rooms_study
from training import Arm, Recipe, arm_rows, beats, measured, run_study, train_arm

from mtjax import dryrun, plots_vision
from mtjax.data import rooms
from mtjax.models.static_decoders import StaticConfig, StaticDecoder, StaticViT, match_width, parameter_count
from mtjax.models.taskexpert import GateStats, TaskExpert, TaskExpertConfig, TaskExpertDecoder, gate_entropy
from mtjax.nn.vit import VIT_B, ViTConfig
from mtjax.plots_objectives import save_small
from mtjax.sharding import to_host
from mtjax.train.images import Augment, image_problem, normalise_image
from mtjax.train.study import Found, plain

SYSTEM = "vision_taskexpert"
LAST, CONCATENATED, NO_MEMORY, FULL = (
    "static decoders, last layer",
    "static decoders, four layers",
    "experts, no memory",
    "experts and memory",
)
ARMS = (LAST, CONCATENATED, NO_MEMORY, FULL)
DATA = rooms.RoomsConfig(size=32, train=2048, validation=128, test=512)
DECODER = TaskExpertConfig(ViTConfig(patch=4, width=64, depth=4, num_heads=4), num_experts=4, width=16, upsample=2)
RECIPE = Recipe(steps=700, tuning_steps=175)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and budgets. `--set recipe.steps=500` overrides any field.

    Attributes:
      data: the rendered rooms.
      tasks: what to predict.
      decoder: trunk and decoder of the full model; the other arms' widths follow from its number of parameters.
      recipe: how every arm is trained.
      arms: what to train, of `ARMS`.
      seeds: number of seeds.
    """

    data: rooms.RoomsConfig = DATA
    tasks: tuple[str, ...] = rooms_study.TASKS
    decoder: TaskExpertConfig = DECODER
    recipe: Recipe = RECIPE
    arms: tuple[str, ...] = ARMS
    seeds: int = 4

    def __post_init__(self):
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown or not {LAST, FULL} <= set(self.arms):
            known, got = ", ".join(ARMS), ", ".join(self.arms)
            raise ValueError(f"arms must be among {known} and hold '{LAST}' and '{FULL}', got {got}")


STUDY = Config()
DEMO = Config(
    data=rooms.RoomsConfig(size=32, train=1024, validation=128, test=256),
    recipe=Recipe(steps=128, learning_rates=(2e-3,)),
    arms=(LAST, NO_MEMORY, FULL),
    seeds=2,
)
SMOKE = Config(
    data=rooms.RoomsConfig(size=16, train=8, validation=4, test=4),
    tasks=("segmentation", "depth"),
    decoder=TaskExpertConfig(ViTConfig(patch=4, width=16, depth=2, num_heads=2), num_experts=2, width=8),
    recipe=Recipe(steps=2, batch_size=4, learning_rates=(2e-3,)),
    arms=(LAST, FULL),
    seeds=2,
)
PAPER = Config(
    data=rooms.RoomsConfig(size=(448, 576), train=795, validation=64, test=654),
    decoder=TaskExpertConfig(VIT_B, layers=(2, 5, 8, 11), num_experts=5, width=384),
    recipe=Recipe(steps=40_000, batch_size=4, learning_rates=(2e-5,), weight_decay=1e-6),
)
PRESETS = {"smoke": SMOKE, "demo": DEMO, "study": STUDY, "paper": PAPER}


def make_model(config: Config, arm: str, heads: Mapping[str, int]) -> Any:
    """The model of an arm, its decoders as large as those of the full model."""
    full, size = config.decoder, config.data.shape
    target = parameter_count(TaskExpertDecoder(heads, full), full, size)
    if arm == FULL:
        return TaskExpert(heads, full)
    if arm == NO_MEMORY:
        none = dataclasses.replace(full, memory=False)
        matched = match_width(none, target, count=lambda c: parameter_count(TaskExpertDecoder(heads, c), c, size))
        return TaskExpert(heads, matched)
    static = StaticConfig(full.vit, full.layers if arm == CONCATENATED else None, width=full.width)
    return StaticViT(
        heads, match_width(static, target, count=lambda c: parameter_count(StaticDecoder(heads, c), c, size))
    )


def train_arms(config: Config, data: Mapping[str, Any], run: pathlib.Path, resume: bool) -> dict[str, Arm]:
    """All arms, at one budget."""
    tasks = rooms_study.make_tasks(config.tasks)

    def arm(name: str) -> Arm:
        model = make_model(config, name, rooms_study.head_sizes(tasks))
        return train_arm(
            name,
            model,
            image_problem(model, tasks, data["train"], data["validation"], augment=Augment()),
            data["test"],
            config.recipe,
            range(config.seeds),
            run,
            resume=resume,
            judge=rooms_study.judged(model, tasks, data["validation"]),
            record={"config": plain(config)},
        )

    return dryrun.each(config.arms, arm)


def gates_of(arm: Arm, images: np.ndarray, batch_size: int = 64) -> dict[str, np.ndarray]:
    """The gates of all seeds on some images, {layer: f[S, T, n, N (+ 1)]}."""

    @jax.jit
    def run(params, image):
        batch = {"image": normalise_image(image)}
        stats = jax.vmap(lambda own: arm.model.apply({"params": own}, batch, with_aux=True)[1])(params)
        return {layer: of.gates for layer, of in stats.items()}

    pieces = [to_host(run(arm.params, images[i : i + batch_size])) for i in range(0, len(images), batch_size)]
    return {layer: np.concatenate([piece[layer] for piece in pieces], axis=2) for layer in pieces[0]}


def gate_findings(gates: Mapping[str, np.ndarray]) -> list[Any]:
    """Whether gating is dynamic: gates vary over images, and are sharper than a uniform mixture."""
    spread = np.mean([of.std(axis=2).mean(axis=(1, 2)) for of in gates.values()], axis=0)
    sharper = np.mean(
        [
            [1 - float(gate_entropy(GateStats(own)).mean()) / math.log(own.shape[-1]) for own in of]
            for of in gates.values()
        ],
        axis=0,
    )
    return [
        measured("gates depend on the image: their standard deviation over test images", "0", spread, above=0.01),
        measured(
            "gates choose: their entropy is below that of a uniform mixture, by a share of it",
            "0 %",
            100 * sharper,
            above=1.0,
            unit=" %",
        ),
    ]


def study(config: Config, run: pathlib.Path, resume: bool) -> Found:
    """All arms, and what the gates do."""
    data = rooms.load(config.data)
    arms = train_arms(config, data, run, resume)
    tasks, gates = arms[FULL].tasks, gates_of(arms[FULL], data["test"]["image"])
    asked = (
        ("experts and memory beat a static decoder on the last layer, at equal parameters", FULL, LAST),
        ("and a static decoder on all four layers", FULL, CONCATENATED),
        ("the memory adds to the mixture of experts", FULL, NO_MEMORY),
        ("without memory, experts still beat a static decoder on the last layer", NO_MEMORY, LAST),
    )
    findings = [beats(claim, arms[a], arms[b]) for claim, a, b in asked if {a, b} <= arms.keys()]
    rows = arm_rows(list(arms.values()), LAST, rooms_study.no_learning(tasks, data))
    heads = rooms_study.head_sizes(tasks)
    decoders = {
        name: parameter_count(
            (TaskExpertDecoder if isinstance(arm.model, TaskExpert) else StaticDecoder)(heads, arm.model.config),
            arm.model.config,
            config.data.shape,
        )
        for name, arm in arms.items()
    }
    details = {
        "decoder_parameters": decoders,
        "mean_gates": {layer: of.mean(axis=(0, 2)).tolist() for layer, of in gates.items()},
        "gate_std_over_images": {layer: of.std(axis=2).mean(axis=0).tolist() for layer, of in gates.items()},
    }

    def draw(folder: pathlib.Path) -> Sequence[pathlib.Path]:
        shown = {"static": arms[LAST], "experts": arms[FULL]}
        figure = plots_vision.gate_figure({layer: of[0] for layer, of in gates.items()}, [task.name for task in tasks])
        return [
            rooms_study.draw_predictions(shown, data["test"], folder, 4),
            save_small(figure, folder / "gates.png"),
        ]

    return Found(tasks, [*findings, *gate_findings(gates)], rows, draw, details)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(argv, __doc__, SYSTEM, PRESETS, study)


if __name__ == "__main__":
    sys.exit(main())
