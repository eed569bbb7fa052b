"""Speed of operator learning: training, data generation and inference, beside DeepXDE, PyTorch and SciPy.

    python experiments/bench/operators.py                  # what the device has, JSON and a table
    python experiments/bench/operators.py --only train     # this section again, the others as they were
    python experiments/bench/operators.py --quick          # the same path with tiny sizes, no file
    python experiments/bench/operators.py --render         # the table from the JSON

Both sides run in one process, in turns, on the same data and parameters. Numbers are medians over turns, with the
smallest and largest beside them, in wall time and in CPU time; turns that other processes disturbed are left out, and
compilation is timed apart. On a CPU everything is measured with one thread and with all: a process for each number, as
JAX takes its threads at its start. What is not installed (extra `bench`: PyTorch, DeepXDE; SciPy) is left out, and
said.

    train      steps of the Cartesian DeepONet (mean squared error, Adam) at the spec's Fisher and Darcy sizes
    data       Darcy solutions and Fisher instances per second, beside a loop over SciPy
    inference  query points per second of the demo network
    gpu        the training step with larger batches, as a share of the device's ceilings; only on a GPU

Results are in results/operators.json, those of a GPU in results/operators_gpu.json.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import operators_data as data
import operators_gpu as gpu
import operators_table as table
from operators_measure import in_turns, load, say
from operators_steps import (
    DARCY,
    FISHER,
    FISHER_GELU,
    Size,
    chunked,
    frozen_trunk,
    fused,
    library,
    multiply_adds,
    timed_training,
    written,
)

from mtjax.train.report import provenance

try:
    import operators_torch as theirs
except ImportError as error:
    theirs, MISSING = None, str(error)

FOLDER = pathlib.Path(__file__).parent
RESULTS = {"cpu": FOLDER / "results" / "operators.json", "gpu": FOLDER / "results" / "operators_gpu.json"}
TABLE = FOLDER / "OPERATORS_COST.md"


class Sizes:
    """What is run: everything, or tiny sizes for `--quick`."""

    train: Sequence[Size] = (FISHER, FISHER_GELU, DARCY)
    steps: int = 10  # of a turn
    turns: int = 9
    patience: float = 40.0  # seconds to wait for quiet moments, for each comparison
    seeds: int = 4
    fields, nodes, chunk, per_form, few = 128, 64, 16, 256, 6
    points, functions, seconds = 65536, 64, 0.2
    gpu: Sequence[Size] = (
        dataclasses.replace(FISHER, functions=3200),
        dataclasses.replace(DARCY, functions=1800, points=10000),
    )
    gpu_steps, matrix, megabytes = 20, 8192, 2048


class OnGpu(Sizes):
    """More at a time, as a GPU likes it."""

    fields, chunk, per_form, points, functions, patience = 512, 256, 2048, 1048576, 256, 2.0


class Quick(Sizes):
    train = (Size("Tiny", (6, 5, 8), (2, 7, 8), ("leaky_relu", "tanh"), 3, 12, chunk=4),)
    steps, turns, seeds, patience = 2, 2, 2, 0.0
    fields, nodes, chunk, per_form, few = 3, 17, 2, 2, 2
    points, functions, seconds = 64, 2, 0.01
    gpu = train
    gpu_steps, matrix, megabytes = 2, 64, 1


# Sections. Each returns rows: dictionaries of numbers and words.


def train(sizes: type[Sizes]) -> list[dict]:
    rows = []
    for size in sizes.train:
        rows += train_cell(size, sizes)
    return rows


def train_cell(size: Size, sizes: type[Sizes]) -> list[dict]:
    """All sides and variants at one size."""
    model, params, batch = size.model(), size.params(), size.batch()
    active, parts = size.model(active_output=True), chunked(batch, size.chunk)
    frozen, frozen_batch = frozen_trunk(model, params, batch)
    # (side, variant, whether the trunk's last map is activated, whether products are fused) -> what is timed
    functions = {}

    def ours(variant, value_and_grad, batch, *, scan=True, seeds=1, active=False, is_fused=False):
        key = ("mtjax", variant, active, is_fused)
        name = " ".join(map(str, key))
        functions[key] = timed_training(name, value_and_grad, params, batch, steps=sizes.steps, scan=scan, seeds=seeds)

    ours(table.BEST, library(model), batch, is_fused=True)
    ours("library, a program per step", library(model), batch, scan=False, is_fused=True)
    ours(f"library, scan, {sizes.seeds} seeds by vmap", library(model), batch, seeds=sizes.seeds, is_fused=True)
    ours("fused by hand, scan", fused(model), parts, is_fused=True)
    ours("as written, scan", written(model), batch)
    ours("active output, as written, scan", written(active), batch, active=True)
    ours("trunk frozen", frozen, frozen_batch)
    if theirs is not None:
        for variant, is_fused in (("as written", False), ("fused", True)):
            key = ("PyTorch", variant, False, is_fused)
            functions[key] = theirs.bare(
                " ".join(map(str, key)), size, params, batch, steps=sizes.steps, fused=is_fused
            )
        if theirs.deepxde is not None:
            for variant, is_active in (("linear output", False), ("active output", True)):
                key = ("DeepXDE", variant, is_active, False)
                functions[key] = theirs.with_deepxde(
                    " ".join(map(str, key)), size, params, batch, steps=sizes.steps, linear_output=not is_active
                )
    results = in_turns(functions.values(), turns=sizes.turns, patience=sizes.patience)
    rows = []
    for key, function in functions.items():
        side, variant, is_active, is_fused = key
        result = results[function.name]
        row = {"size": size.name, "functions": size.functions, "points": size.points, "side": side}
        row |= {"variant": variant, "active_output": is_active, **result, "per_s": round(1e3 / result["ms"], 1)}
        operations = 2e-6 * multiply_adds(size, fused=is_fused)
        known = variant != "trunk frozen" and result["cpu_ms"] > 0
        rows.append(row | {"gflops": round(operations / result["cpu_ms"], 1) if known else None})
        say(f"{size.name}: {side}, {variant}: {row['cpu_ms']} ms CPU, {row['ms']} ms wall")
    return rows


def generation(sizes: type[Sizes]) -> list[dict]:
    return data.generation(
        fields=sizes.fields,
        nodes=sizes.nodes,
        chunk=sizes.chunk,
        per_form=sizes.per_form,
        turns=min(sizes.turns, 5),
        few=sizes.few,
        patience=sizes.patience,
    )


def inference(sizes: type[Sizes]) -> list[dict]:
    return data.inference(
        points=sizes.points,
        functions=sizes.functions,
        turns=min(sizes.turns, 5),
        seconds=sizes.seconds,
        patience=sizes.patience,
    )


def on_gpu(sizes: type[Sizes]) -> list[dict]:
    return gpu.training(
        sizes.gpu,
        turns=min(sizes.turns, 5),
        steps=sizes.gpu_steps,
        matrix=sizes.matrix,
        megabytes=sizes.megabytes,
        torch_side=theirs,
    )


SECTIONS: dict[str, Callable[[type[Sizes]], list[dict]]] = {
    "train": train,
    "data": generation,
    "inference": inference,
    "gpu": on_gpu,
}


def defaults(platform: str) -> list[str]:
    """Sections of a device; training beside DeepXDE at the spec's small batches is a matter of the CPU."""
    return ["gpu", "inference", "data"] if platform == "gpu" else ["train", "data", "inference"]


def in_processes(section: str, counts: Sequence[int], argv: Sequence[str]) -> list[dict]:
    """The rows of a section with each number of threads, each measured by a process of its own."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "rows.json"
            command = [sys.executable, __file__, *argv, "--only", section, "--threads", str(count), "--rows", str(path)]
            subprocess.run(command, check=True)
            rows += json.loads(path.read_text())
    return rows


def main(argv: Sequence[str] | None = None) -> dict:
    """Runs the command line; returns the content of the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two turns, no file")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to run; default: what the device has")
    parser.add_argument("--threads", nargs="+", type=int, help="numbers of cores; default: 1 and all (GPU: all)")
    parser.add_argument("--turns", type=int, help="turns of each function")
    parser.add_argument("--patience", type=float, help="seconds to wait for quiet moments, for each comparison")
    parser.add_argument("--render", action="store_true", help="only write the table of the results that there are")
    parser.add_argument("--rows", type=pathlib.Path, help="write the rows of the section here, and nothing else")
    args = parser.parse_args(argv)
    if args.render:
        contents = [json.loads(path.read_text()) for path in RESULTS.values() if path.exists()]
        TABLE.write_text(table.render(contents))
        return contents[0]

    cores = sorted(os.sched_getaffinity(0))
    if args.threads and len(args.threads) == 1:
        cores = cores[-args.threads[0] :]
        os.sched_setaffinity(0, cores)  # before JAX looks at them
    where = provenance(outputs=[*RESULTS.values(), TABLE])
    platform = jax.default_backend()
    if theirs is None:
        say(f"PyTorch is not installed (pip install 'mtjax[bench]'): leaving it out ({MISSING})")
    else:
        where["versions"] |= theirs.setup(len(cores))
        if theirs.deepxde is None:
            say(f"DeepXDE cannot be used (pip install 'mtjax[bench]'): leaving it out ({theirs.WHY})")
    if data.missing_scipy():
        say(f"SciPy is not installed: leaving it out ({data.missing_scipy()})")

    sizes = type("Chosen", (Quick if args.quick else OnGpu if platform == "gpu" else Sizes,), {})
    sizes.turns = args.turns or sizes.turns
    sizes.patience = sizes.patience if args.patience is None else args.patience
    once = args.quick or platform == "gpu" or len(cores) == 1
    several = args.threads or ([len(cores)] if once else [1, len(cores)])
    shared = [*(["--quick"] if args.quick else []), "--turns", str(sizes.turns), "--patience", str(sizes.patience)]
    path = RESULTS.get(platform, RESULTS["gpu"])
    content = {"benchmark": "operators", "sections": {}}
    if not args.quick and path.exists():
        content = json.loads(path.read_text())
    for name in args.only or defaults(platform):
        began, busy = time.perf_counter(), load()
        if len(several) > 1 and name != "gpu":
            rows = in_processes(name, several, shared)
        else:
            rows = [row | {"threads": len(cores)} for row in SECTIONS[name](sizes)]
        seconds = round(time.perf_counter() - began, 1)
        if args.rows:
            args.rows.write_text(json.dumps(rows))
            return {"rows": rows}
        content["sections"][name] = {"where": where | {"load": busy}, "wall_s": seconds, "rows": rows}
        say(f"{name}: {seconds} s")
        if not args.quick:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
            TABLE.write_text(table.render([json.loads(p.read_text()) for p in RESULTS.values() if p.exists()]))
    for goal in table.goals(content):
        say(table.verdict(goal))
    return content


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    main()
