"""Training on one data set per task: losses, the drawn task, regularizers, what is carried, a short fit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax import dense_tasks
from mtjax.models.mod_squad import ModSquad, ModSquadConfig, PooledLinear
from mtjax.nn.balance import RouterStats
from mtjax.nn.decoders import HeatmapHead, LinearUnpatch
from mtjax.nn.moe import Dispatch
from mtjax.nn.vit import ViTConfig
from mtjax.train.heterogeneous import (
    balanced,
    expert_usage,
    heterogeneous_problem,
    image_regularizer,
    mutual_information,
    uncertainty_weighted,
    usage_of,
)
from mtjax.train.images import normalise_image
from mtjax.train.loop import TrainConfig, fit_problem

TASKS = (
    dense_tasks.segmentation(num_classes=3),
    dense_tasks.classification("class", 4),
    dense_tasks.detection(num_classes=2, stride=4, max_detections=4),
)
NAMES = [task.name for task in TASKS]
MODEL = ModSquad(
    ModSquadConfig(
        ViTConfig(patch=4, width=16, depth=1, num_heads=2),
        layout="both",
        num_experts=4,
        top_k=2,
        attention_experts=3,
        dispatch=Dispatch("all_experts"),
    ),
    {task.name: task.channels for task in TASKS},
    {"segmentation": LinearUnpatch, "class": PooledLinear, "detection": HeatmapHead},
)
LAYERS = ["block_0/attention", "block_0/mlp"]


def split(seed, rows):
    rng = np.random.default_rng(seed)
    labels = {
        "segmentation": rng.integers(0, 3, (rows, 8, 8)).astype(np.uint8),
        "class": rng.integers(0, 4, rows).astype(np.int32),
        "detection": {
            "boxes": np.tile(np.float32([[1, 1, 6, 5], [0, 0, 0, 0]]), (rows, 1, 1)),
            "classes": np.tile(np.int32([1, -1]), (rows, 1)),
        },
    }
    return {n: {"image": rng.integers(0, 255, (rows, 8, 8, 3)).astype(np.uint8), "label": labels[n]} for n in NAMES}


DATA = {"train": split(0, 4) | {"class": split(1, 3)["class"]}, "validation": split(2, 3)}


@functools.cache
def init():
    problem = heterogeneous_problem(MODEL, TASKS, DATA)
    shapes = jax.eval_shape(problem.init_params, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def first_batch(problem):
    rows = jax.tree.map(lambda column: jnp.asarray(column[:2]), dict(problem.train))
    return rows | {"carry": problem.init_carry()}


@functools.cache
def step_of_all_tasks():
    problem = heterogeneous_problem(MODEL, TASKS, DATA)
    run = jax.jit(mtjax.value_and_jacobian(problem.loss_fn, has_aux=True))
    return run(init(), first_batch(problem), jax.random.key(0))


def test_every_task_has_its_own_images_and_an_uncertainty():
    problem = heterogeneous_problem(MODEL, TASKS, DATA)
    assert jax.tree.map(len, problem.train)["class"] == {"image": 4, "label": 4}
    np.testing.assert_array_equal(problem.train["class"]["label"][3], DATA["train"]["class"]["label"][0])
    (losses, carry), rows = step_of_all_tasks()

    @jax.jit
    def plain_losses(params, batch):
        images = {name: {"image": normalise_image(batch[name]["image"])} for name in NAMES}
        outputs = MODEL.apply({"params": params}, images)
        return jnp.stack([task.loss(outputs[task.name], batch[task.name]["label"]) for task in TASKS])

    r, plain = np.asarray(init()["log_scales"]), np.asarray(plain_losses(init(), first_batch(problem)))
    np.testing.assert_allclose(losses, 0.5 * plain / np.exp(r) ** 2 + np.log(1 + np.exp(r) ** 2), rtol=1e-5)
    slope = -plain * np.exp(-2 * r) + 2 / (1 + np.exp(-2 * r))
    np.testing.assert_allclose(rows["log_scales"], np.diag(slope), rtol=1e-4, atol=1e-6)
    assert carry["step"] == 1
    for name, share in usage_of(carry).items():
        assert name in LAYERS
        np.testing.assert_allclose(share.sum(1), 1.0, rtol=1e-6)


def test_a_step_of_one_task_is_that_task_alone():
    """Losses and gradients are those of the step of all tasks, in the drawn task's row; nothing else is touched."""
    problem = heterogeneous_problem(MODEL, TASKS, DATA, mode="task_per_step", regularizer=mutual_information(0.1))
    batch, ((together, _), rows) = first_batch(problem), step_of_all_tasks()

    @jax.jit
    def run(params, batch):
        def total(params):
            losses, carry = problem.loss_fn(params, batch, jax.random.key(1))
            return sum(losses.values()), (losses, carry)

        return jax.grad(total, has_aux=True)(params)

    carry = batch["carry"]
    for task in (0, 1, 2):  # in turn; the first step's joint has one task, so no information yet
        own, (losses, carry) = run(init(), {**batch, "carry": carry})
        assert carry["step"] == task + 1
        assert [float(losses[name]) == 0 for name in NAMES] == [k != task for k in range(3)]
        for kept in (carry["regularizer"]["block_0/mlp"], carry["usage"]["block_0/mlp"]):
            np.testing.assert_array_equal(kept.steps, np.arange(3) <= task)
        if task == 0:
            np.testing.assert_allclose(losses[NAMES[0]], together[0], atol=1e-4)  # epsilon of the information
        else:
            assert losses[NAMES[task]] < together[task] - 1e-5  # information lowers the loss
        for k, name in enumerate(NAMES):
            expected = jax.tree.map(lambda row: row[k] * (k == task), rows[f"head_{name}"])  # noqa: B023
            chex.assert_trees_all_close(own[f"head_{name}"], expected, atol=1e-5)
        moved = np.abs(own["trunk"]["block_0"]["mlp"]["router"]["kernel"]).max((1, 2))
        assert [size > 0 for size in moved] == [k == task for k in range(3)]


def test_shares_draw_a_task():
    shares = {"segmentation": 1e-9, "class": 1.0, "detection": 1e-9}
    problem = heterogeneous_problem(MODEL, TASKS, DATA, mode="task_per_step", shares=shares, uncertainty=False)
    batch = first_batch(problem)
    losses = jax.jit(jax.vmap(lambda key: problem.loss_fn(init(), batch, key)[0]))(
        jax.random.split(jax.random.key(0), 5)
    )
    assert {name: bool((np.asarray(value) > 0).all()) for name, value in losses.items()} == {
        name: name == "class" for name in NAMES
    }
    assert (np.asarray(losses["detection"]) == 0).all()


def stats_of(probability):
    probability = jnp.asarray(probability, jnp.float32)
    count, none = probability * 8, jnp.zeros(len(probability))
    return {"layer": RouterStats(count, probability, count, 3 * count, none, none, none, jnp.asarray(4.0))}


def test_regularizers_are_their_formulas():
    probability = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    stats, tasks = stats_of(probability), jnp.arange(2)
    regularizer = mutual_information(0.5)
    state = regularizer.init({"layer": 3}, 2)
    extra, _ = regularizer.penalty(stats, tasks, state)
    joint = probability / 2
    information = (joint * np.log(joint / (joint.sum(0) * joint.sum(1)[:, None]))).sum()
    np.testing.assert_allclose(extra.sum(), -0.5 * information, atol=1e-3)  # the code's epsilon: 1e-4 inside logarithms
    np.testing.assert_allclose(extra[0], extra[1])
    shared = image_regularizer(regularizer)(stats, TASKS[:2])
    np.testing.assert_allclose([shared[name] for name in NAMES[:2]], extra)

    # A task at a time, the running joint gets to the same.
    for task in (0, 1):
        own = jax.tree.map(lambda leaf: leaf[task : task + 1] if leaf.ndim else leaf, stats)  # noqa: B023
        extra, state = regularizer.penalty(own, jnp.array([task]), state)
    np.testing.assert_allclose(extra, -0.5 * information, atol=1e-3)

    extra, state = balanced(0.1).penalty(stats, tasks, ())
    variation = (probability.std(1) / probability.mean(1)) ** 2
    np.testing.assert_allclose(extra, 0.1 * 2 * variation, rtol=1e-5)  # importance and load
    assert state == ()


def test_uncertainty_is_mod_squads():
    losses, scale = {"a": jnp.array(3.0), "b": jnp.array(0.5)}, np.array([1.0, 2.0])
    weighted = uncertainty_weighted(losses, jnp.log(jnp.asarray(scale)))
    np.testing.assert_allclose(weighted["a"], 0.5 * 3.0 + np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(weighted["b"], 0.5 / 4 * 0.5 + np.log(5.0), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["task_per_step", "task_per_device"])
def test_two_seeds_train_and_are_evaluated_on_each_tasks_own_images(mode):
    tasks = TASKS[:2]
    problem = heterogeneous_problem(MODEL, tasks, DATA, mode=mode, regularizer=mutual_information())
    config = TrainConfig(batch_size=2, max_epochs=2, patience=9, steps_per_dispatch=2)
    fit = fit_problem(problem, config=config, seeds=(0, 1), learning_rates=1e-2, progress=False)
    assert int(fit.state.carry["step"][0]) == 4
    lane = jax.tree.map(lambda leaf: leaf[1], fit.state.carry)
    assert set(usage_of(lane)) == set(LAYERS)
    seen = {"task_per_step": 2, "task_per_device": 4}[mode]
    np.testing.assert_array_equal(lane["usage"]["block_0/mlp"].steps, [seen, seen])
    results = fit.evaluate(DATA["validation"])
    assert results["class"]["accuracy"].shape == (2,) and np.isfinite(results["segmentation"]["mean_iou"]).all()
    params = jax.tree.map(lambda leaf: leaf[1], fit.best_params)
    images = normalise_image(DATA["validation"]["class"]["image"])
    best = MODEL.apply({"params": params}, {"image": images}, task="class")["class"].argmax(-1)
    right = np.mean(np.asarray(best) == DATA["validation"]["class"]["label"])
    np.testing.assert_allclose(results["class"]["accuracy"][1], right, rtol=1e-6)


def test_usage_counts_the_choices_of_tasks_on_their_images():
    counted = expert_usage(MODEL, init(), {"class": DATA["validation"]["class"]}, batch_size=2)
    images = normalise_image(DATA["validation"]["class"]["image"])
    _, stats = jax.jit(lambda p: MODEL.apply({"params": p}, {"image": images}, task="class", with_aux=True))(init())
    for name in LAYERS:
        np.testing.assert_allclose(counted[name][1], stats[name].count[0] / stats[name].count.sum(), rtol=1e-6)
        assert np.isnan(counted[name][[0, 2]]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "all"}, "mode must be 'task_per_device' or 'task_per_step', got 'all'"),
        ({"tasks": (dense_tasks.depth(),)}, "task must name some of segmentation, class, detection"),
        ({"tasks": (dense_tasks.classification("class", 5),)}, "has 5 channels, but the model's head has 4"),
        ({"data": DATA | {"train": {}}}, "train needs {'image', 'label'} of task 'segmentation'"),
        ({"shares": {"class": 1.0}}, "shares go with mode='task_per_step'"),
    ],
)
def test_what_does_not_fit_is_explained(change, message):
    arguments = {"tasks": TASKS, "data": DATA} | change
    with pytest.raises(ValueError, match=message):
        heterogeneous_problem(MODEL, arguments.pop("tasks"), arguments.pop("data"), **arguments)
