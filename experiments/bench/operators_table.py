"""The results of `operators.py` against the goals, and as a markdown file.

Results are `{"sections": {name: {"where": ..., "wall_s": ..., "rows": [...]}}}`, one such object for each device.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Rows = list[dict[str, Any]]
BEST = "library, scan"  # the variant that the goals are about
NOTES = """
Written by `python experiments/bench/operators.py`; the docstrings of the files beside it say what is measured and how.
Milliseconds are medians over turns, with the smallest and largest in brackets. CPU time is that of all threads, and
means the same on a busy machine with one thread; wall time and several threads need an idle one, so that turns in which
other processes ran are left out. A star marks times of which no quiet turns were found, and ratios that therefore mean
nothing. (`load`: runnable processes when the section began.)

Both sides compute the same function, loss (mean squared error) and gradient of the same parameters on the same data,
and step with Adam. *As written* makes the basis at all points, then the field from it; *fused* multiplies the last maps
of branch and trunk before they meet the points, which is the same mathematics in another order of summation
(`operators_steps.py`). *Library* is `mtjax.models.DeepONet`, which does so where it is less work; *fused by hand* also
has its gradient written out. The PyTorch loop is shown in both forms, so that the two can be told apart: as written
against as written is what the compiler gives.
""".strip()


class Goal(NamedTuple):
    """A goal and what was measured.

    Attributes:
      goal: in words.
      value: measured.
      least: which it should reach.
      where: the cell it was measured in.
    """

    goal: str
    value: float
    least: float
    where: str

    @property
    def holds(self) -> bool:
        return self.value >= self.least


def rows_of(content: dict, section: str) -> Rows:
    return content["sections"].get(section, {}).get("rows", [])


def ratios(rows: Rows) -> Rows:
    """For every cell of `train` the times of each PyTorch side over those of each of ours with the same function.

    A cell is a size and a number of threads. Rows with `active_output` compare with each other only.
    """
    found = []
    for ours in rows:
        if ours["side"] != "mtjax" or ours["variant"] == "trunk frozen":
            continue
        for theirs in rows:
            same = all(ours[key] == theirs[key] for key in ("size", "threads", "active_output"))
            if theirs["side"] != "mtjax" and same:
                pair = {key: ours[key] for key in ("size", "threads", "variant", "active_output")}
                pair |= {"other": f"{theirs['side']}, {theirs['variant']}", "deepxde": theirs["side"] == "DeepXDE"}
                pair |= {"wall": theirs["ms"] / ours["ms"], "cpu": theirs["cpu_ms"] / ours["cpu_ms"]}
                # Threads of one process that wait for each other spin: on a busy machine their CPU time grows, too.
                pair["quiet"] = ours["quiet"] and theirs["quiet"]
                pair["disturbed"] = not pair["quiet"] and ours["threads"] > 1
                # From the ranges: how far the ratio could be off in either direction.
                pair["cpu_range"] = [
                    theirs["cpu_range"][0] / ours["cpu_range"][1],
                    theirs["cpu_range"][1] / ours["cpu_range"][0],
                ]
                found.append(pair)
    return found


def goals(content: dict) -> list[Goal]:
    """Every goal that the results can tell about."""
    found = []
    for pair in ratios(rows_of(content, "train")):
        if pair["deepxde"] and pair["variant"] == BEST and not (pair["active_output"] or pair["disturbed"]):
            where = f"{pair['size']}, {threads(pair['threads'])}"
            found.append(Goal("Training step, CPU time of DeepXDE over ours", pair["cpu"], 3, where))
            if pair["quiet"]:
                found.append(Goal("Training step, wall time of DeepXDE over ours", pair["wall"], 4, where))
    for row in rows_of(content, "data"):
        if row["side"] == "mtjax":
            least = 400 if row["unit"] == "solutions" else 2000
            where = f"{row['problem']}, {threads(row['threads'])}"
            found.append(Goal(f"Generation, {row['unit']} per second", row["per_s"], least, where))
    for row in rows_of(content, "inference"):
        if row["layout"] in ("one function", "batch x common points"):
            where = f"{row['layout']}, {threads(row['threads'])}"
            goal = Goal("Inference, query points per second", row["per_s"], 1e6, where)
            # The goal is one of two cores; and what other processes slowed down may still hold, but cannot fail.
            if row["threads"] > 1 and (row["quiet"] or goal.holds):
                found.append(goal)
    return found


def verdict(goal: Goal) -> str:
    """A goal as a sentence."""
    holds = "holds" if goal.holds else "does not hold"
    return f"{goal.goal}: {short(goal.value)} (goal {goal.least:,.0f}; {goal.where}): {holds}"


# Markdown.


def short(value: float | None) -> str:
    """Three significant digits.

    >>> short(1234567.0), short(12.34), short(0.01234), short(None)
    ('1,230,000', '12.3', '0.0123', '')
    """
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def threads(count: int) -> str:
    """
    >>> threads(1), threads(2)
    ('1 thread', '2 threads')
    """
    return f"{count} thread" + "s" * (count > 1)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (header, rule, *lines)] + [""]


def spread(row: dict, key: str = "ms", span: str = "range") -> str:
    low, high = (short(value) for value in row[span])
    return f"{short(row[key])} [{low}, {high}]" + ("" if row["quiet"] else "*")


def unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def render(contents: Sequence[dict]) -> str:
    """The markdown file, of one or more devices."""
    lines = ["# What training and using operator networks costs", "", NOTES, ""]
    for content in contents:
        for name, section in content["sections"].items():
            where = section["where"]
            dirty = ", with changes" if where["dirty"] else ""
            versions = ", ".join(f"{key} {value}" for key, value in where["versions"].items())
            lines += [
                f"- `{name}`: {where['device']}, load {where['load']}, commit {str(where['commit'])[:10]}{dirty};"
                f" {versions}; {section['wall_s']} s"
            ]
        lines += [""]
        found = goals(content)
        if found:
            cells = [[g.goal, f"{g.least:,.0f}", short(g.value), "yes" if g.holds else "no", g.where] for g in found]
            lines += ["## Goals", "", *table(["goal", "at least", "measured", "holds", "cell"], cells)]
        for section, draw in SECTIONS.items():
            rows = rows_of(content, section)
            lines += draw(rows) if rows else []
    return "\n".join(lines).rstrip() + "\n"


def _train(rows: Rows) -> list[str]:
    lines = []
    for size, count in unique((row["size"], row["threads"]) for row in rows):
        here = [row for row in rows if (row["size"], row["threads"]) == (size, count)]
        first = here[0]
        lines += [f"## Training step: {size}, {first['functions']} x {first['points']:,} points, {threads(count)}", ""]
        cells = [
            [
                f"{row['side']}, {row['variant']}",
                spread(row, "cpu_ms", "cpu_range"),
                *[spread(row), short(row["per_s"]), short(row["gflops"]), short(row["compile_s"])],
            ]
            for row in here
        ]
        lines += table(["side", "CPU ms", "wall ms", "steps/s", "GFLOP per CPU s", "compile s"], cells)
        pairs = ratios(here)
        cells = [
            [
                f"{pair['other']} / mtjax, {pair['variant']}",
                f"{pair['cpu']:.2f}x" + "*" * pair["disturbed"],
                " to ".join(f"{value:.2f}" for value in pair["cpu_range"]),
                f"{pair['wall']:.2f}x" + "*" * (not pair["quiet"]),
            ]
            for pair in pairs
        ]
        if cells:
            lines += table(["ratio", "CPU time", "smallest to largest", "wall time"], cells)
    return lines


def _data(rows: Rows) -> list[str]:
    cells, mine = [], {}
    for row in rows:
        key = row["problem"], row["threads"]
        mine |= {key: row} if row["side"] == "mtjax" else {}
        ratio = "" if row["side"] == "mtjax" else f"{mine[key]['per_s'] / row['per_s']:.1f}x"
        deviation = f"{row['deviation']:.1e}" if row.get("deviation") is not None else ""
        cells.append(
            [
                f"{row['problem']}, {row['side']}, {threads(row['threads'])}",
                f"{short(row['per_s'])} {row['unit']}",
                *[spread(row, "cpu_ms", "cpu_range"), spread(row), ratio, deviation],
            ]
        )
    header = ["problem and side", "per second", "CPU ms of one", "wall ms of one", "ours / theirs", "deviation"]
    return ["## Generating data", "", *table(header, cells)]


def _inference(rows: Rows) -> list[str]:
    cells = [
        [
            f"{row['layout']}, {threads(row['threads'])}",
            *[f"{row['functions']}", f"{row['values']:,}", spread(row), short(row["per_s"]), short(row["per_cpu_s"])],
        ]
        for row in rows
    ]
    header = ["layout", "functions", "query points", "ms", "query points/s", "per CPU second"]
    return ["## Inference, the demo network", "", *table(header, cells)]


def _gpu(rows: Rows) -> list[str]:
    def share(row, key):
        return f"{row[key]:.0%}" if key in row else ""

    cells = [
        [
            f"{row['size']}, {row['functions']:,} x {row['points']:,}, "
            f"{row['side']}, {row['form']}, {row['precision']}",
            *[spread(row), short(row["tflops"]), share(row, "of_matmul"), short(row.get("gb_per_s"))],
            *[share(row, "of_copy"), share(row, "of_bound")],
        ]
        for row in rows
    ]
    peaks = unique(f"{row['precision']} {short(row['matmul_tflops'])} TFLOP/s" for row in rows)
    memory = short(rows[0]["copy_gb_per_s"])
    ceilings = f"Ceilings measured in the same run: products in {', '.join(peaks)}; memory {memory} GB/s."
    header = ["step", "ms", "TFLOP/s", "of products", "GB/s", "of memory", "of the bound"]
    return ["## Training step on the GPU", "", ceilings, "", *table(header, cells)]


SECTIONS: dict[str, Callable[[Rows], list[str]]] = {
    "train": _train,
    "data": _data,
    "inference": _inference,
    "gpu": _gpu,
}
