"""ImageNet from miniature class folders, and from tensorflow-datasets."""

import sys

import numpy as np
import pytest
from PIL import Image

from mtjax.data.vision import imagenet, images


@pytest.fixture
def folder(tmp_path):
    for name, files in {"n02": ("b.JPEG",), "n01": ("a.JPEG", "c.png"), "n03": ()}.items():
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "notes.txt").write_text("not an image")
        for file in files:
            Image.fromarray(np.full((12, 16), 7, np.uint8)).save(tmp_path / "val" / name / file)
    return tmp_path


def test_classes_are_the_folders_in_order(folder):
    source = imagenet.load(folder, "val")
    assert imagenet.class_names(folder, "val") == ("n01", "n02", "n03")
    assert source.names == ("n01/a.JPEG", "n01/c.png", "n02/b.JPEG")
    assert [int(example["labels"]["classification"]) for example in source] == [0, 0, 1]
    stacked = images.columns(source, (8, 8), fit="crop")
    assert stacked["image"].shape == (3, 8, 8, 3)
    assert stacked["labels"]["classification"].tolist() == [0, 0, 1]
    assert stacked["labels"]["classification"].dtype == np.int32


def test_missing_folders(folder):
    with pytest.raises(FileNotFoundError, match=r"No folder .*train; expected ImageNet's folders"):
        imagenet.load(folder)
    (folder / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No class folder in .*train; expected train/CLASS/NAME\.JPEG"):
        imagenet.load(folder)
    (folder / "train/n01").mkdir()
    with pytest.raises(FileNotFoundError, match=r"The 1 class folders in .*train hold no \.jpeg"):
        imagenet.load(folder)


@pytest.mark.filterwarnings("default")  # tensorflow-datasets' mock leaves warnings of its own
def test_tfds_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=3):
        source = imagenet.from_tfds("validation", data_dir=tmp_path)
        stacked = images.columns(source, (8, 8))
    assert stacked["image"].shape == (3, 8, 8, 3)
    assert ((stacked["labels"]["classification"] >= 0) & (stacked["labels"]["classification"] < 1000)).all()
    assert "tensorflow" not in sys.modules
