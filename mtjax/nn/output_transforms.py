r"""What is done to a predicted field after the network: standardisation, hard boundary values, the mask.

A transform is a function `(u, batch) -> u` of the field u f[B, N] (f[B, N, C] with C > 1 outputs). Models of operators
take a sequence of them and apply it in order; the boundary condition and the mask come last. Columns of the batch which
they read are f[N], the same for all functions, or f[B, N]; for C outputs also f[B, N, C] or f[1, N, C].

Letters: B functions, N points, C outputs, d coordinates.

>>> import jax.numpy as jnp
>>> batch = {"distance": jnp.array([0.0, 0.5]), "mask": jnp.array([[True, True], [True, False]])}
>>> u = jnp.array([[3.0, 4.0], [5.0, 6.0]])
>>> apply_transforms(u, batch, [hard_boundary(), apply_mask]).tolist()
[[0.0, 2.0], [0.0, 0.0]]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Batch = Mapping[str, Any]
Transform = Callable[[jax.Array, Batch], jax.Array]
Column = Callable[[Batch], jax.Array]


def column(name: str) -> Column:
    """A function that reads a column of the batch, and says so if there is none."""

    def read(batch):
        if name not in batch:
            raise ValueError(f"An output transform reads batch[{name!r}], but the batch has {', '.join(batch)}")
        return batch[name]

    return read


def apply_transforms(u: jax.Array, batch: Batch, transforms: Sequence[Transform]) -> jax.Array:
    """u after all transforms, in order."""
    for transform in transforms:
        u = transform(u, batch)
    return u


def like(values: jax.Array, u: jax.Array) -> jax.Array:
    """A column f[N], f[B, N], f[1, N, C] or f[B, N, C] with the axes of u f[B, N] or f[B, N, C].

    Raises:
      ValueError: if it fits none of them.
    """
    values = jnp.asarray(values)
    given = values.shape
    if values.ndim == 1:
        values = values[None]
    if values.ndim == 2 and u.ndim == 3:
        values = values[:, :, None]
    fits = values.ndim == u.ndim and all(c in (1, n) for c, n in zip(values.shape, u.shape, strict=True))
    if not fits or values.shape[1] != u.shape[1]:
        raise ValueError(f"A column of values at the points has shape {given}, which does not fit u of shape {u.shape}")
    return values


def apply_mask(u: jax.Array, batch: Batch) -> jax.Array:
    """u times batch['mask'] (bool[N] or bool[B, N]): exactly zero outside of the domain and at padded points."""
    return jnp.where(like(column("mask")(batch), u), u, 0.0)


def standardised(mean: Column | jax.Array | None = None, std: Column | jax.Array | None = None) -> Transform:
    """The network predicts (u - mean) / std: u = mean + std * N.

    Args:
      mean: values at the points, or a function of the batch that returns them; None reads batch['output_mean']. Where
        the points of a step are a sample of a grid, the columns of the batch must be the same sample.
      std: the same; None reads batch['output_std'].

    Returns:
      The transform.
    """
    mean = column("output_mean") if mean is None else mean
    std = column("output_std") if std is None else std

    def transform(u, batch):
        m, s = (value(batch) if callable(value) else value for value in (mean, std))
        return like(m, u) + like(s, u) * u

    return transform


def hard_boundary(distance: Column | None = None, value: Column | None = None) -> Transform:
    """Dirichlet values that hold by construction: u = g + d N, with d = 0 on the boundary.

    Args:
      distance: d as a function of the batch; None reads batch['distance'], a column. Where u is differentiated with
        respect to the points (`mtjax.physics`) it must be a function of batch['points']: a column is a constant.
      value: g as a function of the batch; None: zero.

    Returns:
      The transform.
    """
    distance = column("distance") if distance is None else distance

    def transform(u, batch):
        u = like(distance(batch), u) * u
        return u if value is None else like(value(batch), u) + u

    return transform
