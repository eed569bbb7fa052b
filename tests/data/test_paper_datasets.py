"""HIGGS, AliExpress and ACS Income from miniature files of the published layouts."""

import gzip
import json
import sys
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from mtjax.data import acs_income, aliexpress, higgs
from mtjax.data.acs_income import StratifiedSplit, read_arff


def rows_of(data) -> int:
    return sum(len(index) for index in data.rows.values())


# --- HIGGS ----------------------------------------------------------------------------------------------------------


def higgs_values(n: int = 200) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.lognormal(size=(n, 29)).astype(np.float32)
    values[:, 0] = rng.integers(0, 2, n)
    for column, high in ((9, 2.1730762), (13, 2.2148721), (17, 2.5482240), (21, 3.1019614)):
        values[:, column] = rng.choice(np.array([0, high / 2, high], np.float32), n)
    return values


@pytest.fixture(scope="module")
def higgs_csv(tmp_path_factory):
    """The layout of UCI's file: no header, 18 digits, compressed."""
    path = tmp_path_factory.mktemp("higgs") / "HIGGS.csv.gz"
    np.savetxt(path, higgs_values().astype(np.float64), delimiter=",", fmt="%.18e")
    return path


@pytest.fixture(scope="module")
def higgs_tfds(tmp_path_factory, higgs_csv):
    """A data directory that tensorflow-datasets itself prepared from the small file, without TensorFlow."""
    import tensorflow_datasets as tfds

    directory = tmp_path_factory.mktemp("tfds")
    plain = directory / "HIGGS.csv"
    plain.write_bytes(gzip.decompress(higgs_csv.read_bytes()))
    with mock.patch.object(tfds.download.DownloadManager, "download_and_extract", lambda self, url: plain):
        assert rows_of(higgs.load(data_dir=directory, download=True)) == 200
    return directory


def test_higgs_csv_has_eight_tasks_and_21_inputs(higgs_csv):
    data = higgs.load(higgs_csv)
    assert [task.name for task in data.tasks] == ["label", "m_jj", "m_jjj", "m_lv", "m_jlv", "m_bb", "m_wbb", "m_wwbb"]
    assert [task.kind for task in data.tasks] == ["binary"] + ["regression"] * 7
    assert data.cardinalities == (4, 4, 4, 4) and data.num_numeric == 17
    assert [len(data.rows[name]) for name in ("train", "validation", "test")] == [180, 10, 10]
    values = higgs_values()
    for name in ("train", "validation", "test"):
        batch, index = getattr(data, name), data.rows[name]
        for i, column in ((0, "label"), (22, "m_jj"), (28, "m_wwbb")):
            np.testing.assert_array_equal(batch["labels"][column], values[index, i])
        # Categories are sorted by value, so that code 3 is a tight b-tag.
        np.testing.assert_array_equal(batch["categorical"][:, 3] == 3, values[index, 21] > 3)
    np.testing.assert_allclose(data.train["numeric"].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(data.train["numeric"].std(0), 1, atol=1e-5)
    np.testing.assert_allclose(data.tasks[1].offset, values[data.rows["train"], 22].mean(), rtol=1e-5)


def test_higgs_tfds_equals_csv_without_tensorflow(higgs_csv, higgs_tfds):
    from_csv, from_tfds = higgs.load(higgs_csv), higgs.load(data_dir=higgs_tfds)
    assert from_tfds.encoder.feature_names == from_csv.encoder.feature_names
    # tfds shuffles: sorted by the first input, the tables are equal.
    for column in ("label", "m_lv"):
        tables = []
        for data in (from_csv, from_tfds):
            splits = [data.train, data.validation, data.test]
            labels = np.concatenate([split["labels"][column] for split in splits])
            keys = np.concatenate([split["labels"]["m_jj"] for split in splits])
            tables.append(labels[np.argsort(keys)])
        np.testing.assert_array_equal(*tables)
    assert "tensorflow" not in sys.modules


def test_higgs_takes_a_prefix(higgs_csv, higgs_tfds):
    assert rows_of(higgs.load(higgs_csv, rows=60)) == 60
    assert rows_of(higgs.load(data_dir=higgs_tfds, rows=60)) == 60
    assert rows_of(higgs.load(data_dir=higgs_tfds, rows=10**9)) == 200


def test_higgs_says_what_to_do(tmp_path, higgs_csv):
    with pytest.raises(FileNotFoundError, match=r"download HIGGS\.csv\.gz from https://archive\.ics\.uci\.edu"):
        higgs.load(tmp_path / "HIGGS.csv")
    with pytest.raises(FileNotFoundError, match=r"HIGGS is not prepared in .*download=True"):
        higgs.load(data_dir=tmp_path)
    (tmp_path / "header.csv").write_text("label,lepton_pT\n1,2\n")
    with pytest.raises(ValueError, match=r"expected the numbers of HIGGS\.csv, without a header"):
        higgs.load(tmp_path / "header.csv")
    (tmp_path / "narrow.csv").write_text("1,2,3\n")
    with pytest.raises(ValueError, match=r"has 3 columns; HIGGS.csv has 29"):
        higgs.load(tmp_path / "narrow.csv")


def test_higgs_names_the_format_that_cannot_be_read(tmp_path, higgs_tfds):
    """A directory prepared as TFRecord, tfds's default, has no random access."""
    version = tmp_path / "higgs" / "2.0.0"
    version.mkdir(parents=True)
    for file in (higgs_tfds / "higgs" / "2.0.0").glob("*.json"):
        (version / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    for download in (False, True):
        with pytest.raises(ValueError, match=r"holds HIGGS as tfrecord, .*; expected array_record or parquet"):
            higgs.load(data_dir=tmp_path, download=download)


# --- AliExpress -----------------------------------------------------------------------------------------------------


def aliexpress_frame(n: int, seed: int, categories: int = 6) -> pd.DataFrame:
    """Rows as MTReclib writes them; the columns that are constant in NL are constant here."""
    rng = np.random.default_rng(seed)
    columns = {"search_id": np.sort(rng.integers(0, n // 4, n))}
    columns |= {name: rng.integers(0, categories, n) for name in aliexpress.CATEGORICAL}
    columns |= {name: rng.random(n).round(6) for name in aliexpress.NUMERIC}
    columns["categorical_1"] = np.full(n, 8)
    columns |= {f"numerical_{i}": np.zeros(n, int) for i in (58, 59, 60)}
    columns["click"] = rng.integers(0, 2, n)
    columns["conversion"] = columns["click"] * rng.integers(0, 2, n)
    return pd.DataFrame(columns)


@pytest.fixture(scope="module")
def aliexpress_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("AliExpress_NL")
    train, test = aliexpress_frame(400, 0), aliexpress_frame(100, 1, categories=7)
    # A category that training lacks, between two that it has: a refitted encoder would shift all codes above it.
    train["categorical_2"] *= 2
    test.loc[:9, "categorical_2"] = 3
    train.to_csv(directory / "train.csv", index=False)
    test.to_csv(directory / "test.csv.gz", index=False)
    return directory


def test_aliexpress_has_15_categorical_and_60_numeric_inputs(aliexpress_directory):
    data = aliexpress.load(aliexpress_directory)
    assert len(data.cardinalities) == 15 and data.num_numeric == 60
    assert [(task.name, task.kind) for task in data.tasks] == [("click", "binary"), ("conversion", "binary")]
    assert "'categorical_1', 'numerical_58', 'numerical_59', 'numerical_60'" in data.notes[0]
    assert "search_id" not in data.feature_names
    assert len(data.rows["train"]) + len(data.rows["validation"]) == 400 and len(data.rows["test"]) == 100
    train = pd.read_csv(aliexpress_directory / "train.csv")
    numbers = train["numerical_61"].to_numpy()[data.rows["train"]]
    encoded = data.train["numeric"][:, data.encoder.numeric_names.index("numerical_61")]
    np.testing.assert_allclose(encoded, (numbers - numbers.mean()) / numbers.std(), atol=1e-5)
    for name in ("train", "validation"):
        batch, index = getattr(data, name), data.rows[name]
        np.testing.assert_array_equal(batch["labels"]["conversion"], train["conversion"].to_numpy()[index])


def test_aliexpress_test_rows_keep_the_codes_of_training(aliexpress_directory):
    """The reference refits its category encoder on the test file."""
    data = aliexpress.load(aliexpress_directory)
    test = pd.read_csv(aliexpress_directory / "test.csv.gz")
    assert data.encoder.categorical[0].categories == ("0", "2", "4", "6", "8", "10")
    codes = test["categorical_2"].map({0: 1, 2: 2, 4: 3, 6: 4, 8: 5, 10: 6}).fillna(0)
    np.testing.assert_array_equal(data.test["categorical"][:, 0], codes)
    assert (data.test["categorical"][:10, 0] == 0).all()
    refitted = {value: i + 1 for i, value in enumerate(sorted(test["categorical_2"].unique()))}
    assert refitted[4] != 3


def test_aliexpress_chunks_change_nothing(aliexpress_directory):
    whole, chunked = (aliexpress.load(aliexpress_directory, chunk_rows=n) for n in (1000, 37))
    assert whole.encoder.categorical == chunked.encoder.categorical
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(whole.rows[name], chunked.rows[name])
        a, b = getattr(whole, name), getattr(chunked, name)
        np.testing.assert_array_equal(a["categorical"], b["categorical"])
        np.testing.assert_allclose(a["numeric"], b["numeric"], atol=1e-5)
        for task in ("click", "conversion"):
            np.testing.assert_array_equal(a["labels"][task], b["labels"][task])


def test_aliexpress_validates_on_whole_searches(aliexpress_directory):
    search = pd.read_csv(aliexpress_directory / "train.csv")["search_id"].to_numpy()
    data = aliexpress.load(aliexpress_directory, validation=0.3)
    train, validation = (set(search[data.rows[name]]) for name in ("train", "validation"))
    assert not train & validation and 0.15 < len(data.rows["validation"]) / 400 < 0.45
    # A prefix splits the same way as the whole file, another seed another way.
    prefix = aliexpress.load(aliexpress_directory, validation=0.3, rows=150)
    assert len(prefix.rows["test"]) == 100
    np.testing.assert_array_equal(prefix.rows["train"], data.rows["train"][data.rows["train"] < 150])
    other = aliexpress.load(aliexpress_directory, validation=0.3, seed=1)
    assert set(search[other.rows["validation"]]) != validation


@pytest.mark.parametrize("form", ["sequence", "json", "npy"])
def test_aliexpress_takes_validation_rows(aliexpress_directory, tmp_path, form):
    positions = [399, 3, 57, 58]
    validation = positions
    if form == "json":
        validation = tmp_path / "indices.json"
        validation.write_text(json.dumps(positions))
    elif form == "npy":
        validation = tmp_path / "indices.npy"
        np.save(validation, positions)
    data = aliexpress.load(aliexpress_directory, validation=validation, chunk_rows=58)
    assert data.rows["validation"].tolist() == [3, 57, 58, 399] and len(data.rows["train"]) == 396


def test_aliexpress_hash_is_uniform():
    numbers = aliexpress._uniform(np.arange(20_000), seed=3)
    assert numbers.min() >= 0 and numbers.max() < 1
    np.testing.assert_allclose(np.histogram(numbers, bins=10, range=(0, 1))[0] / 20_000, 0.1, atol=0.01)


def test_aliexpress_errors(aliexpress_directory, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No train.csv in .*MTReclib"):
        aliexpress.load(tmp_path)
    for wrong, message in (
        (1.5, "share between 0 and 1, or row positions; got 1.5"),
        ([0.5, 1.0], "row positions >= 0 in one dimension, got an array of float64"),
        ("rows.txt", "must be a .json or .npy file"),
        ([400], "names row 400, but the training file has 400 rows"),
        (range(400), "The train split is empty"),
        (1e-9, "The validation split is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            aliexpress.load(aliexpress_directory, validation=wrong)
    frame = aliexpress_frame(20, 0)
    frame.to_csv(tmp_path / "test.csv", index=False)
    frame.rename(columns={"categorical_3": "cat_3"}).to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(ValueError, match="column 3 is 'cat_3', expected 'categorical_3'"):
        aliexpress.load(tmp_path)
    frame.drop(columns="conversion").to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(ValueError, match="has 81 columns, expected 82"):
        aliexpress.load(tmp_path)
    frame.assign(numerical_5=np.nan).to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(ValueError, match="no value for 'numerical_5' in some of the rows 0 to 19"):
        aliexpress.load(tmp_path)


# --- ACS Income -----------------------------------------------------------------------------------------------------

ACS_COLUMNS = ("AGEP", "COW", "SCHL", "MAR", "OCCP", "POBP", "RELP", "WKHP", "SEX", "RAC1P", "ST", "PINCP")


def acs_frame(n: int = 400) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({name: rng.integers(1, 12, n).astype(float) for name in ACS_COLUMNS})
    frame["MAR"] = rng.choice([1.0, 2, 3, 4, 5], n, p=[0.5, 0.1, 0.1, 0.05, 0.25])
    frame["PINCP"] = rng.choice([20_000.0, 50_000.0, 50_010.0, 90_000.0], n)
    return frame


def write_arff(frame: pd.DataFrame, path) -> None:
    """As OpenML serves it: a comment, quoted attributes, dense rows."""
    header = ["% Retiring Adult", "@RELATION 'ACSIncome'", ""]
    header += [f'@ATTRIBUTE "{name}" REAL' if i % 2 else f"@attribute {name} NUMERIC" for i, name in enumerate(frame)]
    path.write_text("\n".join([*header, "", "@DATA", "% rows", frame.to_csv(index=False, header=False, na_rep="?")]))


def test_acs_income_has_two_tasks_and_ten_categorical_inputs(tmp_path):
    frame = acs_frame()
    frame.to_csv(tmp_path / "acs.csv", index=False)
    data = acs_income.load(tmp_path / "acs.csv")
    assert [(task.name, task.output_size) for task in data.tasks] == [("PINCP", 1), ("MAR", 5)]
    assert data.feature_names == acs_income.INPUTS and data.num_numeric == 0
    assert [len(data.rows[name]) / 400 for name in ("train", "validation", "test")] == pytest.approx(
        [0.7, 0.15, 0.15], abs=0.02
    )
    for name in ("train", "validation", "test"):
        index = data.rows[name]
        np.testing.assert_array_equal(getattr(data, name)["labels"]["PINCP"], frame["PINCP"][index] > 50_000)
        np.testing.assert_array_equal(getattr(data, name)["labels"]["MAR"], frame["MAR"][index] - 1)


def test_acs_income_reads_arff_parquet_and_csv_alike(tmp_path):
    frame = acs_frame(60)
    frame.loc[[4, 7], "OCCP"] = np.nan
    frame.loc[5, "PINCP"] = np.nan
    frame.to_csv(tmp_path / "acs.csv", index=False)
    frame.to_parquet(tmp_path / "acs.pq")
    write_arff(frame, tmp_path / "acs.arff")
    (tmp_path / "acs.arff.gz").write_bytes(gzip.compress((tmp_path / "acs.arff").read_bytes()))
    pd.testing.assert_frame_equal(read_arff(tmp_path / "acs.arff"), frame)
    first, *others = (acs_income.load(tmp_path / f"acs.{ending}") for ending in ("csv", "pq", "arff", "arff.gz"))
    assert np.isnan(np.concatenate([getattr(first, name)["labels"]["PINCP"] for name in first.rows])).sum() == 1
    for other in others:
        assert other.encoder == first.encoder
        np.testing.assert_array_equal(other.train["categorical"], first.train["categorical"])
        np.testing.assert_array_equal(other.test["labels"]["PINCP"], first.test["labels"]["PINCP"])


def test_acs_income_subset_is_random(tmp_path):
    frame = acs_frame().sort_values("ST")
    frame.to_csv(tmp_path / "acs.csv", index=False)
    data = acs_income.load(tmp_path / "acs.csv", rows=100)
    assert rows_of(data) == 100 and data.cardinalities[acs_income.INPUTS.index("ST")] > 8
    assert rows_of(acs_income.load(tmp_path / "acs.csv", rows=10**7)) == 400


def test_arff_errors(tmp_path):
    (tmp_path / "a.arff").write_text("AGEP,COW\n1,2\n")
    with pytest.raises(ValueError, match="has no line @data"):
        read_arff(tmp_path / "a.arff")
    (tmp_path / "b.arff").write_text("@attribute a real\n@attribute b real\n@data\n{0 1, 1 2}\n")
    with pytest.raises(ValueError, match="sparse rows"):
        read_arff(tmp_path / "b.arff")
    (tmp_path / "c.arff").write_text("@attribute a real\n@data\n1,2\n3,4\n")
    with pytest.raises(ValueError, match="declares 1 attributes, but its rows have 2 values"):
        read_arff(tmp_path / "c.arff")
    with pytest.raises(FileNotFoundError, match="43137"):
        acs_income.load(tmp_path / "none.arff")
    acs_frame(50).drop(columns="ST").to_csv(tmp_path / "d.csv", index=False)
    with pytest.raises(ValueError, match=r"no column 'ST' \(of OpenML data set 43137\)"):
        acs_income.load(tmp_path / "d.csv")


def test_stratified_split_keeps_shares():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.choice(["x", "y"], 1000, p=[0.97, 0.03]), "b": rng.integers(0, 2, 1000)})
    split = StratifiedSplit(("a", "b"), validation=0.2, test=0.1)
    assigned = split.assign(frame)
    for _, index in frame.groupby(["a", "b"]).indices.items():
        counts = np.bincount(assigned[index], minlength=3)
        np.testing.assert_allclose(counts, np.array([0.7, 0.2, 0.1]) * len(index), atol=1)
    np.testing.assert_array_equal(assigned, split.assign(frame))
    assert (StratifiedSplit(("a", "b"), 0.2, 0.1, seed=1).assign(frame) != assigned).any()
    # Within a stratum the choice is random, not the order of the file.
    assert not np.all(np.diff(np.flatnonzero(assigned == 2)) < 30)
    with pytest.raises(ValueError, match=r"validation \+ test < 1, got 0.6 and 0.5"):
        StratifiedSplit(("a",), 0.6, 0.5)
