"""MoCo and DB-MTL: by hand, against float64 loops over several updates, with absent tasks, at the limits of floats.

Letters: K tasks, P parameters.
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
from mtjax.optim.buffers import db_mtl, moco, unit_rows

K, P = 3, 4
ROWS = jnp.array([[1.0, 0.0], [0.0, 2.0]])
ONES = jnp.ones(2)


@functools.cache
def jitted(method):
    return jax.jit(lambda rows, state, losses: method.update(rows, state, losses=losses))


def run(method, batches, losses=None):
    """(directions of successive updates, last state). `losses` default to 1."""
    state, directions = method.init(None), []
    for index, batch in enumerate(batches):
        rows = jnp.asarray(batch, jnp.float32)
        given = jnp.ones(len(rows)) if losses is None else jnp.asarray(losses[index], jnp.float32)
        direction, state = jitted(method)(rows, state, given)
        directions.append(np.asarray(direction))
    return directions, state


def random_batches(seed, steps=4, num_tasks=K):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(num_tasks, P))  # gradients of a task resemble one another
    rows = common + 0.3 * rng.normal(size=(steps, num_tasks, P))
    return rows.astype(np.float32), rng.uniform(0.2, 3.0, (steps, num_tasks)).astype(np.float32)


# Rows.


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_unit_rows(scale):
    """Squares of 1e30 overflow, those of 1e-30 vanish."""
    rows = np.random.default_rng(0).normal(size=(K, P)) * np.array([[1.0], [0.0], [100.0]])
    units, norm = unit_rows({"a": jnp.asarray(rows[:, :1] * scale), "b": jnp.asarray(rows[:, 1:] * scale)})
    length = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(norm, length * scale, rtol=1e-6)
    np.testing.assert_allclose(units["b"], rows[:, 1:] / np.where(length > 0, length, 1)[:, None], atol=1e-6)
    assert np.isnan(unit_rows(jnp.array([[1.0, jnp.nan], [1.0, jnp.inf]]))[0]).any(1).all()


# MoCo.


def project(v):
    """Euclidean projection on the simplex: sort, then the longest prefix that stays positive."""
    u = np.sort(v)[::-1]
    excess = (np.cumsum(u) - 1) / np.arange(1, len(v) + 1)
    return np.maximum(v - excess[u > excess][-1], 0)


def naive_moco(batches, beta, gamma, rho, beta_decay=0.5, gamma_decay=0.5):
    y, weights, directions = 0.0, None, []
    for t, rows in enumerate(np.asarray(batches, np.float64), 1):
        weights = np.full(len(rows), 1 / len(rows)) if weights is None else weights
        y = y - beta / t**beta_decay * (y - rows)
        weights = project(weights - gamma / t**gamma_decay * (y @ y.T + rho * np.eye(len(rows))) @ weights)
        directions.append(weights @ y)
    return directions, weights


MOCO = moco(0.5, 0.7, 0.1)


def test_moco_by_hand():
    """beta = 1: y = g, G = diag(1, 4). lambda - 1/4 G lambda = (1/2 - 1/8, 1/2 - 1/2) = (3/8, 0).

    Its sum is 5/8 short of 1: each gets 5/16. lambda = (11/16, 5/16), d = (11/16, 10/16).
    """
    (direction,), state = run(moco(1.0, 0.25), [ROWS])
    np.testing.assert_allclose(state.inner.task_weights, [11 / 16, 5 / 16], rtol=1e-6)
    np.testing.assert_allclose(direction, [11 / 16, 10 / 16], rtol=1e-6)
    np.testing.assert_array_equal(state.inner.tracked, ROWS)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_moco_is_the_papers_algorithm(seed):
    batches, _ = random_batches(seed)
    directions, state = run(MOCO, batches)
    expected, weights = naive_moco(batches, 0.5, 0.7, 0.1)
    np.testing.assert_allclose(directions, expected, atol=1e-4)
    np.testing.assert_allclose(state.inner.task_weights, weights, atol=1e-4)
    assert np.isnan(state.weights).all()  # d is no combination of this batch's gradients


def test_moco_comes_to_the_shortest_combination():
    """MGDA's weights of (1, 0) and (0, 2): (4/5, 1/5)."""
    method = moco(1.0, 0.1, beta_decay=0.0, gamma_decay=0.0)
    state = optim.init(method, jnp.zeros(2), num_tasks=2)
    state, _ = jax.lax.scan(lambda s, _: (method.update(ROWS, s)[1], None), state, length=100)
    np.testing.assert_allclose(state.inner.task_weights, [0.8, 0.2], atol=1e-4)


def test_moco_normalised_by_losses():
    """L_k g_k / |g_k| = 3 (1, 0), 5 (0, 1): with gamma = 0, d = (3, 5) / 2. A zero gradient stays zero."""
    method = moco(1.0, 0.0, normalize="loss")
    (direction,), _ = run(method, [ROWS * 1e10], [[3.0, 5.0]])
    np.testing.assert_allclose(direction, [1.5, 2.5], rtol=1e-6)
    (direction,), _ = run(method, [ROWS.at[1].set(0.0)], [[3.0, 5.0]])
    np.testing.assert_allclose(direction, [1.5, 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match="weighs tasks by their losses"):
        method.update(ROWS, method.init(None))


def test_moco_at_extreme_scales():
    """A slope of 1e19 ends at a vertex; a slope that is common to all tasks moves nothing, however large it is."""
    for scale in (1e-10, 1e10):
        (direction,), state = run(MOCO, [random_batches(0)[0][0] * scale])
        assert np.isfinite(direction).all()
        assert np.sum(state.inner.task_weights) == pytest.approx(1.0)
    assert sorted(np.asarray(state.inner.task_weights)) == [0.0, 0.0, 1.0]
    _, state = run(MOCO, [np.ones((3, 2)) * 1e10])
    np.testing.assert_allclose(state.inner.task_weights, np.full(3, 1 / 3), rtol=1e-6)
    directions, _ = run(MOCO, [np.zeros((3, 2))] * 2)
    assert not np.any(directions)


def test_moco_of_one_task_is_what_is_tracked():
    directions, _ = run(moco(1.0, beta_decay=0.0), [[[2.0, -1.0]], [[3.0, 1.0]]])
    np.testing.assert_array_equal(directions, [[2.0, -1.0], [3.0, 1.0]])
    directions, _ = run(moco(0.5), [[[2.0, -1.0]]])
    np.testing.assert_array_equal(directions, [[1.0, -0.5]])


@pytest.mark.parametrize("method", [MOCO, db_mtl(0.6), db_mtl(0.6, debias=True)], ids=["moco", "db_mtl", "debiased"])
def test_an_absent_task_is_not_there(method):
    """Absent at every step: the run of the others. Absent for one: its row stays as it was."""
    dropping = optim.nonfinite(method, "drop_task")
    batches, losses = random_batches(1)
    gone = batches.copy()
    gone[:, 1, 2] = np.nan
    ours, _ = run(dropping, gone, losses)
    expected, _ = run(method, batches[:, [0, 2]], losses[:, [0, 2]])
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    once = batches.copy()
    once[2, 1] = np.inf
    _, before = run(dropping, once[:2], losses[:2])
    _, after = run(dropping, once[:3], losses[:3])
    for old, new in zip(jax.tree.leaves(before.inner), jax.tree.leaves(after.inner), strict=True):
        if old.ndim == 2 or (old.ndim == 1 and method is not MOCO):  # lambda moves all the same
            np.testing.assert_array_equal(old[1], new[1])
            assert (old[0] != new[0]).any()
    directions, _ = run(dropping, once * np.nan, losses)
    assert not np.any(directions)


def test_weights_of_an_absent_task_are_lent():
    """lambda sums to 1 over the tasks that are there, and the absent one has its share back when it returns."""
    dropping = optim.nonfinite(MOCO, "drop_task")
    batches, _ = random_batches(2)
    batches[1, 0] = np.nan
    _, before = run(dropping, batches[:1])
    directions, after = run(dropping, batches[:2])
    assert before.inner.task_weights[0] == after.inner.task_weights[0] > 0
    assert np.sum(after.inner.task_weights) == pytest.approx(1.0)
    of_others = after.inner.task_weights[1:] / np.sum(after.inner.task_weights[1:])
    np.testing.assert_allclose(directions[1], of_others @ after.inner.tracked[1:], rtol=1e-4)


# DB-MTL.


def naive_db_mtl(batches, losses, beta, debias=False):
    y, directions = 0.0, []
    for t, (rows, loss) in enumerate(zip(np.asarray(batches, np.float64), losses, strict=True), 1):
        y = beta * y + (1 - beta) * rows / loss[:, None]
        estimate = y / (1 - beta**t) if debias else y
        norm = np.linalg.norm(estimate, axis=1)
        directions.append(sum(norm.max() * row / size for row, size in zip(estimate, norm, strict=True) if size > 0))
    return directions


DB_MTL = db_mtl(0.6)


def test_db_mtl_by_hand():
    """L = (1/2, 4): y = (2, 0), (0, 1/2), times 1 - beta = 1/10. The longest is 0.2: d = (0.2, 0.2).

    Then L = (1, 1): y = 0.9 (0.2, 0.05) + 0.1 (1, 2) = (0.28, 0.245): d = (0.28, 0.28).
    """
    directions, _ = run(db_mtl(), [ROWS, ROWS], [[0.5, 4.0], [1.0, 1.0]])
    np.testing.assert_allclose(directions, [[0.2, 0.2], [0.28, 0.28]], rtol=1e-5)
    directions, _ = run(db_mtl(debias=True), [ROWS, ROWS], [[0.5, 4.0], [1.0, 1.0]])
    np.testing.assert_allclose(directions, [[2.0, 2.0], np.full(2, 0.28 / 0.19)], rtol=1e-5)


@pytest.mark.parametrize("debias", [False, True])
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_db_mtl_is_the_papers_algorithm(debias, seed):
    batches, losses = random_batches(seed)
    method = METHOD_OF[debias]
    directions, _ = run(method, batches, losses)
    np.testing.assert_allclose(directions, naive_db_mtl(batches, losses, 0.6, debias), atol=1e-4, rtol=1e-4)


METHOD_OF = {False: DB_MTL, True: db_mtl(0.6, debias=True)}


def test_units_of_the_losses_do_not_matter_to_db_mtl():
    batches, losses = random_batches(3)
    units = np.array([1e-10, 1.0, 1e10], np.float32)
    expected, _ = run(DB_MTL, batches, losses)
    ours, _ = run(DB_MTL, batches * units[:, None], losses * units)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_db_mtl_at_given_losses_commutes_with_scaling():
    """With L near 1e-10 and g near 1e10, |y| is 1e20 and its square no float32."""
    batches, losses = random_batches(4)
    expected, _ = run(DB_MTL, batches, losses)
    for scale in (1e-10, 1e10):
        ours, _ = run(DB_MTL, batches * scale, losses)
        np.testing.assert_allclose(np.asarray(ours) / scale, expected, rtol=1e-4, atol=1e-5)
        (ours,), _ = run(DB_MTL, batches[:1] * scale, losses[:1] / scale)
        np.testing.assert_allclose(ours / scale**2, expected[0], rtol=1e-4, atol=1e-5)


def test_a_solved_task_contributes_nothing_to_db_mtl():
    """L = 0: not the 1e8-fold gradient of log(L + 1e-8). Its average fades; no stale direction is blown up."""
    losses = [[1.0, 1.0], [1.0, 0.0]]
    directions, state = run(db_mtl(0.5), [ROWS, ROWS.at[1].set(0.0)], losses)
    np.testing.assert_allclose(directions, [[1.0, 1.0], [0.75, 0.0]])
    np.testing.assert_allclose(state.inner.average[1], [0.0, 0.5])
    directions, _ = run(db_mtl(0.5), [ROWS], [[0.0, 0.0]])
    assert not np.any(directions)
    (direction,), _ = run(db_mtl(0.0, eps=0.5), [ROWS], [[0.0, 0.5]])  # (2, 0), (0, 2)
    np.testing.assert_allclose(direction, [2.0, 2.0])
    assert np.isnan(run(DB_MTL, [ROWS], [[1.0, -1.0]])[0]).all()
    assert np.isnan(run(DB_MTL, [ROWS.at[0].set(jnp.nan)], [[0.0, 1.0]])[0]).all()


def test_a_task_without_gradient_contributes_nothing_to_db_mtl():
    (direction,), _ = run(db_mtl(0.0), [ROWS.at[1].set(0.0)])
    assert direction.tolist() == [1.0, 0.0]
    (direction,), _ = run(db_mtl(0.0), [[[3.0, 4.0]]], [[2.0]])
    np.testing.assert_allclose(direction, [1.5, 2.0], rtol=1e-6)


def test_rates_decay():
    """beta_t = 0.9 / t: 0.9, 0.45."""
    _, state = run(db_mtl(0.9, beta_decay=1.0), [ROWS, ROWS])
    np.testing.assert_allclose(state.inner.remainder, [0.9 * 0.45] * 2, rtol=1e-6)
    np.testing.assert_allclose(state.inner.average[0, 0], 1 - 0.9 * 0.45, rtol=1e-6)


# Both.


@pytest.mark.parametrize("method", [MOCO, DB_MTL], ids=["moco", "db_mtl"])
def test_buffers_are_as_large_as_what_the_method_sees(method):
    params = {"trunk": jnp.ones((2, 3), jnp.bfloat16), "head": jnp.ones(4)}
    shared = optim.on_shared(method, {"trunk": True, "head": False})
    state = optim.init(shared, params, num_tasks=K)
    buffer = state.inner[0]
    assert buffer["head"] is None
    assert (buffer["trunk"].shape, buffer["trunk"].dtype) == ((K, 2, 3), jnp.float32)

    jacobian = jax.tree.map(lambda p: jnp.ones((K, *p.shape), p.dtype), params)
    gradient, new = shared.update(jacobian, state, params, losses=jnp.ones(K))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert gradient["trunk"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient["head"], np.full(4, K))


@pytest.mark.parametrize("method", [MOCO, DB_MTL], ids=["moco", "db_mtl"])
def test_by_value_and_update(method):
    """By the loss function or by its Jacobian, under jit, step after step."""
    x = jax.random.normal(jax.random.key(0), (8, 3))

    def loss_fn(p, x):
        return {str(k): jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"][:, k] - k) ** 2) for k in range(K)}

    params = {"w": jnp.eye(3), "v": jnp.ones((3, K))}

    @jax.jit
    def both(state):
        losses, jacobian = mtjax.value_and_jacobian(loss_fn)(params, x)
        return mtjax.value_and_update(loss_fn, method)(params, state, x)[1:], method.update(
            jacobian, state, params, losses=losses
        )

    state = optim.init(method, params, num_tasks=K)
    for _ in range(2):
        ours, (gradient, state) = both(state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, (gradient, state))


def test_errors():
    for make in (lambda: moco(0.0), lambda: moco(gamma=-1.0), lambda: moco(rho=-0.1), lambda: moco(beta_decay=-1)):
        with pytest.raises(ValueError, match=r"moco needs beta in \(0, 1\]"):
            make()
    with pytest.raises(ValueError, match="normalize must be 'none' or 'loss', got 'l2'"):
        moco(normalize="l2")
    for make in (lambda: db_mtl(1.0), lambda: db_mtl(eps=-1.0)):
        with pytest.raises(ValueError, match=r"db_mtl needs beta in \[0, 1\)"):
            make()
    for method, name in ((MOCO, "moco"), (DB_MTL, "db_mtl")):
        with pytest.raises(ValueError) as error:
            optim.init(method, None, num_tasks=K)
        assert str(error.value) == (
            f"The state of {name} is as large as the parameters: call init(params, ...) with them"
        )
