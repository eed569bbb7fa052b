"""Runs of several processes, started as a user starts them; none outlives its test."""

import contextlib
import os
import signal
import subprocess
import sys

import jax
import pytest

# Programs to start, not modules to import: the doctests leave them alone.
collect_ignore = ["scripts"]


@pytest.fixture
def start():
    """Starts `python -m mtjax.launch`: (arguments of python, processes, devices, env, options) -> subprocess.Popen."""
    with contextlib.ExitStack() as stack:

        def start(args, processes=2, devices=4, env=None, options=()) -> subprocess.Popen:
            own = ["--processes", str(processes), "--devices-per-process", str(devices), *options]
            process = subprocess.Popen(
                [sys.executable, "-m", "mtjax.launch", *own, "--", sys.executable, *map(str, args)],
                env=_environment(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(_clean_up, process)
            return process

        yield start


@pytest.fixture
def launch(start):
    """Runs `python -m mtjax.launch` to its end.

    (args, processes=2, devices=4, timeout=120, env=None, options=()) -> subprocess.CompletedProcess, where `args` are
    the arguments of python (a script and its own), `env` is added to this process's environment, and `options` are
    further options of the launcher. A run past the timeout is ended, and the test fails with what it printed last.
    """

    def launch(args, processes=2, devices=4, timeout=120, env=None, options=()) -> subprocess.CompletedProcess:
        process = start(args, processes, devices, env, options)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _stop(process)
            out, err = process.communicate()
            pytest.fail(f"not done after {timeout} s: {args}\n{out[-2000:]}\n{err[-4000:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return launch


@pytest.fixture
def python():
    """Runs one process without the launcher: (args, timeout=60, env=None) -> subprocess.CompletedProcess."""

    def python(args, timeout=60, env=None) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, args)]
        return subprocess.run(
            command, env=_environment(env), capture_output=True, text=True, timeout=timeout, check=False
        )

    return python


def _environment(extra) -> dict[str, str]:
    """This process's, with the cache of compiled programs, and without a cluster that the tests may run in."""
    clusters = ("MTJAX_", "SLURM_", "OMPI_", "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR", "JAX_NUM_CPU_DEVICES")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(clusters)}
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(seconds), "JAX_PLATFORMS": "cpu"}
    return variables | {name: str(value) for name, value in (extra or {}).items()}


def _stop(process: subprocess.Popen) -> None:
    """The launcher ends its processes when it is asked to, at the latest after its grace time."""
    for _ in range(2):  # the second time at once, if the script is saving
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
    process.kill()


def _clean_up(process: subprocess.Popen) -> None:
    _stop(process)
    process.wait()
    process.stdout.close()
    process.stderr.close()
