r"""Reaction-diffusion equations of Fisher's type in one dimension: one equation per source term, one code per equation.

    u_t = D u_xx + f(u),   x periodic on [0, L),   0 <= t <= T,   u(0, x) = u_0(x) in (0, 1)

| form | f(u)                      | code: coefficients of u, u^2, u^3, u^4                     |
|------|---------------------------|------------------------------------------------------------|
| F1   | a u (1 - u)               | a [1, -1, 0, 0]                                            |
| F2   | a u (1 - u^2)             | a [1, 0, -1, 0]                                            |
| F4   | a u (1 - u) e^{-b(1 - u)} | a e^{-b} [1, b - 1, b (b / 2 - 1), -b^2 / 2]               |

The code is what an operator network reads as the description of its task. F4 is solved as it stands; its code is the
polynomial that comes of the Taylor expansion e^{bu} = 1 + bu + (bu)^2 / 2 (the published choice), so it describes the
equation to second order only. The three are instances of a `Form`, f(u) = a P(u) e^{-b(1 - u)} with a polynomial P and,
where it is not damped, b = 0; others can be put beside them, and `solve` takes any polynomial as its code.

The solver is Fourier's in space and fourth-order exponential time differencing (ETDRK4): with u^ the transform of u,
L = -D k^2 and N(u^) the transform of f(u), diffusion is exact and only f is approximated. The coefficients, such as
(e^{Lh} - 1) / L, cancel for small Lh and are means over a circle around it, in float64, once.

The paper's D, T, boundary conditions and law of u_0 are not published; those of `FisherConfig` are ours. Initial fields
are sigmoids of periodic Gaussian random fields. Every instance has an initial field of its own, so none of the training
rows is met in validation or test (in the published split the few fields of the data set may well be).

>>> config = FisherConfig(num_nodes=16, num_times=3)
>>> data = generate(config, seed=0, train_per_form=2, validation_per_form=1, test_per_form=1)
>>> {name: value.shape for name, value in data["train"]["inputs"].items()}
{'code': (6, 4), 'initial': (6, 16)}
>>> data["train"]["points"].shape, data["train"]["values"].shape, data["train"]["task"].tolist()
((48, 2), (6, 48), [0, 0, 1, 1, 2, 2])

Letters: B functions, X nodes, S output times, N = S X points, q coefficients of a code.

References: Kumar, Goswami, Kontolati, Shields, Karniadakis, "Synergistic Learning with Multi-Task DeepONet for
Efficient PDE Problem Solving", Neural Networks 184, 2025, arXiv:2408.02198 (forms and codes); Cox and Matthews,
"Exponential time differencing for stiff systems", J. Comput. Phys. 176, 2002, eqs. (26)-(29), and Kassam and Trefethen,
"Fourth-order time-stepping for stiff PDEs", SIAM J. Sci. Comput. 26, 2005, eq. (2.5) (ETDRK4 and its contour means).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.data.pde import store
from mtjax.data.pde.gaussian_process import Kernel, spectral

# Streams of a seed: the splits never share a key.
_STREAMS = {"train": 0, "validation": 1, "test": 2}
# Instances of a call: enough to fill two cores, few enough that a step's arrays stay in the cache.
_CHUNK = 256
_CONTOUR_POINTS = 64


@dataclasses.dataclass(frozen=True)
class Form:
    """A source term f(u) = a P(u) e^{-b (1 - u)}, b = 0 unless it is damped.

    Attributes:
      name: of the task.
      pattern: coefficients of u, u^2, ... in P.
      damped: whether the exponential is there; its code then has two coefficients more than the pattern.
    """

    name: str
    pattern: tuple[float, ...]
    damped: bool = False

    def __post_init__(self):
        object.__setattr__(self, "pattern", tuple(float(c) for c in self.pattern))
        if not self.pattern or not np.isfinite(self.pattern).all():
            raise ValueError(f"pattern={self.pattern} of form {self.name!r} must be finite coefficients of u, u^2, ...")

    @property
    def degree(self) -> int:
        """Number of coefficients of the code."""
        return len(self.pattern) + 2 * self.damped

    def code(self, a: np.ndarray, b: np.ndarray, *, size: int) -> np.ndarray:
        """Codes f[B, size] of strengths a f[B] and dampings b f[B], filled up with zeros.

        >>> Form("F4", (1, -1), damped=True).code(np.ones(1), np.zeros(1), size=4).tolist()
        [[1.0, -1.0, 0.0, 0.0]]
        """
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        taylor = np.stack([np.ones_like(b), b, 0.5 * b**2], -1) if self.damped else np.ones((*b.shape, 1))
        code = np.zeros((*a.shape, size))
        for shift, coefficient in enumerate(self.pattern):
            code[..., shift : shift + taylor.shape[-1]] += coefficient * taylor
        return (a * np.exp(-b) if self.damped else a)[..., None] * code


F1 = Form("F1", (1, -1))
F2 = Form("F2", (1, 0, -1))
F4 = Form("F4", (1, -1), damped=True)
INITIAL = Kernel("squared_exponential", length=0.1, std=1.5, period=1.0)


@dataclasses.dataclass(frozen=True)
class FisherConfig:
    """Equation, grid, solver and laws of the random inputs.

    Attributes:
      forms: the source terms, in the order of the task index.
      diffusion: D > 0, in units of length^2 / time.
      horizon: T > 0.
      length: L > 0, the period.
      num_nodes: X, at x_j = L j / X.
      num_times: S >= 2, at t_i = T i / (S - 1): the first is the initial field.
      substeps: steps of the solver between two output times.
      strength: range of a, drawn uniformly.
      damping: range of b, drawn uniformly for damped forms.
      kernel: covariance of the Gaussian field g on the circle of length L; u_0 = 1 / (1 + e^{-g}).

    Raises:
      ValueError: for values that cannot be.
    """

    forms: tuple[Form, ...] = (F1, F2, F4)
    diffusion: float = 1e-3
    horizon: float = 4.0
    length: float = 1.0
    num_nodes: int = 64
    num_times: int = 20
    substeps: int = 2
    strength: tuple[float, float] = (0.1, 1.0)
    damping: tuple[float, float] = (0.5, 2.0)
    kernel: Kernel = INITIAL

    # The version of the numbers: raised whenever the same fields come to mean other data.
    version = 1

    def __post_init__(self):
        object.__setattr__(self, "forms", tuple(self.forms))
        names = [form.name for form in self.forms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"forms must be at least one and have different names, got {names}")
        for field in ("diffusion", "horizon", "length"):
            value = getattr(self, field)
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{field} must be positive and finite, got {value}")
        for field, least in (("num_nodes", 8), ("num_times", 2), ("substeps", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")
        for field in ("strength", "damping"):
            value = tuple(getattr(self, field))
            if len(value) != 2 or not np.isfinite(value).all() or not value[0] <= value[1]:
                raise ValueError(f"{field} must be a range (low, high), got {value}")
        if self.kernel.period != self.length:
            raise ValueError(
                f"The kernel's period {self.kernel.period} must be length={self.length}: initial fields are periodic"
            )

    @property
    def code_size(self) -> int:
        """q: 4, or more if a form needs more."""
        return max(4, *(form.degree for form in self.forms))

    def points(self) -> np.ndarray:
        """Query points f32[N, 2], (t / T, x / L), each in [0, 1], nodes running fastest."""
        t, x = np.linspace(0, 1, self.num_times), np.arange(self.num_nodes) / self.num_nodes
        return np.stack(np.meshgrid(t, x, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)


class Coefficients(NamedTuple):
    """ETDRK4 for a step h, with z = L h and f[X // 2 + 1] each.

    Attributes:
      whole: e^z.
      half: e^{z / 2}.
      stage: h (e^{z / 2} - 1) / z.
      first: h (-4 - z + e^z (4 - 3 z + z^2)) / z^3.
      middle: 2 h (2 + z + e^z (z - 2)) / z^3, the factor 2 included.
      last: h (-4 - 3 z - z^2 + e^z (4 - z)) / z^3.
    """

    whole: np.ndarray
    half: np.ndarray
    stage: np.ndarray
    first: np.ndarray
    middle: np.ndarray
    last: np.ndarray


def etdrk4_coefficients(linear: np.ndarray, step: float) -> Coefficients:
    """Coefficients of ETDRK4 for a diagonal linear part f[n] and a step, float64.

    The divided differences are entire functions of z; each is the mean of its values on a unit circle around z, where
    nothing cancels. With real z the upper half circle is enough.

    Reference: Kassam and Trefethen 2005, section 2.
    """
    z = step * np.asarray(linear, np.float64)
    circle = np.exp(1j * np.pi * (np.arange(_CONTOUR_POINTS) + 0.5) / _CONTOUR_POINTS)
    r = z[:, None] + circle[None, :]
    e = np.exp(r)

    def mean(values):
        return step * values.mean(-1).real

    return Coefficients(
        whole=np.exp(z),
        half=np.exp(z / 2),
        stage=mean((np.exp(r / 2) - 1) / r),
        first=mean((-4 - r + e * (4 - 3 * r + r**2)) / r**3),
        middle=mean(2 * (2 + r + e * (r - 2)) / r**3),
        last=mean((-4 - 3 * r - r**2 + e * (4 - r)) / r**3),
    )


def source(u: jax.Array, coefficients: jax.Array, damping: jax.Array) -> jax.Array:
    """f(u) = (c_1 u + ... + c_q u^q) e^{-b (1 - u)} for u f[B, X], coefficients f[B, q], b f[B]."""
    value = jnp.zeros_like(u)
    for power in reversed(range(coefficients.shape[-1])):
        value = (value + coefficients[:, power, None]) * u
    return value * jnp.exp(damping[:, None] * (u - 1.0))


def solve(
    initial: np.ndarray,
    coefficients: np.ndarray,
    *,
    damping: np.ndarray | None = None,
    config: FisherConfig | None = None,
    dtype: Any = np.float32,
) -> np.ndarray:
    """Solves u_t = D u_xx + (c_1 u + ... + c_q u^q) e^{-b(1 - u)} for B initial fields, each with a source of its own.

    Args:
      initial: f[B, X], values at x_j = L j / X; X need not be the config's.
      coefficients: f[B, q], or f[q] for all functions: of u, u^2, ..., any q >= 1. For the forms F1 and F2 this is the
        code.
      damping: b f[B]; None: 0, a polynomial source.
      config: D, T, L, output times and substeps; None: the default.
      dtype: float32, or float64 where JAX is allowed it.

    Returns:
      u [B, S, X] at t_i = T i / (S - 1); the first is `initial`.

    Raises:
      ValueError: for arrays of wrong shapes, numbers that are not finite, or a solution that leaves all bounds (the
        source blows up in finite time, or the step is too long for it).
    """
    config = FisherConfig() if config is None else config
    initial = np.asarray(initial, dtype)
    if initial.ndim != 2 or not initial.size:
        raise ValueError(f"initial must have the shape [functions, nodes], got {initial.shape}")
    coefficients = np.asarray(coefficients, dtype)
    if coefficients.ndim == 1:
        coefficients = np.broadcast_to(coefficients, (len(initial), len(coefficients)))
    if coefficients.ndim != 2 or len(coefficients) != len(initial) or not coefficients.shape[1]:
        raise ValueError(
            f"coefficients must have the shape [{len(initial)}, q] (one row per initial field) or [q], got "
            f"{coefficients.shape}"
        )
    damping = np.zeros(len(initial), dtype) if damping is None else np.asarray(damping, dtype)
    if damping.shape != initial.shape[:1]:
        raise ValueError(f"damping must have the shape [{len(initial)}], got {damping.shape}")
    for name, array in (("initial", initial), ("coefficients", coefficients), ("damping", damping)):
        if not np.isfinite(array).all():
            row = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))[0]
            raise ValueError(f"{name} has a value that is not finite in row {row}")
    linear, step = _linear(config, initial.shape[1])
    solution = np.asarray(
        _integrate(
            initial,
            coefficients,
            damping,
            jax.tree.map(lambda c: c.astype(dtype), etdrk4_coefficients(linear, step)),
            num_outputs=config.num_times - 1,
            substeps=config.substeps,
        )
    )
    if not np.isfinite(solution).all():
        row = np.flatnonzero(~np.isfinite(solution).all((1, 2)))[0]
        raise ValueError(
            f"The solution of row {row} is not finite: its source {coefficients[row].tolist()} blows up before "
            f"t={config.horizon:g}, or needs more than substeps={config.substeps}"
        )
    return solution


def _linear(config: FisherConfig, num_nodes: int) -> tuple[np.ndarray, float]:
    """-D k^2 of the real transform's modes, and the solver's step."""
    wave_numbers = 2 * np.pi * np.arange(num_nodes // 2 + 1) / config.length
    return -config.diffusion * wave_numbers**2, config.horizon / ((config.num_times - 1) * config.substeps)


@functools.partial(jax.jit, static_argnames=("num_outputs", "substeps"))
def _integrate(initial, coefficients, damping, etd: Coefficients, *, num_outputs: int, substeps: int) -> jax.Array:
    num_nodes = initial.shape[1]
    etd = Coefficients(*(c[None, :] for c in etd))

    def nonlinear(spectrum):
        return jnp.fft.rfft(source(jnp.fft.irfft(spectrum, num_nodes), coefficients, damping))

    def step(v, _):
        at_v = nonlinear(v)
        a = etd.half * v + etd.stage * at_v
        at_a = nonlinear(a)
        b = etd.half * v + etd.stage * at_a
        at_b = nonlinear(b)
        c = etd.half * a + etd.stage * (2.0 * at_b - at_v)
        return etd.whole * v + etd.first * at_v + etd.middle * (at_a + at_b) + etd.last * nonlinear(c), None

    def interval(v, _):
        v, _ = jax.lax.scan(step, v, None, length=substeps)
        return v, jnp.fft.irfft(v, num_nodes)

    _, later = jax.lax.scan(interval, jnp.fft.rfft(initial), None, length=num_outputs)
    return jnp.concatenate([initial[:, None], jnp.moveaxis(later, 0, 1)], axis=1)


def generate(
    config: FisherConfig | None = None,
    *,
    seed: int = 0,
    train_per_form: int = 100,
    validation_per_form: int = 50,
    test_per_form: int = 200,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """A data set with the same number of instances of every form in each split.

    Row i of a form in a split depends on the seed, the split, the position of the form and i only: a small training set
    is the beginning of a larger one.

    Args:
      config: the equation and the laws of its random inputs; None: the default.
      seed: of everything random.
      train_per_form, validation_per_form, test_per_form: instances of each form.
      progress: called with (done, total) instances.

    Returns:
      For 'train', 'validation' and 'test' the columns of an operator batch, in physical units, forms one after the
      other:
        'inputs'      {'code': f32[B, q], 'initial': f32[B, X]}
        'points'      f32[N, 2], (t / T, x / L)
        'values'      f32[B, N], u with the nodes running fastest
        'task'        i32[B], position in config.forms
        'parameters'  {'a': f32[B], 'b': f32[B]}; b = 0 where the form is not damped

    Raises:
      ValueError: for a negative number of instances, no training instance, or a form whose solution blows up.
    """
    config = FisherConfig() if config is None else config
    sizes = dict(zip(_STREAMS, (train_per_form, validation_per_form, test_per_form), strict=True))
    if train_per_form < 1 or min(sizes.values()) < 0:
        raise ValueError(f"Instances per form must not be negative and at least 1 to train, got {sizes}")
    total, done = sum(sizes.values()) * len(config.forms), 0
    data = {}
    for split, size in sizes.items():
        parts = []
        for task, form in enumerate(config.forms):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STREAMS[split]), task)
            for start in range(0, size, _CHUNK):
                rows = min(_CHUNK, size - start)
                # Always a whole chunk, so that there is one program for all sizes.
                parts.append([column[:rows] for column in _instances(config, form, key, start)])
                done += rows
                if progress is not None:
                    progress(done, total)
        tasks = np.repeat(np.arange(len(config.forms), dtype=np.int32), size)
        empty = (config.code_size,), (config.num_nodes,), (config.num_times * config.num_nodes,), (), ()
        code, initial, values, a, b = (
            [np.concatenate(column) for column in zip(*parts, strict=True)]
            if parts
            else [np.zeros((0, *shape), np.float32) for shape in empty]
        )
        data[split] = {
            "inputs": {"code": code, "initial": initial},
            "points": config.points(),
            "values": values,
            "task": tasks,
            "parameters": {"a": a, "b": b},
        }
    return data


def _instances(config: FisherConfig, form: Form, key: jax.Array, start: int) -> tuple[np.ndarray, ...]:
    """Code, initial field, values, a and b of instances `start` to `start + _CHUNK` of a form."""
    initial, uniform = (np.asarray(part) for part in _draw(key, np.int32(start), config.kernel, config.num_nodes))
    a, b = (low + (high - low) * u for (low, high), u in zip((config.strength, config.damping), uniform.T, strict=True))
    a, b = a.astype(np.float32), (b if form.damped else 0.0 * b).astype(np.float32)
    pattern = np.zeros(config.code_size)
    pattern[: len(form.pattern)] = form.pattern
    values = solve(initial, a[:, None] * pattern[None, :], damping=b, config=config)
    code = form.code(a, b, size=config.code_size).astype(np.float32)
    return code, initial, values.reshape(len(values), -1), a, b


@functools.partial(jax.jit, static_argnames=("kernel", "num_nodes"))
def _draw(key: jax.Array, start: jax.Array, kernel: Kernel, num_nodes: int) -> tuple[jax.Array, jax.Array]:
    """Initial fields f[_CHUNK, X] in (0, 1) and uniform numbers f[_CHUNK, 2], a key per instance."""
    field = spectral(kernel, (num_nodes,))

    def one(index):
        own = jax.random.fold_in(key, index)
        return jax.nn.sigmoid(field(jax.random.fold_in(own, 0))), jax.random.uniform(jax.random.fold_in(own, 1), (2,))

    return jax.vmap(one)(start + jnp.arange(_CHUNK))


@dataclasses.dataclass(frozen=True)
class _Request:
    """What determines a stored data set."""

    config: FisherConfig
    seed: int
    train_per_form: int
    validation_per_form: int
    test_per_form: int


def load(
    config: FisherConfig | None = None,
    *,
    seed: int = 0,
    train_per_form: int = 100,
    validation_per_form: int = 50,
    test_per_form: int = 200,
    folder: Any = None,
) -> dict[str, dict[str, Any]]:
    """`generate`, kept on disk by `store.cached` (`folder`: see there)."""
    config = FisherConfig() if config is None else config
    request = _Request(config, seed, train_per_form, validation_per_form, test_per_form)
    arguments = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    return store.cached("fisher", request, lambda progress: generate(**arguments, progress=progress), folder=folder)
