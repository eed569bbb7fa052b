"""Profiles of a running training: a trace of some steps in its middle, after compilation and warm-up.

A trace is a folder that XProf reads (`pip install xprof`, then `xprof FOLDER`; TensorBoard with its profile plugin
reads the same), and beside it a file for https://ui.perfetto.dev.
"""

import contextlib
import contextvars
import pathlib
import warnings
from collections.abc import Iterator

import jax

_REQUESTED: contextvars.ContextVar[pathlib.Path | None] = contextvars.ContextVar("profile", default=None)


@contextlib.contextmanager
def profiled(directory: pathlib.Path | str | None) -> Iterator[None]:
    """Inside, the first training writes a profile of some of its steps into a folder; None: no profile."""
    token = _REQUESTED.set(None if directory is None else pathlib.Path(directory))
    try:
        yield
    finally:
        _REQUESTED.reset(token)


@contextlib.contextmanager
def profile(directory: pathlib.Path | str) -> Iterator[None]:
    """Traces what runs inside, host and devices, and says where the trace is and how to look at it.

    Args:
      directory: where it is written, below plugins/profile/<time>.
    """
    directory = pathlib.Path(directory)
    with jax.profiler.trace(directory, create_perfetto_trace=True):
        yield
    traces = sorted(directory.glob("**/perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    perfetto = f"; or open {traces[-1]} in https://ui.perfetto.dev" if traces else ""
    print(f"Profile written. Look at it with `xprof {directory}` (pip install xprof){perfetto}")


class ProfileWindow:
    """Traces a window of the steps of a training loop. A context manager: leaving it ends a trace under way.

    Args:
      directory: as for `profile`.
      first: steps before the trace starts: at least those of the first dispatch, which compiles.
      last: steps after which it ends.

    Steps are counted from the first call of `step`, so a resumed run, which compiles again, is profiled alike. A loop
    that makes several steps in one dispatch traces whole dispatches.

    Raises:
      ValueError: unless 0 <= first < last.
    """

    def __init__(self, directory: pathlib.Path | str, first: int = 16, last: int = 32):
        if not 0 <= first < last:
            raise ValueError(f"A profile needs 0 <= first < last, got first={first} and last={last}")
        self._directory, self._first, self._last = directory, first, last
        self._begin: int | None = None
        self._made = 0
        self._trace: contextlib.ExitStack | None = None
        self._done = False

    def step(self, made: int) -> None:
        """To be called before every dispatch, when the one before has finished on the device.

        Args:
          made: steps that the training has made.
        """
        self._begin = made if self._begin is None else self._begin
        self._made = made - self._begin
        if self._trace is not None and self._made >= self._last:
            self.close()
        elif self._trace is None and not self._done and self._made >= self._first:
            self._trace = contextlib.ExitStack()
            self._trace.enter_context(profile(self._directory))

    def close(self) -> None:
        """Ends the trace, and warns if none was begun."""
        if self._trace is not None:
            self._trace.close()
        elif not self._done:
            warnings.warn(
                f"No profile was written: the training ended after {self._made} steps, the profile was to start after "
                f"{self._first}",
                stacklevel=2,
            )
        self._trace, self._done = None, True

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class _NoWindow(contextlib.nullcontext):
    """Nothing is profiled."""

    def __enter__(self) -> "_NoWindow":
        return self

    def step(self, made: int) -> None:
        """As `ProfileWindow.step`."""


def profile_window() -> ProfileWindow | _NoWindow:
    """The window of the training that begins now; a profile that was asked for is written once."""
    directory = _REQUESTED.get()
    if directory is None:
        return _NoWindow()
    _REQUESTED.set(None)
    return ProfileWindow(directory)
