"""What the files beside `operators.py` share: timing in turns, by the clock and in CPU time.

CPU time is that of the whole process, all threads. It is what a computation costs on a machine that is busy with other
things, too; wall time is what a user waits, and means something on an idle machine only: turns with a busy machine are
told apart. `load` says how busy it was before.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Timed(NamedTuple):
    """Something to be timed.

    Attributes:
      name: key of its result.
      run: does it `work` times, and returns when it is done.
      work: how many units (steps, solutions, points) a run does.
      compile_s: seconds of tracing and compiling; None where nothing is compiled.
      traffic: bytes that a unit of work reads and writes by XLA's estimate; None where there is none.
    """

    name: str
    run: Callable[[], object]
    work: int = 1
    compile_s: float | None = None
    traffic: float | None = None


QUIET = 0.15  # cores that other processes may use in a turn that counts as quiet


def in_turns(functions: Iterable[Timed], *, turns: int, rest: float = 0.01, patience: float = 0.0) -> dict[str, dict]:
    """Times functions in turns, one run each, after one run of each that is not counted.

    All functions have their first turn before any has its second, so that what disturbs the machine for a while
    disturbs all of them. Turns in which other processes used the CPU are not counted where there are quiet ones: with
    all cores in use, threads that wait for each other lose far more than the share that was taken from them. There are
    up to twice as many turns to find them. (Cores that this process may not use are free for others.)

    Args:
      functions: what to time.
      turns: of each function.
      rest: seconds of sleep before a run: worker threads of another side spin for a while after their work.
      patience: seconds in all to wait for quiet moments to begin a turn in.

    Returns:
      name -> {"ms": median over turns of the wall time of one unit of work, "range": [smallest, largest], "cpu_ms",
      "cpu_range": the same in CPU time, "turns": that count, "quiet": whether these were quiet, "compile_s"}.
    """
    functions = list(functions)
    taken: dict[str, list[Turn]] = {f.name: [] for f in functions}
    for f in functions:
        f.run()
    for count in range(2 * turns):
        if count >= turns and all(len(quiet(of_one)) >= turns for of_one in taken.values()):
            break
        for f in functions:
            time.sleep(rest)
            patience -= wait_for_quiet(patience)
            wall, cpu, busy = time.perf_counter(), time.process_time(), busy_seconds()
            f.run()
            wall, cpu, busy = time.perf_counter() - wall, time.process_time() - cpu, busy_seconds() - busy
            taken[f.name].append(Turn(wall / f.work, cpu / f.work, (busy - cpu) / wall))
    return {f.name: _summary(f, taken[f.name]) for f in functions}


class Turn(NamedTuple):
    """Seconds of a unit of work by the clock and of CPU time, and the cores that other processes used meanwhile."""

    wall: float
    cpu: float
    others: float


def quiet(turns: list[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn.others < spare_cores() + QUIET]


def spare_cores() -> int:
    """Cores of the machine that this process may not use."""
    return (os.cpu_count() or 1) - len(os.sched_getaffinity(0))


def wait_for_quiet(patience: float, *, window: float = 0.05) -> float:
    """Waits until other processes leave our cores alone for a moment; returns the seconds it took."""
    began = time.perf_counter()
    while time.perf_counter() - began < patience:
        wall, busy = time.perf_counter(), busy_seconds()
        time.sleep(window)
        if busy_seconds() - busy < (spare_cores() + QUIET) * (time.perf_counter() - wall):
            break
    return time.perf_counter() - began


def _summary(f: Timed, taken: list[Turn]) -> dict:
    counted = quiet(taken)
    is_quiet = len(counted) >= min(3, len(taken))
    counted = counted if is_quiet else taken
    wall, cpu = ([milliseconds(turn[clock]) for turn in counted] for clock in (0, 1))
    return {
        "ms": float(f"{statistics.median(wall):.4g}"),
        "range": [min(wall), max(wall)],
        "cpu_ms": float(f"{statistics.median(cpu):.4g}"),
        "cpu_range": [min(cpu), max(cpu)],
        "turns": len(counted),
        "quiet": is_quiet,
        "compile_s": None if f.compile_s is None else round(f.compile_s, 2),
    }


def busy_seconds() -> float:
    """CPU time of all processes on the machine, in seconds since its start; 0 where the system does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, *interrupts = (int(ticks) for ticks in file.readline().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def milliseconds(seconds: float) -> float:
    """With four significant digits.

    >>> milliseconds(0.01234567)
    12.35
    """
    return float(f"{1e3 * seconds:.4g}")


def load() -> float:
    """Mean number of runnable processes over the last minute, this one included."""
    return round(os.getloadavg()[0], 2)


def say(text: str) -> None:
    print(text, flush=True)
