"""Persons with parts and something salient, streets with disparity, and the extra labels."""

import dataclasses
import functools

import numpy as np

from mtjax.data import rooms

PERSON, STREET = rooms.PERSON_CLASSES.index("person"), dict(map(reversed, enumerate(rooms.STREET_CLASSES)))


@functools.cache
def split(variant, **changes):
    config = rooms.RoomsConfig(variant=variant, size=(16, 24), train=32, validation=0, test=0)
    return rooms.generate(dataclasses.replace(config, **changes))["train"]


def test_persons_have_parts_and_something_is_salient():
    part = split("person", extras=rooms.EXTRAS)
    labels = {task: part["labels"][task] for task in rooms.TASKS["person"]}
    assert {task: label.dtype.name for task, label in labels.items()} == {
        "segmentation": "uint8",
        "parts": "uint8",
        "saliency": "uint8",
        "normals": "float16",
        "edge": "uint8",
    }
    assert part["image"].shape == (32, 16, 24, 3) and labels["parts"].shape == (32, 16, 24)
    person = labels["segmentation"] == PERSON
    np.testing.assert_array_equal(labels["parts"] > 0, person)
    np.testing.assert_array_equal(part["instances"] == 7, person)
    assert person.any((1, 2)).mean() > 0.9 and 0.03 < person.mean() < 0.25
    assert set(np.unique(labels["parts"])) == set(range(len(rooms.PARTS)))
    salient = labels["saliency"] == 1
    for mask, instances in zip(salient, part["instances"], strict=True):
        (number,) = np.unique(instances[mask])  # exactly one object, all of it
        assert number > 0
        np.testing.assert_array_equal(mask, instances == number)
    assert person[salient].mean() > 0.3


def test_streets_have_disparity_below_the_sky():
    part = split("street")
    assert {task: label.dtype.name for task, label in part["labels"].items()} == {
        "segmentation": "uint8",
        "disparity": "float16",
    }
    label, disparity = part["labels"]["segmentation"], part["labels"]["disparity"].astype(np.float32)
    sky = label == STREET["sky"]
    np.testing.assert_array_equal(np.isnan(disparity), sky)
    # f B / z of f in pixels, B = .22 m and at most the distance to the end of the street.
    assert disparity[~sky].min() > 0.22 * part["focal"].min() * 12 / 130
    shares = np.bincount(label.ravel(), minlength=7) / label.size
    assert np.all(shares > 0) and shares[[STREET["road"], STREET["building"]]].min() > 0.2
    np.testing.assert_array_equal(part["instances"] > 0, label == STREET["car"])
    rows = np.arange(16)[None, :, None]
    height = {name: np.mean(np.broadcast_to(rows, label.shape)[label == STREET[name]]) for name in STREET}
    assert height["sky"] < height["building"] < height["road"]
    # The ground comes nearer from row to row, wherever two rows of a column are both road.
    road = (label[:, 1:] == STREET["road"]) & (label[:, :-1] == STREET["road"])
    assert np.mean((disparity[:, 1:] >= disparity[:, :-1])[road]) > 0.98


def test_extras_agree_with_the_other_labels():
    part = split("person", extras=rooms.EXTRAS)
    labels = part["labels"]
    assert set(rooms.EXTRAS) < set(labels)
    assert np.all((labels["shading"] >= 0) & (labels["shading"] <= 1))
    ids = rooms.panoptic(labels["segmentation"], part["instances"])
    expected = np.zeros(ids.shape, bool)
    expected[:, :-1] |= np.diff(ids, axis=1) != 0
    expected[:, :, :-1] |= np.diff(ids, axis=2) != 0
    np.testing.assert_array_equal(labels["contour"], expected)
    assert np.all(labels["edge"] >= np.maximum(labels["contour"], labels["occlusion"]))
    assert 0 < labels["occlusion"].mean() < labels["edge"].mean() and 0 < labels["texture_edge"].mean() < 1
    # A person is of capsules: round along the limb or around its ends, where both curvatures are 1 / radius.
    larger, smaller = np.moveaxis(labels["curvature"].astype(np.float32), -1, 0)
    assert not larger[part["instances"] == 0].any()
    assert np.all((smaller == 0) | (smaller == larger))
    head = labels["parts"] == rooms.PARTS.index("head")
    assert np.all((larger[head] > 1 / 0.14) & (larger[head] < 1 / 0.1)) and np.mean(smaller[head] > 0) > 0.6
