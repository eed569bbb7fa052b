r"""What a run directory holds: how it was started, how far it came, its checkpoints and its parameters.

    python -m mtjax.inspect runs/20261126-101500             # configuration, last metrics, checkpoints, sizes
    python -m mtjax.inspect runs/20261126-101500 --params    # and every parameter: shape, dtype, bytes, sharding
    python -m mtjax.inspect runs/20261126-101500 --check     # also read all arrays and compare their checksums
    python -m mtjax.inspect runs/20261126-101500 --json      # all of it for other programs

No array is restored (--check reads them, one checkpoint at a time, to the memory of this machine), nothing is changed,
and no accelerator is used, so a run may be looked at while it is training. A run directory of an experiment with
several models shows each of them.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

CHECKPOINTS, ASIDE, METRICS, RUN = "checkpoints", "damaged_checkpoints", "metrics.jsonl", "run.json"


def inspect_run(run: pathlib.Path | str, *, check: bool = False) -> dict[str, Any]:
    """What is known about a run, as plain JSON values.

    Args:
      run: its directory.
      check: read the arrays of every checkpoint and compare their checksums; otherwise only its record and index.

    Returns:
      'run', the content of run.json under 'started_with' (None without), and 'models': for each folder with checkpoints
      or metrics its 'name' (path from the run), 'evaluations', 'last' (the last record of metrics.jsonl), 'checkpoints'
      (step, bytes, time, score, format of the record, problem: None if it is good), 'put_aside' (damaged ones, moved
      away), 'description', 'code' (commit, versions, device) and 'arrays' (path, shape, dtype, bytes, sharding) of the
      newest good one.

    Raises:
      ValueError: if the directory holds no run.
    """
    run = pathlib.Path(run).resolve()
    if not run.is_dir():
        raise ValueError(f"{run} is no directory; give the directory of a run, such as runs/20261126-101500")
    folders = list(_model_folders(run))
    if not folders and not (run / RUN).is_file():
        inside = sorted(path.parent.name for path in run.glob(f"*/{RUN}"))
        hint = "A run is what an experiment writes with --run DIR, or mtjax.train.fit(directory=DIR)"
        if inside:
            hint = f"It holds runs: {', '.join(inside[:8])}{', ...' * (len(inside) > 8)}; give one of them"
        raise ValueError(f"{run} is no run: it has no {RUN}, and no {CHECKPOINTS} or {METRICS} at or below it. {hint}")
    started = json.loads((run / RUN).read_text()) if (run / RUN).is_file() else None
    return {"run": str(run), "started_with": started, "models": [_model(run, folder, check) for folder in folders]}


def _model_folders(run: pathlib.Path) -> Iterator[pathlib.Path]:
    """Folders at or below the run with checkpoints or metrics; not those of another run that lies inside."""
    for place, folders, files in os.walk(run):
        if RUN in files and pathlib.Path(place) != run:
            folders.clear()
            continue
        if CHECKPOINTS in folders or METRICS in files:
            yield pathlib.Path(place)
        folders[:] = sorted(set(folders) - {CHECKPOINTS, ASIDE})


def _model(run: pathlib.Path, folder: pathlib.Path, check: bool) -> dict[str, Any]:
    from mtjax.train.checkpoint import steps_in

    records = list(_records(folder / METRICS))
    model = {
        "name": folder.relative_to(run).as_posix(),
        "evaluations": len(records),
        "last": records[-1] if records else None,
        "checkpoints": [],
        "put_aside": sorted(path.name for path in (folder / ASIDE).iterdir()) if (folder / ASIDE).is_dir() else [],
        "description": None,
        "code": None,
        "arrays": [],
    }
    for step in steps_in(folder / CHECKPOINTS):
        checkpoint, content, arrays = _checkpoint(folder / CHECKPOINTS / str(step), check)
        model["checkpoints"].append(checkpoint)
        if arrays:
            described = content["record"].get("run", content["record"])
            model |= {"description": described, "code": content.get("code"), "arrays": arrays}
    return model


def _records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; the last may be cut short in a run that was killed."""
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _checkpoint(folder: pathlib.Path, check: bool) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """A checkpoint, what lies beside its arrays, and its arrays."""
    from mtjax.train.checkpoint import FORMAT, read_content, reason_of

    files = [path for path in folder.rglob("*") if path.is_file()]
    checkpoint = {
        "step": int(folder.name),
        "bytes": sum(path.stat().st_size for path in files),
        "time": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime)),
        "score": None,
        "format": None,
        "problem": None,
    }
    content, arrays = {}, []
    try:
        content = read_content(folder)
        checkpoint |= {"score": content.get("score"), "format": content.get("format", 1)}
        if check and checkpoint["format"] == FORMAT:
            _check_arrays(folder, content)
        arrays = _arrays(folder, content)
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        checkpoint["problem"] = reason_of(error)
    return checkpoint, content, arrays


def _index(folder: pathlib.Path) -> dict[str, Any]:
    """Path -> orbax's metadata of every array of a checkpoint."""
    import orbax.checkpoint as ocp

    from mtjax.train.checksums import named_leaves

    tree = ocp.StandardCheckpointHandler().metadata(folder / "state").tree
    paths, leaves = named_leaves(tree)
    return {path: leaf for path, leaf in zip(paths, leaves, strict=True) if hasattr(leaf, "shape")}


def _arrays(folder: pathlib.Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = _index(folder)
    missing = content["layout"].keys() - found.keys()
    if missing:
        raise ValueError(f"its index lacks {len(missing)} arrays, such as {min(missing)}")
    arrays = []
    for path, layout in content["layout"].items():
        leaf = found[path]
        # The record knows of PRNG keys and arrays without elements, which are stored as something else.
        dtype, _, shape = layout[:-1].rpartition("[")
        shape = [int(size) for size in shape.split(",") if size.strip()]
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize if math.prod(shape) else 0
        sharding = _described(leaf.sharding)
        arrays.append({"path": path, "shape": shape, "dtype": dtype, "bytes": size, "sharding": sharding})
    return arrays


def _described(sharding: Any) -> str | None:
    """'fsdp, None on data=2 fsdp=4', or None for an array on one device."""
    names = getattr(sharding, "axis_names", None)
    if names is None:
        return None
    mesh = " ".join(f"{name}={size}" for name, size in zip(names, sharding.shape, strict=True) if size > 1)
    spec = ["*".join(part) if isinstance(part, list | tuple) else str(part) for part in sharding.partition_spec]
    whole = all(part == "None" for part in spec)
    return f"{'replicated' if whole else ', '.join(spec)} on {mesh or 'one device'}"


def _check_arrays(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Raises a ValueError if an array does not match its checksum."""
    import jax
    import orbax.checkpoint as ocp

    from mtjax.train.checksums import checksums

    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder / "state").tree
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    found = checksums(handler.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=how)))
    empty = {path for path, layout in content["layout"].items() if not _elements(layout)}
    bad = [path for path, saved in content["checksums"].items() if path not in empty and found[path] != saved]
    if bad:
        raise ValueError(f"{len(bad)} of its arrays do not match their checksums, the first is {bad[0]}")


def _elements(layout: str) -> int:
    """Number of elements of 'float32[2, 3]'."""
    return math.prod(int(size) for size in layout[:-1].rpartition("[")[2].split(",") if size.strip())


# What a person reads.


def show(found: Mapping[str, Any], *, params: bool = False, check: bool = False) -> None:
    """Prints what `inspect_run` found.

    Args:
      found: its result.
      params: list every parameter.
      check: whether checksums were compared, for the words.
    """
    print(f"Run {found['run']}")
    if found["started_with"] is not None:
        _table("started with", ("setting", "value"), _flat(found["started_with"]))
    for model in found["models"]:
        title = "" if model["name"] == "." else f"{model['name']}: "
        if found["started_with"] is None and model["description"]:
            _table(f"{title}configuration", ("setting", "value"), _flat(model["description"]))
        _show_last(title, model)
        _show_checkpoints(title, model, check)
        _show_arrays(title, model["arrays"], params)
    if not found["models"]:
        print("It was started, and has no metrics or checkpoints yet.")


def _show_last(title: str, model: Mapping[str, Any]) -> None:
    last = model["last"]
    if last is None:
        return
    rows = [
        (task, name, _mean(values))
        for task, metrics in last.get("metrics", {}).items()
        for name, values in metrics.items()
    ]
    where = ", ".join(f"{key} {last[key]:g}" for key in ("step", "epoch") if key in last)
    lanes = max(
        (len(v) for m in last.get("metrics", {}).values() for v in m.values() if isinstance(v, list)), default=1
    )
    over = f", mean over {lanes} runs" if lanes > 1 else ""
    _table(f"{title}evaluation {model['evaluations']} ({where}{over})", ("task", "metric", "value"), rows)


def _show_checkpoints(title: str, model: Mapping[str, Any], check: bool) -> None:
    from mtjax.train.checkpoint import FORMAT

    rows, scored = [], any(found["score"] is not None for found in model["checkpoints"])
    for found in model["checkpoints"]:
        state = "good" if check else "good (record and index)"
        if found["problem"] is not None:
            state = f"damaged: {found['problem']}"
        elif found["format"] != FORMAT:
            state = f"of another version of mtjax (format {found['format']}, this one restores {FORMAT})"
        score = ["" if found["score"] is None else f"{found['score']:g}"] if scored else []
        rows.append((found["step"], _size(found["bytes"]), found["time"], *score, state))
    if rows:
        _table(f"{title}checkpoints", ("step", "size", "written", *["score"] * scored, "state"), rows)
    if model["put_aside"]:
        print(f"{title}damaged and put aside: {', '.join(model['put_aside'])} (step.number, in {ASIDE})")
    code = model["code"]
    if code:
        commit = (
            "no commit"
            if code["commit"] is None
            else f"commit {code['commit'][:10]}" + " (dirty)" * bool(code["dirty"])
        )
        versions = ", ".join(f"{name} {version}" for name, version in code["versions"].items())
        print(f"{title}saved by {commit} on {code['device']}; {versions}")


def _show_arrays(title: str, arrays: Sequence[Mapping[str, Any]], params: bool) -> None:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for array in arrays:
        groups.setdefault(array["path"].split("/")[0], []).append(array)
    rows = [
        (
            name,
            len(group),
            sum(math.prod(a["shape"]) for a in group),
            _size(sum(a["bytes"] for a in group)),
            _meshes(group),
        )
        for name, group in groups.items()
    ]
    if rows:
        _table(f"{title}state of the newest good checkpoint", ("part", "arrays", "numbers", "size", "sharding"), rows)
    if params:
        listed = groups.get("params", arrays)
        rows = [
            (a["path"], str(a["shape"]), a["dtype"], _size(a["bytes"]), a["sharding"] or "one device") for a in listed
        ]
        _table(f"{title}parameters", ("path", "shape", "dtype", "size", "sharding"), rows)


def _meshes(group: Sequence[Mapping[str, Any]]) -> str:
    split = [array for array in group if array["sharding"] and not array["sharding"].startswith("replicated")]
    return f"{len(split)} of {len(group)} split" if split else "whole"


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """('train.batch_size', '512') of nested dicts."""
    if isinstance(tree, Mapping) and tree:
        return [row for key, value in tree.items() for row in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, tree if isinstance(tree, str) else json.dumps(tree))]


def _mean(values: Any) -> str:
    known = [value for value in (values if isinstance(values, list) else [values]) if value is not None]
    return f"{sum(known) / len(known):.4g}" if known else "n/a"


def _size(count: int) -> str:
    """Bytes as people write them.

    >>> _size(900), _size(1_536_000)
    ('900 B', '1.54 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count /= 1000
    raise AssertionError


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on the terminal; lines of full length in a pipe or without rich."""
    cells = [[str(cell) for cell in row] for row in rows]
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        terminal = False
    else:
        terminal = Console().is_terminal
    if terminal:
        table = Table(title=escape(title), title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in cells:
            table.add_row(*map(escape, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}")
    for row in (columns, *cells):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mtjax.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, metavar="RUN", help="run directory")
    parser.add_argument("--params", action="store_true", help="list every parameter")
    parser.add_argument("--check", action="store_true", help="read all arrays and compare their checksums")
    parser.add_argument("--json", action="store_true", help="print JSON, with all arrays of the state")
    args = parser.parse_args(arguments)
    try:
        found = inspect_run(args.run, check=args.check)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if args.json:
            print(json.dumps(found, indent=2))
        else:
            show(found, params=args.params, check=args.check)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")  # the run may be training on the accelerator
    sys.exit(main())
