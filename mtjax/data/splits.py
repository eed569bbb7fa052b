"""Splits: which rows train, which select the model, which are kept for the final test.

A split is a value with one method, `assign(frame) -> i8[N]`, 0 = train, 1 = validation, 2 = test. `RandomSplit` fits
rows that are exchangeable; `OrderedSplit` is for data with a clock, where a random split would let the model see the
same day, storm or campaign in training and in test; `GivenSplit` takes what a benchmark prescribes.

Letters: N rows.

>>> import pandas as pd
>>> frame = pd.DataFrame({"day": [3, 1, 2, 2, 5, 4]})
>>> OrderedSplit("day", validation=0.2, test=0.2).assign(frame).tolist()
[0, 0, 0, 0, 2, 1]
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mtjax.data import frames

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "validation", "test")


class Split(Protocol):
    """Anything that assigns rows; `columns` are the columns it reads, which are then no inputs by default."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    def assign(self, frame: "pd.DataFrame") -> np.ndarray: ...


def _check_fractions(validation: float, test: float) -> None:
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(
            f"A split needs validation > 0, test > 0 and validation + test < 1, got {validation} and {test}"
        )


@dataclasses.dataclass(frozen=True)
class RandomSplit:
    """Rows at random.

    Attributes:
      validation: share of the rows for model selection.
      test: share of the rows for the final test; training gets the rest.
      seed: seed of the permutation.
    """

    validation: float = 0.15
    test: float = 0.15
    seed: int = 0

    def __post_init__(self):
        _check_fractions(self.validation, self.test)

    @property
    def columns(self) -> tuple[str, ...]:
        """No column is read."""
        return ()

    def assign(self, frame: "pd.DataFrame") -> np.ndarray:
        """Returns 0 (train), 1 (validation) or 2 (test) per row, i8[N]."""
        order = np.random.default_rng(self.seed).permutation(len(frame))
        num_validation, num_test = round(self.validation * len(frame)), round(self.test * len(frame))
        result = np.zeros(len(frame), np.int8)
        result[order[:num_validation]] = 1
        result[order[num_validation : num_validation + num_test]] = 2
        return result


@dataclasses.dataclass(frozen=True)
class OrderedSplit:
    """Train on the first rows in the order of a column (time), validate on the next, test on the last.

    Rows with the same value stay together, so that the shares are approximate where values repeat (all flights of a
    day). The column is no input of the model unless it is listed as one.

    Attributes:
      column: numbers, dates or ISO 8601 text, without missing values.
      validation: share of the rows for model selection.
      test: share of the rows for the final test; training gets the rest.
    """

    column: str
    validation: float = 0.15
    test: float = 0.15

    def __post_init__(self):
        _check_fractions(self.validation, self.test)

    @property
    def columns(self) -> tuple[str, ...]:
        """The ordering column."""
        return (self.column,)

    def assign(self, frame: "pd.DataFrame") -> np.ndarray:
        """Returns 0 (train), 1 (validation) or 2 (test) per row, i8[N]."""
        import pandas as pd

        frames.check_columns(frame, [self.column], "the order of OrderedSplit")
        series = frame[self.column]
        if series.isna().any():
            raise ValueError(f"OrderedSplit needs a value in every row of '{self.column}', {series.isna().sum()} miss")
        if frames.kind_of(series) == "categorical":
            try:
                series = pd.to_datetime(series, format="ISO8601", utc=True)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"OrderedSplit needs numbers, dates or ISO 8601 text such as 2013-07-27 in column "
                    f"'{self.column}', got {series.iloc[0]!r}"
                ) from error
        _, rank = np.unique(series.to_numpy(), return_inverse=True)
        ordered = np.sort(rank)
        first_test = ordered[min(round((1 - self.test) * len(rank)), len(rank) - 1)] if len(rank) else 0
        first_validation = ordered[round((1 - self.test - self.validation) * len(rank))] if len(rank) else 0
        return np.where(rank >= first_test, 2, np.where(rank >= first_validation, 1, 0)).astype(np.int8)


@dataclasses.dataclass(frozen=True, eq=False)
class GivenSplit:
    """Rows as prescribed.

    Attributes:
      values: the name of a column, or one value per row: 'train', 'validation' or 'test'.
    """

    values: str | Sequence[str]

    @property
    def columns(self) -> tuple[str, ...]:
        """The column that is read, if it is one."""
        return (self.values,) if isinstance(self.values, str) else ()

    def assign(self, frame: "pd.DataFrame") -> np.ndarray:
        """Returns 0 (train), 1 (validation) or 2 (test) per row, i8[N]."""
        values: Any = self.values
        if isinstance(values, str):
            frames.check_columns(frame, [values], "the column of GivenSplit")
            values = frame[values]
        values = np.asarray(values, object)
        if values.shape != (len(frame),):
            raise ValueError(f"GivenSplit needs one value per row ({len(frame)}), got an array of shape {values.shape}")
        result = np.full(len(frame), -1, np.int8)
        for code, name in enumerate(SPLITS):
            result[values == name] = code
        bad = np.flatnonzero(result < 0)
        if bad.size:
            raise ValueError(
                f"GivenSplit takes 'train', 'validation' or 'test', but row {bad[0]} is {values[bad[0]]!r}"
            )
        return result
