"""The loop: lanes as if alone, early stopping, dispatches, non-finite losses, context, weights, records."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.data.batches import ShuffledRows
from mtjax.train import NonFiniteLossError, TrainConfig, fit, predict, supervised_loss
from mtjax.train.checkpoint import Checkpoints
from mtjax.train.problem import inference_context
from mtjax.train.select import choose_learning_rate

CONFIG = TrainConfig(batch_size=16, max_epochs=6, evals_per_epoch=2, patience=2, steps_per_dispatch=4)


@dataclasses.dataclass
class Problem:
    train: dict
    validation: dict
    tasks: tuple
    model: object

    def fit(self, **options):
        arguments = dict(config=CONFIG, seeds=(0,), learning_rates=1e-2, progress=False) | options
        model = arguments.pop("model", self.model)
        tasks = arguments.pop("tasks", self.tasks)
        train = arguments.pop("train", self.train)
        return fit(model, tasks, train, arguments.pop("validation", self.validation), **arguments)


@pytest.fixture(scope="module")
def problem(toy) -> Problem:
    train, validation = toy.make_split(100, 0), toy.make_split(60, 1)
    tasks = toy.make_tasks(train)
    return Problem(train, validation, tasks, toy.Tiny(mtjax.head_sizes(tasks)))


@pytest.fixture(scope="module")
def lanes(problem: Problem):
    """Three lanes that stop at different times."""
    return problem.fit(seeds=(0, 1, 1), learning_rates=(3e-3, 3e-1, 1e-2))


def select_lane(tree, lane: int):
    return jax.tree.map(lambda leaf: leaf[lane : lane + 1], tree)


@pytest.mark.parametrize("lane", [0, 1, 2])
def test_a_lane_ends_as_if_it_were_alone(problem: Problem, lanes, toy, lane: int):
    """Best step and early stopping exactly, numbers to rounding (other shapes are other programs)."""
    alone = problem.fit(seeds=lanes.seeds[lane : lane + 1], learning_rates=lanes.learning_rates[lane : lane + 1])
    ours, theirs = select_lane(lanes.state.best, lane), alone.state.best
    assert ours.step.tolist() == theirs.step.tolist()
    np.testing.assert_allclose(ours.score, theirs.score, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours.params, theirs.params)
    assert len(alone.history) <= len(lanes.history)
    for together, single in zip(lanes.history, alone.history, strict=False):
        assert together["step"] == single["step"]
        np.testing.assert_allclose(together["losses"][lane], single["losses"][0], rtol=1e-3, atol=1e-5)


def test_early_stopping_by_the_history(problem: Problem, lanes):
    """Follows the history by hand: a lane closes after two evaluations without a new best; all closed ends the fit."""
    per_epoch = ShuffledRows(100, 16).steps_per_epoch
    assert per_epoch == 6 and [entry["step"] for entry in lanes.history] == [
        3 * n for n in range(1, len(lanes.history) + 1)
    ]
    closed_at = []
    for lane in range(3):
        best, best_step, stale, closed = -np.inf, 0, 0, None
        for entry in lanes.history:
            metrics = entry["metrics"]
            score = (metrics["sold"]["auroc"][lane] + metrics["price"]["explained_variance"][lane]) / 2
            if stale < 2:
                best, best_step, stale = (score, entry["step"], 0) if score > best else (best, best_step, stale + 1)
                closed = entry["step"] if stale == 2 else None
        assert int(lanes.state.best.step[lane, 0]) == best_step
        assert float(lanes.state.best.score[lane, 0]) == pytest.approx(best, rel=1e-6)
        closed_at.append(closed)
    last = lanes.history[-1]["step"]
    assert min(step or 99 for step in closed_at) < last, "some lane stopped early"
    assert last == (max(closed_at) if None not in closed_at else 36)


def test_the_best_parameters_are_those_that_are_evaluated(problem: Problem, lanes):
    results = lanes.evaluate(problem.validation)
    scores = (results["sold"]["auroc"] + results["price"]["explained_variance"]) / 2
    np.testing.assert_allclose(scores, lanes.state.best.score[:, 0], rtol=1e-5)
    assert lanes.best_params["shared"]["kernel"].shape[0] == 3 and not lanes.interrupted
    params = problem.model.init(jax.random.key(0), problem.train)["params"]
    assert lanes.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert np.isfinite([lanes.rows_per_s, lanes.compile_s]).all() and lanes.compile_s > 0


def test_steps_per_dispatch_change_nothing(problem: Problem, toy):
    fits = [problem.fit(config=dataclasses.replace(CONFIG, steps_per_dispatch=n)) for n in (1, 16)]
    for other in fits[1:]:
        assert [e["step"] for e in other.history] == [e["step"] for e in fits[0].history]
        ours, theirs = toy.arrays(fits[0].state), toy.arrays(other.state)
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_per_task_selection_is_separate_training(problem: Problem, toy):
    """Networks that share a program but nothing else: the other tasks' labels make no difference to a task."""
    tasks = toy.make_tasks(problem.train, ("sold", "price"))
    model = toy.Separate(mtjax.head_sizes(tasks))
    options = dict(model=model, tasks=tasks, per_task=True, seeds=(0, 1), learning_rates=(1e-1, 1e-2))
    together = problem.fit(**options)
    assert together.best_params["hidden"].shape[:3] == (2, 2, 2), "[lane, task's choice, stacked task, ...]"
    for k, task in enumerate(tasks):
        others = {t.name: np.full(100, np.nan, np.float32) for t in tasks if t is not task}
        unlabelled = {t.name: np.full(60, np.nan, np.float32) for t in tasks if t is not task}
        with pytest.warns(UserWarning, match=r"the main metric has no value on the validation rows .* are its latest"):
            apart = problem.fit(
                **options,
                train={**problem.train, "labels": problem.train["labels"] | others},
                validation={**problem.validation, "labels": problem.validation["labels"] | unlabelled},
            )
        np.testing.assert_array_equal(together.state.best.step[:, k], apart.state.best.step[:, k])
        for leaf in ("hidden", "head"):
            ours, theirs = together.best_params[leaf][:, k, k], apart.best_params[leaf][:, k, k]
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    results = together.evaluate(problem.validation)
    np.testing.assert_allclose(results["sold"]["auroc"], together.state.best.score[:, 0], rtol=1e-5)
    np.testing.assert_allclose(results["price"]["explained_variance"], together.state.best.score[:, 1], rtol=1e-5)
    choice = choose_learning_rate(tasks, together, results)
    assert choice.lanes.shape == (2, 1) and choice.params(together)["head"].shape[:2] == (1, 2)
    picked = predict(model, choice.params(together), tasks, problem.validation, per_task=True)
    assert picked["sold"].shape == (60,)


def broken_after(limit: float, value: float):
    """Squared error, but `value` for labels beyond a limit."""

    def loss(output, label):
        return jnp.where(label > limit, value, (output - label) ** 2)

    return loss


@pytest.mark.parametrize(("value", "text"), [(np.nan, "nan"), (np.inf, "inf")])
def test_a_loss_that_stops_being_finite_ends_the_run(problem: Problem, tmp_path: pathlib.Path, value, text):
    """The row with the bad label comes at a known step of the second lane: all of it is in the message."""
    tasks = (problem.tasks[0], mtjax.Task("price", "regression", scaling="none", loss=broken_after(1e6, value)))
    orders = ShuffledRows(100, 16).epoch_indices([5, 6], epoch=0)  # [2, 6, 16]
    # A row that both lanes see, the second one first.
    steps = {row: [int(np.argwhere(order == row)[0, 0]) for order in orders] for row in np.intersect1d(*orders)}
    row = next(row for row, (first, second) in steps.items() if 2 <= second < first)
    price = problem.train["labels"]["price"].copy()
    price[row] = 1e9
    config = dataclasses.replace(CONFIG, steps_per_dispatch=2, checkpoint_every=2, evals_per_epoch=1)
    with pytest.raises(NonFiniteLossError) as caught:
        problem.fit(
            tasks=tasks,
            train={**problem.train, "labels": problem.train["labels"] | {"price": price}},
            seeds=(5, 6),
            learning_rates=(1e-3, 2e-3),
            config=config,
            directory=tmp_path,
        )
    step = steps[row][1]
    good = step // 2 * 2
    assert str(caught.value) == (
        f"The loss of task 'price' became {text} at step {step} (seed 6, learning rate 0.002); "
        f"last good checkpoint: step {good}"
    )
    assert (caught.value.task, caught.value.step, caught.value.checkpoint) == ("price", step, good)
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == good, "nothing bad was saved"


def test_a_gradient_that_stops_being_finite_ends_the_run_before_it_is_saved(problem: Problem, tmp_path: pathlib.Path):
    """The loss is finite and its gradient is not: the parameters are seen before a checkpoint takes them."""
    root = mtjax.Task("price", "regression", scaling="none", loss=lambda output, label: jnp.sqrt(output * 0.0))
    config = dataclasses.replace(CONFIG, steps_per_dispatch=1, checkpoint_every=1)
    with pytest.raises(
        NonFiniteLossError, match=r"The parameters became NaN or infinite at step 1 \(seed 0, "
    ) as caught:
        problem.fit(tasks=(problem.tasks[0], root), config=config, directory=tmp_path)
    assert caught.value.task is None and caught.value.checkpoint is None
    assert "no checkpoint was saved before it" in str(caught.value)
    assert Checkpoints(tmp_path / "checkpoints").latest_step() is None


def test_a_lane_that_has_stopped_may_diverge(problem: Problem):
    """Plain SGD at an absurd rate: worse at each evaluation, closed at the second, infinite later; lane 0 goes on."""
    config = dataclasses.replace(CONFIG, max_epochs=20, patience=1, evals_per_epoch=1)
    both = problem.fit(
        tasks=(problem.tasks[1],),
        model=problem.model.clone(heads={"price": 1}),
        optimizer=optax.sgd,
        config=config,
        seeds=(0, 1),
        learning_rates=(1e-3, 1.0),
    )
    losses = np.array([entry["losses"] for entry in both.history])[:, :, 0]
    assert not np.isfinite(losses[-1, 1]) and np.isfinite(losses[:, 0]).all() and np.isfinite(losses[:2]).all()
    assert np.isfinite(both.evaluate(problem.validation)["price"]["rmse"]).all(), "its best parameters are good"


def test_a_task_without_validation_labels_is_left_out(problem: Problem):
    """The other task chooses, with a warning; and with no labels at all the best parameters are the last ones."""
    nothing = np.full(60, np.nan, np.float32)
    some = {**problem.validation, "labels": problem.validation["labels"] | {"sold": nothing}}
    with pytest.warns(UserWarning, match="Task 'sold': .* so the other tasks alone choose") as caught:
        fitted = problem.fit(validation=some)
    assert len(caught) == 1, "said once, not at every evaluation"
    scores = [entry["metrics"]["price"]["explained_variance"][0] for entry in fitted.history]
    assert int(fitted.state.best.step[0, 0]) == fitted.history[int(np.argmax(scores))]["step"]

    none = {**problem.validation, "labels": {"sold": nothing, "price": nothing}}
    config = dataclasses.replace(CONFIG, max_epochs=3)
    with pytest.warns(UserWarning, match="Task 'sold', 'price': .* are its latest"):
        fitted = problem.fit(validation=none, config=config)
    assert int(fitted.state.best.step[0, 0]) == 18 == int(fitted.state.step[0])


def test_sample_weights_reach_training_and_evaluation(problem: Problem):
    """Rows of weight 0 with absurd labels change neither the fit nor the metrics."""
    weight = np.arange(100) % 4 > 0
    price = np.where(weight, problem.train["labels"]["price"], 1e6).astype(np.float32)
    spoilt = {**problem.train, "labels": problem.train["labels"] | {"price": price}}
    weights = {"weight": weight.astype(np.float32)}
    config = dataclasses.replace(CONFIG, max_epochs=2)
    ours = problem.fit(train=spoilt | weights, validation=problem.validation, config=config)
    theirs = problem.fit(train=problem.train | weights, config=config)
    assert ours.history == theirs.history
    half = np.arange(60) < 30
    lighter = ours.evaluate({**problem.validation, "weight": half.astype(np.float32)})
    first = ours.evaluate(jax.tree.map(lambda column: column[:30], problem.validation))
    for task in first:
        for name in first[task]:
            np.testing.assert_allclose(lighter[task][name], first[task][name], rtol=1e-5)


def test_a_model_that_reads_other_rows_has_its_context_everywhere(problem: Problem, toy):
    """fit, evaluate and predict give it the same training rows, so no prediction depends on its batch."""
    heads = mtjax.head_sizes(problem.tasks)
    model = toy.Contextual(heads)
    config = TrainConfig(batch_size=50, max_epochs=1, context_rows=10, eval_batch_size=16)
    fitted = problem.fit(model=model, config=config)
    context = inference_context(model, problem.train, 10)
    assert context["numeric"].shape == (10, 3)
    np.testing.assert_array_equal(context["numeric"][-1], problem.train["numeric"][-1])
    assert inference_context(problem.model, problem.train, 10) is None
    at_once = predict(model, fitted.best_params, problem.tasks, problem.validation, context=context, batch_size=60)
    error = at_once["price"] - problem.validation["labels"]["price"]
    rmse = fitted.history[-1]["metrics"]["price"]["rmse"][0]  # evaluated in batches of 16
    assert rmse == pytest.approx(np.sqrt(np.nanmean(error.astype(np.float64) ** 2)), rel=1e-4)


def test_records_on_disk(problem: Problem, tmp_path: pathlib.Path):
    """metrics.jsonl is the history; TensorBoard on request; conflict of the first lane; checkpoints name their run."""
    pytest.importorskip("tensorboardX")
    config = dataclasses.replace(CONFIG, max_epochs=1, conflict_rows=32)
    fitted = problem.fit(
        config=config, directory=tmp_path, tensorboard=True, record={"model": "tiny"}, learning_rates=(1e-2,)
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == fitted.history and len(lines) == 2
    assert set(lines[0]) == {"step", "epoch", "metrics", "cosine", "losses"} and lines[1]["epoch"] == 1.0
    cosine = np.array(lines[0]["cosine"])
    np.testing.assert_allclose(cosine, cosine.T, atol=1e-6)
    np.testing.assert_allclose(np.diagonal(cosine), 1.0, rtol=1e-5)
    assert list(lines[0]["metrics"]) == ["sold", "price"], "tasks in their order"
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"metrics/sold/auroc/0" in events.read_bytes()
    record = Checkpoints(tmp_path / "checkpoints").restore(fitted.state).record
    assert record["run"]["model"] == "tiny" and record["run"]["train"]["batch_size"] == 16
    assert record["run"]["rows"] == [100, 60] and record["data"] == {"epoch": 1, "offset": 0}


def test_losses_of_the_history_are_means_since_the_last_evaluation(problem: Problem):
    """With a rate of 0 nothing moves, so the mean loss over an epoch is that of its rows, batch by batch."""
    config = dataclasses.replace(CONFIG, max_epochs=1, evals_per_epoch=1, weight_decay=0.0)
    fitted = problem.fit(config=config, learning_rates=0.0)
    loss_fn = supervised_loss(problem.model, problem.tasks)
    indices = ShuffledRows(100, 16).epoch_indices([0], 0)[0]
    batches = [jax.tree.map(lambda column, rows=rows: column[rows], problem.train) for rows in indices]
    params = jax.tree.map(lambda leaf: leaf[0], fitted.state.params)
    losses = [[loss for loss in loss_fn(params, batch, jax.random.key(0)).values()] for batch in batches]
    np.testing.assert_allclose(fitted.history[0]["losses"], [np.mean(losses, axis=0)], rtol=1e-5)


def test_a_batch_larger_than_the_data(problem: Problem):
    fitted = problem.fit(config=dataclasses.replace(CONFIG, batch_size=4096, max_epochs=2, evals_per_epoch=3))
    assert [entry["step"] for entry in fitted.history] == [1, 2], "one step per epoch, one evaluation per step"


def test_errors(problem: Problem):
    with pytest.raises(ValueError, match="learning_rates has 2 entries for 3 seeds; give one, or one for each"):
        problem.fit(seeds=(0, 1, 2), learning_rates=(0.1, 0.2))
    with pytest.raises(ValueError, match="resume=True needs the run's directory"):
        problem.fit(resume=True)
    with pytest.raises(ValueError, match="There are no training rows"):
        problem.fit(train=jax.tree.map(lambda column: column[:0], problem.train))
