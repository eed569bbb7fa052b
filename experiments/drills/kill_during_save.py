"""SIGKILL while checkpoints are written: a process that saves after every step is killed at random moments, many times.

    python experiments/drills/kill_during_save.py --times 30

The process trains (a state of a few megabytes that no compression makes smaller, every bit of it known in advance) and
saves in the background after every step, so that a save is always under way. A kill may fall into the copy, the
writing, the renaming or the deletion of an old checkpoint. The next process has to find a good checkpoint, at most one
save older than the newest that was begun, with exactly the right bits; it goes on from there and is killed in turn.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings

import jax
import numpy as np

from mtjax.train.checkpoint import Checkpoints

WORDS = 1 << 20  # 4 MB
LONGEST_S = 0.4  # from the first saves of a process to its end


def kill_during_save(times: int, seed: int, directory: pathlib.Path | str) -> dict[str, float]:
    """Kills a saving process again and again.

    Args:
      times: how often.
      seed: of the moments.
      directory: an empty folder to work in.

    Returns:
      'kills', how many fell while files were being written ('while_writing'), after how many a good checkpoint was
      there ('good'), the most saves that were begun and lost ('most_saves_lost'), the most steps that were done and
      lost ('most_steps_lost'), how many steps survived ('last_step'), 'state_bytes' and 'seconds'.

    Raises:
      RuntimeError: if a process ended by itself, which it does when a checkpoint is damaged or has wrong bits.
    """
    directory, rng, began = pathlib.Path(directory), random.Random(seed), time.perf_counter()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # many processes, one after the other, and this one
    writing, found, lost = 0, [], []
    done = begun = 0

    def note(step: int) -> None:
        """What the next process found, beside what the killed one had done."""
        found.append(step)
        lost.append((begun - step, done - step))

    for number in range(times):
        log = directory / f"{number}.log"
        command = [sys.executable, __file__, "--train", str(directory), "--log", str(log)]
        process = subprocess.Popen(command, env=environment)
        try:
            while len(_numbers(log, "begun")) < 2:
                if process.poll() is not None:
                    raise RuntimeError(
                        f"The process ended by itself (status {process.returncode}) before kill {number}"
                    )
                time.sleep(0.005)
            time.sleep(rng.uniform(0, LONGEST_S))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if number:
            note(_numbers(log, "restored")[0])
        done, begun = _numbers(log, "done")[-1], _numbers(log, "begun")[-1]
        writing += any("tmp" in path.name for path in (directory / "checkpoints").iterdir())
    note(restore(Checkpoints(directory / "checkpoints"))[0])
    saves_lost, steps_lost = map(max, zip(*lost, strict=True))
    return {
        "kills": times,
        "while_writing": writing,
        "good": sum(step > 0 for step in found),
        "most_saves_lost": saves_lost,
        "most_steps_lost": steps_lost,
        "last_step": found[-1],
        "state_bytes": 4 * WORDS + 4,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _numbers(log: pathlib.Path, word: str) -> list[int]:
    """The steps of the lines of a log that begin with a word; the last line may be cut short."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith(word)]


def state_at(step: int) -> dict[str, np.ndarray]:
    """The state after so many steps."""
    numbers = np.random.default_rng(0).integers(0, 2**32, size=WORDS, dtype=np.uint32)
    for _ in range(step):
        numbers = numbers * np.uint32(1664525) + np.uint32(1013904223)
    return {"step": np.asarray(step, np.int32), "numbers": numbers}


@jax.jit
def advance(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """One step: a linear congruential generator for every number."""
    numbers = state["numbers"] * np.uint32(1664525) + np.uint32(1013904223)
    return {"step": state["step"] + 1, "numbers": numbers}


def restore(checkpoints: Checkpoints) -> tuple[int, dict[str, jax.Array]]:
    """Step and state of the newest checkpoint, every bit checked; the start if there is none.

    Raises:
      UserWarning: if one is damaged: a kill must not do that.
      RuntimeError: if a number is wrong.
    """
    start = jax.tree.map(jax.numpy.asarray, state_at(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        restored = checkpoints.restore(start)
    if restored is None:
        return 0, start
    expected = state_at(restored.step)
    if not all(np.array_equal(restored.state[name], expected[name]) for name in expected):
        raise RuntimeError(f"Checkpoint {restored.step} has wrong bits")
    return restored.step, restored.state


def train(directory: pathlib.Path, log: pathlib.Path) -> None:
    """Goes on from the newest checkpoint until it is killed, and says in `log` what it has done."""
    checkpoints = Checkpoints(directory / "checkpoints")
    step, state = restore(checkpoints)
    file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def say(word: str) -> None:
        os.write(file, f"{word} {step}\n".encode())  # at once: a killed process flushes nothing

    say("restored")
    while True:
        state, step = jax.block_until_ready(advance(state)), step + 1
        say("done")
        checkpoints.save(step, state, {"step": step})
        say("begun")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="number of kills (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: 0)")
    parser.add_argument("--train", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.log)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(kill_during_save(args.times, args.seed, folder), indent=2))


if __name__ == "__main__":
    main()
