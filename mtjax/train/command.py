"""What the command lines of all experiments do alike: meshes, processes, errors as sentences, run directories.

A run directory holds `run.json` with the arguments of the command line that started it, so that `--resume --run DIR`
needs no other option, and an option that differs from the run's is refused rather than ignored.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import sys
import tempfile
import time
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import jax
import numpy as np

from mtjax import distributed, dryrun, sharding
from mtjax.train import profiling
from mtjax.train.loop import NonFiniteLossError
from mtjax.train.report import Report

Args = TypeVar("Args")
INTERRUPTED = 130
"""Exit status after SIGINT or SIGTERM, as shells have it."""


@dataclasses.dataclass
class Machine:
    """Where a script runs: options that every experiment has. They may differ from one resume to the next."""

    mesh: str | None = None
    """Devices to train on, such as data=8, or data=4,expert=2: data splits the batch; fsdp also parameters, optimiser
    state and per-task gradients; expert the experts of a mixture; tensor heads and hidden widths. One size may be -1:
    what is left. By default one device, or with --distributed data=-1."""
    distributed: bool = False
    """One of several processes that train together: started by a cluster's launcher (SLURM, GKE, Open MPI, TPU pods) or
    by python -m mtjax.launch."""
    profile: pathlib.Path | None = None
    """Write a trace of some steps of the first training into this folder."""
    dry_run: bool = False
    """Train nothing: compile the step of the first model for --mesh, which may have more devices than there are, and
    print memory, operations and communication of a device."""


def parse(options: type[Args], argv: Sequence[str] | None, *, prog: str, description: str | None = None) -> Args:
    """The options of a script, an instance of the dataclass `options`. `--help` and mistakes end the process.

    Args:
      options: a dataclass; the docstrings of its fields are the help.
      argv: arguments, by default those of the process.
      prog: name of the script.
      description: what `--help` says first, by default the docstring of the class.
    """
    try:
        import tyro
    except ImportError as error:
        print("error: the command line needs the package tyro: pip install tyro", file=sys.stderr)
        raise SystemExit(2) from error
    # The options of the machine have no prefix, and flags no opposite.
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    argv = list(sys.argv[1:] if argv is None else argv)
    return tyro.cli(_with_words(options), args=argv, prog=prog, description=description, config=style)


def _with_words(options: type[Args]) -> type[Args]:
    """A subclass for tyro, whose help calls an option 'NAME' rather than '{None}|STR', and no default 'None'."""
    import tyro

    hints, body = typing.get_type_hints(options), {"__doc__": options.__doc__, "__annotations__": {}}
    for field in dataclasses.fields(options):
        hint, default = hints[field.name], {"default": field.default}
        if dataclasses.is_dataclass(hint):
            hint = _with_words(hint)
            default = {"default_factory": hint}
        elif type(None) in typing.get_args(hint):
            (inner,) = set(typing.get_args(hint)) - {type(None)}
            name = {str: "NAME", int: "N", float: "X"}.get(inner, "PATH")
            hint = Annotated[hint, tyro.conf.arg(metavar=name, help_behavior_hint="")]
        elif field.default in (False, ()):
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
        else:
            continue
        body["__annotations__"][field.name] = hint
        body[field.name] = dataclasses.field(**default)
    frozen = options.__dataclass_params__.frozen
    return dataclasses.dataclass(frozen=frozen)(type(options.__name__, (options,), body))


def run_on_machine(args: Machine, argv: Sequence[str], body: Callable[[], int]) -> int:
    """Runs the body of a script where its options say: joins the other processes, makes the mesh ambient.

    Process 0 alone prints. A dry run starts the script anew, in a process that simulates the devices of the mesh.

    Args:
      args: parsed from `argv`.
      argv: arguments of the script.
      body: of the script.

    Returns:
      The exit status; see `run_command` for errors.
    """

    def run() -> int:
        if args.dry_run and not dryrun.in_child():
            return dryrun.run_in_child(argv, sharding.mesh_size(args.mesh or "data=1"))
        if args.profile is not None and args.profile.exists() and not args.profile.is_dir():
            raise ValueError(f"--profile {args.profile} is a file; name a folder")
        if args.distributed:
            try:
                distributed.initialize()
            except RuntimeError as error:
                raise ValueError(f"--distributed: {error}") from error
            if distributed.process_count() > 1 and jax.default_backend() == "cpu":
                # Programs of process 0 alone are kept, so that it would start while the others compile, for longer
                # than collectives between CPUs wait for each other.
                jax.config.update("jax_enable_compilation_cache", False)
        spec = args.mesh or ("data=-1" if args.distributed else None)
        if spec is None and jax.local_device_count() > 1 and jax.default_backend() != "cpu":
            print(f"note: one of {jax.local_device_count()} devices is used; --mesh data=-1 uses all of them")
        with contextlib.ExitStack() as stack:
            stack.enter_context(profiling.profiled(args.profile if distributed.is_main() else None))
            if args.distributed:
                stack.enter_context(distributed.only_main_prints())
            if spec is not None:
                stack.enter_context(jax.set_mesh(sharding.make_mesh(spec)))
            return body()

    return run_command(run)


def run_command(body: Callable[[], int]) -> int:
    """Runs the body of a script and returns its exit status.

    Compiled programs are kept for the next run (in `JAX_COMPILATION_CACHE_DIR`, or under $XDG_CACHE_HOME or ~/.cache).
    A warning is one line. An error about what was asked is one line and status 2; MTJAX_TRACEBACK=1 shows where it
    came from. A second Ctrl-C, or one outside of training, is status 130.
    """
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "mtjax" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}", file=sys.stderr)
        try:
            return body()
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            distributed.leave_at_exit(INTERRUPTED)
            return INTERRUPTED
        except (ValueError, OSError, ImportError, NonFiniteLossError) as error:
            if os.environ.get("MTJAX_TRACEBACK"):
                raise
            print(f"error: {_sentence(error)}", file=sys.stderr)
            distributed.leave_at_exit(2)
            return 2


def _sentence(error: Exception) -> str:
    """An error in words: those of the operating system without their number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def newest_run(base: pathlib.Path) -> pathlib.Path:
    """The run under `base` that was started last.

    Raises:
      ValueError: if there is none.
    """
    found = sorted(base.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"--resume: there is no run under {base}; name one with --run")
    return found[-1].parent


def read_run(run: pathlib.Path) -> dict[str, Any]:
    """The content of `run.json`.

    Raises:
      ValueError: if the directory holds no run.
    """
    path = run / "run.json"
    if not path.is_file():
        raise ValueError(f"--run {run}: not a run directory (it has no run.json)")
    return json.loads(path.read_text())


def write_run(run: pathlib.Path, arguments: Any, **more: Any) -> None:
    """Writes `run.json`: a dataclass of command line arguments, and more JSON values."""
    distributed.barrier("run.json")  # every process has read it
    if distributed.is_main():
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--run {run}: this folder cannot be made ({error.strerror})") from error
        fields = {"arguments": dataclasses.asdict(arguments)} | more
        temporary = run / "run.json.tmp"
        temporary.write_text(json.dumps(fields, indent=2, default=os.fspath) + "\n")
        temporary.replace(run / "run.json")


@contextlib.contextmanager
def own_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where a process may write what all of them compute: the folder in process 0, a temporary one in the others."""
    if distributed.is_main():
        yield folder
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield pathlib.Path(scratch)


def refuse_run(run: pathlib.Path) -> None:
    """Raises a ValueError if the directory holds the checkpoints of a run, which a new one would mix with."""
    if next(run.glob("**/checkpoints/[0-9]*"), None) is not None:
        raise ValueError(f"--run {run} already holds a run; go on with it by --resume, or choose another directory")


def settle_run(
    args: Args, base: pathlib.Path, *, apart: Sequence[str] = ("run", "resume", "machine")
) -> tuple[Args, pathlib.Path]:
    """The arguments, those of the run that is resumed, and its directory: that of --run, or the newest or a new one.

    Args:
      args: a dataclass of arguments with the fields `run` and `resume`.
      base: where runs without a name lie.
      apart: see `resumed_arguments`.

    Raises:
      ValueError: if there is nothing to resume, an option differs from the run's, or a new run would mix with another.
    """
    if args.resume:
        run = args.run or newest_run(base)
        return resumed_arguments(args, run, apart=apart), run
    run = args.run or base / now()
    if (run / "run.json").exists():
        raise ValueError(f"--run {run} already holds a run; go on with it by --resume, or choose another directory")
    return args, run


def now() -> str:
    """The time, as a name; that of process 0 in all processes."""
    now = int(time.time())
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        now = int(multihost_utils.broadcast_one_to_all(np.int32(now)))
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(now))


def interrupted(run: pathlib.Path) -> int:
    """Says how to go on with a run that a signal ended, and returns the exit status."""
    again = shlex.join(["python", sys.argv[0], "--resume", "--run", str(run)])
    print(f"Interrupted; what is finished is saved. Go on with: {again}")
    return INTERRUPTED


def publish(
    result: Report, run: pathlib.Path, pictures: Sequence[pathlib.Path], results: pathlib.Path | None
) -> list[pathlib.Path]:
    """Writes the report of a run, and with `results` also among the results that are kept; says where.

    Args:
      result: the report.
      run: run directory.
      pictures: figures of the run; among the results they are called `figures/<system>_<name>`, or `<system>.png` if a
        picture bears the name of the system.
      results: folder of the results that are kept, None for runs that are not what the script's card promises.

    Returns:
      The paths of reports and pictures; none in other processes than the first.
    """
    if not distributed.is_main():
        return []
    reports, pictures = [result.write(run / "report.json")], list(pictures)
    if results is not None:
        reports.append(result.write(results / f"{result.system}.json"))
        for picture in list(pictures):
            name = picture.name if picture.stem == result.system else f"{result.system}_{picture.name}"
            pictures.append(results / "figures" / name)
            pictures[-1].parent.mkdir(parents=True, exist_ok=True)
            pictures[-1].write_bytes(picture.read_bytes())
    print(f"Report: {', '.join(map(str, reports))}\nFigures: {', '.join(map(str, pictures))}")
    return [*reports, *pictures]


def resumed_arguments(args: Args, run: pathlib.Path, *, apart: Sequence[str]) -> Args:
    """The arguments of a resumed run: those it was started with.

    Args:
      args: a dataclass with a default for every field, as parsed from the command line.
      run: the run directory.
      apart: fields that are taken from `args` whatever the run says.

    Returns:
      A dataclass of the same type.

    Raises:
      ValueError: if a field was given and differs.
    """
    saved: Mapping[str, Any] = read_run(run)["arguments"]
    hints = typing.get_type_hints(type(args))
    values, differing = {}, []
    for field in dataclasses.fields(args):
        given = getattr(args, field.name)
        if field.name in apart or field.name not in saved:
            continue
        value = saved[field.name]
        if isinstance(value, list):
            value = tuple(value)
        if value is not None and pathlib.Path in typing.get_args(hints[field.name]):
            value = pathlib.Path(value)
        if given not in (field.default, value):
            differing.append(f"  --{field.name}: started with {_shown(value)}, now {_shown(given)}")
        values[field.name] = value
    if differing:
        raise ValueError(f"--resume goes on with the options that {run} was started with:\n" + "\n".join(differing))
    return dataclasses.replace(args, **values)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "nothing" if isinstance(value, tuple) else str(value)


def write_same(path: pathlib.Path, text: str, *, resume: bool) -> None:
    """Writes a file that a resumed run must find as it is.

    Raises:
      ValueError: if it differs.
    """
    if resume and path.exists() and path.read_text() != text:
        raise ValueError(f"The data differ from those that the run was started with ({path} would change)")
    distributed.barrier(path.name)
    if distributed.is_main():
        path.write_text(text)
