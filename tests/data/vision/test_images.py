"""Reading, resizing and stacking images and labels, against Pillow, arithmetic and miniature files."""

import pickle

import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mtjax.data.vision import images, reading, resizing
from mtjax.data.vision.images import ConvertedSource, ImageSource, Labels

SIDES = st.integers(1, 20)


def example(rng, size=(12, 16), boxes=((1, 2, 5, 8),)):
    normals = rng.normal(size=(*size, 3)).astype(np.float32)
    return {
        "image": rng.integers(0, 256, (*size, 3), np.uint8),
        "labels": {
            "segmentation": rng.integers(0, 5, size, np.uint8),
            "depth": rng.uniform(1, 5, size).astype(np.float32),
            "normals": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
            "detection": {
                "boxes": np.array(boxes, np.float32).reshape(-1, 4),
                "classes": np.arange(len(boxes), dtype=np.int32),
            },
            "classification": np.int32(3),
        },
    }


def box(label, row, place=0):
    return label["boxes"][row, place].tolist()


# --- One size -------------------------------------------------------------------------------------------------------


@given(old=st.tuples(SIDES, SIDES), new=st.tuples(SIDES, SIDES))
def test_nearest_is_pillows(old, new):
    values = np.random.default_rng(0).integers(0, 256, old, np.uint8)
    expected = np.array(Image.fromarray(values).resize(new[::-1], Image.Resampling.NEAREST))
    # Where the middle of a new pixel lies between two old ones, Pillow's choice depends on rounding.
    tied = [(2 * np.arange(side) + 1) * before % (2 * side) == 0 for side, before in zip(new, old, strict=True)]
    clear = ~tied[0][:, None] & ~tied[1][None, :]
    np.testing.assert_array_equal(resizing.nearest(values, new)[clear], expected[clear])


@given(old=st.tuples(SIDES, SIDES), new=st.tuples(SIDES, SIDES), unknown=st.floats(0, 1))
def test_normals_stay_unit_vectors_and_unknown_ones_do_not_spread(old, new, unknown):
    rng = np.random.default_rng(1)
    direction = np.array([0.6, 0.0, 0.8], np.float32)
    values = np.where(rng.random((*old, 1)) < unknown, np.float32(np.nan), direction)
    resized = resizing.resize("normals", values, new)
    known = np.isfinite(resized).all(-1)
    # A constant field stays constant, whatever is missing around a pixel, and what is missing stays missing.
    np.testing.assert_allclose(resized[known], np.tile(direction, (known.sum(), 1)), rtol=1e-5)
    np.testing.assert_array_equal(known, resizing.nearest(np.isfinite(values).all(-1), new))


def test_normals_are_averaged_where_they_shrink():
    values = np.zeros((32, 32, 3), np.float32)
    values[:, ::2, 0] = values[:, 1::2, 2] = 1.0  # stripes of x and z
    resized = resizing.resize("normals", values, (4, 4))[:, 1:-1]  # at the borders the window is cut between stripes
    np.testing.assert_allclose(resized, np.broadcast_to([0.5**0.5, 0, 0.5**0.5], (4, 2, 3)), rtol=1e-5)


def test_depth_is_never_mixed(rng):
    values = rng.uniform(1, 5, (12, 16)).astype(np.float32)
    assert np.isin(resizing.resize("depth", values, (5, 7)), values).all()


@pytest.mark.parametrize(
    ("fit", "scaled", "offset"),
    [("stretch", (8, 8), (0, 0)), ("pad", (6, 8), (-1, 0)), ("crop", (8, 11), (0, 1))],
)
def test_fits(fit, scaled, offset, rng):
    place = resizing.Placement((12, 16), (8, 8), fit)
    assert (place.scaled, place.offset) == (scaled, offset)
    values = example(rng)
    image, depth = (
        place.dense("image", values["image"]),
        place.dense("depth", values["labels"]["depth"]),
    )
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and depth.shape == (8, 8) and depth.dtype == np.float16
    whole = resizing.resize("image", values["image"], scaled)
    top, left = (max(-side, 0) for side in offset)
    rows, columns = (max(side, 0) for side in offset)
    part = whole[rows : rows + 8, columns : columns + 8]
    np.testing.assert_array_equal(image[top : top + part.shape[0], left : left + part.shape[1]], part)
    outside = np.ones((8, 8), bool)
    outside[top : top + part.shape[0], left : left + part.shape[1]] = False
    np.testing.assert_array_equal(np.isnan(depth), outside)
    assert (image[outside] == resizing.MEAN_COLOUR).all()


def test_padding_does_not_enlarge():
    place = resizing.Placement((3, 4), (8, 8), "pad")
    assert place.scaled == (3, 4)
    placed = place.dense("segmentation", np.arange(12, dtype=np.uint8).reshape(3, 4))
    np.testing.assert_array_equal(placed[2:5, 2:6], np.arange(12).reshape(3, 4))
    assert (placed == reading.IGNORED).sum() == 64 - 12


def test_boxes_follow_the_pixels():
    """A box around a painted rectangle is around it in the new image too, for every fit."""
    image = np.zeros((24, 32, 3), np.uint8)
    image[8:16, 12:20] = 255
    label = {"boxes": np.array([[8, 12, 16, 20]], np.float32), "classes": np.array([4], np.int32)}
    for fit in ("stretch", "pad", "crop"):
        place = resizing.Placement((24, 32), (12, 12), fit)
        painted = place.dense("segmentation", (image[..., 0] > 0).astype(np.uint8)) == 1
        rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
        y0, x0, y1, x1 = place.boxes(label)["boxes"][0]
        np.testing.assert_allclose([y0, x0, y1, x1], [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], atol=0.6)


def test_boxes_outside_of_a_crop_are_dropped():
    place = resizing.Placement((10, 30), (10, 10), "crop")  # columns 10 to 19
    boxes = np.array([[0, 0, 5, 5], [2, 8, 6, 12], [0, 25, 5, 30]], np.float32)
    placed = place.boxes({"boxes": boxes, "classes": np.arange(3, dtype=np.int32)})
    assert placed["boxes"].tolist() == [[2, 0, 6, 2]] and placed["classes"].tolist() == [1]


# --- Stacking -------------------------------------------------------------------------------------------------------


def test_columns_stack_all_kinds(rng):
    first, second = example(rng), example(rng, (10, 9), boxes=())
    stacked = images.columns([first, second], (6, 8))
    labels = stacked["labels"]
    kinds = {
        name: (value.shape, value.dtype)
        for name, value in {"image": stacked["image"], **labels}.items()
        if name != "detection"
    }
    assert kinds == {
        "image": ((2, 6, 8, 3), np.uint8),
        "segmentation": ((2, 6, 8), np.uint8),
        "depth": ((2, 6, 8), np.float16),
        "normals": ((2, 6, 8, 3), np.float16),
        "classification": ((2,), np.int32),
    }
    assert labels["detection"]["boxes"].shape == (2, 1, 4)
    assert box(labels["detection"], 0) == [0.5, 1, 2.5, 4] and box(labels["detection"], 1) == [-1] * 4
    assert labels["detection"]["classes"].tolist() == [[0], [-1]]
    np.testing.assert_allclose(np.linalg.norm(labels["normals"].astype(np.float32), axis=-1), 1, atol=2e-3)


def test_columns_of_the_same_size_change_nothing(rng):
    source = [example(rng), example(rng)]
    stacked = images.columns(source, (12, 16), [1])
    np.testing.assert_array_equal(stacked["image"][0], source[1]["image"])
    np.testing.assert_array_equal(stacked["labels"]["segmentation"][0], source[1]["labels"]["segmentation"])
    np.testing.assert_array_equal(stacked["labels"]["depth"][0], source[1]["labels"]["depth"].astype(np.float16))


def test_columns_keep_the_largest_boxes(rng):
    boxes = ((0, 0, 1, 1), (0, 0, 9, 9), (2, 2, 4, 5))
    kept = images.columns([example(rng, boxes=boxes)], (12, 16), max_boxes=2)["labels"]["detection"]
    assert kept["classes"].tolist() == [[1, 2]] and box(kept, 0) == [0, 0, 9, 9]
    padded = images.columns([example(rng, boxes=boxes)], (12, 16), max_boxes=5)["labels"]["detection"]
    assert padded["classes"].tolist() == [[0, 1, 2, -1, -1]]


def test_far_points_do_not_become_infinite(rng):
    far = {"image": example(rng)["image"], "labels": {"depth": np.full((12, 16), 1e5, np.float32)}}
    assert np.isfinite(images.columns([far], (12, 16))["labels"]["depth"]).all()


def test_columns_refuse(rng):
    with pytest.raises(ValueError, match="fit must be one of 'stretch', 'pad', 'crop', got 'squash'"):
        images.columns([example(rng)], (4, 4), fit="squash")
    with pytest.raises(ValueError, match="size must be a positive height and width"):
        images.columns([example(rng)], (0, 4))
    with pytest.raises(ValueError, match="There are no examples to stack"):
        images.columns([example(rng)], (4, 4), [])


# --- Files ----------------------------------------------------------------------------------------------------------


def test_images_of_other_modes_become_rgb(tmp_path, rng):
    grey = rng.integers(0, 256, (4, 5), np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([grey] * 3)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    np.testing.assert_array_equal(reading.read_image(tmp_path / "grey.png"), np.dstack([grey] * 3))
    assert reading.read_image(tmp_path / "cmyk.jpg").shape == (4, 5, 3)


def test_palette_images_give_their_numbers(tmp_path):
    numbers = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)
    image = Image.frombytes("P", (3, 2), numbers.tobytes())
    image.putpalette([value for index in range(256) for value in (255 - index, index // 2, 7)])
    image.save(tmp_path / "palette.png")
    with Image.open(tmp_path / "palette.png") as stored:
        assert stored.mode == "P"
    np.testing.assert_array_equal(reading.read_numbers(tmp_path / "palette.png"), numbers)
    np.testing.assert_array_equal(reading.read_classes(tmp_path / "palette.png", 3, zero="class"), numbers)
    shifted = reading.read_classes(tmp_path / "palette.png", 2, zero="unlabelled")
    assert shifted.tolist() == [[255, 0, 1], [255, 1, 0]]


def test_sixteen_bits_survive(tmp_path):
    numbers = np.array([[0, 1, 257], [65535, 300, 2]], np.uint16)
    Image.fromarray(numbers).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(reading.read_numbers(tmp_path / "deep.png"), numbers)


def test_unknown_classes_are_an_error(tmp_path):
    Image.fromarray(np.full((2, 2), 41, np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png holds classes 41 to 41; expected 0 to 40"):
        reading.read_classes(tmp_path / "x.png", 40, zero="unlabelled")
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"rgb\.png has 3 channels; expected a label image with one"):
        reading.read_numbers(tmp_path / "rgb.png")


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.save(tmp_path / "x.npy", np.array([Trap()], object), allow_pickle=True)
    (tmp_path / "y.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("x.npy", "y.npy"):
        with pytest.raises(ValueError, match=f"{name} is no .npy file of plain numbers"):
            reading.read_depth(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_mat_files(tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", {"depth": np.array([[1.5, 0.0], [-1.0, np.inf]])})
    np.testing.assert_array_equal(reading.read_depth(tmp_path / "x.mat"), [[1.5, np.nan], [np.nan, np.nan]])
    with pytest.raises(ValueError, match=r"x\.mat has no variable 'LabelMap'"):
        reading.read_mat(tmp_path / "x.mat", "LabelMap")


def test_a_source_can_be_pickled_iterated_and_indexed_from_the_end(tmp_path):
    for name in "ab":
        Image.fromarray(np.full((4, 5, 3), ord(name), np.uint8)).save(tmp_path / f"{name}.png")
        np.save(tmp_path / f"{name}.npy", np.ones((4, 5, 1), np.float32))
    paths = tuple(tmp_path / f"{name}.png" for name in "ab")
    labels = {"depth": Labels(reading.read_depth, (tmp_path / "a.npy", None))}
    source = pickle.loads(pickle.dumps(ImageSource(("a", "b"), paths, labels)))
    assert len(source) == 2 and len(list(source)) == 2
    assert source[np.int64(-1)]["image"][0, 0, 0] == ord("b")
    assert (source[0]["labels"]["depth"] == 1).all() and np.isnan(source[1]["labels"]["depth"]).all()
    with pytest.raises(IndexError):
        source[2]
    converted = ConvertedSource([1, 2, 3], lambda value: {"image": value})
    assert [item["image"] for item in converted] == [1, 2, 3] and converted[-1]["image"] == 3
    with pytest.raises(IndexError):
        converted[3]


def test_a_label_of_another_size_is_resized_and_one_of_another_shape_refused(tmp_path):
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "half.npy", np.arange(48.0).reshape(6, 8) + 1)
    np.save(tmp_path / "other.npy", np.ones((16, 12)))

    def source(name):
        return ImageSource(("a",), (tmp_path / "a.png",), {"depth": Labels(reading.read_depth, (tmp_path / name,))})

    np.testing.assert_array_equal(source("half.npy")[0]["labels"]["depth"][::2, ::2], np.arange(48.0).reshape(6, 8) + 1)
    with pytest.raises(ValueError, match="The depth label of image 'a' has 16 x 12 pixels, the image 12 x 16"):
        source("other.npy")[0]


def test_find_lists_what_is_missing(tmp_path):
    (tmp_path / "b.png").touch()
    with pytest.raises(
        FileNotFoundError,
        match=r"4 of 5 masks are missing in .*: expected NAME.png or NAME.npy for NAME = a, c, d, \.\.\.$",
    ):
        reading.find(list("abcde"), ["{}.png", "{}.npy"], tmp_path, what="masks")
    assert reading.find(list("abc"), ["{}.png"], tmp_path, what="masks", optional=True)[1] == tmp_path / "b.png"
    with pytest.raises(FileNotFoundError, match="1 of 1 masks are missing"):
        reading.find(["a"], ["{}.png"], tmp_path, what="masks", optional=True)


def test_lists_of_names(tmp_path):
    (tmp_path / "train.txt").write_text("a\r\n\nb\n")
    assert reading.read_names(tmp_path / "train.txt", what="images") == ("a", "b")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt names no image"):
        reading.read_names(tmp_path / "empty.txt", what="images")
    with pytest.raises(FileNotFoundError, match=r"No file .*val\.txt; expected images, one name a line"):
        reading.read_names(tmp_path / "val.txt", what="images")
