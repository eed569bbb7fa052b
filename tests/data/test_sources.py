"""Rows from memory, ArrayRecord, tensorflow-datasets and Parquet: equal to what was written."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtjax.data import sources
from mtjax.data.pde import records


@pytest.fixture
def columns(rng):
    return {
        "image": rng.integers(0, 256, (23, 2, 3)).astype(np.uint8),
        "labels": {"a": rng.random(23, np.float32), "b": rng.integers(0, 5, 23)},
    }


def assert_equal_rows(source, columns, indices=(4, 22, 0, 4)):
    """One by one, and stacked, with dtypes."""
    expected = sources.Columns(columns)
    assert len(source) == len(expected)
    flat = sources.named_leaves
    for index in indices:
        for (name, mine), (other, leaf) in zip(flat(source[index]), flat(expected[index]), strict=True):
            assert name == other and mine.dtype == leaf.dtype
            np.testing.assert_array_equal(mine, leaf)
    stacked, wanted = sources.take(source, np.array(indices)), sources.take(expected, np.array(indices))
    for (name, mine), (other, leaf) in zip(flat(stacked), flat(wanted), strict=True):
        assert name == other and mine.dtype == leaf.dtype
        np.testing.assert_array_equal(mine, leaf)


def test_columns_in_memory_and_on_disk(columns, tmp_path):
    np.save(tmp_path / "x.npy", columns["image"])
    mapped = sources.Columns({**columns, "image": np.load(tmp_path / "x.npy", mmap_mode="r")})
    assert_equal_rows(mapped, columns)
    np.testing.assert_array_equal(mapped[7]["image"], columns["image"][7])
    with pytest.raises(ValueError, match=r"one leading axis of N rows, got the lengths \{'x': 3, 'y/z': 2\}"):
        sources.Columns({"x": np.zeros(3), "y": {"z": np.zeros(2)}})
    with pytest.raises(ValueError, match=r"got the lengths \{'x': None\}"):
        sources.Columns({"x": 1.0})
    with pytest.raises(ValueError, match="columns holds no array"):
        sources.Columns({})


def test_any_sequence_of_rows_is_a_source(columns):
    rows = [sources.Columns(columns)[index] for index in range(23)]
    assert_equal_rows(rows, columns)
    with pytest.raises(ValueError, match="differ in their columns or shapes, and a batch has one shape"):
        sources.take([{"x": np.zeros(2)}, {"x": np.zeros(3)}], np.arange(2))


def test_array_records(columns, tmp_path):
    rows = [sources.Columns(columns)[index] for index in range(23)]
    paths = [tmp_path / "part_0.array_record", tmp_path / "part_1.array_record"]
    sources.write_array_records(paths[0], rows[:9])
    sources.write_array_records(paths[1], rows[9:])
    assert_equal_rows(sources.array_record_source(paths, sources.decode_npz), columns)
    kept = sources.array_record_source(paths, sources.decode_npz, columns=["labels"])
    assert_equal_rows(kept, {"labels": columns["labels"]})
    with pytest.raises(ValueError, match=r"no column 'label'; did you mean 'labels'\?"):
        sources.array_record_source(paths, sources.decode_npz, columns=["label"])
    with pytest.raises(FileNotFoundError, match=r"No ArrayRecord file at .*absent\.array_record"):
        sources.array_record_source([paths[0], tmp_path / "absent.array_record"], sources.decode_npz)
    with pytest.raises(ValueError, match="row 0 is of type bytes"):
        sources.array_record_source(paths, lambda record: record)


def test_pickled_records_are_refused():
    with pytest.raises(ValueError, match="allow_pickle=False"):
        sources.decode_npz(sources.encode_npz({"x": np.array([{}], object)}))


def test_tensorflow_datasets(columns, tmp_path):
    import tensorflow_datasets as tfds

    builder = records.write("tiny", {"train": columns}, folder=tmp_path)
    assert_equal_rows(sources.tfds_source(builder, "train"), columns)
    assert_equal_rows(sources.tfds_source(builder, "train", columns=["image"]), {"image": columns["image"]})
    assert len(sources.tfds_source(builder, "train[:10]")) == 10
    files = sorted(tmp_path.glob("tiny/1.0.0/*array_record*"))
    decoded = sources.array_record_source(files, sources.tfds_decoder(builder.info.features))
    assert_equal_rows(decoded, columns)

    class Absent(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"x": np.float32})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {}

        def _generate_examples(self):
            return {}

    with pytest.raises(FileNotFoundError, match=r"'absent' is not prepared in .*; call builder.download_and_prepare"):
        sources.tfds_source(Absent(data_dir=tmp_path, file_format="array_record"), "train")


def test_text_is_left_out_or_refused():
    rows = [{"x": np.float32(1), "name": b"one"}, {"x": np.float32(2), "name": b"two"}]
    with pytest.raises(ValueError, match=r"Column 'name' holds \|S3 values.* \(there are 'x', 'name'\)"):
        sources.Records(rows)
    assert sources.take(sources.Records(rows, columns=["x"]), np.arange(2))["x"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="list holds no records"):
        sources.Records([])


@pytest.fixture
def table(rng):
    return {
        "x": np.where(rng.random(23) < 0.2, np.nan, rng.random(23)).astype(np.float32),
        "count": rng.integers(0, 99, 23),
        "flag": rng.random(23) < 0.5,
        "vector": rng.random((23, 3), np.float32),
        "listed": rng.random((23, 2)),
    }


def write_parquet(path, table, rows=slice(None), row_group_size=4):
    part = {name: column[rows] for name, column in table.items()}
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(part["vector"].ravel()), 3)
    x = pa.array(part["x"], mask=np.isnan(part["x"]))  # missing floats are NaN
    arrays = {**part, "x": x, "vector": fixed, "listed": pa.array(part["listed"].tolist())}
    arrays["text"] = pa.array(["word"] * len(part["x"]))
    pq.write_table(pa.table(arrays), path, row_group_size=row_group_size)


def test_parquet_files_by_row_group(table, tmp_path):
    write_parquet(tmp_path / "a.parquet", table, slice(0, 10))
    write_parquet(tmp_path / "b.parquet", table, slice(10, 23))
    folder = sources.Parquet(tmp_path, columns=list(table))
    assert_equal_rows(folder, table)
    assert_equal_rows(folder, table, np.random.default_rng(0).permutation(23))
    one = sources.Parquet(tmp_path / "b.parquet", columns=["count"])
    np.testing.assert_array_equal(one.take(np.array([12, 0]))["count"], table["count"][[22, 10]])
    with pytest.raises(IndexError, match=r"Rows must lie in \[0, 13\), got 0 to 13"):
        one.take(np.array([0, 13]))


def test_parquet_reads_only_the_row_groups_that_it_needs(table, tmp_path):
    write_parquet(tmp_path / "a.parquet", table)
    source = sources.Parquet(tmp_path / "a.parquet", columns=["count", "x"])
    source.take(np.array([5, 6, 7, 20]))
    source.take(np.array([4, 22]))
    assert source.groups_read == 2  # of rows 4-7 and 20-22, once
    # Room for one row group: the others are read again, which is said once.
    small = sources.Parquet(tmp_path / "a.parquet", columns=["count"], cache_bytes=40)
    with pytest.warns(UserWarning, match="6 row groups were decoded 25 times: .* raise it"):
        for _ in range(5):
            np.testing.assert_array_equal(small.take(np.arange(23))["count"], table["count"])


def test_parquet_errors(table, tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, table)
    with pytest.raises(ValueError, match=r"Column 'text' of .*a\.parquet is of type string, expected numbers"):
        sources.Parquet(path)
    with pytest.raises(ValueError, match=r"There is no column 'cuont'; did you mean 'count'\?"):
        sources.Parquet(path, columns=["cuont"])
    with pytest.raises(ValueError, match="columns is empty; there are 'x', 'count', "):
        sources.Parquet(path, columns=[])
    with pytest.raises(FileNotFoundError, match=r"No parquet file at .*b\.parquet"):
        sources.Parquet(tmp_path / "b.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No file \*\.parquet in .*empty"):
        sources.Parquet(tmp_path / "empty")
    pq.write_table(pa.table({"x": pa.array([1, None, 3])}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="Column 'x' has missing values, and is of type int64"):
        sources.Parquet(tmp_path / "c.parquet")[0]
    with pytest.raises(ValueError, match=r"Column 'x' is int64 in .*c\.parquet, but float in the first file"):
        sources.Parquet([path, tmp_path / "c.parquet"], columns=["x"])
    pq.write_table(pa.table({"x": pa.array([[1.0], [1.0, 2.0]])}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match="Column 'x' holds lists of 1 to 2 numbers; pad them"):
        sources.Parquet(tmp_path / "d.parquet")[0]
    pq.write_table(pa.table({"x": pa.array([[1.0], [1.0, 2.0]])}), tmp_path / "e.parquet", row_group_size=1)
    with pytest.raises(ValueError, match="Column 'x' holds lists of different lengths"):
        sources.Parquet(tmp_path / "e.parquet").take(np.arange(2))
    pq.write_table(pa.table({"x": pa.array([], pa.float32())}), tmp_path / "f.parquet")
    with pytest.raises(ValueError, match=r"The table in .*f\.parquet has no rows"):
        sources.Parquet(tmp_path / "f.parquet")
