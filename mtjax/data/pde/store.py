"""Generated data sets on disk: a file per configuration, written whole or not at all, checked when it is read.

A data set is a nested dictionary of arrays, made by a function from a frozen configuration. `cached` returns the file's
content if there is one and makes it otherwise:

    folder / {name}-v{FORMAT_VERSION}-{hash of the configuration}.npz

The hash covers the class of the configuration, all its fields and its `version` (a class attribute: raise it when the
same fields come to mean other numbers). The file is a plain compressed npz, so `numpy.load(path, allow_pickle=False)`
reads it too, plus a `header.json` that repeats the configuration in readable form. It is written beside its place and
moved there, so nobody ever sees half of it; the checksums of the zip format catch what happens to it later.

>>> import dataclasses, tempfile
>>> @dataclasses.dataclass(frozen=True)
... class Squares:
...     rows: int = 3
>>> def make(progress):
...     return {"inputs": {"x": np.arange(3.0)}, "values": np.arange(3.0) ** 2}
>>> with tempfile.TemporaryDirectory() as folder:
...     first = cached("squares", Squares(), make, folder=folder)
...     again = cached("squares", Squares(), None, folder=folder)  # nothing is made: it is read
>>> again["inputs"]["x"].tolist(), again["values"].tolist()
([0.0, 1.0, 2.0], [0.0, 1.0, 4.0])
"""

import contextlib
import dataclasses
import enum
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import struct
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mtjax.sharding import on_one_device

FORMAT_VERSION = 1
_HEADER = "header.json"
# Level 1 of zlib is 5 times faster than level 6 and within a few per cent of its size on fields and masks.
_LEVEL = 1
# What reading a cut or overwritten file can raise.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError)

Arrays = dict[str, Any]
Advance = Callable[[int, int], None]


def cached(
    name: str,
    config: Any,
    make: Callable[[Advance], Mapping[str, Any]],
    *,
    folder: str | os.PathLike | None = None,
    show_progress: bool = True,
) -> Arrays:
    """The data set of a configuration: read from disk if it is there and whole, else made and written.

    Args:
      name: short name of the kind of data set, the first part of the file's name: letters, digits, '_' and '-'.
      config: instance of a dataclass of plain values (numbers, strings, tuples, arrays, dataclasses, None) that
        determines the arrays; `version`, a class attribute, counts too.
      make: `make(progress) -> arrays`, a dictionary of arrays and of such dictionaries. It should call
        `progress(done, total)` after each chunk: a bar with the remaining time appears after two seconds.
      folder: where to keep the file; None: $MTJAX_DATA, else ~/.cache/mtjax.
      show_progress: False shows no bar.

    Returns:
      The arrays, nested as `make` returned them. What is read equals what was written bit by bit.

    Raises:
      ValueError: for a name, a configuration or arrays that cannot be stored.
      OSError: if the folder cannot be made or written; this is found before anything is generated.
    """
    path = path_of(name, config, folder=folder)
    if path.exists():
        try:
            return read(path, described(config))
        except _DAMAGE as error:
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"The stored data set {path} is damaged ({reason}); it is made anew", stacklevel=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(
            f"The folder {path.parent} of stored data sets cannot be written ({error}); pass folder=... or set "
            "the environment variable MTJAX_DATA"
        ) from error
    with on_one_device(), progress_bar(f"Generating {name}", enabled=show_progress) as advance:
        flat = flatten(make(advance))
    try:
        write(path, flat, described(config))
    except OSError as error:  # a full disk should not cost what was just computed
        warnings.warn(f"The data set {name!r} could not be stored as {path} ({error})", stacklevel=2)
    return nested(flat)


def default_folder() -> pathlib.Path:
    """$MTJAX_DATA if it is set and not empty, else ~/.cache/mtjax."""
    given = os.environ.get("MTJAX_DATA")
    return pathlib.Path(given) if given else pathlib.Path.home() / ".cache" / "mtjax"


def path_of(name: str, config: Any, *, folder: str | os.PathLike | None = None) -> pathlib.Path:
    """The file that `cached` reads or writes for a name and a configuration."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"name={name!r} cannot begin a file's name; expected letters, digits, '_' and '-' only")
    text = json.dumps(described(config), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    home = default_folder() if folder is None else pathlib.Path(folder).expanduser()
    return home / f"{name}-v{FORMAT_VERSION}-{digest}.npz"


def described(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values; configurations that differ give values that differ."""
    if isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise ValueError(f"config must be an instance of a dataclass, got {config!r}")
    return _plain(config, "config")


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
        return {"class": type(value).__qualname__, "version": getattr(type(value), "version", 1), "fields": fields}
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return {"shape": list(value.shape), "dtype": value.dtype.str, "sha256": digest}
    raise ValueError(
        f"{where} is a {type(value).__name__}, which has no stable description to name a file by; a configuration of "
        "a stored data set holds numbers, strings, tuples, arrays, dataclasses and None"
    )


def flatten(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dictionaries as one, with the keys joined by '/'; leaves become numpy arrays."""
    flat = {}
    for key, value in arrays.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise ValueError(f"Key {key!r} of a data set must be a non-empty string without '/'")
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
            continue
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise ValueError(f"Array {prefix + key!r} holds Python objects; only numbers, bools and strings are stored")
        flat[prefix + key] = array
    return flat


def nested(flat: Mapping[str, np.ndarray]) -> Arrays:
    """The inverse of `flatten`."""
    arrays: Arrays = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        inner = arrays
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return arrays


def write(path: pathlib.Path, flat: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> None:
    """Writes flat arrays and the description of their configuration as an npz, at once; equal data give equal bytes."""
    # Not tempfile: its files are private to a user, and a folder of data may be shared.
    temporary = path.with_name(f".{path.stem}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as archive:
                header = {"format": FORMAT_VERSION, "config": description, "arrays": list(flat)}
                with archive.open(_HEADER, "w") as stream:
                    stream.write(json.dumps(header, indent=1).encode())
                for key, array in flat.items():
                    with archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
                        np.lib.format.write_array(stream, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read(path: pathlib.Path, description: Mapping[str, Any] | None = None) -> Arrays:
    """Reads a file of `write`, nested; raises ValueError or an error of zipfile if it is not whole or not that one."""
    with zipfile.ZipFile(path) as archive:
        header = json.loads(archive.read(_HEADER))
        if header["format"] != FORMAT_VERSION:
            raise ValueError(f"its format is {header['format']}, expected {FORMAT_VERSION}")
        if description is not None and header["config"] != description:
            raise ValueError("it belongs to another configuration than its name says")
        flat = {}
        for key in header["arrays"]:
            with archive.open(f"{key}.npy") as stream:
                flat[key] = np.lib.format.read_array(stream, allow_pickle=False)
                stream.read()  # the checksum is compared at the end of the member
    return nested(flat)


@contextlib.contextmanager
def progress_bar(title: str, *, enabled: bool = True, after_s: float = 2.0, every_s: float = 10.0) -> Iterator[Advance]:
    """Yields `advance(done, total)`: from `after_s` on a bar on a terminal, a line every `every_s` elsewhere."""
    started = last = time.monotonic()
    bar = task = None

    def advance(done: int, total: int) -> None:
        nonlocal bar, task, last
        now = time.monotonic()
        if not enabled or now - started < after_s:
            return
        if bar is None and task is None:
            bar, task = _start_bar(title)
        if bar is not None:
            bar.update(task, completed=done, total=total)
        elif now - last >= every_s:
            last = now
            print(f"{title}: {done:,} of {total:,} in {now - started:.0f} s", flush=True)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _start_bar(title: str) -> tuple[Any, Any]:
    """A started rich bar and its task, or (None, True) where there is no terminal."""
    from rich import progress
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    if not console.is_terminal:
        return None, True
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(bar_width=24))
    columns += (progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
    bar = progress.Progress(*columns, console=console, transient=True)
    bar.start()
    return bar, bar.add_task(escape(title), total=None)
