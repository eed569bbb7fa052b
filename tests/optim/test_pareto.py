"""Sets of solutions: hypervolume against inclusion and exclusion, preferences met on a toy front, the small LP.

Letters: N solutions, K tasks.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import mtjax
from mtjax import optim
from mtjax.optim.linear_program import simplex_lp

# A convex bi-objective problem whose front is known: L_k = |x - a_k|^2 / 2 with a_1 = (-1, 0), a_2 = (1, 0). Its Pareto
# set is the segment between them; L_1 = (1 + t)^2 / 2 and L_2 = (1 - t)^2 / 2 at (t, 0).


def loss_fn(x):
    ends = jnp.array([[-1.0, 0.0], [1.0, 0.0]])
    return 0.5 * jnp.sum((x[None] - ends) ** 2, axis=1)


def descend(method_of, preferences, *, steps, rate, start):
    """N solutions, each with its own preference, by plain descent."""
    update = optim.value_and_set_update(loss_fn, method_of)

    @jax.jit
    def run(x, preferences):
        states = jax.vmap(lambda p, r: optim.init(method_of(r), p, num_tasks=2))(x, preferences)

        def body(carry, _):
            x, states = carry
            _, gradient, states = update(x, states, preferences)
            return (x - rate * gradient, states), None

        (x, _), _ = jax.lax.scan(body, (x, states), None, length=steps)
        return x, jax.vmap(loss_fn)(x)

    return map(np.asarray, run(jnp.asarray(start, float), jnp.asarray(preferences, float)))


# The linear programme.


@functools.cache
def lp(num_variables):
    del num_variables  # a program for each size
    return jax.jit(simplex_lp)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([2, 3, 6]), power=st.integers(-8, 8))
def test_the_lp_finds_the_optimum(seed, size, power):
    rng = np.random.default_rng(seed)
    c, a = rng.normal(size=size) * 10.0**power, rng.normal(size=(size, size))
    b, active = -0.3 * rng.random(size), rng.random(size) < 0.7
    arrays = [jnp.asarray(value, jnp.float32) for value in (c, a, b)]
    x = np.asarray(lp(size)(*arrays, jnp.asarray(active)), np.float64)
    assert (x >= 0).all() and x.sum() == pytest.approx(1.0, abs=1e-5)
    bounds = {"A_ub": -a[active], "b_ub": -b[active]} if active.any() else {}
    # HiGHS stops at absolute tolerances of 1e-7: it gets the objective at size one.
    exact = linprog(-c / np.abs(c).max(), A_eq=np.ones((1, size)), b_eq=[1.0], **bounds)
    if exact.status == 0:
        assert c @ x == pytest.approx(c @ exact.x, abs=1e-3 * np.abs(c).max())
        assert (a @ x >= b - 1e-3)[active].all()


def test_an_impossible_lp_violates_as_little_as_it_can():
    # x_1 >= 0.8 and x_2 >= 0.8 cannot both hold: any point between (0.8, 0.2) and (0.2, 0.8) misses by 0.6 in all.
    x = lp(2)(jnp.array([1.0, 0.0]), jnp.eye(2), jnp.array([0.8, 0.8]), jnp.array([True, True]))
    assert x[0] == pytest.approx(0.8, abs=1e-3)
    assert jnp.isnan(lp(2)(jnp.array([jnp.nan, 0.0]), jnp.eye(2), jnp.zeros(2), jnp.array([True, True]))).all()


# Hypervolume.


def volume_by_inclusion(points, reference):
    """Sum over subsets of the signed volume of the box that all their points dominate."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            total -= (-1) ** size * np.prod(np.maximum(reference - np.max(subset, axis=0), 0.0))
    return total


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), num_tasks=st.sampled_from([1, 2, 3, 4]))
def test_hypervolume_equals_inclusion_and_exclusion(seed, num_tasks):
    rng = np.random.default_rng(seed)
    points = np.round(rng.uniform(0, 1.2, (5, num_tasks)), 1)  # ties, and points beyond the reference
    ours = optim.hypervolume(points, np.ones(num_tasks))
    inside = points[(points < 1).all(1)]
    assert float(ours) == pytest.approx(volume_by_inclusion(inside, np.ones(num_tasks)), abs=1e-5)


def test_hypervolume_by_hand():
    # (1, 3), (2, 1) under (4, 4): 3 * 1 + 2 * 3 - the common 2 * 1 = 7; (2.5, 2.5) is dominated.
    points, reference = jnp.array([[1.0, 3.0], [2.0, 1.0], [2.5, 2.5]]), jnp.array([4.0, 4.0])
    assert optim.hypervolume(points, reference) == 7.0
    assert optim.hypervolume(points, reference, jnp.array([True, False, True])) == 3.0 + 1.5 * 1.5 - 1.5
    # Moving (1, 3) by e to the left adds a strip of height 1, down a strip of width 1 (from 1 to 2).
    gradient = jax.grad(optim.hypervolume)(points, reference)
    assert gradient.tolist() == [[-1.0, -1.0], [-2.0, -2.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match=r"takes losses \[N, K\] and a reference \[K\], got \(3, 2\) and \(3,\)"):
        optim.hypervolume(points, jnp.ones(3))


def test_hypervolume_weights_move_dominated_solutions_too():
    points, reference = jnp.array([[1.0, 3.0], [2.0, 1.0], [2.5, 2.5], [5.0, 0.5]]), jnp.array([4.0, 4.0])
    weights = optim.hypervolume_weights(points, reference)
    np.testing.assert_allclose(jnp.linalg.norm(weights, axis=1), np.ones(4), rtol=1e-6)
    # The third is alone on the second front: a box of 1.5 by 1.5. The fourth is outside, and comes back by the sum.
    np.testing.assert_allclose(weights, np.full((4, 2), np.sqrt(0.5)), rtol=1e-5)


def test_the_hypervolume_gradient_spreads_solutions_over_the_front():
    update = optim.value_and_hypervolume_update(loss_fn, [3.0, 3.0])

    @jax.jit
    def run(x):
        x = jax.lax.scan(lambda x, _: (x - 0.01 * update(x)[1], None), x, None, length=1500)[0]
        return x, update(x)[0]

    x, losses = run(jax.random.normal(jax.random.key(0), (6, 2)) * 0.3)
    assert np.abs(x[:, 1]).max() < 0.02, "on the Pareto set"
    gaps = np.diff(np.sort(np.asarray(x[:, 0])))
    assert gaps.min() > 0.1, "apart from each other"
    # Beside the front's own volume: six equal preferences would all end at t = 0.
    together = optim.hypervolume(jnp.full((6, 2), 0.5), jnp.array([3.0, 3.0]))
    assert optim.hypervolume(losses, jnp.array([3.0, 3.0])) > together + 0.8


# Preferences.


def test_epo_ends_on_the_ray_of_its_preference():
    """r_1 L_1 = r_2 L_2 on the Pareto set, from starts on either side of the ray and from far away."""
    ratios = np.array([[0.8, 0.2], [0.5, 0.5], [0.2, 0.8], [0.1, 0.9]])
    start = np.array([[0.0, 2.0], [0.9, -1.0], [-0.9, 0.5], [2.0, 2.0]])
    x, losses = descend(optim.epo, ratios, steps=3000, rate=0.01, start=start)
    np.testing.assert_allclose(ratios[:, 0] * losses[:, 0], ratios[:, 1] * losses[:, 1], rtol=0.15)
    assert np.abs(x[:, 1]).max() < 0.02
    # (1 + t)^2 r_1 = (1 - t)^2 r_2:  t = (sqrt(r_2) - sqrt(r_1)) / (sqrt(r_2) + sqrt(r_1)).
    root = np.sqrt(ratios)
    np.testing.assert_allclose(x[:, 0], (root[:, 1] - root[:, 0]) / root.sum(1), atol=0.05)


def test_tchebycheff_ends_where_weighted_losses_are_equal():
    ratios = np.array([[0.8, 0.2], [0.5, 0.5], [0.2, 0.8]])
    start = np.array([[0.0, 1.0], [0.5, -1.0], [-0.5, 0.5]])
    smooth = lambda r: optim.stch(0.01, r)  # noqa: E731
    for method_of, tolerance in ((optim.tchebycheff, 0.05), (smooth, 0.05)):
        x, losses = descend(method_of, ratios, steps=3000, rate=0.01, start=start)
        np.testing.assert_allclose(ratios[:, 0] * losses[:, 0], ratios[:, 1] * losses[:, 1], rtol=tolerance)
        assert np.abs(x[:, 1]).max() < 0.05


def test_linear_preferences_reach_the_front_where_its_normal_is():
    ratios = np.array([[0.8, 0.2], [0.5, 0.5], [0.2, 0.8]])

    def weighted(r):
        return optim.from_weighting(optim.Weighting(lambda k: (), lambda g, losses, s: (r, s), needs_gramian=False))

    x, _ = descend(weighted, ratios, steps=2000, rate=0.02, start=np.ones((3, 2)))
    np.testing.assert_allclose(x, np.stack([ratios[:, 1] - ratios[:, 0], np.zeros(3)], 1), atol=1e-3)


def test_pmtl_stays_in_its_sector():
    vectors = np.array([[np.cos(a), np.sin(a)] for a in np.linspace(0.1, np.pi / 2 - 0.1, 5)])
    update = optim.value_and_set_update(loss_fn, lambda index: optim.pmtl(vectors, index.astype(int)))

    @jax.jit
    def run(x):
        indices = jnp.arange(5.0)
        states = jax.vmap(lambda p, i: optim.init(optim.pmtl(vectors, i.astype(int)), p, num_tasks=2))(x, indices)

        def body(carry, _):
            x, states = carry
            _, gradient, states = update(x, states, indices)
            return (x - 0.01 * gradient, states), None

        (x, states), _ = jax.lax.scan(body, (x, states), None, length=2000)
        return x, jax.vmap(loss_fn)(x), states

    x, losses, states = run(jnp.array([[0.3, 1.5]] * 5))
    # In its sector, or on the border of it, where it entered.
    scores = vectors @ np.asarray(losses).T
    assert (np.diag(scores) >= 0.99 * scores.max(axis=0)).all()
    assert states.inner.found.all()
    assert np.abs(x[:, 1]).max() < 0.1


def test_epo_by_hand():
    # r = 1, L = (3, 1): shares (3/4, 1/4), a = (log 1.5 - mu, log 0.5 - mu): positive and negative. Orthogonal rows:
    # G a falls for task 1 only; the best single task for balance is the first, and it may go alone.
    method = optim.epo([1.0, 1.0])
    direction, state = method.update(jnp.eye(2), method.init(None), losses=jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(state.weights, [1.0, 0.0], atol=1e-3)
    np.testing.assert_allclose(direction, [1.0, 0.0], atol=1e-3)
    # Balanced losses: descent, sum(G w) with G = diag(1, 4) is largest at the second task.
    rows = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    _, state = method.update(rows, method.init(None), losses=jnp.array([2.0, 2.0]))
    np.testing.assert_allclose(state.weights, [0.0, 1.0], atol=1e-3)


def test_bad_arguments():
    for bad in ([-1.0, 1.0], [0.0, 0.0], [[1.0]], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="epo takes one number >= 0 for each task"):
            optim.epo(bad)
    with pytest.raises(ValueError, match=r"preferences must be an array \[N, K\]"):
        optim.pmtl([1.0, 2.0], 0)
    with pytest.raises(ValueError, match="num_tasks and divisions must be >= 1"):
        optim.preference_vectors(2, 0)
    method = optim.epo([1.0, 1.0])
    assert jnp.isnan(method.update(jnp.eye(2), method.init(None), losses=jnp.array([-1.0, 1.0]))[0]).all()


def test_preference_vectors():
    vectors = optim.preference_vectors(3, 4)
    assert vectors.shape == (15, 3) and np.allclose(vectors.sum(1), 1) and len(np.unique(vectors, axis=0)) == 15
    assert optim.preference_vectors(1, 3).tolist() == [[1.0]]


def test_set_updates_are_those_of_each_solution():
    preferences = jnp.array([[0.3, 0.7], [0.6, 0.4]])
    x = jnp.array([[0.0, 1.0], [0.5, -1.0]])
    states = jax.vmap(lambda p, r: optim.init(optim.epo(r), p, num_tasks=2))(x, preferences)
    losses, gradients, _ = optim.value_and_set_update(loss_fn, optim.epo)(x, states, preferences)
    for n in range(2):
        method = optim.epo(preferences[n])
        own_losses, own, _ = mtjax.value_and_update(loss_fn, method)(x[n], method.init(None))
        np.testing.assert_allclose(losses[n], own_losses, rtol=1e-6)
        np.testing.assert_allclose(gradients[n], own, atol=1e-4)
