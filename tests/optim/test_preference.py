"""Scalarizations with a preference: float64 NumPy, their minimisers, and their kinks.

Letters: K tasks; L_k the loss of task k; r the preference; z the reference point.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtjax import optim
from mtjax.optim.preference import (
    cosmos,
    cosmos_value,
    pbi,
    pbi_value,
    smooth_tchebycheff_value,
    stch,
    tchebycheff,
    tchebycheff_value,
)

K = 4
SETTINGS = settings(deadline=None, max_examples=20)
VECTORS = st.lists(st.floats(0.01, 10.0), min_size=K, max_size=K).map(lambda x: np.array(x, np.float32))
THETA, LAMBDA, MU = 5.0, 2.0, 0.3

VALUES = {
    "tchebycheff": functools.partial(tchebycheff_value),
    "stch": functools.partial(smooth_tchebycheff_value, mu=MU),
    "cosmos": functools.partial(cosmos_value, lambda_=LAMBDA),
    "pbi": functools.partial(pbi_value, theta=THETA),
}
METHODS = {
    "tchebycheff": tchebycheff,
    "stch": lambda r: stch(MU, r),
    "cosmos": lambda r: cosmos(r, LAMBDA),
    "pbi": lambda r: pbi(r, THETA),
}


def weights_of(method, losses):
    losses = jnp.asarray(losses, jnp.float32)
    return np.asarray(method.update(jnp.eye(losses.size), method.init(None), losses=losses)[1].weights)


def reference(name, losses, r):
    """Value and gradient in float64, from the definitions."""
    losses, r = np.asarray(losses, np.float64), np.asarray(r, np.float64)
    if name == "tchebycheff":
        return np.max(r * losses), np.where(r * losses == np.max(r * losses), r, 0.0)
    if name == "stch":
        e = np.exp((r * losses - np.max(r * losses)) / MU)
        return np.max(r * losses) + MU * np.log(e.sum()), r * e / e.sum()
    unit, length = r / np.linalg.norm(r), np.linalg.norm(losses)
    if name == "cosmos":
        cosine = unit @ losses / length
        return r @ losses - LAMBDA * cosine, r - LAMBDA * (unit - cosine * losses / length) / length
    across = losses - losses @ unit * unit
    return losses @ unit + THETA * np.linalg.norm(across), unit + THETA * across / np.linalg.norm(across)


@functools.cache
def value_and_grad(name):
    return jax.jit(jax.value_and_grad(VALUES[name]))


@pytest.mark.parametrize("name", VALUES)
@SETTINGS
@given(losses=VECTORS, r=VECTORS, size=st.sampled_from([1e-10, 1.0, 1e10]))
def test_values_and_weights(name, losses, r, size):
    # Ties and rays, where rounding decides, have tests of their own.
    second, first = np.sort(r.astype(float) * losses)[-2:]
    assume(name != "tchebycheff" or second < (1 - 1e-5) * first)
    assume(name != "pbi" or np.linalg.norm(losses / losses.max() - r / r.max()) > 1e-3)
    if name in ("tchebycheff", "pbi"):  # these have no scale of their own
        losses = losses * np.float32(size)
    value, gradient = reference(name, losses, r)
    ours = value_and_grad(name)(losses, r)
    np.testing.assert_allclose(ours[0], value, rtol=1e-5, atol=1e-5 * (LAMBDA if name == "cosmos" else 0))
    np.testing.assert_allclose(ours[1], gradient, rtol=2e-3, atol=2e-3 * np.abs(gradient).max())


@pytest.mark.parametrize("name", METHODS)
def test_methods_weigh_by_the_gradient(name):
    losses, r = np.array([0.5, 2.0, 1.0, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(weights_of(METHODS[name](r), losses), reference(name, losses, r)[1], rtol=1e-5)
    uniform = reference(name, losses, np.full(K, 1 / K))[1]
    np.testing.assert_allclose(weights_of(METHODS[name](None), losses), uniform, rtol=1e-5)


def test_weights_by_hand():
    # r L = (3/4, 1): the second is worst.
    assert weights_of(tchebycheff([0.75, 0.25]), [1.0, 4.0]).tolist() == [0.0, 0.25]
    # r L / mu = (0, log 3): softmax (1/4, 3/4), times r = 1/2.
    np.testing.assert_allclose(weights_of(stch(1.0), [0.0, 2 * np.log(3)]), [1 / 8, 3 / 8], rtol=1e-6)
    # cos = 3/5; w = (1, 0) - 5 ((1, 0) - 3/5 (3/5, 4/5)) / 5 = (1, 0) - (16/25, -12/25).
    np.testing.assert_allclose(weights_of(cosmos([1.0, 0.0], 5.0), [3.0, 4.0]), [9 / 25, 12 / 25], rtol=1e-6)
    # The ray is the first axis: w = (1, 0) + theta (0, 1).
    np.testing.assert_allclose(weights_of(pbi([2.0, 0.0], 3.0), [3.0, 4.0]), [1.0, 3.0], rtol=1e-6)


def test_reference_points_are_subtracted():
    losses, r, z = np.array([0.5, 2.0, 1.0, 0.1]), np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.1, 1.0, 0.0, 0.05])
    for name, method in (
        ("tchebycheff", tchebycheff(r, reference=z)),
        ("stch", stch(MU, r, reference=z)),
        ("pbi", pbi(r, THETA, reference=z)),
    ):
        np.testing.assert_allclose(weights_of(method, losses), reference(name, losses - z, r)[1], rtol=1e-5)


def test_smooth_maximum_tends_to_the_maximum():
    """max <= mu log sum exp <= max + mu log K, also where L / mu is beyond the range of exp."""
    losses, r = jnp.array([1.0, 2.0, 4.0, 3e10]), jnp.array([0.1, 0.2, 0.7, 1e-10])
    maximum = tchebycheff_value(losses, r)
    for mu in (1.0, 1e-2, 1e-4):
        value = smooth_tchebycheff_value(losses, r, mu=mu)
        assert maximum - 1e-6 <= value <= maximum + mu * np.log(K) + 1e-6
    assert weights_of(stch(1e-3), [1.0, 2.0, 4.0, 3e10]).tolist() == [0.0, 0.0, 0.0, 0.25]


def test_a_concave_front_needs_more_than_weighted_sums():
    """On L = (1 - x^2, 1 - (1 - x)^2) weighted sums end at x = 0 or 1; Tchebycheff, smooth or not, and PBI inside."""
    x = jnp.linspace(0.0, 1.0, 1001)
    front = jnp.stack([1 - x**2, 1 - (1 - x) ** 2], axis=1)
    preferences = jnp.array([[0.3, 0.7], [0.5, 0.5], [0.8, 0.2]])

    def minimisers(value):
        over_front = jax.vmap(value, in_axes=(0, None))
        table = jax.jit(jax.vmap(over_front, in_axes=(None, 0)))(front, preferences)
        return front[np.argmin(table, axis=1)]

    sums = minimisers(lambda losses, r: jnp.sum(losses * r))
    assert np.all((sums == 0) | (sums == 1))
    for value in (tchebycheff_value, functools.partial(smooth_tchebycheff_value, mu=1e-3)):
        best = minimisers(value) * preferences  # r_1 L_1 = r_2 L_2: inversely proportional
        np.testing.assert_allclose(best[:, 0], best[:, 1], atol=5e-3)
    best = minimisers(functools.partial(pbi_value, theta=5.0))  # proportional
    np.testing.assert_allclose(best[:, 0] * preferences[:, 1], best[:, 1] * preferences[:, 0], atol=5e-3)


@pytest.mark.slow
def test_preferences_may_be_traced():
    """One compiled update for all of them: a front of models by vmap."""
    losses, rows = jnp.array([1.0, 2.0, 3.0]), jnp.eye(3)
    preferences = jnp.array([[0.2, 0.3, 0.5], [0.6, 0.25, 0.15]])
    for name, make in METHODS.items():
        update = lambda r, make=make: make(r).update(rows, make(r).init(None), losses=losses)[0]  # noqa: E731
        for r, gradient in zip(preferences, jax.vmap(update)(preferences), strict=True):
            np.testing.assert_allclose(gradient, reference(name, losses, r)[1], rtol=1e-4)


# Kinks and limits.


def test_tasks_that_share_the_maximum_share_the_weight():
    assert weights_of(tchebycheff(), np.zeros(4)).tolist() == [1 / 16] * 4
    assert weights_of(tchebycheff([0.5, 0.25, 0.25]), [1.0, 2.0, 0.0]).tolist() == [0.25, 0.125, 0.0]


@pytest.mark.parametrize("num_tasks", [1, 2, 64])
@pytest.mark.parametrize("size", [1e-10, 1.0, 1e10])
def test_pbi_on_the_ray_goes_along_the_ray(num_tasks, size, rng):
    """What rounding leaves of d2 has a random direction; the weights must not follow it."""
    for _ in range(5):
        r = rng.dirichlet(np.ones(num_tasks)).astype(np.float32)
        weights = weights_of(pbi(r), r * np.float32(size * rng.uniform(0.1, 10)))
        np.testing.assert_allclose(weights, r / np.linalg.norm(r), atol=1e-6)


def test_losses_of_zero():
    r = np.array([0.25, 0.75])
    assert weights_of(cosmos(r, 3.0), [0.0, 0.0]).tolist() == r.tolist()
    np.testing.assert_allclose(weights_of(pbi(r), [0.0, 0.0]), r / np.linalg.norm(r), rtol=1e-6)
    np.testing.assert_allclose(weights_of(stch(0.1, r), [0.0, 0.0]), r / 2, rtol=1e-6)


def test_cosmos_of_tiny_losses():
    """|L|^2 is no float32; the gradient of the cosine, of size 1 / |L|, is. As by hand above, with |L| = 5e-25."""
    weights = weights_of(cosmos([1.0, 0.0], 1.0), [3e-25, 4e-25])
    np.testing.assert_allclose(weights, [1 - 16 / 25 / 5e-25, 12 / 25 / 5e-25], rtol=1e-5)


@pytest.mark.parametrize("size", [1e-10, 1.0, 1e10])
def test_one_task_alone(size):
    for method in (tchebycheff(), stch(0.1), cosmos(None, 3.0), pbi(None)):
        assert weights_of(method, [size]) == 1.0
    assert weights_of(tchebycheff([0.5]), [size]) == 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_spoil_all_weights(bad):
    for method in (*(make(None) for make in METHODS.values()), stch(1.0, nadir_steps=1)):
        assert np.isnan(weights_of(method, [1.0, bad, 2.0])).all()


# The multitask form of smooth Tchebycheff.


def test_stch_with_nadir_by_hand():
    method = stch(1.0, warmup_steps=1, nadir_steps=2)
    state = method.init(None)
    for losses, expected in (
        ([8.0, 8.0], [1 / 8, 1 / 8]),  # sum of logarithms
        ([1.0, 4.0], [1.0, 1 / 4]),
        ([3.0, 4.0], [1 / 3, 1 / 4]),  # the nadir is ((1 + 3) / 2, (4 + 4) / 2) = (2, 4)
        ([1.0, 6.0], [2 * 1 / 4 / 1, 2 * 3 / 4 / 6]),  # L / n = (1/2, 3/2): softmax of log (1/4, 3/4); K / L
        ([2.0, 0.0], [2 * 1 / 2, 0.0]),  # what is solved leaves the others the whole softmax
    ):
        _, state = method.update(jnp.eye(2), state, losses=jnp.array(losses))
        np.testing.assert_allclose(state.weights, expected, rtol=1e-5)


def test_stch_with_nadir_is_the_gradient_of_its_objective(rng):
    """K mu log sum (L / n)^(K r / mu), whatever the units of the losses; interrupted and resumed from the state."""
    r, mu, units = np.array([0.2, 0.3, 0.5]), 0.7, np.array([1e-6, 1.0, 1e6])
    losses = (rng.uniform(0.5, 2.0, (6, 3)) * units).astype(np.float32).astype(np.float64)
    method = stch(mu, r, warmup_steps=1, nadir_steps=3)
    state = method.init(None)
    for t, loss in enumerate(losses):
        _, state = method.update(jnp.eye(3), state, losses=jnp.asarray(loss, jnp.float32))
        state = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state)
        terms = (loss / losses[1:4].mean(0)) ** (3 * r / mu)
        expected = 1 / loss if t < 4 else 3 * (3 * r) * terms / terms.sum() / loss
        np.testing.assert_allclose(state.weights, expected, rtol=2e-5)


def test_a_nadir_that_was_not_seen_is_the_first_positive_loss():
    method = stch(1.0, nadir_steps=1)
    state = method.init(None)
    for losses, expected in (
        ([0.0, 2.0], [0.0, 1 / 2]),
        ([0.0, 3.0], [0.0, 2 / 3]),
        ([5.0, 2.0], [2 * 1 / 2 / 5, 2 * 1 / 2 / 2]),  # n = (5, 2)
        ([15.0, 2.0], [2 * 3 / 4 / 15, 2 * 1 / 4 / 2]),
    ):
        _, state = method.update(jnp.eye(2), state, losses=jnp.array(losses))
        np.testing.assert_allclose(state.weights, expected, rtol=1e-5)


def test_negative_losses_have_no_logarithm():
    assert np.isnan(weights_of(stch(1.0, nadir_steps=1), [1.0, -1.0])).all()


# Arguments.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tchebycheff([0.5, -0.5]), "preference must be K numbers >= 0, not all 0, got [0.5, -0.5]"),
        (lambda: pbi([0.0, 0.0]), "preference must be K numbers >= 0, not all 0, got [0.0, 0.0]"),
        (lambda: stch(1.0, [np.nan], nadir_steps=1), "preference must be K numbers >= 0, not all 0, got [nan]"),
        (lambda: stch(0.0), "mu must be > 0, got 0.0"),
        (lambda: stch(1.0, nadir_steps=0), "Expected warmup_steps >= 0 and nadir_steps >= 1, got 0 and 0"),
        (
            lambda: stch(1.0, warmup_steps=3),
            "warmup_steps precede the measurement of the nadir: give nadir_steps as well",
        ),
        (
            lambda: stch(1.0, nadir_steps=3, reference=1.0),
            "With nadir_steps losses are compared with their nadir: reference must be 0",
        ),
        (lambda: pbi(None, -1.0), "theta must be >= 0, got -1.0"),
        (lambda: cosmos(None, -1.0), "lambda_ must be >= 0, got -1.0"),
        (lambda: weights_of(tchebycheff([1.0, 2.0]), [1.0]), "preference has shape (2,), but there are 1 losses"),
        (
            lambda: weights_of(stch(1.0, [1.0, 2.0], nadir_steps=1), [1.0]),
            "preference has shape (2,), but there are 1 losses",
        ),
        (
            lambda: weights_of(pbi(None, reference=[1.0, 2.0]), [1.0]),
            "reference has shape (2,), but there are 1 losses",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


# Tasks that are left out.


@pytest.mark.parametrize(
    "make",
    [*METHODS.values(), lambda r: stch(0.5, r, warmup_steps=1, nadir_steps=3), lambda r: stch(0.5, nadir_steps=2)],
)
@pytest.mark.parametrize("given", [True, False])
def test_those_who_stay_do_as_they_would_alone(make, given, rng):
    """Three steps of four tasks, then two without the second: its weight is 0, its part of the state stays."""
    kept, r = np.array([True, False, True, True]), np.array([0.1, 0.2, 0.3, 0.4])
    four, three = (make(r[mask] if given else None).weighting for mask in (np.ones(4, bool), kept))
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
        np.testing.assert_allclose(weights[kept], expected, rtol=1e-5, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mine(state), rest)
        jax.tree.map(lambda new, old: new.shape == () or np.testing.assert_equal(new[1], old[1]), state, before)


def test_values_of_some_tasks_only():
    losses, r = jnp.array([-1.0, 5.0, -2.0]), jnp.array([0.5, 0.3, 0.2])
    where, kept = jnp.array([True, False, True]), jnp.array([0, 2])
    for value in VALUES.values():
        np.testing.assert_allclose(value(losses, r, where=where), value(losses[kept], r[kept]), rtol=1e-6)
    nobody = optim.from_weighting(stch(0.1).weighting).weighting
    assert nobody.weigh(None, losses, (), jnp.zeros(3, bool))[0].tolist() == [0.0, 0.0, 0.0]
