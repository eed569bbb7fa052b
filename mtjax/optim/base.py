"""The two contracts of multi-objective methods, and what turns one into the other.

*Transform.* A method is an `optax.experimental.aggregating.Aggregator`: `update(jacobian, state, params, losses=...)`
takes per-task gradients (every leaf with a leading axis K) and returns one descent gradient of parameter shape, so that
`optax.chain(mtjax.optim.pcgrad(), optax.adamw(1e-3))` is a whole optimiser.

*Weighting.* Most methods are a rule for weights, w = f(G, losses), on the Gramian G = J J^T, and the transform follows:
d = sum_k w_k g_k. To add such a method, write `init(num_tasks)` and `weigh(gramian, losses, state)` in a file of its
own and return `from_weighting(Weighting(init, weigh))`.

A method's state has arrays of size K, but optax's `init(params)` does not know K. State is therefore `Deferred` (a
pytree without leaves) until the first update, which sees K. Where the structure may not change, as in `lax.scan`, pass
`num_tasks` to `init` here: `state = mtjax.optim.init(tx, params, num_tasks=3)`.

Letters: K tasks, P parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

from mtjax import gradients

# The one line that follows optax should its experimental module move.
Aggregator = aggregating.Aggregator

PyTree = Any


class Weighting(NamedTuple):
    """A method that turns a Gramian and losses into weights.

    Attributes:
      init: `num_tasks -> state`.
      weigh: `(gramian f32[K, K], losses f32[K], state) -> (weights f32[K], state)`.
      needs_gramian: False if `weigh` ignores the Gramian; the update then costs one backward pass.
      needs_losses: True if `weigh` reads the losses; the transform then insists on `update(..., losses=...)`.
    """

    init: Callable[[int], PyTree]
    weigh: Callable[[jax.Array, jax.Array, PyTree], tuple[jax.Array, PyTree]]
    needs_gramian: bool = True
    needs_losses: bool = False


class MethodState(NamedTuple):
    """State of a method derived from a weighting; also its diagnostics.

    Attributes:
      inner: the weighting's own state.
      weights: f32[K] used in the last update; 0 before the first.
      gramian: f32[K, K] of the last update (of the shared leaves under `on_shared`); 0 before the first, and NaN after
        an update by `value_and_weighted_grad` of a method that does without it.
      conflicts: i32[], number of pairs with a negative inner product; -1 where the Gramian is unknown.
    """

    inner: PyTree
    weights: jax.Array
    gramian: jax.Array
    conflicts: jax.Array

    @classmethod
    def wrap(cls, inner: PyTree, num_tasks: int) -> "MethodState":
        """The state of a method before its first update."""
        zeros = jnp.zeros((num_tasks, num_tasks), jnp.float32)
        return cls(inner, jnp.zeros((num_tasks,), jnp.float32), zeros, jnp.zeros((), jnp.int32))


@jax.tree_util.register_static
class Deferred:
    """A state that waits for the number of tasks. A pytree without leaves."""

    def __init__(self, make: Callable[[int], PyTree]):
        self.make = make

    def __repr__(self) -> str:
        return "Deferred(until the number of tasks is known)"


def _is_deferred(node: Any) -> bool:
    return isinstance(node, Deferred)


def materialize(state: PyTree, num_tasks: int) -> PyTree:
    """Replaces every `Deferred` in a state by arrays for `num_tasks` tasks."""
    return jax.tree.map(lambda node: node.make(num_tasks) if _is_deferred(node) else node, state, is_leaf=_is_deferred)


def init(tx: optax.GradientTransformation, params: PyTree, *, num_tasks: int) -> PyTree:
    """`tx.init(params)` with all arrays in place: the structure that every later state has.

    Needed where a state's structure may not change (`lax.scan`, checkpoint templates); works for any composition.

    >>> import jax.numpy as jnp, mtjax
    >>> tx = optax.chain(mtjax.optim.pcgrad(), optax.sgd(0.1))
    >>> mtjax.optim.init(tx, {"w": jnp.zeros(2)}, num_tasks=3)[0].weights.shape
    (3,)
    """
    return materialize(tx.init(params), num_tasks)


class Method(Aggregator):
    """An Aggregator that also tells the train step which route it allows.

    Attributes:
      weighting: the weighting that it is derived from, or None if it needs the Jacobian's entries.
      is_shared: which leaves the weighting sees (see `on_shared`); all of them unless `on_shared` was applied.
    """

    weighting: Weighting | None = None
    is_shared: Any = True


def weigh(weighting: Weighting, gramian: jax.Array | None, losses: jax.Array, state: MethodState) -> MethodState:
    """Runs a weighting and records what it used. `gramian` None: not computed."""
    num_tasks = losses.shape[0]
    unknown = gramian is None
    if unknown:
        gramian = jnp.full((num_tasks, num_tasks), jnp.nan, jnp.float32)
    weights, inner = weighting.weigh(gramian, losses, state.inner)
    conflicts = jnp.int32(-1) if unknown else jnp.sum(jnp.triu(gramian < 0, 1), dtype=jnp.int32)
    return MethodState(inner, weights.astype(jnp.float32), gramian, conflicts)


def from_weighting(weighting: Weighting, is_shared: Any = True) -> Method:
    """The transform of a weighting: d = sum_k w_k g_k with w = weigh(J J^T, losses).

    Args:
      weighting: the rule.
      is_shared: see `on_shared`.

    Returns:
      A `Method`, that is, an optax Aggregator.
    """

    # One object, so that the states of two `init` calls have the same structure and share their compilations.
    deferred = Deferred(lambda num_tasks: MethodState.wrap(weighting.init(num_tasks), num_tasks))

    def init_fn(params):
        del params
        return deferred

    def update_fn(jacobian, state, params=None, *, losses=None, **extra):
        del extra  # optax asks to ignore what other transforms of a chain need
        num_tasks = gradients.num_rows(jacobian)
        if params is not None:
            check_row_shapes(jacobian, params)
        if losses is None and weighting.needs_losses:
            raise ValueError(
                "This method weighs tasks by their losses: call update(jacobian, state, params, losses=losses)"
            )
        losses = jnp.zeros((num_tasks,)) if losses is None else gradients.stack_losses(losses)
        if losses.shape != (num_tasks,):
            raise ValueError(f"losses has shape {losses.shape}, but the Jacobian has {num_tasks} rows")
        shared = shared_leaves(is_shared, jacobian if params is None else params, jacobian)
        state = weigh(weighting, shared_gramian(jacobian, shared), losses, materialize(state, num_tasks))
        gradient = gradients.combine(jacobian, state.weights)
        if not all_shared(shared):
            gradient = select_shared(shared, gradient, gradients.combine(jacobian, jnp.ones((num_tasks,))))
        return gradient, state

    method = Method(init_fn, update_fn)
    method.weighting = weighting
    method.is_shared = is_shared
    return method


def check_row_shapes(jacobian: PyTree, params: PyTree) -> None:
    """Raises a ValueError if a leaf is not [K, *parameter shape], e.g. the gradient of a sum instead of K gradients."""

    def check(path, param, rows):
        if jnp.shape(rows)[1:] != jnp.shape(param):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            expected = ", ".join(map(str, ("K", *jnp.shape(param))))
            raise ValueError(
                f"The Jacobian of parameter '{name}' must have shape ({expected}), got {jnp.shape(rows)}. "
                "Use value_and_jacobian, not jax.grad, to get per-task gradients"
            )

    jax.tree_util.tree_map_with_path(check, params, jacobian)


# Shared and task-specific parameters.


def on_shared(method: Method, is_shared: Any = None) -> Method:
    """Lets a method see shared parameters only; task-specific ones get the plain sum of their rows.

    Args:
      method: a method of `mtjax.optim` derived from a weighting.
      is_shared: a pytree of bools like `params` (a prefix will do), or a predicate `path -> bool` on the "/"-joined
        path of a leaf, e.g. `lambda path: "heads" not in path`. By default a leaf that the loss of at most one task
        depends on is task-specific, as seen in the Jacobian of each batch: all its rows but one are zero. Parameters
        of several heads that are stacked in one leaf depend on several tasks: name them by a predicate.

    Returns:
      A method with the same state as the given one.

    Raises:
      ValueError: if the method is not derived from a weighting.

    >>> import jax.numpy as jnp, mtjax
    >>> tx = on_shared(mtjax.optim.linear("mean"), lambda path: not path.startswith("head"))
    >>> jacobian = {"trunk": jnp.array([[2.0], [4.0]]), "head_a": jnp.array([[5.0], [0.0]])}
    >>> gradient, state = tx.update(jacobian, tx.init(None))
    >>> gradient["trunk"].item(), gradient["head_a"].item()
    (3.0, 5.0)
    """
    if getattr(method, "weighting", None) is None:
        raise ValueError("on_shared takes a method of mtjax.optim that is derived from a Weighting")
    return from_weighting(method.weighting, is_shared)


def shared_leaves(is_shared: Any, params: PyTree, jacobian: PyTree | None = None) -> PyTree | None:
    """bool per leaf of `params`: a Python bool where that is known, a traced one where it depends on the Jacobian.

    None if it depends on the Jacobian and none is given.
    """
    if is_shared is None:
        if jacobian is None:
            return None
        return jax.tree.map(lambda rows: jnp.sum(jnp.any(rows != 0, axis=tuple(range(1, rows.ndim)))) > 1, jacobian)
    if callable(is_shared):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: bool(is_shared(jax.tree_util.keystr(path, simple=True, separator="/"))), params
        )
    return jax.tree.map(lambda flag, leaves: jax.tree.map(lambda _: bool(flag), leaves), is_shared, params)


def all_shared(shared: PyTree) -> bool:
    """True if it is known that every leaf is shared."""
    return all(flag is True for flag in jax.tree.leaves(shared))


def shared_gramian(jacobian: PyTree, shared: PyTree) -> jax.Array:
    """f32[K, K] Gramian of the shared leaves."""
    num_tasks = gradients.num_rows(jacobian)
    total = jnp.zeros((num_tasks, num_tasks), jnp.float32)
    for flag, rows in zip(jax.tree.leaves(shared), jax.tree.leaves(jacobian), strict=True):
        if flag is not False:
            gram = gradients.leaf_gramian(rows)
            total += gram if flag is True else jnp.where(flag, gram, 0.0)
    return total


def select_shared(shared: PyTree, aggregated: PyTree, summed: PyTree) -> PyTree:
    """`aggregated` on shared leaves, `summed` on task-specific ones."""

    def select(flag, a, b):
        return (a if flag else b) if isinstance(flag, bool) else jnp.where(flag, a, b)

    return jax.tree.map(select, shared, aggregated, summed)


# Reading a state.


class Diagnostics(NamedTuple):
    """What a method did in its last update.

    Attributes:
      weights: f32[K], the weight of each task's gradient in the update.
      gramian: f32[K, K] of per-task gradients.
      conflicts: i32[], pairs of tasks whose gradients have a negative inner product.
    """

    weights: jax.Array
    gramian: jax.Array
    conflicts: jax.Array


def diagnostics(state: PyTree) -> Diagnostics:
    """Weights, Gramian and number of conflicts of the last update, found anywhere in an optimiser's state.

    Raises:
      ValueError: if the state holds no multi-objective method, several of them, or one that has made no update yet.
    """
    stop = (MethodState, Deferred)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, stop))
    found = [node for node in nodes if isinstance(node, stop)]
    if len(found) != 1:
        raise ValueError(f"Expected the state of one mtjax.optim method, found {len(found)}")
    if isinstance(found[0], Deferred):
        raise ValueError("The method has made no update yet: there is nothing to diagnose")
    return Diagnostics(found[0].weights, found[0].gramian, found[0].conflicts)
