"""Methods that balance gradient norms: GradNorm against an independent loop, formulas against written arithmetic.

Letters: K tasks; n_k the norm of the gradient of task k, L_k its loss, w_k its weight.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtjax
from mtjax import optim
from mtjax.optim.balancing import gradnorm, norm_balance, ntk_balance, rgw
from mtjax.optim.scalarization import rlw

SETTINGS = settings(deadline=None, max_examples=15)


def rows_of(norms):
    """Orthogonal rows of these norms."""
    return jnp.diag(jnp.asarray(norms, jnp.float32))


def run(method, norms, losses, steps=1):
    """The weights of each of `steps` updates with the same rows and losses."""
    rows, losses = rows_of(norms), jnp.asarray(losses, jnp.float32)
    state = optim.init(method, None, num_tasks=losses.size)

    def step(state, _):
        state = method.update(rows, state, losses=losses)[1]
        return state, state.weights

    return np.asarray(jax.lax.scan(step, state, length=steps)[1])


# GradNorm.


def test_gradnorm_by_hand():
    method = gradnorm(1.0, optax.sgd(0.1))
    state = method.init(None)
    # w = 1, G = (1, 3), mean 2; L = L(0), so r = 1: both targets are 2. Slope: signs (-1, 1) times norms (1, 3) over
    # their first mean 2. w = (1.05, 0.85), times 2 / 1.9.
    _, state = method.update(rows_of([1.0, 3.0]), state, losses=jnp.array([2.0, 4.0]))
    assert state.weights.tolist() == [1.0, 1.0]
    # L / L(0) = (1 / 2, 1 / 4), mean 3 / 8: r = (4 / 3, 2 / 3). G = (3, 1) w = (3.316, 0.895), mean 2.105, targets
    # (2.807, 1.404): signs (1, -1), norms (3, 1) over 2. w = (1.1053 - 0.15, 0.8947 + 0.05) = (0.9553, 0.9447).
    _, state = method.update(rows_of([3.0, 1.0]), state, losses=jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(state.weights, np.array([1.05, 0.85]) * 2 / 1.9, rtol=1e-6)
    w = np.array([1.05, 0.85]) * 2 / 1.9 + [-0.15, 0.05]
    np.testing.assert_allclose(state.inner.task_weights, w * 2 / w.sum(), rtol=1e-6)


def test_gradnorm_follows_the_algorithm(rng):
    """Algorithm 1 in float64; the gradient of sum |G_k - target_k| by finite differences."""
    alpha, rate, steps = 1.5, 0.05, 30
    method = gradnorm(alpha, optax.sgd(rate))
    update = jax.jit(lambda rows, state, losses: method.update(rows, state, losses=losses))
    state = optim.init(method, None, num_tasks=3)
    rows, losses = rng.normal(size=(steps, 3, 5)) * [[1.0], [3.0], [0.5]], rng.uniform(0.5, 2.0, (steps, 3))
    w, unit = np.ones(3), np.linalg.norm(rows[0], axis=1).mean()
    for t in range(steps):
        gradient, state = update(jnp.asarray(rows[t], jnp.float32), state, jnp.asarray(losses[t], jnp.float32))
        np.testing.assert_allclose(state.weights, w, rtol=1e-4)
        np.testing.assert_allclose(gradient, w @ rows[t], rtol=1e-3, atol=1e-4)
        norms, progress = np.linalg.norm(rows[t], axis=1) / unit, losses[t] / losses[0]
        target = np.mean(w * norms) * (progress / progress.mean()) ** alpha
        ahead, behind = (np.abs(np.abs(w + h * np.eye(3)) * norms - target).sum(1) for h in (1e-7, -1e-7))
        w = w - rate * (ahead - behind) / 2e-7
        w = w * 3 / w.sum()


def test_gradnorm_with_alpha_zero_equalises_norms():
    norms = np.array([1.0, 2.0, 4.0])
    weights = run(gradnorm(0.0), norms, [1.0, 1.0, 1.0], steps=800)
    np.testing.assert_allclose(weights.sum(1), 3.0, rtol=1e-4)
    sizes = weights[-1] * norms
    np.testing.assert_allclose(sizes, sizes.mean(), rtol=0.1)  # Adam at 0.025 swings around the kink


def test_gradnorm_gives_more_to_the_task_that_lags_behind():
    method = gradnorm(1.5)
    state = optim.init(method, None, num_tasks=2)
    for losses in ([1.0, 1.0], [1.0, 0.1], [1.0, 0.1], [1.0, 0.1]):
        _, state = method.update(rows_of([1.0, 1.0]), state, losses=jnp.array(losses))
    assert state.weights[0] > 1.04 > 0.96 > state.weights[1]


@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e10])
def test_gradnorm_does_not_see_the_scale_of_gradients(scale):
    norms, losses = np.array([1.0, 5.0, 0.2]), [1.0, 2.0, 0.5]
    np.testing.assert_allclose(
        run(gradnorm(), scale * norms, losses, 20), run(gradnorm(), norms, losses, 20), rtol=1e-4
    )


def test_gradnorm_weights_end_at_zero_and_come_back():
    """A step that is too long would make a weight negative; from 0 its slope points up."""
    weights = run(gradnorm(0.0, optax.sgd(10.0)), [1.0, 3.0], [1.0, 1.0], steps=3)
    assert weights[0].tolist() == [1.0, 1.0]
    assert weights[1].tolist() == [2.0, 0.0]
    assert weights[2].tolist() == [0.0, 2.0]


def test_gradnorm_without_gradients_or_losses_stands_still():
    assert run(gradnorm(), [0.0, 0.0], [1.0, 2.0], 3).tolist() == [[1.0, 1.0]] * 3
    # All losses 0: r = 1 for all, as if they were equal.
    assert run(gradnorm(), [1.0, 2.0], [0.0, 0.0], 3).tolist() == run(gradnorm(), [1.0, 2.0], [1.0, 1.0], 3).tolist()
    # A zero gradient does not move its own weight; the mean of the norms (1, 0), 1/2, moves the other: 1 - 0.1 * 2.
    weights = run(gradnorm(0.0, optax.sgd(0.1)), [1.0, 0.0], [1.0, 1.0], 2)
    np.testing.assert_allclose(weights[1], np.array([0.8, 1.0]) * 2 / 1.8, rtol=1e-6)


def test_gradnorm_takes_the_first_loss_that_is_not_zero():
    method = gradnorm()
    state = method.init(None)
    for losses, initial in (([0.0, 3.0], [0.0, 3.0]), ([0.5, 2.0], [0.5, 3.0]), ([4.0, 1.0], [0.5, 3.0])):
        _, state = method.update(rows_of([1.0, 1.0]), state, losses=jnp.array(losses))
        assert state.inner.initial_losses.tolist() == initial


def test_gradnorm_of_negative_losses_is_nan():
    assert np.isnan(run(gradnorm(), [1.0, 1.0], [1.0, -1.0])).all()


# Formulas.


def test_norm_balance_by_hand():
    # Norms (1, 3), mean 2: targets (2, 2/3). w = 0.75 + 0.25 (2, 2/3).
    weights = run(norm_balance(decay=0.75, every=1), [1.0, 3.0], [1.0, 1.0], steps=2)
    np.testing.assert_allclose(weights[0], [1.25, 0.75 + 1 / 6], rtol=1e-6)
    np.testing.assert_allclose(weights[1], [0.75 * 1.25 + 0.5, 0.75 * (0.75 + 1 / 6) + 1 / 6], rtol=1e-6)


def test_ntk_balance_by_hand():
    # G_kk = (4, 9); rates G_kk / L_k = (4, 3), mean 3.5.
    np.testing.assert_allclose(
        run(ntk_balance(decay=0.0, every=1), [2.0, 3.0], [1.0, 3.0])[0], [3.5 / 4, 3.5 / 3], rtol=1e-6
    )
    # For residuals the rates are G_kk itself, mean 6.5.
    np.testing.assert_allclose(
        run(ntk_balance("residuals", decay=0.0, every=1), [2.0, 3.0], [1.0, 3.0])[0], [6.5 / 4, 6.5 / 9], rtol=1e-6
    )


@SETTINGS
@given(
    exponents=st.lists(st.floats(-8, 8), min_size=3, max_size=3).map(np.array),
    scale=st.sampled_from([1e-2, 1.0, 1e2]),
)
def test_formulas_over_all_scales(exponents, scale):
    norms, losses = (10**exponents).astype(np.float32), np.array([0.5, 2.0, 1.0], np.float32)
    for run_jitted, rates in (
        (balanced("norm"), norms.astype(float)),
        (balanced("ntk"), norms.astype(float) ** 2 / losses),
    ):
        np.testing.assert_allclose(run_jitted(norms * np.float32(scale), losses), rates.mean() / rates, rtol=1e-4)


@functools.cache
def balanced(name):
    method = {"norm": norm_balance, "ntk": ntk_balance}[name](decay=0.0, every=1)
    return jax.jit(lambda norms, losses: method.update(jnp.diag(norms), method.init(None), losses=losses)[1].weights)


def test_weights_that_no_float_can_hold():
    """The target of a norm of 1e-18 beside one of 1e18 is 1e72 in 'ntk': the largest number stands for it."""
    weights = run(ntk_balance(every=1), [1e-18, 1e18], [1.0, 1.0])[0]
    assert np.isfinite(weights).all() and weights[0] > 1e37


def test_ntk_balance_equals_rates_of_gradient_flow():
    """Least squares: -d log L_k / dt = G_kk / L_k = (4 / N) r^T A A^T r / |r|^2, w_k rate_k the same for all."""
    rng = np.random.default_rng(1)
    a, targets, x = rng.normal(size=(2, 6, 3)) * [[[1.0]], [[4.0]]], rng.normal(size=(2, 6)), rng.normal(size=3)

    def loss_fn(x):
        return jnp.mean((a @ x - targets) ** 2, axis=1)

    losses, jacobian = mtjax.value_and_jacobian(loss_fn)(jnp.asarray(x, jnp.float32))
    method = ntk_balance(decay=0.0, every=1)
    weights = method.update(jacobian, method.init(None), losses=losses)[1].weights
    residuals = a @ x - targets
    quotients = np.array([r @ m @ m.T @ r / (r @ r) for m, r in zip(a, residuals, strict=True)])
    np.testing.assert_allclose(weights * quotients, quotients.mean(), rtol=1e-4)


@pytest.mark.parametrize("make", [norm_balance, ntk_balance])
def test_zero_gradients_keep_their_weight(make):
    method = make(decay=0.5, every=1)
    first = run(method, [0.0, 1.0, 3.0], [1.0, 1.0, 1.0])[0]
    assert first[0] == 1.0
    rates = np.array([1.0, 3.0]) ** (1 if make is norm_balance else 2)
    np.testing.assert_allclose(first[1:], 0.5 + 0.5 * rates.sum() / 3 / rates, rtol=1e-6)
    assert run(method, [0.0, 0.0], [1.0, 1.0])[0].tolist() == [1.0, 1.0]
    if make is ntk_balance:
        assert run(method, [1.0, 2.0], [0.0, 0.0])[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("make", [norm_balance, ntk_balance])
def test_weights_move_at_every_nth_step_only(make):
    """By both routes; in between the Gramian is not even computed."""

    def loss_fn(params, x):
        return {"a": jnp.mean((x @ params - 1) ** 2), "b": 10 * jnp.mean((x @ params + 2) ** 2)}

    method, params, x = make(decay=0.5, every=3), jnp.array([0.3, -0.7]), jnp.array([[1.0, 2.0], [0.5, -1.0]])
    start = optim.init(method, params, num_tasks=2)

    def by_route(update):
        def step(carry, _):
            params, state = carry
            gradient, state = update(params, state)
            return (params - 0.01 * gradient, state), (state.weights, state.gramian)

        return jax.jit(lambda: jax.lax.scan(step, (params, start), length=5)[1])()

    def with_jacobian(params, state):
        losses, jacobian = mtjax.value_and_jacobian(loss_fn)(params, x)
        return method.update(jacobian, state, params, losses=losses)

    weights, _ = by_route(with_jacobian)
    sparing, gramians = by_route(lambda p, s: mtjax.value_and_weighted_grad(loss_fn, method)(p, s, x)[1:])
    np.testing.assert_allclose(sparing, weights, rtol=1e-5)
    assert [bool((weights[t] == weights[t + 1]).all()) for t in range(4)] == [True, True, False, True]
    assert [bool((gramians[t] == gramians[t + 1]).all()) for t in range(4)] == [True, True, False, True]


def test_errors():
    for make, message in (
        (lambda: gradnorm(-1.0), "alpha must be >= 0, got -1.0"),
        (lambda: norm_balance(decay=1.0), "decay must be in [0, 1), got 1.0"),
        (lambda: ntk_balance(every=0), "every must be a number of steps >= 1, got 0"),
        (lambda: ntk_balance("loss"), "rows must be 'losses' or 'residuals', got 'loss'"),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert str(error.value) == message


# Random weights.


def test_rgw_leaves_heads_alone():
    """On the trunk it is rlw with the same seed; the head gets its own gradient, which rlw scales."""
    jacobian = {"trunk": jnp.array([[2.0], [4.0]]), "head": jnp.array([[5.0], [0.0]])}
    loss_weights, gradient_weights = rlw(seed=1), rgw(seed=1, is_shared=lambda path: path == "trunk")
    (by_loss, state), (by_gradient, _) = (m.update(jacobian, m.init(None)) for m in (loss_weights, gradient_weights))
    assert by_gradient["trunk"] == by_loss["trunk"]
    assert by_gradient["head"] == 5.0
    np.testing.assert_allclose(by_loss["head"], 5.0 * state.weights[0], rtol=1e-6)


# All.

METHODS = {
    "gradnorm": gradnorm,
    "norm_balance": lambda: norm_balance(every=2),
    "ntk_balance": lambda: ntk_balance(every=2),
    "ntk_balance residuals": lambda: ntk_balance("residuals", every=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_one_task_alone(name):
    assert run(METHODS[name](), [3.0], [0.7], steps=4).tolist() == [[1.0]] * 4


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_finite_spoils_all_weights(name):
    method = METHODS[name]()
    for norms, losses in (([1.0, np.inf], [1.0, 1.0]), ([1.0, np.nan], [1.0, 1.0]), ([1.0, 2.0], [1.0, np.nan])):
        if not (method.weighting.needs_losses or np.isfinite(losses).all()):
            continue
        assert np.isnan(run(method, norms, losses)[0]).all()


@pytest.mark.parametrize("name", METHODS)
def test_those_who_stay_do_as_they_would_alone(name, rng):
    """Three steps of four tasks, then two without the second: its weight is 0, its part of the state stays."""
    kept = np.array([True, False, True, True])
    weighting = METHODS[name]().weighting
    mine = lambda state: jax.tree.map(lambda x: x[kept] if x.shape == (4,) else x, state)  # noqa: E731
    weigh = jax.jit(weighting.weigh)
    state = weighting.init(4)
    for step in range(5):
        losses = jnp.asarray(rng.uniform(0.2, 3.0, 4), jnp.float32)
        rows = rng.normal(size=(4, 5)) * [[1.0], [2.0], [0.3], [5.0]]
        gramian = jnp.asarray(rows @ rows.T, jnp.float32)
        if step < 3:
            _, state = weigh(gramian, losses, state, jnp.ones(4, bool))
            continue
        before = state
        expected, rest = weigh(gramian[kept][:, kept], losses[kept], mine(state), jnp.ones(3, bool))
        cleaned = jnp.where(kept[:, None] & kept[None, :], gramian, 0.0)
        weights, state = weigh(cleaned, jnp.where(kept, losses, 0.0), state, jnp.asarray(kept))
        assert weights[1] == 0
        np.testing.assert_allclose(weights[kept], expected, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mine(state), rest)
        jax.tree.map(lambda new, old: new.shape == () or np.testing.assert_equal(new[1], old[1]), state, before)
