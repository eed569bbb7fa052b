r"""U-Net on a grid: convolutions on coarser and coarser images, and back up with the finer ones beside.

    down:  x_l = block(pool(x_{l-1}))           up:  y_l = block([upsample(y_{l+1}), x_l])           u = 1 x 1 conv(y_0)

A peer of the DeepONets under the same batch contract as `FNO`: images in, the field at the nodes of their grid out.
Unlike an FNO it is tied to the spacing of the grid that it was trained on. Normalization is by groups of channels, so
that the model has no state.

Reference: Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI
2015. Smaller here, with convolutions that keep the size, average pooling, upsampling by repetition and group
normalization (Wu and He, ECCV 2018); grids of any size are filled up with zeros to a multiple of 2^(levels - 1), then
cut.

Letters: B functions, n_1..n_d grid (N nodes), C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.grid_layers import ConvBlock, flat_outputs, grid_inputs
from mtjax.nn.output_transforms import Transform, apply_transforms


class UNet(nn.Module):
    """The network; see the module.

    Attributes:
      channels: of the levels, from the finest.
      num_outputs: fields that are predicted.
      groups: most groups of the normalizations.
      coordinates: whether the nodes' coordinates (batch['points']) are more input channels.
      transforms: applied to the field, in order.
      activation: of the blocks.
    """

    channels: Sequence[int] = (16, 32, 64)
    num_outputs: int = 1
    groups: int = 8
    coordinates: bool = False
    transforms: Sequence[Transform] = ()
    activation: Callable[[jax.Array], jax.Array] = nn.gelu

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False
    ) -> dict[str, jax.Array]:
        """Predicts the fields at the nodes.

        Args:
          batch: 'inputs' f[B, n_1..n_d, C], 'points' with `coordinates`, and what the transforms read.
          task: ignored; all tasks share all.
          train: ignored; there is no dropout.

        Returns:
          {'u': f[B, N]}, f[B, N, outputs] for several.
        """
        del task, train
        x = grid_inputs(batch, coordinates=self.coordinates)
        grid, levels = x.shape[1:-1], len(self.channels)
        step = 2 ** (levels - 1)
        x = jnp.pad(x, [(0, 0), *((0, -n % step) for n in grid), (0, 0)])
        window = (2,) * len(grid)

        finer = []
        for level, width in enumerate(self.channels):
            x = x if level == 0 else nn.avg_pool(x, window, strides=window)
            x = ConvBlock(width, self.groups, self.activation, name=f"down_{level}")(x)
            finer.append(x)
        for level in reversed(range(levels - 1)):
            for axis in range(1, 1 + len(grid)):
                x = jnp.repeat(x, 2, axis=axis)
            x = jnp.concatenate([x, finer[level]], axis=-1)
            x = ConvBlock(self.channels[level], self.groups, self.activation, name=f"up_{level}")(x)
        x = nn.Dense(self.num_outputs, name="out")(x)
        u = flat_outputs(x[(slice(None), *(slice(n) for n in grid))])
        return {"u": apply_transforms(u, batch, self.transforms)}
