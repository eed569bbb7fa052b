r"""Krum: the gradient that lies nearest to most of the others.

Of K gradients, some unknown f may be arbitrarily wrong. Each one is scored by its squared distances to its K - f - 2
nearest others; a wrong one is far from the honest majority, or close enough to it to do no harm. The gradients with the
least scores are averaged:

    score_i = sum_{j in the K - f - 2 nearest to i} |g_i - g_j|^2,    d = mean of the m rows with the least score.

Distances come from the Gramian, by norms and cosines: |g_i - g_j|^2 = (n_i - n_j)^2 + 2 n_i n_j (1 - cos_ij). The usual
n_i^2 + n_j^2 - 2 <g_i, g_j> loses all digits where norms are equal and large.

Letters: K tasks; g_k the gradient of task k, n_k its norm; f `num_byzantine`, m `num_selected`.
"""

import jax
import jax.numpy as jnp

from mtjax.optim import solvers
from mtjax.optim.base import Method, Weighting, from_weighting


def krum(num_byzantine: int = 1, num_selected: int = 1) -> Method:
    r"""Krum (`num_selected` = 1) and Multi-Krum: the mean of the gradients that lie closest to their neighbours.

    Args:
      num_byzantine: f, how many tasks may be arbitrarily wrong.
      num_selected: m, how many gradients are averaged.

    Returns:
      A `Method`; weights are 1 / m for the chosen tasks and 0 for the others. Of equal scores the first task wins;
      distances below about sqrt(eps) of the norms are rounding and decide like a tie. method(s J) = s method(J). If in
      some step fewer than f + 3 tasks take part (see `mtjax.optim.nonfinite`), a score still counts the nearest other;
      if fewer than m do, all of them are averaged.

    Raises:
      ValueError: for f < 0 or m < 1; when the number of tasks is known, for K < f + 3 (so that K = 1 has no Krum) or
        K < m.

    >>> method = krum(num_byzantine=1)
    >>> rows = jnp.array([[1.0, 0.0], [1.0, 0.2], [1.0, -0.1], [-50.0, 9.0]])
    >>> method.update(rows, method.init(None))[1].weights.tolist()
    [1.0, 0.0, 0.0, 0.0]

    Reference: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
      sections 4 and 5. TorchJD sums distances instead of squared distances and may choose other rows. LibMTL has none.
    """
    if not (isinstance(num_byzantine, int) and num_byzantine >= 0):
        raise ValueError(f"num_byzantine must be an integer >= 0, got {num_byzantine!r}")
    if not (isinstance(num_selected, int) and num_selected >= 1):
        raise ValueError(f"num_selected must be an integer >= 1, got {num_selected!r}")

    def weigh(gramian, losses, state, present):
        del losses
        num_tasks = gramian.shape[0]
        if num_tasks < num_byzantine + 3:
            raise ValueError(
                f"krum(num_byzantine={num_byzantine}) needs at least {num_byzantine + 3} tasks, got {num_tasks}"
            )
        if num_tasks < num_selected:
            raise ValueError(f"krum(num_selected={num_selected}) got only {num_tasks} tasks")
        place = jnp.arange(num_tasks)
        others = present[:, None] & present[None, :] & (place[:, None] != place[None, :])
        nearest = jnp.sort(jnp.where(others, squared_distances(gramian), jnp.inf), axis=1)
        neighbours = jnp.maximum(jnp.sum(present) - num_byzantine - 2, 1)
        counted = (place[None, :] < neighbours) & jnp.isfinite(nearest)
        score = jnp.where(present, jnp.sum(jnp.where(counted, nearest, 0.0), axis=1), jnp.inf)
        rank = jnp.argsort(jnp.argsort(score, stable=True), stable=True)
        chosen = present & (rank < num_selected)
        weights = chosen.astype(gramian.dtype) / jnp.maximum(jnp.sum(chosen), 1)
        return jnp.where(jnp.isfinite(gramian).all(), weights, jnp.nan), state

    return from_weighting(Weighting(lambda num_tasks: (), weigh, masked=True))


def squared_distances(gramian: jax.Array) -> jax.Array:
    """Gramian f[K, K] -> f[K, K], |g_i - g_j|^2 >= 0 in units of the largest squared norm."""
    norm, cosine = solvers.row_normalized(gramian)
    size = norm * solvers.reciprocal(jnp.max(norm))
    return (size[:, None] - size[None, :]) ** 2 + 2 * size[:, None] * size[None, :] * (1.0 - cosine)
