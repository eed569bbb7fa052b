"""What a run survives: drills that kill, stop, move and compare runs, and write what was found.

    python experiments/drills/survive.py              # about an hour on two CPU cores
    python experiments/drills/survive.py --quick      # a few of each

* kills while a checkpoint is being written: after every one a good checkpoint has to be there;
* SIGKILL to one of two processes in the middle of training: the others have to end, and the run that goes on has to end
  in the bits of one that was never killed;
* SIGTERM: how long until the state is saved and the processes are gone;
* a run in two processes beside the same in one, and beside what rounding alone does to it;
* a run that is moved from 8 devices to 2 to 1, and from two processes to one;
* a training step of every model on every mesh, with the sum, PCGrad and MGDA by both routes, beside that of one device
  (tests/test_mesh_models.py).

Results: experiments/results/drills/survive.json (not of the preset `--quick`).
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree

import numpy as np
from kill_during_save import kill_during_save
from workload import CONFIG, SAVE_EVERY

from mtjax.train import report

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULT = ROOT / "experiments" / "results" / "drills" / "survive.json"
WORKLOAD = [sys.executable, str(HERE / "workload.py")]
MESH = "data=2,fsdp=4"
PATIENCE_S = 300


def start(run: pathlib.Path, result: pathlib.Path, *more: str, mesh: str | None, processes: int, devices: int):
    """Starts the workload through the launcher, in a process group of its own."""
    launcher = ["-m", "mtjax.launch", "--processes", str(processes), "--devices-per-process", str(devices), "--"]
    where = ([] if mesh is None else ["--mesh", mesh]) + (["--distributed"] if processes > 1 else [])
    command = [sys.executable, *launcher, *WORKLOAD, str(run), str(result), *where, *more]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Its exit status and what it said to stderr."""
    try:
        errors = process.communicate(timeout=PATIENCE_S)[1]
    except subprocess.TimeoutExpired:
        for number in (*workers(process), process.pid):
            os.kill(number, signal.SIGKILL)
        raise
    return process.returncode, errors


def whole(folder: pathlib.Path, name: str, *more: str, mesh: str | None, processes: int, devices: int) -> dict:
    """The bits of a run to its end."""
    result = folder / f"{name}.npz"
    status, errors = finish(start(folder / name, result, *more, mesh=mesh, processes=processes, devices=devices))
    if status != 0:
        raise RuntimeError(f"The run '{name}' ended with status {status}:\n{errors[-2000:]}")
    with np.load(result, allow_pickle=False) as arrays:
        return dict(arrays)


def newest(run: pathlib.Path) -> int:
    """Step of the newest finished checkpoint; -1 if there is none."""
    folder = run / "checkpoints"
    steps = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()] if folder.exists() else []
    return max(steps, default=-1)


def wait_for(run: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    """Until a checkpoint of at least that step is there."""
    ends = time.monotonic() + PATIENCE_S
    while newest(run) < step:
        if process.poll() is not None or time.monotonic() > ends:
            raise RuntimeError(f"The run in {run} came to no checkpoint {step}")
        time.sleep(0.02)


def workers(process: subprocess.Popen) -> list[int]:
    """Process numbers of the workload's processes, in the order of their ranks."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            rank = [entry.split(b"=", 1)[1] for entry in environment if entry.startswith(b"MTJAX_PROCESS_ID=")]
            if parent == process.pid and rank:
                found.append((int(rank[0]), int(path.name)))
    return [number for _, number in sorted(found)]


def difference(found: dict, expected: dict) -> float:
    """Largest relative difference of the losses along two runs."""
    ours, theirs = found["losses"], expected["losses"]
    return float((np.abs(ours - theirs) / np.abs(theirs)).max())


def same_bits(found: dict, expected: dict) -> bool:
    return all(found[name].tobytes() == value.tobytes() for name, value in expected.items())


def kill_one_process(folder: pathlib.Path, expected: dict, times: int, seed: int) -> dict:
    """SIGKILL to one of two processes at random steps; the run goes on and has to end in the expected bits."""
    rng = np.random.default_rng(seed)
    steps = ROWS_STEPS
    ended, lost, equal = [], [], 0
    for number in range(times):
        name = f"killed_{number}"
        run, victim = folder / name, int(rng.integers(2))
        process = start(run, folder / "never.npz", mesh=MESH, processes=2, devices=4)
        wait_for(run, int(rng.integers(SAVE_EVERY, steps - 2 * SAVE_EVERY)), process)
        before = newest(run)
        began = time.perf_counter()
        os.kill(workers(process)[victim], signal.SIGKILL)
        status, errors = finish(process)
        ended.append(time.perf_counter() - began)
        if status == 0 or f"process {victim}" not in errors.lower():
            raise RuntimeError(f"The launcher did not say that process {victim} was killed: {status}, {errors[-500:]}")
        lost.append(max(0, before - newest(run)))
        found = whole(folder, name, "--resume", mesh=MESH, processes=2, devices=4)
        equal += same_bits(found, expected)
    return {
        "kills": times,
        "ended_in_the_same_bits": equal,
        "seconds_until_all_had_ended": [round(s, 1) for s in ended],
        "finished_checkpoints_lost": max(lost),
        "save_interval_steps": SAVE_EVERY,
    }


ROWS_STEPS = CONFIG.max_epochs * 64
"""Steps of a whole run: 2,048 rows in batches of 32."""


def stop_and_move(folder: pathlib.Path, expected: dict) -> dict:
    """SIGTERM on 8 devices in two processes, on with 2 devices of one, stopped again, on with one device."""
    run, seconds = folder / "moved", []
    for resume, mesh, processes, devices in ((False, MESH, 2, 4), (True, "data=2", 1, 2)):
        more = ["--resume"] if resume else []
        process = start(run, folder / "never.npz", *more, mesh=mesh, processes=processes, devices=devices)
        wait_for(run, newest(run) + 3 * SAVE_EVERY, process)
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        status, errors = finish(process)
        seconds.append(round(time.perf_counter() - began, 1))
        if status != 130:
            raise RuntimeError(f"A run that was asked to stop ended with status {status}:\n{errors[-2000:]}")
    found = whole(folder, "moved", "--resume", mesh=None, processes=1, devices=1)
    return {
        "route": "2 processes x 4 devices -> 2 devices -> 1 device",
        "seconds_from_SIGTERM_to_the_end": seconds,
        "largest_relative_difference_of_losses": difference(found, expected),
    }


def meshes_agree(quick: bool) -> dict:
    """Runs tests/test_mesh_models.py and counts."""
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch) / "junit.xml"
        which = ["-m", "not slow"] if quick else ["-m", "slow or not slow"]
        command = [sys.executable, "-m", "pytest", "tests/test_mesh_models.py", *which, "-n", "2", f"--junitxml={out}"]
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        cases = xml.etree.ElementTree.parse(out).getroot().iter("testcase")
        cases = [(case.get("name"), not list(case)) for case in cases if "[" in case.get("name")]
    return {
        "cases": len(cases),
        "agreed": sum(passed for _, passed in cases),
        "tolerance": 1e-5,
        "disagreed": [name for name, passed in cases if not passed],
    }


DRILLS = ("saves", "processes", "killed", "moved", "meshes")


def run(drill: str, folder: pathlib.Path, seed: int, quick: bool) -> dict:
    """One drill. Runs that several of them compare with are made once."""

    def reference(name: str, mesh: str | None, processes: int, devices: int, *more: str) -> dict:
        if (folder / f"{name}.npz").exists():
            with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
                return dict(arrays)
        return whole(folder, name, *more, mesh=mesh, processes=processes, devices=devices)

    def two() -> dict:
        return reference("two", MESH, 2, 4)

    if drill == "saves":
        (folder / "saves").mkdir()
        return kill_during_save(3 if quick else 30, seed, folder / "saves")
    if drill == "processes":
        eight, alone = reference("one", MESH, 1, 8), reference("alone", None, 1, 1)
        return {
            "what": "largest relative difference of the losses of two trainings of 128 steps",
            "2 processes x 4 devices, 1 process x 8 devices": difference(two(), eight),
            # How far apart rounding alone drives two trainings: the same program, inputs of one bit more.
            "1 x 8, the same with inputs that are one unit in the last place larger": difference(
                reference("nudged", MESH, 1, 8, "--nudge"), eight
            ),
            # On a CPU one device draws dropout for each chunk of rows, and eight have one chunk each.
            "2 x 4, 1 device (other dropout masks)": difference(two(), alone),
        }
    if drill == "killed":
        return kill_one_process(folder, two(), 1 if quick else 3, seed)
    if drill == "moved":
        return stop_and_move(folder, two())
    return meshes_agree(quick)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drills", nargs="+", choices=DRILLS, default=DRILLS, help="which; the others' figures stay")
    parser.add_argument("--quick", action="store_true", help="a few of each drill; writes no result")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: 0)")
    args = parser.parse_args()
    where = report.provenance(outputs=[RESULT])
    with tempfile.TemporaryDirectory() as scratch:
        for drill in args.drills:
            print(f"{drill} ...", flush=True)
            began = time.perf_counter()
            found = run(drill, pathlib.Path(scratch), args.seed, args.quick)
            print(json.dumps(found), flush=True)
            if not args.quick:
                content = json.loads(RESULT.read_text()) if RESULT.exists() else {}
                wall_s = round(time.perf_counter() - began, 1)
                content[drill] = {"found": found, "seed": args.seed, "wall_s": wall_s, "provenance": where}
                RESULT.parent.mkdir(parents=True, exist_ok=True)
                RESULT.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
