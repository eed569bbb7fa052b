"""Fields as training data: losses per task, masks, random points, lanes with rows of their own, fine-tuning."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax import losses, metrics, optim
from mtjax.train import NonFiniteLossError, TrainConfig, fit_problem
from mtjax.train.fields import Domain, field_loss, field_problem, make_field_evaluate, predict_fields

TASKS = tuple(mtjax.Task(name, "regression", metrics=(metrics.relative_l2(),)) for name in ("flat", "steep"))
CONFIG = TrainConfig(batch_size=8, max_epochs=30, evals_per_epoch=0.1, patience=100, weight_decay=0.0)


class Tiny(nn.Module):
    """A rank-2 DeepONet."""

    @nn.compact
    def __call__(self, batch, *, task=None, train=False):
        branch, trunk = nn.Dense(2)(batch["inputs"]), nn.Dense(2)(batch["points"])
        return {"u": branch @ trunk.T}


@pytest.fixture(scope="module")
def data():
    """u(x) = a x for 'flat' and u(x) = 3 a x for 'steep', a in (1, 2); the branch reads (a, task)."""
    rng = np.random.default_rng(0)
    task = np.arange(24) % 2
    slope = rng.uniform(1, 2, 24)
    points = np.linspace(0, 1, 10)[:, None]
    values = (slope * np.where(task == 0, 1.0, 3.0))[:, None] * points.T
    split = {"inputs": np.stack([slope, task], 1), "values": values, "task": task.astype(np.int32)}
    split = {k: v.astype(np.float32) if v.dtype == float else v for k, v in split.items()}
    mask = np.ones((2, 10), bool)
    mask[1, 7:] = False
    return split, Domain(points.astype(np.float32), mask)


def problem_of(data, **options):
    split, domain = data
    return field_problem(Tiny(), TASKS, domain, split, split, **options)


def test_relative_l2_by_hand():
    # |(3 - 3, 0 - 4)| / |(3, 4)| = 4 / 5; the point without a value counts for nothing, not even if it is infinite.
    output, label = jnp.array([[3.0, 0.0, jnp.inf]]), jnp.array([[3.0, 4.0, jnp.nan]])
    value, gradient = jax.value_and_grad(lambda z: losses.relative_l2(z, label).sum())(output)
    assert float(value) == pytest.approx(0.8)
    np.testing.assert_allclose(gradient, [[0.0, -0.2, 0.0]], atol=1e-6)
    assert losses.field_mse(output, label).tolist() == [8.0]
    assert not np.isnan(jax.grad(lambda z: losses.relative_l2(z, z + 0.0).sum())(jnp.ones((1, 3)))).any()
    # After the minimum 3 has gone: |(0, -4)| / |(0, 1)|.
    above = metrics.relative_l2("minimum")
    assert float(above.compute(above.statistic(output, label))) == pytest.approx(4.0)


def test_losses_are_means_over_the_functions_of_a_task(data):
    split, domain = data
    problem = problem_of(data)
    params = problem.init_params(jax.random.key(0))
    ours = problem.loss_fn(params, split, jax.random.key(1))
    output = Tiny().apply({"params": params}, {**split, "points": domain.points})["u"]
    for k in range(2):
        of_task, inside = split["task"] == k, domain.mask[k]
        error = np.asarray(output)[of_task][:, inside] - split["values"][of_task][:, inside]
        norms = np.linalg.norm(split["values"][of_task][:, inside], axis=1)
        assert float(ours[k]) == pytest.approx((np.linalg.norm(error, axis=1) / norms).mean(), rel=1e-5)
    only_flat = jax.tree.map(lambda column: column[split["task"] == 0], split)
    value, jacobian = mtjax.value_and_jacobian(problem.loss_fn)(params, only_flat, jax.random.key(1))
    assert value[1] == 0 and all((leaf[1] == 0).all() for leaf in jax.tree.leaves(jacobian))


def test_random_points_are_an_unbiased_sample(data):
    split, domain = data
    params = problem_of(data).init_params(jax.random.key(0))
    whole = field_loss(Tiny(), 2, domain, loss="mse")(params, split, jax.random.key(0))
    sampled = jax.vmap(field_loss(Tiny(), 2, domain, loss="mse", points_per_step=5), in_axes=(None, None, 0))
    values = sampled(params, split, jax.random.split(jax.random.key(1), 2000))
    assert len(np.unique(values[:, 0])) > 10
    # With every point inside, the mean over draws is the mean over points.
    np.testing.assert_allclose(values[:, 0].mean(), whole[0], rtol=0.03)


def test_joint_training_separate_lanes_and_fine_tuning(data):
    split = data[0]
    problem = problem_of(data)
    joint = fit_problem(problem, config=CONFIG, learning_rates=0.05, progress=False, seeds=(0, 1))
    # Three rows of eight a step, an evaluation each ten epochs.
    assert [entry["step"] for entry in joint.history] == [30, 60, 90]
    results = joint.evaluate(split)
    assert results["flat"]["relative_l2"].shape == (2,) and results["steep"]["relative_l2"].max() < 0.2

    # A lane on the rows of one task knows that task only, and ends as it would alone.
    rows = np.stack([np.flatnonzero(split["task"] == k) for k in (0, 1)])
    apart = fit_problem(problem, config=CONFIG, learning_rates=0.05, progress=False, seeds=(0, 0), lane_rows=rows)
    own = apart.evaluate(split)
    assert own["flat"]["relative_l2"][0] < 0.2 < 0.5 < own["flat"]["relative_l2"][1]
    alone = fit_problem(problem, config=CONFIG, learning_rates=0.05, progress=False, seeds=(0,), lane_rows=rows[1:])
    ours = jax.tree.map(lambda leaf: leaf[1], apart.state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-3, atol=1e-4), ours, alone.state.params)

    # Started from given parameters with rate zero, they stay.
    tuned = fit_problem(
        problem, config=CONFIG, learning_rates=0.0, progress=False, seeds=(5, 6), start=joint.state.params
    )
    jax.tree.map(np.testing.assert_array_equal, tuned.state.params, joint.state.params)


def test_evaluation_in_batches_and_per_task(data):
    split, domain = data
    params = jax.vmap(problem_of(data).init_params)(jax.random.split(jax.random.key(0), 3))
    whole = make_field_evaluate(Tiny(), TASKS, domain)(params, split)
    pieces = make_field_evaluate(Tiny(), TASKS, domain, batch_size=7)(params, split)
    for task in ("flat", "steep"):
        np.testing.assert_allclose(whole[task]["relative_l2"], pieces[task]["relative_l2"], rtol=1e-5)
    pairs = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]], axis=1), params)
    apart = make_field_evaluate(Tiny(), TASKS, domain, per_task=True)(pairs, split)
    np.testing.assert_allclose(apart["steep"]["relative_l2"], whole["steep"]["relative_l2"][::-1], rtol=1e-5)
    fields = predict_fields(Tiny(), jax.tree.map(lambda leaf: leaf[0], params), domain, split, batch_size=7)
    assert fields.shape == (24, 10) and np.isnan(fields).sum() == 12 * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.zeros((24, 9))}, r"must have shape \[n, 10\]"),
        ({"task": np.full(24, 2)}, r"must lie in \[0, 2\)"),
        ({"inputs": np.zeros((23, 2))}, "one row per function"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(data, change, message):
    split, domain = data
    with pytest.raises(ValueError, match=message):
        field_problem(Tiny(), TASKS, domain, split | change, split)
    with pytest.raises(ValueError, match="lacks the columns task"):
        field_problem(Tiny(), TASKS, domain, {k: v for k, v in split.items() if k != "task"}, split)
    with pytest.raises(ValueError, match=r"domain.mask must have shape \[2, 10\]"):
        field_problem(Tiny(), TASKS, dataclasses.replace(domain, mask=domain.mask[:1]), split, split)
    with pytest.raises(ValueError, match="one per seed"):
        fit_problem(problem_of(data), seeds=(0, 1), lane_rows=np.zeros((1, 4), int), progress=False)


def test_losses_that_are_not_those_of_the_tasks(data, tmp_path):
    """Three losses on two tasks: the method, the history and messages go by the losses, the metrics by the tasks."""
    plain = problem_of(data)

    def loss_fn(params, rows, rng):
        flat, steep = plain.loss_fn(params, rows, rng)
        return {"steep": steep, "both": flat + steep, "nothing": 0.0 * flat}

    names = ("steep", "both", "nothing")
    problem = dataclasses.replace(plain, loss_fn=loss_fn, losses=names)
    assert plain.loss_names == ("flat", "steep") and problem.loss_names == names
    config = dataclasses.replace(CONFIG, max_epochs=10)
    options = {"config": config, "seeds": (0, 1), "learning_rates": 1e-2, "progress": False}
    fitted = fit_problem(problem, method=optim.linear([1.0, 1.0, 5.0]), directory=tmp_path, **options)
    assert fitted.state.method_state.weights.tolist() == [[1, 1, 5]] * 2
    (record,) = fitted.history
    assert np.shape(record["losses"]) == (2, 3) and set(record["metrics"]) == {"flat", "steep"}
    assert all(steep < both and nothing == 0 for steep, both, nothing in record["losses"])
    # The same sum of the tasks' losses, called by the tasks: the same run.
    by_task = fit_problem(plain, method=optim.linear([1.0, 2.0]), **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), fitted.state.params, by_task.state.params)
    with pytest.raises(ValueError, match=r"losses: saved .*, now .*'nil'"):
        renamed = dataclasses.replace(problem, losses=(*names[:2], "nil"))
        fit_problem(renamed, method=optim.linear([1.0, 1.0, 5.0]), directory=tmp_path, resume=True, **options)
    broken = dataclasses.replace(problem, loss_fn=lambda *args: loss_fn(*args) | {"nothing": jnp.inf})
    with pytest.raises(NonFiniteLossError, match="The loss of task 'nothing' became inf at step 0") as caught:
        fit_problem(broken, **options)
    assert caught.value.task == "nothing"
    for wrong in ((), ("a", "a")):
        with pytest.raises(ValueError, match="losses must be at least one and have different names"):
            dataclasses.replace(plain, losses=wrong)
