r"""MT-DeepONet: one DeepONet for many forms of an equation, or many geometries, which reads a description of its task.

    G(f, task)(x) = sum_k b_k(f, code(task)) t_k(x)            no bias; no head, index or embedding of a task

The code is a physical description, so that tasks which were not trained on have one too. It enters the branch in one of
three ways, each with the network that was published for it:

| problem                          | code                                   | model              | parameters |
|----------------------------------|----------------------------------------|--------------------|------------|
| `fisher_deeponet`: source terms  | polynomial coefficients, `with_code`   | two MLPs           | 136,664    |
| `darcy_deeponet`: 2-D geometries | mask, a channel, `with_mask_channel`   | CNN branch         | 559,164    |
| `heat3d_deeponet`: 3-D designs   | design parameters, `scaled_design`     | residual trunk     | 240,880    |

Where the geometry varies, the prediction is multiplied by the mask, before the loss and at inference.

`small_deeponet` is another recipe, for a budget of seconds to minutes: GELU, and random Fourier features before the
trunk. At equal cost its error is a third of that of the published branch, trunk and rate of learning.

How they are trained (optimizers, schedules, the subset of weights for a transfer to a new geometry) is in
`mtjax.models.mt_deeponet_training`.

Reference: Kumar, Goswami, Kontolati, Shields and Karniadakis, "Synergistic Learning with Multi-Task DeepONet for
Efficient PDE Problem Solving", Neural Networks 2025 (arXiv 2408.02198), and its code, whose sizes these are. Deviation:
models here are free of state, so batch normalization (3-D only) is replaced, see `heat3d_deeponet`.

Letters: B functions, m sensors, q numbers in a code, H x W image, p basis functions.

>>> import jax
>>> batch = {"inputs": jnp.zeros((1, 68)), "points": jnp.zeros((1280, 2))}
>>> params = jax.eval_shape(fisher_deeponet().init, jax.random.key(0), batch)
>>> sum(leaf.size for leaf in jax.tree.leaves(params))
136664
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.models.deeponet import DeepONet
from mtjax.nn.embeddings import FlatImage, RandomFourierFeatures
from mtjax.nn.operator_layers import CNN, MLP, ResidualMLP
from mtjax.nn.output_transforms import Transform, apply_mask

leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)  # the slope of TensorFlow's, not of Flax's 0.01
normal = nn.initializers.normal
_glorot = {"kernel_init": nn.initializers.glorot_normal(), "bias_init": normal(0.01)}
PublishedDense = functools.partial(nn.Dense, **_glorot)
PublishedConv = functools.partial(nn.Conv, kernel_size=(5, 5), padding="SAME", **_glorot)
SmallNormalDense = functools.partial(nn.Dense, kernel_init=normal(1e-3), bias_init=normal(1e-3))
KerasLayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-3)


def fisher_deeponet(
    *,
    num_basis: int = 300,
    branch_hidden: Sequence[int] = (128, 128),
    trunk_hidden: Sequence[int] = (128, 128, 128),
    transforms: Sequence[Transform] = (),
) -> DeepONet:
    """The network for several source terms of Fisher's equation; the defaults are the published sizes.

    Args:
      num_basis: p.
      branch_hidden: hidden widths of the branch, which reads 'inputs' f[B, q + m] (`with_code`; 4 + 64 as published).
      trunk_hidden: hidden widths of the trunk, which reads 'points' (t, x).
      transforms: output transforms; published is `standardised()` with the training outputs' moments at every point.

    Returns:
      The model. Its kernels have a penalty of 1e-3 (`branch_penalty`).
    """
    branch = MLP((*branch_hidden, num_basis), leaky_relu, norm=KerasLayerNorm, dense=PublishedDense)
    trunk = MLP((*trunk_hidden, num_basis), leaky_relu, dense=PublishedDense)
    return DeepONet(branch, trunk, use_bias=False, transforms=tuple(transforms))


def darcy_deeponet(
    *,
    num_basis: int = 150,
    channels: Sequence[int] = (16, 32, 64, 64),
    branch_hidden: Sequence[int] = (128, 128),
    trunk_hidden: Sequence[int] = (64, 128, 128, 128),
    dropout: float = 0.1,
    transforms: Sequence[Transform] = (apply_mask,),
) -> DeepONet:
    """The network for Darcy flow in several geometries; the defaults are the published sizes.

    Args:
      num_basis: p.
      channels: of the convolutions, each followed by pooling; the branch reads 'inputs' f[B, H, W, 2]
        (`with_mask_channel`; 100 x 100 as published).
      branch_hidden: hidden widths after the convolutions.
      trunk_hidden: hidden widths of the trunk, which reads 'points' scaled to [-1, 1].
      dropout: rate in the hidden layers after the convolutions.
      transforms: output transforms; the published one multiplies by batch['mask'].

    Returns:
      The model; it is published with targets of 10 u.
    """
    head = MLP((*branch_hidden, num_basis), nn.tanh, dropout=dropout, dense=PublishedDense)
    branch = CNN(tuple(channels), head, conv=PublishedConv)
    trunk = MLP((*trunk_hidden, num_basis), leaky_relu, dense=PublishedDense)
    return DeepONet(branch, trunk, use_bias=False, transforms=tuple(transforms))


def heat3d_deeponet(
    *,
    num_basis: int = 200,
    branch_hidden: Sequence[int] = (32, 64, 128, 128),
    trunk_hidden: Sequence[int] = (32, 64, 64, 64, 128, 128, 128, 128, 128),
    dropout: float | Sequence[float] = (0.1, 0.1),
    norm: Any = KerasLayerNorm,
    transforms: Sequence[Transform] = (apply_mask,),
) -> DeepONet:
    """The network for heat in plates with holes; the defaults are the published sizes.

    Args:
      num_basis: p.
      branch_hidden: hidden widths of the branch, which reads 'inputs' f[B, 2] (`scaled_design`) and ends in SELU.
      trunk_hidden: hidden widths of the residual trunk, which reads 'points' (x, y, z) as they are.
      dropout: rates after the branch's first hidden layers.
      norm: factory of the normalization. Published is batch normalization. The default replaces it by layer
        normalization (238,448 parameters: no moments); `FixedNorm` is its inference form, whose moments are parameters
        without gradient (240,880, the count of the published values).
      transforms: output transforms; the published one multiplies by batch['mask'].

    Returns:
      The model; it is published with temperatures scaled to [0, 1] by the extremes of the training set.
    """
    branch = MLP((*branch_hidden, num_basis), nn.swish, nn.selu, norm=norm, dropout=dropout, dense=SmallNormalDense)
    trunk = ResidualMLP((*trunk_hidden, num_basis), nn.swish, norm=norm, dense=SmallNormalDense)
    return DeepONet(branch, trunk, use_bias=False, transforms=tuple(transforms))


def small_deeponet(
    *,
    num_basis: int = 100,
    branch_hidden: Sequence[int] = (128, 128),
    trunk_hidden: Sequence[int] = (128, 128, 128),
    num_frequencies: int = 32,
    sigma: float = 1.0,
    image_stride: int | None = None,
    seed: int = 0,
    transforms: Sequence[Transform] = (),
) -> DeepONet:
    """A network that trains in seconds: GELU branch, frozen random Fourier features before a GELU trunk.

    Args:
      num_basis: p.
      branch_hidden: hidden widths of the branch.
      trunk_hidden: hidden widths of the trunk.
      num_frequencies: of the Fourier features; there are twice as many features.
      sigma: standard deviation of the frequencies, in cycles per unit of the coordinates.
      image_stride: for 'inputs' f[B, H, W, channels]: the branch reads every `image_stride`-th pixel; None for 'inputs'
        f[B, m].
      seed: of the frequencies.
      transforms: output transforms, `(apply_mask,)` where the geometry varies.

    Returns:
      The model.
    """
    embed = None if image_stride is None else FlatImage(image_stride)
    branch = MLP((*branch_hidden, num_basis), embed=embed)
    trunk = MLP((*trunk_hidden, num_basis), embed=RandomFourierFeatures(num_frequencies, sigma, seed))
    return DeepONet(branch, trunk, use_bias=False, transforms=tuple(transforms))


def with_code(field: jax.Array, code: jax.Array, *, zeroed: bool = False) -> jax.Array:
    """Coefficients of the equation before the sensor values: [code, field], f[B, q + m].

    Args:
      field: f[B, m], sensor values (standardised).
      code: f[B, q], for Fisher's equation the coefficients of u, u^2, u^3, u^4 in the source term.
      zeroed: the control without the code: zeros of its size, so that the network stays the same.

    Returns:
      f[B, q + m].
    """
    return jnp.concatenate([jnp.zeros_like(code) if zeroed else code, field], axis=-1)


def with_mask_channel(field: jax.Array, mask: jax.Array, *, zeroed: bool = False) -> jax.Array:
    """The geometry as a second channel of the image: f[B, H, W, 2].

    Args:
      field: f[B, H, W], the field on the grid (standardised log-permeability).
      mask: bool[B, H, W] or bool[H, W], True in the domain.
      zeroed: the control without the mask: zeros in its place.

    Returns:
      f[B, H, W, 2].
    """
    mask = jnp.broadcast_to(jnp.asarray(mask, field.dtype), field.shape)
    return jnp.stack([field, jnp.zeros_like(mask) if zeroed else mask], axis=-1)


def scaled_design(design: jax.Array, low: Sequence[float], high: Sequence[float]) -> jax.Array:
    """Design parameters scaled to [0, 1] by the extremes of the training designs.

    Args:
      design: f[B, q].
      low: f[q], least values over the training designs.
      high: f[q], greatest values.

    Returns:
      f[B, q].

    Raises:
      ValueError: if a parameter does not vary.

    >>> scaled_design(jnp.array([[2.0, 1.25], [9.0, 0.9]]), [2, 0.9], [9, 1.6]).round(2).tolist()
    [[0.0, 0.5], [1.0, 0.0]]
    """
    low, high = np.asarray(low, design.dtype), np.asarray(high, design.dtype)
    if not (high > low).all():
        raise ValueError(f"Every design parameter must vary: high > low, got low={low.tolist()}, high={high.tolist()}")
    return (design - low[None]) / (high - low)[None]


def branch_penalty(params: Any, weight: float = 1e-3) -> jax.Array:
    """weight times the sum of squares of the branch's kernels (Keras's L2 regularizer), to be added to the loss.

    Args:
      params: of a `DeepONet`, with or without the level 'params'.
      weight: 1e-3 as published for Fisher's equation, 0 for the other two.
    """
    branch = params.get("params", params)["branch"]
    leaves = jax.tree_util.tree_leaves_with_path(branch)
    return weight * sum(jnp.sum(leaf**2) for path, leaf in leaves if path[-1].key == "kernel")
