"""The results of `moe.py` against the goals, and as a markdown file."""

from collections.abc import Sequence
from typing import NamedTuple

from operators_table import short, spread, table, threads, unique

NOTES = """
Written by `python experiments/bench/moe.py`; the docstrings of the files beside it say what is measured and how.
Milliseconds are medians over turns, with the smallest and largest in brackets; ratios are to the dense network of equal
multiply-adds, in the same run. CPU time is that of all threads. A star marks times of which no quiet turns were found.
""".strip()
LIMITS = {"forward": 1.8, "forward and backward": 2.5}


class Goal(NamedTuple):
    """A goal and what was measured.

    Attributes:
      where: in words.
      ratio: time of `auto` over that of the dense network.
      limit: what it may be.
    """

    where: str
    ratio: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.ratio <= self.limit

    def __str__(self) -> str:
        holds = "holds" if self.holds else "does not hold"
        return f"auto, {self.where}: {self.ratio:.2f} times the dense network (goal: at most {self.limit}): {holds}"


def goals(content: dict) -> list[Goal]:
    """`auto` against the dense network at every shape, in wall time."""
    found = []
    for row in content["sections"].get("dispatch", {}).get("rows", []):
        if row["dispatch"] == "auto":
            where = f"{row['pass']}, shape {row['shape']}, {threads(row['threads'])}"
            found.append(Goal(where + ("" if row["quiet"] else " (busy)"), row["ratio"], LIMITS[row["pass"]]))
    return found


def render(content: dict) -> str:
    """All sections as markdown."""
    lines = ["# Cost of mixtures of experts", "", NOTES, "", *(f"* {goal}" for goal in goals(content)), ""]
    titles = {
        "dispatch": "All forms of dispatch, balanced random gates",
        "small": "Small batches",
        "skew": "Uneven use of experts",
        "seeds": "Seeds by vmap, data and parameters batched",
        "step": "Whole models: experts beside dense transformers of equal multiply-adds",
        "extract": "Inference of one task",
    }
    for section, title in titles.items():
        if section in content["sections"]:
            lines += [f"## {title}", "", *_times(content["sections"][section]["rows"])]
    if "parallel" in content["sections"]:
        lines += ["## Expert parallelism: bytes between devices", "", *_volume(content["sections"]["parallel"]["rows"])]
    if "extract" in content["sections"]:
        sizes = {row["dispatch"]: row["bytes"] for row in content["sections"]["extract"]["rows"]}
        lines += ["Bytes of parameters:", "", *table(["model", "bytes"], ([n, f"{b:,}"] for n, b in sizes.items()))]
    if "compile" in content["sections"]:
        header, rows = ["blocks", "form", "seconds"], content["sections"]["compile"]["rows"]
        cells = ([str(r["blocks"]), "scan" if r["scan"] else "unrolled", f"{r['compile_s']:.1f}"] for r in rows)
        lines += ["## Compile time of a gradient, 4 tasks", "", *table(header, cells)]
    return "\n".join(lines).rstrip() + "\n"


def _times(rows: Sequence[dict]) -> list[str]:
    lines = []
    for key in unique((row["threads"], row["pass"]) for row in rows):
        some = [row for row in rows if (row["threads"], row["pass"]) == key]
        lines += [f"{key[1].capitalize()}, {threads(key[0])}:", ""]
        lines += table(
            ["shape", "dispatch", "ms", "ratio", "CPU ms", "CPU ratio", "dropped", "compile s"],
            (
                [
                    row["shape"],
                    row["dispatch"],
                    spread(row),
                    f"{row['ratio']:.2f}",
                    short(row["cpu_ms"]),
                    f"{row['cpu_ratio']:.2f}",
                    "-" if row["dropped"] is None else f"{row['dropped']:.1%}",
                    f"{row['compile_s']:.1f}",
                ]
                for row in some
            ),
        )
    return lines


def _volume(rows: Sequence[dict]) -> list[str]:
    header = ["shape", "devices", "all-to-alls forward", "bytes in the program", "bytes by the formula", "sent forward"]
    keys = ("shape", "devices", "all_to_alls", "operand_compiled", "operand_formula", "sent_forward")
    return table(header, ([str(row[key]) for key in keys] for row in rows))
