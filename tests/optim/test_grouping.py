"""Affinity by look-ahead against explicit steps; grouping against a search over all groupings.

Letters: K tasks, B groups.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax import optim

K = 4
PARAMS = {"trunk": jax.random.normal(jax.random.key(1), (3, 5)), "heads": jax.random.normal(jax.random.key(2), (5, K))}
X = jax.random.normal(jax.random.key(0), (8, 3))


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["trunk"]) @ params["heads"] - jnp.arange(K)[None]) ** 2, axis=0)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("is_shared", [True, {"trunk": True, "heads": False}], ids=["all", "trunk"])
def test_affinity_is_the_relative_change_after_a_step(chunk_size, is_shared):
    fn = jax.jit(optim.task_affinity(loss_fn, 0.1, is_shared, chunk_size=chunk_size))
    losses, affinity = fn(PARAMS, X)
    for i in range(K):
        gradient = jax.grad(lambda p, i=i: loss_fn(p, X)[i])(PARAMS)
        heads = gradient["heads"] if is_shared is True else jnp.zeros_like(gradient["heads"])
        away = {"trunk": PARAMS["trunk"] - 0.1 * gradient["trunk"], "heads": PARAMS["heads"] - 0.1 * heads}
        np.testing.assert_allclose(affinity[i], 1 - loss_fn(away, X) / losses, rtol=1e-4, atol=1e-5)


def test_to_first_order_affinity_is_the_gramian():
    losses, affinity = optim.task_affinity(loss_fn, 1e-3)(PARAMS, X)
    gramian = mtjax.gramian(mtjax.value_and_jacobian(loss_fn)(PARAMS, X)[1])
    np.testing.assert_allclose(affinity, 1e-3 * gramian / losses[None], rtol=0.05, atol=1e-4)


def test_affinity_of_a_solved_task():
    _, affinity = optim.task_affinity(lambda p: {"a": p**2, "solved": jnp.array(0.0)}, 0.1)(jnp.array(1.0))
    assert jnp.isfinite(affinity).all() and affinity[:, 1].tolist() == [0.0, 0.0]


def best_total(affinity, num_groups):
    """All sets of at most B groups, each task served by its best one."""
    tasks = range(len(affinity))
    groups = [g for size in range(1, len(affinity) + 1) for g in itertools.combinations(tasks, size)]

    def score(group, j):
        others = [i for i in group if i != j]
        return affinity[others, j].mean() if others else 0.0

    best = -np.inf
    for count in range(1, num_groups + 1):
        for chosen in itertools.combinations(groups, count):
            if set().union(*chosen) == set(tasks):
                best = max(best, sum(max(score(g, j) for g in chosen if j in g) for j in tasks))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_grouping_is_optimal(seed, num_groups):
    affinity = np.random.default_rng(seed).normal(size=(K, K))
    found = optim.group_tasks(affinity, num_groups)
    assert len(found) <= num_groups
    served = sorted(j for _, mine in found for j in mine)
    assert served == list(range(K)), "every task is served once"
    total = 0.0
    for members, mine in found:
        assert set(mine) <= set(members)
        for j in mine:
            others = [i for i in members if i != j]
            total += affinity[others, j].mean() if others else 0.0
    assert total == pytest.approx(best_total(affinity, num_groups), abs=1e-6)


def test_tasks_that_hurt_each_other_stay_alone():
    assert optim.group_tasks(-np.ones((3, 3)), 3) == [((0,), (0,)), ((1,), (1,)), ((2,), (2,))]
    assert optim.group_tasks(np.ones((3, 3)), 3)[0][0] in itertools.chain(
        itertools.combinations(range(3), 3), itertools.combinations(range(3), 2)
    )


def test_a_helper_trains_along_without_being_served():
    # Task 2 helps 0 and 1, which hurt each other; nobody helps 2. Two networks: (0, 2) and (1, 2).
    helps = np.array([[0, -1, 0], [-1, 0, 0], [2, 2, 0.0]])
    found = optim.group_tasks(helps, 2)
    assert sorted(members for members, _ in found) == [(0, 2), (1, 2)]


def test_sampling_probabilities():
    np.testing.assert_allclose(optim.sampling_probabilities([1, 3]), [0.25, 0.75])
    np.testing.assert_allclose(optim.sampling_probabilities([1, 9], 2.0), [0.25, 0.75])
    np.testing.assert_allclose(optim.sampling_probabilities([1, 1e9], np.inf), [0.5, 0.5])


def test_bad_arguments():
    with pytest.raises(ValueError, match="learning_rate must be > 0, got 0"):
        optim.task_affinity(loss_fn, 0)
    with pytest.raises(ValueError, match=r"affinity must be a finite matrix \[K, K\]"):
        optim.group_tasks(np.ones((2, 3)), 1)
    with pytest.raises(ValueError, match="takes 1 to 12 tasks, got 13"):
        optim.group_tasks(np.ones((13, 13)), 2)
    with pytest.raises(ValueError, match="num_groups must be >= 1, got 0"):
        optim.group_tasks(np.ones((2, 2)), 0)
    with pytest.raises(ValueError, match="sizes and temperature must be > 0"):
        optim.sampling_probabilities([0, 1])
