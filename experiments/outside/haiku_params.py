"""Haiku-style parameters, {'model/~/trunk': {'w': ...}}: `on_shared` tells trunk and heads apart by these paths.

`apply` stands for what `hk.without_apply_rng(hk.transform(...))` returns; Haiku itself is not needed here.

    python experiments/outside/haiku_params.py
"""

import jax
import jax.numpy as jnp
import optax

import mtjax

TASKS = ("price", "demand")
# The rule sees the trunk alone; each head follows its own task, as in the papers.
method = mtjax.optim.on_shared(mtjax.optim.upgrad(), lambda path: path.startswith("model/~/trunk"))
tx = optax.chain(method, optax.sgd(0.002))


def linear(params, name, x):
    return x @ params[f"model/~/{name}"]["w"]


def apply(params, x):
    """The network of plain_jax.py."""
    hidden = linear(params, "trunk", x)
    return {task: linear(params, task, hidden)[:, 0] for task in TASKS}


def loss_fn(params, batch):
    outputs = apply(params, batch["x"])
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
    from plain_jax import init_params, make_batch

    params = {f"model/~/{name}": leaf for name, leaf in init_params().items()}
    _, history = train(params, make_batch(jax.random.key(0)), 300)
    print("losses (price, demand):", history[0].round(3), "->", history[-1].round(3))
