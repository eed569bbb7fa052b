"""Cost of mixtures of experts: every dispatch beside the dense network that does as many multiply-adds.

    python experiments/bench/moe.py                            # all sections, JSON and a table
    python experiments/bench/moe.py --sections dispatch seeds  # these again, the others as they were
    python experiments/bench/moe.py --quick                    # the same path with tiny sizes, no file
    python experiments/bench/moe.py --render                   # the table from the JSON

Everything that is compared runs in one process, in turns. Times are medians over turns by the clock and in CPU time;
turns that other processes disturbed are left out; compilation is timed apart. Each section is measured with one thread
and with all, by a process for each, as JAX takes its threads at its start.

    dispatch  all backends at shapes A, B, C, forward and forward and backward
    small     backends at shape C with few tokens
    skew      backends that never drop, where experts are used unevenly
    seeds     four seeds by vmap, with data and parameters of their own
    parallel  bytes between 8 (simulated) devices: the compiled program's and the formula's
    step, extract, compile    whole models: see moe_models.py

Results are in results/moe.json and MOE_COST.md. The choice of `Dispatch('auto')` rests on them.
"""

import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import moe_cases as cases
import moe_models as models
import moe_table as table
from operators_measure import in_turns, load, say

from mtjax.nn.moe import Dispatch
from mtjax.nn.moe_parallel import communication_volume, moe_apply_parallel
from mtjax.train.report import provenance

FOLDER = pathlib.Path(__file__).parent
RESULTS, TABLE = FOLDER / "results" / "moe.json", FOLDER / "MOE_COST.md"
PASSES = {"forward": False, "forward and backward": True}
DEVICES = 8


class Sizes:
    """What is run: everything, or tiny sizes for `--quick`."""

    shapes: Sequence[cases.Shape] = (cases.A, cases.B, cases.C)
    small: Sequence[cases.Shape] = cases.SMALL
    seeds: int = 4
    skew: float = 1.0
    turns: int = 9
    patience: float = 30.0  # seconds to wait for quiet moments, for each comparison
    seconds: float = 0.03  # of a turn
    quick: bool = False


class Quick(Sizes):
    shapes = (cases.Shape("tiny", 32, 6, 5, 4, 2),)
    small = ()
    seeds, turns, patience, seconds, quick = 2, 2, 0.0, 0.0, True


# Sections. Each returns rows: dictionaries of numbers and words.


def dispatch(sizes: type[Sizes]) -> list[dict]:
    return [row for shape in sizes.shapes for row in compared(shape, cases.BACKENDS, sizes)]


def small(sizes: type[Sizes]) -> list[dict]:
    names = ("auto", "capacity_overflow", "block_dropless", "all_experts")
    return [row for shape in sizes.small for row in compared(shape, names, sizes)]


def skew(sizes: type[Sizes]) -> list[dict]:
    names = ("auto", "block_dropless", "sort_capacity 1.25", "sort_capacity 2.0")
    return [row for shape in sizes.shapes for row in compared(shape, names, sizes, skew=sizes.skew)]


def seeds(sizes: type[Sizes]) -> list[dict]:
    names = ("auto", "block_dropless", "sort_capacity 1.25")
    return [row for shape in sizes.shapes for row in compared(shape, names, sizes, seeds=sizes.seeds)]


def compared(shape: cases.Shape, names: Sequence[str], sizes: type[Sizes], **options) -> list[dict]:
    """Rows of one shape: the dense network and the backends `names`, and the ratios of the latter to the former."""
    rows = []
    for name, backward in PASSES.items():
        functions = cases.cases(shape, names, backward=backward, seconds=sizes.seconds, **options)
        results = in_turns(functions, turns=sizes.turns, patience=sizes.patience)
        base = results[cases.DENSE]
        for function in functions:
            result = results[function.name]
            row = {"shape": shape.name, "pass": name, "dispatch": function.name, **options, **result}
            row |= {"ratio": result["ms"] / base["ms"], "cpu_ratio": result["cpu_ms"] / max(base["cpu_ms"], 1e-9)}
            row["quiet"] = result["quiet"] and base["quiet"]
            is_dense = function.name == cases.DENSE
            row["dropped"] = None if is_dense else cases.dropped(shape, function.name, skew=options.get("skew", 0.0))
            rows.append(row)
            say(
                f"{shape.name}, {name}: {function.name}: {row['ms']} ms, {row['ratio']:.2f} x dense "
                f"(CPU {row['cpu_ratio']:.2f} x)"
            )
    return rows


def parallel(sizes: type[Sizes]) -> list[dict]:
    """Needs `DEVICES` devices; nothing is run, only compiled."""
    rows = []
    mesh = jax.make_mesh((DEVICES,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    for size in sizes.shapes:
        shape = size._replace(experts=max(size.experts, DEVICES))
        form = Dispatch("sort_capacity")

        def apply(*arguments, form=form):
            return moe_apply_parallel(*arguments, mesh=mesh, dispatch=form).y

        arguments = jax.eval_shape(lambda shape=shape: cases.layer(shape))
        text = jax.jit(apply).lower(*arguments).compile().as_text()
        operands = [
            sum(4 * math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", kinds))
            for kinds in re.findall(r"= \(?(.*?)\)? all-to-all(?:-start)?\(", text)
        ]
        volume = communication_volume(shape.tokens, shape.top_k, shape.experts, shape.width, shards=DEVICES)
        row = {"shape": shape.name, "devices": DEVICES, "all_to_alls": len(operands)}
        row |= {"operand_compiled": max(operands), "operand_formula": volume.operand, "sent_forward": volume.forward}
        rows.append(row | {"equal": set(operands) == {volume.operand}})
        say(f"parallel, {shape.name}: {row}")
    return rows


SECTIONS: dict[str, Callable[[type[Sizes]], list[dict]]] = {
    "dispatch": dispatch,
    "small": small,
    "skew": skew,
    "seeds": seeds,
    "parallel": parallel,
    "step": models.step,
    "extract": models.extract,
    "compile": models.compile_time,
}


def in_processes(section: str, counts: Sequence[int], argv: Sequence[str]) -> list[dict]:
    """The rows of a section with each number of threads, each measured by a process of its own."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "rows.json"
            command = [
                sys.executable,
                __file__,
                *argv,
                "--sections",
                section,
                "--threads",
                str(count),
                "--rows",
                str(path),
            ]
            environment = os.environ | ({"JAX_NUM_CPU_DEVICES": str(DEVICES)} if section == "parallel" else {})
            subprocess.run(command, check=True, env=environment)
            rows += json.loads(path.read_text())
    return rows


def main(argv: Sequence[str] | None = None) -> dict:
    """Runs the command line; returns the content of the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two turns, no file, in this process")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to run")
    parser.add_argument("--threads", nargs="+", type=int, help="numbers of cores; default: 1 and all")
    parser.add_argument("--turns", type=int, help="turns of each function")
    parser.add_argument("--patience", type=float, help="seconds to wait for quiet moments, for each comparison")
    parser.add_argument("--render", action="store_true", help="only write the table of the results that there are")
    parser.add_argument("--rows", type=pathlib.Path, help="write the rows of the sections here, and nothing else")
    args = parser.parse_args(argv)
    if args.render:
        content = json.loads(RESULTS.read_text())
        TABLE.write_text(table.render(content))
        return content

    cores = sorted(os.sched_getaffinity(0))
    if args.rows and args.threads:
        cores = cores[-args.threads[0] :]
        os.sched_setaffinity(0, cores)  # before JAX looks at them
    sizes = type("Chosen", (Quick if args.quick else Sizes,), {})
    sizes.turns = args.turns or sizes.turns
    sizes.patience = sizes.patience if args.patience is None else args.patience
    if args.rows:
        rows = [row | {"threads": len(cores)} for name in args.sections for row in SECTIONS[name](sizes)]
        args.rows.write_text(json.dumps(rows))
        return {"rows": rows}

    where = provenance(outputs=[RESULTS, TABLE])
    shared = ["--turns", str(sizes.turns), "--patience", str(sizes.patience)]
    content = {"benchmark": "moe", "sections": {}}
    if not args.quick and RESULTS.exists():
        content = json.loads(RESULTS.read_text())
    for name in args.sections:
        began, busy = time.perf_counter(), load()
        if args.quick:
            rows = [row | {"threads": len(cores)} for row in SECTIONS[name](sizes)]
        else:
            several = [1] if name in ("parallel", "compile") else args.threads or sorted({1, len(cores)})
            rows = in_processes(name, several, shared)
        seconds = round(time.perf_counter() - began, 1)
        content["sections"][name] = {"where": where | {"load": busy}, "wall_s": seconds, "rows": rows}
        say(f"{name}: {seconds} s")
        if not args.quick:
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
            TABLE.write_text(table.render(content))
    for goal in table.goals(content):
        say(str(goal))
    return content


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    main()
