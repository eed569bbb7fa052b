"""The contracts of multi-objective methods, and what turns one into the other.

*Transform.* A method is an `optax.experimental.aggregating.Aggregator`: `update(jacobian, state, params, losses=...)`
takes per-task gradients (every leaf with a leading axis K) and returns one descent gradient of parameter shape, so that
`optax.chain(mtjax.optim.pcgrad(), optax.adamw(1e-3))` is a whole optimiser.

*Weighting.* Most methods are a rule for weights, w = f(G, losses), on the Gramian G = J J^T, and the transform follows:
d = sum_k w_k g_k. To add such a method, write `init(num_tasks)` and `weigh(gramian, losses, state)` in a file of its
own and return `from_weighting(Weighting(init, weigh))`.

*Combination.* A method that looks at the entries of the Jacobian is a rule (J, losses) -> d, or keeps state as large as
the parameters: `from_combination(Combination(init, combine))`.

What else a method needs it declares, and `mtjax.value_and_update` honours it, so that no training loop knows methods by
name: `Weighting.observe` (losses after the step), `Weighting.due` (no Gramian this time), `Method.route` (gradients at
other points, on several batches, or at the shared representation), `Method.nonfinite` (what becomes of NaN).

A method's state has arrays of size K, but optax's `init(params)` does not know K. State is therefore `Deferred` (a
pytree without leaves) until the first update, which sees K. Where the structure may not change, as in `lax.scan`, pass
`num_tasks` to `init` here: `state = mtjax.optim.init(tx, params, num_tasks=3)`.

Letters: K tasks, P parameters.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

from mtjax import gradients
from mtjax.optim.sharing import all_shared, only_shared, select_shared, shared_gramian, shared_leaves

# The one line that follows optax should its experimental module move.
Aggregator = aggregating.Aggregator

PyTree = Any
Policy = Literal["propagate", "drop_task", "skip_step"]


class Weighting(NamedTuple):
    """A method that turns a Gramian and losses into weights.

    Attributes:
      init: `num_tasks -> state`.
      weigh: `(gramian f[K, K], losses f[K], state) -> (weights f[K], state)`; if `masked`, with a fourth argument
        `present` bool[K].
      needs_gramian: False if `weigh` ignores the Gramian; the update then costs one backward pass.
      needs_losses: True if `weigh` reads the losses; the transform then insists on `update(..., losses=...)`.
      masked: True if `weigh` takes `present`: the tasks that take part in this step. Those left out arrive as zeros,
        get weight 0, and change nothing for the others. `nonfinite(method, 'drop_task')` needs it.
      observe: `(losses f[K], state, present bool[K]) -> state`, called after the parameters have moved, with the losses
        of the same batch; None if it is not needed.
      due: `state -> bool[]`, whether the coming `weigh` will look at the Gramian; None if it always does.
    """

    init: Callable[[int], PyTree]
    weigh: Callable[..., tuple[jax.Array, PyTree]]
    needs_gramian: bool = True
    needs_losses: bool = False
    masked: bool = False
    observe: Callable[[jax.Array, PyTree, jax.Array], PyTree] | None = None
    due: Callable[[PyTree], jax.Array] | None = None


class Combination(NamedTuple):
    """A method that needs the entries of the Jacobian, or state as large as the parameters.

    Attributes:
      init: `(num_tasks, params) -> state`; of `params` only structure, shapes and dtypes count.
      combine: `(jacobian, losses f[K], state, present bool[K]) -> (gradient, weights, state)`. Rows of tasks that are
        not present are zero. `weights` is f[K] if the gradient is that combination of the rows, else None. The
        gradient may be of a wider dtype than the parameters; it is cast to theirs.
      needs_losses: as for a `Weighting`.
    """

    init: Callable[[int, PyTree], PyTree]
    combine: Callable[[PyTree, jax.Array, PyTree, jax.Array], tuple[PyTree, jax.Array | None, PyTree]]
    needs_losses: bool = False


class MethodState(NamedTuple):
    """State of a method; also its diagnostics.

    Attributes:
      inner: the method's own state.
      weights: f[K] used in the last update; 0 before the first, NaN for methods whose update is no weighted sum of the
        rows.
      gramian: f[K, K] of the last update (of the shared leaves under `on_shared`); 0 before the first, and NaN after
        an update by a route that does without it.
      conflicts: i32[], number of pairs with a negative inner product; -1 where the Gramian is unknown.
      present: bool[K], the tasks that took part in the last update: all, unless `nonfinite` left some out.
    """

    inner: PyTree
    weights: jax.Array
    gramian: jax.Array
    conflicts: jax.Array
    present: jax.Array

    @classmethod
    def wrap(cls, inner: PyTree, num_tasks: int) -> "MethodState":
        """The state of a method before its first update."""
        zeros = jnp.zeros((num_tasks, num_tasks))
        present = jnp.ones((num_tasks,), bool)
        return cls(inner, jnp.zeros((num_tasks,)), zeros, jnp.zeros((), jnp.int32), present)


@jax.tree_util.register_static
class Deferred:
    """A state that waits for the number of tasks. A pytree without leaves."""

    def __init__(self, make: Callable[[int, PyTree], PyTree]):
        self.make = make

    def __repr__(self) -> str:
        return "Deferred(until the number of tasks is known)"


def _is_deferred(node: Any) -> bool:
    return isinstance(node, Deferred)


def materialize(state: PyTree, num_tasks: int, params: PyTree = None) -> PyTree:
    """Replaces every `Deferred` in a state by arrays for `num_tasks` tasks (and parameters of these shapes)."""
    return jax.tree.map(
        lambda node: node.make(num_tasks, params) if _is_deferred(node) else node, state, is_leaf=_is_deferred
    )


def init(tx: optax.GradientTransformation, params: PyTree, *, num_tasks: int) -> PyTree:
    """`tx.init(params)` with all arrays in place: the structure that every later state has.

    Needed where a state's structure may not change (`lax.scan`, checkpoint templates); works for any composition.

    >>> import jax.numpy as jnp, mtjax
    >>> tx = optax.chain(mtjax.optim.pcgrad(), optax.sgd(0.1))
    >>> mtjax.optim.init(tx, {"w": jnp.zeros(2)}, num_tasks=3)[0].weights.shape
    (3,)
    """
    return materialize(tx.init(params), num_tasks, params)


class Method(Aggregator):
    """An Aggregator that also tells `mtjax.value_and_update` how its gradient is to be had.

    Attributes:
      weighting: the weighting that it is derived from, if it is.
      combination: the combination that it is derived from, if it is.
      is_shared: which leaves the rule sees (see `on_shared`); all of them unless `on_shared` was applied.
      nonfinite: what becomes of NaN and infinity (see `mtjax.optim.nonfinite`).
      drop_zero: whether 'drop_task' also leaves out tasks whose gradient is exactly zero.
      route: `(loss_fn, method, *, has_aux, chunk_size) -> ((params, state, batch, *rest) -> (losses, gradient, state))`
        where gradients at `params` on one batch are not what the method is about; None: they are.
      observer: `(state, losses f[K], present bool[K]) -> state` of a method made of others, in the place of
        `Weighting.observe`.
    """

    weighting: Weighting | None = None
    combination: Combination | None = None
    is_shared: Any = True
    nonfinite: Policy = "propagate"
    drop_zero: bool = False
    route: Callable | None = None
    observer: Callable | None = None

    def replace(self, **fields: Any) -> "Method":
        """A method with the same rule and other fields.

        Raises:
          ValueError: for a method without a single rule, such as `flat_regions(...)`.
        """
        if self.weighting is None and self.combination is None:
            raise ValueError("This method is made of others: wrap the method inside it instead")
        kept = {name: getattr(self, name) for name in Method.__annotations__} | fields
        made = _build(kept.pop("weighting"), kept.pop("combination"))
        return made._set(**kept)

    def rerouted(self, route: Callable) -> "Method":
        """The same transform, whose gradient from a loss function comes by another route."""
        if self.weighting is not None or self.combination is not None:
            return self.replace(route=route)
        return Method(self.init, self.update)._set(route=route, observer=self.observer)

    def _set(self, **fields: Any) -> "Method":
        for name, value in fields.items():
            setattr(self, name, value)
        return self


def from_weighting(weighting: Weighting, is_shared: Any = True, *, route: Callable | None = None) -> Method:
    """The transform of a weighting: d = sum_k w_k g_k with w = weigh(J J^T, losses).

    Args:
      weighting: the rule.
      is_shared: see `on_shared`.
      route: see `Method`.

    Returns:
      A `Method`, that is, an optax Aggregator.
    """
    return _build(weighting, None).replace(is_shared=is_shared, route=route)


def from_combination(combination: Combination, is_shared: Any = True, *, route: Callable | None = None) -> Method:
    """The transform of a combination: d = combine(J, losses).

    Args:
      combination: the rule.
      is_shared: see `on_shared`.
      route: see `Method`.

    Returns:
      A `Method`, that is, an optax Aggregator.
    """
    return _build(None, combination).replace(is_shared=is_shared, route=route)


def _build(weighting: Weighting | None, combination: Combination | None) -> Method:
    rule = weighting or combination

    def make(num_tasks, params):
        if combination is None:
            return MethodState.wrap(weighting.init(num_tasks), num_tasks)
        if params is not None:  # of the leaves that the rule will see
            flags = shared_leaves(method.is_shared, params)
            params = params if flags is None else jax.tree.map(lambda flag, p: p if flag else None, flags, params)
        return MethodState.wrap(combination.init(num_tasks, params), num_tasks)

    # One object, so that the states of two `init` calls have the same structure and share their compilations.
    deferred = Deferred(make)

    def init_fn(params):
        del params
        return deferred

    def update_fn(jacobian, state, params=None, *, losses=None, independent=None, **extra):
        del extra  # optax asks to ignore what other transforms of a chain need
        num_tasks = gradients.num_rows(jacobian)
        if params is not None:
            check_row_shapes(jacobian, params)
        if losses is None and rule.needs_losses:
            raise ValueError(
                "This method weighs tasks by their losses: call update(jacobian, state, params, losses=losses)"
            )
        losses = jnp.zeros((num_tasks,)) if losses is None else gradients.stack_losses(losses)
        if losses.shape != (num_tasks,):
            raise ValueError(f"losses has shape {losses.shape}, but the Jacobian has {num_tasks} rows")
        if params is None:
            params = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), jacobian)
        state = materialize(state, num_tasks, params)
        return _update(method, jacobian, state, params, losses, independent)

    method = Method(init_fn, update_fn)._set(weighting=weighting, combination=combination)
    return method


def composite(
    deferred: Deferred, update: Callable, *, route: Callable | None = None, observer: Callable | None = None
) -> Method:
    """A method made of others: its update calls theirs, and its state (a `MethodState`) holds theirs as `inner`."""
    return Method(lambda params: deferred, update)._set(route=route, observer=observer)


def _update(method: Method, jacobian: PyTree, state: MethodState, params: PyTree, losses: jax.Array, independent: Any):
    """Jacobian -> (gradient, state): admission by the policy, rule on the shared leaves, plain sum on the others."""
    num_tasks = losses.shape[0]
    present = admitted(method, losses, jacobian if independent is None else (jacobian, *independent))
    if method.nonfinite == "drop_task":
        jacobian, losses = drop_rows(jacobian, present), jnp.where(present, losses, 0.0)
        independent = None if independent is None else tuple(drop_rows(rows, present) for rows in independent)
    shared = shared_leaves(method.is_shared, params, jacobian)
    if method.weighting is not None:
        pair = (jacobian, shared) if independent is None else (independent[0], shared, independent[1])
        new = weigh(method.weighting, shared_gramian(*pair), losses, state, present)
        gradient = gradients.combine(jacobian, new.weights)
    else:
        seen = only_shared(shared, jacobian)
        gradient, weights, inner = method.combination.combine(seen, losses, state.inner, present)
        gradient = jax.tree.map(lambda g, rows: g.astype(rows.dtype), gradient, seen)
        weights = jnp.full((num_tasks,), jnp.nan) if weights is None else weights
        unknown = jnp.full((num_tasks, num_tasks), jnp.nan)
        new = record(state, inner, weights, unknown, jnp.int32(-1), present)
    if not all_shared(shared):
        gradient = select_shared(shared, gradient, gradients.combine(jacobian, jnp.ones((num_tasks,))))
    return skip(present, gradient, new, state) if method.nonfinite == "skip_step" else (gradient, new)


def skip(present: jax.Array, gradient: PyTree, new: MethodState, old: MethodState) -> tuple[PyTree, MethodState]:
    """The update if all tasks are present, else a zero gradient and the old state, which tells who was not."""
    gradient = jax.tree.map(lambda g: jnp.where(present.all(), g, jnp.zeros_like(g)), gradient)
    return gradient, choose(present.all(), new, old)._replace(present=present)


def choose(flag: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    """`yes` where the scalar flag holds, else `no`; leaf by leaf, PRNG keys included."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), yes, no)


def record(
    state: MethodState,
    inner: PyTree,
    weights: jax.Array,
    gramian: jax.Array,
    conflicts: jax.Array,
    present: jax.Array,
) -> MethodState:
    """The next state, every leaf in the dtype of the last one, so that loops can carry it."""
    return like(MethodState(inner, weights, gramian, conflicts, present), state)


def like(new: PyTree, old: PyTree) -> PyTree:
    """The new leaves in the dtypes of the old ones."""

    def cast(new, old):
        new = jnp.asarray(new)
        return new if new.dtype == old.dtype else new.astype(old.dtype)

    return jax.tree.map(cast, new, old)


def weigh(
    weighting: Weighting,
    gramian: jax.Array | None,
    losses: jax.Array,
    state: MethodState,
    present: jax.Array | None = None,
) -> MethodState:
    """Runs a weighting and records what it used. `gramian` None: not computed; `present` None: all tasks."""
    num_tasks = losses.shape[0]
    present = jnp.ones((num_tasks,), bool) if present is None else present
    unknown = gramian is None
    if unknown:
        gramian = jnp.full((num_tasks, num_tasks), jnp.nan)
    weights, inner = weighting.weigh(gramian, losses, state.inner, *((present,) if weighting.masked else ()))
    conflicts = jnp.int32(-1) if unknown else jnp.sum(jnp.triu(gramian < 0, 1), dtype=jnp.int32)
    return record(state, inner, weights, gramian, conflicts, present)


# What becomes of NaN and infinity.


def admitted(method: Method, losses: jax.Array, jacobian: PyTree) -> jax.Array:
    """bool[K]: tasks that may take part in a step under the method's policy; everyone under 'propagate'."""
    if method.nonfinite == "propagate":
        return jnp.ones(losses.shape, bool)
    present = jnp.isfinite(losses) & rows_are_finite(jacobian)
    if method.nonfinite == "drop_task" and method.drop_zero:
        used = [jnp.any(rows != 0, axis=tuple(range(1, rows.ndim))) for rows in jax.tree.leaves(jacobian)]
        present &= jnp.stack(used).any(axis=0)
    return present


def rows_are_finite(jacobian: PyTree) -> jax.Array:
    """bool[K]: rows without NaN and infinity."""
    leaves = jax.tree.leaves(jacobian)
    return jnp.stack([jnp.isfinite(rows).all(axis=tuple(range(1, rows.ndim))) for rows in leaves]).all(axis=0)


def drop_rows(jacobian: PyTree, present: jax.Array) -> PyTree:
    """The Jacobian with zeros in the rows of tasks that are not present, whatever these held."""
    return jax.tree.map(
        lambda rows: jnp.where(present.reshape(-1, *[1] * (rows.ndim - 1)), rows, jnp.zeros_like(rows)), jacobian
    )


def spoil_rows(jacobian: PyTree, present: jax.Array) -> PyTree:
    """The Jacobian with NaN in the rows of tasks that are not present: whoever sees them will leave them out too."""
    return jax.tree.map(
        lambda rows: jnp.where(present.reshape(-1, *[1] * (rows.ndim - 1)), rows, jnp.full_like(rows, jnp.nan)),
        jacobian,
    )


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


# Reading a state.


class Diagnostics(NamedTuple):
    """What a method did in its last update.

    Attributes:
      weights: f[K], the weight of each task's gradient in the update; NaN if it is no weighted sum.
      gramian: f[K, K] of per-task gradients.
      conflicts: i32[], pairs of tasks whose gradients have a negative inner product; -1 if unknown.
      present: bool[K], tasks that took part.
    """

    weights: jax.Array
    gramian: jax.Array
    conflicts: jax.Array
    present: jax.Array


def is_method_state(node: Any) -> bool:
    """Whether a node of an optimiser's state is that of a method."""
    return isinstance(node, MethodState | Deferred)


def diagnostics(state: PyTree) -> Diagnostics:
    """Weights, Gramian and number of conflicts of the last update, found anywhere in an optimiser's state.

    Raises:
      ValueError: if the state holds no multi-objective method, several of them, or one that has made no update yet.
    """
    found = [node for node in jax.tree.leaves(state, is_leaf=is_method_state) if is_method_state(node)]
    if len(found) != 1:
        raise ValueError(f"Expected the state of one mtjax.optim method, found {len(found)}")
    if isinstance(found[0], Deferred):
        raise ValueError("The method has made no update yet: there is nothing to diagnose")
    return Diagnostics(*found[0][1:])
