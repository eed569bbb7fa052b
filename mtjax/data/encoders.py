r"""Encoders: a table's columns -> fixed-shape arrays, fitted on training rows, frozen, stored as JSON.

A categorical column becomes integer codes: category i of the training rows has code i + 1; code 0 is reserved for
missing values and for categories that training never showed. A numeric column x becomes

$$ z = (x - \mathrm{mean}) / \mathrm{std} \quad (0 \text{ where } x \text{ is missing}), $$

with mean and standard deviation over the training rows, plus an indicator column (1 = missing) if the training rows
have missing values. Columns whose values go missing together share one indicator. A column that is complete in
training and has gaps later has no indicator, because the model could not have learned what it means: the gap then
reads as the training mean.

Class targets may be text: classes are numbered in sorted order (numbers by value, text alphabetically), so that the
second, *positive* class of a binary target is the natural one for 0/1, False/True, no/yes, n/y and -1/1; name the
classes yourself where it is not.

Letters: N rows, F columns, C classes.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mtjax.data import frames

if TYPE_CHECKING:
    import pandas as pd

Batch = dict[str, Any]
_FORMAT = "mtjax.TabularEncoder"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class CategoricalColumn:
    """Categories of one input column; category i has code i + 1, everything else code 0.

    Attributes:
      name: column of the table.
      categories: texts of the categories, see `frames.text_of`.
    """

    name: str
    categories: tuple[str, ...]

    @property
    def cardinality(self) -> int:
        """Number of codes, the reserved 0 included."""
        return len(self.categories) + 1

    def encode(self, series: "pd.Series") -> np.ndarray:
        """Codes i32[N]."""
        texts, positions = frames.levels(series)
        code = {text: i + 1 for i, text in enumerate(self.categories)}
        lookup = np.array([code.get(text, 0) for text in texts] + [0], np.int32)
        return lookup[positions]


@dataclasses.dataclass(frozen=True)
class NumericColumn:
    """Standardisation of one input column.

    Attributes:
      name: column of the table.
      mean: mean over the training rows.
      scale: standard deviation over the training rows (1 where the value itself is not a feature).
      value: whether the standardised value is a feature (False: constant in training, only its absence informs).
      indicator: whether a column that says 'missing' is a feature.
    """

    name: str
    mean: float
    scale: float
    value: bool = True
    indicator: bool = False

    def encode(self, series: "pd.Series") -> tuple[np.ndarray, np.ndarray]:
        """Standardised values f32[N], 0 where missing, and missing bool[N]."""
        numbers = frames.numbers(series)
        missing = np.isnan(numbers)
        with np.errstate(over="ignore"):
            scaled = np.where(missing, 0.0, (numbers - self.mean) / self.scale)
            result = scaled.astype(np.float32)
        lost = np.flatnonzero(~np.isfinite(result))
        if lost.size:
            raise ValueError(
                f"Column '{self.name}' holds {numbers[lost[0]]:g} in row {lost[0]}, which is too far from the training "
                f"values (mean {self.mean:g}, standard deviation {self.scale:g}) for float32"
            )
        return result, missing


@dataclasses.dataclass(frozen=True)
class TargetColumn:
    """Where the labels of a task come from, and the names of its classes.

    Attributes:
      name: name of the task.
      column: column of the table.
      kind: kind of the task, see `mtjax.Task`.
      classes: texts of the classes of a binary (negative, positive) or multiclass task; empty for other kinds.
    """

    name: str
    column: str
    kind: str
    classes: tuple[str, ...] = ()

    def encode(self, series: "pd.Series") -> np.ndarray:
        """Labels f32[N] in original units (the index of the class for class targets), NaN = missing."""
        if self.classes:
            texts, positions = frames.levels(series)
            index = {text: float(i) for i, text in enumerate(self.classes)}
            foreign = [text for text in texts if text not in index]
            if foreign:
                raise ValueError(
                    f"Column '{self.column}' holds {frames.listing(foreign)}, which is none of the classes "
                    f"{frames.listing(self.classes)} of task '{self.name}'"
                )
            return np.array([index[text] for text in texts] + [np.nan], np.float32)[positions]
        numbers = frames.numbers(series)
        if self.kind == "count":
            bad = np.flatnonzero((numbers < 0) | (numbers != np.round(numbers)) & ~np.isnan(numbers))
            if bad.size:
                raise ValueError(
                    f"Task '{self.name}' counts, so column '{self.column}' must hold integers >= 0, but row {bad[0]} "
                    f"holds {numbers[bad[0]]:g}"
                )
        with np.errstate(over="ignore"):
            labels = numbers.astype(np.float32)
        lost = np.flatnonzero(np.isinf(labels))
        if lost.size:
            raise ValueError(
                f"Column '{self.column}' holds {numbers[lost[0]]:g} in row {lost[0]}, too large for float32; "
                f"change the unit of task '{self.name}'"
            )
        return labels

    def decode(self, prediction: np.ndarray) -> dict[str, np.ndarray]:
        """Predictions in original units -> named columns, see `TabularEncoder.decode_predictions`."""
        prediction = np.asarray(prediction)
        width = len(self.classes) if self.kind == "multiclass" else None
        if prediction.ndim != (1 if width is None else 2) or (width is not None and prediction.shape[1] != width):
            wanted = "[N]" if width is None else f"[N, {width}]"
            raise ValueError(f"Predictions of task '{self.name}' must have shape {wanted}, got {prediction.shape}")
        if self.kind == "binary":
            return {f"{self.name}_probability_{self.classes[1]}": prediction}
        if self.kind == "multiclass":
            best = np.array(self.classes, object)[prediction.argmax(axis=1)]
            columns = {f"{self.name}_probability_{c}": prediction[:, i] for i, c in enumerate(self.classes)}
            return {self.name: best, **columns}
        return {self.name: prediction}


@dataclasses.dataclass(frozen=True)
class TabularEncoder:
    """Everything needed to turn rows of the same kind of table into batches, and predictions into a table.

    Attributes:
      categorical: input columns that become codes.
      numeric: input columns that become standardised numbers.
      targets: the tasks' label columns, in task order.

    >>> import pandas as pd
    >>> encoder = TabularEncoder(
    ...     categorical=(CategoricalColumn("color", ("blue", "red")),),
    ...     numeric=(NumericColumn("age", mean=40.0, scale=10.0, indicator=True),),
    ...     targets=(TargetColumn("churn", "churn", "binary", ("no", "yes")),),
    ... )
    >>> batch = encoder.encode(pd.DataFrame({"color": ["red", "green"], "age": [30.0, None]}))
    >>> batch["categorical"].tolist(), batch["numeric"].tolist()
    ([[2], [0]], [[-1.0, 0.0], [0.0, 1.0]])
    >>> encoder == TabularEncoder.from_json(encoder.to_json())
    True
    >>> list(encoder.decode_predictions({"churn": np.array([0.25])}))
    ['churn_probability_yes']
    """

    categorical: tuple[CategoricalColumn, ...]
    numeric: tuple[NumericColumn, ...]
    targets: tuple[TargetColumn, ...] = ()

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Codes per categorical column, the reserved code 0 included."""
        return tuple(column.cardinality for column in self.categorical)

    @property
    def numeric_names(self) -> tuple[str, ...]:
        """Names of the numeric features: values first, then indicators, as 'age (missing)'."""
        values = tuple(column.name for column in self.numeric if column.value)
        return values + tuple(f"{column.name} (missing)" for column in self.numeric if column.indicator)

    @property
    def categorical_names(self) -> tuple[str, ...]:
        """Names of the categorical features."""
        return tuple(column.name for column in self.categorical)

    @property
    def num_numeric(self) -> int:
        """Number of numeric features, indicators included."""
        return len(self.numeric_names)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of all features: categorical, then numeric."""
        return self.categorical_names + self.numeric_names

    def encode(self, frame: Any, *, labels: bool = True) -> Batch:
        """Encodes all rows of a table, new ones included.

        Args:
          frame: a DataFrame (or mapping of columns) with at least the input columns.
          labels: whether to encode label columns too; columns that are absent give labels that are all missing, and
            if all are absent (rows to predict) the batch has no 'labels'.

        Returns:
          `categorical` i32[N, F_c], `numeric` f32[N, F_n] and, where asked, `labels` {task: f32[N]}.

        Raises:
          ValueError: if an input column is absent, or a value cannot be encoded.
        """
        frame = frames.as_frame(frame)
        inputs = self.categorical + self.numeric
        frames.check_columns(frame, [column.name for column in inputs], "an input that the encoder was fitted on")
        categorical = np.zeros((len(frame), len(self.categorical)), np.int32)
        for i, column in enumerate(self.categorical):
            categorical[:, i] = column.encode(frame[column.name])
        numeric = np.zeros((len(frame), self.num_numeric), np.float32)
        next_value, next_indicator = 0, sum(column.value for column in self.numeric)
        for column in self.numeric:
            values, missing = column.encode(frame[column.name])
            if column.value:
                numeric[:, next_value] = values
                next_value += 1
            if column.indicator:
                numeric[:, next_indicator] = missing
                next_indicator += 1
        batch: Batch = {"categorical": categorical, "numeric": numeric}
        if labels and any(target.column in frame for target in self.targets):
            batch["labels"] = {
                target.name: target.encode(frame[target.column])
                if target.column in frame
                else np.full(len(frame), np.nan, np.float32)
                for target in self.targets
            }
        return batch

    def decode_predictions(self, predictions: Mapping[str, Any], index: Any = None) -> "pd.DataFrame":
        """Predictions (`mtjax.predictions`) -> a DataFrame to read or to save.

        Args:
          predictions: task name -> probability [N] (binary), probabilities [N, C] (multiclass), value [N] (others).
          index: row labels of the result; 0..N-1 by default.

        Returns:
          Columns in task order: `churn_probability_yes` for a binary task whose positive class is 'yes';
          `color` (the most probable class) and `color_probability_red`, ... for a multiclass task; `price` for others.

        Raises:
          ValueError: if a task is unknown, or shapes do not fit.
        """
        import pandas as pd

        unknown = sorted(set(predictions) - {target.name for target in self.targets})
        if unknown:
            names = frames.listing([target.name for target in self.targets])
            raise ValueError(f"There are predictions for {frames.listing(unknown)}, but the tasks are {names}")
        columns: dict[str, np.ndarray] = {}
        for target in self.targets:
            if target.name in predictions:
                columns |= target.decode(predictions[target.name])
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Predictions must have one row count for all tasks, got {lengths}")
        return pd.DataFrame(columns, index=index)

    def to_json(self) -> str:
        """The encoder as JSON text; numbers come back bit for bit."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "TabularEncoder":
        """Inverse of `to_json`.

        Raises:
          ValueError: if the text is not an encoder of this version.
        """
        fields = json.loads(text)
        found = (fields.get("format"), fields.get("version")) if isinstance(fields, dict) else (None, None)
        if found != (_FORMAT, _VERSION):
            raise ValueError(f"Expected JSON with format={_FORMAT!r}, version={_VERSION}, got {found[0]!r}, {found[1]}")
        return cls(
            tuple(CategoricalColumn(c["name"], tuple(c["categories"])) for c in fields["categorical"]),
            tuple(NumericColumn(**c) for c in fields["numeric"]),
            tuple(TargetColumn(**{**c, "classes": tuple(c["classes"])}) for c in fields["targets"]),
        )
