r"""RotoGrad: every task sees the shared features through a rotation of its own, learned so that gradients agree.

A trunk gives features z = f(theta, x) in R^D, and head k sees R_k z. With G_k = dL_k/dz the gradient of task k at the
features of all examples, n_k its norm, U_k = G_k / n_k:

* magnitudes: all gradients get one norm C, which follows the tasks that have converged least,

      dz = C sum_k U_k,    C = sum_k a_k n_k,    a_k = (n_k / n_k(0)) / sum_j (n_j / n_j(0));

* directions: R_k is moved by an optimiser of its own, slower than the model's, so that the gradient which task k would
  send back through it points along the common direction V = (1/K) sum_k U_k,

      minimise over R_k:  - < R_k^T (R_k U_k), V >,    with (R_k U_k), the gradient at R_k z, and V held fixed.

R_k = (I + S_k)^-1 (I - S_k) with a skew-symmetric S_k, the Cayley transform: orthogonal at each step, and I at first.
S_k = (A_k - A_k^T) / 4, so that a step of size eta on A_k, with its two entries for each plane, turns by about eta.

The trunk is walked back once, with dz. Heads are evaluated K times, each time for all tasks, on K rotations of the
features, and follow the plain sum of the losses. A model that was trained so needs its rotations at test time:

    rotation = mtjax.optim.rotations(state)        # f[K, D, D]
    prediction of task k from  z @ rotation[k].T

Letters: K tasks, B batch, D width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtjax import gradients
from mtjax.optim import base, routes, solvers
from mtjax.optim.base import Combination, Method, from_combination
from mtjax.optim.buffers import along, unit_rows
from mtjax.optim.representation import Staged
from mtjax.optim.scalarization import count

PyTree = Any


class RotogradState(NamedTuple):
    """State of `rotograd`.

    Attributes:
      angles: f[K, D, D], A_k.
      optimizer_state: of the optimiser of the rotations.
      initial_norms: f[K], n_k(0); 0 before.
      count: i32[], updates so far.
    """

    angles: jax.Array
    optimizer_state: Any
    initial_norms: jax.Array
    count: jax.Array


def rotograd(width: int, optimizer: optax.GradientTransformation | None = None, *, burn_in: int = 20) -> Method:
    r"""RotoGrad: homogenises magnitudes and directions of gradients at the shared features; see the module's docstring.

    Args:
      width: D, how many features are rotated: all, or the first ones of a wider array. Rotations cost K D^2 memory and
        K D^3 time.
      optimizer: of the rotations; by default `optax.adam(1e-4)`. It should learn more slowly than the model's.
      burn_in: n_k(0) is the norm at the first update, and again at update number `burn_in` (from 0), as losses change
        quickly at first.

    Returns:
      A `Method` for `mtjax.value_and_update` on a `mtjax.Staged` loss function with features [..., D]. Weights are
      C / n_k, by which the gradients at the features are multiplied. With has_aux, aux has a leading axis K: that of
      the heads on each rotation. With K = 1, d = g and the rotation stays. A zero gradient stays zero, has no part in C
      and does not set n_k(0), which then is the task's first norm that is not zero. With all losses multiplied by s,
      the direction at the features is s times as long. Rotations of absent tasks stay as they were.

    Raises:
      ValueError: for arguments out of range; in a plain `update`; if the loss function is not `Staged`, or its features
        are not one array of at least this width.

    Reference: Javaloy and Valera, "RotoGrad: Gradient Homogenization in Multitask Learning", ICLR 2022, and the
      authors' package rotograd 0.1.6. There rotations are exponentials of skew-symmetric matrices, and the objective
      of R_k is multiplied by n_k and a mean norm, which an optimiser like Adam takes out again. LibMTL and TorchJD have
      none.

    >>> import mtjax
    >>> loss_fn = mtjax.Staged(lambda p, x: p[None], lambda p, z, x: {"a": 3 * z[0, 0], "b": z[0, 1]})
    >>> method = rotograd(width=2)
    >>> _, gradient, state = mtjax.value_and_update(loss_fn, method)(jnp.ones(2), method.init(None), None)
    >>> print(gradient.round(3), rotations(state).shape)
    [2. 2.] (2, 2, 2)
    """
    if not (isinstance(width, int) and width >= 1):
        raise ValueError(f"width must be a number of features >= 1, got {width!r}")
    if burn_in < 0:
        raise ValueError(f"burn_in must be a number of updates >= 0, got {burn_in}")
    optimizer = optimizer or optax.adam(1e-4)

    def init(num_tasks, params):
        del params
        angles = jnp.zeros((num_tasks, width, width))
        return RotogradState(angles, optimizer.init(angles), jnp.zeros((num_tasks,)), jnp.zeros((), jnp.int32))

    def combine(rows, losses, state, present):
        units, norm = unit_rows(rows)
        norm = norm.astype(losses.dtype)
        first = (state.count == 0) | (state.count == burn_in) | (state.initial_norms == 0)
        initial = jnp.where(first & present & (norm != 0), norm, state.initial_norms)
        ratio = jnp.minimum(norm * solvers.reciprocal(initial), jnp.finfo(norm.dtype).max / norm.size)
        common = jnp.sum(ratio * solvers.reciprocal(jnp.sum(ratio)) * norm)
        weights = common * solvers.reciprocal(norm)
        direction = common.astype(units.dtype) * jnp.sum(units, axis=0)

        target = (jnp.sum(units, axis=0) / count(present))[..., :width]
        turned = _rotate(units[..., :width], _cayley(state.angles), "kij,k...j->k...i")
        agreement = jnp.einsum("k...i,...j->kij", turned, target, precision=gradients.HIGHEST)
        slope = jax.grad(lambda angles: -jnp.sum(_cayley(angles) * agreement))(state.angles)
        updates, optimizer_state = optimizer.update(slope, state.optimizer_state, state.angles)

        def keep(new, old):
            return jnp.where(along(present, new), new, old) if jnp.shape(new) == state.angles.shape else new

        angles = keep(state.angles + updates, state.angles)
        optimizer_state = jax.tree.map(keep, optimizer_state, state.optimizer_state)
        return direction, weights, RotogradState(angles, optimizer_state, initial, state.count + 1)

    def refuse(jacobian, losses, state, present):
        raise ValueError(
            "rotograd rotates the features that heads see, which a Jacobian does not allow: use "
            "mtjax.value_and_update(mtjax.Staged(encode, heads), method)"
        )

    def route(loss_fn, method, *, has_aux, chunk_size):
        if not isinstance(loss_fn, Staged):
            raise ValueError(
                "rotograd needs to know where the shared features are: pass mtjax.Staged(encode, heads) as the loss "
                f"function, got {type(loss_fn).__name__}"
            )
        rule = from_combination(Combination(init, combine))
        rule = rule.replace(nonfinite=method.nonfinite, drop_zero=method.drop_zero)

        def rotograd_fn(params, state, batch, *rest):
            features, encode_pullback = jax.vjp(lambda p: loss_fn.encode(p, batch, *rest), params)
            _check_features(features, width)

            def heads(p, z):
                return gradients.stacked_loss(loss_fn.heads, has_aux, (z, batch, *rest), {})(p)

            def of_task(p, inputs):
                task, z = inputs
                losses, aux = heads(p, z)
                return losses[task], aux

            num_tasks = jax.eval_shape(heads, params, features)[0].shape[0]
            state = base.materialize(state, num_tasks, params)
            rotation = _cayley(state.inner.angles)

            def of_heads(p, seen):
                inputs = (jnp.arange(num_tasks), seen)
                if chunk_size is None or chunk_size >= num_tasks:
                    return jax.vmap(of_task, (None, 0))(p, inputs)
                return jax.lax.map(
                    lambda one: of_task(p, one), inputs, batch_size=None if chunk_size == 1 else chunk_size
                )

            seen = _rotated(features[None], rotation, "kij,k...j->k...i")
            losses, pullback, aux = jax.vjp(of_heads, params, seen, has_aux=True)
            # Loss k depends on its own rotation of the features only: one pass gives all gradients at features.
            own, at_seen = pullback(jnp.ones_like(losses))
            rows = _rotated(at_seen, rotation, "kij,k...i->k...j")
            direction, state = rule.update(rows, state, features, losses=losses)
            present = base.admitted(method, losses, rows)
            if method.nonfinite == "drop_task":
                own = routes.careful(lambda cotangent: pullback(cotangent)[0], present)(jnp.ones_like(losses))
            gradient = jax.tree.map(jnp.add, encode_pullback(direction)[0], own)
            if method.nonfinite == "skip_step":
                gradient = jax.tree.map(lambda g: jnp.where(present.all(), g, jnp.zeros_like(g)), gradient)
            return ((losses, aux) if has_aux else losses), gradient, state

        return rotograd_fn

    return from_combination(Combination(init, refuse), route=route)


def rotations(state: PyTree) -> jax.Array:
    """The rotations f[K, D, D] of `rotograd`, found anywhere in an optimiser's state: head k sees R_k z.

    Raises:
      ValueError: if there is not exactly one `rotograd` that has made an update.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, RotogradState))
    found = [node for node in nodes if isinstance(node, RotogradState)]
    if len(found) != 1:
        raise ValueError(f"Expected the state of one rotograd after an update, found {len(found)}")
    return _cayley(found[0].angles)


def _check_features(features: PyTree, width: int) -> None:
    if not isinstance(features, jax.Array) or features.ndim == 0 or features.shape[-1] < width:
        found = getattr(features, "shape", type(features).__name__)
        raise ValueError(f"rotograd(width={width}) needs features in one array [..., D] with D >= {width}, got {found}")


def _cayley(angles: jax.Array) -> jax.Array:
    """f[K, D, D] -> rotations f[K, D, D]."""
    skew = (angles - jnp.swapaxes(angles, -1, -2)) / 4
    eye = jnp.eye(skew.shape[-1], dtype=skew.dtype)[None]
    return jnp.linalg.solve(eye + skew, eye - skew)


def _rotate(rows: jax.Array, rotation: jax.Array, subscripts: str) -> jax.Array:
    """[K or 1, ..., D] times rotations f[K, D, D]."""
    wide = jnp.promote_types(jnp.float32, rows.dtype)
    return jnp.einsum(subscripts, rotation.astype(wide), rows.astype(wide), precision=gradients.HIGHEST)


def _rotated(rows: jax.Array, rotation: jax.Array, subscripts: str) -> jax.Array:
    """The same for the first features of a possibly wider array, in its dtype."""
    width = rotation.shape[-1]
    turned = _rotate(rows[..., :width], rotation, subscripts).astype(rows.dtype)
    rest = jnp.broadcast_to(rows[..., width:], (*turned.shape[:-1], rows.shape[-1] - width))
    return jnp.concatenate([turned, rest], axis=-1)
