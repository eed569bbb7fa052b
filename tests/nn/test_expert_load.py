"""Expert use over training against a loop, and the overlap of tasks in its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from mtjax.nn.balance import RouterStats
from mtjax.nn.expert_load import ExpertLoad, expert_load, summarise_load, update_load


def stats_of(count, dropped):
    rows = len(count)
    table, row = jnp.zeros((rows, count.shape[1])), jnp.zeros(rows)
    return RouterStats(table, table, jnp.asarray(count), table, row, row, jnp.asarray(dropped), jnp.asarray(1.0))


update = functools.partial(jax.jit, static_argnums=2)(update_load)
summarise = jax.jit(summarise_load, static_argnames="threshold")


def load_of(count):
    return ExpertLoad(jnp.asarray(count, jnp.float32), jnp.zeros(len(count)), jnp.ones(len(count)))


def test_moving_averages_equal_a_loop_and_absent_tasks_stay():
    rng = np.random.default_rng(0)
    load = expert_load(3, 4)
    count, dropped, seen = np.zeros((3, 4)), np.zeros(3), np.zeros(3)
    for tasks in [(0, 2), (2, 1), (2, 1), (0, 2)]:
        batch = rng.integers(0, 20, (2, 4)).astype(np.float32)
        lost = rng.random(2).astype(np.float32)
        load = update(load, stats_of(batch, lost), tasks)
        for row, task in enumerate(tasks):
            count[task] = 0.95 * count[task] + 0.05 * batch[row]
            dropped[task] = 0.95 * dropped[task] + 0.05 * lost[row] if seen[task] else lost[row]
            seen[task] += 1
        np.testing.assert_allclose(load.count, count, rtol=1e-5)
        np.testing.assert_allclose(load.dropped, dropped, rtol=1e-5)
        np.testing.assert_array_equal(load.steps, seen)


def test_one_stream_may_stand_for_all_tasks():
    batch = np.array([[3.0, 1.0]], np.float32)
    load = update(expert_load(2, 2), stats_of(batch, np.array([0.25], np.float32)), (0, 1))
    np.testing.assert_allclose(summarise(load).percent, [[75, 25], [75, 25]], rtol=1e-6)
    np.testing.assert_allclose(load.dropped, [0.25, 0.25], rtol=1e-6)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=8)
def test_overlap_is_the_cosine_and_the_common_share(seed):
    count = np.random.default_rng(seed).gamma(0.5, size=(3, 6))
    summary = summarise(load_of(count))
    share = count / count.sum(1, keepdims=True)
    np.testing.assert_allclose(summary.overlap, cosine_similarity(count), rtol=1e-4, atol=1e-5)
    for t in range(3):
        for u in range(3):
            common = sum(min(share[t, e], share[u, e]) for e in range(6))
            np.testing.assert_allclose(summary.shared[t, u], common, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(summary.percent.sum(-1), 100, rtol=1e-5)


def test_disjoint_and_equal_tasks_dead_experts_and_unseen_tasks():
    summary = summarise(load_of([[5, 5, 0, 0, 0], [0, 0, 9, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]), threshold=20.0)
    np.testing.assert_allclose(summary.shared[0], [1, 0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(summary.overlap[0], [1, 0, 1, 0], atol=1e-6)
    np.testing.assert_array_equal(summary.experts_used, [2, 1, 2, 0])
    np.testing.assert_array_equal(summary.dead, [False, False, False, True, True])
    np.testing.assert_array_equal(summary.percent[3], 0)
