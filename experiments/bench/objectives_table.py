"""The results of `objectives.py` against the goals, and as a markdown file.

Letters: K tasks, P parameters.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Rows = list[dict[str, Any]]


class Goal(NamedTuple):
    """A goal and what was measured.

    Attributes:
      goal: in words.
      worst: the measured value that is furthest off.
      limit: which it must not exceed.
      where: the cell it was measured in.
      share: of all cells that hold.
    """

    goal: str
    worst: float
    limit: float
    where: str
    share: float

    @property
    def holds(self) -> bool:
        return self.worst <= self.limit


def _rows(content: dict, section: str) -> Rows:
    return content["sections"].get(section, {}).get("rows", [])


def _at_most(goal: str, limit: float, rows: Iterable[dict], value: Callable, where: Callable) -> list[Goal]:
    """One goal, judged on the worst row; none without rows."""
    rows = list(rows)
    if not rows:
        return []
    worst = max(rows, key=value)
    return [Goal(goal, value(worst), limit, where(worst), sum(value(row) <= limit for row in rows) / len(rows))]


def _cell(row: dict) -> str:
    return f"{row['method']}, K = {row['tasks']}, P = {power(row['params'])}"


def goals(content: dict) -> list[Goal]:
    """Every goal that the results can tell about."""
    found: list[Goal] = []
    ours = [row for row in _rows(content, "weightings") if row["side"] == "mtjax" and row["tasks"] == 40]
    found += _at_most("Weighting alone, 40 tasks, ms", 1, ours, lambda row: row["ms"], lambda row: row["method"])

    routes = [row for row in _rows(content, "aggregators") if row["side"] == "mtjax" and row["what"] == "route"]
    routes = [row for row in routes if row["family"] == "Gramian"]
    found += _at_most(
        "Gramian method, gradient from the loss function, as a multiple of the bare Jacobian",
        1.1,
        routes,
        lambda row: row["of_jacobian"],
        _cell,
    )

    measured = [row for row in _rows(content, "steps") if "ms" in row]
    every = [row for row in _rows(content, "methods") if row["family"] in ("Gramian", "entries")]
    level = [row for row in measured if row["side"] == "mtjax" and row["family"] in ("Gramian", "entries")]
    for num_tasks, limit in ((8, 4), (40, 20)):
        here = [row for row in level if row["tasks"] == num_tasks]
        goal = f"Step on parameter level as a multiple of the plain step, K = {num_tasks}"
        found += _at_most(goal, limit, here, lambda row: row["multiple"], _cell)
        here = [row for row in every if row["tasks"] == num_tasks]
        found += _at_most(f"{goal}, every method", limit, here, lambda row: row["multiple"], _cell)
    pairs = [{**ours, "of_theirs": ours["ms"] / theirs["ms"]} for ours, theirs in beside(measured)]
    found += _at_most("Step, as a share of TorchJD's", 1, pairs, lambda row: row["of_theirs"], _cell)

    found += _at_most(
        "Seconds to compile for 40 tasks, as a multiple of those for 2",
        1.3,
        _rows(content, "compile"),
        lambda row: row["ratio"],
        lambda row: row["method"],
    )
    for route, limit in (("representation", 1.15), ("directional", 1.5), ("disjoint", 1.3)):
        here = [row for row in _rows(content, "routes") if row["route"] == route]
        goal = f"Route '{route}' on a transformer, as a multiple of the plain step, K = 8"
        found += _at_most(goal, limit, here, lambda row: row["multiple"], lambda row: f"K = {row['tasks']}")
    return found + _memory_goals(_rows(content, "memory"))


def _memory_goals(rows: Rows) -> list[Goal]:
    by_route = {row["route"]: row for row in rows}
    if not by_route:
        return []
    plain, weighted, one = (by_route[name] for name in ("plain sum", "weighted", "weighted, chunk_size=1"))
    growth = (weighted["temporary_mb"] - plain["temporary_mb"]) / (plain["tasks"] * plain["params_mb"])
    share = one["temporary_mb"] / plain["temporary_mb"]
    return [
        Goal("Weighted route: growth of temporary memory over K copies of the parameters", growth, 0.5, "K = 8", 1.0),
        Goal("chunk_size=1: temporary memory over that of the plain step", share, 1.25, "K = 8", 1.0),
    ]


def beside(rows: Rows) -> list[tuple[dict, dict]]:
    """(our row, their row) of the same cell and method."""
    theirs = {(row["tasks"], row["params"], row["method"]): row for row in rows if row["side"] == "TorchJD"}
    keys = [(row, (row["tasks"], row["params"], row["method"])) for row in rows if row["side"] == "mtjax"]
    return [(row, theirs[key]) for row, key in keys if key in theirs and "ms" in theirs[key]]


def verdict(goal: Goal) -> str:
    """A goal as a sentence."""
    sign = "holds" if goal.holds else f"does not hold ({goal.share:.0%} of cells do)"
    return f"{goal.goal}: {short(goal.worst)} (goal {goal.limit:g}; {goal.where}): {sign}"


# Markdown.


def short(value: float | None) -> str:
    """Three significant digits.

    >>> short(1234.5), short(12.34), short(0.01234), short(None)
    ('1230', '12.3', '0.0123', '')
    """
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):.{max(digits, 0)}f}"


def power(value: float) -> str:
    """1e6 of 1000000.

    >>> power(1000000)
    '1e6'
    """
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (header, rule, *lines)] + [""]


def _time(row: dict | None) -> str:
    if row is None:
        return ""
    if "skipped" in row:
        return "-"
    low, high = (short(value) for value in row["range"])
    multiple = f" ({short(row['multiple'])}x)" if "multiple" in row else ""
    return f"{short(row['ms'])} [{low}, {high}]{multiple}"


def _unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _pivot(rows: Rows, columns: str, cell: Callable[[dict | None], str]) -> list[str]:
    """Methods down, the values of `columns` across."""
    values, names = _unique(row[columns] for row in rows), _unique(row["method"] for row in rows)
    found = {(row["method"], row[columns]): row for row in rows}
    label = "K = {}" if columns == "tasks" else "{}"
    header = ["method", *[label.format(value) for value in values]]
    return _table(header, [[name, *[cell(found.get((name, value))) for value in values]] for name in names])


def render(content: dict) -> str:
    """The markdown file."""
    lines = [
        "# What multi-objective methods cost",
        "",
        "Written by `python experiments/bench/objectives.py`; its docstring says what is measured and how.",
        "Milliseconds are medians over turns, with the smallest and largest in brackets; `(3.2x)` is the multiple of",
        "the same side's own step on the sum of the losses.",
        "",
    ]
    for name, section in content["sections"].items():
        where = section["where"]
        dirty = ", with changes" if where["dirty"] else ""
        versions = ", ".join(f"{key} {value}" for key, value in where["versions"].items())
        lines += [
            f"- `{name}`: {where['device']}, {where['threads']} threads, commit {str(where['commit'])[:10]}{dirty};"
            f" {versions}; {section['wall_s']} s"
        ]
    lines += ["", "## Goals", ""]
    lines += _table(
        ["goal", "limit", "worst", "holds", "cells that hold", "worst cell"],
        [
            [g.goal, f"{g.limit:g}", short(g.worst), "yes" if g.holds else "no", f"{g.share:.0%}", g.where]
            for g in goals(content)
        ],
    )
    lines += _render_steps(_rows(content, "steps"))
    lines += _render_aggregators(_rows(content, "aggregators"))
    for side in ("mtjax", "TorchJD"):
        rows = [row for row in _rows(content, "weightings") if row["side"] == side]
        if rows:
            lines += [f"## Weighting alone, {side} (ms)", "", *_pivot(rows, "tasks", _time)]
    rows = _rows(content, "methods")
    if rows:
        params = _unique(row["params"] for row in rows)[0]
        lines += [f"## The whole step of every method, P = {power(params)} (ms)", "", *_pivot(rows, "tasks", _time)]
    lines += _render_compile(_rows(content, "compile"))
    rows = _rows(content, "routes")
    if rows:
        title = f"## Routes on a transformer of {power(rows[0]['params'])} parameters, K = {rows[0]['tasks']} (ms)"
        lines += [title, "", *_table(["route", "step"], [[row["route"], _time(row)] for row in rows])]
    rows = _rows(content, "memory")
    if rows:
        title = f"## Memory of the step, K = {rows[0]['tasks']}, parameters of {rows[0]['params_mb']} MB (MB)"
        cells = [[row["route"], short(row["temporary_mb"]), short(row["peak_mb"])] for row in rows]
        header = ["route", "temporary", "with parameters and state"]
        lines += [title, "", *_table(header, cells)]
    return "\n".join(lines).rstrip() + "\n"


def _render_steps(rows: Rows) -> list[str]:
    lines = []
    for params in _unique(row["params"] for row in rows):
        lines += [f"## The whole step, P = {power(params)} (ms)", ""]
        here = [row for row in rows if row["params"] == params]
        pairs = [({**ours}, theirs) for ours, theirs in beside(here)]
        for side in ("mtjax", "TorchJD", "formula"):
            mine = [row for row in here if row["side"] == side and "ms" in row]
            if mine:
                lines += [f"**{side}**", "", *_pivot(mine, "tasks", _time)]
        if pairs:
            ratio = [{**ours, "ratio": theirs["ms"] / ours["ms"]} for ours, theirs in pairs]
            lines += ["**TorchJD / mtjax**", ""]
            lines += _pivot(ratio, "tasks", lambda row: "" if row is None else f"{short(row['ratio'])}x")
    skipped = _unique(f"{row['method']} ({row['side']}): {row['skipped']}" for row in rows if "skipped" in row)
    return lines + (["Left out: " + "; ".join(skipped) + ".", ""] if skipped else [])


def _render_aggregators(rows: Rows) -> list[str]:
    lines = []
    titles = {
        "alone": "Jacobian to gradient, as a share of the time of the bare Jacobian",
        "route": "Loss function to gradient by the cheapest route, as a multiple of the bare Jacobian",
    }
    for what, title in titles.items():
        for params in _unique(row["params"] for row in rows):
            here = [row for row in rows if row["params"] == params and row["what"] == what]
            for side in _unique(row["side"] for row in here):
                mine = [row for row in here if row["side"] == side]
                lines += [f"## {title}, {side}, P = {power(params)}", ""]
                lines += _pivot(mine, "tasks", lambda row: "" if row is None else short(row["of_jacobian"]))
    return lines


def _render_compile(rows: Rows) -> list[str]:
    if not rows:
        return []
    few, many = rows[0]["tasks"]
    header = ["method", f"K = {few}", f"K = {many}", "ratio"]
    cells = [[row["method"], *[short(s) for s in row["seconds"]], short(row["ratio"])] for row in rows]
    return ["## Seconds to trace and compile a step", "", *_table(header, cells)]
