"""Processes: join the others, know which one this is, wait for them, agree with them, and end when one of them fails.

One process drives the devices of one host (or a share of them); all run the same script in lockstep. `initialize` joins
them through `jax.distributed`. A script that never calls it, or is alone, pays nothing: every function here is trivial
then.

Messages between processes go through JAX's coordination service, host to host: they start no program on the devices and
do not wait for those that run there, so the training loop may call `agree` between two dispatches.
"""

import atexit
import contextlib
import io
import itertools
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax

# Set by mtjax.launch for each process it starts; they may also be set by hand.
COORDINATOR = "MTJAX_COORDINATOR"
NUM_PROCESSES = "MTJAX_NUM_PROCESSES"
PROCESS_ID = "MTJAX_PROCESS_ID"
LAUNCHED = "MTJAX_LAUNCHED"

# A process that sends no heartbeat for so long is dead, and the others are ended: within a minute with JAX's own
# delays. Shorter would end a run whose process is merely busy allocating pinned memory (jax-ml/jax#23599).
HEARTBEAT_S = 40
# A process that is done waits so long for the others; process 0 may still be writing the report.
SHUTDOWN_S = 600
# JAX aborts the whole interpreter when its own wait for the others times out, so it must never time out.
_NEVER_S = 7 * 24 * 3600

# Each call of `agree` has its own key. All processes call it equally often, so that they count alike.
_agreements = itertools.count()


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = 300.0,
) -> None:
    """Joins the other processes of the run; call it before the first JAX computation.

    With no arguments, what `python -m mtjax.launch` has set in the environment is used, or the environment variables
    MTJAX_COORDINATOR, MTJAX_NUM_PROCESSES and MTJAX_PROCESS_ID set by hand, or else the cluster that JAX detects (TPU
    slices, SLURM, Open MPI, Kubernetes with the package `kubernetes`). A second call does nothing.

    From then on the death of a process ends the others within a minute, and an exception that nobody catches ends this
    process at once, where it would wait at exit for the others. SIGTERM keeps the handler that Python has for it.

    Args:
      coordinator: "host:port" of process 0, on which it listens and which all others can reach.
      num_processes: how many processes take part.
      process_id: which one this is, from 0; given all three or none.
      timeout_s: seconds to wait for the others.

    Raises:
      ValueError: only some of the three are given, or they are impossible.
      RuntimeError: nothing is given and no cluster is detected, or JAX has computed already.
      TimeoutError: not all processes came in time. This process cannot try again: start it anew.
    """
    if jax.distributed.is_initialized():
        return
    given = _arguments(coordinator, num_processes, process_id)
    # What JAX detects would give a process its first GPU only; the launcher has given each its share.
    options = {"cluster_detection_method": "deactivate"} if LAUNCHED in os.environ else {}
    if given and _is_loopback(given["coordinator_address"]):
        # Otherwise the service, which asks for no password, listens on every network interface.
        options["coordinator_bind_address"] = given["coordinator_address"]

    def join():
        jax.distributed.initialize(
            **given,
            **options,
            initialization_timeout=_NEVER_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )

    try:
        finished = _call_in_thread(join, timeout_s)
    except ValueError as error:
        if given:
            raise
        raise RuntimeError(
            "No other processes to join: neither the arguments coordinator, num_processes and process_id, nor "
            f"{COORDINATOR}, {NUM_PROCESSES} and {PROCESS_ID} in the environment are given, and JAX detects no "
            f"cluster ({str(error).rstrip('.')}). Start the script with 'python -m mtjax.launch --processes N -- "
            "python SCRIPT ...' on one machine, with srun, mpirun or as an indexed Kubernetes job on several, or give "
            "the three."
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"Process {_state().process_id} could not start or join the coordinator {_state().coordinator_address}: "
            f"{error}. Is the port in use on that host?"
        ) from error
    if not finished:
        atexit.register(_leave, 1)  # JAX would wait for the others there
        raise TimeoutError(
            f"Not all processes came: process {_state().process_id} waited {timeout_s:g} s for {_who()}. Check that "
            f"{_state().num_processes} processes were started, each with its own id from 0 to "
            f"{_state().num_processes - 1}, that none of them stopped with an error of its own (see its log), and that "
            "all can reach the coordinator's host and port (name, firewall, port in use)."
        )
    _restore_sigterm()
    if process_count() > 1:
        _leave_on_exception()


def process_id() -> int:
    """Which process this is, from 0. Unlike `jax.process_index` it does not start the devices."""
    return _state().process_id if jax.distributed.is_initialized() else 0


def process_count() -> int:
    """How many processes take part. Unlike `jax.process_count` it does not start the devices.

    >>> process_count()
    1
    """
    return _state().num_processes if jax.distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that logs and writes reports: process 0.

    >>> is_main()
    True
    """
    return process_id() == 0


def barrier(name: str, *, timeout_s: float = 600.0) -> None:
    """Returns when every process has called it with the same name.

    Args:
      name: says in the error what was waited for. The same name may be used again.
      timeout_s: seconds to wait; alike on all processes.

    Raises:
      TimeoutError: some processes did not come in time; the message names them.
      RuntimeError: a process died meanwhile.
    """
    if process_count() == 1:
        return
    try:
        _state().client.wait_at_barrier(f"mtjax/{name}", timeout_in_ms=max(1, int(timeout_s * 1000)))
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if text.startswith("DEADLINE_EXCEEDED"):
            raise TimeoutError(
                f"Process {process_id()} waited {timeout_s:g} s at the barrier {name!r} for {_missing(text)} of "
                f"{process_count()} processes. They are slower, stuck, or doing something else: see their logs."
            ) from error
        raise RuntimeError(f"Process {process_id()} waited in vain at the barrier {name!r}: {text}") from error


def agree(flag: bool, *, timeout_s: float = 3600.0) -> bool:
    """Whether any process says True: all get the same answer. All processes must call it, equally often.

    It costs two messages to process 0 and back (about a millisecond), and waits for the slowest host, not for the
    devices. Call it from one thread.

    Args:
      flag: what this process says.
      timeout_s: seconds to wait for the others; long, as one of them may be compiling or saving.

    Returns:
      True if `flag` is true on at least one process.

    Raises:
      TimeoutError: as `barrier`.

    >>> agree(False)
    False
    """
    if process_count() == 1:
        return bool(flag)
    client = _state().client
    directory = f"mtjax/agree/{next(_agreements)}"
    if flag:
        client.key_value_set(f"{directory}/{process_id()}", "1")
    # All that is said before the barrier is read after it.
    barrier("agree", timeout_s=timeout_s)
    return bool(client.key_value_dir_get(directory))


@contextlib.contextmanager
def only_main_prints() -> Iterator[None]:
    """Inside, what processes other than 0 print is dropped; their errors and warnings show, marked by their number.

    It acts on Python's `sys.stdout` and `sys.stderr`. Under mtjax.launch the marks are the launcher's. It goes around
    the whole of a script: an exception that leaves it, or `sys.exit` with an error, is the end of this process's part
    in the run, as with `leave_at_exit`.
    """
    with contextlib.ExitStack() as stack:
        if not is_main():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            if LAUNCHED not in os.environ:
                marked = _MarkedLines(sys.stderr, f"[{process_id()}] ")
                stack.callback(marked.finish)
                stack.enter_context(contextlib.redirect_stderr(marked))
        try:
            yield
        except SystemExit as error:
            if error.code not in (None, 0):
                leave_at_exit(error.code if isinstance(error.code, int) else 1)
            raise
        except BaseException as error:
            leave_at_exit(130 if isinstance(error, KeyboardInterrupt) else 1)
            raise


def leave_at_exit(code: int) -> None:
    """This process has failed: it will end with this exit code, and not wait at exit for the others, which wait for it.

    For errors that are caught and shown; an exception that nobody catches ends the process anyway. The last call
    counts. Alone it does nothing.
    """
    if process_count() > 1:
        atexit.register(_leave, code)


class _MarkedLines(io.TextIOBase):
    """A text stream that puts a mark before every line of what is written to another one."""

    def __init__(self, stream, mark: str):
        self._stream, self._mark, self._at_start = stream, mark, True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._stream.write((self._mark if self._at_start else "") + line)
            self._at_start = line.endswith(("\n", "\r"))
        return len(text)

    def finish(self) -> None:
        """Ends a last line that has no end, so that it is not glued to another process's."""
        if not self._at_start:
            self.write("\n")
        self.flush()

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:
        return self._stream.encoding


def _state():
    """What JAX knows of the processes. There is no public access to it, or to its client, short of starting devices."""
    from jax._src import distributed

    return distributed.global_state


def _who() -> str:
    state = _state()
    return f"a run of {state.num_processes} processes with the coordinator {state.coordinator_address}"


def _missing(text: str) -> str:
    """The processes that a timed-out barrier of JAX names, as words."""
    names = re.search(r"task names:\n((?:\S+\n)+)", text)
    ids = [] if names is None else [name.rsplit("task:", 1)[-1] for name in names[1].split()]
    return f"process {', '.join(ids)}" if ids else "some"


def _arguments(coordinator: str | None, num_processes: int | None, process_id: int | None) -> dict:
    """The keyword arguments of jax.distributed.initialize, from ours or the environment; none: JAX detects them."""
    values = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if all(value is None for value in values.values()):
        names = {"coordinator": COORDINATOR, "num_processes": NUM_PROCESSES, "process_id": PROCESS_ID}
        values = {key: os.environ.get(name) for key, name in names.items()}
        for key in ("num_processes", "process_id"):
            if values[key] is not None:
                try:
                    values[key] = int(values[key])
                except ValueError:
                    raise ValueError(f"{names[key]} must be a whole number, got {values[key]!r}.") from None
        labels = names
    else:
        labels = {key: key for key in values}
    absent = [labels[key] for key, value in values.items() if value is None]
    if len(absent) == 3:
        return {}
    if absent:
        raise ValueError(
            f"{', '.join(labels.values())} belong together: give all three, or none where a cluster can be detected. "
            f"Missing: {', '.join(absent)}."
        )
    address, count, number = values.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{labels['coordinator']} must be 'host:port' with a port from 1 to 65535, got {address!r}.")
    if count < 1:
        raise ValueError(f"{labels['num_processes']} must be at least 1, got {count}.")
    if not 0 <= number < count:
        raise ValueError(
            f"{labels['process_id']} must be from 0 to {count - 1}, below {labels['num_processes']}={count}, "
            f"got {number}."
        )
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _call_in_thread(function: Callable[[], None], timeout_s: float) -> bool:
    """Whether `function` returned in time; Ctrl-C works meanwhile. One that did not goes on in its thread."""
    errors: list[BaseException] = []

    def call():
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="mtjax.distributed.initialize", daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout_s
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(min(1.0, max(0.0, deadline - time.monotonic())))
    if errors:
        raise errors[0]
    return not thread.is_alive()


def _restore_sigterm() -> None:
    """Python's handler of SIGTERM back: JAX's, which only takes note, would let a stopped process live on."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:  # None: not installed by Python
            signal.signal(signal.SIGTERM, handler)


def _leave_on_exception() -> None:
    """Makes an uncaught exception end the process, where it would wait at exit for others that wait for it."""
    previous = sys.excepthook

    def hook(kind, error, trace):
        if LAUNCHED not in os.environ:
            print(f"Process {process_id()} of {process_count()} failed:", file=sys.stderr)
        try:
            previous(kind, error, trace)
        except Exception:
            traceback.print_exception(kind, error, trace)
        if not hasattr(sys, "ps1"):  # a prompt goes on
            _leave(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = hook


def _leave(code: int) -> None:
    """Ends the process before JAX, which registered its exit function earlier, waits for the others."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
