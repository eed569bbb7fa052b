"""The MultiTab script: smoke run, a user's own table, the sweep, resuming, predictions, errors, paper sizes."""

import functools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import mtjax
from mtjax.train import make_train_step, supervised_loss
from mtjax.train.state import TrainState

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "tabular" / "multitab.py"
KEYS = ["system", "claim", "preset", "command", "seeds", "commit", "dirty", "device", "versions", "wall_s", "rows"]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("tabular/multitab.py")


@pytest.fixture
def call(script, call_script):
    return functools.partial(call_script, script)


# The smoke preset, end to end.


SMOKE_MODELS = ("single-task MLP", "PLE", "MultiTab-Net")  # .ci/run takes the default ones, one more


@pytest.fixture(scope="module")
def smoke(script, run_smoke) -> pathlib.Path:
    return run_smoke(script, "--models", *SMOKE_MODELS)


def test_smoke_report(smoke, script):
    report = json.loads((smoke / "report.json").read_text())
    assert list(report) == [*KEYS, "holds", "details"]
    assert report["system"] == "multitab" and report["preset"] == "smoke" and report["seeds"] == [0, 1]
    assert report["wall_s"] > 0 and set(report["holds"]) == {"holds", "reason"}
    assert report["details"]["config"]["train"]["batch_size"] == 128
    findings = report["details"]["findings"]
    assert [set(finding) for finding in findings] == [{"claim", "baseline", "ours", "holds", "reason"}] * 2
    assert report["claim"] == "; ".join(finding["claim"] for finding in findings)


def test_smoke_rows_are_complete_and_finite(smoke, script):
    report = json.loads((smoke / "report.json").read_text())
    tasks = script.sources.flights.load(rows=(512, 256, 256)).tasks
    models = report["details"]["models"]
    assert models == list(SMOKE_MODELS) and set(models) < set(script.SMOKE_MODELS)
    cells = {(row["model"], row["task"], row["metric"]): row for row in report["rows"]}
    for model in models:
        for task in tasks:
            for metric in task.metrics:
                row = cells[model, task.name, metric.name]
                assert math.isfinite(row["mean"]) and math.isfinite(row["se"]) and row["n"] == 2
                assert row["baseline"] == "single-task MLP" and row["params"] > 1000 and row["rows_per_s"] > 0
                assert row["higher_is_better"] == metric.higher_is_better
        assert math.isfinite(cells[model, "all", "delta_m"]["mean"])
    assert len(report["rows"]) == len(models) * (sum(len(task.metrics) for task in tasks) + 2)


def test_smoke_figures_and_files(smoke):
    figures = {path.name: path.stat().st_size for path in (smoke / "figures").iterdir()}
    assert set(figures) == {"delta_m.png", "curves.png", "conflict.png", "expert_use.png"}
    assert min(figures.values()) > 5000
    for model in ("single-task_mlp", "ple", "multitab-net"):
        lines = (smoke / "models" / model / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2 and (smoke / "models" / model / "best.npz").exists()
        assert ("cosine" in json.loads(lines[0])) == (model == "multitab-net"), "conflict is measured for one model"
    assert set(json.loads((smoke / "scores.json").read_text())) == set(SMOKE_MODELS)


# A table of one's own.


def make_table(num_rows: int, seed: int) -> pd.DataFrame:
    """Text and number columns with gaps, and four partly labelled targets."""
    rng = np.random.default_rng(seed)
    city, area = rng.choice(["Lima", "Oslo", "Rome"], num_rows), rng.normal(80, 20, num_rows).round(1)
    rooms = rng.integers(1, 6, num_rows)
    frame = pd.DataFrame({"id": [f"h{i}" for i in range(num_rows)], "city": city, "area": area, "rooms": rooms})
    frame["price"] = 2 * area + 50 * (city == "Oslo") + rng.normal(0, 5, num_rows)
    frame["sold"] = np.where(rng.random(num_rows) < np.where(city == "Rome", 0.8, 0.3), "yes", "no")
    frame["style"] = rng.choice(["flat", "loft", "villa"], num_rows)
    frame["visits"] = rng.poisson(rooms)
    for column in ("area", "price", "sold", "style", "visits"):
        frame[column] = frame[column].astype(object).where(rng.random(num_rows) > 0.2)
    return frame


TARGETS = ("price:regression", "sold:binary", "style:multiclass", "visits:count")
MODELS = ("single-task MLP", "MultiTab-Net, flat attention")  # one model per task; predictions that need a context
SMALL = ("--preset", "smoke", "--seeds", "2", "--set", "width=4", "ff_width=8", "train.max_epochs=2")


@pytest.fixture(scope="module")
def houses(script, tmp_path_factory) -> pathlib.Path:
    """A folder with houses.csv and the run trained on it."""
    folder = tmp_path_factory.mktemp("houses")
    make_table(400, 0).to_csv(folder / "houses.csv", index=False)
    arguments = ["--data", str(folder / "houses.csv"), "--targets", *TARGETS, "--ignore", "id", "--models", *MODELS]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert script.main([*arguments, "--run", "run", *SMALL]) == 0
    return folder


def test_own_table_trains_partly_labelled_targets_of_every_kind(houses):
    report = json.loads((houses / "run" / "report.json").read_text())
    assert report["seeds"] == [0, 1]
    assert {row["task"] for row in report["rows"]} == {"price", "sold", "style", "visits", "all", "mean over tasks"}
    assert all(math.isfinite(row["mean"]) for row in report["rows"])
    arguments = json.loads((houses / "run" / "run.json").read_text())["arguments"]
    assert arguments["data"] == str(houses / "houses.csv"), "absolute: resuming works from anywhere"


def test_predictions_for_rows_with_unknown_categories_and_gaps(houses, call):
    new = make_table(6, 1).drop(columns=["price", "sold", "style", "visits"])
    new.loc[0, "city"], new.loc[1, "city"], new.loc[2, "area"] = "Paris", None, None
    new["note"] = "a column that the run never saw"
    new.to_csv(houses / "new.csv", index=False)
    for model in MODELS:
        out = houses / "predictions.csv"
        status, stdout, _ = call(
            "predict", "--run", houses / "run", "--data", houses / "new.csv", "--out", out, "--model", model
        )
        assert status == 0 and stdout == f"6 rows predicted by {model} -> {out}\n"
        predicted = pd.read_csv(out)
        styles = [f"style_probability_{name}" for name in ("flat", "loft", "villa")]
        assert list(predicted.columns) == ["price", "sold_probability_yes", "style", *styles, "visits"]
        assert len(predicted) == 6 and predicted.notna().all(axis=None)
        assert predicted["sold_probability_yes"].between(0, 1).all() and (predicted["visits"] > 0).all()
        np.testing.assert_allclose(predicted[styles].sum(axis=1), 1.0, rtol=1e-5)
        assert predicted["style"].isin(["flat", "loft", "villa"]).all()
        assert predicted["price"].between(50, 400).all(), "original units"
        # No row's prediction depends on the rows beside it.
        new.iloc[[4]].to_csv(houses / "one.csv", index=False)
        call("predict", "--run", houses / "run", "--data", houses / "one.csv", "--out", out, "--model", model)
        numbers = predicted.select_dtypes("number")
        np.testing.assert_allclose(pd.read_csv(out)[numbers.columns].iloc[0], numbers.iloc[4], rtol=1e-4)


def test_the_default_model_is_the_best_by_validation(houses, call):
    scores = json.loads((houses / "run" / "scores.json").read_text())
    assert set(scores) == set(MODELS)
    status, stdout, _ = call(
        "predict", "--run", houses / "run", "--data", houses / "houses.csv", "--out", houses / "all.csv"
    )
    assert status == 0 and f"400 rows predicted by {max(scores, key=scores.get)} ->" in stdout


@pytest.mark.slow  # tests/train/test_resume.py does the same to the loop
def test_interrupt_then_resume_without_repeating_any_option(houses, call, request, monkeypatch):
    """SIGTERM in the middle of the first model: status 130, and the command to go on with, which needs no options."""
    monkeypatch.chdir(houses)
    run = pathlib.Path("interrupted")
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))

    done = threading.Event()

    def send():
        while not list(run.glob("models/*/checkpoints/[0-9]*")):
            if done.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    arguments = ("--data", "houses.csv", "--targets", *TARGETS[:2], "--ignore", "id", "--method", "pcgrad")
    few = ("--models", "shared bottom", "--preset", "smoke", "--set", "train.max_epochs=20", "train.patience=20")
    try:
        status, stdout, _ = call(*arguments, *few, "--run", run)
    finally:  # no signal may come when the test is over
        done.set()
        thread.join()
    assert status == 130
    assert re.search(r"Interrupted and saved. Go on with: python .* --resume --run interrupted\n", stdout)
    history = run / "models" / "shared_bottom" / "metrics.jsonl"
    assert 0 < len(history.read_text().splitlines()) < 20

    status, _, stderr = call("predict", "--run", run, "--data", "houses.csv")
    assert (status, stderr) == (2, "error: --run interrupted: no model of this run has finished training\n")
    pathlib.Path("other.csv").write_bytes(pathlib.Path("houses.csv").read_bytes())
    status, _, stderr = call("--resume", "--run", run, "--method", "mgda", "--data", "other.csv")
    assert status == 2 and stderr.splitlines() == [
        "error: --resume goes on with the options that interrupted was started with:",
        f"  --data: started with {houses / 'houses.csv'}, now {pathlib.Path.cwd() / 'other.csv'}",
        "  --method: started with pcgrad, now mgda",
    ]
    status, _, stderr = call(*arguments, "--run", run)
    refusal = "error: --run interrupted already holds a run; go on with it by --resume, or choose another directory\n"
    assert (status, stderr) == (2, refusal)
    original = pathlib.Path("houses.csv").read_bytes()
    frame = pd.read_csv("houses.csv")
    frame.assign(area=frame["area"] + 1).to_csv("houses.csv", index=False)
    status, _, stderr = call("--resume", "--run", run)
    assert status == 2 and "The data differ from those that the run was started with" in stderr
    pathlib.Path("houses.csv").write_bytes(original)

    status, stdout, stderr = call("--resume", "--run", run)
    assert (status, stderr) == (0, "") and "shared bottom" in stdout
    assert len(history.read_text().splitlines()) == 20
    report = json.loads((run / "report.json").read_text())
    assert report["details"]["method"] == "pcgrad" and report["preset"] == "smoke"
    assert all(row["rows_per_s"] > 0 for row in report["rows"] if "rows_per_s" in row)


# The benchmark sweep.


@pytest.mark.slow
def test_bench_sweep(call, tmp_path):
    run = tmp_path / "bench"
    sizes = ("bench_tasks=(2,)", "bench_features=4", "rows=(256,64,64)", "width=4")
    models = ("single-task MLP", "shared bottom")
    status, stdout, stderr = call(
        "--preset", "smoke", "--data", "bench", "--run", run, "--models", *models, "--set", *sizes
    )
    assert (status, stderr) == (0, "") and "Report:" in stdout
    report = json.loads((run / "report.json").read_text())
    assert report["system"] == "multitab_bench" and list(report) == [*KEYS, "holds", "details"]
    assert list(dict.fromkeys(row["model"] for row in report["rows"])) == [f"{model} (T=2)" for model in models]
    assert {row["num_tasks"] for row in report["rows"]} == {2}
    assert (run / "tasks_2" / "figures" / "delta_m.png").exists()


def test_findings_of_a_sweep(script):
    """Gaps of 0.1 on every seed with two tasks and of 0.3, 0.4, 0.5 with eight: 0.3 more, 0.058 standard errors."""

    def outcome(scores):
        return script.compare.Outcome({"y": {"explained_variance": np.array(scores)}}, None, None, None)

    tasks, one = [mtjax.Task("y", "regression")], "MultiTab-Net, one token"
    two = {"MultiTab-Net": outcome([0.6, 0.7, 0.8]), one: outcome([0.5, 0.6, 0.7])}
    eight = {"MultiTab-Net": outcome([0.8, 0.9, 1.0]), one: outcome([0.5, 0.5, 0.5])}
    findings = script.sweep_findings({2: (tasks, two), 8: (tasks, eight)})
    assert [finding.holds for finding in findings] == [True, True, True]
    assert findings[2].ours == "T=2: +0.1000, T=8: +0.4000"
    assert findings[2].reason == "gap at T=8 minus gap at T=2: +0.3000 ± 0.0577"
    (only,) = script.sweep_findings({2: (tasks, two)})
    assert only.claim == "a token per task beats one token for all, 2 tasks"
    (nothing,) = script.sweep_findings({2: (tasks, {one: outcome([0.5])})})
    assert nothing.holds is None and nothing.claim == "your own comparison"


# Help, lists and errors.


def test_help_and_lists(call, script):
    status, stdout, _ = call("--help")
    assert status == 0 and "multitab.py predict --help" in re.sub(r"\s+", " ", stdout)
    for option in ("--preset", "--data", "--targets", "--models", "--method", "--resume", "--set", "--tensorboard"):
        assert option in stdout
    status, stdout, _ = call("predict", "--help")
    assert status == 0 and "--out" in stdout and "averages the models of all seeds" in re.sub(r"\s+", " ", stdout)
    status, stdout, _ = call("--preset", "smoke", "--models", "list")
    assert status == 0 and stdout.splitlines() == list(script.MODELS)


def test_as_a_program(houses):
    """Run as a user runs it: nothing on stderr, also where XLA finds its programs in the cache (the second time)."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, str(SCRIPT), "predict", "--run", "run", "--data", "houses.csv", "--out", "program.csv"]
    for _ in range(2):
        done = subprocess.run(
            command, cwd=houses, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert (done.returncode, done.stderr) == (0, "") and "400 rows predicted" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--data", "nowhere.csv"),
            "--data nowhere.csv: no such file, and not one of flights, bench, higgs, acs_income,",
        ),
        (("--data", "."), "--data .: no such file"),
        (("--data", "houses.csv"), "--data with a file of your own needs --targets, e.g."),
        (
            ("--data", "houses.csv", "--targets", "price"),
            "--targets takes one name:kind pair for each target, got price",
        ),
        (
            ("--data", "houses.csv", "--targets", "price:count", "price:regression"),
            "--targets takes one name:kind pair for each target, got price:count price:regression",
        ),
        (
            ("--data", "houses.csv", "--targets", "prize:regression"),
            "The table has no column 'prize' (the target of task 'prize'); did you mean 'price'",
        ),
        (
            ("--data", "houses.csv", "--targets", "style:binary"),
            "Task 'style' is binary but its column 'style' holds 3 values",
        ),
        (
            ("--data", "houses.csv", "--targets", "price:number"),
            "Task 'price' has kind 'number'; expected one of binary",
        ),
        (("--data", "houses.csv", "--targets", "price:regression", "--ignore", "idd"), "no column 'idd'"),
        (
            ("--models", "MultiTabNet"),
            "--models: there is no 'MultiTabNet'; did you mean 'MultiTab-Net'? --models list",
        ),
        (("--models", "list", "MMoE"), "--models: there is no 'list'; --models list names all of them"),
        (("--method", "pc-grad"), "--method pc-grad: choose one of sum, mean, uncertainty, pcgrad, mgda"),
        (("--set", "widht=3"), "--set widht: no field 'widht' in Config; did you mean 'width'? (rows, width, "),
        (("--set", "train.batch_size=big"), "--set train.batch_size: expected int, such as 128, got 'big'"),
        (("--set", "train.batch_size=0"), "batch_size must be >= 1, got 0"),
        (("--set", "rows=(5,5)"), "rows must be (train, validation, test) or None, got (5, 5)"),
        (("--set", "learning_rates=()"), "learning_rates must hold at least one number > 0, got ()"),
        (("--seeds", "0"), "seeds must be >= 1, got 0"),
        (("--resume",), "--resume: there is no run under runs/multitab; name one with --run"),
        (("--resume", "--run", "none"), "--run none: not a run directory (it has no run.json)"),
        (("--data", "higgs", "--path", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_errors_are_sentences_without_traceback(call, houses, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "houses.csv").symlink_to(houses / "houses.csv")
    status, _, stderr = call("--preset", "smoke", *arguments)
    assert status == 2
    assert stderr.startswith("error: ") and message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "runs").exists(), "what was refused leaves nothing behind"


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda frame: frame.drop(columns="area"), (), "The table has no column 'area'"),
        (lambda frame: frame.assign(area="large"), (), "Column 'area' must hold numbers, but row 0 holds 'large'"),
        (lambda frame: frame.iloc[:0], (), "There are no rows"),
        (
            lambda frame: frame,
            ("--model", "MMoE"),
            "--model MMoE: this run trained single-task MLP, MultiTab-Net, flat",
        ),
    ],
)
def test_errors_of_predict(call, houses, tmp_path, change, arguments, message):
    change(make_table(5, 2)).to_csv(tmp_path / "new.csv", index=False)
    out = tmp_path / "out.csv"
    status, _, stderr = call(
        "predict", "--run", houses / "run", "--data", tmp_path / "new.csv", "--out", out, *arguments
    )
    assert status == 2 and stderr.startswith("error: ") and message in stderr and not out.exists()


def test_predict_without_a_run_or_a_table(call, houses, tmp_path):
    status, _, stderr = call("predict", "--run", tmp_path, "--data", houses / "houses.csv")
    assert (status, stderr) == (2, f"error: --run {tmp_path}: not a run directory (it has no run.json)\n")
    status, _, stderr = call("predict", "--run", houses / "run", "--data", tmp_path / "new.csv")
    assert (status, stderr) == (2, f"error: No table at {tmp_path / 'new.csv'}\n")


# The paper's sizes, by shapes alone.


def paper_problem(script):
    """Tasks of Higgs (a signal and seven masses), a batch of abstract rows, and the configuration."""
    masses = ("m_jj", "m_jjj", "m_lv", "m_jlv", "m_bb", "m_wbb", "m_wwbb")
    tasks = (mtjax.Task("target", "binary"), *(mtjax.Task(name, "regression") for name in masses))
    config = script.PRESETS["paper"]
    size = config.train.batch_size
    labels = {task.name: jax.ShapeDtypeStruct((size,), jnp.float32) for task in tasks}
    categorical = jax.ShapeDtypeStruct((size, 4), jnp.int32)
    batch = {"categorical": categorical, "numeric": jax.ShapeDtypeStruct((size, 17), jnp.float32), "labels": labels}
    return tasks, batch, config


def abstract_step(script, name: str, method: str):
    """Shapes of the fresh state, of the state after a step, and of its metrics."""
    tasks, batch, config = paper_problem(script)
    model = script.MODELS[name]((mtjax.head_sizes(tasks), (4, 4, 4, 4), 17), config)
    tx = script.METHODS[method]()

    def init(batch):
        def init_params(key):
            return model.init({"params": key, "dropout": key}, batch, train=True)["params"]

        optimizer = config.train.optimizer
        return TrainState.create(init_params, tx, optimizer, 0, config.learning_rates[0], num_tasks=len(tasks))

    fresh = jax.eval_shape(init, batch)
    step = make_train_step(supervised_loss(model, tasks), tx, config.train.optimizer)
    return fresh, *jax.eval_shape(step, fresh, batch)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("names", [("PLE", "MultiTab-Net, one token"), pytest.param(None, marks=pytest.mark.slow)])
def test_every_model_takes_a_step_at_the_papers_sizes(script, names):
    for name in script.MODELS if names is None else names:
        fresh, new, metrics = abstract_step(script, name, "sum")
        assert shapes(fresh) == shapes(new), f"{name}: a step must not change the structure of its state"
        assert metrics.losses.shape == (8,)


@pytest.mark.parametrize(
    "method", ["uncertainty", "pcgrad", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mean", "mgda"))]
)
def test_every_method_takes_a_step_at_the_papers_sizes(script, method):
    assert set(script.METHODS) == {"sum", "mean", "uncertainty", "pcgrad", "mgda"}
    fresh, new, metrics = abstract_step(script, "MultiTab-Net", method)
    assert shapes(fresh) == shapes(new) and metrics.weights.shape == (8,)


def test_the_papers_numbers(script):
    """Sizes of the published Higgs runs; parameters of the reference code: 1.123 M, and 0.699 M with one token."""
    config = script.PRESETS["paper"]
    assert (config.width, config.num_heads, config.ff_width, config.num_blocks, config.dropout) == (16, 4, 256, 1, 0.0)
    assert (config.mlp, config.head, config.mmoe_experts) == ((256, 128), 64, 8)
    assert (config.task_experts, config.shared_experts, config.seeds, config.rows) == (1, 1, 5, None)
    assert 1e-3 in config.learning_rates and config.train.weight_decay == 1e-5 and config.train.clip_norm is None
    assert (config.train.batch_size, config.train.max_epochs, config.train.patience) == (2048, 100, 5)
    published = {"MultiTab-Net, flat attention": 1.123e6, "MultiTab-Net": 1.123e6, "MultiTab-Net, one token": 0.699e6}
    for name, count in published.items():
        params = abstract_step(script, name, "sum")[0].params
        ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        if "flat" not in name:  # the runs computed a token mixer: queries and keys were there but dropped out
            flat = (21 + (1 if "one token" in name else 8)) * config.width
            ours += 2 * flat * (flat + 1)
        assert ours == pytest.approx(count, rel=2e-3), name


def test_the_demo_is_what_the_card_says(script):
    config = script.PRESETS["demo"]
    assert config.seeds >= 3 and len(config.learning_rates) >= 2
    assert {"MultiTab-Net", "MultiTab-Net, one token", "single-task MLP", "shared bottom", "MMoE", "PLE"} == set(
        script.DEFAULT_MODELS
    )
    assert set(script.SINGLE_TASK) <= set(script.MODELS) and script.BASELINE in script.SINGLE_TASK
