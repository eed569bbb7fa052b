r"""Ways of reaching experts that do not go through queues: all of them, one-hot products, grouped matrix products.

`AllExperts` is the definition, y[n] = sum_k g[n, k] f_{e(n, k)}(x[n]), computed with every expert on every token.

`OneHot` is V-MoE's form for TPUs: tokens stand in G groups, and a dispatch tensor O[g, s, k, e, c], 1 where the k-th
choice of token s is place c of expert e, moves rows by matrix products,

    slots[e, (g, c)] = sum_{s, k} O[g, s, k, e, c] x[g, s]
    y[g, s]          = sum_{k, e, c} gate[g, s, k] O[g, s, k, e, c] f_e(slots)[e, (g, c)]

at 2 S (E C) D multiply-adds per group, S E C / (K S H) = factor S / H of what the experts cost: for groups that are
small beside the hidden width.

`Ragged` sorts assignments by expert and multiplies stretches of rows by their expert's kernel. The kernel is
`jax.lax.ragged_dot` (an instruction on TPUs, a dense product with every expert elsewhere), megablox (a Pallas kernel
for TPUs), or tokamax where it is installed (GPUs and TPUs).

Letters: N tokens, K experts per token, E experts, G groups of S tokens, C capacity, D width, F output width.

References: Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", NeurIPS 2021, appendix C. Lepikhin et al.,
"GShard", ICLR 2021. Gale et al., "MegaBlocks", MLSys 2023.
"""

import functools
import importlib.util

import flax.struct
import jax
import jax.numpy as jnp

from mtjax.nn import moe_queues

KERNELS = ("lax", "megablox", "megablox_interpret", "tokamax")
ROWS = 128  # rows of a tile of megablox


@flax.struct.dataclass
class AllExperts:
    """Every expert on every row. Slots are f[E, R, F], R = N where a token's choices read the same row, else N K.

    Attributes:
      ids: i32[N, K]; E where there is no expert.
      num_experts: E.
    """

    ids: jax.Array
    num_experts: int = flax.struct.field(pytree_node=False)

    @property
    def kept(self) -> jax.Array:
        return self.ids < self.num_experts

    def scatter(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(1, -1, x.shape[-1])
        return jnp.broadcast_to(rows, (self.num_experts, *rows.shape[1:]))

    def linear(self, slots: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        out = jnp.einsum("erd,edf->erf", slots, kernel)
        return out if bias is None else out + bias[:, None]

    def gather(self, slots: jax.Array) -> jax.Array:
        num_tokens, top_k = self.ids.shape
        row = jnp.arange(num_tokens)[:, None]
        if slots.shape[1] != num_tokens:
            row = row * top_k + jnp.arange(top_k)[None]
        row = jnp.broadcast_to(row, self.ids.shape)
        return slots.at[self.ids, row].get(mode="fill", fill_value=0)

    def combine(self, slots: jax.Array, gate_values: jax.Array) -> jax.Array:
        return _weighted(self.gather(slots), gate_values)


def _weighted(rows: jax.Array, gate_values: jax.Array) -> jax.Array:
    """sum_k g[n, k] rows[n, k]."""
    return jnp.sum(rows * gate_values[..., None], axis=1).astype(rows.dtype)


@flax.struct.dataclass
class OneHot:
    """One-hot products. Slots are f[E, G C, F].

    Attributes:
      expert: f32[G, S, K, E], 1 for the choice's expert if the assignment is kept.
      place: f32[G, S, K, C], 1 for its place.
      kept: bool[N, K].
    """

    expert: jax.Array
    place: jax.Array
    kept: jax.Array

    def scatter(self, x: jax.Array) -> jax.Array:
        groups, size, top_k, num_experts = self.expert.shape
        one_hot = jnp.einsum("gske,gskc->gskec", self.expert, self.place).astype(x.dtype)
        if x.ndim == 2:
            rows = x.reshape(groups, size, -1)
            slots = jnp.einsum("gsec,gsd->egcd", one_hot.sum(2), rows)
        else:
            slots = jnp.einsum("gskec,gskd->egcd", one_hot, x.reshape(groups, size, top_k, -1))
        return slots.reshape(num_experts, -1, x.shape[-1])

    def linear(self, slots: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        out = jnp.einsum("erd,edf->erf", slots, kernel)
        return out if bias is None else out + bias[:, None]

    def _grouped(self, slots: jax.Array) -> jax.Array:
        return slots.reshape(slots.shape[0], self.expert.shape[0], -1, slots.shape[-1])

    def gather(self, slots: jax.Array) -> jax.Array:
        one_hot = jnp.einsum("gske,gskc->gskec", self.expert, self.place).astype(slots.dtype)
        rows = jnp.einsum("gskec,egcf->gskf", one_hot, self._grouped(slots))
        return rows.reshape(*self.kept.shape, -1)

    def combine(self, slots: jax.Array, gate_values: jax.Array) -> jax.Array:
        gates = gate_values.reshape(self.expert.shape[:3])
        weights = jnp.einsum("gsk,gske,gskc->gsec", gates, self.expert, self.place).astype(slots.dtype)
        return jnp.einsum("gsec,egcf->gsf", weights, self._grouped(slots)).reshape(self.kept.shape[0], -1)


def form_groups(
    gate_ids: jax.Array, num_experts: int, factor: float, groups: int, token_rank: jax.Array | None
) -> OneHot:
    """Places by cumulative sums in every group, first choices before second choices, then by rank of the token.

    Args:
      gate_ids: i32[N, K].
      num_experts: E.
      factor: capacity factor, of each group.
      groups: G, divides N; a group is N / G consecutive tokens.
      token_rank: i32[N], tokens of lower rank come first; None: the order of the batch.

    Returns:
      `OneHot`.
    """
    num_tokens, top_k = gate_ids.shape
    size = num_tokens // groups
    places = moe_queues.capacity(size, top_k, num_experts, factor)
    chosen = jax.nn.one_hot(gate_ids.reshape(groups, size, top_k), num_experts, dtype=jnp.int32)
    order = None
    if token_rank is not None:
        order = jnp.argsort(token_rank.reshape(groups, size), axis=1)
        chosen = jnp.take_along_axis(chosen, order[:, :, None, None], axis=1)
    queue = chosen.swapaxes(1, 2).reshape(groups, top_k * size, num_experts)  # first choices first
    place = jnp.sum((jnp.cumsum(queue, axis=1) - 1) * queue, axis=-1).reshape(groups, top_k, size).swapaxes(1, 2)
    if order is not None:
        back = jnp.argsort(order, axis=1)[:, :, None]
        place = jnp.take_along_axis(place, back, axis=1)
        chosen = jnp.take_along_axis(chosen, back[..., None], axis=1)
    kept = place < places  # one_hot of a place behind the end is zero
    kept = kept.reshape(num_tokens, top_k) & (gate_ids < num_experts)
    return OneHot(chosen.astype(jnp.float32), jax.nn.one_hot(place, places), kept)


@flax.struct.dataclass
class Ragged:
    """Grouped products. Slots are f[N K, F], rows sorted by expert.

    Attributes:
      queues: the sorted order.
      kernel: one of `KERNELS`, or None for the default of the platform.
    """

    queues: moe_queues.Queues
    kernel: str | None = flax.struct.field(pytree_node=False)

    @classmethod
    def form(cls, gate_ids: jax.Array, num_experts: int, kernel: str | None) -> "Ragged":
        # One block of one row per assignment behind a first tier without places: rows are the sorted order.
        return cls(moe_queues.form_queues(gate_ids, num_experts, places=0, block=1), kernel)

    @property
    def kept(self) -> jax.Array:
        return self.queues.kept

    @property
    def _order(self) -> jax.Array:
        return self.queues.order[: self.queues.ids.size]

    def scatter(self, x: jax.Array) -> jax.Array:
        return _sort_rows(x, self.queues)

    def linear(self, slots: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        out = grouped_product(self.kernel or default_kernel(), slots, kernel, jnp.diff(self.queues.start))
        if bias is None:
            return out
        return out + bias.at[self.queues.ids.reshape(-1)[self._order]].get(mode="clip")

    def gather(self, slots: jax.Array) -> jax.Array:
        return _unsort_rows(slots, self.queues)

    def combine(self, slots: jax.Array, gate_values: jax.Array) -> jax.Array:
        return _weighted(self.gather(slots), gate_values)


@jax.custom_vjp
def _sort_rows(x: jax.Array, queues: moe_queues.Queues) -> jax.Array:
    assignment = queues.order[: queues.ids.size]
    return x.reshape(-1, x.shape[-1])[assignment if x.ndim == 3 else assignment // queues.ids.shape[1]]


def _sort_rows_bwd(residuals, rows):
    queues, per_choice = residuals
    back = _unsort_rows(rows, queues)
    return (back if per_choice is not None else jnp.sum(back, axis=1)), None


_sort_rows.defvjp(lambda x, queues: (_sort_rows(x, queues), (queues, () if x.ndim == 3 else None)), _sort_rows_bwd)


@jax.custom_vjp
def _unsort_rows(rows: jax.Array, queues: moe_queues.Queues) -> jax.Array:
    # Kernels leave what stands behind the last group, rows without an expert, undefined.
    back = rows[queues.start[queues.ids] + queues.place]
    return jnp.where(queues.kept[..., None], back, 0)


_unsort_rows.defvjp(
    lambda rows, queues: (_unsort_rows(rows, queues), queues),
    lambda queues, back: (_sort_rows(back, queues), None),
)


def has_tokamax() -> bool:
    """Whether tokamax is installed."""
    return importlib.util.find_spec("tokamax") is not None


def default_kernel(platform: str | None = None) -> str:
    """'tokamax' on a GPU where it is installed, else 'lax' (on TPUs that is an instruction)."""
    platform = platform or jax.default_backend()
    return "tokamax" if platform in ("gpu", "cuda", "rocm") and has_tokamax() else "lax"


def _grouped(kernel: str, rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    if kernel == "lax":
        return jax.lax.ragged_dot(rows, weights, sizes)
    if kernel == "tokamax":
        import tokamax

        return tokamax.ragged_dot(rows, weights, sizes)
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    # Rows behind the last group belong to nobody: they fill the last tile.
    padded = jnp.pad(rows, ((0, -rows.shape[0] % ROWS), (0, 0)))
    tiling = (ROWS, min(128, weights.shape[1]), min(128, weights.shape[2]))
    interpret = kernel == "megablox_interpret"
    return gmm(padded, weights, sizes, rows.dtype, tiling, interpret=interpret)[: rows.shape[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_product(kernel: str, rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiplies stretches of rows by their own matrix: out[i] = rows[i] weights[g(i)].

    It can be vmapped over any operands, which `jax.lax.ragged_dot` itself cannot: one member of a batch (a seed, or a
    task of a Jacobian) is taken after the other.

    Args:
      kernel: one of `KERNELS`.
      rows: f[M, D], group after group.
      weights: f[E, D, F].
      sizes: i32[E], rows per group. Rows behind the last group give anything.

    Returns:
      f[M, F].
    """
    return jax.custom_batching.sequential_vmap(functools.partial(_grouped, kernel))(rows, weights, sizes)


def _grouped_bwd(kernel, residuals, out):
    @jax.custom_batching.sequential_vmap
    def backward(out, rows, weights, sizes):
        return jax.vjp(lambda r, w: _grouped(kernel, r, w, sizes), rows, weights)[1](out)

    return *backward(out, *residuals), None


grouped_product.defvjp(lambda kernel, *args: (grouped_product(kernel, *args), args), _grouped_bwd)
