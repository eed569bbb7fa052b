r"""Expert by expert: a mixture of experts that holds the weights of two experts, however many there are.

All tokens are gated first and queued at the experts that they chose. Then one expert after the other, among those whose
queue is not empty, works through its queue, block by block, and adds its weighted outputs:

    queue_e = tokens that chose e,       y[n] += g[n, e] E_e(x[n])   for n in queue_e,       e over non-empty queues

While expert e works, the weights of the next one are fetched (the double buffer), so that two experts are resident and
not E. Experts that no token chose are never fetched. Inference only: the number of turns depends on the data.

Reference: the accelerator of Liang et al., "M3ViT", NeurIPS 2022, and Sarkar et al., "Edge-MoE", ICCAD 2023, as an
algorithm; their pipelines and fixed-point formats are not modelled.

Letters: N tokens, D width, H hidden width of an expert, E experts, K experts per token.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

exact_gelu = functools.partial(jax.nn.gelu, approximate=False)


def expert_queue_apply(
    x: jax.Array,
    gate_values: jax.Array,
    gate_ids: jax.Array,
    expert_params: Mapping[str, jax.Array],
    *,
    activation: Callable[[jax.Array], jax.Array] = exact_gelu,
    block: int = 32,
    threshold: float = 0.0,
) -> jax.Array:
    """The function of `mtjax.nn.moe.moe_apply`, without drops, computed expert by expert.

    Args:
      x: f[N, D].
      gate_values: f[N, K].
      gate_ids: i32[N, K]; E (no expert) is allowed.
      expert_params: 'kernel_in' f[E, D, H], 'bias_in' f[E, H], 'kernel_out' f[E, H, D], 'bias_out' f[E, D].
      activation: between the two layers of an expert.
      block: tokens that an expert takes at a time.
      threshold: assignments whose gate value is not above it are not queued (M3ViT's code has 0.1 as an option; 0
        skips only what would add nothing).

    Returns:
      f[N, D].
    """
    num_experts, chosen = expert_params["kernel_in"].shape[0], gate_ids.shape[1]
    ids = jnp.where(gate_values > threshold, gate_ids, num_experts).reshape(-1)
    order = jnp.argsort(ids, stable=True)  # assignments, queue after queue
    length = jnp.sum(ids[None] == jnp.arange(num_experts)[:, None], axis=1)
    start = jnp.cumsum(length) - length
    turns = jnp.argsort(length == 0, stable=True)  # non-empty queues first
    num_turns = jnp.sum(length > 0)
    values = gate_values.reshape(-1)

    def fetch(turn: jax.Array) -> dict[str, jax.Array]:
        expert = turns[jnp.minimum(turn, num_experts - 1)]
        return {name: leaf[expert] for name, leaf in expert_params.items()}

    def work(turn: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        weights, y = carry
        following = fetch(turn + 1)  # in the other half of the buffer
        expert = turns[turn]

        def take(step: jax.Array, y: jax.Array) -> jax.Array:
            position = step * block + jnp.arange(block)
            mine = position < length[expert]
            assignment = order[jnp.where(mine, start[expert] + position, 0)]
            token = assignment // chosen
            hidden = activation(x[token] @ weights["kernel_in"] + weights["bias_in"][None])
            out = hidden @ weights["kernel_out"] + weights["bias_out"][None]
            return y.at[token].add(jnp.where(mine, values[assignment], 0.0)[:, None] * out)

        return following, jax.lax.fori_loop(0, -(-length[expert] // block), take, y)

    return jax.lax.fori_loop(0, num_turns, work, (fetch(jnp.asarray(0)), jnp.zeros_like(x)))[1]


def peak_weight_bytes(expert_params: Mapping[str, jax.Array], *, resident: int | None = 2) -> int:
    """Bytes of the weights that must be in fast memory: of `resident` experts, or of all for None.

    >>> experts = {"kernel_in": jnp.zeros((16, 4, 8)), "bias_in": jnp.zeros((16, 8))}
    >>> peak_weight_bytes(experts), peak_weight_bytes(experts, resident=None)
    (320, 2560)
    """
    total = 0
    for leaf in expert_params.values():
        held = leaf.shape[0] if resident is None else min(resident, leaf.shape[0])
        total += held * (leaf.size // leaf.shape[0]) * leaf.dtype.itemsize
    return total
