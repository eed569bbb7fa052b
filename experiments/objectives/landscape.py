r"""The two-objective landscape of the CAGrad and Nash-MTL papers: a steep log-shaped pass above a wide valley.

Two parameters x = (x_1, x_2), two losses. Above the line x_2 = 0 each loss has a logarithmic gorge, whose gradients
dwarf those of the other loss; below it both are paraboloids, and the Pareto front lies on the floor of that valley:

    upper_1 = log max(|(-x_1 - 7) / 2 + tanh(x_2)|, e) + 6,        lower_1 = ((x_1 - 7)^2 + (x_2 + 8)^2 / 10) / 10 - 20
    upper_2 = log max(|(-x_1 + 3) / 2 - tanh(x_2) + 2|, e) + 6,    lower_2 = ((x_1 + 7)^2 + (x_2 + 8)^2 / 10) / 10 - 20
    L_k = s_k ( max(tanh(x_2 / 2), 0) upper_k + max(tanh(-x_2 / 2), 0) lower_k ),     e = 5e-6

CAGrad takes s = (1, 1). Nash-MTL takes s = (0.1, 1): the same valley, seen by tasks that measure in other units. A
descent that sums the gradients gets stuck in a gorge, where the other task hardly counts.

*Shift.* The losses of the papers lie between -20 and 12, but logarithms and ratios of losses, which many methods take,
need positive numbers. Here 21 is added before the scale, the same for all methods: the best value of either loss is
then 1.01 s_k, gradients are those of the papers, and a scale remains a scale. The authors of FAMO shift by the same.

*Front.* In the valley the gradients in x_1 are (x_1 - 7) / 5 and (x_1 + 7) / 5 up to a common factor, so that at a
Pareto point the weights of the two losses are (7 + x_1) / 14 and (7 - x_1) / 14, and x_2 minimises the weighted sum.

>>> front(3).losses.round(2).tolist()
[[20.6, 1.01], [5.91, 5.91], [1.01, 20.6]]

Reference: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, section 5.1 and the
authors' code; Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, section 5.1 and the authors' code;
Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, section 5.1 and the authors' code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
"""The five starting points of Nash-MTL; CAGrad shares the first and the third."""
SHIFT = 21.0
SMALLEST = 5e-6
TASKS = ("loss 1", "loss 2")


@jax.jit
def losses(x: jax.Array, scale: jax.Array | tuple[float, float] = (1.0, 1.0)) -> jax.Array:
    """f[..., 2] both losses, shifted (module docstring), at points f[..., 2]."""
    x1, x2 = x[..., 0], x[..., 1]
    gorges = (jnp.abs(0.5 * (-x1 - 7.0) + jnp.tanh(x2)), jnp.abs(0.5 * (-x1 + 3.0) - jnp.tanh(x2) + 2.0))
    bowls = ((x1 - 7.0) ** 2, (x1 + 7.0) ** 2)
    above, below = _floor(jnp.tanh(0.5 * x2), 0.0), _floor(jnp.tanh(-0.5 * x2), 0.0)
    scale = jnp.asarray(scale)
    values = [
        above * (jnp.log(_floor(gorge, SMALLEST)) + 6.0) + below * ((bowl + 0.1 * (x2 + 8.0) ** 2) / 10.0 - 20.0)
        for gorge, bowl in zip(gorges, bowls, strict=True)
    ]
    return jnp.stack([scale[k] * (value + SHIFT) for k, value in enumerate(values)], axis=-1)


def _floor(value: jax.Array, lowest: float) -> jax.Array:
    """max(value, lowest) with the derivative 1 on the boundary, as in the authors' code: a start lies on it."""
    return jnp.where(value >= lowest, value, lowest)


class Front(NamedTuple):
    """The Pareto front.

    Attributes:
      points: f64[n, 2] parameters, from the best of loss 2 (x_1 = -7) to the best of loss 1 (x_1 = 7).
      losses: f64[n, 2] at scale (1, 1).
    """

    points: np.ndarray
    losses: np.ndarray


def front(n: int = 1401) -> Front:
    """n points of the front at equal steps of x_1, by a fixed point iteration for x_2."""
    x1 = np.linspace(-7.0, 7.0, n)
    share = (7.0 + x1) / 14.0
    x2 = np.full(n, -8.0)
    for _ in range(100):  # contracts by 0.45 at least
        slope, below = -0.5 / np.cosh(0.5 * x2) ** 2, np.tanh(-0.5 * x2)
        lower = [((x1 + side) ** 2 + 0.1 * (x2 + 8.0) ** 2) / 10.0 - 20.0 for side in (-7.0, 7.0)]
        x2 = -8.0 - 50.0 * (share * lower[0] + (1.0 - share) * lower[1]) * slope / below
    lower = [((x1 + side) ** 2 + 0.1 * (x2 + 8.0) ** 2) / 10.0 - 20.0 for side in (-7.0, 7.0)]
    values = np.stack([np.tanh(-0.5 * x2) * value for value in lower], axis=-1) + SHIFT
    return Front(np.stack([x1, x2], axis=-1), values)


class Place(NamedTuple):
    """Where points lie with respect to the front, in units of the losses at scale (1, 1); its ends are 27.7 apart.

    Attributes:
      distance: f64[...], to the nearest point of the front in loss space.
      share: f64[...], position of that point: 0 at the best of loss 2, 1 at the best of loss 1.
    """

    distance: np.ndarray
    share: np.ndarray


def place(points: np.ndarray) -> Place:
    """Distance to the front and position along it of parameters f[..., 2]; NaN for points that are not finite."""
    from scipy.spatial import KDTree

    curve = front()
    values = np.asarray(losses(jnp.asarray(points)), np.float64)
    finite = np.isfinite(values).all(axis=-1)
    distance, nearest = KDTree(curve.losses).query(np.where(finite[..., None], values, 0.0))
    share = nearest / (len(curve.losses) - 1)
    return Place(np.where(finite, distance, np.nan), np.where(finite, share, np.nan))
