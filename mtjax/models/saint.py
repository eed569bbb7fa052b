"""SAINT: attention over the columns of a row, then attention over the rows of the batch, prediction from a [CLS] token.

    tokens = [cls, column_1 .. column_F]
    block:  tokens <- inter-feature layer(tokens);  tokens <- row mixing(tokens)
    output  = head(cls)

The two layers are those of `MultiTabNet`, which is SAINT with task tokens, masks and shared parameters: a difference
between them is a difference in that. The layer across rows reads the flattened row (`flat_attention`); `row_mixing=
'none'` leaves it out (the paper's SAINT-s), and `'token_mixer'` is what MultiTab's SAINT runs with rotary embeddings
computed (`mtjax.nn.row_mixing`). With attention across rows, the rows to read at inference are explicit
(`mtjax.models.multitab.with_context`).

The default sizes are those of the baseline in the MultiTab paper (width 16, 1 block, feed-forward width 256, 4 heads,
tower of 64 units, affine numeric tokens). `PAPER` holds the sizes that the authors' code uses for attention across
rows. There, residuals start after the layer norm, the feed-forward nets are gated, heads across rows are 64 wide, and
the dropout rate inside the feed-forward nets is 0.8. The paper's self-supervised pre-training is not here.

Reference: Somepalli et al., "SAINT: Improved Neural Networks for Tabular Data via Row Attention and Contrastive
Pre-Training", 2021 (arXiv 2106.01342), section 3, and the authors' code.

Letters: K tasks, B batch, F columns, n = 1 + F, D width.

>>> single_task_saint({"click": 1}, cardinalities=(5, 3), num_numeric=2, **PAPER).needs_context
True
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from mtjax.models.multitab import needs_context, with_context
from mtjax.models.single_task_model import SingleTaskModel
from mtjax.nn.attention import TransformerLayer, default_chunk, in_row_chunks
from mtjax.nn.row_mixing import RowMixing
from mtjax.nn.tokenizer import FeatureTokenizer

Initializer = nn.initializers.Initializer
normal = nn.initializers.normal(0.01)  # as in MultiTabNet
PAPER: Mapping[str, Any] = {
    "width": 32,
    "num_heads": 4,
    "ff_width": 128,
    "num_blocks": 1,
    "numeric_hidden": 100,
    "head_hidden": (1000,),
}


def single_task_saint(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    *,
    head_hidden: Sequence[int] = (64,),
    head_dropout: float = 0.0,
    kernel_init: Initializer = normal,
    **options: Any,
) -> SingleTaskModel:
    """K SAINTs, one per task.

    Args:
      heads: task name -> output size.
      cardinalities: codes of each categorical column, the unknown code 0 included.
      num_numeric: numeric columns.
      head_hidden: hidden widths of the heads.
      head_dropout: dropout rate in the heads.
      kernel_init: of tokens and linear maps, heads included; the packed query-key-value maps are Xavier-uniform.
      **options: other fields of `Saint`.

    Returns:
      The model.
    """
    body = Saint(tuple(cardinalities), num_numeric, kernel_init=kernel_init, **options)
    return SingleTaskModel(FrozenDict(heads), body, tuple(head_hidden), head_dropout, kernel_init)


class Saint(nn.Module):
    """The network of one task up to its head.

    Attributes:
      cardinalities: codes per categorical column (0 = unknown included).
      num_numeric: number of numeric columns.
      width: D.
      num_heads: attention heads, over columns and over rows.
      ff_width: hidden width of the feed-forward nets.
      num_blocks: blocks of [inter-feature, row mixing].
      row_mixing: one of `mtjax.nn.row_mixing.ROW_MIXING`.
      inference_context: 'explicit' (batch['context']) or 'batch', as in `MultiTabNet`.
      numeric_hidden: hidden width of the numeric columns' MLPs; None for affine maps.
      ff_dropout, attention_dropout: as in `MultiTabNet`.
      chunk_rows: rows per pass of the inter-feature layer: 'auto', a number, or None for all (`in_row_chunks`).
      kernel_init: of tokens and linear maps; the packed query-key-value maps are Xavier-uniform.
    """

    cardinalities: Sequence[int]
    num_numeric: int
    width: int = 16
    num_heads: int = 4
    ff_width: int = 256
    num_blocks: int = 1
    row_mixing: str = "flat_attention"
    inference_context: str = "explicit"
    numeric_hidden: int | None = None
    ff_dropout: float = 0.0
    attention_dropout: float = 0.0
    chunk_rows: int | str | None = "auto"
    kernel_init: Initializer = normal

    @property
    def needs_context(self) -> bool:
        """Whether inference needs batch['context']."""
        return needs_context(self.row_mixing, self.inference_context)

    @nn.compact
    def __call__(self, batch: Mapping[str, Any], *, train: bool = False) -> jax.Array:
        """batch: 'categorical' i32[B, C], 'numeric' f32[B, N], 'context' (`MultiTabNet`) -> f32[B, D]."""
        rows, row_mask, num_context = with_context(batch, self.row_mixing, self.inference_context, train)
        columns = FeatureTokenizer(
            self.cardinalities,
            self.num_numeric,
            self.width,
            self.kernel_init,
            numeric_hidden=self.numeric_hidden,
            name="features",
        )(rows)
        cls = self.param("cls", self.kernel_init, (1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls, (columns.shape[0], 1, self.width)), columns], axis=1)
        x = nn.Dropout(self.ff_dropout, deterministic=not train)(x)
        rows_at_once = default_chunk(x.shape[1]) if self.chunk_rows == "auto" else self.chunk_rows
        sizes = (self.num_heads, self.ff_width, self.ff_dropout, self.attention_dropout)
        for block in range(self.num_blocks):
            layer = TransformerLayer(*sizes, kernel_init=self.kernel_init, name=f"features_{block}")
            x = in_row_chunks(layer, x, None, rows_at_once, train=train)
            mixing = RowMixing(self.row_mixing, *sizes, self.kernel_init, name=f"rows_{block}")
            x = mixing(x, row_mask, train=train)
        return x[num_context:, 0]
