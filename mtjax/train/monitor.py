"""What a person sees of a run and how they stop it: progress bar, metrics files, signals.

Metrics go to `metrics.jsonl`, one line per evaluation, and on request to TensorBoard. A resumed run writes the file
anew from the history in its checkpoint, so that it reads like that of an uninterrupted run.
"""

import contextlib
import json
import math
import pathlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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
    # None: a handler that was not installed by Python, which could not be put back.
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    previous = {number: handler for number, handler in previous.items() if handler is not None}

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
      history: the records so far; whatever else an interrupted run left behind is dropped.
    """

    def __init__(
        self,
        directory: pathlib.Path | None,
        *,
        tensorboard: bool = False,
        history: Sequence[Mapping[str, Any]] = (),
    ):
        self._path = None if directory is None else directory / "metrics.jsonl"
        self._board = None
        if self._path is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(_line(record) for record in history))
        temporary.replace(self._path)
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ImportError("TensorBoard logs need: pip install 'mtjax[tensorboard]'") from error
            later = {"purge_step": history[-1]["step"] + 1} if history else {}
            self._board = SummaryWriter(str(directory / "tensorboard"), **later)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record that has a 'step'; nested numbers become scalars named by their path."""
        if self._path is None:
            return
        with self._path.open("a") as file:
            file.write(_line(record))
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _line(record: Mapping[str, Any]) -> str:
    """A record as a line of strict JSON: NaN and infinity become null."""

    def plain(value):
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(record), allow_nan=False) + "\n"


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
    """A bar with rate, remaining time and the current metrics on a terminal; a line now and then elsewhere.

    Args:
      title: what is being done.
      total_steps: steps of a complete run.
      start: steps done before, by the run that is resumed.
      enabled: False shows nothing.
      every_s: seconds between lines where there is no terminal.
    """

    def __init__(self, title: str, total_steps: int, start: int = 0, *, enabled: bool = True, every_s: float = 10.0):
        self._title, self._total, self._start = title, total_steps, start
        self._enabled, self._every_s = enabled, every_s
        self._note = ""
        self._last_line = time.monotonic()
        self._bar = None

    def __enter__(self) -> "Progress":
        if self._enabled:
            from rich.console import Console

            console = Console()
            if console.is_terminal:
                self._bar = self._make_bar(console)
                self._bar.start()
        return self

    def _make_bar(self, console):
        from rich import progress
        from rich.markup import escape
        from rich.text import Text

        class Bar(progress.Progress):
            def get_renderables(bar):  # the metrics have a line of their own: there may be many tasks
                yield bar.make_tasks_table(bar.tasks)
                yield Text(f"  {self._note}", style="dim", no_wrap=True, overflow="ellipsis")

        bar = Bar(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        bar.add_task(escape(self._title), total=self._total, completed=self._start, rate="compiling")
        return bar

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, rows_per_s: float, note: str | None = None) -> None:
        """Reports that `step` updates are done, the training rows per second (NaN: not known yet) and the metrics."""
        self._note = self._note if note is None else note
        rate = f"{rows_per_s:,.0f} rows/s" if math.isfinite(rows_per_s) else "compiling"
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, rate=rate)
        elif self._enabled and now - self._last_line > self._every_s:
            self._last_line = now
            print(f"{self._title}: step {step}/{self._total}, {rate}, {self._note}".rstrip(", "), flush=True)
