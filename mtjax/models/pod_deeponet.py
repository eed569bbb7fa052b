r"""POD-DeepONet: the trunk is a fixed basis, the principal components of the training outputs.

    G(f)(x_n) = mean_n + (1 / m) (sum_{k <= m} b_k(f) phi_k(x_n)   [ + sum_j b_{m+j}(f) t_j(x_n) + b0 ])

phi_k are eigenvectors of the covariance of the training outputs (proper orthogonal decomposition), scaled by sqrt(N) so
that the entries are of order one whatever the grid. The part in brackets is an optional learned trunk beside them.

The basis is known at the points of the training outputs, and there only. It travels in the batch as columns
(`PODBasis.columns`), so that a step may use a sample of the points, and the model is free of arrays.

Reference: Lu et al., "A Comprehensive and Fair Comparison of Two Neural Operators (with Practical Extensions) Based on
FAIR Data", CMAME 2022, section 3.1.5, and its code, from which the scale and the division by m (`modes` there) are.

Letters: S training outputs, B functions, N points, m modes, p = m + learned basis functions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.models.deeponet import merge
from mtjax.nn.output_transforms import Transform, apply_transforms, like


class PODBasis(NamedTuple):
    """Principal components of fields.

    Attributes:
      mean: f32[N], of the training outputs.
      vectors: f32[N, m], orthogonal, each with mean square 1 over the points.
      energy: f32[m], share of the variance up to and with each mode.
    """

    mean: np.ndarray
    vectors: np.ndarray
    energy: np.ndarray

    def columns(self, points: Any = slice(None)) -> dict[str, np.ndarray]:
        """What a batch needs, at the points of the given positions: 'basis' f32[n, m] and 'output_mean' f32[n]."""
        return {"basis": self.vectors[points], "output_mean": self.mean[points]}


def pod_basis(values: Any, num_modes: int) -> PODBasis:
    """The POD basis of training outputs, by a singular value decomposition of the centred outputs.

    Args:
      values: f[S, N], training outputs at common points; zero where a function has no point there.
      num_modes: m.

    Returns:
      The basis, by falling energy; the sign makes each mode's entry of largest size positive.

    Raises:
      ValueError: if `values` is not a matrix, or `num_modes` is not in 1..min(S - 1, N).

    >>> basis = pod_basis([[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]], 1)
    >>> basis.mean.tolist(), basis.vectors.round(4).tolist(), basis.energy.tolist()
    ([2.0, 2.0], [[1.0], [1.0]], [1.0])
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2:
        raise ValueError(f"values must be a matrix f[samples, points], got shape {values.shape}")
    most = min(values.shape[0] - 1, values.shape[1])
    if not 1 <= num_modes <= most:
        raise ValueError(f"num_modes must be in 1..{most} for outputs of shape {values.shape}, got {num_modes}")
    mean = values.mean(0)
    _, size, modes = np.linalg.svd(values - mean, full_matrices=False)
    modes = modes[:num_modes]
    largest = np.take_along_axis(modes, np.abs(modes).argmax(1)[:, None], axis=1)
    vectors = (modes * np.sign(largest)).T * values.shape[1] ** 0.5
    energy = np.cumsum(size**2) / max((size**2).sum(), np.finfo(float).tiny)
    return PODBasis(*(array.astype(np.float32) for array in (mean, vectors, energy[:num_modes])))


class PODDeepONet(nn.Module):
    """DeepONet on a fixed basis; see the module.

    Attributes:
      branch: `branch(batch['inputs'], train=)` -> f[B, m], or f[B, m + p'] with a trunk that ends in p'.
      trunk: learned basis functions beside the fixed ones; None: none.
      use_bias: whether a trained scalar is added; None: if there is a trunk, as in DeepXDE.
      transforms: applied to the field, in order, after the mean.
    """

    branch: nn.Module
    trunk: nn.Module | None = None
    use_bias: bool | None = None
    transforms: Sequence[Transform] = ()

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False
    ) -> dict[str, jax.Array]:
        """Predicts the fields at the points of the basis.

        Args:
          batch: 'inputs', 'basis' f[N, m], 'output_mean' f[N], and 'points' f[N, d] if there is a trunk.
          task: ignored; all tasks share all.
          train: whether dropout is on.

        Returns:
          {'u': f[B, N]}.
        """
        del task
        basis = batch["basis"]
        modes = basis.shape[-1]
        if self.trunk is not None:
            basis = jnp.concatenate([basis, self.trunk(batch["points"], train=train)], axis=-1)
        u = merge(self.branch(batch["inputs"], train=train), basis, pointwise=False) / modes
        if self.use_bias if self.use_bias is not None else self.trunk is not None:
            u = u + self.param("bias", nn.initializers.zeros_init(), (1,))[0] / modes
        return {"u": apply_transforms(u + like(batch["output_mean"], u), batch, self.transforms)}
