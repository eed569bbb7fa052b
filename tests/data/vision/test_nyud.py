"""NYUD-v2 from miniature files of the three published layouts, and depth from tensorflow-datasets."""

import shutil
import sys

import numpy as np
import pytest
import scipy.io
from PIL import Image

from mtjax.data.vision import images, nyud

SIZE = (12, 16)


def truth(seed):
    """An image and its labels, with unlabelled pixels in each."""
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(*SIZE, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    depth = rng.uniform(0.5, 9.0, SIZE).astype(np.float32)
    depth[0, :3] = 0
    normals[1, :4] = 0
    return {
        "image": rng.integers(0, 256, (*SIZE, 3), np.uint8),
        "segmentation": rng.integers(0, 41, SIZE, np.uint8),
        "depth": depth,
        "normals": normals,
        "edge": rng.integers(0, 2, SIZE, np.uint8),
    }


def save(path, values, ending):
    """The array as a .npy, .mat, .png or .jpg file at `path`, whose folder is the kind of the label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.with_suffix(f".{ending}")
    kind = path.parent.name
    if ending == "npy":
        np.save(path, values)
    elif ending == "mat":
        scipy.io.savemat(path, {kind: values})
    else:
        scale = {"edge": lambda v: v * 255, "normals": lambda v: np.round((v + 1) / 2 * 255)}
        Image.fromarray(scale.get(kind, lambda v: v)(values).astype(np.uint8)).save(path, quality=100, subsampling=0)


LAYOUTS = {
    "InvPT": {"images": "png", "segmentation": "png", "depth": "npy", "normals": "png", "edge": "png"},
    "M3ViT": {"images": "jpg", "segmentation": "png", "depth": "npy", "normals": "npy", "edge": "npy"},
    "original": {"images": "jpg", "segmentation": "mat", "depth": "mat", "normals": "jpg", "edge": "png"},
}


def make(folder, layout):
    for seed, name in enumerate(("0001", "0002", "0003")):
        labels = truth(seed)
        labels["images"] = labels.pop("image")
        for kind, ending in LAYOUTS[layout].items():
            save(folder / kind / name, labels[kind], ending)
    (folder / "gt_sets").mkdir()
    (folder / "gt_sets" / "train.txt").write_text("0001\n0003\n")
    (folder / "gt_sets" / "val.txt").write_text("0002\n")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    source = nyud.load(make(tmp_path, layout))
    assert source.names == ("0001", "0003") and len(nyud.load(tmp_path, "val")) == 1
    expected, example = truth(2), source[1]
    labels = example["labels"]
    assert list(labels) == list(nyud.CHANNELS)
    if layout == "InvPT":
        np.testing.assert_array_equal(example["image"], expected["image"])
    ignored = expected["segmentation"] == 0
    assert ignored.any() and (labels["segmentation"][ignored] == 255).all()
    np.testing.assert_array_equal(labels["segmentation"][~ignored], expected["segmentation"][~ignored] - 1)
    np.testing.assert_array_equal(labels["depth"], np.where(expected["depth"] > 0, expected["depth"], np.nan))
    np.testing.assert_array_equal(labels["edge"], expected["edge"])
    unknown = (expected["normals"] == 0).all(-1)
    assert np.isnan(labels["normals"][unknown]).all()
    np.testing.assert_allclose(np.linalg.norm(labels["normals"][~unknown], axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(labels["normals"][~unknown], expected["normals"][~unknown], atol=0.03)  # JPEG


def test_columns_are_a_batch(tmp_path):
    stacked = images.columns(nyud.load(make(tmp_path, "M3ViT")), (6, 8))
    assert stacked["image"].shape == (2, 6, 8, 3)
    shapes = {name: (label.shape, label.dtype.name) for name, label in stacked["labels"].items()}
    assert shapes == {
        "segmentation": ((2, 6, 8), "uint8"),
        "depth": ((2, 6, 8), "float16"),
        "normals": ((2, 6, 8, 3), "float16"),
        "edge": ((2, 6, 8), "uint8"),
    }


def test_only_the_files_of_the_tasks_asked_for_are_needed(tmp_path):
    make(tmp_path, "InvPT")
    shutil.rmtree(tmp_path / "normals")
    assert list(nyud.load(tmp_path, tasks=("depth", "edge"))[0]["labels"]) == ["depth", "edge"]
    with pytest.raises(FileNotFoundError, match=r"No folder .*normals; expected the layout of NYUD_MT"):
        nyud.load(tmp_path)
    with pytest.raises(ValueError, match="has no task 'parts'; it has segmentation, depth, normals, edge"):
        nyud.load(tmp_path, tasks=("parts",))


def test_missing_files(tmp_path):
    make(tmp_path, "InvPT")
    (tmp_path / "depth" / "0003.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 depth labels are missing .* for NAME = 0003$"):
        nyud.load(tmp_path)
    source = nyud.load(tmp_path, allow_missing=True)
    assert np.isnan(source[1]["labels"]["depth"]).all() and np.isfinite(source[0]["labels"]["depth"]).any()
    with pytest.raises(FileNotFoundError, match=r"No file .*test\.txt; expected the images of split 'test'"):
        nyud.load(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="No folder"):
        nyud.load(tmp_path / "nowhere")


@pytest.mark.filterwarnings("default")  # tensorflow-datasets' mock leaves warnings of its own
def test_tfds_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    with pytest.raises(FileNotFoundError, match="does not hold 'nyu_depth_v2' as array_record"):
        nyud.from_tfds(data_dir=tmp_path)
    with tfds.testing.mock_data(num_examples=2):
        source = nyud.from_tfds(data_dir=tmp_path)
        assert len(source) == 2
        example = source[-1]
    assert example["image"].shape == (480, 640, 3) and list(example["labels"]) == ["depth"]
    depth = example["labels"]["depth"]
    assert depth.shape == (480, 640) and depth.dtype == np.float32 and (depth[np.isfinite(depth)] > 0).all()
    assert "tensorflow" not in sys.modules
