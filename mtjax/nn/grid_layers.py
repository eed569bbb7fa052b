r"""Layers on regular grids: spectral convolution, a block of convolutions, and the way in and out of a batch.

    spectral convolution    y = F^-1 ( W_k F(x)_k  for the low modes k, 0 for the others )

Letters: B batch, n_1..n_d grid (N points in all, last axis fastest), C channels, F output channels, m_i modes.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def grid_inputs(batch: Mapping[str, Any], *, coordinates: bool) -> jax.Array:
    """The images batch['inputs'] f[B, n_1..n_d, C], with the coordinates of the nodes as more channels if asked for.

    The coordinates are batch['points'], f[N, d] or f[B, N, d], the nodes in the order of the flattened image.
    """
    x = batch["inputs"]
    if not coordinates:
        return x
    grid, points = x.shape[1:-1], batch["points"]
    if points.shape[-2] != math.prod(grid):
        raise ValueError(
            f"The points must be the {math.prod(grid)} nodes of the inputs' grid {grid}, got {points.shape[-2]} points"
        )
    nodes = points.reshape(*points.shape[:-2], *grid, points.shape[-1])
    if points.ndim == 2:
        nodes = jnp.broadcast_to(nodes, (x.shape[0], *nodes.shape))
    return jnp.concatenate([x, nodes.astype(x.dtype)], axis=-1)


def flat_outputs(y: jax.Array) -> jax.Array:
    """Images f[B, n_1..n_d, C] as fields f[B, N], f[B, N, C] for C > 1."""
    y = y.reshape(y.shape[0], -1, y.shape[-1])
    return y[..., 0] if y.shape[-1] == 1 else y


class SpectralConv(nn.Module):
    """Spectral convolution: a linear map of the channels for every low Fourier mode, f[B, n_1..n_d, C] -> [..., F].

    Modes -m_i .. m_i - 1 of all axes but the last, 0 .. m_d - 1 of the last (the others follow from y being real). What
    it does to a signal without higher modes does not depend on the grid. The complex maps are stored as two real
    parameters, 'real' and 'imag', of the shape [2 m_1, .., m_d, C, F], drawn so that the energy of a mode is kept.

    Attributes:
      features: F.
      modes: m_1, .., m_d (d is 1 to 3).
    """

    features: int
    modes: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        grid = x.shape[1:-1]
        if len(self.modes) != len(grid):
            raise ValueError(f"modes must have an entry for each axis of the grid {grid}, got {tuple(self.modes)}")
        if any(not 1 <= m <= n // 2 for m, n in zip(self.modes, grid, strict=True)):
            raise ValueError(f"modes must be 1 to half of the grid {grid}, got {tuple(self.modes)}")
        *full, last = self.modes
        shape = (*(2 * m for m in full), last, x.shape[-1], self.features)
        init = nn.initializers.normal((2 * x.shape[-1]) ** -0.5)
        weight = jax.lax.complex(self.param("real", init, shape), self.param("imag", init, shape))

        axes = tuple(range(1, 1 + len(grid)))
        spectrum = jax.lax.slice_in_dim(jnp.fft.rfftn(x, axes=axes), 0, last, axis=axes[-1])
        for axis, m in zip(axes, full, strict=False):
            n = spectrum.shape[axis]
            ends = [jax.lax.slice_in_dim(spectrum, *part, axis=axis) for part in ((0, m), (n - m, n))]
            spectrum = jnp.concatenate(ends, axis=axis)
        spectrum = jnp.einsum("b...c,...cf->b...f", spectrum, weight)
        for axis, m in zip(axes, full, strict=False):
            gap = (*spectrum.shape[:axis], x.shape[axis] - 2 * m, *spectrum.shape[axis + 1 :])
            low, high = jnp.split(spectrum, 2, axis=axis)
            spectrum = jnp.concatenate([low, jnp.zeros(gap, spectrum.dtype), high], axis=axis)
        return jnp.fft.irfftn(spectrum, s=grid, axes=axes)  # pads the last axis with zeros


class Conv3(nn.Module):
    """Convolution of side 3 that keeps the size, as a matrix product: f[B, n_1..n_d, C] -> f[B, n_1..n_d, features].

    The same function and parameters as `nn.Conv(features, (3,) * d)`. A stack of networks (`vmap` over parameters)
    turns a convolution into a grouped one, which is far slower on a CPU; a product of matrices stays one.

    Attributes:
      features: channels.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes, channels = x.ndim - 2, x.shape[-1]
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (3,) * axes + (channels, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        padded = jnp.pad(x, [(0, 0), *[(1, 1)] * axes, (0, 0)])
        shifts = itertools.product(range(3), repeat=axes)
        # The neighbours of every node, side by side: 3^d C channels.
        patches = jnp.concatenate(
            [
                padded[(slice(None), *(slice(s, s + n) for s, n in zip(shift, x.shape[1:-1], strict=True)))]
                for shift in shifts
            ],
            axis=-1,
        )
        return patches @ kernel.reshape(-1, self.features) + bias.reshape((1,) * (axes + 1) + (-1,))


class ConvBlock(nn.Module):
    """Twice [convolution of side 3, group normalization, activation]: f[B, n_1..n_d, C] -> f[B, n_1..n_d, features].

    Attributes:
      features: channels.
      groups: most groups of the normalization; fewer where they do not divide the channels.
      activation: after each normalization.
    """

    features: int
    groups: int = 8
    activation: Callable[[jax.Array], jax.Array] = nn.gelu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups = math.gcd(self.groups, self.features)
        for layer in range(2):
            x = Conv3(self.features, name=f"conv_{layer}")(x)
            x = self.activation(nn.GroupNorm(num_groups=groups, name=f"norm_{layer}")(x))
        return x
