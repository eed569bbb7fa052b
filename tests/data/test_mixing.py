"""Shares of tasks, and whole draws that stay within 1 of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.data.mixing import CLOSE, Draws, Mixing


def test_shares_of_every_kind():
    sizes = [1000, 10, 90]
    of = lambda *args, step=0, **options: Mixing(*args, **options).shares(sizes, step)  # noqa: E731
    np.testing.assert_allclose(of("equal"), [1 / 3] * 3, rtol=1e-12)
    np.testing.assert_allclose(of("proportional"), [1000 / 1100, 10 / 1100, 90 / 1100], rtol=1e-12)
    roots = [1000**0.5, 10**0.5, 90**0.5]
    np.testing.assert_allclose(of("sqrt"), [r / sum(roots) for r in roots], rtol=1e-12)
    powers = [1000**0.2, 10**0.2, 90**0.2]
    np.testing.assert_allclose(of("temperature", temperature=5.0), [r / sum(powers) for r in powers], rtol=1e-12)
    np.testing.assert_allclose(of("temperature", temperature=1.0), of("proportional"), rtol=1e-12)
    np.testing.assert_allclose(of("temperature", temperature=2.0), of("sqrt"), rtol=1e-12)
    np.testing.assert_allclose(of("temperature", temperature=1e9), of("equal"), rtol=1e-6)


def test_annealed_goes_from_proportional_to_nearly_equal_epoch_by_epoch():
    sizes, mixing = [900, 100], Mixing("annealed", epochs=5, steps_per_epoch=7)
    for step in range(0, 60):
        epoch = min(step // 7, 4) + 1
        alpha = 1 - 0.8 * (epoch - 1) / (5 - 1)
        expected = np.array([900**alpha, 100**alpha])
        np.testing.assert_allclose(mixing.shares(sizes, step), expected / expected.sum(), rtol=1e-12)


def test_scheduled_shares_are_normalised_and_change_where_they_are_told_to():
    mixing = Mixing("scheduled", schedule=((0, (1, 0)), (10, (1, 3)), (12, (0, 2))))
    shares = [mixing.shares([5, 5], step).tolist() for step in (0, 9, 10, 11, 12, 1000)]
    assert shares == [[1, 0], [1, 0], [0.25, 0.75], [0.25, 0.75], [0, 1], [0, 1]]


@st.composite
def pieces(draw):
    """Shares that change at some steps, also to 0, and units per step."""
    num_tasks = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 25), min_size=0, max_size=3))
    weight = st.one_of(st.just(0.0), st.floats(1e-3, 1.0), st.just(1.0))
    rows = draw(st.lists(st.lists(weight, min_size=num_tasks, max_size=num_tasks), min_size=4, max_size=4))
    shares = np.array(rows[: len(lengths) + 1]) + 1e-3 * np.eye(num_tasks)[0]
    return np.cumsum([0, *lengths]), shares / shares.sum(-1, keepdims=True), draw(st.sampled_from([1, 2, 3, 8, 64]))


@settings(max_examples=15)
@given(pieces=pieces(), seed=st.integers(0, 5), stop=st.integers(0, 70))
def test_counts_stay_within_one_of_their_shares(pieces, seed, stop):
    starts, shares, capacity = pieces
    draws = Draws(starts, shares, capacity, seed)
    exact, before = np.zeros(shares.shape[1]), draws.before(0)
    for step in range(80):
        exact = exact + capacity * shares[np.searchsorted(starts, step, side="right") - 1]
        after = draws.before(step + 1)
        assert (after >= before).all() and after.sum() == (step + 1) * capacity
        assert (abs(after - exact) < 1 + CLOSE).all(), (step, after, exact)
        before = after
    resumed = Draws(starts, shares, capacity, seed, step=stop, counts=draws.before(stop).tolist())
    np.testing.assert_array_equal(resumed.before(stop + 260), draws.before(stop + 260))  # also over a block
    np.testing.assert_array_equal(resumed.before(stop), draws.before(stop))  # any order of asking


def test_long_runs_keep_to_their_shares():
    share = Mixing("sqrt").shares([7, 1000, 31, 2, 500])
    draws = Draws(np.zeros(1, np.int64), share[None], 1)
    for step in (999, 5000):
        assert (abs(draws.before(step) - step * share) < 1).all()


def test_equal_shares_take_turns_in_an_order_of_the_seed():
    def order(seed):
        draws = Draws(*Mixing("equal").pieces([3, 50, 7]), 1, seed)
        return [int(np.argmax(draws.before(step + 1) - draws.before(step))) for step in range(30)]

    turns = np.array(order(0)).reshape(10, 3)
    assert (np.sort(turns) == np.arange(3)).all(), "each task once in three steps"
    assert len({tuple(turn) for turn in turns}) > 1 and order(0) != order(1) and order(0) == order(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixing("uniform"), "kind must be one of equal, .* got 'uniform'"),
        (lambda: Mixing("temperature", temperature=0), "temperature must be > 0, got 0"),
        (lambda: Mixing("annealed", anneal_to=2.0), r"anneal_to must lie in \[0, 1\], got 2.0"),
        (lambda: Mixing("annealed", epochs=0), "epochs must be >= 1, got 0"),
        (lambda: Mixing("annealed").shares([1, 2]), "needs epochs and steps_per_epoch"),
        (lambda: Mixing("scheduled"), "belongs to kind='scheduled'"),
        (lambda: Mixing("equal", schedule=((0, (1,)),)), "belongs to kind='scheduled'"),
        (lambda: Mixing("scheduled", schedule=((1, (1,)),)), r"must begin at 0 and increase, got \[1\]"),
        (lambda: Mixing("scheduled", schedule=((0, (1, -1)),)), r"Shares must be >= 0.* got \(1.0, -1.0\) from step 0"),
        (lambda: Mixing("scheduled", schedule=((0, (1, 1)),)).shares([1]), "there are 1 tasks"),
        (lambda: Mixing().shares([3, 0]), r"Every task must have rows, got the sizes \[3, 0\]"),
        (lambda: Mixing().shares([3], -1), "step must be >= 0, got -1"),
        (lambda: Draws(*Mixing().pieces([1, 1]), 4, step=3, counts=[6, 5]), r"with the sum 12, got \[6, 5\]"),
        (lambda: Draws(*Mixing().pieces([1, 1]), 4, step=3, counts=[6, 6]).before(2), "step must be >= 3, got 2"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
