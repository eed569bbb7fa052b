"""NYUD-v2: indoor rooms seen by a Kinect; 795 images to train on, 654 to evaluate, 480 x 640 pixels.

| task           | label                                                                                     |
|----------------|-------------------------------------------------------------------------------------------|
| `segmentation` | 40 classes (Gupta et al. 2013); unlabelled pixels, 0 in the files, are ignored            |
| `depth`        | metres; NaN where the file has 0                                                          |
| `normals`      | unit vectors in the frame of the camera; NaN where the file has no direction              |
| `edge`         | 1 on the contours of labelled regions                                                     |

Layout, `NYUD_MT` of Maninis et al., "Attentive Single-Tasking of Multiple Tasks", CVPR 2019, which the multitask papers
repackaged; each kind of file may have any of the endings, the one named first is preferred:

    folder/gt_sets/{train,val}.txt      names, one a line
    folder/images/NAME.png .jpg
    folder/segmentation/NAME.png .mat   (.mat: variable 'segmentation')
    folder/depth/NAME.npy .mat          (.mat: variable 'depth')
    folder/normals/NAME.npy .png .jpg   (images: v stands for 2 v / 255 - 1)
    folder/edge/NAME.png .npy

M3ViT's files are (jpg, png, npy, npy, npy), those of InvPT and TaskPrompter (png, png, npy, png, png), the original
ones (jpg, mat, mat, jpg, png). Normals shorter than 1/2 count as unknown; the published code looks for zeros, which the
values of an image never are.

Reference: Silberman, Hoiem, Kohli, Fergus, "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012.
"""

import functools
from collections.abc import Sequence

import numpy as np

from mtjax.data.vision import reading
from mtjax.data.vision.images import ConvertedSource, ImageSource, Labels
from mtjax.data.vision.reading import Folder

CHANNELS = {"segmentation": 40, "depth": 1, "normals": 3, "edge": 1}
SIZES = {"train": 795, "val": 654}
SIZE = (480, 640)
_FILES = {
    "segmentation": (
        functools.partial(reading.read_classes, count=40, zero="unlabelled", variable="segmentation"),
        "png mat",
    ),
    "depth": (reading.read_depth, "npy mat"),
    "normals": (reading.read_normals, "npy png jpg"),
    "edge": (reading.read_mask, "png npy"),
}


def load(
    folder: Folder, split: str = "train", *, tasks: Sequence[str] = tuple(CHANNELS), allow_missing: bool = False
) -> ImageSource:
    """Opens a split; images are read when they are asked for.

    Args:
      folder: with the layout above.
      split: 'train' or 'val', or the name of another list in gt_sets.
      tasks: which labels to read.
      allow_missing: whether an image may lack a label file; it then counts as unlabelled for that task.

    Returns:
      The source; see `images`.

    Raises:
      FileNotFoundError: if a folder, the list or files are missing.
      ValueError: for an unknown task.
    """
    tasks = reading.check_tasks(tasks, CHANNELS)
    root = reading.folder_of(
        folder, "gt_sets", "images", *tasks, what="the layout of NYUD_MT (see mtjax.data.vision.nyud)"
    )
    names = reading.read_names(root / "gt_sets" / f"{split}.txt", what=f"the images of split {split!r}")
    labels = {}
    for task in tasks:
        read, endings = _FILES[task]
        patterns = [f"{task}/{{}}.{ending}" for ending in endings.split()]
        labels[task] = Labels(read, reading.find(names, patterns, root, what=f"{task} labels", optional=allow_missing))
    return ImageSource(names, reading.find(names, ["images/{}.png", "images/{}.jpg"], root, what="images"), labels)


def from_tfds(split: str = "train", *, data_dir: Folder | None = None) -> ConvertedSource:
    """`nyu_depth_v2` of tensorflow-datasets: depth alone, 47,584 frames of the videos to train on, 654 to validate.

    Args:
      split: 'train' or 'validation', or a slice such as 'train[:1000]'.
      data_dir: of prepared data sets; None: the default of tensorflow-datasets.

    Returns:
      The source, with the one task 'depth'. It is read without TensorFlow if it was prepared as array_record.

    Raises:
      FileNotFoundError: if it is not prepared in such a format.
    """
    return ConvertedSource(reading.prepared_tfds("nyu_depth_v2", split, data_dir), _from_example)


def _from_example(example: dict[str, np.ndarray]) -> dict:
    return {"image": example["image"], "labels": {"depth": reading.positive(example["depth"])}}
