"""Coordinate-wise methods: GradDrop against a loop with the same draws, its layer too; trimmed means by sorting.

Letters: K tasks, P parameters; B batch, D width.
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
from mtjax.optim.elementwise import graddrop, trimmed_mean

K, P = 5, 7


def random_rows(seed, num_tasks=K, num_params=P):
    rows = np.random.default_rng(seed).normal(size=(num_tasks, num_params))
    return jnp.asarray(rows, jnp.float32)


@functools.cache
def runner(make, policy="propagate"):
    """jitted (rows, state) -> (direction, state); the state before the first update."""
    method = optim.nonfinite(make(), policy) if policy != "propagate" else make()
    return jax.jit(method.update), method.init(None)


def run(make, rows, policy="propagate"):
    update, state = runner(make, policy)
    return np.asarray(update(jnp.asarray(rows, jnp.float32), state)[0])


# GradDrop.


def draws(shape, seed=0, leaf=0):
    """U of the first update."""
    _, draw = jax.random.split(jax.random.key(seed))
    return np.asarray(jax.random.uniform(jax.random.fold_in(draw, leaf), shape))


def naive_graddrop(rows, u, leak, f=lambda p: p):
    """Algorithm 1 of the paper, coordinate by coordinate."""
    d = np.zeros(rows.shape[1])
    for p, column in enumerate(np.asarray(rows, np.float64).T):
        if not column.any():
            continue
        purity = 0.5 * (1 + column.sum() / np.abs(column).sum())
        for k, g in enumerate(column):
            kept = g > 0 if f(purity) > u[p] else g < 0
            d[p] += (leak[k] + (1 - leak[k]) * kept) * g
    return d


LEAKS = (0.0, 0.5, 1.0, 0.25, 0.0)


def leaking():
    return graddrop(3, leak=LEAKS)


def sharper():
    return graddrop(3, keep=lambda p: p**2 * (3 - 2 * p))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_graddrop_is_the_papers_loop(seed):
    rows = random_rows(seed).at[:, 0].set(0.0)
    np.testing.assert_allclose(run(leaking, rows), naive_graddrop(rows, draws((P,), 3), LEAKS), atol=1e-5)
    expected = naive_graddrop(rows, draws((P,), 3), np.zeros(K), lambda p: p**2 * (3 - 2 * p))
    np.testing.assert_allclose(run(sharper, rows), expected, atol=1e-5)


def test_graddrop_by_hand():
    """(1, 3): P = 1, all kept: 4. (-1, -2): P = 0: -3. (0, 0): 0. (5, -2): 5 or -2; a leak adds half of the other."""
    rows = jnp.array([[1.0, -1.0, 0.0, 5.0], [3.0, -2.0, 0.0, -2.0]])
    for keep, last, leaked in ((jnp.ones_like, 5.0, 4.0), (jnp.zeros_like, -2.0, 0.5)):
        method = graddrop(keep=lambda p, keep=keep: jnp.where((p > 0) & (p < 1), keep(p), p))
        assert method.update(rows, method.init(None))[0].tolist() == [4.0, -3.0, 0.0, last]
        method = graddrop(leak=0.5, keep=keep)
        assert method.update(rows, method.init(None))[0][3].item() == leaked


def test_graddrop_keeps_a_sign_with_the_probability_of_its_purity():
    """(3, -1): P = (1 + 2/4) / 2 = 3/4; with 10^4 columns the share is within 4 sqrt(3/16) / 100 = 0.017."""
    rows = jnp.tile(jnp.array([[3.0], [-1.0]]), (1, 10_000))
    direction = run(graddrop, rows)
    assert set(direction) == {3.0, -1.0}
    assert abs((direction == 3.0).mean() - 0.75) < 0.017


def test_graddrop_draws_anew_for_every_update_and_leaf():
    method = graddrop()
    rows = jnp.tile(jnp.array([[1.0], [-1.0]]), (1, 64))
    first, state = method.update({"a": rows, "b": rows}, method.init(None))
    second, _ = method.update({"a": rows, "b": rows}, state)
    again, _ = method.update({"a": rows, "b": rows}, method.init(None))
    assert (first["a"] != first["b"]).any()
    assert (first["a"] != second["a"]).any()
    np.testing.assert_array_equal(first["a"], again["a"])
    assert np.isnan(state.weights).all()


def test_graddrop_of_one_task_zeros_and_all_of_the_leak():
    row = random_rows(0, 1)
    np.testing.assert_array_equal(run(graddrop, row), row[0])
    assert not run(graddrop, 0 * random_rows(0)).any()
    rows = random_rows(1)
    method = graddrop(leak=1.0)
    np.testing.assert_allclose(method.update(rows, method.init(None))[0], rows.sum(0), atol=1e-6)


@pytest.mark.parametrize("power", [-33, 33])
def test_graddrop_commutes_with_scaling(power):
    rows = random_rows(2)
    np.testing.assert_array_equal(run(graddrop, rows * 2.0**power), run(graddrop, rows) * np.float32(2.0**power))


def test_graddrop_without_the_tasks_that_are_left_out():
    rows = random_rows(3)
    dropped = run(graddrop, rows.at[1].set(jnp.nan).at[4, 0].set(jnp.inf), "drop_task")
    np.testing.assert_array_equal(dropped, run(graddrop, rows[np.array([0, 2, 3])]))
    assert np.isnan(run(graddrop, rows.at[1, 2].set(jnp.nan))[2])


def test_errors_of_graddrop():
    for leak in (-0.1, 1.5, float("nan"), [[0.5]]):
        with pytest.raises(ValueError, match="leak must be one number"):
            graddrop(leak=leak)
    method = graddrop(leak=[0.0, 1.0])
    with pytest.raises(ValueError, match="graddrop got 2 leaks for 5 tasks"):
        method.update(random_rows(0), method.init(None))
    layer = graddrop(layer=True)
    with pytest.raises(ValueError, match=r"use mtjax\.value_and_update"):
        layer.update(random_rows(0), layer.init(None))
    with pytest.raises(ValueError, match=r"mtjax\.Staged"):
        mtjax.value_and_update(lambda p, x: p, layer)(jnp.ones(2), layer.init(None), None)


# Its layer.

B, D = 6, 4
X = jax.random.normal(jax.random.key(0), (B, 3))
PARAMS = {"trunk": jax.random.normal(jax.random.key(1), (3, D)), "heads": jax.random.normal(jax.random.key(2), (D, 3))}
STAGED = mtjax.Staged(
    lambda p, x: jnp.tanh(x @ p["trunk"]),
    lambda p, z, x: {str(k): jnp.mean(jnp.sin((k + 1) * (z @ p["heads"])[:, k])) for k in range(3)},
)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_the_layer_decides_by_features(chunk_size):
    """P and M from gradients times activation signs, summed over the batch; masks then apply to every example."""
    method = graddrop(7, leak=[0.0, 0.5, 0.0], layer=True)
    update = mtjax.value_and_update(STAGED, method, chunk_size=chunk_size)
    losses, gradient, state = jax.jit(update)(PARAMS, method.init(None), X)

    z = STAGED.encode(PARAMS, X)
    rows = jax.jacrev(lambda z: jnp.stack(list(STAGED.heads(PARAMS, z, X).values())))(z)  # [K, B, D]
    signed = np.asarray((rows * jnp.sign(z)[None]).sum(1), np.float64)
    u, leak = draws((1, D), 7)[0], (0.0, 0.5, 0.0)
    direction = np.zeros((B, D))
    for d in range(D):
        purity = 0.5 * (1 + signed[:, d].sum() / np.abs(signed[:, d]).sum())
        for k in range(3):
            kept = signed[k, d] > 0 if u[d] < purity else signed[k, d] < 0
            direction[:, d] += (leak[k] + (1 - leak[k]) * kept) * np.asarray(rows[k, :, d])
    trunk = jax.vjp(lambda w: jnp.tanh(X @ w), PARAMS["trunk"])[1](jnp.asarray(direction, jnp.float32))[0]
    np.testing.assert_allclose(gradient["trunk"], trunk, atol=1e-5)
    own = jax.grad(lambda p: sum(STAGED.heads(p, z, X).values()))(PARAMS)["heads"]
    np.testing.assert_allclose(gradient["heads"], own, atol=1e-5)
    assert losses.shape == (3,)
    assert len(np.unique(np.sign(signed), axis=0)) > 1  # there is something to decide
    assert jax.tree.structure(state) == jax.tree.structure(optim.init(method, PARAMS, num_tasks=3))


@pytest.mark.slow
def test_the_layer_leaves_out_tasks_and_steps():
    """A task with NaN takes no part; the step is that of the two others. Or the step is skipped."""
    broken = mtjax.Staged(STAGED.encode, lambda p, z, x: STAGED.heads(p, z, x) | {"1": jnp.array(jnp.nan)})
    two = mtjax.Staged(STAGED.encode, lambda p, z, x: {k: STAGED.heads(p, z, x)[k] for k in ("0", "2")})
    method = optim.nonfinite(graddrop(7, layer=True), "drop_task")
    _, ours, _ = mtjax.value_and_update(broken, method)(PARAMS, method.init(None), X)
    _, expected, _ = mtjax.value_and_update(two, method)(PARAMS, method.init(None), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, expected)
    skipping = optim.nonfinite(graddrop(7, layer=True), "skip_step")
    start = optim.init(skipping, PARAMS, num_tasks=3)
    _, ours, state = jax.jit(mtjax.value_and_update(broken, skipping))(PARAMS, start, X)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(ours))
    assert state.inner == start.inner


# Trimmed mean.

EXTREME = st.sampled_from([np.nan, np.inf, -np.inf, 1e30])


def trim_one():
    return trimmed_mean(1)


def trim_two():
    return trimmed_mean(2)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_trimmed_mean_is_that_of_the_sorted_entries(seed):
    rows = random_rows(seed)
    np.testing.assert_allclose(run(trim_one, rows), np.sort(rows, 0)[1:-1].mean(0), atol=1e-6)
    np.testing.assert_allclose(run(trim_two, rows), np.median(rows, 0), atol=1e-6)


def test_trimmed_mean_by_hand():
    """(1, 5, 2, 100): 1 and 100 go, (2 + 5) / 2. (-7, 0, 0, 4): 0."""
    assert run(trim_one, [[1.0, -7.0], [5.0, 0.0], [2.0, 0.0], [100.0, 4.0]]).tolist() == [3.5, 0.0]


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    bad=st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 1e30]), min_size=2, max_size=2),
)
def test_corrupted_tasks_cannot_move_it_out_of_the_range_of_the_others(seed, bad):
    rows = random_rows(seed)
    honest = np.asarray(rows[2:])
    direction = run(trim_two, rows.at[0].set(bad[0]).at[1].set(bad[1]))
    assert (honest.min(0) <= direction).all()
    assert (direction <= honest.max(0)).all()


def test_more_corruption_than_is_trimmed_shows():
    rows = random_rows(0).at[:2, 0].set(jnp.nan).at[:2, 1].set(-jnp.inf).at[0, 2].set(jnp.inf)
    direction = run(trim_one, rows)
    assert np.isnan(direction[0])
    assert direction[1] == -np.inf
    assert np.isfinite(direction[2:]).all()


def test_trimmed_mean_of_the_tasks_that_take_part():
    """Those that are left out are no zeros among the entries. With two left, one cannot be trimmed at each end."""
    rows = random_rows(1) + 3
    gone = rows.at[1, 0].set(jnp.nan)
    np.testing.assert_allclose(run(trim_one, gone, "drop_task"), np.sort(rows[np.array([0, 2, 3, 4])], 0)[1:3].mean(0))
    for number in (2, 3):
        few = rows.at[number:].set(jnp.nan)
        np.testing.assert_allclose(run(trim_one, few, "drop_task"), np.median(rows[:number], 0), rtol=1e-6)
    assert not run(trim_one, rows * jnp.nan, "drop_task").any()


def test_trimmed_mean_at_the_limits():
    row = random_rows(2, 1)
    method = trimmed_mean(0)
    np.testing.assert_array_equal(method.update(row, method.init(None))[0], row[0])
    for scale in (1e-10, 1e10):
        rows = random_rows(3)
        np.testing.assert_allclose(run(trim_one, rows * scale), run(trim_one, rows) * scale, rtol=1e-5)
    many = random_rows(4, 64)
    np.testing.assert_allclose(run(lambda: trimmed_mean(8), many), np.sort(many, 0)[8:-8].mean(0), atol=1e-6)
    half = {"a": random_rows(5).astype(jnp.bfloat16)}
    method = trimmed_mean(1)
    assert method.update(half, method.init(None))[0]["a"].dtype == jnp.bfloat16


def test_errors_of_trimmed_mean():
    for trim in (-1, 0.5):
        with pytest.raises(ValueError, match="trim must be an integer >= 0"):
            trimmed_mean(trim)
    method = trimmed_mean(2)
    with pytest.raises(ValueError) as error:
        method.update(random_rows(0, 4), method.init(None))
    assert str(error.value) == "trimmed_mean(trim=2) needs at least 5 tasks, got 4"
