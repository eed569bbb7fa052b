r"""Scalarizations with a preference: which point of the Pareto front is wanted.

Each is a function of the losses and a preference r, a vector of K numbers >= 0, usually of sum 1:

* Tchebycheff            max_k r_k (L_k - z_k)
* smooth Tchebycheff     mu log sum_k exp( r_k (L_k - z_k) / mu )
* COSMOS                 r . L - lambda cos(r, L)
* PBI                    d1 + theta d2: lengths of L - z along r, and across it

`*_value` are these functions, (losses, preference) -> scalar: differentiable, without NaN where they have a kink, and
fit for `jax.vmap` over preferences. The methods of the same names weigh by the gradient, w_k = d value / d L_k: one
backward pass, and method(s J) = s method(J) for every s > 0 at given losses.

Letters: K tasks; L_k the loss of task k; z_k the best (ideal) value of L_k.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.optim.base import Method, Weighting, from_weighting
from mtjax.optim.scalarization import count, non_negative, settle, solved

Vector = jax.Array | np.ndarray | Sequence[float]


def _arguments(losses, preference, reference, where):
    """L - z, r (default 1/K) and the mask, as f[K], f[K], bool[K]; zeros for tasks that are left out."""
    losses = jnp.asarray(losses)
    where = jnp.ones(losses.shape, bool) if where is None else where
    preference = jnp.asarray(1.0 / count(where) if preference is None else preference, losses.dtype)
    reference = jnp.asarray(reference, losses.dtype)
    for name, given in (("preference", preference), ("reference", reference)):
        if given.shape not in ((), losses.shape):
            raise ValueError(f"{name} has shape {given.shape}, but there are {losses.size} losses")
    return jnp.where(where, losses - reference, 0.0), jnp.where(where, preference, 0.0), where


def _length(x: jax.Array) -> jax.Array:
    """|x|, with the subgradient 0 at 0. Scaled by max |x_k| first: squares of small losses underflow."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    safe = jnp.where(largest > 0, largest, 1.0)
    squared = jnp.sum((x / safe) ** 2)
    return jnp.where(largest == 0, 0.0, safe * jnp.sqrt(jnp.where(largest == 0, 1.0, squared)))


# The functions.


def tchebycheff_value(
    losses: Vector, preference: Vector | None = None, *, reference: Vector | float = 0.0, where: jax.Array | None = None
) -> jax.Array:
    """max_k r_k (L_k - z_k).

    Args:
      losses: f[K].
      preference: r, f[K]; 1/K each by default.
      reference: z, f[K] or one number.
      where: bool[K], tasks that take part; all by default.

    Returns:
      f[]. Its gradient is shared equally by the tasks that attain the maximum.

    >>> tchebycheff_value(jnp.array([1.0, 4.0]), jnp.array([0.75, 0.25])).item()
    1.0
    """
    shifted, preference, where = _arguments(losses, preference, reference, where)
    return jnp.max(preference * shifted, where=where, initial=-jnp.inf)


def smooth_tchebycheff_value(
    losses: Vector,
    preference: Vector | None = None,
    *,
    mu: float,
    reference: Vector | float = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """mu log sum_k exp(r_k (L_k - z_k) / mu), above the maximum by at most mu log K.

    Args:
      losses: f[K].
      preference: r, f[K]; 1/K each by default.
      mu: width of the smoothing, > 0, in the unit of the losses.
      reference: z, f[K] or one number.
      where: bool[K], tasks that take part; all by default.

    Returns:
      f[].

    >>> print(smooth_tchebycheff_value(jnp.array([2.0, 2.0]), mu=1.0).round(4))  # 1 + log 2
    1.6931
    """
    shifted, preference, where = _arguments(losses, preference, reference, where)
    y = preference * shifted
    # Centred before the division by mu: what rounding does to large losses is not to be blown up by 1 / mu and exp.
    top = jax.lax.stop_gradient(jnp.max(y, where=where, initial=-jnp.inf))
    top = jnp.where(jnp.any(where), top, 0.0)
    return mu * jax.nn.logsumexp((y - top) / mu, where=where) + top


def cosmos_value(
    losses: Vector, preference: Vector | None = None, *, lambda_: float, where: jax.Array | None = None
) -> jax.Array:
    """r . L - lambda cos(r, L).

    Args:
      losses: f[K].
      preference: r, f[K]; 1/K each by default.
      lambda_: weight of the cosine, >= 0.
      where: bool[K], tasks that take part; all by default.

    Returns:
      f[]. The cosine with a vector of zeros counts as 0, with gradient 0.

    >>> cosmos_value(jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0]), lambda_=5.0).item()  # 3 - 5 * 3/5
    0.0
    """
    losses, preference, _ = _arguments(losses, preference, 0.0, where)
    # The cosine of L / max |L|: the same function, none of whose intermediate powers leaves the dtype's range.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(losses)))
    unit = losses / jnp.where(largest > 0, largest, 1.0)
    lengths = _length(unit), _length(preference)
    zero = (lengths[0] == 0) | (lengths[1] == 0)
    direction = preference / jnp.where(lengths[1] == 0, 1.0, lengths[1])
    cosine = jnp.where(zero, 0.0, jnp.sum(direction * unit) / jnp.where(zero, 1.0, lengths[0]))
    return jnp.sum(preference * losses) - lambda_ * cosine


def pbi_value(
    losses: Vector,
    preference: Vector | None = None,
    *,
    theta: float = 5.0,
    reference: Vector | float = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """d1 + theta d2, with d1 the component of L - z along r and d2 the length of what is left.

    Args:
      losses: f[K].
      preference: r, f[K]; 1/K each by default.
      theta: weight of the distance from the ray, >= 0.
      reference: z, f[K] or one number.
      where: bool[K], tasks that take part; all by default.

    Returns:
      f[]. On the ray, up to rounding, d2 is 0 and has gradient 0.

    >>> pbi_value(jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0]), theta=2.0).item()  # 3 + 2 * 4
    11.0
    """
    shifted, preference, _ = _arguments(losses, preference, reference, where)
    length = _length(preference)
    direction = preference / jnp.where(length == 0, 1.0, length)
    along = jnp.sum(direction * shifted)
    across = _length(shifted - along * direction)
    # What rounding leaves of it on the ray has a random direction, and a gradient of length theta.
    on_ray = across <= 4 * jnp.finfo(across.dtype).eps * _length(shifted)
    return along + theta * jnp.where(on_ray, 0.0, across)


# The methods.


def _check_preference(preference: Vector | None) -> None:
    """Raises a ValueError unless a preference is f[K], finite, >= 0 and not all 0. A traced one is not looked at."""
    if preference is None or isinstance(preference, jax.core.Tracer):
        return
    given = np.asarray(preference, float)
    if given.ndim != 1 or not np.all(np.isfinite(given)) or np.any(given < 0) or not np.any(given > 0):
        raise ValueError(f"preference must be K numbers >= 0, not all 0, got {preference}")


def _from_value(value: Callable, preference: Vector | None) -> Method:
    """The method whose weights are the gradient of value(losses, preference, where=present)."""
    _check_preference(preference)

    def weigh(gramian, losses, state, present):
        del gramian
        weights = jax.grad(value)(losses, preference, where=present)
        return settle(weights, present, jnp.isfinite(losses)), state

    weighting = Weighting(lambda num_tasks: (), weigh, needs_gramian=False, needs_losses=True, masked=True)
    return from_weighting(weighting)


def tchebycheff(preference: Vector | None = None, *, reference: Vector | float = 0.0) -> Method:
    r"""Tchebycheff scalarization: only the task that is worst for the preference is trained.

    minimise max_k r_k (L_k - z_k),  hence w_k = r_k for the k of the maximum, 0 for others.

    Every Pareto-optimal point minimises it for some preference, also on the concave parts of the front, which no
    weighted sum reaches.

    Args:
      preference: r, K numbers >= 0, also a traced array; 1/K each by default. At the minimum losses are (where the
        front allows it) inversely proportional to it.
      reference: z, the best value of each loss; K numbers or one.

    Returns:
      A `Method`; `update` needs `losses=`. Tasks that share the maximum share the weight equally. With K = 1,
      d = r_1 g.

    Raises:
      ValueError: for a preference that is negative, not finite or 0, and (when the number of tasks is known) a wrong
        number of entries.

    >>> method = tchebycheff([0.75, 0.25])
    >>> method.update(jnp.eye(2), method.init(None), losses=jnp.array([1.0, 4.0]))[0].tolist()
    [0.0, 0.25]

    Reference: Steuer and Choo, "An interactive weighted Tchebycheff procedure for multiple objective programming",
      Mathematical Programming 1983. LibMOON's `tche` differentiates max_k by L_k instead of r_k L_k: its weights are
      one-hot.
    """

    def value(losses, preference, where):
        return tchebycheff_value(losses, preference, reference=reference, where=where)

    return _from_value(value, preference)


def cosmos(preference: Vector | None, lambda_: float) -> Method:
    r"""COSMOS: a weighted sum, and a reward for losses that are proportional to the preference.

    minimise r . L - lambda cos(r, L),  hence w = r - lambda ( r/|r| - cos(r, L) L/|L| ) / |L|.

    The authors draw the preference anew for each batch, from a Dirichlet distribution, and give it to the network as an
    input as well; here it may be a traced array.

    Args:
      preference: r, K numbers >= 0; None for 1/K each.
      lambda_: >= 0; 0 is the weighted sum. The authors use 0.01 to 8, by data set.

    Returns:
      A `Method`; `update` needs `losses=`. Weights can be negative. w = r if all losses are 0. With K = 1,
      d = r_1 g. The two terms differ in unit: rescaling the losses changes their balance.

    Raises:
      ValueError: if `lambda_` < 0; as for `tchebycheff`.

    Reference: Ruchte and Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning", ICDM 2021.
      TorchJD (COSMOS) and the authors' code are the same.
    """
    if not lambda_ >= 0:
        raise ValueError(f"lambda_ must be >= 0, got {lambda_}")

    def value(losses, preference, where):
        return cosmos_value(losses, preference, lambda_=lambda_, where=where)

    return _from_value(value, preference)


def pbi(preference: Vector | None, theta: float = 5.0, *, reference: Vector | float = 0.0) -> Method:
    r"""Penalty-based boundary intersection: descend along the ray of the preference, and stay near it.

    With u = r / |r| and f = L - z:  minimise d1 + theta d2,  d1 = <f, u>,  d2 = |f - d1 u|,
    hence w = u + theta (f - d1 u) / d2.

    Args:
      preference: r, K numbers >= 0, also a traced array; None for 1/K each. Losses end up proportional to it.
      theta: weight of the distance from the ray, >= 0.
      reference: z, the best value of each loss; K numbers or one.

    Returns:
      A `Method`; `update` needs `losses=`. Weights can be negative. On the ray (to rounding) w = u. With K = 1, d = g.

    Raises:
      ValueError: if `theta` < 0; as for `tchebycheff`.

    Reference: Zhang and Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE Transactions
      on Evolutionary Computation 2007 (theta = 5). TorchJD adds 1e-12 to d2^2, which hides the second term from losses
      below 1e-6.
    """
    if not theta >= 0:
        raise ValueError(f"theta must be >= 0, got {theta}")

    def value(losses, preference, where):
        return pbi_value(losses, preference, theta=theta, reference=reference, where=where)

    return _from_value(value, preference)


# Smooth Tchebycheff, and its multitask form.


class StchState(NamedTuple):
    """State of `stch` with `nadir_steps`.

    Attributes:
      step: i32[], steps made.
      total: f[K], sum of the losses that make up each task's nadir.
      observed: i32[K], how many `total` adds up.
    """

    step: jax.Array
    total: jax.Array
    observed: jax.Array


def stch(
    mu: float,
    preference: Vector | None = None,
    *,
    reference: Vector | float = 0.0,
    warmup_steps: int = 0,
    nadir_steps: int | None = None,
) -> Method:
    r"""Smooth Tchebycheff scalarization: tasks that are bad for the preference get more weight, smoothly.

    minimise mu log sum_k exp( r_k (L_k - z_k) / mu ),  hence w = r * softmax( r (L - z) / mu ).

    With `nadir_steps` it is the form of the authors' multitask experiments, which compares tasks by the logarithm of
    what each has gained on its nadir n_k, so that units and mu no longer depend on the losses:

    minimise K mu log sum_k exp( K r_k log(L_k / n_k) / mu ).

    The first `warmup_steps + nadir_steps` steps minimise sum_k log L_k instead; n_k is the mean of L_k in the last
    `nadir_steps` of them. All of it is in the state, so a run that is resumed goes on as it was.

    Args:
      mu: width of the smoothing, > 0: in the unit of the losses, or of their logarithms. The smaller, the nearer to
        `tchebycheff`. The paper takes 0.01 to 1; the authors' multitask code 1.
      preference: r, K numbers >= 0, also a traced array; 1/K each by default.
      reference: z, the best value of each loss; K numbers or one. Not with `nadir_steps`.
      warmup_steps: steps before the nadir is measured (the authors: 4 epochs).
      nadir_steps: steps over which it is averaged (the authors: 1 epoch); None for the form without.

    Returns:
      A `Method`; `update` needs `losses=`. Without nadir: sum w_k = 1/K for equal preferences, and with K = 1,
      d = r_1 g. With nadir, losses must be >= 0: a loss of 0 is a solved task and gets weight 0, a negative one
      makes all weights NaN; multiplying a loss by a constant changes nothing; with K = 1, d = g / L. A task whose
      losses were 0 or absent while nadirs were measured takes its first positive loss thereafter.

    Raises:
      ValueError: if `mu` <= 0, for step counts out of range, for both `reference` and `nadir_steps`; as for
        `tchebycheff`.

    >>> method = stch(1.0)
    >>> print(method.update(jnp.eye(2), method.init(None), losses=jnp.array([0.0, 2 * jnp.log(3.0)]))[0].round(4))
    [0.125 0.375]

    Reference: Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024. The first
      form is TorchJD's, the second, without a preference, is that of the authors' code and LibMTL, which count epochs,
      add 1e-20 to arguments of logarithms, and lose the nadir when a run is resumed.
    """
    if not mu > 0:
        raise ValueError(f"mu must be > 0, got {mu}")
    if warmup_steps < 0 or (nadir_steps is not None and nadir_steps < 1):
        raise ValueError(f"Expected warmup_steps >= 0 and nadir_steps >= 1, got {warmup_steps} and {nadir_steps}")
    if nadir_steps is None:
        if warmup_steps:
            raise ValueError("warmup_steps precede the measurement of the nadir: give nadir_steps as well")

        def value(losses, preference, where):
            return smooth_tchebycheff_value(losses, preference, mu=mu, reference=reference, where=where)

        return _from_value(value, preference)
    if np.any(np.asarray(reference)):
        raise ValueError("With nadir_steps losses are compared with their nadir: reference must be 0")
    _check_preference(preference)

    def init(num_tasks):
        zero = jnp.zeros((), jnp.int32)
        return StchState(zero, jnp.zeros((num_tasks,)), jnp.zeros((num_tasks,), jnp.int32))

    def weigh(gramian, losses, state, present):
        del gramian
        warm = state.step < warmup_steps + nadir_steps
        measured = present & warm & (state.step >= warmup_steps)
        late = present & ~warm & (state.total == 0)
        total = jnp.where(late, losses, state.total + jnp.where(measured, losses, 0.0))
        observed = jnp.where(late, 1, state.observed + measured)

        active = present & ~solved(losses)
        losses_ = jnp.where(active, losses, 1.0)
        nadir = jnp.where(active & ~warm, total / jnp.maximum(observed, 1), 1.0)
        num_present = count(present)
        exponent = jnp.ones_like(losses) if preference is None else num_present * jnp.asarray(preference, losses.dtype)
        slope = jax.grad(smooth_tchebycheff_value)(jnp.log(losses_) - jnp.log(nadir), exponent, mu=mu, where=active)
        weights = jnp.where(active, jnp.where(warm, 1.0, num_present * slope) / losses_, 0.0)
        return settle(weights, present, non_negative(losses)), StchState(state.step + 1, total, observed)

    weighting = Weighting(init, weigh, needs_gramian=False, needs_losses=True, masked=True)
    return from_weighting(weighting)
