r"""A training step of the Cartesian DeepONet for `operators.py`: as it is written, and with its products fused.

Both nets end in a linear map, u = (G V + c) (H W + d)^T + b0 with hidden activations G f[B, v] and H f[N, w] of branch
and trunk. As written this makes the N x p basis, then the B x N field from it. *Fused*, the two maps are multiplied
first,

    u = G~ M H^T + (G~ m + b0) 1^T,     G~ = [G, 1],  M = [V; c] W^T f[v + 1, w],  m = [V; c] d f[v + 1],

so that the trunk's last map at all points (N w p) and the sum over p functions (B N p) become one product (B N w). The
parameters, the function, the loss and the gradient are the same; only the order of summation differs. It pays where
p > w, or where N is large; half of the arithmetic of the Fisher network goes. `mtjax.models.DeepONet` does this where
it is less work.

By hand, the gradient of the fused loss is written out too: with r = u - y and the mean over all B N entries, dL/dA =
2 r H / (B N) for A = G~ M, and dL/dH = 2 r^T A / (B N). Points are taken in chunks whose activations stay in the cache;
the gradients of chunks add up.

Letters: B functions, N points, d coordinates, p basis functions, v and w last hidden widths of branch and trunk.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from operators_measure import Timed

from mtjax.models.deeponet import DeepONet
from mtjax.nn.operator_layers import MLP

PyTree = Any
LEARNING_RATE = 1e-4  # small: all turns see about the same gradients
LEAK = 0.2  # of leaky ReLU, as published
ACTIVATIONS: dict[str, Callable] = {
    "leaky_relu": functools.partial(nn.leaky_relu, negative_slope=LEAK),
    "tanh": jnp.tanh,
    "gelu": nn.gelu,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A network and its data.

    Attributes:
      name: of the cell.
      branch, trunk: widths, the input's first.
      activations: names of the branch's and the trunk's.
      functions, points: B, N.
      chunk: points at a time in the fused step; None: all.
    """

    name: str
    branch: tuple[int, ...]
    trunk: tuple[int, ...]
    activations: tuple[str, str]
    functions: int
    points: int
    chunk: int | None = None

    def model(self, *, active_output: bool = False) -> DeepONet:
        """The library's network; with `active_output` the trunk's activation also follows its last map."""
        branch, trunk = (ACTIVATIONS[name] for name in self.activations)
        return DeepONet(
            branch=MLP(self.branch[1:], branch),
            trunk=MLP(self.trunk[1:], trunk, output_activation=trunk if active_output else None),
        )

    def batch(self) -> dict[str, np.ndarray]:
        """Random inputs and targets, points in the unit cube."""
        rng = np.random.default_rng(0)
        return {
            "inputs": rng.normal(size=(self.functions, self.branch[0])).astype(np.float32),
            "points": rng.uniform(size=(self.points, self.trunk[0])).astype(np.float32),
            "values": rng.normal(size=(self.functions, self.points)).astype(np.float32),
        }

    def params(self) -> PyTree:
        """Glorot initialisation, biases random (zeros would hide a mistake), NumPy."""
        shapes = jax.eval_shape(self.model().init, jax.random.key(0), self.batch())["params"]
        rng = np.random.default_rng(1)

        def draw(leaf):
            std = np.sqrt(2 / sum(leaf.shape)) if leaf.ndim == 2 else 0.1
            return (std * rng.normal(size=leaf.shape)).astype(np.float32)

        return jax.tree.map(draw, shapes)


FISHER = Size("Fisher", (68, 128, 128, 300), (2, 128, 128, 128, 300), ("leaky_relu", "leaky_relu"), 200, 1280)
DARCY = Size("Darcy", (2048, 128, 128, 150), (2, 128, 128, 128, 150), ("tanh", "leaky_relu"), 100, 4096, chunk=512)
FISHER_GELU = dataclasses.replace(FISHER, name="Fisher, GELU", activations=("gelu", "gelu"))


def multiply_adds(size: Size, *, fused: bool) -> int:
    """Of a training step's matrix products: forward, gradient of weights, gradient of inputs (but of first layers).

    >>> multiply_adds(Size("", (3, 5, 7), (2, 5, 7), ("tanh", "tanh"), 10, 20), fused=False)
    8050
    """
    total = 0
    for rows, widths in ((size.functions, size.branch), (size.points, size.trunk)):
        layers = list(itertools.pairwise(widths))
        for layer, (inner, outer) in enumerate(layers[:-1] if fused else layers):
            total += (2 if layer == 0 else 3) * rows * inner * outer
    v, w, p = size.branch[-2] + 1, size.trunk[-2], size.trunk[-1]
    if fused:
        return total + 3 * (v * p * w + size.functions * v * w + size.functions * size.points * w)
    return total + 3 * size.functions * size.points * p


# Loss and gradient, (params, data) -> (loss, gradient), and what they read of a batch.


def library(model: DeepONet) -> Callable:
    """Mean squared error of the library's network, which fuses the products itself, differentiated by JAX."""

    def loss_fn(params, batch):
        return jnp.mean((model.apply({"params": params}, batch, train=True)["u"] - batch["values"]) ** 2)

    return jax.value_and_grad(loss_fn)


def written(model: DeepONet) -> Callable:
    """The same as the formula is written: the basis at all points, then the field from it."""

    def loss_fn(params, batch):
        coefficients = model.apply({"params": params}, batch, train=True, method="encode")
        basis = model.apply({"params": params}, batch["points"], train=True, method="basis")
        u = model.apply({"params": params}, coefficients, basis, batch, method="combine")
        return jnp.mean((u - batch["values"]) ** 2)

    return jax.value_and_grad(loss_fn)


def fused(model: DeepONet) -> Callable:
    """The same with products fused, gradient and chunks of points by hand; reads `chunked` batches."""

    def value_and_grad(params, batch):
        trunk = {name: layer for name, layer in params["trunk"].items() if name != "out"}
        (coefficients, offsets), to_params = jax.vjp(
            lambda params: fused_coefficients(model, params, batch["inputs"]), params
        )
        scale = 2 / batch["values"].size
        scaled = scale * coefficients

        def chunk(sums, part):
            hidden, to_trunk = jax.vjp(lambda trunk: hidden_layers(model.trunk, trunk, part["points"]), trunk)
            residual = hidden @ coefficients.T + offsets[None, :] - part["values"]  # [n, B]
            gradients = residual.T @ hidden, residual.sum(0), to_trunk(residual @ scaled)[0]
            return jax.tree.map(jnp.add, sums, ((residual**2).sum(), *gradients)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), coefficients, offsets, trunk))
        parts = {name: batch[name] for name in ("points", "values")}
        (squares, for_coefficients, for_offsets, for_trunk), _ = jax.lax.scan(chunk, zeros, parts)
        (gradient,) = to_params((scale * for_coefficients, scale * for_offsets))
        hidden = {name: jax.tree.map(jnp.add, gradient["trunk"][name], layer) for name, layer in for_trunk.items()}
        return squares / batch["values"].size, gradient | {"trunk": gradient["trunk"] | hidden}

    return value_and_grad


def fused_coefficients(model: DeepONet, params: PyTree, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A = G~ M f[B, w] and G~ m + b0 f[B]."""
    left, right = params["branch"]["out"], params["trunk"]["out"]
    left = jnp.concatenate([left["kernel"], left["bias"][None, :]])
    middle, shift = left @ right["kernel"].T, left @ right["bias"]
    hidden = hidden_layers(model.branch, params["branch"], inputs)
    return hidden @ middle[:-1] + middle[-1:], hidden @ shift[:-1] + shift[-1] + params["bias"][0]


def hidden_layers(net: MLP, params: PyTree, x: jax.Array) -> jax.Array:
    """The activations before an MLP's last map."""
    for layer in range(len(net.features) - 1):
        x = net.activation(x @ params[f"dense_{layer}"]["kernel"] + params[f"dense_{layer}"]["bias"][None, :])
    return x


def chunked(batch: dict[str, np.ndarray], chunk: int | None = None) -> dict[str, np.ndarray]:
    """A batch for `fused`: points f[parts, n, d] and, points first, values f[parts, n, B].

    Raises:
      ValueError: if `chunk` does not divide the number of points.
    """
    count = len(batch["points"])
    chunk = count if chunk is None else chunk
    if count % chunk:
        raise ValueError(f"chunk={chunk} must divide the number of points, {count}")
    values = np.ascontiguousarray(batch["values"].T).reshape(count // chunk, chunk, -1)
    return batch | {"points": batch["points"].reshape(count // chunk, chunk, -1), "values": values}


def frozen_trunk(model: DeepONet, params: PyTree, batch: dict) -> tuple[Callable, dict]:
    """Only the branch trains; the trunk's values on the grid are computed once. Loss and gradient, and its batch."""
    basis = model.apply({"params": params}, batch["points"], method="basis")
    trunk = params["trunk"]

    def loss_fn(params, batch):
        variables = {"params": params | {"trunk": trunk}}
        coefficients = model.apply(variables, batch, train=True, method="encode")
        u = model.apply(variables, coefficients, batch["basis"], batch, method="combine")
        return jnp.mean((u - batch["values"]) ** 2)

    return jax.value_and_grad(loss_fn), {name: batch[name] for name in ("inputs", "values")} | {"basis": basis}


def timed_training(
    name: str, value_and_grad: Callable, params: PyTree, batch: dict, *, steps: int, scan: bool, seeds: int = 1
) -> Timed:
    """Steps of Adam from `params`, the state donated.

    Args:
      name: of the result.
      value_and_grad: (params, batch) -> (loss, gradient).
      params: where to start.
      batch: the same in every step.
      steps: of a run.
      scan: all steps in one program; else a program for each.
      seeds: so many networks at once by vmap; a unit of work is then a step of one of them.
    """
    adam = optax.adam(LEARNING_RATE)

    def step(carry, batch):
        params, state = carry
        loss, gradient = value_and_grad(params, batch)
        updates, state = adam.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    step = step if seeds == 1 else jax.vmap(step, in_axes=(0, None))

    def program(carry, batch):
        if not scan:
            return step(carry, batch)
        return jax.lax.scan(lambda carry, _: step(carry, batch), carry, None, length=steps)

    params, batch = jax.tree.map(jnp.array, (params, batch))
    carry = params, adam.init(params)
    if seeds > 1:
        carry = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), carry)
    began = time.perf_counter()
    compiled = jax.jit(program, donate_argnums=0).lower(carry, batch).compile()
    compile_s = time.perf_counter() - began
    holder = [carry]

    def run():
        for _ in range(1 if scan else steps):
            holder[0], loss = compiled(holder[0], batch)
        return jax.block_until_ready((holder[0], loss))

    return Timed(name, run, steps * seeds, compile_s, traffic(compiled, seeds))


def traffic(compiled: Any, seeds: int = 1) -> float | None:
    """Bytes that a compiled program reads and writes for one of its seeds; XLA counts the body of a loop once."""
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    count = (analysis or {}).get("bytes accessed")
    return None if count is None else count / seeds
