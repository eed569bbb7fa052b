"""What losses carry from step to step: part of the state, apart in each lane, there after a resume."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

import mtjax
from mtjax.data.batches import LaneBatches
from mtjax.train import Problem, TrainConfig, fit_problem

X = np.random.default_rng(0).normal(size=(12, 1)).astype(np.float32)
SEEDS = (0, 1)


def running_mean() -> Problem:
    """Its losses keep a running mean of the batch."""

    def loss_fn(params, batch, rng):
        mean = 0.9 * batch["carry"] + 0.1 * batch["x"].mean()
        return {"a": ((params["w"][None] - batch["x"]) ** 2).mean(), "b": (params["w"] ** 2).sum()}, mean

    tasks = (mtjax.Task("a", "regression"), mtjax.Task("b", "regression"))

    def evaluate(params, split):
        return {task.name: {m.name: np.asarray(params["w"])[:, 0] for m in task.metrics} for task in tasks}

    return Problem(
        tasks,
        {"x": X},
        {"x": X},
        loss_fn,
        lambda key: {"w": jax.random.normal(key, (1,))},
        lambda per_task: evaluate,
        init_carry=lambda: jnp.zeros(()),
    )


def test_the_carry_of_every_lane_is_that_of_its_own_batches_also_after_a_resume(tmp_path: pathlib.Path):
    config = TrainConfig(batch_size=4, max_epochs=3, patience=9, steps_per_dispatch=2, conflict_rows=4)
    how = {"config": config, "seeds": SEEDS, "directory": tmp_path, "progress": False}
    whole = fit_problem(running_mean(), **how)
    for lane, seed in enumerate(SEEDS):
        expected = 0.0
        for rows in LaneBatches(12, 4, (seed,)).take(0, 9)[0]:
            expected = 0.9 * expected + 0.1 * X[rows].mean()
        np.testing.assert_allclose(whole.state.carry[lane], expected, rtol=1e-5)
    assert np.abs(whole.history[0]["cosine"]).max() <= 1 + 1e-6

    shutil.rmtree(tmp_path / "checkpoints" / "9")
    resumed = fit_problem(running_mean(), **how, resume=True)
    np.testing.assert_array_equal(resumed.state.carry, whole.state.carry)
