r"""Sharpness-aware wrappers: methods on gradients at worst-case perturbations of the parameters.

* `sam`, `asam`: one perturbation for all tasks, along the gradient of the summed loss; any method then runs on the
  per-task gradients at the perturbed point. One more forward and backward pass.
* `flat_regions`: a perturbation for *each* task, along its own gradient. What the perturbation changes is the task's
  flatness gradient, and a method aggregates losses and flatness apart:

      e_k = rho g_k / |g_k|,  g_k^SAM = grad L_k(theta + e_k),  g_k^flat = g_k^SAM - g_k
      d = method(g_1, ..., g_K) + method(g_1^flat, ..., g_K^flat)      on shared parameters
      d = g_k^SAM                                                      on those of task k alone

Letters: K tasks, P parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax import gradients
from mtjax.optim import base, routes, sharing
from mtjax.optim.base import Method, MethodState

PyTree = Any


def sam(method: Method, rho: float = 0.05) -> Method:
    """Sharpness-aware minimisation: the method runs on gradients at theta + rho g / |g|, g the summed loss's gradient.

    Args:
      method: any method of `mtjax.optim`.
      rho: radius of the perturbation, over all parameters together.

    Returns:
      A method for `mtjax.value_and_update`; its plain `update` is that of the given method. Losses are reported at the
      unperturbed parameters, weights are computed at the perturbed ones. Where g is zero nothing is perturbed.

    Raises:
      ValueError: for a negative radius.

    Reference: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021.
    """
    _check_radius(rho)

    def perturbation(params, gradient):
        del params
        return _along(gradient, rho)

    return _perturbed(method, perturbation)


def asam(method: Method, rho: float = 0.5, *, eta: float = 0.01) -> Method:
    """Adaptive SAM: the perturbation is measured relative to the size of each parameter, so rescaling layers is free.

    e = rho T^2 g / |T g| with T = diag(|theta| + eta).

    Args:
      method: any method of `mtjax.optim`.
      rho: radius in units of the parameters' own size.
      eta: what a parameter of size zero counts as.

    Returns:
      A method, as for `sam`.

    Raises:
      ValueError: for a negative radius or eta.

    Reference: Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
      Networks", ICML 2021, equation 5.
    """
    _check_radius(rho)
    if not eta >= 0:
        raise ValueError(f"eta must be >= 0, got {eta}")

    def perturbation(params, gradient):
        size = jax.tree.map(lambda p: jnp.abs(p) + jnp.asarray(eta, p.dtype), params)
        scaled = jax.tree.map(jnp.multiply, size, gradient)
        return jax.tree.map(jnp.multiply, size, _along(scaled, rho))

    return _perturbed(method, perturbation)


def _check_radius(rho: float) -> None:
    if not rho >= 0:
        raise ValueError(f"rho must be >= 0, got {rho}")


def _perturbed(method: Method, perturbation: Callable[[PyTree, PyTree], PyTree]) -> Method:
    """The method at parameters that are perturbed along the gradient of the summed loss."""
    if not isinstance(method, Method):
        raise ValueError("sam and asam take a method of mtjax.optim (apply them before optax.chain)")

    def route(loss_fn, outer, *, has_aux, chunk_size):
        # What was wrapped around it meanwhile (`on_shared`, `nonfinite`) holds at the perturbed point.
        made_of_others = outer.weighting is None and outer.combination is None
        there = method if made_of_others else outer.replace(route=method.route)
        inner = routes.value_and_update(loss_fn, there, has_aux, chunk_size)

        def perturbed_fn(params, state, *args):
            losses, pullback, aux = gradients.losses_and_vjp(loss_fn, has_aux, params, args, {})
            away = jax.tree.map(jnp.add, params, perturbation(params, pullback(jnp.ones_like(losses))))
            _, gradient, state = inner(away, state, *args)
            return ((losses, aux) if has_aux else losses), gradient, state

        return perturbed_fn

    return method.rerouted(route)


class FlatRegions(NamedTuple):
    """State of `flat_regions`.

    Attributes:
      loss: the method's state for the gradients of the losses.
      flat: its state for the gradients of the flatness.
    """

    loss: MethodState
    flat: MethodState


def flat_regions(method: Method, rho: float = 0.05, *, rho_specific: float | None = None) -> Method:
    r"""Task-based flat regions (F-MTL, SAM-MTL): every task looks for a flat minimum of its own.

    See the module's docstring for the equations. Cost: two forward and 2 K backward passes' worth of work, plus K
    forward passes at the K perturbed points; memory 2 K P for both Jacobians. `chunk_size` of `mtjax.value_and_update`
    says how many perturbed points are visited at once (vmap within a chunk).

    Args:
      method: any method of `mtjax.optim` without a route of its own. Wrap it in `on_shared` to say which parameters are
        shared; by default (no `on_shared`) the method sees all of them.
      rho: radius of the perturbation of the parameters that the method sees.
      rho_specific: of those that it does not see, in a ball of their own; by default the same.

    Returns:
      A method for `mtjax.value_and_update`. Its plain `update(jacobian, state, params, losses=..., perturbed=...)`
      takes the Jacobian at the perturbed points (row k at the k-th point) as `perturbed`. Diagnostics are those of the
      loss part; both are in the state. A task whose gradient is zero is not perturbed. Scaling all losses scales the
      direction if it does so for the method (the perturbations do not change).

    Raises:
      ValueError: for a negative radius or a method with a route of its own.

    Reference: Phan et al., "Improving Multi-task Learning via Seeking Task-based Flat Regions", arXiv 2211.13723, 2022
      (ICCV 2025 as "Beyond Losses Reweighting"), algorithm 1. Shared and task-specific parameters are perturbed at the
      same time, each within its own radius.
    """
    _check_radius(rho)
    rho_specific = rho if rho_specific is None else rho_specific
    _check_radius(rho_specific)
    if not isinstance(method, Method) or method.route is not None:
        raise ValueError("flat_regions takes a method of mtjax.optim that works on gradients at the parameters")

    def make(num_tasks, params):
        states = FlatRegions(*(base.materialize(method.init(params), num_tasks, params) for _ in range(2)))
        return MethodState.wrap(states, num_tasks)

    def update(jacobian, state, params=None, *, losses=None, perturbed=None, **extra):
        del extra
        if perturbed is None:
            raise ValueError(
                "flat_regions needs gradients at perturbed parameters: use mtjax.value_and_update, or pass "
                "update(..., perturbed=J) with row k taken at the k-th perturbed point"
            )
        num_tasks = gradients.num_rows(jacobian)
        shapes = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), jacobian)
        state = base.materialize(state, num_tasks, shapes)
        flatness = jax.tree.map(jnp.subtract, perturbed, jacobian)
        # The policy looks at both: a task whose perturbed gradient is not finite is out altogether.
        seen = jnp.zeros((num_tasks,)) if losses is None else gradients.stack_losses(losses)
        present = base.admitted(method, seen, (jacobian, perturbed))
        if method.nonfinite == "drop_task":
            jacobian, flatness, perturbed = (base.spoil_rows(j, present) for j in (jacobian, flatness, perturbed))
        elif method.nonfinite == "skip_step":
            jacobian, flatness = (base.spoil_rows(j, present.all()[None]) for j in (jacobian, flatness))
        of_loss, loss_state = method.update(jacobian, state.inner.loss, params, losses=losses)
        of_flat, flat_state = method.update(flatness, state.inner.flat, params, losses=losses)
        gradient = jax.tree.map(jnp.add, of_loss, of_flat)
        return gradient, base.record(state, FlatRegions(loss_state, flat_state), *loss_state[1:])

    def observe(state, losses, present):
        parts = (routes.observe(method, part, losses) for part in state.inner)
        del present
        return state._replace(inner=FlatRegions(*parts))

    def route(loss_fn, outer, *, has_aux, chunk_size):
        def flat_regions_fn(params, state, *args):
            # A task that is to be left out must not reach the rows of the others.
            separate = method.nonfinite == "drop_task"
            jacobian_fn = gradients.value_and_jacobian(loss_fn, has_aux, chunk_size, separate=separate)
            result, rows = jacobian_fn(params, *args)
            losses = result[0] if has_aux else result
            num_tasks = losses.shape[0]
            shared = sharing.shared_leaves(method.is_shared, params, rows)

            def own_point(task):
                row = jax.tree.map(lambda leaf: leaf[task], rows)
                mine, own = _parts(shared, row)
                step = jax.tree.map(jnp.add, _along(mine, rho), _along(own, rho_specific))
                return jax.tree.map(jnp.add, params, step)

            def at_own_point(task):
                stacked = gradients.stacked_loss(loss_fn, has_aux, args, {})
                return jax.grad(lambda p: stacked(p)[0][task])(own_point(task))

            tasks = jnp.arange(num_tasks)
            if separate:
                points = [
                    gradients.separate_pullbacks(loss_fn, has_aux, own_point(k), args, {}) for k in range(num_tasks)
                ]
                perturbed = jax.tree.map(
                    lambda *g: jnp.stack(g), *[pulls[k]() for k, (_, pulls, _) in enumerate(points)]
                )
            elif chunk_size is None or chunk_size >= num_tasks:
                perturbed = jax.vmap(at_own_point)(tasks)
            else:
                perturbed = jax.lax.map(at_own_point, tasks, batch_size=None if chunk_size == 1 else chunk_size)
            gradient, state = outer.update(rows, state, params, losses=losses, perturbed=perturbed)
            return result, gradient, state

        return flat_regions_fn

    observer = observe if routes.observes(method) else None
    return base.composite(base.Deferred(make), update, route=route, observer=observer)


def _parts(shared: PyTree, row: PyTree) -> tuple[PyTree, PyTree]:
    """The shared and the task-specific part of a gradient, zeros elsewhere."""
    mine = jax.tree.map(lambda flag, g: jnp.where(flag, g, jnp.zeros_like(g)), shared, row)
    return mine, jax.tree.map(lambda flag, g: jnp.where(flag, jnp.zeros_like(g), g), shared, row)


def _along(direction: PyTree, length: float) -> PyTree:
    """The direction scaled to a length; zero stays zero. Safe for entries whose squares leave the range of floats."""
    leaves = jax.tree.leaves(direction)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0.0).astype(float) for leaf in leaves]))
    safe = jnp.where(largest > 0, largest, 1.0)
    unit = jax.tree.map(lambda leaf: leaf / safe.astype(leaf.dtype), direction)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(float))) for leaf in jax.tree.leaves(unit)))
    factor = length / jnp.where(norm > 0, norm, 1.0)
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), unit)
