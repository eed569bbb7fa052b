"""Sections `routes` and `memory` of `objectives.py`: what the cheap routes to an update cost, and what they hold.

Letters: K tasks, P parameters, B batch, T tokens, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from objectives_measure import (
    LEARNING_RATE,
    compiled,
    in_turns,
    losses_of,
    make_network,
    method_step,
    plain_step,
    release,
    timed_step,
)

import mtjax

PyTree = Any


class Vit(NamedTuple):
    """Sizes of a small transformer encoder in the manner of a ViT, with a linear head per task on the mean token."""

    layers: int = 6
    width: int = 192
    heads: int = 3
    tokens: int = 64
    batch: int = 8
    num_tasks: int = 8
    patch: int = 48


class Block(nn.Module):
    """Pre-norm attention and MLP of four times the width; [B, T, D] -> [B, T, D]."""

    sizes: Vit

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.sizes.heads)(nn.LayerNorm()(x))
        h = nn.Dense(4 * self.sizes.width)(nn.LayerNorm()(x))
        return x + nn.Dense(self.sizes.width)(nn.gelu(h))


class Encoder(nn.Module):
    """Patches [B, T, patch] -> features [B, D]."""

    sizes: Vit

    @nn.compact
    def __call__(self, patches):
        position = self.param("position", nn.initializers.normal(0.02), (self.sizes.tokens, self.sizes.width))
        x = nn.Dense(self.sizes.width)(patches) + position[None]
        for _ in range(self.sizes.layers):
            x = Block(self.sizes)(x)
        return nn.LayerNorm()(x).mean(1)


class Vision(NamedTuple):
    """The transformer with its parameters and a batch.

    Attributes:
      loss_fn: `(params, batch) -> f32[K]`, in two stages.
      disjoint_loss_fn: `(params, batch of one task, task) -> f32[]`.
      params: {"trunk": ..., "heads": {"w": f32[D, K], "b": f32[K]}}.
      batch: {"x": f32[B, T, patch], "y": f32[B, K]}.
      batches: the same examples dealt out to the tasks: leaves [K, B / K, ...].
    """

    loss_fn: mtjax.Staged
    disjoint_loss_fn: Callable
    params: PyTree
    batch: PyTree
    batches: PyTree


def make_vision(sizes: Vit) -> Vision:
    """Random parameters, inputs and targets."""
    encoder = Encoder(sizes)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(sizes.batch, sizes.tokens, sizes.patch)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(sizes.batch, sizes.num_tasks)), jnp.float32)
    heads = {"w": rng.normal(size=(sizes.width, sizes.num_tasks)) * 0.1, "b": np.zeros(sizes.num_tasks)}

    def random_leaf(path, shape):  # compiling the real initialisation takes longer than all else here
        scale = jax.tree_util.keystr(path, simple=True, separator="/").endswith("scale")
        return np.ones(shape.shape) if scale else 0.02 * rng.normal(size=shape.shape)

    shapes = jax.eval_shape(encoder.init, jax.random.key(0), x)["params"]
    trunk = jax.tree_util.tree_map_with_path(random_leaf, shapes)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"trunk": trunk, "heads": heads})

    def encode(params, batch):
        return encoder.apply({"params": params["trunk"]}, batch["x"])

    def head_losses(params, features, batch):
        outputs = features @ params["heads"]["w"] + params["heads"]["b"][None]
        return jnp.mean((outputs - batch["y"]) ** 2, axis=0)

    def disjoint_loss_fn(params, batch, task):
        output = encode(params, batch) @ params["heads"]["w"][:, task] + params["heads"]["b"][task]
        return jnp.mean((output - batch["y"][:, task]) ** 2)

    batch = {"x": x, "y": y}
    share = max(1, sizes.batch // sizes.num_tasks)
    batches = jax.tree.map(
        lambda leaf: leaf[: share * sizes.num_tasks].reshape(sizes.num_tasks, share, *leaf.shape[1:]), batch
    )
    return Vision(mtjax.Staged(encode, head_losses), disjoint_loss_fn, params, batch, batches)


def directional_step(loss_fn: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """The plain step, with <g_k, d> of every task along its direction d."""
    derivatives = mtjax.directional_derivatives(loss_fn)

    def step(carry, batch):
        params, opt_state, _ = carry
        gradient = jax.grad(lambda p: jnp.sum(loss_fn(p, batch)))(params)
        _, along = derivatives(params, gradient, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, along

    return step


def disjoint_step(loss_fn: Callable, method: Any, optimizer: optax.GradientTransformation) -> Callable:
    """Every task on examples of its own, then the method."""
    jacobian_fn = mtjax.value_and_disjoint_jacobian(loss_fn)

    def step(carry, batches):
        params, opt_state, state = carry
        losses, jacobian = jacobian_fn(params, batches)
        gradient, state = method.update(jacobian, state, params, losses=losses)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    return step


def times(sizes: Vit, *, turns: int, seconds: float, say: Callable[[str], None]) -> list[dict]:
    """Steps of the transformer by each route; MGDA is the method where there is one."""
    vision = make_vision(sizes)
    adam, mgda = optax.adam(LEARNING_RATE), mtjax.optim.mgda()
    plain = (vision.params, adam.init(vision.params))
    at_features = mtjax.optim.at_representation(mgda)

    def with_state(method):
        return (*plain, mtjax.optim.init(method, vision.params, num_tasks=sizes.num_tasks))

    along = (*plain, jnp.zeros((sizes.num_tasks,)))
    functions = [
        timed_step("plain sum", plain_step(vision.loss_fn, adam), plain, vision.batch),
        timed_step("parameters", method_step(vision.loss_fn, mgda, adam), with_state(mgda), vision.batch),
        timed_step(
            "representation", method_step(vision.loss_fn, at_features, adam), with_state(at_features), vision.batch
        ),
        timed_step("directional", directional_step(vision.loss_fn, adam), along, vision.batch),
        timed_step("disjoint", disjoint_step(vision.disjoint_loss_fn, mgda, adam), with_state(mgda), vision.batches),
    ]
    results = in_turns(functions, turns=turns, seconds=seconds, target=0.3)
    base = results["plain sum"]["ms"]
    num_params = sum(leaf.size for leaf in jax.tree.leaves(vision.params))
    rows = [
        {"route": name, "tasks": sizes.num_tasks, "params": num_params, **result}
        | {"multiple": round(result["ms"] / base, 3)}
        for name, result in results.items()
    ]
    say("routes: " + ", ".join(f"{row['route']} {row['ms']} ms ({row['multiple']}x)" for row in rows))
    release()
    return rows


def memory(width: int, layers: int, *, say: Callable[[str], None], num_tasks: int = 8) -> list[dict]:
    """Temporary memory of the whole step by each route, as the compiler plans it."""
    network = make_network(num_tasks, width, hidden=layers)
    params, batch = jax.tree.map(jnp.asarray, (network.params, network.batch()))
    adam, mgda = optax.adam(LEARNING_RATE), mtjax.optim.mgda()
    plain = (params, adam.init(params))
    carry = (*plain, mtjax.optim.init(mgda, params, num_tasks=num_tasks))

    def jacobian_step(carry, batch):
        params, opt_state, state = carry
        losses, jacobian = mtjax.value_and_jacobian(losses_of)(params, batch)
        gradient, state = mgda.update(jacobian, state, params, losses=losses)
        updates, opt_state = adam.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    programs = {
        "plain sum": (plain_step(losses_of, adam), plain),
        "Jacobian": (jacobian_step, carry),
        "weighted": (method_step(losses_of, mgda, adam), carry),
        "weighted, chunk_size=1": (method_step(losses_of, mgda, adam, chunk_size=1), carry),
    }
    rows = []
    for name, (step, start) in programs.items():
        stats = compiled(step, start, batch, donate=(0,))[0].memory_analysis()
        temporary, held = stats.temp_size_in_bytes, stats.argument_size_in_bytes + stats.output_size_in_bytes
        rows.append(
            {
                "route": name,
                "tasks": num_tasks,
                "params": network.num_params,
                "params_mb": _mb(4 * network.num_params),
                "temporary_mb": _mb(temporary),
                "peak_mb": _mb(temporary + held - stats.alias_size_in_bytes),
            }
        )
    say("memory: " + ", ".join(f"{row['route']} {row['temporary_mb']:.1f} MB" for row in rows))
    release()
    return rows


def _mb(size: float) -> float:
    return round(size / 1e6, 3)
