"""Reading the columns of a data frame: as text levels, as numbers, and with errors that name the column and the row.

Everything that touches pandas' many dtypes is here, so that the encoders see only two things: text levels with
positions (categories, classes) and `f64[N]` with NaN for missing (numbers). A category is known by its text: the
integer 3, the float 3.0 (what an integer column becomes when one value is missing) and the string "3" are one level,
which makes an encoder fitted on a Parquet file read the same table from CSV.

Letters: N rows.
"""

import difflib
import numbers as number_types
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def as_frame(frame: Any) -> "pd.DataFrame":
    """Returns `frame` (pandas, anything with `to_pandas()`, or a mapping of columns) as a checked pandas DataFrame.

    Raises:
      ValueError: if column names are duplicated or are not strings.
    """
    import pandas as pd

    if hasattr(frame, "to_pandas"):  # pyarrow and polars tables
        frame = frame.to_pandas()
    if not isinstance(frame, pd.DataFrame):
        if not isinstance(frame, Mapping):
            raise ValueError(f"frame must be a DataFrame or a mapping of columns, got {type(frame).__name__}")
        frame = pd.DataFrame(frame)
    check_names(frame.columns)
    return frame


def check_names(names: Iterable[Any]) -> None:
    """Raises a ValueError unless the column names are distinct strings."""
    names = list(names)
    other = [name for name in names if not isinstance(name, str)]
    if other:
        raise ValueError(f"Column names must be strings, got {other[0]!r}; rename: frame.columns = [...]")
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ValueError(f"Column names must be unique, but {listing(repeated)} is there more than once")


def read_table(path: Any) -> "pd.DataFrame":
    """Reads a .csv (also .csv.gz, .csv.zip, .tsv) or .parquet file.

    Raises:
      ValueError: for another ending or duplicated column names.
      FileNotFoundError: if there is no such file.
    """
    import pathlib

    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No table at {path}")
    endings = [ending.lower() for ending in path.suffixes]
    try:
        return _read(path, endings)
    except ValueError as error:  # pandas and pyarrow do not name the file
        raise ValueError(f"Cannot read {path}: {error}") from error


def _read(path: Any, endings: Sequence[str]) -> "pd.DataFrame":
    import pandas as pd

    if any(ending in (".parquet", ".pq") for ending in endings[-1:]):
        return as_frame(pd.read_parquet(path))
    if any(ending in (".csv", ".tsv") for ending in endings[-2:]):
        separator = "\t" if ".tsv" in endings[-2:] else ","
        # pandas would silently rename a repeated column "x" to "x.1".
        header = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str).iloc[0]
        check_names([f"(column {i})" if pd.isna(name) else name for i, name in enumerate(header)])
        return as_frame(pd.read_csv(path, sep=separator, low_memory=False))
    raise ValueError("expected a file that ends in .csv, .tsv, .parquet or .pq")


def listing(values: Sequence[Any], limit: int = 6) -> str:
    """The first values, quoted if they are text, for an error message.

    >>> listing(["a", "b", "c"], limit=2)
    "'a', 'b', ... (3 in all)"
    """
    shown = ", ".join(repr(value) if isinstance(value, str) else f"{value}" for value in values[:limit])
    return shown if len(values) <= limit else f"{shown}, ... ({len(values)} in all)"


def check_columns(frame: "pd.DataFrame", wanted: Sequence[str], role: str) -> None:
    """Raises a ValueError with near names if a wanted column is absent from the frame."""
    absent = [name for name in wanted if name not in frame.columns]
    if absent:
        near = difflib.get_close_matches(str(absent[0]), frame.columns, n=3, cutoff=0.5)
        hint = f"did you mean {listing(near)}?" if near else f"it has {listing(list(frame.columns))}"
        raise ValueError(f"The table has no column {listing(absent)} ({role}); {hint}")


def text_of(value: Any) -> str:
    """The text by which a category is known.

    >>> text_of(3), text_of(3.0), text_of("3"), text_of(True), text_of(2.5)
    ('3', '3', '3', 'True', '2.5')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, number_types.Real) and float(value).is_integer():
        return str(int(value))
    return repr(float(value)) if isinstance(value, float | np.floating) else str(value)


def sorted_texts(texts: Iterable[str]) -> list[str]:
    """Sorts by number if every text is a number, else alphabetically.

    >>> sorted_texts(["10", "9", "-1"]), sorted_texts(["yes", "no"])
    (['-1', '9', '10'], ['no', 'yes'])
    """
    texts = list(texts)
    try:
        return sorted(texts, key=lambda text: (float(text), text))
    except ValueError:
        return sorted(texts)


def levels(series: "pd.Series") -> tuple[list[str], np.ndarray]:
    """Distinct texts of a column, and the position of each row's text in that list (-1 = missing) i64[N]."""
    import pandas as pd

    try:
        codes, values = pd.factorize(series)
    except TypeError as error:
        raise ValueError(f"Column '{series.name}' holds values that are no categories: {error}") from error
    texts = [text_of(value) for value in values]
    distinct = list(dict.fromkeys(texts))
    position = {text: i for i, text in enumerate(distinct)}
    # 3 and "3" are two values for pandas and one level here; the last entry serves the code -1 of missing rows.
    lookup = np.array([position[text] for text in texts] + [-1], np.int64)
    return distinct, lookup[codes]


def kind_of(series: "pd.Series") -> str:
    """'categorical', 'numeric' or 'date', from the dtype (and for object columns from the values)."""
    import pandas as pd

    types = pd.api.types
    if types.is_bool_dtype(series.dtype) or isinstance(series.dtype, pd.CategoricalDtype):
        return "categorical"
    if types.is_numeric_dtype(series.dtype):
        return "numeric"
    inferred = types.infer_dtype(series, skipna=True)
    if inferred in ("integer", "floating", "mixed-integer-float", "decimal", "empty"):
        return "numeric"
    dates = ("datetime64", "datetime", "date", "timedelta64", "timedelta", "time", "period")
    return "date" if inferred in dates else "categorical"


def numbers(series: "pd.Series") -> np.ndarray:
    """A column as f64[N] with NaN for missing; text is parsed.

    Raises:
      ValueError: naming column, row (counted from 0) and value, for text that is no number, dates, complex numbers,
        infinite values and integers beyond float64.
    """
    import pandas as pd

    name = series.name
    if kind_of(series) == "date" or pd.api.types.is_complex_dtype(series.dtype):
        raise ValueError(f"Column '{name}' holds {series.dtype} values, expected numbers")
    if pd.api.types.is_numeric_dtype(series.dtype) and not isinstance(series.dtype, pd.CategoricalDtype):
        values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        values = np.array([_number(value) for value in series.astype(object)], np.float64)
        bad = np.flatnonzero(np.isnan(values) & series.notna().to_numpy())
        if bad.size:
            raise ValueError(f"Column '{name}' must hold numbers, but row {bad[0]} holds {series.iloc[bad[0]]!r}")
    infinite = np.flatnonzero(np.isinf(values))
    if infinite.size:
        raise ValueError(
            f"Column '{name}' has {infinite.size} infinite values or integers beyond float64 (the first in row "
            f"{infinite[0]}); replace them by numbers, or by NaN if they mean 'missing'"
        )
    return values


def _number(value: Any) -> float:
    """float(value), NaN if that is not possible, inf for integers that float64 cannot hold."""
    try:
        return float(value)
    except OverflowError:
        return float("inf")
    except (TypeError, ValueError):
        return float("nan")
