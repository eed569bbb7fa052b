r"""Masked multi-head attention over tokens, and the masks that say which token may read which in a multitask model.

    A = softmax(Q K^T / sqrt(d) + M),   M_qk = 0 where query q may read key k, -inf where it may not

Rows of a mask are queries, columns are keys; True means "may read".

Letters: B batch, n tokens (q queries, k keys), D width, h heads, d = D/h, T task tokens, F feature tokens.

>>> multitask_mask(2, 1, "FxT").astype(int)
array([[1, 1, 1],
       [1, 1, 1],
       [0, 0, 1]])
>>> multitask_mask(2, 1, "TxT").astype(int)
array([[1, 0, 1],
       [0, 1, 1],
       [1, 1, 1]])
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.nn.local_rows import pin_rows, rows_mesh
from mtjax.sharding import BATCH_AXES, current_mesh

Initializer = nn.initializers.Initializer
MASKS = ("none", "FxT", "TxT", "FxT_TxT")
QUERY_BLOCK = 256  # queries per block of long attention
TOKENS_PER_CHUNK = 2048  # tokens whose layer fits a CPU cache


def multitask_mask(num_task_tokens: int, num_feature_tokens: int, mode: str | Sequence[Sequence[bool]]) -> np.ndarray:
    """Which token may read which, task tokens first.

    Args:
      num_task_tokens: T.
      num_feature_tokens: F.
      mode: 'none' (all read all), 'FxT' (feature tokens do not read task tokens), 'TxT' (a task token does not read
        another task token), 'FxT_TxT' (both), or a custom bool[n, n] with n = T + F. Task tokens always read features
        and themselves in the named modes.

    Returns:
      bool[n, n], True where query (row) may read key (column).

    Raises:
      ValueError: for an unknown mode, a custom mask of another shape, or one with a query that may read nothing.

    Reference: MultiTab (arXiv 2511.09970), multitask masked attention.
    """
    n = num_task_tokens + num_feature_tokens
    if not isinstance(mode, str):
        custom = np.asarray(mode, bool)
        if custom.shape != (n, n):
            raise ValueError(f"A custom mask must be bool[{n}, {n}] (task tokens, then features), got {custom.shape}")
        if not custom.any(axis=1).all():
            raise ValueError(f"Row {int(np.argmin(custom.any(axis=1)))} of the custom mask lets its token read nothing")
        return custom
    if mode not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)} or a bool[n, n], got {mode!r}")
    is_task = np.arange(n) < num_task_tokens
    allowed = np.ones((n, n), bool)
    if "FxT" in mode:
        allowed &= ~(~is_task[:, None] & is_task[None, :])
    if "TxT" in mode:
        allowed &= ~(is_task[:, None] & is_task[None, :] & ~np.eye(n, dtype=bool))
    return allowed


def readable_tokens(mask: np.ndarray, queries: Sequence[int], num_layers: int) -> list[int]:
    """Tokens that can influence `queries` through `num_layers` attention layers: what a single task has to compute."""
    needed = np.zeros(mask.shape[0], bool)
    needed[list(queries)] = True
    for _ in range(num_layers):
        needed |= mask[needed].any(axis=0)
    return np.flatnonzero(needed).tolist()


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(d) + mask) v.

    Args:
      query, key, value: f32[..., q or k, h, d].
      mask: bool[q, k], True where a query may read a key; None: everywhere.
      dropout: rate on the probabilities; used with `rng` only.
      rng: key of the dropout mask; None: no dropout.

    Returns:
      f32[..., q, h, d].
    """
    query = query * query.shape[-1] ** -0.5
    # In an export the number of queries may be a symbol.
    long = query.ndim == 3 and isinstance(query.shape[0], int) and query.shape[0] >= 2 * QUERY_BLOCK
    if long and jax.default_backend() == "cpu" and current_mesh() is None:  # whole sequences are on one device
        return _attend_in_blocks(query, key, value, mask, dropout, rng)
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key)
    if mask is not None:
        scores = jnp.where(mask.reshape((1,) * (scores.ndim - 2) + mask.shape), scores, jnp.finfo(scores.dtype).min)
    probabilities = _dropout(softmax(scores), dropout, rng)
    return jnp.einsum("...hqk,...khd->...qhd", probabilities, value)


def softmax(scores: jax.Array) -> jax.Array:
    """Over the last axis, computed in float32 at least: in half precision the sum over many keys would be rounded."""
    wide = jnp.promote_types(scores.dtype, jnp.float32)
    return jax.nn.softmax(scores.astype(wide), axis=-1).astype(scores.dtype)


def flat_rows(x: jax.Array, *, whole: bool = True) -> jax.Array:
    """f[..., D] as f[M, D]: XLA:CPU runs the gradient of a matrix product 3-5x faster than of a batched one.

    On a mesh the rows are pinned to their devices, and f[T, B, N, D] becomes f[T, B N, D]: T and a split B together are
    not split by rows.
    """
    keep = x.shape[:-3] if current_mesh() is not None and x.ndim > 3 and x.shape[0] > 1 else ()
    return pin_rows(x.reshape(*keep, -1, x.shape[-1]), axis=len(keep), whole=whole)


def _dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    if rng is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def _attend_in_blocks(query, key, value, mask, dropout, rng):
    """`attend` for one long sequence (the rows of a batch) on a CPU: head by head, block of queries by block.

    A block's scores stay in the cache and are recomputed on the way back. Keys and values enter transposed: the
    gradient of `q @ kT` then contracts over the leading axis of a small matrix, which XLA:CPU does 2-5x faster than the
    transposed product over the large one. Together 2x faster than the plain form (experiments/bench/tabular.py).
    """
    num_queries, num_heads, width = query.shape
    num_blocks = -(-num_queries // QUERY_BLOCK)
    pad = num_blocks * QUERY_BLOCK - num_queries
    query = jnp.pad(query, ((0, pad), (0, 0), (0, 0))).reshape(num_blocks, QUERY_BLOCK, num_heads, width)
    masks = None
    if mask is not None:  # padding queries read everything; their output is dropped
        masks = jnp.pad(mask, ((0, pad), (0, 0)), constant_values=True).reshape(num_blocks, QUERY_BLOCK, -1)

    def head(inputs):
        blocks, key_t, value_t, head_index = inputs

        @jax.checkpoint
        def block(block_query, block_mask, block_index):
            scores = block_query @ key_t
            if block_mask is not None:
                scores = jnp.where(block_mask, scores, jnp.finfo(scores.dtype).min)
            probabilities = softmax(scores)
            if rng is not None:
                block_rng = jax.random.fold_in(rng, head_index * num_blocks + block_index)
                probabilities = _dropout(probabilities, dropout, block_rng)
            return (value_t @ probabilities.T).T

        return jax.lax.map(lambda args: block(*args), (blocks, masks, jnp.arange(num_blocks)))

    heads_first = (query.transpose(2, 0, 1, 3), key.transpose(1, 2, 0), value.transpose(1, 2, 0), jnp.arange(num_heads))
    out = jax.lax.map(head, heads_first)  # [heads, blocks, QUERY_BLOCK, width]
    return out.reshape(num_heads, -1, width).swapaxes(0, 1)[:num_queries]


class MultiHeadAttention(nn.Module):
    """Self-attention with biases, as in the transformer encoder of MultiTab and SAINT.

    Attributes:
      num_heads: h; must divide the width.
      dropout: rate on attention probabilities.
      qkv_init: initializer of the kernel f[D, 3, D] of queries, keys and values, called with its packed shape [D, 3D]
        (Xavier-uniform on that shape in the published code).
      kernel_init: initializer of the output map.
    """

    num_heads: int
    dropout: float = 0.0
    qkv_init: Initializer = nn.initializers.xavier_uniform()
    kernel_init: Initializer = nn.initializers.normal(0.01)

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: Any = None, *, num_queries: int | None = None, train: bool = False
    ) -> jax.Array:
        """Lets tokens read each other.

        Args:
          x: f32[..., n, D].
          mask: bool[q, n], True where a query may read a key; None: everywhere.
          num_queries: q, only the first q tokens ask (all tokens are read); None: all n.
          train: dropout on.

        Returns:
          f32[..., q, D].
        """
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide the width {width}")
        # A dimension of their own for q, k and v: a split of the last one over devices then splits heads.
        rows = flat_rows(x)
        qkv = nn.DenseGeneral((3, width), kernel_init=self.qkv_init, name="qkv")(rows)
        qkv = pin_rows(qkv, axis=rows.ndim - 2)
        query, key, value = (qkv[..., i, :].reshape(*x.shape[:-1], self.num_heads, -1) for i in range(3))
        query = query[..., :num_queries, :, :]
        rng = self.make_rng("dropout") if self.dropout and train else None
        mask = None if mask is None else jnp.asarray(mask)
        mixed = attend(query, key, value, mask, dropout=self.dropout, rng=rng)
        mixed = mixed.reshape(*mixed.shape[:-2], width)
        out = nn.Dense(width, kernel_init=self.kernel_init, name="out")(flat_rows(mixed, whole=False))
        return pin_rows(out, axis=out.ndim - 2, whole=True).reshape(mixed.shape)


class FeedForward(nn.Module):
    """Dense -> activation (exact GELU) -> dropout -> dense, back to the input's width.

    Attributes:
      hidden: width after the activation.
      dropout: rate after the activation.
      kernel_init: initializer of both kernels.
      gate: None, or the activation g of a gated unit h = a * g(b), whose first layer has 2 `hidden` outputs [a, b];
        `nn.relu` makes it ReGLU.
    """

    hidden: int
    dropout: float = 0.0
    kernel_init: Initializer = nn.initializers.normal(0.01)
    gate: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """x f32[..., D] -> f32[..., D]."""
        flat = flat_rows(x)
        rows = flat.ndim - 2
        h = nn.Dense(self.hidden * (1 if self.gate is None else 2), kernel_init=self.kernel_init, name="in")(flat)
        h = pin_rows(h, axis=rows)
        if self.gate is None:
            h = nn.gelu(h, approximate=False)
        else:
            a, b = jnp.split(h, 2, axis=-1)
            h = a * self.gate(b)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        out = nn.Dense(x.shape[-1], kernel_init=self.kernel_init, name="out")(h)
        return pin_rows(out, axis=rows, whole=True).reshape(x.shape)


class TransformerLayer(nn.Module):
    """Pre-norm encoder layer: u = x + drop(attention(LN x)); y = u + feed_forward(LN u).

    Attributes:
      num_heads, ff_width: sizes.
      ff_dropout: after the attention and inside the feed-forward net.
      attention_dropout: on attention probabilities.
      num_queries: q, compute the first q tokens only (they read all); None: all.
    """

    num_heads: int
    ff_width: int
    ff_dropout: float = 0.0
    attention_dropout: float = 0.0
    qkv_init: Initializer = nn.initializers.xavier_uniform()
    kernel_init: Initializer = nn.initializers.normal(0.01)
    num_queries: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: Any = None, *, train: bool = False) -> jax.Array:
        """x f32[..., n, D] -> f32[..., q, D]; mask bool[q, n] or None."""
        attention = MultiHeadAttention(
            self.num_heads, self.attention_dropout, self.qkv_init, self.kernel_init, name="attention"
        )
        normed = nn.LayerNorm(epsilon=1e-5, name="norm_1")(x)
        attended = attention(normed, mask, num_queries=self.num_queries, train=train)
        u = x[..., : self.num_queries, :] + nn.Dropout(self.ff_dropout, deterministic=not train)(attended)
        feed_forward = FeedForward(self.ff_width, self.ff_dropout, self.kernel_init, name="feed_forward")
        return u + feed_forward(nn.LayerNorm(epsilon=1e-5, name="norm_2")(u), train=train)


def in_row_chunks(layer: nn.Module, x: jax.Array, mask: Any, rows: int | None, *, train: bool) -> jax.Array:
    """Applies a layer that treats rows independently, `rows` rows at a time, recomputing each chunk on the way back.

    On a CPU the activations of one chunk stay in the cache, which makes a step of MultiTab-Net 2-3 times faster
    (experiments/bench/tabular.py); everywhere it bounds memory by one chunk.

    Args:
      layer: `(x f32[b, n, D], mask, train=) -> f32[b, q, D]`.
      x: f32[B, n, D].
      mask: passed on.
      rows: rows per chunk, on a mesh of every device; None runs all at once.
      train: passed on; dropout draws anew for each chunk, so that other chunks (a mesh has its own) have other masks.

    Returns:
      f32[B, q, D].
    """
    batch = x.shape[0]
    if rows is None or rows >= batch:
        return layer(x, mask, train=train)
    shards = 1
    if current_mesh() is not None:  # chunks of what every device has
        mesh = rows_mesh(batch)
        shards = batch if mesh is None else math.prod(mesh.shape[name] for name in BATCH_AXES)
    own = batch // shards
    if rows >= own:
        return layer(x, mask, train=train)
    num_chunks = -(-own // rows)
    padded = jnp.pad(x.reshape(shards, own, *x.shape[1:]), ((0, 0), (0, num_chunks * rows - own), (0, 0), (0, 0)))
    padded = padded.reshape(shards, num_chunks, rows, *x.shape[1:]).swapaxes(0, 1)
    run = nn.scan(
        nn.remat(lambda layer, carry, chunk: (carry, layer(chunk, mask, train=train)), prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False, "dropout": True},
    )
    chunks = run(layer, (), padded.reshape(num_chunks, shards * rows, *x.shape[1:]))[1]
    chunks = chunks.reshape(num_chunks, shards, rows, *chunks.shape[2:]).swapaxes(0, 1)
    return chunks.reshape(shards, num_chunks * rows, *chunks.shape[3:])[:, :own].reshape(batch, *chunks.shape[3:])


def default_chunk(num_tokens: int) -> int | None:
    """Rows per chunk that suit the default backend: cache-sized on a CPU, None (all at once) elsewhere."""
    return max(1, TOKENS_PER_CHUNK // num_tokens) if jax.default_backend() == "cpu" else None
