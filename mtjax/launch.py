"""Starts the processes of a run on this machine: python -m mtjax.launch --processes 2 -- python SCRIPT --distributed

It only starts programs, sets their environment and watches them: `mtjax.distributed.initialize()` in the script finds
the rest. Process 0 prints as if it ran alone, the lines of the others begin with [1], [2], ... If one fails, its last
error lines are shown before what the others say to that, the others are ended, and its exit code is returned.
"""

import argparse
import collections
import contextlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from mtjax.distributed import COORDINATOR, LAUNCHED, NUM_PROCESSES, PROCESS_ID

# Seconds that the others have after one process failed, between SIGTERM and SIGKILL.
FAILURE_GRACE_S = 10.0
# Lines wait so long before they are shown, so that the first failure can be shown before its consequences elsewhere.
HOLD_S = 0.4
# Seconds to wait for the last words of a process that has ended; a child it left behind may hold its output open.
LAST_WORDS_S = 2.0
# Error lines of the failed process to show.
TAIL_LINES = 40
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_DESCRIPTION = """
Starts N processes of one run on this machine, connected over loopback, to try a multi-process run out before it goes
to a cluster, or to give each GPU (or share of the GPUs) a process of its own.

The script calls mtjax.distributed.initialize(), which the experiments of this repository do with --distributed; it
finds coordinator, number and count in the environment. On several machines use their scheduler (srun, mpirun, an
indexed Kubernetes job) without this launcher, or start the script once per machine with MTJAX_COORDINATOR=HOST:PORT,
MTJAX_NUM_PROCESSES and MTJAX_PROCESS_ID set. On a TPU machine one process drives all chips: no launcher there.

Output: process 0 prints as usual, lines of the others begin with [1], [2], ...
Ctrl-C, SIGTERM and SIGHUP go to all processes, which then have --grace seconds to save.
If one process fails, its last error lines come first, the others are ended within seconds, and its exit code (128 + the
number of the signal, if one ended it) is that of the launcher.
"""
_EXAMPLES = """
examples:
  python -m mtjax.launch --processes 2 --devices-per-process 4 -- python experiments/tabular/multitab.py --distributed
  python -m mtjax.launch --processes 8 -- python train.py --distributed --mesh data=-1     (8 GPUs, one for each)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mtjax.launch",
        usage="python -m mtjax.launch --processes N [--devices-per-process M] [--port P] [--grace S] -- COMMAND ...",
        description=textwrap.dedent(_DESCRIPTION),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=_positive, required=True, metavar="N", help="processes to start")
    parser.add_argument(
        "--devices-per-process",
        type=_positive,
        metavar="M",
        help="run on the CPU, with M devices in each process; without it each gets its share of the GPUs, if any",
    )
    parser.add_argument("--port", type=int, metavar="P", help="port of the coordinator; otherwise a free one")
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="seconds from a forwarded signal to SIGKILL (30)"
    )
    own, command = split_command(sys.argv[1:] if arguments is None else list(arguments))
    options, unknown = parser.parse_known_args(own)
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}; the command to start comes after ' -- '")
    if not command:
        parser.error("the command to start is missing: write it after ' -- '")
    try:
        gpus = None
        if options.devices_per_process is None and os.environ.get("JAX_PLATFORMS") != "cpu":
            gpus = share(visible_gpus(os.environ), options.processes)
        coordinator = f"127.0.0.1:{options.port or free_port()}"
        environments = [
            environment(
                os.environ,
                coordinator=coordinator,
                num_processes=options.processes,
                process_id=number,
                cpu_devices=options.devices_per_process,
                gpus=gpus and gpus[number],
            )
            for number in range(options.processes)
        ]
        return run(command, environments, grace_s=options.grace)
    except (FileNotFoundError, PermissionError) as error:
        parser.error(f"{error.filename} cannot be started: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))


def split_command(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's own arguments, and the command after the first '--'.

    >>> split_command(["--processes", "2", "--", "python", "a.py", "--", "b"])
    (['--processes', '2'], ['python', 'a.py', '--', 'b'])
    """
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def share(devices: Sequence[str], processes: int) -> list[list[str]] | None:
    """The devices of each process, equally many; None if there are no devices.

    >>> share(["0", "1", "2", "3"], 2)
    [['0', '1'], ['2', '3']]
    """
    if not devices:
        return None
    each = len(devices) // processes
    if each == 0:
        raise ValueError(
            f"{processes} processes cannot share {len(devices)} GPUs: each needs one. Start at most {len(devices)}, "
            "or add --devices-per-process to run on the CPU."
        )
    return [list(devices[number * each : (number + 1) * each]) for number in range(processes)]


def visible_gpus(variables: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that this machine lets its programs use: CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists."""
    chosen = variables.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listing = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return [line.strip() for line in listing.stdout.splitlines() if line.strip().isdecimal()]


def free_port() -> int:
    """A port of the loopback interface that nobody uses at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment(
    base: Mapping[str, str],
    *,
    coordinator: str,
    num_processes: int,
    process_id: int,
    cpu_devices: int | None = None,
    gpus: Sequence[str] | None = None,
) -> dict[str, str]:
    """The environment variables of one process.

    Args:
      base: those that all inherit.
      coordinator: "host:port" of process 0.
      num_processes: how many there are.
      process_id: which one this is.
      cpu_devices: devices to make of the CPU; None leaves the platform to JAX.
      gpus: the GPUs of this process; None leaves that to JAX too.
    """
    variables = dict(base)
    variables |= {COORDINATOR: coordinator, NUM_PROCESSES: str(num_processes), PROCESS_ID: str(process_id)}
    # Lines as they are printed, not when a buffer is full.
    variables |= {LAUNCHED: "1", "PYTHONUNBUFFERED": "1"}
    if any("_proxy" in name.lower() for name in base):
        # A proxy for the outside must not be asked for loopback.
        for name in ("no_proxy", "NO_PROXY"):
            variables[name] = ",".join(filter(None, (base.get(name), "127.0.0.1,localhost")))
    if cpu_devices is not None:
        variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(cpu_devices)}
    if gpus is not None:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return variables


def run(command: Sequence[str], environments: Sequence[Mapping[str, str]], *, grace_s: float = 30.0) -> int:
    """Runs the command once per environment and watches until all have ended; call it in the main thread.

    Args:
      command: program and arguments.
      environments: of each process.
      grace_s: seconds from SIGINT, SIGTERM or SIGHUP, which are passed on, to SIGKILL.

    Returns:
      0, or the exit code of the process that failed first.
    """
    with _Watch(grace_s) as watch:
        for variables in environments:
            watch.start(command, variables)
        return watch.wait()


class _Watch:
    """Processes, what they print, and how they end. Threads only put events into a queue; the rest is one loop."""

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._began = time.monotonic()
        self._processes: list[subprocess.Popen] = []
        self._codes: dict[int, int] = {}
        self._events: queue.SimpleQueue = queue.SimpleQueue()  # of (process, "out" | "err" | "eof" | "exit", payload)
        self._held: collections.deque = collections.deque()  # of (time, process, "out" | "err", line)
        self._tails: dict[tuple[int, str], collections.deque] = {}
        self._open: list[int] = []  # per process, output streams that are not at their end
        self._failed: int | None = None  # the first that did, unless all were told to stop
        self._reported = False
        self._stopping = False
        self._kill_at: float | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "_Watch":
        for number in FORWARDED:
            if signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
            self._handlers[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *exception) -> None:
        self._send(signal.SIGKILL)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        process = subprocess.Popen(
            command,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches it through us only, and its children end with it
        )
        number = len(self._processes)
        self._processes.append(process)
        self._open.append(2)
        for kind, stream in (("out", process.stdout), ("err", process.stderr)):
            self._tails[number, kind] = collections.deque(maxlen=TAIL_LINES)
            threading.Thread(target=self._read, args=(number, kind, stream), daemon=True).start()
        threading.Thread(target=lambda: self._events.put((number, "exit", process.wait())), daemon=True).start()

    def wait(self) -> int:
        """Until all have ended; returns the exit code."""
        while len(self._codes) < len(self._processes):
            self._step(HOLD_S / 4)
            if self._failed is not None and not self._reported:
                self._end_others()
        self._drain(range(len(self._processes)))
        self._show(until=float("inf"))
        if self._failed is not None and len(self._processes) > 1:
            self._say(f"process {self._failed} failed first: {_ending(self._codes[self._failed])}.")
        # In the order in which they ended.
        code = next((code for code in self._codes.values() if code != 0), 0)
        return 128 - code if code < 0 else code

    def _end_others(self) -> None:
        """Ends the processes that did not fail, and reports the one that did before what they say to that."""
        failed = self._failed
        self._kill_at = time.monotonic() + FAILURE_GRACE_S
        self._send(signal.SIGTERM)
        self._drain([failed])
        kind = "err" if self._tails[failed, "err"] else "out"
        mine = [line for _, number, stream, line in self._held if (number, stream) == (failed, kind)]
        others = [item for item in self._held if (item[1], item[2]) != (failed, kind)]
        self._held = collections.deque(others)
        self._say(
            f"process {failed} of {len(self._processes)} failed after {time.monotonic() - self._began:.0f} s: "
            f"{_ending(self._codes[failed])}. The others are ended. Its last lines:"
        )
        # All that was not shown yet, and no fewer than there is room for.
        for line in max(mine, list(self._tails[failed, kind]), key=len):
            self._print(failed, "err", line)
        self._say("end of its last lines")
        self._reported = True

    def _step(self, timeout_s: float) -> None:
        """Takes events for a while; shows what was held long enough; kills what has had its grace time."""
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=timeout_s)
            while True:
                self._take(*event)
                event = self._events.get_nowait()
        if self._failed is None or self._reported:
            self._show(until=time.monotonic() - HOLD_S)
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self._send(signal.SIGKILL)

    def _take(self, number: int, kind: str, payload: Any) -> None:
        if kind == "exit":
            self._codes[number] = payload
            if payload != 0 and self._failed is None and not self._stopping:
                self._failed = number
        elif kind == "eof":
            self._open[number] -= 1
        else:
            self._held.append((time.monotonic(), number, kind, payload))
            self._tails[number, kind].append(payload)

    def _drain(self, numbers: Sequence[int]) -> None:
        """Reads what these processes, which have ended, printed last."""
        deadline = time.monotonic() + LAST_WORDS_S
        while any(self._open[number] for number in numbers) and time.monotonic() < deadline:
            self._step(0.05)

    def _read(self, number: int, kind: str, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._events.put((number, kind, line.decode(errors="replace").rstrip("\n")))
        self._events.put((number, "eof", None))

    def _show(self, until: float) -> None:
        while self._held and self._held[0][0] <= until:
            _, number, kind, line = self._held.popleft()
            self._print(number, kind, line)

    def _print(self, number: int, kind: str, line: str) -> None:
        mark = f"[{number}] " if number else ""
        print(f"{mark}{line}", file=sys.stdout if kind == "out" else sys.stderr, flush=True)

    def _say(self, text: str) -> None:
        print(f"mtjax.launch: {text}", file=sys.stderr, flush=True)

    def _forward(self, number: int, frame: Any) -> None:
        del frame
        self._stopping = True
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace_s
        self._send(number)

    def _send(self, number: int) -> None:
        """Signals the processes that have not ended, each with the children it started."""
        for process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)


def _ending(code: int) -> str:
    """An exit code in words.

    >>> _ending(-9)
    'ended by signal SIGKILL'
    """
    return f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
