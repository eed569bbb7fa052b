r"""The report of an experiment: one JSON file whose top-level keys every experiment shares.

    system, claim, preset, command, seeds, commit, dirty, device, versions, wall_s, rows, holds (, details)

A row is one cell of a table of results, `{model, task, metric, mean, se, n, baseline}`: mean and standard error over n
seeds, and what it is compared with (the name of a model of these rows, a published number, or null). Rows may carry
more, such as `params` and `rows_per_s`. `holds` is `{"holds": true | false | null, "reason": "..."}`: whether the claim
of the paper was seen here; null if this run cannot tell.

An experiment records where it runs when it starts, collects rows and findings, and writes once:

>>> where = provenance()
>>> rows = result_rows("shared bottom", {"price": {"rmse": [9.0, 11.0]}}, baseline="single-task MLP", params=1200)
>>> rows[0]["mean"], rows[0]["se"], rows[0]["n"]
(10.0, 1.0, 2)
>>> finding = Finding("sharing helps", "12.1 ± 0.4", "10.0 ± 1.0", True, "2.1 below the baseline, 2 s.e.")
>>> report = from_findings("demo", [finding], preset="smoke", seeds=[0, 1], wall_s=3.5, rows=rows, provenance=where)
>>> report.holds
{'holds': True, 'reason': '2.1 below the baseline, 2 s.e.'}
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtjax.delta import DeltaM, Results

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_ROW_KEYS = ("model", "task", "metric", "mean", "se", "n", "baseline")
DELTA_CELL = ("all", "delta_m")
"""Task and metric of the rows that hold Delta_m."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table "claim | baseline | ours | holds?".

    Attributes:
      claim: what the paper says, in one sentence.
      baseline: what it is compared with, ready to print, such as "single token: 0.71 ± 0.01".
      ours: what was measured, likewise.
      holds: whether the claim was seen here, None if this run cannot tell.
      reason: why, in one sentence with numbers.
    """

    claim: str
    baseline: str
    ours: str
    holds: bool | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What an experiment found, where and how; see the module docstring for the meaning of rows and holds.

    Attributes:
      system: name of the reproduced system.
      claim: the paper's claim.
      preset: 'smoke', 'demo' or 'paper'.
      command: the command line that produced this report.
      seeds: the seeds, in the order of all per-seed values.
      commit: git commit of the code, None outside of a repository.
      dirty: whether the working tree differed from that commit, None outside of a repository.
      device: number and kind of devices.
      versions: package -> version.
      wall_s: duration in seconds.
      rows: results.
      holds: the verdict on the claim.
      details: anything else that is worth keeping: findings, hyperparameters, curves.
    """

    system: str
    claim: str
    preset: str
    command: str
    seeds: list[int]
    commit: str | None
    dirty: bool | None
    device: str
    versions: dict[str, str]
    wall_s: float
    rows: list[Row]
    holds: dict[str, Any]
    details: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values, validated; `details` only if there are any.

        Raises:
          ValueError: if a field is not what the schema says.
          TypeError: if a value has no JSON form.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.details is None:
            del fields["details"]
        content = _plain(fields, "report")
        validate(content)
        return content

    def write(self, path: str | os.PathLike) -> Path:
        """Writes strict JSON (NaN and infinity become null), whole or not at all.

        Args:
          path: of the file; its folder is made if needed.

        Returns:
          The path.
        """
        path = Path(path)
        # Rendered before any file is touched; then renamed over the old report in one step.
        text = json.dumps(self.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Report":
        """Inverse of `write`; null in the numbers of a row becomes NaN again.

        Raises:
          ValueError: if the file is not JSON or not a report; the message names the file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            validate(content)
        except ValueError as error:
            raise ValueError(f"{path} is not a report: {error}") from error
        nan = {"mean": math.nan, "se": math.nan}
        content["rows"] = [row | {k: v for k, v in nan.items() if row[k] is None} for row in content["rows"]]
        return cls(**content)


def from_findings(
    system: str,
    findings: Sequence[Finding],
    *,
    preset: str,
    seeds: Sequence[int],
    wall_s: float,
    rows: Sequence[Row],
    provenance: Mapping[str, Any],
    details: Mapping[str, Any] | None = None,
) -> Report:
    """A report whose claim and verdict are those of its findings, which it keeps under `details["findings"]`.

    All findings must hold for the verdict to be True; one that does not makes it False; else one that cannot be told
    makes it None.

    Args:
      system, preset, seeds, wall_s, rows: as in `Report`.
      findings: at least one.
      provenance: what `provenance()` returned when the run started.
      details: more to keep.

    Returns:
      The report.

    Raises:
      ValueError: if there is no finding.
    """
    if not findings:
        raise ValueError(f"Report '{system}' needs at least one finding: an experiment is run to check a claim")
    verdicts = [finding.holds for finding in findings]
    holds = False if False in verdicts else None if None in verdicts else True
    return Report(
        system=system,
        claim="; ".join(finding.claim for finding in findings),
        preset=preset,
        seeds=list(seeds),
        wall_s=wall_s,
        rows=list(rows),
        holds={"holds": holds, "reason": "; ".join(finding.reason for finding in findings)},
        details={"findings": [dataclasses.asdict(finding) for finding in findings], **(details or {})},
        **provenance,
    )


def result_rows(model: str, results: Results, *, baseline: str | float | None = None, **extra: Any) -> list[Row]:
    """One row per task and metric.

    Args:
      model: name of the model.
      results: task -> metric -> a number or one number per seed [S].
      baseline: what the model is compared with.
      **extra: more keys of every row, such as `params=` and `rows_per_s=`.

    Returns:
      The rows; `se` is the standard error of the mean over seeds (ddof 1), NaN with one seed.
    """
    rows = []
    for task, metrics in results.items():
        for metric, values in metrics.items():
            seeds = np.atleast_1d(np.asarray(values, np.float64))
            se = float(seeds.std(ddof=1) / math.sqrt(seeds.size)) if seeds.size > 1 else math.nan
            rows.append(_row(model, task, metric, float(seeds.mean()), se, seeds.size, baseline) | extra)
    return rows


def delta_rows(table: Mapping[str, DeltaM], baseline: str, **extra: Any) -> list[Row]:
    """Delta_m of every model as rows of task 'all' and metric 'delta_m' (percent, positive is better)."""
    return [_row(model, *DELTA_CELL, gain.mean, gain.stderr, gain.n, baseline) | extra for model, gain in table.items()]


def _row(model: str, task: str, metric: str, mean: float, se: float, n: int, baseline: str | float | None) -> Row:
    return dict(zip(_ROW_KEYS, (model, task, metric, mean, se, n, baseline), strict=True))


def provenance(*, outputs: Sequence[str | os.PathLike] = ()) -> dict[str, Any]:
    """Command, commit, dirty, device and versions; call it when the run starts, before it writes anything.

    A copy of the files that is not in their own repository can be told which commit it is of, by MTJAX_COMMIT; whether
    it differs from that commit is then not known.

    Args:
      outputs: files or folders that the experiment itself writes; that they differ does not make the tree dirty.

    Returns:
      Those fields of a `Report`.
    """
    told = os.environ.get("MTJAX_COMMIT")
    commit, dirty = (told, None) if told else git_state(Path(__file__).resolve(), outputs=outputs)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "dirty": dirty,
        "device": _device(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
    }


def git_state(source: Path, *, outputs: Sequence[str | os.PathLike] = ()) -> tuple[str | None, bool | None]:
    """Commit of the repository that tracks the file `source`, and whether its working tree differs from the commit.

    Changed, staged, deleted and new files (and submodules) count, whatever git is configured to show; files that
    .gitignore names do not, nor do `outputs`.

    Args:
      source: a file of the running code. An installed copy that lies inside of another project's repository is not
        tracked there, and gets (None, None).
      outputs: files or folders to leave out.

    Returns:
      (commit, dirty), or (None, None) without git, outside of a repository, or if the file is not tracked.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        commit, top = git("rev-parse", "HEAD"), git("rev-parse", "--show-toplevel")
        paths = [Path(output).absolute() for output in outputs]
        inside = [path.relative_to(top).as_posix() for path in paths if path.is_relative_to(top)]
        excluded = [f":(top,exclude,literal){path}" for path in inside]
        changes = git("status", "--porcelain", "--untracked-files=all", "--ignore-submodules=none", ":/", *excluded)
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(changes)


def _device() -> str:
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kind = f"{platform.machine()} CPU, {cores} cores"
    return f"{len(devices)} x {kind}"


def _plain(value: Any, where: str) -> Any:
    """Copies a value into plain JSON types; `where` names it in errors."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            raise TypeError(f"{where} has the key {bad[0]!r}; JSON takes strings as keys")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist(), where)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{where} is a {type(value).__name__}, which has no JSON form; convert it to numbers and strings")


def validate(content: Any) -> None:
    """Checks the JSON content of a report.

    Args:
      content: what `json.load` gives.

    Raises:
      ValueError: with a sentence that names the field, what was expected and what was found.
    """
    if not isinstance(content, dict):
        raise ValueError(f"a report is a JSON object, got {type(content).__name__}")
    fields = {field.name for field in dataclasses.fields(Report)}
    missing, unknown = fields - {"details"} - content.keys(), content.keys() - fields
    if missing or unknown:
        raise ValueError(
            f"the keys of a report are fixed; missing: {', '.join(sorted(missing)) or 'none'}, "
            f"unknown: {', '.join(sorted(unknown)) or 'none'} (put more under 'details')"
        )
    for key in ("system", "claim", "preset", "command", "device"):
        _expect(isinstance(content[key], str), key, "a string", content[key])
    _expect(_is_number(content["wall_s"]), "wall_s", "a number of seconds", content["wall_s"])
    _expect(isinstance(content["commit"], str | None), "commit", "a string or null", content["commit"])
    _expect(isinstance(content["dirty"], bool | None), "dirty", "true, false or null", content["dirty"])
    seeds, versions, holds = content["seeds"], content["versions"], content["holds"]
    _expect(isinstance(seeds, list) and all(_is_integer(seed) for seed in seeds), "seeds", "a list of integers", seeds)
    is_versions = isinstance(versions, dict) and all(isinstance(version, str) for version in versions.values())
    _expect(is_versions, "versions", "an object of strings", versions)
    is_verdict = (
        isinstance(holds, dict)
        and holds.keys() == {"holds", "reason"}
        and isinstance(holds["holds"], bool | None)
        and isinstance(holds["reason"], str)
    )
    _expect(is_verdict, "holds", '{"holds": true, false or null, "reason": a string}', holds)
    _expect(isinstance(content.get("details", {}), dict), "details", "an object", content.get("details"))
    _expect(isinstance(content["rows"], list), "rows", "a list", content["rows"])
    for i, row in enumerate(content["rows"]):
        _validate_row(row, f"rows[{i}]")


def _validate_row(row: Any, where: str) -> None:
    _expect(isinstance(row, dict), where, "an object", row)
    missing = [key for key in _ROW_KEYS if key not in row]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; a row has {', '.join(_ROW_KEYS)}")
    for key in ("model", "task", "metric"):
        _expect(isinstance(row[key], str), f"{where}.{key}", "a string", row[key])
    for key in ("mean", "se"):
        _expect(row[key] is None or _is_number(row[key]), f"{where}.{key}", "a number or null", row[key])
    _expect(_is_integer(row["n"]) and row["n"] > 0, f"{where}.n", "a number of seeds > 0", row["n"])
    baseline = row["baseline"]
    is_baseline = isinstance(baseline, str | None) or _is_number(baseline)
    _expect(is_baseline, f"{where}.baseline", "the name of a model, a number or null", baseline)


def _expect(condition: bool, where: str, expected: str, found: Any) -> None:
    if not condition:
        raise ValueError(f"{where} must be {expected}, got {found!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)


def format_mean(mean: float, se: float = math.nan) -> str:
    """A mean with two significant digits of its standard error; four significant digits without one.

    >>> format_mean(0.81234, 0.0031), format_mean(38.2, 0.12), format_mean(1234.5, 56.0), format_mean(0.81234)
    ('0.8123 ± 0.0031', '38.20 ± 0.12', '1234 ± 56', '0.8123')
    """
    if not math.isfinite(mean):
        return "n/a" if math.isnan(mean) else f"{mean:+}"
    if math.isfinite(se) and se > 0:
        digits = min(max(1 - math.floor(math.log10(se)), 0), 4)
        return f"{mean:.{digits}f} ± {se:.{digits}f}"
    digits = min(max(3 - math.floor(math.log10(abs(mean))), 0), 4) if mean else 1
    return f"{mean:.{digits}f}" + (" ± 0" if se == 0 else "")
