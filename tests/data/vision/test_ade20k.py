"""ADE20K from miniature files of the layout of ADEChallengeData2016."""

import numpy as np
import pytest
from PIL import Image

from mtjax.data.vision import ade20k, images


@pytest.fixture
def folder(tmp_path):
    for kind in ("images", "annotations"):
        (tmp_path / kind / "validation").mkdir(parents=True)
    for number in (2, 1):
        name = f"validation/ADE_val_0000000{number}"
        Image.fromarray(np.full((12, 16, 3), 50 * number, np.uint8)).save(tmp_path / "images" / f"{name}.jpg")
        classes = np.full((12, 16), 150 * (number - 1), np.uint8)
        classes[0, 0] = number
        Image.fromarray(classes).save(tmp_path / "annotations" / f"{name}.png")
    return tmp_path


def test_zero_is_ignored_and_classes_start_at_zero(folder):
    source = ade20k.load(folder, "validation")
    assert source.names == ("ADE_val_00000001", "ADE_val_00000002")
    first, second = (example["labels"]["segmentation"] for example in source)
    assert first[0, 0] == 0 and (first.ravel()[1:] == 255).all()
    assert second[0, 0] == 1 and (second.ravel()[1:] == 149).all()
    stacked = images.columns(source, (6, 8))
    assert stacked["labels"]["segmentation"].shape == (2, 6, 8)


def test_missing_files(folder):
    (folder / "annotations/validation/ADE_val_00000002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 annotations are missing .* NAME = ADE_val_00000002"):
        ade20k.load(folder, "validation")
    assert (ade20k.load(folder, "validation", allow_missing=True)[1]["labels"]["segmentation"] == 255).all()
    with pytest.raises(FileNotFoundError, match=r"No folder .*images/training; expected the layout of ADEC"):
        ade20k.load(folder)
    for path in (folder / "images/validation").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"No image in .*validation; expected NAME\.jpg"):
        ade20k.load(folder, "validation")
