"""Where the batches of a dispatch come from: columns on the device, columns of the host, or a stream.

    in_memory   columns lie on the one device; a dispatch gets row numbers, and rows are gathered inside of it
    gathered    columns lie on the host; rows are gathered there and split over the devices of the mesh, so that a
                process reads only what its own devices need
    streamed    batches of a `mtjax.data.streams.Stream`, the same for all lanes

Rows in memory are drawn as a pure function of seed and step. A stream has a position, which is saved with the run: that
of what the steps have taken, not of what was read ahead.

Letters: L lanes, n steps of a dispatch, B batch.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import sharding
from mtjax.data.batches import LaneBatches
from mtjax.data.prefetch import place_batch
from mtjax.data.streams import Stream
from mtjax.train.evaluate import num_rows
from mtjax.train.step import gather_rows

PyTree = Any


class Chunk(NamedTuple):
    """Input of one dispatch: what its steps take, and the position of the feed after them (JSON)."""

    steps: PyTree
    position: dict[str, Any]


class Feed(Protocol):
    """Batches of a run.

    Attributes:
      batch_size: B.
      steps_per_epoch: of every lane.
      total_rows: rows there are.
      data: what every step of a dispatch may read, on the device.
      shared: whether all lanes take the same batches: the leaves of `Chunk.steps` have leading axes [n], else [L, n].
    """

    batch_size: int
    steps_per_epoch: int
    total_rows: int
    data: PyTree
    shared: bool

    def take(self, data: PyTree, step: PyTree) -> PyTree:
        """The batch of one step, inside of jit."""

    def chunk(self, step: int, count: int, length: int) -> Chunk:
        """Input of `count` steps from `step` on, padded to `length`."""

    def seek(self, step: int, position: Mapping[str, Any]) -> None:
        """Goes to the position that was saved at a step."""

    def sample(self, count: int) -> PyTree:
        """Some rows, always the same."""

    def describe(self) -> dict[str, Any]:
        """What decides the batches beside the configuration, to be checked when a run is resumed (JSON)."""

    def close(self) -> None:
        """Ends its threads."""


class _Rows:
    """Rows in memory, drawn by number."""

    shared = False

    def __init__(self, columns: PyTree, batch_size: int, seeds: Sequence[int], lane_rows: np.ndarray | None):
        self.total_rows = num_rows(columns)
        self._batches = LaneBatches(self.total_rows, batch_size, tuple(seeds), lane_rows)
        self.batch_size, self.steps_per_epoch = self._batches.batch_size, self._batches.steps_per_epoch

    def seek(self, step: int, position: Mapping[str, Any]) -> None:
        del step, position  # rows are a function of the step

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing runs."""

    def _numbers(self, step: int, count: int, length: int) -> tuple[np.ndarray, dict[str, int]]:
        numbers = np.pad(self._batches.take(step, count), ((0, 0), (0, length - count), (0, 0)))
        epoch, offset = divmod(step + count, self.steps_per_epoch)
        return numbers, {"epoch": epoch, "offset": offset}


class InMemory(_Rows):
    """Columns on the one device."""

    def __init__(self, columns: PyTree, batch_size: int, seeds: Sequence[int], lane_rows: np.ndarray | None = None):
        super().__init__(columns, batch_size, seeds, lane_rows)
        self.data = jax.tree.map(jnp.asarray, columns)

    def take(self, data: PyTree, step: PyTree) -> PyTree:
        return gather_rows(data, step)

    def chunk(self, step: int, count: int, length: int) -> Chunk:
        numbers, position = self._numbers(step, count, length)
        return Chunk(jnp.asarray(numbers), position)

    def sample(self, count: int) -> PyTree:
        return jax.tree.map(lambda column: column[:count], self.data)


class Gathered(_Rows):
    """Columns on the host, batches on a mesh."""

    data = ()

    def __init__(
        self,
        columns: PyTree,
        batch_size: int,
        seeds: Sequence[int],
        lane_rows: np.ndarray | None = None,
        *,
        mesh: jax.sharding.Mesh,
    ):
        super().__init__(columns, batch_size, seeds, lane_rows)
        self._columns, self._mesh = jax.tree.map(np.asarray, columns), mesh

    def take(self, data: PyTree, step: PyTree) -> PyTree:
        del data
        return step

    def chunk(self, step: int, count: int, length: int) -> Chunk:
        numbers, position = self._numbers(step, count, length)
        return Chunk(sharding.take_rows(self._columns, numbers, self._mesh), position)

    def sample(self, count: int) -> PyTree:
        return sharding.place_rows(jax.tree.map(lambda column: column[:count], self._columns), self._mesh)


class Streamed:
    """Batches of a stream, the same for all lanes."""

    shared, data = True, ()

    def __init__(self, stream: Stream, *, mesh: jax.sharding.Mesh | None):
        self.batch_size, self.steps_per_epoch = stream.batch_size, stream.steps_per_epoch
        self.total_rows = stream.rows_per_epoch
        self._stream, self._mesh = stream, mesh
        self._iterator = stream.iterator()

    def take(self, data: PyTree, step: PyTree) -> PyTree:
        del data
        return step

    def chunk(self, step: int, count: int, length: int) -> Chunk:
        del step
        batches = [next(self._iterator) for _ in range(count)]
        batches += batches[-1:] * (length - count)
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        return Chunk(self._place(stacked, axis=1), self._iterator.get_state())

    def seek(self, step: int, position: Mapping[str, Any]) -> None:
        del step
        self._iterator.set_state(position)

    def sample(self, count: int) -> PyTree:
        return jax.tree.map(lambda column: column[:count], self._place(self._stream.batch(0), axis=0))

    def describe(self) -> dict[str, Any]:
        return {"stream": self._stream.describe()}

    def close(self) -> None:
        self._iterator.close()

    def _place(self, tree: PyTree, axis: int) -> PyTree:
        """A process has its own slice of every batch."""
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return place_batch(tree, self._mesh, axis=axis)


def first_rows(train: Mapping[str, Any] | Stream, count: int) -> dict[str, Any]:
    """The first rows of columns in memory or of the first batch of a stream: what an initialisation looks at."""
    columns = dict(train) if isinstance(train, Mapping) else train.batch(0)
    return jax.tree.map(lambda column: np.asarray(column[:count]), columns)


def make_feed(
    train: Mapping[str, Any] | Stream,
    batch_size: int,
    seeds: Sequence[int],
    lane_rows: np.ndarray | None,
    mesh: jax.sharding.Mesh | None,
) -> Feed:
    """The feed of a problem's training data, for the ambient mesh.

    Raises:
      ValueError: if lanes are to have rows of their own of a stream, or its batches are not of `batch_size`.
    """
    if isinstance(train, Mapping):
        if mesh is None:
            return InMemory(dict(train), batch_size, seeds, lane_rows)
        return Gathered(dict(train), batch_size, seeds, lane_rows, mesh=mesh)
    if lane_rows is not None:
        raise ValueError("lane_rows names rows in memory; a stream gives all lanes the same batches")
    if train.batch_size != batch_size:
        raise ValueError(f"The stream has batches of {train.batch_size} rows, the training asks for {batch_size}")
    return Streamed(train, mesh=mesh)


class InputClock:
    """How fast input comes, and how long the device had to wait for it.

    A dispatch runs while the input of the next one is prepared. If it is done before that is ready, the device waited,
    at most as long as the preparation took.
    """

    def __init__(self):
        self.rows, self.preparing_s, self.waiting_s, self.total_s = 0, 0.0, 0.0, 0.0
        self._last, self._dispatches, self._warned = 0.0, 0, False

    def prepare(self, feed: Feed, step: int, count: int, length: int) -> Chunk:
        """`feed.chunk`, timed."""
        began = time.perf_counter()
        chunk = feed.chunk(step, count, length)
        self._last = time.perf_counter() - began
        self.rows, self.preparing_s = self.rows + count * feed.batch_size, self.preparing_s + self._last
        return chunk

    def note(self, *, device_was_done: bool) -> None:
        """Called when the next input is ready: whether the device had finished before."""
        self.waiting_s += self._last if device_was_done else 0.0
        self._dispatches += 1

    def add(self, seconds: float) -> None:
        """The duration of a dispatch, with the preparation of the next one."""
        self.total_s += seconds

    @property
    def rows_per_s(self) -> float:
        """Rows that the feed can give per second; NaN before the first."""
        return self.rows / self.preparing_s if self.preparing_s else float("nan")

    @property
    def waiting(self) -> float:
        """Share of the time in which the device waited, at most."""
        return min(1.0, self.waiting_s / self.total_s) if self.total_s else 0.0

    def warning(self) -> str | None:
        """A sentence, once, if the device waits for input for more than a fifth of the time."""
        if self._warned or self._dispatches < 20 or self.waiting < 0.2:
            return None
        self._warned = True
        return (
            f"The device waits for input up to {self.waiting:.0%} of the time: input comes at {self.rows_per_s:,.0f} "
            "rows/s. More reading threads, smaller examples or larger batches may help"
        )
