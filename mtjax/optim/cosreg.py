r"""CosReg: a penalty that makes the gradients of the tasks orthogonal.

With cos_ij the cosine of the gradients of tasks i and j, training minimises

    sum_k L_k + weight c,    c = mean over i != j of cos_ij^2.

c depends on the parameters through the gradients, so that its own gradient is of second order. With u_k = g_k / |g_k|,

    grad c = sum_k H_k dc/dg_k,
    dc/dg_k = 4 / (K (K - 1) |g_k|) (sum_{j != k} cos_kj u_j - sum_{j != k} cos_kj^2 u_k),

H_k the Hessian of L_k: K Hessian-vector products, each a forward-mode derivative of a backward pass. Nothing larger
than the Jacobian is in memory; `chunk_size` of `mtjax.value_and_update` says how many are computed at once.

Letters: K tasks, P parameters; g_k the gradient of task k.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax import gradients
from mtjax.optim import solvers
from mtjax.optim.base import Combination, Method, from_combination
from mtjax.optim.buffers import along, wide

PyTree = Any


class CosRegState(NamedTuple):
    """State of `cosreg`.

    Attributes:
      penalty: f[], c in the last update.
    """

    penalty: jax.Array


def cosreg(weight: float = 10.0) -> Method:
    r"""Gradient regularisation by squared cosines: d = sum_k g_k + weight grad c; see the module's docstring.

    Under `on_shared`, cosines are those of the gradients at shared leaves, and the penalty moves these only: heads get
    the plain sum. (Gradients at heads are orthogonal anyway and would hide conflicts: name the shared leaves.)

    Args:
      weight: of the penalty.

    Returns:
      A `Method` for `mtjax.value_and_update`, without weights of the gradients. With K = 1, d = g. A zero gradient has
      no direction: its cosines count as 0 and have no derivative. c does not depend on the scale of the losses, so that
      d is not scale equivariant. Near a zero gradient grad c may grow as 1 / |g_k|. The mean runs over pairs of tasks
      that take part in the step.

    Raises:
      ValueError: for a negative weight; in a plain `update`, where the second-order term cannot be had.

    Reference: Suteu and Guo, "Regularizing Deep Multi-Task Networks using Orthogonal Gradients", arXiv 1912.06844,
      2019. The mean over pairs and the weight 10 are those of Pylon, where the penalty carries no gradient, as the
      gradients in it are constants to the backward pass. LibMTL and TorchJD have none.

    >>> import mtjax
    >>> method = cosreg()
    >>> update = mtjax.value_and_update(lambda p: {"a": p[0] ** 2 / 2 + p[1], "b": p[1]}, method)
    >>> _, gradient, state = update(jnp.array([1.0, 3.0]), method.init(None))
    >>> print(gradient.round(3), state.inner.penalty.round(3))
    [-4.  2.] 0.5
    """
    if not weight >= 0:
        raise ValueError(f"weight must be >= 0, got {weight}")

    def init(num_tasks, params):
        del num_tasks, params
        return CosRegState(jnp.zeros(()))

    def refuse(jacobian, losses, state, present):
        raise ValueError(
            "cosreg differentiates the gradients once more, which a Jacobian does not allow: use "
            "mtjax.value_and_update(loss_fn, method)"
        )

    def route(loss_fn, method, *, has_aux, chunk_size):
        def cosreg_fn(params, state, *args, **kwargs):
            losses, pullback, aux = gradients.losses_and_vjp(loss_fn, has_aux, params, args, kwargs)
            rows = gradients.rows_of(pullback, losses.shape[0], chunk_size)
            stacked = gradients.stacked_loss(loss_fn, has_aux, args, kwargs)

            def combine(seen, losses, state, present):
                del state
                penalty, turn, factor = _penalty(gradients.gramian(seen), present)
                # Along what is not seen, nothing moves.
                turned = jax.tree.map(lambda leaf: _matmul(turn, leaf), wide(seen))
                directions = jax.tree.map(
                    lambda leaf, d: jnp.zeros_like(leaf) if d is None else d.astype(leaf.dtype),
                    rows,
                    turned,
                    is_leaf=_none,
                )
                moved = _hessian_products(stacked, params, directions, chunk_size)
                scale = jnp.where(present, weight * factor, 0.0)

                def total(leaf, mine, change):
                    if mine is None:
                        return None
                    change = jnp.where(along(present, leaf), change, jnp.zeros_like(change))
                    return jnp.sum(mine, axis=0) + gradients.combine(wide(change), scale)

                return jax.tree.map(total, rows, wide(seen), moved, is_leaf=_none), None, CosRegState(penalty)

            rule = from_combination(Combination(init, combine), method.is_shared)
            rule = rule.replace(nonfinite=method.nonfinite, drop_zero=method.drop_zero)
            gradient, state = rule.update(rows, state, params, losses=losses)
            return ((losses, aux) if has_aux else losses), gradient, state

        return cosreg_fn

    return from_combination(Combination(init, refuse), route=route)


def _none(node: Any) -> bool:
    return node is None


def _matmul(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """f[K, K] times rows [K, ...]."""
    return jnp.tensordot(matrix.astype(rows.dtype), rows, axes=1, precision=gradients.HIGHEST)


def _penalty(gramian: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """c, and dc/dg_k = factor_k sum_j turn_kj g_j with turn f[K, K], factor f[K]."""
    norm, cosine = solvers.row_normalized(gramian)
    inverse = solvers.reciprocal(norm)
    cosine = jnp.where(jnp.eye(norm.size, dtype=bool), 0.0, cosine)
    number = jnp.sum(present)
    pairs = jnp.maximum(number * (number - 1), 1)
    squared = jnp.sum(cosine**2, axis=1)
    turn = (cosine - jnp.diag(squared)) * inverse[None, :]
    return jnp.sum(squared) / pairs, turn, 4 * inverse / pairs


def _hessian_products(stacked, params: PyTree, directions: PyTree, chunk_size: int | None) -> PyTree:
    """H_k v_k for rows v_k, with a leading axis K."""

    def product(inputs):
        task, direction = inputs
        return jax.jvp(jax.grad(lambda p: stacked(p)[0][task]), (params,), (direction,))[1]

    num_tasks = gradients.num_rows(directions)
    inputs = (jnp.arange(num_tasks), directions)
    if chunk_size is None or chunk_size >= num_tasks:
        return jax.vmap(product)(inputs)
    return jax.lax.map(product, inputs, batch_size=None if chunk_size == 1 else chunk_size)
