"""Flat regions: what steps cost, sharpness equal to a plain loop, verdicts, and the script end to end."""

import json
import os
import pathlib
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.train.step import supervised_loss

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "objectives" / "flat_regions.py"
KEYS = ["system", "claim", "preset", "command", "seeds", "commit", "dirty", "device", "versions", "wall_s", "rows"]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("objectives/flat_regions.py")


@pytest.fixture(scope="module")
def runs(script):
    return sys.modules["flat_runs"]


# Methods and measures.


def test_more_epochs_cost_what_flat_regions_cost(runs):
    """By hand, K = 6, a backward pass counting two. Sum: 1 + 2. PCGrad: 1 + 2 K + 2 = 15. Flat: 1 + 2 K + 3 K = 31."""
    cost = [runs.passes(name, variant, 6) for name in ("Sum", "PCGrad") for variant in runs.VARIANTS]
    assert cost == [3, 3, 6, 31, 15, 15, 18, 31]
    config = runs.PAPER
    base = config.train.max_epochs
    for name in config.methods:
        long = runs.epochs(name, runs.LONGER, config, 6)
        assert long / base == pytest.approx(
            runs.passes(name, runs.FLAT, 6) / runs.passes(name, runs.PLAIN, 6), rel=0.02
        )
        assert {runs.epochs(name, variant, config, 6) for variant in (runs.PLAIN, runs.SAM, runs.FLAT)} == {base}


def small(runs):
    data = runs.load(runs.SMOKE, 0.3)
    model = runs.model_of(False, tuple(mtjax.head_sizes(data.tasks).items()), data.num_numeric, runs.SMOKE.hidden)
    batch = jax.tree.map(jnp.asarray, dict(data.train))
    return data, model, batch


def test_sharpness_is_that_of_a_plain_loop(runs):
    data, model, batch = small(runs)
    init = jax.jit(jax.vmap(lambda key: model.init(key, batch)["params"]))(jax.random.split(jax.random.key(0), 2))
    found = runs.make_sharpness(model, data.tasks, 0.2)(init, batch)
    loss_fn = supervised_loss(model, data.tasks)
    losses = jax.jit(lambda params: jnp.stack(list(loss_fn(params, batch, jax.random.key(0)).values())))
    jacobian = jax.jit(jax.jacrev(losses))
    for lane in range(2):
        params = jax.tree.map(lambda leaf: np.asarray(leaf)[lane], init)  # noqa: B023
        rows = jax.tree.map(np.asarray, jacobian(params))
        for k in range(2):
            length = np.sqrt(sum((leaf[k] ** 2).sum() for leaf in jax.tree.leaves(rows)))
            away = jax.tree.map(lambda p, leaf: p + 0.2 / length * leaf[k], params, rows)  # noqa: B023
            np.testing.assert_allclose(found[lane, k], losses(away)[k] - losses(params)[k], rtol=1e-3)
    assert (np.asarray(found) > 0).all()


def test_a_task_without_gradient_has_no_sharpness(runs):
    data, model, batch = small(runs)
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    missing = batch["labels"] | {"odd": jnp.full_like(batch["labels"]["odd"], jnp.nan)}
    lanes = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    found = np.asarray(runs.make_sharpness(model, data.tasks, 0.2)(lanes, batch | {"labels": missing}))
    assert (found[:, 0] == 0).all() and (found[:, 1] > 0).all()


def test_every_method_of_the_paper_preset_makes_a_step_in_every_variant(runs):
    """Abstractly, so that a typo in the preset cannot hide."""
    data, model, batch = small(runs)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), batch)["params"])
    loss_fn = supervised_loss(model, data.tasks)
    for name in runs.PAPER.methods:
        for variant in runs.VARIANTS:
            method = runs.build(name, variant, 0.05)
            state = jax.eval_shape(lambda p: mtjax.optim.init(method, p, num_tasks=2), params)  # noqa: B023
            step = mtjax.value_and_update(loss_fn, method)
            losses, gradient, after = jax.eval_shape(step, params, state, batch, jax.random.key(0))
            assert losses.shape == (2,) and jax.tree.structure(gradient) == jax.tree.structure(params)
            assert jax.tree.structure(after) == jax.tree.structure(state), name + variant
    assert len(runs.PAPER.tasks) == 6 and runs.PAPER.seeds >= 5


def test_paper_data_has_wrong_training_labels_only(runs):
    clean, noisy = (runs.load(runs.PAPER, noise) for noise in (0.0, 0.3))
    assert len(clean.train["numeric"]) == 200
    for name, share in {"digit": 0.3, "odd": 0.3, "large": 0.3, "ink": 0.0}.items():
        differ = clean.train["labels"][name] != noisy.train["labels"][name]
        assert differ.mean() == pytest.approx(share)
        for split in ("validation", "test"):
            np.testing.assert_array_equal(getattr(clean, split)["labels"][name], getattr(noisy, split)["labels"][name])
    assert all(task.main_metric.name in ("accuracy", "explained_variance") for task in clean.tasks)


def test_overconfidence_by_hand(runs):
    """Two classes: confidence 0.8 and right, 0.6 and wrong: (0.8 + 0.6) / 2 - 1 / 2 = 0.2; the same in two columns."""
    probability, label = jnp.array([0.8, 0.4]), jnp.array([1.0, 1.0])
    for prediction in (probability, jnp.stack([1 - probability, probability], -1)):
        metric = runs.OVERCONFIDENCE
        assert metric.compute(metric.statistic(prediction, label)) == pytest.approx(0.2)


# Verdicts.


def stop_of(runs, score: float, rho: float):
    return runs.Stop(score, [1e-3], rho, np.ones(2), {})


def test_each_stop_chooses_its_own_radius(runs):
    scores = {0.01: (0.7, 0.9), 0.1: (0.8, 0.85)}
    candidates = [
        runs.Outcome(dict(zip(runs.STOPS, (stop_of(runs, s, rho) for s in pair), strict=True)), 1, 1.0, 1.0)
        for rho, pair in scores.items()
    ]
    chosen = runs.choose_radius(candidates)
    assert [chosen[stop].rho for stop in runs.STOPS] == [0.1, 0.01]


def test_gain_of_a_seed_is_the_mean_relative_change(script, runs):
    """By hand: odd 0.9 against 0.75 is +20 %, ink 0.8 against 1.0 is -20 % in the first seed, +0 % in the second."""
    tasks = runs.load(runs.SMOKE, 0.0).tasks
    test = {"odd": {"accuracy": np.array([0.9, 0.9])}, "ink": {"explained_variance": np.array([0.8, 1.0])}}
    base = {"odd": {"accuracy": np.array([0.75, 0.75])}, "ink": {"explained_variance": np.ones(2)}}
    ours, single = (runs.Stop(0.0, [1e-3], None, np.ones(2), of) for of in (test, base))
    np.testing.assert_allclose(script.gain(tasks, ours, single), [0.0, 10.0], atol=1e-9)


def synthetic(script, better: dict[str, float], spread: float = 0.01):
    """Values in which flat regions are better than each variant by so much, in all measures."""
    noise = spread * np.array([-1.0, 0.0, 1.0, 0.5, -0.5])
    values = {}
    for name in ("Sum", "PCGrad"):
        values[name + script.FLAT] = dict.fromkeys(script.MEASURES, np.ones(5))
        for variant, amount in better.items():
            values[name + variant] = {
                measure: 1.0 - (1 if higher else -1) * (amount + noise) for measure, higher in script.MEASURES.items()
            }
    return {"a setting": values}


@pytest.mark.parametrize(
    ("longer", "sam", "expected"), [(0.5, 0.5, True), (0.5, 0.0, None), (-0.5, 0.5, False), (0.0, 0.0, None)]
)
def test_a_claim_holds_if_flat_regions_beat_every_variant(script, longer, sam, expected):
    found = synthetic(script, {script.PLAIN: 0.5, script.LONGER: longer, script.SAM: sam})
    names = ("Sum", "PCGrad")
    verdicts = {finding.claim: finding for finding in script.findings(found, names)}
    for measure in ("Δm in %", "ECE"):
        verb = "raise" if measure == "Δm in %" else "lower"
        finding = verdicts[f"flat regions {verb} {measure} (a setting)"]
        assert finding.holds is expected
        assert "the methods alone: +0.5 ± 0.0035" in finding.reason and "better for 2 of 2" in finding.reason
    made = script.tests(found, names)
    assert len(made) == len(script.MEASURES) * 2 * 3
    for test in made:
        if test["against"] == "Sum":
            # By hand: the noise has mean 0 and variance (1 + 0 + 1 + 1/4 + 1/4) / 4 * 1e-4 = 0.625e-4, over 5 seeds.
            assert test["improvement"] == pytest.approx(0.5) and test["se"] == pytest.approx((0.625e-4 / 5) ** 0.5)
            assert test["p"] < 1e-6 and test["n"] == 5


# The script.


@pytest.fixture(scope="module")
def smoke(script, run_smoke) -> pathlib.Path:
    return run_smoke(script)


def test_smoke_report(smoke, script):
    content = json.loads((smoke / "report.json").read_text())
    assert list(content) == [*KEYS, "holds", "details"]
    assert content["system"] == "objectives_flat_regions" and content["seeds"] == [0, 1]
    cells = {(row["model"], row["task"], row["metric"]): row for row in content["rows"]}
    for stop in script.STOPS:
        setting = f"30% wrong labels, {stop}"
        for variant in script.VARIANTS:
            row = cells["Sum" + variant, setting, "delta_m"]
            assert row["n"] == 2 and row["baseline"] == "single task" and row["higher_is_better"]
            assert row["rho"] == (0.05 if variant in (script.SAM, script.FLAT) else None)
            assert 0 <= cells["Sum" + variant, setting, "ECE"]["mean"] <= 1
            assert cells["Sum" + variant, setting, "sharpness"]["mean"] > 0
            odd = cells["Sum" + variant, f"{setting}: odd", "accuracy"]["mean"]
            assert 0 < odd < 1
        assert cells["single task", setting, "delta_m"]["mean"] == 0
    last = [cells["Sum" + variant, "30% wrong labels, last epoch", "delta_m"]["epochs"] for variant in script.VARIANTS]
    # K = 2: flat regions cost 11 passes, the sum 3; 2 epochs become 7.
    assert last == [2, 7, 2, 2]
    assert len(content["details"]["findings"]) == 6 and content["details"]["passes"]["Sum + flat regions"] == 11


def test_smoke_figure(smoke):
    assert (smoke / "figures" / "objectives_flat_regions.png").stat().st_size > 5000


def test_a_run_is_not_overwritten_and_resuming_trains_only_what_is_missing(smoke, script, capsys):
    before = json.loads((smoke / "report.json").read_text())
    assert script.main(["--preset", "smoke", "--run", str(smoke)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert script.main(["--resume", "--run", str(smoke), "--seeds", "3"]) == 2
    assert "--seeds: started with None, now 3" in capsys.readouterr().err
    files = {path: path.stat().st_mtime_ns for path in smoke.glob("noise_0.3/*.json")}
    missing = smoke / "noise_0.3" / "sum-sam-rho-0.05.json"
    missing.unlink()
    assert script.main(["--resume", "--run", str(smoke)]) == 0
    again = {path: path.stat().st_mtime_ns for path in smoke.glob("noise_0.3/*.json")}
    assert len(again) == 5 and {path for path in files if files[path] != again[path]} == {missing}
    after = json.loads((smoke / "report.json").read_text())
    apart = ("rows_per_s",)
    strip = lambda rows: [{key: value for key, value in row.items() if key not in apart} for row in rows]  # noqa: E731
    assert strip(after["rows"]) == strip(before["rows"]) and after["holds"] == before["holds"]


def test_an_interruption_says_how_to_go_on(smoke, script, capsys, request, tmp_path):
    """SIGTERM while the first method trains, far from its last epoch."""
    default = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, default)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    done = threading.Event()

    def send():
        while signal.getsignal(signal.SIGTERM) is default:  # a training has not yet begun
            if done.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    run = tmp_path / "run"
    try:
        status = script.main(["--preset", "smoke", "--run", str(run), "--set", "train.max_epochs=100000"])
    finally:  # no signal may come when the test is over
        done.set()
        thread.join()
    assert status == 130
    assert f"--resume --run {run}" in capsys.readouterr().out
    assert not (run / "report.json").exists()


def test_command_line_errors_are_sentences(script, capsys, tmp_path):
    assert script.main(["--methods", "list"]) == 0
    shown = capsys.readouterr().out.split("\n")
    assert "PCGrad" in shown and "SAM" not in shown
    for arguments, message in (
        (["--methods", "Nash"], "error: --methods: there is no 'Nash'"),
        (["--methods", "SAM"], "SAM does not work on gradients at the parameters"),
        (["--set", "radii=(0.1,0.1)"], "radii must hold at least one value and none twice"),
        (["--set", "learning_rates=(-1.0,)"], "must be > 0, got (-1.0,)"),
        (["--set", "tasks=('ink',)"], "tasks must hold one of digit, odd, large, got ink"),
        (["--seeds", "0"], "seeds must be >= 1, got 0"),
    ):
        assert script.main([*arguments, "--run", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
