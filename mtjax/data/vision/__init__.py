"""Images with labels of several tasks from published data sets, for those who have the files: one data set per file."""

from mtjax.data.vision import ade20k, cityscapes, coco, imagenet, images, nyud, pascal_context, reading, resizing
from mtjax.data.vision.images import ConvertedSource, ImageSource, Source, columns

__all__ = [
    "ConvertedSource",
    "ImageSource",
    "Source",
    "ade20k",
    "cityscapes",
    "coco",
    "columns",
    "imagenet",
    "images",
    "nyud",
    "pascal_context",
    "reading",
    "resizing",
]
