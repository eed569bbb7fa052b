r"""What a network reads in place of its raw input: Fourier features, periodic coordinates, a coarser image.

Embeddings are frozen dataclasses with `__call__`, functions of their input alone. They have no parameters: the
frequencies of the random Fourier features are *constants*, drawn from an integer seed by numpy. A frozen array among
the parameters would have to be kept from every optimizer, weight decay and multi-objective method; a variable
collection of its own would be a second thing to carry, save and shard. The price: networks that are vmapped over seeds
share their frequencies, so the spread over such seeds leaves their draw out.

Letters: N points, d coordinates, F frequencies, B batch, H x W image.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RandomFourierFeatures:
    r"""Random Fourier features, x -> [cos(2 pi W x), sin(2 pi W x)], W_ij ~ N(0, sigma^2).

    Attributes:
      num: F, so that there are 2 F features.
      sigma: standard deviation of the frequencies, in cycles per unit of the coordinates.
      seed: of the frequencies, which are constants (see the module).

    Raises:
      ValueError: unless `num` >= 1 and `sigma` > 0.

    Reference: Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains",
      NeurIPS 2020. (Some codes of physics-informed networks leave out 2 pi: theirs is sigma = sigma' / 2 pi here.)

    >>> RandomFourierFeatures(32)(jnp.zeros((5, 2))).shape
    (5, 64)
    """

    num: int
    sigma: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.num < 1 or not self.sigma > 0:
            raise ValueError(f"num must be >= 1 and sigma > 0, got num={self.num} and sigma={self.sigma}")

    def frequencies(self, num_coordinates: int) -> np.ndarray:
        """2 pi W^T, f32[d, F]."""
        draw = np.random.default_rng(self.seed).normal(size=(num_coordinates, self.num))
        return (2 * np.pi * self.sigma * draw).astype(np.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x f[..., d] -> f[..., 2 F]."""
        phase = x @ jnp.asarray(self.frequencies(x.shape[-1]), x.dtype)
        return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


@dataclasses.dataclass(frozen=True)
class PeriodicEmbedding:
    r"""Coordinates of a torus: x_i -> [cos(2 pi k x_i / P_i), sin(2 pi k x_i / P_i)] for k = 1..harmonics.

    A network of these is exactly periodic, with all derivatives, in the coordinates that have a period.

    Attributes:
      periods: P_i for each coordinate; None for one that is passed on as it is.
      harmonics: the largest k.

    Raises:
      ValueError: if a period is not positive, or `harmonics` < 1.

    Reference: Dong and Ni, "A Method for Representing Periodic Functions and Enforcing Exactly Periodic Boundary
      Conditions with Deep Neural Networks", Journal of Computational Physics 2021.

    >>> PeriodicEmbedding((None, 1.0), harmonics=2)(jnp.array([[0.5, 0.25]])).round(3).tolist()
    [[0.5, -0.0, -1.0, 1.0, -0.0]]
    """

    periods: Sequence[float | None]
    harmonics: int = 1

    def __post_init__(self):
        object.__setattr__(self, "periods", tuple(self.periods))
        if self.harmonics < 1 or any(period is not None and not period > 0 for period in self.periods):
            raise ValueError(
                f"periods must be positive or None, and harmonics >= 1, got {self.periods} and {self.harmonics}"
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x f[..., d] -> f[..., features]."""
        if x.shape[-1] != len(self.periods):
            raise ValueError(f"periods has {len(self.periods)} entries, but the points have {x.shape[-1]} coordinates")
        k = jnp.arange(1, self.harmonics + 1, dtype=x.dtype)
        columns = []
        for axis, period in enumerate(self.periods):
            column = x[..., axis : axis + 1]
            if period is None:
                columns.append(column)
            else:
                phase = column * jnp.broadcast_to(2 * jnp.pi / period * k, (*x.shape[:-1], self.harmonics))
                columns += [jnp.cos(phase), jnp.sin(phase)]
        return jnp.concatenate(columns, axis=-1)


@dataclasses.dataclass(frozen=True)
class FlatImage:
    """Every `stride`-th pixel of an image as one row: f[B, H, W, channels] -> f[B, features].

    >>> FlatImage(2)(jnp.zeros((3, 32, 32, 2))).shape
    (3, 512)
    """

    stride: int = 1

    def __call__(self, x: jax.Array) -> jax.Array:
        return x[:, :: self.stride, :: self.stride].reshape(x.shape[0], -1)
