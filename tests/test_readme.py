"""README: its two commands, its code and its paths are true."""

import ast
import json
import pathlib
import re
import shlex
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.models import ModSquad, ModSquadConfig, shared_bottom
from mtjax.nn import Dispatch, ViTConfig
from mtjax.train import TrainConfig

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def block_with(text: str) -> str:
    """The python block that holds a text."""
    return next(block for block in blocks("python") if text in block)


def test_the_first_two_sh_blocks_are_the_documented_commands():
    """.ci/run takes them from here: one line each, the main command and the test command."""
    main, tests = blocks("sh")[:2]
    assert main == "pip install -e . && python experiments/tabular/multitab.py\n"
    assert tests == "pip install -e '.[test]' && pytest\n"
    assert (ROOT / "experiments" / "tabular" / "multitab.py").exists()


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"mtjax\[(\w+)\]|'\.\[(\w+)\]'", TEXT)
    assert {first or second for first, second in named} <= set(extras) and named


def options_of(source: str) -> set[str]:
    """Options that a script or its folder names, as fields of a dataclass or by argparse."""
    named = re.findall(r"^    (\w+): ", source, flags=re.MULTILINE) + re.findall(r'"--([\w-]+)"', source)
    return {name.replace("_", "-") for name in named}


def test_commands_of_the_shell_examples_exist():
    """Scripts, modules and their options; what follows -- of a launcher is a command of its own."""
    machine = options_of((ROOT / "mtjax" / "train" / "command.py").read_text())
    commands = [line.split("#")[0].split(" -- ") for line in "".join(blocks("bash")).splitlines()]
    for words in (shlex.split(command) for line in commands for command in line):
        assert words[0] == "python"
        if words[1] == "-m":
            known = options_of((ROOT / (words[2].replace(".", "/") + ".py")).read_text())
        else:
            folder = (ROOT / words[1]).parent
            assert (ROOT / words[1]).exists() and words[1].startswith("experiments/")
            known = machine | options_of("\n".join(path.read_text() for path in folder.glob("*.py")))
            known |= options_of((ROOT / "mtjax" / "train" / "study.py").read_text())
        assert {word.removeprefix("--") for word in words if word.startswith("--")} <= known, words


def test_files_of_the_table_exist():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "`" in line]
    named = [re.search(r"`([^` ]+)", line).group(1) for line in rows]
    assert len(named) >= 5
    for path in named:
        assert (ROOT / path).exists(), path


def test_every_python_block_parses():
    assert blocks("python")
    for block in blocks("python"):
        ast.parse(block)


def test_the_example_runs_and_learns():
    """The first python block on two regression tasks whose gradients conflict at first."""

    def loss_fn(params, batch):
        prediction = batch["x"] @ params["w"]
        return {"a": jnp.mean((prediction - batch["a"]) ** 2), "b": jnp.mean((prediction - batch["b"]) ** 2)}

    x = jax.random.normal(jax.random.key(0), (64, 3))
    batch = {"x": x, "a": x @ jnp.array([1.0, 2.0, 0.0]), "b": x @ jnp.array([1.0, 0.0, 0.0])}
    names = {"loss_fn": loss_fn}
    exec(compile(block_with("def train_step"), "README.md", "exec"), names)
    params = {"w": jnp.array([0.0, 1.0, 1.0])}
    state = names["tx"].init(params)
    first = None
    for _ in range(300):
        params, state, losses = names["train_step"](params, state, batch)
        first = losses if first is None else first
    assert losses.shape == (2,) and (losses < first).all()
    assert names["mtjax"].optim.diagnostics(state).weights.shape == (2,)


def test_the_method_of_the_text_is_one():
    """The second python block, by both routes and with a task that is left out."""
    names = {}
    exec(compile(block_with("def inverse_norm"), "README.md", "exec"), names)
    method = mtjax.optim.nonfinite(names["inverse_norm"](), "drop_task")
    assert len(block_with("def inverse_norm").splitlines()) <= 60
    loss_fn = lambda p: {"a": 3.0 * p[0], "b": 4.0 * p[1], "c": p[0] * jnp.inf}  # noqa: E731
    params = jnp.ones(2)
    _, weighted, state = mtjax.value_and_update(loss_fn, method)(params, method.init(params))
    losses, jacobian = mtjax.value_and_jacobian(loss_fn, separate=True)(params)
    direction, _ = method.update(jacobian, method.init(params), params, losses=losses)
    assert weighted.tolist() == direction.tolist() == pytest.approx([1.0, 1.0])
    assert state.weights.tolist() == pytest.approx([1 / 3, 1 / 4, 0.0])


@pytest.mark.parametrize("name", re.findall(r"`mtjax\.(\w+)(?:\.\w+)?\(", TEXT))
def test_functions_of_the_text_exist(name):
    import mtjax

    assert name in mtjax.__all__


def test_a_geometry_of_your_own_becomes_data():
    names = {}
    exec(compile(block_with("DarcyConfig"), "README.md", "exec"), names)
    train = names["data"]["train"]
    assert train["values"].shape == (200, 1024) and (train["values"][train["mask"]] > 0).all()
    # An ellipse with half axes 0.4 and 0.2; 32 nodes are 31 spacings.
    assert train["mask"][train["task"] == 1].mean() == pytest.approx(np.pi * 0.4 * 0.2 * (31 / 32) ** 2, rel=0.05)


def test_a_task_is_cut_out_and_another_one_added():
    """The fourth python block on a tiny model: the cut-out model predicts what the whole one does."""
    vit = ViTConfig(patch=4, width=8, depth=2, num_heads=2)
    config = ModSquadConfig(vit, num_experts=4, top_k=2, attention_experts=3, dispatch=Dispatch("all_experts"))
    model = ModSquad(config, {"depth": 1, "edge": 1})
    batch = {"image": np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)}
    names = {"model": model, "images": batch, "key": jax.random.key(1)}
    names["params"] = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    exec(compile(block_with("surgery"), "README.md", "exec"), names)
    whole = model.apply({"params": names["params"]}, batch, task="depth")["depth"]
    cut = names["small"].apply({"params": names["small_params"]}, batch)["depth"]
    np.testing.assert_allclose(cut, whole, atol=1e-5)
    assert list(names["larger"].heads) == ["depth", "edge", "normals"]
    assert names["larger"].config.layers[0].num_experts == config.layers[0].num_experts + 4


def test_training_on_a_mesh_is_two_lines(capsys):
    """The block of the section on meshes, on 8 simulated devices."""
    rng = np.random.default_rng(0)
    numeric = rng.normal(size=(64, 4)).astype(np.float32)
    rows = {"categorical": np.ones((64, 1), np.int32), "numeric": numeric, "labels": {"price": numeric.sum(1)}}
    tasks = (mtjax.Task("price", "regression").fit(rows["labels"]["price"]),)
    model = shared_bottom({"price": 1}, cardinalities=(2,), num_numeric=4, features=(64,))
    names = {"model": model, "tasks": tasks, "rows": rows, "validation": rows}
    block = block_with("sharding.make_mesh").replace("validation)", "validation, config=config, progress=False)")
    names["config"] = TrainConfig(batch_size=16, max_epochs=1)
    exec(compile(block, "README.md", "exec"), names)
    assert re.search(r"kernel .* fsdp ", capsys.readouterr().out)


PAIR = re.compile(r"(\d+(?:\.\d+)?) ± (\d+(?:\.\d+)?)")
MEASURED = ("README.md", *(f"experiments/docs/pages/families/{name}.md" for name in ("operators", "tabular", "vision")))


def measured() -> list[tuple[float, float]]:
    """(|mean|, standard error) of all rows and findings of the committed results, shares also in percent."""
    found = []
    for path in (ROOT / "experiments" / "results").glob("*.json"):
        report = json.loads(path.read_text())
        findings = json.dumps(report["details"].get("findings", []), ensure_ascii=False)
        found += [(float(mean), float(error)) for mean, error in PAIR.findall(findings)]
        numbers = [(row.get("mean"), row.get("se")) for row in report["rows"]]
        numbers = [(abs(mean), error) for mean, error in numbers if mean is not None and error is not None]
        found += [(scale * mean, scale * error) for mean, error in numbers for scale in (1, 100)]
    return found


@pytest.mark.parametrize("page", MEASURED)
def test_means_and_errors_of_the_text_are_those_of_the_results(page):
    """Every 'mean ± standard error' is in a committed result, rounded."""

    def rounds_to(shown: str, value: float) -> bool:
        digits = len(shown.partition(".")[2])
        return abs(float(shown) - value) <= 0.5001 * 10**-digits

    known = measured()
    shown = PAIR.findall((ROOT / page).read_text())
    assert shown
    missing = [pair for pair in shown if not any(all(map(rounds_to, pair, numbers)) for numbers in known)]
    assert not missing
