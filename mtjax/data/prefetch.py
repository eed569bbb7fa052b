"""Keeping the accelerator fed: batches on the device before they are used, and a clock that tells when they come late.

    batches = prefetch_to_device(stream.iterator(), place)
    for batch in batches: ...
    print(batches.clock.report()); state = batches.get_state()

Batches are placed by the thread that uses them, since a mesh set by `jax.set_mesh` is known to its own thread only;
the copy itself is JAX's and goes on behind the computation. Reading is done by the threads of the stream. The state is
where the consumer is: batches that were placed and not taken come again after a restart.
"""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

PyTree = Any


class LoaderClock:
    """How fast batches came, and how much of the time somebody waited for them, over the latest batches.

    The first wait is not counted: threads start then, and the first rows are read.

    Args:
      window: batches that are looked at.
      limit: share of the time above which there is a warning.
    """

    def __init__(self, *, window: int = 100, limit: float = 0.2):
        self._window, self._limit = window, limit
        self._waits: collections.deque[tuple[float, float, int]] = collections.deque(maxlen=window + 1)

    @contextlib.contextmanager
    def waiting(self, rows: int) -> Iterator[None]:
        """Around what gets the next batch, of `rows` rows; what raises is not counted."""
        began = time.perf_counter()
        yield
        self._waits.append((began, time.perf_counter(), rows))

    @property
    def rows_per_s(self) -> float:
        """Rows that were taken per second, waits and everything else included; NaN before the second batch."""
        if len(self._waits) < 2:
            return float("nan")
        return sum(rows for *_, rows in list(self._waits)[1:]) / (self._waits[-1][1] - self._waits[0][1])

    @property
    def waited(self) -> float:
        """Share of the time spent waiting, in [0, 1]; NaN before the second batch."""
        if len(self._waits) < 2:
            return float("nan")
        waits = sum(ended - began for began, ended, _ in list(self._waits)[1:])
        return waits / (self._waits[-1][1] - self._waits[0][1])

    def report(self) -> str:
        """One line: rows per second and the share of waiting."""
        return f"input {self.rows_per_s:,.0f} rows/s, waited for {self.waited:.0%} of the time"

    def warning(self) -> str | None:
        """A sentence if a whole window waited more than `limit` of its time, else None."""
        if len(self._waits) <= self._window or self.waited <= self._limit:
            return None
        return (
            f"The accelerator waited for input during {self.waited:.0%} of the last {self._window} batches "
            f"({self.rows_per_s:,.0f} rows/s): use more read_threads, decode less per row, or keep columns in memory"
        )


def reader(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """`process_index` and `process_count` of a stream whose batches are split over a mesh.

    They are JAX's where every process has rows of its own. Processes between which lies an axis that does not split the
    batch ('tensor') read the same rows, so there are fewer readers then.

    Raises:
      ValueError: as `reader_of`.
    """
    from mtjax.sharding import BATCH_AXES

    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    axes = [mesh.axis_names.index(name) for name in BATCH_AXES]
    parts = math.prod(mesh.devices.shape[axis] for axis in axes)
    return reader_of(jax.process_index(), np.moveaxis(owners, axes, range(len(axes))).reshape(parts, -1))


def reader_of(process: int, owners: np.ndarray) -> tuple[int, int]:
    """Which of how many equal slices of a batch a process reads.

    Args:
      process: its index.
      owners: i[parts, copies], the processes of the devices that hold a part of the batch.

    Raises:
      ValueError: if processes share some of their rows but not all, or do not hold neighbouring rows.

    >>> reader_of(1, np.array([[0], [0], [1], [1]])), reader_of(1, np.array([[0, 1], [0, 1]]))
    ((1, 2), (0, 1))
    """
    held = {int(p): tuple(np.flatnonzero((owners == p).any(1)).tolist()) for p in np.unique(owners)}
    slices = sorted(set(held.values()))
    if [part for own in slices for part in own] != list(range(len(owners))) or len(set(map(len, slices))) > 1:
        raise ValueError(
            f"Processes must hold equal slices of neighbouring rows, or the same rows, but they hold the parts {held}; "
            "order the axes of the mesh so that 'tensor' lies within processes"
        )
    return slices.index(held[process]), len(slices)


def place_batch(batch: PyTree, mesh: jax.sharding.Mesh, *, axis: int = 0) -> PyTree:
    """The slices of a batch that the processes have read, as global arrays split over the batch axes of a mesh.

    Args:
      batch: numpy arrays [B / P, ...].
      mesh: the mesh; P is the number of its readers.
      axis: that of the rows, where several batches are stacked.

    Returns:
      Arrays [B, ...].

    Raises:
      ValueError: if B is not a multiple of the devices over which a batch is split.
    """
    from mtjax.sharding import BATCH_AXES

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * axis, BATCH_AXES))
    parts, readers = math.prod(mesh.shape[name] for name in BATCH_AXES), reader(mesh)[1]

    def place(rows):
        whole = rows.shape[axis] * readers
        if whole % parts:
            raise ValueError(f"A batch of {whole} rows cannot be split over {parts} devices; make it a multiple")
        shape = (*rows.shape[:axis], whole, *rows.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(place, batch)


def prefetch_to_device(iterator: Any, place: Callable[[PyTree], PyTree], size: int = 2) -> "PlacedBatches":
    """Batches that are placed ahead of use.

    Args:
      iterator: of a stream.
      place: puts a batch on its devices: `jax.device_put`, or `functools.partial(place_batch, mesh=mesh)`.
      size: batches that are placed at a time, with the one that is taken.

    Returns:
      An iterator with the same methods.

    Raises:
      ValueError: if size < 1.
    """
    return PlacedBatches(iterator, place, size)


class PlacedBatches:
    """What `prefetch_to_device` returns.

    Attributes:
      clock: of the iterator below: waits for rows, without the placing.
    """

    def __init__(self, iterator: Any, place: Callable[[PyTree], PyTree], size: int):
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        self._iterator, self._place, self._size = iterator, place, size
        self.clock: LoaderClock = iterator.clock
        self._placed: collections.deque[tuple[PyTree, Any]] = collections.deque()
        self._state = iterator.get_state()

    def __iter__(self) -> "PlacedBatches":
        return self

    def __next__(self) -> PyTree:
        while len(self._placed) < self._size:
            try:
                batch = next(self._iterator)
            except StopIteration:
                break
            self._placed.append((self._place(batch), self._iterator.get_state()))
        if not self._placed:
            raise StopIteration
        batch, self._state = self._placed.popleft()
        return batch

    def get_state(self) -> Mapping[str, Any]:
        """The state after the last batch that was taken."""
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where a state was taken; placed batches are forgotten."""
        self._iterator.set_state(state)
        self._placed.clear()
        self._state = self._iterator.get_state()

    def close(self) -> None:
        """Ends the threads of the iterator below."""
        self._iterator.close()

    def __enter__(self) -> "PlacedBatches":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
