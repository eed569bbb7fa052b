"""experiments/outside: mtjax in loops of other libraries' models. All of them are one network, so all agree."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax

FOLDER = pathlib.Path(__file__).parent.parent / "experiments" / "outside"
STEPS = 60


@functools.cache
def script(name):
    spec = importlib.util.spec_from_file_location(f"outside_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def batch():
    return script("plain_jax").make_batch(jax.random.key(0))


@functools.cache
def plain():
    plain_jax = script("plain_jax")
    return plain_jax.train(plain_jax.init_params(), batch(), STEPS)


def leaves_of(params):
    """The weights of plain parameters."""
    return [np.asarray(params[name]["w"]) for name in ("trunk", "price", "demand")]


def assert_same(history, leaves):
    params, expected = plain()
    np.testing.assert_allclose(history, expected, rtol=1e-5)
    for leaf, other in zip(leaves, leaves_of(params), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)


def test_the_tasks_conflict_and_the_sum_makes_one_of_them_pay():
    plain_jax = script("plain_jax")
    params, loss_fn = plain_jax.init_params(), plain_jax.loss_fn
    _, jacobian = mtjax.value_and_jacobian(loss_fn)(params, batch())
    assert mtjax.conflict(jacobian).share == 1.0

    @jax.jit
    def plain_step(params):
        gradient = jax.grad(lambda p: sum(loss_fn(p, batch()).values()))(params)
        return jax.tree.map(lambda p, g: p - 0.002 * g, params, gradient)

    before = loss_fn(params, batch())
    for _ in range(STEPS):
        params = plain_step(params)
    after = loss_fn(params, batch())
    assert after["price"] < before["price"] and after["demand"] > 1.5 * before["demand"]


def test_plain_jax_improves_both_tasks():
    history = np.asarray(plain()[1])
    assert (history[-1] < 0.95 * history[0]).all()
    assert (history <= history[0] * (1 + 1e-6)).all()  # at no time is a task worse off than at the start


def test_nnx_takes_the_same_steps():
    nnx = pytest.importorskip("flax.nnx")
    module = script("nnx_model")
    model = module.Model(nnx.Rngs(0))
    layers = [model.trunk, model.price, model.demand]
    for layer, name in zip(layers, ("trunk", "price", "demand"), strict=True):
        layer.kernel[...] = script("plain_jax").init_params()[name]["w"]
    model, history = module.train(model, batch(), STEPS)
    assert_same(history, [layer.kernel[...] for layer in layers])


def test_equinox_takes_the_same_steps():
    eqx = pytest.importorskip("equinox", reason="the example needs Equinox: pip install equinox")
    module = script("equinox_model")
    model = module.Model(jax.random.key(0))
    start = [jnp.asarray(leaf) for leaf in leaves_of(script("plain_jax").init_params())]

    def where(model):
        return [layer.weight for layer in (model.trunk, model.price, model.demand)]

    model = eqx.tree_at(where, model, [leaf.T for leaf in start])
    model, history = module.train(model, batch(), STEPS)
    assert_same(history, [leaf.T for leaf in where(model)])


def test_haiku_parameters_take_the_same_steps_as_plain_ones_under_on_shared():
    module, plain_jax = script("haiku_params"), script("plain_jax")
    start = {f"model/~/{name}": leaf for name, leaf in plain_jax.init_params().items()}
    params, history = module.train(start, batch(), STEPS)
    history = np.asarray(history)
    assert (history[-1] < 0.95 * history[0]).all() and (history <= history[0] * (1 + 1e-6)).all()

    tx = optax.chain(mtjax.optim.on_shared(mtjax.optim.upgrad()), optax.sgd(0.002))  # finds the heads in the Jacobian
    expected = plain_jax.init_params()

    @jax.jit
    def step(params, state):
        losses, jacobian = mtjax.value_and_jacobian(plain_jax.loss_fn)(params, batch())
        updates, state = tx.update(jacobian, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    state = tx.init(expected)
    for _ in range(STEPS):
        expected, state = step(expected, state)
    renamed = {name.removeprefix("model/~/"): leaf for name, leaf in params.items()}
    for leaf, other in zip(leaves_of(renamed), leaves_of(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)
