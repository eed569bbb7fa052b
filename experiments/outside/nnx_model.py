"""Flax NNX: split the model into a graph and its parameters; the transforms take the parameters like any pytree.

python experiments/outside/nnx_model.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mtjax

TASKS = ("price", "demand")
tx = optax.chain(mtjax.optim.upgrad(), optax.sgd(0.002))


class Model(nnx.Module):
    """The network of plain_jax.py."""

    def __init__(self, rngs):
        self.trunk = nnx.Linear(4, 1, use_bias=False, rngs=rngs)
        self.price = nnx.Linear(1, 1, use_bias=False, rngs=rngs)
        self.demand = nnx.Linear(1, 1, use_bias=False, rngs=rngs)

    def __call__(self, x):
        hidden = self.trunk(x)
        return {"price": self.price(hidden)[:, 0], "demand": self.demand(hidden)[:, 0]}


def make_step(graph):
    """A training step on the parameters; what else the model holds (statistics, keys) would be a third part."""

    def loss_fn(params, batch):
        outputs = nnx.merge(graph, params)(batch["x"])
        return {task: jnp.mean((outputs[task] - batch[task]) ** 2) for task in TASKS}

    @jax.jit
    def train_step(params, state, batch):
        losses, jacobian = mtjax.value_and_jacobian(loss_fn)(params, batch)
        updates, state = tx.update(jacobian, state, params, losses=losses)
        return optax.apply_updates(params, updates), state, losses

    return train_step


def train(model, batch, steps):
    """The trained model, and the losses before each step, f32[steps, 2]."""
    graph, params = nnx.split(model, nnx.Param)
    train_step, state, history = make_step(graph), tx.init(params), []
    for _ in range(steps):
        params, state, losses = train_step(params, state, batch)
        history.append(losses)
    nnx.update(model, params)
    return model, jnp.stack(history)


if __name__ == "__main__":
    from plain_jax import make_batch

    _, history = train(Model(nnx.Rngs(0)), make_batch(jax.random.key(0)), 300)
    print("losses (price, demand):", history[0].round(3), "->", history[-1].round(3))
