"""The state of a training run: one pytree that holds all that a resumed run needs.

Letters: L lanes (runs trained at once by vmap), G selection groups (1, or one per task), K tasks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtjax import sharding
from mtjax.optim import base

PyTree = Any
OptimizerFactory = Callable[[jax.Array], optax.GradientTransformation]


@flax.struct.dataclass
class Best:
    """The best parameters so far, by validation score, for each selection group.

    Attributes:
      params: leaves with a leading axis G.
      score: f32[G], -inf before the first evaluation.
      step: i32[G], step of the best score.
      stale: i32[G], evaluations since then.
    """

    params: PyTree
    score: jax.Array
    step: jax.Array
    stale: jax.Array


@flax.struct.dataclass
class TrainState:
    """One training run.

    Attributes:
      step: i32[], updates made.
      params: model parameters.
      opt_state: state of the optax optimiser.
      method_state: state of the multi-objective method.
      rng: base key of the run; step t uses fold_in(rng, t).
      learning_rate: f32[], kept here so that runs with different rates share one compiled step.
      best: see `Best`.
      carry: what the losses carry from step to step (`Problem.init_carry`); () if nothing.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    method_state: PyTree
    rng: jax.Array
    learning_rate: jax.Array
    best: Best
    carry: PyTree = ()

    @classmethod
    def create(
        cls,
        init_params: Callable[[jax.Array], PyTree],
        method: base.Method,
        optimizer: OptimizerFactory,
        seed: jax.Array,
        learning_rate: jax.Array,
        *,
        num_tasks: int,
        num_groups: int = 1,
        start: PyTree | None = None,
        init_carry: Callable[[], PyTree] | None = None,
    ) -> "TrainState":
        """A fresh run, from the parameters `start` if given; jit and vmap over `seed`, `learning_rate` and `start`."""
        init_key, run_key = jax.random.split(jax.random.key(seed))
        params = init_params(init_key) if start is None else start
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer(learning_rate).init(params),
            method_state=own_keys(base.init(method, params, num_tasks=num_tasks), seed),
            rng=run_key,
            learning_rate=jnp.asarray(learning_rate, jnp.float32),
            best=Best(
                params=jax.tree.map(lambda leaf: jnp.repeat(leaf[None], num_groups, axis=0), params),
                score=jnp.full((num_groups,), -jnp.inf, jnp.float32),
                step=jnp.zeros((num_groups,), jnp.int32),
                stale=jnp.zeros((num_groups,), jnp.int32),
            ),
            carry=() if init_carry is None else jax.tree.map(jnp.asarray, init_carry()),
        )


def own_keys(state: PyTree, seed: jax.Array) -> PyTree:
    """The state with the seed folded into its PRNG keys: lanes of a random method draw apart."""

    def fold(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(leaf, seed) if is_key and leaf.ndim == 0 else leaf

    return jax.tree.map(fold, state)


def create_lanes(
    init_params: Callable[[jax.Array], PyTree],
    method: base.Method,
    optimizer: OptimizerFactory,
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    *,
    num_tasks: int,
    num_groups: int = 1,
    start: PyTree | None = None,
    init_carry: Callable[[], PyTree] | None = None,
    abstract: bool = False,
) -> TrainState:
    """Fresh runs, stacked: every leaf has a leading axis L, as those of `start`. A lane does not depend on the others.

    On the ambient mesh every leaf is created where it belongs: a model larger than the memory of one device never lies
    on one. `abstract` creates nothing: leaves are `jax.ShapeDtypeStruct`s with their shardings.

    On a CPU the program is compiled without optimisation: it runs once, and compiling the random number generator of
    every parameter with all passes takes longer than anything else of a short run (8 s against 1 s).
    """

    def create(lane):
        seed, rate, start = lane
        sizes = {"num_tasks": num_tasks, "num_groups": num_groups}
        return TrainState.create(
            init_params, method, optimizer, seed, rate, **sizes, start=start, init_carry=init_carry
        )

    def create_all(lanes):
        return jax.lax.map(create, lanes)

    lanes = (np.asarray(seeds, np.int32), np.asarray(learning_rates, np.float32), start)
    mesh = sharding.current_mesh()
    placed = {}
    if mesh is not None or abstract:
        shapes = jax.eval_shape(create_all, lanes)
        if mesh is None:
            return shapes
        where = sharding.shardings(shapes, mesh)
        if abstract:
            return jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
        placed = {"out_shardings": where}
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(create_all, **placed).lower(lanes).compile(compiler_options=options)(lanes)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def update_best_lanes(state: TrainState, scores: jax.Array, patience: int) -> TrainState:
    """`update_best` of every lane, scores f32[L, G]; the state is donated."""
    return sharding.constrain(jax.vmap(update_best, in_axes=(0, 0, None))(state, scores, patience))


def update_best(state: TrainState, score: jax.Array, patience: int) -> TrainState:
    """Takes the current parameters for every group whose score f32[G] is the best so far.

    A group that has gone `patience` evaluations without improvement is closed: it keeps its best parameters even if
    the run goes on for other groups or lanes, so that lanes stop as if they ran alone. NaN scores never win.
    """
    best = state.best
    open_ = best.stale < patience
    better = (score > best.score) & open_

    def pick(old, new):
        return jnp.where(better.reshape(-1, *[1] * new.ndim), new[None], old)

    return state.replace(
        best=Best(
            params=jax.tree.map(pick, best.params, state.params),
            score=jnp.where(better, score, best.score),
            step=jnp.where(better, state.step, best.step),
            stale=jnp.where(better, 0, best.stale + 1),
        )
    )
