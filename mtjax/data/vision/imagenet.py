"""ImageNet-1k (ILSVRC 2012), or any other images in one folder per class; 1,281,167 to train on, 50,000 to validate.

| task             | label                                                                    |
|------------------|--------------------------------------------------------------------------|
| `classification` | position of the class's folder among the folders in alphabetical order   |

Layout; the validation images, published in one folder, must have been sorted into the folders of their classes:

    folder/{train,val}/CLASS/NAME.JPEG      CLASS: n01440764, ...; endings .jpg, .jpeg and .png are read as well

The order is that of ILSVRC's 1,000 labels in most of today's weights, and that of tensorflow-datasets.

Reference: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
"""

import numpy as np

from mtjax.data.vision import reading
from mtjax.data.vision.images import ConvertedSource, ImageSource, Labels
from mtjax.data.vision.reading import Folder

CHANNELS = {"classification": 1000}
SIZES = {"train": 1281167, "val": 50000}
ENDINGS = (".jpeg", ".jpg", ".png")


def load(folder: Folder, split: str = "train") -> ImageSource:
    """Opens a split; images are read when they are asked for.

    Args:
      folder: with the layout above.
      split: 'train' or 'val', or any other folder of class folders.

    Returns:
      The source; see `images`. Its `names` are 'CLASS/NAME.JPEG'; `class_names(folder, split)` lists the classes.

    Raises:
      FileNotFoundError: if a folder is missing, or has no class folders or no images in them.
    """
    classes = class_names(folder, split)
    root = reading.folder_of(folder, what="ImageNet") / split
    paths, numbers = [], []
    for number, name in enumerate(classes):
        found = sorted(path for path in (root / name).iterdir() if path.suffix.lower() in ENDINGS)
        paths += found
        numbers += [number] * len(found)
    if not paths:
        raise FileNotFoundError(f"The {len(classes)} class folders in {root} hold no {', '.join(ENDINGS)} file")
    names = tuple(f"{path.parent.name}/{path.name}" for path in paths)
    return ImageSource(names, tuple(paths), {"classification": Labels(np.int32, tuple(numbers))})


def class_names(folder: Folder, split: str = "train") -> tuple[str, ...]:
    """The classes of a split in the order of their numbers."""
    root = (
        reading.folder_of(folder, split, what="ImageNet's folders train and val (see mtjax.data.vision.imagenet)")
        / split
    )
    classes = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
    if not classes:
        raise FileNotFoundError(f"No class folder in {root}; expected {split}/CLASS/NAME.JPEG")
    return classes


def from_tfds(split: str = "train", *, data_dir: Folder | None = None) -> ConvertedSource:
    """`imagenet2012` of tensorflow-datasets, read without TensorFlow if it was prepared as array_record.

    Args:
      split: 'train' or 'validation', or a slice such as 'train[:1000]'.
      data_dir: of prepared data sets; None: the default of tensorflow-datasets.

    Raises:
      FileNotFoundError: if it is not prepared in such a format.
    """
    return ConvertedSource(reading.prepared_tfds("imagenet2012", split, data_dir), _from_example)


def _from_example(example: dict) -> dict:
    image = example["image"]
    image = np.repeat(image.reshape(*image.shape[:2], -1)[..., :1], 3, -1) if image.shape[2:] != (3,) else image
    return {"image": image, "labels": {"classification": np.int32(example["label"])}}
