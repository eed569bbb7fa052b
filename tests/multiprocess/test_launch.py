"""python -m mtjax.launch and mtjax.distributed with real processes."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from mtjax.launch import TAIL_LINES, environment, free_port, main, run, share, split_command, visible_gpus

SCRIPTS = pathlib.Path(__file__).parent / "scripts"


def environments(count: int) -> list[dict[str, str]]:
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        environment(os.environ, coordinator=coordinator, num_processes=count, process_id=number)
        for number in range(count)
    ]


def run_snippet(code: str, count: int = 2) -> int:
    """Runs code, which knows its `me`, in so many processes without JAX."""
    code = f"import os, signal, sys, time\nme = int(os.environ['MTJAX_PROCESS_ID'])\n{code}"
    return run([sys.executable, "-c", code], environments(count))


def check_together(folder: pathlib.Path, count: int) -> None:
    seen = [json.loads((folder / f"{number}.json").read_text()) for number in range(count)]
    for number, record in enumerate(seen):
        assert (record["id"], record["count"], record["main"]) == (number, count, number == 0)
        assert record["devices"] == 2 * count
        # Each process has the rows 0, 1, 2, 3 and 100 times its number.
        assert record["sum"] == sum(0 + 1 + 2 + 3 + 4 * 100 * other for other in range(count))
        assert record["agreed"] == [False, True, False, True, True]
        assert record["arrived"] == count
        assert record["agree_ms"] < 200
    assert re.match(r"Process 0 waited 0\.2 s at the barrier 'lonely' for process 1 of 2 processes", seen[0]["lonely"])


def test_processes_work_together(launch, tmp_path):
    done = launch([SCRIPTS / "together.py", tmp_path], processes=2, devices=2, timeout=60)
    assert done.returncode == 0, done.stderr
    check_together(tmp_path, 2)
    assert "printed by 0\n" in done.stdout and "printed by 1" not in done.stdout
    assert {"warning of 0", "[1] warning of 1"} <= set(done.stderr.splitlines())


def test_the_error_of_the_failing_process_comes_first(launch):
    began = time.monotonic()
    done = launch([SCRIPTS / "fails.py", "raises", 1, "agree"], devices=1, timeout=60)
    assert done.returncode == 1
    assert time.monotonic() - began < 60
    first, *others = done.stderr.splitlines()
    assert first.startswith("mtjax.launch: process 1 of 2 failed") and "exit code 1" in first
    report = others[: others.index("mtjax.launch: end of its last lines")]
    assert report[0] == "[1] Traceback (most recent call last):"
    assert report[-1] == "[1] FileNotFoundError: no rows in the folder"
    assert others[-1] == "mtjax.launch: process 1 failed first: exit code 1."


def test_a_missing_process_is_a_sentence(python):
    began = time.monotonic()
    done = python([SCRIPTS / "waits.py", 0.5])
    assert time.monotonic() - began < 60
    nothing, missing = done.stdout.splitlines()
    assert nothing.startswith("RuntimeError: No other processes to join") and "python -m mtjax.launch" in nothing
    assert re.match(r"TimeoutError: Not all processes came: process 0 waited 0\.5 s for a run of 2 processes", missing)
    assert re.search(r"coordinator 127\.0\.0\.1:\d+\. Check that 2 processes were started", missing)
    assert done.returncode == 1


def test_lines_are_marked_by_process_and_complete(capsys):
    assert run_snippet("for i in range(50): print(me, i); print('note', me, i, file=sys.stderr)", 3) == 0
    out, err = capsys.readouterr()
    for number, mark in enumerate(("", "[1] ", "[2] ")):
        mine = [line for line in out.splitlines() if line.startswith(f"{mark}{number} ")]
        assert mine == [f"{mark}{number} {i}" for i in range(50)]
    assert len(out.splitlines()) == len(err.splitlines()) == 150


def test_a_failure_comes_before_what_follows_from_it_and_whole(capsys, tmp_path):
    """The others see process 1 fail, or are told to end, and say so at once."""
    lines = TAIL_LINES + 60
    code = f"""
def touch(name): open({str(tmp_path)!r} + '/' + name, 'w').close()
def wait(name):
    while not os.path.exists({str(tmp_path)!r} + '/' + name): time.sleep(0.001)
def end(*_):
    print('consequence', me, file=sys.stderr)
    os._exit(6)
if me == 1:
    wait('ready0'); wait('ready2')
    for i in range({lines}): print('reason', i, file=sys.stderr)
    touch('failing')
    os._exit(5)
signal.signal(signal.SIGTERM, end)
touch(f'ready{{me}}')
wait('failing')
print('consequence', me, file=sys.stderr)
time.sleep(60)
"""
    assert run_snippet(code, 3) == 5
    _, err = capsys.readouterr()
    first, *others = err.splitlines()
    assert first.startswith("mtjax.launch: process 1 of 3 failed") and "exit code 5" in first
    assert others[:lines] == [f"[1] reason {i}" for i in range(lines)]
    assert {"consequence 0", "[2] consequence 2"} <= set(others[lines:])
    assert sum("reason" in line for line in others) == lines


@pytest.mark.parametrize(("code", "expected"), [("pass", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_exit_code_is_that_of_the_process_that_failed(code, expected, capsys):
    assert run_snippet(f"if me == 1: {code}\nelse: time.sleep(60 * ({expected} > 0))") == expected
    assert ("SIGKILL" in capsys.readouterr().err) == (expected == 137)


def test_signals_are_passed_on_and_wait_for_the_grace_time(start):
    process = start([SCRIPTS / "stops.py"], options=("--grace", "1"))
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[1] ready\n", "ready\n"]
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert out == "saved\n"
    assert process.returncode == 128 + signal.SIGKILL


def test_gpus_are_shared_equally_and_the_cpu_is_split():
    assert share([], 2) is None
    assert share(list("abcde"), 2) == [["a", "b"], ["c", "d"]]
    with pytest.raises(ValueError, match="3 processes cannot share 2 GPUs"):
        share(["0", "1"], 3)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, 5"}) == ["3", "5"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    same = {"coordinator": "127.0.0.1:5", "num_processes": 2, "process_id": 1}
    on_gpu = environment({"A": "b"}, **same, gpus=["4", "5"])
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "4,5" and "JAX_PLATFORMS" not in on_gpu and on_gpu["A"] == "b"
    on_cpu = environment({"https_proxy": "x", "no_proxy": "y"}, **same, cpu_devices=3)
    assert (on_cpu["JAX_PLATFORMS"], on_cpu["JAX_NUM_CPU_DEVICES"]) == ("cpu", "3")
    assert on_cpu["no_proxy"] == "y,127.0.0.1,localhost"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2"], "the command to start is missing"),
        (["--processes", "0", "--", "python"], "must be at least 1"),
        (["--processes", "1", "--devices-per-process", "1", "--", "no-such-program"], "no-such-program"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert split_command(arguments)[0] == arguments[: arguments.index("--") if "--" in arguments else None]


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("what", ["agree", "collective"])
@pytest.mark.parametrize(("how", "code"), [("SIGKILL", 137), ("raises", 1), ("returns", 2), ("exits", 7)])
def test_the_end_of_one_process_ends_the_run(launch, how, code, what, who):
    began = time.monotonic()
    done = launch([SCRIPTS / "fails.py", how, who, what], devices=2, timeout=120)
    assert time.monotonic() - began < 60
    assert done.returncode == code
    reports = [line for line in done.stderr.splitlines() if line.startswith("mtjax.launch:")]
    assert reports[0].startswith(f"mtjax.launch: process {who} of 2 failed")
    assert reports[-1].startswith(f"mtjax.launch: process {who} failed first")


@pytest.mark.slow
def test_without_a_launcher_heartbeats_end_the_others_within_a_minute():
    with contextlib.ExitStack() as stack:
        command = [sys.executable, SCRIPTS / "fails.py", "SIGKILL", "1", "agree"]
        processes = []
        for variables in environments(2):
            del variables["MTJAX_LAUNCHED"]
            variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
            process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        assert processes[1].wait(timeout=120) == -signal.SIGKILL
        began = time.monotonic()
        _, err = processes[0].communicate(timeout=120)
        assert time.monotonic() - began < 60
        assert processes[0].returncode != 0
        assert "unhealthy" in err or "heartbeat" in err


@pytest.mark.slow
def test_a_slurm_job_is_detected(tmp_path):
    """The environment of two tasks on one node, as srun sets it; JAX derives the port from the number of the job."""
    job = str(free_port() % 4096)
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(2):
            variables = {name: value for name, value in os.environ.items() if not name.startswith("MTJAX_")}
            variables |= {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
            variables |= {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_STEP_NUM_NODES": "1"}
            variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
            command = [sys.executable, SCRIPTS / "together.py", tmp_path]
            process = subprocess.Popen(
                command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        (_, _), (out, err) = (process.communicate(timeout=120) for process in processes)
    check_together(tmp_path, 2)
    assert "printed by" not in out
    assert "[1] warning of 1" in err.splitlines()
