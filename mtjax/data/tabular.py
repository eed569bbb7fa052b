"""Tables: a data frame and a list of tasks -> arrays to train on, and an encoder for rows to come.

One rule holds everywhere: whatever is learned about a column (categories, mean, variance, classes, scaling of a
target) is learned from the training rows only, so that validation and test rows look to the model as new rows will.
Partially labelled rows are normal: a label that is missing (NaN) takes no part in loss and metrics of its task.

Letters: N rows, F features, C classes.

>>> import pandas as pd
>>> frame = pd.DataFrame({
...     "area": [50, 60, 70, 80, 90, 100.0], "city": ["Rome", "Oslo"] * 3,
...     "price": [1.0, 2, 3, 4, 5, 6], "sold": ["yes", "no", "no", None, "yes", "yes"],
... })
>>> split = GivenSplit(["train"] * 4 + ["validation", "test"])
>>> data = TabularDataset.from_frame(frame, {"price": "regression", "sold": "binary"}, split=split)
>>> data.feature_names, data.cardinalities, data.num_numeric
(('city', 'area'), (3,), 1)
>>> data.train["labels"]["sold"].tolist()
[1.0, 0.0, 0.0, nan]
>>> data.tasks[0].offset, data.tasks[1].kind
(2.5, 'binary')
>>> data.encoder.encode(pd.DataFrame({"area": [65.0], "city": ["Bonn"]}))["categorical"].tolist()
[[0]]
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtjax.data import fitting, frames
from mtjax.data.encoders import Batch, TabularEncoder
from mtjax.data.splits import SPLITS, GivenSplit, OrderedSplit, RandomSplit, Split
from mtjax.tasks import Kind, Task

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["GivenSplit", "OrderedSplit", "RandomSplit", "TabularDataset"]


@dataclasses.dataclass(frozen=True, eq=False)
class TabularDataset:
    """A table ready for training.

    Attributes:
      encoder: encodes new rows and names predictions; store it with the model (`encoder.to_json()`).
      tasks: the tasks, target scaling fitted on the training rows.
      train: `categorical` i32[N, F_c], `numeric` f32[N, F_n], `labels` {task: f32[N], NaN = missing}, and `weight`
        f32[N] if weights were given.
      validation: the same for the validation rows.
      test: the same for the test rows.
      rows: split name -> positions of its rows in the table.
      notes: sentences on what was dropped or looks odd.
    """

    encoder: TabularEncoder
    tasks: tuple[Task, ...]
    train: Batch
    validation: Batch
    test: Batch
    rows: Mapping[str, np.ndarray]
    notes: list[str]

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Codes per categorical feature, 0 = unknown included."""
        return self.encoder.cardinalities

    @property
    def num_numeric(self) -> int:
        """Number of numeric features, indicators included."""
        return self.encoder.num_numeric

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of all features: categorical, then numeric."""
        return self.encoder.feature_names

    @classmethod
    def from_path(cls, path: Any, tasks: Sequence[Task] | Mapping[str, Kind], **options: Any) -> "TabularDataset":
        """Reads a CSV or Parquet file; everything else as in `from_frame`."""
        return cls.from_frame(frames.read_table(path), tasks, **options)

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        tasks: Sequence[Task] | Mapping[str, Kind],
        *,
        categorical: Sequence[str] | None = None,
        numeric: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        weight: str | Sequence[float] | np.ndarray | None = None,
        split: Split = RandomSplit(),  # noqa: B008 (frozen)
        target_columns: Mapping[str, str] | None = None,
        classes: Mapping[str, Sequence[Any]] | None = None,
        max_categories: int = 1000,
        min_count: int = 1,
    ) -> "TabularDataset":
        """Builds a data set from a table.

        Args:
          frame: a DataFrame, anything with `to_pandas()`, or a mapping of columns. It is not changed.
          tasks: `Task` objects, named as their column; or name -> kind, in which case classes are counted for you.
          categorical: input columns that hold categories. None: text, bool and category columns not listed elsewhere.
          numeric: input columns that hold numbers. None: number columns not listed elsewhere. Dates are an error: turn
            them into the numbers that matter (weekday, age in days), or ignore them.
          ignore: columns that are no input.
          weight: column or array of sample weights >= 0.
          split: which rows train, validate and test; columns that it reads are no input unless listed.
          target_columns: task name -> column, for tasks that are not named as their column.
          classes: task name -> its classes in order (negative before positive), where sorted order will not do or
            some class is in no training row.
          max_categories: bound on the categories of a column and on the classes of a task.
          min_count: categories with fewer training rows than that share the code 0 of unknown ones.

        Returns:
          The data set.

        Raises:
          ValueError: a sentence that names the column or argument, what was expected and what came.
        """
        frame = frames.as_frame(frame)
        notes: list[str] = []
        specs = (
            [(t, None) for t in tasks.items()] if isinstance(tasks, Mapping) else [((t.name, t.kind), t) for t in tasks]
        )
        sources = _target_columns(frame, [name for (name, _), _ in specs], target_columns or {}, classes or {})
        assigned = _assign(frame, split)

        weights = _weights(frame, weight, assigned)
        aside = {*split.columns, *([weight] if isinstance(weight, str) else [])}
        categorical, numeric = _input_columns(frame, sources, categorical, numeric, ignore, aside, notes)
        targets, fitted = [], []
        for (name, kind), task in specs:
            target, target_notes = fitting.fit_target(
                name,
                kind,
                frame[sources[name]],
                assigned,
                num_classes=task.num_classes if task else None,
                classes=(classes or {}).get(name),
                max_classes=max_categories,
            )
            targets.append(target)
            notes += target_notes
            fitted.append(task or Task(name, kind, num_classes=len(target.classes) if kind == "multiclass" else None))

        train_rows = frame[assigned == 0]
        columns = fitting.fit_inputs(
            train_rows, categorical, numeric, max_categories=max_categories, min_count=min_count
        )
        notes += columns[2]
        encoder = TabularEncoder(columns[0], columns[1], tuple(targets))
        if not encoder.feature_names:
            raise ValueError(f"No input column is left besides the targets; {' '.join(notes) or 'the table has none'}")

        everything = encoder.encode(frame)
        if weights is not None:
            everything["weight"] = weights
        rows = {name: np.flatnonzero(assigned == code) for code, name in enumerate(SPLITS)}
        batches = {name: _take(everything, index) for name, index in rows.items()}
        for task in fitted:
            task.check_labels(everything["labels"][task.name])
        fitted = [task.fit(batches["train"]["labels"][task.name]) for task in fitted]
        notes += _later_notes(frame, encoder, everything, assigned)
        return cls(encoder, tuple(fitted), **batches, rows=rows, notes=notes)

    def predictions_frame(self, predictions: Mapping[str, Any], split: str = "test") -> "pd.DataFrame":
        """Predictions for the rows of a split as a DataFrame, indexed by their positions in the table.

        Columns are those of `TabularEncoder.decode_predictions`.
        """
        return self.encoder.decode_predictions(predictions, index=self.rows[split])

    def summary(self) -> str:
        """Rows, features, and per task the labelled share and label statistic of each split, as text."""
        counts = " / ".join(f"{len(self.rows[name]):,} {name}" for name in SPLITS)
        lines = [
            f"rows      {counts}",
            f"inputs    {len(self.cardinalities)} categorical ({sum(self.cardinalities):,} codes), "
            f"{self.num_numeric} numeric",
            f"{'task':<18}{'kind':<12}{'':<16}" + "".join(f"{name:>20}" for name in SPLITS),
        ]
        for task, target in zip(self.tasks, self.encoder.targets, strict=True):
            what = {"binary": f"P({target.classes[-1]})" if target.classes else "", "multiclass": "top class"}
            cells = "".join(f"{_statistic(task, getattr(self, name), target.classes):>20}" for name in SPLITS)
            lines.append(f"{task.name:<18}{task.kind:<12}{what.get(task.kind, 'mean ± sd'):<16}{cells}")
            shares = [np.mean(~np.isnan(getattr(self, name)["labels"][task.name])) for name in SPLITS]
            if min(shares) < 1:
                lines.append(f"{'':<30}{'labelled':<16}" + "".join(f"{share:>20.1%}" for share in shares))
        return "\n".join(lines + [f"note      {note}" for note in self.notes])


def _take(batch: Batch, index: np.ndarray) -> Batch:
    """Rows of a batch."""
    return {
        key: {name: label[index] for name, label in value.items()} if isinstance(value, dict) else value[index]
        for key, value in batch.items()
    }


def _statistic(task: Task, batch: Batch, classes: tuple[str, ...]) -> str:
    """Share of the positive or of the most frequent class, or mean and standard deviation, of the present labels."""
    labels = batch["labels"][task.name].astype(np.float64)
    labels = labels[~np.isnan(labels)]
    if labels.size == 0:
        return "no label"
    if task.kind == "binary":
        return f"{labels.mean():.2%}"
    if task.kind == "multiclass":
        shares = np.bincount(labels.astype(int), minlength=len(classes)) / labels.size
        return f"{classes[shares.argmax()]} {shares.max():.1%}"
    return f"{labels.mean():.4g} ± {labels.std():.4g}"


def _target_columns(
    frame: "pd.DataFrame", names: Sequence[str], columns: Mapping[str, str], classes: Mapping[str, Any]
) -> dict[str, str]:
    """Task name -> column that exists."""
    if not names:
        raise ValueError("A data set needs at least one task, got none")
    if len(set(names)) < len(names):
        raise ValueError(f"Task names must be unique, got {frames.listing(names, limit=20)}")
    for argument, keys in (("target_columns", columns), ("classes", classes)):
        strange = [key for key in keys if key not in names]
        if strange:
            raise ValueError(f"{argument} names {frames.listing(strange)}, but the tasks are {frames.listing(names)}")
    sources = {name: columns.get(name, name) for name in names}
    for name, column in sources.items():
        frames.check_columns(frame, [column], f"the target of task '{name}'")
    return sources


def _assign(frame: "pd.DataFrame", split: Split) -> np.ndarray:
    """Split codes i8[N], each split having at least one row."""
    assigned = split.assign(frame)
    counts = np.bincount(assigned, minlength=len(SPLITS))
    for name, count in zip(SPLITS, counts, strict=True):
        if count == 0:
            shown = ", ".join(f"{n} {c}" for n, c in zip(SPLITS, counts, strict=True))
            raise ValueError(f"The {name} split is empty ({shown} of {len(frame)} rows); change split={split!r:.200}")
    return assigned


def _weights(frame: "pd.DataFrame", weight: Any, assigned: np.ndarray) -> np.ndarray | None:
    """Sample weights f32[N], checked."""
    if weight is None:
        return None
    if isinstance(weight, str):
        frames.check_columns(frame, [weight], "the sample weight")
        weights, what = frames.numbers(frame[weight]), f"Weight column '{weight}'"
    else:
        weights, what = np.asarray(weight, np.float64), "weight="
    if weights.shape != (len(frame),):
        raise ValueError(f"{what} must hold one number per row ({len(frame)}), got shape {weights.shape}")
    bad = np.flatnonzero(~np.isfinite(weights) | (weights < 0) | (weights > np.finfo(np.float32).max))
    if bad.size:
        raise ValueError(f"{what} must hold finite numbers >= 0, but row {bad[0]} holds {weights[bad[0]]:g}")
    if not (weights[assigned == 0] > 0).any():
        raise ValueError(f"{what} is 0 for every training row")
    return weights.astype(np.float32)


def _input_columns(
    frame: "pd.DataFrame",
    sources: Mapping[str, str],
    categorical: Sequence[str] | None,
    numeric: Sequence[str] | None,
    ignore: Sequence[str],
    aside: set[str],
    notes: list[str],
) -> tuple[list[str], list[str]]:
    """Which columns are categorical and which numeric inputs; columns left over are mentioned in `notes`."""
    lists = {"categorical": list(categorical or ()), "numeric": list(numeric or ()), "ignore": list(ignore)}
    where: dict[str, str] = {}
    for argument, names in lists.items():
        frames.check_columns(frame, names, f"listed in {argument}=")
        for name in names:
            if name in where:
                raise ValueError(f"Column '{name}' is listed in {where[name]}= and again in {argument}=")
            where[name] = argument
    for task, column in sources.items():
        if column in where:
            raise ValueError(f"Column '{column}' is the target of task '{task}' and listed in {where[column]}= too")
    rest = [name for name in frame.columns if name not in where and name not in {*sources.values(), *aside}]
    kinds = {name: frames.kind_of(frame[name]) for name in rest}
    if categorical is None or numeric is None:
        for name in rest:
            if kinds[name] == "date":
                raise ValueError(
                    f"Column '{name}' holds dates, expected numbers or categories; put it into ignore= and add what "
                    f"matters as columns (weekday, hour, days since ...), or split by it: OrderedSplit('{name}')"
                )
    inferred = {"categorical": categorical is None, "numeric": numeric is None, "date": False}
    for name in rest:
        if inferred[kinds[name]]:
            lists[kinds[name]].append(name)
    unused = [name for name in rest if not inferred[kinds[name]]]
    if unused:
        notes.append(f"Columns that are not used: {frames.listing(unused, limit=20)}.")
    return lists["categorical"], lists["numeric"]


def _later_notes(frame: "pd.DataFrame", encoder: TabularEncoder, batch: Batch, assigned: np.ndarray) -> list[str]:
    """Notes on validation and test rows that hold what training rows never showed."""
    later = assigned > 0
    notes = []
    for i, column in enumerate(encoder.categorical):
        unknown = int((later & (batch["categorical"][:, i] == 0) & frame[column.name].notna().to_numpy()).sum())
        if unknown:
            notes.append(
                f"Column '{column.name}': {unknown} of {later.sum()} validation and test rows hold categories that "
                "training does not know (code 0)."
            )
    for column in encoder.numeric:
        missing = frame[column.name].isna().to_numpy()
        if (missing & later).any() and not (missing & ~later).any():
            notes.append(
                f"Column '{column.name}' is complete in training but missing in {int(missing.sum())} validation and "
                "test rows, which take the training mean (no indicator)."
            )
    for target in encoder.targets:
        labelled = ~np.isnan(batch["labels"][target.name])
        empty = [SPLITS[code] for code in (1, 2) if not labelled[assigned == code].any()]
        if empty:
            notes.append(f"Task '{target.name}' has no label in the rows for {frames.listing(empty)}.")
    return notes
