"""ExcessMTL: by hand, against the authors' loop in float64, warm-ups, tasks without gradient, extreme scales.

Letters: K tasks, P parameters.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax import optim
from mtjax.optim.excess import excess_mtl

K, P = 3, 4


@functools.cache
def jitted(method):
    return jax.jit(method.update)


def run(method, batches):
    """(weights of successive updates, last state); each direction is the weighted sum of the rows."""
    state, weights = method.init(None), []
    for batch in batches:
        rows = jnp.asarray(batch, jnp.float32)
        direction, state = jitted(method)(rows, state)
        finite = np.where(np.isfinite(rows), rows, 0)
        np.testing.assert_allclose(direction, state.weights @ finite, rtol=1e-4, atol=1e-5 * np.abs(finite).max())
        weights.append(np.asarray(state.weights))
    return weights, state


def random_batches(seed, steps=5, num_tasks=K):
    return np.random.default_rng(seed).normal(size=(steps, num_tasks, P)).astype(np.float32)


def naive(batches, eta):
    """The authors' loop without its 1e-7."""
    total, weights, result = 0.0, np.ones(len(batches[0])), []
    for t, rows in enumerate(np.asarray(batches, np.float64)):
        total = total + rows**2
        excess = (rows**2 / np.sqrt(total)).sum(1)
        if t == 0:
            first = excess
        else:
            weights = weights * np.exp(eta * excess / first)
            weights = weights / weights.sum() * len(weights)
        result.append(weights)
    return result


ONE = excess_mtl(1.0)


def test_by_hand():
    """g = (1, 0), (0, 2): e = |g| = 1, 2, the baseline. Then (2, 0), (0, 2): S = 5, 8; e = 4 / sqrt 5, 4 / sqrt 8.

    Relative to the baseline 4 / sqrt 5 = 1.789 and 1 / sqrt 2 = 0.707; w = 2 softmax of these for eta = 1.
    """
    weights, state = run(ONE, [np.diag([1.0, 2.0]), np.diag([2.0, 2.0])])
    assert weights[0].tolist() == [1.0, 1.0]
    share = 1 / (1 + math.exp(1 / math.sqrt(2) - 4 / math.sqrt(5)))
    np.testing.assert_allclose(weights[1], [2 * share, 2 * (1 - share)], rtol=1e-6)
    np.testing.assert_allclose(state.inner.baseline, [1.0, 2.0])
    np.testing.assert_allclose(state.inner.root, np.diag(np.sqrt([5.0, 8.0])), rtol=1e-6)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_authors_loop(seed):
    batches = random_batches(seed)
    np.testing.assert_allclose(run(ONE, batches)[0], naive(batches, 1.0), rtol=1e-3, atol=1e-5)
    one = run(SUM_ONE, batches)[0]
    np.testing.assert_allclose(K * np.array(one), naive(batches, 1.0), rtol=1e-3, atol=1e-5)


SUM_ONE = excess_mtl(1.0, total="one")


def test_warmup_averages_the_baseline():
    batches = random_batches(0)
    weights, state = run(excess_mtl(1.0, warmup=3), batches)
    assert all(np.all(w == 1) for w in weights[:3])
    assert not np.all(weights[3] == 1)
    total, excess = 0.0, []
    for rows in batches[:3].astype(np.float64):
        total = total + rows**2
        excess.append((rows**2 / np.sqrt(total)).sum(1))
    np.testing.assert_allclose(state.inner.baseline, np.mean(excess, 0), rtol=1e-5)


def test_a_task_without_gradient_at_first():
    """Its warm-up starts with its first gradient; there is no division by zero, and no weight for having come late."""
    batches = np.array([np.diag([1.0, 0.0]), np.diag([1.0, 5.0]), np.diag([1.0, 5.0])])
    weights, state = run(ONE, batches)
    np.testing.assert_allclose(state.inner.baseline, [1.0, 5.0])
    share = 1 / (1 + math.exp(-1 / math.sqrt(2)))  # task 0 has e = 1 / sqrt 2 in the second update, task 1 rests
    np.testing.assert_allclose(weights[1], [2 * share, 2 * (1 - share)], rtol=1e-6)
    assert np.isfinite(weights).all()
    assert np.all(run(ONE, np.zeros((3, 2, 2)))[0] == np.ones(2))


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_scales_do_not_matter(scale):
    batches = random_batches(1)
    expected, _ = run(ONE, batches)
    np.testing.assert_allclose(run(ONE, batches * scale)[0], expected, rtol=1e-3)
    uneven = batches * np.array([scale, 1.0, 1 / scale], np.float32)[:, None]
    np.testing.assert_allclose(run(ONE, uneven)[0], expected, rtol=1e-3)


def test_a_jump_of_many_orders_takes_all_the_weight_and_stays_finite():
    rows = np.eye(2)
    weights, state = run(ONE, [rows, rows * np.array([[1e30], [1.0]]), rows, rows * np.array([[1.0], [1e30]])])
    np.testing.assert_array_equal(weights[1], [2.0, 0.0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.inner))


def test_one_task_is_plain_descent():
    assert all(w.tolist() == [1.0] for w in run(ONE, random_batches(2, num_tasks=1))[0])


def test_an_absent_task_is_not_there():
    dropping = optim.nonfinite(ONE, "drop_task")
    batches = random_batches(3)
    gone = batches.copy()
    gone[:, 1, 2] = np.nan
    ours = []
    state = dropping.init(None)
    for rows in gone:
        _, state = jitted(dropping)(jnp.asarray(rows), state)
        ours.append(np.asarray(state.weights))
    np.testing.assert_allclose(np.array(ours)[:, [0, 2]], run(ONE, batches[:, [0, 2]])[0], rtol=1e-5)
    assert not np.array(ours)[:, 1].any()

    start = run(ONE, batches[:3])[1].inner
    _, after = jitted(dropping)(jnp.asarray(gone[3]), run(ONE, batches[:3])[1])
    for name in ("root", "baseline", "observed"):
        np.testing.assert_array_equal(getattr(start, name)[1], getattr(after.inner, name)[1])
    direction, _ = jitted(dropping)(jnp.full((K, P), jnp.nan), start_of(dropping))
    assert not np.any(direction)


def start_of(method):
    return optim.init(method, jnp.zeros(P), num_tasks=K)


def test_nan_is_not_hidden():
    direction, state = jitted(ONE)(jnp.asarray(random_batches(4)[0]).at[1, 1].set(jnp.nan), start_of(ONE))
    assert np.isnan(state.weights).all()
    assert np.isnan(direction).all()


def test_a_scan_of_updates_in_half_precision():
    """Statistics are in float32, and the state has one structure from the first to the last update."""
    batches = jnp.asarray(random_batches(5), jnp.bfloat16)
    start = start_of(ONE)
    final, _ = jax.jit(lambda s, b: jax.lax.scan(lambda c, x: (ONE.update(x, c)[1], None), s, b))(start, batches)
    np.testing.assert_allclose(final.weights, naive(batches.astype(jnp.float32), 1.0)[-1], rtol=1e-3)
    assert final.inner.root.dtype == jnp.float32


def test_errors():
    for make, message in (
        (lambda: excess_mtl(-1.0), "eta must be >= 0"),
        (lambda: excess_mtl(warmup=0), "warmup must be a number of updates >= 1"),
        (lambda: excess_mtl(total="K"), "total must be 'tasks' or 'one', got 'K'"),
        (lambda: optim.init(ONE, None, num_tasks=2), "The state of excess_mtl is as large as the parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
