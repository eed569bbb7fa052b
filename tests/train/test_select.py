"""Choosing the learning rate: by hand, per task and for all tasks at once, with scores missing."""

import types

import numpy as np
import pytest

import mtjax
from mtjax.train.select import choose_learning_rate

TASKS = (mtjax.Task("a", "binary"), mtjax.Task("n", "count"))
NAN = float("nan")


def fitted(rates, per_task=False, params=None):
    return types.SimpleNamespace(learning_rates=rates, per_task=per_task, best_params=params)


def validation(a, n):
    return {"a": {"auroc": np.array(a), "f1": np.zeros(len(a))}, "n": {"poisson_deviance": np.array(n)}}


# Lanes: rates 0.1, 0.1, 0.3, 0.3 with seeds 0, 1, 0, 1. Deviance: smaller is better.
RATES = [0.1, 0.1, 0.3, 0.3]
RESULTS = validation([0.6, 0.8, 0.9, 0.9], [1.0, 2.0, 3.0, 4.0])


def test_one_rate_for_all_tasks():
    """Means over tasks: ((0.6 - 1) + (0.8 - 2)) / 4 = -0.4 for 0.1, ((0.9 - 3) + (0.9 - 4)) / 4 = -1.3 for 0.3."""
    choice = choose_learning_rate(TASKS, fitted(RATES), RESULTS)
    assert choice.lanes.tolist() == [[0, 1], [0, 1]] and choice.learning_rates == (0.1, 0.1)
    assert choice.validation_score == pytest.approx(-0.4) and not choice.per_task
    chosen = choice.results(RESULTS)
    assert chosen["a"]["auroc"].tolist() == [0.6, 0.8] and chosen["n"]["poisson_deviance"].tolist() == [1.0, 2.0]
    assert list(chosen["a"]) == ["auroc", "f1"]


def test_every_task_its_own_rate():
    """AUROC is best at 0.3, deviance at 0.1; score (0.9 - 1.5) / 2."""
    params = {"w": np.arange(8.0).reshape(4, 2, 1)}  # [L, K, 1]
    choice = choose_learning_rate(TASKS, fitted(RATES, True, params), RESULTS)
    assert choice.lanes.tolist() == [[2, 3], [0, 1]] and choice.learning_rates == (0.3, 0.1)
    assert choice.validation_score == pytest.approx(-0.3)
    assert choice.results(RESULTS)["a"]["auroc"].tolist() == [0.9, 0.9]
    # Task 0 from lanes 2 and 3, task 1 from lanes 0 and 1: leaves [S, K, 1].
    picked = choice.params(fitted(RATES, True, params))["w"][:, :, 0]
    assert picked.tolist() == [[params["w"][2, 0, 0], params["w"][0, 1, 0]], [params["w"][3, 0, 0], 3.0]]


def test_parameters_of_a_multitask_model():
    params = {"w": np.arange(4.0)[:, None]}
    choice = choose_learning_rate(TASKS, fitted(RATES, params=params), RESULTS)
    assert choice.params(fitted(RATES, params=params))["w"].tolist() == [[0.0], [1.0]]


@pytest.mark.filterwarnings("error")
def test_missing_scores():
    # No labels of task a: the other task decides.
    choice = choose_learning_rate(TASKS, fitted(RATES), validation([NAN] * 4, [3.0, 3.0, 1.0, 1.0]))
    assert choice.learning_rates == (0.3, 0.3) and choice.validation_score == -1.0
    # A rate under which one seed has no score, where others have, loses however good the rest is.
    diverged = validation([0.9, NAN, 0.6, 0.6], [1.0, 1.0, 1.0, 1.0])
    assert choose_learning_rate(TASKS, fitted(RATES), diverged).learning_rates == (0.3, 0.3)
    assert choose_learning_rate(TASKS, fitted(RATES, True), diverged).learning_rates == (0.3, 0.1)
    # No score at all: the first rate.
    nothing = choose_learning_rate(TASKS, fitted(RATES), validation([NAN] * 4, [NAN] * 4))
    assert nothing.learning_rates == (0.1, 0.1) and np.isnan(nothing.validation_score)


def test_order_of_the_grid_does_not_matter():
    interleaved = validation([0.6, 0.9, 0.8, 0.9], [1.0, 3.0, 2.0, 4.0])
    choice = choose_learning_rate(TASKS, fitted([0.1, 0.3, 0.1, 0.3]), interleaved)
    assert choice.lanes.tolist() == [[0, 2], [0, 2]]
