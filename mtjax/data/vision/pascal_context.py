"""PASCAL-Context with five tasks: 4,998 images to train on, 5,105 to evaluate, of many sizes up to 500 pixels.

| task           | label                                                                                               |
|----------------|-----------------------------------------------------------------------------------------------------|
| `segmentation` | background and the 20 classes of VOC; 255 ignored                                                   |
| `parts`        | background and 6 groups of human parts; images without labelled people are ignored whole            |
| `normals`      | made by a network; known only on classes that NYUD-v2 has as well (170 of 459), NaN elsewhere       |
| `saliency`     | made by a network, thresholded at one half                                                          |
| `edge`         | 1 where the map of 459 classes changes (its discrete Laplacian is not 0), thinned to one pixel      |

Layout, `PASCAL_MT` of Maninis et al., "Attentive Single-Tasking of Multiple Tasks", CVPR 2019:

    folder/ImageSets/Context/{train,val}.txt            names, one a line
    folder/JPEGImages/NAME.jpg
    folder/semseg/VOC12/NAME.png                        segmentation, if VOC has it
    folder/semseg/pascal-context/NAME.png               else
    folder/human_parts/NAME.mat                         'anno': objects with masks and named parts
    folder/normals_distill/NAME.png                     v stands for 2 v / 255 - 1
    folder/sal_distill/NAME.png
    folder/pascal-context/trainval/NAME.mat             'LabelMap', 459 classes: edges, and where normals are known

The multitask papers evaluate in a frame of 512 x 512 pixels: `images.columns(source, (512, 512), fit="pad")`.
Asked for `parts` alone, their code leaves images without people out; here `indices` chooses.

References: Mottaghi et al., "The Role of Context for Object Detection and Semantic Segmentation in the Wild", CVPR
2014; Chen et al., "Detect What You Can: Detecting and Representing Objects using Holistic Models and Body Parts", CVPR
2014.
"""

import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from mtjax.data.vision import reading, resizing
from mtjax.data.vision.images import ImageSource, Labels
from mtjax.data.vision.reading import Folder

CHANNELS = {"segmentation": 21, "parts": 7, "normals": 3, "saliency": 1, "edge": 1}
SIZES = {"train": 4998, "val": 5105}
PERSON = 15
# Group -> the parts of the files, in the order of their numbers 1 ... 6.
PARTS = {
    "head": ("head", "hair", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"),
    "torso": ("torso", "neck"),
    "upper arms": ("luarm", "ruarm"),
    "lower arms": ("llarm", "lhand", "rlarm", "rhand"),
    "upper legs": ("luleg", "ruleg"),
    "lower legs": ("llleg", "lfoot", "rlleg", "rfoot"),
}
# Numbers in 'LabelMap' of the classes whose names are classes of NYUD-v2 too, and of the television.
NORMALS_KNOWN = (
    *(3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56),
    *(59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124),
    *(135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202),
    *(213, 215, 216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261),
    *(263, 269, 272, 273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314),
    *(315, 319, 323, 329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383),
    *(384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442),
    *(443, 444, 446, 454, 457),
)
_MAPS = "pascal-context/trainval/{}.mat"
_FOLDERS = {
    "segmentation": ("semseg",),
    "parts": ("human_parts",),
    "normals": ("normals_distill", "pascal-context/trainval"),
    "saliency": ("sal_distill",),
    "edge": ("pascal-context/trainval",),
}


def load(
    folder: Folder, split: str = "train", *, tasks: Sequence[str] = tuple(CHANNELS), allow_missing: bool = False
) -> ImageSource:
    """Opens a split; images are read when they are asked for.

    Args:
      folder: with the layout above.
      split: 'train' or 'val', or the name of another list in ImageSets/Context.
      tasks: which labels to read.
      allow_missing: whether an image may lack a label file; it then counts as unlabelled for that task.

    Returns:
      The source; see `images`.

    Raises:
      FileNotFoundError: if a folder, the list or files are missing.
      ValueError: for an unknown task.
    """
    tasks = reading.check_tasks(tasks, CHANNELS)
    needed = dict.fromkeys(name for task in tasks for name in _FOLDERS[task])
    root = reading.folder_of(
        folder,
        *("ImageSets/Context", "JPEGImages", *needed),
        what="the layout of PASCAL_MT (see mtjax.data.vision.pascal_context)",
    )
    names = reading.read_names(root / "ImageSets/Context" / f"{split}.txt", what=f"the images of split {split!r}")

    def find(task: str, *patterns: str) -> tuple[pathlib.Path | None, ...]:
        return reading.find(names, patterns, root, what=f"{task} labels", optional=allow_missing)

    labels = {}
    for task in tasks:
        if task == "segmentation":
            read = functools.partial(reading.read_classes, count=21, zero="class")
            labels[task] = Labels(read, find(task, "semseg/VOC12/{}.png", "semseg/pascal-context/{}.png"))
        elif task == "parts":
            labels[task] = Labels(_parts, find(task, "human_parts/{}.mat"))
        elif task == "saliency":
            labels[task] = Labels(reading.read_mask, find(task, "sal_distill/{}.png"))
        elif task == "edge":
            labels[task] = Labels(_edge, find(task, _MAPS))
        else:
            pairs = zip(find(task, "normals_distill/{}.png"), find(task, _MAPS), strict=True)
            labels[task] = Labels(_normals, tuple(None if None in pair else pair for pair in pairs))
    return ImageSource(names, reading.find(names, ["JPEGImages/{}.jpg"], root, what="images"), labels)


def _parts(path: pathlib.Path) -> np.ndarray | None:
    """Groups of human parts u8[H, W], 0 = background; None if the image shows no labelled part of a person."""
    numbers = {name: number for number, group in enumerate(PARTS.values(), start=1) for name in group}
    label = None
    for thing in reading.read_mat(path, "anno")["objects"][0, 0].ravel():
        if int(np.squeeze(thing["class_ind"])) != PERSON:
            continue
        for part in thing["parts"].ravel():
            name = str(np.squeeze(part["part_name"]))
            if name not in numbers:
                raise ValueError(f"{path} has a human part {name!r}; known are {', '.join(sorted(numbers))}")
            mask = part["mask"].astype(bool)
            label = np.zeros(mask.shape, np.uint8) if label is None else label
            label[mask] = numbers[name]
    return label if label is not None and label.any() else None


def _normals(paths: tuple[pathlib.Path, pathlib.Path]) -> np.ndarray:
    vectors = reading.read_normals(paths[0])
    classes = resizing.nearest(reading.read_mat(paths[1], "LabelMap"), vectors.shape[:2])
    return np.where(np.isin(classes, NORMALS_KNOWN)[..., None], vectors, np.float32(np.nan))


def _edge(path: pathlib.Path) -> np.ndarray:
    classes = np.pad(reading.read_mat(path, "LabelMap").astype(np.int64), 1, mode="reflect")
    neighbours = classes[:-2, 1:-1] + classes[2:, 1:-1] + classes[1:-1, :-2] + classes[1:-1, 2:]
    return thin(neighbours != 4 * classes[1:-1, 1:-1]).astype(np.uint8)


def thin(mask: np.ndarray) -> np.ndarray:
    """Lines reduced to a width of one pixel, their connections kept; bool[H, W] -> bool[H, W].

    Reference: Guo and Hall, "Parallel Thinning with Two-Subiteration Algorithms", CACM 1989, conditions G1 to G3 as in
    scikit-image's `thin`, which the published loaders call.
    """
    mask = np.pad(np.asarray(mask, bool), 1)
    inner = (slice(1, -1), slice(1, -1))
    while True:
        before = mask.copy()
        for half in (0, 1):
            # Neighbours in a circle from the east: E, NE, N, NW, W, SW, S, SE.
            x = [
                np.roll(mask, (-dy, -dx), (0, 1))[inner]
                for dy, dx in ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
            ]
            crossings = sum((~x[i] & (x[i + 1] | x[(i + 2) % 8])).astype(int) for i in (0, 2, 4, 6))
            ones = sum((x[i] | x[i + 1]).astype(int) for i in (0, 2, 4, 6))
            twos = sum((x[i + 1] | x[(i + 2) % 8]).astype(int) for i in (0, 2, 4, 6))
            fewest = np.minimum(ones, twos)
            a, b, c, d = (x[1], x[2], x[7], x[0]) if half == 0 else (x[5], x[6], x[3], x[4])
            mask[inner] &= ~((crossings == 1) & (fewest >= 2) & (fewest <= 3) & ~((a | b | ~c) & d))
        if (mask == before).all():
            return mask[inner]
