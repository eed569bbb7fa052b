"""Methods made from methods: where a rule looks, how often, and what is done with its weights.

| wrapper        | effect                                                                                   |
|----------------|------------------------------------------------------------------------------------------|
| `on_shared`    | the rule sees shared parameters; the others get the plain sum of their rows              |
| `per_group`    | one instance of the rule for each group of leaves (whole model, module, leaf)            |
| `every`        | the rule runs at every n-th update, its weights serve until then                         |
| `ema`          | a moving average of the weights or of the Gramian; `cr_mogm` is the published one        |
| `clip_weights` | bounds on the weights                                                                    |
| `nonfinite`    | what becomes of NaN and infinity                                                         |

Wrappers nest: `on_shared(every(nash_mtl(), 10), is_shared)`. (`at_representation` is in `representation.py`, the
flatness wrappers in `flatness.py`.)

Letters: K tasks, N groups.
"""

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtjax import gradients
from mtjax.optim import base
from mtjax.optim.base import Combination, Method, Weighting, from_combination

PyTree = Any


def _weighting_of(method: Method, wrapper: str) -> Weighting:
    weighting = getattr(method, "weighting", None)
    if weighting is None:
        raise ValueError(f"{wrapper} takes a method of mtjax.optim that is derived from a Weighting")
    return weighting


def on_shared(method: Method, is_shared: Any = None) -> Method:
    """Lets a method see shared parameters only; task-specific ones get the plain sum of their rows.

    Args:
      method: a method of `mtjax.optim`.
      is_shared: a pytree of bools like `params` (a prefix will do), or a predicate `path -> bool` on the "/"-joined
        path of a leaf, e.g. `lambda path: "heads" not in path`. By default a leaf that the loss of at most one task
        depends on is task-specific, as seen in the Jacobian of each batch: all its rows but one are zero. Parameters
        of several heads that are stacked in one leaf depend on several tasks: name them by a predicate.

    Returns:
      A method with the same rule.

    Raises:
      ValueError: if the method is not one of `mtjax.optim`.

    >>> import jax.numpy as jnp, mtjax
    >>> tx = on_shared(mtjax.optim.linear("mean"), lambda path: not path.startswith("head"))
    >>> jacobian = {"trunk": jnp.array([[2.0], [4.0]]), "head_a": jnp.array([[5.0], [0.0]])}
    >>> gradient, state = tx.update(jacobian, tx.init(None))
    >>> gradient["trunk"].item(), gradient["head_a"].item()
    (3.0, 5.0)
    """
    if not isinstance(method, Method):
        raise ValueError("on_shared takes a method of mtjax.optim (apply it before optax.chain)")
    return method.replace(is_shared=is_shared)


class PerGroup(NamedTuple):
    """State of `per_group`.

    Attributes:
      inner: the rule's state, leaves with a leading axis N.
      weights: f[N, K] used in the last update.
    """

    inner: PyTree
    weights: jax.Array


def per_group(method: Method, group: Literal["leaf", "module"] | Callable[[str], Hashable] = "leaf") -> Method:
    """One instance of a method for each group of parameters, each with its own Gramian, weights and state.

    The granularities of GradVac: the whole model (no wrapper), every layer (`module`), every matrix (`leaf`). Rules run
    vmapped over groups, so their cost hardly grows with the number of layers.

    Args:
      method: a method derived from a weighting.
      group: 'leaf', 'module' (leaves with the same parent), or a function from the "/"-joined path of a leaf to the
        label of its group.

    Returns:
      A method; its diagnostics have no single weights (they are f[N, K] in its state).

    Raises:
      ValueError: for another `group`, or a method that is not a plain weighting.

    >>> import jax.numpy as jnp, mtjax
    >>> tx = per_group(mtjax.optim.mgda())
    >>> tx.update({"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[1.0], [-1.0]])}, tx.init(None))[0]
    {'a': Array([1.], dtype=float32), 'b': Array([0.], dtype=float32)}
    """
    weighting = _weighting_of(method, "per_group")
    if method.route is not None or weighting.observe is not None:
        raise ValueError("per_group takes a method without a route or an observation of its own")
    if not (group in ("leaf", "module") or callable(group)):
        raise ValueError(f"group must be 'leaf', 'module' or a function of the path, got {group!r}")

    def labels(tree):
        """Group index of each leaf, in the order of leaves, and the number of groups."""
        found: dict[Hashable, int] = {}
        indices = []
        for path, _ in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            label = name if group == "leaf" else name.rpartition("/")[0] if group == "module" else group(name)
            indices.append(found.setdefault(label, len(found)))
        return indices, len(found)

    def init(num_tasks, params):
        if params is None:
            raise ValueError("per_group needs the parameters: call init(params, ...) with them")
        _, count = labels(params)

        def repeat(leaf):
            leaf = jnp.asarray(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.split(leaf, count)  # groups draw apart
            return jnp.broadcast_to(leaf, (count, *leaf.shape))

        return PerGroup(jax.tree.map(repeat, weighting.init(num_tasks)), jnp.zeros((count, num_tasks)))

    def combine(jacobian, losses, state, present):
        indices, count = labels(jacobian)
        leaves, structure = jax.tree.flatten(jacobian)
        groups = [[label == index for label in indices] for index in range(count)]
        grams = [gradients.gramian(jacobian, counted=own) for own in groups]
        extra = (present,) if weighting.masked else ()
        weights, inner = jax.vmap(lambda gram, inner: weighting.weigh(gram, losses, inner, *extra))(
            jnp.stack(grams), state.inner
        )
        combined = [gradients.combine(rows, weights[index]) for index, rows in zip(indices, leaves, strict=True)]
        return jax.tree.unflatten(structure, combined), None, PerGroup(inner, weights)

    made = from_combination(Combination(init, combine, needs_losses=weighting.needs_losses))
    return made.replace(is_shared=method.is_shared, nonfinite=method.nonfinite, drop_zero=method.drop_zero)


class Every(NamedTuple):
    """State of `every`.

    Attributes:
      inner: the rule's state.
      weights: f[K] of its last run.
      count: i32[], updates so far.
    """

    inner: PyTree
    weights: jax.Array
    count: jax.Array


def every(method: Method, n: int) -> Method:
    """Runs a method's rule at updates 0, n, 2n, ... and reuses its weights in between.

    `mtjax.value_and_update` then skips the K backward passes of the Gramian: those updates cost one backward pass.
    (Under vmap over seeds a branch becomes a selection, and both sides are computed.)

    Args:
      method: a method derived from a weighting.
      n: >= 1.

    Returns:
      A method. A task that was absent when the weights were made has weight 0 until the next run.

    Raises:
      ValueError: for another n, or a method without weights.
    """
    weighting = _weighting_of(method, "every")
    if not (isinstance(n, int) and n >= 1):
        raise ValueError(f"every needs an integer n >= 1, got {n!r}")

    def init(num_tasks):
        return Every(weighting.init(num_tasks), jnp.zeros((num_tasks,)), jnp.zeros((), jnp.int32))

    def due(state):
        mine = state.count % n == 0
        return mine if weighting.due is None else mine & weighting.due(state.inner)

    def weigh(gramian, losses, state, *present):
        def run():
            weights, inner = weighting.weigh(gramian, losses, state.inner, *present)
            return weights.astype(state.weights.dtype), base.like(inner, state.inner)

        weights, inner = jax.lax.cond(state.count % n == 0, run, lambda: (state.weights, state.inner))
        new = Every(inner, weights, state.count + 1)
        return (jnp.where(present[0], weights, 0.0) if present else weights), new

    return method.replace(weighting=_lifted(weighting, init, weigh)._replace(due=due))


class Ema(NamedTuple):
    """State of `ema`.

    Attributes:
      inner: the rule's state.
      average: f[K] or f[K, K], the moving average.
      count: i32[], updates so far.
    """

    inner: PyTree
    average: jax.Array
    count: jax.Array


def ema(method: Method, decay: float = 0.9, *, of: Literal["weights", "gramian"] = "weights") -> Method:
    r"""Smooths a method over steps by an exponential moving average, a <- decay a + (1 - decay) x.

    Args:
      method: a method derived from a weighting.
      decay: in [0, 1); the first value is taken as it is.
      of: 'weights' (the rule runs on this batch's Gramian and its weights are averaged) or 'gramian' (the rule runs on
        the averaged Gramian: noise of small batches averages out before the rule sees it).

    Returns:
      A method. An absent task's averages stay as they were.

    Raises:
      ValueError: for other arguments.
    """
    weighting = _weighting_of(method, "ema")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    if of not in ("weights", "gramian"):
        raise ValueError(f"of must be 'weights' or 'gramian', got {of!r}")
    if of == "gramian" and not weighting.needs_gramian:
        raise ValueError("ema(of='gramian') takes a method that looks at the Gramian; this one looks at losses only")
    shape = (lambda k: (k,)) if of == "weights" else (lambda k: (k, k))

    def init(num_tasks):
        return Ema(weighting.init(num_tasks), jnp.zeros(shape(num_tasks)), jnp.zeros((), jnp.int32))

    def average(state, new):
        return jnp.where(state.count == 0, new, decay * state.average + (1 - decay) * new)

    def weigh(gramian, losses, state, *present):
        if of == "gramian":
            new = average(state, gramian)
            there = present[0][:, None] & present[0][None, :] if present else True
            kept = jnp.where(there, new, state.average)
            weights, inner = weighting.weigh(jnp.where(there, new, 0.0), losses, state.inner, *present)
            return weights, Ema(inner, kept, state.count + 1)
        weights, inner = weighting.weigh(gramian, losses, state.inner, *present)
        new = average(state, weights)
        there = present[0] if present else True
        kept = jnp.where(there, new, state.average)
        return jnp.where(there, new, 0.0), Ema(inner, kept, state.count + 1)

    return method.replace(weighting=_lifted(weighting, init, weigh))


def cr_mogm(method: Method, decay: float = 0.9) -> Method:
    """Correction of multi-objective gradient manipulation: averaged weights make any rule's stochastic bias vanish.

    `ema` of the weights: lambda_t = decay lambda_{t-1} + (1 - decay) w(G_t), starting with w(G_1).

    Args:
      method: any method derived from a weighting.
      decay: alpha of the paper.

    Returns:
      A method.

    Reference: Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond",
      NeurIPS 2022, algorithm 1. The paper lets alpha grow to 1; a constant 0.9 is TorchJD's.
    """
    return ema(method, decay)


def clip_weights(
    method: Method, minimum: float = 0.0, maximum: float = float("inf"), *, keep_sum: bool = False
) -> Method:
    """Bounds on a method's weights.

    Args:
      method: a method derived from a weighting.
      minimum, maximum: bounds; some rules have negative or unbounded weights (IMTL-G, Nash-MTL).
      keep_sum: rescale the clipped weights to the sum that they had; where the clipped ones sum to zero they stay.

    Returns:
      A method.

    Raises:
      ValueError: if the bounds are not ordered.
    """
    weighting = _weighting_of(method, "clip_weights")
    if not minimum <= maximum:
        raise ValueError(f"clip_weights needs minimum <= maximum, got {minimum} and {maximum}")

    def weigh(gramian, losses, state, *present):
        weights, state = weighting.weigh(gramian, losses, state, *present)
        clipped = jnp.clip(weights, minimum, maximum)
        clipped = jnp.where(present[0], clipped, 0.0) if present else clipped
        if keep_sum:
            total = jnp.sum(clipped)
            clipped = clipped * jnp.where(total == 0, 1.0, jnp.sum(weights) / jnp.where(total == 0, 1.0, total))
        return clipped, state

    return method.replace(weighting=weighting._replace(weigh=weigh))


def _lifted(weighting: Weighting, init: Callable, weigh: Callable) -> Weighting:
    """A weighting around another one, whose state is in the field `inner` of the new one's."""

    def observe(losses, state, present):
        return state._replace(inner=weighting.observe(losses, state.inner, present))

    return weighting._replace(
        init=init,
        weigh=weigh,
        observe=None if weighting.observe is None else observe,
        due=None if weighting.due is None else lambda state: weighting.due(state.inner),
    )


def nonfinite(
    method: optax.GradientTransformation, policy: base.Policy = "drop_task", *, drop_zero: bool = False
) -> optax.GradientTransformation:
    """What becomes of a step in which a loss or a gradient of some task is NaN or infinite.

    Args:
      method: a method of `mtjax.optim`; for 'skip_step' also any chain around one.
      policy:
        'propagate': NaN goes where it goes (what methods do without this wrapper).
        'drop_task': the tasks concerned take no part in this step: the update is exactly that of the other tasks. If
          none is left it is zero, up to what a rule does without a Gramian.
        'skip_step': the gradient is zero and no state changes. Wrap the whole chain to keep an optimiser's moments and
          weight decay from moving the parameters too: `nonfinite(optax.chain(pcgrad(), adamw(1e-3)), 'skip_step')`.
      drop_zero: with 'drop_task', also leave out tasks whose gradient is exactly zero, such as tasks without any label
        in the batch, which a rule like MGDA would otherwise take for stationary.

    Returns:
      A method, or a transformation for a chain. With 'drop_task' and 'skip_step' all K gradients are computed, also
      for methods that look at losses only; with 'drop_task' they are kept in memory, each from a backward pass of its
      own (`value_and_jacobian(..., separate=True)`, which plain users of `update` should pass too), and losses must be
      a dict. RotoGrad and M-ConFIG share one backward pass among tasks: there NaN may reach all rows, and no task is
      left.

    Raises:
      ValueError: for another policy, a chain with another policy than 'skip_step', or a weighting without `present`.

    >>> import jax.numpy as jnp, mtjax
    >>> tx = nonfinite(mtjax.optim.linear("mean"), "drop_task")
    >>> tx.update(jnp.array([[1.0], [jnp.nan], [3.0]]), tx.init(None))[0].tolist()
    [2.0]
    """
    if policy not in ("propagate", "drop_task", "skip_step"):
        raise ValueError(f"policy must be 'propagate', 'drop_task' or 'skip_step', got {policy!r}")
    if drop_zero and policy != "drop_task":
        raise ValueError(f"drop_zero goes with policy 'drop_task', got {policy!r}")
    if isinstance(method, Method):
        if policy == "drop_task" and method.weighting is not None and not method.weighting.masked:
            raise ValueError(
                "drop_task needs a weighting that takes `present`: "
                "write weigh(gramian, losses, state, present) and Weighting(..., masked=True)"
            )
        return method.replace(nonfinite=policy, drop_zero=drop_zero)
    if policy != "skip_step":
        raise ValueError(f"Around a chain only 'skip_step' makes sense, got {policy!r}: wrap the method inside")

    def update(jacobian, state, params=None, *, losses=None, **extra):
        num_tasks = gradients.num_rows(jacobian)
        usable = base.rows_are_finite(jacobian).all()
        if losses is not None:
            usable &= jnp.isfinite(gradients.stack_losses(losses)).all()
        state = base.materialize(state, num_tasks, params)
        updates, new = inner.update(jacobian, state, params, losses=losses, **extra)
        updates = jax.tree.map(lambda u: jnp.where(usable, u, jnp.zeros_like(u)), updates)
        return updates, base.choose(usable, new, state)

    inner = optax.with_extra_args_support(method)
    return optax.GradientTransformationExtraArgs(inner.init, update)
