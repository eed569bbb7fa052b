"""Labels that follow from what the rays saw: edges, valid depth, saliency, boxes, panoptic ids.

An edge is where the instance changes, where the normal turns, or where the depth jumps. Depth jumps are sought in the
second difference of *inverse* depth, which is affine over a plane in perspective: a floor seen at a grazing angle does
not fire, whatever its slope.

Letters: H height, W width, M boxes, B images.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.data.rooms.scene import Array

CREASE = 0.94
"""Cosine between the normals of neighbours below which there is a crease."""
JUMP = 0.08
"""Second difference of inverse depth, in units of the inverse depth, above which there is an occlusion."""
PANOPTIC_DIVISOR = 256
IGNORED = 255


def _between(values: Array, axis: int, differ) -> Array:
    """differ(a, b) of every pixel and the next one along an axis, False in the last row or column."""
    ahead = jax.lax.slice_in_dim(values, 1, None, axis=axis)
    here = jax.lax.slice_in_dim(values, 0, -1, axis=axis)
    changes = differ(here, ahead)
    widths = [(0, 0)] * changes.ndim
    widths[axis] = (0, 1)
    return jnp.pad(changes, widths)


def contours(identity: Array) -> Array:
    """Pixels whose right or lower neighbour has another identity, bool[H, W]."""
    return _between(identity, -1, jnp.not_equal) | _between(identity, -2, jnp.not_equal)


def occlusions(depth: Array, surface: Array) -> Array:
    """Jumps of depth between different surfaces, bool[H, W]: the pixel before the jump.

    Args:
      depth: f32[H, W], inf for the sky.
      surface: i32[H, W], index of the primitive seen.
    """
    inverse = 1 / depth
    found = jnp.zeros(depth.shape, bool)
    for axis in (-1, -2):
        step = jnp.diff(inverse, axis=axis)
        bent = jnp.abs(jnp.diff(step, axis=axis)) > JUMP * jax.lax.slice_in_dim(inverse, 1, -1, axis=axis)
        # Both pixels at a jump are bent; those on the border of the image have no second difference.
        widths = [(0, 0), (0, 0)]
        widths[axis] = (1, 1)
        both = _between(jnp.pad(bent, widths, constant_values=True), axis, jnp.logical_and)
        apart = _between(inverse, axis, lambda a, b: jnp.abs(a - b) > JUMP / 2 * a)
        found |= both & (apart | jnp.isinf(depth)) & _between(surface, axis, jnp.not_equal)
    return found


def creases(normal: Array, surface: Array, curved: Array) -> Array:
    """Turns of the normal, bool[H, W], except where one round surface goes on.

    Args:
      normal: f32[3, H, W] unit vectors, NaN for the sky.
      surface: i32[H, W].
      curved: bool[H, W].
    """
    tag = jnp.where(curved, surface + 1, 0)
    found = jnp.zeros(surface.shape, bool)
    for axis in (-1, -2):
        turned = _between(normal, axis, lambda a, b: a * b)
        cosine = jnp.sum(turned, 0)
        last = jnp.arange(surface.shape[axis]) == surface.shape[axis] - 1
        last = last[None, :] if axis == -1 else last[:, None]
        same = _between(tag, axis, lambda a, b: (a == b) & (a > 0))
        found |= (cosine < CREASE) & ~same & ~last
    return found


def depth_holes(depth: Array, facing: Array, brightness: Array, speckle: Array, focal: Array) -> Array:
    """Where a depth sensor finds nothing, bool[H, W]: grazing rays, dark surfaces, speckle, and stereo shadow.

    Stereo shadow is what one of the two eyes cannot see: a pixel whose disparity is smaller by k or more than that of
    the pixel k to its right, k = 1, 2, 3. The base is 7.5 cm.

    Args:
      depth: f32[H, W] in metres.
      facing: f32[H, W], cosine between normal and the way to the camera.
      brightness: f32[H, W] in [0, 1].
      speckle: f32[H, W], uniform in [0, 1).
      focal: f32[], half widths of the image.
    """
    disparity = 0.075 * focal * depth.shape[1] / 2 / depth
    shadow = jnp.zeros(depth.shape, bool)
    for k in (1, 2, 3):
        ahead = jnp.pad(disparity[:, k:], ((0, 0), (0, k)))
        shadow |= ahead - disparity >= k
    return (facing < 0.15) | (brightness < 0.06) | (speckle < 0.02) | shadow


def salient(instance: Array, instances: int) -> Array:
    """Mask of the largest object, its pixels weighted by how central they are, u8[H, W].

    Args:
      instance: i32[H, W], 0 for what is no object.
      instances: largest instance.
    """
    height, width = instance.shape
    y = ((jnp.arange(height) * 2 + 1) / height - 1)[:, None]
    x = ((jnp.arange(width) * 2 + 1) / width - 1)[None, :]
    weight = jnp.exp(-2 * (x * x + y * y))
    masks = instance[None] == jnp.arange(1, instances + 1)[:, None, None]
    score = jnp.sum(masks * weight[None], (1, 2))
    return ((instance == jnp.argmax(score) + 1) & (instance > 0)).astype(jnp.uint8)


def boxes(
    instances: np.ndarray,
    segmentation: np.ndarray,
    *,
    things: Sequence[int] | None = None,
    min_pixels: int = 4,
    count: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the visible parts of objects.

    Args:
      instances: u8[B, H, W], 0 for what has none.
      segmentation: u8[B, H, W]; the class of an instance is that of most of its pixels.
      things: classes that are boxed; None: all that have an instance.
      min_pixels: smaller objects are left out.
      count: M; None: the largest instance in the arrays.

    Returns:
      boxes f32[B, M, 4] (y0, x0, y1, x1) in pixels, so that y1 - y0 is the height in pixels, and classes i32[B, M];
      rows without an object have class -1 and a box of zeros. Row m is instance m + 1.
    """
    largest = int(instances.max(initial=0))
    count = largest if count is None else count
    if count < largest:
        raise ValueError(f"count={count} boxes are too few for instance {largest}")
    found = np.zeros((len(instances), count, 4), np.float32)
    classes = np.full((len(instances), count), -1, np.int32)
    kinds = np.unique(segmentation[instances > 0])
    kinds = kinds[kinds != IGNORED]
    if not len(kinds):
        return found, classes
    for number in range(1, largest + 1):
        mask = instances == number
        size = mask.sum((1, 2))
        votes = np.stack([np.sum(mask & (segmentation == kind), (1, 2)) for kind in kinds])
        kind = kinds.astype(np.int32)[votes.argmax(0)]
        kept = (size >= min_pixels) & (votes.max(0) > 0)
        if things is not None:
            kept &= np.isin(kind, things)
        ends = [_ends(mask.any(axis)) for axis in (2, 1)]
        box = np.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], 1)
        found[:, number - 1] = np.where(kept[:, None], box, 0)
        classes[:, number - 1] = np.where(kept, kind, -1)
    return found, classes


def _ends(line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First true place and one past the last of bool[B, n]."""
    return line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1)


def panoptic(segmentation: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """One id per segment, i32[B, H, W]: class * 256 + instance; -1 where the class is ignored."""
    ids = segmentation.astype(np.int32) * PANOPTIC_DIVISOR + instances
    return np.where(segmentation == IGNORED, -1, ids)


def sobel(brightness: Array) -> Array:
    """Magnitude of the Sobel gradient of an image f32[H, W]; the border repeats."""
    padded = jnp.pad(brightness, 1, mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return jnp.hypot(rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]) / 4
