"""ADE20K as the scene parsing benchmark of 150 classes: 20,210 images to train on, 2,000 to validate.

| task           | label                                                                  |
|----------------|------------------------------------------------------------------------|
| `segmentation` | 150 classes; 0 in the files ("other objects", unlabelled) is ignored   |

Layout (`ADEChallengeData2016.zip`):

    folder/images/{training,validation}/NAME.jpg
    folder/annotations/{training,validation}/NAME.png     0 ... 150

There is no `from_tfds`: `scene_parse150` of tensorflow-datasets holds the same files, but declares the annotations to
be images of three channels, which they are not, so that what a reader gets depends on how it decodes them.

Reference: Zhou, Zhao, Puig, Fidler, Barriuso, Torralba, "Scene Parsing through ADE20K Dataset", CVPR 2017.
"""

import functools

from mtjax.data.vision import reading
from mtjax.data.vision.images import ImageSource, Labels
from mtjax.data.vision.reading import Folder

CHANNELS = {"segmentation": 150}
SIZES = {"training": 20210, "validation": 2000}


def load(folder: Folder, split: str = "training", *, allow_missing: bool = False) -> ImageSource:
    """Opens a split; images are read when they are asked for.

    Args:
      folder: with the layout above.
      split: 'training' or 'validation'.
      allow_missing: whether an image may lack its annotation; it then counts as unlabelled.

    Returns:
      The source; see `images`.

    Raises:
      FileNotFoundError: if a folder or files are missing.
    """
    needed = (f"images/{split}", f"annotations/{split}")
    root = reading.folder_of(folder, *needed, what="the layout of ADEChallengeData2016 (see mtjax.data.vision.ade20k)")
    names = tuple(sorted(path.stem for path in (root / "images" / split).glob("*.jpg")))
    if not names:
        raise FileNotFoundError(f"No image in {root / 'images' / split}; expected NAME.jpg")
    read = functools.partial(reading.read_classes, count=150, zero="unlabelled")
    patterns = [f"annotations/{split}/{{}}.png"]
    labels = Labels(read, reading.find(names, patterns, root, what="annotations", optional=allow_missing))
    paths = reading.find(names, [f"images/{split}/{{}}.jpg"], root, what="images")
    return ImageSource(names, paths, {"segmentation": labels})
