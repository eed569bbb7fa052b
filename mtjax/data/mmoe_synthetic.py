r"""MMoE's task-relatedness generator: two regression tasks whose weight vectors have a chosen cosine.

    u_1, u_2 orthonormal in R^D,  w_1 = c u_1,  w_2 = c (rho u_1 + sqrt(1 - rho^2) u_2)  =>  cos(w_1, w_2) = rho
    y_k = w_k . x + sum_{i=1}^{m} sin(alpha_i w_k . x + beta_i) + e_k,   x ~ N(0, I_D),  e_k ~ N(0, noise^2)

Both tasks share the wave parameters alpha, beta ~ N(0, 1), so at rho = 1 they differ by noise only, and a shared
bottom loses as rho falls while a mixture of gated experts loses less. The labels' correlation rises with rho without
being equal to it. (MultiTab-Bench, in `multitab_bench`, generalises the first line to T tasks and the second to
polynomials with a closed-form correlation.)

Letters: D features, m sine terms, n rows.

>>> generator = MMoESynthetic(rho=0.5)
>>> w = generator.parameters().weights
>>> round(float(w[0] @ w[1] / (jnp.linalg.norm(w[0]) * jnp.linalg.norm(w[1]))), 4)
0.5

Reference: Ma, Zhao, Yi, Chen, Hong, Chi, "Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts", KDD 2018, section 3.2. Sizes are those of the public re-implementation drawbridge/keras-mmoe.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax.data.multitab_bench import orthonormal_rows, stream, synthetic_dataset
from mtjax.data.tabular import TabularDataset
from mtjax.tasks import Task


class Parameters(NamedTuple):
    """What the two tasks are made of.

    Attributes:
      weights: f32[2, D], rows of norm c with cosine rho.
      alpha: f32[m], frequencies of the sine terms.
      beta: f32[m], their phases.
    """

    weights: jax.Array
    alpha: jax.Array
    beta: jax.Array


@dataclasses.dataclass(frozen=True)
class MMoESynthetic:
    """Configuration of the generator.

    Attributes:
      rho: cosine between the tasks' weight vectors, in [-1, 1]; the paper sweeps 0.5, 0.9 and 1.
      num_features: D >= 2.
      num_sines: m >= 0; 0 leaves two linear tasks.
      scale: c, the norm of the weight vectors.
      noise: standard deviation of the label noise (the paper's N(0, 0.01) is a variance).
      seed: of the parameters and of the splits that `dataset` draws.

    Raises:
      ValueError: if a field is out of its range.
    """

    rho: float = 0.9
    num_features: int = 100
    num_sines: int = 5
    scale: float = 0.3
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if not -1.0 <= self.rho <= 1.0:
            raise ValueError(f"rho={self.rho} is no cosine; expected a number between -1 and 1")
        if self.num_features < 2:
            raise ValueError(f"num_features must be at least 2 for two directions, got {self.num_features}")
        if self.num_sines < 0 or self.noise < 0 or self.scale <= 0:
            raise ValueError(
                f"num_sines={self.num_sines}, noise={self.noise}, scale={self.scale}: expected num_sines >= 0, "
                "noise >= 0 and scale > 0"
            )

    @property
    def tasks(self) -> tuple[Task, Task]:
        """The two regression tasks, with raw targets: their scales are equal by construction."""
        return Task("task_0", "regression", scaling="none"), Task("task_1", "regression", scaling="none")

    def parameters(self, key: jax.Array | None = None) -> Parameters:
        """Draws the weights and the shared wave; `key` is by default that of the configured seed."""
        key_u, key_alpha, key_beta = jax.random.split(stream(self.seed, "weights") if key is None else key, 3)
        u = orthonormal_rows(key_u, 2, self.num_features)
        mix = jnp.array([[1.0, 0.0], [self.rho, math.sqrt(1.0 - self.rho**2)]], jnp.float32)
        return Parameters(
            weights=self.scale * jnp.matmul(mix, u, precision=jax.lax.Precision.HIGHEST),
            alpha=jax.random.normal(key_alpha, (self.num_sines,), jnp.float32),
            beta=jax.random.normal(key_beta, (self.num_sines,), jnp.float32),
        )

    def sample(self, key: jax.Array, n: int, parameters: Parameters | None = None) -> dict[str, Any]:
        """Draws n labelled rows; pure, so it can be jitted (static n) and vmapped over keys.

        Args:
          key: random key of this draw.
          n: number of rows.
          parameters: by default `self.parameters()`, those of the configured seed.

        Returns:
          A batch: 'categorical' i32[n, 0], 'numeric' f32[n, D], 'labels' {task: f32[n]}.
        """
        weights, alpha, beta = self.parameters() if parameters is None else parameters
        normal = jax.random.normal(key, (n, self.num_features + 2), jnp.float32)
        x, noise = normal[:, :-2], normal[:, -2:]
        s = x @ weights.T
        waves = jnp.sin(jnp.einsum("nk,m->nkm", s, alpha) + beta[None, None, :]).sum(-1)
        y = s + waves + self.noise * noise
        return {
            "categorical": jnp.zeros((n, 0), jnp.int32),
            "numeric": x,
            "labels": {task.name: y[:, k] for k, task in enumerate(self.tasks)},
        }

    def dataset(self, train: int = 10_000, validation: int = 1_000, test: int = 1_000) -> TabularDataset:
        """Draws three independent splits with the parameters of the configured seed; sizes as in keras-mmoe."""
        parameters = self.parameters()
        return synthetic_dataset(
            lambda key, n: self.sample(key, n, parameters),
            self.tasks,
            self.num_features,
            self.seed,
            (train, validation, test),
        )
