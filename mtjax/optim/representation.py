r"""Gradients at the shared representation: K backward passes through the heads, one through the trunk.

A model is often a trunk z = f(theta, x) and heads L_k(phi, z). Then d L_k / d theta = (d L_k / d z) (d z / d theta),
and a method can look at the small d L_k / d z (every example's features, for each task) instead of at d L_k / d theta.
Its direction at z is walked back through the trunk once, so the step costs hardly more than that of the summed loss;
what is given up is that angles and norms are those of feature gradients. Heads follow the plain sum of the losses, each
its own task.

    loss_fn = mtjax.Staged(encode, heads)         # still an ordinary loss function
    method = mtjax.optim.at_representation(mtjax.optim.mgda())

Reference: Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018, section 3.3 (MGDA-UB);
Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, and Chen et al., "GradDrop", NeurIPS 2020, also work on
features.

Letters: K tasks, B batch, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax import gradients
from mtjax.optim import base

PyTree = Any


class Staged(NamedTuple):
    """A loss function in two stages; itself a loss function `(params, batch, *rest) -> losses`.

    Attributes:
      encode: `(params, batch, *rest) -> features`, a pytree of arrays, e.g. f[B, D].
      heads: `(params, features, batch, *rest) -> losses` (a dict of scalars or f[K]).

    >>> loss_fn = Staged(lambda p, x: x @ p["trunk"], lambda p, z, x: {"a": (z * p["a"]).mean(), "b": (z**2).mean()})
    >>> params = {"trunk": jnp.ones((2, 1)), "a": jnp.array(3.0)}
    >>> {name: loss.item() for name, loss in loss_fn(params, jnp.ones((4, 2))).items()}
    {'a': 6.0, 'b': 4.0}
    """

    encode: Callable[..., PyTree]
    heads: Callable[..., Any]

    def __call__(self, params: PyTree, batch: Any, *rest: Any) -> Any:
        return self.heads(params, self.encode(params, batch, *rest), batch, *rest)


def at_representation(method: base.Method) -> base.Method:
    """Lets a method see the gradients with respect to the shared features of a `Staged` loss function.

    Args:
      method: any method of `mtjax.optim` whose state does not have the shape of the parameters.

    Returns:
      A method for `mtjax.value_and_update` on a `Staged` loss function. Its Gramian and weights are those at the
      features. Its plain `update` takes a Jacobian with respect to features and returns their direction.

    Raises:
      ValueError: if the method brings a route of its own; later, if the loss function is not `Staged`.
    """
    if method.route is not None:
        raise ValueError("at_representation takes a method without a route of its own (several batches, perturbations)")
    return method.replace(is_shared=True, route=_route)


def _route(loss_fn: Callable, method: base.Method, *, has_aux: bool, chunk_size: int | None) -> Callable:
    if not isinstance(loss_fn, Staged):
        raise ValueError(
            "at_representation needs to know where the shared representation is: pass mtjax.Staged(encode, heads) as "
            f"the loss function, got {type(loss_fn).__name__}"
        )

    def representation_fn(params, state, batch, *rest):
        features, encode_pullback = jax.vjp(lambda p: loss_fn.encode(p, batch, *rest), params)

        args = (batch, *rest)
        if method.nonfinite == "drop_task":  # a bad task must not reach the rows of the others
            both = lambda p_and_z, *args: loss_fn.heads(*p_and_z, *args)  # noqa: E731
            losses, pullbacks, aux = gradients.separate_pullbacks(both, has_aux, (params, features), args, {})
            of_params, rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[pullback() for pullback in pullbacks])
            own = jax.tree.map(lambda g: g.sum(0), base.drop_rows(of_params, base.admitted(method, losses, rows)))
        else:

            def of_heads(p, z):
                return gradients.stacked_loss(loss_fn.heads, has_aux, (z, *args), {})(p)

            losses, heads_pullback, aux = jax.vjp(of_heads, params, features, has_aux=True)
            rows = gradients.rows_of(lambda cotangent: heads_pullback(cotangent)[1], losses.shape[0], chunk_size)
            own = heads_pullback(jnp.ones_like(losses))[0]
        direction, state = method.update(rows, state, features, losses=losses)
        gradient = jax.tree.map(jnp.add, encode_pullback(direction)[0], own)
        if method.nonfinite == "skip_step":
            usable = state.present.all()
            gradient = jax.tree.map(lambda g: jnp.where(usable, g, jnp.zeros_like(g)), gradient)
        return ((losses, aux) if has_aux else losses), gradient, state

    return representation_fn
