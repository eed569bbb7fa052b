"""Krum: scores by hand and by a float64 loop over rows; distances without cancellation; robustness; fewer tasks.

Letters: K tasks, P parameters; f tasks that may be wrong.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtjax
from mtjax import optim
from mtjax.optim.krum import krum, squared_distances

K, P = 6, 4


def random_rows(seed, num_tasks=K, num_params=P):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_tasks, num_params)) * 10 ** rng.uniform(-1, 1, (num_tasks, 1))
    return jnp.asarray(rows, jnp.float32)


@functools.cache
def updater(num_byzantine, num_selected, policy):
    method = optim.nonfinite(krum(num_byzantine, num_selected), policy)
    return jax.jit(lambda rows: method.update(rows, method.init(None)))


def weights_of(rows, num_byzantine=1, num_selected=1, policy="propagate"):
    direction, state = updater(num_byzantine, num_selected, policy)(jnp.asarray(rows, jnp.float32))
    if policy == "propagate":
        np.testing.assert_allclose(direction, state.weights @ np.asarray(rows, np.float32), rtol=1e-5)
    return np.asarray(state.weights)


def naive_scores(rows, num_byzantine):
    rows = np.asarray(rows, np.float64)
    scores = []
    for i, row in enumerate(rows):
        distances = sorted(float(((row - other) ** 2).sum()) for j, other in enumerate(rows) if j != i)
        scores.append(sum(distances[: len(rows) - num_byzantine - 2]))
    return np.array(scores)


def test_krum_by_hand():
    """0, 1, 3, 10 on a line, f = 1, so one neighbour each: scores 1, 1, 4, 49. A tie: the first wins.

    With 0, 1, 2.5, 10 and f = 0, two neighbours: 1 + 6.25, 1 + 2.25, 2.25 + 6.25, 56.25 + 81: the second, then 0.
    """
    assert weights_of([[0.0], [1.0], [3.0], [10.0]]).tolist() == [1.0, 0.0, 0.0, 0.0]
    rows = [[0.0], [1.0], [2.5], [10.0]]
    assert weights_of(rows, 0).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert weights_of(rows, 0, 2).tolist() == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(("num_byzantine", "num_selected"), [(0, 1), (1, 1), (3, 1), (1, 3)])
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_chosen_rows_have_the_least_scores(num_byzantine, num_selected, seed):
    rows = random_rows(seed)
    weights = weights_of(rows, num_byzantine, num_selected)
    scores = naive_scores(rows, num_byzantine)
    assert np.unique(weights).tolist() == [0.0, np.float32(1 / num_selected)]
    assert (weights > 0).sum() == num_selected
    assert scores[weights > 0].max() <= np.sort(scores)[num_selected - 1] * (1 + 1e-4)


def test_distances_are_exact_to_rounding_of_the_gramian():
    """Also where |g_i|^2 + |g_j|^2 - 2 <g_i, g_j> has no digit left."""
    rows = np.asarray(random_rows(1), np.float64)
    rows[1] = rows[0] * (1 + 2.0**-12)  # parallel, nearly as long: the difference is in the norms
    for scale in (1e-10, 1.0, 1e10):
        gram = mtjax.gramian(jnp.asarray(rows * scale, jnp.float32))
        longest = (rows**2).sum(1).max()
        expected = ((rows[:, None] - rows[None]) ** 2).sum(-1) / longest
        size = np.sqrt((rows**2).sum(1) / longest)
        ours = np.asarray(squared_distances(gram))
        assert (np.abs(ours - expected) <= 8 * np.finfo(np.float32).eps * (expected + size[:, None] * size[None])).all()
        assert (ours >= 0).all()
    parallel = jnp.array([[1e4], [1e4 + 1], [0.0]])
    np.testing.assert_allclose(squared_distances(mtjax.gramian(parallel))[0, 1], (1 / (1e4 + 1)) ** 2, rtol=1e-2)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e2, 1e8]))
def test_a_far_away_task_is_never_chosen(seed, size):
    rng = np.random.default_rng(seed)
    rows = 1 + 0.1 * rng.normal(size=(K, P))
    rows[2] = size * rng.normal(size=P)
    assert weights_of(rows, 1, 2)[2] == 0


def test_order_and_scale_do_not_matter():
    rows = random_rows(2)
    weights = weights_of(rows, 1, 2)
    order = np.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_array_equal(weights_of(rows[order], 1, 2), weights[order])
    for scale in (1e-10, 1e10):
        np.testing.assert_array_equal(weights_of(rows * scale, 1, 2), weights)


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((K, P)),
        np.ones((K, P)),
        np.outer([1, -1, 1, -1, 1, -1], np.ones(P)),
        np.outer(10.0 ** np.array([-8, 8, 0, 3, -3, 5]), np.ones(P)),
        np.vstack([np.zeros(P), np.eye(5, P)]),
    ],
    ids=["zero", "identical", "opposite", "ratios", "a zero row"],
)
def test_weights_sum_to_one_whatever_the_rows(rows):
    for selected in (1, 3):
        weights = weights_of(rows, 1, selected)
        assert weights.sum() == pytest.approx(1.0)
        assert (weights >= 0).all()


def test_absent_tasks_are_not_there():
    """A zero row would be a neighbour at distance |g|; an absent one is none. K' - f - 2 neighbours count."""
    rows = random_rows(3, 7)
    gone = np.asarray(rows).copy()
    gone[[0, 4]] = np.nan
    kept = np.array([1, 2, 3, 5, 6])
    for byzantine, selected in ((1, 1), (2, 2)):
        weights = weights_of(gone, byzantine, selected, "drop_task")
        np.testing.assert_array_equal(weights[kept], weights_of(rows[kept], byzantine, selected))
        assert not weights[[0, 4]].any()


def test_too_few_tasks_in_a_step():
    """Of 0, 1, 5: nearest others at 1, 1, 4. A single task is chosen. Nobody: no update."""
    rows = np.full((K, 1), np.nan)
    rows[[1, 3, 4]] = [[1.0], [0.0], [5.0]]
    assert weights_of(rows, 3, 1, "drop_task").tolist() == [0, 1, 0, 0, 0, 0]
    assert weights_of(rows, 3, 5, "drop_task").tolist() == pytest.approx([0, 1 / 3, 0, 1 / 3, 1 / 3, 0])
    rows[[1, 3]] = np.nan
    assert weights_of(rows, 3, 1, "drop_task").tolist() == [0, 0, 0, 0, 1, 0]
    assert not weights_of(rows * np.nan, 3, 1, "drop_task").any()


def test_nan_is_not_hidden():
    rows = random_rows(4).at[2, 1].set(jnp.nan)
    assert np.isnan(updater(1, 1, "propagate")(rows)[1].weights).all()


def test_many_tasks():
    rows = random_rows(5, 64, 16)
    weights = weights_of(rows, 10, 5)
    chosen = naive_scores(rows, 10)[weights > 0]
    assert chosen.max() <= np.sort(naive_scores(rows, 10))[4] * (1 + 1e-4)


def test_errors_of_krum():
    for arguments, name in (((-1,), "num_byzantine"), ((1.5,), "num_byzantine"), ((1, 0), "num_selected")):
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            krum(*arguments)
    with pytest.raises(ValueError) as error:
        weights_of(random_rows(0, 4), 2)
    assert str(error.value) == "krum(num_byzantine=2) needs at least 5 tasks, got 4"
    with pytest.raises(ValueError) as error:
        weights_of(random_rows(0, 4), 1, 5)
    assert str(error.value) == "krum(num_selected=5) got only 4 tasks"
