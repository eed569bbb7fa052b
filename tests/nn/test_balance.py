"""Router statistics against loops; the losses at their optima, against closed forms and scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from mtjax.nn import balance
from mtjax.nn.balance import RouterStats, mutual_information, mutual_information_loss, router_stats, running_joint
from mtjax.nn.routers import choose

T, M, E, K = 2, 9, 5, 2


@pytest.fixture(scope="module")
def routing():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(T, M, E)).astype(np.float32)
    noisy = logits + 0.3 * rng.normal(size=(T, M, E)).astype(np.float32)
    return choose(jnp.asarray(logits), jnp.asarray(noisy), jnp.asarray(0.3), top_k=K, num_experts=E)


def stats_of(**fields):
    rows = len(next(iter(fields.values())))
    zeros = jnp.zeros((rows, 1))
    default = dict(importance=zeros, probability=zeros, count=zeros, load=zeros)
    per_stream = dict.fromkeys(("z", "entropy", "dropped"), jnp.zeros(rows))
    fields = {name: jnp.asarray(value, jnp.float32) for name, value in fields.items()}
    return RouterStats(**(default | per_stream | {"tokens": jnp.asarray(1.0)} | fields))


def test_every_statistic_equals_a_loop(routing):
    kept = np.random.default_rng(1).random((T, M, K)) < 0.7
    stats = jax.jit(router_stats)(routing, kept)
    values, ids, probs, logits, noisy, _ = map(np.asarray, routing)
    for t in range(T):
        importance, count, load, entropy, z = np.zeros(E), np.zeros(E), np.zeros(E), 0.0, 0.0
        for m in range(M):
            for k in range(K):
                importance[ids[t, m, k]] += values[t, m, k]
                count[ids[t, m, k]] += 1
            threshold = np.sort(noisy[t, m])[-K]
            load += 1 - scipy.stats.norm.cdf((threshold - logits[t, m]) / 0.3)
            entropy -= (probs[t, m] * np.log(probs[t, m])).sum() / M
            z += np.log(np.exp(logits[t, m]).sum()) ** 2 / M
        np.testing.assert_allclose(stats.importance[t], importance, rtol=1e-5)
        np.testing.assert_array_equal(stats.count[t], count)
        np.testing.assert_allclose(stats.load[t], load, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.entropy[t], entropy, rtol=1e-5)
        np.testing.assert_allclose(stats.z[t], z, rtol=1e-5)
    np.testing.assert_allclose(stats.probability, probs.mean(1), rtol=1e-5)
    np.testing.assert_allclose(stats.dropped, 1 - kept.mean((1, 2)), rtol=1e-5, atol=1e-7)
    assert stats.tokens == M


stats_without_noise = jax.jit(router_stats)


def test_without_noise_the_load_is_the_hard_count(routing):
    stats = stats_without_noise(routing._replace(noise_std=None))
    np.testing.assert_array_equal(stats.load, stats.count)
    np.testing.assert_array_equal(stats.dropped, 0)


def test_load_has_a_gradient_with_noise_that_pulls_towards_balance():
    logits = jnp.asarray([[[2.0, 0.0, -2.0]] * 4])

    def loss(logits):
        return balance.load_loss(router_stats(choose(logits, logits, jnp.asarray(1.0), top_k=1, num_experts=3)))[0]

    gradient = jax.jit(jax.grad(loss))(logits)[0, 0]
    assert gradient[0] > 0 > gradient[2]  # descent lowers the crowded expert and raises the idle one


def test_an_empty_choice_counts_for_no_expert(routing):
    ids = np.array(routing.ids)
    ids[:, :, 1] = E
    stats = stats_without_noise(routing._replace(ids=ids, noise_std=None))
    np.testing.assert_array_equal(stats.count.sum(-1), M)
    np.testing.assert_array_equal(stats.dropped, 0)


cv_squared = jax.jit(balance.cv_squared)
losses = jax.jit(lambda stats: (balance.importance_loss(stats), balance.load_loss(stats), balance.switch_loss(stats)))


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
@settings(max_examples=10)
def test_cv_squared_is_zero_at_balance_only_and_has_no_scale(seed, scale):
    x = np.random.default_rng(seed).random((3, 6)).astype(np.float32)
    np.testing.assert_allclose(cv_squared(x), x.var(-1) / x.mean(-1) ** 2, rtol=1e-4)
    np.testing.assert_allclose(cv_squared(np.float32(scale) * x), cv_squared(x), rtol=1e-4)
    np.testing.assert_allclose(cv_squared(np.full((3, 6), np.float32(scale))), 0, atol=1e-10)


def test_balance_losses_at_balance_and_at_collapse():
    even = np.full((1, 4), 2.0)
    one = np.array([[8.0, 0.0, 0.0, 0.0]])
    stats = stats_of(importance=np.r_[even, one], load=np.r_[even, one], count=np.r_[even, one])
    stats = stats._replace(probability=jnp.asarray(np.r_[even, one] / 8, jnp.float32))
    importance, load, switch = losses(stats)
    np.testing.assert_allclose(importance, [0, 3], rtol=1e-6)  # CV^2 of one in E is E - 1
    np.testing.assert_allclose(load, [0, 3], rtol=1e-6)
    np.testing.assert_allclose(switch, [1, 4], rtol=1e-6)
    visible = np.array([[True] * 4, [True, False, False, False]])
    among_visible = jax.jit(balance.importance_loss)(stats, visible=visible)
    np.testing.assert_allclose(among_visible, [0, 0], atol=1e-7)
    np.testing.assert_array_equal(cv_squared(np.zeros((1, 4), np.float32)), [0])


def test_pooled_streams_may_specialise():
    stats = stats_of(importance=np.eye(4), load=np.eye(4), count=np.eye(4), probability=np.eye(4))
    np.testing.assert_allclose(losses(stats)[0], 3, rtol=1e-6)
    pool = jax.jit(balance.pooled)(stats)
    importance, load, switch = losses(pool)
    np.testing.assert_allclose([importance, load], 0, atol=1e-7)
    np.testing.assert_allclose(switch, [1], rtol=1e-6)
    assert pool.tokens == 4 * stats.tokens


def test_top_k_loss_is_the_squared_mass_outside():
    stats = stats_of(probability=[[0.5, 0.1, 0.3, 0.1], [0.25] * 4])
    np.testing.assert_allclose(balance.top_k_loss(stats, limit_k=2), [0.02, 2 / 16], rtol=1e-5)
    np.testing.assert_array_equal(balance.top_k_loss(stats, limit_k=4), [0, 0])


information = functools.partial(jax.jit, static_argnames="epsilon")(mutual_information)


@given(seed=st.integers(0, 10**6), zeros=st.booleans())
@settings(max_examples=10)
def test_mutual_information_equals_scikit_learn_and_keeps_its_bounds(seed, zeros):
    counts = np.random.default_rng(seed).integers(1, 100, (3, 5))
    if zeros:
        counts *= counts > 60
        counts[0, 0] = 50
    joint = (counts / counts.sum()).astype(np.float32)
    value = float(information(joint, epsilon=0.0))
    np.testing.assert_allclose(value, mutual_info_score(None, None, contingency=counts), atol=1e-5)
    assert -1e-6 <= value <= np.log(3) + 1e-6
    task, expert = joint.sum(1, keepdims=True) + 1e-4, joint.sum(0, keepdims=True) + 1e-4
    published = (joint * np.log(joint / task / expert + 1e-4)).sum()
    np.testing.assert_allclose(information(joint), published, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(information(joint), value, atol=20e-4)


@pytest.mark.parametrize(("tasks", "experts"), [(3, 3), (2, 6), (4, 2)])
def test_mutual_information_of_disjoint_and_of_independent_use(tasks, experts):
    disjoint = np.zeros((tasks, experts), np.float32)
    for e in range(max(tasks, experts)):
        disjoint[e % tasks, e % experts] = 1
    disjoint /= disjoint.sum()
    closed = np.log(min(tasks, experts))
    np.testing.assert_allclose(information(disjoint, epsilon=0.0), closed, rtol=1e-5)
    np.testing.assert_allclose(information(disjoint), closed, rtol=2e-3)
    expert = np.arange(1, experts + 1, dtype=np.float32)
    independent = np.full((tasks, 1), 1 / tasks, np.float32) * expert[None] / expert.sum()
    np.testing.assert_allclose(information(independent, epsilon=0.0), 0, atol=1e-6)
    np.testing.assert_allclose(information(independent), 0, atol=20e-4)


loss_of = jax.jit(mutual_information_loss, static_argnames="decay")
TABLE = np.random.default_rng(0).dirichlet(np.ones(E), 3).astype(np.float32)


def test_information_loss_of_a_batch_with_all_tasks():
    loss, joint = loss_of(stats_of(probability=TABLE), (0, 1, 2))
    np.testing.assert_allclose(loss, -information(TABLE / 3), rtol=1e-5)
    np.testing.assert_array_equal(joint.rows, TABLE)
    shared, _ = loss_of(stats_of(probability=TABLE[:1]), (0, 1, 2))  # a gate that knows no task carries no information
    np.testing.assert_allclose(shared, 0, atol=20e-4)


def test_one_task_per_batch_gives_the_value_and_the_gradient_of_all_at_once():
    joint = running_joint(3, E)
    for task in (2, 0, 1):
        before, (_, joint) = joint, loss_of(stats_of(probability=TABLE[task : task + 1]), (task,), joint)
        others = [t for t in range(3) if t != task]
        np.testing.assert_array_equal(joint.rows[np.array(others)], before.rows[np.array(others)])
    np.testing.assert_allclose(joint.rows, TABLE, rtol=1e-6)
    np.testing.assert_array_equal(joint.steps, 1)

    def loss(rows, joint, tasks):
        return mutual_information_loss(stats_of(probability=rows), tasks, joint)[0]

    value_and_gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    whole, (expected, _) = value_and_gradient(TABLE, None, (0, 1, 2))
    for task in range(3):
        value, (gradient, to_state) = value_and_gradient(TABLE[task : task + 1], joint, (task,))
        np.testing.assert_allclose(value, whole, rtol=1e-5)
        np.testing.assert_allclose(gradient[0], expected[task], rtol=1e-4, atol=1e-6)
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(to_state))


def test_running_rows_are_plain_means_first_and_moving_averages_later():
    rows = np.random.default_rng(1).dirichlet(np.ones(E), 8).astype(np.float32)
    joint, expected = running_joint(3, E), np.zeros(E)
    for step, row in enumerate(rows):
        _, joint = loss_of(stats_of(probability=row[None]), (1,), joint, decay=0.75)
        keep = min(0.75, step / (step + 1))
        expected = keep * expected + (1 - keep) * row
        np.testing.assert_allclose(joint.rows[1], expected, rtol=1e-5)
        if step == 3:
            np.testing.assert_allclose(expected, rows[:4].mean(0), rtol=1e-6)


def test_minimising_the_loss_gives_each_task_its_own_experts():
    """4 tasks, 8 experts: the descent ends at I = log 4, each task on 2 experts of its own or fewer."""
    logits = 0.1 * np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)

    def loss(logits):
        return mutual_information_loss(stats_of(probability=jax.nn.softmax(logits)), jnp.arange(4))[0]

    @jax.jit
    def descend(logits):
        return jax.lax.fori_loop(0, 600, lambda _, z: z - 20.0 * jax.grad(loss)(z), logits)

    table = np.asarray(jax.nn.softmax(descend(logits)))
    assert information(table / 4) > np.log(4) - 0.05
    assert ((table > 0.05).sum(0) <= 1).all()
