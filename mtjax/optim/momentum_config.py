r"""M-ConFIG: the conflict-free direction of momenta, for one backward pass a step.

ConFIG needs the gradients of all K tasks at each step. M-ConFIG keeps a momentum of each task's gradient, refreshes
one of them (or n) at a step, in turn, and takes the ConFIG direction of the momenta. With m_k the momentum of task k,
t_k the number of its refreshments, and t that of the steps since all tasks have had one:

    m_k <- b1 m_k + (1 - b1) g_k                       for the tasks whose turn it is
    c = ConFIG(m_1 / (1 - b1^t_1), ..., m_K / (1 - b1^t_K))

c is smooth already, so that Adam would smooth twice. Its second moment is taken instead of the gradient that would have
given c as Adam's momentum:

    a = (c (1 - b1^t) - b1 m) / (1 - b1),  m <- c (1 - b1^t)
    v <- b2 v + (1 - b2) a^2
    d = c / (sqrt(v / (1 - b2^t)) + eps)

That division belongs to the method: chain it with a learning rate (`optax.sgd`, `optax.scale_by_schedule`), not with
Adam. `mtjax.value_and_update` computes the gradients of the tasks whose turn it is and no other.

Letters: K tasks, P parameters; g_k the gradient of task k.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax import gradients
from mtjax.optim import base, routes, sharing, solvers
from mtjax.optim.alignment import config
from mtjax.optim.base import Combination, Method, drop_rows, from_combination
from mtjax.optim.buffers import along, replace_rows, wide, zero_rows

PyTree = Any


class MomentumConfigState(NamedTuple):
    """State of `momentum_config`.

    Attributes:
      momenta: pytree [K, ...], m_k.
      refreshed: i32[K], t_k.
      turn: i32[], the task that is refreshed next.
      count: i32[], t.
      pseudo: pytree of parameter shape, m; () without a second moment.
      second: pytree of parameter shape, v; () without.
    """

    momenta: PyTree
    refreshed: jax.Array
    turn: jax.Array
    count: jax.Array
    pseudo: PyTree
    second: PyTree


def momentum_config(b1: float = 0.9, b2: float | None = 0.999, *, eps: float = 1e-8, refresh: int = 1) -> Method:
    r"""ConFIG on momenta that are refreshed in turn; see the module's docstring for the equations.

    Args:
      b1: of the momenta, in [0, 1).
      b2: of the second moment, in [0, 1); None leaves it out, and d = c.
      eps: as in Adam.
      refresh: n, how many tasks get a new gradient at each step.

    Returns:
      A `Method` without weights of the gradients. d = 0 until every task has had its turn. `mtjax.value_and_update`
      makes n backward passes a step (and one through the heads under `on_shared`, which then needs to be told the
      shared leaves: a single gradient does not show them); the plain `update` takes a whole Jacobian and looks at n of
      its rows. The losses' scale cancels in d up to eps; with b2=None, a run on s J is s times the run on J. With K = 1
      and b2=None, d is the bias-corrected momentum, g itself for b1 = 0. Where nothing has ever moved, d = 0.

      A task that is left out in a step (see `mtjax.optim.nonfinite`) loses its turn if it had one, and its momentum
      takes no part in c. Of tasks whose gradient is not computed, only the loss says whether they are finite;
      'drop_zero' is not possible.

    Raises:
      ValueError: for arguments out of range; for a state without parameters; in `mtjax.value_and_update`, if the shared
        leaves are to be found in the gradients, or with 'drop_zero'.

    Reference: Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR
      2025, algorithm 1, and the authors' code (PseudoMomentumOperator), which adds that nothing moves before all tasks
      have had a gradient. LibMTL and TorchJD have none.

    >>> method = momentum_config(b2=None)
    >>> rows, state = jnp.array([[3.0, 0.0], [0.0, 1.0]]), method.init(None)
    >>> for _ in range(2):
    ...     gradient, state = method.update(rows, state)
    ...     print(gradient.round(3))
    [0. 0.]
    [2. 2.]
    """
    if not (0 <= b1 < 1 and (b2 is None or 0 <= b2 < 1) and eps >= 0):
        raise ValueError(f"momentum_config needs b1 and b2 in [0, 1) and eps >= 0, got {(b1, b2, eps)}")
    if not (isinstance(refresh, int) and refresh >= 1):
        raise ValueError(f"refresh must be a number of tasks >= 1, got {refresh!r}")

    rule = config().weighting

    def init(num_tasks, params):
        rows = zero_rows(num_tasks, params, "momentum_config")
        none = jnp.zeros((), jnp.int32)
        moments = (() if b2 is None else jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), rows) for _ in range(2))
        return MomentumConfigState(rows, jnp.zeros((num_tasks,), jnp.int32), none, none, *moments)

    def combine(jacobian, losses, state, present):
        num_tasks = losses.size
        mine = jnp.zeros((num_tasks,), bool).at[_due(state.turn, refresh, num_tasks)].set(True) & present
        momenta = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.momenta, wide(jacobian))
        momenta = replace_rows(mine, momenta, state.momenta)
        refreshed = state.refreshed + mine
        used = present & (refreshed > 0)
        ready = jnp.any(present) & jnp.all(used == present)
        count = state.count + ready

        scale = _unbias(b1, refreshed, losses.dtype)
        estimates = jax.tree.map(lambda m: m * along(scale, m).astype(m.dtype), drop_rows(momenta, used))
        weights, _ = rule.weigh(gradients.gramian(estimates), losses, (), used)
        direction = gradients.combine(estimates, weights)
        direction = jax.tree.map(lambda c: jnp.where(ready, c, 0.0), direction)
        turn = (state.turn + min(refresh, num_tasks)) % num_tasks
        new = MomentumConfigState(momenta, refreshed, turn, count, state.pseudo, state.second)
        if b2 is None:
            return direction, None, new

        grown = 1 - jnp.asarray(b1, losses.dtype) ** count
        pseudo = jax.tree.map(lambda c: c * grown.astype(c.dtype), direction)
        step = lambda m, old, v: b2 * v + (1 - b2) * jnp.square((m - b1 * old) / (1 - b1))  # noqa: E731
        second = jax.tree.map(step, pseudo, state.pseudo, state.second)
        pseudo, second = base.choose(ready, (pseudo, second), (state.pseudo, state.second))
        correction = _unbias(b2, count, losses.dtype)

        def divide(c, v):
            return c * solvers.reciprocal(jnp.sqrt(v * correction.astype(v.dtype)) + eps)

        return jax.tree.map(divide, direction, second), None, new._replace(pseudo=pseudo, second=second)

    def route(loss_fn, method, *, has_aux, chunk_size):
        if method.drop_zero:
            raise ValueError(
                "momentum_config computes the gradients of a few tasks only: drop_zero would drop the others"
            )
        return _some_rows(loss_fn, method, refresh, has_aux, chunk_size)

    return from_combination(Combination(init, combine), route=route)


def _due(turn: jax.Array, refresh: int, num_tasks: int) -> jax.Array:
    """i32[n], the tasks whose turn it is."""
    return (turn + jnp.arange(min(refresh, num_tasks))) % num_tasks


def _unbias(rate: float, count: jax.Array, dtype: Any) -> jax.Array:
    """1 / (1 - rate^count); 0 where nothing has been averaged."""
    return solvers.reciprocal(1 - jnp.asarray(rate, dtype) ** count)


def _some_rows(loss_fn, method: Method, refresh: int, has_aux: bool, chunk_size: int | None):
    """The route: backward passes for the tasks whose turn it is, and one for leaves that the method does not see."""

    def some_rows_fn(params, state, *args, **kwargs):
        losses, pullback, aux = gradients.losses_and_vjp(loss_fn, has_aux, params, args, kwargs)
        num_tasks = losses.shape[0]
        shared = sharing.shared_leaves(method.is_shared, params)
        if shared is None:
            raise ValueError(
                "momentum_config computes one gradient at a step, which does not show the leaves that tasks share: "
                "name them by on_shared(method, is_shared)"
            )
        state = base.materialize(state, num_tasks, params)
        due = _due(state.inner.turn, refresh, num_tasks)
        cotangents = jax.nn.one_hot(due, num_tasks, dtype=losses.dtype)
        if len(cotangents) == 1:
            rows = jax.tree.map(lambda leaf: leaf[None], pullback(cotangents[0]))
        elif chunk_size is None or chunk_size >= len(cotangents):
            rows = jax.vmap(pullback)(cotangents)
        else:
            rows = jax.lax.map(pullback, cotangents, batch_size=None if chunk_size == 1 else chunk_size)
        jacobian = jax.tree.map(
            lambda leaf: jnp.zeros((num_tasks, *leaf.shape[1:]), leaf.dtype).at[due].set(leaf), rows
        )
        gradient, new = method.update(jacobian, state, params, losses=losses)
        if not sharing.all_shared(shared):
            present = base.admitted(method, losses, jacobian)
            pull = routes.careful(pullback, present) if method.nonfinite == "drop_task" else pullback
            own = pull(jnp.ones_like(losses))
            if method.nonfinite == "skip_step":
                own = jax.tree.map(lambda g: jnp.where(present.all(), g, jnp.zeros_like(g)), own)
            gradient = sharing.select_shared(shared, gradient, own)
        return ((losses, aux) if has_aux else losses), gradient, new

    return some_rows_fn
