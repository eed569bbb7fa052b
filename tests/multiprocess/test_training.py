"""Training in several processes: the numbers of one process, also after one of them was killed and all came back."""

import pathlib

import numpy as np
import pytest

TOY = pathlib.Path(__file__).parents[1] / "train" / "toy.py"
MESH = "data=2,fsdp=4"


def results(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "history"}


def train(launch, run, *more, processes, devices):
    result = run.with_suffix(".npz")
    done = launch([TOY, run, result, "--mesh", MESH, *more], processes=processes, devices=devices, timeout=240)
    assert done.returncode == 0, done.stderr
    return results(result)


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(launch, tmp_path):
    one = train(launch, tmp_path / "one", processes=1, devices=8)
    two = train(launch, tmp_path / "two", "--distributed", processes=2, devices=4)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
