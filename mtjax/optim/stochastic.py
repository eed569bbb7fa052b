r"""Min-norm methods for stochastic gradients: MoDo and SDMGrad, unbiased by independent batches.

MGDA weighs by w^T G w with G = J J^T. On a small batch E[J J^T] is not E[J] E[J]^T: the noise of each gradient adds to
its own squared norm, and noisy tasks lose weight whatever the number of steps. With J_1 and J_2 from two independent
batches, A = J_1 J_2^T is unbiased, and so is the direction if it is taken from a third one:

    w <- a projected gradient step on w^T E[A] w over the simplex,  d = J_3^T w.

`mtjax.value_and_update` cuts the batch it is given into three equal parts for this (the leading axis must divide by 3)
and makes 2K + 1 backward passes; no Jacobian is kept. Losses are reported on the third part, and parameters that the
method does not see (`on_shared`) follow its plain sum of gradients. By hand: `update(J_3, state, params,
independent=(J_1, J_2))`. Without `independent` the Gramian of the one batch takes the place of A: the biased variant.

Under `nonfinite(..., 'drop_task')` a task takes part if it is finite on all three parts; the three Jacobians are kept.

Letters: K tasks; A the cross Gramian f[K, K]; w weights on the simplex.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtjax.optim import base, cross, routes, solvers
from mtjax.optim.base import Method, Weighting, from_weighting
from mtjax.optim.scalarization import count, settle


class SimplexState(NamedTuple):
    """State of `modo` and `sdmgrad`.

    Attributes:
      task_weights: f[K], w, non-negative and of sum 1.
    """

    task_weights: jax.Array


def _uniform(num_tasks: int) -> SimplexState:
    return SimplexState(jnp.full((num_tasks,), 1 / num_tasks))


def _among(weights: jax.Array, present: jax.Array) -> jax.Array:
    """The weights of the tasks that take part, brought to sum 1; uniform if they have none."""
    total = jnp.sum(weights, where=present)
    shares = jnp.where(total == 0, 1 / count(present), weights / jnp.where(total == 0, 1.0, total))
    return jnp.where(present, shares, 0.0)


def modo(gamma: float = 0.1, *, rho: float = 0.1) -> Method:
    r"""Multi-objective gradient with double sampling: one step on the weights for each step on the parameters.

    w <- Proj_simplex( w - gamma (A w + rho w) ),  d = J_3^T w.

    Args:
      gamma: learning rate of w. It multiplies squared gradient norms: the smaller these are, the longer w stays near
        uniform. method(s J) is therefore not s method(J).
      rho: of the squared norm of w, which keeps w unique and draws it to uniform.

    Returns:
      A `Method`; see the module's docstring for the three batches. Weights start uniform; with K = 1, d = g. A zero
      gradient is only gaining weight slowly, so that the other tasks go on for a while (unlike in `mgda`).

    Raises:
      ValueError: for a negative number.

    >>> method = modo(gamma=0.1, rho=0.0)
    >>> _, state = method.update(jnp.array([[2.0], [1.0]]), method.init(None))
    >>> [round(weight, 3) for weight in state.weights.tolist()]  # A w = (3, 1.5), and 0.1 x (3 - 1.5) / 2 = 0.075
    [0.425, 0.575]

    Reference: Chen, Fernando, Ying and Chen, "Three-Way Trade-Off in Multi-Objective Learning: Optimization,
      Generalization and Conflict-Avoidance", NeurIPS 2023 (JMLR 2024), "MoDo". Defaults are those of the authors' code
      and of TorchJD; LibMTL has gamma = 1e-3. The authors' code steps along the sum of J_1 and J_2 rather than along a
      third batch; LibMTL takes a third, and a third of the decoders' gradients on all three.
    """
    if not (gamma >= 0 and rho >= 0):
        raise ValueError(f"gamma and rho must be >= 0, got {gamma} and {rho}")

    def weigh(gramian, losses, state, present):
        del losses
        w = _among(state.task_weights, present)
        slope = jnp.matmul(gramian, w, precision=solvers.HIGHEST) + rho * w
        w = solvers.simplex_projection(w - gamma * slope, present)
        weights = settle(w, present, jnp.isfinite(gramian).all(axis=1))
        return weights, SimplexState(jnp.where(present, w, state.task_weights))

    return from_weighting(Weighting(_uniform, weigh, masked=True), route=_three_batches)


def sdmgrad(
    lambda_: float = 0.3,
    *,
    preference: Sequence[float] | None = None,
    learning_rate: float = 10.0,
    momentum: float = 0.5,
    num_steps: int = 20,
) -> Method:
    r"""Stochastic direction-oriented multi-objective gradient descent: near a preferred direction, and fair to all.

    w <- `num_steps` projected steps of momentum SGD on 1/2 w^T A' w + lambda w^T A' w_0,  A' = A / scale^2,
    scale = mean_k sqrt(max(A_kk, 0));  d = J_3^T (w + lambda w_0) / (1 + lambda).

    Args:
      lambda_: pull towards the preferred direction J^T w_0; 0 is stochastic MGDA, infinity the preferred direction.
      preference: w_0, K non-negative numbers, brought to sum 1; uniform by default (the mean gradient).
      learning_rate, momentum, num_steps: of the inner SGD, which starts from the last step's w. A learning rate of 10
        does not converge: A' has eigenvalues of order one, and steps are longer than the simplex is wide, so that w
        often ends in a corner of it. Take 1 (for few tasks) to solve the problem.

    Returns:
      A `Method`; see the module's docstring for the three batches. Weights are non-negative and sum to 1; with K = 1,
      d = g. method(s J) = s method(J). If no A_kk is positive there is no scale, and w stays as it was.

    Raises:
      ValueError: for a negative number, a momentum outside [0, 1), no step, or a preference that is negative or zero;
        when the number of tasks is known, for a preference of another length.

    >>> method = sdmgrad(lambda_=0.0, learning_rate=1.0)
    >>> _, state = method.update(jnp.array([[2.0, 0.0], [0.0, 1.0]]), method.init(None))
    >>> [round(weight, 2) for weight in state.weights.tolist()]  # in proportion to 1 / |g|^2, as the two are orthogonal
    [0.2, 0.8]

    Reference: Xiao, Ban and Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
      Algorithms", NeurIPS 2023, "SDMGrad". lambda = 0.3, learning rate 10 and momentum 0.5 are those of the authors'
      code for NYU-v2 and of TorchJD; LibMTL has learning rate 5. They add 1e-8 to scale^2 (the authors 1e-4 to A_kk),
      which stops the weights of small gradients; nothing is added here. In the authors' later release one buffer
      serves for all three batches, so that A becomes the Gramian of the last.
    """
    if not (lambda_ >= 0 and learning_rate >= 0):
        raise ValueError(f"lambda_ and learning_rate must be >= 0, got {lambda_} and {learning_rate}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    if preference is not None and not (min(preference) >= 0 and sum(preference) > 0):
        raise ValueError(f"preference must be non-negative numbers, not all zero, got {list(preference)}")

    def weigh(gramian, losses, state, present):
        del losses
        given = jnp.ones_like(state.task_weights) if preference is None else jnp.asarray(preference, gramian.dtype)
        if given.shape != state.task_weights.shape:
            raise ValueError(f"sdmgrad got a preference for {given.size} tasks, but there are {present.size}")
        target = _among(given, present)
        inverse = solvers.reciprocal(jnp.sum(jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0.0))) / count(present))
        # Off-diagonal entries of a cross Gramian may exceed the scale by any factor.
        largest = jnp.sqrt(jnp.finfo(gramian.dtype).max)
        relative = jnp.clip(gramian * inverse * inverse, -largest, largest)

        def step(carry, _):
            w, velocity = carry
            slope = jnp.matmul(relative, w + lambda_ * target, precision=solvers.HIGHEST)
            velocity = momentum * velocity + slope
            return (solvers.simplex_projection(w - learning_rate * velocity, present), velocity), None

        start = (_among(state.task_weights, present), jnp.zeros_like(state.task_weights))
        (w, _), _ = jax.lax.scan(step, start, length=num_steps)
        weights = settle((w + lambda_ * target) / (1 + lambda_), present, jnp.isfinite(gramian).all(axis=1))
        return weights, SimplexState(jnp.where(present, w, state.task_weights))

    return from_weighting(Weighting(_uniform, weigh, masked=True), route=_three_batches)


def _three_batches(loss_fn: Callable, method: Method, *, has_aux: bool, chunk_size: int | None) -> Callable:
    """The route: A from the first two thirds of the batch, the direction from the last."""

    def three_batches_fn(params, state, batch, *rest):
        drops, by_columns = method.nonfinite == "drop_task", chunk_size is not None
        first, second, third = (
            cross.visit(loss_fn, has_aux, params, (part, *rest), forward_mode=by_columns and index == 0, separate=drops)
            for index, part in enumerate(routes.split_batch(batch, 3))
        )
        old = base.materialize(state, third.losses.shape[0], params)
        shared = cross.shared_at(method, params, third, chunk_size)
        present = jnp.stack([cross.takes_part(method, point, chunk_size) for point in (first, second, third)]).all(0)
        dropped = present if drops else None

        def measure():
            return cross.cross_gramian(first, second, shared, chunk_size, dropped)

        losses = jnp.where(present, third.losses, 0.0) if drops else third.losses
        gram = cross.if_due(method, old, measure, old.gramian)
        new = base.weigh(method.weighting, gram, losses, old, present)
        gradient = cross.combined(third, new.weights, shared, dropped)
        if method.nonfinite == "skip_step":
            gradient, new = base.skip(present, gradient, new, old)
        return ((third.losses, third.aux) if has_aux else third.losses), gradient, new

    return three_batches_fn
