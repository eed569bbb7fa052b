"""Cityscapes: streets of German cities from a car; 2,975 images to train on, 500 to validate, 1024 x 2048 pixels.

| task           | label                                                                                              |
|----------------|----------------------------------------------------------------------------------------------------|
| `segmentation` | the 19 classes of the benchmark, or the 7 categories these belong to; all others are ignored       |
| `disparity`    | (p - 1) / 256 pixels of the full image for a stored p > 0; NaN for p = 0                           |
| `depth`        | baseline * focal length / disparity, metres; NaN without disparity                                 |

Layout; STEM is CITY_SEQUENCE_FRAME:

    folder/leftImg8bit/{train,val}/CITY/STEM_leftImg8bit.png
    folder/gtFine/{train,val}/CITY/STEM_gtFine_labelIds.png         segmentation
    folder/disparity/{train,val}/CITY/STEM_disparity.png            disparity, depth (16 bits)
    folder/camera/{train,val}/CITY/STEM_camera.json                 depth

`load_small` reads the copies at 128 x 256 pixels made for MTAN (Liu, Johns, Davison, CVPR 2019), which M3ViT and most
papers on objectives use.

TaskPrompter's code sets the disparity of the sky to 0, but looks for the sky under the number 10, which in these files
is a rail track; here pixels without disparity stay without a label.

Reference: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mtjax.data.vision import reading
from mtjax.data.vision.images import ConvertedSource, ImageSource, Labels
from mtjax.data.vision.reading import Folder

CHANNELS = {"segmentation": 19, "disparity": 1, "depth": 1}
SIZES = {"train": 2975, "val": 500}
SIZE = (1024, 2048)
# Number in the files -> (class, category); the others are not evaluated by the benchmark.
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CATEGORIES = {
    "flat": (7, 8),
    "construction": (11, 12, 13),
    "object": (17, 19, 20),
    "nature": (21, 22),
    "sky": (23,),
    "human": (24, 25),
    "vehicle": (26, 27, 28, 31, 32, 33),
}


def load(
    folder: Folder,
    split: str = "train",
    *,
    tasks: Sequence[str] = ("segmentation", "disparity"),
    classes: Literal[19, 7] = 19,
    allow_missing: bool = False,
) -> ImageSource:
    """Opens a split; images are read when they are asked for.

    Args:
      folder: with the layout above.
      split: 'train' or 'val'.
      tasks: which labels to read.
      classes: 19 or 7, of the segmentation.
      allow_missing: whether an image may lack a label file; it then counts as unlabelled for that task.

    Returns:
      The source; see `images`.

    Raises:
      FileNotFoundError: if a folder or files are missing.
      ValueError: for an unknown task or number of classes.
    """
    tasks = reading.check_tasks(tasks, CHANNELS)
    reading.check_choice("classes", classes, (19, 7))
    sources = {"segmentation": ("gtFine",), "disparity": ("disparity",), "depth": ("disparity", "camera")}
    needed = dict.fromkeys(f"{name}/{split}" for task in tasks for name in sources[task])
    root = reading.folder_of(
        folder, f"leftImg8bit/{split}", *needed, what="the layout of Cityscapes (see mtjax.data.vision.cityscapes)"
    )
    ending = "_leftImg8bit.png"
    base = root / "leftImg8bit" / split
    names = tuple(sorted(f"{path.parent.name}/{path.name[: -len(ending)]}" for path in base.glob(f"*/*{ending}")))
    if not names:
        raise FileNotFoundError(f"No image in {base}; expected CITY/STEM{ending}")

    def find(kind: str, end: str, optional: bool = allow_missing) -> tuple[pathlib.Path | None, ...]:
        return reading.find(names, [f"{kind}/{split}/{{}}{end}"], root, what=f"{kind} files", optional=optional)

    labels = {}
    for task in tasks:
        if task == "segmentation":
            labels[task] = Labels(
                functools.partial(_segmentation, classes=classes), find("gtFine", "_gtFine_labelIds.png")
            )
        elif task == "disparity":
            labels[task] = Labels(_disparity, find("disparity", "_disparity.png"))
        else:
            pairs = zip(find("disparity", "_disparity.png"), find("camera", "_camera.json"), strict=True)
            labels[task] = Labels(_depth, tuple(None if None in pair else pair for pair in pairs))
    return ImageSource(names, find("leftImg8bit", ending, optional=False), labels)


def load_small(folder: Folder, split: str = "train") -> ConvertedSource:
    """Opens MTAN's copies: 128 x 256 pixels, 7 categories, and a scaled disparity.

    Args:
      folder: holds {train,val}/{image,label_7,depth}/0.npy, 1.npy, ...: colours f[128, 256, 3] from 0 to 1, categories
        [128, 256] with -1 = ignored, and what the papers call depth, f[128, 256, 1]: disparity divided by a constant, 0
        where there is none.
      split: 'train' (2,975) or 'val' (500).

    Returns:
      The source, with the tasks 'segmentation' and 'disparity'.

    Raises:
      FileNotFoundError: if a folder or files are missing.
    """
    kinds = ("image", "label_7", "depth")
    needed = [f"{split}/{kind}" for kind in kinds]
    root = reading.folder_of(folder, *needed, what="MTAN's copies of Cityscapes (see mtjax.data.vision.cityscapes)")
    names = [str(i) for i in range(len(list((root / split / "image").glob("*.npy"))))]
    if not names:
        raise FileNotFoundError(f"No image in {root / split / 'image'}; expected 0.npy, 1.npy, ...")
    files = [reading.find(names, [f"{split}/{kind}/{{}}.npy"], root, what=f"{kind} arrays") for kind in kinds]
    return ConvertedSource(tuple(zip(*files, strict=True)), _small)


def from_tfds(split: str = "train", *, classes: Literal[19, 7] = 19, data_dir: Folder | None = None) -> ConvertedSource:
    """`cityscapes/semantic_segmentation` of tensorflow-datasets: the segmentation alone.

    Its disparity is declared as 8 bits, which loses the upper ones of the files' 16, so it is not offered.

    Args:
      split: 'train' or 'validation', or a slice.
      classes: 19 or 7.
      data_dir: of prepared data sets; None: the default of tensorflow-datasets.

    Returns:
      The source. It is read without TensorFlow if it was prepared as array_record.

    Raises:
      FileNotFoundError: if it is not prepared in such a format.
    """
    reading.check_choice("classes", classes, (19, 7))
    source = reading.prepared_tfds("cityscapes/semantic_segmentation", split, data_dir)
    return ConvertedSource(source, functools.partial(_from_example, classes=classes))


def _table(classes: int) -> np.ndarray:
    """Class of every number in the files, u8[256]."""
    groups = CATEGORIES.values() if classes == 7 else [(number,) for number in EVALUATED]
    table = np.full(256, reading.IGNORED, np.uint8)
    for index, numbers in enumerate(groups):
        table[list(numbers)] = index
    return table


def _segmentation(path: pathlib.Path, *, classes: int) -> np.ndarray:
    return _table(classes)[reading.read_numbers(path).astype(np.uint8)]


def _disparity(path: pathlib.Path) -> np.ndarray:
    stored = reading.read_numbers(path).astype(np.float32)
    return np.where(stored > 0, (stored - 1) / 256, np.float32(np.nan))


def _depth(paths: tuple[pathlib.Path, pathlib.Path]) -> np.ndarray:
    camera = json.loads(paths[1].read_text())
    # A disparity of 0 is a point at infinity: `positive` leaves it without a label.
    return camera["extrinsic"]["baseline"] * camera["intrinsic"]["fx"] / reading.positive(_disparity(paths[0]))


def _small(paths: tuple[pathlib.Path, ...]) -> dict:
    image, categories, disparity = (reading.read_array(path) for path in paths)
    segmentation = np.where(categories < 0, reading.IGNORED, categories).astype(np.uint8)
    image = np.clip(np.round(image * 255.0), 0, 255).astype(np.uint8)
    return {"image": image, "labels": {"segmentation": segmentation, "disparity": reading.positive(disparity)}}


def _from_example(example: dict, *, classes: int) -> dict:
    segmentation = _table(classes)[example["segmentation_label"][..., 0]]
    return {"image": example["image_left"], "labels": {"segmentation": segmentation}}
