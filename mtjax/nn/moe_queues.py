r"""Queues of tokens, one per expert: what a mixture of experts computes, in the order in which it is computed.

The N K assignments (token n, its k-th expert) are sorted by expert, so that expert e owns the stretch
start[e] .. start[e + 1] of the sorted order, its queue. The first C places of every queue are the *first tier*: slots
f[E, C, D], which one batched product serves,

    s[e, c] = x[token of place c of queue e]        y[n] = sum_k g[n, k] f_{e(n, k)}(s)[e(n, k), place(n, k)]

What stands behind place C is dropped (`block=None`, as in Switch Transformers and V-MoE) or is the *second tier*:
blocks of B places of one expert, served one after another by a loop that ends with the last block in use. With C = 0
all places are in blocks (MegaBlocks' dropless form with dense blocks; the reordered, queue by queue execution that
M3ViT's accelerator uses); with C = N K / E, the mean load, the batched product does nearly everything where experts are
used evenly, the loop does the rest, and nothing is ever dropped.

Rows move by gathers in both directions: place -> token into the slots, (token, choice) -> place out of them; the
gradients use the other table of the two, so that nothing is added up by scattering but the few rows of blocks.

Letters: N tokens, K experts per token, M = N K assignments, E experts, C capacity, B block, D width, H hidden, F out.

References: Fedus et al., "Switch Transformers", JMLR 2022 (capacity). Riquelme et al., "Scaling Vision with Sparse
Mixture of Experts", NeurIPS 2021, section 3 and appendix C (batch priority). Gale et al., "MegaBlocks: Efficient Sparse
Training with Mixture-of-Experts", MLSys 2023 (blocks). Liang et al., "M3ViT", NeurIPS 2022 (queues).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]
# Chosen by measurement on two CPU cores, at the shapes of experiments/bench/moe.py:
BLOCK = 128  # rows of a block when all places are in blocks; of a second tier that few places reach, OVERFLOW_BLOCK
OVERFLOW_BLOCK = 64
CACHED = 2**21  # bytes of all experts' pre-activations that a CPU keeps from the forward to the backward pass


class Slots(NamedTuple):
    """Rows at their experts; elementwise functions are applied with `jax.tree.map`.

    Attributes:
      first: f[E, C, F].
      blocks: f[(ceil(M/B) + E) B, F], or None where the second tier is dropped.
    """

    first: jax.Array
    blocks: jax.Array | None


def capacity(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """C = ceil(N K factor / E), rounded up to a multiple of 4, at most N: the places per expert.

    >>> capacity(1024, 4, 16, 1.05), capacity(6, 1, 2, 1.0), capacity(6, 1, 2, 9.0)
    (272, 4, 6)
    """
    # The product is rounded first: 100 * 1.1 is 110.00000000000001.
    places = -(-round(num_tokens * top_k * factor, 6) // num_experts)
    return min(num_tokens, int(-(-places // 4) * 4))


@flax.struct.dataclass
class Queues:
    """Assignments sorted by expert.

    Attributes:
      order: i32[M + pad], assignment n K + k of every place of the sorted order; M behind the end.
      start: i32[E + 1], where each expert's queue starts; start[E] is where the last one ends.
      ids: i32[N, K]; E where there is no expert.
      place: i32[N, K], the assignment's place in its expert's queue.
      kept: bool[N, K], False where it is dropped or there is no expert.
      places: C.
      block: B, or None.
      limit: places of every queue behind which assignments are dropped; None: none are.
    """

    order: jax.Array
    start: jax.Array
    ids: jax.Array
    place: jax.Array
    kept: jax.Array
    places: int = flax.struct.field(pytree_node=False)
    block: int | None = flax.struct.field(pytree_node=False)
    limit: int | None = flax.struct.field(pytree_node=False)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.start.shape[0] - 1

    def scatter(self, x: jax.Array) -> Slots:
        """Rows to their experts: f[N, D], the same row for all choices of a token, or f[N, K, D] -> slots."""
        return _scatter(x, self)

    def linear(self, slots: Slots, kernel: jax.Array, bias: jax.Array | None = None) -> Slots:
        """Every expert's affine map: slots of width D, f[E, D, F], f[E, F] -> slots of width F."""
        first = jnp.einsum("ecd,edf->ecf", slots.first, kernel)
        blocks = None if slots.blocks is None else _blocks_linear(slots.blocks, kernel, self)
        if bias is not None:
            first = first + bias[:, None]
            blocks = None if blocks is None else blocks + jnp.repeat(bias[self.block_expert], self.block, axis=0)
        return Slots(first, blocks)

    def gather(self, slots: Slots) -> jax.Array:
        """Rows back to their tokens: slots -> f[N, K, F], zeros where an assignment was dropped."""
        return _gather(slots, self)

    def combine(self, slots: Slots, gate_values: jax.Array) -> jax.Array:
        """y[n] = sum_k g[n, k] row[n, k]: slots, f[N, K] -> f[N, F]."""
        rows = self.gather(slots)
        return jnp.sum(rows * gate_values[..., None], axis=1).astype(rows.dtype)

    def in_blocks(self) -> "Queues":
        """The same assignments, all of them in blocks."""
        return self.replace(places=0, block=default_block(self.ids.size, self.num_experts))

    # Tables, computed where they are used. Index M (or N) means "nothing", and reads as zeros.

    @property
    def table(self) -> jax.Array:
        """i32[E, C], the assignment in each slot of the first tier; M where there is none."""
        i = self.start[:-1, None] + jnp.arange(self.places)[None]
        found = self.order.at[jnp.minimum(i, self.order.shape[0] - 1)].get(mode="promise_in_bounds")
        return jnp.where(i < self.start[1:, None], found, self.ids.size)

    @property
    def slot(self) -> jax.Array:
        """i32[N, K], position in the flattened first tier; E C for what is not there."""
        there = (self.place < self.places) & (self.ids < self.num_experts)
        return jnp.where(there, self.ids * self.places + self.place, self.num_experts * self.places)

    @property
    def num_blocks(self) -> int:
        """The static bound on blocks, ceil(M / B) + E."""
        return -(-self.ids.size // self.block) + self.num_experts

    @property
    def block_end(self) -> jax.Array:
        """i32[E], number of blocks in use by experts 0..e."""
        waiting = jnp.maximum(jnp.minimum(jnp.diff(self.start), self._limit) - self.places, 0)
        return jnp.cumsum(-(-waiting // self.block))

    @property
    def _limit(self) -> int:
        return self.ids.size if self.limit is None else self.limit

    @property
    def block_expert(self) -> jax.Array:
        """i32[num_blocks], whose block it is; E - 1 behind the last one in use."""
        j = jnp.arange(self.num_blocks)
        return jnp.minimum(jnp.sum(self.block_end[None] <= j[:, None], axis=1), self.num_experts - 1)

    def block_at(self, j: jax.Array, block_end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Expert e i32[] of block j, and its assignments i32[B] (M where there is none)."""
        e = jnp.sum(block_end <= j)
        begun = jnp.where(e > 0, block_end[jnp.maximum(e - 1, 0)], 0)
        at = self.start[e] + self.places + (j - begun) * self.block
        found = jax.lax.dynamic_slice(self.order, (at,), (self.block,))
        stop = jnp.minimum(self.start[e + 1], self.start[e] + self._limit)
        return e, jnp.where(at + jnp.arange(self.block) < stop, found, self.ids.size)

    @property
    def block_table(self) -> jax.Array:
        """i32[num_blocks B], the assignment in each row of the blocks; M where there is none."""
        j, end = jnp.arange(self.num_blocks), self.block_end
        e = self.block_expert
        begun = jnp.where(e > 0, end[jnp.maximum(e - 1, 0)], 0)
        i = (self.start[e] + self.places + (j - begun) * self.block)[:, None] + jnp.arange(self.block)[None]
        found = self.order.at[jnp.minimum(i, self.order.shape[0] - 1)].get(mode="promise_in_bounds")
        inside = (i < self.start[e + 1][:, None]) & (j < end[-1])[:, None]
        return jnp.where(inside, found, self.ids.size).reshape(-1)

    @property
    def block_row(self) -> jax.Array:
        """i32[N, K], row in the blocks; num_blocks B for what is in the first tier."""
        end = self.block_end
        begun = jnp.concatenate([jnp.zeros(1, end.dtype), end[:-1]])
        row = begun.at[self.ids].get(mode="clip") * self.block + self.place - self.places
        there = (self.place >= self.places) & (self.ids < self.num_experts)
        return jnp.where(there, row, self.num_blocks * self.block)


def default_block(num_assignments: int, num_experts: int) -> int:
    """B where all places are in blocks: `BLOCK`, less where the mean load is less."""
    return min(BLOCK, max(8, -(-num_assignments // num_experts)))


def form_queues(
    gate_ids: jax.Array, num_experts: int, *, places: int, block: int | None = None, token_rank: jax.Array | None = None
) -> Queues:
    """Sorts assignments by expert, first choices before second choices, then by rank of the token.

    Args:
      gate_ids: i32[N, K], the experts of each token, in order of preference; E for no expert.
      num_experts: E.
      places: C, slots per expert in the first tier.
      block: B, rows per block of the second tier; None drops what does not fit the first.
      token_rank: i32[N], a permutation; tokens of lower rank come first. None: their order in the batch.

    Returns:
      `Queues`.

    Raises:
      ValueError: if there are too many assignments to sort by one 32-bit key.
    """
    num_tokens, top_k = gate_ids.shape
    m = gate_ids.size
    if (num_experts + 1) * m >= 2**31:
        raise ValueError(
            f"{m} assignments to {num_experts} experts exceed what a 32-bit sort key holds; route tokens in groups, or "
            "shard them with moe_apply_parallel"
        )
    rank = jnp.arange(num_tokens, dtype=jnp.int32) if token_rank is None else token_rank
    # One key of (expert, choice, rank): a sort of single integers takes a quarter of the time of an argsort.
    keys = jnp.sort((gate_ids * m + jnp.arange(top_k)[None] * num_tokens + rank[:, None]).reshape(-1))
    choice, token = jnp.divmod(keys % m, num_tokens)
    if token_rank is not None:
        token = jnp.zeros_like(rank).at[rank].set(jnp.arange(num_tokens, dtype=jnp.int32), unique_indices=True)[token]
    order = token * top_k + choice
    start = jnp.searchsorted(keys, jnp.arange(num_experts + 1, dtype=jnp.int32) * m, method="scan_unrolled")
    start = start.astype(jnp.int32)
    sorted_at = jnp.zeros(m, jnp.int32).at[order].set(jnp.arange(m, dtype=jnp.int32), unique_indices=True)
    place = sorted_at.reshape(num_tokens, top_k) - start[gate_ids]
    kept = gate_ids < num_experts
    if block is None:
        kept &= place < places
    order = jnp.concatenate([order, jnp.full(max(block or 0, BLOCK), m, order.dtype)])
    return Queues(order, start, gate_ids, place, kept, places, block, places if block is None else None)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x f[R, F] at any integers; zeros where the index is R or more."""
    return x.at[index].get(mode="fill", fill_value=0)


def _rows_of(assignment: jax.Array, queues: Queues, per_choice: bool) -> jax.Array:
    """Row of x f[N, D] or f[N K, D] that an assignment reads; its end for M."""
    return assignment if per_choice else assignment // queues.ids.shape[1]


@jax.custom_vjp
def _scatter(x: jax.Array, queues: Queues) -> Slots:
    rows, per_choice = x.reshape(-1, x.shape[-1]), x.ndim == 3
    first = take_rows(rows, _rows_of(queues.table, queues, per_choice))
    blocks = None
    if queues.block is not None:
        blocks = take_rows(rows, _rows_of(queues.block_table, queues, per_choice))
    return Slots(first, blocks)


def _scatter_bwd(residuals, slots):
    queues, per_choice = residuals
    rows = _gather(slots, queues)
    return (rows if per_choice is not None else jnp.sum(rows, axis=1)), None


_scatter.defvjp(lambda x, queues: (_scatter(x, queues), (queues, () if x.ndim == 3 else None)), _scatter_bwd)


@jax.custom_vjp
def _gather(slots: Slots, queues: Queues) -> jax.Array:
    width = slots.first.shape[-1]
    if not queues.places:
        return take_rows(slots.blocks, queues.block_row)
    rows = take_rows(slots.first.reshape(-1, width), queues.slot)
    if slots.blocks is not None:
        rows = jnp.where((queues.place < queues.places)[..., None], rows, take_rows(slots.blocks, queues.block_row))
    return rows


_gather.defvjp(
    lambda slots, queues: (_gather(slots, queues), queues),
    lambda queues, rows: (_scatter(rows, queues), None),
)


# Loops over blocks. Their length is a number of the batch, so vmap takes one member of the batch after the other, and
# the gradient is written out.


@jax.custom_batching.sequential_vmap
def _loop_linear(rows: jax.Array, kernel: jax.Array, queues: Queues) -> jax.Array:
    end, block = queues.block_end, queues.block

    def body(j, out):
        product = jax.lax.dynamic_slice_in_dim(rows, j * block, block) @ kernel[jnp.sum(end <= j)]
        return jax.lax.dynamic_update_slice_in_dim(out, product, j * block, 0)

    return jax.lax.fori_loop(0, end[-1], body, jnp.zeros_like(rows, shape=(rows.shape[0], kernel.shape[-1])))


@jax.custom_batching.sequential_vmap
def _loop_outer(rows: jax.Array, out: jax.Array, queues: Queues) -> jax.Array:
    end, block = queues.block_end, queues.block

    def body(j, kernel):
        e = jnp.sum(end <= j)
        left, right = (jax.lax.dynamic_slice_in_dim(a, j * block, block) for a in (rows, out))
        return kernel.at[e].add(left.T @ right)

    zeros = jnp.zeros_like(rows, shape=(queues.num_experts, rows.shape[1], out.shape[1]))
    return jax.lax.fori_loop(0, end[-1], body, zeros)


@jax.custom_vjp
def _blocks_linear(rows: jax.Array, kernel: jax.Array, queues: Queues) -> jax.Array:
    """Every block's rows times its expert's kernel."""
    return _loop_linear(rows, kernel, queues)


def _blocks_linear_bwd(residuals, out):
    rows, kernel, queues = residuals
    return _loop_linear(out, kernel.swapaxes(1, 2), queues), _loop_outer(rows, out, queues), None


_blocks_linear.defvjp(lambda *args: (_loop_linear(*args), args), _blocks_linear_bwd)


# The two-layer experts, whole: nothing is materialised that the loop does not reach.


def queued_mlp(x: jax.Array, gate_values: jax.Array, params: dict, queues: Queues, activation: Activation) -> jax.Array:
    """y[n] = sum_k g[n, k] (act(x[n] W1[e] + b1[e]) W2[e] + b2[e]) with e = ids[n, k], over what is kept.

    Args:
      x: f[N, D].
      gate_values: f[N, K].
      params: {'kernel_in' f[E, D, H], 'bias_in' f[E, H], 'kernel_out' f[E, H, D], 'bias_out' f[E, D]}.
      queues: from `form_queues`.
      activation: elementwise.

    Returns:
      f[N, D]. Gradients are written out (reverse mode only): the gate's is <act(z), dy W2^T> + <b2, dy>, which needs no
      expert output.
    """
    weights = (params["kernel_in"], params["bias_in"], params["kernel_out"], params["bias_out"])
    return _mlp(activation, x, gate_values, weights, queues)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(activation, x, gates, weights, queues):
    return _mlp_fwd(activation, x, gates, weights, queues)[0]


def _mlp_fwd(activation, x, gates, weights, queues):
    def forward(x, gates, weights, queues):
        y, z = jnp.zeros_like(x), None
        if queues.places:
            y, z = _first_fwd(activation, x, gates, weights, queues)
            if jax.default_backend() == "cpu" and math.prod(z.shape) * z.dtype.itemsize > CACHED:
                z = None  # Fresh memory costs a CPU more than the product: the backward pass goes block by block.
        return (y if queues.block is None else _blocks_fwd(activation, y, x, gates, weights, queues)), z

    y, z = _one_by_one(forward, queues)(x, gates, weights, queues)
    return y, (x, gates, weights, queues, z)


def _mlp_bwd(activation, residuals, dy):
    def backward(dy, x, gates, weights, queues, z):
        if z is not None:
            grads = _first_bwd(activation, dy, x, gates, weights, queues, z)
        else:
            grads = jax.tree.map(jnp.zeros_like, (x, gates, weights))
            queues = queues.in_blocks() if queues.places else queues
        if queues.block is not None:
            grads = _blocks_bwd(activation, grads, dy, x, gates, weights, queues)
        return jax.tree.map(lambda grad, of: grad.astype(of.dtype), grads, (x, gates, weights))

    queues = residuals[3]
    return *_one_by_one(backward, queues)(dy, *residuals), None


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


def _one_by_one(function, queues):
    """`function` with the vmap rule of a loop: one seed or task after the other (on a CPU no slower than together)."""
    if queues.block is None and jax.default_backend() != "cpu":
        return function
    return jax.custom_batching.sequential_vmap(function)


def _first_fwd(activation, x, gates, weights, queues):
    """The first tier: y f[N, D], and the pre-activations f[E, C, H]."""
    kernel_in, bias_in, kernel_out, bias_out = weights
    rows = take_rows(x, _rows_of(queues.table, queues, False))
    z = jnp.einsum("ecd,edh->ech", rows, kernel_in) + bias_in[:, None]
    out = jnp.einsum("ech,ehd->ecd", activation(z), kernel_out) + bias_out[:, None]
    return _weighted_rows(out, queues.slot, gates).astype(x.dtype), z


def _weighted_rows(rows: jax.Array, slot: jax.Array, gates: jax.Array | None) -> jax.Array:
    """sum_k g[n, k] rows[slot[n, k]]: choice by choice, so that f[N, K, F] is never in memory."""
    rows = rows.reshape(-1, rows.shape[-1])
    parts = (take_rows(rows, slot[:, k]) * (1 if gates is None else gates[:, k, None]) for k in range(slot.shape[1]))
    return sum(parts)


def _first_bwd(activation, dy, x, gates, weights, queues, z):
    kernel_in, _, kernel_out, bias_out = weights
    table, slot = queues.table, queues.slot
    gate = take_rows(gates.reshape(-1, 1), table).astype(x.dtype)  # [E, C, 1]
    rows, dout = (take_rows(a, _rows_of(table, queues, False)) for a in (x, dy))
    h, pull = jax.vjp(activation, z)
    dh = jnp.einsum("ecd,ehd->ech", dout, kernel_out)  # per unit of gate
    dgate = jnp.sum(dh * h, axis=-1) + jnp.einsum("ecd,ed->ec", dout, bias_out)
    (dz,) = pull(dh * gate)
    dout = dout * gate
    grads = (
        jnp.einsum("ecd,ech->edh", rows, dz),
        jnp.sum(dz, axis=1),
        jnp.einsum("ech,ecd->ehd", h, dout),
        jnp.sum(dout, axis=1),
    )
    dx = _weighted_rows(jnp.einsum("ech,edh->ecd", dz, kernel_in), slot, None)
    return dx, take_rows(dgate.reshape(-1), slot).astype(gates.dtype), grads


def _block_inputs(j, end, x, gates, weights, queues):
    e, assignment = queues.block_at(j, end)
    token = assignment // queues.ids.shape[1]
    gate = take_rows(gates.reshape(-1, 1), assignment).astype(x.dtype)  # [B, 1]
    return e, assignment, token, gate, take_rows(x, token), [w[e] for w in weights]


def _blocks_fwd(activation, y, x, gates, weights, queues):
    end = queues.block_end

    def body(j, y):
        _, _, token, gate, rows, (kernel_in, bias_in, kernel_out, bias_out) = _block_inputs(
            j, end, x, gates, weights, queues
        )
        out = activation(rows @ kernel_in + bias_in[None]) @ kernel_out + bias_out[None]
        return y.at[token].add(gate * out, mode="drop")

    return jax.lax.fori_loop(0, end[-1], body, y)


def _blocks_bwd(activation, grads, dy, x, gates, weights, queues):
    end = queues.block_end

    def body(j, grads):
        dx, dgates, dweights = grads
        e, assignment, token, gate, rows, (kernel_in, bias_in, kernel_out, bias_out) = _block_inputs(
            j, end, x, gates, weights, queues
        )
        dout = take_rows(dy, token)
        h, pull = jax.vjp(activation, rows @ kernel_in + bias_in[None])
        dh = dout @ kernel_out.T
        dgate = jnp.sum(dh * h, axis=-1) + dout @ bias_out
        (dz,) = pull(dh * gate)
        dout = dout * gate
        more = (rows.T @ dz, jnp.sum(dz, axis=0), h.T @ dout, jnp.sum(dout, axis=0))
        dweights = tuple(old.at[e].add(new) for old, new in zip(dweights, more, strict=True))
        dgates = dgates.at[assignment].set(dgate.astype(dgates.dtype), mode="drop")
        return dx.at[token].add(dz @ kernel_in.T, mode="drop"), dgates, dweights

    # Sums over many blocks, at least in float32.
    dx, dgates, dweights = jax.tree.map(lambda grad: grad.astype(jnp.promote_types(grad.dtype, jnp.float32)), grads)
    dx, dgates, dweights = jax.lax.fori_loop(0, end[-1], body, (dx, dgates.reshape(-1), dweights))
    return dx, dgates.reshape(gates.shape), dweights
