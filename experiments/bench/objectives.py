"""What multi-objective methods cost: mtjax beside TorchJD, and against its own plain step.

    python experiments/bench/objectives.py                     # all sections, JSON and a table
    python experiments/bench/objectives.py --only steps memory # these again, the others as they were
    python experiments/bench/objectives.py --quick             # the same path with tiny sizes, no file
    python experiments/bench/objectives.py --render            # the table from the JSON

Both sides run in one process, in turns, on the same network (a shared MLP of four hidden layers, K outputs, every
parameter shared), the same batch (96) and optimiser (Adam), with the same cores. Numbers are medians over turns, with
the smallest and largest beside them; compilation is timed apart. Without TorchJD (extra `bench`) mtjax runs alone.

Sections, with K in {2, 8, 16, 40} tasks and P in {1e5, 1e6, 1e7} parameters:

    weightings   the rule alone: K x K Gramian in, K weights out
    aggregators  the method on a given Jacobian, and its update from the loss function, beside the bare Jacobian
    steps        the whole step: forward, gradients, method, Adam, as a multiple of the side's own step on the sum
    methods      the whole step of every method of mtjax at P = 1e6, K = 8 and 40
    compile      seconds of tracing and compiling a step for K = 2 and K = 40
    routes       representation, directional derivatives, disjoint examples: a transformer, K = 8
    memory       temporary memory of each route: 8-layer MLP of width 1024, K = 8

Letters: K tasks, P parameters.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import objectives_routes as routes
import objectives_table as table
import optax
from objectives_measure import (
    LEARNING_RATE,
    Network,
    Timed,
    compiled,
    in_turns,
    losses_of,
    make_network,
    method_step,
    plain_step,
    release,
    timed_call,
    timed_step,
    width_for,
)

import mtjax
from mtjax.train.report import provenance

sys.path.append(str(pathlib.Path(__file__).parents[1] / "objectives"))
from methods import METHODS

try:
    import objectives_torch as theirs
except ImportError as error:
    theirs, MISSING = None, str(error)

# One pair of files for each kind of device.
KIND = "" if jax.default_backend() == "cpu" else f"_{jax.default_backend()}"
RESULTS = pathlib.Path(__file__).parent / "results" / f"objectives{KIND}.json"
TABLE = pathlib.Path(__file__).parent / f"OBJECTIVES_COST{KIND.upper()}.md"

# Methods of the side-by-side sections, as far as `METHODS` has them: those with a counterpart.
BESIDE = ("UW", "MGDA", "PCGrad", "GradVac", "CAGrad", "IMTL-G", "Nash-MTL", "FairGrad", "Aligned-MTL", "UPGrad")
BESIDE += ("DualProj", "GradDrop", "ConFIG")
# Of the section on aggregators: on a given Jacobian the methods of a family differ by their weighting only.
ALONE = ("MGDA", "PCGrad", "UPGrad", "Nash-MTL", "GradDrop", "ConFIG")
FORMULA = "PCGrad, dense"


class Sizes:
    """What is run: everything, or tiny sizes for `--quick`."""

    tasks: Sequence[int] = (2, 8, 16, 40)
    params: Sequence[float] = (1e5, 1e6, 1e7)
    hidden: int = 4
    every: Sequence[tuple[int, float]] = ((8, 1e6), (40, 1e6))
    compiled: Sequence[int] = (2, 40)
    turns: int = 7
    seconds: float = 2.5  # of one function in one cell
    names: Sequence[str] = tuple(name for name, entry in METHODS.items() if not entry.features)
    vit: routes.Vit = routes.Vit()
    memory_width: int = 1024
    memory_layers: int = 8


class Quick(Sizes):
    tasks = (3,)
    params = (7e3,)
    hidden = 2
    every = ((3, 7e3),)
    compiled = (2, 3)
    turns = 2
    seconds = 0.05
    names = ("Sum", "UW", "MGDA", "PCGrad")
    # Without blocks: compiling five steps through one takes longer than all the rest.
    vit = routes.Vit(layers=0, width=16, heads=2, tokens=4, batch=2, num_tasks=2)
    memory_width = 32
    memory_layers = 1


def among(names: Sequence[str], sizes: type[Sizes], num_tasks: int) -> list[str]:
    """Those that are wanted and defined for this number of tasks."""
    return [name for name in names if name in sizes.names and METHODS[name].min_tasks <= num_tasks]


def family_of(name: str) -> str | None:
    """What a method reads; None for what is no method of ours."""
    return METHODS[name].family if name in METHODS else None


def say(text: str) -> None:
    print(text, flush=True)


# Sections. Each returns rows: dictionaries of numbers and words.


def weightings(sizes: type[Sizes]) -> list[dict]:
    """Gramian -> weights, jitted, called from Python; the state goes along."""
    rows = []
    for num_tasks in sizes.tasks:
        gradients = np.random.default_rng(0).normal(size=(num_tasks, 2 * num_tasks)).astype(np.float32)
        gram, losses = jnp.asarray(gradients @ gradients.T), jnp.linspace(0.5, 2.0, num_tasks)
        functions, side_of = [], {}
        for name in among(sizes.names, sizes, num_tasks):
            weighting = getattr(METHODS[name].make(), "weighting", None)
            if weighting is None:
                continue
            functions.append(_timed_weighting(name, weighting, gram, losses))
            side_of[functions[-1].name] = ("mtjax", name)
            if theirs is None:
                continue
            aggregator = theirs.make_aggregator(name, num_tasks)
            if not isinstance(aggregator, str) and theirs.is_gramian(aggregator):
                functions.append(theirs.timed_weighting(f"{name}, TorchJD", aggregator, gradients))
                side_of[functions[-1].name] = ("TorchJD", name)
        for key, result in in_turns(functions, turns=sizes.turns, seconds=sizes.seconds).items():
            side, name = side_of[key]
            rows.append({"tasks": num_tasks, "side": side, "method": name, **result})
        ours = [row for row in rows if row["tasks"] == num_tasks and row["side"] == "mtjax"]
        slowest = max(ours, key=lambda row: row["ms"])
        say(f"weightings, K = {num_tasks}: slowest {slowest['method']} {slowest['ms']} ms of {len(ours)}")
        release()
    return rows


def _timed_weighting(name: str, weighting: Any, gram: jax.Array, losses: jax.Array) -> Timed:
    present = (jnp.ones(losses.shape, bool),) if weighting.masked else ()

    def weigh(state, gram, losses):
        weights, state = weighting.weigh(gram, losses, state, *present)
        return state, weights

    state = weighting.init(losses.shape[0])
    program, seconds = compiled(weigh, state, gram, losses)
    holder = [state]

    def run(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            holder[0], weights = program(holder[0], gram, losses)
            jax.block_until_ready(weights)
        return time.perf_counter() - began

    return Timed(name, run, seconds)


def network_for(num_tasks: int, num_params: float, sizes: type[Sizes]) -> Network:
    return make_network(num_tasks, width_for(num_params, num_tasks, sizes.hidden), sizes.hidden)


def cells(sizes: type[Sizes]):
    """(K, P, network) from small to large."""
    for num_params in sizes.params:
        for num_tasks in sizes.tasks:
            yield num_tasks, num_params, network_for(num_tasks, num_params, sizes)


def _cell(network: Network, num_params: float) -> dict:
    return {
        "tasks": network.num_tasks,
        "params": int(num_params),
        "exact_params": network.num_params,
        "width": network.width,
    }


def _theirs(network: Network, losses: jax.Array) -> tuple[Any, dict]:
    """TorchJD's side at its fastest route, after checking that it is the same network."""
    side = theirs.Side(network)
    np.testing.assert_allclose(side.losses().detach().cpu().numpy(), losses, rtol=1e-3)
    return side, side.choose_route(seconds=1.0)


def aggregators(sizes: type[Sizes]) -> list[dict]:
    """Jacobian -> gradient, and loss function -> gradient, beside the bare Jacobian."""
    rows = []
    for num_tasks, num_params, network in cells(sizes):
        params, batch = jax.tree.map(jnp.asarray, (network.params, network.batch()))
        jacobian_fn = mtjax.value_and_jacobian(losses_of)
        losses, jacobian = jax.jit(jacobian_fn)(params, batch)
        functions = {("mtjax", "jacobian"): timed_call("jacobian", jacobian_fn, params, batch)}
        for name in among(ALONE, sizes, num_tasks):
            method = METHODS[name].make()
            state = mtjax.optim.init(method, params, num_tasks=num_tasks)

            def update(jacobian, losses, state, method=method):
                return method.update(jacobian, state, losses=losses)

            functions["mtjax", name, "alone"] = timed_call(f"{name} alone", update, jacobian, losses, state)
            route = mtjax.value_and_update(losses_of, method)
            functions["mtjax", name, "route"] = timed_call(f"{name} route", route, params, state, batch)
        if theirs is not None:
            side, _ = _theirs(network, losses)
            functions["TorchJD", "jacobian"] = theirs.timed("TorchJD jacobian", side.jacobian)
            matrix = theirs.as_matrix(side.jacobian())
            for name in among(ALONE, sizes, num_tasks):
                aggregator = theirs.make_aggregator(name, num_tasks)
                if isinstance(aggregator, str) or theirs.too_large(name, network):
                    continue
                functions["TorchJD", name, "alone"] = theirs.timed(f"TorchJD {name}", partial(aggregator, matrix))
        results = in_turns(functions.values(), turns=sizes.turns, seconds=sizes.seconds)
        cell = _cell(network, num_params)
        base = {side: results[functions[side, "jacobian"].name]["ms"] for side in {key[0] for key in functions}}
        for key, function in functions.items():
            result = results[function.name]
            what = key[2] if len(key) == 3 else "bare"
            rows.append(
                {**cell, "side": key[0], "method": key[1], "family": family_of(key[1]), "what": what, **result}
                | {"of_jacobian": round(result["ms"] / base[key[0]], 3)}
            )
        alone = [row["of_jacobian"] for row in rows[-len(functions) :] if row["what"] == "alone"]
        say(
            f"aggregators, K = {num_tasks}, P = {num_params:.0e}: bare Jacobian "
            + ", ".join(f"{side} {ms} ms" for side, ms in sorted(base.items()))
            + f"; on top of it at most {max(alone):.2f} of that"
        )
        del functions, jacobian
        release()
    return rows


def steps(sizes: type[Sizes]) -> list[dict]:
    """The whole step of both sides."""
    rows = []
    for num_tasks, num_params, network in cells(sizes):
        functions, skipped = _our_steps(network, among(BESIDE, sizes, num_tasks)), {}
        if theirs is not None:
            losses = jax.jit(losses_of)(*jax.tree.map(jnp.asarray, (network.params, network.batch())))
            side, tried = _theirs(network, losses)
            functions["TorchJD", "sum"] = theirs.timed("TorchJD sum", side.plain_step)
            functions["TorchJD", "jacobian"] = theirs.timed("TorchJD jacobian", side.jacobian)
            for name in among(BESIDE, sizes, num_tasks):
                key = ("TorchJD", name)
                aggregator = theirs.make_aggregator(name, num_tasks)
                if name == "UW":
                    functions[key] = theirs.timed("TorchJD UW", side.uncertainty_step())
                elif isinstance(aggregator, str) or theirs.too_large(name, network):
                    skipped[key] = aggregator if isinstance(aggregator, str) else "not run: minutes a step"
                else:
                    functions[key] = theirs.timed(f"TorchJD {name}", partial(side.step, aggregator))
            if theirs.too_large(FORMULA, network):
                skipped["formula", FORMULA] = "not run: minutes a step"
            else:
                functions["formula", FORMULA] = theirs.timed(FORMULA, side.dense_pcgrad_step)
        results = in_turns(functions.values(), turns=sizes.turns, seconds=sizes.seconds)
        cell = _cell(network, num_params)
        for key, function in functions.items():
            result = results[function.name]
            plain = results[functions["mtjax" if key[0] == "mtjax" else "TorchJD", "sum"].name]["ms"]
            row = {**cell, "side": key[0], "method": key[1], "family": family_of(key[1]), **result}
            row["multiple"] = round(result["ms"] / plain, 2)
            rows.append(row | ({"tried": tried} if key == ("TorchJD", "sum") else {}))
        rows += [{**cell, "side": side, "method": name, "skipped": why} for (side, name), why in skipped.items()]
        _say_steps(cell, rows)
        del functions
        release()
    return rows


def _our_steps(network: Network, names: Sequence[str]) -> dict[tuple[str, str], Timed]:
    params, batch = jax.tree.map(jnp.asarray, (network.params, network.batch()))
    adam = optax.adam(LEARNING_RATE)
    carry = (params, adam.init(params))
    functions = {
        ("mtjax", "sum"): timed_step("sum", plain_step(losses_of, adam), carry, batch),
        ("mtjax", "jacobian"): timed_call("jacobian", mtjax.value_and_jacobian(losses_of), params, batch),
    }
    for name in names:
        method = METHODS[name].make()
        state = mtjax.optim.init(method, params, num_tasks=network.num_tasks)
        functions["mtjax", name] = timed_step(name, method_step(losses_of, method, adam), (*carry, state), batch)
    return functions


def _say_steps(cell: dict, rows: list[dict]) -> None:
    here = [row for row in rows if all(row[key] == value for key, value in cell.items()) and "ms" in row]
    for side in ("mtjax", "TorchJD", "formula"):
        mine = [f"{row['method']} {row['ms']} ms ({row['multiple']}x)" for row in here if row["side"] == side]
        if mine:
            say(f"steps, K = {cell['tasks']}, P = {cell['params']:.0e}, {side}: " + ", ".join(mine))


def methods(sizes: type[Sizes]) -> list[dict]:
    """The whole step of every method of mtjax."""
    rows = []
    for num_tasks, num_params in sizes.every:
        network = network_for(num_tasks, num_params, sizes)
        functions = _our_steps(network, among(sizes.names, sizes, num_tasks))
        results = in_turns(functions.values(), turns=sizes.turns, seconds=sizes.seconds / 2)
        plain = results["sum"]["ms"]
        for (side, name), function in functions.items():
            result = results[function.name]
            rows.append(
                {**_cell(network, num_params), "side": side, "method": name, "family": family_of(name), **result}
                | {"multiple": round(result["ms"] / plain, 2)}
            )
        _say_steps(_cell(network, num_params), rows)
        del functions
        release()
    return rows


def compile_times(sizes: type[Sizes]) -> list[dict]:
    """Seconds of tracing and compiling a whole step for few and for many tasks."""
    rows = []
    for name in among(sizes.names, sizes, min(sizes.compiled)):
        few, many = (_compile_time(name, num_tasks, sizes) for num_tasks in sizes.compiled)
        if many > 1.2 * few:  # a disturbance, or true: look again
            again = [_compile_time(name, num_tasks, sizes) for num_tasks in sizes.compiled]
            few, many = min(few, again[0]), min(many, again[1])
        rows.append(
            {"method": name, "tasks": list(sizes.compiled), "seconds": [round(few, 2), round(many, 2)]}
            | {"ratio": round(many / few, 2)}
        )
        say(f"compile {name}: {few:.1f} and {many:.1f} s")
    worst = max(rows, key=lambda row: row["ratio"])
    say(f"compile: ratio at most {worst['ratio']} ({worst['method']}), median {np.median([r['ratio'] for r in rows])}")
    return rows


def _compile_time(name: str, num_tasks: int, sizes: type[Sizes]) -> float:
    network, adam, method = make_network(num_tasks, 32, sizes.hidden), optax.adam(LEARNING_RATE), METHODS[name].make()
    params, batch = jax.tree.map(jnp.asarray, (network.params, network.batch()))
    carry = (params, adam.init(params), mtjax.optim.init(method, params, num_tasks=num_tasks))
    return compiled(method_step(losses_of, method, adam), carry, batch, donate=(0,))[1]


SECTIONS: dict[str, Callable[[type[Sizes]], list[dict]]] = {
    "weightings": weightings,
    "aggregators": aggregators,
    "steps": steps,
    "methods": methods,
    "compile": compile_times,
    "routes": lambda sizes: routes.times(sizes.vit, turns=sizes.turns, seconds=sizes.seconds, say=say),
    "memory": lambda sizes: routes.memory(sizes.memory_width, sizes.memory_layers, say=say),
}


def main(argv: Sequence[str] | None = None) -> dict:
    """Runs the command line; returns the content of the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two turns, no file")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--methods", nargs="+", help="names of experiments/objectives/methods.py; default: all")
    parser.add_argument("--tasks", type=int, nargs="+", help="numbers of tasks of the sections with cells")
    parser.add_argument("--params", type=float, nargs="+", help="numbers of parameters of the sections with cells")
    parser.add_argument("--threads", type=int, help="cores of both sides; default: all that the process may use")
    parser.add_argument("--turns", type=int, help="turns of each function")
    parser.add_argument("--render", action="store_true", help="only write the table of the results that there are")
    args = parser.parse_args(argv)
    if args.render:
        content = json.loads(RESULTS.read_text())
        TABLE.write_text(table.render(content))
        return content

    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    if args.threads:
        os.sched_setaffinity(0, cores)  # before JAX looks at them
    where = provenance(outputs=[RESULTS, TABLE])
    if theirs is None:
        say(f"TorchJD is not installed (pip install 'mtjax[bench]'): timing mtjax alone ({MISSING})")
    else:
        where["versions"] |= theirs.setup(len(cores))
    where["threads"] = len(cores)

    sizes = type("Chosen", (Quick if args.quick else Sizes,), {})
    sizes.turns = args.turns or sizes.turns
    sizes.names = args.methods or sizes.names
    sizes.tasks, sizes.params = args.tasks or sizes.tasks, args.params or sizes.params
    content = {"benchmark": "objectives", "sections": {}}
    if not args.quick and RESULTS.exists():
        content = json.loads(RESULTS.read_text())
    for name in args.only:
        began = time.perf_counter()
        rows = SECTIONS[name](sizes)
        seconds = round(time.perf_counter() - began, 1)
        content["sections"][name] = {"where": where, "wall_s": seconds, "rows": rows}
        say(f"{name}: {seconds} s")
        if not args.quick:
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
            TABLE.write_text(table.render(content))
    for goal in table.goals(content):
        say(table.verdict(goal))
    return content


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_default_matmul_precision", "float32")  # as on a CPU; a GPU would take fewer bits
    main()
