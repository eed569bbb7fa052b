"""Nash-MTL and FairGrad against a concave maximisation on the rows, their equation, and values by hand.

Letters: K tasks, P parameters; g_k rows of J, n_k their norms, u_k = g_k / n_k; w weights, d = J^T w.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtjax.optim.bargaining import _bargain, fairgrad, nash_mtl

from . import cases, reference
from .cases import CASES
from .in_slots import SLOTS, direction_of, norms, weights_of

ALPHAS = (0.3, 1.0, 2.0, 20.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of numpy, for the references: more only get in one another's way on matrices of this size."""
    with threadpoolctl.threadpool_limits(1):
        yield


@functools.cache
def jitted(make, *args, **kwargs):
    weigh = make(*args, **kwargs).weighting.weigh
    return jax.jit(lambda gramian, present: weigh(gramian, jnp.zeros(present.size), (), present)[0])


@functools.cache
def bargain(alpha):
    """As `fairgrad(alpha)`, compiled once for all alpha."""
    return lambda gramian, present: _any_alpha(gramian, alpha)


_any_alpha = jax.jit(lambda gramian, alpha: _bargain(gramian, alpha)[0])


@pytest.mark.parametrize("name", CASES)
def test_equals_the_maximum_of_the_utilities(name):
    matrix = CASES[name].matrix
    for alpha in (0.5, 1.0, 2.0):  # elsewhere the reference's problem is too stiff, and the equation itself is tested
        exact = reference.fairgrad(matrix, alpha)
        d = direction_of(bargain(alpha), matrix)
        assert np.linalg.norm(d - exact.d) <= 2e-5 * exact.scale, (alpha, exact.note)


def test_equals_the_maximum_of_the_utilities_in_float64():
    with jax.enable_x64(True):
        for case in CASES.values():
            exact = reference.nash(case.matrix)
            d = direction_of(bargain(1.0), case.matrix, dtype=np.float64)
            assert np.linalg.norm(d - exact.d) <= 1e-8 * exact.scale, exact.note


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), alpha=st.sampled_from(ALPHAS), spread=st.sampled_from([0, 4, 20]))
def test_solves_its_equation(seed, alpha, spread):
    """w_k = <g_k, d>^-alpha, as far as what each task contributes to d is concerned."""
    rng = np.random.default_rng(seed)
    num_tasks = int(rng.integers(1, 13))
    # No small gains: they drown in the rounding of the Gramian.
    matrix = np.abs(cases.normal(rng, num_tasks, 16)) + cases.GRID
    matrix *= 2.0 ** rng.integers(-spread, spread + 1, (num_tasks, 1))
    weights = weights_of(bargain(alpha), matrix)
    gain = matrix @ (weights @ matrix)
    assert (gain > 0).all() and (weights >= 0).all()
    share = weights * norms(matrix)
    expected = norms(matrix) * gain**-alpha
    np.testing.assert_allclose(share, expected, atol=1e-5 * max(1, alpha) * share.sum())


def test_nash_of_two_tasks_by_hand():
    # u_1 = (1, 0), u_2 = (-1, 1) / sqrt 2, whose cosine is r = -1 / sqrt 2. By symmetry b_1 = b_2 = b with
    # (1 + r) b = 1 / b, and w_k = b / n_k for n = (2, 3).
    matrix = np.array([[2.0, 0.0], 3 / np.sqrt(2) * np.array([-1.0, 1.0])])
    b = (1 - 1 / np.sqrt(2)) ** -0.5
    np.testing.assert_allclose(weights_of(bargain(1.0), matrix), [b / 2, b / 3], rtol=1e-5)
    # |d| = sqrt 2, cut to 1.
    expected = [b / 2 / np.sqrt(2), b / 3 / np.sqrt(2)]
    np.testing.assert_allclose(weights_of(jitted(nash_mtl), matrix), expected, rtol=1e-5)


def test_fairgrad_of_orthogonal_tasks_by_hand():
    # w n^2 = w^(-1 / alpha). For alpha = 1/2: w^3 = n^-2, so that n = (8, 27) give w = (1/4, 1/9).
    matrix = np.diag([8.0, 27.0])
    np.testing.assert_allclose(weights_of(bargain(0.5), matrix), [1 / 4, 1 / 9], rtol=1e-5)
    # The code's factor K, where K is the number of tasks that are present.
    np.testing.assert_allclose(weights_of(jitted(fairgrad, 0.5, factor="tasks"), matrix), [1 / 2, 2 / 9], rtol=1e-5)


def test_nash_is_fairgrad_with_alpha_1_and_clipped(rng):
    matrix = cases.non_stationary(rng, 5, 8)
    fair = direction_of(bargain(1.0), matrix)
    assert np.linalg.norm(fair) == pytest.approx(np.sqrt(5), rel=1e-4)
    np.testing.assert_allclose(direction_of(jitted(nash_mtl), matrix), fair / np.linalg.norm(fair), atol=1e-4)
    # Nothing to clip.
    np.testing.assert_allclose(direction_of(jitted(nash_mtl, max_norm=3.0), matrix), fair, rtol=1e-5)


def test_nash_does_not_see_the_length_of_a_gradient(rng):
    matrix = cases.non_stationary(rng, 5, 8)
    d = direction_of(jitted(nash_mtl), matrix)
    for factors in (1e-10, 1e10, 10.0 ** np.array([[-8], [0], [8], [3], [-4]])):
        np.testing.assert_allclose(direction_of(jitted(nash_mtl), factors * matrix), d, atol=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [2.0**-33, 2.0**33])
def test_fairgrad_scales_as_documented(alpha, scale, rng):
    matrix = cases.non_stationary(rng, 5, 8)
    d = direction_of(bargain(alpha), matrix)
    scaled = direction_of(bargain(alpha), scale * matrix)
    np.testing.assert_allclose(scaled / scale ** ((1 - alpha) / (1 + alpha)), d, atol=1e-4 * np.linalg.norm(d))


def test_fairgrad_goes_from_the_sum_to_the_greatest_least_gain(rng):
    matrix = np.abs(cases.normal(rng, 4, 8))
    np.testing.assert_allclose(weights_of(bargain(1e-4), matrix), 1.0, atol=2e-3)
    d = direction_of(bargain(1e4), matrix)
    best = reference.mgda(matrix).d
    np.testing.assert_allclose(d / np.linalg.norm(d), best / np.linalg.norm(best), atol=1e-3)


G = np.array([1.0, -2.0, 2.0])  # of length 3
ACROSS = np.array([2.0, 2.0, 1.0])  # of length 3, orthogonal to G


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([G], G / 3),
        ([G, G, G], np.sqrt(3) * G / 3),
        ([2 * G, G, 5 * G], np.sqrt(3) * G / 3),
        ([G, -G], 0 * G),
        ([G, -3 * G], 0 * G),
        ([G, 0 * G], G / 3),
        ([0 * G, 0 * G], 0 * G),
        ([G, 1e8 * ACROSS], (G + ACROSS) / 3),
        # Opposite tasks are held: the third one moves alone, across them.
        ([G, -G, G + ACROSS], ACROSS / 3),
        ([G[:1], -2 * G[:1], 3 * G[:1]], 0 * G[:1]),
    ],
    ids=[
        "one task",
        "identical",
        "collinear",
        "opposite",
        "opposite 1:3",
        "zero row",
        "all zero",
        "ratio 1e8",
        "two held",
        "one parameter",
    ],
)
def test_nash_of_degenerate_rows(rows, expected, scale):
    matrix = scale * np.array(rows)
    weights = weights_of(bargain(1.0), matrix)
    np.testing.assert_allclose(weights @ matrix, expected, atol=1e-5)
    if not expected.any():
        assert not weights.any()


@pytest.mark.parametrize("sampler", [cases.strongly_stationary, cases.weakly_stationary])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_held_tasks_are_neither_helped_nor_hurt(sampler, seed):
    rng = np.random.default_rng(seed)
    matrix = sampler(rng, int(rng.integers(3, 9)), 10)
    stuck = reference.stuck(matrix)
    # A task within a few degrees of the span of held ones may be one of them, as far as a float32 Gramian can tell.
    unit = matrix / np.maximum(norms(matrix), 1e-30)[:, None]
    _, size, basis = np.linalg.svd(unit[stuck], full_matrices=False)
    left = norms(unit - unit @ basis[size > 1e-9].T @ basis[size > 1e-9])
    assume((left[~stuck] > 0.1).all())
    weights = weights_of(bargain(2.0), matrix)
    gain = matrix @ (weights @ matrix) / norms(matrix)
    scale = np.abs(weights) @ norms(matrix)
    np.testing.assert_allclose(gain[stuck], 0.0, atol=1e-5 * scale)
    assert (gain[~stuck] > 0).all()
    assert weights.any() or stuck.all()


def test_absent_tasks_change_nothing(rng):
    matrix = cases.non_stationary(rng, 5, 8)
    np.testing.assert_allclose(weights_of(bargain(2.0), matrix), weights_of(bargain(2.0), matrix, slots=5), rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gramian_that_is_not_finite_gives_nan(bad):
    gramian = np.eye(3, dtype=np.float32)
    gramian[0, 1] = gramian[1, 0] = bad
    padded = np.pad(gramian, (0, SLOTS - 3))
    assert np.isnan(jitted(nash_mtl)(padded, np.arange(SLOTS) < 3)[:3]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nash_mtl(max_norm=0.0), "max_norm must be positive or None, got 0.0"),
        (lambda: fairgrad(0.0), "alpha must be positive and finite, got 0.0"),
        (lambda: fairgrad(float("inf")), "alpha must be positive and finite, got inf"),
        (lambda: fairgrad(factor="two"), "factor must be 'one' or 'tasks', got 'two'"),
    ],
)
def test_errors_are_sentences(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
