"""Plain JAX: an existing optax loop, changed in three lines so that no task pays for another.

A small model that predicts demand is to predict prices as well. Both read one number that a trunk computes, and the
loss of prices is a hundred times as large: descending the sum of the two makes the prediction of demand worse.
`upgrad` combines the gradients so that neither loss rises to first order.

    python experiments/outside/plain_jax.py
"""

import jax
import jax.numpy as jnp
import optax

import mtjax

TASKS = ("price", "demand")
tx = optax.chain(mtjax.optim.upgrad(), optax.sgd(0.002))


def init_params():
    """The trunk has been trained for demand; prices get a new head."""
    trunk = jnp.array([[0.0], [0.5], [0.0], [0.0]])
    return {"trunk": {"w": trunk}, "price": {"w": jnp.ones((1, 1))}, "demand": {"w": jnp.ones((1, 1))}}


def make_batch(key):
    """Demand depends on the second input, the price on the first, in small units."""
    x = jax.random.normal(key, (128, 4))
    return {"x": x, "price": 10.0 * x[:, 0], "demand": x[:, 1]}


def loss_fn(params, batch):
    hidden = batch["x"] @ params["trunk"]["w"]
    outputs = {task: (hidden @ params[task]["w"])[:, 0] for task in TASKS}
    return {task: jnp.mean((outputs[task] - batch[task]) ** 2) for task in TASKS}


@jax.jit
def train_step(params, state, batch):
    losses, jacobian = mtjax.value_and_jacobian(loss_fn)(params, batch)
    updates, state = tx.update(jacobian, state, params, losses=losses)
    return optax.apply_updates(params, updates), state, losses


def train(params, batch, steps):
    """Parameters after some steps, and the losses before each of them, f32[steps, 2]."""
    state, history = tx.init(params), []
    for _ in range(steps):
        params, state, losses = train_step(params, state, batch)
        history.append(losses)
    return params, jnp.stack(history)


if __name__ == "__main__":
    _, history = train(init_params(), make_batch(jax.random.key(0)), 300)
    print("losses (price, demand):", history[0].round(3), "->", history[-1].round(3))
