"""Shuffled batches of rows that are in memory, as a pure function of (seed, epoch).

A batch is a row of indices into arrays that already lie on the device. The order of an epoch depends on the seed and
the number of the epoch alone, so the position of a run is two integers: a resumed run sees the rows it would have seen.

Letters: N rows, B batch, S seeds.

>>> order = ShuffledRows(num_rows=5, batch_size=2)
>>> order.steps_per_epoch, order.epoch_indices([0, 1], epoch=0).shape
(2, (2, 2, 2))
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class ShuffledRows:
    """Every epoch visits the rows in a new order; the last N mod B rows of an order are left out.

    Attributes:
      num_rows: N.
      batch_size: B; reduced to N if it is larger.
    """

    num_rows: int
    batch_size: int

    def __post_init__(self):
        if self.num_rows < 1:
            raise ValueError("There are no training rows")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")
        object.__setattr__(self, "batch_size", min(self.batch_size, self.num_rows))

    @property
    def steps_per_epoch(self) -> int:
        """floor(N / B)."""
        return self.num_rows // self.batch_size

    def epoch_indices(self, seeds: Sequence[int], epoch: int) -> np.ndarray:
        """Row numbers i32[S, steps_per_epoch, B] of an epoch, one order for each seed."""
        used = self.steps_per_epoch * self.batch_size
        orders = [np.random.default_rng([seed, epoch]).permutation(self.num_rows)[:used] for seed in seeds]
        return np.stack(orders).astype(np.int32).reshape(len(seeds), self.steps_per_epoch, self.batch_size)
