"""Rooms: the set is what it says, looks like what it stands for, and its labels agree with each other."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from sklearn.metrics import recall_score
from sklearn.neighbors import NearestCentroid

from mtjax.data import rooms
from mtjax.data.pde import records
from mtjax.data.rooms import dataset

CONFIG = rooms.RoomsConfig(train=96, validation=32, test=64)


@functools.cache
def data(**changes):
    return rooms.generate(dataclasses.replace(CONFIG, **changes))


def whole():
    """Training and test scenes together."""
    both = data()["train"], data()["test"]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *both)


def test_layout():
    for split, count in CONFIG.splits.items():
        part = data()[split]
        found = jax.tree.map(lambda a: (a.dtype.name, a.shape[1:]), part)
        size = (32, 32)
        assert found == {
            "image": ("uint8", (*size, 3)),
            "labels": {
                "segmentation": ("uint8", size),
                "depth": ("float16", size),
                "normals": ("float16", (*size, 3)),
                "edge": ("uint8", size),
            },
            "instances": ("uint8", size),
            "focal": ("float32", ()),
        }
        assert all(len(leaf) == count for leaf in jax.tree.leaves(part))
    assert tuple(data()["train"]["labels"]) == tuple(sorted(rooms.TASKS["rooms"]))


def test_statistics_are_those_of_the_specification():
    labels = whole()["labels"]
    shares = np.bincount(labels["segmentation"].ravel(), minlength=13) / labels["segmentation"].size
    expected = {"wall": 0.38, "floor": 0.24, "ceiling": 0.16, "bed": 0.06, "sofa": 0.05, "cabinet": 0.045}
    for name, share in expected.items():
        assert shares[rooms.ROOM_CLASSES.index(name)] == pytest.approx(share, rel=0.35)
    assert (shares > 0).sum() >= 12 and np.sum(shares < 0.01) >= 4  # a long tail
    assert np.isfinite(labels["depth"]).mean() == pytest.approx(0.977, abs=0.007)
    assert labels["edge"].mean() == pytest.approx(0.18, abs=0.01)
    assert np.nanmin(labels["depth"]) > 0.1 and np.nanmax(labels["depth"]) < 6.5
    objects = [len(np.unique(image)) - 1 for image in whole()["instances"]]
    assert 3 < np.mean(objects) < 5 and max(objects) <= 7


def test_a_guess_without_the_image_is_as_bad_as_specified():
    found = rooms.baselines(data()["train"], data()["test"])
    # Of thousands of scenes; the tolerance is three standard deviations of what 96 and 64 scenes give.
    expected = {
        "segmentation": {"constant": (0.030, 0.004), "per_pixel": (0.104, 0.015)},
        "depth": {"constant": (0.917, 0.05), "per_pixel": (0.749, 0.07)},
        "normals": {"constant": (63.3, 3.2), "per_pixel": (36.6, 1.9)},
        "edge": {"constant": (0.305, 0.018), "per_pixel": (0.353, 0.027)},
    }
    for task, scores in expected.items():
        for kind, (value, tolerance) in scores.items():
            assert found[task][kind] == pytest.approx(value, abs=tolerance), (task, kind)


def chroma(part):
    """Mean chroma and classes of the segments of at least 8 pixels."""
    colours, classes = [], []
    segments = rooms.panoptic(part["labels"]["segmentation"], part["instances"])
    for image, ids in zip(part["image"], segments, strict=True):
        for each in np.unique(ids):
            mask = ids == each
            if mask.sum() >= 8:
                colours.append(image[mask].mean(0) / 255)
                classes.append(each // 256)
    colours = np.array(colours)
    return colours / colours.sum(1, keepdims=True), np.array(classes)


def test_colour_does_not_give_the_class_away():
    """Mean recall of the nearest mean chroma; chance is 1 / 13, and 3 in 10 surfaces have the hue of their class."""
    told = data(style=rooms.Style(colour_correlation=1.0), train=64, validation=0, test=32)
    accuracy = {}
    for correlation, found in ((0.3, data()), (1.0, told)):
        (seen, kind), (new, truth) = (chroma(found[split]) for split in ("train", "test"))
        guess = NearestCentroid().fit(seen, kind).predict(new)
        accuracy[correlation] = recall_score(truth, guess, labels=np.unique(truth), average="macro", zero_division=0)
    assert accuracy[0.3] < 0.27
    assert accuracy[1.0] > 0.5  # so the test would notice


def test_normals_are_unit_and_face_the_camera():
    part = whole()
    normals = part["labels"]["normals"].astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=2e-3)
    towards = np.sum(normals * rays(part["focal"]), -1)
    assert towards.max() < 5e-3


def rays(focal):
    """Directions f32[B, H, W, 3] of the pixels, of unit z."""
    place = (np.arange(32) * 2 + 1) / 32 - 1
    x, y = np.meshgrid(place, place)
    flat = np.stack([x, y], -1)[None] / focal[:, None, None, None]
    return np.concatenate([flat, np.ones_like(flat[..., :1])], -1)


def test_depth_and_normals_are_of_the_same_surface():
    """On walls, floor and ceiling the cross product of back-projected differences is the normal."""
    part = whole()
    labels = part["labels"]
    points = labels["depth"].astype(np.float32)[..., None] * rays(part["focal"])
    along = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    down = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    normal = np.cross(down, along)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    cosine = np.sum(normal * labels["normals"][:, 1:-1, 1:-1], -1)
    same = np.ones(cosine.shape, bool)
    identity = labels["segmentation"] * 2 + labels["edge"]
    for shift_y in range(3):
        for shift_x in range(3):
            around = identity[:, shift_y : shift_y + 30, shift_x : shift_x + 30]
            same &= (around == identity[:, 1:-1, 1:-1]) & (around % 2 == 0) & (around < 6)
    angle = np.degrees(np.arccos(np.clip(cosine[same & np.isfinite(cosine)], -1, 1)))
    assert angle.size > 50_000
    assert np.quantile(angle, 0.99) < 3 and angle.max() < 12  # half floats hold depth to a thousandth


def test_edges_are_where_something_changes():
    labels = whole()["labels"]
    ids = rooms.panoptic(labels["segmentation"], whole()["instances"])
    normals, edge = labels["normals"].astype(np.float32), labels["edge"].astype(bool)
    inverse = 1 / labels["depth"].astype(np.float32)
    changes, jumps, turns = (np.zeros(edge.shape, bool) for _ in range(3))
    for axis in (1, 2):
        here = [slice(None)] * 3
        here[axis] = slice(0, -1)
        changes[tuple(here)] |= np.diff(ids, axis=axis) != 0
        relative = np.abs(np.diff(inverse, axis=axis)) / inverse[tuple(here)]
        jumps[tuple(here)] |= ~(relative < 0.02)  # or unknown, in a hole
        ahead = np.roll(normals, -1, axis)
        turns[tuple(here)] |= np.sum(normals * ahead, -1)[tuple(here)] < 0.945
    assert np.all(edge[changes])
    assert np.all((changes | jumps | turns)[edge])
    assert 0.6 < changes[edge].mean() < 0.95  # creases and occlusions within objects are edges too
    # Where nothing changes there is none, apart from round surfaces, whose normals turn.
    assert np.mean(edge[~changes & ~turns]) < 0.01


def test_keys_are_different_in_every_split_stream_and_seed():
    found = [
        jax.random.key_data(dataset.scene_keys(rooms.RoomsConfig(seed=seed, stream=stream), split, np.arange(2000)))
        for seed in (0, 1)
        for stream in (0, 1, 5)
        for split in dataset.SPLITS
    ]
    found = np.concatenate(found)
    assert len(np.unique(found, axis=0)) == len(found) == 36_000
    images = np.concatenate([data()[split]["image"] for split in dataset.SPLITS])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_larger_splits_begin_with_the_smaller_ones():
    small = data(train=5, validation=0, test=1)
    for split, count in (("train", 5), ("test", 1)):
        jax.tree.map(np.testing.assert_array_equal, small[split], jax.tree.map(lambda a, n=count: a[:n], data()[split]))
    assert small["validation"]["labels"]["depth"].shape == (0, 32, 32)


def test_label_noise_is_of_objects_of_the_training_split():
    noisy = data(label_noise=0.5, unlabelled=0.25, train=64, validation=0, test=1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:1]), noisy["test"], data()["test"])
    clean, found = (d["train"]["labels"]["segmentation"][:64] for d in (data(), noisy))
    thing = noisy["train"]["instances"] > 0
    np.testing.assert_array_equal(found[~thing], clean[~thing])
    assert np.mean(found[thing] == 255) == pytest.approx(0.25, abs=0.08)
    # A tenth of the random classes is the right one.
    assert np.mean((found != clean)[thing & (found != 255)]) == pytest.approx(0.5 * 0.9 / 0.75, abs=0.1)
    assert set(np.unique(found[thing])) <= {*rooms.THINGS["rooms"], 255}


def test_styles_share_a_program_and_change_the_images_only_as_they_say():
    program = dataset._program("rooms", (32, 32), 1, ())
    before = program._cache_size()
    other = data(style=rooms.Style(textures=(1.0, 0.0, 0.0, 0.0), noise=0.0), train=0, validation=0, test=32)
    assert program._cache_size() == before == 1
    for task in ("segmentation", "normals", "edge"):
        np.testing.assert_array_equal(other["test"]["labels"][task], data()["test"]["labels"][task][:32])
    assert not np.array_equal(other["test"]["image"], data()["test"]["image"][:32])


def test_the_set_is_stored_read_back_and_written_as_a_builder_of_tensorflow_datasets(tmp_path):
    config = dataclasses.replace(CONFIG, train=3, validation=0, test=2)
    cache = tmp_path / "cache"
    builder = rooms.to_records(config, folder=tmp_path, cache=cache)
    (path,) = cache.iterdir()
    assert path.name.startswith("rooms-rooms-v1-")
    written = path.stat().st_mtime_ns
    stored = rooms.load(config, folder=cache)
    assert path.stat().st_mtime_ns == written
    expected = jax.tree.map(lambda a: a[:2], data()["test"])
    jax.tree.map(np.testing.assert_array_equal, stored["test"], expected)
    rooms.load(dataclasses.replace(config, train=0, test=0), folder=cache, progress=False)
    assert len(list(cache.iterdir())) == 2

    assert builder.info.metadata["task_names"] == list(rooms.TASKS["rooms"])
    read = records.load("rooms_rooms", folder=tmp_path)
    assert set(read.info.splits) == {"train", "test"}
    for split in ("train", "test"):
        jax.tree.map(np.testing.assert_array_equal, records.columns(read, split), stored[split])
    example = read.as_data_source("train")[1]
    np.testing.assert_array_equal(example["labels"]["normals"], stored["train"]["labels"]["normals"][1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "kitchen"}, "variant='kitchen' must be one of rooms, person, street, object"),
        ({"size": 4}, "size=4 is too small"),
        ({"supersample": 2}, "supersample=2 must be odd"),
        ({"train": -1}, "Splits need a number of scenes >= 0"),
        ({"seed": -1}, "must be from 0 to"),
        ({"label_noise": 0.8, "unlabelled": 0.5}, "must be probabilities with a sum <= 1"),
        ({"extras": ("smell",)}, "extras holds .'smell'.; known are shading"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        rooms.RoomsConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour_correlation": 1.5}, "must be a probability"),
        ({"textures": (1.0, 1.0)}, "needs 4 weights"),
        ({"pitch": (10.0, -10.0)}, "must be a range"),
        ({"focal": (0.0, 1.0)}, "must be positive"),
    ],
)
def test_bad_styles(changes, message):
    with pytest.raises(ValueError, match=message):
        rooms.Style(**changes)
