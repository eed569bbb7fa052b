"""The train step: per-task losses -> weights or Jacobian -> direction -> optax. One pure function.

It takes any method of `mtjax.optim`; `value_and_update` goes by what the method declares: methods that are weightings
never build the Jacobian, others do, or bring a route of their own; some want to see the losses after the step.

Letters: K tasks, B batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtjax import sharding
from mtjax.gradients import conflict, value_and_jacobian
from mtjax.optim.base import Method, choose
from mtjax.optim.representation import Staged
from mtjax.optim.routes import observe, observes, value_and_update
from mtjax.tasks import Task, task_losses
from mtjax.train.state import OptimizerFactory, TrainState

PyTree = Any


class StepMetrics(NamedTuple):
    """What a step reports.

    Attributes:
      losses: f32[K] before the update.
      weights: f32[K] of the method, NaN if its update is no weighted sum; None for aggregators of other libraries.
    """

    losses: jax.Array
    weights: jax.Array | None


def supervised_loss(
    model: Any,
    tasks: Sequence[Task],
    regularizer: Callable[[Mapping[str, jax.Array], Mapping[str, Any]], Mapping[str, jax.Array]] | None = None,
) -> Callable:
    """The loss function of a Linen model on labelled batches (contract 1): one loss per task.

    Args:
      model: `apply({'params': params}, batch, train=True, rngs=...) -> outputs`.
      tasks: order of the losses.
      regularizer: `(outputs, batch) -> {task name: f32[]}` added to the losses of the tasks it names.

    Returns:
      `loss_fn(params, batch, rng) -> dict[str, f32[]]`.
    """

    def loss_fn(params, batch, rng):
        outputs = model.apply({"params": params}, batch, train=True, rngs={"dropout": rng})
        losses = task_losses(tasks, outputs, batch)
        if regularizer is not None:
            losses |= {name: losses[name] + extra for name, extra in regularizer(outputs, batch).items()}
        return losses

    return loss_fn


def pinned(loss_fn: Callable) -> Callable:
    """The loss with its parameters, and so their gradients and Jacobians, where they belong on the ambient mesh."""
    if isinstance(loss_fn, Staged):
        return Staged(*(pinned(stage) for stage in loss_fn))
    return lambda params, *args: loss_fn(sharding.constrain(params), *args)


def make_train_step(
    loss_fn: Callable,
    method: Method,
    optimizer: OptimizerFactory,
    *,
    chunk_size: int | None = None,
    carries: bool = False,
) -> Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]:
    """Builds `(state, batch) -> (state, metrics)`.

    Args:
      loss_fn: `(params, batch, rng) -> losses`.
      method: a multi-objective method.
      optimizer: `learning_rate -> optax transformation`, e.g. `optax.adamw`.
      chunk_size: backward passes at once (see `value_and_jacobian`).
      carries: whether the losses carry something from step to step: `loss_fn` then finds it in `batch['carry']` and
        returns `(losses, carry)`.
    """
    loss_fn = pinned(loss_fn)
    gradient_fn = value_and_update(loss_fn, method, has_aux=carries, chunk_size=chunk_size)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        if carries:
            batch = {**batch, "carry": state.carry}
        result, gradient, method_state = gradient_fn(state.params, state.method_state, batch, rng)
        losses, carry = result if carries else (result, state.carry)
        updates, opt_state = optimizer(state.learning_rate).update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if observes(method):
            after = loss_fn(params, batch, rng)
            method_state = observe(method, method_state, after[0] if carries else after)
        if getattr(method, "nonfinite", "propagate") == "skip_step":
            # Neither momentum nor weight decay may move the parameters.
            old = (state.params, state.opt_state, state.carry)
            params, opt_state, carry = choose(method_state.present.all(), (params, opt_state, carry), old)
        state = state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, method_state=method_state, carry=carry
        )
        return state, StepMetrics(losses, getattr(method_state, "weights", None))

    return train_step


def gather_rows(data: PyTree, rows: jax.Array) -> PyTree:
    """The batch of a step from whole columns: `column[rows]` of each."""
    return jax.tree.map(lambda column: column[rows], data)


def make_train_chunk(
    train_step: Callable,
    *,
    take: Callable[[PyTree, PyTree], PyTree] = gather_rows,
    shared: bool = False,
    out_shardings: PyTree | None = None,
) -> Callable:
    """Several steps in one dispatch, for a stack of runs: jitted, vmapped over lanes, the state donated.

    Args:
      train_step: `(state, batch) -> (state, metrics)`.
      take: `(data, step) -> batch`.
      shared: whether all lanes take the same steps; their leaves then have no lane axis.
      out_shardings: of the states on a mesh; None: one device.

    Returns:
      `(states [L, ...], data, steps [L, n, ...], active bool[n]) -> (states, metrics [L, n, ...], finite bool[L])`.
      `data` and `steps` are what `take` makes a batch of: by default whole columns on the device and row numbers
      i32[L, n, B]. `active` switches off the steps that only pad a chunk to its fixed length; `finite` tells whether
      all parameters are finite at the end.
    """

    def run(state, data, steps, active):
        def body(state, step):
            inputs, is_active = step
            # Not batched over lanes, so this stays a branch: a padding step costs nothing.
            return jax.lax.cond(is_active, taken, skipped, state, inputs)

        def taken(state, inputs):
            return train_step(state, take(data, inputs))

        def skipped(state, inputs):
            shapes = jax.eval_shape(taken, state, inputs)[1]
            return state, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        state, metrics = jax.lax.scan(body, state, (steps, active))
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]).all()
        return state, metrics, finite

    placed = {}
    if out_shardings is not None:
        whole = sharding.replicated(jax.tree.leaves(out_shardings)[0].mesh)
        placed = {"out_shardings": (out_shardings, whole, whole)}
    return jax.jit(jax.vmap(run, in_axes=(0, None, None if shared else 0, None)), donate_argnums=0, **placed)


def make_conflict_probe(loss_fn: Callable, *, chunk_size: int | None = None, carries: bool = False) -> Callable:
    """`(state [L, ...], batch, rng) -> f32[K, K]`, jitted: cosines of the first lane's per-task gradients."""
    jacobian_fn = value_and_jacobian(pinned(loss_fn), has_aux=carries, chunk_size=chunk_size)

    def probe(state, batch, rng):
        params, carry = jax.tree.map(lambda leaf: leaf[0], (state.params, state.carry))
        return conflict(jacobian_fn(params, {**batch, "carry": carry} if carries else batch, rng)[1]).cosine

    return jax.jit(probe)
