"""Weights that are given, drawn, or a formula of the losses: against written arithmetic and float64 NumPy.

Letters: K tasks; L_k the loss of task k.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtjax
from mtjax import optim
from mtjax.optim.scalarization import dwa, gls, linear, rlw, scale_invariant, single

ROWS = jnp.array([[1.0, 2.0], [-3.0, 0.5], [0.0, 4.0]])
LOSSES = jnp.array([0.5, 2.0, 10.0])
SETTINGS = settings(deadline=None, max_examples=20)


def update(method, losses=LOSSES, rows=ROWS):
    return method.update(rows, method.init(None), losses=losses)


def weights_of(method, losses):
    losses = jnp.asarray(losses, jnp.float32)
    return np.asarray(update(method, losses, jnp.eye(losses.size))[1].weights)


def positive(num_tasks, low=1e-6, high=1e6):
    return st.lists(st.floats(low, high), min_size=num_tasks, max_size=num_tasks).map(np.array)


# Fixed weights.


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("sum", [1.0, 1.0, 1.0]),
        ("mean", [1 / 3, 1 / 3, 1 / 3]),
        ([2.0, 0.0, -1.0], [2.0, 0.0, -1.0]),
        ((0, 1, 0), [0.0, 1.0, 0.0]),  # single-task training as a method
        (np.array([0.25, 0.5, 0.25]), [0.25, 0.5, 0.25]),
    ],
)
def test_linear_weights(weights, expected):
    gradient, state = update(linear(weights))
    np.testing.assert_allclose(state.weights, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.array(expected) @ np.asarray(ROWS), rtol=1e-6)
    assert jax.tree.leaves(state.inner) == []


def test_linear_is_the_gradient_of_the_weighted_loss():
    def loss_fn(params):
        return {"b": (params**2).sum(), "a": jnp.sin(params).sum()}

    params, weights = jnp.array([0.3, -1.2]), [0.7, 2.0]
    method = linear(weights)
    _, gradient, _ = mtjax.value_and_weighted_grad(loss_fn, method)(params, method.init(params))
    expected = jax.grad(lambda p: 0.7 * loss_fn(p)["b"] + 2.0 * loss_fn(p)["a"])(params)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_errors_of_linear():
    with pytest.raises(ValueError) as error:
        linear("median")
    assert str(error.value) == "weights must be 'sum', 'mean' or a sequence of numbers, got 'median'"
    for run in (
        update,
        lambda method: mtjax.value_and_weighted_grad(lambda p: p, method)(jnp.ones(3), method.init(None)),
    ):
        with pytest.raises(ValueError) as error:
            run(linear([1.0, 2.0]))
        assert str(error.value) == "linear got 2 weights for 3 tasks"


def test_single_is_a_one_hot_vector():
    gradient, state = update(single(1))
    assert state.weights.tolist() == [0.0, 1.0, 0.0]
    assert gradient.tolist() == ROWS[1].tolist()


def test_errors_of_single():
    with pytest.raises(ValueError) as error:
        single(-1)
    assert str(error.value) == "task must be a position >= 0, got -1"
    with pytest.raises(ValueError) as error:
        update(single(3))
    assert str(error.value) == "single got task 3, but there are 3 tasks (the first is 0)"


# Logarithms: the sum of them, and the geometric mean.


@SETTINGS
@given(losses=positive(3), units=positive(3, 1e-3, 1e3))
def test_scale_invariant_does_not_see_the_units_of_losses(losses, units):
    """L_k -> u_k L_k and g_k -> u_k g_k: d = sum_k g_k / L_k stays."""
    losses, units = jnp.asarray(losses, jnp.float32), jnp.asarray(units, jnp.float32)
    gradient, state = update(scale_invariant(), losses)
    other, _ = update(scale_invariant(), losses * units, ROWS * units[:, None])
    np.testing.assert_allclose(state.weights, 1 / np.asarray(losses), rtol=1e-6)
    np.testing.assert_allclose(other, gradient, atol=1e-5 * np.max(np.abs(state.weights[:, None] * ROWS)))


def test_gls_by_hand():
    # (1 * 8 * 27)^(1/3) = 6, so w = 6 / (3 L) = 2 / L.
    np.testing.assert_allclose(weights_of(gls(), [1.0, 8.0, 27.0]), [2.0, 2 / 8, 2 / 27], rtol=1e-6)
    # 40 losses of 0.01: their product, 1e-80, is no float32. w = 0.01 / (40 * 0.01).
    np.testing.assert_allclose(weights_of(gls(), np.full(40, 0.01)), np.full(40, 1 / 40), rtol=1e-5)


@SETTINGS
@given(losses=positive(5, 1e-10, 1e10))
def test_gls_is_the_gradient_of_the_geometric_mean(losses):
    losses = losses.astype(np.float32).astype(np.float64)
    mean = np.exp(np.mean(np.log(losses)))
    np.testing.assert_allclose(weights_of(gls(), losses), mean / (5 * losses), rtol=2e-5)


@pytest.mark.parametrize("size", [1.0, 1e-10, 1e10])
def test_one_task_alone(size):
    assert weights_of(gls(), [size]) == 1.0
    np.testing.assert_allclose(weights_of(scale_invariant(), [size]), [1 / size], rtol=1e-6)


def test_solved_tasks():
    """A loss of 0 has weight 0 in the sum of logarithms; the geometric mean is then 0, at its minimum, as a whole."""
    assert weights_of(scale_invariant(), [2.0, 0.0, 4.0]).tolist() == [0.5, 0.0, 0.25]
    assert weights_of(gls(), [2.0, 0.0, 4.0]).tolist() == [0.0, 0.0, 0.0]
    assert weights_of(gls(), [0.0]).tolist() == [1.0]  # GM = L
    assert weights_of(scale_invariant(), [0.0, 0.0]).tolist() == [0.0, 0.0]
    # The smallest normal number still has a finite inverse; what is smaller counts as 0.
    tiny = float(jnp.finfo(jnp.float32).tiny)
    assert weights_of(scale_invariant(), [tiny, tiny / 4]).tolist() == [1 / tiny, 0.0]


@pytest.mark.parametrize("method", [scale_invariant, gls, dwa])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_spoil_all_weights(method, bad):
    assert np.isnan(weights_of(method(), [1.0, bad, 2.0])).all()


@pytest.mark.parametrize("method", [scale_invariant, gls])
def test_negative_losses_have_no_logarithm(method):
    assert np.isnan(weights_of(method(), [1.0, -1.0, 2.0])).all()


# Random weights.


def test_rlw_draws_softmax_of_normals():
    """log w_i - log w_j ~ N(0, 2), independent from step to step, from the key in the state."""
    method = rlw(seed=3)
    start = optim.init(method, None, num_tasks=3)
    weights = jax.lax.scan(lambda s, _: (lambda s: (s, s.weights))(method.update(ROWS, s)[1]), start, length=2000)[1]
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    logarithms = np.log(weights)
    differences = logarithms[:, 1:] - logarithms[:, :-1]  # standard deviation of each entry: sqrt(2) = 1.414
    np.testing.assert_allclose(differences.mean(0), 0.0, atol=4 * np.sqrt(2 / 2000))
    np.testing.assert_allclose(differences.std(0), np.sqrt(2), rtol=4 / np.sqrt(2 * 2000))
    assert abs(np.corrcoef(differences[1:, 0], differences[:-1, 0])[0, 1]) < 4 / np.sqrt(2000)
    np.testing.assert_array_equal(weights_of(rlw(seed=3), LOSSES), weights[0])
    assert not np.array_equal(weights_of(rlw(seed=4), LOSSES), weights[0])


# Dynamic weight average.


def test_dwa_by_hand():
    method = dwa(temperature=2.0)
    state = method.init(None)
    for losses, expected in (
        ([1.0, 1.0], 1.0),
        ([0.5, 1.0], 1.0),
        # r = (0.5 / 1, 1 / 1): w_1 = 2 e^(0.5 / 2) / (e^(0.5 / 2) + e^(1 / 2)) = 2 / (1 + e^0.25)
        ([9.0, 9.0], 2 / (1 + np.exp(0.25))),
        # r = (9 / 0.5, 9 / 1) = (18, 9): w_1 = 2 / (1 + e^(9 / 2 - 18 / 2))
        ([1.0, 1.0], 2 / (1 + np.exp(-4.5))),
    ):
        _, state = method.update(jnp.eye(2), state, losses=jnp.array(losses))
        np.testing.assert_allclose(state.weights, [expected, 2 - expected], rtol=1e-5)


@pytest.mark.parametrize("window", [1, 3])
def test_dwa_compares_means_over_windows(window, rng):
    losses = rng.uniform(0.2, 3.0, (5 * window, 4)).astype(np.float32)
    method = dwa(1.5, window=window)
    step = jax.jit(lambda s, loss: method.update(jnp.eye(4), s, losses=loss)[1])
    state = optim.init(method, None, num_tasks=4)
    for t, loss in enumerate(losses):
        state = step(state, loss)
        means = losses[: t // window * window].astype(np.float64).reshape(-1, window, 4).mean(1)
        rates = means[-1] / means[-2] if len(means) >= 2 else np.ones(4)
        share = np.exp(rates / 1.5) / np.exp(rates / 1.5).sum()
        np.testing.assert_allclose(state.weights, 4 * share, rtol=1e-5)


def test_dwa_at_zero():
    """0 after 0 counts as standing still; a loss that comes back from 0 takes all the weight."""
    method = dwa()
    state = method.init(None)
    for losses, expected in (
        ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0]),
        ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0]),
        ([0.0, 2.0, 1.0], [1.0, 1.0, 1.0]),
        ([0.0, 2.0, 1.0], [0.0, 3.0, 0.0]),
    ):
        _, state = method.update(ROWS, state, losses=jnp.array(losses))
        np.testing.assert_allclose(state.weights, expected, rtol=1e-6)


def test_errors_of_dwa():
    with pytest.raises(ValueError) as error:
        dwa(0.0)
    assert str(error.value) == "temperature must be > 0, got 0.0"
    with pytest.raises(ValueError) as error:
        dwa(window=0)
    assert str(error.value) == "window must be a number of steps >= 1, got 0"


# Tasks that are left out.

MASKED = {
    "sum": lambda kept: linear(),
    "mean": lambda kept: linear("mean"),
    "given": lambda kept: linear(np.arange(1.0, 5.0)[kept]),
    "single": lambda kept: single(int(np.flatnonzero(np.arange(4)[kept] == 3)[0])),
    "scale_invariant": lambda kept: scale_invariant(),
    "gls": lambda kept: gls(),
    "rlw": lambda kept: rlw(),
    "dwa": lambda kept: dwa(),
}


@pytest.mark.parametrize("name", MASKED)
def test_those_who_stay_do_as_they_would_alone(name, rng):
    """Three steps of four tasks, then two without the second: its weight is 0, its part of the state stays."""
    kept = np.array([True, False, True, True])
    four, three = (MASKED[name](mask).weighting for mask in (np.ones(4, bool), kept))
    mine = lambda state: jax.tree.map(lambda x: x[kept] if x.shape == (4,) else x, state)  # noqa: E731
    state = four.init(4)
    for step in range(5):
        losses = jnp.asarray(rng.uniform(0.2, 3.0, 4), jnp.float32)
        if step < 3:
            _, state = four.weigh(None, losses, state, jnp.ones(4, bool))
            continue
        before = state
        expected, rest = three.weigh(None, losses[kept], mine(state), jnp.ones(3, bool))
        weights, state = four.weigh(None, jnp.where(kept, losses, 0.0), state, jnp.asarray(kept))
        assert weights[1] == 0
        np.testing.assert_allclose(weights[kept], expected, rtol=1e-6)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), mine(state), rest))
        jax.tree.map(lambda new, old: new.shape == () or np.testing.assert_equal(new[1], old[1]), state, before)
