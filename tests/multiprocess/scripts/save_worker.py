"""Checkpoints in several processes; a test runs it in two, and reads what it prints and leaves behind.

python save_worker.py OTHER RUN: restores the checkpoint that one process wrote to OTHER, saves to RUN, damages parts
there that process 1 alone reads, restores, and saves again.
"""

import json
import pathlib
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import distributed
from mtjax.sharding import make_mesh
from mtjax.train.checkpoint import Checkpoints

SPECS = {
    "w": jax.P(("data", "fsdp"), "tensor"),  # each process has rows of its own
    "half": jax.P("data"),
    "keys": jax.P("data"),
    "step": jax.P(),
    "empty": jax.P(),
    "mask": jax.P(("data", "fsdp")),
}


def numbers(step: int) -> dict[str, np.ndarray]:
    """What a state holds, on the host."""
    rng = np.random.default_rng(step)
    return {
        "w": rng.normal(size=(64, 64)).astype(np.float32),
        "half": rng.normal(size=(8,)).astype(jnp.bfloat16),
        "keys": np.asarray(jax.random.key_data(jax.random.split(jax.random.key(step), 4))),
        "step": np.asarray(step, np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "mask": rng.random(16) < 0.5,
    }


def make_state(mesh: jax.sharding.Mesh, step: int) -> dict[str, jax.Array]:
    """The state, spread over a mesh; the same numbers on every mesh."""

    def place(name: str, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, jax.NamedSharding(mesh, SPECS[name]), lambda i: array[i])

    state = {name: place(name, array) for name, array in numbers(step).items()}
    state["keys"] = jax.jit(jax.random.wrap_key_data)(state["keys"])
    return state


def make_target(mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings only."""
    shapes = make_state(make_mesh("data=1", jax.local_devices()[:1]), 0)
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, SPECS[name]))
        for name, leaf in shapes.items()
    }


def check(state: dict[str, Any], step: int, mesh: jax.sharding.Mesh) -> None:
    """Every part that this process has is right, and where it was asked for."""
    expected = numbers(step)
    assert state.keys() == expected.keys()
    for name, leaf in state.items():
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, SPECS[name]), leaf.ndim), name
        data = jax.random.key_data(leaf) if name == "keys" else leaf
        assert data.dtype == expected[name].dtype
        for shard in data.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[name][shard.index], err_msg=name)


def main(other: pathlib.Path, run: pathlib.Path) -> None:
    distributed.initialize()
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    said = {"processes": jax.process_count()}

    before = Checkpoints(other).restore(make_target(mesh))
    check(before.state, before.step, mesh)
    said["from_one_process"] = before.record

    checkpoints = Checkpoints(run, max_to_keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(mesh, step), {"step": step})
    checkpoints.close()
    if distributed.is_main():
        # Step 3: numbers of process 1 that can be read and are wrong. Step 2: files that it cannot read.
        for path in (run / "3" / "state" / "ocdbt.process_1" / "d").iterdir():
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        for path in (run / "2" / "state" / "ocdbt.process_1" / "d").iterdir():
            path.write_bytes(path.read_bytes()[:10])
    distributed.barrier("damaged")

    checkpoints = Checkpoints(run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = checkpoints.restore(make_state(mesh, 0))
    check(restored.state, restored.step, mesh)
    said |= {"restored": restored.step, "warnings": [str(warning.message) for warning in caught]}
    checkpoints.save(2, make_state(mesh, 2), {"step": 2})
    try:
        checkpoints.save(3, {"here": jnp.ones(3)}, {})  # on a device of this process alone
    except ValueError as error:
        said["refused"] = str(error)
    checkpoints.close()
    if distributed.is_main():
        print(json.dumps(said))


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
