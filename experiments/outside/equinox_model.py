"""Equinox: partition the model into its arrays and the rest, and differentiate with respect to the arrays.

pip install equinox && python experiments/outside/equinox_model.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import mtjax

TASKS = ("price", "demand")  # of the losses: jax.vmap gives dicts back with sorted names
tx = optax.chain(mtjax.optim.upgrad(), optax.sgd(0.002))


class Model(eqx.Module):
    """The network of plain_jax.py, for one example."""

    trunk: eqx.nn.Linear
    price: eqx.nn.Linear
    demand: eqx.nn.Linear

    def __init__(self, key):
        trunk, price, demand = jax.random.split(key, 3)
        self.trunk = eqx.nn.Linear(4, 1, use_bias=False, key=trunk)
        self.price = eqx.nn.Linear(1, 1, use_bias=False, key=price)
        self.demand = eqx.nn.Linear(1, 1, use_bias=False, key=demand)

    def __call__(self, x):
        hidden = self.trunk(x)
        return {"price": self.price(hidden)[0], "demand": self.demand(hidden)[0]}


def make_step(static):
    """A training step on the arrays of the model."""

    def loss_fn(params, batch):
        outputs = jax.vmap(eqx.combine(params, static))(batch["x"])
        return {task: jnp.mean((outputs[task] - batch[task]) ** 2) for task in TASKS}

    @jax.jit
    def train_step(params, state, batch):
        losses, jacobian = mtjax.value_and_jacobian(loss_fn)(params, batch)
        updates, state = tx.update(jacobian, state, params, losses=losses)
        return eqx.apply_updates(params, updates), state, losses

    return train_step


def train(model, batch, steps):
    """The trained model, and the losses before each step, f32[steps, 2]."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    train_step, state, history = make_step(static), tx.init(params), []
    for _ in range(steps):
        params, state, losses = train_step(params, state, batch)
        history.append(losses)
    return eqx.combine(params, static), jnp.stack(history)


if __name__ == "__main__":
    from plain_jax import make_batch

    _, history = train(Model(jax.random.key(0)), make_batch(jax.random.key(0)), 300)
    print("losses (price, demand):", history[0].round(3), "->", history[-1].round(3))
