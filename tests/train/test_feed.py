"""Where batches come from: rows by number on one device or a mesh, a stream and its position, the clock."""

import dataclasses
import time

import jax
import numpy as np
import pytest

import mtjax
from mtjax import sharding
from mtjax.data.sources import Columns
from mtjax.data.streams import make_stream
from mtjax.train import fit
from mtjax.train.feed import InputClock, first_rows, make_feed


@pytest.fixture(scope="module")
def columns(toy):
    return toy.make_split(60, 0)


def stream_of(columns, **options):
    return make_stream(Columns(columns), **({"batch_size": 8, "seed": 3} | options))


def test_a_mesh_takes_the_rows_of_one_device(columns):
    mesh = sharding.make_mesh("data=4,tensor=2")
    one, many = (make_feed(columns, 8, (0, 1), None, where) for where in (None, mesh))
    for step, count in ((0, 3), (5, 3)):  # the second goes on into the next epoch
        ours, theirs = many.chunk(step, count, 4), one.chunk(step, count, 4)
        expected = jax.vmap(one.take, in_axes=(None, 0))(one.data, theirs.steps)
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), ours.steps, expected))
        assert ours.position == theirs.position
        assert ours.steps["numeric"].sharding.spec == sharding.P(None, None, ("data",))


def test_a_stream_goes_on_where_the_steps_were(columns):
    feed = make_feed(stream_of(columns), 8, (0,), None, None)
    first, second = feed.chunk(0, 2, 4), feed.chunk(2, 4, 4)
    np.testing.assert_array_equal(first.steps["numeric"][1], first.steps["numeric"][3])  # padded by the last
    again = make_feed(stream_of(columns), 8, (0,), None, None)
    again.seek(2, first.position)
    np.testing.assert_array_equal(again.chunk(2, 4, 4).steps["numeric"], second.steps["numeric"])
    for one in (feed, again):
        one.close()


def test_a_stream_that_does_not_fit_is_refused(columns):
    with pytest.raises(ValueError, match="batches of 8 rows, the training asks for 16"):
        make_feed(stream_of(columns), 16, (0,), None, None)
    with pytest.raises(ValueError, match="lane_rows names rows in memory"):
        make_feed(stream_of(columns), 8, (0,), np.zeros((1, 8), int), None)


def test_first_rows_are_those_of_the_data(columns):
    np.testing.assert_array_equal(first_rows(columns, 3)["numeric"], columns["numeric"][:3])
    assert first_rows(stream_of(columns), 3)["labels"]["price"].shape == (3,)


class Slow:
    """A feed that takes a while."""

    batch_size = 4

    def chunk(self, step, count, length):
        time.sleep(0.002)
        return step, count, length


def test_the_clock_says_once_that_the_device_waits():
    clock = InputClock()
    for step in range(25):
        assert clock.prepare(Slow(), step, 1, 1) == (step, 1, 1)
        clock.note(device_was_done=True)
        clock.add(0.004)
    assert 100 < clock.rows_per_s <= 2000 and clock.waiting >= 0.5
    assert "waits for input" in clock.warning() and clock.warning() is None
    idle = InputClock()
    idle.prepare(Slow(), 0, 1, 1)
    idle.note(device_was_done=False)
    assert idle.waiting == 0 and idle.warning() is None


def test_training_on_a_stream_is_resumed_to_the_same_bits(toy, columns, tmp_path):
    config = dataclasses.replace(toy.CONFIG, max_epochs=2, batch_size=8, evals_per_epoch=1, checkpoint_every=2)
    tasks = toy.make_tasks(columns)
    model = toy.Tiny(mtjax.head_sizes(tasks), dropout=0.2)
    how = {"config": config, "directory": tmp_path / "run", "progress": False}
    stream = stream_of(columns)
    whole = fit(model, tasks, stream, columns, **how)
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for file in sorted(newest.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    newest.rmdir()
    again = fit(model, tasks, stream, columns, resume=True, **how)
    for name, leaf in toy.arrays(whole.state).items():
        np.testing.assert_array_equal(toy.arrays(again.state)[name], leaf, err_msg=name)
    with pytest.raises(ValueError, match=r"stream.seed: saved 3, now 4"):
        fit(model, tasks, stream_of(columns, seed=4), columns, resume=True, **how)
