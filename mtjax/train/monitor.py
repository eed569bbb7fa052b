"""What a person sees of a run and how they stop it: progress bar, metrics files, signals.

Metrics go to `metrics.jsonl`, one line per evaluation, and on request to TensorBoard. A line is written after the
checkpoint that contains it is under way, and lines beyond the restored step are dropped on resume, so that the file of
a resumed run reads like that of an uninterrupted one.
"""

import contextlib
import json
import pathlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any


class StopRequest:
    """Set by SIGINT or SIGTERM; the loop looks at it between dispatches."""

    def __init__(self):
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask for a save and a clean exit; a second one interrupts at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python delivers signals to the main thread only
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number, frame):
        del frame
        if request:
            raise KeyboardInterrupt
        request.signal = number

    for number in previous:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class MetricsWriter:
    """Appends records to a JSONL file, and scalars to TensorBoard if asked.

    Args:
      directory: run directory; None writes nothing.
      tensorboard: also write TensorBoard events (needs the `tensorboard` extra).
      keep_until: drop records of later steps that an interrupted run left behind.
    """

    def __init__(self, directory: pathlib.Path | None, *, tensorboard: bool = False, keep_until: int = 0):
        self._path = None if directory is None else directory / "metrics.jsonl"
        self._board = None
        if self._path is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        kept = []
        if self._path.exists() and keep_until > 0:
            for line in self._path.read_text().splitlines():
                # The last line may be cut off by a kill.
                with contextlib.suppress(json.JSONDecodeError):
                    if json.loads(line)["step"] <= keep_until:
                        kept.append(line)
        self._path.write_text("".join(line + "\n" for line in kept))
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ImportError("TensorBoard logs need: pip install 'mtjax[tensorboard]'") from error
            self._board = SummaryWriter(str(directory / "tensorboard"))

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record that has a 'step'; nested numbers become scalars named by their path."""
        if self._path is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _scalars(record: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Path and value of every number in nested dicts and lists."""
    if isinstance(record, Mapping):
        for key, value in record.items():
            yield from _scalars(value, f"{prefix}/{key}" if prefix else str(key))
    elif isinstance(record, list):
        for position, value in enumerate(record):
            yield from _scalars(value, f"{prefix}/{position}")
    elif isinstance(record, int | float):
        yield prefix, float(record)


class Progress:
    """A bar with rate, remaining time and the current metrics on a terminal; a line now and then elsewhere."""

    def __init__(self, title: str, total_steps: int, start: int = 0, *, enabled: bool = True, every_s: float = 10.0):
        self._title, self._total, self._start = title, total_steps, start
        self._enabled, self._every_s = enabled, every_s
        self._note = ""
        self._last_line = time.monotonic()
        self._began: float | None = None
        self._began_step = start
        self._bar = None

    def __enter__(self) -> "Progress":
        if self._enabled:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console()
            if console.is_terminal:
                self._bar = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=24),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[rate]}"),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[note]}"),
                    console=console,
                    transient=True,
                )
                self._bar.start()
                self._task = self._bar.add_task(
                    self._title, total=self._total, completed=self._start, rate="compiling", note=""
                )
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, rows_per_step: int, note: str | None = None) -> None:
        """Reports that `step` updates are done; the first call only starts the clock, after compilation."""
        self._note = self._note if note is None else note
        now = time.monotonic()
        if self._began is None:
            self._began, self._began_step = now, step
        elapsed = now - self._began
        done = (step - self._began_step) * rows_per_step
        rate = f"{done / elapsed:,.0f} rows/s" if elapsed > 0 and done > 0 else "starting"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=rate, note=self._note)
        elif self._enabled and now - self._last_line > self._every_s:
            self._last_line = now
            print(f"{self._title}: step {step}/{self._total}, {rate}, {self._note}", flush=True)
