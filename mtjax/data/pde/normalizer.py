"""Standardisation of the inputs and of the solutions of a data set, fitted on training rows only.

    x' = (x - mean) / std

Statistics are kept in float64 and applied in float32. `per="point"` has a mean and a standard deviation for every
sensor or query point, as the published code does; `per="all"` one of each, which does not bind a network to a grid.

>>> batch = {"inputs": {"code": np.ones((2, 4)), "initial": np.array([[0.0, 1.0], [2.0, 3.0]])},
...          "values": np.array([[1.0], [5.0]])}
>>> normalizer = Normalizer.fit(batch, inputs=("initial",))
>>> normalizer.apply(batch)["values"].ravel().tolist()
[-1.0, 1.0]
>>> normalizer.denormalize(np.array([[-1.0], [1.0]])).ravel().tolist()
[1.0, 5.0]

Letters: B functions, N query points, C outputs.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

Per = Literal["point", "all"]


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """x -> (x - mean) / std. Attributes: mean, std: float64 arrays that broadcast against one function's x."""

    mean: np.ndarray
    std: np.ndarray

    def __post_init__(self):
        mean, std = np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)
        if mean.shape != std.shape or not np.isfinite(mean).all() or not np.isfinite(std).all() or (std <= 0).any():
            raise ValueError(
                f"mean and std must be finite, of one shape, and std positive; got shapes {mean.shape} and {std.shape}"
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @classmethod
    def fit(cls, x: np.ndarray, *, per: Per = "point", mask: np.ndarray | None = None) -> "Affine":
        """Statistics over the functions of x f[B, ...], of the entries where the mask is True.

        Entries that never vary (a point on a fixed boundary, a point outside of every domain) keep the std 1.
        """
        x = np.asarray(x, np.float64)
        if per not in ("point", "all"):
            raise ValueError(f"per={per!r} must be 'point' or 'all'")
        if mask is not None:
            mask = np.broadcast_to(np.reshape(mask, np.shape(mask) + (1,) * (x.ndim - np.ndim(mask))), x.shape)
        used = x[...] if mask is None else x[mask]
        if not x.size or not used.size or not np.isfinite(used).all():
            raise ValueError(f"Statistics need finite numbers; got an array of shape {x.shape} that has none or others")
        axis = 0 if per == "point" else None
        weight = np.ones(x.shape) if mask is None else mask.astype(np.float64)
        count = np.maximum(weight.sum(axis), 1.0)
        mean = np.where(weight > 0, x, 0.0).sum(axis) / count
        deviations = np.where(weight > 0, x - (mean[None] if per == "point" else mean), 0.0)
        std = np.sqrt((deviations**2).sum(axis) / count)
        # Relative to the largest: a constant in float32 has a spread of rounding size.
        constant = std <= 1e-7 * np.maximum(np.abs(mean), std.max())
        return cls(mean, np.where(constant, 1.0, std))

    def __call__(self, x: Any) -> np.ndarray:
        """Standardised, float32."""
        return ((np.asarray(x, np.float64) - self._row(self.mean)) / self._row(self.std)).astype(np.float32)

    def inverse(self, x: Any) -> Any:
        """Back in physical units, in x's own kind of array (numpy or JAX) and precision."""
        return x * self._row(self.std).astype(x.dtype) + self._row(self.mean).astype(x.dtype)

    @staticmethod
    def _row(values: np.ndarray) -> np.ndarray:
        return values[None] if values.ndim else values


@dataclasses.dataclass(frozen=True, eq=False)
class Normalizer:
    """Standardisation of a batch: of some inputs, by name, and of the values.

    Attributes:
      inputs: `Affine` by the name of the input; inputs without one stay as they are (a task code is a physical quantity
        and is read raw).
      values: `Affine` of the values.
    """

    inputs: Mapping[str, Affine]
    values: Affine

    @classmethod
    def fit(cls, batch: Mapping[str, Any], *, inputs: Sequence[str] = (), per: Per = "point") -> "Normalizer":
        """Statistics of the training rows: of the named inputs and, inside of the mask if there is one, of the values.

        Args:
          batch: the training columns, with 'inputs' as a dictionary.
          inputs: names of the inputs to standardise.
          per: 'point' or 'all'.

        Returns:
          The fitted normalizer.

        Raises:
          ValueError: for an input that the batch lacks, and for numbers that are not finite.
        """
        missing = [name for name in inputs if name not in batch["inputs"]]
        if missing:
            raise ValueError(f"Input {missing[0]!r} is not among the batch's inputs: {', '.join(batch['inputs'])}")
        fitted = {name: Affine.fit(batch["inputs"][name], per=per) for name in inputs}
        return cls(fitted, Affine.fit(batch["values"], per=per, mask=batch.get("mask")))

    def apply(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with standardised inputs and values; outside of the mask the values become 0."""
        inputs = {
            name: self.inputs[name](value) if name in self.inputs else value for name, value in batch["inputs"].items()
        }
        values = self.values(batch["values"])
        if "mask" in batch:
            mask = np.asarray(batch["mask"])
            values = np.where(mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)), values, np.float32(0))
        return {**batch, "inputs": inputs, "values": values}

    def denormalize(self, values: Any) -> Any:
        """Predictions f[B, N] or f[B, N, C] in physical units."""
        return self.values.inverse(values)

    def to_json(self) -> str:
        """All statistics as JSON text; numbers are written so that they are read back exactly."""

        def plain(affine):
            return {"mean": affine.mean.tolist(), "std": affine.std.tolist()}

        return json.dumps({"inputs": {k: plain(v) for k, v in self.inputs.items()}, "values": plain(self.values)})

    @classmethod
    def from_json(cls, text: str) -> "Normalizer":
        """The inverse of `to_json`."""
        read = json.loads(text)
        return cls({name: Affine(**value) for name, value in read["inputs"].items()}, Affine(**read["values"]))
