r"""Losses of dense tasks, one signature: `loss(output f[B, H, W, C], label) -> PixelSum(total f[B], count f[B])`.

`total` sums the loss over the labelled pixels of an image, `count` is their number; the loss of a task in a batch is

    sum_b total_b / sum_b count_b            (0, with a gradient of 0, if no pixel of the batch has a label)

so that every labelled pixel weighs the same, whatever image it is in. A pixel has no label where a class is 255 or a
value is NaN. Its output is replaced *before* the loss is taken: `0 * nan` and `0 * inf` would survive in a gradient.

| loss            | output        | label                     | of a pixel                                        |
|-----------------|---------------|---------------------------|---------------------------------------------------|
| `cross_entropy` | C logits      | class                     | log sum_c exp(z_c) - z_y                          |
| `l1`            | 1 value       | value                     | abs(z - y)                                        |
| `normals_l1`    | 3 values      | unit vector               | sum_i abs(z_i / norm(z) - y_i)                    |
| `normals_cosine`| 3 values      | unit vector               | 1 - z . y / norm(z)                               |
| `balanced_bce`  | 1 logit       | 0 or 1                    | -w y log s(z) - (1 - w) (1 - y) log(1 - s(z))     |
| `dice`          | 1 logit       | 0 or 1                    | of an image: 1 - (2 sum s y + 1) / (sum s + sum y + 1) |

The loss of detection is in `mtjax.detection`. Outputs of half precision are computed in float32.

>>> logits, label = jnp.zeros((1, 1, 2, 3)), jnp.array([[[2, 255]]], jnp.uint8)
>>> print(batch_mean(cross_entropy()(logits, label)).round(4))
1.0986

Letters: B images, H x W pixels, C channels, z output, y label, s the logistic function, w weight of the positives.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class PixelSum(NamedTuple):
    """A loss, image by image.

    Attributes:
      total: f[B], sum over labelled pixels.
      count: f[B], number of labelled pixels.
    """

    total: jax.Array
    count: jax.Array


Loss = Callable[..., PixelSum]


def batch_mean(pixels: PixelSum) -> jax.Array:
    """sum_b total_b / sum_b count_b, f[]; the denominator is 1 where there is nothing to count."""
    count = pixels.count.sum()
    return pixels.total.sum() / jnp.where(count > 0, count, 1.0)


def _sum(loss: jax.Array, valid: jax.Array) -> PixelSum:
    """Sums [B, ...] over all axes but the first."""
    axes = tuple(range(1, valid.ndim))
    return PixelSum(jnp.where(valid, loss, 0.0).sum(axes), valid.astype(jnp.float32).sum(axes))


def _kept(output: jax.Array, valid: jax.Array, fill: float = 0.0) -> jax.Array:
    """Float32 outputs [..., C] with `fill` where there is no label [...]."""
    return jnp.where(valid[..., None], output.astype(jnp.float32), fill)


@functools.cache
def cross_entropy(ignore: int = 255) -> Loss:
    """Softmax cross-entropy per pixel, `log sum_c exp(z_c) - z_y`; also per image, for labels i[B].

    Args:
      ignore: class of pixels without a label; so are negative classes.

    Returns:
      `(output f[B, ..., C], label int[B, ...]) -> PixelSum`.
    """

    def loss(output: jax.Array, label: jax.Array) -> PixelSum:
        label = jnp.asarray(label).astype(jnp.int32)
        valid = (label != ignore) & (label >= 0)
        logits = _kept(output, valid)
        classes = jnp.arange(logits.shape[-1]).reshape((1,) * label.ndim + (-1,))
        # A comparison in place of a gather: its gradient is elementwise, not a scatter.
        of_label = jnp.where(label[..., None] == classes, logits, 0.0).sum(-1)
        return _sum(jax.nn.logsumexp(logits, axis=-1) - of_label, valid)

    return loss


def l1(output: jax.Array, label: jax.Array) -> PixelSum:
    """Absolute error `|z - y|` of depth or disparity: f[B, H, W, 1] against f[B, H, W] in the same unit, NaN = none."""
    label = jnp.asarray(label).astype(jnp.float32)
    valid = ~jnp.isnan(label)
    return _sum(jnp.abs(_kept(output, valid)[..., 0] - jnp.where(valid, label, 0.0)), valid)


def unit(vector: jax.Array, *, softening: float = 1e-6) -> jax.Array:
    """`z / sqrt(|z|^2 + softening)`: unit vectors, and a finite gradient (1 / sqrt(softening) at most) at z = 0.

    A vector of length 0.1 comes out 5e-5 short, one of length 1 is exact to float32.
    """
    return vector * jax.lax.rsqrt((vector**2).sum(-1, keepdims=True) + softening)


def _normals(output: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    label = jnp.asarray(label).astype(jnp.float32)
    valid = ~jnp.isnan(label).any(-1)
    return unit(_kept(output, valid, 1.0)), jnp.where(valid[..., None], label, 0.0), valid


def normals_l1(output: jax.Array, label: jax.Array) -> PixelSum:
    """L1 distance of the unit-normalised prediction to the normal, summed over the three components of a pixel.

    f[B, H, W, 3] against unit vectors f[B, H, W, 3], NaN = none. This is how TaskPrompter counts; ASTMT and M3ViT
    divide by the number of components instead, which is a third of it (their weight of 10 is the same).
    """
    prediction, label, valid = _normals(output, label)
    return _sum(jnp.abs(prediction - label).sum(-1), valid)


def normals_cosine(output: jax.Array, label: jax.Array) -> PixelSum:
    """`1 - cos` of the angle to the normal; f[B, H, W, 3] against unit vectors f[B, H, W, 3], NaN = none."""
    prediction, label, valid = _normals(output, label)
    return _sum(1.0 - (prediction * label).sum(-1), valid)


def _binary(output: jax.Array, label: jax.Array, ignore: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logit f[B, H, W], positive f[B, H, W] and valid bool[B, H, W]."""
    label = jnp.asarray(label)
    valid = label != ignore
    return _kept(output, valid)[..., 0], (label == 1).astype(jnp.float32), valid


@functools.cache
def balanced_bce(positive_weight: float | None = None, *, ignore: int = 255) -> Loss:
    """Binary cross-entropy in which the few positives (edges, salient pixels) weigh more than the many negatives.

        -w y log s(z) - (1 - w) (1 - y) log(1 - s(z))

    Args:
      positive_weight: w. None balances every image: w is its share of negatives (an image without any positive then
        costs nothing, as in HED). The published codes balance the batch, which is one image or two there.
      ignore: label of pixels that do not count.

    Returns:
      `(output f[B, H, W, 1], label int[B, H, W]) -> PixelSum`; the count is that of all labelled pixels.

    Raises:
      ValueError: if the weight is not between 0 and 1.

    Reference: Xie and Tu, "Holistically-Nested Edge Detection", ICCV 2015, equation 2; the fixed weights 0.95
    (TaskPrompter), 0.88 and 0.925 (MLoRE, NYUD and PASCAL) are those of the published codes.
    """
    if positive_weight is not None and not 0 < positive_weight < 1:
        raise ValueError(f"positive_weight must be between 0 and 1, or None to balance, got {positive_weight}")

    def loss(output: jax.Array, label: jax.Array) -> PixelSum:
        logit, positive, valid = _binary(output, label, ignore)
        if positive_weight is None:
            count = valid.sum((1, 2), keepdims=True)
            negatives = (valid & (positive == 0)).sum((1, 2), keepdims=True)
            w = negatives / jnp.maximum(count, 1)
        else:
            w = positive_weight
        of_pixel = w * positive * jax.nn.softplus(-logit) + (1 - w) * (1 - positive) * jax.nn.softplus(logit)
        return _sum(of_pixel, valid)

    return loss


@functools.cache
def dice(*, smooth: float = 1.0, ignore: int = 255) -> Loss:
    """Soft Dice loss of an image, `1 - (2 sum_p s y + smooth) / (sum_p s + sum_p y + smooth)`.

    Args:
      smooth: keeps images without positives defined.
      ignore: label of pixels that do not count.

    Returns:
      `(output f[B, H, W, 1], label int[B, H, W]) -> PixelSum` with a count of 1 for each image that has labels.

    Reference: Milletari, Navab, Ahmadi, "V-Net", 3DV 2016, equation 1, without the squares in the denominator.
    """

    def loss(output: jax.Array, label: jax.Array) -> PixelSum:
        logit, positive, valid = _binary(output, label, ignore)
        probability = jnp.where(valid, jax.nn.sigmoid(logit), 0.0)
        positive = jnp.where(valid, positive, 0.0)
        overlap, total = (probability * positive).sum((1, 2)), (probability + positive).sum((1, 2))
        labelled = valid.any((1, 2))
        of_image = 1.0 - (2 * overlap + smooth) / (total + smooth)
        return PixelSum(jnp.where(labelled, of_image, 0.0), labelled.astype(jnp.float32))

    return loss
