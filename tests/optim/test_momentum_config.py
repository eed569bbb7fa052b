"""M-ConFIG: by hand, against the authors' operator in float64, and by the route that computes one gradient a step.

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
from mtjax.optim.momentum_config import momentum_config

K, P = 3, 6


@functools.cache
def jitted(method):
    return jax.jit(method.update)


def run(method, batches, dtype=np.float32):
    """(directions of successive updates, last state)."""
    batches = jnp.asarray(batches, dtype)
    state, directions = optim.init(method, batches[0, 0], num_tasks=batches.shape[1]), []
    for rows in batches:
        direction, state = jitted(method)(rows, state)
        directions.append(np.asarray(direction))
    return np.array(directions), state


def random_batches(seed, steps=8):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(K, P)) + 0.3 * rng.normal(size=(steps, K, P))).astype(np.float32)


def config_direction(rows):
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    x = np.linalg.lstsq(units, np.ones(len(rows)), rcond=None)[0]
    return (rows @ x).sum() * x / (x @ x)


def naive(batches, b1, b2, eps, refresh):
    """Algorithm 1 with the start of the authors' code."""
    batches = np.asarray(batches, np.float64)
    m, times, t, pseudo, v = np.zeros_like(batches[0]), np.zeros(len(batches[0]), int), 0, 0.0, 0.0
    directions = []
    for step, rows in enumerate(batches):
        for i in {(step * refresh + offset) % len(rows) for offset in range(min(refresh, len(rows)))}:
            times[i] += 1
            m[i] = b1 * m[i] + (1 - b1) * rows[i]
        if not times.all():
            directions.append(np.zeros_like(rows[0]))
            continue
        t += 1
        c = config_direction(m / (1 - b1**times)[:, None])
        if b2 is not None:
            new = c * (1 - b1**t)
            v = b2 * v + (1 - b2) * ((new - b1 * pseudo) / (1 - b1)) ** 2
            pseudo = new
            c = c / (np.sqrt(v / (1 - b2**t)) + eps)
        directions.append(c)
    return np.array(directions)


def test_by_hand():
    """b1 = b2 = 1/2. First (1, 0) alone: nothing moves. Then (0, 1): momenta / (1 - 1/2) are (1, 0), (0, 1).

    ConFIG of these is (1, 1): x = (1, 1), of length (1 + 1) / sqrt 2. m = 1/2, a = 1, v = 1/2, v / (1 - b2) = 1, so
    that d = (1, 1).
    Then (3, 0): its momentum is (1/4 + 3/2) / (3/4) = 7/3, c = (7/3 + 1) / 2 = 5/3 in both, m = 5/3 * 3/4 = 5/4,
    a = (5/4 - 1/4) / (1/2) = 2, v = 1/4 + 2 = 9/4, v / (3/4) = 3: d = 5/3 / sqrt 3.
    """
    batches = np.array([np.diag([1.0, 1.0]), np.diag([1.0, 1.0]), np.diag([3.0, 1.0])])
    directions, state = run(momentum_config(0.5, 0.5, eps=0.0), batches)
    np.testing.assert_allclose(directions, [[0, 0], [1, 1], [5 / 3 / np.sqrt(3)] * 2], rtol=1e-5)
    assert state.inner.refreshed.tolist() == [2, 1]
    assert state.inner.count == 2
    assert state.inner.turn == 1
    assert np.isnan(state.weights).all()
    directions, state = run(momentum_config(0.5, None), batches)
    np.testing.assert_allclose(directions, [[0, 0], [1, 1], [5 / 3] * 2], rtol=1e-5)
    assert (state.inner.pseudo, state.inner.second) == ((), ())


METHODS = {
    "one": (momentum_config(), (0.9, 0.999, 1e-8, 1)),
    "two": (momentum_config(0.5, 0.9, eps=0.1, refresh=2), (0.5, 0.9, 0.1, 2)),
    "all": (momentum_config(0.5, 0.9, refresh=9), (0.5, 0.9, 1e-8, 9)),
    "no second moment": (momentum_config(0.8, None), (0.8, None, 0.0, 1)),
}


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_authors_operator(name, seed):
    method, arguments = METHODS[name]
    batches = random_batches(seed)
    with jax.enable_x64(True):  # b1 c - m cancels, and v may be small: float32 would tell little
        directions, _ = run(method, batches, dtype=np.float64)
    np.testing.assert_allclose(directions, naive(batches, *arguments), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_scales(scale):
    """The second moment takes the scale out; without it d is as much longer."""
    batches = random_batches(1)
    for method, power in ((momentum_config(0.8, None), 1), (momentum_config(0.8, 0.9, eps=0.0), 0)):
        expected, _ = run(method, batches)
        directions, _ = run(method, batches * scale)
        np.testing.assert_allclose(directions / scale**power, expected, rtol=1e-2, atol=1e-3)


def test_one_task_and_no_gradient():
    batches = random_batches(2)[:, :1]
    np.testing.assert_allclose(run(momentum_config(0.0, None), batches)[0], batches[:, 0], rtol=1e-5)
    for b2 in (None, 0.9):
        assert not run(momentum_config(0.5, b2, eps=0.0), np.zeros((4, 2, P)))[0].any()
    opposite = np.tile(np.array([[1.0, 2.0], [-1.0, -2.0]]), (4, 1, 1))
    assert not run(momentum_config(0.5, None), opposite)[0].any()


def test_only_rows_whose_turn_it_is_are_looked_at():
    batches = random_batches(3)
    other = batches.copy()
    for step in range(len(batches)):
        other[step, np.arange(K) != step % K] = 77.0
    method = METHODS["one"][0]
    np.testing.assert_array_equal(run(method, other)[0], run(method, batches)[0])


def test_an_absent_task_loses_its_turn_and_its_say():
    """Task 1 has no finite gradient from the fourth update on: c is that of the momenta of the others."""
    method = momentum_config(0.8, None)
    dropping = optim.nonfinite(method, "drop_task")
    batches = random_batches(4)
    batches[4:, 1] = np.nan
    directions, state = run(dropping, batches)
    _, before = run(method, batches[:4])
    np.testing.assert_array_equal(state.inner.momenta[1], before.inner.momenta[1])
    assert state.inner.refreshed.tolist() == [3, 1, 2]
    momenta = np.asarray(state.inner.momenta, np.float64) / (1 - 0.8 ** np.array([3, 1, 2]))[:, None]
    np.testing.assert_allclose(directions[-1], config_direction(momenta[[0, 2]]), rtol=1e-3, atol=1e-4)

    directions, state = run(dropping, batches * np.nan)  # nobody: nothing moves, then or later
    assert not directions.any()
    assert state.inner.count == 0


def test_nan_is_not_hidden():
    batches = random_batches(5)[:3]
    batches[0, 0, 0] = np.nan
    assert np.isnan(run(METHODS["one"][0], batches)[0][2]).all()


# The route.

X = jax.random.normal(jax.random.key(0), (8, 3))
PARAMS = {"trunk": jax.random.normal(jax.random.key(1), (3, 4)), "heads": jax.random.normal(jax.random.key(2), (4, K))}


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["trunk"])
    return {f"task {k}": jnp.mean((hidden @ params["heads"][:, k] - k) ** 2) for k in range(K)}


def assert_trees_close(ours, reference):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours, reference)


@pytest.mark.parametrize(
    ("refresh", "chunk_size", "shared", "policy"),
    [
        (1, None, True, "propagate"),
        (2, 1, True, "propagate"),
        (2, None, {"trunk": True, "heads": False}, "drop_task"),
        (1, None, {"trunk": True, "heads": False}, "skip_step"),
    ],
)
def test_the_route_gives_the_update_of_the_whole_jacobian(refresh, chunk_size, shared, policy):
    method = optim.nonfinite(optim.on_shared(momentum_config(0.5, 0.9, eps=0.1, refresh=refresh), shared), policy)

    @jax.jit
    def both(params, state):
        losses, jacobian = mtjax.value_and_jacobian(loss_fn)(params, X)
        ours = mtjax.value_and_update(loss_fn, method, chunk_size=chunk_size)(params, state, X)
        return ours, method.update(jacobian, state, params, losses=losses), losses

    params, state = PARAMS, optim.init(method, PARAMS, num_tasks=K)
    for _ in range(4):
        (losses, gradient, ours), (expected, state), given = both(params, state)
        np.testing.assert_allclose(losses, given, rtol=1e-6)
        assert_trees_close(gradient, expected)
        assert_trees_close(ours, state)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, expected)


def test_a_step_costs_about_as_much_as_one_gradient():
    params = {"w": jnp.ones((5, 128, 128)), "heads": jnp.ones((128, 16))}

    def deep(p, x):
        for w in p["w"]:
            x = jnp.tanh(x @ w)
        return jnp.mean((x @ p["heads"]) ** 2, axis=0)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    x = jnp.ones((256, 128))
    plain = flops(jax.grad(lambda p, x: deep(p, x).sum()), params, x)
    method = momentum_config(0.9, None)
    state = optim.init(method, params, num_tasks=16)
    ours = flops(mtjax.value_and_update(deep, method), params, state, x)
    every_task = flops(jax.jacrev(deep), params, x)
    assert ours < plain + 0.3 * (every_task - plain)
    # What it adds are the K x P momenta and their Gramian; none of it grows with the batch.
    wide = jnp.ones((2048, 128))
    assert flops(mtjax.value_and_update(deep, method), params, state, wide) - ours < 1.1 * (
        flops(jax.grad(lambda p, x: deep(p, x).sum()), params, wide) - plain
    )


def test_auxiliary_outputs_and_a_dropped_task():
    def broken(params, x):
        return loss_fn(params, x) | {"task 1": jnp.array(jnp.nan)}, x.sum()

    def alone(params, x):
        return {k: v for k, v in loss_fn(params, x).items() if k != "task 1"}

    shared = {"trunk": True, "heads": False}
    method = optim.nonfinite(optim.on_shared(momentum_config(0.0, None, refresh=K), shared), "drop_task")
    update = mtjax.value_and_update(broken, method, has_aux=True)
    (losses, aux), gradient, state = jax.jit(update)(PARAMS, optim.init(method, PARAMS, num_tasks=K), X)
    assert np.isnan(losses[1])
    assert aux == X.sum()
    assert state.present.tolist() == [True, False, True]
    own = jax.grad(lambda p: sum(alone(p, X).values()))(PARAMS)
    np.testing.assert_allclose(gradient["heads"], own["heads"], rtol=1e-4, atol=1e-6)
    rows = jax.jacrev(lambda p: jnp.stack(list(alone(p, X).values())))(PARAMS)["trunk"]
    expected = config_direction(np.asarray(rows, np.float64).reshape(2, -1)).reshape(3, 4)
    np.testing.assert_allclose(gradient["trunk"], expected, rtol=1e-3, atol=1e-4)


def test_errors():
    for make in (lambda: momentum_config(1.0), lambda: momentum_config(b2=1.0), lambda: momentum_config(eps=-1.0)):
        with pytest.raises(ValueError, match=r"momentum_config needs b1 and b2 in \[0, 1\)"):
            make()
    with pytest.raises(ValueError, match="refresh must be a number of tasks >= 1, got 0"):
        momentum_config(refresh=0)
    method = momentum_config()
    with pytest.raises(ValueError, match="The state of momentum_config is as large as the parameters"):
        optim.init(method, None, num_tasks=2)
    with pytest.raises(ValueError, match=r"name them by on_shared\(method, is_shared\)"):
        mtjax.value_and_update(loss_fn, optim.on_shared(method))(PARAMS, method.init(None), X)
    with pytest.raises(ValueError, match="drop_zero would drop the others"):
        mtjax.value_and_update(loss_fn, optim.nonfinite(method, "drop_task", drop_zero=True))
    with pytest.raises(ValueError, match="without a route of its own"):
        optim.at_representation(method)
