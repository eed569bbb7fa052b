"""COCO's detection labels from miniature annotations."""

import json

import numpy as np
import pytest
from PIL import Image

from mtjax.data.vision import coco, images

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]


def thing(image, category, box, crowd=0):
    return {"image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    entries = [{"id": number, "file_name": f"{number:012}.jpg"} for number in (42, 7, 9)]
    for entry in entries:
        Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(tmp_path / "val2017" / entry["file_name"])
    things = [
        thing(7, 13, [2, 3, 4, 5]),
        thing(42, 90, [0, 0, 16, 12]),
        thing(7, 1, [1.5, 0, 0.5, 2]),
        thing(7, 1, [0, 0, 9, 9], crowd=1),
        thing(7, 1, [3, 3, 0, 4]),
    ]
    content = {"images": entries, "annotations": things, "categories": CATEGORIES}
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return tmp_path


def test_boxes_and_classes(folder):
    source = coco.load(folder, "val2017")
    assert source.names == ("000000000042.jpg", "000000000007.jpg", "000000000009.jpg")
    assert coco.class_names(folder, "val2017") == ("person", "stop sign", "toothbrush")
    labels = [example["labels"]["detection"] for example in source]
    # From (x, y, width, height) to (y0, x0, y1, x1); no crowd, no box of width 0.
    assert [label["boxes"].tolist() for label in labels] == [[[0, 0, 12, 16]], [[3, 2, 8, 6], [0, 1.5, 2, 2]], []]
    assert [label["classes"].tolist() for label in labels] == [[2], [1, 0], []]
    assert labels[2]["boxes"].shape == (0, 4) and labels[2]["classes"].dtype == np.int32


def test_columns(folder):
    detection = images.columns(coco.load(folder, "val2017"), (6, 8), max_boxes=3)["labels"]["detection"]
    assert detection["boxes"].shape == (3, 3, 4) and detection["classes"].tolist() == [
        [2, -1, -1],
        [1, 0, -1],
        [-1] * 3,
    ]
    assert detection["boxes"][1, 0].tolist() == [1.5, 1, 4, 3]


def test_images_of_the_source_stay_as_they_were(folder):
    """What a user does to an example's dictionary does not reach the next reader."""
    source = coco.load(folder, "val2017")
    source[0]["labels"]["detection"]["boxes"] = None
    assert source[0]["labels"]["detection"]["boxes"].shape == (1, 4)


def test_missing_files(folder):
    (folder / "val2017/000000000009.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images are missing .* NAME = 000000000009\.jpg"):
        coco.load(folder, "val2017")
    with pytest.raises(FileNotFoundError, match=r"No folder .*train2017; expected the layout of COCO"):
        coco.load(folder)
    (folder / "annotations/instances_val2017.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match="has no 'categories'; expected COCO's annotations of instances"):
        coco.load(folder, "val2017")
    (folder / "annotations/instances_val2017.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"No file .*instances_val2017\.json"):
        coco.load(folder, "val2017")
