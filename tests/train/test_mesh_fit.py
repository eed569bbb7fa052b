"""The loop on a mesh: the numbers of one device, the state where it belongs, resumed on another mesh."""

import contextlib
import dataclasses
import shutil
from typing import NamedTuple

import jax
import numpy as np
import pytest

from mtjax import sharding
from mtjax.train import Fit


class Run(NamedTuple):
    """A run, its final state as arrays, and its directory."""

    fitted: Fit
    arrays: dict
    directory: object


@pytest.fixture(scope="module")
def train(toy):
    """`(spec or None, directory, devices=None, resume=False) -> Run`."""
    config = dataclasses.replace(toy.CONFIG, max_epochs=2, conflict_rows=8, checkpoint_every=2)

    def train(spec, directory, devices=None, *, resume=False) -> Run:
        mesh = contextlib.nullcontext() if spec is None else jax.set_mesh(sharding.make_mesh(spec, devices))
        with mesh:
            fitted = toy.train_toy(directory, config=config, width=256, resume=resume)
            return Run(fitted, toy.arrays(fitted.state), directory)

    return train


@pytest.fixture(scope="module")
def one_device(train, tmp_path_factory):
    return train(None, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def three_axes(train, tmp_path_factory):
    return train("data=2,fsdp=2,tensor=2", tmp_path_factory.mktemp("three") / "run")


def check_same(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def check_history(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-4)
        np.testing.assert_allclose(ours["cosine"], theirs["cosine"], atol=1e-4)
        np.testing.assert_allclose(ours["metrics"]["sold"]["auroc"], theirs["metrics"]["sold"]["auroc"], atol=1e-3)


def test_a_run_on_a_mesh_is_that_of_one_device(one_device, three_axes):
    check_same(three_axes.arrays, one_device.arrays)
    check_history(three_axes.fitted.history, one_device.fitted.history)


def test_the_state_stays_where_it_belongs(three_axes):
    state = three_axes.fitted.state
    where = sharding.shardings(state, state.step.sharding.mesh)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
    assert state.params["shared"]["kernel"].addressable_shards[0].data.shape == (2, 7, 128)  # [L, 7, 256] by fsdp=2


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["data=8", "fsdp=8"])
def test_other_meshes_agree_too(train, one_device, spec, tmp_path):
    run = train(spec, tmp_path / "run")
    check_same(run.arrays, one_device.arrays)
    check_history(run.fitted.history, one_device.fitted.history)


@pytest.mark.parametrize("spec, count", [(None, 1), pytest.param("data=2", 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_fewer_devices(train, three_axes, spec, count, tmp_path):
    run = shutil.copytree(three_axes.directory, tmp_path / "run")
    steps = sorted(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))
    shutil.rmtree(run / "checkpoints" / str(steps[-1]))  # as if it had been killed before its last save
    resumed = train(spec, run, jax.devices()[:count], resume=True)
    check_same(resumed.arrays, three_axes.arrays)
    check_history(resumed.fitted.history, three_axes.fitted.history)
