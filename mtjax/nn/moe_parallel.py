r"""Expert parallelism: experts live on different devices, and tokens travel to them and back.

P devices along one mesh axis hold N / P tokens and E / P experts each. A device routes its own tokens into slots
f[E, C, D], sends every expert's slots to the expert's device (first all-to-all), computes its own experts on the slots
that came from everywhere, f[E / P, P C, D], and sends the results back (second all-to-all), where gates combine them:

    [E, C, D] = [P, E/P, C, D]  --all-to-all-->  [P, E/P, C, D] -> f_e -> [P, E/P, C, D]  --all-to-all-->  [E, C, D]

Slots have one static size, so there is a capacity, and it holds per device: C = ceil((N / P) K factor / E), rounded up
to a multiple of 4, at most N / P. An assignment is dropped where its expert's slots *on the token's device* are full,
also where the batch as a whole has room. Where nothing is dropped the result is that of one device.

Letters: P devices of the axis, R other devices that tokens are split over, N tokens, K experts per token, E experts, C
capacity, D width.

References: Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding", ICLR
2021. Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", NeurIPS 2021 (one pair of all-to-alls a layer).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtjax.nn.moe import Dispatch, MoEOutput, gelu, route_tokens
from mtjax.nn.moe_queues import capacity

P = jax.sharding.PartitionSpec


def moe_apply_parallel(
    x: jax.Array,
    gate_values: jax.Array,
    gate_ids: jax.Array,
    expert_params: Mapping[str, jax.Array],
    *,
    mesh: jax.sharding.Mesh,
    axis: str = "expert",
    token_axes: Sequence[str] | None = None,
    dispatch: Dispatch | str = "sort_capacity",
    activation: Callable[[jax.Array], jax.Array] = gelu,
) -> MoEOutput:
    """`moe_apply` with experts sharded over a mesh axis: two all-to-alls forward, two backward.

    Args:
      x: f[N, D].
      gate_values: f[N, K].
      gate_ids: i32[N, K], as for `moe_apply`.
      expert_params: as for `moe_apply`; sharded on their first axis over `axis`.
      mesh: has `axis`.
      axis: the mesh axis over which experts are sharded; its size divides E.
      token_axes: mesh axes over which tokens are sharded, `axis` among them; None: `axis` alone. Their size divides N.
      dispatch: 'sort_capacity' or 'einsum_capacity', whose slots have a static size; the capacity is per device.
      activation: as for `moe_apply`.

    Returns:
      `MoEOutput`, sharded over `token_axes`.

    Raises:
      ValueError: a sentence, if sizes or the dispatch do not fit.
    """
    dispatch = Dispatch(dispatch) if isinstance(dispatch, str) else dispatch
    token_axes = (axis,) if token_axes is None else tuple(token_axes)
    num_tokens, width = x.shape
    num_experts = expert_params["kernel_in"].shape[0]
    if axis not in token_axes or not set(token_axes) <= set(mesh.axis_names):
        raise ValueError(f"token_axes must be axes of the mesh {mesh.axis_names} and hold {axis!r}, got {token_axes}")
    if dispatch.backend not in ("sort_capacity", "einsum_capacity"):
        raise ValueError(
            "Experts on other devices need slots of a static size: dispatch must be 'sort_capacity' or "
            f"'einsum_capacity', got {dispatch.backend!r}"
        )
    shards, token_shards = mesh.shape[axis], math.prod(mesh.shape[name] for name in token_axes)
    if num_experts % shards or num_tokens % token_shards:
        raise ValueError(
            f"{shards} devices must divide the number of experts, {num_experts}, and {token_shards} devices the number "
            f"of tokens, {num_tokens}"
        )

    def exchange(slots: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(slots, axis, split_axis=0, concat_axis=0)

    def on_device(x, gate_values, gate_ids, params):
        routed = route_tokens(gate_ids, num_experts, dispatch, gate_values=gate_values)
        slots, form = jax.tree.flatten(routed.scatter(x))  # one array, f[E, C, D]
        sent = exchange(slots[0].reshape(shards, num_experts // shards, -1, width))
        mine = sent.swapaxes(0, 1).reshape(num_experts // shards, -1, width)
        hidden = activation(_affine(mine, params["kernel_in"], params["bias_in"]))
        mine = _affine(hidden, params["kernel_out"], params["bias_out"])
        back = exchange(mine.reshape(num_experts // shards, shards, -1, width).swapaxes(0, 1))
        slots = jax.tree.unflatten(form, [back.reshape(num_experts, -1, width)])
        return MoEOutput(routed.combine(slots, gate_values).astype(x.dtype), routed.kept)

    tokens = P(token_axes)
    shard = jax.shard_map(on_device, mesh=mesh, in_specs=(tokens, tokens, tokens, P(axis)), out_specs=tokens)
    return shard(x, gate_values, gate_ids, dict(expert_params))


def _affine(slots: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.einsum("ecd,edf->ecf", slots, kernel) + bias[:, None]


class Volume(NamedTuple):
    """Bytes that a layer sends between devices.

    Attributes:
      operand: of one all-to-all on one device, E C D itemsize; what the compiled program shows.
      sent: of these, what leaves the device, (P - 1) / P of them.
      forward: sent by all devices in a forward pass, 2 all-to-alls. A backward pass sends as much again.
    """

    operand: int
    sent: int
    forward: int


def communication_volume(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    width: int,
    *,
    shards: int,
    token_shards: int | None = None,
    capacity_factor: float = 1.25,
    itemsize: int = 4,
) -> Volume:
    """Bytes between devices: 2 (P - 1) / P E C D itemsize per device and forward pass.

    Up to the rounding of C that is 2 (P - 1) / P factor (N / P) K D itemsize: what a device sends does not depend on
    the number of experts.

    Args:
      num_tokens: N, on all devices.
      top_k: K.
      num_experts: E.
      width: D.
      shards: P, devices that share the experts.
      token_shards: devices that share the tokens; None: P.
      capacity_factor: of the dispatch.
      itemsize: bytes of a number.

    Returns:
      The volume.

    >>> communication_volume(4096, 2, 8, 64, shards=4, capacity_factor=1.0)
    Volume(operand=524288, sent=393216, forward=3145728)
    """
    token_shards = token_shards or shards
    places = capacity(num_tokens // token_shards, top_k, num_experts, capacity_factor)
    operand = num_experts * places * width * itemsize
    sent = operand * (shards - 1) // shards
    return Volume(operand, sent, 2 * sent * token_shards)
