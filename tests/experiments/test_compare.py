"""The comparison of objective methods: weights and tests by hand, verdicts, divergence, smoke run, resuming."""

import dataclasses
import doctest
import functools
import json
import math
import os
import pathlib
import re
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.train import make_train_step, supervised_loss
from mtjax.train.loop import TrainConfig
from mtjax.train.state import TrainState

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "objectives" / "compare.py"
KEYS = ["system", "claim", "preset", "command", "seeds", "commit", "dirty", "device", "versions", "wall_s", "rows"]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("objectives/compare.py")


@pytest.fixture(scope="module")
def competitors(script):
    return sys.modules["competitors"]


@pytest.fixture(scope="module")
def claims(script):
    return sys.modules["compare_claims"]


@pytest.fixture
def call(script, call_script):
    return functools.partial(call_script, script)


# Who competes.


def test_fixed_weights_by_hand(competitors):
    """Losses 4 and 9 at first: w = L^-1/2 = 1/2 and 1/3, which stay when the losses become 1 and 1."""
    method = competitors.fixed_weights(power=0.5)
    state = method.init(None)
    for losses in ([4.0, 9.0], [1.0, 1.0]):
        gradient, state = method.update(jnp.eye(2), state, losses=jnp.array(losses))
        np.testing.assert_allclose(gradient, [1 / 2, 1 / 3], rtol=1e-6)
    plain = competitors.fixed_weights()
    np.testing.assert_allclose(plain.update(jnp.eye(2), plain.init(None), losses=jnp.array([4.0, 9.0]))[0], [1.0, 1.0])
    drawn = competitors.fixed_weights(draw=1)
    gradient, _ = drawn.update(jnp.eye(3), drawn.init(None), losses=jnp.ones(3))
    assert float(gradient.sum()) == pytest.approx(3.0) and float(gradient.min()) > 0
    solved = competitors.fixed_weights(power=1.0)
    gradient, _ = solved.update(jnp.eye(2), solved.init(None), losses=jnp.array([0.0, 2.0]))
    np.testing.assert_allclose(gradient, [1.0, 0.5])  # a task that is solved from the start keeps weight 1


def test_the_bench_has_opposed_directions_and_unequal_scales(competitors):
    data = competitors.load_bench(competitors.Source((4096, 64, 64), 192, 1))
    labels = np.stack([data.train["labels"][task.name] for task in data.tasks])
    # Degrees 1, 2, 3, 4, 1, 2 have variances 1, 3, 24, 144, 1, 3, and noise adds 1/4.
    np.testing.assert_allclose(labels.var(axis=1)[[0, 1, 4, 5]], [1.25, 3.25, 1.25, 3.25], rtol=0.15)
    assert labels.var(axis=1)[3] > 30 * labels.var(axis=1)[1]
    # Tasks 0 and 4 are linear, on opposite sides: -1/2 over a variance of 1.25.
    assert np.corrcoef(labels[[0, 4]])[0, 1] == pytest.approx(-0.4, abs=0.05)
    assert all((task.offset, task.scale) == (0.0, 1.0) for task in data.tasks), "labels are not standardised"


@pytest.mark.parametrize("names", [("Sum", "CAGrad", "FAMO"), pytest.param(None, marks=pytest.mark.slow)])
def test_every_method_takes_a_step_at_the_papers_sizes(competitors, names):
    """Abstractly, on shared parameters of the model of the paper preset: a step does not change the state's shape."""
    config = competitors.PAPER
    data = competitors.load_bench(competitors.Source((12, 6, 6), 6, 1))
    model = competitors.make_model("any", data, config)
    size = config.bench.batch_size
    batch = jax.tree.map(lambda column: jax.ShapeDtypeStruct((size, *column.shape[1:]), column.dtype), data.train)
    optimizer = TrainConfig().optimizer

    def init(batch, method):
        def init_params(key):
            return model.init({"params": key, "dropout": key}, batch, train=True)["params"]

        return TrainState.create(init_params, method, optimizer, 0, 1e-3, num_tasks=len(data.tasks))

    shape = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert set(config.methods) == set(competitors.TABLE) and config.data == ("flights", "digits", "bench")
    for name, entry in competitors.TABLE.items():
        if competitors.left_out(name, len(data.tasks)) or (names is not None and name not in names):
            continue
        for setting in ({}, *entry.settings()[:1]):
            method = competitors.build(name, setting)
            fresh = jax.eval_shape(lambda batch, method=method: init(batch, method), batch)
            step = make_train_step(supervised_loss(model, data.tasks), method, optimizer)
            new, metrics = jax.eval_shape(step, fresh, batch)
            assert shape(fresh) == shape(new) and metrics.losses.shape == (6,), name


def test_methods_that_have_no_place_are_named_with_a_reason(competitors):
    assert competitors.left_out("PCGrad", 2) is None
    assert competitors.left_out("Krum", 3) == "needs 4 tasks"
    assert [name for name in competitors.TABLE if competitors.left_out(name, 5)] == ["RotoGrad"]


@pytest.mark.parametrize("name", ["MGDA", "F-MGDA"])
def test_methods_see_shared_parameters_only(competitors, name):
    """The shortest vector between two unit vectors is (1/2, 1/2); heads follow their own tasks."""
    params = {"trunk": jnp.ones(2), "heads": {"out": jnp.ones(2)}}
    jacobian = {"trunk": jnp.eye(2), "heads": {"out": 5.0 * jnp.eye(2)}}
    method = competitors.build(name, {})
    state = method.init(params)
    gradient, _ = method.update(jacobian, state, params, losses=jnp.ones(2), perturbed=jacobian)
    np.testing.assert_allclose(gradient["trunk"], [0.5, 0.5], rtol=1e-5)
    np.testing.assert_allclose(gradient["heads"]["out"], [5.0, 5.0])


def test_presets_and_settings(competitors):
    demo, paper = competitors.DEMO, competitors.PAPER
    assert paper.seeds == 5 and len(paper.learning_rates) == 2 and {"Sum", "tuned sum"} <= set(demo.methods)
    assert competitors.settings("MGDA", paper) == [{}]
    tuned = competitors.settings("MGDA", dataclasses.replace(paper, tune=True))
    assert tuned == [{"normalize": kind} for kind in ("none", "l2", "loss+")]
    assert len(competitors.settings("tuned sum", paper)) == 9
    assert competitors.settings("tuned sum", demo) == [{"draw": None, "power": p} for p in (0.0, 0.5, 1.0)]
    with pytest.raises(ValueError, match="batch_size must be a multiple of 6"):
        competitors.Source((100, 10, 10), 32, 1)
    with pytest.raises(ValueError, match=r"rows must be \(train, validation, test\)"):
        competitors.Source((100, 10), 6, 1)
    with pytest.raises(ValueError, match="learning_rates must hold"):
        competitors.Config(methods=(), learning_rates=())
    with pytest.raises(ValueError, match="must be >= 1, got 0"):
        competitors.Config(methods=(), seeds=0)


# Tests and verdicts.


def test_paired_test_and_correction(claims, rng):
    from scipy import stats

    a, b = rng.normal(size=(2, 5))
    assert claims.p_value(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert claims.p_value(np.zeros(5)) == 1.0 and claims.p_value(np.ones(5)) == 0.0
    assert claims.p_value(np.ones(1)) == 1.0, "one seed tells nothing"
    # 0.01 <= 0.05 / 3, 0.02 <= 0.05 / 2, 0.06 > 0.05.
    assert claims.holm({"a": 0.06, "b": 0.01, "c": 0.02}) == ["b", "c"]
    assert claims.holm({"a": 0.02, "b": 0.02, "c": 0.02}) == [], "0.02 > 0.05 / 3 stops it at once"
    assert claims.holm({}) == []
    assert doctest.testmod(claims).failed == 0


def outcome(script, scores, validation=0.0, **fields):
    """One task with these scores f64[S]."""
    kept = {"learning_rates": [0.01], "setting": {}, "diverged": [], "conflicts": 0.5, "params": 10}
    numbers = {"rows_per_s": 100.0, "compile_s": 1.0, "wall_s": 2.0}
    test = {"y": {"explained_variance": np.asarray(scores, float)}}
    return script.Outcome(test, validation, **kept | numbers | fields)


def test_findings_follow_the_scores(script, claims):
    tasks = [mtjax.Task("y", "regression")]
    wiggle = np.array([-1e-3, 0.0, 1e-3])
    better, plain, worse = 0.8 + wiggle, np.full(3, 0.7), 0.6 - wiggle
    outcomes = {
        "single task": outcome(script, plain),
        "Sum": outcome(script, plain),
        "tuned sum": outcome(script, plain, setting={"power": 1.0}),
        "UW": outcome(script, better, validation=0.9),
        "PCGrad": outcome(script, worse, validation=0.5),
        "MGDA": outcome(script, [np.nan] * 3),
    }
    found = {finding.claim: finding for finding in claims.findings({"bench": (tasks, outcomes)})}
    average = found["objective methods beat the plain sum on average (bench)"]
    assert average.holds is None and "mean of 2 methods minus Sum" in average.reason, "MGDA diverged and is left out"
    assert "better by itself: UW; worse: PCGrad of 2" in average.reason
    tuned = found["no method beats a tuned weighted sum (bench)"]
    assert tuned.holds is False and "better: UW; worse: PCGrad of 2" in tuned.reason and "power 1.0" in tuned.reason
    assert tuned.ours == "UW: 0.80000 ± 0.00058" or tuned.ours.startswith("UW: 0.8")
    balance = found["balancing losses of unequal scale beats the plain sum (bench)"]
    assert balance.holds is True and balance.reason.startswith("mean of UW minus Sum: +0.1000 ± 0.0006 over 3 paired")
    assert found["methods that read gradients (Gramian) beat those that read losses"].holds is False

    del outcomes["UW"]
    found = {finding.claim: finding for finding in claims.findings({"digits": (tasks, outcomes)})}
    assert found["objective methods beat the plain sum on average (digits)"].holds is False
    assert found["no method beats a tuned weighted sum (digits)"].holds is True
    assert len(found) == 2, "no claim on balancing without bench, nor on families without both"
    close = outcomes | {"PCGrad": outcome(script, plain + 20 * wiggle)}
    found = {finding.claim: finding.holds for finding in claims.findings({"digits": (tasks, close)})}
    assert found["no method beats a tuned weighted sum (digits)"] is None, "an interval of ± 0.05 leaves it open"
    (nothing,) = claims.findings({"digits": (tasks, {"Sum": outcome(script, plain)})})
    assert nothing.holds is None


def test_rows_ranks_and_gains(script):
    """Scores 0.9 and 0.5 against 0.5: ranks 1 and 2.5 (a tie); gains of 80 % and 0."""
    tasks = [mtjax.Task("y", "regression")]
    outcomes = {
        "single task": outcome(script, [0.5, 0.5]),
        "Sum": outcome(script, [0.5, 0.5], rows_per_s=300.0),
        "UW": outcome(script, [0.9, 0.9], conflicts=0.25),
    }
    found = {"digits": (tasks, outcomes)}
    ranked = script.rank_methods(found)
    assert ranked.mean == {"UW": 1.0, "single task": 2.5, "Sum": 2.5} and ranked.n == 2
    delta = {"digits": script.gains(*found["digits"])}
    assert list(delta["digits"]) == ["UW", "single task", "Sum"]
    cells = {(row["model"], row["task"], row["metric"]): row for row in script.rows(found, ranked, delta)}
    assert cells["UW", "all data", "mean rank"]["mean"] == 1.0 and cells["UW", "all data", "mean rank"]["n"] == 2
    assert cells["UW", "digits", "delta_m"]["mean"] == pytest.approx(80.0)
    assert cells["UW", "step", "x Sum"]["mean"] == pytest.approx(3.0)
    assert cells["UW", "conflicts", "% of pairs"]["mean"] == pytest.approx(25.0)
    assert cells["UW", "digits/y", "explained_variance"]["mean"] == pytest.approx(0.9)
    assert ("single task", "step", "x Sum") not in cells


def test_the_best_setting_is_chosen_on_validation_rows(script):
    candidates = [outcome(script, [1.0], validation=v) for v in (math.nan, 0.2, 0.8, 0.5)]
    chosen = script.best(candidates)
    assert chosen.validation_score == 0.8 and chosen.wall_s == 8.0
    again = script.Outcome.from_json(chosen.to_json())
    np.testing.assert_array_equal(again.test["y"]["explained_variance"], [1.0])
    assert again.setting == chosen.setting and again.learning_rates == chosen.learning_rates


def test_progress_counts_what_was_measured_now(script):
    clock = script.Clock(10)
    assert clock.note(4, None) == "[4/10, 0.0 min to go]", "read from file: no time to go by"
    assert clock.note(2, 60.0) == "[6/10, 2.0 min to go]"


# The script.


@pytest.fixture(scope="module")
def smoke(script, run_smoke) -> pathlib.Path:
    return run_smoke(script)


@pytest.mark.slow  # the smoke runs of toy.py and flat_regions.py have its parts
def test_smoke_report(smoke, competitors):
    content = json.loads((smoke / "report.json").read_text())
    assert list(content) == [*KEYS, "holds", "details"]
    assert content["system"] == "objectives_compare" and content["preset"] == "smoke" and content["seeds"] == [0, 1]
    cells = {(row["model"], row["task"], row["metric"]): row for row in content["rows"]}
    for name in ("single task", *competitors.SMOKE.methods):
        row = cells[name, "bench", "delta_m"]
        assert math.isfinite(row["mean"]) and row["n"] == 2 and row["rows_per_s"] > 0 and row["diverged"] == []
        assert 1 <= cells[name, "all data", "mean rank"]["mean"] <= 5
        assert cells[name, "all data", "mean rank"]["n"] == 12, "six tasks, two seeds"
        assert len([cell for cell in cells if cell[:1] == (name,) and cell[1].startswith("bench/")]) == 6
    assert cells["tuned sum", "bench", "delta_m"]["setting"].keys() == {"draw", "power"}
    assert 0 < cells["Sum", "conflicts", "% of pairs"]["mean"] < 100
    assert cells["Sum", "step", "x Sum"]["mean"] == 1.0
    claims = [finding["claim"] for finding in content["details"]["findings"]]
    assert len(claims) == 4 and content["claim"] == "; ".join(claims)
    assert content["details"]["config"]["bench"]["batch_size"] == 48
    assert content["details"]["ranks"]["n"] == 12


@pytest.mark.slow
def test_smoke_figures(smoke):
    sizes = {path.name: path.stat().st_size for path in (smoke / "figures").iterdir()}
    assert set(sizes) == {"ranks.png", "delta_bench.png"} and min(sizes.values()) > 5000


@pytest.mark.slow
def test_resuming_runs_only_what_is_missing(smoke, call):
    """A lost outcome is measured again, to the same bits; the others are read."""
    paths = {path.stem: path for path in (smoke / "bench").iterdir()}
    assert set(paths) == {"single-task", "sum", "tuned-sum", "uw", "pcgrad"}
    before = {stem: path.stat().st_mtime_ns for stem, path in paths.items()}
    lost = json.loads(paths["pcgrad"].read_text())
    paths["pcgrad"].unlink()
    status, stdout, stderr = call("--resume", "--run", smoke)
    assert (status, stderr) == (0, "") and re.search(r"\[6/6, 0.0 min to go\] bench +PCGrad", stdout)
    assert {stem for stem, path in paths.items() if path.stat().st_mtime_ns != before[stem]} == {"pcgrad"}
    again = json.loads(paths["pcgrad"].read_text())
    assert again["test"] == lost["test"] and again["validation_score"] == lost["validation_score"]

    status, _, stderr = call("--resume", "--run", smoke, "--seeds", "7")
    assert status == 2 and "--seeds: started with None, now 7" in stderr
    status, _, stderr = call("--preset", "smoke", "--run", smoke)
    assert status == 2 and stderr.endswith(
        "already holds a run; go on with it by --resume, or choose another directory\n"
    )
    record = json.loads((smoke / "run.json").read_text())
    record["budget"]["width"] = 3
    (smoke / "run.json").write_text(json.dumps(record))
    status, _, stderr = call("--resume", "--run", smoke)
    assert status == 2 and "was started with other sizes or budgets" in stderr


def test_an_interrupted_run_tells_how_to_go_on(script, call, tmp_path, request):
    """SIGTERM while the second method trains: status 130; the first one is on file."""
    ignore = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, ignore)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    run, done = tmp_path / "run", threading.Event()

    def send():
        while not (run / "bench" / "single-task.json").exists() or signal.getsignal(signal.SIGTERM) is ignore:
            if done.wait(0.001):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        status, stdout, _ = call("--preset", "smoke", "--run", run, "--methods", "uw")
    finally:
        done.set()
        thread.join()
    assert status == 130
    assert re.search(r"what is finished is saved. Go on with: python .* --resume --run .*run\n", stdout)
    assert [path.name for path in (run / "bench").iterdir()] == ["single-task.json"]
    assert not (run / "report.json").exists()


def test_a_rate_at_which_a_method_diverges_is_left_out(script, competitors):
    """At a rate of 1e38 parameters overflow; alone it leaves a method without scores."""
    data = competitors.load_bench(competitors.SMOKE.bench)
    config = dataclasses.replace(competitors.SMOKE, learning_rates=(1e38, 1e-2))
    found = script.measure("Sum", data, config, config.bench, {})
    assert found.diverged == [1e38] and set(found.learning_rates) == {1e-2}
    assert np.isfinite(found.score(data.tasks)).all()
    config = dataclasses.replace(config, learning_rates=(1e38,))
    lost = script.measure("Sum", data, config, config.bench, {})
    assert lost.diverged == [1e38] and np.isnan(lost.score(data.tasks)).all() and math.isnan(lost.validation_score)
    ranked = script.rank_methods({"bench": (data.tasks, {"Sum": found, "UW": lost})})
    assert ranked.mean == {"Sum": 1.0, "UW": 2.0}, "who diverged ranks last"


def test_command_line(call, tmp_path):
    status, stdout, _ = call("--help")
    assert status == 0 and all(option in stdout for option in ("--preset", "--methods", "--data", "--resume", "--set"))
    status, stdout, _ = call("--methods", "list")
    assert status == 0 and {"Sum", "PCGrad"} <= {line.split()[0] for line in stdout.splitlines()}
    for arguments, message in (
        (["--methods", "PCGard"], "error: --methods: there is no 'PCGard'; did you mean 'PCGrad'"),
        (["--data", "mnist"], "error: --data: there is no 'mnist'; choose among flights, digits, bench"),
        (["--set", "bench.batch_size=50"], "batch_size must be a multiple of 6"),
        (["--set", "bench.epoch=5"], "did you mean 'epochs'?"),
        (["--seeds", "0"], "must be >= 1, got 0"),
    ):
        status, _, stderr = call(*arguments, "--run", tmp_path / "run")
        assert status == 2 and message in stderr, arguments
    assert not (tmp_path / "run").exists(), "what was refused leaves nothing behind"
