"""The modular model on heterogeneous data: experts that belong to tasks, small models pulled out, tasks added later.

Paper:   "An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training", 2023, and its parent
         "Mod-Squad: Designing Mixture of Experts As Modular Multi-Task Learners", CVPR 2023.
Claims:  a mutual-information loss between task and expert makes each task use few experts, where balancing spreads it
         over all; a model of the used experts keeps the accuracy; the joint model is close to single-task ones; a new
         task takes new experts and gates and leaves the outputs of the old tasks as they are, to the bit.
Data:    RoomScenes 32 x 32, one set per task, no image in two of them: object crops -> class, rooms -> segmentation,
         rooms -> boxes; later rooms -> depth.
Command: python experiments/vision/modular.py             # about two minutes on two CPU cores
Results: experiments/results/vision_modular.json, experiments/results/figures/vision_modular_*.png
"""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# jax 0.10.1 prints a harmless E-level message of XLA whenever it finds a compiled program in its cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np
from training import (
    Arm,
    Recipe,
    arm_rows,
    beats,
    gain,
    gain_by_seed,
    main_results,
    measured,
    run_study,
    train_arm,
)

from mtjax import dense_tasks, dryrun, plots_vision
from mtjax.data import rooms
from mtjax.dense_tasks import DenseTask
from mtjax.models import mod_squad_surgery as surgery
from mtjax.models.mod_squad import ModSquad, ModSquadConfig, PooledLinear
from mtjax.nn.decoders import HeatmapHead, LinearUnpatch
from mtjax.nn.moe import Dispatch
from mtjax.nn.vit import VIT_S, ViTConfig
from mtjax.plots_objectives import save_small
from mtjax.sharding import to_host
from mtjax.train import report
from mtjax.train.compare import mean_and_se
from mtjax.train.evaluate import Results
from mtjax.train.heterogeneous import (
    balanced,
    expert_usage,
    heterogeneous_problem,
    make_heterogeneous_evaluate,
    mutual_information,
)
from mtjax.train.images import Augment, normalise_image
from mtjax.train.study import Found, plain

SYSTEM = "vision_modular"
INFORMED, BALANCED, RUNNING, ALONE = (
    "mutual information",
    "balanced experts",
    "mutual information, a task per step",
    "single-task models",
)
ARMS = (INFORMED, BALANCED, RUNNING, ALONE)
NEW_TASK = "depth"
NEW, ROUTER, EVERYTHING, SCRATCH = "new experts", "gates and head only", "everything fine-tuned", "from scratch"
WAYS = (NEW, ROUTER, EVERYTHING, SCRATCH)
USED = 0.05  # a task uses an expert that gets more than this share of its choices
DATA = rooms.RoomsConfig(size=32, train=1024, validation=128, test=384)
MODEL = ModSquadConfig(
    ViTConfig(patch=4, width=64, depth=4, num_heads=4),
    num_experts=8,
    top_k=2,
    attention_experts=8,
    attention_top_k=4,
    dispatch=Dispatch("auto"),
)
RECIPE = Recipe()


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and budgets. `--set recipe.steps=500` overrides any field.

    Attributes:
      data: the rendered rooms; sizes are per task.
      tasks: what is trained together, each on images of its own.
      model: the trunk.
      recipe: how every arm is trained; a batch has `batch_size` images of every task.
      arms: what to train, of `ARMS`.
      information: weight of the mutual information.
      balance: weight of the balancing losses of the other arm.
      kept: numbers of experts per layer to which every task's model is cut.
      new_experts: per layer, for the task that is added.
      new_steps: updates for the task that is added.
      ways: how it is added, of `WAYS`.
      seeds: number of seeds.
    """

    data: rooms.RoomsConfig = DATA
    tasks: tuple[str, ...] = ("classification", "segmentation", "detection")
    model: ModSquadConfig = MODEL
    recipe: Recipe = RECIPE
    arms: tuple[str, ...] = (INFORMED, BALANCED, ALONE)
    information: float = 5e-3
    balance: float = 1e-2
    kept: tuple[int, ...] = (4, 5, 6)
    new_experts: int = 4
    new_steps: int = 400
    ways: tuple[str, ...] = WAYS
    seeds: int = 4

    def __post_init__(self):
        if NEW not in self.ways or not set(self.ways) <= set(WAYS):
            raise ValueError(f"ways must be among {', '.join(WAYS)} and hold '{NEW}', got {', '.join(self.ways)}")
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown or not {INFORMED, BALANCED} <= set(self.arms):
            known, got = ", ".join(ARMS), ", ".join(self.arms)
            raise ValueError(f"arms must be among {known} and hold '{INFORMED}' and '{BALANCED}', got {got}")


STUDY = Config()
DEMO = Config(
    data=rooms.RoomsConfig(size=32, train=512, validation=128, test=128),
    recipe=Recipe(steps=128, learning_rates=(2e-3,)),
    arms=(INFORMED, BALANCED),
    kept=(4,),
    new_steps=64,
    ways=(NEW, ROUTER),
    seeds=2,
)
SMOKE = Config(
    data=rooms.RoomsConfig(size=16, train=8, validation=4, test=4),
    tasks=("classification", "segmentation"),
    model=ModSquadConfig(
        ViTConfig(patch=4, width=16, depth=2, num_heads=2),
        num_experts=4,
        top_k=2,
        attention_experts=4,
        attention_top_k=2,
        dispatch=Dispatch("auto"),
    ),
    recipe=Recipe(steps=2, batch_size=4, learning_rates=(2e-3,)),
    arms=(INFORMED, BALANCED),
    kept=(2,),
    new_experts=1,
    new_steps=2,
    ways=(NEW,),
    seeds=2,
)
PAPER = Config(
    data=rooms.RoomsConfig(size=224, train=100_000, validation=5_000, test=5_000),
    model=ModSquadConfig(VIT_S, num_experts=16, top_k=4, attention_experts=12, attention_top_k=6),
    recipe=Recipe(steps=100_000, batch_size=256, learning_rates=(4e-4,), weight_decay=0.05),
)
PRESETS = {"smoke": SMOKE, "demo": DEMO, "study": STUDY, "paper": PAPER}


def make_tasks(names: Sequence[str], patch: int) -> tuple[DenseTask, ...]:
    made = {
        "classification": lambda: dense_tasks.classification(num_classes=len(rooms.OBJECT_CLASSES)),
        "segmentation": lambda: dense_tasks.segmentation(num_classes=len(rooms.ROOM_CLASSES)),
        "detection": lambda: dense_tasks.detection(num_classes=len(rooms.THINGS["rooms"]), stride=patch),
        "depth": dense_tasks.depth,
        "normals": dense_tasks.normals,
    }
    return tuple(made[name]() for name in names)


def make_model(config: Config, tasks: Sequence[DenseTask]) -> ModSquad:
    """The modular model with the heads of some tasks."""
    kinds = {"classification": PooledLinear, "detection": functools.partial(HeatmapHead, upsample=1)}
    heads = {task.name: task.channels for task in tasks}
    return ModSquad(config.model, heads, {task.name: kinds.get(task.kind, LinearUnpatch) for task in tasks})


def load(config: Config, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{split: {task: {'image', 'label'}}}; the classes of boxes are counted from the first thing."""
    sets = rooms.heterogeneous(config.data, names)
    for part in sets.get("detection", {}).values():
        classes = part["label"]["classes"]
        part["label"]["classes"] = np.where(classes >= 0, classes - rooms.THINGS["rooms"][0], classes)
    return {split: {name: sets[name][split] for name in names} for split in ("train", "validation", "test")}


def train_arms(config: Config, data: Mapping[str, Any], run: pathlib.Path, resume: bool) -> dict[str, Arm]:
    """The joint arms, and a single-task model of the same kind for every task."""
    tasks = make_tasks(config.tasks, config.model.vit.patch)
    record = {"config": plain(config)}

    def arm(name, of_tasks, recipe=config.recipe, **options):
        model = make_model(config, of_tasks)
        problem = heterogeneous_problem(model, of_tasks, data, augment=Augment(), **options)
        how = {"resume": resume, "record": record}
        return train_arm(name, model, problem, data["test"], recipe, range(config.seeds), run, **how)

    # A step of a task's own sees one task: as many updates of every task take as many times the steps.
    longer = dataclasses.replace(
        config.recipe,
        steps=config.recipe.steps * len(tasks),
        tuning_steps=config.recipe.tuning_steps * len(tasks),
    )
    how = {
        INFORMED: {"regularizer": mutual_information(config.information)},
        BALANCED: {"regularizer": balanced(config.balance)},
        RUNNING: {
            "regularizer": mutual_information(config.information, running=True),
            "mode": "task_per_step",
            "recipe": longer,
        },
    }
    arms = dryrun.each([name for name in config.arms if name in how], lambda name: arm(name, tasks, **how[name]))
    if ALONE in config.arms:
        own = [
            arm(f"{ALONE}, {task.name}", (task,), regularizer=balanced(config.balance), uncertainty=False)
            for task in tasks
        ]
        first = own[0]
        arms[ALONE] = dataclasses.replace(
            first,
            name=ALONE,
            tasks=tasks,
            test={name: metrics for part in own for name, metrics in part.test.items()},
            validation={name: metrics for part in own for name, metrics in part.validation.items()},
            params={task.name: part.params for task, part in zip(tasks, own, strict=True)},
            num_parameters=sum(part.num_parameters for part in own),
            steps=sum(part.steps for part in own),
        )
    return arms


def usage_of(arm: Arm, images: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
    """Shares of every task's choices, {layer: f[T, E]} of every seed."""
    seeds = range(len(jax.tree.leaves(arm.params)[0]))
    return [expert_usage(arm.model, arm.of_seed(seed), images) for seed in seeds]


def experts_used(usage: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """f[S]: experts per task and layer with more than `USED` of the task's choices, mean over tasks and layers."""
    return np.array([np.mean([(of > USED).sum(-1).mean() for of in own.values()]) for own in usage])


def pruned(arm: Arm, usage: Sequence[Mapping[str, np.ndarray]], data: Mapping[str, Any], kept: int) -> Results:
    """Test metrics of the small models of all tasks, each with its `kept` most used experts in every layer."""
    results = {}
    for index, task in enumerate(arm.tasks):
        cut = []
        for seed, own in enumerate(usage):
            most = {layer: _most_used(of, index, kept) for layer, of in own.items()}
            cut.append(surgery.extract(arm.model, arm.of_seed(seed), task.name, most, threshold=0.0))
        params = jax.tree.map(lambda *leaves: np.stack(leaves), *[params for _, params in cut])
        results |= make_heterogeneous_evaluate(cut[0][0], (task,))(params, data)
    return results


def _most_used(shares: np.ndarray, task: int, kept: int) -> np.ndarray:
    """Shares with all but the `kept` largest of a task set to 0 (an unused one of those counts as used a little)."""
    shares = np.array(shares, np.float64)
    order = np.argsort(-shares[task], kind="stable")
    shares[task, order[:kept]] = np.maximum(shares[task, order[:kept]], 1e-9)
    shares[task, order[kept:]] = 0.0
    return shares


def pruning_curves(
    arms: Mapping[str, Arm], usage: Mapping[str, Any], data: Mapping[str, Any], kept: Sequence[int]
) -> dict[str, dict[int, np.ndarray]]:
    """Delta_m of the cut models over the whole one in percent, {arm: {experts kept: f[S]}}."""
    curves = {}
    for name in (INFORMED, BALANCED):
        arm = arms[name]
        curves[name] = {
            count: gain_by_seed(main_results(arm.tasks, pruned(arm, usage[name], data, count)), arm.main, arm.tasks)
            for count in kept
        }
    return curves


def add_task(config: Config, arm: Arm, run: pathlib.Path, resume: bool) -> tuple[dict[str, Arm], np.ndarray]:
    """The new task on the trained model in several ways; and how much the old tasks' outputs moved, f[S]."""
    (task,) = make_tasks((NEW_TASK,), config.model.vit.patch)
    data = load(config, (NEW_TASK,))
    recipe = dataclasses.replace(
        config.recipe,
        steps=config.new_steps,
        tuning_steps=min(config.recipe.tuning_steps, max(1, config.new_steps // 2)),
    )
    image_size = data["train"][NEW_TASK]["image"].shape[1:3]

    def grown(seed: int, experts: int):
        return surgery.grow(
            arm.model,
            arm.of_seed(seed),
            NEW_TASK,
            experts,
            jax.random.key(seed),
            channels=task.channels,
            image_size=image_size,
            decoder=LinearUnpatch,
        )

    found = {}
    for name in config.ways:
        models = [grown(seed, config.new_experts if name == NEW else 0) for seed in range(config.seeds)]
        model, start = models[0][0], jax.tree.map(lambda *leaves: np.stack(leaves), *[params for _, params in models])
        wrap = None
        if name in (NEW, ROUTER):
            which = "new" if name == NEW else "router_and_head"
            mask = surgery.trainable(model, models[0][1], NEW_TASK, which)
            wrap = functools.partial(surgery.train_only, mask=mask)
        if name == SCRATCH:
            model, start = make_model(config, (task,)), None
        problem = heterogeneous_problem(model, (task,), data, uncertainty=False, augment=Augment())
        found[name] = train_arm(
            f"{NEW_TASK}, {name}",
            model,
            problem,
            data["test"],
            recipe,
            range(config.seeds),
            run,
            resume=resume,
            start=start,
            wrap=wrap,
            record={"config": plain(config)},
        )
    images = jnp.asarray(normalise_image(data["test"][NEW_TASK]["image"][:32]))
    return found, np.array([moved(arm, found[NEW], seed, images) for seed in range(config.seeds)])


def moved(old: Arm, new: Arm, seed: int, images: jax.Array) -> float:
    """The largest change of any output of an old task."""
    names = [task.name for task in old.tasks]

    def outputs(arm):
        apply = jax.jit(lambda params: arm.model.apply({"params": params}, {"image": images}, task=names))
        params = {key: leaf for key, leaf in arm.of_seed(seed).items() if key != "log_scales"}
        return to_host(apply(params))

    before, after = outputs(old), outputs(new)
    return max(float(np.abs(before[name] - after[name]).max()) for name in names)


def few_experts(usage: Mapping[str, Sequence[Any]], arms: Mapping[str, Arm]) -> report.Finding:
    """Whether the experts used per task halve at equal accuracy."""
    used = {name: experts_used(usage[name]) for name in (INFORMED, BALANCED)}
    found = measured(
        "with mutual information a task uses at most half of the experts that it uses with balancing",
        f"{used[BALANCED].mean():.2f} experts per task and layer",
        used[BALANCED] / used[INFORMED],
        above=2.0,
        unit=" times fewer",
    )
    delta, se, _ = gain(arms[INFORMED].main, arms[BALANCED].main, arms[INFORMED].tasks)
    reason = f"{used[INFORMED].mean():.2f} against {used[BALANCED].mean():.2f} experts ({found.reason})"
    return dataclasses.replace(found, reason=f"{reason}; Delta_m of one over the other {delta:+.2f} ± {se:.2f} %")


def keeps(curves: Mapping[str, Mapping[int, np.ndarray]], config: Config) -> list[report.Finding]:
    """Whether half of the experts suffice, with each loss."""
    half, total = min(config.kept), config.model.num_experts
    ours, theirs = curves[INFORMED][half], curves[BALANCED][half]
    claim = f"a task's model with {half} of {total} experts per layer changes by more than -1 %"
    more = "and by more than a balanced model that is cut alike"
    lost = report.format_mean(*mean_and_se(theirs))
    return [
        measured(claim, "the whole model", ours, above=-1.0, unit=" %"),
        measured(more, f"balanced: {lost} %", ours - theirs, above=0.0, unit=" points"),
    ]


def growth_findings(found: Mapping[str, Arm], change: np.ndarray) -> list[report.Finding]:
    """No forgetting, and what the new task reaches."""
    exact = report.Finding(
        "adding a task leaves the old tasks' outputs as they are",
        "0",
        f"largest change {change.max():g}",
        bool(change.max() == 0),
        f"largest change of any output over {change.size} seeds: {change.max():g}",
    )
    asked = (
        ("the added task: new experts beat gates and head alone", ROUTER),
        ("and training from scratch", SCRATCH),
        ("and come to what fine-tuning everything does", EVERYTHING),
    )
    return [exact, *(beats(claim, found[NEW], found[other]) for claim, other in asked if other in found)]


def study(config: Config, run: pathlib.Path, resume: bool) -> Found:
    """All arms, who uses which expert, cut models, and a task that is added."""
    data = load(config, config.tasks)
    arms = train_arms(config, data, run, resume)
    usage = {name: usage_of(arm, data["test"]) for name, arm in arms.items() if name != ALONE}
    curves = pruning_curves(arms, usage, data["test"], config.kept)
    added, change = add_task(config, arms[INFORMED], run, resume)
    findings = [few_experts(usage, arms), *keeps(curves, config), *growth_findings(added, change)]
    if RUNNING in arms:
        findings.append(
            measured(
                "a task per step, with a running estimate of the joint, does so too",
                f"{experts_used(usage[BALANCED]).mean():.2f} experts per task and layer",
                experts_used(usage[BALANCED]) / experts_used(usage[RUNNING]),
                above=2.0,
                unit=" times fewer",
            )
        )
    if ALONE in arms:
        delta, se, n = gain(arms[INFORMED].main, arms[ALONE].main, arms[ALONE].tasks)
        findings.append(
            report.Finding(
                "the joint model is within 3 % of single-task models",
                ALONE,
                f"{report.format_mean(delta, se)} %",
                bool(delta > -3),
                f"Delta_m {delta:+.2f} ± {se:.2f} % over {n} seeds",
            )
        )
    rows = arm_rows(list(arms.values()), ALONE if ALONE in arms else BALANCED)
    rows += arm_rows(list(added.values()), f"{NEW_TASK}, {config.ways[-1]}")
    details = {
        "experts_used": {name: experts_used(own).tolist() for name, own in usage.items()},
        "expert_use": {
            name: {layer: np.mean([of[layer] for of in own], axis=0).tolist() for layer in own[0]}
            for name, own in usage.items()
        },
        "pruning_curve": {
            name: {str(count): of.tolist() for count, of in points.items()} for name, points in curves.items()
        },
        "old_outputs_moved": change.tolist(),
    }
    names = [task.name for task in arms[INFORMED].tasks]

    def draw(folder: pathlib.Path) -> Sequence[pathlib.Path]:
        paths = [
            save_small(plots_vision.expert_use_heatmap(usage[name][0], names, title=name), folder / f"experts_{k}.png")
            for k, name in enumerate((INFORMED, BALANCED))
        ]
        removed = [100 * (1 - count / config.model.num_experts) for count in config.kept]
        points = {name: (removed, np.stack(list(of.values()), axis=1)) for name, of in curves.items()}
        return [*paths, save_small(plots_vision.pruning_curve(points), folder / "pruning.png")]

    return Found((*arms[INFORMED].tasks, *added[NEW].tasks), findings, rows, draw, details)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(argv, __doc__, SYSTEM, PRESETS, study)


if __name__ == "__main__":
    sys.exit(main())
