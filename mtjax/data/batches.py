"""Shuffled batches of rows that are in memory, as a pure function of (seed, epoch).

A batch is a row of indices into arrays that already lie on the device. The order of an epoch depends on the seed and
the number of the epoch alone, so the position of a run is two integers: a resumed run sees the rows it would have seen.

Letters: N rows, B batch, S seeds.

>>> order = ShuffledRows(num_rows=5, batch_size=2)
>>> order.steps_per_epoch, order.epoch_indices([0, 1], epoch=0).shape
(2, (2, 2, 2))
"""

import dataclasses
import functools
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


class LaneBatches:
    """Batches of several runs, step by step: each lane has its own order, and possibly its own rows.

    Attributes:
      batch_size: B; reduced to the number of rows if that is smaller.
      steps_per_epoch: of every lane.

    >>> batches = LaneBatches(6, 2, seeds=(0, 0), lane_rows=np.array([[0, 1, 2], [3, 4, 5]]))
    >>> batches.steps_per_epoch, (batches.take(0, 3)[1] >= 3).all().item()
    (1, True)
    """

    def __init__(self, num_rows: int, batch_size: int, seeds: tuple[int, ...], lane_rows: np.ndarray | None = None):
        """Batches of `batch_size` of `num_rows` rows, or of the rows `lane_rows` i[L, n] of each lane.

        Raises:
          ValueError: if `lane_rows` is not one array of rows per seed, or names a row that is not there.
        """
        if lane_rows is not None:
            lane_rows = np.asarray(lane_rows)
            if lane_rows.ndim != 2 or len(lane_rows) != len(seeds):
                raise ValueError(f"lane_rows must have shape [{len(seeds)}, n] (one per seed), got {lane_rows.shape}")
            if lane_rows.size and not 0 <= lane_rows.min() <= lane_rows.max() < num_rows:
                raise ValueError(f"lane_rows must lie in [0, {num_rows}), got {lane_rows.min()} to {lane_rows.max()}")
        order = ShuffledRows(num_rows if lane_rows is None else lane_rows.shape[1], batch_size)
        self.batch_size, self.steps_per_epoch = order.batch_size, order.steps_per_epoch

        # An epoch is drawn once; a dispatch may need the end of one and the beginning of the next.
        @functools.lru_cache(maxsize=2)
        def of_epoch(epoch):
            indices = order.epoch_indices(seeds, epoch)
            if lane_rows is None:
                return indices
            return np.stack([rows[i] for rows, i in zip(lane_rows, indices, strict=True)]).astype(np.int32)

        self._of_epoch = of_epoch

    def take(self, step: int, count: int) -> np.ndarray:
        """Row numbers i32[L, count, B] of the steps from `step` on."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(step, self.steps_per_epoch)
            pieces.append(self._of_epoch(epoch)[:, offset : offset + count])
            step, count = step + pieces[-1].shape[1], count - pieces[-1].shape[1]
        return np.concatenate(pieces, axis=1)
