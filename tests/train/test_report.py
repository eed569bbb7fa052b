"""Reports: schema, strict JSON, atomic writing, provenance from git, console tables."""

import json
import math
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mtjax.delta import delta_table
from mtjax.train import report as reports
from mtjax.train import tables

KEYS = ["system", "claim", "preset", "command", "seeds", "commit", "dirty", "device", "versions", "wall_s", "rows"]
KEYS += ["holds", "details"]
RESULTS = {
    "single-task MLP": {
        "delay": {"rmse": [10.0, 12.0, 11.0], "r2": [0.2, 0.25, 0.3]},
        "late": {"auroc": [0.7, 0.7, 0.7]},
    },
    "MMoE": {"delay": {"rmse": [9.0, 11.0, 11.5], "r2": [0.25, 0.3, 0.28]}, "late": {"auroc": [0.72, 0.7, 0.71]}},
}
DIRECTIONS = {"delay": {"rmse": False, "r2": True}, "late": {"auroc": True}}
FINDING = reports.Finding("sharing helps", "0", "+4 ± 1", True, "4 s.e. above zero")
DOUBT = reports.Finding("order matters [a]", "1", "1.0 ± 0.2", None, "within one s.e.")


def make_report(**changes) -> reports.Report:
    rows = [
        row
        for model, results in RESULTS.items()
        for row in reports.result_rows(model, results, baseline="single-task MLP", params=12345, rows_per_s=2e4)
    ]
    rows += reports.delta_rows(delta_table(RESULTS, "single-task MLP", DIRECTIONS), "single-task MLP")
    arguments = dict(preset="demo", seeds=[0, 1, 2], wall_s=1.5, rows=rows, provenance=reports.provenance())
    return reports.from_findings("multitab", [FINDING, DOUBT], **(arguments | changes))


def test_the_file_has_exactly_the_shared_keys(tmp_path: Path):
    path = make_report().write(tmp_path / "new" / "multitab.json")
    content = json.loads(path.read_text())
    assert list(content) == KEYS
    assert list(content["rows"][0])[:7] == ["model", "task", "metric", "mean", "se", "n", "baseline"]
    assert set(content["versions"]) == {"python", "jax", "jaxlib", "flax", "optax", "numpy"}
    assert content["versions"]["jax"] == jax.__version__
    assert content["device"].startswith(f"{jax.device_count()} x ")
    assert content["command"].startswith("python ")
    assert [p.name for p in path.parent.iterdir()] == ["multitab.json"]


def test_details_are_optional(tmp_path: Path):
    whole = make_report()
    bare = reports.Report(**{key: getattr(whole, key) for key in KEYS if key != "details"})
    assert list(json.loads(bare.write(tmp_path / "a.json").read_text())) == KEYS[:-1]
    assert reports.Report.read(tmp_path / "a.json").details is None


def test_round_trip_and_strict_json(tmp_path: Path):
    rows = reports.result_rows("m", {"t": {"auroc": math.nan, "rmse": np.float32(2.0)}}, note=np.int32(3))
    details = {"curve": jnp.arange(2.0), "bad": [math.inf, -math.inf], "where": Path("runs/a"), "pair": (1, True)}
    report = make_report(rows=rows, details=details, seeds=range(1))
    path = report.write(tmp_path / "r.json")
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    again = reports.Report.read(path)
    assert again.details | {"findings": 0} == {
        "curve": [0.0, 1.0],
        "bad": [None, None],
        "where": "runs/a",
        "pair": [1, True],
        "findings": 0,
    }
    assert math.isnan(again.rows[0]["mean"]) and math.isnan(again.rows[1]["se"]) and again.rows[1]["mean"] == 2.0
    assert again.rows[1]["note"] == 3 and again.rows[1]["n"] == 1 and again.seeds == [0]
    assert again.write(tmp_path / "s.json").read_text() == text


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    path = make_report().write(tmp_path / "r.json")
    before = path.read_text()
    with pytest.raises(
        TypeError, match=r"report\['details'\]\['f'\]\[0\] is a builtin_function_or_method, which has no JSON form"
    ):
        make_report(details={"f": [len]}).write(path)
    with pytest.raises(TypeError, match=r"has the key 3; JSON takes strings"):
        make_report(details={3: 1}).write(path)
    with pytest.raises(ValueError, match=r"wall_s must be a number of seconds, got 'long'"):
        make_report(wall_s="long").write(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_rows_and_delta_rows():
    rows = reports.result_rows("MMoE", {"delay": {"rmse": [9.0, 11.0, 10.0]}}, baseline=11.0, params=7)
    assert rows == [
        {
            "model": "MMoE",
            "task": "delay",
            "metric": "rmse",
            "mean": 10.0,
            "se": pytest.approx(1 / math.sqrt(3)),
            "n": 3,
        }
        | {"baseline": 11.0, "params": 7}
    ]
    gain = delta_table(RESULTS, "single-task MLP", DIRECTIONS)
    zero, mmoe = reports.delta_rows(gain, "single-task MLP")
    assert (zero["mean"], zero["se"], zero["task"], zero["metric"]) == (0.0, 0.0, "all", "delta_m")
    assert (mmoe["mean"], mmoe["se"], mmoe["n"]) == (gain["MMoE"].mean, gain["MMoE"].stderr, 3)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [((True, True), True), ((True, None), None), ((None, False), False), ((True, False), False)],
)
def test_the_verdict_is_that_of_all_findings(verdicts, expected):
    findings = [reports.Finding(f"claim {i}", "", "", holds, f"reason {i}") for i, holds in enumerate(verdicts)]
    whole = make_report()
    report = reports.from_findings(
        "s", findings, preset="smoke", seeds=[0], wall_s=1, rows=whole.rows, provenance=reports.provenance()
    )
    assert report.holds == {"holds": expected, "reason": "reason 0; reason 1"}
    assert report.claim == "claim 0; claim 1"
    with pytest.raises(ValueError, match="at least one finding"):
        reports.from_findings("s", [], preset="smoke", seeds=[0], wall_s=1, rows=[], provenance={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 3}, "rows must be a list, got 3"),
        ({"dirty": "no"}, "dirty must be true, false or null, got 'no'"),
        ({"seeds": [True]}, "seeds must be a list of integers"),
        ({"versions": {"jax": 1}}, "versions must be an object of strings"),
        ({"holds": {"holds": True}}, "holds must be .*reason"),
        ({"commit": 1}, "commit must be a string or null"),
        ({"details": []}, "details must be an object"),
        ({"rows": [{"model": "m"}]}, r"rows\[0\] lacks task, metric, mean, se, n, baseline"),
        ({"rows": [7]}, r"rows\[0\] must be an object"),
        ({"extra": 1}, ".*missing: none, unknown: extra"),
    ],
)
def test_validation_names_what_is_wrong(tmp_path: Path, change: dict, message: str):
    path = make_report().write(tmp_path / "r.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"r\.json is not a report: {message}"):
        reports.Report.read(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("task", None, r"rows\[0\]\.task must be a string, got None"),
        ("mean", "high", r"rows\[0\]\.mean must be a number or null"),
        ("n", 0, r"rows\[0\]\.n must be a number of seeds > 0, got 0"),
        ("baseline", True, r"rows\[0\]\.baseline must be the name of a model, a number or null, got True"),
    ],
)
def test_validation_of_rows(key: str, value, message: str):
    content = make_report().to_json()
    content["rows"][0][key] = value
    with pytest.raises(ValueError, match=message):
        reports.validate(content)


def test_reading_something_else(tmp_path: Path):
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ValueError, match=r"r\.json is not a report: Expecting"):
        reports.Report.read(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(ValueError, match="a report is a JSON object, got list"):
        reports.Report.read(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ValueError, match="missing: claim, command, commit"):
        reports.Report.read(tmp_path / "r.json")


def test_commit_and_dirty(tmp_path: Path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    source = tmp_path / "package" / "code.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    results = tmp_path / "results"
    results.mkdir()
    (results / "x.json").write_text("1")
    assert reports.git_state(source) == (None, None)  # not a repository
    git("init", "-q")
    git("config", "status.showUntrackedFiles", "no")
    assert reports.git_state(source) == (None, None)  # not tracked, as an installed copy in someone's repository
    (tmp_path / ".gitignore").write_text("*.log\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit, dirty = reports.git_state(source)
    assert len(commit) == 40 and dirty is False
    (tmp_path / "run.log").write_text("ignored")
    (results / "x.json").write_text("2")
    assert reports.git_state(source) == (commit, True)
    assert reports.git_state(source, outputs=[results, "/elsewhere"]) == (commit, False)
    (tmp_path / "helper.py").write_text("new file, not shown by this repository's configuration")
    assert reports.git_state(source, outputs=[results]) == (commit, True)
    git("add", "helper.py")
    assert reports.git_state(source, outputs=[results]) == (commit, True)
    git("commit", "-q", "-m", "second", "helper.py")
    second, dirty = reports.git_state(source, outputs=[results])
    assert second != commit and dirty is False
    source.write_text("a = 2\n")
    assert reports.git_state(source, outputs=[results]) == (second, True)


def render(printable, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(printable)
    console.file.close()
    return console.export_text()


def test_claims_table():
    text = render(tables.claims_table([FINDING, DOUBT], title="multitab [demo]"))
    for words in ("claim", "baseline", "ours, mean ± s.e.", "holds?", "sharing helps", "+4 ± 1", "multitab [demo]"):
        assert words in text
    assert "yes: 4 s.e. above zero" in text and "open: within one s.e." in text and "order matters [a]" in text


def test_task_tables():
    (table,) = tables.task_tables(make_report().rows, metrics={"delay": "rmse", "late": "auroc"})
    text = render(table)
    assert "11.00 ± 0.58" in text and "0.7100 ± 0.0058" in text
    assert "Δm %" in text and "+0.00 ± 0.00" in text and "12,345" in text and "20,000" in text
    assert "r2" not in text and "↑" not in text
    rows = [row | {"higher_is_better": row["metric"] != "rmse"} for row in make_report().rows]
    text = render(tables.task_tables(rows)[0])
    assert "r2 ↑" in text and "rmse ↓" in text
    assert tables.task_tables([]) == []


def test_cells_that_are_missing_or_unknown():
    rows = reports.result_rows("a", {"t": {"auroc": math.nan}}) + reports.result_rows(
        "b", {"u": {"rmse": 2.0}}, params=3
    )
    rows[0]["mean"] = None  # as in the JSON
    lines = render(tables.task_tables(rows)[0]).splitlines()
    assert [cell.strip() for cell in lines[4].split("│")[1:-1]] == ["a", "n/a", "", ""]
    assert [cell.strip() for cell in lines[5].split("│")[1:-1]] == ["b", "", "2.000", "3"]


def test_print_report_fits_a_narrow_terminal(tmp_path: Path):
    report = make_report()
    for width in (160, 60):
        with (tmp_path / "out.txt").open("w+") as file:
            tables.print_report(report, console=Console(width=width, file=file, color_system=None))
            file.seek(0)
            text = file.read()
        assert max(map(len, text.splitlines())) <= width
        # Nothing is cut off: what does not fit goes into a further table.
        for words in ("0.7100 ± 0.0058", "12,345", "20,000", "vs single-task MLP", "3 seeds", "sharing", "…"):
            assert (words in text) == (words != "…")


def test_print_report_to_a_pipe(capsys: pytest.CaptureFixture):
    tables.print_report(make_report())
    assert "0.7100 ± 0.0058" in capsys.readouterr().out


def test_a_copy_can_be_told_its_commit(monkeypatch):
    monkeypatch.setenv("MTJAX_COMMIT", "abc123")
    told = reports.provenance()
    assert (told["commit"], told["dirty"]) == ("abc123", None)
