"""Task-based flat regions: do they improve the methods that they wrap? Digits with few rows, and with wrong labels.

Paper:   Phan et al., "Improving Multi-task Learning via Seeking Task-based Flat Regions", arXiv 2211.13723.
Claims:  a method over flat regions has a larger multitask gain (Delta_m) and a smaller calibration error than the
         method alone, and than the method with a single joint SAM; its minima are flatter for every task.
Data:    digits (six tasks), 200 training rows; all labels true, or 30 % of the class labels wrong. Validation and test
         labels are true. One draw of rows and of wrong labels: errors are over initialisations and orders of batches.
Command: python experiments/objectives/flat_regions.py                   # about two minutes on two CPU cores
         python experiments/objectives/flat_regions.py --preset paper    # all methods, with and without wrong labels
Results: experiments/results/objectives_flat_regions.json, experiments/results/figures/objectives_flat_regions.png
         (paper)

Every method runs as it is, as it is for as many epochs as cost what flat regions cost, with SAM, and over flat regions.
All share model, learning rates, and where there is one the candidates of the radius; both are chosen on validation
rows. Two stops are reported: after the last epoch, as in the paper, and at the epoch with the best validation score,
because stopping early is the cheapest way not to learn wrong labels. Delta_m is over one MLP per task.

How to read the calibration error with wrong labels: a model that is calibrated on its training labels believes that
30 % of them are wrong, and so is less sure than it is right on true test labels. A model that has begun to learn the
wrong labels by heart is surer, and may look better calibrated for this reason alone. The rows `overconfidence` (mean
confidence minus accuracy) of each task say which way an error goes.

Letters: S seeds.
"""

import dataclasses
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
from flat_runs import (
    ECE,
    FLAT,
    LONGER,
    PLAIN,
    PRESETS,
    SAM,
    SHARPNESS,
    SINGLE,
    STOPS,
    VARIANTS,
    Config,
    Outcome,
    Stop,
    choose_radius,
    load,
    measure,
    passes,
)

import mtjax
from mtjax import plots_objectives
from mtjax.delta import delta_m
from mtjax.train import command, report, tables
from mtjax.train.compare import mean_and_se, verdict
from mtjax.train.config import override

ROOT = pathlib.Path(__file__).resolve().parent.parent
SYSTEM = "objectives_flat_regions"
MEASURES = {"delta_m": True, "delta_m of class tasks": True, "ECE": False, "log loss": False, SHARPNESS: False}
"""Measure -> whether more is better. ECE and log loss are means over the class tasks, sharpness over all tasks."""
CLAIMED = {"delta_m": (PLAIN, LONGER, SAM), "ECE": (PLAIN, LONGER, SAM), SHARPNESS: (PLAIN, SAM)}
"""What flat regions are claimed to improve, and over which variants. A longer run is as sharp as it is overfitted."""

Values = Mapping[str, Mapping[str, np.ndarray]]
"""Model (method and variant) -> measure -> f64[S]."""


@dataclasses.dataclass
class Arguments:
    """Compare methods alone, with SAM and over task-based flat regions, with few training rows and wrong labels."""

    preset: Literal["smoke", "demo", "paper"] = "demo"
    """smoke: seconds. demo: two methods with wrong labels. paper: five methods, with and without wrong labels."""
    methods: tuple[str, ...] = ()
    """Methods to wrap. `--methods list` names those there are."""
    seeds: int | None = None
    """Number of seeds (at least 3 for a standard error that means something)."""
    run: pathlib.Path | None = None
    """Run directory; by default a new one under runs/objectives_flat_regions."""
    resume: bool = False
    """Go on with an interrupted run, with the options that it was started with: that of --run, by default the newest
    one. Trainings that are finished are not run again."""
    set: Annotated[tuple[str, ...], "FIELD=VALUE"] = ()
    """Override configuration fields, e.g. --set train_rows=100 train.max_epochs=40."""


# Running.


def plan(config: Config) -> list[tuple[str, str, float | None]]:
    """The trainings of one comparison: method, variant, radius."""
    result = [(SINGLE, PLAIN, None)]
    for name in config.methods:
        result += [(name, PLAIN, None), (name, LONGER, None)]
        result += [(name, variant, rho) for variant in (SAM, FLAT) for rho in config.radii]
    return result


def run_all(data: Any, config: Config, folder: pathlib.Path, where: str) -> dict[str, list[Outcome]] | None:
    """Model -> outcomes, one per radius; those on file are not run again. None if a signal interrupted it."""
    found: dict[str, list[Outcome]] = {}
    for name, variant, rho in plan(config):
        model = name + variant
        title = model if rho is None else f"{model}, rho {rho:g}"
        path = folder / f"{re.sub('[^a-z0-9.]+', '-', title.lower()).strip('-')}.json"
        if path.exists():
            outcome = Outcome.from_json(path.read_text())
        else:
            outcome = measure(name, variant, rho, data, config, title)
            if outcome is None:
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(outcome.to_json())
        found.setdefault(model, []).append(outcome)
        scores = ", ".join(f"{outcome.stops[stop].validation_score:.4f} ({stop})" for stop in STOPS)
        print(f"{where}: {title}: validation {scores}, {outcome.wall_s:.1f} s", flush=True)
    return found


# What was found.


def gain(tasks: Sequence[mtjax.Task], ours: Stop, single: Stop) -> np.ndarray:
    """f64[S]: Delta_m of each seed over single-task models, on the main metrics of these tasks."""
    pairs = {task.name: task.main_metric.name for task in tasks}

    def of_seed(stop: Stop, seed: int):
        return {task: {metric: stop.test[task][metric][seed]} for task, metric in pairs.items()}

    with warnings.catch_warnings():  # scores are far from zero here
        warnings.simplefilter("ignore", UserWarning)
        count = len(next(iter(ours.test[tasks[0].name].values())))
        return np.array([delta_m(of_seed(ours, s), of_seed(single, s), tasks).mean for s in range(count)])


def values_of(tasks: Sequence[mtjax.Task], stops: Mapping[str, Stop]) -> Values:
    """The measures of all models at one stop."""
    classes = [task for task in tasks if task.kind != "regression"]
    result = {}
    for model, stop in stops.items():
        mean = lambda metric, over: np.mean([stop.test[task.name][metric] for task in over], axis=0)  # noqa: B023, E731
        result[model] = {
            "delta_m": gain(tasks, stop, stops[SINGLE]),
            "delta_m of class tasks": gain(classes, stop, stops[SINGLE]),
            "ECE": mean(ECE, classes),
            "log loss": mean("log_loss", classes),
        }
        if model != SINGLE:
            result[model][SHARPNESS] = mean(SHARPNESS, tasks)
    return result


def p_value(difference: np.ndarray) -> float:
    """Of the two-sided t-test that paired differences have mean 0; 1 with one seed or no difference."""
    from scipy import stats

    mean, se = mean_and_se(difference)
    if difference.size < 2 or mean == 0:
        return 1.0
    return float(2 * stats.t.sf(abs(mean) / se, difference.size - 1)) if se > 0 else 0.0


def improvement(values: Values, name: str, measure_: str, other: str) -> np.ndarray:
    """f64[S]: how much better the method over flat regions is than another variant of it; positive is better."""
    sign = 1.0 if MEASURES[measure_] else -1.0
    return sign * (values[name + FLAT][measure_] - values[name + other][measure_])


def tests(found: Mapping[str, Values], names: Sequence[str]) -> list[dict[str, Any]]:
    """Every paired t-test of flat regions against another variant of the same method."""
    result = []
    for setting, values in found.items():
        for measure_ in MEASURES:
            for name in names:
                for other in VARIANTS[:-1]:
                    difference = improvement(values, name, measure_, other)
                    mean, se = mean_and_se(difference)
                    result.append(
                        {"setting": setting, "measure": measure_, "method": name, "against": name + other}
                        | {"improvement": mean, "se": se, "n": difference.size, "p": p_value(difference)}
                    )
    return result


def findings(found: Mapping[str, Values], names: Sequence[str]) -> list[report.Finding]:
    """One finding per setting and measure: the mean over methods, by paired t-tests over seeds.

    A claim holds if flat regions are significantly better than all variants they are held against, does not hold if
    they are significantly worse than one, and is open otherwise.
    """
    result = []
    for setting, values in found.items():
        for measure_, others in CLAIMED.items():
            verdicts, reasons = [], []
            for other in others:
                each = [improvement(values, name, measure_, other) for name in names]
                difference = np.mean(each, axis=0)
                mean, se = mean_and_se(difference)
                verdicts.append(verdict(mean, se, difference.size))
                better = sum(bool(of.mean() > 0) for of in each)
                against = {PLAIN: "the methods alone", LONGER: "more epochs", SAM: "SAM"}[other]
                answer = {True: "better", False: "worse", None: "no difference seen"}[verdicts[-1]]
                reasons.append(
                    f"{against}: {mean:+.3g} ± {se:.2g}, p = {p_value(difference):.2g}, better for {better} of "
                    f"{len(names)}: {answer}"
                )
            shown = {
                variant: mean_and_se(np.mean([values[name + variant][measure_] for name in names], axis=0))
                for variant in (PLAIN, *others, FLAT)
            }
            texts = [f"{variant.strip(' ,+') or 'alone'} {report.format_mean(*shown[variant])}" for variant in others]
            holds = False if False in verdicts else True if all(v is True for v in verdicts) else None
            what = f"{'raise' if MEASURES[measure_] else 'lower'} {measure_.replace('delta_m', 'Δm in %')}"
            claim = f"flat regions {what} ({setting})"
            reason = "improvement over " + "; ".join(reasons)
            result.append(report.Finding(claim, ", ".join(texts), report.format_mean(*shown[FLAT]), holds, reason))
    return result


def rows(
    found: Mapping[str, Values], stops: Mapping[str, Mapping[str, Stop]], outcomes: Mapping[str, Sequence[Outcome]]
) -> list[report.Row]:
    """Report rows: for each setting the measures of every model, then the metrics of every task."""
    result = []
    for setting, values in found.items():
        for model, measures in values.items():
            stop = stops[setting][model]
            extra = {"learning_rate": sorted(set(stop.learning_rates)), "rho": stop.rho}
            extra["epochs"] = float(stop.epoch.mean())
            baseline = SINGLE if model != SINGLE else None
            for row in report.result_rows(model, {setting: measures}, baseline=baseline, **extra):
                result.append(row | {"higher_is_better": MEASURES[row["metric"]]})
            for task, of_task in stop.test.items():
                result += report.result_rows(model, {f"{setting}: {task}": of_task}, baseline=baseline)
    for row in result:
        row["params"] = outcomes[row["model"]][0].params
        row["rows_per_s"] = float(np.mean([outcome.rows_per_s for outcome in outcomes[row["model"]]]))
    return result


def draw(found: Mapping[str, Values], names: Sequence[str]) -> Any:
    """A row of panels per setting: Delta_m, ECE and sharpness of every method and variant."""
    from matplotlib.figure import Figure

    shown = ("delta_m", "ECE", SHARPNESS)
    looks = {PLAIN: ("#8C8C8C", "o"), LONGER: ("#E69F00", "s"), SAM: ("#0072B2", "^"), FLAT: ("#009E73", "D")}
    figure = Figure(figsize=(11.0, 0.9 + 2.3 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), len(shown), squeeze=False)
    for line, (setting, values) in zip(panels, found.items(), strict=True):
        for panel, measure_ in zip(line, shown, strict=True):
            for i, (variant, (color, marker)) in enumerate(looks.items()):
                of = np.array([mean_and_se(values[name + variant][measure_]) for name in names])
                label = variant.strip(" ,+") or "the method alone"
                x = np.arange(len(names)) + 0.18 * (i - 1.5)
                error = np.nan_to_num(of[:, 1])
                panel.errorbar(x, of[:, 0], error, fmt=marker, color=color, markersize=5, capsize=2, label=label)
            if measure_ == SHARPNESS:
                panel.set_yscale("log")
            panel.set_xticks(range(len(names)), names, fontsize=8)
            panel.set_xlim(-0.5, len(names) - 0.5)
            panel.grid(axis="y", alpha=0.3)
            arrow = "↑" if MEASURES[measure_] else "↓"
            panel.set_title(f"{'Δm in %' if measure_ == 'delta_m' else measure_} {arrow}, {setting}", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(looks), frameon=False, fontsize=9)
    return figure


# The command.


def experiment(args: Arguments) -> int:
    """Runs the experiment; returns the exit status."""
    began = time.perf_counter()
    if args.methods == ("list",):
        print("\n".join(name for name, entry in methods.METHODS.items() if entry.family in ("losses", "Gramian")))
        return 0
    args, run = command.settle_run(args, pathlib.Path("runs") / SYSTEM)
    config = override(PRESETS[args.preset], args.set)
    names = methods.chosen(args.methods or config.methods)
    seeds = config.seeds if args.seeds is None else args.seeds
    config = dataclasses.replace(config, methods=names, seeds=seeds)
    for name in names:
        if methods.METHODS[name].family not in ("losses", "Gramian"):
            raise ValueError(f"--methods: {name} does not work on gradients at the parameters, or not on these alone")
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if args.resume and command.read_run(run).get("config") != settings:
        raise ValueError(f"--resume: {run} was started with other sizes or budgets than this version of the script has")
    where = report.provenance(outputs=[run, ROOT / "results"])
    command.write_run(run, args, config=settings)

    found: dict[str, Values] = {}
    stops: dict[str, dict[str, Stop]] = {}
    every: dict[str, list[Outcome]] = {}
    for noise in config.label_noise:
        data = load(config, noise)
        labels = f"{noise:.0%} wrong labels" if noise else "true labels"
        outcomes = run_all(data, config, run / f"noise_{noise:g}", labels)
        if outcomes is None:
            return command.interrupted(run)
        chosen = {model: choose_radius(candidates) for model, candidates in outcomes.items()}
        for model, candidates in outcomes.items():
            every.setdefault(model, []).extend(candidates)
        for stop in STOPS:
            setting = f"{labels}, {stop}"
            stops[setting] = {model: of[stop] for model, of in chosen.items()}
            found[setting] = values_of(data.tasks, stops[setting])

    count = len(data.tasks)
    result = report.from_findings(
        SYSTEM,
        findings(found, names),
        preset=args.preset,
        seeds=range(config.seeds),
        wall_s=round(sum(outcome.wall_s for of in every.values() for outcome in of), 1),
        rows=rows(found, stops, every),
        provenance=where,
        details={
            "config": settings,
            "tests": tests(found, names),
            "passes": {name + variant: passes(name, variant, count) for name in names for variant in VARIANTS},
        },
    )
    console = wide_console()
    for measure_ in ("delta_m", "ECE"):
        # One table per measure, all settings beside each other.
        for table in tables.task_tables(result.rows, metrics=dict.fromkeys(found, measure_), width=console.width):
            console.print(table)
    tables.print_report(dataclasses.replace(result, rows=[]), console=console)
    picture = plots_objectives.save_small(draw(found, names), run / "figures" / f"{SYSTEM}.png")
    kept = args.preset == "paper" and (args.methods, args.seeds, args.set) == ((), None, ())
    command.publish(result, run, [picture], ROOT / "results" if kept else None)
    print(f"Took {time.perf_counter() - began:.0f} s.")
    return 0


def wide_console() -> Any:
    """The terminal, or 160 columns in a file or pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = command.parse(Arguments, argv, prog="flat_regions.py")
    return command.run_command(lambda: experiment(arguments))


if __name__ == "__main__":
    sys.exit(main())
