"""The report of an experiment on the console: what was claimed and found, and every model on every task.

claim | baseline | ours, mean ± s.e. | holds?

model | task: metric ... | Delta_m | parameters | rows/s
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mtjax.train.report import DELTA_CELL, Finding, Report, Row, format_mean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_VERDICTS = {True: "[green]yes[/]", False: "[red]no[/]", None: "[yellow]open[/]"}
_LOG_WIDTH = 160
"""Width of tables in a file or pipe, where there is no terminal to fit into."""


def print_report(report: Report, *, metrics: Mapping[str, str] | None = None, console: "Console | None" = None) -> None:
    """Prints both tables and a line on where the numbers come from.

    Args:
      report: made by `from_findings`.
      metrics: task -> the metric to show, all by default.
      console: where to print, by default the terminal; redirected output is 160 columns wide.
    """
    from rich.console import Console

    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=_LOG_WIDTH)
    for table in task_tables(report.rows, metrics=metrics, width=console.width):
        console.print(table)
    findings = [Finding(**finding) for finding in (report.details or {}).get("findings", [])]
    console.print(claims_table(findings, title=f"{report.system} ({report.preset})"))
    commit = "no commit" if report.commit is None else report.commit[:10] + " (dirty)" * bool(report.dirty)
    seeds = f"{len(report.seeds)} seed{'s' * (len(report.seeds) != 1)}"
    console.print(
        f"mean ± s.e. over {seeds}; {report.wall_s:.0f} s on {report.device}, "
        f"jax {report.versions.get('jax', '?')}, {commit}",
        style="dim",
        highlight=False,
    )


def claims_table(findings: Sequence[Finding], *, title: str | None = None) -> "Table":
    """The table "claim | baseline | ours, mean ± s.e. | holds?" with the reason beside each verdict."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title and escape(title), show_lines=True)
    for header, share in (("claim", 3), ("baseline", 2), ("ours, mean ± s.e.", 2), ("holds?", 3)):
        table.add_column(header, ratio=share, overflow="fold")
    for finding in findings:
        texts = (escape(text) for text in (finding.claim, finding.baseline, finding.ours))
        table.add_row(*texts, f"{_VERDICTS[finding.holds]}: {escape(finding.reason)}")
    return table


def task_tables(
    rows: Sequence[Row], *, metrics: Mapping[str, str] | None = None, width: int = _LOG_WIDTH
) -> list["Table"]:
    """Models by tasks with mean ± s.e., and, where rows hold them, Delta_m, parameters and training rows/s.

    Args:
      rows: of a report. The keys `params` and `rows_per_s` of any row of a model fill the last columns;
        `higher_is_better` puts an arrow beside the metric.
      metrics: task -> the metric to show, all by default.
      width: what does not fit beside each other goes into a further table, with the models again in front.

    Returns:
      Rich tables; none without rows.
    """
    from rich.markup import escape
    from rich.table import Table

    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = _columns(rows, models, metrics)
    first = max([len("model"), *map(len, models)])
    groups: list[list[_Column]] = []
    room = 0
    for column in columns:
        # A cell costs its text, two spaces of padding and a line.
        if not groups or column.width + 3 > room:
            groups.append([])
            room = width - (first + 4)
        groups[-1].append(column)
        room -= column.width + 3
    tables = []
    for group in groups:
        table = Table()
        table.add_column("model", no_wrap=True)
        for column in group:
            table.add_column(escape(column.header), justify="right", no_wrap=True)
        for i, model in enumerate(models):
            table.add_row(escape(model), *(column.cells[i] for column in group))
        tables.append(table)
    return tables


class _Column(NamedTuple):
    header: str
    cells: list[str]

    @property
    def width(self) -> int:
        return max(map(len, [*self.header.split("\n"), *self.cells]))


def _columns(rows: Sequence[Row], models: Sequence[str], metrics: Mapping[str, str] | None) -> list[_Column]:
    """The columns after the model: task metrics in the order of the rows, Delta_m, parameters, rows/s."""
    cells = {(row["model"], row["task"], row["metric"]): row for row in rows}
    arrows = {(row["task"], row["metric"]): _arrow(row) for row in rows}
    columns = [
        _Column(f"{task}\n{metric}{arrow}", [_mean(cells.get((model, task, metric))) for model in models])
        for (task, metric), arrow in arrows.items()
        if (task, metric) != DELTA_CELL and (metrics is None or metrics.get(task) == metric)
    ]
    baselines = {str(row["baseline"]) for row in rows if (row["task"], row["metric"]) == DELTA_CELL}
    if baselines:
        header = f"Δm %\nvs {baselines.pop() if len(baselines) == 1 else 'own baseline'}"
        columns.append(_Column(header, [_percent(cells.get((model, *DELTA_CELL))) for model in models]))
    for key, header in (("params", "parameters"), ("rows_per_s", "rows/s")):
        values = {row["model"]: f"{row[key]:,.0f}" for row in rows if row.get(key) is not None}
        if values:
            columns.append(_Column(header, [values.get(model, "") for model in models]))
    return columns


def _arrow(row: Row) -> str:
    return {True: " ↑", False: " ↓", None: ""}[row.get("higher_is_better")]


def _cell(render: Callable[[float, float], str]) -> Callable[[Row | None], str]:
    """Renders mean and standard error of a row; an absent row is empty, null is NaN."""

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        return render(*(math.nan if row[key] is None else row[key] for key in ("mean", "se")))

    return cell


_mean = _cell(format_mean)
# Two decimals of a percentage say all that seeds can.
_percent = _cell(lambda mean, se: f"{mean:+.2f}" + (f" ± {se:.2f}" if math.isfinite(se) else ""))
