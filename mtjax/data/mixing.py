r"""Mixing tasks of different sizes: the share of every task, and whole numbers of draws that keep to it.

    equal          p_t = 1 / T
    proportional   p_t ~ n_t                     as if the data sets were joined
    sqrt           p_t ~ n_t^(1/2)
    temperature    p_t ~ n_t^(1/tau)             tau = 1: proportional; tau -> inf: equal
    annealed       p_t ~ n_t^alpha,  alpha = 1 - (1 - a) (e - 1) / (E - 1)  in epoch e of E;  a = 0.2
    scheduled      given, constant from one step to the next that is named

Shares are kept without chance. If C_t(s) is the sum of a task's shares before step s, times the units that a step takes
(rows of a mixed batch, or one batch), then the units c_t(s) that it was given are whole and

    |c_t(s) - C_t(s)| < 1      for every task and every step,

also where shares change. Draw k of a task may come once C_t > k and must have come when C_t reaches k + 1; serving the
draw that is due first never misses one, since in any stretch of steps there is room for all draws whose whole window
lies in it. (This is the chairman assignment problem, and "proportionate fairness" of schedulers.) `MapDataset.mix` of
Grain rounds a task at a time, so that errors add up over tasks, has no shares of 0, and no shares that change.

References: Raffel et al., "Exploring the limits of transfer learning", JMLR 2020, section 3.5.2 (temperature);
Arivazhagan et al., "Massively multilingual neural machine translation in the wild", 2019 (tau = 5); Stickland & Murray,
"BERT and PALs", ICML 2019, section 4.1 (square root, annealed); Tijdeman, "The chairman assignment problem", Discrete
Mathematics 1980; Baruah et al., "Proportionate progress", Algorithmica 1996.

Letters: T tasks, n_t rows of a task, S pieces of constant shares.
"""

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

Kind = Literal["equal", "proportional", "sqrt", "temperature", "annealed", "scheduled"]
# Sums of shares are rounded: what is this close to a whole number of draws is that number.
CLOSE = 1e-4
BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Shares of tasks as a function of their sizes and the step.

    Attributes:
      kind: see the module.
      temperature: tau, of 'temperature'.
      anneal_to: the exponent in the last epoch, of 'annealed'.
      epochs: E, of 'annealed'; None: those of the stream.
      steps_per_epoch: steps of an epoch, of 'annealed'; None: those of the stream.
      schedule: pairs (first step, shares of the tasks in their order), of 'scheduled'; the first step is 0. Shares are
        normalised and may be 0.

    Raises:
      ValueError: for numbers that are out of range, or a schedule that does not fit.

    >>> Mixing("sqrt").shares([100, 900]).tolist()
    [0.25, 0.75]
    """

    kind: Kind = "proportional"
    temperature: float = 5.0
    anneal_to: float = 0.2
    epochs: int | None = None
    steps_per_epoch: int | None = None
    schedule: tuple[tuple[int, tuple[float, ...]], ...] = ()

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not 0 <= self.anneal_to <= 1:
            raise ValueError(f"anneal_to must lie in [0, 1], got {self.anneal_to}")
        for name in ("epochs", "steps_per_epoch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if bool(self.schedule) != (self.kind == "scheduled"):
            raise ValueError("schedule, pairs of (first step, shares), belongs to kind='scheduled' and to no other")
        schedule = tuple((int(step), tuple(float(share) for share in shares)) for step, shares in self.schedule)
        object.__setattr__(self, "schedule", schedule)
        steps = [step for step, _ in schedule]
        if schedule and (steps[0] != 0 or steps != sorted(set(steps))):
            raise ValueError(f"The first steps of a schedule must begin at 0 and increase, got {steps}")
        for step, shares in schedule:
            if min(shares, default=0) < 0 or not 0 < sum(shares) < np.inf:
                raise ValueError(f"Shares must be >= 0, and one of them > 0, got {shares} from step {step} on")

    def pieces(self, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The shares as a function of the step, by stretches in which they are constant.

        Args:
          sizes: n_t, T numbers.

        Returns:
          First steps i64[S], the first of them 0, and shares f64[S, T].

        Raises:
          ValueError: if a task has no rows, the schedule is one of other tasks, or 'annealed' lacks its epochs.
        """
        sizes = np.asarray(sizes, np.float64)
        if sizes.size == 0 or not (sizes > 0).all():
            raise ValueError(f"Every task must have rows, got the sizes {sizes.astype(int).tolist()}")
        if self.kind == "scheduled":
            wrong = [shares for _, shares in self.schedule if len(shares) != len(sizes)]
            if wrong:
                raise ValueError(f"The schedule holds {wrong[0]}, but there are {len(sizes)} tasks")
            starts = np.array([step for step, _ in self.schedule], np.int64)
            shares = np.array([shares for _, shares in self.schedule])
            return starts, shares / shares.sum(-1, keepdims=True)
        if self.kind == "annealed":
            if self.epochs is None or self.steps_per_epoch is None:
                raise ValueError("kind='annealed' needs epochs and steps_per_epoch: shares depend on both")
            starts = np.arange(self.epochs, dtype=np.int64) * self.steps_per_epoch
            exponents = 1 - (1 - self.anneal_to) * np.arange(self.epochs) / max(self.epochs - 1, 1)
        else:
            starts = np.zeros(1, np.int64)
            fixed = {"equal": 0.0, "proportional": 1.0, "sqrt": 0.5, "temperature": 1 / self.temperature}
            exponents = np.array([fixed[self.kind]])
        # Relative to the largest, so that nothing overflows.
        shares = (sizes / sizes.max())[None, :] ** exponents[:, None]
        return starts, shares / shares.sum(-1, keepdims=True)

    def shares(self, sizes: Sequence[int], step: int = 0) -> np.ndarray:
        """p_t at a step, f64[T]; they sum to 1.

        Args:
          sizes: n_t, T numbers.
          step: from 0.

        Raises:
          ValueError: as `pieces`, or for a negative step.
        """
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        starts, shares = self.pieces(sizes)
        return shares[np.searchsorted(starts, step, side="right") - 1]


class Draws:
    """Units that every task is given before a step: whole numbers that stay within 1 of their shares.

    A function of its arguments alone. Steps are worked out in order, so a start far from 0 costs some 50 us for every
    step before, unless the counts there are given.

    Args:
      starts, shares: of `Mixing.pieces`.
      capacity: units that a step takes.
      seed: decides between tasks whose draws are due at the same step.
      step: where to start; nothing before it can be asked for.
      counts: i64[T], what this class gives for `step`; None: start from 0.

    Raises:
      ValueError: if `counts` is not T numbers whose sum is step * capacity.

    >>> draws = Draws(*Mixing("proportional").pieces([1, 3]), capacity=1)
    >>> [draws.before(step).tolist() for step in (0, 4, 8, 400)]
    [[0, 0], [1, 3], [2, 6], [100, 300]]
    """

    def __init__(
        self,
        starts: np.ndarray,
        shares: np.ndarray,
        capacity: int,
        seed: int = 0,
        *,
        step: int = 0,
        counts: Sequence[int] | None = None,
    ):
        self._starts, self._shares, self._capacity, self._seed = starts, shares, capacity, seed
        units = np.diff(starts)[:, None] * capacity * shares[:-1]
        self._sums = np.concatenate([np.zeros((1, shares.shape[1])), np.cumsum(units, axis=0)])  # C at `starts`
        first = 0 if counts is None else step
        known = np.zeros(shares.shape[1], np.int64) if counts is None else np.asarray(counts, np.int64)
        if known.shape != shares.shape[1:] or known.sum() != first * capacity:
            raise ValueError(
                f"counts must be {shares.shape[1]} numbers with the sum {first * capacity}, got {known.tolist()}"
            )
        self._first, self._lock = first, threading.Lock()
        self._known = [known]  # counts at the first step of every block so far
        self._block = functools.lru_cache(maxsize=8)(self._work_out)

    def before(self, step: int) -> np.ndarray:
        """Units i64[T] of every task before `step`."""
        if step < self._first:
            raise ValueError(f"step must be >= {self._first}, got {step}")
        block, offset = divmod(step - self._first, BLOCK)
        with self._lock:  # threads ask for steps in any order
            while len(self._known) <= block:
                self._known.append(self._block(len(self._known) - 1)[-1])
            return self._block(block)[offset]

    def _work_out(self, block: int) -> np.ndarray:
        """Counts i64[BLOCK + 1, T] of the steps of a block and the first step of the next."""
        counts = [self._known[block]]
        begin = self._first + block * BLOCK
        for step in range(begin, begin + BLOCK):
            counts.append(self._after(step, counts[-1]))
        return np.stack(counts)

    def _after(self, step: int, counts: np.ndarray) -> np.ndarray:
        """Counts before step + 1, from those before `step`."""
        piece = np.searchsorted(self._starts, step + 1, side="right") - 1
        target = self._sums[piece] + (step + 1 - self._starts[piece]) * self._capacity * self._shares[piece]
        # Draws that are due now, then the rest to those that are due first among those that may come already.
        given = np.maximum(np.floor(target + CLOSE).astype(np.int64), counts)
        spare = self._capacity - int((given - counts).sum())
        if spare:
            too_early = target <= given + CLOSE
            chance = np.random.default_rng([self._seed, step]).random(len(given))
            given[np.lexsort((chance, self._reached(given + 1), too_early))[:spare]] += 1
        return given

    def _reached(self, units: np.ndarray) -> np.ndarray:
        """First step before which C_t is `units` or more, f64[T]; inf if there is none."""
        tasks = np.arange(len(units))
        piece = (self._sums < units - CLOSE).sum(0) - 1
        left, rate = units - CLOSE - self._sums[piece, tasks], self._capacity * self._shares[piece, tasks]
        steps = np.divide(left, rate, out=np.full(len(units), np.inf), where=rate > 0)
        return self._starts[piece] + np.ceil(steps)
