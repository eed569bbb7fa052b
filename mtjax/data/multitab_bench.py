r"""MultiTab-Bench: synthetic multitask regression whose task relatedness, difficulty and noise are set by hand.

Every task reads one direction of the same Gaussian input and bends it by a polynomial; the angle between two
directions is how related two tasks are, the degree of the polynomial is how hard a task is:

    U [T, D]: Gram-Schmidt of Gaussian rows            P = Q diag(l) Q^T,  W = Q diag(l)^(1/2) U  =>  W W^T = P
    x ~ N(0, I_D),   s_i = w_i . x ~ N(0, 1),          y_i = sum_{k=1}^{d_i} s_i^k + e_i,  e_i ~ N(0, sigma_i^2)

P is any positive semidefinite matrix with a unit diagonal, or one number p for all pairs (p >= -1/(T-1)).
The relatedness of the *labels* is not P. With He_n the probabilists' Hermite polynomials, E[He_n(s_i) He_m(s_j)] =
n! P_ij^n [n = m], so that for sum_k s^k = sum_n a_n He_n(s)

    Cov(y_i, y_j) = sum_{n >= 1} n! a_{i,n} a_{j,n} P_ij^n + sigma_i^2 [i = j],

which is what `label_covariance` and `label_correlation` compute, for any degrees. Two traps of the published benchmark
follow from it, and a third is in its code:

* Var(y) = 1, 3, 24, 144 for degrees 1 to 4. A sum of raw mean squared errors gives a task of degree 4 the weight of 144
  tasks of degree 1, so "relative complexity" is confounded with loss scale. `standardize=True` removes the closed-form
  mean and variance from the labels; the default keeps them, as published.
* p = 0.4 gives a label correlation of 0.23 between degrees 1 and 2 and of 0.13 between degrees 1 and 4: report
  `label_correlation()` next to p.
* In the reference code validation and test rows *are* the training rows (the second generator receives every attribute
  of the first). Here the three splits are independent draws from the same W.

Beyond the paper a task may be binary (its label above a quantile, or Bernoulli(sigmoid(y / temperature))) or multiclass
(quantile bins). Quantiles are those of the distribution of y, found once on a fixed grid, never of the rows drawn.

Letters: T tasks, D features, n rows, C classes.

>>> bench = MultiTabBench(num_tasks=3, degrees=(1, 2, 4), noise=0.0)
>>> bench.variance().round(3).tolist()
[1.0, 3.0, 144.0]
>>> bench.label_correlation()[0].round(2).tolist()
[1.0, 0.23, 0.13]
>>> bench.sample(jax.random.key(0), 5)["numeric"].shape
(5, 32)

Reference: Sinodinos, Wei, Armanfard, "MultiTab: A Scalable Foundation for Multitask Learning on Tabular Data",
AAAI 2026, arXiv:2511.09970; the Hermite form is Mehler's formula.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.data.encoders import NumericColumn, TabularEncoder, TargetColumn
from mtjax.data.splits import SPLITS
from mtjax.data.tabular import TabularDataset
from mtjax.sharding import on_one_device
from mtjax.tasks import Task

Kind = Literal["regression", "binary", "multiclass"]
Matrix = tuple[tuple[float, ...], ...]

PUBLISHED_DEGREES = (1, 3, 2, 3, 4, 2, 3)
# Streams of a seed: the weights and the three splits never share a key.
_STREAMS = {"weights": 0, "train": 1, "validation": 2, "test": 3}
_BLOCK = 8192


@dataclasses.dataclass(frozen=True)
class MultiTabBench:
    """Configuration of the generator; the defaults are the published benchmark (with 10^6 training rows).

    A field that is "one per task" takes a sequence of T values or a single value for all tasks.

    Attributes:
      num_tasks: T.
      num_features: D >= T.
      correlation: the cosines P between task directions: one p for all pairs, or a [T, T] matrix.
      degrees: polynomial degree, one per task; None repeats the published (1, 3, 2, 3, 4, 2, 3) to T tasks.
      noise: standard deviation sigma of the label noise, in raw label units, one per task.
      kinds: 'regression', 'binary' or 'multiclass', one per task.
      num_classes: C of the multiclass tasks, one per task; classes are equally likely quantile bins.
      binary_rule: 'quantile' labels 1 the rows above the (1 - positive_rate) quantile of y; 'bernoulli' draws the label
        with probability sigmoid(y / temperature).
      positive_rate: share of ones under 'quantile', one per task.
      temperature: of 'bernoulli', in the units of y (standard deviations when `standardize`), one per task.
      standardize: subtract the closed-form mean of y and divide by its closed-form standard deviation.
      seed: of the weights and of the splits that `dataset` draws.

    Raises:
      ValueError: for sizes, correlations or per-task values that cannot be.
    """

    num_tasks: int = 7
    num_features: int = 32
    correlation: float | Matrix = 0.4
    degrees: int | tuple[int, ...] | None = None
    noise: float | tuple[float, ...] = 0.01
    kinds: Kind | tuple[Kind, ...] = "regression"
    num_classes: int | tuple[int, ...] = 5
    binary_rule: Literal["quantile", "bernoulli"] = "quantile"
    positive_rate: float | tuple[float, ...] = 0.5
    temperature: float | tuple[float, ...] = 1.0
    standardize: bool = False
    seed: int = 0

    def __post_init__(self):
        tasks, features = self.num_tasks, self.num_features
        if tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, got {tasks}")
        if features < tasks:
            raise ValueError(
                f"num_features={features} is smaller than num_tasks={tasks}: the task directions are built on T "
                "orthonormal vectors of R^D, so T <= D"
            )
        if self.degrees is None:
            repeats = -(-tasks // len(PUBLISHED_DEGREES))
            object.__setattr__(self, "degrees", (PUBLISHED_DEGREES * repeats)[:tasks])
        for field in ("degrees", "noise", "kinds", "num_classes", "positive_rate", "temperature"):
            object.__setattr__(self, field, _one_per_task(field, getattr(self, field), tasks))
        object.__setattr__(self, "correlation", _checked_correlation(self.correlation, tasks))
        for field, valid, expected in (
            ("degrees", lambda v: v >= 1 and v == int(v), "integers >= 1"),
            ("noise", lambda v: v >= 0, "standard deviations >= 0"),
            ("kinds", lambda v: v in ("regression", "binary", "multiclass"), "regression, binary or multiclass"),
            ("num_classes", lambda v: v >= 2 and v == int(v), "integers >= 2"),
            ("positive_rate", lambda v: 0 < v < 1, "shares strictly between 0 and 1"),
            ("temperature", lambda v: v > 0, "positive numbers"),
        ):
            wrong = [value for value in getattr(self, field) if not valid(value)]
            if wrong:
                raise ValueError(f"{field} holds {wrong[0]!r}; expected {expected}")
        if self.binary_rule not in ("quantile", "bernoulli"):
            raise ValueError(f"binary_rule is {self.binary_rule!r}; expected 'quantile' or 'bernoulli'")

    @property
    def correlation_matrix(self) -> np.ndarray:
        """P, f64[T, T]: the cosines between the task directions."""
        if isinstance(self.correlation, tuple):
            return np.array(self.correlation)
        return np.where(np.eye(self.num_tasks, dtype=bool), 1.0, self.correlation)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The T tasks, named task_0, task_1, ...

        Regression targets carry scaling 'none': they reach the loss as `standardize` left them.
        """
        return tuple(
            Task(f"task_{i}", kind, num_classes=self.num_classes[i] if kind == "multiclass" else None, scaling="none")
            for i, kind in enumerate(self.kinds)
        )

    # --- closed forms of y before any thresholding --------------------------------------------------------------

    def mean(self) -> np.ndarray:
        """E[y], f64[T], in raw units: the zeroth Hermite coefficient."""
        return np.array([hermite_coefficients(degree)[0] for degree in self.degrees])

    def label_covariance(self) -> np.ndarray:
        """Cov(y_i, y_j), f64[T, T], in raw units, noise included (module docstring)."""
        size = max(self.degrees) + 1
        coefficients = np.stack([_padded(hermite_coefficients(degree), size) for degree in self.degrees])
        factorials = np.array([math.factorial(n) for n in range(size)], np.float64)
        # 0 ** 0 = 1 in numpy, so unrelated tasks need no special case; n = 0 is the mean and is left out.
        powers = self.correlation_matrix[:, :, None] ** np.arange(size)
        scaled = coefficients * np.sqrt(factorials)
        covariance = np.einsum("in,jn,ijn->ij", scaled[:, 1:], scaled[:, 1:], powers[:, :, 1:])
        return covariance + np.diag(np.square(self.noise))

    def variance(self) -> np.ndarray:
        """Var(y), f64[T], in raw units: 1, 3, 24, 144 for degrees 1 to 4, plus the noise variance."""
        return np.diag(self.label_covariance()).copy()

    def label_correlation(self) -> np.ndarray:
        """Corr(y_i, y_j), f64[T, T]; for binary and multiclass tasks that of the y behind the label."""
        deviation = np.sqrt(self.variance())
        return self.label_covariance() / np.outer(deviation, deviation)

    # --- draws ------------------------------------------------------------------------------------------------

    def weights(self, key: jax.Array | None = None) -> jax.Array:
        """Draws the task directions W, f32[T, D], with W W^T = P.

        Args:
          key: random key; by default the one of the configured seed.
        """
        key = stream(self.seed, "weights") if key is None else key
        orthonormal = orthonormal_rows(key, self.num_tasks, self.num_features)
        values, vectors = np.linalg.eigh(self.correlation_matrix)
        root = vectors * np.sqrt(np.clip(values, 0.0, None))
        return jnp.matmul(jnp.asarray(root, jnp.float32), orthonormal, precision=jax.lax.Precision.HIGHEST)

    def sample(self, key: jax.Array, n: int, weights: jax.Array | None = None) -> dict[str, Any]:
        """Draws n labelled rows; pure, so it can be jitted (static n), vmapped over keys and run inside a train step.

        Args:
          key: random key of this draw.
          n: number of rows.
          weights: W f32[T, D]; by default `self.weights()`, those of the configured seed.

        Returns:
          A batch: 'categorical' i32[n, 0], 'numeric' f32[n, D], 'labels' {task: f32[n]}.
        """
        weights = self.weights() if weights is None else weights
        key_normal, key_label = jax.random.split(key)
        # Inputs and noise are parts of one draw: random bits are the dearest part to compile.
        normal = jax.random.normal(key_normal, (n, self.num_features + self.num_tasks), jnp.float32)
        x, noise = normal[:, : self.num_features], normal[:, self.num_features :]
        s = jnp.matmul(x, weights.T, precision=jax.lax.Precision.HIGHEST)
        y = _polynomial(s, self.degrees) + _row(self.noise) * noise
        if self.standardize:
            y = (y - _row(self.mean())) / _row(np.sqrt(self.variance()))
        labels = self._labels(key_label, y)
        return {
            "categorical": jnp.zeros((n, 0), jnp.int32),
            "numeric": x,
            "labels": {task.name: labels[:, i] for i, task in enumerate(self.tasks)},
        }

    def dataset(self, train: int = 1_000_000, validation: int = 100_000, test: int = 100_000) -> TabularDataset:
        """Draws three independent splits with the weights of the configured seed.

        Args:
          train: number of training rows; the published benchmark has 10^6.
          validation: number of validation rows.
          test: number of test rows.

        Returns:
          The data set; inputs are used as drawn (they are standard normal), so its encoder is the identity.
        """
        weights = self.weights()
        return synthetic_dataset(
            lambda key, n: self.sample(key, n, weights),
            self.tasks,
            self.num_features,
            self.seed,
            (train, validation, test),
        )

    def thresholds(self) -> tuple[np.ndarray, ...]:
        """Cut points of every task, in the units of y that `sample` uses; empty where the label is not cut."""
        cuts = []
        for i, kind in enumerate(self.kinds):
            if kind == "multiclass":
                levels = tuple(k / self.num_classes[i] for k in range(1, self.num_classes[i]))
            elif kind == "binary" and self.binary_rule == "quantile":
                levels = (1.0 - self.positive_rate[i],)
            else:
                levels = ()
            cuts.append(np.array(label_quantiles(self.degrees[i], self.noise[i], levels)))
        if self.standardize:
            deviation = np.sqrt(self.variance())
            cuts = [(cut - mean) / scale for cut, mean, scale in zip(cuts, self.mean(), deviation, strict=True)]
        return tuple(cuts)

    def _labels(self, key: jax.Array, y: jax.Array) -> jax.Array:
        """y f32[n, T] -> labels f32[n, T]: the class where the task is cut, a Bernoulli draw, or y itself."""
        cuts = self.thresholds()
        width = max((cut.size for cut in cuts), default=0)
        table = np.stack([_padded(cut, width, np.inf) for cut in cuts]).astype(np.float32)
        is_cut = np.array([[cut.size > 0 for cut in cuts]])
        labels = jnp.where(is_cut, (y[:, :, None] > table[None]).sum(-1), y)
        if self.binary_rule == "bernoulli" and "binary" in self.kinds:
            drawn = jax.random.bernoulli(key, jax.nn.sigmoid(y / _row(self.temperature)))
            labels = jnp.where(np.array([self.kinds]) == "binary", drawn, labels)
        return labels.astype(jnp.float32)


def stream(seed: int, name: str) -> jax.Array:
    """The random key of 'weights', 'train', 'validation' or 'test' under a seed."""
    return jax.random.fold_in(jax.random.key(seed), _STREAMS[name])


def orthonormal_rows(key: jax.Array, rows: int, size: int) -> jax.Array:
    """Gram-Schmidt of Gaussian vectors: f32[rows, size] with orthonormal rows, uniformly distributed."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (size, rows), jnp.float32))
    # QR with a positive diagonal in R is the Gram-Schmidt process of the columns.
    return (q * jnp.sign(jnp.diagonal(r))[None, :]).T


def synthetic_dataset(
    sample: Callable[[jax.Array, int], dict[str, Any]],
    tasks: tuple[Task, ...],
    num_features: int,
    seed: int,
    rows: tuple[int, int, int],
) -> TabularDataset:
    """One independent draw per split of a generator with standard normal inputs.

    Rows are drawn in blocks of a fixed size: one compilation serves all splits, and a larger split begins with the rows
    of a smaller one.

    Args:
      sample: `(key, n) -> batch` of n rows.
      tasks: the tasks of the batch's labels.
      num_features: D, the number of numeric inputs.
      seed: of the three keys.
      rows: training, validation and test rows.

    Returns:
      The data set; its encoder passes features x_0, x_1, ... on as they are.

    Raises:
      ValueError: if a split would be empty.
    """
    batches, positions, first = {}, {}, 0
    draw = jax.jit(lambda key: sample(key, _BLOCK))
    for name, n in zip(SPLITS, rows, strict=True):
        if n < 1:
            raise ValueError(f"The {name} split needs at least one row, got {name}={n}")
        with on_one_device():
            blocks = [jax.device_get(draw(jax.random.fold_in(stream(seed, name), i))) for i in range(-(-n // _BLOCK))]
        batches[name] = jax.tree.map(lambda *parts, n=n: np.concatenate(parts)[:n], *blocks)
        positions[name] = np.arange(first, first + n)
        first += n
    encoder = TabularEncoder(
        categorical=(),
        numeric=tuple(NumericColumn(f"x_{i}", mean=0.0, scale=1.0) for i in range(num_features)),
        targets=tuple(TargetColumn(task.name, task.name, task.kind, _class_names(task)) for task in tasks),
    )
    return TabularDataset(encoder, tasks, **batches, rows=positions, notes=[])


def _class_names(task: Task) -> tuple[str, ...]:
    classes = {"binary": 2, "multiclass": task.num_classes}.get(task.kind, 0)
    return tuple(str(i) for i in range(classes))


@functools.lru_cache
def hermite_coefficients(degree: int) -> tuple[float, ...]:
    """Coefficients a_0, ..., a_d of sum_{k=1}^{d} s^k in the probabilists' Hermite polynomials.

    >>> hermite_coefficients(4)
    (4.0, 4.0, 7.0, 1.0, 1.0)
    """
    power_series = np.ones(degree + 1)
    power_series[0] = 0.0
    return tuple(np.polynomial.hermite_e.poly2herme(power_series).tolist())


@functools.lru_cache
def label_quantiles(degree: int, noise: float, levels: tuple[float, ...]) -> tuple[float, ...]:
    """Quantiles of y = sum_{k=1}^{d} s^k + e, with s ~ N(0, 1) and e ~ N(0, noise^2), in raw units.

    They are read off a fixed grid of equally likely (s, e) pairs, so they depend on no random draw: 2^14 Gaussian
    quantiles of s times 33 of e leave an error below 10^-3 standard deviations for levels within [0.01, 0.99].

    >>> round(label_quantiles(1, 0.0, (0.975,))[0], 2)
    1.96
    """
    if not levels:
        return ()
    s = _gaussian_quantiles(2**14)
    e = noise * _gaussian_quantiles(33 if noise > 0 else 1)
    y = np.polynomial.polynomial.polyval(s, np.r_[0.0, np.ones(degree)])
    return tuple(np.quantile((y[:, None] + e).ravel(), levels).tolist())


@functools.lru_cache
def _gaussian_quantiles(size: int) -> np.ndarray:
    """The midpoints of `size` equally likely slices of N(0, 1)."""
    inverse = statistics.NormalDist().inv_cdf
    return np.array([inverse((i + 0.5) / size) for i in range(size)])


def _polynomial(s: jax.Array, degrees: Sequence[int]) -> jax.Array:
    """sum_{k=1}^{d_i} s_i^k for all tasks at once, s f32[n, T], by Horner's rule with the terms above d_i masked."""
    total = jnp.zeros_like(s)
    for k in range(max(degrees), 0, -1):
        total = (total + _row([k <= degree for degree in degrees])) * s
    return total


def _row(values: Any) -> np.ndarray:
    """T values as f32[1, T]."""
    return np.asarray(values, np.float32)[None, :]


def _padded(values: Sequence[float], size: int, fill: float = 0.0) -> np.ndarray:
    return np.r_[np.asarray(values, np.float64), np.full(size - len(values), fill)]


def _one_per_task(field: str, value: Any, tasks: int) -> tuple:
    """A single value repeated for all tasks, or the T given ones."""
    if isinstance(value, str) or np.ndim(value) == 0:
        return (value,) * tasks
    if len(value) != tasks:
        raise ValueError(f"{field} has {len(value)} values but num_tasks={tasks}; give one value or one per task")
    # Plain Python numbers keep the configuration hashable and writable as JSON.
    return tuple(v.item() if isinstance(v, np.generic) else v for v in value)


def _checked_correlation(correlation: Any, tasks: int) -> float | Matrix:
    """Correlation as a float or a nested tuple, after checking that it is one of unit vectors."""
    matrix = np.asarray(correlation, np.float64)
    if matrix.ndim == 0:
        lowest = -1.0 / (tasks - 1) if tasks > 1 else -1.0
        if not lowest - 1e-12 <= matrix <= 1.0:
            raise ValueError(
                f"correlation={float(matrix):g} is impossible for num_tasks={tasks}: all pairs of T unit vectors can "
                f"share a cosine only between -1/(T-1) = {lowest:.4g} and 1"
            )
        return float(matrix)
    if matrix.shape != (tasks, tasks):
        raise ValueError(f"correlation has shape {matrix.shape}; expected a number or a [{tasks}, {tasks}] matrix")
    if not np.allclose(matrix, matrix.T, atol=1e-6):
        raise ValueError("correlation is not symmetric: P_ij is the cosine between the directions of tasks i and j")
    if not np.allclose(np.diag(matrix), 1.0, atol=1e-6):
        raise ValueError(f"correlation has the diagonal {np.diag(matrix).round(4).tolist()}; expected ones")
    smallest = np.linalg.eigvalsh(matrix).min()
    if smallest < -1e-6:
        raise ValueError(
            f"correlation is not positive semidefinite (smallest eigenvalue {smallest:.4g}): no unit vectors have "
            "these cosines"
        )
    return tuple(tuple(row) for row in matrix.tolist())
