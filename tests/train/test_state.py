"""TrainState: fresh lanes, and the choice of the best parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.train.state import Best, TrainState, create_lanes, update_best


def init_params(key):
    return {"w": jax.random.normal(key, (3, 2)), "b": jnp.zeros(2)}


def lanes(seeds, rates, **options) -> TrainState:
    return create_lanes(init_params, mtjax.optim.pcgrad(), optax.adamw, seeds, rates, num_tasks=3, **options)


def test_fresh_lanes(toy):
    state = lanes((0, 1), (0.1, 0.2), num_groups=3)
    assert state.step.tolist() == [0, 0] and state.params["w"].shape == (2, 3, 2)
    np.testing.assert_allclose(state.learning_rate, [0.1, 0.2])
    assert state.best.params["w"].shape == (2, 3, 3, 2) and state.best.score.shape == (2, 3)
    assert (np.asarray(state.best.score) == -np.inf).all() and not np.asarray(state.best.stale).any()
    np.testing.assert_array_equal(state.best.params["w"][:, 1], state.params["w"])
    assert state.method_state.weights.shape == (2, 3), "the method's state has its final structure from the start"
    assert not np.array_equal(state.params["w"][0], state.params["w"][1])


def test_a_lane_starts_in_the_same_bits_whatever_is_beside_it(toy):
    together, alone = lanes((3, 0, 7), (0.1, 0.2, 0.3)), lanes((7,), (0.5,))
    ours = toy.arrays(jax.tree.map(lambda leaf: leaf[2:], together))
    theirs = toy.arrays(alone)
    differing = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert differing == [".learning_rate"]


def test_initialisation_and_steps_have_different_keys():
    state = lanes((0,), (0.1,))
    init_key, run_key = jax.random.split(jax.random.key(0))
    np.testing.assert_allclose(state.params["w"][0], init_params(init_key)["w"], rtol=1e-6)
    np.testing.assert_array_equal(jax.random.key_data(state.rng[0]), jax.random.key_data(run_key))


def follow(scores, patience, groups=1):
    """Runs update_best over evaluations 1, 2, ... whose parameters are the number of the evaluation."""
    best = Best(jnp.zeros((groups, 1)), jnp.full(groups, -jnp.inf), jnp.zeros(groups, int), jnp.zeros(groups, int))
    state = TrainState(jnp.int32(0), jnp.zeros(1), (), (), jax.random.key(0), jnp.float32(0.1), best)
    for number, score in enumerate(scores, start=1):
        state = state.replace(step=jnp.int32(number), params=jnp.full(1, float(number)))
        state = update_best(state, jnp.broadcast_to(jnp.asarray(score, jnp.float32), (groups,)), patience)
    return state.best


@pytest.mark.parametrize(
    ("scores", "patience", "step", "stale"),
    [
        ([0.1, 0.3, 0.2], 5, 2, 1),
        ([0.1, 0.1, 0.1], 5, 1, 2),  # a tie is no improvement
        ([0.3, 0.2, 0.1, 0.9], 2, 1, 3),  # closed before the 0.9 came
        ([0.3, 0.2, 0.9, 0.1], 2, 3, 1),
        ([np.nan, 0.2, np.nan], 5, 2, 1),
        ([np.nan, np.nan], 2, 0, 2),
        ([-np.inf, -5.0], 5, 2, 0),
    ],
)
def test_the_best_by_hand(scores, patience, step, stale):
    best = follow(scores, patience)
    assert (int(best.step[0]), int(best.stale[0])) == (step, stale)
    assert float(best.params[0, 0]) == step, "the parameters are those of the best step"
    if step:
        assert float(best.score[0]) == np.float32(scores[step - 1])


def test_groups_choose_apart():
    best = follow([[0.1, 0.9], [0.2, 0.5], [0.3, 0.6]], patience=2, groups=2)
    assert best.step.tolist() == [3, 1] and best.params[:, 0].tolist() == [3.0, 1.0] and best.stale.tolist() == [0, 2]
