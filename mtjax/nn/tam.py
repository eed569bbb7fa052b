r"""M3ViT's training-only branch: a mask learned from all tasks' decoder features scales each of them.

With F_t the features of task t's decoder after one of its stages, and S the first half of the T tasks:

    B   = sigmoid(norm(conv ReLU(norm(conv [F_1; ...; F_T]))))                    f[h, w, C] in (0, 1)
    F_b = [F_t B / |S| for t in S;  F_t (1 - B) / (T - |S|) for the others]
    M   = sigmoid(hourglass(ReLU(norm(conv F_b))))                                2 convs of stride 2, 2 transposed
    auxiliary_t = W_t ReLU(norm(conv_t [F_1 (1 + M); ...; F_T (1 + M)]))          one more prediction of task t

The auxiliary predictions get the tasks' own losses. Gradients of one task thereby reach the others' decoders. Inference
leaves the branch out, so it costs nothing there.

Reference: the code of Liang et al., "M3ViT", NeurIPS 2022 (`TamModule`): three branches with parameters of their own,
on the decoder's features at 2, 4 and 8 times the resolution of the tokens. Deviations: features are taken behind the
doubling of a stage, the published ones behind the convolution that follows it; group instead of batch normalization.
Strided and transposed convolutions are written as a 3 x 3 convolution before taking every second pixel, or after
inserting zeros, which are the same functions.

Letters: T tasks, B images, h x w map, H x W image, C channels of a map.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.decoders import resize_bilinear
from mtjax.nn.grid_layers import Conv3


class _ConvNorm(nn.Module):
    """Convolution of side 3 and group normalization, f[B, h, w, C] -> f[B, h, w, features]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.GroupNorm(num_groups=math.gcd(32, self.features))(Conv3(self.features, name="conv")(x))


def insert_zeros(x: jax.Array) -> jax.Array:
    """f[B, h, w, C] -> f[B, 2h, 2w, C], x at the even pixels: what a transposed convolution of stride 2 convolves."""
    batch, h, w, channels = x.shape
    x = jnp.pad(x[:, :, None, :, None], ((0, 0), (0, 0), (0, 1), (0, 0), (0, 1), (0, 0)))
    return x.reshape(batch, 2 * h, 2 * w, channels)


def share_mask(features: jax.Array, mask: jax.Array) -> jax.Array:
    """F_b: features f[T, B, h, w, C] of the first half of the tasks by B, of the others by 1 - B, each by its share."""
    tasks = len(features)
    first = max(1, tasks // 2)
    own, other = mask / first, (1.0 - mask) / max(1, tasks - first)
    return features * jnp.stack([own] * first + [other] * (tasks - first))


def side_by_side(features: jax.Array) -> jax.Array:
    """f[T, B, h, w, C] -> f[B, h, w, T C]."""
    return jnp.moveaxis(features, 0, -2).reshape(*features.shape[1:-1], -1)


class TAM(nn.Module):
    """The branch after one stage of the decoders; see the module.

    Attributes:
      heads: task name -> channels of its prediction.
    """

    heads: Mapping[str, int]

    @nn.compact
    def __call__(self, features: jax.Array, size: tuple[int, int]) -> dict[str, jax.Array]:
        """Predicts every task once more.

        Args:
          features: f[T, B, h, w, C], in the order of the heads.
          size: (H, W).

        Returns:
          task name -> f[B, H, W, channels].
        """
        if len(features) != len(self.heads):
            raise ValueError(f"features must hold one map per task, {len(self.heads)}, got {len(features)}")
        channels = features.shape[-1]
        x = nn.relu(_ConvNorm(channels, name="joint")(side_by_side(features)))
        mask = nn.sigmoid(_ConvNorm(channels, name="mask")(x))
        x = nn.relu(_ConvNorm(channels, name="shared")(side_by_side(share_mask(features, mask))))
        sizes = [x.shape[1:3]]
        for stage in range(2):
            x = nn.relu(_ConvNorm(channels, name=f"down_{stage}")(x)[:, ::2, ::2])
            sizes.append(x.shape[1:3])
        for stage in range(2):
            rows, columns = sizes[1 - stage]
            x = _ConvNorm(channels, name=f"up_{stage}")(insert_zeros(x))[:, :rows, :columns]
            x = nn.relu(x) if stage == 0 else nn.sigmoid(x)
        scaled = side_by_side(features * (1.0 + x)[None])
        outputs = {}
        for name, count in self.heads.items():
            y = nn.relu(_ConvNorm(channels, name=f"conv_{name}")(scaled))
            y = nn.Dense(count, name=f"out_{name}")(y.reshape(-1, channels)).reshape(*y.shape[:-1], count)
            outputs[name] = resize_bilinear(y, size)
        return outputs
