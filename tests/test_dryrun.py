"""Dry runs: what they say is what a step then has, and they need neither the devices nor the memory."""

import dataclasses
import json
import pathlib
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax import dryrun, sharding
from mtjax.collectives import totals
from mtjax.optim import graddrop, linear
from mtjax.train.loop import TrainConfig
from mtjax.train.problem import Problem
from mtjax.train.state import create_lanes
from mtjax.train.step import make_train_step

WIDTH, HIDDEN, ROWS = 64, 128, 32


class Task(NamedTuple):
    name: str


class Net(nn.Module):
    """Two maps without biases, whose sizes are easily counted."""

    width: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(nn.Dense(self.hidden, use_bias=False, name="in")(x))
        return nn.Dense(self.width, use_bias=False, name="out")(hidden)


def problem(width=WIDTH, hidden=HIDDEN, rows=ROWS) -> Problem:
    net = Net(width, hidden)

    def loss_fn(params, batch, rng):
        y = net.apply({"params": params}, batch["x"])
        return {"a": jnp.mean(y**2), "b": jnp.mean((y - batch["x"]) ** 2)}

    def init_params(key):
        return net.init(key, jnp.zeros((1, width)))["params"]

    train = {"x": np.broadcast_to(np.float32(0.5), (rows, width))}
    return Problem((Task("a"), Task("b")), train, train, loss_fn, init_params, evaluator=None)


def described(mesh, method=None, **sizes) -> dryrun.DryRun:
    config = TrainConfig(batch_size=ROWS)
    return dryrun.dry_run(problem(**sizes), method=method, optimizer=optax.adam, config=config, mesh=mesh)


@pytest.fixture(scope="module")
def by_data():
    return described("data=8")


@pytest.fixture(scope="module")
def by_fsdp():
    return described("data=2,fsdp=4")


def test_bytes_are_those_of_the_step_itself(by_fsdp):
    """State and batch of a real step, made on 8 devices: bytes on one of them."""
    the_problem, method = problem(), linear("sum")
    with jax.set_mesh(sharding.make_mesh("data=2,fsdp=4")) as mesh:
        state = create_lanes(the_problem.init_params, method, optax.adam, [0], [1e-3], num_tasks=2)
        batch = sharding.place_rows({"x": np.zeros((1, ROWS, WIDTH), np.float32)}, mesh or sharding.current_mesh(), 1)
        on_first = lambda leaf: leaf.addressable_shards[0].data.nbytes  # noqa: E731
        key = state.rng
        held = sum(map(on_first, jax.tree.leaves((state.replace(rng=()), batch)))) + jax.random.key_data(key).nbytes
        step = jax.jit(jax.vmap(make_train_step(the_problem.loss_fn, method, optax.adam)))
        after, _ = step(state, batch)
    assert by_fsdp.argument_bytes == held
    assert sum(by_fsdp.state_bytes.values()) + by_fsdp.batch_bytes == held
    assert by_fsdp.state_bytes["params"] == sum(map(on_first, jax.tree.leaves(after.params)))


def test_memory_by_arithmetic(by_data, by_fsdp):
    whole = 4 * 2 * WIDTH * HIDDEN
    assert by_data.state_bytes["params"] == by_data.gradient_bytes == whole == 4 * by_data.num_parameters
    assert by_fsdp.state_bytes["params"] == whole / 4
    assert by_data.state_bytes["opt_state"] == 2 * whole + 4  # two moments and a counter
    assert by_data.jacobian_bytes == 2 * whole
    assert by_data.batch_bytes == by_fsdp.batch_bytes == 4 * ROWS * WIDTH / 8 and by_fsdp.row_shards == 8
    # The state is donated: what is new is what the metrics take, to which the program adds a table of its outputs.
    assert by_data.alias_bytes == sum(by_data.state_bytes.values())
    assert 0 <= by_data.output_bytes - by_data.alias_bytes < 1024
    # At least the gradients, and no more than these, the activations and a copy of either.
    activations = 4 * (ROWS // 8) * (HIDDEN + WIDTH)
    assert whole <= by_data.temp_bytes <= 2 * (whole + 4 * activations) + 4096


def test_operations_by_arithmetic(by_data):
    # Forward, gradients of both maps, and of the hidden layer.
    products = 2 * (ROWS // 8) * WIDTH * HIDDEN * 5
    assert by_data.traced_flops == products
    # What Adam does to a parameter comes on top: with 4 rows to a device that is not little.
    assert products < by_data.flops < products + 20 * by_data.num_parameters


def test_gradients_are_reduced_once(by_data, by_fsdp):
    number, size = totals(by_data.found)["all-reduce"]
    assert by_data.gradient_bytes <= size <= by_data.gradient_bytes + 64 and number <= 4
    assert set(totals(by_data.found)) == {"all-reduce"}
    assert set(totals(by_fsdp.found)) > {"all-reduce"}, "parameters are gathered, or activations moved"
    assert by_data.sent_bytes == sum(one.sent for one in by_data.found)


def test_a_jacobian_is_what_it_costs_more(by_data):
    """A method on the entries of the Jacobian: K rows of gradients are reduced, and held."""
    every = described("data=8", graddrop())
    size = totals(every.found)["all-reduce"][1]
    assert every.jacobian_bytes <= size <= every.jacobian_bytes + 64
    assert every.temp_bytes >= by_data.temp_bytes + every.jacobian_bytes - every.gradient_bytes


def test_several_seeds_and_one_device():
    lanes = dryrun.dry_run(problem(), optimizer=optax.adam, config=TrainConfig(batch_size=ROWS), seeds=3)
    assert lanes.num_devices == 1 and not lanes.found
    assert lanes.num_parameters == 2 * WIDTH * HIDDEN and lanes.state_bytes["params"] == 3 * 4 * lanes.num_parameters
    assert lanes.batch_bytes == 3 * 4 * ROWS * WIDTH and lanes.traced_flops == 3 * 2 * 5 * ROWS * WIDTH * HIDDEN


def test_a_model_larger_than_the_memory():
    """4.3 billion parameters with Adam: 69 GB of state, of which an eighth on each device."""
    found = described("fsdp=8", width=2**15, hidden=2**16)
    assert found.num_parameters == 2**32
    assert sum(found.state_bytes.values()) > 2**33 > found.state_bytes["params"] == 2**31


def test_the_report_reads_well(by_fsdp):
    text = dryrun.report(by_fsdp)
    assert "mesh data=2, fsdp=4: 8 devices" in text and "16,384 parameters, 2 losses, 32 rows in a step" in text
    assert re.search(r"\n    parameters +16.00 KiB\n", text)
    assert "all-gather" in text and "peak, estimated" in text and "note" not in text
    uneven = dryrun.report(dataclasses.replace(by_fsdp, batch_size=30, row_shards=2))
    assert "note: 30 rows are not divided by data, fsdp, expert together, 8 devices, and are split over 2" in uneven


SCRIPT = """
import json, sys
import jax, numpy as np, optax
sys.path.insert(0, {folder!r})
from test_dryrun import problem
from mtjax import dryrun
from mtjax.train.loop import TrainConfig

def main():
    assert dryrun.in_child()
    config = TrainConfig(batch_size=32)
    found = dryrun.dry_run(problem(), optimizer=optax.adam, config=config, mesh=sys.argv[1], title="a script")
    print(json.dumps([jax.device_count(), found.num_devices, found.state_bytes["params"], sys.argv[2:]]))
    raise dryrun.DryRunDone(found)

if __name__ == "__main__":
    main()
"""


def child(folder: pathlib.Path, capfd, devices: int, mesh: str) -> list:
    """What the script prints when it is run with described devices."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(folder=str(pathlib.Path(__file__).parent)))
    assert not dryrun.in_child()
    assert dryrun.run_in_child([mesh, "--more"], devices, script=script) == 0
    return json.loads(capfd.readouterr().out)


def test_more_devices_than_there_are(tmp_path, capfd):
    assert child(tmp_path, capfd, 16, "data=4,fsdp=4") == [16, 16, WIDTH * HIDDEN * 2 * 4 / 4, ["--more"]]


@pytest.mark.slow
def test_more_devices_than_a_process_can_have(tmp_path, capfd):
    assert child(tmp_path, capfd, 4096, "data=512,fsdp=8") == [4096, 4096, WIDTH * HIDDEN * 2 * 4 / 8, ["--more"]]


@pytest.mark.parametrize("ending, status", [("sys.exit(7)", 7), ("sys.exit()", 0), ("sys.exit('no')", 1), ("", 0)])
def test_the_exit_status_is_that_of_the_script(ending, status, tmp_path, monkeypatch):
    script = tmp_path / "ends.py"
    script.write_text(f"import sys\nassert sys.argv[1:] == ['--mesh', 'data=8']\n{ending}\n")
    for name, value in dryrun.child_environment(8).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", [])
    assert dryrun.main(["--devices", "8", str(script), "--mesh", "data=8"]) == status


def test_all_of_several_trainings_are_described(by_data):
    seen = []

    def train(name):
        seen.append(name)
        raise dryrun.DryRunDone(by_data)

    with pytest.raises(dryrun.DryRunDone, match="dry run of training"):
        dryrun.each(["a", "b"], train)
    assert seen == ["a", "b"] and dryrun.each(seen, str.upper) == {"a": "A", "b": "B"}


def test_devices_are_shared_out_evenly():
    environments = {devices: dryrun.child_environment(devices) for devices in (7, 2048, 4096, 6000)}
    each = {devices: int(env["JAX_NUM_CPU_DEVICES"]) for devices, env in environments.items()}
    assert each == {7: 7, 2048: 2048, 4096: 2048, 6000: 2000}
    with pytest.raises(ValueError, match="at least one device, got 0"):
        dryrun.child_environment(0)


@pytest.mark.slow
def test_the_compiler_of_a_tpu_agrees(by_data):
    """Where `libtpu` is installed: a program for TPUs, on a machine without one."""
    pytest.importorskip("libtpu")
    found = dryrun.dry_run(
        problem(),
        optimizer=optax.adam,
        config=TrainConfig(batch_size=ROWS),
        mesh=dryrun.topology_mesh("v5e:2x4", "data=8"),
    )
    assert found.device == "TPU v5 lite" and found.state_bytes == by_data.state_bytes
    assert totals(found.found)["all-reduce"][1] == totals(by_data.found)["all-reduce"][1]
