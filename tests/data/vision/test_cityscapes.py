"""Cityscapes from miniature files of the published layout and of MTAN's copies."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from mtjax.data.vision import cityscapes, images

SIZE = (12, 16)
# All numbers of the published table: 0 to 33.
NUMBERS = np.arange(12 * 16).reshape(SIZE) % 34
STEMS = ("aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "bochum/bochum_000000_000313")


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        path.write_text(json.dumps(content))
    else:
        Image.fromarray(content).save(path)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 2**15, SIZE).astype(np.uint16)
    stored[0, :3] = (0, 1, 257)
    for stem in STEMS:
        save(tmp_path / f"leftImg8bit/train/{stem}_leftImg8bit.png", rng.integers(0, 256, (*SIZE, 3), np.uint8))
        save(tmp_path / f"gtFine/train/{stem}_gtFine_labelIds.png", NUMBERS.astype(np.uint8))
        save(tmp_path / f"disparity/train/{stem}_disparity.png", stored)
        save(tmp_path / f"camera/train/{stem}_camera.json", {"extrinsic": {"baseline": 0.2}, "intrinsic": {"fx": 2000}})
    return tmp_path, stored


def test_segmentation_of_19_and_7_classes(folder):
    for classes, table in (
        (19, {7: 0, 8: 1, 11: 2, 13: 4, 17: 5, 23: 10, 24: 11, 26: 13, 28: 15, 31: 16, 33: 18}),
        (7, {7: 0, 8: 0, 11: 1, 13: 1, 17: 2, 21: 3, 23: 4, 24: 5, 25: 5, 26: 6, 31: 6, 33: 6}),
    ):
        source = cityscapes.load(folder[0], classes=classes)
        assert source.names == STEMS
        segmentation = source[2]["labels"]["segmentation"]
        assert segmentation.dtype == np.uint8
        for number, expected in table.items():
            assert (segmentation[number == NUMBERS] == expected).all()
        # Unlabelled, ego vehicle, ..., parking, rail track, guard rail, bridge, tunnel, pole group, caravan, trailer.
        ignored = np.isin(NUMBERS, [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30])
        np.testing.assert_array_equal(segmentation == 255, ignored)
        assert np.unique(segmentation[~ignored]).tolist() == list(range(classes))


def test_categories_group_the_evaluated_classes():
    assert tuple(n for group in cityscapes.CATEGORIES.values() for n in group) == cityscapes.EVALUATED


def test_disparity_and_depth(folder):
    path, stored = folder
    labels = cityscapes.load(path, tasks=("disparity", "depth"))[0]["labels"]
    assert np.isnan(labels["disparity"][0, 0]) and labels["disparity"][0, 1] == 0 and labels["disparity"][0, 2] == 1
    np.testing.assert_array_equal(labels["disparity"][stored > 0], (stored[stored > 0] - 1.0) / 256)
    assert np.isnan(labels["depth"][0, :2]).all()  # unknown, infinitely far
    seen = stored > 1
    np.testing.assert_allclose(labels["depth"][seen], 400 * 256 / (stored[seen] - 1.0), rtol=1e-6)


def test_columns(folder):
    stacked = images.columns(cityscapes.load(folder[0]), (4, 8), [0, 2])
    assert stacked["image"].shape == (2, 4, 8, 3) and stacked["labels"]["segmentation"].shape == (2, 4, 8)
    assert stacked["labels"]["disparity"].dtype == np.float16


def test_missing_files(folder):
    path = folder[0]
    (path / f"disparity/train/{STEMS[1]}_disparity.png").unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 3 disparity files are missing .* NAME = {STEMS[1]}"):
        cityscapes.load(path)
    source = cityscapes.load(path, tasks=("disparity", "depth"), allow_missing=True)
    assert np.isnan(source[1]["labels"]["disparity"]).all() and np.isnan(source[1]["labels"]["depth"]).all()
    assert len(cityscapes.load(path, tasks=("segmentation",))) == 3
    with pytest.raises(FileNotFoundError, match=r"No folder .*leftImg8bit/val; expected the layout of Cityscapes"):
        cityscapes.load(path, "val")
    with pytest.raises(ValueError, match="classes must be one of 19, 7, got 20"):
        cityscapes.load(path, classes=20)


def test_copies_of_mtan(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("image", "label_7", "depth"):
        (tmp_path / "val" / kind).mkdir(parents=True)
    categories, disparity = rng.integers(-1, 7, (11, *SIZE)), rng.uniform(0.1, 0.5, (11, *SIZE, 1))
    disparity[:, 0] = 0
    colours = rng.integers(0, 256, (11, *SIZE, 3))
    for i in range(11):
        np.save(tmp_path / f"val/image/{i}.npy", (colours[i] / 255.0).astype(np.float32))
        np.save(tmp_path / f"val/label_7/{i}.npy", categories[i].astype(np.float32))
        np.save(tmp_path / f"val/depth/{i}.npy", disparity[i])
    source = cityscapes.load_small(tmp_path, "val")
    assert len(source) == 11
    example = source[10]  # by number: 10.npy is not between 1.npy and 2.npy
    np.testing.assert_array_equal(example["image"], colours[10])
    np.testing.assert_array_equal(example["labels"]["segmentation"], np.where(categories[10] < 0, 255, categories[10]))
    np.testing.assert_allclose(example["labels"]["disparity"][1:], disparity[10, 1:, :, 0], rtol=1e-6)
    assert np.isnan(example["labels"]["disparity"][0]).all()
    (tmp_path / "val/depth/3.npy").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 11 depth arrays are missing"):
        cityscapes.load_small(tmp_path, "val")


@pytest.mark.filterwarnings("default")  # tensorflow-datasets' mock leaves warnings of its own
def test_tfds_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=1):
        example = cityscapes.from_tfds("validation", classes=7, data_dir=tmp_path)[0]
    segmentation = example["labels"]["segmentation"]
    assert example["image"].shape == (1024, 2048, 3) and segmentation.shape == (1024, 2048)
    assert set(np.unique(segmentation)) <= {*range(7), 255}
    assert "tensorflow" not in sys.modules
