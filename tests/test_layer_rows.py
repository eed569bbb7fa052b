"""Rows of dense layers in compressed form: the Gramian, the gradient and any combination, against the Jacobian itself.

Letters: K tasks, R inputs of a layer.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.gradients import sliced_gramian
from mtjax.layer_rows import losses_and_rows
from mtjax.optim.sharing import shared_gramian

KEY = jax.random.key(0)


def check(function, params, compressed, tolerance=3e-6):
    """function: params -> f[K]. `compressed`: how many leaves have rows that are not written out."""

    @jax.jit
    def everything(params):
        losses, pullback, rows_fn, _, written_out = losses_and_rows(lambda p: (function(p), None), params)
        rows, weights = rows_fn(), jnp.arange(1.0, losses.size + 1)
        everywhere = jax.tree.map(lambda _: True, params)
        gram = shared_gramian(rows.left, everywhere, rows.right)
        return losses, pullback(weights), rows.combine(weights), gram, rows.left, written_out

    losses, pulled, combined, gram, left, _ = everything(params)
    expected_losses, jacobian = jax.jit(mtjax.value_and_jacobian(function))(params)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    expected = np.asarray(mtjax.gramian(jacobian))
    np.testing.assert_allclose(gram, expected, atol=tolerance * np.abs(expected).max())
    direction = mtjax.combine(jacobian, jnp.arange(1.0, losses.size + 1))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(direction))
    for ours in (pulled, combined):
        assert jax.tree.structure(ours) == jax.tree.structure(direction)
        for leaf, reference in zip(jax.tree.leaves(ours), jax.tree.leaves(direction), strict=True):
            np.testing.assert_allclose(leaf, reference, rtol=1e-4, atol=5e-6 * largest)
    shapes = zip(jax.tree.leaves(left), jax.tree.leaves(jacobian), strict=True)
    assert sum(a.shape != b.shape for a, b in shapes) == compressed


def test_a_multilayer_perceptron():
    x = jax.random.normal(KEY, (5, 30))
    params = {"a": jax.random.normal(KEY, (30, 40)), "b": jax.random.normal(KEY, (40, 3)), "bias": jnp.ones(40)}
    check(lambda p: jnp.mean((nn.relu(x @ p["a"] + p["bias"][None]) @ p["b"]) ** 2, 0), params, compressed=2)


def test_weights_first_and_several_contracted_dimensions():
    x = jax.random.normal(KEY, (4, 5, 7))
    params = {"w": jax.random.normal(KEY, (6, 5, 7)), "v": jax.random.normal(KEY, (6, 3))}
    contract = lambda p: jnp.tensordot(p["w"], x, axes=((1, 2), (1, 2))).T  # noqa: E731
    check(lambda p: jnp.mean(jnp.tanh(contract(p)) @ p["v"], 0) ** 2, params, compressed=2)


def test_what_is_left_alone():
    """Weights that are used twice, layers with as many inputs as features, and anything that is not a product."""
    x, square = jax.random.normal(KEY, (3, 8)), {"w": jax.random.normal(KEY, (8, 8))}
    check(lambda p: jnp.mean(jnp.tanh(x @ p["w"]) @ p["w"], 0)[:2], square, compressed=0)
    tall = jax.random.normal(KEY, (9, 8))
    check(lambda p: jnp.mean(jnp.tanh(tall @ p["w"]), 0)[:2], square, compressed=0)
    check(lambda p: jnp.stack([jnp.sum(p["w"] ** 2), jnp.sum(jnp.sin(p["w"]))]), square, compressed=0)
    check(lambda p: jnp.mean(jnp.tanh(jax.checkpoint(lambda w: x @ w)(p["w"])), 0)[:2], square, compressed=0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(nn.Dense(64)(x)))
        return nn.Dense(3)(nn.gelu(nn.Dense(32)(h)).mean(1))


def test_a_flax_transformer():
    net, x = Net(), jax.random.normal(jax.random.key(1), (2, 5, 40))
    params = jax.jit(net.init)(KEY, x)
    check(lambda p: jnp.mean(net.apply(p, x) ** 2, 0), params, compressed=7)  # dense, q, k, v, out, dense, head


@pytest.mark.parametrize(
    "x", [np.ones((5, 30)), np.zeros((5, 30)), np.full((5, 30), 1e-20)], ids=["equal", "0", "tiny"]
)
def test_degenerate_inputs(x):
    x = jnp.asarray(x, jnp.float32)
    params = {"w": jax.random.normal(KEY, (30, 4))}
    check(lambda p: jnp.mean(jnp.tanh(x @ p["w"]), 0), params, compressed=1, tolerance=2e-5)


def test_under_vmap_over_seeds():
    x = jax.random.normal(jax.random.key(1), (5, 30))

    def gramian_of(w):
        rows = losses_and_rows(lambda w: (jnp.mean(jnp.tanh(x @ w), 0), None), w)[2]()
        return shared_gramian(rows.left, True, rows.right)

    seeds = jax.random.normal(KEY, (3, 30, 4))
    batched = jax.jit(jax.vmap(gramian_of))(seeds)
    for index in range(3):
        jacobian = jax.jacrev(lambda w: jnp.mean(jnp.tanh(x @ w), 0))(seeds[index])
        np.testing.assert_allclose(batched[index], mtjax.gramian(jacobian), atol=3e-6)


@pytest.mark.parametrize("shape", [(3, 70, 9), (3, 1000, 40), (8, 37, 4, 5)])
def test_a_sliced_gramian_is_the_gramian(shape, monkeypatch):
    monkeypatch.setattr("mtjax.gradients.SLICE", 2000)
    rows, columns = (np.random.default_rng(seed).normal(size=shape).astype(np.float32) for seed in (0, 1))
    ours = sliced_gramian(jnp.asarray(rows), jnp.asarray(columns))
    flat = [array.reshape(shape[0], -1).astype(np.float64) for array in (rows, columns)]
    np.testing.assert_allclose(ours, flat[0] @ flat[1].T, atol=1e-3)
