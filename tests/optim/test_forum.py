"""FORUM against its own constrained problem, solved by trying all supports in float64, and gradients of q by jax.grad.

Letters: K tasks; u_k unit gradients of the upper losses; q the constraint, b = phi |grad q|.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtjax
from mtjax import optim
from mtjax.optim.forum import forum

K, ETA, T, PHI = 3, 0.05, 3, 0.4
PARAMS = {
    "trunk": jax.random.normal(jax.random.key(1), (3, 4)),
    "heads": tuple(jax.random.normal(jax.random.key(2 + k), (4,)) for k in range(K)),
}
IS_SHARED = {"trunk": True, "heads": False}
BATCH = jax.random.normal(jax.random.key(0), (8, 3))
TRAIN, VAL = BATCH[:4], BATCH[4:]
make = functools.partial(forum, PHI, optax.sgd(0.01), inner_learning_rate=ETA, inner_steps=T)


def loss_fn(params, x):
    z = jnp.tanh(x @ params["trunk"])
    return {f"task {k}": 2.0 ** (k - 1) * jnp.mean((z @ head - 1) ** 2) for k, head in enumerate(params["heads"])}


def stacked(params, x):
    return jnp.stack(list(loss_fn(params, x).values()))


def assert_trees_close(ours, expected, tolerance=2e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), ours, expected)


def dual(units, q, phi=PHI):
    """lambda, nu and d of min 1/2 |lambda u + nu q|^2 - nu phi |q|^2: the best KKT point of all supports. units
    f64[K, N], q f64[N]; N counts theta and alpha."""
    best = (np.inf, None)
    rows, square = np.vstack([units, q]), phi * q @ q
    for size in range(1, len(units) + 1):
        for support in itertools.combinations(range(len(units)), size):
            for active in ([], [len(units)]):
                index = [*support, *active]
                one = np.array([1.0] * size + [0.0] * len(active))[:, None]
                system = np.block([[rows[index] @ rows[index].T, one], [one.T, np.zeros((1, 1))]])
                x = np.zeros(len(rows))
                x[index] = np.linalg.lstsq(system, [0.0] * size + [square] * len(active) + [1.0], rcond=None)[0][:-1]
                value = 0.5 * np.sum((x @ rows) ** 2) - x[-1] * square
                if (x >= -1e-10).all() and abs(x[:-1].sum() - 1) < 1e-8 and value < best[0] - 1e-13:
                    best = (value, x)
    return best[1][:-1], best[1][-1], best[1] @ rows


def first_update(matrix, phi=PHI):
    """The first update by hand, by `dual`: multipliers, direction, slope of alpha."""
    matrix = np.asarray(matrix, np.float64)
    w, size = np.full(len(matrix), 1 / len(matrix)), np.linalg.norm(matrix, axis=1)
    falls = ETA * T * matrix @ (w @ matrix)
    q = np.concatenate([w @ matrix, w * (falls - w @ falls)])
    units = np.hstack([matrix / np.where(size > 0, size, 1.0)[:, None], np.zeros((len(matrix), len(matrix)))])
    lam, _, d = dual(units, q, phi)
    return lam, d[: matrix.shape[1]], d[matrix.shape[1] :], q


@functools.cache
def updater(phi=PHI, num_tasks=K):
    method = forum(phi, optax.sgd(0.01), inner_learning_rate=ETA, inner_steps=T)
    return jax.jit(method.update), optim.init(method, None, num_tasks=num_tasks)


# The constrained problem.


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([0.1, 1.0, 5.0]), spread=st.sampled_from([0.0, 1.0]))
def test_the_direction_solves_the_constrained_problem(seed, size, spread):
    rng = np.random.default_rng(seed)
    matrix = size * rng.normal(size=(K, 5)) * 10 ** (spread * rng.uniform(-1, 1, (K, 1)))
    update, start = updater()
    direction, state = update(jnp.asarray(matrix, jnp.float32), start)
    _, expected, slope, q = first_update(matrix)
    reach = 1.0 + np.linalg.norm(expected)
    np.testing.assert_allclose(direction, expected, atol=2e-3 * reach)
    # Feasible: q falls at the rate that was asked for.
    whole = np.concatenate([np.asarray(direction, np.float64), slope])
    assert q @ whole >= PHI * q @ q - 2e-3 * reach * np.linalg.norm(q)
    np.testing.assert_allclose(state.weights @ matrix, direction, atol=1e-4 * reach)


def test_both_regimes_by_hand():
    """g = (1, 0) and (0, 1), w = (1/2, 1/2): q = (1/2, 1/2), |q|^2 = 1/2, equal falls. The shortest vector of the hull
    is (1/2, 1/2), with <q, d> = 1/2. phi = 0.1 asks for 0.05: it stays. phi = 2 asks for 1: nu = 1, d = (1, 1)."""
    for phi, expected in ((0.1, [0.5, 0.5]), (2.0, [1.0, 1.0])):
        update, start = updater(phi, 2)
        direction, state = update(jnp.eye(2), start)
        np.testing.assert_allclose(direction, expected, rtol=1e-5)
        np.testing.assert_allclose(state.inner.multipliers, [0.5, 0.5], rtol=1e-5)
        np.testing.assert_allclose(state.inner.logits, [0, 0], atol=1e-6)


def test_tasks_that_training_lowers_fast_lose_weight():
    """nu > 0, and alpha descends q: w_k (fall_k - mean fall) is positive for the task with the larger gradient."""
    update, start = updater(2.0, 2)
    _, state = update(jnp.diag(jnp.array([1.0, 3.0])), start)
    # Falls are in proportion to w_k n_k^2 = (1/2, 9/2); in its own unit the slope is (-1, 1), and SGD has rate 0.01.
    np.testing.assert_allclose(state.inner.logits, [0.01, -0.01], rtol=1e-5)


def test_multipliers_are_averaged_with_a_decaying_rate():
    matrices = [np.random.default_rng(seed).normal(size=(K, 5)) for seed in (0, 1, 2)]
    for window, rates in ((1, (1.0, 2**-0.75, 3**-0.75)), (2, (1.0, 1.0, 2**-0.75))):
        method = forum(PHI, optax.sgd(0.0), inner_learning_rate=ETA, inner_steps=T, window=window)
        update, state, average = jax.jit(method.update), method.init(None), 0.0
        for matrix, rate in zip(matrices, rates, strict=True):
            _, state = update(jnp.asarray(matrix, jnp.float32), state)
            average = average + rate * (first_update(matrix)[0] - average)  # alpha does not move: rate 0
            np.testing.assert_allclose(state.inner.multipliers, average, atol=2e-3)


# Limits.


def test_one_task_has_unit_length_or_falls_at_the_rate():
    for size in (0.5, 10.0):
        update, start = updater(PHI, 1)
        direction, _ = update(size * jnp.array([[0.6, -0.8]]), start)
        np.testing.assert_allclose(direction, max(1.0, PHI * size) * np.array([0.6, -0.8]), rtol=1e-5)


def test_a_stationary_task_leaves_only_the_constraint_if_that_hurts_nobody():
    matrix = np.abs(np.random.default_rng(0).normal(size=(K, 5))) * np.array([[1.0], [0.0], [1.0]])
    update, start = updater()
    direction, state = update(jnp.asarray(matrix, jnp.float32), start)
    q = matrix.mean(0)
    np.testing.assert_allclose(state.inner.multipliers, [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(direction, PHI * q, rtol=1e-4)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    factors=st.sampled_from([(0, 0, 0), (0, 1, 1), (1e-8, 1, 1e8), (1e10, 1e10, 1e10), (1e-10, 1e-10, 1e-10)]),
    rank=st.sampled_from([1, 3]),
)
def test_degenerate_matrices_give_finite_updates(seed, factors, rank):
    update, state = updater()
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(K, rank)) @ rng.normal(size=(rank, 5)) * np.array(factors, float)[:, None]
    for _ in range(3):
        direction, state = update(jnp.asarray(rows, jnp.float32), state)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((direction, state.inner, state.weights)))
    if not any(factors):
        assert (direction == 0).all()


def test_nan_is_not_hidden():
    update, start = updater()
    direction, state = update(jnp.ones((K, 2)).at[0, 0].set(jnp.nan), start)
    assert jnp.isnan(state.weights).all()
    assert jnp.isnan(direction).all()


@pytest.mark.slow
def test_a_task_that_is_left_out_changes_nothing_for_the_others():
    whole, part = (optim.nonfinite(make(), "drop_task") for _ in range(2))
    rng, keep = np.random.default_rng(0), np.array([0, 2])
    state, alone = whole.init(None), part.init(None)
    for _ in range(2):
        rows = jnp.asarray(rng.normal(size=(K, 5)), jnp.float32)
        gradient, state = whole.update(rows.at[1].set(jnp.inf), state)
        expected, alone = part.update(rows[keep], alone)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.weights, [alone.weights[0], 0.0, alone.weights[1]], rtol=1e-4, atol=1e-6)


# The route.


def written_out(is_shared):
    """d and the slope of alpha, by jax.grad of q and of the upper losses, and `dual`."""

    def inner_gradient(p):
        gradient = jax.grad(lambda p: stacked(p, TRAIN).mean())(p)
        if is_shared is not True:
            gradient["heads"] = jax.grad(lambda p: stacked(p, TRAIN).sum())(p)["heads"]
        return gradient

    away = PARAMS
    for _ in range(T):
        away = jax.tree.map(lambda p, g: p - ETA * g, away, inner_gradient(away))

    def q(alpha, params):
        return jax.nn.softmax(alpha) @ (stacked(params, TRAIN) - jax.lax.stop_gradient(stacked(away, TRAIN)))

    def flat(tree):
        seen = tree if is_shared is True else tree["trunk"]
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(seen)]).astype(np.float64)

    of_alpha, of_theta = jax.grad(q, argnums=(0, 1))(jnp.zeros(K), PARAMS)
    upper = np.stack([flat(jax.grad(lambda p, k=k: stacked(p, VAL)[k])(PARAMS)) for k in range(K)])
    units = np.hstack([upper / np.linalg.norm(upper, axis=1)[:, None], np.zeros((K, K))])
    _, _, d = dual(units, np.concatenate([flat(of_theta), np.asarray(of_alpha, np.float64)]))
    return d[: upper.shape[1]], d[upper.shape[1] :], flat


@pytest.mark.parametrize(
    ("chunk_size", "is_shared"), [(None, True), (2, IS_SHARED), (1, True)], ids=["rows", "columns", "one by one"]
)
def test_the_route_solves_the_bilevel_problem_of_two_halves(chunk_size, is_shared):
    method = optim.on_shared(make(), is_shared)
    route = jax.jit(mtjax.value_and_update(loss_fn, method, chunk_size=chunk_size))
    losses, gradient, state = route(PARAMS, optim.init(method, PARAMS, num_tasks=K), BATCH)
    expected, slope, flat = written_out(is_shared)
    np.testing.assert_allclose(flat(gradient), expected, rtol=2e-3, atol=2e-3)
    if is_shared is not True:
        assert_trees_close(gradient["heads"], jax.grad(lambda p: stacked(p, TRAIN).sum())(PARAMS)["heads"])
    np.testing.assert_allclose(state.inner.unit, np.abs(slope).max(), rtol=1e-2)
    np.testing.assert_allclose(-100 * state.inner.logits, slope / np.abs(slope).max(), atol=2e-2)
    np.testing.assert_allclose(losses, stacked(PARAMS, TRAIN), rtol=1e-5)
    assert jnp.isnan(state.weights).all()


def test_by_hand_is_the_limit_of_short_inner_steps_on_one_batch():
    short = functools.partial(forum, PHI, optax.sgd(0.01), inner_learning_rate=1e-4, inner_steps=1)
    method = short()
    route = jax.jit(mtjax.value_and_update(loss_fn, method))
    _, gradient, state = route(PARAMS, optim.init(method, PARAMS, num_tasks=K), jnp.concatenate([TRAIN, TRAIN]))
    jacobian = mtjax.value_and_jacobian(loss_fn)(PARAMS, TRAIN)[1]
    expected, expected_state = method.update(jacobian, method.init(PARAMS), PARAMS)
    assert_trees_close(gradient, expected, 2e-3)
    assert_trees_close((state.gramian, state.inner.logits), (expected_state.gramian, expected_state.inner.logits), 2e-3)


def test_inner_steps_that_overshoot_do_no_harm():
    """theta_T is the best point visited: at a learning rate of 1e6, where it started; then q is flat in alpha."""
    method = forum(PHI, optax.sgd(0.01), inner_learning_rate=1e6, inner_steps=T)
    route = jax.jit(mtjax.value_and_update(loss_fn, method))
    _, gradient, state = route(PARAMS, optim.init(method, PARAMS, num_tasks=K), BATCH)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(state.inner.logits, np.zeros(K))


def test_a_step_that_breaks_is_skipped_and_aux_is_that_of_the_train_half():
    def broken(params, x):
        losses = loss_fn(params, jnp.minimum(x, 10.0))
        return losses | {"task 1": jnp.where(x[0, 0] > 100.0, jnp.inf, 1.0) * losses["task 1"]}, x.sum()

    method = optim.nonfinite(make(), "skip_step")
    start = optim.init(method, PARAMS, num_tasks=K)
    route = jax.jit(mtjax.value_and_update(broken, method, has_aux=True))
    for half in (0, 1):
        _, gradient, state = route(PARAMS, start, BATCH.at[4 * half, 0].set(1000.0))
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
        jax.tree.map(np.testing.assert_array_equal, state._replace(present=start.present), start)
        assert not state.present[1]
    (_, aux), gradient, state = route(PARAMS, start, BATCH)
    assert state.present.all()
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(aux, TRAIN.sum(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.slow
def test_it_trains_in_a_scan_for_several_seeds_at_once():
    update = mtjax.value_and_update(loss_fn, optim.on_shared(make(), IS_SHARED))

    def train(key):
        def body(carry, step_key):
            params, state = carry
            _, gradient, state = update(params, state, jax.random.normal(step_key, (16, 3)))
            return (jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient), state), None

        start = (PARAMS, optim.init(make(), PARAMS, num_tasks=K))
        (params, _), _ = jax.lax.scan(body, start, jax.random.split(key, 100))
        return stacked(params, fixed)

    fixed = jax.random.normal(jax.random.key(9), (256, 3))
    losses = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 2))
    assert (losses < stacked(PARAMS, fixed)[None, :]).all()


def test_wrong_arguments():
    for call, message in (
        (lambda: forum(-0.1), "phi must be >= 0, got -0.1"),
        (lambda: forum(inner_learning_rate=0.0), "inner_learning_rate must be > 0"),
        (lambda: forum(inner_steps=0), "inner_steps and window must be >= 1, got 0 and 1"),
        (lambda: mtjax.value_and_update(loss_fn, optim.ema(forum())), "no wrapper that changes weights"),
        (lambda: mtjax.value_and_update(loss_fn, optim.nonfinite(forum(), "drop_task")), "cannot leave a task out"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
