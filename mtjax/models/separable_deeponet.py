r"""Separable DeepONet: one trunk per coordinate, so that a grid of n^d points costs d n evaluations of small networks.

    t_p(x, y, ...) = sum_r X_rp(x) Y_rp(y) ...         G(f)(x, y, ...) = sum_p b_p(f) t_p(x, y, ...) + b0

`SeparableTrunk` is a trunk like any other: at scattered points it multiplies its factors point by point. On a grid that
is given by its axes, batch['axes'], `SeparableDeepONet` leaves the product to one einsum, and never holds the N x p
basis. Both are the same function. Derivatives along the axes: `mtjax.physics.derivatives` with the axes as the points.

Reference: Mandl, Goswami, Lambers and Ricken, "Separable Physics-informed DeepONet: Breaking the Curse of
Dimensionality in Physics-informed Machine Learning", CMAME 2025, whose equation this is. A version of their code (2024)
contracts the branch with each factor before the product over the axes, sum_r prod_i (sum_p b_rp X^i_rp), a polynomial
of degree d in the branch; here the branch enters once. The factors' last layer is linear here; there the activation
follows it.

Letters: B functions, N = n_1 ... n_d points, d coordinates (1 to 4), r rank, p basis functions.
"""

import string
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.models.deeponet import merge
from mtjax.nn.output_transforms import Transform, apply_transforms


class SeparableTrunk(nn.Module):
    """Product over the coordinates of one network each, summed over the rank.

    Attributes:
      nets: for each coordinate a network f[..., 1] -> f[..., r p].
      rank: r.

    Raises:
      ValueError: if there are no nets or more than four, or `rank` < 1.
    """

    nets: Sequence[nn.Module]
    rank: int

    def __post_init__(self):
        if not 1 <= len(self.nets) <= 4:
            raise ValueError(f"nets must hold a network for each of 1 to 4 coordinates, got {len(self.nets)}")
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}")
        super().__post_init__()

    def factors(self, columns: Sequence[jax.Array], *, train: bool = False) -> list[jax.Array]:
        """The networks at coordinates f[...] of each axis: f[..., r, p] each."""
        if len(columns) != len(self.nets):
            raise ValueError(f"The trunk has nets for {len(self.nets)} coordinates, got {len(columns)}")
        values = [net(x[..., None], train=train) for net, x in zip(self.nets, columns, strict=True)]
        for axis, value in enumerate(values):
            if value.shape[-1] % self.rank:
                raise ValueError(f"Net {axis} must end in a multiple of rank={self.rank}, got {value.shape[-1]}")
        return [value.reshape(*value.shape[:-1], self.rank, -1) for value in values]

    def __call__(self, points: jax.Array, *, train: bool = False) -> jax.Array:
        """points f[..., d] -> f[..., p]."""
        product, *others = self.factors([points[..., axis] for axis in range(points.shape[-1])], train=train)
        for factor in others:
            product = product * factor
        return product.sum(-2)


class SeparableDeepONet(nn.Module):
    """DeepONet with a separable trunk, on grids without the basis in memory.

    Attributes:
      branch: `branch(batch['inputs'], train=)` -> f[B, p].
      trunk: the separable trunk.
      use_bias: whether a trained scalar is added.
      transforms: applied to the field, in order.
    """

    branch: nn.Module
    trunk: SeparableTrunk
    use_bias: bool = True
    transforms: Sequence[Transform] = ()

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False
    ) -> dict[str, jax.Array]:
        """Predicts the fields on the grid, or at the points.

        Args:
          batch: 'inputs', and either 'axes', a sequence of f[n_i], whose product (last axis fastest) are the N points,
            or 'points' f[N, d] or f[B, N, d].
          task: ignored; all tasks share all.
          train: whether dropout is on.

        Returns:
          {'u': f[B, N]}.
        """
        del task
        coefficients = self.branch(batch["inputs"], train=train)
        if "axes" in batch:
            factors = self.trunk.factors(batch["axes"], train=train)
            if factors[0].shape[-1] != coefficients.shape[-1]:
                raise ValueError(
                    "The branch must end in p and every net of the trunk in rank * p, got "
                    f"{coefficients.shape[-1]} and {self.trunk.rank} * {factors[0].shape[-1]}"
                )
            letters = string.ascii_lowercase[-len(factors) :]
            spec = ",".join(["bp", *(f"{letter}rp" for letter in letters)]) + "->b" + letters
            u = jnp.einsum(spec, coefficients, *factors).reshape(coefficients.shape[0], -1)
        else:
            points = batch["points"]
            u = merge(coefficients, self.trunk(points, train=train), pointwise=points.ndim == 3)
        if self.use_bias:
            u = u + self.param("bias", nn.initializers.zeros_init(), (1,))[0]
        return {"u": apply_transforms(u, batch, self.transforms)}
