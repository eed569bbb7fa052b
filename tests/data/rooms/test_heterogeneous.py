"""Single objects, and single-task sets that share no image."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mtjax.data import rooms


@functools.cache
def split(variant, **changes):
    config = rooms.RoomsConfig(variant=variant, train=32, validation=0, test=0)
    return rooms.generate(dataclasses.replace(config, **changes))["train"]


def test_single_task_sets_share_no_image(tmp_path):
    config = rooms.RoomsConfig(train=32, validation=0, test=0)
    sets = rooms.heterogeneous(config, folder=tmp_path, progress=False)
    assert tuple(sets) == ("classification", "segmentation", "detection", "depth", "normals")
    images = [part["image"] for one in sets.values() for part in one.values()]
    images.append(split("object")["image"])  # of the joint stream
    flat = np.concatenate(images).reshape(-1, 32 * 32 * 3)
    assert len(flat) == 5 * 32 + 32 == len(np.unique(flat, axis=0))
    means = [sets[task]["train"]["image"].std((0, 1, 2)).mean() for task in ("segmentation", "normals")]
    assert means[1] < means[0]  # less saturated

    kinds = sets["classification"]["train"]["label"]
    assert kinds.dtype == np.int32 and kinds.shape == (32,) and set(kinds) <= set(range(10)) and len(set(kinds)) > 6
    boxes, classes = (sets["detection"]["train"]["label"][key] for key in ("boxes", "classes"))
    assert boxes.shape == (32, 7, 4) and boxes.dtype == np.float32
    assert classes.shape == (32, 7) and classes.dtype == np.int32
    there = classes >= 0
    assert there.any(1).mean() > 0.9 and set(classes[there]) <= set(rooms.THINGS["rooms"])
    assert np.all(boxes[there][:, :2] < boxes[there][:, 2:]) and np.all(boxes[there] <= 32)
    for task in ("segmentation", "depth", "normals"):
        assert sets[task]["train"]["label"].shape[:3] == (32, 32, 32)
    # A set does not depend on which others are asked for.
    alone = rooms.heterogeneous(config, ["depth"], folder=tmp_path, progress=False)
    jax.tree.map(np.testing.assert_array_equal, alone["depth"], sets["depth"])
    with pytest.raises(ValueError, match=r"tasks holds .'edge'.; known are classification"):
        rooms.heterogeneous(config, ["edge"])


@pytest.mark.slow
def test_supersampling_changes_the_image_only():
    plain, fine = split("object"), split("object", supersample=3)
    np.testing.assert_array_equal(fine["labels"]["classification"], plain["labels"]["classification"])
    np.testing.assert_array_equal(fine["instances"], plain["instances"])
    # The central of nine rays is one of those in the mean.
    images = fine["image"].astype(float), plain["image"].astype(float)
    assert np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1] > 0.95
    assert np.abs(np.diff(images[0], axis=2)).mean() < np.abs(np.diff(images[1], axis=2)).mean()


def test_the_object_is_in_the_middle_of_its_image():
    part = split("object")
    thing = part["instances"] == 1
    assert thing.any((1, 2)).mean() > 0.95
    assert thing[:, 11:21, 11:21].mean() > 2 * thing.mean() > 0.1
