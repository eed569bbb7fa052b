"""MoDo and SDMGrad against NumPy, and their route against the transform on Jacobians of the three parts.

Letters: K tasks; J_1, J_2, J_3 Jacobians of independent batches, A = J_1 J_2^T; w weights on the simplex.
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
from mtjax.optim.stochastic import modo, sdmgrad

K = 3
# With SDMGrad's default learning rate of 10 the inner iterates jump between corners, and magnify every rounding.
METHODS = {"modo": functools.partial(modo, 0.3), "sdmgrad": functools.partial(sdmgrad, learning_rate=0.3)}
EVERY = pytest.mark.parametrize("name", METHODS)
PARAMS = {
    "trunk": jax.random.normal(jax.random.key(1), (3, 4)),
    "heads": tuple(jax.random.normal(jax.random.key(2 + k), (4,)) for k in range(K)),
}
IS_SHARED = {"trunk": True, "heads": False}
BATCH = jax.random.normal(jax.random.key(0), (12, 3))


def loss_fn(params, x, key=None):
    """Losses of different size; with a key, inputs are noisy."""
    x = x if key is None else x + jax.random.normal(key, x.shape)
    z = jnp.tanh(x @ params["trunk"])
    return {f"task {k}": 4.0 ** (k - 1) * jnp.mean((z @ head - 1) ** 2) for k, head in enumerate(params["heads"])}


def with_aux(params, x):
    return loss_fn(params, x), x.sum()


def assert_trees_close(ours, expected, tolerance=2e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), ours, expected)


# The rules.


def project(v):
    """Duchi et al., by the sorted cumulative sums, in float64."""
    ordered = np.sort(v)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(v) + 1)
    return np.maximum(v - excess[np.nonzero(ordered > excess)[0][-1]], 0)


def numpy_modo(cross, w, gamma, rho):
    w = project(w - gamma * (cross @ w + rho * w))
    return w, w


def numpy_sdmgrad(cross, w, lambda_, rate, momentum=0.5, steps=20):
    target = np.full(len(w), 1 / len(w))
    relative = cross / np.sqrt(np.maximum(np.diag(cross), 0)).mean() ** 2
    velocity = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + relative @ (w + lambda_ * target)
        w = project(w - rate * velocity)
    return (w + lambda_ * target) / (1 + lambda_), w


@functools.cache
def rule(name):
    """jitted: J_1, J_2 and J_3 [T, K, P] -> directions [T, P] and weights [T, K] of T updates."""
    method = METHODS[name]()

    def body(state, rows):
        direction, state = method.update(rows[2], state, independent=(rows[0], rows[1]))
        return state, (direction, state.weights)

    start = optim.init(method, None, num_tasks=K)
    return jax.jit(lambda *rows: jax.lax.scan(body, start, rows)[1])


@EVERY
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_it_is_the_rule_in_numpy(name, seed):
    rng = np.random.default_rng(seed)
    # J_2 near J_1, so that the diagonal of A (SDMGrad's scale) is not zero by chance.
    first, third = rng.normal(size=(2, 4, K, 6))
    second = first + 0.5 * rng.normal(size=first.shape)
    directions, weights = rule(name)(*(jnp.asarray(rows, jnp.float32) for rows in (first, second, third)))
    step = {"modo": (numpy_modo, 0.3, 0.1), "sdmgrad": (numpy_sdmgrad, 0.3, 0.3)}[name]
    w = np.full(K, 1 / K)
    for t in range(4):
        expected, w = step[0](first[t] @ second[t].T, w, *step[1:])
        np.testing.assert_allclose(weights[t], expected, atol=1e-4)
        np.testing.assert_allclose(directions[t], expected @ third[t], atol=1e-3)


def test_modo_by_hand():
    """J_1 = (1, 2), J_2 = (1, 0), w = (1/2, 1/2): A w = J_1 (J_2 w) = (1/2, 1). With gamma = 0.2 and rho = 0.5,
    w - 0.2 ((1/2, 1) + (1/4, 1/4)) = (0.35, 0.25), and the projection adds 0.2 to both. J_3 = (1, 10): d = 5.05."""
    method = modo(0.2, rho=0.5)
    first, second, third = (jnp.array(rows)[:, None] for rows in ([1.0, 2.0], [1.0, 0.0], [1.0, 10.0]))
    direction, state = method.update(third, method.init(None), independent=(first, second))
    np.testing.assert_allclose(state.weights, [0.55, 0.45], rtol=1e-6)
    np.testing.assert_allclose(direction, [0.55 + 4.5], rtol=1e-6)
    np.testing.assert_allclose(state.gramian, [[1, 0], [2, 0]])
    _, biased = method.update(first, method.init(None))
    np.testing.assert_allclose(biased.gramian, [[1, 2], [2, 4]])


def test_one_step_of_sdmgrad_by_hand():
    """A = diag(4, 1), scale = (2 + 1) / 2, A' = diag(16/9, 4/9). With lambda = 1 the slope at w = w_0 = (1/2, 1/2) is
    A' (1, 1), and w = Proj((1/2, 1/2) - 0.09 (16/9, 4/9)) = Proj(0.34, 0.46) = (0.44, 0.56): weights (0.47, 0.53)."""
    method = sdmgrad(1.0, learning_rate=0.09, num_steps=1)
    _, state = method.update(jnp.diag(jnp.array([2.0, 1.0])), method.init(None))
    np.testing.assert_allclose(state.inner.task_weights, [0.44, 0.56], rtol=1e-5)
    np.testing.assert_allclose(state.weights, [0.47, 0.53], rtol=1e-5)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_sdmgrad_without_a_preferred_direction_solves_mgda(seed):
    rows = jnp.asarray(np.random.default_rng(seed).normal(size=(K, 8)), jnp.float32)
    direction = solved()(rows)
    shortest, _ = optim.mgda().update(rows, optim.mgda().init(None))
    assert jnp.linalg.norm(direction) <= 1.001 * jnp.linalg.norm(shortest) + 1e-4


@functools.cache
def solved():
    method = sdmgrad(0.0, learning_rate=0.5, num_steps=300)
    return jax.jit(lambda rows: method.update(rows, method.init(None))[0])


def test_a_preference_is_where_a_large_lambda_leads():
    method = sdmgrad(1e6, preference=[1.0, 0.0, 3.0])
    direction, state = method.update(jnp.eye(K), method.init(None))
    np.testing.assert_allclose(state.weights, [0.25, 0.0, 0.75], atol=1e-5)
    np.testing.assert_allclose(direction, state.weights)


def test_two_batches_are_unbiased_where_one_is_not():
    """Gradients 1 and 1 with noise of variance 0 and 3: E[J J^T] = ((1, 1), (1, 4)), E[J_1 J_2^T] is all ones."""
    noise = jnp.sqrt(3.0) * jax.random.normal(jax.random.key(0), (2, 20_000))
    rows = jnp.stack([jnp.ones_like(noise), 1 + noise], axis=-1)[..., None]  # [2, N, K = 2, P = 1]
    method = modo()
    one = jax.vmap(lambda j: method.update(j, method.init(None))[1].gramian)(rows[0])
    two = jax.vmap(lambda j, k: method.update(j, method.init(None), independent=(j, k))[1].gramian)(*rows)
    np.testing.assert_allclose(one.mean(0), [[1, 1], [1, 4]], atol=0.15)
    np.testing.assert_allclose(two.mean(0), [[1, 1], [1, 1]], atol=0.1)


# Limits.


@pytest.mark.parametrize("power", [-30, 30])
def test_sdmgrad_is_scale_equivariant_and_modo_is_not(power):
    rng = np.random.default_rng(0)
    rows = [jnp.asarray(rng.normal(size=(1, K, 6)), jnp.float32) for _ in range(3)]
    rows[1] = rows[0] + 0.1 * rows[1]
    direction, weights = rule("sdmgrad")(*rows)
    scaled, scaled_weights = rule("sdmgrad")(*(2.0**power * j for j in rows))
    np.testing.assert_array_equal(scaled_weights, weights)
    np.testing.assert_array_equal(scaled, 2.0**power * direction)
    # Small gradients leave MoDo's weights where they are, large ones send them to a corner.
    _, small_or_large = rule("modo")(*(2.0**power * j for j in rows))
    np.testing.assert_allclose(small_or_large.max(), 1 / K if power < 0 else 1.0, rtol=1e-6)


@EVERY
def test_one_task_is_plain_descent(name):
    method, rows = METHODS[name](), jnp.array([[3.0, -4.0]])
    np.testing.assert_allclose(method.update(rows, method.init(None))[0], rows[0], rtol=1e-6)


@EVERY
@pytest.mark.parametrize("scale", [0.0, 1e-10, 1.0, 1e10])
def test_degenerate_matrices_give_finite_weights_on_the_simplex(name, scale):
    update = jax.jit(METHODS[name]().update)
    base = np.random.default_rng(0).normal(size=(K, 4))
    start = optim.init(METHODS[name](), None, num_tasks=K)
    for factors in ([1, 0, 1], [1, -1, 1], [1e-8, 1, 1e8]):
        rows = jnp.asarray(scale * base * np.array(factors)[:, None], jnp.float32)
        for other in (rows, -rows, jnp.flip(rows, axis=0)):  # scales may be zero, negative or in no proportion
            direction, state = update(rows, start, independent=(rows, other))
            assert jnp.isfinite(direction).all()
            assert (state.weights >= 0).all()
            np.testing.assert_allclose(state.weights.sum(), 1.0, rtol=1e-5)


@EVERY
def test_nan_is_not_hidden(name):
    method = METHODS[name]()
    direction, state = method.update(jnp.eye(K).at[0, 0].set(jnp.nan), method.init(None))
    assert jnp.isnan(direction).all()
    assert jnp.isnan(state.weights).all()


@EVERY
def test_a_task_that_is_left_out_changes_nothing_for_the_others(name):
    whole, part = (optim.nonfinite(METHODS[name](), "drop_task") for _ in range(2))
    rng, keep = np.random.default_rng(0), np.array([0, 2])
    state, alone = whole.init(None), part.init(None)
    for _ in range(2):
        rows = jnp.asarray(rng.normal(size=(K, 5)), jnp.float32)
        gradient, state = whole.update(rows.at[1].set(jnp.inf), state)
        expected, alone = part.update(rows[keep], alone)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.weights, [alone.weights[0], 0.0, alone.weights[1]], rtol=1e-5)
        np.testing.assert_allclose(state.inner.task_weights[1], 1 / K)
    _, state = whole.update(rows, state)  # back again
    np.testing.assert_allclose(state.weights.sum(), 1.0, rtol=1e-5)


def test_wrong_arguments():
    for make, message in (
        (lambda: modo(-1.0), "gamma and rho must be >= 0, got -1.0 and 0.1"),
        (lambda: sdmgrad(-0.1), "lambda_ and learning_rate must be >= 0"),
        (lambda: sdmgrad(momentum=1.0), "momentum must be in"),
        (lambda: sdmgrad(num_steps=0), "num_steps must be >= 1, got 0"),
        (lambda: sdmgrad(preference=[1.0, -1.0]), "preference must be non-negative"),
        (lambda: sdmgrad(preference=[1.0]).update(jnp.eye(2), sdmgrad(preference=[1.0]).init(None)), "for 1 tasks"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    method = modo()
    with pytest.raises(ValueError, match="needs 3 independent batches"):
        mtjax.value_and_update(loss_fn, method)(PARAMS, method.init(PARAMS), BATCH[:11])


# The route.


def parts(batch=BATCH):
    """Losses of the third part, and the Jacobians of all three."""
    pairs = [mtjax.value_and_jacobian(loss_fn)(PARAMS, part) for part in optim.split_batch(batch, 3)]
    return pairs[2][0], [jacobian for _, jacobian in pairs]


@pytest.mark.parametrize(
    ("name", "chunk_size", "is_shared"),
    [
        ("modo", None, True),
        ("modo", None, None),
        ("modo", 1, IS_SHARED),
        ("modo", 2, None),
        ("sdmgrad", None, IS_SHARED),
        ("sdmgrad", 2, True),
    ],
)
def test_the_route_is_the_transform_on_the_jacobians_of_three_parts(name, chunk_size, is_shared):
    method = optim.on_shared(METHODS[name](), is_shared)
    route = jax.jit(mtjax.value_and_update(loss_fn, method, chunk_size=chunk_size))
    expected_losses, (first, second, third) = parts()
    state, expected_state = (optim.init(method, PARAMS, num_tasks=K) for _ in range(2))
    for _ in range(2):
        losses, gradient, state = route(PARAMS, state, BATCH)
        expected, expected_state = method.update(
            third, expected_state, PARAMS, losses=losses, independent=(first, second)
        )
        assert_trees_close((losses, gradient, state), (expected_losses, expected, expected_state))
    assert not np.allclose(state.gramian, state.gramian.T)  # of two batches
    if is_shared is not True:
        assert_trees_close(gradient["heads"], jax.tree.map(lambda rows: rows.sum(0), third["heads"]))


def test_a_key_is_the_same_for_all_parts_and_aux_is_that_of_the_third():
    method, key = modo(), jax.random.key(7)
    losses, _, state = mtjax.value_and_update(loss_fn, method)(PARAMS, method.init(PARAMS), BATCH, key)
    np.testing.assert_allclose(losses, list(loss_fn(PARAMS, BATCH[8:], key).values()), rtol=1e-5)
    first, second = (
        mtjax.value_and_jacobian(loss_fn)(PARAMS, part, key)[1] for part in optim.split_batch(BATCH, 3)[:2]
    )
    flat = [
        np.concatenate([leaf.reshape(K, -1) for leaf in jax.tree.leaves(jacobian)], 1) for jacobian in (first, second)
    ]
    expected = flat[0] @ flat[1].T
    np.testing.assert_allclose(state.gramian, expected, rtol=1e-4, atol=1e-4)
    (_, aux), _, _ = mtjax.value_and_update(with_aux, method, has_aux=True)(PARAMS, method.init(PARAMS), BATCH)
    np.testing.assert_allclose(aux, BATCH[8:].sum(), rtol=1e-5)


def broken(params, x):
    """The second task's loss is infinite, and its gradient NaN, on batches whose first entry is large."""
    losses = loss_fn(params, jnp.minimum(x, 10.0))
    return losses | {"task 1": jnp.where(x[0, 0] > 100.0, jnp.inf, 1.0) * losses["task 1"]}


@functools.cache
def dropping(chunk_size):
    method = optim.nonfinite(modo(), "drop_task")
    return method, jax.jit(mtjax.value_and_update(broken, method, chunk_size=chunk_size))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_task_that_breaks_on_one_part_is_left_out(chunk_size, part):
    """As if its rows were not there in any of the three."""
    method, route = dropping(chunk_size)
    batch = BATCH.at[4 * part, 0].set(1000.0)
    losses, gradient, state = route(PARAMS, method.init(PARAMS), batch)
    _, jacobians = parts(jnp.minimum(batch, 10.0))
    dropped = [jax.tree.map(lambda rows: rows.at[1].set(0.0), jacobian) for jacobian in jacobians]
    spoiled = jax.tree.map(lambda rows: rows.at[1].set(jnp.nan), jacobians[2])
    expected, expected_state = method.update(spoiled, method.init(PARAMS), PARAMS, independent=dropped[:2])
    assert_trees_close((gradient, state), (expected, expected_state))
    assert jnp.isinf(losses[1]) == (part == 2)


def test_a_step_that_breaks_on_one_part_is_skipped():
    method = optim.nonfinite(modo(), "skip_step")
    route = jax.jit(mtjax.value_and_update(broken, method))
    start = optim.init(method, PARAMS, num_tasks=K)
    _, gradient, state = route(PARAMS, start, BATCH.at[4, 0].set(1000.0))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    jax.tree.map(np.testing.assert_array_equal, state._replace(present=start.present), start)
    assert not state.present[1]
    _, gradient, _ = route(PARAMS, state, BATCH)
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradient))


def test_every_second_step_needs_no_gramian():
    method = optim.every(modo(0.01), 2)
    route = jax.jit(mtjax.value_and_update(loss_fn, method))
    state, weights = optim.init(method, PARAMS, num_tasks=K), []
    for key in jax.random.split(jax.random.key(0), 4):
        _, _, state = route(PARAMS, state, BATCH, key)
        weights.append(state.weights)
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(weights[2], weights[3])
    assert (weights[1] != weights[2]).any()


def test_it_trains_in_a_scan_for_several_seeds_at_once():
    """Every loss on a fixed batch falls."""
    method = optim.on_shared(modo(0.01), IS_SHARED)
    update = mtjax.value_and_update(loss_fn, method)

    def train(key):
        def body(carry, step_key):
            params, state = carry
            _, gradient, state = update(params, state, jax.random.normal(step_key, (12, 3)))
            return (jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient), state), None

        start = (PARAMS, optim.init(method, PARAMS, num_tasks=K))
        (params, _), _ = jax.lax.scan(body, start, jax.random.split(key, 100))
        return jnp.stack(list(loss_fn(params, fixed).values()))

    fixed = jax.random.normal(jax.random.key(9), (256, 3))
    losses = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 2))
    assert (losses < jnp.stack(list(loss_fn(PARAMS, fixed).values()))[None, :]).all()
