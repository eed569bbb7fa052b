r"""What a training step would cost on a mesh that is not there: compiled ahead of time, never run.

    python experiments/vision/m3vit.py --preset paper --mesh data=32,expert=8 --dry-run
    python -m mtjax.dryrun --devices 256 my_script.py                      # any script that calls `fit_problem`

The step is the one that training runs, `make_train_step` on the state of `create_lanes`. State and batch are shapes
with shardings; the compiler partitions the program for the described mesh, and no array of a full size is ever made, so
a model larger than this machine's memory is no obstacle. The devices are simulated by the CPU backend, which has to
know their number before it starts: `run_in_child` runs the script again in a process of its own that does. A process
has at most 2,048 of them; more take further, idle processes.

How far the numbers go:

* bytes of parameters, optimiser state, batches and per-task gradients are arithmetic on shapes and shardings: exact.
* bytes of temporaries are what the CPU compiler's buffer assignment reserves. Buffers are reused as on any backend, but
  bfloat16 is computed in float32 (up to twice the bytes of such activations), scores of attention are written out, and
  less is fused. Accelerators pad small dimensions to their tiles, a TPU the last one to 128, which is not in here:
  an upper bound for wide models and far too little for narrow ones (experiments/bench/SCALING.md has ratios).
* floating-point operations are the compiler's count, loops multiplied by their turns; operations are the same on any
  backend but for what is computed twice (rematerialisation by an accelerator's compiler, which this one does not do).
* collectives are those that the partitioner puts in. The CPU compiler leaves an all-reduce of which every device keeps
  a slice as it is, where accelerators use a reduce-scatter of half the bytes, and overlaps nothing.

With the package `libtpu`, on any machine, the TPU's own compiler can be asked instead: `mesh=topology_mesh(...)`.

Letters: L lanes (seeds), K tasks, B batch.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import pathlib
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mtjax import hlo, sharding
from mtjax.collectives import Collective, collectives, totals
from mtjax.described import (
    CHILD,
    MARKER,
    child_environment,
    described_devices,
    hold,
    in_child,
    topology_mesh,
)
from mtjax.macs import traced_macs
from mtjax.optim import linear
from mtjax.optim.base import Method
from mtjax.train.problem import Problem
from mtjax.train.state import OptimizerFactory, create_lanes
from mtjax.train.step import make_train_step

__all__ = [
    "DryRun",
    "DryRunDone",
    "dry_run",
    "each",
    "in_child",
    "report",
    "run_in_child",
    "topology_mesh",
]

PyTree = Any


class DryRunDone(Exception):
    """Raised in the place of a training that was only to be described.

    Attributes:
      result: its `DryRun`.
    """

    def __init__(self, result: "DryRun"):
        super().__init__(f"dry run of {result.title}")
        self.result = result


def each(names: Sequence[str], train: Callable[[str], Any]) -> dict[str, Any]:
    """`{name: train(name)}`: the models of a comparison, one after the other. In a dry run all of them are described.

    Raises:
      DryRunDone: after the last, if they were only to be described.
    """
    found, done = {}, None
    for name in names:
        try:
            found[name] = train(name)
        except DryRunDone as described:
            done = described
    if done is not None:
        raise done
    return found


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a step takes. Bytes and operations are those of one device.

    Attributes:
      title: what is trained.
      mesh: size of every axis.
      device: what it was compiled for.
      batch_size: B, rows of a step on all devices together, for each lane.
      row_shards: devices that the rows are split over: all but those along "tensor", if their number divides B.
      seeds: L.
      num_tasks: K.
      num_parameters: scalars of a lane.
      state_bytes: of each part of the training state: params, opt_state, method_state, best, ...
      batch_bytes: of the rows of a step.
      gradient_bytes: of the direction of the update.
      jacobian_bytes: of the per-task gradients as a whole, whether or not the method's route writes them out.
      argument_bytes, output_bytes, alias_bytes, temp_bytes: of the compiled program; `alias` is what arguments and
        outputs share (the state is donated), `temp` holds activations, gradients and whatever else is not kept.
      flops: floating-point operations.
      traced_flops: those of all products of the step as it is written, over the number of devices; more in `flops` is
        work that several devices do alike. None if a loop's length depends on the data.
      bytes_accessed: to and from memory by the compiler's estimate, loops multiplied by their turns.
      found: collectives.
      lower_s, compile_s: seconds.
    """

    title: str
    mesh: dict[str, int]
    device: str
    batch_size: int
    row_shards: int
    seeds: int
    num_tasks: int
    num_parameters: int
    state_bytes: dict[str, int]
    batch_bytes: int
    gradient_bytes: int
    jacobian_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    flops: float
    traced_flops: float | None
    bytes_accessed: float
    found: tuple[Collective, ...] = dataclasses.field(repr=False)
    lower_s: float
    compile_s: float

    @property
    def num_devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs that are not donated arguments, and temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    @property
    def sent_bytes(self) -> float:
        """That a device sends to others."""
        return sum(one.times * one.sent for one in self.found)


def dry_run(
    problem: Problem,
    *,
    method: Method | None = None,
    optimizer: OptimizerFactory,
    config: Any,
    mesh: jax.sharding.Mesh | str | None = None,
    seeds: int = 1,
    per_task: bool = False,
    title: str = "training",
    trace: bool = True,
) -> DryRun:
    """Lowers and compiles a step of `fit_problem`; nothing is run.

    Args:
      problem, method, optimizer: as for `fit_problem`.
      config: its `TrainConfig`.
      mesh: or a specification, see `mtjax.sharding.make_mesh`; None: the ambient one, or a single device.
      seeds: L, lanes trained at once.
      per_task: as for `fit_problem`.
      title: of the report.
      trace: whether to count the operations of the step as it is written, too.

    Returns:
      A `DryRun`.
    """
    method = linear("sum") if method is None else method
    if isinstance(mesh, str):
        mesh = sharding.make_mesh(mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        mesh = sharding.current_mesh()
        carries = problem.init_carry is not None
        step = make_train_step(config.loss(problem), method, optimizer, chunk_size=config.chunk_size, carries=carries)
        state = create_lanes(
            problem.init_params,
            method,
            optimizer,
            list(range(seeds)),
            [1e-3] * seeds,
            num_tasks=len(problem.loss_names),
            num_groups=len(problem.tasks) if per_task else 1,
            init_carry=problem.init_carry,
            abstract=True,
        )
        batch = abstract_batch(problem.train, config.batch_size, seeds, mesh)
        placed = {}
        if mesh is not None:
            placed = {"out_shardings": (jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh))}
        stepped = jax.vmap(step)
        began = time.perf_counter()
        # Also what the step does not read: it is there all the same.
        lowered = jax.jit(stepped, donate_argnums=0, keep_unused=True, **placed).lower(state, batch)
        lowered_at = time.perf_counter()
        devices = jax.devices() if mesh is None else mesh.devices.ravel().tolist()
        # Code generation, which comes after all that is read here, need not try hard.
        options = {"xla_backend_optimization_level": 0} if devices[0].platform == "cpu" else None
        compiled = lowered.compile(compiler_options=options)
        compiled_at = time.perf_counter()
        traced = traced_flops(stepped, state, batch) if trace else None
    program, memory, cost = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis()
    parsed, params, rows = hlo.parse(program), device_bytes(state.params), jax.tree.leaves(batch)[0].shape[1]
    return DryRun(
        title=title,
        mesh={"data": 1} if mesh is None else dict(mesh.shape),
        device=devices[0].device_kind,
        batch_size=rows,
        row_shards=1 if mesh is None else math.prod(mesh.shape[axis] for axis in sharding.batch_axes(rows, mesh)),
        seeds=seeds,
        num_tasks=len(problem.loss_names),
        num_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)) // seeds,
        state_bytes={field.name: device_bytes(getattr(state, field.name)) for field in dataclasses.fields(state)},
        batch_bytes=device_bytes(batch),
        gradient_bytes=params,
        jacobian_bytes=len(problem.loss_names) * params,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        flops=float(cost.get("flops", 0.0)) + hlo.repeated_flops(parsed),
        traced_flops=None if traced is None else traced / (1 if mesh is None else mesh.size),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)) + hlo.repeated_bytes(parsed),
        found=tuple(collectives(program)),
        lower_s=lowered_at - began,
        compile_s=compiled_at - lowered_at,
    )


def abstract_batch(train: Any, batch_size: int, seeds: int, mesh: jax.sharding.Mesh | None) -> PyTree:
    """Shapes of the rows of a step, [L, B, ...], and where they lie on the mesh.

    Args:
      train: columns [N, ...], or a stream, of which one batch is read.
      batch_size: B; of columns at most N.
      seeds: L.
      mesh: None: one device.
    """
    if isinstance(train, Mapping):
        columns = dict(train)
        size = min(batch_size, len(jax.tree.leaves(columns)[0]))
    else:
        columns = next(train.iterator())
        size = len(jax.tree.leaves(columns)[0]) * jax.process_count()

    def place(column):
        dtype = jax.dtypes.canonicalize_dtype(column.dtype)
        where = None if mesh is None else sharding.rows_sharding(size, mesh, axis=1)
        return jax.ShapeDtypeStruct((seeds, size, *column.shape[1:]), dtype, sharding=where)

    return jax.tree.map(lambda column: place(np.asarray(column)), columns)


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree of shapes on one device."""

    def size(leaf):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        # A key is one element to JAX, and an array of numbers to a device.
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), leaf.dtype)) if is_key else leaf
        return math.prod(shape) * words.dtype.itemsize * (math.prod(words.shape) if is_key else 1)

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def traced_flops(function: Any, *args: Any) -> float | None:
    """Floating-point operations of all products as they are written, None if a loop's length depends on the data."""
    try:
        return 2.0 * traced_macs(function, *args)
    except ValueError:
        return None


# Reports.


def report(result: DryRun) -> str:
    """A readable table of a dry run."""
    axes = ", ".join(f"{name}={size}" for name, size in result.mesh.items() if size > 1) or "one device"
    several = f", {result.seeds} seeds at once" if result.seeds > 1 else ""
    lines = [
        f"Dry run: {result.title}",
        f"  mesh {axes}: {result.num_devices:,} devices, compiled for {result.device}",
        f"  {result.num_parameters:,} parameters, {result.num_tasks} losses, {result.batch_size:,} rows in a step"
        f"{several}; lowered in {result.lower_s:.1f} s, compiled in {result.compile_s:.1f} s",
    ]
    wanted = math.prod(result.mesh.get(axis, 1) for axis in sharding.BATCH_AXES)
    if result.row_shards < wanted:
        lines.append(
            f"  note: {result.batch_size} rows are not divided by {', '.join(sharding.BATCH_AXES)} together, {wanted} "
            f"devices, and are split over {result.row_shards}: others compute the same again"
        )
    lines.append("  memory of one device")
    names = {"params": "parameters", "opt_state": "optimiser state", "best": "best parameters so far"}
    parts = {name: size for name, size in result.state_bytes.items() if size >= 1024 or name == "params"}
    rows = [(names.get(name, name.replace("_", " ")), readable_bytes(size)) for name, size in parts.items()]
    rows += [
        ("rows of a step", readable_bytes(result.batch_bytes)),
        ("temporaries (activations, gradients)", readable_bytes(result.temp_bytes)),
        ("peak, estimated", readable_bytes(result.peak_bytes)),
        ("gradients of all tasks, if written out", readable_bytes(result.jacobian_bytes)),
    ]
    lines += [f"    {name:<42}{value:>12}" for name, value in rows]
    lines += ["  work of one device in a step", f"    {'floating-point operations':<42}{result.flops:>12.3g}"]
    if result.traced_flops:
        share = result.flops / result.traced_flops
        lines.append(f"    {'as written, split evenly':<42}{result.traced_flops:>12.3g}  (compiled: {share:.2f} times)")
    lines.append("  sent and received")
    by_kind = totals(result.found)
    for kind, (number, size) in by_kind.items():
        sent = sum(one.times * one.sent for one in result.found if one.kind == kind)
        lines.append(f"    {number:>5} {kind:<20}{readable_bytes(size):>12} of results, {readable_bytes(sent)} sent")
    if not by_kind:
        lines.append("    nothing")
    if not all(one.known for one in result.found):
        lines.append("    some are in loops of unknown length, counted as one turn")
    return "\n".join(lines)


def readable_bytes(size: float) -> str:
    """Bytes with a unit.

    >>> readable_bytes(512), readable_bytes(3 * 2**30)
    ('512 B', '3.00 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    raise AssertionError


# Processes.


def run_in_child(argv: Sequence[str], num_devices: int, *, script: str | os.PathLike | None = None) -> int:
    """Runs a script again with the same arguments, in a process that simulates a number of devices.

    Args:
      argv: arguments of the script, without its name.
      num_devices: that the described mesh has.
      script: path of the script; None: the one that is running.

    Returns:
      Its exit status.
    """
    path = pathlib.Path(sys.argv[0] if script is None else script).resolve()
    command = [*CHILD, "--devices", str(num_devices), str(path), *argv]
    return subprocess.run(command, env=child_environment(num_devices), check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a script with described devices; see the module."""
    parser = argparse.ArgumentParser(prog="python -m mtjax.dryrun", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, required=True, help="number of devices of the described mesh")
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("script", nargs="?", help="Python file that trains something with mtjax")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args(argv)
    if os.environ.get(MARKER) != str(args.devices):  # JAX reads the environment when it is imported
        command = [*CHILD, *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=child_environment(args.devices), check=False).returncode
    if args.hold:
        hold(args.hold, args.devices, args.rank)
        return 0
    if args.script is None:
        parser.error("a script to run is needed")
    sys.argv = [args.script, *args.arguments]
    sys.path.insert(0, str(pathlib.Path(args.script).resolve().parent))
    with described_devices(args.devices):
        try:
            runpy.run_path(args.script, run_name="__main__")
        except DryRunDone:
            return 0
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
