"""Batches: every example once an epoch, through restarts, and the same whatever the number of processes."""

import functools
import itertools
import json
import threading

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.data.mixing import Mixing
from mtjax.data.prefetch import LoaderClock, place_batch, prefetch_to_device, reader, reader_of
from mtjax.data.sources import Columns, Parquet, array_record_source, decode_npz, write_array_records
from mtjax.data.streams import make_stream
from mtjax.sharding import make_mesh

SIZES = {"a": 10, "b": 30, "c": 7}
MODES = ("mixed", "one_task", "per_device")


@functools.cache
def rows_of(task, size):
    """Rows that know whose they are: 1000 t + i."""
    ids = 1000 * "abc".index(task) + np.arange(size)
    return Columns({"id": ids, "nested": {"x": np.stack([ids, -ids], 1).astype(np.float32)}})


def make(mode="mixed", *, sizes=SIZES, **options):
    options = {"batch_size": 12, "seed": 3, "read_threads": 0, "process_index": 0, "process_count": 1} | options
    return make_stream({task: rows_of(task, size) for task, size in sizes.items()}, mode=mode, **options)


def ids(batches, task):
    """Row numbers of a task in the order in which they were drawn."""
    found = [batch[task]["id"] if task in batch else batch["id"] for batch in batches]
    found = np.concatenate(found)
    return [int(i) % 1000 for i in found if i // 1000 == "abc".index(task)]


def assert_batches_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def joined(parts):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


@settings(max_examples=30)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**40), epochs=st.integers(1, 4))
def test_one_source_gives_every_row_once_an_epoch(size, batch_size, seed, epochs):
    options = {"batch_size": batch_size, "seed": seed, "num_epochs": epochs, "process_index": 0, "process_count": 1}
    if size * epochs < batch_size:
        with pytest.raises(ValueError, match="are less than one batch"):
            make_stream(rows_of("a", size), read_threads=0, **options)
        return
    stream = make_stream(rows_of("a", size), read_threads=0, **options)
    drawn = np.concatenate([batch["id"] for batch in stream.iterator()])
    assert stream.num_batches == size * epochs // batch_size and len(drawn) == stream.num_batches * batch_size
    for epoch in range(epochs):
        own = drawn[epoch * size : (epoch + 1) * size]  # the last may lack what makes no batch
        assert len(set(own)) == len(own) and set(own) <= set(range(size))


@pytest.mark.parametrize("mode", MODES)
def test_no_row_of_a_task_comes_again_before_all_have_come(mode):
    batches = list(make(mode, num_epochs=5).iterator())
    for task, size in SIZES.items():
        drawn = ids(batches, task)
        assert len(drawn) >= 2 * size
        epochs = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert epochs[0] != epochs[1], "each epoch has an order of its own"


@pytest.mark.parametrize("mode", MODES)
def test_slices_of_processes_make_the_batch(mode):
    whole = list(make(mode, num_epochs=2).iterator())
    for count in (2, 4):
        iterators = [make(mode, num_epochs=2, process_index=p, process_count=count).iterator() for p in range(count)]
        for batch, *parts in itertools.zip_longest(whole, *iterators):
            assert_batches_equal(batch, joined(parts))


@pytest.mark.parametrize("mode", MODES)
def test_restarts_with_other_numbers_of_processes_repeat_and_skip_nothing(mode):
    """Processes 1 -> 2 -> 4, two threads, a shares that change: what comes is what comes without restarts."""
    mixing = None if mode == "per_device" else Mixing("annealed")
    options = {"num_epochs": 4, "mixing": mixing}
    whole = list(make(mode, **options).iterator())
    got, state = [], None
    for count, steps in ((1, 4), (2, 5), (4, len(whole) - 9)):
        streams = [make(mode, **options, process_index=p, process_count=count, read_threads=2) for p in range(count)]
        iterators = [stream.iterator(state) for stream in streams]
        got += [joined([next(iterator) for iterator in iterators]) for _ in range(steps)]
        states = [iterator.get_state() for iterator in iterators]
        assert all(s == states[0] for s in states)
        state = json.loads(json.dumps(states[0]))
        assert state["batches"] == len(got) and len(json.dumps(state)) < 1000
        for iterator in iterators:
            iterator.close()
    for mine, expected in zip(got, whole, strict=True):
        assert_batches_equal(mine, expected)


def test_state_is_where_the_consumer_is_and_can_be_set_at_any_time():
    with make(read_threads=3).iterator() as batches:
        first = [next(batches) for _ in range(6)]
        assert batches.get_state()["batches"] == 6
        saved = batches.get_state()
        later = [next(batches) for _ in range(5)]
        batches.set_state(saved)
        for expected in later:
            assert_batches_equal(next(batches), expected)
        batches.set_state({"batches": 2, "stream": saved["stream"]})  # the counts are worked out
        for expected in first[2:] + later:
            assert_batches_equal(next(batches), expected)
        assert_batches_equal(batches.stream.batch(4), first[4])


def test_structure_of_the_modes():
    mixed = next(make("mixed").iterator())
    assert set(mixed) == {"task", "id", "nested"} and mixed["task"].dtype == np.int32
    np.testing.assert_array_equal(mixed["task"], mixed["id"] // 1000)
    assert mixed["nested"]["x"].shape == (12, 2) and mixed["nested"]["x"].dtype == np.float32

    one = next(make("one_task").iterator())
    assert (one["task"] == one["id"] // 1000).all() and len(set(one["task"])) == 1 and one["id"].shape == (12,)

    grouped = next(make("per_device").iterator())
    assert {task: (rows["id"] // 1000).tolist() for task, rows in grouped.items()} == {
        task: 4 * [k] for k, task in enumerate("abc")
    }
    single = make_stream(rows_of("a", 10), batch_size=4, seed=0)
    assert set(next(single.iterator())) == {"id", "nested"} and single.steps_per_epoch == 2


def test_tasks_of_one_task_batches_may_differ_in_structure():
    sources = {"image": Columns({"image": np.zeros((4, 2, 2))}), "table": Columns({"x": np.arange(4)})}
    stream = make_stream(sources, batch_size=4, seed=0, mixing=Mixing("equal"))
    batches = list(itertools.islice(stream.iterator(), 2))
    assert {frozenset(batch) for batch in batches} == {frozenset({"task", "image"}), frozenset({"task", "x"})}
    with pytest.raises(ValueError, match=r"column 'image' of task 'table' is absent, and of 'image' shape \(2, 2\)"):
        make_stream(sources, batch_size=4, seed=0, mode="mixed")


@pytest.mark.parametrize(
    "mixing",
    [
        Mixing("equal"),
        Mixing("proportional"),
        Mixing("sqrt"),
        Mixing("temperature"),
        Mixing("annealed"),
        Mixing("scheduled", schedule=((0, (1, 1, 0)), (9, (0.2, 0.3, 0.5)))),
    ],
    ids=lambda mixing: mixing.kind,
)
@pytest.mark.parametrize("mode", ["mixed", "one_task"])
def test_counts_follow_the_mixing(mode, mixing):
    stream = make(mode, mixing=mixing, num_epochs=8)
    unit, expected, counts = 12 if mode == "one_task" else 1, np.zeros(3), np.zeros(3, int)
    for step, batch in enumerate(stream.iterator()):
        counts += np.bincount(batch["task"], minlength=3)
        expected += 12 * stream.mixing.shares(stream.sizes, step)
        assert (abs(counts - expected) < 1.001 * unit).all()


def test_annealed_shares_use_the_epochs_of_the_stream():
    stream = make(mixing=Mixing("annealed"), num_epochs=6)
    assert stream.mixing == Mixing("annealed", epochs=6, steps_per_epoch=47 // 12)
    early, late = (stream.mixing.shares(stream.sizes, step) for step in (0, 3 * 5))
    np.testing.assert_allclose(early, np.array([10, 30, 7]) / 47)
    np.testing.assert_allclose(late, np.array([10, 30, 7]) ** 0.2 / sum(np.array([10, 30, 7]) ** 0.2))
    with pytest.raises(ValueError, match="needs epochs and steps_per_epoch"):
        make(mixing=Mixing("annealed"))


def test_order_depends_on_the_seed_and_on_the_name_of_a_task_only():
    def first_epoch(task, **options):
        stream = make("per_device", batch_size=12, **options)
        return ids(itertools.islice(stream.iterator(), 5), task)[:10]

    assert first_epoch("a") == first_epoch("a", sizes={"c": 20, "a": 10})[:10]
    assert first_epoch("a") != first_epoch("a", seed=4)
    same = make("per_device", sizes={"a": 10, "c": 10})
    batches = list(itertools.islice(same.iterator(), 5))
    assert ids(batches, "a") != ids(batches, "c")


def test_placed_batches_are_split_over_the_mesh_and_the_state_is_that_of_the_consumer():
    mesh = make_mesh("data=2,expert=2", jax.devices()[:4])
    stream = make("mixed", num_epochs=2, read_threads=2)
    plain = list(stream.iterator())
    with prefetch_to_device(stream.iterator(), functools.partial(place_batch, mesh=mesh), size=3) as placed:
        assert placed.get_state()["batches"] == 0
        first, second = next(placed), next(placed)
        assert first["nested"]["x"].sharding.shard_shape((12, 2)) == (3, 2)
        assert_batches_equal(jax.device_get([first, second]), plain[:2])
        state = placed.get_state()
        assert state["batches"] == 2, "not those that lie on the device already"
        rest = [jax.device_get(batch) for batch in placed]
        assert_batches_equal(rest, plain[2:])
        placed.set_state(state)
        assert_batches_equal([jax.device_get(batch) for batch in placed], plain[2:])
        assert_batches_equal(
            [jax.device_get(batch) for batch in prefetch_to_device(stream.iterator(state), dict)], rest
        )
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        prefetch_to_device(stream.iterator(), dict, size=0)


def test_readers_of_meshes_over_several_processes():
    assert reader(make_mesh("data=2,tensor=4")) == (0, 1)
    owners = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    assert [reader_of(p, owners[:, None]) for p in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    # A 'tensor' axis of 4 over pairs of processes, which read the same rows; of 8 over all of them.
    assert [reader_of(p, owners.reshape(2, 4)) for p in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [reader_of(p, owners.reshape(1, 8)) for p in range(4)] == [(0, 1)] * 4
    with pytest.raises(ValueError, match=r"equal slices of neighbouring rows.* \{0: \(0, 2\), 1: \(1, 3\)\}"):
        reader_of(0, np.array([[0], [1], [0], [1]]))
    with pytest.raises(ValueError, match="A batch of 12 rows cannot be split over 8 devices"):
        place_batch({"x": np.zeros(12)}, make_mesh("data=8"))


def test_files_are_read_by_several_threads_as_by_one(tmp_path):
    """ArrayRecord and Parquet: a stream over both, with and without threads."""
    write_array_records(tmp_path / "a.array_record", [{"x": np.full(3, i, np.float32)} for i in range(50)])
    x = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(np.arange(100, 170, dtype=np.float32), 3)), 3)
    pq.write_table(pa.table({"x": x}), tmp_path / "b.parquet", row_group_size=9)
    files = {
        "a": array_record_source(tmp_path / "a.array_record", decode_npz),
        "b": Parquet(tmp_path / "b.parquet"),
    }
    one, many = (
        make_stream(files, batch_size=24, seed=0, mode="mixed", num_epochs=2, read_threads=threads)
        for threads in (0, 4)
    )
    with many.iterator() as batches:
        got = list(batches)
    for mine, expected in zip(got, one.iterator(), strict=True):
        assert_batches_equal(mine, expected)
        np.testing.assert_array_equal(mine["task"], mine["x"][:, 0] >= 100)
    values = np.concatenate([batch["x"][batch["task"] == 1][:, 0] for batch in got])
    assert sorted(values[:70]) == list(range(100, 170))


def test_clock_warns_when_input_is_what_one_waits_for():
    class Slow:
        """Rows that take 5 ms each, until told otherwise."""

        seconds = 0.005

        def __len__(self):
            return 8

        def __getitem__(self, index):
            pause.wait(self.seconds)
            return {"id": np.int64(index)}

    pause = threading.Event()
    with make_stream(Slow(), batch_size=4, seed=0, read_threads=0).iterator() as batches:
        batches.clock = LoaderClock(window=5)
        for _ in range(6):
            assert batches.clock.warning() is None
            next(batches)
        assert batches.clock.waited > 0.5 and 0 < batches.clock.rows_per_s < 250
        assert batches.clock.warning().startswith("The accelerator waited for input during ")
        Slow.seconds = 0.0
        for _ in range(5):
            pause.wait(0.05)  # now it is the consumer who takes time
            next(batches)
        assert batches.clock.warning() is None and "rows/s, waited for" in batches.clock.report()
    clock = LoaderClock()
    assert np.isnan(clock.waited) and np.isnan(clock.rows_per_s)


def test_errors_of_reading_reach_the_consumer():
    class Broken:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise OSError(f"row {index} is unreadable")

    stream = make_stream(Broken(), batch_size=4, seed=0)
    with stream.iterator() as batches, pytest.raises(OSError, match="is unreadable"):
        next(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode must be one of one_task, mixed, per_device, got 'both'"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"batch_size": 10, "process_count": 4}, r"batch_size=10 must be a multiple of 4 \(4 processes\)"),
        ({"mode": "per_device", "batch_size": 10}, r"multiple of 3 \(1 processes times 3 tasks\)"),
        ({"batch_size": 0}, "batch_size=0 must be a multiple of 1"),
        ({"process_index": 2, "process_count": 2}, r"process_index must lie in \[0, 2\), got 2"),
        ({"num_epochs": 0}, "num_epochs must be >= 1, got 0"),
        ({"num_epochs": 1, "batch_size": 48}, "num_epochs=1 of 47 rows are less than one batch of 48"),
        ({"read_threads": -1}, "read_threads must be >= 0, got -1"),
        ({"mode": "per_device", "mixing": Mixing("sqrt")}, "as many rows of every task, but mixing is of kind 'sqrt'"),
        ({"mixing": Mixing("scheduled", schedule=((0, (1, 1)),))}, "there are 3 tasks"),
        ({"sizes": {"a": 3, "b": 0}}, "Task 'b' has no rows"),
        ({"sizes": {}}, "There are no rows"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_other_errors():
    with pytest.raises(ValueError, match=r"mixing is for \{task: source\}, but there is one source"):
        make_stream(rows_of("a", 5), batch_size=2, seed=0, mixing=Mixing())
    with pytest.raises(ValueError, match="Rows of task 'a' have a column 'task', which a batch uses"):
        make_stream({"a": Columns({"task": np.zeros(3)})}, batch_size=2, seed=0)
    stream = make(num_epochs=2)
    state = make(seed=4).iterator().get_state()
    with pytest.raises(ValueError, match=r"The state is one of another stream: .* This one is \{'tasks': \['a', 'b'"):
        stream.iterator(state)
    with pytest.raises(ValueError, match="The state is at batch 99 of 7"):
        stream.iterator({"batches": 99, "stream": stream.fingerprint})
