"""Evaluation equals scikit-learn on the whole split, however it is cut; prediction averages lanes in original units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

import mtjax
from mtjax.train import make_evaluate, predict
from mtjax.train.evaluate import main_scores, padded_batches, selection_scores, undefined_scores

NAMES = ("sold", "price", "style", "visits")


@pytest.fixture(scope="module")
def problem(toy):
    """tasks, split with missing labels and weights, model, parameters of 2 lanes, outputs {task: f[2, N, ...]}."""
    split = toy.make_split(101, 3)
    labels = {name: label.copy() for name, label in split["labels"].items()}
    labels["sold"][::7] = np.nan
    split = {**split, "labels": labels, "mask": {"visits": np.arange(101) % 5 > 0}}
    split["weight"] = np.random.default_rng(0).uniform(0.5, 2.0, 101).astype(np.float32)
    tasks = toy.make_tasks(toy.make_split(200, 0), NAMES)
    model = toy.Tiny(mtjax.head_sizes(tasks))
    params = jax.vmap(lambda key: model.init(key, split)["params"])(jax.random.split(jax.random.key(0), 2))
    outputs = jax.vmap(lambda p: model.apply({"params": p}, split))(params)
    return tasks, split, model, params, jax.tree.map(np.asarray, outputs)


def by_sklearn(tasks, split, outputs, lane):
    """The main metrics of one lane by scikit-learn, on predictions written out by hand."""
    weight = split["weight"]
    results = {}
    for task in tasks:
        label = split["labels"][task.name]
        z = outputs[task.name][lane].astype(np.float64)
        seen = ~np.isnan(label) & split["mask"].get(task.name, np.ones(len(label), bool))
        y, z, w = label[seen], z[seen], weight[seen]
        if task.kind == "binary":
            p = 1 / (1 + np.exp(-z))
            results[task.name] = {
                "auroc": sk.roc_auc_score(y, p, sample_weight=w),
                "log_loss": sk.log_loss(y, p, sample_weight=w),
            }
        elif task.kind == "multiclass":
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            macro = np.mean([sk.roc_auc_score(y == c, p[:, c], sample_weight=w) for c in range(3)])
            results[task.name] = {
                "auroc_ovr": macro,
                "accuracy": sk.accuracy_score(y, p.argmax(1), sample_weight=w),
            }
        elif task.kind == "regression":
            value = z * task.scale + task.offset
            results[task.name] = {
                "explained_variance": sk.explained_variance_score(y, value, sample_weight=w),
                "rmse": np.sqrt(sk.mean_squared_error(y, value, sample_weight=w)),
            }
        else:
            results[task.name] = {"poisson_deviance": sk.mean_poisson_deviance(y, np.exp(z), sample_weight=w)}
    return results


@pytest.mark.parametrize("batch_size", [10, 64, 4096])
def test_equals_scikit_learn_whatever_the_batch_size(problem, batch_size):
    tasks, split, model, params, outputs = problem
    results = make_evaluate(model, tasks, batch_size=batch_size)(params, split)
    assert list(results) == list(NAMES)
    for lane in range(2):
        for task, metrics in by_sklearn(tasks, split, outputs, lane).items():
            for name, expected in metrics.items():
                np.testing.assert_allclose(results[task][name][lane], expected, rtol=2e-5, err_msg=f"{task} {name}")
    for task in tasks:
        assert {metric.name for metric in task.metrics} == set(results[task.name])
        assert all(np.isfinite(values).all() and values.shape == (2,) for values in results[task.name].values())


def test_per_task_uses_the_kth_parameters_for_task_k(problem):
    """Leaves [L, K, ...]: task k is evaluated and predicted with set k."""
    tasks, split, model, params, _ = problem
    shuffled = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, leaf[::-1], leaf * 2], axis=1), params)
    results = make_evaluate(model, tasks, batch_size=64, per_task=True)(shuffled, split)
    plain = make_evaluate(model, tasks, batch_size=64)
    predicted = predict(model, shuffled, tasks, split, per_task=True)
    for k, task in enumerate(tasks):
        own = jax.tree.map(lambda leaf, k=k: leaf[:, k], shuffled)
        expected = plain(own, split)[task.name]
        for name in expected:
            np.testing.assert_allclose(results[task.name][name], expected[name], rtol=1e-5)
        np.testing.assert_allclose(predicted[task.name], predict(model, own, tasks, split)[task.name], rtol=1e-5)


@pytest.mark.parametrize("batch_size", [17, 4096])
def test_predictions_are_means_over_lanes_in_original_units(problem, batch_size):
    tasks, split, model, params, outputs = problem
    rows = {key: split[key] for key in ("categorical", "numeric")}
    predicted = predict(model, params, tasks, rows, batch_size=batch_size)
    price = next(task for task in tasks if task.name == "price")
    by_hand = {
        "sold": 1 / (1 + np.exp(-outputs["sold"])),
        "price": outputs["price"] * price.scale + price.offset,
        "style": np.exp(outputs["style"]) / np.exp(outputs["style"]).sum(-1, keepdims=True),
        "visits": np.exp(outputs["visits"]),
    }
    assert list(predicted) == list(NAMES)
    for name, values in by_hand.items():
        assert predicted[name].shape == values.shape[1:]
        np.testing.assert_allclose(predicted[name], values.mean(axis=0), rtol=1e-5)


def test_padded_batches():
    split = {"numeric": np.arange(5.0)[:, None], "labels": {"a": np.arange(5.0)}, "weight": np.full(5, 2.0)}
    batches = list(padded_batches(split, 2))
    assert [real for _, real in batches] == [2, 2, 1]
    assert [batch["weight"].tolist() for batch, _ in batches] == [[2, 2], [2, 2], [2, 0]]
    assert batches[2][0]["numeric"].ravel().tolist() == [4, 4] and batches[2][0]["labels"]["a"].tolist() == [4, 4]
    ((batch, real),) = padded_batches({"numeric": np.zeros((3, 1))}, 100)
    assert real == 3 and batch["numeric"].shape == (3, 1), "a small split is not padded to a large batch"
    with pytest.raises(ValueError, match="There are no rows to evaluate or predict"):
        list(padded_batches({"numeric": np.zeros((0, 1))}, 100))


def test_main_scores_are_signed(problem):
    tasks = problem[0]
    results = {
        "sold": {"auroc": [0.5, 0.6]},
        "price": {"explained_variance": [0.1, np.nan]},
        "style": {"auroc_ovr": [np.nan, np.nan]},
        "visits": {"poisson_deviance": [2.0, 3.0]},
    }
    expected = [[0.5, 0.1, np.nan, -2.0], [0.6, np.nan, np.nan, -3.0]]
    np.testing.assert_array_equal(main_scores(tasks, results), expected)
    assert undefined_scores(tasks, results).tolist() == [False, False, True, False]


def test_selection_scores():
    scores = np.array([[0.5, 0.1, np.nan], [0.7, np.nan, np.nan]])
    undefined = np.array([False, False, True])
    joint = selection_scores(scores, undefined, per_task=False, step=9)
    np.testing.assert_allclose(joint, [[0.3], [np.nan]])  # a lane that lost a task's score never wins
    apart = selection_scores(scores, undefined, per_task=True, step=9)
    np.testing.assert_allclose(apart, [[0.5, 0.1, 9.0], [0.7, np.nan, 9.0]])
    nothing = selection_scores(np.full((2, 3), np.nan), np.ones(3, bool), per_task=False, step=9)
    assert nothing.tolist() == [[9.0], [9.0]]
