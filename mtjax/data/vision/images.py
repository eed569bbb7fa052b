"""Images with labels, read from files: what the loaders of this package share.

Every loader returns a `Source`: `len(source)` examples, `source[i]` reads the i-th from disk,

    {'image': u8[H, W, 3], 'labels': {task: label}}      at the size of the image's file

| tasks                               | label                                       | no label                 |
|-------------------------------------|---------------------------------------------|--------------------------|
| segmentation, parts, edge, saliency | u8[H, W], class; edge and saliency 0 or 1   | 255                      |
| depth (m), disparity (pixels)       | f32[H, W]                                   | NaN                      |
| normals                             | f32[H, W, 3], unit vectors                  | NaN                      |
| detection                           | boxes f32[M, 4] (y0, x0, y1, x1), classes i32[M] | no boxes            |
| classification                      | i32[]                                       | -1                       |

so that any loader of data (`grain`, a PyTorch one) can shuffle and transform it; sources can be pickled. `columns`
brings all images to one size and stacks them, which is what training in memory takes.

Letters: H x W pixels of an image, M boxes, n images.
"""

import dataclasses
import operator
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, SupportsIndex

import numpy as np

from mtjax.data.pde.store import progress_bar
from mtjax.data.vision import reading, resizing
from mtjax.data.vision.resizing import Fit, Size

CLASSES = ("segmentation", "parts", "edge", "saliency")
DISTANCES = ("depth", "disparity")
Label = Any  # an array, or for detection a dictionary of two


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex, /) -> dict[str, Any]: ...


class Labels(NamedTuple):
    """The labels of one task, unread.

    Attributes:
      read: item -> label, or None if it turns out that there is none.
      items: one per image, mostly the path of a file; None: no label.
    """

    read: Callable[[Any], Label | None]
    items: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Examples in files; see the module.

    Attributes:
      names: of the images, as their data set has them.
      images: paths.
      labels: task -> where its labels are.
    """

    names: tuple[str, ...]
    images: tuple[pathlib.Path, ...]
    labels: Mapping[str, Labels]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = operator.index(index)
        image = reading.read_image(self.images[index])
        size = image.shape[:2]
        labels = {}
        for task, (read, items) in self.labels.items():
            label = None if items[index] is None else read(items[index])
            label = no_label(task, size) if label is None else label
            if task not in ("detection", "classification"):
                label = _of_size(task, label, size, self.names[index])
            labels[task] = label
        return {"image": image, "labels": labels}


@dataclasses.dataclass(frozen=True)
class ConvertedSource:
    """The examples of another source, each passed through `convert`."""

    source: Any
    convert: Callable[[Any], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        return self.convert(self.source[index % len(self)])


def _of_size(task: str, label: np.ndarray, size: Size, name: str) -> np.ndarray:
    """A dense label at its image's size: the published loaders expect maps that are smaller or larger."""
    ratios = [old / new for old, new in zip(label.shape, size, strict=False)]
    if max(ratios) > 1.1 * min(ratios):
        raise ValueError(
            f"The {task} label of image {name!r} has {label.shape[0]} x {label.shape[1]} pixels, the image {size[0]} x "
            f"{size[1]}: the label of another image?"
        )
    return resizing.resize(task, label, size)


def no_label(task: str, size: Size) -> Label:
    """The label of an image of the given size that has none for the task."""
    if task == "detection":
        return {"boxes": np.zeros((0, 4), np.float32), "classes": np.zeros(0, np.int32)}
    if task in CLASSES:
        return np.full(size, reading.IGNORED, np.uint8)
    if task in (*DISTANCES, "normals"):
        return np.full((*size, 3) if task == "normals" else size, np.nan, np.float32)
    return np.int32(-1)


def columns(
    source: Source,
    size: Size,
    indices: Iterable[int] | None = None,
    progress: bool = True,
    *,
    fit: Fit = "stretch",
    max_boxes: int | None = None,
) -> dict[str, Any]:
    """Reads images, brings them to one size and stacks them.

    Args:
      source: of examples as in the module's table.
      size: (height, width) of all images.
      indices: which examples, in this order; None: all.
      progress: whether a bar appears after two seconds.
      fit: 'stretch', 'pad' or 'crop'; see `resizing.Placement`.
      max_boxes: M, the largest boxes of an image are kept; None: as many as the fullest image has.

    Returns:
      {'image': u8[n, *size, 3], 'labels': {task: ...}}: classes u8[n, *size] with 255 = ignored; depth and disparity
      f16[n, *size] and normals f16[n, *size, 3] with NaN = no label; classification i32[n]; detection
      {'boxes': f32[n, M, 4] in pixels of the new size, 'classes': i32[n, M]}, -1 in both where there is no box.

    Raises:
      ValueError: for an unknown `fit`, a size that is not positive, or no examples.
    """
    reading.check_choice("fit", fit, ("stretch", "pad", "crop"))
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be a positive height and width, got {size}")
    chosen = list(range(len(source)) if indices is None else indices)
    if not chosen:
        raise ValueError("There are no examples to stack: the source, or indices, is empty")
    stacked: dict[str, np.ndarray] = {}
    boxes: list[dict[str, np.ndarray]] = []
    with progress_bar("Reading images", enabled=progress) as advance:
        for row, index in enumerate(chosen):
            example = source[index]
            place = resizing.Placement(example["image"].shape[:2], tuple(size), fit)
            for task, label in {"image": example["image"], **example["labels"]}.items():
                if task == "detection":
                    boxes.append(place.boxes(label))
                    continue
                value = np.int32(label) if task == "classification" else place.dense(task, label)
                if row == 0:
                    stacked[task] = np.empty((len(chosen), *value.shape), value.dtype)
                stacked[task][row] = value
            advance(row + 1, len(chosen))
    image = stacked.pop("image")
    return {"image": image, "labels": {**stacked, **({"detection": stack_boxes(boxes, max_boxes)} if boxes else {})}}


def stack_boxes(labels: Sequence[Mapping[str, np.ndarray]], max_boxes: int | None = None) -> dict[str, np.ndarray]:
    """Detection labels of n images as {'boxes': f32[n, M, 4], 'classes': i32[n, M]}, padded with -1."""
    most = max(len(label["classes"]) for label in labels) if max_boxes is None else max_boxes
    boxes = np.full((len(labels), most, 4), -1, np.float32)
    classes = np.full((len(labels), most), -1, np.int32)
    for row, label in enumerate(labels):
        area = np.prod(label["boxes"][:, 2:] - label["boxes"][:, :2], axis=-1)
        kept = np.sort(np.argsort(-area, kind="stable")[:most])
        boxes[row, : len(kept)] = label["boxes"][kept]
        classes[row, : len(kept)] = label["classes"][kept]
    return {"boxes": boxes, "classes": classes}
