"""Sources of rows with random access: arrays in memory, tensorflow-datasets, ArrayRecord, Parquet.

A source has a length, and `source[i]` is row i: a dictionary of numpy arrays, nested as the data are. That is all that
a stream needs, so an own class will do. A source that can read many rows faster than one by one has

    take(indices i64[n]) -> the rows stacked, leaves [n, ...]

or, as the sources of tensorflow-datasets and ArrayRecord do, `__getitems__(indices) -> list of rows`. Sources are read
by several threads at once. Nothing here unpickles: what a record holds is decoded by a function that one names.

Letters: N rows, n rows of a batch.
"""

import collections
import difflib
import functools
import io
import os
import pathlib
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from mtjax.data.frames import listing

Row = Mapping[str, Any]
"""Dictionary of numpy arrays, possibly nested."""


class Source(Protocol):
    """N rows with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def take(source: Source, indices: np.ndarray) -> dict[str, Any]:
    """Rows of a source, stacked.

    Args:
      source: where from.
      indices: i64[n], which.

    Returns:
      The rows as one dictionary, leaves [n, ...].

    Raises:
      ValueError: if the rows do not have one structure and one shape.
    """
    if hasattr(source, "take"):
        return source.take(indices)
    wanted = [int(index) for index in indices]
    rows = source.__getitems__(wanted) if hasattr(source, "__getitems__") else [source[index] for index in wanted]
    try:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    except ValueError as error:
        raise ValueError(
            f"Rows of {type(source).__name__} differ in their columns or shapes, and a batch has one shape; pad or "
            f"crop them where they are decoded ({error})"
        ) from error


class Columns:
    """Rows in memory: a dictionary of arrays with a leading axis N, nested at will. Memory maps stay on the disk.

    Args:
      columns: the arrays.

    Raises:
      ValueError: if there is no array, or their lengths differ.

    >>> source = Columns({"x": np.arange(6).reshape(3, 2), "labels": {"y": np.array([0.0, 1.0, 2.0])}})
    >>> len(source), source[1]["x"].tolist(), source.take(np.array([2, 0]))["labels"]["y"].tolist()
    (3, [2, 3], [2.0, 0.0])
    """

    def __init__(self, columns: Mapping[str, Any]):
        self._columns = jax.tree.map(np.asarray, dict(columns))
        lengths = {name: leaf.shape[0] if leaf.ndim else None for name, leaf in named_leaves(self._columns)}
        if not lengths:
            raise ValueError("columns holds no array")
        if len(set(lengths.values())) > 1 or None in lengths.values():
            raise ValueError(f"columns must be arrays with one leading axis of N rows, got the lengths {lengths}")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        return jax.tree.map(lambda column: np.asarray(column[index]), self._columns)

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        """Rows `indices` i64[n], leaves [n, ...]."""
        return jax.tree.map(lambda column: column[indices], self._columns)


class Records:
    """Rows from a sequence of records, decoded one by one.

    Args:
      records: has a length and `[i]`, perhaps `__getitems__`; its items are rows, or what `decode` makes rows of.
      decode: `record -> row`; None: they are rows already.
      columns: those to keep; None: all.

    Raises:
      ValueError: if there are no records, a column is not there, or one holds what is no number.
    """

    def __init__(self, records: Any, decode: Callable[[Any], Row] | None = None, columns: Sequence[str] | None = None):
        self._records, self._decode, self._wanted = records, decode, columns
        if len(records) == 0:
            raise ValueError(f"{type(records).__name__} holds no records")
        whole = records[0] if decode is None else decode(records[0])
        if not isinstance(whole, Mapping):
            raise ValueError(f"A row must be a dictionary of arrays, but row 0 is of type {type(whole).__name__}")
        check_columns(list(whole), columns)
        for name, leaf in named_leaves(self._row(records[0])):
            if leaf.dtype.kind not in "biufcV":  # V: bfloat16 and other dtypes of ml_dtypes
                raise ValueError(
                    f"Column '{name}' holds {leaf.dtype} values, which no accelerator takes; decode it to numbers, or "
                    f"leave it out by columns=[...] (there are {listing(list(whole))})"
                )

    def _row(self, record: Any) -> Row:
        row = record if self._decode is None else self._decode(record)
        kept = row if self._wanted is None else {name: row[name] for name in self._wanted}
        return jax.tree.map(np.asarray, dict(kept))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        return self._row(self._records[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        many = getattr(self._records, "__getitems__", None)
        return [self._row(r) for r in (many(indices) if many else (self._records[index] for index in indices))]


def tfds_source(builder: Any, split: str, *, columns: Sequence[str] | None = None) -> Records:
    """A split of a prepared tensorflow-datasets builder, read without TensorFlow.

    Args:
      builder: prepared with a format of random access: `download_and_prepare(file_format="array_record")`.
      split: its name, or a slice such as 'train[:80%]'.
      columns: features to keep; None: all, which must be numbers then.

    Returns:
      The source.

    Raises:
      FileNotFoundError: if the data set is not prepared. (Nothing is downloaded here: offline, that hangs for minutes.)
      ValueError: as `Records`.
    """
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"Data set '{builder.name}' is not prepared in {builder.data_dir}; call "
            'builder.download_and_prepare(file_format="array_record") first'
        )
    return Records(builder.as_data_source(split), functools.partial(_as_declared, builder.info.features), columns)


def tfds_decoder(features: Any) -> Callable[[bytes], Row]:
    """Decodes the records of a tensorflow-datasets data set, `builder.info.features`, for `array_record_source`."""
    return lambda record: _as_declared(features, features.deserialize_example_np(record))


def _as_declared(features: Any, row: Row) -> Row:
    # Scalars come back as Python's numbers, which forget that they were float32.
    return jax.tree.map(lambda kind, leaf: np.asarray(leaf, kind), dict(features.np_dtype), dict(row))


def array_record_source(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    decode: Callable[[bytes], Row],
    *,
    columns: Sequence[str] | None = None,
) -> Records:
    """Rows of ArrayRecord files.

    Args:
      paths: the files, in the order of their rows.
      decode: `bytes -> row`: `decode_npz`, `tfds_decoder(features)`, or an own one.
      columns: those to keep; None: all.

    Returns:
      The source.

    Raises:
      FileNotFoundError: if a file is not there.
      ValueError: as `Records`.
    """
    import grain

    return Records(grain.sources.ArrayRecordDataSource(_existing(paths, "ArrayRecord")), decode, columns)


def encode_npz(row: Row) -> bytes:
    """A row as the bytes of an .npz file; names of nested columns are joined by '/'."""
    buffer = io.BytesIO()
    np.savez(buffer, **dict(named_leaves(jax.tree.map(np.asarray, dict(row)))))
    return buffer.getvalue()


def decode_npz(record: bytes) -> dict[str, Any]:
    """The inverse of `encode_npz`; pickled objects are refused.

    >>> decode_npz(encode_npz({"labels": {"y": np.float32(2)}}))
    {'labels': {'y': array(2., dtype=float32)}}
    """
    row: dict[str, Any] = {}
    with np.load(io.BytesIO(record), allow_pickle=False) as arrays:
        for name in arrays.files:
            *outer, last = name.split("/")
            functools.reduce(lambda tree, key: tree.setdefault(key, {}), outer, row)[last] = arrays[name]
    return row


def write_array_records(path: str | os.PathLike, rows: Iterable[Row], *, group_size: int = 1) -> None:
    """Writes rows to an ArrayRecord file, as `encode_npz` does.

    Args:
      path: of the file.
      rows: one record each.
      group_size: records that are compressed, and so read, together; 1 is right for random access.
    """
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(os.fspath(path), f"group_size:{group_size}")
    try:
        for row in rows:
            writer.write(encode_npz(row))
    finally:
        writer.close()


class Parquet:
    """Rows of Parquet files, read by row group when they are first asked for.

    Files are memory-mapped; decoded row groups stay in memory up to `cache_bytes`, the latest used ones. Rows in a
    shuffled order come from everywhere, so a table whose wanted columns do not fit is decoded over and over: there is a
    warning then.

    Args:
      paths: a file, several with the same columns, or a folder with *.parquet files (in the order of their names).
      columns: names of those to read; None: all. Numbers, truth values and lists of one length of them: [N] and [N, d].
      cache_bytes: of decoded row groups.

    Raises:
      FileNotFoundError: if a file is not there, or the folder has none.
      ValueError: if a column is not there, is no number, or differs between files; when rows are read, for missing
        integers and lists of different lengths. Missing floats are NaN.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        columns: Sequence[str] | None = None,
        cache_bytes: int = 1 << 30,
    ):
        import pyarrow.parquet as pq

        self._files = [pq.ParquetFile(path, memory_map=True) for path in _existing(paths, "parquet")]
        schema = self._files[0].schema_arrow
        check_columns(schema.names, columns)
        self.columns = tuple(schema.names if columns is None else columns)
        for path, file in zip(_existing(paths, "parquet"), self._files, strict=True):
            for name in self.columns:
                _check_field(path, name, file.schema_arrow, schema)
        self._groups = [(file, group) for file in self._files for group in range(file.num_row_groups)]
        lengths = [file.metadata.row_group(group).num_rows for file, group in self._groups]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._cache: collections.OrderedDict[int, dict[str, np.ndarray]] = collections.OrderedDict()
        self._cache_bytes, self._lock, self.groups_read, self._warned = cache_bytes, threading.Lock(), 0, False
        if len(self) == 0:
            raise ValueError(f"The table in {_existing(paths, 'parquet')[0]} has no rows")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Row:
        return {name: column[0] for name, column in self.take(np.array([index])).items()}

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        """Rows `indices` i64[n], leaves [n, ...]; every row group is decoded at most once for them."""
        indices = np.asarray(indices)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"Rows must lie in [0, {len(self)}), got {indices.min()} to {indices.max()}")
        of_group = np.searchsorted(self._starts, indices, side="right") - 1
        result: dict[str, np.ndarray] = {}
        for group in np.unique(of_group):
            here = np.flatnonzero(of_group == group)
            for name, column in self._group(int(group)).items():
                if name not in result:
                    result[name] = np.empty((len(indices), *column.shape[1:]), column.dtype)
                if result[name].shape[1:] != column.shape[1:]:
                    raise ValueError(f"Column '{name}' holds lists of different lengths; batches have one shape")
                result[name][here] = column[indices[here] - self._starts[group]]
        return result

    def _group(self, group: int) -> dict[str, np.ndarray]:
        # One thread reads: the others would decode the same group. pyarrow decodes columns in threads of its own.
        with self._lock:
            if group not in self._cache:
                file, index = self._groups[group]
                table = file.read_row_group(index, columns=list(self.columns))
                self._cache[group] = {name: _to_numpy(name, table.column(name)) for name in self.columns}
                self._count_read()
                while len(self._cache) > 1 and _num_bytes(self._cache.values()) > self._cache_bytes:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(group)
            return self._cache[group]

    def _count_read(self) -> None:
        self.groups_read += 1
        if self.groups_read > 4 * len(self._groups) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(self._groups)} row groups were decoded {self.groups_read} times: what is read of the table does "
                f"not fit into cache_bytes={self._cache_bytes:,}; raise it, read fewer columns, or write the rows to "
                "ArrayRecord files (write_array_records)",
                stacklevel=2,
            )


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves of a nested dictionary with their '/'-joined names."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in found]


def check_columns(there: Sequence[str], wanted: Sequence[str] | None) -> None:
    """Raises a ValueError, with near names, if a wanted column is not there."""
    absent = [name for name in wanted or () if name not in there]
    if wanted is not None and not wanted:
        raise ValueError(f"columns is empty; there are {listing(list(there))}")
    if absent:
        near = difflib.get_close_matches(absent[0], there, n=3)
        hint = f"did you mean {listing(near)}?" if near else f"there are {listing(list(there))}"
        raise ValueError(f"There is no column {listing(absent)}; {hint}")


def _existing(paths: str | os.PathLike | Sequence[str | os.PathLike], kind: str) -> list[str]:
    """The files that are meant, or a FileNotFoundError."""
    given = [pathlib.Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if len(given) == 1 and given[0].is_dir():
        folder, given = given[0], sorted(given[0].glob(f"*.{kind}"))
        if not given:
            raise FileNotFoundError(f"No file *.{kind} in {folder}")
    absent = [path for path in given if not path.is_file()]
    if absent or not given:
        raise FileNotFoundError(f"No {kind} file at {absent[0]}" if absent else f"No {kind} files were given")
    return [os.fspath(path) for path in given]


def _check_field(path: str, name: str, own: Any, first: Any) -> None:
    """Raises a ValueError unless a column has the type of the first file's, and that is one of numbers."""
    import pyarrow as pa

    kind = first.field(name).type
    if name not in own.names or own.field(name).type != kind:
        came = f"{own.field(name).type}" if name in own.names else "absent"
        raise ValueError(f"Column '{name}' is {came} in {path}, but {kind} in the first file")
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) else kind
    if not (pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner)):
        raise ValueError(f"Column '{name}' of {path} is of type {kind}, expected numbers; encode it, or leave it out")


def _to_numpy(name: str, column: Any) -> np.ndarray:
    """A column of a row group: [n], or [n, d] for lists of d numbers."""
    import pyarrow as pa

    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    is_list = pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type)
    values = array.flatten() if is_list else array
    may_miss = pa.types.is_floating(values.type)  # as NaN; but flatten() would drop a list that is missing
    if (array.null_count and (is_list or not may_miss)) or (values.null_count and not may_miss):
        raise ValueError(f"Column '{name}' has missing values, and is of type {array.type}; fill them before")
    numbers = values.to_numpy(zero_copy_only=False)
    if not is_list:
        return numbers
    lengths = np.unique(array.value_lengths().to_numpy())
    if len(lengths) > 1:
        raise ValueError(f"Column '{name}' holds lists of {lengths.min()} to {lengths.max()} numbers; pad them")
    return numbers.reshape(len(array), int(lengths[0]))


def _num_bytes(groups: Iterable[Mapping[str, np.ndarray]]) -> int:
    return sum(column.nbytes for group in groups for column in group.values())
