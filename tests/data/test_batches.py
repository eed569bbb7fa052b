"""Orders of rows: a pure function of (seed, epoch)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtjax.data.batches import ShuffledRows


@given(num_rows=st.integers(1, 50), batch_size=st.integers(1, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 99))
def test_every_row_at_most_once_in_whole_batches(num_rows, batch_size, seed, epoch):
    order = ShuffledRows(num_rows, batch_size)
    indices = order.epoch_indices([seed], epoch)
    size = min(batch_size, num_rows)
    assert order.batch_size == size and order.steps_per_epoch == num_rows // size
    assert indices.shape == (1, num_rows // size, size) and indices.dtype == np.int32
    assert len(set(indices.ravel().tolist())) == indices.size, "no row twice in an epoch"
    assert indices.min() >= 0 and indices.max() < num_rows
    np.testing.assert_array_equal(indices, order.epoch_indices([seed], epoch))


def test_lanes_do_not_depend_on_each_other():
    order = ShuffledRows(100, 10)
    together = order.epoch_indices([4, 7, 4], epoch=3)
    np.testing.assert_array_equal(together[1], order.epoch_indices([7], epoch=3)[0])
    np.testing.assert_array_equal(together[0], together[2])
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(together[0], order.epoch_indices([4], epoch=4)[0])


def test_left_out_rows_differ_between_epochs():
    order = ShuffledRows(7, 3)
    left_out = {(set(range(7)) - set(order.epoch_indices([0], e).ravel().tolist())).pop() for e in range(30)}
    assert len(left_out) == 7


def test_errors():
    with pytest.raises(ValueError, match="There are no training rows"):
        ShuffledRows(0, 4)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        ShuffledRows(4, 0)
