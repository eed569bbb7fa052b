"""What a run remembers besides its state: the history of evaluations, losses since the last one, and a clock.

All of it goes into every checkpoint as JSON, so that a resumed run writes the history of an uninterrupted one and still
knows its rate.

Letters: L lanes, K tasks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass
class RunLog:
    """The record of a run so far.

    Attributes:
      history: records of evaluations.
      losses: f64[L, K], sum of the losses since the last evaluation.
      count: steps in that sum.
      compile_s: seconds of the first dispatch.
      rows: training rows in later dispatches.
      seconds: their duration.
    """

    history: list[dict[str, Any]]
    losses: np.ndarray
    count: int = 0
    compile_s: float = 0.0
    rows: int = 0
    seconds: float = 0.0
    _warm: bool = dataclasses.field(default=False, init=False)

    @classmethod
    def empty(cls, num_lanes: int, num_tasks: int) -> "RunLog":
        """The log of a fresh run."""
        return cls([], np.zeros((num_lanes, num_tasks)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        keys = ("history", "count", "compile_s", "rows", "seconds")
        return {key: getattr(self, key) for key in keys} | {"losses": self.losses.tolist()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "RunLog":
        """Inverse of `to_json`."""
        return cls(**{**record, "losses": np.asarray(record["losses"])})

    def add(self, losses: np.ndarray, *, rows: int, seconds: float) -> None:
        """Notes a dispatch: losses f32[L, n, K] of its n steps, its training rows and its duration."""
        self.losses, self.count = self.losses + losses.sum(1), self.count + losses.shape[1]
        if self._warm:
            self.rows, self.seconds = self.rows + rows, self.seconds + seconds
        else:  # the first dispatch of a process compiles
            self.compile_s, self._warm = self.compile_s or seconds, True

    def close(self, record: dict[str, Any]) -> dict[str, Any]:
        """Ends the period with an evaluation's record, which gets the mean losses."""
        record = {**record, "losses": (self.losses / self.count).tolist()}
        self.history.append(record)
        self.losses, self.count = np.zeros_like(self.losses), 0
        return record

    @property
    def rows_per_s(self) -> float:
        """Training rows per second of all lanes together after compilation; NaN if there was one dispatch."""
        return self.rows / self.seconds if self.seconds else float("nan")


def check_same_run(asked: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises a ValueError that lists the differences between two descriptions of a run."""
    asked, saved = _flat(asked), _flat(saved)
    differing = [key for key in sorted(asked.keys() | saved.keys()) if asked.get(key) != saved.get(key)]
    if differing:
        lines = [f"  {key}: saved {saved.get(key)!r}, now {asked.get(key)!r}" for key in differing]
        raise ValueError("This run was started with another configuration and cannot be resumed:\n" + "\n".join(lines))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Path -> leaf of nested dicts; tuples and lists compare as lists, as JSON has them."""
    if isinstance(tree, Mapping):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): _plain(tree)}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
