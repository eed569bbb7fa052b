"""FT-Transformer: feature tokenizer, pre-norm transformer with ReGLU, prediction from a [CLS] token.

    tokens = [cls, column_1 .. column_F]                          every column, categorical ones too, has a bias
    layer:  tokens += attention(LN tokens);  tokens += reglu(LN tokens)
    output  = head(relu(LN cls))

As in the authors' code the very first layer norm is left out, and in the last layer only [CLS] asks: its output is all
that the head reads.

The default sizes are those of the baseline in the MultiTab paper (width 16, 2 blocks, feed-forward width 256, 4 heads,
tower of 64 units); `PAPER` holds the authors' defaults. MultiTab's baseline also differs in structure: GELU, a layer
norm at the very start, none before the head, no bias for categorical columns, N(0, 0.01^2) for every weight. That
network is a `MultiTabNet` of one task with `row_mixing='none'`. Biases of linear layers start at 0 here, at PyTorch's
uniform draw in the authors' code.

Reference: Gorishniy et al., "Revisiting Deep Learning Models for Tabular Data", NeurIPS 2021, section 3.3, and the
authors' code.

Letters: K tasks, B batch, F columns, n = 1 + F, D width.

>>> model = single_task_ft_transformer({"click": 1, "buy": 1}, cardinalities=(5, 3), num_numeric=2, **PAPER)
>>> model.body.num_blocks, model.head_hidden
(3, ())
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from mtjax.models.single_task_model import SingleTaskModel
from mtjax.nn.attention import FeedForward, MultiHeadAttention, default_chunk, in_row_chunks
from mtjax.nn.stacked import uniform_fan_in
from mtjax.nn.tokenizer import FeatureTokenizer

Initializer = nn.initializers.Initializer
PAPER: Mapping[str, Any] = {
    "width": 192,
    "num_heads": 8,
    "ff_width": 256,  # 4/3 of the width
    "num_blocks": 3,
    "head_hidden": (),
    "ff_dropout": 0.1,
    "attention_dropout": 0.2,
}


def single_task_ft_transformer(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    *,
    head_hidden: Sequence[int] = (64,),
    head_dropout: float = 0.0,
    kernel_init: Initializer = uniform_fan_in,
    **options: Any,
) -> SingleTaskModel:
    """K FT-Transformers, one per task.

    Args:
      heads: task name -> output size.
      cardinalities: codes of each categorical column, the unknown code 0 included.
      num_numeric: numeric columns.
      head_hidden: hidden widths of the heads, () for the paper's linear head.
      head_dropout: dropout rate in the heads.
      kernel_init: of linear maps, heads included; the packed query-key-value maps are Xavier-uniform.
      **options: other fields of `FTTransformer`.

    Returns:
      The model.
    """
    body = FTTransformer(tuple(cardinalities), num_numeric, kernel_init=kernel_init, **options)
    return SingleTaskModel(FrozenDict(heads), body, tuple(head_hidden), head_dropout, kernel_init)


def uniform_width(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """U(-1/sqrt(D), 1/sqrt(D)) for tokens f32[..., D]."""
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * shape[-1] ** -0.5


class FTLayer(nn.Module):
    """u = x + drop(attention(norm x)), y = u + drop(reglu(LN u)), for the first `num_queries` tokens.

    Attributes:
      num_heads, ff_width, ff_dropout, attention_dropout, residual_dropout, kernel_init: as in `FTTransformer`.
      norm_first: False leaves out the norm before the attention.
      num_queries: tokens to compute; None: all.
    """

    num_heads: int
    ff_width: int
    ff_dropout: float
    attention_dropout: float
    residual_dropout: float
    kernel_init: Initializer
    norm_first: bool = True
    num_queries: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: Any = None, *, train: bool = False) -> jax.Array:
        """x f32[B, n, D] -> f32[B, num_queries, D]."""
        # Xavier-uniform on the packed kernel has the bound sqrt(6 / 4D), the authors' with their gain of 1/sqrt(2).
        attention = MultiHeadAttention(
            self.num_heads, self.attention_dropout, kernel_init=self.kernel_init, name="attention"
        )
        feed_forward = FeedForward(self.ff_width, self.ff_dropout, self.kernel_init, nn.relu, name="feed_forward")
        drop = nn.Dropout(self.residual_dropout, deterministic=not train)

        normed = nn.LayerNorm(epsilon=1e-5, name="norm_1")(x) if self.norm_first else x
        u = x[:, : self.num_queries] + drop(attention(normed, mask, num_queries=self.num_queries, train=train))
        return u + drop(feed_forward(nn.LayerNorm(epsilon=1e-5, name="norm_2")(u), train=train))


class FTTransformer(nn.Module):
    """The network of one task up to its head.

    Attributes:
      cardinalities: codes per categorical column (0 = unknown included).
      num_numeric: number of numeric columns.
      width: D.
      num_heads: attention heads.
      ff_width: width inside the feed-forward nets, after the gate.
      num_blocks: layers.
      ff_dropout: rate inside the feed-forward nets.
      attention_dropout: on attention probabilities.
      residual_dropout: on what a layer adds.
      chunk_rows: rows per pass of a layer: 'auto', a number, or None for all (`in_row_chunks`).
      kernel_init: of linear maps; the packed query-key-value maps are Xavier-uniform.
      token_init: of tables, numeric weights, biases of columns and [CLS].
    """

    cardinalities: Sequence[int]
    num_numeric: int
    width: int = 16
    num_heads: int = 4
    ff_width: int = 256
    num_blocks: int = 2
    ff_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    chunk_rows: int | str | None = "auto"
    kernel_init: Initializer = uniform_fan_in
    token_init: Initializer = uniform_width

    @nn.compact
    def __call__(self, batch: Mapping[str, Any], *, train: bool = False) -> jax.Array:
        """batch: 'categorical' i32[B, C] and 'numeric' f32[B, N] -> f32[B, D], relu(LN cls)."""
        columns = FeatureTokenizer(
            self.cardinalities,
            self.num_numeric,
            self.width,
            self.token_init,
            self.token_init,
            categorical_bias=True,
            name="features",
        )(batch)
        cls = self.param("cls", self.token_init, (self.width,))
        x = jnp.concatenate([jnp.broadcast_to(cls, (columns.shape[0], 1, self.width)), columns], axis=1)
        rows_at_once = default_chunk(x.shape[1]) if self.chunk_rows == "auto" else self.chunk_rows
        for block in range(self.num_blocks):
            layer = FTLayer(
                self.num_heads,
                self.ff_width,
                self.ff_dropout,
                self.attention_dropout,
                self.residual_dropout,
                self.kernel_init,
                norm_first=block > 0,
                num_queries=1 if block == self.num_blocks - 1 else None,
                name=f"block_{block}",
            )
            x = in_row_chunks(layer, x, None, rows_at_once, train=train)
        return nn.relu(nn.LayerNorm(epsilon=1e-5, name="norm")(x[:, 0]))
