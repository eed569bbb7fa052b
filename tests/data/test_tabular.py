"""Tables: what is fitted on which rows, how gaps and strangers are coded, and what every error says."""

import datetime
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.data import frames
from mtjax.data.encoders import NumericColumn, TabularEncoder, TargetColumn
from mtjax.data.splits import SPLITS, GivenSplit, OrderedSplit, RandomSplit
from mtjax.data.tabular import TabularDataset
from mtjax.tasks import Task

N = 40
GIVEN = np.array(["train"] * 24 + ["validation"] * 8 + ["test"] * 8)
KINDS = {"price": "regression", "sold": "binary", "style": "multiclass", "visits": "count"}


def houses(seed: int = 0) -> pd.DataFrame:
    """A table with every kind of input and target; every class and category is in the training rows."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "area": rng.normal(100.0, 20.0, N),
            "rooms": rng.integers(1, 6, N),
            "city": np.array(["Rome", "Oslo", "Bonn"])[np.arange(N) % 3],
            "garden": rng.random(N) < 0.5,
            "price": rng.normal(300.0, 50.0, N),
            "sold": np.array(["no", "yes"])[np.arange(N) % 2],
            "style": np.array(["old", "new", "mid"])[np.arange(N) % 3],
            "visits": rng.poisson(3.0, N),
        }
    )
    frame.loc[[1, 5, 30], "area"] = np.nan
    return frame


def build(frame: pd.DataFrame, tasks=None, **options) -> TabularDataset:
    return TabularDataset.from_frame(
        frame, KINDS if tasks is None else tasks, **{"split": GivenSplit(GIVEN), **options}
    )


def fails(message: str, frame: pd.DataFrame, tasks=None, **options) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(frame, tasks, **options)


def assert_same_batch(a, b) -> None:
    assert a.keys() == b.keys()
    for key in a.keys() - {"labels"}:
        np.testing.assert_array_equal(a[key], b[key])
    for name in a.get("labels", {}):
        np.testing.assert_array_equal(a["labels"][name], b["labels"][name])


def test_shapes_and_types():
    data = build(houses())
    assert data.feature_names == ("city", "garden", "area", "rooms", "area (missing)")
    assert data.cardinalities == (4, 3) and data.num_numeric == 3
    for name, rows in zip(SPLITS, (24, 8, 8), strict=True):
        batch = getattr(data, name)
        assert batch["categorical"].shape == (rows, 2) and batch["categorical"].dtype == np.int32
        assert batch["numeric"].shape == (rows, 3) and batch["numeric"].dtype == np.float32
        assert list(batch["labels"]) == list(KINDS)
        assert all(label.shape == (rows,) and label.dtype == np.float32 for label in batch["labels"].values())
        np.testing.assert_array_equal(data.rows[name], np.flatnonzero(name == GIVEN))


def test_values_against_pandas():
    frame, data = houses(), build(houses())
    train = frame[:24]
    area = ((frame["area"] - train["area"].mean()) / train["area"].std(ddof=0)).fillna(0.0)
    np.testing.assert_allclose(data.test["numeric"][:, 0], area[32:], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(data.train["numeric"][:, 2], frame["area"].isna()[:24])
    # Sorted categories: Bonn 1, Oslo 2, Rome 3.
    expected = frame["city"].map({"Bonn": 1, "Oslo": 2, "Rome": 3})
    np.testing.assert_array_equal(data.validation["categorical"][:, 0], expected[24:32])
    np.testing.assert_array_equal(data.train["labels"]["sold"], (frame["sold"] == "yes")[:24])
    np.testing.assert_array_equal(
        data.train["labels"]["style"], frame["style"].map({"mid": 0, "new": 1, "old": 2})[:24]
    )
    price = next(task for task in data.tasks if task.name == "price")
    assert price.offset == pytest.approx(train["price"].mean(), rel=1e-6)
    assert price.scale == pytest.approx(train["price"].std(ddof=0), rel=1e-6)


def test_other_rows_do_not_change_what_training_sees():
    frame, changed = houses(), houses()
    later = changed.index[24:]
    changed.loc[later, "area"] = 1e6 * np.arange(16)
    changed.loc[later, "price"] = -1.0
    changed.loc[later, "city"] = "Lima"
    a, b = build(frame), build(changed)
    assert_same_batch(a.train, b.train)
    assert a.tasks == b.tasks and a.encoder == b.encoder
    assert (b.test["categorical"][:, 0] == 0).all()
    assert any("Column 'city': 16 of 16" in note for note in b.notes)


def test_caller_frame_is_not_changed():
    frame = houses()
    build(frame)
    pd.testing.assert_frame_equal(frame, houses())


def test_unknown_and_missing_categories_are_code_0():
    encoder = build(houses()).encoder
    new = houses()[["area", "rooms", "city", "garden"]][:3].astype({"city": object})
    new["city"] = ["Lima", None, "Oslo"]
    assert encoder.encode(new)["categorical"][:, 0].tolist() == [0, 0, 2]


def test_rare_categories_share_code_0():
    frame = houses()
    frame.loc[0, "city"] = "Pisa"
    data = build(frame, min_count=2)
    assert data.encoder.categorical[0].categories == ("Bonn", "Oslo", "Rome")
    assert data.train["categorical"][0, 0] == 0


def test_missing_only_later_has_no_indicator_but_a_note():
    frame = houses()
    frame["area"] = np.arange(N, dtype=float)
    frame.loc[39, "area"] = np.nan
    data = build(frame)
    assert "area (missing)" not in data.feature_names
    assert data.test["numeric"][-1, 0] == 0.0
    assert any("'area' is complete in training but missing in 1" in note for note in data.notes)


def test_columns_missing_together_share_an_indicator():
    frame = houses()
    frame["volume"] = frame["area"] * 3.0 + frame["rooms"]
    frame["depth"] = np.where(np.arange(N) == 2, np.nan, np.arange(N))
    data = build(frame)
    assert [name for name in data.feature_names if "missing" in name] == ["area (missing)", "depth (missing)"]
    assert any("'area', 'volume' are missing together" in note for note in data.notes)


def test_constant_columns_are_dropped_with_a_note():
    frame = houses()
    frame["country"], frame["floors"], frame["empty"] = "Italy", 2, np.nan
    frame.loc[35, "floors"] = 3  # constant where it counts, in training
    frame["lift"] = np.where(np.arange(N) % 2, 1.0, np.nan)
    data = build(frame)
    assert not {"country", "floors", "empty", "lift"} & set(data.feature_names)
    assert "lift (missing)" in data.feature_names
    for name in ("country", "floors", "empty", "lift"):
        assert any(f"'{name}'" in note for note in data.notes), name
    position = data.encoder.numeric_names.index("lift (missing)")
    np.testing.assert_array_equal(data.train["numeric"][:, position], frame["lift"].isna()[:24])


def test_identifiers_are_mentioned():
    frame = pd.concat([houses()] * 4, ignore_index=True)
    frame["id"] = np.arange(len(frame))
    data = build(frame, split=RandomSplit())
    assert any("'id'" in note and "identifier" in note for note in data.notes)


def test_partial_labels_are_normal():
    frame = houses()
    frame.loc[::2, "price"] = np.nan
    frame.loc[3:20, "sold"] = None
    frame.loc[32:, "sold"] = None
    data = build(frame)
    assert np.isnan(data.train["labels"]["price"][::2]).all()
    assert np.isnan(data.train["labels"]["sold"]).sum() == 18
    assert any("Task 'sold' has no label in the rows for 'test'" in note for note in data.notes)
    assert data.tasks[0].offset == pytest.approx(frame["price"][1:24:2].mean(), rel=1e-6)
    assert "no label" in data.summary()


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["no", "yes"], ("no", "yes")),
        ([True, False], ("False", "True")),
        ([1.0, 0.0], ("0", "1")),
        ([1, -1], ("-1", "1")),
        ([10, 9], ("9", "10")),
        (["dog", "cat"], ("cat", "dog")),
    ],
)
def test_binary_targets_of_any_type(values, classes):
    frame = houses()
    frame["sold"] = [values[i % 2] for i in range(N)]
    data = build(frame, {"sold": "binary"})
    assert data.encoder.targets[0].classes == classes
    positive = frames.text_of(values[0]) == classes[1]
    np.testing.assert_array_equal(data.train["labels"]["sold"], (np.arange(24) % 2 == 0) == positive)


def test_declared_classes_set_the_order_and_admit_unseen_ones():
    frame = houses()
    data = build(frame, {"sold": "binary"}, classes={"sold": ["yes", "no"]})
    np.testing.assert_array_equal(data.train["labels"]["sold"], (frame["sold"] == "no")[:24])
    task = Task("style", "multiclass", num_classes=4)
    data = build(frame, [task], classes={"style": ["old", "mid", "new", "next"]})
    assert data.tasks[0].num_classes == 4
    assert any("no training row has class 'next'" in note for note in data.notes)


def test_class_indices_keep_their_number():
    frame = houses()
    frame["style"] = np.array([4, 1, 2])[np.arange(N) % 3]
    data = build(frame, [Task("style", "multiclass", num_classes=5)])
    np.testing.assert_array_equal(data.train["labels"]["style"], frame["style"][:24])
    assert build(frame, {"style": "multiclass"}).tasks[0].num_classes == 3


def test_task_and_column_may_differ_in_name():
    frame = houses()
    data = build(
        frame,
        {"cost": "regression", "log_cost": "regression"},
        target_columns=dict.fromkeys(["cost", "log_cost"], "price"),
    )
    np.testing.assert_array_equal(data.train["labels"]["cost"], frame["price"][:24].astype(np.float32))
    assert "price" not in data.feature_names


def test_explicit_columns():
    data = build(houses(), categorical=["rooms"], numeric=["garden"])
    assert data.feature_names == ("rooms", "garden")
    assert any("not used" in note and "'area', 'city'" in note for note in data.notes)
    data = build(houses(), categorical=["rooms"])
    assert data.feature_names == ("rooms", "area", "area (missing)")
    data = build(houses(), ignore=["city", "rooms"])
    assert data.feature_names == ("garden", "area", "area (missing)")


def test_weights():
    frame = houses()
    frame["w"] = np.arange(N) / 10
    data = build(frame, weight="w")
    assert "w" not in data.feature_names and data.train["weight"].dtype == np.float32
    np.testing.assert_allclose(data.test["weight"], frame["w"][32:])
    assert_same_batch(data.train, build(frame, weight=frame["w"].to_numpy(), ignore=["w"]).train)


@pytest.mark.parametrize("name", ["houses.csv", "houses.csv.gz", "houses.tsv", "houses.parquet"])
def test_files_equal_frames(tmp_path, name):
    frame, path = houses(), tmp_path / name
    if ".parquet" in name:
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in name else ",")
    split = RandomSplit(0.2, 0.2, seed=3)
    loaded, expected = TabularDataset.from_path(path, KINDS, split=split), build(frame, split=split)
    for part in SPLITS:
        assert_same_batch(getattr(loaded, part), getattr(expected, part))
    assert loaded.encoder == expected.encoder and loaded.tasks == expected.tasks


def test_json_round_trip():
    data = build(houses())
    text = data.encoder.to_json()
    encoder = TabularEncoder.from_json(text)
    assert encoder == data.encoder and encoder.to_json() == text
    assert_same_batch(encoder.encode(houses(1)), data.encoder.encode(houses(1)))
    for wrong in ("[]", '{"format": "other"}', text.replace('"version": 1', '"version": 99')):
        with pytest.raises(ValueError, match="Expected JSON with format"):
            TabularEncoder.from_json(wrong)


def test_new_rows_without_targets():
    encoder = build(houses()).encoder
    new = houses(1)
    assert "labels" not in encoder.encode(new.drop(columns=list(KINDS)))
    assert "labels" not in encoder.encode(new, labels=False)
    partial = encoder.encode(new.drop(columns=["price"]))["labels"]
    assert np.isnan(partial["price"]).all() and not np.isnan(partial["sold"]).any()
    empty = encoder.encode(new[:0])
    assert empty["categorical"].shape == (0, 2) and empty["numeric"].shape == (0, 3)


def test_encoding_does_not_depend_on_dtypes_of_new_rows():
    frame = houses()
    frame["rooms"] = frame["rooms"] + 10
    encoder = build(frame, categorical=["rooms", "city"], numeric=["area"]).encoder
    as_float, as_text = (
        frame.astype({"rooms": float}),
        frame.astype({"rooms": str, "city": "category", "area": "Float64"}),
    )
    expected = encoder.encode(frame, labels=False)
    assert_same_batch(encoder.encode(as_float, labels=False), expected)
    assert_same_batch(encoder.encode(as_text, labels=False), expected)
    assert_same_batch(encoder.encode({name: frame[name].tolist() for name in frame}, labels=False), expected)


def test_predictions_frame():
    data = build(houses())
    probabilities = np.full((8, 3), 0.25)
    probabilities[:, 1] = 0.5
    table = data.predictions_frame(
        {"visits": np.ones(8), "style": probabilities, "sold": np.full(8, 0.3), "price": np.arange(8.0)}
    )
    style = ["style", "style_probability_mid", "style_probability_new", "style_probability_old"]
    assert list(table) == ["price", "sold_probability_yes", *style, "visits"]
    assert (table["style"] == "new").all() and table.index.tolist() == list(range(32, 40))
    with pytest.raises(ValueError, match="predictions for 'prise', but the tasks are 'price'"):
        data.predictions_frame({"prise": np.ones(8)})
    with pytest.raises(ValueError, match=re.escape("must have shape [N, 3], got (8,)")):
        data.predictions_frame({"style": np.ones(8)})
    with pytest.raises(ValueError, match="one row count"):
        data.encoder.decode_predictions({"price": np.ones(8), "visits": np.ones(7)})


def test_summary():
    text = build(houses()).summary()
    assert "24 train / 8 validation / 8 test" in text and "P(yes)" in text and "50.00%" in text


def test_random_split():
    frame = pd.DataFrame({"x": np.arange(1000)})
    assigned = RandomSplit(0.2, 0.1, seed=1).assign(frame)
    assert np.bincount(assigned).tolist() == [700, 200, 100]
    np.testing.assert_array_equal(assigned, RandomSplit(0.2, 0.1, seed=1).assign(frame))
    assert (assigned != RandomSplit(0.2, 0.1, seed=2).assign(frame)).any()


@given(st.lists(st.integers(0, 30), min_size=20, max_size=60), st.floats(0.1, 0.4), st.floats(0.1, 0.4))
def test_ordered_split_is_monotone_and_keeps_ties_together(values, validation, test):
    frame = pd.DataFrame({"t": values})
    assigned = OrderedSplit("t", validation, test).assign(frame)
    order = np.argsort(values, kind="stable")
    assert (np.diff(assigned[order].astype(int)) >= 0).all()
    assert all(len(set(assigned[frame["t"] == value])) == 1 for value in set(values))
    # Ties can only move rows out of training and into the later splits.
    assert (assigned == 0).sum() <= round((1 - validation - test) * len(values))


def test_ordered_split_reads_dates():
    text = pd.DataFrame({"t": ["2013-02-10", "2013-01-09", "2013-11-01", "2013-03-01"]})
    expected = [0, 0, 2, 1]
    assert OrderedSplit("t", 0.25, 0.25).assign(text).tolist() == expected
    dates = text.assign(t=pd.to_datetime(text["t"]))
    assert OrderedSplit("t", 0.25, 0.25).assign(dates).tolist() == expected
    data = build(houses().assign(when=pd.date_range("2020-01-01", periods=N)), split=OrderedSplit("when", 0.2, 0.2))
    assert data.rows["test"].tolist() == list(range(32, 40)) and "when" not in data.feature_names


def test_given_split_by_column():
    data = build(houses().assign(part=GIVEN), split=GivenSplit("part"))
    assert "part" not in data.feature_names
    assert_same_batch(data.train, build(houses()).train)


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=2, max_size=40),
    st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=10),
)
@settings(max_examples=60, deadline=None)
def test_standardised_columns_are_finite_and_centered(train, later):
    values = np.array([np.nan if v is None else v for v in train + later])
    filler = np.arange(len(values), dtype=float)
    split = GivenSplit(["train"] * len(train) + ["validation"] + ["test"] * len(later))
    frame = pd.DataFrame({"x": np.append(values, 0.0), "filler": np.append(filler, 0.0), "y": np.append(filler, 0.0)})
    scale = np.nanstd(values[: len(train)]) if np.isfinite(values[: len(train)]).any() else 1.0
    if 0 < scale < 1e-30:  # then later rows may rightly be too far away for float32
        return
    data = TabularDataset.from_frame(frame, {"y": "regression"}, split=split)
    assert np.isfinite(data.train["numeric"]).all() and np.isfinite(data.test["numeric"]).all()
    if "x" in data.feature_names:
        present = ~np.isnan(values[: len(train)])
        z = data.train["numeric"][:, data.encoder.numeric_names.index("x")].astype(np.float64)
        assert abs(z[present].mean()) < 1e-4 and abs(z[present].std() - 1) < 1e-4
        assert (z[~present] == 0).all()


@given(st.lists(st.text(max_size=3), min_size=3, max_size=30), st.lists(st.text(max_size=3), max_size=10))
@settings(max_examples=60, deadline=None)
def test_codes_invert(train, new):
    from mtjax.data.fitting import fit_categorical

    column = fit_categorical(pd.Series(train, name="c", dtype=object), max_categories=100, min_count=1)
    assert (column is None) == (len(set(train)) == 1)
    if column is not None:
        codes = column.encode(pd.Series(train + new, dtype=object, name="c"))
        for text, code in zip(train + new, codes, strict=True):
            assert (column.categories[code - 1] == text) if code else (text not in train)


# Errors: each says which column or argument, what was expected, what came.


def test_targets_that_do_not_exist():
    fails("no column 'prize' (the target of task 'prize'); did you mean 'price'", houses(), {"prize": "regression"})
    fails("at least one task", houses(), [])
    twice = [Task("price", "regression"), Task("price", "regression")]
    fails("Task names must be unique", houses(), twice)
    fails("target_columns names 'cost'", houses(), target_columns={"cost": "price"})
    fails("has kind 'ordinal'; expected one of", houses(), {"price": "ordinal"})


def test_targets_that_are_inputs():
    fails("Column 'price' is the target of task 'price' and listed in numeric= too", houses(), numeric=["price"])
    fails(
        "Column 'area' is listed in categorical= and again in numeric=",
        houses(),
        categorical=["area"],
        numeric=["area"],
    )
    fails("Column 'area' is listed in numeric= and again in numeric=", houses(), numeric=["area", "area"])
    fails("no column 'aera' (listed in ignore=); did you mean 'area'", houses(), ignore=["aera"])


def test_class_labels_that_do_not_fit():
    frame = houses()
    frame["sold"] = np.array([0, 1, 7])[np.arange(N) % 3]
    message = "Task 'sold' is binary but its column 'sold' holds 3 values (0, 1, 7); use kind='multiclass'"
    fails(message, frame, {"sold": "binary"})
    frame["sold"] = "no"
    fails("Task 'sold' is binary but all its labelled rows hold 'no'", frame, {"sold": "binary"})
    frame = houses()
    frame.loc[35, "style"] = "gothic"
    fails("Task 'style' has class 'gothic' in its test rows but in no training row", frame)
    fails("'gothic', which is none of the classes", frame, classes={"style": ["old", "mid", "new"]})
    fails("num_classes=7 but its training rows hold 3 classes", houses(), [Task("style", "multiclass", num_classes=7)])
    fails("classes['sold'] must name 2 distinct classes", houses(), classes={"sold": ["no"]})
    fails("Task 'price' is regression, but classes= names", houses(), classes={"price": [1, 2]})
    fails("classes names 'prize'", houses(), classes={"prize": [1, 2]})
    fails("distinct values, more than max_categories=10", houses(), {"price": "multiclass"}, max_categories=10)


def test_number_labels_that_do_not_fit():
    frame = houses()
    frame.loc[:23, "price"] = np.nan
    fails("Task 'price' has no labelled training row (column 'price'", frame)
    for value, shown in ((-1, "-1"), (1.5, "1.5")):
        frame = houses().astype({"visits": float})
        frame.loc[33, "visits"] = value
        fails(f"Task 'visits' counts, so column 'visits' must hold integers >= 0, but row 33 holds {shown}", frame)
    frame = houses()
    frame.loc[7, "price"] = np.inf
    fails("Column 'price' has 1 infinite values or integers beyond float64 (the first in row 7)", frame)
    frame.loc[7, "price"] = 1e300
    fails("Column 'price' holds 1e+300 in row 7, too large for float32", frame)
    fails("Column 'city' must hold numbers, but row 0 holds 'Rome'", houses(), {"city": "regression"})
    frame.loc[7, "price"] = -2.0
    fails("log1p", frame, [Task("price", "regression", scaling="log1p")])


def test_inputs_that_cannot_be_encoded():
    frame = houses()
    frame.loc[3, "area"] = -np.inf
    fails("Column 'area' has 1 infinite values", frame)
    frame = houses().assign(big=pd.Series([10**400, *range(N - 1)], dtype=object))
    fails("Column 'big' has 1 infinite values or integers beyond float64 (the first in row 0)", frame)
    frame = houses().assign(big=np.where(np.arange(N) == 3, 1e308, -1e308))
    fails("Column 'big' ranges from -1e+308 to 1e+308", frame)
    fails("Column 'city' must hold numbers, but row 0 holds 'Rome'", houses(), numeric=["city"])
    frame = houses().assign(when=pd.date_range("2020-01-01", periods=N))
    fails("Column 'when' holds dates, expected numbers or categories; put it into ignore=", frame)
    frame = houses().assign(when=[datetime.date(2020, 1, 1)] * N)
    fails("Column 'when' holds dates", frame)
    fails("values, expected numbers", frame, numeric=["when"])
    frame = houses().assign(tags=[["a"]] * N)
    fails("Column 'tags' holds values that are no categories", frame)
    fails("No input column is left", houses(), ignore=["area", "rooms", "city", "garden"])


def test_text_with_100_000_values():
    rows = 130_000
    frame = pd.DataFrame({"comment": [f"text {i}" for i in range(rows)], "y": np.arange(rows) % 7})
    fails("Column 'comment' has 91000 distinct values in 91000 training rows, more than max_categories=1000; put it "
          "into ignore=", frame, {"y": "regression"}, split=RandomSplit())  # fmt: skip


def test_splits_that_do_not_fit():
    fails("The test split is empty (train 24, validation 16, test 0 of 40 rows)", houses(),
          split=GivenSplit(np.where(GIVEN == "test", "validation", GIVEN)))  # fmt: skip
    fails("GivenSplit takes 'train', 'validation' or 'test', but row 24 is 'dev'", houses(),
          split=GivenSplit(np.where(GIVEN == "validation", "dev", GIVEN)))  # fmt: skip
    fails(
        "GivenSplit needs one value per row (40), got an array of shape (3,)", houses(), split=GivenSplit(["train"] * 3)
    )
    fails("no column 'part' (the column of GivenSplit)", houses(), split=GivenSplit("part"))
    fails("no column 'time' (the order of OrderedSplit)", houses(), split=OrderedSplit("time"))
    fails("OrderedSplit needs a value in every row of 'area', 3 miss", houses(), split=OrderedSplit("area"))
    fails("ISO 8601 text such as 2013-07-27 in column 'city', got 'Rome'", houses(), split=OrderedSplit("city"))
    fails("The validation split is empty (train 1,", houses()[:1], split=RandomSplit())
    for bad in ({"validation": 0.0}, {"test": 0.9}, {"validation": -0.1}):
        with pytest.raises(ValueError, match="validation > 0, test > 0"):
            RandomSplit(**bad)


def test_weights_that_do_not_fit():
    frame = houses().assign(w=1.0)
    frame.loc[4, "w"] = -1.0
    fails("Weight column 'w' must hold finite numbers >= 0, but row 4 holds -1", frame, weight="w")
    frame.loc[4, "w"] = np.nan
    fails("row 4 holds nan", frame, weight="w")
    fails("weight= must hold one number per row (40), got shape (3,)", houses(), weight=[1, 2, 3])
    fails("weight= is 0 for every training row", houses(), weight=np.r_[np.zeros(24), np.ones(16)])
    fails("no column 'v' (the sample weight)", houses(), weight="v")


def test_column_names_that_do_not_fit(tmp_path):
    frame = houses()
    fails(
        "Column names must be unique, but 'area' is there more than once", pd.concat([frame, frame[["area"]]], axis=1)
    )
    fails("Column names must be strings, got 0", pd.DataFrame(np.zeros((3, 2))))
    with pytest.raises(ValueError, match="must be a DataFrame or a mapping of columns, got list"):
        TabularDataset.from_frame([1, 2], {"y": "binary"})
    (tmp_path / "twice.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(ValueError, match="'a' is there more than once"):
        TabularDataset.from_path(tmp_path / "twice.csv", {"a": "regression"})
    with pytest.raises(FileNotFoundError, match="No table at"):
        TabularDataset.from_path(tmp_path / "nowhere.csv", {"a": "regression"})
    (tmp_path / "table.xlsx").write_text("")
    with pytest.raises(ValueError, match=re.escape("expected a file that ends in .csv, .tsv, .parquet or .pq")):
        TabularDataset.from_path(tmp_path / "table.xlsx", {"a": "regression"})


def test_new_rows_that_do_not_fit():
    encoder, frame = build(houses()).encoder, houses()
    with pytest.raises(ValueError, match=re.escape("no column 'rooms' (an input that the encoder was fitted on)")):
        encoder.encode(frame.drop(columns="rooms").rename(columns={"sold": "x"}))
    frame = frame.astype({"area": object})
    frame.loc[2, "area"] = "large"
    with pytest.raises(ValueError, match="Column 'area' must hold numbers, but row 2 holds 'large'"):
        encoder.encode(frame)
    frame.loc[2, "area"] = 1e300
    with pytest.raises(ValueError, match="too far from the training values"):
        encoder.encode(frame)
    with pytest.raises(ValueError, match="'maybe', which is none of the classes 'no', 'yes' of task 'sold'"):
        encoder.encode(houses().assign(sold="maybe"))


def test_columns_are_plain_values():
    assert NumericColumn("a", 0.0, 1.0) == NumericColumn("a", 0.0, 1.0)
    assert hash(TargetColumn("a", "a", "binary", ("0", "1")))
