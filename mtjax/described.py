"""Devices that are not there: simulated by a process of its own, or described to a compiler.

JAX's CPU backend has as many devices as it is told before it starts. A process numbers at most 2,048; for more, idle
processes are started, which hold theirs and compile nothing. A TPU slice can be described to the TPU's compiler by its
topology.
"""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

import jax

from mtjax import sharding

MARKER = "MTJAX_DRY_RUN"
"""Environment variable of a child process: the number of devices that are described."""
PER_PROCESS = 2048
"""Simulated devices that a process can have: their numbers are packed with that of the process."""
# Not with -m: this file would be there twice, and `DryRunDone` with it.
CHILD = (sys.executable, "-c", "import sys; from mtjax.dryrun import main; sys.exit(main())")


def in_child() -> bool:
    """Whether this process was started to describe a run rather than to train."""
    return MARKER in os.environ


def child_environment(num_devices: int) -> dict[str, str]:
    """The environment of a process that simulates a number of devices, or its share of them."""
    each = num_devices // _processes(num_devices)
    # Nothing of what is compiled here will run: it need not be kept, and what it took is not to be hidden.
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(each), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    root = str(pathlib.Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | own | {MARKER: str(num_devices), "PYTHONPATH": os.pathsep.join(paths)}


def _processes(num_devices: int) -> int:
    """How many processes with equal numbers of devices are needed."""
    if num_devices < 1:
        raise ValueError(f"A mesh has at least one device, got {num_devices}")
    return next(n for n in range(-(-num_devices // PER_PROCESS), num_devices + 1) if num_devices % n == 0)


def hold(address: str, num_devices: int, rank: int) -> None:
    """What a process does that only holds its share of the devices, until its input is closed."""
    jax.distributed.initialize(address, _processes(num_devices), rank)
    jax.devices()  # the processes tell each other what they have
    sys.stdin.read()
    jax.distributed.shutdown()


@contextlib.contextmanager
def described_devices(num_devices: int):
    """Inside, JAX has this many devices; it must not have been used before, and the environment be that of a child.

    For more than one process can hold, others are started which do nothing but hold theirs.
    """
    count = _processes(num_devices)
    if count == 1:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [*CHILD, "--devices", str(num_devices), "--hold", address, "--rank"]
    others = [subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE) for rank in range(1, count)]
    try:
        jax.distributed.initialize(address, count, 0)
        yield
    finally:
        for other in others:
            other.stdin.close()  # which they wait for: all of them leave together
        jax.distributed.shutdown()
        for other in others:
            other.wait(timeout=60)


def topology_mesh(topology: str, spec: str) -> jax.sharding.Mesh:
    """A mesh of TPUs that are not there, for which the TPU's compiler compiles; needs the package `libtpu`, and no TPU.

    Args:
      topology: generation and shape, such as 'v5e:4x4' or 'v5p:4x4x4'.
      spec: see `mtjax.sharding.make_mesh`.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would look for the machine that it runs on
    return sharding.make_mesh(spec, topologies.get_topology_desc(topology, platform="tpu").devices)
