"""HIGGS as an eight-task table: signal or background, and the seven masses that physicists derive by hand.

Each row is a simulated collision: 21 measurements of the detector, seven invariant masses computed from them, and
whether a Higgs boson was produced. MultiTab asks for all of the last eight from the 21 measurements:

| task                                                     | kind       | published column            |
|----------------------------------------------------------|------------|-----------------------------|
| `label`                                                  | binary     | first (1 = signal, 53 %)    |
| `m_jj`, `m_jjj`, `m_lv`, `m_jlv`, `m_bb`, `m_wbb`, `m_wwbb` | regression | last seven, scaled by Task  |

The four b-tag columns take three values each and are categorical; the other 17 inputs are numeric.

Size: 11,000,000 rows; split at random 90 / 5 / 5 as in MultiTab (the original paper tests on the last 500,000 rows).
Sources: `HIGGS.csv.gz` from the UCI repository (28 numbers after the label, no header; all rows in about a minute), or
a directory prepared by tensorflow-datasets, which is read here without TensorFlow, example by example (about 0.2 ms
each, so some 40 minutes for all rows). UCI lists the data under CC BY 4.0; none of it is in this package.

Where the reference code (Armanfard-Lab/MultiTab) differs: its scaler and category encoder are fitted on all rows before
the split, and its regression targets stay in raw units. Here encoders and target scaling see training rows only.

References: Baldi, Sadowski, Whiteson, "Searching for Exotic Particles in High-Energy Physics with Deep Learning",
Nature Communications 5, 2014, arXiv:1402.4735; task definition of MultiTab, AAAI 2026, arXiv:2511.09970.
"""

import itertools
import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from mtjax.data.splits import RandomSplit, Split
from mtjax.data.tabular import TabularDataset
from mtjax.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

B_TAGS = tuple(f"jet_{i}_b-tag" for i in range(1, 5))
INPUTS = (
    "lepton_pT",
    "lepton_eta",
    "lepton_phi",
    "missing_energy_magnitude",
    "missing_energy_phi",
    *(f"jet_{i}_{quantity}" for i in range(1, 5) for quantity in ("pt", "eta", "phi", "b-tag")),
)
MASSES = ("m_jj", "m_jjj", "m_lv", "m_jlv", "m_bb", "m_wbb", "m_wwbb")
COLUMNS = ("label", *INPUTS, *MASSES)  # the order of HIGGS.csv
TASKS = (Task("label", "binary"), *(Task(name, "regression") for name in MASSES))


def load(
    path: str | os.PathLike | None = None,
    *,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    rows: int | None = None,
    split: Split = RandomSplit(validation=0.05, test=0.05),  # noqa: B008 (frozen)
) -> TabularDataset:
    """Loads HIGGS as a data set of eight tasks.

    Args:
      path: HIGGS.csv or HIGGS.csv.gz. None: the data set 'higgs' of tensorflow-datasets.
      data_dir: directory of prepared tensorflow-datasets; its own default if None.
      download: let tensorflow-datasets download (2.6 GB) and prepare what is not there. Off by default, because
        without a network connection its retries take minutes.
      rows: number of rows to take from the start (rows are independent draws, so any part is representative); all
        if None.
      split: which rows train, validate and test.

    Returns:
      The data set: 4 categorical and 17 numeric inputs, tasks `label`, `m_jj`, ..., `m_wwbb`.

    Raises:
      FileNotFoundError: if there is no such file, or no prepared data set.
      ValueError: if the file does not have the layout of HIGGS.csv, or the prepared data set cannot be read.
    """
    frame = _from_csv(pathlib.Path(path), rows) if path is not None else _from_tfds(data_dir, download, rows)
    numeric = [name for name in INPUTS if name not in B_TAGS]
    return TabularDataset.from_frame(
        frame, TASKS, categorical=B_TAGS, numeric=numeric, split=split, classes={"label": (0, 1)}
    )


def _from_csv(path: pathlib.Path, rows: int | None) -> "pd.DataFrame":
    """The table of a UCI file, f32[N] per column."""
    import pandas as pd

    if not path.is_file():
        raise FileNotFoundError(
            f"No file {path}; download HIGGS.csv.gz from https://archive.ics.uci.edu/dataset/280/higgs (it may stay "
            "compressed)"
        )
    first = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].tolist()
    try:
        [float(value) for value in first]
    except ValueError:
        raise ValueError(
            f"{path} starts with {first[:3]}; expected the numbers of HIGGS.csv, without a header"
        ) from None
    if len(first) != len(COLUMNS):
        raise ValueError(f"{path} has {len(first)} columns; HIGGS.csv has {len(COLUMNS)}: label, 21 inputs, 7 masses")
    # The published digits are those of float32 numbers, so that float32 loses nothing and halves the memory.
    return pd.read_csv(path, header=None, names=list(COLUMNS), dtype=np.float32, nrows=rows)


def _from_tfds(data_dir: str | os.PathLike | None, download: bool, rows: int | None) -> "pd.DataFrame":
    """The table of a prepared tensorflow-datasets directory, f32[N] per column."""
    import pandas as pd
    import tensorflow_datasets as tfds

    # Registers the builder: without this import tfds knows only the data sets that have a folder of their own.
    import tensorflow_datasets.structured

    directory = None if data_dir is None else os.fspath(data_dir)
    builder = tfds.builder("higgs", data_dir=directory)
    formats = builder.info.available_file_formats() if builder.is_prepared() else set()
    if formats and not formats & tfds.core.FileFormat.with_random_access():
        raise ValueError(
            f"{builder.data_dir} holds HIGGS as {', '.join(f.value for f in formats)}, which only TensorFlow reads; "
            "expected array_record or parquet: choose another data_dir and prepare it with download=True"
        )
    if not formats and not download:
        raise FileNotFoundError(
            f"HIGGS is not prepared in {builder.data_dir}. Pass path='HIGGS.csv.gz' with the file from "
            "https://archive.ics.uci.edu/dataset/280/higgs, or download=True to let tensorflow-datasets fetch and "
            "prepare it (2.6 GB)"
        )
    if not formats:
        builder = tfds.builder("higgs", data_dir=directory, file_format="array_record")
        builder.download_and_prepare()
    source = builder.as_data_source(split="train")
    names = ("class_label", *COLUMNS[1:])
    values = np.empty((len(source) if rows is None else min(rows, len(source)), len(names)), np.float32)
    for i, example in enumerate(itertools.islice(source, len(values))):
        values[i] = [example[name] for name in names]
    return pd.DataFrame(values, columns=list(COLUMNS))
