"""What `moe.py` times: mixtures of experts and the dense network that costs as many multiply-adds.

A token pays K experts of hidden width H, 2 K D H multiply-adds, as much as in a dense network of hidden width K H.

Letters: N tokens, D width, H hidden width, E experts, K experts per token, S seeds.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from operators_measure import Timed

from mtjax.nn.moe import Dispatch, gelu, moe_apply


class Shape(NamedTuple):
    """A layer and its batch."""

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int


A = Shape("A", 2048, 192, 384, 16, 2)
B = Shape("B", 2048, 192, 192, 16, 4)
C = Shape("C", 1024, 64, 64, 16, 4)
SMALL = tuple(Shape(f"C, {tokens} tokens", tokens, 64, 64, 16, 4) for tokens in (8, 64, 256))

DENSE = "dense MLP of width K H"
BACKENDS: dict[str, Dispatch] = {
    "auto": Dispatch(),
    "capacity_overflow": Dispatch("capacity_overflow"),
    "sort_capacity 1.25": Dispatch("sort_capacity"),
    "sort_capacity 2.0": Dispatch("sort_capacity", capacity_factor=2.0),
    "block_dropless": Dispatch("block_dropless"),
    "block_dropless 32": Dispatch("block_dropless", block=32),
    "einsum_capacity 1.25, 8 groups": Dispatch("einsum_capacity", groups=8),
    "ragged": Dispatch("ragged"),
    "all_experts": Dispatch("all_experts"),
}
DROPLESS = ("auto", "block_dropless", "ragged", "all_experts")


def layer(shape: Shape, *, seed: int = 0, skew: float = 0.0):
    """x, gate values, gate ids, expert parameters; `skew` is the standard deviation of the experts' popularity."""
    rng = np.random.default_rng(seed)

    def draw(*size):
        return rng.normal(size=size).astype(np.float32)

    logits = draw(shape.tokens, shape.experts) + skew * draw(1, shape.experts)
    values, ids = jax.lax.top_k(jax.nn.softmax(logits), shape.top_k)
    params = {
        "kernel_in": draw(shape.experts, shape.width, shape.hidden) * shape.width**-0.5,
        "bias_in": draw(shape.experts, shape.hidden),
        "kernel_out": draw(shape.experts, shape.hidden, shape.width) * shape.hidden**-0.5,
        "bias_out": draw(shape.experts, shape.width),
    }
    return jax.tree.map(jnp.asarray, (draw(shape.tokens, shape.width), values, ids, params))


def network(shape: Shape, *, seed: int = 0):
    """x and parameters of the dense network."""
    wide = shape._replace(experts=1, hidden=shape.top_k * shape.hidden, top_k=1)
    x, _, _, params = layer(wide, seed=seed)
    return x, jax.tree.map(lambda leaf: leaf[0], params)


def dense(x, params):
    hidden = gelu(x @ params["kernel_in"] + params["bias_in"][None])
    return hidden @ params["kernel_out"] + params["bias_out"][None]


def sparse(dispatch: Dispatch) -> Callable:
    return lambda *args: moe_apply(*args, dispatch=dispatch).y


def with_gradient(function: Callable, argnums: tuple[int, ...]) -> Callable:
    """The gradient of the sum of squares by everything that is not an index."""
    return jax.grad(lambda *args: jnp.sum(jnp.square(function(*args))), argnums=argnums)


def cases(
    shape: Shape, names, *, backward: bool, seeds: int = 1, skew: float = 0.0, seconds: float = 0.03
) -> list[Timed]:
    """The dense network and the mixtures `names`, compiled.

    Args:
      shape: sizes.
      names: keys of `BACKENDS`.
      backward: whether gradients are taken, too.
      seeds: S; with more than one, functions are vmapped over data and parameters of S seeds.
      skew: how unevenly experts are used.
      seconds: a turn repeats the function until it takes about that long.
    """
    found = []
    for name in (DENSE, *names):
        make = network if name == DENSE else layer
        function = dense if name == DENSE else sparse(BACKENDS[name])
        options = {} if name == DENSE else {"skew": skew}
        if backward:
            function = with_gradient(function, (0, 1) if name == DENSE else (0, 1, 3))
        arguments = make(shape, **options)
        if seeds > 1:
            function = jax.vmap(function)
            arguments = jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *(make(shape, seed=seed, **options) for seed in range(seeds))
            )
        found.append(timed(name, function, arguments, seconds))
    return found


def compile_seconds(function: Callable, arguments: tuple) -> float:
    """Seconds of tracing and compiling; arguments may be abstract."""
    began = time.perf_counter()
    jax.jit(function).lower(*arguments).compile()
    return time.perf_counter() - began


def timed(name: str, function: Callable, arguments: tuple, seconds: float) -> Timed:
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_s = time.perf_counter() - began

    def run(repeat: int):
        for _ in range(repeat):
            out = compiled(*arguments)
        return jax.block_until_ready(out)

    run(1)
    began = time.perf_counter()
    run(1)
    work = max(1, int(seconds / (time.perf_counter() - began)))
    return Timed(name, lambda: run(work), work, compile_s)


def dropped(shape: Shape, name: str, *, skew: float = 0.0) -> float:
    """Share of the assignments that a dispatch drops."""
    kept = jax.jit(lambda *args: moe_apply(*args, dispatch=BACKENDS[name]).kept)(*layer(shape, skew=skew))
    return round(float(1 - np.mean(kept)), 4)
