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

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.attention import flat_rows, softmax
from mtjax.nn.balance import RouterStats, router_stats
from mtjax.nn.moe import Dispatch, route_tokens
from mtjax.nn.moe_parallel import at_experts, dispatch_mesh, own_params, static_slots
from mtjax.nn.routers import Router, RouterConfig
from mtjax.nn.stacked import uniform_fan_in
from mtjax.sharding import BATCH_AXES

P = jax.sharding.PartitionSpec


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
    weights = softmax(jnp.einsum("tbqd,tbkd->tbqk", rows, key))
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
      dispatch: how tokens reach experts. On a mesh see `attend_parallel`.
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

        key_value = nn.Dense(2 * self.head_dim, name="key_value")(flat_rows(x))
        key, value = jnp.split(key_value.reshape(*x.shape[:-1], -1), 2, axis=-1)
        images = (streams, batch, tokens)
        inputs = (
            jnp.broadcast_to(x, (*images, width)),
            key,
            value,
            routing.values.reshape(*images, heads),
            routing.ids.reshape(*images, heads),
        )
        mesh = dispatch_mesh(batch, self.router.num_experts)
        if mesh is not None:
            y, kept = attend_parallel(*inputs, experts, mesh=mesh, dispatch=self.dispatch)
        else:
            pool = self.router.pool_size(tasks)  # experts out of these tasks' reach are not part of the program
            if pool < self.router.num_experts:
                experts = jax.tree.map(lambda leaf: leaf[:pool], experts)
            y, kept = attend_with_experts(*inputs, experts, dispatch=self.dispatch)
        return y, router_stats(routing, kept.reshape(routing.ids.shape))


def attend_with_experts(
    x: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate_values: jax.Array,
    gate_ids: jax.Array,
    experts: Mapping[str, jax.Array],
    *,
    dispatch: Dispatch | str = "auto",
    axis: str | None = None,
    shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Queries by the experts, attention, output maps by the experts.

    Args:
      x: f[T, B, N, D].
      key, value: f[T or 1, B, N, d].
      gate_values: f[T, B, N, K].
      gate_ids: i32[T, B, N, K].
      experts: 'query_kernel' f[E, D, d] and 'out_kernel' f[E, d, D].
      dispatch: how tokens reach their experts.
      axis: inside of `shard_map`, the mesh axis over which experts are split; `experts` are then the device's own.
      shards: size of that axis.

    Returns:
      y f[T, B, N, D], and bool[T, B, N, K], what the dispatch did not drop.
    """
    num_experts, width, head_dim = experts["query_kernel"].shape
    num_experts, heads = num_experts * shards, gate_ids.shape[-1]
    values = gate_values.reshape(-1, heads)
    ids = jnp.minimum(gate_ids, num_experts).reshape(-1, heads)  # "no expert" is the number of experts
    routed = route_tokens(ids, num_experts, dispatch, gate_values=values)

    def linear(rows: jax.Array, kernel: jax.Array):
        if axis is None:
            return routed.linear(routed.scatter(rows), kernel, None)
        return at_experts(lambda slots: jnp.einsum("ecd,edf->ecf", slots, kernel), routed.scatter(rows), axis, shards)

    query = routed.gather(linear(x.reshape(-1, width), experts["query_kernel"]))
    mixed = attend_shared_head(query.reshape(*x.shape[:-1], heads, head_dim), key, value)
    slots = linear(mixed.reshape(-1, heads, head_dim), experts["out_kernel"])
    return routed.combine(slots, values).reshape(x.shape), routed.kept.reshape(gate_ids.shape)


def attend_parallel(
    x: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gate_values: jax.Array,
    gate_ids: jax.Array,
    experts: Mapping[str, jax.Array],
    *,
    mesh: Any,
    dispatch: Dispatch | str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`attend_with_experts` on a mesh of `mtjax.sharding`: rows of a batch on their device, experts on theirs.

    Queries and output maps are two round trips, four all-to-alls forward and four backward. Along the axis 'tensor' the
    work is repeated: there is one key-value head, and a query's width is one head's. Capacity is per device, and a
    dispatch that never drops pays for slots that cannot overflow, as in `mtjax.nn.moe_parallel`.
    """
    shards, dispatch = mesh.shape["expert"], Dispatch(dispatch) if isinstance(dispatch, str) else dispatch
    num_experts, width, _ = experts["query_kernel"].shape
    axes = tuple(name for name in BATCH_AXES if mesh.shape[name] > 1)
    fsdp = "fsdp" if "fsdp" in axes and width % mesh.shape["fsdp"] == 0 else None
    axis = "expert" if shards > 1 else None
    rows, specs = P(None, axes), {"query_kernel": P(axis, fsdp, None), "out_kernel": P(axis, None, fsdp)}
    if shards > 1:
        dispatch = static_slots(dispatch, num_experts)

    def on_device(experts, *inputs):
        mine = own_params(experts, specs, axes, fsdp)
        return attend_with_experts(*inputs, mine, dispatch=dispatch, axis=axis, shards=shards)

    shard = jax.shard_map(on_device, mesh=mesh, in_specs=(specs, *[rows] * 5), out_specs=rows)
    return shard(dict(experts), x, key, value, gate_values, gate_ids)


def _init_experts(key: jax.Array, num_experts: int, width: int, head_dim: int) -> dict[str, jax.Array]:
    query, out = jax.random.split(key)
    return {
        "query_kernel": uniform_fan_in(query, (num_experts, width, head_dim)),
        "out_kernel": uniform_fan_in(out, (num_experts, head_dim, width)),
    }
