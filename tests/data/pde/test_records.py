"""tensorflow-datasets builders: a tiny data set is written and read without TensorFlow and comes back unchanged."""

import sys

import numpy as np
import pytest

from mtjax.data.pde import records


def batch(functions, seed=0, *, own_points=False):
    rng = np.random.default_rng(seed)
    shape = (functions, 5, 2) if own_points else (5, 2)
    return {
        "inputs": {
            "code": rng.normal(size=(functions, 4)).astype(np.float32),
            "image": rng.normal(size=(functions, 3, 3, 2)).astype(np.float32),
        },
        "points": np.full(shape, 0.1, np.float32),
        "values": rng.normal(size=(functions, 5)).astype(np.float32),
        "mask": rng.random((functions, 5)) > 0.5,
        "task": np.arange(functions, dtype=np.int32),
        "parameters": {"a": rng.random(functions).astype(np.float32)},
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[key], value)
        else:
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value)


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
@pytest.mark.parametrize("own_points", [False, True])
def test_written_and_read(tmp_path, file_format, own_points):
    data = {split: batch(n, n, own_points=own_points) for split, n in (("train", 23), ("validation", 0), ("test", 2))}
    written = records.write("tiny", data, folder=tmp_path, file_format=file_format, task_names=("F1", "F2"))
    read = records.load("tiny", folder=tmp_path)
    for builder in (written, read):
        assert set(builder.info.splits) == {"train", "test"}
        for split in ("train", "test"):
            assert_same(records.columns(builder, split), data[split])
        source = builder.as_data_source("train")
        assert len(source) == 23
        np.testing.assert_array_equal(source[7]["inputs"]["image"], data["train"]["inputs"]["image"][7])
        assert (records.points(builder) is None) == own_points
        assert builder.info.metadata["task_names"] == ["F1", "F2"]
    assert "tensorflow" not in sys.modules


def test_the_same_data_are_kept_and_others_refused(tmp_path):
    records.write("tiny", {"train": batch(3)}, folder=tmp_path)
    records.write("tiny", {"train": batch(3)}, folder=tmp_path)
    with pytest.raises(ValueError, match="already holds other data"):
        records.write("tiny", {"train": batch(3, seed=1)}, folder=tmp_path)
    newer = records.write("tiny", {"train": batch(3, seed=1)}, folder=tmp_path, version="1.0.1")
    assert_same(records.columns(newer, "train"), batch(3, seed=1))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="lower case"):
        records.write("Tiny set", {"train": batch(2)}, folder=tmp_path)
    with pytest.raises(ValueError, match="file_format='tfrecord'"):
        records.write("tiny", {"train": batch(2)}, folder=tmp_path, file_format="tfrecord")
    with pytest.raises(ValueError, match="one row per function"):
        records.write("tiny", {"train": {**batch(2), "values": np.zeros((3, 5))}}, folder=tmp_path)
    with pytest.raises(ValueError, match="no split with rows"):
        records.write("tiny", {"train": batch(0)}, folder=tmp_path)
    with pytest.raises(ValueError, match="differ in their columns"):
        records.write("tiny", {"train": batch(2), "test": {"task": np.zeros(2)}}, folder=tmp_path)
    with pytest.raises(ValueError, match="different shared points"):
        other = {**batch(2), "points": np.zeros((5, 2), np.float32)}
        records.write("tiny", {"train": batch(2), "test": other}, folder=tmp_path)
    with pytest.raises(ValueError, match="no data set 'tiny'"):
        records.load("tiny", folder=tmp_path)
