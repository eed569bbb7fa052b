"""The studies of operator learning: budgets, chosen rates, verdicts by hand, and each script end to end."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.models.mt_deeponet import darcy_deeponet, fisher_deeponet, heat3d_deeponet

KEYS = ["system", "claim", "preset", "command", "seeds", "commit", "dirty", "device", "versions", "wall_s", "rows"]
MAIN = "relative_l2"


@pytest.fixture(scope="module")
def scripts(load_script):
    return {name: load_script(f"operators/{name}.py") for name in ("fisher", "darcy", "heat3d", "training", "transfer")}


@pytest.fixture(scope="module")
def arm(scripts):
    """`(name, {task: errors by seed}) -> Arm`."""

    def make(name, errors):
        test = {task: {MAIN: np.asarray(values, float)} for task, values in errors.items()}
        return scripts["fisher"].training.Arm(name, test, test, {}, False, (1e-3,), 1, 1, 1.0, 1.0)

    return make


# What the studies share.


def test_a_budget_is_whole_epochs_and_the_rate_ends_at_zero(scripts):
    recipe = scripts["training"].Recipe(steps=100, batch_size=64, learning_rates=(0.5,), warmup=0.1)
    config, steps = recipe.budget(rows=300)  # four steps an epoch
    assert (config.max_epochs, steps) == (25, 100) and config.batch_size == 64
    config, steps = recipe.budget(rows=20)  # all rows in every step
    assert (config.max_epochs, steps) == (100, 100)
    optimizer = recipe.optimizer(100)(0.5)
    state, moves = optimizer.init(jnp.zeros(())), []
    for _ in range(100):
        update, state = optimizer.update(jnp.ones(()), state)
        moves.append(abs(float(update)))
    # Adam's step on a constant gradient is the rate: up to 0.5 in ten steps, then down.
    assert np.argmax(moves) == 10 and max(moves) == pytest.approx(0.5, rel=1e-3) and moves[-1] < 1e-3


def test_verdicts_by_hand(scripts, arm):
    training = scripts["fisher"].training
    ours, other = arm("ours", {"a": [0.1, 0.11, 0.09]}), arm("other", {"a": [0.2, 0.22, 0.18]})
    found = training.against("better", ours, other)
    # Differences 10, 11, 9 points: mean 10, standard error 1 / sqrt(3).
    assert found.holds is True and "+10.00 ± 0.58" in found.reason
    assert training.against("better", other, ours).holds is False
    assert training.against("more than twice", other, ours, factor=2.0, better=False).holds is None, "exactly twice"
    mixed = arm("mixed", {"a": [0.1, 0.11, 0.09], "b": [0.5, 0.5, 0.5]})
    worse = arm("worse", {"a": [0.9, 0.91, 0.89], "b": [0.4, 0.4, 0.4]})
    assert training.against("better", mixed, worse).holds is None, "better in the mean, not for every task"


def test_no_learning_by_hand(scripts):
    task = scripts["fisher"].mtjax.Task("t", "regression")
    split = lambda values: {"values": np.asarray(values, float), "task": np.zeros(len(values), int)}  # noqa: E731
    # The mean field is (2, 0); the test field (4, 3) is (2, 3) away from it, sqrt(13) of 5; inside of the mask 2 of 4.
    train, test = split([[1.0, 0.0], [3.0, 0.0]]), split([[4.0, 3.0]])
    error = scripts["training"].mean_field_error([task], train, test)["t"][MAIN]
    assert error[0] == pytest.approx(np.sqrt(13) / 5)
    masked = scripts["training"].mean_field_error([task], train, test, mask=np.array([[True, False]]))["t"][MAIN]
    assert masked[0] == pytest.approx(0.5)


def test_interpolation_in_the_radius_by_hand(scripts):
    heat = scripts["heat3d"]
    fields = np.array([[300.0, 310.0], [300.0, 330.0]])
    train = {"task": np.zeros(2, int), "design": np.array([[2, 1.0], [2, 2.0]]), "values": fields}
    test = {"task": np.zeros(1, int), "design": np.array([[2, 1.5]]), "values": np.array([[300.0, 320.0]])}
    for split in (train, test):
        split["mask"] = np.ones((len(split["task"]), 2), bool)
    task = heat.mtjax.Task("2 holes", "regression")
    found = heat.baselines({"train": train, "test": test}, [task])
    assert found[heat.INTERPOLATED]["2 holes"][MAIN][0] == 0  # half way between 310 and 330
    test["values"][0, 1] = 325.0  # 5 off, of T - T_min = (0, 25)
    found = heat.baselines({"train": train, "test": test}, [task])
    assert found[heat.INTERPOLATED]["2 holes"][heat.ABOVE][0] == pytest.approx(0.2)


# The scripts.


@pytest.mark.parametrize(
    "name", ["darcy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fisher", "heat3d"))]
)
def test_smoke(scripts, run_smoke, name):
    """Report, figures, and every arm of the smoke preset with a finite error for every task."""
    script = scripts[name]
    run = run_smoke(script)
    content = json.loads((run / "report.json").read_text())
    assert list(content) == [*KEYS, "holds", "details"] and content["system"] == f"operators_{name}"
    cells = {(row["model"], row["task"]): row for row in content["rows"] if row["metric"] == MAIN}
    config = script.PRESETS["smoke"]
    tasks = {task for model, task in cells if model == "joint"}
    assert tasks and all(np.isfinite(cells[model, task]["mean"]) for model in config.arms for task in tasks)
    assert all(cells["joint", task]["n"] == 2 and cells["joint", task]["steps"] > 0 for task in tasks)
    moved = {row["model"] for row in content["rows"] if "examples" in row}
    expected = {"zero-shot", *(f"{way}, 2 examples" for way in scripts["transfer"].WAYS)} if name != "heat3d" else set()
    assert moved == expected
    figures = {path.name: path.stat().st_size for path in (run / "figures").iterdir()}
    assert set(figures) == {"fields.png"} | ({"transfer.png"} if expected else set()) and min(figures.values()) > 5000


def test_command_line_errors_are_sentences(scripts, call_script, tmp_path):
    for name, setting, message in (
        ("fisher", "methods=('nash',)", "there is no 'nash'"),
        ("darcy", "arms=('joint',)", "arms must hold 'separate'"),
        ("darcy", "examples=(500,)", "examples may be at most"),
        ("heat3d", "recipe.steps=0", "steps and batch_size must be >= 1"),
    ):
        status, _, error = call_script(scripts[name], "--run", tmp_path / "run", "--set", setting)
        assert status == 2 and message in error, error


@pytest.mark.parametrize(
    ("name", "published", "inputs", "dimension"),
    [
        ("fisher", fisher_deeponet, (68,), 2),
        ("darcy", darcy_deeponet, (100, 100, 2), 2),
        ("heat3d", heat3d_deeponet, (2,), 3),
    ],
)
def test_the_paper_preset_has_the_published_network_and_sizes(scripts, name, published, inputs, dimension):
    """Abstractly: the network of the preset is the published one (whose parameters test_mt_deeponet.py counts)."""
    script, config = scripts[name], scripts[name].PRESETS["paper"]
    model = script.network(config)
    size = {"fisher": 200, "darcy": 1000, "heat3d": 24}[name]
    points = {"fisher": 1280, "darcy": 10_000, "heat3d": 1_000_000}[name]
    assert config.recipe.batch_size == size
    batch = {
        "inputs": jax.ShapeDtypeStruct((size, *inputs), jnp.float32),
        "points": jax.ShapeDtypeStruct((points, dimension), jnp.float32),
        "mask": jax.ShapeDtypeStruct((size, points), bool),
    }
    params = jax.eval_shape(model.init, jax.random.key(0), batch)
    theirs = jax.eval_shape(published().init, jax.random.key(0), batch)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, theirs)
    assert jax.eval_shape(model.apply, params, batch)["u"].shape == (size, points)


def test_published_budgets(scripts):
    fisher, darcy, heat = (scripts[name].PRESETS["paper"] for name in ("fisher", "darcy", "heat3d"))
    assert [config.recipe.steps for config in (fisher, darcy, heat)] == [100_000, 30_000, 20_000]
    assert (fisher.data.num_nodes, fisher.data.num_times, darcy.data.size, heat.data.size) == (64, 20, 100, 100)
    assert len(heat.data.train_radii) * len(heat.data.holes) == 24 and len(heat.data.test_radii) * 8 == 40


def test_committed_results_are_of_the_study_preset():
    results = pathlib.Path(__file__).parents[2] / "experiments" / "results"
    for path in sorted(results.glob("operators_*.json")):
        content = json.loads(path.read_text())
        assert content["preset"] == "study" and len(content["seeds"]) >= 3 and content["dirty"] is False, path.name
