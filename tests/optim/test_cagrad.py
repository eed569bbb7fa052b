"""CAGrad against a search along the multiplier of its ball, its duality gap, and values by hand.

Letters: K tasks, P parameters; g_k rows of J, n_k their norms, g_0 their mean; w weights, d = J^T w.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.optim.cagrad import _conflict_averse, cagrad

from . import cases, reference
from .cases import CASES
from .in_slots import SLOTS, direction_of, norms, weights_of


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of numpy, for the references: more only get in one another's way on matrices of this size."""
    with threadpoolctl.threadpool_limits(1):
        yield


@functools.cache
def jitted(*args, **kwargs):
    weigh = cagrad(*args, **kwargs).weighting.weigh
    return jax.jit(lambda gramian, present: weigh(gramian, jnp.zeros(present.size), (), present)[0])


_any_c = jax.jit(lambda gramian, present, c: _conflict_averse(gramian, present, present / present.sum(), c))


@functools.cache
def averse(c):
    """As `cagrad(c)`, compiled once for all c."""
    return lambda gramian, present: _any_c(gramian, present, c)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_maximum_of_the_least_gain(name):
    matrix = CASES[name].matrix
    for c in (0.1, 0.5, 0.9):
        exact = reference.cagrad(matrix, c)
        d = direction_of(averse(c), matrix)
        assert np.linalg.norm(d - exact.d) <= 1e-4 * exact.scale, (c, exact.note)


def test_equals_the_maximum_of_the_least_gain_in_float64():
    with jax.enable_x64(True):
        for case in CASES.values():
            exact = reference.cagrad(case.matrix, 0.5)
            d = direction_of(averse(0.5), case.matrix, dtype=np.float64)
            assert np.linalg.norm(d - exact.d) <= 1e-8 * exact.scale, exact.note


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), c=st.sampled_from([0.05, 0.5, 0.95, 3.0]), spread=st.sampled_from([0, 2, 20]))
def test_no_gap_to_the_dual(seed, c, spread):
    """d is in the ball, and for its w the least gain is <g_w, g_0> + c |g_0| |g_w|, which bounds that of all d."""
    rng = np.random.default_rng(seed)
    num_tasks = int(rng.integers(2, 13))
    matrix = cases.normal(rng, num_tasks, 24) * 2.0 ** rng.integers(-spread, spread + 1, (num_tasks, 1))
    mean = matrix.mean(0)
    radius = c * np.linalg.norm(mean)
    push = weights_of(averse(c), matrix) - 1 / num_tasks
    size = norms(matrix).sum() / num_tasks + np.abs(push) @ norms(matrix)
    assert (push >= -1e-6).all()
    moved = push @ matrix
    assert np.linalg.norm(moved) <= radius + 1e-5 * size
    weights = push / push.sum()
    bound = weights @ matrix @ mean + radius * np.linalg.norm(weights @ matrix)
    # Gains are known to a share of their gradient: that of the tasks that weigh counts.
    least = (matrix @ (mean + moved) + 1e-4 * size * norms(matrix)).min()
    assert least >= bound - 1e-4 * size * (weights @ norms(matrix))


def test_of_two_tasks_by_hand():
    # J = [[-4, 1, 1], [6, 1, 1]]: g_0 = (1, 1, 1), g_w = (x, 1, 1) with x = 6 - 10 w_1 in [-4, 6]. The objective
    # x + 2 + c sqrt 3 sqrt(x^2 + 2) has the slope 1 + c sqrt 3 x / sqrt(x^2 + 2), positive everywhere if c sqrt 3 < 1.
    # For c = 1/2 therefore x = -4, w = (1, 0), and d = g_0 + sqrt 3 / 2 (-4, 1, 1) / sqrt 18.
    matrix = np.array([[-4.0, 1, 1], [6, 1, 1]])
    push = np.sqrt(3) / 2 / np.sqrt(18)
    np.testing.assert_allclose(weights_of(averse(0.5), matrix), [0.5 + push, 0.5], atol=1e-6)
    # For c = 1 the slope is zero at x = -1: w = (0.7, 0.3), |g_w| = sqrt 3, and d = (0, 2, 2).
    np.testing.assert_allclose(weights_of(averse(1.0), matrix), [1.2, 0.8], atol=1e-5)


def test_factors(rng):
    matrix = cases.normal(rng, 4, 6)
    d = direction_of(averse(0.5), matrix)
    for kwargs, factor in (
        ({"rescale": 1}, 1 / 1.25),
        ({"rescale": 2, "reduction": "sum"}, 4 / 1.5),  # 4 of 64 tasks are present
    ):
        np.testing.assert_allclose(direction_of(jitted(0.5, **kwargs), matrix), factor * d, atol=1e-5)


def test_without_a_ball_it_is_the_mean(rng):
    matrix = cases.normal(rng, 4, 6)
    assert weights_of(jitted(0.0), matrix).tolist() == [0.25] * 4
    np.testing.assert_allclose(direction_of(averse(1e-4), matrix), matrix.mean(0), atol=1e-3)


def test_in_a_large_ball_it_turns_to_the_shortest_vector_of_the_hull(rng):
    matrix = cases.non_stationary(rng, 4, 6)
    d, best = direction_of(averse(100.0), matrix), reference.mgda(matrix).d
    cosine = d @ best / np.linalg.norm(d) / np.linalg.norm(best)
    assert cosine > 0.999


@pytest.mark.parametrize("scale", [2.0**-33, 2.0**33])
def test_scale(scale, rng):
    matrix = cases.non_stationary(rng, 5, 8)
    d = direction_of(averse(0.5), matrix)
    np.testing.assert_allclose(direction_of(averse(0.5), scale * matrix) / scale, d, atol=1e-5)


G = np.array([1.0, -2.0, 2.0])  # of length 3
ACROSS = np.array([2.0, 2.0, 1.0])  # of length 3, orthogonal to G


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([G], 1.5 * G),
        ([G, G, G], 1.5 * G),
        # The mean plus half of its length along G, the shortest.
        ([G, 3 * G], 3 * G),
        ([G, -G], 0 * G),
        # The mean is -G, and a ball of half its length reaches no further.
        ([G, -3 * G], -G / 2),
        # Nothing helps a zero gradient, and the mean hurts no task.
        ([G, 0 * G], G / 2),
        ([0 * G, 0 * G], 0 * G),
        # The mean is ACROSS - G / 3, of length sqrt 10: the ball reaches ACROSS, the nearest that hurts no task.
        ([G, 0 * G, 3 * ACROSS - 2 * G], ACROSS),
        ([G, 1e8 * ACROSS], 1e8 * ACROSS / 2 + 1e8 * G / 4),
    ],
    ids=["one task", "identical", "collinear", "opposite", "opposite 1:3", "zero row", "all zero", "held", "ratio 1e8"],
)
def test_degenerate_rows(rows, expected, scale):
    d = direction_of(averse(0.5), scale * np.array(rows))
    np.testing.assert_allclose(d, scale * expected, atol=1e-4 * scale * norms(np.array(rows)).max())


def test_stays_where_the_ball_first_reaches_the_directions_that_hurt_no_task(rng):
    matrix = CASES["weakly stationary 4x6"].matrix
    nearest = reference.dual_proj(matrix)
    distance = np.linalg.norm(nearest.d - matrix.mean(0)) / np.linalg.norm(matrix.mean(0))
    for factor in (0.999, 1.001, 1.1, 2.0):
        d = direction_of(averse(factor * distance), matrix)
        np.testing.assert_allclose(d, nearest.d, atol=2e-3 * nearest.scale)


def test_absent_tasks_change_nothing(rng):
    matrix = cases.normal(rng, 5, 8)
    np.testing.assert_allclose(weights_of(averse(0.5), matrix), weights_of(averse(0.5), matrix, slots=5), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("weigh", [jitted(0.0), jitted(0.5, rescale=1)], ids=["c=0", "c=0.5"])
def test_a_gramian_that_is_not_finite_gives_nan(bad, weigh):
    gramian = np.zeros((SLOTS, SLOTS), np.float32)
    gramian[:2, :2] = [[1.0, bad], [bad, 1.0]]
    assert np.isnan(weigh(gramian, np.arange(SLOTS) < 2)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cagrad(-0.1), "c must be at least 0 and finite, got -0.1"),
        (lambda: cagrad(rescale=3), "rescale must be 0, 1 or 2, got 3"),
        (lambda: cagrad(reduction="max"), "reduction must be 'mean' or 'sum', got 'max'"),
    ],
)
def test_errors_are_sentences(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
