"""README: its two commands, its code and its paths are true."""

import ast
import pathlib
import re
import shlex
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.models import ModSquad, ModSquadConfig
from mtjax.nn import Dispatch, ViTConfig

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


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


def test_options_of_the_shell_examples_exist():
    for line in "".join(blocks("bash")).splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "python" and words[1].startswith("experiments/")
        script = "\n".join(path.read_text() for path in (ROOT / words[1]).parent.glob("*.py"))
        for option in (word.removeprefix("--") for word in words if word.startswith("--")):
            assert re.search(rf"^    {option}: ", script, flags=re.MULTILINE), option


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
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
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
    exec(compile(blocks("python")[1], "README.md", "exec"), names)
    method = mtjax.optim.nonfinite(names["inverse_norm"](), "drop_task")
    assert len(blocks("python")[1].splitlines()) <= 60
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
    exec(compile(blocks("python")[2], "README.md", "exec"), names)
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
    exec(compile(blocks("python")[3], "README.md", "exec"), names)
    whole = model.apply({"params": names["params"]}, batch, task="depth")["depth"]
    cut = names["small"].apply({"params": names["small_params"]}, batch)["depth"]
    np.testing.assert_allclose(cut, whole, atol=1e-5)
    assert list(names["larger"].heads) == ["depth", "edge", "normals"]
    assert names["larger"].config.layers[0].num_experts == config.layers[0].num_experts + 4
