"""Quadratic programmes on the simplex against the best of all supports, tried one by one.

Letters: K coordinates.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.optim.simplex import simplex_qp

K = 4


@functools.cache
def solver():
    return jax.jit(simplex_qp)


def solve(a, b, present=None):
    present = np.ones(len(b), bool) if present is None else present
    return np.asarray(solver()(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.asarray(present)))


def value(a, b, x):
    return 0.5 * x @ a @ x - b @ x


def best_support(a, b):
    """The least value over all sets of positive coordinates, in float64."""
    found = np.inf
    for size in range(1, len(b) + 1):
        for support in itertools.combinations(range(len(b)), size):
            index = list(support)
            system = np.block([[a[np.ix_(index, index)], np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            x = np.zeros(len(b))
            x[index] = np.linalg.lstsq(system, np.append(b[index], 1.0), rcond=None)[0][:-1]
            if (x >= -1e-12).all() and abs(x.sum() - 1) < 1e-9:
                found = min(found, value(a, b, x))
    return found


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(0, K), linear=st.sampled_from([0.0, 0.1, 1.0]))
def test_no_other_point_of_the_simplex_is_better(seed, rank, linear):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(K, rank)) / np.sqrt(max(rank, 1))
    a, b = rows @ rows.T, linear * rng.normal(size=K)
    x = solve(a, b)
    assert (x >= 0).all()
    np.testing.assert_allclose(x.sum(), 1.0, rtol=1e-5)
    assert value(a, b, x) <= best_support(a, b) + 3e-6


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_absent_coordinates_are_those_of_a_smaller_problem(seed):
    rng = np.random.default_rng(seed)
    rows, b = rng.normal(size=(K, K)) / 2, 0.3 * rng.normal(size=K)
    present = np.array([True, False, True, True])
    x = solve(rows @ rows.T, b, present)
    alone = solve((rows @ rows.T)[np.ix_(present, present)], b[present])
    np.testing.assert_allclose(x[present], alone, atol=1e-5)
    assert x[1] == 0


def test_by_hand():
    """A = diag(1, 4): x in proportion to 1 / A_kk. With b = (0, 3): x_1 + tau = 0, 4 x_2 + tau = 3, x = (1/5, 4/5)."""
    np.testing.assert_allclose(solve(np.diag([1.0, 4.0]), [0.0, 0.0]), [0.8, 0.2], rtol=1e-5)
    np.testing.assert_allclose(solve(np.diag([1.0, 4.0]), [0.0, 3.0]), [0.2, 0.8], rtol=1e-5)
    np.testing.assert_allclose(solve(np.diag([1.0, 4.0]), [0.0, 9.0]), [0.0, 1.0], atol=1e-6)


def test_degenerate_problems():
    np.testing.assert_allclose(solve(np.zeros((K, K)), np.zeros(K)).sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(solve(np.zeros((K, K)), [0.0, 1.0, 0.5, 1e-3]), [0, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(solve(np.ones((K, K)), np.zeros(K)).sum(), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(solve(np.eye(K), np.zeros(K), np.zeros(K, bool)), np.zeros(K))
    np.testing.assert_array_equal(solve([[3.0]], [1.0]), [1.0])


@pytest.mark.parametrize("num_params", [10, 200])
def test_many_coordinates(num_params):
    rows = np.random.default_rng(0).normal(size=(64, num_params))
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    x = solve(rows @ rows.T, np.zeros(64))
    slope = rows @ (x @ rows)  # at the minimum, equal on the support and not less elsewhere
    assert slope.min() >= x @ slope - 1e-6
