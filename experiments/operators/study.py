"""The command line of the studies of operator learning: presets, run directory, report, figures.

A study is a function from a configuration to what it found; everything around it is here.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from training import MAIN, Interrupted, plain

import mtjax
from mtjax.train import command, report, tables
from mtjax.train.config import override

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEPT = "study"
"""The preset whose results are kept."""


@dataclasses.dataclass
class Arguments:
    """See the head of the script."""

    preset: Literal["smoke", "demo", "study", "paper"] = "demo"
    """smoke: seconds. demo: about two minutes on two CPU cores. study: every arm, tuned, as in the committed results.
    paper: published sizes and schedules, for an accelerator."""
    seeds: int | None = None
    """Number of seeds (at least 3 for a standard error that means something)."""
    run: pathlib.Path | None = None
    """Run directory; by default a new one under runs/."""
    resume: bool = False
    """Go on with an interrupted run, with the options that it was started with: that of --run, by default the newest
    one."""
    set: Annotated[tuple[str, ...], "FIELD=VALUE"] = ()
    """Override configuration fields, e.g. --set recipe.steps=500 seeds=5."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a study found.

    Attributes:
      tasks: the tasks of the table.
      findings: the paper's claims and what was measured.
      rows: of the report.
      draw: folder -> figures.
      details: more to keep.
    """

    tasks: Sequence[mtjax.Task]
    findings: Sequence[report.Finding]
    rows: Sequence[report.Row]
    draw: Callable[[pathlib.Path], Sequence[pathlib.Path]]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run(
    args: Arguments,
    system: str,
    presets: Mapping[str, Any],
    body: Callable[[Any, pathlib.Path, bool], Found],
) -> int:
    """Runs a study; returns the exit status.

    Args:
      args: of the command line.
      system: name of the report and of the figures.
      presets: name -> configuration, a dataclass with a field `seeds`.
      body: `(configuration, run directory, resume) -> Found`.
    """
    began = time.perf_counter()
    args, directory = command.settle_run(args, pathlib.Path("runs") / system)
    config = override(presets[args.preset], args.set)
    config = dataclasses.replace(config, seeds=config.seeds if args.seeds is None else args.seeds)
    where = report.provenance(outputs=[directory, ROOT / "results"])
    settings = plain(config)
    if args.resume and command.read_run(directory).get("config") != settings:
        raise ValueError(f"--resume: {directory} was started with other sizes than this version of the script has")
    command.write_run(directory, args, config=settings)
    try:
        found = body(config, directory, args.resume)
    except Interrupted:
        return command.interrupted(directory)
    result = report.from_findings(
        system,
        found.findings,
        preset=args.preset,
        seeds=range(config.seeds),
        wall_s=round(time.perf_counter() - began, 1),
        rows=[{"higher_is_better": False} | row for row in found.rows],
        provenance=where,
        details={"config": settings, **found.details},
    )
    shown = [row for row in result.rows if "examples" not in row]
    tables.print_report(
        dataclasses.replace(result, rows=shown), metrics=dict.fromkeys((task.name for task in found.tasks), MAIN)
    )
    pictures = found.draw(directory / "figures")
    kept = args.preset == KEPT and (args.seeds, args.set) == (None, ())
    command.publish(result, directory, pictures, ROOT / "results" if kept else None)
    return 0


def main(
    argv: Sequence[str] | None,
    description: str,
    system: str,
    presets: Mapping[str, Any],
    body: Callable[[Any, pathlib.Path, bool], Found],
) -> int:
    """The script: parses the command line and runs the study."""
    import tyro

    name = f"{system.removeprefix('operators_')}.py"
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = tyro.cli(Arguments, args=argv, prog=name, description=description)
    return command.run_command(lambda: run(arguments, system, presets, body))
