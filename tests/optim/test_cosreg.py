"""CosReg: the penalty's gradient by hand and by differentiating the objective; shared leaves, absent tasks, scales.

Letters: K tasks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax import optim
from mtjax.optim.cosreg import cosreg

K = 3
X = jax.random.normal(jax.random.key(0), (8, 3))
PARAMS = {"trunk": jax.random.normal(jax.random.key(1), (3, 4)), "heads": jax.random.normal(jax.random.key(2), (4, K))}
SHARED = {"trunk": True, "heads": False}


def loss_fn(params, x, scale=1.0):
    hidden = jnp.tanh(x @ params["trunk"])
    return {f"task {k}": scale * jnp.mean((hidden @ params["heads"][:, k] - k + 1) ** 2) for k in range(K)}


def objective(params, x, weight, leaves=("trunk", "heads"), loss_fn=loss_fn):
    """sum L + weight c, with c from explicit cosines of gradients at some leaves."""

    def losses(p):
        return jnp.stack(list(loss_fn(p, x).values()))

    jacobian = jax.jacrev(losses)(params)
    rows = jnp.concatenate([jacobian[name].reshape(jacobian[name].shape[0], -1) for name in leaves], axis=1)
    units = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    cosine = units @ units.T
    size = len(rows)
    penalty = (jnp.sum(cosine**2) - size) / (size * (size - 1))
    return jnp.sum(losses(params)) + weight * penalty, penalty


@functools.cache
def by_objective(leaves=("trunk", "heads"), kept=tuple(range(K))):
    def some(params, x):
        losses = list(loss_fn(params, x).values())
        return {str(k): losses[k] for k in kept}

    graded = jax.grad(functools.partial(objective, leaves=leaves, loss_fn=some), has_aux=True)
    return jax.jit(graded, static_argnums=2)(PARAMS, X, 10.0)


def run(method, loss_fn=loss_fn, params=PARAMS, chunk_size=None, x=X):
    update = jax.jit(mtjax.value_and_update(loss_fn, method, chunk_size=chunk_size))
    return update(params, method.init(params), x)


def assert_trees_close(ours, reference, tolerance=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, reference)


def test_by_hand():
    """L_1 = x^2 / 2 + y, L_2 = y: g = (x, 1), (0, 1), cos^2 = 1 / (1 + x^2), whose derivative is -2 x / (1 + x^2)^2.

    At x = 1: c = 1/2, grad c = (-1/2, 0); d = (1, 1) + (0, 1) + 10 (-1/2, 0) = (-4, 2).
    """
    method = cosreg()
    losses, gradient, state = mtjax.value_and_update(lambda p: jnp.stack([p[0] ** 2 / 2 + p[1], p[1]]), method)(
        jnp.array([1.0, 3.0]), method.init(None)
    )
    np.testing.assert_allclose(gradient, [-4.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(state.inner.penalty, 0.5, rtol=1e-6)
    assert losses.tolist() == [3.5, 3.0]  # as they are, without the penalty


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_it_is_the_gradient_of_the_penalised_loss(chunk_size):
    expected, penalty = by_objective()
    losses, gradient, state = run(cosreg(), chunk_size=chunk_size)
    assert_trees_close(gradient, expected)
    np.testing.assert_allclose(state.inner.penalty, penalty, rtol=1e-5)
    assert np.isnan(state.weights).all()
    np.testing.assert_allclose(losses, list(loss_fn(PARAMS, X).values()), rtol=1e-6)


def test_shared_leaves():
    """Cosines at the trunk, which alone the penalty moves; the heads get the plain sum."""
    expected, penalty = by_objective(("trunk",))
    method = optim.on_shared(cosreg(), SHARED)
    _, gradient, state = run(method)
    np.testing.assert_allclose(gradient["trunk"], expected["trunk"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.inner.penalty, penalty, rtol=1e-5)
    plain = jax.grad(lambda p: sum(loss_fn(p, X).values()))(PARAMS)
    np.testing.assert_allclose(gradient["heads"], plain["heads"], rtol=1e-5)

    def in_leaves(params, x):  # one leaf for each head, so that the Jacobian shows what is shared
        return loss_fn({"trunk": params["trunk"], "heads": jnp.stack(params["heads"], axis=1)}, x)

    split = PARAMS | {"heads": list(PARAMS["heads"].T)}
    _, found, _ = run(optim.on_shared(cosreg()), in_leaves, split)
    np.testing.assert_allclose(found["trunk"], gradient["trunk"], rtol=1e-4, atol=1e-5)


def test_an_absent_task_is_not_there():
    expected, penalty = by_objective(kept=(0, 2))

    def broken(params, x):
        return loss_fn(params, x) | {"task 1": jnp.array(jnp.nan)}

    _, gradient, state = run(optim.nonfinite(cosreg(), "drop_task"), broken)
    assert_trees_close(gradient, expected)
    np.testing.assert_allclose(state.inner.penalty, penalty, rtol=1e-5)
    assert state.present.tolist() == [True, False, True]
    _, gradient, _ = run(optim.nonfinite(cosreg(), "skip_step"), broken)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_one_task_zero_gradients_and_no_weight():
    single = lambda p, x: {"a": loss_fn(p, x)["task 0"]}  # noqa: E731
    _, gradient, state = run(cosreg(), single)
    assert_trees_close(gradient, jax.grad(lambda p: single(p, X)["a"])(PARAMS), 1e-6)
    assert state.inner.penalty == 0
    still = lambda p, x: loss_fn(p, x) | {"task 1": jnp.array(0.0)}  # noqa: E731
    _, gradient, state = run(cosreg(0.0), still)
    assert_trees_close(gradient, jax.grad(lambda p: sum(still(p, X).values()))(PARAMS))
    _, gradient, _ = run(cosreg(), still)  # the cosine of the other two, of three pairs
    two, _ = by_objective(kept=(0, 2))
    plain = jax.grad(lambda p: sum(still(p, X).values()))(PARAMS)
    assert_trees_close(gradient, jax.tree.map(lambda g, t: g + (t - g) / 3, plain, two))


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_the_penalty_has_no_scale(scale):
    """d - sum g does not depend on the scale of the losses; at 1e10 it is lost in the rounding of sum g."""
    scaled = functools.partial(loss_fn, scale=scale)
    _, gradient, state = run(cosreg(), scaled)
    reference = run(cosreg())[2].inner.penalty
    np.testing.assert_allclose(state.inner.penalty, reference, rtol=1e-4)
    expected, _ = by_objective()
    plain = jax.grad(lambda p: sum(loss_fn(p, X).values()))(PARAMS)
    expected = jax.tree.map(lambda e, g: e - g + scale * g, expected, plain)
    assert_trees_close(
        jax.tree.map(lambda g: g / max(scale, 1), gradient), jax.tree.map(lambda g: g / max(scale, 1), expected)
    )


def test_training_on_the_penalty_makes_gradients_orthogonal():
    method = optim.on_shared(cosreg(100.0), SHARED)
    update = mtjax.value_and_update(loss_fn, method)

    def step(carry, _):
        params, state = carry
        _, gradient, state = update(params, state, X)
        return (jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient), state), state.inner.penalty

    start = optim.init(method, PARAMS, num_tasks=K)
    _, penalties = jax.jit(lambda c: jax.lax.scan(step, c, length=1000))((PARAMS, start))
    assert penalties[-1] < 0.2 * penalties[0]


def test_layers_with_a_backward_pass_of_their_own():
    """Forward mode over reverse mode differentiates what the backward pass does."""

    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, ct: (2 * x * ct,))
    method = cosreg()
    _, gradient, _ = mtjax.value_and_update(lambda p: jnp.stack([square(p[0]) / 2 + p[1], p[1]]), method)(
        jnp.array([1.0, 3.0]), method.init(None)
    )
    np.testing.assert_allclose(gradient, [-4.0, 2.0], rtol=1e-6)


def test_auxiliary_outputs_and_errors():
    method = cosreg()
    with_aux = mtjax.value_and_update(lambda p, x: (loss_fn(p, x), x.sum()), method, has_aux=True)
    (losses, aux), _, _ = with_aux(PARAMS, method.init(None), X)
    assert losses.shape == (K,)
    assert aux == X.sum()
    with pytest.raises(ValueError, match=r"use mtjax\.value_and_update\(loss_fn, method\)"):
        method.update(jnp.ones((2, 3)), method.init(None))
    with pytest.raises(ValueError, match="weight must be >= 0, got -1"):
        cosreg(-1)
    with pytest.raises(ValueError, match="a method without a route of its own"):
        optim.at_representation(method)
