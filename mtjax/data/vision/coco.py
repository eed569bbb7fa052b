"""COCO: objects of 80 classes in boxes; 118,287 images to train on, 5,000 to validate (2017).

| task        | label                                                                                  |
|-------------|----------------------------------------------------------------------------------------|
| `detection` | boxes (y0, x0, y1, x1) in pixels and their classes, 0 ... 79 in the order of the ids   |

Layout:

    folder/{train2017,val2017}/NAME.jpg
    folder/annotations/instances_{train2017,val2017}.json

The file's boxes are (x, y, width, height) and its class ids have gaps (1 ... 90). Boxes around crowds (`iscrowd`) and
boxes without an area are left out; images without boxes are kept. COCO's own evaluation treats crowds as regions where
detections count neither way; without them such detections count as false.

There is no `from_tfds`: tensorflow-datasets cannot construct its `coco` without TensorFlow.

Reference: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014.
"""

import json
import pathlib

import numpy as np

from mtjax.data.vision import reading
from mtjax.data.vision.images import ImageSource, Labels
from mtjax.data.vision.reading import Folder

CHANNELS = {"detection": 80}
SIZES = {"train2017": 118287, "val2017": 5000}


def load(folder: Folder, split: str = "train2017") -> ImageSource:
    """Opens a split: reads all annotations, and images when they are asked for.

    Args:
      folder: with the layout above.
      split: 'train2017' or 'val2017', or the name of another folder of images with its annotations.

    Returns:
      The source; see `images`. `class_names(folder, split)` lists the classes.

    Raises:
      FileNotFoundError: if a folder, the annotations or images are missing.
      ValueError: if the annotations are not those of instances.
    """
    root, content = _annotations(folder, split)
    numbers = {category: number for number, (category, _) in enumerate(_categories(content))}
    boxes: dict[int, list[tuple[float, ...]]] = {entry["id"]: [] for entry in content["images"]}
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        if not entry.get("iscrowd", 0) and width > 0 and height > 0:
            boxes[entry["image_id"]].append((y, x, y + height, x + width, numbers[entry["category_id"]]))
    names = tuple(entry["file_name"] for entry in content["images"])
    labels = tuple(_label(boxes[entry["id"]]) for entry in content["images"])
    paths = reading.find(names, [f"{split}/{{}}"], root, what="images")
    return ImageSource(names, paths, {"detection": Labels(dict, labels)})


def class_names(folder: Folder, split: str = "train2017") -> tuple[str, ...]:
    """The classes in the order of their numbers."""
    return tuple(name for _, name in _categories(_annotations(folder, split)[1]))


def _annotations(folder: Folder, split: str) -> tuple[pathlib.Path, dict]:
    root = reading.folder_of(folder, "annotations", split, what="the layout of COCO (see mtjax.data.vision.coco)")
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}; expected the annotations of {split}'s instances")
    content = json.loads(path.read_text())
    lacking = [key for key in ("images", "annotations", "categories") if key not in content]
    if lacking:
        raise ValueError(f"{path} has no {lacking[0]!r}; expected COCO's annotations of instances")
    return root, content


def _categories(content: dict) -> list[tuple[int, str]]:
    return sorted((entry["id"], entry["name"]) for entry in content["categories"])


def _label(rows: list[tuple[float, ...]]) -> dict[str, np.ndarray]:
    values = np.array(rows, np.float32).reshape(-1, 5)
    return {"boxes": values[:, :4], "classes": values[:, 4].astype(np.int32)}
