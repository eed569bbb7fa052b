"""What the sections of `objectives.py` share: the network on both sides, and timing in turns.

Letters: K tasks, P parameters, B batch.
"""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtjax

PyTree = Any
INPUTS = 64
BATCH = 96  # divides by 2 and 3: some methods cut a batch into independent ones
# The optimiser of both sides. The steps are small: all turns see about the same gradients.
LEARNING_RATE = 1e-5


class Network(NamedTuple):
    """A shared MLP with ReLU and K outputs, every parameter shared by all tasks, and a batch; NumPy arrays.

    Attributes:
      params: [{"w": f32[n, m], "b": f32[m]}, ...], first layer first.
      x: f32[B, 64].
      y: f32[B, K]; the loss of task k is the mean squared error of output k.
    """

    params: list[dict[str, np.ndarray]]
    x: np.ndarray
    y: np.ndarray

    @property
    def num_tasks(self) -> int:
        return self.y.shape[1]

    @property
    def num_params(self) -> int:
        return sum(leaf.size for layer in self.params for leaf in layer.values())

    @property
    def width(self) -> int:
        return self.params[0]["w"].shape[1]

    def batch(self) -> dict[str, np.ndarray]:
        return {"x": self.x, "y": self.y}


def make_network(num_tasks: int, width: int, hidden: int = 4, batch: int = BATCH) -> Network:
    """`hidden` hidden layers of `width` units, He initialisation, random inputs and targets."""
    rng = np.random.default_rng(0)
    sizes = [INPUTS, *[width] * hidden, num_tasks]
    params = [
        {
            "w": (rng.normal(size=(n, m)) * math.sqrt(2 / n)).astype(np.float32),
            "b": np.zeros(m, np.float32),
        }
        for n, m in itertools.pairwise(sizes)
    ]
    x, y = (rng.normal(size=(batch, size)).astype(np.float32) for size in (INPUTS, num_tasks))
    return Network(params, x, y)


def width_for(num_params: float, num_tasks: int, hidden: int = 4) -> int:
    """The width whose network has about `num_params` parameters.

    >>> width_for(1e6, 8), make_network(8, width_for(1e6, 8)).num_params
    (565, 1000623)
    """
    square, linear, constant = hidden - 1, INPUTS + hidden + num_tasks, num_tasks - num_params
    return round((-linear + math.sqrt(linear**2 - 4 * square * constant)) / (2 * square))


def losses_of(params: PyTree, batch: dict[str, jax.Array]) -> jax.Array:
    """f32[K], mean squared error of each output."""
    h = batch["x"]
    for index, layer in enumerate(params):
        h = h @ layer["w"] + layer["b"][None]
        h = jax.nn.relu(h) if index < len(params) - 1 else h
    return jnp.mean((h - batch["y"]) ** 2, axis=0)


# Steps of mtjax. Each is `(carry, batch) -> carry`, with everything that changes in the carry.


def plain_step(loss_fn: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """Gradient of the summed losses, then the optimiser."""

    def step(carry, batch):
        params, opt_state = carry
        gradient = jax.grad(lambda p: total(loss_fn(p, batch)))(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def total(losses: Any) -> jax.Array:
    """Sum of a dict of scalars or of f[K]."""
    return sum(losses.values()) if isinstance(losses, dict) else jnp.sum(losses)


def method_step(
    loss_fn: Callable, method: Any, optimizer: optax.GradientTransformation, chunk_size: int | None = None
) -> Callable:
    """A method's update by its cheapest route, then the optimiser."""
    update = mtjax.value_and_update(loss_fn, method, chunk_size=chunk_size)

    def step(carry, batch):
        params, opt_state, state = carry
        _, gradient, state = update(params, state, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        if mtjax.optim.observes(method):
            state = mtjax.optim.observe(method, state, loss_fn(params, batch))
        return params, opt_state, state

    return step


# Timing.


class Timed(NamedTuple):
    """Something to be timed.

    Attributes:
      name: key of its result.
      run: runs it n times and returns the seconds.
      compile_s: of tracing and compiling; None where nothing is compiled.
    """

    name: str
    run: Callable[[int], float]
    compile_s: float | None = None


def compiled(function: Callable, *args: PyTree, donate: Sequence[int] = ()) -> tuple[Any, float]:
    """Compiles for these arguments, past any cache; returns the program and the seconds it took."""
    began = time.perf_counter()
    program = jax.jit(function, donate_argnums=tuple(donate)).lower(*args).compile()
    return program, time.perf_counter() - began


def timed_step(name: str, step: Callable, carry: PyTree, batch: PyTree) -> Timed:
    """A step `(carry, batch) -> carry` on a copy of `carry` of its own, which is donated as in training."""
    program, seconds = compiled(step, carry, batch, donate=(0,))
    holder = [jax.tree.map(jnp.copy, carry)]

    def run(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            holder[0] = program(holder[0], batch)
        jax.block_until_ready(holder[0])
        return time.perf_counter() - began

    return Timed(name, run, seconds)


def timed_call(name: str, function: Callable, *args: PyTree) -> Timed:
    """A pure function of fixed arguments, whose results are dropped."""
    program, seconds = compiled(function, *args)

    def run(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(program(*args))
        return time.perf_counter() - began

    return Timed(name, run, seconds)


def in_turns(functions: Iterable[Timed], *, turns: int, seconds: float, target: float = 0.04) -> dict[str, dict]:
    """Times functions in turns.

    A turn of a function is as many runs as fit in `target` seconds, after one that is not counted. All functions have
    their first turn before any has its second, so that what disturbs the machine for a while disturbs all of them.

    Args:
      functions: what to time.
      turns: at most; a function stops earlier (after one) when it has had `seconds` in all.
      seconds: see `turns`.
      target: length of a turn.

    Returns:
      name -> {"ms": median over turns of the time of one run, "range": [smallest, largest], "turns", "compile_s"}.
    """
    functions = list(functions)
    runs, spent, times = {}, {}, {f.name: [] for f in functions}
    for f in functions:
        first = f.run(1)
        once = f.run(1) if first < 1 else first
        runs[f.name], spent[f.name] = max(1, min(200, int(target / once))), first
    for _ in range(turns):
        for f in functions:
            if times[f.name] and spent[f.name] > seconds:
                continue
            time.sleep(0.002)  # worker threads of the other side spin for a while after their work
            if runs[f.name] > 1:
                f.run(1)
            taken = f.run(runs[f.name])
            times[f.name].append(taken / runs[f.name])
            spent[f.name] += taken
    return {
        f.name: {
            "ms": _ms(statistics.median(times[f.name])),
            "range": [_ms(min(times[f.name])), _ms(max(times[f.name]))],
            "turns": len(times[f.name]),
            "compile_s": None if f.compile_s is None else round(f.compile_s, 2),
        }
        for f in functions
    }


def _ms(seconds: float) -> float:
    return float(f"{1e3 * seconds:.4g}")


def release() -> None:
    """Frees what the last cell held, before the next one is built."""
    gc.collect()
