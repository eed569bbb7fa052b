"""Checkpoints across processes: 1 -> 2 processes, 2 -> 1, other meshes, and damage that one process sees alone."""

import importlib.util
import json
import pathlib

import jax
import pytest

from mtjax.sharding import make_mesh
from mtjax.train.checkpoint import Checkpoints

SCRIPTS = pathlib.Path(__file__).parent / "scripts"


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("save_worker", SCRIPTS / "save_worker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_processes_and_one(worker, launch, tmp_path):
    other, run = tmp_path / "other", tmp_path / "run"
    checkpoints = Checkpoints(other)
    checkpoints.save(7, worker.make_state(make_mesh("fsdp=4,tensor=2"), 7), {"by": "one process"})
    checkpoints.close()

    done = launch([SCRIPTS / "save_worker.py", other, run], processes=2, devices=4)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout[done.stdout.index("{") :])
    assert said["processes"] == 2 and said["from_one_process"] == {"by": "one process"}
    # Process 0 had read its parts well both times; all went back together, and it moved the folders.
    assert said["restored"] == 1
    wrong, unreadable = said["warnings"]
    assert "Checkpoint 3 in" in wrong and "1 of its arrays do not match their checksums, the first is w" in wrong
    assert "Checkpoint 2 in" in unreadable and "(another process cannot read it); trying step 1" in unreadable
    assert sorted(path.name for path in (tmp_path / "damaged_checkpoints").iterdir()) == ["2.1", "3.1"]
    assert said["refused"].startswith("Cannot save here: there are 2 processes and it lies in one of them only")

    # What two processes wrote, in one process: on 8, 2 and 1 devices, and split along other axes.
    for spec, count in (("data=4,fsdp=2", 8), ("fsdp=2,tensor=4", 8), ("tensor=2", 2), ("data=1", 1)):
        mesh = make_mesh(spec, jax.devices()[:count])
        step, state, record = Checkpoints(run).restore(worker.make_target(mesh))
        assert step == 2 and record == {"step": 2}
        worker.check(state, 2, mesh)
