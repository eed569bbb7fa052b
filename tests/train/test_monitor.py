"""Metrics files, the progress bar, and signals."""

import io
import json
import math
import os
import pathlib
import re
import signal
import threading

import pytest

from mtjax.train.monitor import MetricsWriter, Progress, stop_on_signals

RECORDS = [{"step": 2, "losses": [[0.5]]}, {"step": 4, "metrics": {"sold": {"auroc": [math.nan, 0.7]}}}]


def lines(directory: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_records_are_lines_of_strict_json(tmp_path: pathlib.Path):
    writer = MetricsWriter(tmp_path / "new")
    for record in RECORDS:
        writer.write(record)
    writer.close()
    assert "NaN" not in (tmp_path / "new" / "metrics.jsonl").read_text()
    assert lines(tmp_path / "new") == [RECORDS[0], {"step": 4, "metrics": {"sold": {"auroc": [None, 0.7]}}}]


def test_a_resumed_run_starts_from_the_history_of_its_checkpoint(tmp_path: pathlib.Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "old": 1}\n{"step": 9}\n{"step": 11, "lo')  # cut off by a kill
    MetricsWriter(tmp_path, history=RECORDS[:1]).close()
    assert lines(tmp_path) == RECORDS[:1]
    MetricsWriter(tmp_path).close()
    assert lines(tmp_path) == [], "a run that starts over has no history"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_directory_writes_nothing(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = MetricsWriter(None, tensorboard=True)
    writer.write(RECORDS[0])
    writer.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_events_on_request(tmp_path: pathlib.Path):
    pytest.importorskip("tensorboardX")
    writer = MetricsWriter(tmp_path, tensorboard=True)
    for record in RECORDS:
        writer.write(record)
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"losses/0/0" in content and b"metrics/sold/auroc/1" in content
    MetricsWriter(tmp_path / "plain").close()
    assert not (tmp_path / "plain" / "tensorboard").exists()


def test_tensorboard_without_its_package_says_what_to_install(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'mtjax\[tensorboard\]'"):
        MetricsWriter(tmp_path, tensorboard=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.signal == number
        os.kill(os.getpid(), number)
        raise AssertionError("the second signal must interrupt at once")
    assert signal.getsignal(number) is before


def test_other_threads_get_no_handlers():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with stop_on_signals() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


def test_lines_now_and_then_without_a_terminal(capsys):
    with Progress("MMoE", 100, every_s=0.0) as bar:
        bar.update(16, math.nan)
        bar.update(32, 12_345.6, "sold 0.712")
    with Progress("quiet", 100, every_s=0.0, enabled=False) as bar:
        bar.update(16, 1.0)
    with Progress("fast", 100, every_s=60.0) as bar:
        bar.update(16, 1.0)
    output = capsys.readouterr().out.splitlines()
    assert output == ["MMoE: step 16/100, compiling", "MMoE: step 32/100, 12,346 rows/s, sold 0.712"]


def test_the_bar_on_a_terminal(monkeypatch):
    """Two lines within the width of the terminal: progress, rate and remaining time; then the metrics, as they are."""
    import rich.console

    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=80, _environ={})
    monkeypatch.setattr(rich.console, "Console", lambda: console)
    with Progress("MultiTab-Net [T=8]", 200, start=40) as bar:
        bar.update(120, 4321.0, "  ".join(f"task_{k}[x] 0.123" for k in range(12)))
        bar._bar.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    frames = [line for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert any("MultiTab-Net [T=8]" in line and "120/200" in line and "4,321 rows/s" in line for line in frames)
    assert any(line.startswith("  task_0[x] 0.123  task_1[x]") and line.rstrip().endswith("…") for line in frames)
    assert max(map(len, frames)) <= 80
