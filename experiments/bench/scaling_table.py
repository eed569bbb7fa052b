"""The results of `scaling.py` as a short document with two figures."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import scaling_model as model
from operators_table import table, unique

from mtjax.dryrun import readable_bytes

NOTES = """
Written by `python experiments/bench/scaling.py`; nothing here was run on the machines it speaks of. A training step of
the real loop (AdamW, float32 parameters, gradients reduced in float32) is compiled for a *described* mesh by XLA's CPU
backend, which partitions the program as it would for accelerators. Bytes, operations and collectives are read from the
compiled program of one device; seconds come from a roofline over them (`scaling_model.py`):

* at best: compute, memory and network overlap completely, products reach {best:.0%} of the peak, all links are used;
* at worst: nothing overlaps with the network, products reach {worst:.0%}, a torus is used one dimension at a time.

The truth should lie between. Programs are compiled in float32; activations are taken to be bfloat16 (half of the bytes
accessed, and of the tokens on their way to experts). *Efficiency* is the share of a step that would remain if the
network took no time: weak scaling, as the work of a device is fixed.
""".strip()
UNCERTAIN = """
* Bytes accessed and temporaries are those of the CPU's compiler. It fuses less than an accelerator's and writes scores
  of attention out, which makes them too large for wide models; it does not pad, which makes them too small for narrow
  ones (a TPU pads the last dimension to 128; MultiTab is 16 wide). Halving them for bfloat16 is crude. Steps bound by
  memory, as most here are, are therefore known to a factor of about two, and their efficiency errs with them.
* Gradients are taken to be reduced in float32. Where products are in bfloat16 the compiler may reduce their gradients
  before they are cast back: half of the bytes.
* With 'fsdp' the CPU's compiler leaves all-reduces of which each device keeps a slice; accelerators turn them into
  reduce-scatters, half of the bytes.
* Latencies and utilisations are assumed, and no straggler, input pipeline or checkpoint is in the model.
* Seconds were not measured: no accelerator was at hand. `--measure` times the same steps where there is one and writes
  them beside the prediction.
""".strip()


def short_ms(pair: Sequence[float]) -> str:
    return " – ".join(f"{1e3 * seconds:.3g}" for seconds in pair)


def per_cent(pair: Sequence[float]) -> str:
    return " – ".join(f"{100 * share:.0f}" for share in sorted(pair))


def render(content: Mapping[str, Any]) -> str:
    """The document."""
    sections = content["sections"]
    lines = ["# Scale on paper", "", NOTES.format(best=model.COMPUTE[0], worst=model.COMPUTE[1]), ""]
    lines += ["## Hardware", "", *hardware_table(content["hardware"])]
    if "weak" in sections:
        lines += weak_part(sections["weak"]["rows"])
        lines += ["### What limits it", "", *limits(sections["weak"]["rows"]), ""]
    if "tasks" in sections:
        lines += tasks_part(sections["tasks"]["rows"])
    checks = [row for name in ("weak", "tasks", "check") for row in sections.get(name, {}).get("rows", [])]
    if checks:
        lines += check_part(checks)
    if "compilers" in sections:
        lines += compilers_part(sections["compilers"]["rows"])
    if "measure" in sections:
        lines += measured_part(sections["measure"]["rows"])
    lines += ["## What is uncertain", "", UNCERTAIN, ""]
    return "\n".join(lines).rstrip() + "\n"


def hardware_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    header = ["device", "bf16 TFLOP/s", "memory GB", "GB/s", "links GB/s, one way", "pod or node", "out GB/s", "source"]
    cells = (
        [
            row["name"],
            f"{row['flops'] / 1e12:.0f}",
            f"{row['memory'] / 1e9:.0f}",
            f"{row['bandwidth'] / 1e9:.0f}",
            f"{row['link'] / 1e9:.0f}" + (f", torus {row['axes']}-D" if row["axes"] else ", switch"),
            str(row["pod"]),
            f"{row['out'] / 1e9:.3g}",
            row["source"],
        ]
        for row in rows
    )
    return table(header, cells)


def weak_part(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["## Weak scaling", "", "![Weak scaling](results/figures/scaling_weak.png)", ""]
    for name in unique(row["model"] for row in rows):
        some = [row for row in rows if row["model"] == name]
        first = some[0]
        lines += [
            f"### {name}: {first['num_parameters']:,} parameters, {first['num_tasks']} tasks, "
            f"{first['batch_size'] // first['devices']:,} rows per device",
            "",
            "Of one device, in a step:",
            "",
        ]
        header = ["devices", "mesh", "route", "parameters", "gradients of all tasks", "temporaries", "GFLOP"]
        header += ["all-reduce", "all-to-all", "other", "sent"]
        cells = (
            [
                f"{row['devices']:,}",
                row["mesh"],
                row["route"],
                *(readable_bytes(row[f"{key}_bytes"]) for key in ("params", "jacobian", "temp")),
                f"{row['flops'] / 1e9:.3g}",
                *(readable_bytes(size) for size in by_kind(row)),
                readable_bytes(row["sent_bytes"]),
            ]
            for row in some
        )
        lines += table(header, cells)
        lines += [
            "Predicted, milliseconds of a step (best – worst), and efficiency in per cent:",
            "",
            *predictions(some),
        ]
    return lines


def limits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For every model and route a sentence about the most devices."""
    lines = []
    for name, route in unique((row["model"], row["route"]) for row in rows):
        row = max((r for r in rows if (r["model"], r["route"]) == (name, route)), key=lambda r: r["devices"])
        parts = []
        for hardware, one in row["predicted"].items():
            kind = max(one["by_kind"], key=one["by_kind"].get)
            share = one["by_kind"][kind] / sum(one["by_kind"].values())
            parts.append(f"{hardware} {per_cent(one['efficiency'])} % ({kind}: {share:.0%} of the network's time)")
        lines.append(f"* {name}, {route}, {row['devices']:,} devices: efficiency " + ", ".join(parts) + ".")
    return lines


def by_kind(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Bytes of results of all-reduces, all-to-alls, and all else."""
    sizes = {"all-reduce": 0.0, "all-to-all": 0.0, "other": 0.0}
    for one in row["collectives"]:
        sizes[one["kind"] if one["kind"] in sizes else "other"] += one["bytes"]
    return tuple(sizes.values())


def predictions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(rows[0]["predicted"])
    header = ["devices", "route", *(f"{name}: ms" for name in names), *(f"{name}: %" for name in names), "limit"]
    cells = []
    for row in rows:
        every = [row["predicted"][name] for name in names]
        times = [short_ms(one["step"]) + ("" if one["fits"] else " (memory!)") for one in every]
        limits = [one["limit"] for one in every]
        limit = limits[0] if len(set(limits)) == 1 else " / ".join(limits)
        cells.append(
            [f"{row['devices']:,}", row["route"], *times, *(per_cent(one["efficiency"]) for one in every), limit]
        )
    return [*table(header, cells), "(memory!): the estimated peak is more than the device has.", ""]


def tasks_part(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    first = rows[0]
    lines = [
        f"## K tasks on {first['devices']} devices",
        "",
        "![Bytes and operations by the number of tasks](results/figures/scaling_tasks.png)",
        "",
        "*Losses only*: one backward pass of a weighted sum. *Gramian first*: K backward passes at once, K x K inner "
        "products, then one weighted backward pass; *by columns*: one task at a time. *Jacobian*: all rows at once, as "
        "methods on entries need them. Multiples are of losses only with as many tasks on the same mesh.",
        "",
    ]
    base = {(row["mesh"], row["num_tasks"]): row for row in rows if row["route"] == "losses only"}
    names = list(first["predicted"])
    header = ["K", "mesh", "route", "temporaries", "gradients of all tasks"]
    header += ["GFLOP", "operations, x", "sent", "sent, x"]
    header += [f"{name}: time, x" for name in names]
    cells = []
    for row in rows:
        plain = base[row["mesh"], row["num_tasks"]]
        ratios = [
            " – ".join(
                f"{a / b:.2f}" for a, b in zip(row["predicted"][n]["step"], plain["predicted"][n]["step"], strict=True)
            )
            for n in names
        ]
        cells.append(
            [
                str(row["num_tasks"]),
                row["mesh"],
                row["route"],
                readable_bytes(row["temp_bytes"]),
                readable_bytes(row["jacobian_bytes"]),
                f"{row['flops'] / 1e9:.3g}",
                f"{row['flops'] / plain['flops']:.2f}",
                readable_bytes(row["sent_bytes"]),
                f"{row['sent_bytes'] / max(plain['sent_bytes'], 1):.2f}",
                *ratios,
            ]
        )
    return [*lines, *table(header, cells)]


def check_part(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Checks",
        "",
        "Bytes of results of collectives by arithmetic over those in the compiled program, and bytes of arguments as "
        "compiled over those of arrays made on simulated devices.",
        "",
    ]
    cells = []
    for row in rows:
        sizes = dict(zip(("all-reduce", "all-to-all", "other"), by_kind(row), strict=True))
        for kind, expected in row.get("formula", {}).items():
            ratio = f"{expected / sizes[kind]:.4f}" if sizes[kind] else "-"
            cells.append(
                [
                    row["model"],
                    row["route"],
                    f"{row['devices']:,}",
                    kind,
                    f"{expected:,.0f}",
                    f"{sizes[kind]:,.0f}",
                    ratio,
                ]
            )
        if "held_bytes" in row:
            sizes = (f"{row['argument_bytes']:,}", f"{row['held_bytes']:,}", f"{row['ratio']:.4f}")
            cells.append([f"{row['model']} (state and rows)", row["route"], str(row["devices"]), "arguments", *sizes])
    return [*lines, *table(["model", "route", "devices", "what", "predicted", "found", "ratio"], cells)]


def compilers_part(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## The CPU's compiler and the TPU's",
        "",
        "The same steps on 8 devices, compiled by XLA for CPU (what everything above rests on) and by the TPU's own "
        "compiler for a v5e slice, which needs no TPU. In brackets: over the CPU's.",
        "",
    ]
    header = ["model", "route", "compiler", "dtype", "temporaries", "GFLOP", "bytes accessed", "sent"]
    cells, first = [], rows[0]
    for row in rows:
        first = row if row["compiler"] == "cpu" else first
        keys = ("temp_bytes", "flops", "bytes_accessed", "sent_bytes")
        ratios = [f" ({row[key] / first[key]:.2f})" if row is not first and first[key] else "" for key in keys]
        values = [
            readable_bytes(row[keys[0]]),
            f"{row[keys[1]] / 1e9:.3g}",
            *(readable_bytes(row[k]) for k in keys[2:]),
        ]
        cells.append([row["model"], row["route"], row["compiler"], row["dtype"]])
        cells[-1] += [value + ratio for value, ratio in zip(values, ratios, strict=True)]
    return [*lines, *table(header, cells)]


def measured_part(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    header = ["model", "route", "devices", "measured ms", "predicted ms"]
    cells = (
        [
            row["model"],
            row["route"],
            f"{row['devices']} x {row['device']}",
            f"{1e3 * row['step_s']:.2f}",
            short_ms(row["predicted_s"]) if "predicted_s" in row else "-",
        ]
        for row in rows
    )
    return ["## Measured", "", *table(header, cells)]


def write(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """The document and its figures."""
    path.write_text(render(content))
    from mtjax.plots_objectives import save_small

    folder, sections = path.parent / "results" / "figures", content["sections"]
    if "weak" in sections:
        save_small(weak_figure(sections["weak"]["rows"]), folder / "scaling_weak.png")
    if "tasks" in sections:
        save_small(tasks_figure(sections["tasks"]["rows"]), folder / "scaling_tasks.png")


def weak_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Efficiency over the number of devices, a band from worst to best for each kind of hardware."""
    from matplotlib.figure import Figure

    panels = unique((row["model"], row["route"]) for row in rows)
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        some = sorted((row for row in rows if (row["model"], row["route"]) == panel), key=lambda row: row["devices"])
        devices = [row["devices"] for row in some]
        for number, name in enumerate(some[0]["predicted"]):
            best, worst = zip(*(row["predicted"][name]["efficiency"] for row in some), strict=True)
            axis.fill_between(devices, worst, best, color=f"C{number}", alpha=0.15, linewidth=0)
            axis.plot(devices, worst, color=f"C{number}", marker="o", markersize=3, label=name)
        axis.set(title=", ".join(panel), xlabel="devices", xscale="log", ylim=(0, 1.05))
        axis.set_xticks(devices, [f"{count:,}" for count in devices])
        axis.minorticks_off()
    axes[0].set_ylabel("share of the step without network\n(line: at worst, band: to best)")
    axes[0].legend(frameon=False, fontsize="small")
    return figure


def tasks_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Temporaries, operations and bytes sent of one device over K, for each route."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    shown = {"temporaries, GiB": ("temp_bytes", 2**30), "TFLOP": ("flops", 1e12), "sent, GiB": ("sent_bytes", 2**30)}
    for axis, (label, (key, unit)) in zip(axes, shown.items(), strict=True):
        for number, route in enumerate(unique(row["route"] for row in rows)):
            some = [row for row in rows if row["route"] == route and "fsdp" not in row["mesh"]]
            counts = [row["num_tasks"] for row in some]
            axis.plot(
                counts, [row[key] / unit for row in some], color=f"C{number}", marker="o", markersize=3, label=route
            )
        axis.set(xlabel="tasks", ylabel=label, xscale="log")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    axes[0].legend(frameon=False, fontsize="small")
    return figure
