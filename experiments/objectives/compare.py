"""Every objective method on three multitask data sets, with equal budgets: gain, rank, and what a step costs.

Papers:  Kurin et al., "In Defense of the Unitary Scalarization for Deep Multi-Task Learning", NeurIPS 2022;
         Xin et al., "Do Current Multi-Task Optimization Methods in Deep Learning Even Help?", NeurIPS 2022.
Claims:  objective methods beat the plain sum of the losses (theirs); none beats a tuned weighted sum (Kurin, Xin);
         balancing helps where losses differ in scale; reading gradients helps more than reading losses.
Data:    flights: five tasks of three kinds on NYC flights 2013, split by time. digits: six tasks on 8 x 8 digits.
         bench: MultiTab-Bench with two groups of tasks whose directions oppose each other (cosine 1/2 within a group,
         -1/2 between), degrees 1 to 4, labels *not* standardised: their variances are 1, 3, 24 and 144.
Command: python experiments/objectives/compare.py                 # about two minutes on two CPU cores
         python experiments/objectives/compare.py --preset paper  # every method and data set
Results: experiments/results/objectives_compare.json, experiments/results/figures/objectives_compare_*.png (paper)

One small shared-bottom MLP serves every method; methods act on the parameters below the heads, heads follow their own
tasks. All get the same steps, batches, learning rates (chosen on validation rows), seeds and the defaults of their
papers (`--set tune=True` tries the one hyper-parameter of each). Gains (Delta_m) are over single-task MLPs that choose
their rate and epoch task by task. The tuned weighted sum is the best of several fixed weights on validation rows.

A block of the ranks is a data set, a task and a seed. Blocks of one data set share its split, and tasks share models,
so the critical difference is optimistic. Tests of claims are paired by seed, the unit that was repeated, and corrected
for the number of methods; they say nothing about other splits. Methods on the features of a trunk (RotoGrad,
`at_representation`) are left out: the train step takes models whole, and rotations would be needed in prediction too.

What a step costs beside the plain sum's (one forward, one backward pass), for K tasks:

| family     | passes on the batch of a step                                                                     |
|------------|---------------------------------------------------------------------------------------------------|
| `losses`   | one backward pass; FAMO one more forward pass                                                     |
| `Gramian`  | K backward passes, and one with the weights                                                       |
| `entries`  | K backward passes, whose gradients are held at once; buffers hold K more; CosReg differentiates   |
|            | each once more                                                                                    |
| `batches`  | the batch is cut into two or three parts (the rows read per step are those of all others), with K |
|            | backward passes on each; a look-ahead step adds some                                              |
| `flatness` | one backward pass more (SAM), or K more at K perturbed points (flat regions)                      |

It is measured as rows per second of all runs of a method, which train side by side. In a model of this size solvers
weigh more, and backward passes less, than in a large one: experiments/bench/objectives.py measures those.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in experiments/tabular/multitab.py

import methods
import numpy as np
from compare_claims import Found, findings
from compare_outcomes import Outcome, best, measure
from competitors import DATA, PRESETS, SINGLE, SUM, TABLE, TUNED, Config, left_out, settings

import mtjax
from mtjax import plots, ranks
from mtjax import plots_objectives as figures
from mtjax.delta import DeltaM, delta_table
from mtjax.train import command, report, tables
from mtjax.train.config import override
from mtjax.train.evaluate import main_scores

ROOT = pathlib.Path(__file__).resolve().parent.parent
SYSTEM = "objectives_compare"


@dataclasses.dataclass
class Arguments:
    """Compare objective methods with equal budgets: multitask gain, ranks over tasks and seeds, cost of a step."""

    preset: Literal["smoke", "demo", "paper"] = "demo"
    """smoke: seconds. demo: nine methods on two data sets. paper: every method on three."""
    methods: tuple[str, ...] = ()
    """Methods to compare. `--methods list` names them."""
    data: tuple[str, ...] = ()
    """Data sets, of flights, digits and bench."""
    seeds: int | None = None
    """Number of seeds (at least 3 for a standard error that means something)."""
    run: pathlib.Path | None = None
    """Run directory; by default a new one under runs/objectives_compare."""
    resume: bool = False
    """Go on with an interrupted run, with the options that it was started with: that of --run, by default the newest
    one. Methods that are finished are not run again."""
    set: Annotated[tuple[str, ...], "FIELD=VALUE"] = ()
    """Override configuration fields, e.g. --set bench.epochs=20 tune=True."""


class Clock:
    """How long the rest of a comparison will take, by the settings measured so far."""

    def __init__(self, total: int):
        self.total, self.done, self.measured, self.seconds = total, 0, 0, 0.0

    def note(self, count: int, seconds: float | None) -> str:
        """Counts settings that are done, measured now if there are seconds; returns the progress as text."""
        self.done += count
        if seconds is not None:
            self.measured, self.seconds = self.measured + count, self.seconds + seconds
        rest = (self.total - self.done) * self.seconds / max(self.measured, 1)
        return f"[{self.done}/{self.total}, {rest / 60:.1f} min to go]"


def run_data(name: str, data: Any, config: Config, run: pathlib.Path, clock: Clock) -> dict[str, Outcome] | None:
    """All methods on one data set, those on file not again; None if a signal interrupted it."""
    outcomes = {}
    for method in (SINGLE, *config.methods):
        path = run / name / f"{re.sub('[^a-z0-9]+', '-', method.lower()).strip('-')}.json"
        tried = settings(method, config)
        seconds = None
        if path.exists():
            outcome = Outcome.from_json(path.read_text())
        else:
            candidates = []
            for setting in tried:
                candidates.append(measure(method, data, config, getattr(config, name), setting))
                if candidates[-1] is None:
                    return None
            outcome = best(candidates)
            seconds = outcome.wall_s
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(outcome.to_json())
        outcomes[method] = outcome
        rate = "/".join(f"{r:g}" for r in sorted(set(outcome.learning_rates))) or "none"
        text = f"validation {outcome.validation_score:.4f} at rate {rate}, {outcome.wall_s:.1f} s"
        print(f"{clock.note(len(tried), seconds)} {name:<8}{method:<14}{text}", flush=True)
    return outcomes


def gains(tasks: Sequence[mtjax.Task], outcomes: Mapping[str, Outcome]) -> dict[str, DeltaM]:
    """Delta_m of every method over the single-task models, best first."""
    with warnings.catch_warnings():  # the sentences are in the gains, and printed once
        warnings.simplefilter("ignore", UserWarning)
        table = delta_table({name: of.main(tasks) for name, of in outcomes.items()}, SINGLE, tasks)
    return dict(sorted(table.items(), key=lambda item: -np.nan_to_num(item[1].mean, nan=-np.inf)))


def rank_methods(found: Found) -> ranks.Ranks:
    """Ranks over blocks (data set, task, seed) by the main metric on test rows."""
    names = list(dict.fromkeys(name for _, outcomes in found.values() for name in outcomes))
    blocks = [{name: main_scores(tasks, of[name].test).T.ravel() for name in names} for tasks, of in found.values()]
    return ranks.mean_ranks({name: np.concatenate([block[name] for block in blocks]) for name in names})


def rows(found: Found, ranked: ranks.Ranks, delta: Mapping[str, Mapping[str, DeltaM]]) -> list[report.Row]:
    """Report rows of every method, best rank first: rank, Delta_m, cost and conflicts, main metric of every task."""
    result = []
    for name, rank in ranked.mean.items():
        family = {"family": family_of(name)}
        mine = {data: outcomes[name] for data, (_, outcomes) in found.items()}
        over = functools.partial(report.result_rows, name)
        result += [row | family | {"n": ranked.n} for row in over({"all data": {"mean rank": rank}})]
        for data, gain in ((data, of[name]) for data, of in delta.items()):
            row = report.delta_rows({name: gain}, SINGLE)[0] | {"task": data}
            fields = ("params", "rows_per_s", "compile_s", "learning_rates", "setting", "diverged", "conflicts")
            result.append(row | {field: getattr(mine[data], field) for field in fields})
        if name != SINGLE:
            cost = [found[data][1][SUM].rows_per_s / of.rows_per_s for data, of in mine.items()]
            result += over({"step": {f"x {SUM}": cost}}, baseline=SUM)
            result += over({"conflicts": {"% of pairs": [100 * of.conflicts for of in mine.values()]}})
        for data, (tasks, _) in found.items():
            result += over({f"{data}/{task}": of for task, of in mine[data].main(tasks).items()}, baseline=SINGLE)
    return result


def family_of(name: str) -> str:
    return "baseline" if name in (SINGLE, SUM, TUNED) else TABLE[name].family


def draw(folder: pathlib.Path, ranked: ranks.Ranks, delta: Mapping[str, Mapping[str, DeltaM]]) -> list[pathlib.Path]:
    """Mean ranks with the critical difference, and Delta_m on each data set."""
    groups = {name: family_of(name) for name in ranked.mean}
    title = f"block: data set ({', '.join(delta)}) x task x seed"
    paths = [plots.save(figures.critical_difference(ranked, groups=groups, title=title), folder / "ranks.png", dpi=100)]
    for data, table in delta.items():
        named = {name + " (diverged)" * bool(np.isnan(gain.mean)): gain for name, gain in table.items()}
        figure = plots.delta_bars(named, title=f"{data}: multitask gain over {SINGLE} MLPs")
        # Half the height that few models would have, and no room above and below.
        figure.set_size_inches(7.2, 1.8 + 0.24 * len(named))
        figure.axes[0].set_ylim(len(named) - 0.4, -0.6)
        figure.axes[0].tick_params(axis="y", labelsize=8)
        paths.append(figures.save_small(figure, folder / f"delta_{data}.png"))
    return paths


# The command.


def configure(args: Arguments) -> Config:
    """The configuration that the arguments name."""
    config = override(PRESETS[args.preset], args.set)
    unknown = [name for name in args.data or config.data if name not in DATA]
    if unknown:
        raise ValueError(f"--data: there is no '{unknown[0]}'; choose among {', '.join(DATA)}")
    names = methods.chosen(args.methods or config.methods, TABLE)
    return dataclasses.replace(
        config,
        methods=tuple(dict.fromkeys((SUM, *names))),
        data=args.data or config.data,
        seeds=config.seeds if args.seeds is None else args.seeds,
    )


def compare(args: Arguments) -> int:
    """Runs the comparison; returns the exit status."""
    began = time.perf_counter()
    if args.methods == ("list",):
        print("\n".join(f"{name:<16}{entry.family}" for name, entry in TABLE.items()))
        return 0
    args, run = command.settle_run(args, pathlib.Path("runs") / SYSTEM)
    config = configure(args)
    budget = dataclasses.replace(config, methods=())  # methods may be added to a run
    saved = command.read_run(run).get("budget") if args.resume else None
    asked = json.loads(json.dumps(dataclasses.asdict(budget)))
    if saved not in (None, asked):
        raise ValueError(f"--resume: {run} was started with other sizes or budgets than this version of the script has")
    where = report.provenance(outputs=[run, ROOT / "results"])
    command.write_run(run, args, budget=asked)

    data = {name: DATA[name](getattr(config, name)) for name in config.data}
    fewest = min(len(of.tasks) for of in data.values())
    excluded = {name: reason for name in config.methods if (reason := left_out(name, fewest))}
    for name, reason in excluded.items():
        print(f"{name} is left out: {reason}")
    config = dataclasses.replace(config, methods=tuple(name for name in config.methods if name not in excluded))
    clock = Clock(len(data) * sum(len(settings(name, config)) for name in (SINGLE, *config.methods)))
    found = {}
    for name, of in data.items():
        print(of.summary() if name == "flights" else f"{name}: {', '.join(task.name for task in of.tasks)}", flush=True)
        outcomes = run_data(name, of, config, run, clock)
        if outcomes is None:
            return command.interrupted(run)
        found[name] = (of.tasks, outcomes)

    ranked, delta = rank_methods(found), {name: gains(*of) for name, of in found.items()}
    sentences = [text for table in delta.values() for gain in table.values() for text in gain.warnings]
    notes = list(dict.fromkeys(text.partition(":")[0] for text in sentences))
    result = report.from_findings(
        SYSTEM,
        findings(found),
        preset=args.preset,
        seeds=range(config.seeds),
        wall_s=round(sum(of.wall_s for _, outcomes in found.values() for of in outcomes.values()), 1),
        rows=rows(found, ranked, delta),
        provenance=where,
        details={
            "config": dataclasses.asdict(config),
            "left_out": excluded,
            "ranks": ranked._asdict() | {"block": "data set x task x seed"},
            "near_zero_baselines": notes,
            "wall_s": {name: {m: round(of.wall_s, 1) for m, of in found[name][1].items()} for name in found},
        },
    )
    shown = {"all data": "mean rank", "step": f"x {SUM}", "conflicts": "% of pairs"}
    tables.print_report(result, metrics=shown | dict.fromkeys(found, report.DELTA_CELL[1]))
    print(f"Columns {', '.join(found)}: Δm in % over {SINGLE} MLPs; step and conflicts: mean ± s.e. over data sets.")
    for note in notes:
        print(f"note: {note}: the baseline is near zero, relative changes are large")
    pictures = draw(run / "figures", ranked, delta)
    kept = args.preset == "paper" and (args.methods, args.data, args.seeds, args.set) == ((), (), None, ())
    command.publish(result, run, pictures, ROOT / "results" if kept else None)
    print(f"Took {time.perf_counter() - began:.0f} s.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = command.parse(Arguments, argv, prog="compare.py")
    return command.run_command(lambda: compare(arguments))


if __name__ == "__main__":
    sys.exit(main())
