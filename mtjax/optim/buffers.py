r"""Methods that remember a gradient for each task: MoCo and DB-MTL.

A gradient of one batch is noisy, and weights that are computed from noisy gradients are biased: their average over
batches is not the weight of the average gradient. These methods smooth first and weigh then.

    moco     y_k tracks g_k                        d = sum_k lambda_k y_k, lambda by projected descent
    db_mtl   y_k tracks the gradient of log L_k    d = sum_k y_k, all rescaled to the largest norm

y is K x P numbers in float32 at least; `mtjax.optim.on_shared` makes P the number of shared parameters. The y_k of a
task that takes no part in a step stays as it was. (`excess_mtl` and `momentum_config` remember as much.)

Letters: K tasks, P parameters; g_k the gradient of task k, L_k its loss; t the number of the update, from 1.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtjax import gradients
from mtjax.optim import solvers
from mtjax.optim.base import Combination, Method, drop_rows, from_combination
from mtjax.optim.scalarization import count, non_negative, solved

PyTree = Any

# Rows, as pytrees with a leading axis K.


def along(vector: jax.Array, rows: jax.Array) -> jax.Array:
    """f[K] -> f[K, 1, ...], to be broadcast against rows [K, ...]."""
    return vector.reshape(-1, *[1] * (rows.ndim - 1))


def wide(rows: PyTree) -> PyTree:
    """The same in float32 at least."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(jnp.float32, leaf.dtype)), rows)


def zero_rows(num_tasks: int, params: PyTree, name: str) -> PyTree:
    """K rows of zeros for parameters of these shapes, in float32 at least.

    Raises:
      ValueError: without parameters, in the name of the method.
    """
    if params is None:
        raise ValueError(f"The state of {name} is as large as the parameters: call init(params, ...) with them")
    return jax.tree.map(lambda p: jnp.zeros((num_tasks, *p.shape), jnp.promote_types(jnp.float32, p.dtype)), params)


def unit_rows(rows: PyTree) -> tuple[PyTree, jax.Array]:
    """Rows of norm 1 and their norms f[K]; zero rows stay. Safe for entries whose squares leave the range of floats."""
    rows = wide(rows)
    leaves = jax.tree.leaves(rows)
    largest = jnp.stack([jnp.max(jnp.abs(leaf), axis=tuple(range(1, leaf.ndim)), initial=0.0) for leaf in leaves])
    largest = jnp.max(largest, axis=0)
    divisor = jnp.where(largest == 0, 1.0, largest)
    rows = jax.tree.map(lambda leaf: leaf / along(divisor, leaf), rows)
    squared = sum(jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(rows))
    length = jnp.sqrt(squared)  # between 1 and sqrt(P)
    units = jax.tree.map(lambda leaf: leaf / along(jnp.where(length == 0, 1.0, length), leaf), rows)
    return units, largest * length


def replace_rows(present: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` in the rows of tasks that take part, `old` in the others."""
    return jax.tree.map(lambda a, b: jnp.where(along(present, a), a, b), new, old)


# MoCo.


class MocoState(NamedTuple):
    """State of `moco`.

    Attributes:
      tracked: pytree [K, ...], y.
      task_weights: f[K], lambda, on the simplex.
      count: i32[], updates so far.
    """

    tracked: PyTree
    task_weights: jax.Array
    count: jax.Array


def moco(
    beta: float = 0.1,
    gamma: float = 0.1,
    rho: float = 0.0,
    *,
    beta_decay: float = 0.5,
    gamma_decay: float = 0.5,
    normalize: Literal["none", "loss"] = "none",
) -> Method:
    r"""Multi-objective gradient correction: MGDA's weights by slow descent on gradients that are tracked over batches.

        y_k <- y_k - beta_t (y_k - g_k)                            beta_t = beta / t^beta_decay
        lambda <- Proj(lambda - gamma_t (Y Y^T + rho I) lambda)    gamma_t = gamma / t^gamma_decay
        d = sum_k lambda_k y_k

    with Proj the Euclidean projection on the simplex. y starts at 0, lambda at 1/K.

    Args:
      beta: rate at which y follows the gradients, in (0, 1].
      gamma: step size of lambda. It multiplies squared norms of gradients: the smaller these, the less lambda moves.
      rho: pulls lambda towards 1/K.
      beta_decay, gamma_decay: exponents of their decay.
      normalize: 'none', or 'loss': L_k g_k / |g_k| in the place of g_k, which the authors use for scene understanding.

    Returns:
      A `Method` without weights of the gradients (lambda is in its state). With K = 1, d = y, which with beta = 1 and
      no decay is g. Not scale equivariant: with s J in the place of J, gamma / s^2 and rho s^2 give s d. With
      normalize='loss', d does not depend on the gradients' norms, and zero gradients stay zero. Tasks that are left out
      leave their share of lambda to the others for that step.

    Raises:
      ValueError: for arguments out of range, and for a state without parameters.

    Reference: Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Stochastic
      Approach", ICLR 2023, algorithm 1. Rates and decays are those of the authors' code for Office-31, which doubles
      the descent step of lambda. Their code for scene understanding, and LibMTL after it (beta = 0.5, gradients always
      normalised), put a softmax of lambda - gamma_t Y Y^T lambda in the place of the projection, which keeps lambda
      near 1/K. TorchJD has none.

    >>> method = moco(beta=1.0, gamma=0.25)
    >>> method.update(jnp.array([[1.0, 0.0], [0.0, 2.0]]), method.init(None))[0].tolist()
    [0.6875, 0.625]
    """
    if not (0 < beta <= 1 and gamma >= 0 and rho >= 0 and beta_decay >= 0 and gamma_decay >= 0):
        raise ValueError(
            "moco needs beta in (0, 1] and gamma, rho, beta_decay, gamma_decay >= 0, "
            f"got {(beta, gamma, rho, beta_decay, gamma_decay)}"
        )
    if normalize not in ("none", "loss"):
        raise ValueError(f"normalize must be 'none' or 'loss', got {normalize!r}")

    def init(num_tasks, params):
        rows = zero_rows(num_tasks, params, "moco")
        return MocoState(rows, jnp.full((num_tasks,), 1 / num_tasks), jnp.zeros((), jnp.int32))

    def combine(jacobian, losses, state, present):
        time = (state.count + 1).astype(losses.dtype)
        rows = wide(jacobian)
        if normalize == "loss":
            units, _ = unit_rows(rows)
            rows = jax.tree.map(lambda leaf: leaf * along(losses, leaf), units)
        rate = beta * time**-beta_decay
        tracked = jax.tree.map(lambda y, g: y + rate.astype(y.dtype) * (g - y), state.tracked, rows)
        tracked = replace_rows(present, tracked, state.tracked)

        used = drop_rows(tracked, present)
        gram = gradients.gramian(used)
        mass = jnp.sum(jnp.where(present, state.task_weights, 0.0))
        start = jnp.where(mass == 0, 1 / count(present), state.task_weights * solvers.reciprocal(mass))
        start = jnp.where(present, start, 0.0)
        slope = jnp.matmul(gram, start, precision=solvers.HIGHEST) + rho * start
        # A common shift does not move the projection; without it, lambda would drown in a large slope.
        slope = slope - jnp.min(slope, where=present, initial=jnp.inf)
        moved = start - gamma * time**-gamma_decay * jnp.where(present, slope, 0.0)
        weights = jnp.where(present, solvers.simplex_projection(moved, present), 0.0)
        weights = jnp.where(jnp.isfinite(gram).all(), weights, jnp.nan)
        kept = jnp.where(present, mass * weights, state.task_weights)
        return gradients.combine(used, weights), None, MocoState(tracked, kept, state.count + 1)

    return from_combination(Combination(init, combine, needs_losses=normalize == "loss"))


# DB-MTL.


class DbMtlState(NamedTuple):
    """State of `db_mtl`.

    Attributes:
      average: pytree [K, ...], y, moving averages of the gradients of log L_k.
      remainder: f[K], weight that the start at 0 still has in each average: product of the rates so far.
      count: i32[], updates so far.
    """

    average: PyTree
    remainder: jax.Array
    count: jax.Array


def db_mtl(beta: float = 0.9, *, beta_decay: float = 0.0, eps: float = 0.0, debias: bool = False) -> Method:
    r"""Dual balancing: logarithms balance the losses, a common norm balances the gradients.

        g_k = grad log L_k = (grad L_k) / L_k
        y_k <- beta_t y_k + (1 - beta_t) g_k         beta_t = beta / t^beta_decay,  y = 0 at first
        d = max_j |y_j| sum_k y_k / |y_k|

    Args:
      beta: of the moving average, in [0, 1); 0 does without.
      beta_decay: exponent of its decay.
      eps: added to L_k. The authors take 1e-8, which bounds g_k where losses come near 0.
      debias: divides y_k by 1 - prod_t beta_t, so that it is an average from the first update on. The authors do not:
        their first update is 1 - beta times as long.

    Returns:
      A `Method` without weights; `update` needs `losses=`. d does not depend on the units of the losses. At given
      losses, method(s J) = s method(J). With K = 1, d = y: for beta = 0, g / L. A task whose y is zero contributes
      nothing. So does a task whose loss is exactly 0, which is solved (with `eps` > 0 it is a task like others); its
      average decays. A negative loss has no logarithm and gives NaN.

    Raises:
      ValueError: for arguments out of range, and for a state without parameters.

    Reference: Lin et al., "Dual-Balancing for Multi-Task Learning", arXiv 2308.12029, 2023, algorithm 1. LibMTL's is
      the authors' code; it also adds 1e-8 to |y_k|, and heads follow the logarithms of the losses (here, with
      `on_shared`, the losses). TorchJD has none.

    >>> method = db_mtl(beta=0.0)
    >>> rows, losses = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([0.5, 4.0])
    >>> method.update(rows, method.init(None), losses=losses)[0].tolist()
    [2.0, 2.0]
    """
    if not (0 <= beta < 1 and beta_decay >= 0 and eps >= 0):
        raise ValueError(f"db_mtl needs beta in [0, 1), beta_decay and eps >= 0, got {(beta, beta_decay, eps)}")

    def init(num_tasks, params):
        rows = zero_rows(num_tasks, params, "db_mtl")
        return DbMtlState(rows, jnp.ones((num_tasks,)), jnp.zeros((), jnp.int32))

    def combine(jacobian, losses, state, present):
        shifted = losses + eps
        zero = solved(shifted)
        inverse = solvers.reciprocal(jnp.where(zero, 0.0, shifted))
        inverse = jnp.where(non_negative(losses), inverse, jnp.nan)
        keep = beta * (state.count + 1).astype(losses.dtype) ** -beta_decay

        def step(y, rows):
            return keep.astype(y.dtype) * y + (1 - keep).astype(y.dtype) * rows * along(inverse, y).astype(y.dtype)

        average = replace_rows(present, jax.tree.map(step, state.average, wide(jacobian)), state.average)
        remainder = jnp.where(present, keep * state.remainder, state.remainder)

        units, norm = unit_rows(average)
        norm = norm / jnp.where(remainder < 1, 1 - remainder, 1.0) if debias else norm
        active = present & ~zero
        longest = jnp.max(jnp.where(active, norm, 0.0))
        longest = jnp.where(jnp.all(jnp.isfinite(norm) | ~present), longest, jnp.nan)
        gradient = gradients.combine(drop_rows(units, active), jnp.where(active, longest, 0.0))
        return gradient, None, DbMtlState(average, remainder, state.count + 1)

    return from_combination(Combination(init, combine, needs_losses=True))
