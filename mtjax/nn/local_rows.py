"""Every device does its own rows of a batch, also where the compiler would not do so by itself.

On a mesh the compiler splits a program operation by operation, from where the inputs are. What it cannot split has its
operand gathered on every device first: `jax.lax.top_k`, a custom call, is of that kind (`on_own_rows`). And a map whose
kernel is split over 'fsdp' can be computed where the rows are, with a gathered kernel, or where the kernel is, with
gathered rows: for one gradient the compiler takes the former, for the K of a Jacobian the latter, unless activations
are pinned to their rows (`pin_rows`).

Pins also keep results right. XLA (of jax 0.10) computes x W wrongly where x is split by rows over 'data' and 'fsdp' and
by columns over 'tensor', W over 'tensor' and 'fsdp', and x W like x, each axis larger than 1; and the gradient of a
lookup whose indices it chose to split over an axis that does not divide them. So what a map with a kernel split over
'tensor' reads or returns, other than the hidden layer between two of them, and what is looked up, is pinned whole.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from mtjax.sharding import BATCH_AXES, auto_mesh, batch_axes

P = jax.sharding.PartitionSpec


def rows_mesh(rows: int) -> Any:
    """The ambient mesh if its devices divide a number of rows, else None; None also inside of another `shard_map`."""
    mesh = auto_mesh()
    return None if mesh is None or rows % math.prod(mesh.shape[name] for name in BATCH_AXES) else mesh


def pin_rows(x: jax.Array, *, axis: int = 0, whole: bool = False) -> jax.Array:
    """x, and by transposition its cotangents, split on a mesh by rows along `axis`, as a batch is that is placed there.

    Args:
      x: f[...].
      axis: the rows.
      whole: whether every device holds its rows whole. Otherwise the compiler may split them over the axis 'tensor':
        for what lies between two maps only, see the module.
    """
    mesh = auto_mesh()
    if mesh is None:
        return x
    spec = [None if whole else P.UNCONSTRAINED] * x.ndim
    spec[axis] = batch_axes(x.shape[axis], mesh) or None
    return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, P(*spec)))


def on_own_rows(function: Callable, x: jax.Array, *, axis: int) -> Any:
    """`function(x)`, device by device on a mesh whose devices divide the rows.

    Args:
      function: treats the entries along `axis` independently and keeps their order, in everything that it returns.
      x: f[...].
      axis: not negative; the rows of a batch, or what is inside of each of them with the rows outermost (tokens).
    """
    mesh = rows_mesh(x.shape[axis])
    if mesh is None:
        return function(x)
    rows = P(*[None] * axis, BATCH_AXES)
    return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows)(x)
