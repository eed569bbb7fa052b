r"""Fourier neural operator (FNO): layers that act on the low Fourier modes of a field on a regular grid.

    v_0 = lift(x),   v_{l+1} = act(K_l v_l + W_l v_l + b_l),   u = project(v_L)        K_l: spectral convolution

A peer of the DeepONets under the same batch contract: 'inputs' are images f[B, n_1..n_d, C] on the grid whose nodes are
the points, in order; the output is the field at these nodes, f[B, N], and the grid's shape is that of the inputs. A
trained network can be asked on a finer grid. Several geometries: the mask as a channel of the inputs and `apply_mask`
among the transforms, as for MT-DeepONet.

Reference: Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021, and its code,
where the last layer has no activation and the projection one hidden layer of 128. The draw of the spectral weights is
another (`SpectralConv`); the coordinates come from the batch.

Letters: B functions, n_1..n_d grid (N nodes), C channels.

>>> import jax
>>> batch = {"inputs": jnp.zeros((2, 16, 16, 2)), "points": jnp.zeros((256, 2))}
>>> FNO(modes=(4, 4), width=8).init_with_output(jax.random.key(0), batch)[0]["u"].shape
(2, 256)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.grid_layers import SpectralConv, flat_outputs, grid_inputs
from mtjax.nn.output_transforms import Transform, apply_transforms


class FNO(nn.Module):
    """The network; see the module.

    Attributes:
      modes: modes kept along each axis of the grid (1 to 3 axes), at most half of its nodes.
      width: channels of v.
      num_layers: L.
      projection: hidden width of the projection.
      num_outputs: fields that are predicted.
      coordinates: whether the nodes' coordinates (batch['points']) are more input channels.
      padding: share of each axis' nodes that is added (zeros) before the layers and cut off after, for fields that are
        not periodic.
      transforms: applied to the field, in order.
    """

    modes: Sequence[int]
    width: int = 32
    num_layers: int = 4
    projection: int = 128
    num_outputs: int = 1
    coordinates: bool = True
    padding: float = 0.0
    transforms: Sequence[Transform] = ()
    activation: Callable[[jax.Array], jax.Array] = nn.gelu

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False
    ) -> dict[str, jax.Array]:
        """Predicts the fields at the nodes.

        Args:
          batch: 'inputs' f[B, n_1..n_d, C], 'points' f[N, d] or f[B, N, d] with `coordinates`, and what the transforms
            read.
          task: ignored; all tasks share all.
          train: ignored; there is no dropout.

        Returns:
          {'u': f[B, N]}, f[B, N, outputs] for several.
        """
        del task, train
        x = nn.Dense(self.width, name="lift")(grid_inputs(batch, coordinates=self.coordinates))
        grid = x.shape[1:-1]
        margin = [round(self.padding * n) for n in grid]
        x = jnp.pad(x, [(0, 0), *((0, m) for m in margin), (0, 0)])
        for layer in range(self.num_layers):
            spectral = SpectralConv(self.width, self.modes, name=f"spectral_{layer}")(x)
            x = spectral + nn.Dense(self.width, name=f"skip_{layer}")(x)
            if layer < self.num_layers - 1:
                x = self.activation(x)
        x = x[(slice(None), *(slice(n) for n in grid))]
        x = self.activation(nn.Dense(self.projection, name="project")(x))
        u = flat_outputs(nn.Dense(self.num_outputs, name="out")(x))
        return {"u": apply_transforms(u, batch, self.transforms)}
