r"""Physics-informed losses: derivatives of an operator network with respect to the query points, and residuals of PDEs.

    u(x; f) = G(f)(x)           field: points f[N, d] -> u f[B, N], all functions at once
    u_x, u_xx                   forward over forward: the directional derivative d/ds of u(x + s e) and its own

A field maps every point to its value there, so that one tangent, the same unit vector at all points, gives the
derivative at all of them. In a Cartesian DeepONet the tangent goes through the trunk and the one product with the
coefficients; the branch has none, and the values come from the same pass. (Reverse mode per point and function costs
B N backward passes.)

`physics_losses` turns a model and a residual into named losses, one for each of the parts of a batch: 'residual',
'initial', 'boundary', 'data'. These are tasks like any others: `mtjax.optim.ntk_balance`, `gradnorm`, or any other
method weighs them.

>>> import jax.numpy as jnp
>>> from mtjax.physics import derivatives
>>> x = jnp.array([[0.0, 1.0], [2.0, 3.0]])
>>> d = derivatives(lambda x: (x[:, 0] * x[:, 1] ** 2)[None], x, first=(0,), second=(1,))
>>> d.value.tolist(), d.first[0].tolist(), d.first[1].tolist(), d.second[1].tolist()
([[0.0, 18.0]], [[1.0, 9.0]], [[0.0, 12.0]], [[0.0, 4.0]])

References:
  Wang, Wang and Perdikaris, "Learning the Solution Operator of Parametric Partial Differential Equations with
  Physics-informed DeepONets", Science Advances 2021 (the losses; diffusion-reaction example). Mandl et al., "Separable
  Physics-informed DeepONet", CMAME 2025, and its code (forward over forward).

Letters: B functions, N points, d coordinates.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PARTS = ("residual", "initial", "boundary", "data")
Points = jax.Array | Sequence[jax.Array]
Field = Callable[[Any], jax.Array]
Part = Mapping[str, Any]
Residual = Callable[[Field, Part], jax.Array]


class Derivatives(NamedTuple):
    """A field and its derivatives along coordinate axes.

    Attributes:
      value: u, f[B, N].
      first: axis -> f[B, N], first derivative; of the axes in `second` too.
      second: axis -> f[B, N], second derivative.
    """

    value: jax.Array
    first: dict[int, jax.Array]
    second: dict[int, jax.Array]


def derivatives(field: Field, points: Points, *, first: Sequence[int] = (), second: Sequence[int] = ()) -> Derivatives:
    """Value, first and second derivatives of a field along axes, by forward mode.

    Args:
      field: u of the points; the value at a point may depend on that point only.
      points: f[N, d] or f[B, N, d]; or the axes of a grid, a sequence of f[n_i], for a field of axes
        (`SeparableDeepONet`).
      first: axes of the first derivatives.
      second: axes of the second derivatives (which come with the first).

    Returns:
      The value and the derivatives, each of the shape of u.

    Raises:
      ValueError: if an axis is not one of the points', or none is asked for.
    """
    on_axes = isinstance(points, Sequence)
    num_axes = len(points) if on_axes else points.shape[-1]
    twice = tuple(dict.fromkeys(second))
    once = tuple(axis for axis in dict.fromkeys(first) if axis not in twice)
    if not once + twice or any(not 0 <= axis < num_axes for axis in once + twice):
        raise ValueError(
            f"first and second must name axes 0..{num_axes - 1} of the points, at least one, got {tuple(first)} and "
            f"{tuple(second)}"
        )
    along = _along_grid_axes if on_axes else _along_coordinates
    values, gradients, curvatures = [], {}, {}
    for axes, order in ((twice, 2), (once, 1)):
        if axes:
            value, *found = along(field, points, axes, order)
            values.append(value)
            for i, axis in enumerate(axes):
                gradients[axis] = found[0][i]
                if order == 2:
                    curvatures[axis] = found[1][i]
    return Derivatives(values[0], gradients, curvatures)


def _push(function: Callable, x: Any, tangent: Any, order: int) -> tuple[jax.Array, ...]:
    """(f, f') or (f, f', f'') at x along the constant direction `tangent`."""
    if order == 1:
        return jax.jvp(function, (x,), (tangent,))
    (value, slope), (_, curvature) = jax.jvp(lambda x: jax.jvp(function, (x,), (tangent,)), (x,), (tangent,))
    return value, slope, curvature


def _along_coordinates(field: Field, points: jax.Array, axes: Sequence[int], order: int) -> tuple[jax.Array, ...]:
    """u f[B, N], and each derivative f[axes, B, N]. All axes share one pass: the values are computed once."""
    directions = np.eye(points.shape[-1])[list(axes)]

    def along(direction):
        return _push(field, points, jnp.broadcast_to(direction, points.shape), order)

    return jax.vmap(along, out_axes=(None, *(0,) * order))(jnp.asarray(directions, points.dtype))


def _along_grid_axes(field: Field, axes_of_grid: Sequence, axes: Sequence[int], order: int) -> tuple[Any, ...]:
    """The same on a grid: the tangent is in one axis' coordinates, so that the other factors have none."""
    results = []
    for axis in axes:

        def moved(x, axis=axis):
            return field((*axes_of_grid[:axis], x, *axes_of_grid[axis + 1 :]))

        x = axes_of_grid[axis]
        results.append(_push(moved, x, jnp.ones_like(x), order))
    return (results[0][0], *([result[i] for result in results] for i in range(1, order + 1)))


def diffusion_reaction(
    diffusivity: float,
    *,
    reaction: Callable[[jax.Array, Part], jax.Array] | None = None,
    time_axis: int | None = 0,
    space_axes: Sequence[int] = (1,),
) -> Residual:
    r"""Residual of u_t = D lap u + R(u) + s: heat, diffusion-reaction, Fisher's equation; Poisson's without time.

        r = u_t - D sum_i u_ii - R(u) - s

    Args:
      diffusivity: D.
      reaction: R, a function of u f[B, N] and the part of the batch; None: zero (the heat equation).
      time_axis: axis of the points that is time; None: a steady problem, r = -D lap u - R(u) - s.
      space_axes: axes of the points that are space.

    Returns:
      A residual `(field, part) -> f[B, N]`; it reads part['points'] (or part['axes']), and part['source'] s f[B, N] or
      f[N] if it is there.
    """

    def residual(field, part):
        time = () if time_axis is None else (time_axis,)
        d = derivatives(field, points_of(part), first=time, second=space_axes)
        r = -diffusivity * sum(d.second[axis] for axis in space_axes)
        if time_axis is not None:
            r = r + d.first[time_axis]
        if reaction is not None:
            r = r - reaction(d.value, part)
        return r - _rows(part["source"]) if "source" in part else r

    return residual


def darcy(*, axes: Sequence[int] = (0, 1)) -> Residual:
    r"""Residual of Darcy flow, -div(K grad u) = s, with the permeability and its gradient given at the points.

        r = -K sum_i u_ii - sum_i K_i u_i - s

    Args:
      axes: axes of the points that are space.

    Returns:
      A residual `(field, part) -> f[B, N]`; it reads part['points'] (or part['axes']), part['permeability'] K f[B, N],
      part['permeability_gradient'] f[B, N, len(axes)], and part['source'] s f[B, N] or f[N] (1 if it is not there).
    """

    def residual(field, part):
        d = derivatives(field, points_of(part), second=axes)
        gradient = part["permeability_gradient"]
        r = -part["permeability"] * sum(d.second[axis] for axis in axes)
        r = r - sum(gradient[..., i] * d.first[axis] for i, axis in enumerate(axes))
        return r - _rows(part["source"] if "source" in part else jnp.ones(()))

    return residual


def points_of(part: Part) -> Points:
    """The points of a part: the axes of a grid if it has any, else its points."""
    return tuple(part["axes"]) if "axes" in part else part["points"]


def _rows(column: jax.Array) -> jax.Array:
    """A scalar, f[N] or f[B, N] so that it goes with f[B, N]."""
    column = jnp.asarray(column)
    return column.reshape((1,) * (2 - column.ndim) + column.shape)


def field_of(apply_fn: Callable[[Any, Any], Mapping[str, jax.Array]], params: Any, batch: Part) -> Field:
    """The model as a function of its points, everything else in the batch held fixed.

    Args:
      apply_fn: `(params, batch) -> {'u': f[B, N]}`, e.g. `model.apply`.
      params: what it wants.
      batch: the batch without points. A column that goes with the points (a distance, a mean) has no derivative.
    """

    def field(points):
        place = {"axes": tuple(points)} if isinstance(points, Sequence) else {"points": points}
        return apply_fn(params, {**batch, **place})["u"]

    return field


def mean_square(error: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean of error^2 f[B, N] over the entries where `mask` (bool[B, N] or bool[N]); over all without one."""
    if mask is None:
        return jnp.mean(error**2)
    mask = jnp.broadcast_to(_rows(mask), error.shape)
    return jnp.sum(jnp.where(mask, error, 0.0) ** 2) / jnp.maximum(jnp.sum(mask), 1)


def physics_losses(apply_fn: Callable[[Any, Any], Mapping[str, jax.Array]], residual: Residual) -> Callable:
    """A loss function with one loss for each part of the batch.

        'residual'                        mean r^2 at the collocation points
        'initial', 'boundary', 'data'     mean (u - values)^2 at the points of each

    Args:
      apply_fn: `(params, batch) -> {'u': f[B, N]}`, e.g. `model.apply`.
      residual: of the equation, e.g. `diffusion_reaction(0.01)`.

    Returns:
      `loss_fn(params, batch, rng=None) -> {part: loss}`, in the order of `PARTS`. The batch has 'inputs' (and what else
      the model reads of each function, such as 'task'), and for each part that is wanted a dict: 'points' f[N, d] or
      f[B, N, d] (or 'axes'); 'values' f[B, N] or f[N] for all but 'residual'; 'mask' if not all count; and what the
      residual or the model reads at these points.

    Raises:
      ValueError: if the batch has no part.
    """

    def loss_fn(params, batch, rng=None):
        del rng
        common = {name: value for name, value in batch.items() if name not in PARTS}
        losses = {}
        for name in PARTS:
            if name not in batch:
                continue
            part = batch[name]
            field = field_of(apply_fn, params, {**common, **part})
            error = residual(field, part) if name == "residual" else field(points_of(part)) - _rows(part["values"])
            losses[name] = mean_square(error, part.get("mask"))
        if not losses:
            raise ValueError(f"The batch must have some of the parts {', '.join(PARTS)}, got {', '.join(batch)}")
        return losses

    return loss_fn
