r"""Weights learned by what they do: Auto-Lambda and MOML, bilevel methods that look one step ahead.

With weights w the training losses lead to theta'(w) = theta - eta sum_k w_k g_k(theta; train). The upper level asks how
the losses on *other* examples at theta' depend on w. Through one step the chain rule is exact and first-order,

    d L_j(theta'; val) / d w_k = -eta < grad L_j(theta'; val), g_k(theta; train) >:

inner products of gradients, no second derivative. A task gets weight as far as its training gradient helps others.

`mtjax.value_and_update` cuts the batch it is given into two equal halves, train and val. Weights are updated first, and
the direction is sum_k w_k g_k(theta; train) with the new ones; losses are reported on the train half. Parameters that
the method does not see (`on_shared`) follow the plain sum of gradients, in the look-ahead too. By hand, `update` takes
one Jacobian (or, as `independent=(J_val, J_train)`, two) at theta: the limit of a small eta.

Letters: K tasks; w weights; eta the learning rate of the look-ahead.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtjax.optim import base, cross, routes, solvers
from mtjax.optim.base import Method, Weighting, from_weighting
from mtjax.optim.learned_weights import step_present
from mtjax.optim.scalarization import settle


def in_first_unit(slope: jax.Array, unit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A slope f[K] in the unit of the first one that was not zero, and that unit f[].

    Adam divides by the size of past slopes, but adds an epsilon, and squares: only slopes of order one are safe.
    """
    unit = jnp.where(unit == 0, jnp.max(jnp.abs(slope)), unit)
    largest = 0.1 * jnp.sqrt(jnp.finfo(slope.dtype).max)
    return jnp.clip(slope / jnp.where(unit == 0, 1.0, unit), -largest, largest), unit


def own_state(state: Any, kind: type) -> Any:
    """The method's own state inside those of the wrappers around it (`ema`, `every`)."""
    return next(
        node for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, kind)) if isinstance(node, kind)
    )


def check_rate(inner_learning_rate: float) -> None:
    if not inner_learning_rate > 0:
        raise ValueError(f"inner_learning_rate must be > 0, got {inner_learning_rate}")


class AutoLambdaState(NamedTuple):
    """State of `auto_lambda`.

    Attributes:
      task_weights: f[K], lambda.
      unit: f[], size of the first slope of lambda, in which slopes are measured; 0 before.
      optimizer_state: state of the optimiser of lambda.
    """

    task_weights: jax.Array
    unit: jax.Array
    optimizer_state: Any


def auto_lambda(
    primary: int | Sequence[int] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    *,
    init: float = 0.1,
    inner_learning_rate: float = 0.1,
) -> Method:
    r"""Auto-Lambda: weights that make a training step on all tasks help the primary ones on other examples.

    lambda <- optimizer on  d/d lambda_k sum_{j primary} L_j(theta'; val) = -eta <v, g_k(theta; train)>,
    v = grad sum_{j primary} L_j(theta'; val),  theta' = theta - eta sum_k lambda_k g_k(theta; train);
    d = sum_k lambda_k g_k(theta; train).

    All K inner products are one forward-mode pass along v: the step costs about three gradients of a summed loss, for
    any number of tasks. By hand, with the Gramian of one batch, the slope is -sum_{j primary} G_jk.

    Args:
      primary: positions of the tasks that count; all of them by default. The others are auxiliary: they are trained as
        far as they help.
      optimizer: of lambda; by default `optax.adam(1e-4)`. Slopes are measured in the unit of the first, which Adam does
        not notice.
      init: lambda at the start.
      inner_learning_rate: eta; pass the learning rate of the model's SGD.

    Returns:
      A `Method`. lambda is not constrained: a harmful task's becomes negative, if it is not stopped by
      `clip_weights(auto_lambda(...), 0.0)`. With K = 1, d = lambda g. `update` on gradients s J gives s times the
      direction; from a loss function the look-ahead is s times longer. Layers that only have a backward pass
      (`jax.custom_vjp`) have no forward mode and raise a TypeError. The Gramian is not recorded.
      `nonfinite(..., 'drop_task')` works by hand only: a task's own gradient is never computed.

    Raises:
      ValueError: for a negative position, no position, or a rate <= 0; when the number of tasks is known, for a
        position that is too large.

    Reference: Liu, James, Davison and Johns, "Auto-Lambda: Disentangling Dynamic Task Relationships", TMLR 2022,
      equations 4 to 6. The authors' code takes the inner products by finite differences (four more passes and an
      error), looks ahead with the momentum and weight decay of the model's optimiser, and draws validation batches from
      the training set; its Adam has 1e-4 for dense prediction, 3e-4 for CIFAR. LibMTL has lambda = softmax and makes
      every task primary.
    """
    primary = (primary,) if isinstance(primary, int) else primary
    if primary is not None and not (len(primary) and min(primary) >= 0):
        raise ValueError(f"primary must be positions >= 0, at least one, got {list(primary)}")
    check_rate(inner_learning_rate)
    optimizer = optimizer or optax.adam(1e-4)

    def chosen(num_tasks):
        if primary is None:
            return jnp.ones((num_tasks,), bool)
        if max(primary) >= num_tasks:
            raise ValueError(f"auto_lambda got primary task {max(primary)}, but there are {num_tasks} tasks")
        return jnp.zeros((num_tasks,), bool).at[jnp.array(primary)].set(True)

    def init_state(num_tasks):
        weights = jnp.full((num_tasks,), init)
        return AutoLambdaState(weights, jnp.zeros(()), optimizer.init(weights))

    def weigh(gramian, losses, state, present):
        del losses
        raw = -jnp.sum(gramian, axis=0, where=(chosen(present.size) & present)[:, None])
        slope, unit = in_first_unit(jnp.where(present, raw, 0.0), state.unit)
        weights, optimizer_state = step_present(optimizer, slope, state.optimizer_state, state.task_weights, present)
        return settle(weights, present, jnp.isfinite(raw)), AutoLambdaState(weights, unit, optimizer_state)

    def route(loss_fn, method, *, has_aux, chunk_size):
        if method.nonfinite == "drop_task":
            raise ValueError(
                "auto_lambda never computes a task's own gradient, so that it cannot leave out the one that is not "
                "finite: use nonfinite(..., 'skip_step')"
            )

        def auto_lambda_fn(params, state, batch, *rest):
            train, val = routes.split_batch(batch, 2)
            here = cross.visit(loss_fn, has_aux, params, (train, *rest), forward_mode=True)
            num_tasks = here.losses.shape[0]
            old = base.materialize(state, num_tasks, params)
            shared = cross.shared_at(method, params, here, chunk_size)
            counts = chosen(num_tasks)

            def measure():
                """f[K], <v, g_k>."""
                step = cross.combined(here, own_state(old.inner, AutoLambdaState).task_weights, shared)
                away = cross.stepped(params, step, inner_learning_rate)
                there = cross.visit(loss_fn, has_aux, away, (val, *rest))
                return here.push(cross.where_shared(shared, there.pull(counts.astype(here.losses.dtype))))

            help_ = cross.if_due(method, old, measure, jnp.zeros((num_tasks,)))
            # All that the rule reads of a Gramian: the sum of its primary rows.
            gram = jnp.where(counts[:, None], help_[None, :] / jnp.sum(counts), 0.0)
            new = base.weigh(method.weighting, gram, here.losses, old)
            new = new._replace(gramian=jnp.full_like(new.gramian, jnp.nan), conflicts=jnp.full_like(new.conflicts, -1))
            gradient = cross.combined(here, new.weights, shared)
            if method.nonfinite == "skip_step":
                finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)]
                usable = jnp.isfinite(here.losses) & jnp.isfinite(help_) & jnp.stack(finite).all()
                gradient, new = base.skip(usable, gradient, new, old)
            return ((here.losses, here.aux) if has_aux else here.losses), gradient, new

        return auto_lambda_fn

    return from_weighting(Weighting(init_state, weigh, masked=True), route=route)


class MomlState(NamedTuple):
    """State of `moml`.

    Attributes:
      logits: f[K], alpha; w = softmax(alpha).
      optimizer_state: state of the optimiser of alpha.
    """

    logits: jax.Array
    optimizer_state: Any


def moml(optimizer: optax.GradientTransformation | None = None, *, inner_learning_rate: float = 0.1) -> Method:
    r"""Multi-objective meta-learning: weights that one training step ahead improve every task on other examples.

    With w = softmax(alpha), theta' = theta - eta sum_k w_k g_k(theta; train) and C_jk = <grad L_j(theta'; val), g_k>:
    a_j = d L_j(theta'; val) / d alpha = -eta C_j (diag(w) - w w^T),  alpha <- optimizer on the shortest vector in the
    convex hull of a_1 / |a_1|, ..., a_K / |a_K| (MGDA);  d = sum_k w_k g_k(theta; train).

    Args:
      optimizer: of alpha; by default `optax.adam(1e-3)`.
      inner_learning_rate: eta; it only says how far the look-ahead goes, as the a_j are normalised.

    Returns:
      A `Method`; the Gramian in its state is C, and what it costs is 2K + 2 backward passes. Weights are positive and
      sum to 1, uniform at first; with K = 1, d = g. `update` on gradients s J gives s times the direction; from a loss
      function the look-ahead is s times longer. Where a convex combination of the a_j is zero to rounding (all training
      gradients do the same to one task, or what helps one hurts another), the upper level is stationary: weights stay.

    Raises:
      ValueError: for a rate <= 0.

    Reference: Ye et al., "Multi-Objective Meta Learning", NeurIPS 2021 (Artificial Intelligence 2024). This is the form
      of one inner step that the authors' later code (of FORUM) and LibMTL have, with their defaults; they take another
      batch, or both halves, for the direction. The original code divides a_j by the losses instead of by its norm.
    """
    check_rate(inner_learning_rate)
    optimizer = optimizer or optax.adam(1e-3)

    def init(num_tasks):
        logits = jnp.zeros((num_tasks,))
        return MomlState(logits, optimizer.init(logits))

    def weigh(gramian, losses, state, present):
        del losses
        slope = _common_slope(gramian, softmax(state.logits, present), present)
        logits, optimizer_state = step_present(optimizer, slope, state.optimizer_state, state.logits, present)
        weights = settle(softmax(logits, present), present, jnp.isfinite(gramian).all(axis=1))
        return weights, MomlState(logits, optimizer_state)

    def route(loss_fn, method, *, has_aux, chunk_size):
        def moml_fn(params, state, batch, *rest):
            train, val = routes.split_batch(batch, 2)
            drops, by_columns = method.nonfinite == "drop_task", chunk_size is not None
            here = cross.visit(loss_fn, has_aux, params, (train, *rest), separate=drops)
            old = base.materialize(state, here.losses.shape[0], params)
            shared = cross.shared_at(method, params, here, chunk_size)
            present = cross.takes_part(method, here, chunk_size)
            w = softmax(own_state(old.inner, MomlState).logits, present)
            step = cross.combined(here, w, shared, present if drops else None)
            away = cross.stepped(params, step, inner_learning_rate)
            there = cross.visit(loss_fn, has_aux, away, (val, *rest), forward_mode=by_columns, separate=drops)
            present &= cross.takes_part(method, there, chunk_size)
            dropped = present if drops else None

            def measure():
                return cross.cross_gramian(there, here, shared, chunk_size, dropped)

            gram = cross.if_due(method, old, measure, old.gramian)
            losses = jnp.where(present, here.losses, 0.0) if drops else here.losses
            new = base.weigh(method.weighting, gram, losses, old, present)
            gradient = cross.combined(here, new.weights, shared, dropped)
            if method.nonfinite == "skip_step":
                gradient, new = base.skip(present, gradient, new, old)
            return ((here.losses, here.aux) if has_aux else here.losses), gradient, new

        return moml_fn

    return from_weighting(Weighting(init, weigh, masked=True), route=route)


def softmax(logits: jax.Array, present: jax.Array) -> jax.Array:
    """f[K], softmax over the tasks that take part, 0 for the others."""
    return jnp.where(present, jax.nn.softmax(logits, where=present), 0.0)


def _common_slope(gramian: jax.Array, w: jax.Array, present: jax.Array) -> jax.Array:
    """f[K], the shortest vector in the convex hull of the unit vectors along -C_j (diag(w) - w w^T)."""
    largest = jnp.max(jnp.abs(gramian), axis=1, keepdims=True)
    relative = gramian * solvers.reciprocal(largest)
    deviation = relative - jnp.matmul(relative, w, precision=solvers.HIGHEST)[:, None]
    # What is left of equal entries is rounding, and would be scaled up to a unit vector.
    noise = 4 * w.size * jnp.finfo(w.dtype).eps
    rows = jnp.where(jnp.abs(deviation) <= noise, 0.0, -w[None, :] * deviation)
    units = rows * solvers.reciprocal(jnp.linalg.norm(rows, axis=1, keepdims=True))
    shares = solvers.min_norm_weights(jnp.matmul(units, units.T, precision=solvers.HIGHEST), present)
    shortest = jnp.matmul(shares, units, precision=solvers.HIGHEST)
    # Known to about sqrt(eps): what is left at a stationary point is rounding, which Adam would take for a slope.
    length = jnp.linalg.norm(shortest)
    return jnp.where(length <= jnp.sqrt(32 * jnp.finfo(w.dtype).eps), 0.0, shortest)
