"""Scale on paper: what a step holds, computes and sends on up to 4,096 devices, and how long it would take there.

    python experiments/bench/scaling.py                      # everything: JSON, SCALING.md, figures
    python experiments/bench/scaling.py --sections tasks     # one section again, the others as they were
    python experiments/bench/scaling.py --preset smoke       # the same path with tiny models on 8 devices, no file
    python experiments/bench/scaling.py --render             # document and figures from the JSON
    python experiments/bench/scaling.py --measure            # times the steps on the accelerators that are there

Steps are compiled for described meshes (`mtjax.dryrun`), by a process for each number of devices; nothing of a full
size is allocated or run. Bytes, operations and collectives are read from the compiled programs, seconds are predicted
from them (`scaling_model.py`), and bytes are checked against arithmetic and against arrays on 8 simulated devices.

    weak        MoE ViT and MultiTab, work per device fixed, 8 to 4,096 devices
    tasks       K = 1 to 16 tasks on 64 devices, by the ways in which their losses become an update
    check       on 8 devices: bytes of arguments as predicted and as they are, collectives by formula and as compiled
    compilers   8 devices, by the CPU's compiler in float32, and the TPU's in float32 and bfloat16; not by default: it
                needs the package `libtpu` and many minutes

Results are in results/scaling.json and SCALING.md.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import scaling_cases as cases
import scaling_model as model
import scaling_table as table

from mtjax import dryrun, sharding
from mtjax.nn.moe_parallel import communication_volume
from mtjax.train.report import provenance
from mtjax.train.state import create_lanes
from mtjax.train.step import make_train_step

FOLDER = pathlib.Path(__file__).parent
RESULTS, TABLE = FOLDER / "results" / "scaling.json", FOLDER / "SCALING.md"
SECTIONS = ("weak", "tasks", "check", "compilers")
PODS = tuple(sorted({hardware.pod for hardware in model.ALL}))
CHECKED, TOPOLOGY = 8, "v5e:2x4"  # devices, and how they stand


def say(text: str) -> None:
    print(text, flush=True)


def row_of(case: cases.Case, *, trace: bool = True, topology: str | None = None) -> dict[str, Any]:
    """What a compiled step takes, as JSON has it; on TPUs of a topology, or on as many devices as there are."""
    found = dryrun.dry_run(
        case.problem,
        method=case.method,
        optimizer=cases.optimizer,
        config=case.config,
        mesh=case.mesh if topology is None else dryrun.topology_mesh(topology, case.mesh),
        title=f"{case.model}, {case.route}, {case.mesh}",
        trace=trace,
    )
    row = {"model": case.model, "route": case.route, "mesh": case.mesh, "devices": found.num_devices}
    row |= {
        "compiler": found.device,
        "num_tasks": case.num_tasks,
        "num_parameters": found.num_parameters,
        "batch_size": found.batch_size,
    }
    row |= {"shared_bytes": shared_bytes(case), "state_bytes": sum(found.state_bytes.values())}
    row |= {"params_bytes": found.state_bytes["params"], "optimizer_bytes": found.state_bytes["opt_state"]}
    for name in ("batch", "gradient", "jacobian", "argument", "temp", "peak", "sent"):
        row[f"{name}_bytes"] = getattr(found, f"{name}_bytes")
    for name in ("flops", "traced_flops", "bytes_accessed", "lower_s", "compile_s"):
        row[name] = getattr(found, name)
    row["collectives"] = merged(found.found)
    say(
        f"{found.title}: {dryrun.readable_bytes(found.peak_bytes)}, {found.flops:.3g} operations, "
        f"{dryrun.readable_bytes(found.sent_bytes)} sent; compiled in {found.compile_s:.0f} s"
    )
    return row


def shared_bytes(case: cases.Case) -> int:
    """Bytes on one device of the parameters that the method sees."""
    return sum(place.bytes_per_device for place in places(case) if cases.trunk(place.path))


def expert_bytes(case: cases.Case) -> int:
    """Bytes on one device of the parameters that are split over 'expert'."""
    return sum(place.bytes_per_device for place in places(case) if "expert" in jax.tree.leaves(tuple(place.spec)))


def places(case: cases.Case) -> list[sharding.Place]:
    params = jax.eval_shape(case.problem.init_params, jax.random.key(0))
    return sharding.places(params, sharding.make_mesh(case.mesh))


def merged(found: Sequence[Any]) -> list[dict[str, Any]]:
    """Collectives of one kind and group, as one that runs as often with their mean size."""
    sums: dict[tuple, list[float]] = {}
    for one in found:
        inside = model.members(one.group, PODS)
        key = (one.kind, one.group_size, *inside.items())
        total = sums.setdefault(key, [0, 0])
        total[0], total[1] = total[0] + one.times, total[1] + one.times * one.bytes
    return [
        {"kind": kind, "group": group, "inside": {str(pod): m for pod, m in inside}, "times": times, "bytes": size}
        for (kind, group, *inside), (times, size) in sums.items()
    ]


def exchanges(row: dict[str, Any]) -> list[model.Exchange]:
    return [
        model.Exchange(
            one["kind"],
            one["bytes"] / one["times"],
            one["group"],
            {int(pod): m for pod, m in one["inside"].items()},
            one["times"],
        )
        for one in row["collectives"]
    ]


def predicted(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{hardware: prediction} for a row."""
    return {
        hardware.name: model.predict(
            flops=row["flops"],
            accessed=row["bytes_accessed"],
            exchanges=exchanges(row),
            peak_bytes=row["peak_bytes"],
            hardware=hardware,
        )._asdict()
        for hardware in model.ALL
    }


def formula(case: cases.Case, row: dict[str, Any], sizes: cases.Sizes) -> dict[str, float]:
    """Bytes of collectives by arithmetic, to stand beside those of the compiled program.

    Without 'fsdp' gradients are reduced whole: once for the losses' sum; a method that needs the Gramian of the batch
    reduces the K rows of the shared parameters before, one that needs the Jacobian all of its K rows. Experts are
    reduced over 'data' only. An expert layer exchanges its slots twice forward, twice more where the forward pass is
    repeated on the way back, and twice in every backward pass: K + 1 of them.
    """
    alone = expert_bytes(case) if "data=1," in case.mesh else 0
    found = {"all-reduce": row["params_bytes"] - alone}
    if case.route == "Jacobian":
        found["all-reduce"] *= case.num_tasks
    elif case.route != "losses only":
        found["all-reduce"] += case.num_tasks * (row["shared_bytes"] - alone)
    if case.model == "MoE ViT":
        config, (height, width) = sizes.moe, sizes.image
        tokens = (height // config.vit.patch) * (width // config.vit.patch) + config.vit.cls_token
        volume = communication_volume(
            case.num_tasks * row["batch_size"] * tokens,
            config.top_k,
            config.num_experts(0),
            config.vit.width,
            shards=min(8, row["devices"]),
            token_shards=row["devices"],
        )
        backward = 1 if case.route == "losses only" else case.num_tasks + 1
        passes = 1 + bool(config.vit.remat) * (1 if backward == 1 else 2) + backward
        found["all-to-all"] = 2 * passes * len(config.expert_blocks) * volume.operand
    return found


# Sections: rows for the number of devices of this process.


def weak(sizes: cases.Sizes) -> list[dict]:
    rows = []
    for make in (cases.moe_vit, cases.multitab):
        for route in cases.WEAK:
            if route != "losses only" and jax.device_count() in set(sizes.devices) - set(sizes.several):
                continue
            case = make(sizes, jax.device_count(), route)
            row = row_of(case, trace=route == "losses only")
            rows.append(row | {"formula": formula(case, row, sizes)})
    return rows


def tasks(sizes: cases.Sizes) -> list[dict]:
    rows = []
    for count, fsdp in [(count, 1) for count in sizes.tasks] + [(sizes.split, 8)]:
        for route in cases.ROUTES:
            case = cases.many_tasks(sizes, jax.device_count(), route, count, fsdp)
            rows.append(row_of(case, trace=False))
            if fsdp == 1:
                rows[-1]["formula"] = formula(case, rows[-1], sizes)
    return rows


def check(sizes: cases.Sizes) -> list[dict]:
    """Makes the arrays of a small model of each kind, on simulated devices."""
    devices, rows = jax.device_count(), []
    small = cases.SMOKE
    for case in (
        cases.moe_vit(small, devices, "Gramian first"),
        cases.multitab(sizes, devices, "Gramian first"),
        cases.many_tasks(small, devices, "Jacobian", 2, fsdp=8),
    ):
        row = row_of(case, trace=False)
        state, batch = arrays(case)
        held = sum(map(on_first_device, jax.tree.leaves((state, batch))))
        rows.append(row | {"held_bytes": held, "ratio": row["argument_bytes"] / held})
    return rows


def compilers(sizes: cases.Sizes) -> list[dict]:
    """The same steps by different compilers."""
    if importlib.util.find_spec("libtpu") is None:
        say("compilers: left out, as there is no libtpu (pip install 'jax[tpu]')")
        return []
    devices, rows = jax.device_count(), []
    for case in (
        cases.multitab(sizes, devices, "losses only"),
        cases.many_tasks(sizes, devices, "losses only", sizes.split),
    ):
        half = case._replace(config=dataclasses.replace(case.config, compute_dtype="bfloat16"))
        rows.append(row_of(case, trace=False) | {"dtype": "float32"})
        rows.append(row_of(case, trace=False, topology=TOPOLOGY) | {"dtype": "float32"})
        rows.append(row_of(half, trace=False, topology=TOPOLOGY) | {"dtype": "bfloat16"})
    return rows


def arrays(case: cases.Case) -> tuple[Any, Any]:
    """A training state and the rows of a step, on the devices that there are."""
    with jax.set_mesh(sharding.make_mesh(case.mesh)):
        state = create_lanes(
            case.problem.init_params, case.method, cases.optimizer, [0], [1e-3], num_tasks=case.num_tasks
        )
        mesh = sharding.current_mesh()
        columns = jax.tree.map(lambda column: column[None], dict(case.problem.train))
        if mesh is None:
            return state, jax.tree.map(jnp.asarray, columns)
        return state, sharding.place_rows(columns, mesh, axis=1)


def on_first_device(leaf: jax.Array) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return leaf.addressable_shards[0].data.nbytes


# Time, where there is an accelerator.


def measure(sizes: cases.Sizes, *, steps: int = 10) -> list[dict]:
    """Seconds of a step in bfloat16 on all devices that there are, and what is predicted for them."""
    devices, kind = jax.device_count(), jax.devices()[0].device_kind
    known = [hardware for hardware in model.ALL if is_kind(hardware.name, kind)]
    preset = next(name for name, value in cases.PRESETS.items() if value == sizes)
    described = in_child(["--preset", preset, "--sections", "weak"], devices) if known else []
    rows = []
    for make in (cases.moe_vit, cases.multitab):
        for route in cases.WEAK:
            case = make(sizes, devices, route)
            loss_fn = dataclasses.replace(case.config, compute_dtype="bfloat16").loss(case.problem)
            state, batch = arrays(case)
            with jax.set_mesh(sharding.make_mesh(case.mesh)):
                step = jax.jit(jax.vmap(make_train_step(loss_fn, case.method, cases.optimizer)), donate_argnums=0)
                seconds = []
                for _ in range(steps + 2):
                    began = time.perf_counter()
                    state, metrics = step(state, batch)
                    jax.block_until_ready(metrics)
                    seconds.append(time.perf_counter() - began)
            row = {"model": case.model, "route": route, "device": kind, "devices": devices}
            row |= {"step_s": statistics.median(seconds[2:]), "range_s": [min(seconds[2:]), max(seconds[2:])]}
            for same in (one for one in described if (one["model"], one["route"]) == (case.model, route)):
                row["predicted_s"] = predicted(same)[known[0].name]["step"]
            rows.append(row)
            say(f"{case.model}, {route}: {1e3 * row['step_s']:.2f} ms on {devices} x {kind}; {row.get('predicted_s')}")
    return rows


def is_kind(name: str, device_kind: str) -> bool:
    """Whether the name that a device gives itself is that of known hardware.

    >>> is_kind("H100 SXM", "NVIDIA H100 80GB HBM3"), is_kind("TPU v5e", "TPU v5 lite"), is_kind("H200 SXM", "cpu")
    (True, True, False)
    """
    if name.startswith("TPU"):
        return {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5"}[name] == device_kind
    return name.split()[0] in device_kind


def in_child(argv: Sequence[str], devices: int) -> list[dict]:
    """Rows of a section for described devices."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.json"
        status = dryrun.run_in_child([*argv, "--rows", str(path)], devices, script=__file__)
        if status:
            raise RuntimeError(f"The process with {devices} devices ended with status {status}")
        return json.loads(path.read_text())


def main(argv: Sequence[str] | None = None) -> dict:
    """Runs the command line; returns the content of the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", choices=cases.PRESETS, default="demo", help="smoke: tiny models, 8 devices, no file"
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS[:3]), help="what to run")
    parser.add_argument("--devices", nargs="+", type=int, help="numbers of devices of the weak scaling")
    parser.add_argument("--measure", action="store_true", help="time the steps on the accelerators that are there")
    parser.add_argument(
        "--render", action="store_true", help="only write document and figures of the results there are"
    )
    parser.add_argument("--rows", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sizes, kept = cases.PRESETS[args.preset], args.preset == "demo"
    if args.rows:
        args.rows.write_text(json.dumps([row for name in args.sections for row in globals()[name](sizes)]))
        return {}
    if args.render:
        content = json.loads(RESULTS.read_text())
        table.write(content, TABLE)
        return content
    if args.measure and jax.default_backend() == "cpu":
        parser.error("--measure times steps on accelerators, and there is none here")

    versions = {"libtpu": importlib.metadata.version("libtpu")} if importlib.util.find_spec("libtpu") else {}
    where = provenance(outputs=[RESULTS, TABLE, RESULTS.parent / "figures"])
    where["versions"] |= versions
    content: dict[str, Any] = {"benchmark": "scaling", "sections": {}}
    if kept and RESULTS.exists():
        content = json.loads(RESULTS.read_text())
    content["hardware"] = [vars(hardware) for hardware in model.ALL]
    sections = {name: sizes.devices if name == "weak" else (sizes.fixed,) for name in args.sections}
    sections |= {"weak": tuple(args.devices)} if args.devices and "weak" in sections else {}
    sections |= {name: (CHECKED,) for name in ("check", "compilers") if name in sections}
    sections = {"measure": ()} if args.measure else sections
    for name, counts in sections.items():
        began, rows = time.perf_counter(), []
        for count in counts or (0,):
            if name == "measure":
                rows = measure(sizes)
            else:
                found = in_child(["--preset", args.preset, "--sections", name], count)
                rows += [row | {"predicted": predicted(row)} for row in found]
            seconds = round(time.perf_counter() - began, 1)
            if rows:
                content["sections"][name] = {"where": where, "wall_s": seconds, "rows": rows}
            if kept:
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                RESULTS.write_text(json.dumps(content, indent=1) + "\n")
                table.write(content, TABLE)
        say(f"{name}: {seconds} s")
    return content


if __name__ == "__main__":
    main()
