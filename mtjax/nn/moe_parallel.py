r"""Expert parallelism: experts live on different devices, and tokens travel to them and back.

P devices along one mesh axis hold N / P tokens and E / P experts each. A device routes its own tokens into slots
f[E, C, D], sends every expert's slots to the expert's device (first all-to-all), computes its own experts on the slots
that came from everywhere, f[E / P, P C, D], and sends the results back (second all-to-all), where gates combine them:

    [E, C, D] = [P, E/P, C, D]  --all-to-all-->  [P, E/P, C, D] -> f_e -> [P, E/P, C, D]  --all-to-all-->  [E, C, D]

Slots have one static size, so there is a capacity, and it holds per device: C = ceil((N / P) K factor / E), rounded up
to a multiple of 4, at most N / P. An assignment is dropped where its expert's slots *on the token's device* are full,
also where the batch as a whole has room. Where nothing is dropped the result is that of one device.

**What a dispatch that never drops costs.** All tokens of a device may choose the same expert, so 'auto' and the other
backends without a capacity take C = N / P: slots, exchanges and the experts' work are E / K times those of the mean
load. In production use `Dispatch("sort_capacity", capacity_factor=...)`, whose cost does not grow with E. (On one
device, or where experts are not split, 'auto' costs what it always does.)

On a mesh of `mtjax.sharding` the other axes take part: tokens are split over all axes of a batch; kernels that are
split over 'fsdp' are gathered, this device's experts only, and their gradients leave as slices; the hidden width is
split over 'tensor', with one sum over it forward and one backward.

Letters: P devices of the axis, R other devices that tokens are split over, N tokens, K experts per token, E experts, C
capacity, D width, H hidden width.

References: Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding", ICLR
2021. Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", NeurIPS 2021 (one pair of all-to-alls a layer).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax.nn.local_rows import rows_mesh
from mtjax.nn.moe import Dispatch, MoEOutput, gelu, moe_apply, route_tokens
from mtjax.nn.moe_queues import capacity

P = jax.sharding.PartitionSpec
STATIC = ("sort_capacity", "einsum_capacity")  # backends whose slots have a static size


def dispatch_mesh(batch: int, num_experts: int) -> Any:
    """The ambient mesh if every device can dispatch rows of its own there, else None.

    None without a mesh, inside of another `shard_map`, or where the devices do not divide the batch (a model is
    initialised with two rows) or the axis 'expert' not the experts: the compiler then splits the ordinary path.
    """
    mesh = rows_mesh(batch)
    return None if mesh is None or num_experts % mesh.shape["expert"] else mesh


def moe_apply_parallel(
    x: jax.Array,
    gate_values: jax.Array,
    gate_ids: jax.Array,
    expert_params: Mapping[str, jax.Array],
    *,
    mesh: Any,
    axis: str = "expert",
    token_axes: Sequence[str] | None = None,
    fsdp_axis: str | None = None,
    tensor_axis: str | None = None,
    dispatch: Dispatch | str = "sort_capacity",
    activation: Callable[[jax.Array], jax.Array] = gelu,
) -> MoEOutput:
    """`moe_apply` with experts sharded over a mesh axis: two all-to-alls forward, two backward.

    Args:
      x: f[N, D] of which N is split over devices, or f[T, B, N, D] of which B is.
      gate_values: f[N, K] or f[T, B, N, K].
      gate_ids: i32, of the same shape, as for `moe_apply`.
      expert_params: as for `moe_apply`; sharded on their first axis over `axis`.
      mesh: has `axis`; concrete or abstract.
      axis: the mesh axis over which experts are sharded; its size divides E. Of size 1: no exchange.
      token_axes: mesh axes over which tokens are sharded, `axis` among them; None: `axis` alone. Their size divides N
        (or B).
      fsdp_axis: mesh axis, one of `token_axes`, over which the kernels' D is split too, where it divides D.
      tensor_axis: mesh axis over which H is split, where it divides H.
      dispatch: its capacity is per device; a backend that never drops has slots for all tokens at every expert (see the
        module) unless `axis` has size 1.
      activation: as for `moe_apply`.

    Returns:
      `MoEOutput` of the shapes of x and gate_ids, sharded like x.

    Raises:
      ValueError: a sentence, if sizes do not fit.
    """
    dispatch = Dispatch(dispatch) if isinstance(dispatch, str) else dispatch
    token_axes = (axis,) if token_axes is None else tuple(token_axes)
    num_experts, width, hidden = expert_params["kernel_in"].shape
    if axis not in token_axes or not set(token_axes) <= set(mesh.axis_names):
        raise ValueError(f"token_axes must be axes of the mesh {mesh.axis_names} and hold {axis!r}, got {token_axes}")
    if x.ndim not in (2, 4) or x.shape[:-1] != gate_ids.shape[:-1]:
        raise ValueError(f"x must be [N, D] or [T, B, N, D] and gates [..., K], got {x.shape} and {gate_ids.shape}")
    rows = x.shape[0 if x.ndim == 2 else 1]
    shards, token_shards = mesh.shape[axis], math.prod(mesh.shape[name] for name in token_axes)
    if num_experts % shards or rows % token_shards:
        raise ValueError(
            f"{shards} devices must divide the number of experts, {num_experts}, and {token_shards} devices the number "
            f"of {'tokens' if x.ndim == 2 else 'images'}, {rows}"
        )

    token_axes = tuple(name for name in token_axes if mesh.shape[name] > 1)  # a sum over one device would be compiled
    axis = axis if shards > 1 else None

    def if_divides(name: str | None, size: int) -> str | None:
        return name if name is not None and mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None

    fsdp, tensor = if_divides(fsdp_axis, width), if_divides(tensor_axis, hidden)
    varying = token_axes if tensor is None else (*token_axes, tensor)

    tokens = P(token_axes) if x.ndim == 2 else P(None, token_axes)
    specs = {
        "kernel_in": P(axis, fsdp, tensor),
        "bias_in": P(axis, tensor),
        "kernel_out": P(axis, tensor, fsdp),
        "bias_out": P(axis),
    }

    def on_device(x, gate_values, gate_ids, params):
        shape, gate_shape = x.shape, gate_ids.shape
        values, ids = gate_values.reshape(-1, gate_shape[-1]), gate_ids.reshape(-1, gate_shape[-1])
        params = own_params(params, specs, varying, fsdp)
        if tensor is not None:  # every part adds its share of the hidden width, the first one the bias
            first = jax.lax.axis_index(tensor) == 0
            params["bias_out"] = jnp.where(first, params["bias_out"], jnp.zeros_like(params["bias_out"]))
        rows, weights = vary(x.reshape(-1, width), tokens, varying), vary(values, tokens, varying)
        if shards == 1:
            kept = route_tokens(ids, num_experts, dispatch, gate_values=values).kept
            y = moe_apply(rows, weights, ids, params, dispatch=dispatch, activation=activation).y
        else:
            routed = route_tokens(ids, num_experts, static_slots(dispatch, num_experts), gate_values=values)

            def experts(slots):
                hidden = activation(_affine(slots, params["kernel_in"], params["bias_in"]))
                return _affine(hidden, params["kernel_out"], params["bias_out"])

            slots = at_experts(experts, routed.scatter(rows), axis, shards)
            kept, y = routed.kept, routed.combine(slots, weights).astype(x.dtype)
        y = y if tensor is None else jax.lax.psum(y, tensor)
        return MoEOutput(y.reshape(shape), kept.reshape(gate_shape))

    shard = jax.shard_map(on_device, mesh=mesh, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens)
    return shard(x, gate_values, gate_ids, {name: expert_params[name] for name in specs})


def static_slots(dispatch: Dispatch, num_experts: int) -> Dispatch:
    """The dispatch itself if its slots have a static size, else one whose slots no routing can overflow."""
    if dispatch.backend in STATIC:
        return dispatch
    return dataclasses.replace(dispatch, backend="sort_capacity", capacity_factor=float(num_experts))


def at_experts(function: Callable, slots: Any, axis: str, shards: int) -> Any:
    """Inside of `shard_map`: sends slots to the devices of their experts, applies `function` there, sends results back.

    Args:
      function: f[E/P, P C, F] -> f[E/P, P C, F'], on the device's own experts.
      slots: what `scatter` of a dispatch with slots of static size returns, a pytree of one f[E, C, F].
      axis: mesh axis of the experts.
      shards: P.

    Returns:
      The same pytree with f[E, C, F'].
    """
    leaves, form = jax.tree.flatten(slots)
    (mine,) = leaves
    num_experts, places, width = mine.shape

    def exchange(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0)

    sent = exchange(mine.reshape(shards, num_experts // shards, places, width))
    out = function(sent.swapaxes(0, 1).reshape(num_experts // shards, shards * places, width))
    back = exchange(out.reshape(num_experts // shards, shards, places, -1).swapaxes(0, 1))
    return jax.tree.unflatten(form, [back.reshape(num_experts, places, -1)])


def own_params(params: Mapping[str, jax.Array], specs: Mapping[str, P], axes: Sequence[str], fsdp: str | None) -> dict:
    """Inside of `shard_map`: the parameters of a device's own experts, whole along 'fsdp'.

    They count from here on as different on every device along `axes`: their gradients are summed (over 'fsdp':
    reduce-scattered) here and nowhere else.
    """
    mine = {name: vary(value, specs[name], axes) for name, value in params.items()}
    for name, value in mine.items():
        if fsdp is not None and fsdp in specs[name]:
            mine[name] = jax.lax.all_gather(value, fsdp, axis=specs[name].index(fsdp), tiled=True)
    return mine


def vary(x: jax.Array, spec: P, axes: Sequence[str]) -> jax.Array:
    """x, which came in with `spec`, as one that may differ along `axes`: cotangents are summed over the new ones."""
    there = {name for entry in spec if entry is not None for name in (entry if isinstance(entry, tuple) else (entry,))}
    missing = tuple(axis for axis in axes if axis not in there)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


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
