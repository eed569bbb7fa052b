r"""The context-aware gate of TaskExpert: scores of n experts for each task and image, from the whole feature map.

    a_t = W_2 mean_p GELU(LN(W_1 x_p))            a small convolutional net, then the average over positions
    b_t = W_4 GELU(LN(sum_p v_p x_p + v_0))       a learned linear pooling over the positions, then a small net
    s_t = W_5 [a_t, b_t]                          all W and v of task t

Softmax over the scores gives dense mixing weights which change with the image, not a learned constant per task.

Reference: Ye and Xu, "TaskExpert: Dynamically Assembling Multi-Task Representations with Memorial Mixture-of-Experts",
ICCV 2023. Its code was never released; the two branches are those of the same line's successor, MLoRE (Yang et al.,
"Multi-Task Dense Prediction via Mixture of Low-Rank Experts", CVPR 2024). Sizes are this file's choice. The second 1x1
convolution of branch a comes after the average instead of before it, the same function for less.

Letters: T tasks, B images, P = h w positions, C channels, n scores.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.stacked import StackedDense, StackedLayerNorm, take, uniform_fan_in


class ContextGate(nn.Module):
    """x f[B, h, w, C] -> scores f[T, B, n]; parameters are stacked over the tasks.

    The learned pooling ties the gate to one map size.

    Attributes:
      num_tasks: tasks that exist.
      num_scores: n.
      hidden: width of both branches; None: C.
    """

    num_tasks: int
    num_scores: int
    hidden: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, tasks: Sequence[int] | None = None) -> jax.Array:
        """Scores the experts.

        Args:
          x: f[B, h, w, C].
          tasks: static; tasks to compute, None: all.

        Returns:
          f[T, B, n], before any softmax.
        """
        if x.ndim != 4:
            raise ValueError(f"x must be a batch of maps [B, h, w, C], got shape {x.shape}")
        batch, height, width, channels = x.shape
        hidden = self.hidden or channels
        index = None if tasks is None or tuple(tasks) == tuple(range(self.num_tasks)) else tuple(tasks)

        def dense(features: int, name: str) -> StackedDense:
            return StackedDense(self.num_tasks, features, kernel_init=uniform_fan_in, name=name)

        rows = dense(hidden, "local_in")(x.reshape(-1, channels), index)  # [T, B P, hidden]
        rows = nn.gelu(StackedLayerNorm(self.num_tasks, name="local_norm")(rows, index), approximate=False)
        local = jnp.mean(rows.reshape(len(rows), batch, height * width, hidden), axis=2)
        local = dense(hidden, "local_out")(local, index)

        positions = height * width
        pool = take(self.param("pool", uniform_fan_in, (self.num_tasks, positions, 1)), index)[..., 0]
        pool_bias = take(self.param("pool_bias", nn.initializers.zeros_init(), (self.num_tasks,)), index)
        summary = jnp.einsum("bpc,tp->tbc", x.reshape(batch, positions, channels), pool) + pool_bias[:, None, None]
        summary = nn.gelu(StackedLayerNorm(self.num_tasks, name="pooled_norm")(summary, index), approximate=False)
        summary = dense(hidden, "pooled_out")(summary, index)
        return dense(self.num_scores, "scores")(jnp.concatenate([local, summary], axis=-1), index)
