r"""Sparse mixture-of-experts layers behind one function: every token visits K of E experts and pays for K.

    y[n] = sum_{k < K} g[n, k] f_{e(n, k)}(x[n]),        f_e(x) = act(x W1[e] + b1[e]) W2[e] + b2[e]

g are gate values and e expert ids of a router (`mtjax.nn.routers`). How tokens reach their experts is a `Dispatch`. It
changes the cost and, for those with a capacity, which assignments are dropped, and nothing else:

| backend             | form                                                              | drops | derivatives     |
|---------------------|-------------------------------------------------------------------|-------|-----------------|
| `all_experts`       | every expert on every token, then K are picked: the reference     | never | any             |
| `sort_capacity`     | tokens sorted by expert, C slots per expert, one batched product  | yes   | reverse mode    |
| `capacity_overflow` | the same with C = N K / E; what does not fit is served in blocks  | never | reverse mode    |
| `block_dropless`    | tokens sorted by expert, blocks of B rows of one expert           | never | reverse mode    |
| `einsum_capacity`   | one-hot dispatch and combine products in groups of tokens (TPUs)  | yes   | any             |
| `ragged`            | tokens sorted by expert, grouped matrix products (kernels)        | never | reverse mode    |

`auto` never drops; it picks by platform and size (see `choose`). All run under jit, grad, vmap (over seeds, with any
operands batched) and jacrev (per-task gradients).

Experts that are not a two-layer network use the lower level: `route_tokens(...)` returns an object with `scatter` (rows
to their experts), `linear` (every expert's affine map), `gather` and `combine` (rows back to their tokens). What is
between them is a pytree of arrays f[..., F], on which elementwise functions act through `jax.tree.map`.

Letters: N tokens, K experts per token, E experts, C capacity, D width, H hidden width, F output width, B block.

>>> gate_values, gate_ids = jnp.array([[0.75, 0.25]]), jnp.array([[2, 0]])
>>> routed = route_tokens(gate_ids, 3, "all_experts")
>>> slots = routed.linear(routed.scatter(jnp.ones((1, 1))), jnp.array([1.0, 10.0, 100.0])[:, None, None])
>>> routed.combine(slots, gate_values).tolist()
[[75.25]]

References: Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", NeurIPS 2021 (V-MoE). Liang et al.,
"M3ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning with Model-Accelerator Co-design",
NeurIPS 2022.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtjax.nn import moe_backends, moe_queues

BACKENDS = ("auto", "sort_capacity", "capacity_overflow", "block_dropless", "einsum_capacity", "ragged", "all_experts")
PRIORITIES = ("first_choice", "batch")
gelu = functools.partial(jax.nn.gelu, approximate=False)


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How tokens reach their experts.

    Attributes:
      backend: one of `BACKENDS`.
      capacity_factor: slots per expert over the mean number of assignments per expert, of `sort_capacity` and
        `einsum_capacity`: C = ceil(N K capacity_factor / E), rounded up to a multiple of 4, at most N.
      priority: whose assignment is kept when an expert is full. 'first_choice': all first choices before all second
        choices, in each of them the order of the batch; 'batch': the same with the tokens of larger first gates ahead
        (V-MoE's batch-prioritised routing).
      block: B, rows per block of `block_dropless` and `capacity_overflow`; None: what was measured to be fast.
      groups: token groups of `einsum_capacity`, each with its own capacity; must divide N.
      kernel: grouped product of `ragged`: None (by platform), 'lax', 'megablox', 'megablox_interpret' or 'tokamax'.

    Raises:
      ValueError: a sentence that names the argument, what was expected and what came.
    """

    backend: str = "auto"
    capacity_factor: float = 1.25
    priority: str = "first_choice"
    block: int | None = None
    groups: int = 1
    kernel: str | None = None

    def __post_init__(self):
        for name, value, allowed in [
            ("backend", self.backend, BACKENDS),
            ("priority", self.priority, PRIORITIES),
            ("kernel", self.kernel, (None, *moe_backends.KERNELS)),
        ]:
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor must be positive, got {self.capacity_factor}")
        if (self.block is not None and self.block < 1) or self.groups < 1:
            raise ValueError(f"block and groups must be at least 1, got {self.block} and {self.groups}")


class MoEOutput(NamedTuple):
    """What a mixture of experts computed.

    Attributes:
      y: f[N, D].
      kept: bool[N, K], False where an assignment was dropped or names no expert; its term is missing in y.
    """

    y: jax.Array
    kept: jax.Array


def choose(width: int = 0, hidden: int = 0, *, platform: str | None = None) -> str:
    """The backend that `auto` stands for: one that never drops, by platform and size of an expert.

    CPU: `capacity_overflow` at all sizes (experiments/bench/MOE_COST.md, 8 to 2048 tokens, sections `dispatch`, `small`
    and `seeds`). Where experts are used very unevenly `block_dropless` is faster forward (section `skew`). TPU:
    `ragged`, an instruction there. GPU: `ragged` if tokamax is installed and experts are at least 512 by 1024, below
    which grouped kernels were slower than batched products; that and the TPU's choice are from others' measurements,
    not from ours.

    Args:
      width: D; 0 if it is not known.
      hidden: H.
      platform: 'cpu', 'gpu' or 'tpu'; None: JAX's default.

    Returns:
      A name from `BACKENDS`.
    """
    platform = platform or jax.default_backend()
    kernels = platform in ("gpu", "cuda", "rocm") and moe_backends.has_tokamax() and width >= 512 and hidden >= 1024
    return "ragged" if platform == "tpu" or kernels else "capacity_overflow"


def route_tokens(
    gate_ids: jax.Array, num_experts: int, dispatch: Dispatch | str = "auto", *, gate_values: jax.Array | None = None
):
    """Plans how tokens reach their experts; for experts of any kind.

    Args:
      gate_ids: i32[N, K], distinct experts in each row, in order of preference; E or more for no expert.
      num_experts: E.
      dispatch: a `Dispatch`, or the name of a backend.
      gate_values: f[N, K]; only priority 'batch' reads them.

    Returns:
      An object with
        `.scatter(x f[N, D] or f[N, K, D]) -> slots`, rows to their experts;
        `.linear(slots, kernel f[E, D, F], bias f[E, F] | None) -> slots`;
        `.gather(slots) -> f[N, K, F]`, zeros where an assignment was dropped;
        `.combine(slots, gate_values f[N, K]) -> f[N, F]`;
        `.kept` bool[N, K], False where it was dropped or there is no expert.

    Raises:
      ValueError: a sentence, if arguments do not fit.
    """
    dispatch = Dispatch(dispatch) if isinstance(dispatch, str) else dispatch
    if gate_ids.ndim != 2 or not jnp.issubdtype(gate_ids.dtype, jnp.integer):
        raise ValueError(f"gate_ids must be integers of shape [N, K], got {gate_ids.dtype}{list(gate_ids.shape)}")
    num_tokens, top_k = gate_ids.shape
    if top_k > num_experts:
        raise ValueError(f"A token can visit at most num_experts={num_experts} experts, got gate_ids for {top_k}")
    gate_ids = jnp.minimum(gate_ids.astype(jnp.int32), num_experts)
    backend = choose() if dispatch.backend == "auto" else dispatch.backend
    if backend == "all_experts":
        return moe_backends.AllExperts(gate_ids, num_experts)
    rank = None
    if dispatch.priority == "batch" and backend in ("sort_capacity", "einsum_capacity"):
        if gate_values is None:
            raise ValueError("priority='batch' sorts tokens by their gates: gate_values must be given to route_tokens")
        rank = token_rank(gate_values)
    if backend == "einsum_capacity":
        if num_tokens % dispatch.groups:
            raise ValueError(f"groups={dispatch.groups} must divide the number of tokens, {num_tokens}")
        return moe_backends.form_groups(gate_ids, num_experts, dispatch.capacity_factor, dispatch.groups, rank)
    if backend == "ragged":
        return moe_backends.Ragged.form(gate_ids, num_experts, dispatch.kernel)
    default = {
        "sort_capacity": None,
        "capacity_overflow": moe_queues.OVERFLOW_BLOCK,
        "block_dropless": moe_queues.default_block(gate_ids.size, num_experts),
    }[backend]
    factor = {"sort_capacity": dispatch.capacity_factor, "capacity_overflow": 1.0, "block_dropless": 0.0}[backend]
    return moe_queues.form_queues(
        gate_ids,
        num_experts,
        places=moe_queues.capacity(num_tokens, top_k, num_experts, factor),
        block=None if default is None else dispatch.block or default,
        token_rank=rank,
    )


def token_rank(gate_values: jax.Array) -> jax.Array:
    """i32[N]: 0 for the token with the largest gate f[N, K], 1 for the next, ...; ties in the order of the batch."""
    order = jnp.argsort(-jnp.max(jax.lax.stop_gradient(gate_values), axis=1), stable=True)
    places = jnp.arange(order.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(places).at[order].set(places, unique_indices=True)


def moe_apply(
    x: jax.Array,
    gate_values: jax.Array,
    gate_ids: jax.Array,
    expert_params: Mapping[str, jax.Array],
    *,
    dispatch: Dispatch | str = "auto",
    activation: Callable[[jax.Array], jax.Array] = gelu,
) -> MoEOutput:
    """y[n] = sum_k g[n, k] f_{e(n, k)}(x[n]) with two-layer experts.

    Args:
      x: f[N, D].
      gate_values: f[N, K].
      gate_ids: i32[N, K], distinct experts in each row, in order of preference; E or more for no expert.
      expert_params: {'kernel_in': f[E, D, H], 'bias_in': f[E, H], 'kernel_out': f[E, H, D], 'bias_out': f[E, D]}.
      dispatch: a `Dispatch`, or the name of a backend.
      activation: act, elementwise.

    Returns:
      `MoEOutput`: y f[N, D] and what was kept, bool[N, K].

    Raises:
      ValueError: a sentence, if shapes do not fit.
    """
    kernel = expert_params["kernel_in"]
    if x.ndim != 2 or gate_values.shape != gate_ids.shape or gate_ids.shape[:1] != x.shape[:1]:
        raise ValueError(
            "x must be [N, D], gate_values and gate_ids both [N, K], got "
            f"{x.shape}, {gate_values.shape} and {gate_ids.shape}"
        )
    if kernel.ndim != 3 or kernel.shape[1] != x.shape[1]:
        raise ValueError(f"kernel_in must be [E, D, H] with D = {x.shape[1]} as in x, got {kernel.shape}")
    dispatch = Dispatch(dispatch) if isinstance(dispatch, str) else dispatch
    if dispatch.backend == "auto":
        dispatch = dataclasses.replace(dispatch, backend=choose(*kernel.shape[1:]))
    routed = route_tokens(gate_ids, kernel.shape[0], dispatch, gate_values=gate_values)
    if isinstance(routed, moe_queues.Queues):
        y = moe_queues.queued_mlp(x, gate_values, expert_params, routed, activation)
    else:
        slots = routed.linear(routed.scatter(x), kernel, expert_params["bias_in"])
        slots = jax.tree.map(activation, slots)
        slots = routed.linear(slots, expert_params["kernel_out"], expert_params["bias_out"])
        y = routed.combine(slots, gate_values)
    return MoEOutput(y.astype(x.dtype), routed.kept)
