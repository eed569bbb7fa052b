r"""Decoders of dense tasks: a map of tokens f[..., h, w, D] and a size (H, W) in, one value per channel and pixel out.

| decoder        | how                                                              | reads           |
|----------------|------------------------------------------------------------------|-----------------|
| `PUP`          | stages of [3x3 - norm - ReLU - twice the size] (SETR, M3ViT)      | any patch side  |
| `ConvHead`     | 3x3 - norm - GELU - 1x1, then bilinear to the size (TaskPrompter) | any map         |
| `LinearUnpatch`| 3x3 - GELU - linear to P x P values per token                     | whole patches   |
| `HeatmapHead`  | 3x3 - GELU - 1x1 at the resolution of the map, or twice that      | detection       |

All take any leading axes, hold parameters only, and normalise within an image (group normalization), so that a task
pass, a stack of seeds and a batch of one image give the same numbers; where a paper has batch normalization this is the
deviation. Convolutions are products of matrices (`mtjax.nn.grid_layers.Conv3`), and so is bilinear interpolation:

    y = A_H x A_W^T            A_n: f[n, m], two entries per row

Letters: h x w grid of tokens, D width, H x W pixels, P patch side, C channels.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.nn.grid_layers import Conv3


@functools.cache
def interpolation_matrix(size: int, source: int) -> np.ndarray:
    """Rows of bilinear weights f32[size, source] with half-pixel centres; edges repeat.

    The value at pixel i is that of position (i + 1/2) source / size - 1/2 on a line through the centres of the source.
    Shrinking is not smoothed (no anti-aliasing).

    >>> interpolation_matrix(4, 2)
    array([[1.  , 0.  ],
           [0.75, 0.25],
           [0.25, 0.75],
           [0.  , 1.  ]], dtype=float32)
    """
    position = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
    return np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(source))).astype(np.float32)


def resize_bilinear(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear interpolation f[..., h, w, C] -> f[..., H, W, C] with half-pixel centres, as two products of matrices.

    Equal to `jax.image.resize(..., 'bilinear', antialias=False)`, whose gather-like program is slower on a CPU.
    """
    precision = jax.lax.Precision.HIGHEST  # in bfloat16 products a map of depths would lose its digits
    for axis, n in zip((-3, -2), size, strict=True):
        if x.shape[axis] != n:
            weights = jnp.asarray(interpolation_matrix(n, x.shape[axis]), x.dtype)
            rows = "Hh,...hwc->...Hwc" if axis == -3 else "Ww,...hwc->...hWc"
            x = jnp.einsum(rows, weights, x, precision=precision)
    return x


class _Pointwise(nn.Module):
    """1 x 1 convolution f[M, h, w, C] -> f[M, h, w, features], as a product of two matrices.

    Attributes:
      features: channels.
      kernel_init, bias_init: initializers.
    """

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(self.features, kernel_init=self.kernel_init, bias_init=self.bias_init, name="dense")
        # Flat: on a CPU the gradient of a product over four axes is far slower.
        return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


def _group_norm(x: jax.Array, groups: int, name: str) -> jax.Array:
    return nn.GroupNorm(num_groups=math.gcd(groups, x.shape[-1]), name=name)(x)


def _flat(tokens: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
    """Maps f[M, h, w, D] and the leading axes, whose product is M."""
    return tokens.reshape(-1, *tokens.shape[-3:]), tokens.shape[:-3]


def _unflat(x: jax.Array, leading: tuple[int, ...]) -> jax.Array:
    return x.reshape(*leading, *x.shape[1:])


class PUP(nn.Module):
    """SETR's decoder of progressive upsampling: as many doublings as lead from a token to a pixel.

        x_0 = LN(tokens),   x_{s+1} = up2(ReLU(norm(conv3(x_s)))),   output = resize(W ReLU(norm(conv3(x_{S-1}))))

    The last of the S = ceil(log2 P) stages maps to the channels first and is resized after, to the size asked for; with
    P = 16 these are four convolutions. Group normalization stands where the paper has batch normalization.

    Attributes:
      channels: C of the output.
      width: channels of the convolutions (256 in the paper).
      groups: most groups of the normalization.
      stages: S; None follows the size, ceil(log2(H / h)) and at least 1.

    Reference: Zheng et al., "Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with
    Transformers" (SETR), CVPR 2021, section 3.3 (SETR-PUP). M3ViT uses it for every task, and reads the features after
    stages 0, 1 and 2 (`with_features`) in a branch that only training has.
    """

    channels: int
    width: int = 256
    groups: int = 32
    stages: int | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array, size: tuple[int, int], *, with_features: bool = False) -> Any:
        """Decodes.

        Args:
          tokens: f[..., h, w, D].
          size: (H, W).
          with_features: also return what every stage but the last gives.

        Returns:
          f[..., H, W, C]; with features a pair of it and a list: after stage s f[..., 2^(s+1) h, 2^(s+1) w, width].
        """
        x, leading = _flat(tokens)
        stages = self.stages or max(1, math.ceil(math.log2(size[0] / x.shape[1])))
        x = nn.LayerNorm(name="norm")(x)
        features = []
        for stage in range(stages):
            x = nn.relu(_group_norm(Conv3(self.width, name=f"conv_{stage}")(x), self.groups, f"norm_{stage}"))
            if stage < stages - 1:
                x = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))
                features.append(_unflat(x, leading))
        output = _unflat(resize_bilinear(_Pointwise(self.channels, name="out")(x), size), leading)
        return (output, features) if with_features else output


class ConvHead(nn.Module):
    """Convolution, normalization, GELU, 1 x 1, at the resolution of the map; then bilinear to the pixels.

        output = resize(W GELU(norm(conv3(tokens))))

    The head of TaskPrompter, TaskExpert and MLoRE; group normalization stands where they have batch normalization.

    Attributes:
      channels: C of the output.
      width: channels of the convolution; None: those of the tokens.
      groups: most groups of the normalization.
    """

    channels: int
    width: int | None = None
    groups: int = 8

    @nn.compact
    def __call__(self, tokens: jax.Array, size: tuple[int, int]) -> jax.Array:
        """f[..., h, w, D], (H, W) -> f[..., H, W, C]."""
        x, leading = _flat(tokens)
        x = Conv3(self.width or x.shape[-1], name="conv")(x)
        x = _Pointwise(self.channels, name="out")(nn.gelu(_group_norm(x, self.groups, "norm")))
        return _unflat(resize_bilinear(x, size), leading)


class LinearUnpatch(nn.Module):
    """Every token paints its own patch: 3x3 convolution, GELU, and a linear map to the P x P x C values of the patch.

    The cheapest head that is sharp below the patch (nothing is interpolated): the default at small sizes.

    Attributes:
      channels: C of the output.
      width: channels of the convolution; None: those of the tokens.
    """

    channels: int
    width: int | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array, size: tuple[int, int]) -> jax.Array:
        """f[..., h, w, D], (H, W) -> f[..., H, W, C].

        Raises:
          ValueError: if the size is not a whole number of tokens.
        """
        x, leading = _flat(tokens)
        h, w = x.shape[1:3]
        if size[0] % h or size[1] % w:
            raise ValueError(f"LinearUnpatch needs a size of whole patches on a grid of {(h, w)} tokens, got {size}")
        p, q = size[0] // h, size[1] // w
        x = nn.gelu(Conv3(self.width or x.shape[-1], name="conv")(x))
        x = _Pointwise(p * q * self.channels, name="out")(x)
        x = x.reshape(-1, h, w, p, q, self.channels).transpose(0, 1, 3, 2, 4, 5)
        return _unflat(x.reshape(-1, h * p, w * q, self.channels), leading)


class HeatmapHead(nn.Module):
    """Centres, sizes and offsets of objects (CenterNet): f[..., h, w, D] -> f[..., u h, u w, C + 4].

    Channels are C logits of the centre heatmap, then height, width, and the offset (y, x) of the centre in its cell, in
    cells of this output. `mtjax.detection` has targets, loss and decoding.

    Attributes:
      channels: C + 4.
      width: channels of the convolution; None: those of the tokens.
      upsample: u, 1 or 2.
      prior: probability of a centre that the heatmap starts from.

    Reference: Zhou, Wang, Krähenbühl, "Objects as Points", 2019, section 4. One branch of convolutions for all three
    outputs, where the published network has one for each.
    """

    channels: int
    width: int | None = None
    upsample: int = 1
    prior: float = 0.1

    @nn.compact
    def __call__(self, tokens: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        """f[..., h, w, D] -> f[..., u h, u w, C + 4]; the size is ignored: centres stay on the grid."""
        del size
        x, leading = _flat(tokens)
        if self.upsample not in (1, 2):
            raise ValueError(f"HeatmapHead upsamples by 1 or 2, got {self.upsample}")
        if self.channels < 5:
            raise ValueError(f"HeatmapHead has classes + 4 channels, at least 5, got {self.channels}")
        x = resize_bilinear(x, (self.upsample * x.shape[1], self.upsample * x.shape[2]))
        x = nn.gelu(Conv3(self.width or x.shape[-1], name="conv")(x))
        start = np.zeros(self.channels, np.float32)
        start[:-4] = -math.log(1 / self.prior - 1)

        def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            del key, shape
            return jnp.asarray(start, dtype)

        return _unflat(_Pointwise(self.channels, bias_init=bias_init, name="out")(x), leading)
