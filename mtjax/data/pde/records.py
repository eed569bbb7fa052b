"""Data sets of operator learning as tensorflow-datasets builders, written and read without TensorFlow.

A builder gives a data set a name, a version, documented features and random access to single functions by any reader of
tensorflow-datasets, among them `grain`:

    builder = records.write("fisher", fisher.generate(...), folder="~/tensorflow_datasets")
    source = builder.as_data_source("train")       # source[3]["inputs"]["initial"], ...
    again = records.load("fisher", folder="~/tensorflow_datasets")
    columns = records.columns(again, "train")      # the batch dictionary, equal to what was written

An example is one function: every column of the batch without its leading axis, nested as it was. Query points that all
functions share (a column f[N, d] named 'points') are stored once, with the metadata of the data set. The records are
array_record or parquet files; tfrecord would need TensorFlow.

Letters: B functions, N query points, d coordinates.
"""

import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mtjax.data.pde.store import Arrays, flatten, nested

POINTS = "points"
FileFormat = Literal["array_record", "parquet"]


def write(
    name: str,
    data: Mapping[str, Mapping[str, Any]],
    *,
    folder: str | os.PathLike,
    version: str = "1.0.0",
    description: str = "",
    task_names: Sequence[str] = (),
    file_format: FileFormat = "array_record",
) -> Any:
    """Writes the splits of a data set and returns its builder; what is there already is checked and kept.

    Args:
      name: of the data set, lower case with underscores.
      data: columns of every split: a dictionary like an operator batch ('inputs', 'points', 'values', 'mask', 'task',
        'parameters', ...) whose arrays have one row per function. Splits without rows are left out.
      folder: where tensorflow-datasets keeps its data sets; the files go to folder / name / version.
      version: 'major.minor.patch'.
      description: what the data set is, with its units.
      task_names: names of the task indices.
      file_format: 'array_record' or 'parquet'.

    Returns:
      A `tfds.core.GeneratorBasedBuilder`, ready for `as_data_source(split)`.

    Raises:
      ValueError: for splits that differ in their columns, columns that differ in length, or a folder that holds other
        data under this name and version.
    """
    import tensorflow_datasets as tfds

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name={name!r} must be lower case letters, digits and '_', and begin with a letter")
    if file_format not in ("array_record", "parquet"):
        raise ValueError(f"file_format={file_format!r} must be 'array_record' or 'parquet'")
    rows, shared = _checked_splits(data)
    features = {key: (array.shape[1:], array.dtype) for key, array in next(iter(rows.values())).items()}
    metadata = {"digest": _digest(rows, shared), "task_names": list(task_names)}
    if shared is not None:
        metadata |= {POINTS: shared.tolist(), "points_dtype": shared.dtype.name}

    class Functions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            tensors = nested(
                {k: tfds.features.Tensor(shape=shape, dtype=kind) for k, (shape, kind) in features.items()}
            )
            return tfds.core.DatasetInfo(
                builder=self,
                description=description or f"Operator learning: {name}.",
                features=tfds.features.FeaturesDict(nested(tensors)),
                metadata=tfds.core.MetadataDict(metadata),
                disable_shuffling=True,  # else rows are written in the order of a hash of their index
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # nothing is downloaded
            return {split: self._generate_examples(columns) for split, columns in rows.items()}

        def _generate_examples(self, columns):
            for row in range(len(next(iter(columns.values())))):
                yield row, nested({key: array[row] for key, array in columns.items()})

    Functions.name = name
    builder = Functions(data_dir=pathlib.Path(folder).expanduser(), file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    if builder.info.metadata["digest"] != metadata["digest"]:
        raise ValueError(
            f"{builder.data_dir} already holds other data under this name and version; give another version"
        )
    return builder


def load(name: str, *, folder: str | os.PathLike, version: str = "1.0.0") -> Any:
    """The builder of a data set that was written; needs no code of its generator.

    Raises:
      ValueError: if there is no such data set in the folder.
    """
    import tensorflow_datasets as tfds

    path = pathlib.Path(folder).expanduser() / name / version
    if not (path / "dataset_info.json").exists():
        raise ValueError(f"There is no data set {name!r} of version {version} in {folder}; write it with records.write")
    return tfds.builder_from_directory(path)


def points(builder: Any) -> np.ndarray | None:
    """The query points f[N, d] that all functions share, or None if each has its own."""
    metadata = builder.info.metadata
    return np.asarray(metadata[POINTS], metadata["points_dtype"]) if POINTS in metadata else None


def columns(builder: Any, split: str) -> Arrays:
    """A whole split as the columns of an operator batch, in the order in which it was written."""
    source = builder.as_data_source(split)
    examples = [flatten(source[row]) for row in range(len(source))]
    kinds = builder.info.features.np_dtype  # scalars come back as Python's numbers
    flat = {}
    for key in examples[0]:
        kind = functools.reduce(dict.__getitem__, key.split("/"), kinds)
        flat[key] = np.asarray([example[key] for example in examples], kind)
    shared = points(builder)
    return nested(flat) if shared is None else {**nested(flat), POINTS: shared}


def _checked_splits(data: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict[str, np.ndarray]], Any]:
    """Flat columns with one row per function of every split that has rows, and the points that all of them share."""
    rows, shared = {}, []
    for split, batch in data.items():
        flat = flatten(batch)
        if POINTS in flat and flat[POINTS].ndim == 2:
            shared.append(flat.pop(POINTS))
        lengths = {key: len(array) if array.ndim else None for key, array in flat.items()}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise ValueError(f"The columns of split {split!r} need one row per function each; their lengths: {lengths}")
        if next(iter(lengths.values())):
            rows[split] = flat
    if not rows:
        raise ValueError("There is no split with rows to write")
    layouts = [{key: (array.shape[1:], array.dtype) for key, array in flat.items()} for flat in rows.values()]
    if any(layout != layouts[0] for layout in layouts):
        raise ValueError(f"The splits {', '.join(rows)} differ in their columns, or in their shapes or types")
    if any(not np.array_equal(other, shared[0]) for other in shared):
        raise ValueError("The splits have different shared points; give every function its own, [B, N, d]")
    return rows, shared[0] if shared else None


def _digest(rows: Mapping[str, Mapping[str, np.ndarray]], shared: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for split, flat in rows.items():
        for key, array in flat.items():
            digest.update(f"{split}/{key}{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    if shared is not None:
        digest.update(np.ascontiguousarray(shared).tobytes())
    return digest.hexdigest()
