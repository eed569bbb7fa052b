"""Streams of batches: one shape, every example once an epoch, the same whatever the number of processes.

    stream = make_stream({"a": source_a, "b": source_b}, batch_size=512, seed=0, mode="mixed", mixing=Mixing("sqrt"))
    batches = stream.iterator()                    # or stream.iterator(state), of a checkpoint
    batch = next(batches)                          # numpy; rows of this process
    state = batches.get_state()                    # small, JSON

A batch is a pure function of (stream, number of the batch). Every task goes through its rows in an order of their own
for every epoch, and on into the next epoch where a batch ends: nothing is left out. What a batch holds depends on the
mode:

    mixed        rows of all tasks in random places, which have one structure; column 'task' i32[B] says whose a row is
    one_task     rows of one task, whose structure may be its own; column 'task' as above, all alike
    per_device   {task: rows}, B / T of every task, as `mtjax.train.heterogeneous` takes them
    (one source) its rows, whatever the mode

Process p of P reads rows p B/P ... (p+1) B/P of a batch only (of every task's rows with 'per_device'), which is the
layout of `jax.make_array_from_process_local_data`: joined over processes, slices are the batch of a process alone.
The state knows nothing of processes, so a run may go on with another number of them.

Grain reads ahead with threads and keeps the position. Order and mixture are computed here, for a whole batch at once:
rows that Grain shuffles and reads one by one come some ten times slower from a table in memory, and its mixture is not
exact (see `mixing`). The order of an epoch is a permutation in memory, 4 bytes a row.

Letters: B rows of a batch, T tasks, n_t rows of a task, P processes.
"""

import dataclasses
import functools
import hashlib
import json
import sys
import zlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

from mtjax.data.mixing import Draws, Mixing
from mtjax.data.prefetch import LoaderClock
from mtjax.data.sources import Source, named_leaves, take

Mode = Literal["one_task", "mixed", "per_device"]
Batch = dict[str, Any]
TASK = "task"
"""Column of a batch: whose a row is, as an index into `Stream.tasks`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """What is read, in which order, by which process. Build it by `make_stream`.

    Attributes:
      sources: of the tasks, in their order.
      tasks: their names; () for a single source without a name.
      batch_size: B, rows of all processes together.
      seed: of order and mixture.
      mode: see the module.
      mixing: with all its numbers.
      process_index, process_count: p and P.
      num_epochs: after which the stream ends; None: it never does.
      read_threads: that read ahead; 0 reads when asked.
    """

    sources: tuple[Source, ...]
    tasks: tuple[str, ...]
    batch_size: int
    seed: int
    mode: Mode
    mixing: Mixing
    process_index: int
    process_count: int
    num_epochs: int | None
    read_threads: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """n_t."""
        return tuple(len(source) for source in self.sources)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch: of all tasks; with 'per_device', T times those of the largest (others are repeated)."""
        return max(self.sizes) * len(self.sizes) if self.mode == "per_device" else sum(self.sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch, at least 1. (What is left is the beginning of the next epoch's first batch.)"""
        return max(1, self.rows_per_epoch // self.batch_size)

    @property
    def num_batches(self) -> int | None:
        """Batches until the end, None if there is none. Only rows after the last whole batch are left out."""
        return None if self.num_epochs is None else self.num_epochs * self.rows_per_epoch // self.batch_size

    @property
    def local_rows(self) -> int:
        """B / P."""
        return self.batch_size // self.process_count

    def describe(self) -> dict[str, Any]:
        """What decides the batches, to be kept with a run: JSON, without processes and threads."""
        return {
            "tasks": list(self.tasks),
            "rows": list(self.sizes),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "mode": self.mode,
            "mixing": json.loads(json.dumps(dataclasses.asdict(self.mixing))),
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """Short hash of `describe()`."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def batch(self, step: int) -> Batch:
        """This process's rows of a batch, read now; the mixture is worked out from batch 0 on (50 us each)."""
        return _Batches(self)[step]

    def iterator(self, state: Mapping[str, Any] | None = None) -> "StreamIterator":
        """Batches from the first on, or from where a `state` was taken."""
        return StreamIterator(self, state)


def make_stream(
    source: Source | Mapping[str, Source],
    *,
    batch_size: int,
    seed: int,
    mode: Mode = "one_task",
    mixing: Mixing | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    num_epochs: int | None = None,
    read_threads: int = 2,
) -> Stream:
    """A stream of shuffled batches.

    Args:
      source: rows, or {task: rows} (see `mtjax.data.sources`).
      batch_size: B, rows of a batch on all processes together.
      seed: of order and mixture, >= 0.
      mode: see the module.
      mixing: shares of the tasks in batches ('one_task') or rows ('mixed'); None: proportional to their rows. There is
        nothing to choose for one source, and for 'per_device', where shares are equal.
      process_index, process_count: p and P; None: JAX's. Where an axis that does not split the batch lies between
        processes, they read the same rows: `mtjax.data.prefetch.reader(mesh)` gives both numbers for any mesh.
      num_epochs: after which the stream ends; None: never.
      read_threads: threads that read ahead, twice as many batches; 0: none.

    Returns:
      The stream.

    Raises:
      ValueError: for arguments that do not fit each other, or tasks whose rows differ with 'mixed'.
    """
    several = isinstance(source, Mapping)
    tasks = tuple(source) if several else ()
    sources = tuple(source.values()) if several else (source,)
    count = jax.process_count() if process_count is None else process_count
    index = jax.process_index() if process_index is None else process_index
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if not sources or not all(len(s) for s in sources):
        empty = [task for task, s in zip(tasks, sources, strict=False) if not len(s)]
        raise ValueError(f"Task '{empty[0]}' has no rows" if empty else "There are no rows to make a stream of")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    if not 0 <= index < count:
        raise ValueError(f"process_index must lie in [0, {count}), got {index}")
    parts = count * (len(sources) if mode == "per_device" and several else 1)
    if batch_size < 1 or batch_size % parts:
        what = f"{count} processes" + (f" times {len(sources)} tasks" if parts > count else "")
        raise ValueError(f"batch_size={batch_size} must be a multiple of {parts} ({what})")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be >= 1, got {num_epochs}")
    if read_threads < 0:
        raise ValueError(f"read_threads must be >= 0, got {read_threads}")
    if mixing is not None and not several:
        raise ValueError("mixing is for {task: source}, but there is one source")
    if mode == "per_device" and mixing not in (None, Mixing("equal")):
        raise ValueError(f"mode='per_device' takes as many rows of every task, but mixing is of kind {mixing.kind!r}")
    _check_rows(tasks, sources, mode)
    mixing = Mixing("equal" if mode == "per_device" else "proportional") if mixing is None else mixing
    stream = Stream(sources, tasks, batch_size, seed, mode, mixing, index, count, num_epochs, read_threads)
    if stream.num_batches == 0:
        raise ValueError(
            f"num_epochs={num_epochs} of {stream.rows_per_epoch} rows are less than one batch of {batch_size}"
        )
    if mixing.kind == "annealed":
        epochs = mixing.epochs or num_epochs
        steps = mixing.steps_per_epoch or stream.steps_per_epoch
        stream = dataclasses.replace(stream, mixing=dataclasses.replace(mixing, epochs=epochs, steps_per_epoch=steps))
    stream.mixing.pieces(stream.sizes)  # raises for what does not fit
    return stream


def _check_rows(tasks: tuple[str, ...], sources: tuple[Source, ...], mode: Mode) -> None:
    """Raises a ValueError where batches would have no column for the task, or no common structure."""
    if not tasks or mode == "per_device":
        return
    first = None
    for task, source in zip(tasks, sources, strict=True):
        row = source[0]
        if TASK in row:
            raise ValueError(f"Rows of task '{task}' have a column '{TASK}', which a batch uses to name the task")
        shapes = {name: (np.shape(leaf), np.asarray(leaf).dtype.name) for name, leaf in named_leaves(dict(row))}
        first = shapes if first is None else first
        if mode == "mixed" and shapes != first:
            name = min(name for name in shapes | first if shapes.get(name) != first.get(name))
            mine, others = (
                f"shape {s[name][0]} and dtype {s[name][1]}" if name in s else "absent" for s in (shapes, first)
            )
            raise ValueError(
                f"mode='mixed' needs rows of one structure, but column '{name}' of task '{task}' is {mine}, and of "
                f"'{tasks[0]}' {others}; use mode='one_task' or 'per_device'"
            )


class StreamIterator:
    """Batches of a stream, read ahead. Close it, or use it in a `with` statement, to end its threads.

    Attributes:
      stream: whose.
      clock: how long `next` waited.
    """

    def __init__(self, stream: Stream, state: Mapping[str, Any] | None = None):
        self.stream, self.clock = stream, LoaderClock()
        self._start({"batches": 0, "stream": stream.fingerprint} if state is None else state)

    def _start(self, state: Mapping[str, Any]) -> None:
        import grain

        stream, step = self.stream, int(state["batches"])
        if state.get("stream") != stream.fingerprint:
            raise ValueError(
                "The state is one of another stream: tasks, rows, batch_size, seed, mode or mixing differ. This one is "
                f"{stream.describe()}"
            )
        if stream.num_batches is not None and not 0 <= step <= stream.num_batches:
            raise ValueError(f"The state is at batch {step} of {stream.num_batches}")
        self._batches = _Batches(stream, step, state.get("counts"))
        options = grain.ReadOptions(num_threads=stream.read_threads, prefetch_buffer_size=2 * stream.read_threads)
        self._inner = iter(grain.MapDataset.source(self._batches).to_iter_dataset(options))
        self._inner.set_state({"next_index": step})

    def __iter__(self) -> "StreamIterator":
        return self

    def __next__(self) -> Batch:
        with self.clock.waiting(self.stream.batch_size):
            return next(self._inner)

    def get_state(self) -> dict[str, Any]:
        """Where the consumer is, as JSON: batches taken, draws of every task before, and whose state it is."""
        step = self._inner.get_state()["next_index"]
        counts = self._batches.draws.before(step).tolist()
        return {"batches": step, "counts": counts, "stream": self.stream.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where a state was taken, with any number of processes.

        Raises:
          ValueError: if it is the state of another stream.
        """
        old = self._inner
        self._start(state)
        old.close()

    def close(self) -> None:
        """Ends the threads."""
        self._inner.close()

    def __enter__(self) -> "StreamIterator":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


class _Batches:
    """Batches as a source of Grain: `[step]` is this process's part of a batch. Threads share it."""

    def __init__(self, stream: Stream, step: int = 0, counts: Any = None):
        self._stream = stream
        capacity = 1 if stream.mode == "one_task" else stream.batch_size
        self.draws = Draws(*stream.mixing.pieces(stream.sizes), capacity, stream.seed, step=step, counts=counts)
        # Two epochs of every task: that which ends and that which begins.
        self._order = functools.lru_cache(maxsize=2 * len(stream.sources))(self._epoch_order)

    def __len__(self) -> int:
        count = self._stream.num_batches
        return sys.maxsize if count is None else count

    def __getitem__(self, step: int) -> Batch:
        stream, before = self._stream, self.draws.before(step)
        quota = self.draws.before(step + 1) - before
        local, first = stream.local_rows, stream.process_index * stream.local_rows
        if stream.mode == "per_device" and stream.tasks:
            local, first = local // len(stream.tasks), first // len(stream.tasks)
            return {task: self._rows(t, before[t] + first, local) for t, task in enumerate(stream.tasks)}
        if stream.mode == "mixed" and stream.tasks:
            return self._mixed(step, before, quota)
        t = int(np.argmax(quota))
        rows = self._rows(t, before[t] * (stream.batch_size // int(quota[t])) + first, local)
        return {TASK: np.full(local, t, np.int32), **rows} if stream.tasks else rows

    def _mixed(self, step: int, before: np.ndarray, quota: np.ndarray) -> Batch:
        stream = self._stream
        owners = np.repeat(np.arange(len(quota), dtype=np.int32), quota)
        # The third number tells this generator from the others of the stream.
        owners = np.random.default_rng([stream.seed, step, 1]).permutation(owners)
        first = stream.process_index * stream.local_rows
        earlier = np.bincount(owners[:first], minlength=len(quota))
        mine = owners[first : first + stream.local_rows]
        parts = [self._rows(t, before[t] + earlier[t], int((mine == t).sum())) for t in np.unique(mine)]
        place = np.argsort(np.argsort(mine, kind="stable"), kind="stable")  # of a row in the parts joined
        rows = jax.tree.map(lambda *columns: np.concatenate(columns)[place], *parts) if len(parts) > 1 else parts[0]
        return {TASK: mine, **rows}

    def _rows(self, t: int, first: int, count: int) -> Batch:
        """Draws `first` ... `first + count` of a task."""
        size = len(self._stream.sources[t])
        epochs, positions = np.divmod(np.arange(first, first + count), size)
        indices = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._order(int(t), int(epoch))[positions[here]]
        return dict(take(self._stream.sources[t], indices))

    def _epoch_order(self, t: int, epoch: int) -> np.ndarray:
        """Rows of a task in the order of an epoch, which depends on the task's name and not on the other tasks."""
        stream = self._stream
        name = zlib.crc32(stream.tasks[t].encode()) if stream.tasks else 0
        size = len(stream.sources[t])
        order = np.random.default_rng([stream.seed, name, epoch, 2]).permutation(size)
        return order.astype(np.int32) if size < 2**31 else order
