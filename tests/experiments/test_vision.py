"""The studies of dense vision tasks: their shared recipe and verdicts, the scripts, the published sizes."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import dense_tasks

KEYS = ("system", "claim", "preset", "command", "seeds", "commit", "dirty", "device", "versions", "wall_s", "rows")
FIGURES = {
    "m3vit": {"predictions.png", "experts.png"},
    "taskexpert": {"predictions.png", "gates.png"},
    "modular": {"experts_0.png", "experts_1.png", "pruning.png"},
}


@pytest.fixture(scope="module")
def scripts(load_script, import_beside):
    import_beside(("training", "rooms_study"), "vision")  # another family has files of these names
    return {name: load_script(f"vision/{name}.py") for name in FIGURES}


# What the studies share.


def test_the_rate_rises_then_falls_to_zero(scripts):
    recipe = scripts["m3vit"].Recipe(steps=100, batch_size=8, learning_rates=(0.5,), warmup=0.1, weight_decay=0.0)
    config, steps = recipe.budget(100, rows=64)
    assert steps == 104 and config.max_epochs == 13  # whole epochs of 8 steps
    optimizer = recipe.optimizer(100)(jnp.asarray(0.5))
    state, sizes = optimizer.init(jnp.zeros(())), []
    for _ in range(101):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        sizes.append(-float(update))
    assert sizes[0] == 0 and np.argmax(sizes) == 10 and sizes[10] == pytest.approx(0.5, rel=1e-3)
    assert sizes[100] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="learning_rates must be at least one number > 0"):
        scripts["m3vit"].Recipe(learning_rates=())


def test_gains_by_seed_by_hand(scripts):
    training = scripts["m3vit"].sys.modules["training"]
    tasks = (dense_tasks.segmentation(), dense_tasks.depth())
    ours = {"segmentation": {"mean_iou": np.array([0.3, 0.2])}, "depth": {"rmse": np.array([1.0, 0.5])}}
    theirs = {"segmentation": {"mean_iou": np.array([0.2, 0.2])}, "depth": {"rmse": np.array([1.0, 1.0])}}
    # First seed: +50 % and 0; second: 0 and half of the error.
    np.testing.assert_allclose(training.gain_by_seed(ours, theirs, tasks), [25.0, 25.0])
    score = training.scale_free_score(tasks, ours)
    np.testing.assert_allclose(score, [np.log(0.3) / 2, (np.log(0.2) - np.log(0.5)) / 2])


def test_a_measured_number_is_above_its_bound_only_beyond_doubt(scripts):
    measured = scripts["taskexpert"].measured
    assert measured("claim", "0", np.array([1.0, 1.1, 0.9]), above=0.5).holds is True
    assert measured("claim", "0", np.array([1.0, 1.1, 0.9]), above=1.5).holds is False
    assert measured("claim", "0", np.array([1.0, 1.1, 0.9]), above=0.95).holds is None
    assert measured("claim", "0", np.array([2.0, 2.0]), above=1.0).holds is True, "no spread"


def test_cutting_keeps_the_most_used_experts(scripts):
    shares = np.array([[0.5, 0.2, 0.3, 0.0], [0.1, 0.2, 0.3, 0.4]])
    cut = scripts["modular"]._most_used(shares, task=0, kept=2)
    assert (cut[0] > 0).tolist() == [True, False, True, False] and cut[1].tolist() == shares[1].tolist()
    cut = scripts["modular"]._most_used(shares, task=0, kept=4)
    assert (cut[0] > 0).all(), "an unused expert that is kept counts as used"
    used = scripts["modular"].experts_used([{"a": shares, "b": np.full((2, 4), 0.25)}])
    np.testing.assert_allclose(used, [(3 + 4 + 4 + 4) / 4])


# The scripts.


@pytest.mark.parametrize(
    "name", ["m3vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("taskexpert", "modular"))]
)
def test_smoke(scripts, run_smoke, name):
    """Report, figures, and a finite main metric of every task for every arm."""
    run = run_smoke(scripts[name])
    content = json.loads((run / "report.json").read_text())
    assert list(content) == [*KEYS, "holds", "details"] and content["system"] == f"vision_{name}"
    config = scripts[name].PRESETS["smoke"]
    for arm in config.arms:
        rows = [row for row in content["rows"] if row["model"] == arm and row["task"] in config.tasks]
        assert {row["task"] for row in rows} == set(config.tasks)
        assert all(np.isfinite(row["mean"]) and row["n"] == 2 and row["steps"] > 0 for row in rows), arm
    figures = {path.name: path.stat().st_size for path in (run / "figures").iterdir()}
    assert set(figures) == FIGURES[name] and min(figures.values()) > 5000
    if name == "modular":
        assert content["details"]["old_outputs_moved"] == [0.0, 0.0]


def test_command_line_errors_are_sentences(scripts, call_script, tmp_path):
    experts_first = f"arms={scripts['m3vit'].SMOKE.arms[::-1]}"  # what is wrong with them is said before a training
    for name, settings, message in (
        ("m3vit", ["arms=('dense',)"], "arms must be among"),
        ("m3vit", ["top_k=3", experts_first], "top_k * expert_ratio must equal"),
        ("taskexpert", ["tasks=('poses',)"], "tasks must be among"),
        ("modular", ["ways=('new',)"], "ways must be among"),
    ):
        status, _, error = call_script(
            scripts[name], "--preset", "smoke", "--run", tmp_path / name / settings[0][:4], "--set", *settings
        )
        assert status == 2 and message in error, error


def test_paper_presets_have_the_published_sizes(scripts):
    """Abstractly: the outputs of models of the published sizes, and the sizes themselves."""
    m3vit, taskexpert, modular = (scripts[name].PRESETS["paper"] for name in FIGURES)
    assert (m3vit.vit.width, m3vit.vit.depth, m3vit.experts, m3vit.top_k, m3vit.decoder_width) == (384, 12, 16, 4, 256)
    assert (taskexpert.decoder.vit.width, taskexpert.decoder.layers) == (768, (2, 5, 8, 11))
    assert (modular.model.vit.width, modular.model.num_experts, modular.model.attention_top_k) == (384, 16, 6)
    heads = {"segmentation": 40, "depth": 1}
    shallow = dataclasses.replace(m3vit, vit=dataclasses.replace(m3vit.vit, depth=2))  # blocks repeat
    for script, config in (("m3vit", shallow), ("taskexpert", taskexpert)):
        last = scripts[script].ARMS[-2] if script == "m3vit" else scripts[script].FULL
        model = scripts[script].make_model(config, last, heads)
        batch = {"image": jax.ShapeDtypeStruct((1, *config.data.shape, 3), jnp.float32)}
        outputs = jax.eval_shape(
            lambda key, b, model=model: model.init_with_output(key, b)[0], jax.random.key(0), batch
        )
        assert {name: output.shape for name, output in outputs.items()} == {
            name: (1, *config.data.shape, channels) for name, channels in heads.items()
        }


def test_committed_results_are_of_the_study_preset():
    results = pathlib.Path(__file__).parents[2] / "experiments" / "results"
    found = sorted(results.glob("vision_*.json"))
    assert len(found) == len(FIGURES)
    for path in found:
        content = json.loads(path.read_text())
        assert content["preset"] == "study" and len(content["seeds"]) >= 4 and content["dirty"] is False, path.name
