"""Images, dense labels and boxes at another size.

Images are interpolated, bilinear, and averaged where they shrink. Classes, depth and disparity are taken from the
nearest pixel: their means across a border belong to neither side. Normals are averaged over known neighbours and scaled
to length 1 again. Disparity keeps the unit of the original image's pixels.

Letters: H x W pixels, M boxes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from mtjax.data.vision import reading
from mtjax.data.vision.reading import IGNORED

Size = tuple[int, int]
Fit = Literal["stretch", "pad", "crop"]
MEAN_COLOUR = np.array((124, 116, 104), np.uint8)  # of ImageNet: it becomes 0 where images are normalised by its mean


def nearest(values: np.ndarray, size: Size) -> np.ndarray:
    """[H, W, ...] at another size, each pixel from the one at the same place."""
    # The old pixel in which the middle of the new one lies, in whole numbers, so that rounding has no say.
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, values.shape, strict=False))
    return values[rows[:, None], columns[None, :]]


def smooth(values: np.ndarray, size: Size) -> np.ndarray:
    """f32[H, W] at another size, bilinear; where it shrinks, averaged over the pixels that become one."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.array(image.resize(size[::-1], Image.Resampling.BILINEAR))


def resize(task: str, values: np.ndarray, size: Size) -> np.ndarray:
    """An image ('image', u8[H, W, 3]) or a dense label of a task at another size."""
    from PIL import Image

    if values.shape[:2] == tuple(size):
        return values
    if task == "image":
        return np.array(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))
    if task != "normals":
        return nearest(values, size)
    known = nearest(np.isfinite(values).all(-1), size)
    # Unknown vectors count as 0: they shorten the mean, and its direction is that of the known ones.
    mean = np.stack([smooth(channel, size) for channel in np.moveaxis(np.nan_to_num(values), -1, 0)], axis=-1)
    return np.where(known[..., None], reading.unit(mean, 1e-3), np.float32(np.nan))


@dataclasses.dataclass(frozen=True)
class Placement:
    """How an image comes to another size.

    Attributes:
      old: its (height, width).
      size: the one wanted.
      fit: 'stretch': each side by itself; 'pad': the whole image with its proportions, not enlarged, in the middle; the
        rest has ImageNet's mean colour and no labels; 'crop': the middle of the image with its proportions.
    """

    old: Size
    size: Size
    fit: Fit

    @property
    def scaled(self) -> Size:
        """The size to which the image is scaled before it is padded or cropped."""
        if self.fit == "stretch":
            return self.size
        ratios = [new / side for new, side in zip(self.size, self.old, strict=True)]
        ratio = min(1.0, *ratios) if self.fit == "pad" else max(ratios)
        return max(1, round(self.old[0] * ratio)), max(1, round(self.old[1] * ratio))

    @property
    def offset(self) -> Size:
        """Where the new image's upper left corner lies in the scaled one; negative where there is padding."""
        return int((self.scaled[0] - self.size[0]) / 2), int((self.scaled[1] - self.size[1]) / 2)

    def dense(self, task: str, values: np.ndarray) -> np.ndarray:
        """An image ('image', u8[H, W, 3]) or a dense label of a task, in the type that is stored: u8 or f16."""
        values = resize(task, values, self.scaled)
        if values.dtype != np.uint8:
            # A tiny disparity is a depth of 100 km, which float16 would turn into infinity.
            values = np.minimum(values, np.float32(np.finfo(np.float16).max)).astype(np.float16)
        fill = MEAN_COLOUR if task == "image" else IGNORED if values.dtype == np.uint8 else np.nan
        top, left = self.offset
        values = values[max(top, 0) : max(top, 0) + self.size[0], max(left, 0) : max(left, 0) + self.size[1]]
        placed = np.full((*self.size, *values.shape[2:]), fill, values.dtype)
        placed[max(-top, 0) :, max(-left, 0) :][: values.shape[0], : values.shape[1]] = values
        return placed

    def boxes(self, label: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Boxes in pixels of the new image, clipped to it; those that lie outside are dropped."""
        scale = np.array(self.scaled, np.float32) / np.array(self.old, np.float32)
        boxes = label["boxes"] * np.tile(scale, 2)[None] - np.tile(np.float32(self.offset), 2)[None]
        boxes = np.clip(boxes, 0, np.tile(np.float32(self.size), 2)[None]).astype(np.float32)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        return {"boxes": boxes[inside], "classes": label["classes"][inside]}
