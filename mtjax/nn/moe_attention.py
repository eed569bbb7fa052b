r"""Mixture of attention heads: every token picks K of E experts as its heads (Mod-Squad's MoE attention).

An expert is one query projection and one output projection; keys and values are one head that all experts share:

    k, v = x W_kv;    y_n = sum_{e in top-K(n)} p_e(x_n) softmax( (x_n Q_e) k^T / sqrt(d_h) ) v O_e

The gate's weight multiplies at the output projection only, so that it does not sharpen or flatten the attention. With
K = H heads and d_h = 2 D / H the published small model costs what a dense ViT's attention does.

References:
  Chen et al., "Mod-Squad: Designing Mixture of Experts As Modular Multi-Task Learners", CVPR 2023.
  Zhang et al., "Mixture of Attention Heads: Selecting Attention Heads Per Token", EMNLP 2022.
Deviation: kernels start from U(-1/sqrt(fan-in), 1/sqrt(fan-in)); the published code has 1/fan-in.

Letters: T task streams, B images, N tokens, D width, E experts, K = heads of a token, d_h head width.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.balance import RouterStats, router_stats
from mtjax.nn.moe import Dispatch, route_tokens
from mtjax.nn.routers import Router, RouterConfig
from mtjax.nn.stacked import uniform_fan_in


def attend_shared_head(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v with one key-value head for all heads of the queries.

    Args:
      query: f[T, B, N, K, d].
      key, value: f[T, B, N, d], or f[1, B, N, d] when the streams share them, which are then not copied.

    Returns:
      f[T, B, N, K, d].
    """
    streams, batch, tokens, heads, width = query.shape
    query = query * width**-0.5
    # All queries that read the same keys are rows of one matrix.
    shared = len(key) == 1 and streams > 1
    rows = query.swapaxes(0, 1) if shared else query
    rows = rows.reshape(len(key), batch, -1, width)
    weights = jax.nn.softmax(jnp.einsum("tbqd,tbkd->tbqk", rows, key), axis=-1)
    out = jnp.einsum("tbqk,tbkd->tbqd", weights, value)
    if shared:
        return out.reshape(batch, streams, tokens, heads, width).swapaxes(0, 1)
    return out.reshape(query.shape)


class MoEAttention(nn.Module):
    """Self-attention whose heads are experts.

    Parameters: 'router' (a `Router`), 'experts' = {'query_kernel' f[E, D, d_h], 'out_kernel' f[E, d_h, D]} without
    biases, and 'key_value', a dense map D -> 2 d_h with bias. A token that the dispatch drops at an expert has no such
    head.

    Attributes:
      router: how tokens choose heads; `top_k` is their number.
      head_dim: d_h.
      num_tasks: tasks that exist.
      dispatch: how tokens reach experts.
    """

    router: RouterConfig
    head_dim: int
    num_tasks: int
    dispatch: Dispatch | str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, *, tasks: Sequence[int], train: bool = False) -> tuple[jax.Array, RouterStats]:
        """Lets tokens read each other.

        Args:
          x: f[T, B, N, D], T = len(tasks), or T = 1 while all streams are equal.
          tasks: static; the task of each stream.
          train: whether the router adds noise.

        Returns:
          f[T, B, N, D] (T = 1 if the gate is 'single' and x has one stream), and what the router did.
        """
        _, batch, tokens, width = x.shape
        experts = self.param("experts", _init_experts, self.router.num_experts, width, self.head_dim)
        routing = Router(self.router, self.num_tasks, name="router")(
            x.reshape(len(x), batch * tokens, width), tasks=tasks, train=train
        )
        streams, _, heads = routing.ids.shape

        pool = self.router.pool_size(tasks)  # experts out of these tasks' reach are not part of the program
        if pool < self.router.num_experts:
            experts = jax.tree.map(lambda leaf: leaf[:pool], experts)
        values = routing.values.reshape(-1, heads)
        ids = jnp.minimum(routing.ids, pool).reshape(-1, heads)  # "no expert" is the number of experts
        routed = route_tokens(ids, pool, self.dispatch, gate_values=values)
        flat = jnp.broadcast_to(x, (streams, *x.shape[1:])).reshape(-1, width)
        query = routed.gather(routed.linear(routed.scatter(flat), experts["query_kernel"], None))

        key_value = nn.Dense(2 * self.head_dim, name="key_value")(x.reshape(-1, width))
        key, value = jnp.split(key_value.reshape(*x.shape[:-1], -1), 2, axis=-1)
        mixed = attend_shared_head(query.reshape(streams, batch, tokens, heads, -1), key, value)

        slots = routed.linear(routed.scatter(mixed.reshape(-1, heads, self.head_dim)), experts["out_kernel"], None)
        y = routed.combine(slots, values)
        stats = router_stats(routing, routed.kept.reshape(routing.ids.shape))
        return y.reshape(streams, batch, tokens, width), stats


def _init_experts(key: jax.Array, num_experts: int, width: int, head_dim: int) -> dict[str, jax.Array]:
    query, out = jax.random.split(key)
    return {
        "query_kernel": uniform_fan_in(query, (num_experts, width, head_dim)),
        "out_kernel": uniform_fan_in(out, (num_experts, head_dim, width)),
    }
