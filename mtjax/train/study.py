"""The command line of a study: presets, run directory, resuming, report, figures.

A study is a function from a configuration to what it found; everything around it is here, once for every family of
experiments.
"""

import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from mtjax.tasks import Task
from mtjax.train import command, report, tables
from mtjax.train.config import override

KEPT = "study"
"""The preset whose results are kept."""


class Interrupted(Exception):
    """A signal ended a training; what is finished is on file."""


def plain(config: Any) -> dict[str, Any]:
    """A configuration, a dataclass, as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


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
    machine: command.Machine = dataclasses.field(default_factory=command.Machine)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a study found.

    Attributes:
      tasks: the tasks of the table; their main metrics are shown.
      findings: the paper's claims and what was measured.
      rows: of the report.
      draw: folder -> figures.
      details: more to keep.
    """

    tasks: Sequence[Task]
    findings: Sequence[report.Finding]
    rows: Sequence[report.Row]
    draw: Callable[[pathlib.Path], Sequence[pathlib.Path]]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run(
    args: Arguments,
    system: str,
    presets: Mapping[str, Any],
    body: Callable[[Any, pathlib.Path, bool], Found],
    results: pathlib.Path,
    row_defaults: Mapping[str, Any] | None = None,
) -> int:
    """Runs a study; returns the exit status.

    Args:
      args: of the command line.
      system: name of the report and of the figures, family_name.
      presets: name -> configuration, a dataclass with a field `seeds`.
      body: `(configuration, run directory, resume) -> Found`; may raise `Interrupted`.
      results: folder where the report and the figures of the preset `KEPT` are kept.
      row_defaults: entries of every row of the report that does not have them.
    """
    began = time.perf_counter()
    args, directory = command.settle_run(args, pathlib.Path("runs") / system)
    config = override(presets[args.preset], args.set)
    config = dataclasses.replace(config, seeds=config.seeds if args.seeds is None else args.seeds)
    if config.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {config.seeds}")
    if args.machine.dry_run:
        body(config, directory, False)
        raise ValueError("--dry-run: nothing was trained, so there is nothing to describe")
    where = report.provenance(outputs=[directory, results])
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
        rows=[dict(row_defaults or {}) | row for row in found.rows],
        provenance=where,
        details={"config": settings, **found.details},
    )
    shown = [row for row in result.rows if "examples" not in row]
    main_metrics = {task.name: task.main_metric.name for task in found.tasks}
    tables.print_report(dataclasses.replace(result, rows=shown), metrics=main_metrics)
    with command.own_folder(directory / "figures") as folder:
        pictures = found.draw(folder)
    kept = args.preset == KEPT and (args.seeds, args.set) == (None, ())
    command.publish(result, directory, pictures, results if kept else None)
    return 0


def main(
    argv: Sequence[str] | None,
    description: str,
    system: str,
    presets: Mapping[str, Any],
    body: Callable[[Any, pathlib.Path, bool], Found],
    results: pathlib.Path,
    row_defaults: Mapping[str, Any] | None = None,
) -> int:
    """The script: parses the command line and runs the study (arguments as for `run`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = f"{system.split('_', 1)[1]}.py"
    card = re.sub(r"\n(?=\w+: )", "\n\n", description)  # every entry of the head is a paragraph
    arguments = command.parse(Arguments, argv, prog=name, description=card)

    def body_on_machine() -> int:
        return run(arguments, system, presets, body, results, row_defaults)

    return command.run_on_machine(arguments.machine, argv, body_on_machine)
