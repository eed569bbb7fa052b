"""Fitting encoders: what is learned about each column from the training rows, and what is wrong with it.

Input columns are fitted on the training rows alone. Label columns are looked at in all rows, but only to find labels
that no model fitted on the training rows could predict; names and number of the classes come from the training rows
or from the caller. Every surprise that is no error becomes a note.

Letters: N rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtjax.data import frames
from mtjax.data.encoders import CategoricalColumn, NumericColumn, TargetColumn
from mtjax.data.splits import SPLITS

if TYPE_CHECKING:
    import pandas as pd

# A column in which nearly every row has its own value is probably an identifier; below this size it may be chance.
_IDENTIFIER_SHARE, _IDENTIFIER_ROWS = 0.9, 50


def fit_categorical(series: "pd.Series", *, max_categories: int, min_count: int) -> CategoricalColumn | None:
    """Fits a column on training rows.

    Args:
      series: the training rows.
      max_categories: more categories than that are an error.
      min_count: categories with fewer training rows share code 0, which is thereby trained.

    Returns:
      The encoder, or None if all training rows would get the same code.

    Raises:
      ValueError: if there are more than `max_categories` categories.
    """
    texts, positions = frames.levels(series)
    counts = np.bincount(positions[positions >= 0], minlength=len(texts))
    kept = [text for text, count in zip(texts, counts, strict=True) if count >= min_count]
    if len(kept) > max_categories:
        raise ValueError(
            f"Column '{series.name}' has {len(kept)} distinct values in {len(series)} training rows, more than "
            f"max_categories={max_categories}; put it into ignore= if it is free text or an identifier, raise "
            "max_categories, or drop rare values with min_count="
        )
    some_unknown = len(kept) < len(texts) or counts.sum() < len(series)
    if len(kept) + some_unknown < 2:
        return None
    return CategoricalColumn(series.name, tuple(frames.sorted_texts(kept))) if kept else None


def fit_numeric(series: "pd.Series", indicators: dict[bytes, list[str]]) -> tuple[NumericColumn | None, str | None]:
    """Fits a column on training rows.

    Args:
      series: the training rows.
      indicators: pattern of missing rows -> columns with that pattern, the first of which has the indicator; updated.

    Returns:
      The encoder (None if it is constant) and a note (None if there is nothing to say).

    Raises:
      ValueError: if the column holds anything but finite numbers, or its variance overflows.
    """
    name = series.name
    numbers = frames.numbers(series)
    missing = np.isnan(numbers)
    present = numbers[~missing]
    pattern = np.packbits(missing).tobytes()
    has_twin = pattern in indicators
    if present.size == 0:
        return None, f"Column '{name}' is dropped: it has no value in any training row."
    if present.min() == present.max():
        if not missing.any() or has_twin:
            return None, f"Column '{name}' is dropped: it is constant ({present[0]:g}) in the training rows."
        indicators[pattern] = [name]
        column = NumericColumn(name, float(present[0]), 1.0, value=False, indicator=True)
        return (
            column,
            f"Column '{name}' is constant ({present[0]:g}) where it is present: only its indicator is kept.",
        )
    with np.errstate(over="ignore", invalid="ignore"):
        mean, spread = float(present.mean()), float(present.std())
    if not (np.isfinite(mean) and np.isfinite(spread) and spread > 0):
        raise ValueError(
            f"Column '{name}' ranges from {present.min():g} to {present.max():g} in the training rows, and its "
            "variance is beyond float64; change its unit"
        )
    if not missing.any():
        return NumericColumn(name, mean, spread), None
    indicators.setdefault(pattern, []).append(name)
    return NumericColumn(name, mean, spread, indicator=not has_twin), None


def fit_inputs(
    train: "pd.DataFrame",
    categorical: Sequence[str],
    numeric: Sequence[str],
    *,
    max_categories: int,
    min_count: int,
) -> tuple[tuple[CategoricalColumn, ...], tuple[NumericColumn, ...], list[str]]:
    """Fits all input columns on the training rows; returns the encoders and notes on what was dropped or looks odd."""
    notes: list[str] = []
    categorical_columns, numeric_columns = [], []
    for name in categorical:
        column = fit_categorical(train[name], max_categories=max_categories, min_count=min_count)
        if column is None:
            notes.append(f"Column '{name}' is dropped: all training rows hold the same category or none.")
        else:
            categorical_columns.append(column)
            notes += _identifier_note(name, len(column.categories), len(train))
    indicators: dict[bytes, list[str]] = {}
    for name in numeric:
        numeric_column, note = fit_numeric(train[name], indicators)
        notes += [note] if note else []
        if numeric_column is not None:
            numeric_columns.append(numeric_column)
            if train[name].dtype.kind in "iu":
                notes += _identifier_note(name, train[name].nunique(), len(train))
    notes += [
        f"Columns {frames.listing(names, limit=20)} are missing together: one indicator, that of '{names[0]}'."
        for names in indicators.values()
        if len(names) > 1
    ]
    return tuple(categorical_columns), tuple(numeric_columns), notes


def _identifier_note(name: str, distinct: int, rows: int) -> list[str]:
    if rows < _IDENTIFIER_ROWS or distinct < _IDENTIFIER_SHARE * rows:
        return []
    return [f"Column '{name}' has {distinct} distinct values in {rows} training rows: an identifier? See ignore=."]


def fit_target(
    name: str,
    kind: str,
    series: "pd.Series",
    split: np.ndarray,
    *,
    num_classes: int | None = None,
    classes: Sequence[Any] | None = None,
    max_classes: int,
) -> tuple[TargetColumn, list[str]]:
    """Finds the classes of a task and checks them against every split.

    Args:
      name: name of the task.
      kind: kind of the task.
      series: its label column, all rows, missing where there is no label.
      split: 0, 1, 2 per row, see `mtjax.data.splits`.
      num_classes: number of classes that a multiclass task declares.
      classes: its classes in order, declared by the caller; these need not all be in the training rows.
      max_classes: more classes than that are an error.

    Returns:
      The label encoder, and notes.

    Raises:
      ValueError: if the labels do not fit the kind, or a class is in no training row and was not declared.
    """
    column = str(series.name)
    if not series[split == 0].notna().any():
        raise ValueError(f"Task '{name}' has no labelled training row (column '{column}', NaN = missing)")
    if kind not in ("binary", "multiclass"):
        if classes is not None:
            raise ValueError(f"Task '{name}' is {kind}, but classes= names classes for it")
        return TargetColumn(name, column, kind), []

    texts, positions = frames.levels(series)
    in_train = [texts[i] for i in np.unique(positions[(split == 0) & (positions >= 0)])]
    if classes is not None:
        names = [frames.text_of(value) for value in classes]
        expected = 2 if kind == "binary" else num_classes or len(names)
        if len(set(names)) < len(names) or len(names) != expected or expected < 2:
            raise ValueError(f"classes['{name}'] must name {expected} distinct classes, got {frames.listing(names)}")
    elif kind == "multiclass" and num_classes and set(texts) <= {str(i) for i in range(num_classes)}:
        names = [str(i) for i in range(num_classes)]  # class indices speak for themselves
    else:
        names = _classes_of_training_rows(name, kind, column, texts, positions, split, num_classes, max_classes)
    unseen = [text for text in names if text not in in_train]
    notes = [f"Task '{name}': no training row has class {frames.listing(unseen)}."] if unseen else []
    return TargetColumn(name, column, kind, tuple(names)), notes


def _classes_of_training_rows(
    name: str,
    kind: str,
    column: str,
    texts: list[str],
    positions: np.ndarray,
    split: np.ndarray,
    num_classes: int | None,
    max_classes: int,
) -> list[str]:
    """Classes in sorted order, or a ValueError that says why the labels do not define them."""
    if kind == "binary" and len(texts) > 2:
        shown = ", ".join(frames.sorted_texts(texts)[:6]) + (", ..." if len(texts) > 6 else "")
        raise ValueError(
            f"Task '{name}' is binary but its column '{column}' holds {len(texts)} values ({shown}); "
            "use kind='multiclass'"
        )
    if len(texts) > max_classes:
        raise ValueError(
            f"Task '{name}' is {kind} but its column '{column}' holds {len(texts)} distinct values, more than "
            f"max_categories={max_classes}; use kind='regression' for a number"
        )
    seen = {code: set(positions[(split == code) & (positions >= 0)].tolist()) for code in range(len(SPLITS))}
    for code in (1, 2):
        unseen = sorted(seen[code] - seen[0])
        if unseen:
            raise ValueError(
                f"Task '{name}' has class {frames.listing([texts[i] for i in unseen])} in its {SPLITS[code]} rows but "
                f"in no training row, so no model can learn it; choose another split, or declare classes={{'{name}': "
                "[...]}"
            )
    names = frames.sorted_texts(texts[i] for i in seen[0])
    if len(names) < 2:
        raise ValueError(
            f"Task '{name}' is {kind} but all its labelled rows hold {frames.listing(names)}; there is nothing to "
            f"learn (declare classes={{'{name}': [...]}} to go on)"
        )
    if num_classes is not None and len(names) != num_classes:
        raise ValueError(
            f"Task '{name}' has num_classes={num_classes} but its training rows hold {len(names)} classes "
            f"({frames.listing(names)}); correct the number, or declare classes={{'{name}': [...]}}"
        )
    return names
