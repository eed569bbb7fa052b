"""AliExpress-NL: which products shown by a search are clicked, and which of those are bought, from 75 logged features.

| task         | kind   | positive rate (NL) | label                                        |
|--------------|--------|--------------------|----------------------------------------------|
| `click`      | binary | 2.0 %              | the product was clicked                      |
| `conversion` | binary | 0.073 %            | it was clicked and bought: never without one |

Layout of `train.csv` and `test.csv` (the preprocessing of MTReclib, which MultiTab uses as well): `search_id`,
`categorical_1` ... `categorical_16`, `numerical_1` ... `numerical_63`, `click`, `conversion`. The search id is no
input; columns that are constant in the training rows are dropped, for NL `categorical_1` and `numerical_58` to `60`,
which leaves 15 categorical and 60 numeric inputs. Files of the other countries (ES, FR, US) have the same layout.

Size (NL): 12,157,894 training and 5,559,301 later test rows. The files are read in chunks, twice for training (fit,
then encode; a few minutes in all), so that memory holds the encoded arrays (5.4 GB, for a moment twice the training
part) and one chunk. The logs come from https://tianchi.aliyun.com/dataset/74690 under the terms stated there; MTReclib
links the processed files. None of them is in this package.

Validation rows are taken from the training file. User and query features are equal for all products of one search, so
whole searches are drawn: a search goes to validation if a hash of its id falls below the share asked for, which does
not depend on how many rows are read. A list of row positions, as the reference code uses, is accepted instead.

Where the reference code (Armanfard-Lab/MultiTab) differs: it fits a *second* category encoder on the test file, so that
one category may have two codes; here codes come from the training rows and code 0 means a category never seen there. It
draws validation rows regardless of searches, leaves numeric columns unscaled, and configures positive weights (48.6 and
1364) that its loss never uses.

Letters: N rows, F features.

References: Li, Li, Liu, et al., "Improving Multi-Scenario Learning to Rank in E-commerce by Exploiting Task
Relationships in the Label Space", CIKM 2020 (the data); easezyc/Multitask-Recommendation-Library (the layout).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtjax.data import frames
from mtjax.data.encoders import Batch, CategoricalColumn, NumericColumn, TabularEncoder, TargetColumn
from mtjax.data.tabular import TabularDataset
from mtjax.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

CATEGORICAL = tuple(f"categorical_{i}" for i in range(1, 17))
NUMERIC = tuple(f"numerical_{i}" for i in range(1, 64))
COLUMNS = ("search_id", *CATEGORICAL, *NUMERIC, "click", "conversion")
TASKS = (Task("click", "binary"), Task("conversion", "binary"))


def load(
    directory: str | os.PathLike,
    *,
    rows: int | None = None,
    validation: float | str | os.PathLike | Sequence[int] = 0.2,
    seed: int = 0,
    chunk_rows: int = 500_000,
) -> TabularDataset:
    """Loads an AliExpress country as a data set of two tasks.

    Args:
      directory: holds `train.csv` and `test.csv` (each may be compressed: .csv.gz).
      rows: number of rows to take from the start of each file; all if None.
      validation: share of the searches of the training file to validate on (0.2 is MultiTab's), or the positions of
        validation rows in the training file: a sequence, or a .json or .npy file of one.
      seed: of the draw of searches.
      chunk_rows: rows in memory at once while reading.

    Returns:
      The data set. `rows["train"]` and `rows["validation"]` are positions in the training file, `rows["test"]` in
      the test file.

    Raises:
      FileNotFoundError: if a file is absent.
      ValueError: if a file has another layout, a value is missing, or a split is empty.
    """
    train_path, test_path = (_find(pathlib.Path(directory), name) for name in ("train", "test"))
    held_out = _HeldOut.of(validation, seed)
    fit = _Fit()
    file_rows = 0
    for first, chunk in _chunks(train_path, rows, chunk_rows):
        fit.add(chunk[~held_out.mask(chunk["search_id"].to_numpy(), first)])
        file_rows = first + len(chunk)
    if rows is None:
        held_out.check(file_rows)
    if fit.rows == 0:
        raise ValueError(f"The train split is empty: all {file_rows} rows of {train_path} are validation rows")
    encoder, notes = fit.encoder()

    parts: dict[str, list[tuple[np.ndarray, Batch]]] = {"train": [], "validation": [], "test": []}
    for first, chunk in _chunks(train_path, rows, chunk_rows):
        mask = held_out.mask(chunk["search_id"].to_numpy(), first)
        for name, kept in (("train", ~mask), ("validation", mask)):
            parts[name].append((first + np.flatnonzero(kept), encoder.encode(chunk[kept])))
    for first, chunk in _chunks(test_path, rows, chunk_rows):
        parts["test"].append((np.arange(first, first + len(chunk)), encoder.encode(chunk)))
    positions = {name: np.concatenate([index for index, _ in part]) for name, part in parts.items()}
    batches = {name: _joined([batch for _, batch in part]) for name, part in parts.items()}
    for name, index in positions.items():
        if index.size == 0:
            raise ValueError(f"The {name} split is empty; read more rows, or change validation=")
    for task in TASKS:
        for name, batch in batches.items():
            if not batch["labels"][task.name].any():
                notes.append(f"Task '{task.name}' has no positive row in {name}.")
    return TabularDataset(encoder, TASKS, **batches, rows=positions, notes=notes)


def _find(directory: pathlib.Path, name: str) -> pathlib.Path:
    for ending in (".csv", ".csv.gz"):
        if (directory / f"{name}{ending}").is_file():
            return directory / f"{name}{ending}"
    raise FileNotFoundError(
        f"No {name}.csv in {directory}; expected the AliExpress files as processed by MTReclib "
        "(https://github.com/easezyc/Multitask-Recommendation-Library, section Datasets)"
    )


def _chunks(path: pathlib.Path, rows: int | None, chunk_rows: int) -> Iterator[tuple[int, "pd.DataFrame"]]:
    """Yields (position of the first row, chunk), after checking the header."""
    import pandas as pd

    header = pd.read_csv(path, nrows=0).columns.tolist()
    if header != list(COLUMNS):
        strange = next((i for i, (a, b) in enumerate(zip(header, COLUMNS, strict=False)) if a != b), None)
        where = f"column {strange} is '{header[strange]}', expected '{COLUMNS[strange]}'" if strange is not None else ""
        raise ValueError(f"{path} has {len(header)} columns, expected {len(COLUMNS)}{'; ' if where else ''}{where}")
    types = {"search_id": np.int64, **dict.fromkeys(NUMERIC, np.float32)}
    first = 0
    with pd.read_csv(path, dtype=types, nrows=rows, chunksize=chunk_rows) as reader:
        for chunk in reader:
            lacking = [name for name in chunk.columns if chunk[name].isna().any()]
            if lacking:
                raise ValueError(
                    f"{path} has no value for '{lacking[0]}' in some of the rows {first} to {first + len(chunk) - 1}; "
                    "the published file is complete, so this one may be damaged"
                )
            yield first, chunk
            first += len(chunk)


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """Which rows of the training file validate: given positions (sorted), or a share of the searches."""

    positions: np.ndarray | None
    share: float
    seed: int

    @classmethod
    def of(cls, validation: float | str | os.PathLike | Sequence[int], seed: int) -> "_HeldOut":
        if isinstance(validation, int | float):
            if not 0 < validation < 1:
                raise ValueError(f"validation must be a share between 0 and 1, or row positions; got {validation}")
            return cls(None, float(validation), seed)
        if isinstance(validation, str | os.PathLike):
            path = pathlib.Path(validation)
            if path.suffix not in (".json", ".npy"):
                raise ValueError(f"validation='{path}' must be a .json or .npy file of row positions")
            validation = json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)
        positions = np.asarray(validation)
        if positions.ndim != 1 or positions.dtype.kind not in "iu" or (positions < 0).any():
            raise ValueError(
                "validation must hold row positions >= 0 in one dimension, got an array of "
                f"{positions.dtype} with shape {positions.shape}"
            )
        return cls(np.unique(positions), 0.0, seed)

    def mask(self, search_id: np.ndarray, first: int) -> np.ndarray:
        """True for validation rows, bool[N], of the chunk that begins at row `first`."""
        if self.positions is None:
            return _uniform(search_id, self.seed) < self.share
        mask = np.zeros(len(search_id), bool)
        begin, end = np.searchsorted(self.positions, (first, first + len(search_id)))
        mask[self.positions[begin:end] - first] = True
        return mask

    def check(self, file_rows: int) -> None:
        """Raises a ValueError if a position lies behind the end of the file."""
        if self.positions is not None and self.positions.size and self.positions[-1] >= file_rows:
            raise ValueError(
                f"validation names row {self.positions[-1]}, but the training file has {file_rows} rows: positions of "
                "another file?"
            )


def _uniform(ids: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) per id, f64[N], by the SplitMix64 hash: the same id gets the same number in every chunk."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * 2.0**-53


class _Fit:
    """Categories, means and variances of the training rows, accumulated chunk by chunk (Chan's update, in float64)."""

    def __init__(self):
        self.rows = 0
        self.categories: dict[str, set[str]] = {name: set() for name in CATEGORICAL}
        self.mean = np.zeros(len(NUMERIC))
        self.squares = np.zeros(len(NUMERIC))  # sum of squared deviations from the mean
        self.low = np.full(len(NUMERIC), np.inf)
        self.high = np.full(len(NUMERIC), -np.inf)

    def add(self, chunk: "pd.DataFrame") -> None:
        """Takes in the training rows of a chunk."""
        n = len(chunk)
        if n == 0:
            return
        for name, known in self.categories.items():
            known.update(frames.levels(chunk[name])[0])
        values = chunk[list(NUMERIC)].to_numpy(np.float64)
        mean = values.mean(0)
        delta, total = mean - self.mean, self.rows + n
        self.squares += np.square(values - mean[None, :]).sum(0) + np.square(delta) * self.rows * n / total
        self.mean += delta * n / total
        self.low, self.high = np.minimum(self.low, values.min(0)), np.maximum(self.high, values.max(0))
        self.rows = total

    def encoder(self) -> tuple[TabularEncoder, list[str]]:
        """The encoder, and a note on the columns that are constant."""
        varies = self.high > self.low
        constant = [name for name, known in self.categories.items() if len(known) < 2]
        constant += [name for name, kept in zip(NUMERIC, varies, strict=True) if not kept]
        scale = np.sqrt(self.squares / max(self.rows, 1))
        encoder = TabularEncoder(
            categorical=tuple(
                CategoricalColumn(name, tuple(frames.sorted_texts(known)))
                for name, known in self.categories.items()
                if len(known) >= 2
            ),
            numeric=tuple(
                NumericColumn(name, float(self.mean[i]), float(scale[i])) for i, name in enumerate(NUMERIC) if varies[i]
            ),
            targets=tuple(TargetColumn(task.name, task.name, task.kind, ("0", "1")) for task in TASKS),
        )
        dropped = frames.listing(constant, limit=10)
        return encoder, [f"Columns that are constant in the training rows are dropped: {dropped}."] if constant else []


def _joined(parts: list[Batch]) -> Batch:
    """Batches one after the other; each part gives its arrays up as they are copied, to bound memory."""
    labels = [part.pop("labels") for part in parts]
    joined: Batch = {key: np.concatenate([part.pop(key) for part in parts]) for key in ("categorical", "numeric")}
    joined["labels"] = {task.name: np.concatenate([label[task.name] for label in labels]) for task in TASKS}
    return joined
