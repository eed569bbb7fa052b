"""The log of a run: losses between evaluations, the clock, JSON, and whether two runs are the same."""

import json

import numpy as np
import pytest

from mtjax.train.runlog import RunLog, check_same_run


def test_losses_are_means_since_the_last_evaluation():
    log = RunLog.empty(2, 1)
    log.add(np.array([[[1.0], [2.0]], [[5.0], [5.0]]]), rows=10, seconds=4.0)  # [L=2, n=2, K=1]
    log.add(np.array([[[3.0]], [[8.0]]]), rows=10, seconds=0.5)
    record = log.close({"step": 3})
    assert record == {"step": 3, "losses": [[2.0], [6.0]]} == log.history[0]
    log.add(np.array([[[7.0]], [[1.0]]]), rows=10, seconds=0.5)
    assert log.close({"step": 4})["losses"] == [[7.0], [1.0]]


def test_the_first_dispatch_compiles_and_does_not_count_as_speed():
    log = RunLog.empty(1, 1)
    assert np.isnan(log.rows_per_s)
    log.add(np.zeros((1, 1, 1)), rows=100, seconds=9.0)
    assert log.compile_s == 9.0 and np.isnan(log.rows_per_s)
    log.add(np.zeros((1, 1, 1)), rows=100, seconds=0.5)
    log.add(np.zeros((1, 1, 1)), rows=300, seconds=0.5)
    assert log.rows_per_s == 400.0
    # A resumed process compiles again; neither that nor the first time is forgotten or counted.
    again = RunLog.from_json(json.loads(json.dumps(log.to_json())))
    assert (again.compile_s, again.rows_per_s) == (9.0, 400.0)
    again.add(np.zeros((1, 1, 1)), rows=100, seconds=7.0)
    assert (again.compile_s, again.rows_per_s) == (9.0, 400.0)
    again.add(np.zeros((1, 1, 1)), rows=200, seconds=0.5)
    assert again.rows_per_s == 400.0


def test_json_keeps_every_bit():
    log = RunLog.empty(1, 2)
    log.add(np.array([[[0.1, 1 / 3]]], np.float32), rows=1, seconds=0.1)
    log.close({"step": 1, "metrics": {"a": {"auroc": [float("nan")]}}})
    log.add(np.array([[[np.pi, 1e-30]]], np.float32), rows=1, seconds=0.1)
    again = RunLog.from_json(json.loads(json.dumps(log.to_json())))
    np.testing.assert_array_equal(again.losses, log.losses)
    assert again.count == 1 and again.history[0]["losses"] == log.history[0]["losses"]
    assert np.isnan(again.history[0]["metrics"]["a"]["auroc"][0])


def test_check_same_run():
    run = {"seeds": [0, 1], "train": {"batch_size": 4, "sizes": (1, (2, 3))}, "note": None}
    check_same_run(run, json.loads(json.dumps(run)))
    check_same_run(run, {key: value for key, value in run.items() if key != "note"})
    with pytest.raises(ValueError, match="cannot be resumed") as error:
        check_same_run(run | {"more": 1}, run | {"train": {"batch_size": 8, "sizes": [1, [2, 4]]}})
    assert str(error.value).splitlines()[1:] == [
        "  more: saved None, now 1",
        "  train.batch_size: saved 8, now 4",
        "  train.sizes: saved [1, [2, 4]], now [1, [2, 3]]",
    ]
