"""Transfer subsets leave frozen weights untouched; the published schedules step where Keras steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax.models.mt_deeponet import darcy_deeponet, heat3d_deeponet, small_deeponet
from mtjax.models.mt_deeponet_training import (
    darcy_optimizer,
    fine_tune,
    fisher_optimizer,
    heat3d_optimizer,
    keras_piecewise,
    small_optimizer,
    switch_at,
    tl_deeponet_labels,
    transfer_labels,
    transfer_optimizer,
)

BATCH = {"inputs": jnp.zeros((1, 100, 100, 2)), "points": jnp.zeros((3, 2)), "mask": jnp.ones((1, 3), bool)}


@functools.cache
def darcy_shapes():
    return jax.eval_shape(darcy_deeponet().init, jax.random.key(0), BATCH)


def trained(labels):
    """Paths of layers that are trained."""
    leaves = jax.tree_util.tree_leaves_with_path(labels)
    paths = [jax.tree_util.keystr(path[:-1], simple=True, separator="/") for path, label in leaves if label == "train"]
    return sorted(set(paths))


def test_published_subset():
    dense = ["branch/head/dense_0", "branch/head/dense_1", "branch/head/out"]
    params = darcy_shapes()["params"]
    assert trained(transfer_labels(params)) == ["branch/conv_0", *dense, "trunk/out"]
    assert trained(transfer_labels(params, True)) == ["branch/conv_0", *dense, "trunk/dense_3", "trunk/out"]
    assert trained(tl_deeponet_labels(params)) == [*dense, "trunk/out"]
    whole = transfer_labels(darcy_shapes())  # with the level 'params': the same rule
    assert whole["params"] == transfer_labels(params)
    assert set(jax.tree.leaves(whole)) == {"train", "freeze"}


def test_subset_of_other_branches_and_trunks():
    batch = {"inputs": jnp.zeros((1, 4)), "points": jnp.zeros((3, 3)), "mask": jnp.ones((1, 3), bool)}
    params = jax.eval_shape(small_deeponet().init, jax.random.key(0), batch)["params"]
    assert trained(transfer_labels(params)) == ["branch/dense_0", "branch/dense_1", "branch/out", "trunk/out"]
    plate = {**batch, "inputs": jnp.zeros((1, 2))}
    labels = transfer_labels(jax.eval_shape(heat3d_deeponet().init, jax.random.key(0), plate)["params"], True)
    assert [path for path in trained(labels) if "trunk" in path] == ["trunk/dense_8", "trunk/out"]
    with pytest.raises(ValueError, match="with 'branch' and 'trunk', got dense_0"):
        transfer_labels({"dense_0": {"kernel": jnp.zeros(2)}})
    with pytest.raises(ValueError, match="The trunk must have a last layer 'out', got nets_0"):
        transfer_labels({"branch": {}, "trunk": {"nets_0": {}}})


@pytest.mark.parametrize("make_labels", [transfer_labels, tl_deeponet_labels])
def test_frozen_weights_do_not_move(make_labels):
    model = darcy_deeponet(num_basis=3, channels=(2, 2), branch_hidden=(4,), trunk_hidden=(4, 4))
    batch = {"inputs": jnp.ones((2, 8, 8, 2)), "points": jnp.ones((5, 2)), "mask": jnp.ones((2, 5), bool)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    labels = make_labels(params)
    tx = fine_tune(optax.adamw(0.1), labels)  # weight decay must not move frozen weights either
    state = tx.init(params)
    # Gradients that are nowhere zero, and not a number where frozen: they must not matter.
    gradients = jax.tree.map(
        lambda leaf, label: jnp.full(leaf.shape, 1.0 if label == "train" else jnp.nan), params, labels
    )
    step = jax.jit(lambda state: tx.update(gradients, state, params))
    for _ in range(2):
        updates, state = step(state)
    jax.tree.map(lambda u, label: np.testing.assert_array_equal(np.asarray(u) != 0, label == "train"), updates, labels)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    kept = [p for p, label in zip(*map(jax.tree.leaves, (params, labels)), strict=True) if label == "train"]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in kept)  # none for frozen weights


def rates(tx, steps):
    """Sizes of the updates of Adam or Lion for a constant gradient: the rate of learning."""
    params = jnp.zeros(())

    def step(state, _):
        update, state = tx.update(jnp.ones(()), state, params)
        return state, -update

    return np.asarray(jax.jit(lambda: jax.lax.scan(step, tx.init(params), length=steps)[1])())


def test_piecewise_rates_of_darcy_and_of_its_transfer():
    found = rates(darcy_optimizer(), 8010)
    np.testing.assert_allclose(found[[0, 5001, 5002, 8001, 8002]], [1e-3, 1e-3, 5e-4, 5e-4, 1e-4], rtol=1e-4)
    found = rates(transfer_optimizer("train"), 3010)
    np.testing.assert_allclose(found[[0, 2001, 2002, 3001, 3002]], [5e-4, 5e-4, 1e-4, 1e-4, 1e-5], rtol=1e-4)
    with pytest.raises(ValueError, match="2 boundaries need 3 values, got 2"):
        keras_piecewise((1, 2), (0.1, 0.2))


def test_staircases():
    found = rates(fisher_optimizer(), 2001)
    np.testing.assert_allclose(found[[0, 999, 1000, 1999, 2000]], 1e-3 * 0.95 ** np.array([0, 0, 1, 1, 2]), rtol=1e-4)
    found = rates(heat3d_optimizer(switch=1200), 1450)
    adam = 1e-3 * 0.9 ** np.array([0, 0, 1, 1])
    np.testing.assert_allclose(found[[0, 999, 1000, 1199]], adam, rtol=1e-4)
    lion = 1e-5 * 0.9 ** np.array([0, 0, 1, 2])
    np.testing.assert_allclose(found[[1200, 1299, 1300, 1449]], lion, rtol=1e-4)


def test_lion_starts_with_no_memory_of_adam_and_without_decay():
    tx = heat3d_optimizer(switch=3)
    state, updates = tx.init(jnp.ones(2)), []
    for gradient in ([1.0, 1.0],) * 3 + ([-1.0, 0.0],):
        update, state = tx.update(jnp.array(gradient), state, jnp.ones(2))
        updates.append(update)
    # Lion's update is the sign of its interpolated momentum: of the last gradient alone.
    np.testing.assert_allclose(updates[3], [1e-5, 0.0], rtol=1e-5)
    assert int(state.step) == 4


def test_switch_works_in_scans_and_over_seeds():
    tx = switch_at(2, optax.sgd(1.0), optax.sgd(0.1))
    found = jax.vmap(lambda g: scan_updates(tx, g))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(found, [[-1, -1, -0.1, -0.1], [-2, -2, -0.2, -0.2]], rtol=1e-6)


def scan_updates(tx, gradient):
    return jax.lax.scan(lambda state, _: tx.update(gradient, state)[::-1], tx.init(gradient), length=4)[1]


def test_small_optimizer_warms_up_and_ends_at_zero():
    found = rates(small_optimizer(100, warmup=10), 101)
    np.testing.assert_allclose(found[[0, 5, 10, 100]], [0.0, 2.5e-3, 5e-3, 0.0], atol=1e-6)
    with pytest.raises(ValueError, match="steps must exceed the warm-up of 200 steps, got 200"):
        small_optimizer(200)
