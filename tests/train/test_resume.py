"""A run that was killed, stopped or damaged and then resumed ends in the bits of one that was not."""

import gc
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

TOY = pathlib.Path(__file__).with_name("toy.py")


def start(*arguments) -> subprocess.Popen:
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen([sys.executable, str(TOY), *map(str, arguments)], env=environment)


def newest_checkpoint(run: pathlib.Path) -> int:
    """The newest finished checkpoint; 0 if there is none."""
    found = (run / "checkpoints").glob("[0-9]*") if (run / "checkpoints").exists() else ()
    return max((int(path.name) for path in found if path.name.isdigit()), default=0)


def assert_same_run(run: pathlib.Path, reference: pathlib.Path) -> None:
    """Every leaf of the state, the history and metrics.jsonl are equal, bit by bit."""
    with np.load(run.with_suffix(".npz")) as ours, np.load(reference.with_suffix(".npz")) as theirs:
        assert ours.files == theirs.files and len(ours.files) > 30
        for name in ours.files:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
        assert any("method_state" in name for name in ours.files) and any(".best.params" in n for n in ours.files)
    assert (run / "metrics.jsonl").read_text() == (reference / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> pathlib.Path:
    """The directory of an uninterrupted run."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert start(run, run.with_suffix(".npz")).wait(timeout=300) == 0
    return run


def test_killed_at_random_moments(tmp_path: pathlib.Path, reference: pathlib.Path):
    run, result = tmp_path / "run", tmp_path / "run.npz"
    rng = random.Random(time.time_ns())
    killed = []
    for attempt in range(4):
        process = start(run, result, *["--resume"] * (attempt > 0))
        began = newest_checkpoint(run)
        # At least one checkpoint further each time, then anywhere: in a step, an evaluation or the next checkpoint.
        while process.poll() is None and newest_checkpoint(run) <= began + 3 * (attempt > 0):
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed.append((newest_checkpoint(run), process.returncode))
    assert [code for _, code in killed].count(-signal.SIGKILL) >= 2, killed
    assert start(run, result, "--resume").wait(timeout=300) == 0
    assert_same_run(run, reference)
    assert not list(run.glob("checkpoints/*tmp*")), "what was being written when the process died is cleaned up"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_returns(toy, tmp_path: pathlib.Path, reference: pathlib.Path, request, number: int):
    """In this process: the fit returns, says so, gives the handlers back, and goes on to the same bits."""
    run = tmp_path / "run"

    def before(*_):
        raise AssertionError("the signal came after the fit")

    previous = signal.signal(number, before)
    request.addfinalizer(lambda: signal.signal(number, previous))

    done = threading.Event()

    def send():
        while newest_checkpoint(run) < 10:
            if done.wait(0.005):
                return
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        stopped = toy.train_toy(run)
    finally:  # no signal may come when the test is over
        done.set()
        thread.join()
    step = int(stopped.state.step[0])
    assert stopped.interrupted and 10 <= step < 56
    assert newest_checkpoint(run) == step, "saved where it stopped"
    assert signal.getsignal(number) is before

    resumed = toy.train_toy(run, resume=True)
    assert not resumed.interrupted and int(resumed.state.step[0]) == 56
    with np.load(reference.with_suffix(".npz")) as theirs:
        ours = toy.arrays(resumed.state)
        assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []
        assert json.loads(str(theirs["history"])) == resumed.history
    assert resumed.compile_s > 0 and resumed.rows_per_s > 0


def test_resuming_a_finished_run_changes_nothing(toy, tmp_path: pathlib.Path):
    config = toy.TrainConfig(batch_size=60, max_epochs=2)
    # Nothing was saved yet, as after a kill before the first checkpoint: the run starts.
    first = toy.train_toy(tmp_path, config=config, resume=True)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = toy.train_toy(tmp_path, config=config, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    jax.tree.map(np.testing.assert_array_equal, toy.arrays(first.state), toy.arrays(again.state))
    assert again.history == first.history and not again.interrupted
    assert (again.compile_s, again.rows_per_s) == (first.compile_s, first.rows_per_s), "kept in the checkpoint"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that orbax drops
def test_a_damaged_checkpoint_costs_steps_but_no_bits(toy, tmp_path: pathlib.Path, reference: pathlib.Path):
    """The newest checkpoint is cut short, the one before it is used; then both are, and the run starts over."""
    config = toy.TrainConfig(batch_size=60, max_epochs=4, checkpoint_every=2)
    first = toy.train_toy(tmp_path, config=config)

    def damage(step: int) -> None:
        for path in (tmp_path / "checkpoints" / str(step)).rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    damage(8)
    with pytest.warns(UserWarning, match=r"Checkpoint 8 in .* is damaged \(.*\); trying step 6"):
        again = toy.train_toy(tmp_path, config=config, resume=True)
    jax.tree.map(np.testing.assert_array_equal, toy.arrays(first.state), toy.arrays(again.state))
    assert again.history == first.history
    assert (tmp_path / "damaged_checkpoints" / "8.1").is_dir()

    damage(6)
    damage(8)
    with pytest.warns(UserWarning) as caught:
        over = toy.train_toy(tmp_path, config=config, resume=True)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2 and messages[1].endswith("there is none before it: starting from the beginning")
    jax.tree.map(np.testing.assert_array_equal, toy.arrays(first.state), toy.arrays(over.state))
    assert over.history == first.history
    gc.collect()


def test_what_cannot_be_resumed_is_refused_and_left_alone(toy, tmp_path: pathlib.Path):
    config = toy.TrainConfig(batch_size=60, max_epochs=1)
    toy.train_toy(tmp_path, config=config, record={"note": "x"})
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    with pytest.raises(ValueError, match="already holds a run; resume it, or choose another directory"):
        toy.train_toy(tmp_path, config=config)
    other = toy.TrainConfig(batch_size=40, max_epochs=1)
    with pytest.raises(ValueError, match="started with another configuration") as error:
        toy.train_toy(tmp_path, config=other, resume=True, seeds=(0, 5), record={"note": "y"})
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  note: saved 'x', now 'y'",
        "  seeds: saved [0, 1], now [0, 5]",
        "  train.batch_size: saved 60, now 40",
    ]
    # The same description, but another method, whose state has other arrays.
    with pytest.raises(
        ValueError, match=r"another model, optimizer or method: its arrays differ\n  method_state/inner"
    ):
        toy.train_toy(tmp_path, config=config, resume=True, record={"note": "x"}, method=toy.mtjax.optim.linear())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    with pytest.raises(ValueError, match="resume=True needs the run's directory"):
        toy.train_toy(None, config=config, resume=True)
