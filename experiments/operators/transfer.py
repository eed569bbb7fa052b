"""Moving a trained operator network to a task it has not seen: zero-shot, fine-tuned on a few examples, from scratch.

The baseline is tuned as the fine-tuning is: the same steps, each with candidates of the learning rate of its own,
chosen on validation functions of the target.

Letters: S seeds, m examples.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from training import MAIN, Arm, Recipe, against, say, tasks_named, train_arm

import mtjax
from mtjax.models import mt_deeponet_training
from mtjax.train import report
from mtjax.train.fields import Domain, field_problem

WAYS = ALL, SUBSET, SCRATCH = ("fine-tuned", "fine-tuned, published subset", "from scratch")


@dataclasses.dataclass(frozen=True)
class Target:
    """Tasks that were not trained on.

    Attributes:
      model: the operator network.
      domain: points, and masks by target.
      names: of the targets, in the order of the column 'task'.
      splits: 'train', 'validation' and 'test' as the network reads them, with as many training rows of each target.
      options: of the loss.
    """

    model: Any
    domain: Domain
    names: tuple[str, ...]
    splits: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]

    def tasks(self) -> tuple[mtjax.Task, ...]:
        return tasks_named(self.names)

    def problem(self, examples: int):
        """With the first m training functions of every target."""
        train = self.splits["train"]
        kept = np.concatenate([np.flatnonzero(train["task"] == k)[:examples] for k in range(len(self.names))])
        few = jax.tree.map(lambda column: column[kept], dict(train))
        return field_problem(self.model, self.tasks(), self.domain, few, self.splits["validation"], **self.options)


def move(
    target: Target,
    source: Arm,
    recipe: Recipe,
    examples: Sequence[int],
    seeds: Sequence[int],
    directory: pathlib.Path,
    *,
    tuned: Sequence[float],
    resume: bool,
    subset: Callable[[Any], Any] = mt_deeponet_training.transfer_labels,
) -> tuple[list[report.Finding], list[report.Row], dict[str, Any]]:
    """Zero-shot error, and errors with m examples of each target in three ways, all targets with networks of their own.

    Args:
      target: the unseen tasks.
      source: the arm to start from, one network per seed.
      recipe: how networks are trained from scratch; fine-tuning differs by its learning rates `tuned`.
      examples: numbers m.
      seeds: the seeds.
      directory: for checkpoints.
      tuned: learning rates of fine-tuning.
      resume: go on from them.
      subset: parameters -> labels 'train' and 'freeze' of the published subset.

    Returns:
      Findings, report rows, and {target: {way: (m [n], error in % [n, S])}}.
    """
    start = source.params
    first = jax.tree.map(lambda leaf: leaf[0], start)
    fewer = dataclasses.replace(recipe, learning_rates=tuple(tuned))
    evaluate = target.problem(1).evaluator(False)
    zero_shot = evaluate(start, target.splits["test"])
    errors = ", ".join(f"{task} {100 * values[MAIN].mean():.1f}" for task, values in zero_shot.items())
    print(f"unseen, without any example: error in %: {errors}", flush=True)
    rows = report.result_rows("zero-shot", zero_shot, baseline=SCRATCH, examples=0)
    ways = {
        SCRATCH: (recipe, {}),
        ALL: (fewer, {"start": start}),
        SUBSET: (fewer, {"start": start, "wrap": lambda tx: mt_deeponet_training.fine_tune(tx, subset(first))}),
    }
    found: dict[int, dict[str, Arm]] = {}
    for m in examples:
        problem = target.problem(m)
        for way, (how, options) in ways.items():
            # A network is trained for each target: lanes with rows of their own.
            name = f"{way}, {m} examples"
            arm = train_arm(
                name,
                problem,
                target.splits["test"],
                how,
                seeds,
                directory,
                resume=resume,
                separate=len(target.names) > 1,
                **options,
            )
            say(arm)
            found.setdefault(m, {})[way] = arm
            rows += report.result_rows(name, arm.test, baseline=SCRATCH, examples=m, **arm.cost())
    curves = {
        name: {
            way: (
                np.array([0, *examples] if way == ALL else examples),
                100
                * np.stack(
                    [
                        *([zero_shot[name][MAIN]] if way == ALL else []),
                        *(found[m][way].test[name][MAIN] for m in examples),
                    ]
                ),
            )
            for way in ways
        }
        for name in target.names
    }
    return findings(found, examples), rows, curves


def findings(found: Mapping[int, Mapping[str, Arm]], examples: Sequence[int]) -> list[report.Finding]:
    """That fine-tuning on few examples beats training on many, and that the subset costs little."""
    few, many = sorted(examples)[len(examples) > 2], max(examples)
    pairs = (
        (f"fine-tuned on {few} examples beats from scratch on {few}", found[few][ALL], found[few][SCRATCH]),
        (f"fine-tuned on {few} examples beats from scratch on {many}", found[few][ALL], found[many][SCRATCH]),
        (f"all weights beat the published subset, {few} examples", found[few][ALL], found[few][SUBSET]),
    )
    return [against(claim, ours, theirs) for claim, ours, theirs in pairs]
