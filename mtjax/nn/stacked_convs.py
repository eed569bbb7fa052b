r"""Stacks of equal convolutions on maps, run at once, and the dense heads that stand on them.

    block    y_n = GELU(LayerNorm(conv_n(x_n)))            n = 1..N, each with its own parameters
    heads    out_t = ConvHead_t( up(x_t) )                 up: bilinear, `upsample` times

Task decoders and convolutional experts are "the same layer N times": their kernels live in one array with a leading
stack axis, as the dense layers of `mtjax.nn.stacked`. A convolution is a product of matrices (the neighbours of a
pixel side by side), which stays fast under `vmap` over seeds. Layer normalization over the channels stands where the
published decoders have batch normalization, so that there is no state.

Letters: N stack, T tasks, B images, h x w map, H x W image, C input and F output channels.
"""

import itertools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.decoders import ConvHead, resize_bilinear
from mtjax.nn.stacked import StackedLayerNorm, take, task_index

_INIT = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))


def neighbours(x: jax.Array, side: int) -> jax.Array:
    """Every pixel with its side^2 - 1 neighbours beside it (zeros outside): f[..., h, w, C] -> f[..., h, w, side^2 C].

    >>> neighbours(jnp.arange(4.0).reshape(2, 2, 1), 3)[0, 0].tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 2.0, 3.0]
    """
    if side == 1:
        return x
    reach, (height, width) = side // 2, x.shape[-3:-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(reach, reach), (reach, reach), (0, 0)])
    shifts = itertools.product(range(side), repeat=2)
    return jnp.concatenate([padded[..., i : i + height, j : j + width, :] for i, j in shifts], axis=-1)


class StackedConv(nn.Module):
    """N convolutions that keep the size: y[n] = conv(x[n], W[n]) + b[n].

    Attributes:
      stack: N.
      features: F.
      side: of the kernel [N, side, side, C, F]; odd.
    """

    stack: int
    features: int
    side: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, index: Sequence[int] | None = None) -> jax.Array:
        """Applies the convolutions.

        Args:
          x: f[N, B, h, w, C], or f[B, h, w, C] when every one reads the same map (which is then not copied).
          index: static positions in the stack to compute; x then holds those only.

        Returns:
          f[N, B, h, w, F], or f[len(index), B, h, w, F].
        """
        if self.side % 2 != 1:
            raise ValueError(f"side must be odd, so that the map keeps its size, got {self.side}")
        shape = (self.stack, self.side, self.side, x.shape[-1], self.features)
        kernel = take(self.param("kernel", _INIT, shape), index)
        bias = take(self.param("bias", nn.initializers.zeros_init(), (self.stack, self.features)), index)
        kernel = kernel.reshape(len(kernel), -1, self.features)
        patches = neighbours(x, self.side)
        grid = patches.shape[-4:-1]
        if x.ndim == 4:
            # One product of two matrices for the whole stack: its gradient is far faster than that of a batched one.
            flat = patches.reshape(-1, patches.shape[-1]) @ jnp.moveaxis(kernel, 0, 1).reshape(kernel.shape[1], -1)
            y = jnp.moveaxis(flat.reshape(-1, len(kernel), self.features), 1, 0)
        else:
            y = jnp.einsum("npk,nkf->npf", patches.reshape(len(patches), -1, patches.shape[-1]), kernel)
        return (y + bias[:, None, :]).reshape(len(kernel), *grid, self.features)


class StackedConvBlock(nn.Module):
    """N times [convolution, layer normalization over the channels, GELU]; arguments as of `StackedConv`."""

    stack: int
    features: int
    side: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, index: Sequence[int] | None = None) -> jax.Array:
        y = StackedConv(self.stack, self.features, self.side, name="conv")(x, index)
        flat = StackedLayerNorm(self.stack, name="norm")(y.reshape(len(y), -1, self.features), index)
        return nn.gelu(flat).reshape(y.shape)


class DenseHeads(nn.Module):
    """A head per task: bilinear upsampling, then `ConvHead` (3 x 3 - norm - GELU - 1 x 1, resized to the image).

    Attributes:
      heads: task name -> channels.
      width: channels of the convolutions.
      upsample: factor before them; never beyond the image's size.

    Reference: the head of the TaskPrompter line (Ye and Xu, "TaskPrompter", ICLR 2023).
    """

    heads: Mapping[str, int]
    width: int
    upsample: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int], *, task: str | None = None) -> dict[str, jax.Array]:
        """Predicts at the image's resolution.

        Args:
          x: f[T, B, h, w, C], a map per task asked for, in the order of `heads`.
          size: (H, W).
          task: static; compute this task only.

        Returns:
          task name -> f32[B, H, W, channels].
        """
        names = asked_for(self.heads, task)[0]
        if len(x) != len(names):
            raise ValueError(f"x must hold a map for each of the tasks {', '.join(names)}, got {len(x)}")
        grid = tuple(max(n, min(self.upsample * n, whole)) for n, whole in zip(x.shape[2:4], size, strict=True))
        x = resize_bilinear(x, grid)
        outputs = {}
        # A loop: on a CPU a stack of these large convolutions is no faster, and the last layers differ in size.
        for name, channels in self.heads.items():
            head = ConvHead(channels, self.width, name=name)
            if name in names:
                outputs[name] = head(x[names.index(name)], size)
            elif self.is_initializing():
                head(jnp.zeros((1, 1, 1, x.shape[-1]), x.dtype), size)
        return outputs


def asked_for(heads: Mapping[str, int], task: str | None) -> tuple[list[str], tuple[int] | None]:
    """Names of the tasks to compute, and their positions among all, None if that is every one (no gather then).

    >>> asked_for({"depth": 1, "edge": 1}, "edge"), asked_for({"depth": 1, "edge": 1}, None)
    ((['edge'], (1,)), (['depth', 'edge'], None))
    """
    position = task_index(heads, task)
    return (list(heads), None) if position is None else ([task], (position,))
