"""PASCAL-Context with five tasks from miniature files of the layout of PASCAL_MT."""

import numpy as np
import pytest
import scipy.io
from PIL import Image
from scipy import ndimage

from mtjax.data.vision import images, pascal_context

SIZE = (12, 16)
NAMES = ("2008_000002", "2008_000003", "2008_000007")


def person(masks, number=15):
    """An object of PASCAL-Part: {name: mask} of its parts."""
    parts = np.zeros((1, len(masks)), dtype=[("part_name", object), ("mask", object)])
    for column, (name, mask) in enumerate(masks.items()):
        parts[0, column] = (name, mask.astype(np.uint8))
    whole = np.any(list(masks.values()), axis=0) if masks else np.ones(SIZE, bool)
    return ("person", number, whole.astype(np.uint8), parts if masks else np.zeros((0, 0)))


def save_parts(path, things):
    objects = np.zeros((1, len(things)), dtype=[(name, object) for name in ("class", "class_ind", "mask", "parts")])
    for column, thing in enumerate(things):
        objects[0, column] = thing
    anno = np.zeros((1, 1), dtype=[("imname", object), ("objects", object)])
    anno[0, 0] = (path.stem, objects)
    scipy.io.savemat(path, {"anno": anno})


def rectangle(rows, columns):
    mask = np.zeros(SIZE, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


HEAD, ARM, LEG = rectangle((0, 3), (4, 7)), rectangle((3, 6), (2, 4)), rectangle((8, 12), (4, 6))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    folders = ("semseg/VOC12", "semseg/pascal-context", "human_parts", "normals_distill", "sal_distill")
    for name in ("ImageSets/Context", "JPEGImages", "pascal-context/trainval", *folders):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ImageSets/Context/train.txt").write_text("\n".join(NAMES) + "\n")
    classes = np.full(SIZE, 9)  # a bag: normals known
    classes[:, 8:] = 2  # an aeroplane: normals unknown
    for number, name in enumerate(NAMES):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(tmp_path / f"JPEGImages/{name}.jpg")
        segmentation = Image.frombytes("P", SIZE[::-1], np.full(SIZE, (number, 20, 255)[number], np.uint8).tobytes())
        segmentation.putpalette([value for index in range(256) for value in (index, 255 - index, 0)])
        segmentation.save(tmp_path / "semseg" / ("pascal-context" if number else "VOC12") / f"{name}.png")
        Image.fromarray(np.full((*SIZE, 3), (128, 128, 255), np.uint8)).save(tmp_path / f"normals_distill/{name}.png")
        saliency = np.where(rectangle((2, 9), (3, 9)), 200, 90).astype(np.uint8)
        Image.fromarray(saliency).save(tmp_path / f"sal_distill/{name}.png")
        scipy.io.savemat(tmp_path / f"pascal-context/trainval/{name}.mat", {"LabelMap": classes.astype(np.uint16)})
    save_parts(tmp_path / f"human_parts/{NAMES[0]}.mat", [person({"hair": HEAD, "llarm": ARM}), person({"rfoot": LEG})])
    save_parts(tmp_path / f"human_parts/{NAMES[1]}.mat", [person({"head": HEAD}, number=12)])  # a dog
    save_parts(tmp_path / f"human_parts/{NAMES[2]}.mat", [person({})])
    return tmp_path


def test_segmentation_comes_from_either_folder_and_keeps_its_numbers(folder):
    source = pascal_context.load(folder)
    assert source.names == NAMES and list(source[0]["labels"]) == list(pascal_context.CHANNELS)
    assert [int(source[i]["labels"]["segmentation"][0, 0]) for i in range(3)] == [0, 20, 255]


def test_parts_are_grouped_and_images_without_people_ignored(folder):
    source = pascal_context.load(folder, tasks=("parts",))
    expected = np.zeros(SIZE, np.uint8)
    expected[HEAD], expected[ARM], expected[LEG] = 1, 4, 6
    np.testing.assert_array_equal(source[0]["labels"]["parts"], expected)
    for without in (1, 2):  # a dog's head, a person whose parts nobody drew
        assert (source[without]["labels"]["parts"] == 255).all()
    save_parts(folder / f"human_parts/{NAMES[1]}.mat", [person({"tail": HEAD})])
    with pytest.raises(ValueError, match="has a human part 'tail'; known are hair, head"):
        source[1]


def test_all_24_parts_have_a_group():
    assert sum(map(len, pascal_context.PARTS.values())) == 24
    assert len(set(pascal_context.NORMALS_KNOWN)) == 170


def test_normals_are_known_on_indoor_classes_only(folder):
    normals = pascal_context.load(folder)[0]["labels"]["normals"]
    assert np.isnan(normals[:, 8:]).all()
    np.testing.assert_allclose(normals[:, :8], np.broadcast_to([0, 0, 1], (12, 8, 3)), atol=5e-3)


def test_saliency_and_edges(folder):
    labels = pascal_context.load(folder)[0]["labels"]
    np.testing.assert_array_equal(labels["saliency"], rectangle((2, 9), (3, 9)))
    # Between columns 7 and 8 the classes change: two columns of changes, of which thinning leaves one.
    assert labels["edge"].dtype == np.uint8
    # (It shortens the ends of lines as well.)
    assert (labels["edge"][1:-1].sum(1) == 1).all() and (labels["edge"][1:-1, 7:9].sum(1) == 1).all()


def test_thinning_keeps_what_is_connected(rng):
    blobs = ndimage.gaussian_filter(rng.normal(size=(60, 70)), 2) > 0.05
    lines = pascal_context.thin(blobs)
    eight = np.ones((3, 3))
    assert (lines <= blobs).all() and lines.sum() < 0.5 * blobs.sum()
    labelled, count = ndimage.label(blobs, eight)
    assert count > 3 and ndimage.label(lines, eight)[1] == count
    assert (np.unique(labelled[lines]) == np.arange(1, count + 1)).all()  # one line in each blob
    assert not (ndimage.uniform_filter(lines.astype(float), 3) > 0.99).any()
    np.testing.assert_array_equal(pascal_context.thin(lines), lines)


def test_thinning_by_hand():
    """A bar three pixels wide shrinks to its middle line; a single pixel and a diagonal stay."""
    bar = np.zeros((7, 12), bool)
    bar[2:5, 1:11] = True
    thinned = pascal_context.thin(bar)
    assert thinned[3, 3:9].all() and not thinned[[0, 1, 2, 4, 5, 6]].any()
    for stable in (np.eye(5, dtype=bool), np.pad(np.ones((1, 1), bool), 2)):
        np.testing.assert_array_equal(pascal_context.thin(stable), stable)


@pytest.mark.slow
def test_thinning_is_scikit_images(rng):
    morphology = pytest.importorskip("skimage.morphology")
    for density in (0.3, 0.5, 0.7, 0.9):
        for _ in range(20):
            mask = rng.random((40, 50)) < density
            np.testing.assert_array_equal(pascal_context.thin(mask), morphology.thin(mask))


def test_columns_pad_images_of_different_sizes(folder):
    Image.fromarray(np.zeros((16, 10, 3), np.uint8)).save(folder / f"JPEGImages/{NAMES[1]}.jpg")
    Image.fromarray(np.ones((16, 10), np.uint8)).save(folder / f"semseg/pascal-context/{NAMES[1]}.png")
    stacked = images.columns(pascal_context.load(folder, tasks=("segmentation",)), (16, 16), fit="pad")
    segmentation = stacked["labels"]["segmentation"]
    assert stacked["image"].shape == (3, 16, 16, 3)
    assert (segmentation[1][:, 3:13] == 1).all() and (segmentation[1] == 255).sum() == 16 * 6


def test_missing_files(folder):
    (folder / f"normals_distill/{NAMES[2]}.png").unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 3 normals labels are missing .* NAME = {NAMES[2]}"):
        pascal_context.load(folder)
    source = pascal_context.load(folder, allow_missing=True)
    assert np.isnan(source[2]["labels"]["normals"]).all()
    (folder / f"pascal-context/trainval/{NAMES[0]}.mat").unlink()
    assert (pascal_context.load(folder, tasks=("edge",), allow_missing=True)[0]["labels"]["edge"] == 255).all()
    with pytest.raises(FileNotFoundError, match=r"No file .*val\.txt"):
        pascal_context.load(folder, "val")
