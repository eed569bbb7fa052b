"""ACS Income as a two-task table: income above 50,000 dollars, and marital status, from ten census answers.

| task    | kind              | label                                                                             |
|---------|-------------------|-----------------------------------------------------------------------------------|
| `PINCP` | binary            | personal income of the year above `threshold` = 50,000 dollars                    |
| `MAR`   | multiclass, C = 5 | 1 married, 2 widowed, 3 divorced, 4 separated, 5 never married (in this order)    |

Inputs, all categorical as in MultiTab (also age and working hours, which have under 100 values each): age AGEP, class
of worker COW, schooling SCHL, occupation OCCP (some 530 codes), place of birth POBP, relation in the household RELP,
hours a week WKHP, sex SEX, race RAC1P, state ST.

Size: 1,664,500 rows (adults of the American Community Survey 2018 with at least one working hour a week and 100 dollars
a year); split 70 / 15 / 15 within each combination of the two labels, so that rare classes keep their share. Source:
the file of OpenML data set 43137 as ARFF, CSV or Parquet, downloaded by you. It holds public-use microdata of the US
Census Bureau, whose terms forbid any attempt to identify a person; none of it is in this package.

Where the reference code (Armanfard-Lab/MultiTab) differs: its category codes are fitted on all rows before the split.
Here they come from the training rows, and code 0 is kept for what training never showed.

References: Ding, Hardt, Miller, Schmidt, "Retiring Adult: New Datasets for Fair Machine Learning", NeurIPS 2021,
arXiv:2108.04884; task definition of MultiTab, AAAI 2026, arXiv:2511.09970.
"""

import dataclasses
import os
import pathlib
import re
from typing import IO, TYPE_CHECKING

import numpy as np

from mtjax.data import frames
from mtjax.data.splits import Split
from mtjax.data.tabular import TabularDataset
from mtjax.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

INPUTS = ("AGEP", "COW", "SCHL", "OCCP", "POBP", "RELP", "WKHP", "SEX", "RAC1P", "ST")
TASKS = (Task("PINCP", "binary"), Task("MAR", "multiclass", num_classes=5))
_ATTRIBUTE = re.compile(r"""@attribute\s+(?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<bare>\S+))""", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class StratifiedSplit:
    """Random rows, with the same shares of every combination of values of some columns.

    Attributes:
      strata: the columns; rows with equal values in all of them form one stratum.
      validation: share of each stratum for model selection.
      test: share of each stratum for the final test; training gets the rest.
      seed: seed of the permutation.

    >>> import pandas as pd
    >>> split = StratifiedSplit(("sex",), validation=0.25, test=0.25)
    >>> assigned = split.assign(pd.DataFrame({"sex": [1, 2] * 4}))
    >>> [sorted(assigned[i::2].tolist()) for i in (0, 1)]
    [[0, 0, 1, 2], [0, 0, 1, 2]]
    """

    strata: tuple[str, ...]
    validation: float = 0.15
    test: float = 0.15
    seed: int = 0

    def __post_init__(self):
        if not (0 < self.validation < 1 and 0 < self.test < 1 and self.validation + self.test < 1):
            raise ValueError(
                "A split needs validation > 0, test > 0 and validation + test < 1, got "
                f"{self.validation} and {self.test}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return self.strata

    def assign(self, frame: "pd.DataFrame") -> np.ndarray:
        """Returns 0 (train), 1 (validation) or 2 (test) per row, i8[N]."""
        frames.check_columns(frame, self.strata, "a stratum of StratifiedSplit")
        stratum = frame.groupby(list(self.strata), dropna=False).ngroup().to_numpy()
        # Rows in random order, grouped by stratum: a row's place in its group decides its split.
        order = np.random.default_rng(self.seed).permutation(len(frame))
        order = order[np.argsort(stratum[order], kind="stable")]
        sizes = np.bincount(stratum)
        place = np.arange(len(frame)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        size = np.repeat(sizes, sizes)
        num_test, num_validation = np.round(self.test * size), np.round(self.validation * size)
        result = np.empty(len(frame), np.int8)
        result[order] = np.where(place < num_test, 2, np.where(place < num_test + num_validation, 1, 0))
        return result


def load(
    path: str | os.PathLike,
    *,
    rows: int | None = None,
    threshold: float = 50_000.0,
    split: Split = StratifiedSplit(("PINCP", "MAR")),
    seed: int = 0,
) -> TabularDataset:
    """Loads ACS Income as a data set of two tasks.

    Args:
      path: OpenML's file of data set 43137: .arff (also .arff.gz), .csv, .tsv or .parquet.
      rows: number of rows to draw at random (the file is sorted by state, so its first rows would not do); all if
        None.
      threshold: income in dollars above which `PINCP` is 1.
      split: which rows train, validate and test; it sees `PINCP` as 0 or 1.
      seed: of the draw of `rows`.

    Returns:
      The data set: 10 categorical inputs, tasks `PINCP` and `MAR`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file lacks a column, or is no table.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}; download data set 43137 (ACSIncome) from https://www.openml.org")
    is_arff = ".arff" in [ending.lower() for ending in path.suffixes[-2:]]
    frame = read_arff(path) if is_arff else frames.read_table(path)
    frames.check_columns(frame, ["PINCP", "MAR", *INPUTS], "of OpenML data set 43137")
    frame = frame[["PINCP", "MAR", *INPUTS]]
    if rows is not None and rows < len(frame):
        kept = np.random.default_rng(seed).choice(len(frame), rows, replace=False)
        frame = frame.iloc[np.sort(kept)].reset_index(drop=True)
    income = frames.numbers(frame["PINCP"])
    frame = frame.assign(PINCP=np.where(np.isnan(income), np.nan, income > threshold))
    return TabularDataset.from_frame(
        frame, TASKS, categorical=INPUTS, numeric=(), split=split, classes={"PINCP": (0, 1), "MAR": range(1, 6)}
    )


def read_arff(path: str | os.PathLike) -> "pd.DataFrame":
    """Reads a dense ARFF file (Weka's format, used by OpenML): attribute names from the header, then CSV; ? = missing.

    Raises:
      ValueError: if there is no @data line, or the rows are sparse.
    """
    import pandas as pd

    with _open_text(path) as file:
        names = []
        for line in file:
            text = line.strip()
            if text.lower().startswith("@data"):
                break
            match = _ATTRIBUTE.match(text)
            if match:
                names.append(next(group for group in match.groups() if group is not None))
        else:
            raise ValueError(f"{path} has no line @data; expected an ARFF file")
        # The parser goes on where the header ended: blank lines and comments are skipped as ARFF asks.
        frame = pd.read_csv(
            file, header=None, na_values="?", comment="%", quotechar="'", skipinitialspace=True, low_memory=False
        )
    if frame.iloc[:1, 0].astype(str).str.startswith("{").any():
        raise ValueError(f"{path} holds sparse rows {{index value, ...}}; expected a dense ARFF file")
    if frame.shape[1] != len(names):
        raise ValueError(f"{path} declares {len(names)} attributes, but its rows have {frame.shape[1]} values")
    frame.columns = names
    return frames.as_frame(frame)


def _open_text(path: str | os.PathLike) -> IO[str]:
    import gzip

    return (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8")
