"""TabTransformer: a transformer over the categorical columns; numeric columns join its outputs before the MLP.

    token_c = [column_c, table_c[x_c]]                        D/8 of the width says which column it is
    output  = MLP([transformer(token_1 .. token_C), LN(x_1 .. x_N)])

The transformer is pre-norm with GELU, as in the MultiTab baseline. The paper draws a post-norm one, and much-used code
(lucidrains/tab-transformer-pytorch) is pre-norm with GEGLU. A table with a single numeric column passes it on as it is,
because a layer norm over one number is constant.

The default sizes are those of the baseline in the MultiTab paper (width 16, 2 blocks, feed-forward width 256, 4 heads,
tower of 64 units; it has no column identifiers and draws all weights from N(0, 0.01^2)). `PAPER` holds the original
sizes, but for the MLP, whose hidden widths are 4 l and 2 l with l the width of its input (`paper_tower`).

Reference: Huang et al., "TabTransformer: Tabular Data Modeling Using Contextual Embeddings", 2020 (arXiv 2012.06678).

Letters: K tasks, B batch, C categorical columns, N numeric columns, D width.

>>> tower = paper_tower((5, 3), num_numeric=2, width=32)
>>> model = single_task_tab_transformer({"click": 1}, (5, 3), 2, head_hidden=tower, **PAPER)
>>> model.head_hidden
(264, 132)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from mtjax.models.single_task_model import SingleTaskModel
from mtjax.nn.attention import TransformerLayer, default_chunk, in_row_chunks
from mtjax.nn.stacked import uniform_fan_in
from mtjax.nn.tokenizer import FeatureTokenizer, check_features

Initializer = nn.initializers.Initializer
PAPER: Mapping[str, Any] = {"width": 32, "num_heads": 8, "ff_width": 128, "num_blocks": 6}


def paper_tower(cardinalities: Sequence[int], num_numeric: int, width: int) -> tuple[int, int]:
    """Hidden widths of the paper's MLP: 4 l and 2 l, with l = C D + N the width of its input."""
    size = len(cardinalities) * width + num_numeric
    return 4 * size, 2 * size


def single_task_tab_transformer(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    *,
    head_hidden: Sequence[int] = (64,),
    head_dropout: float = 0.0,
    kernel_init: Initializer = uniform_fan_in,
    **options: Any,
) -> SingleTaskModel:
    """K TabTransformers, one per task.

    Args:
      heads: task name -> output size.
      cardinalities: codes of each categorical column, the unknown code 0 included.
      num_numeric: numeric columns.
      head_hidden: hidden widths of the MLPs.
      head_dropout: dropout rate in them.
      kernel_init: of linear maps, MLPs included; the packed query-key-value maps are Xavier-uniform.
      **options: other fields of `TabTransformer`.

    Returns:
      The model.
    """
    body = TabTransformer(tuple(cardinalities), num_numeric, kernel_init=kernel_init, **options)
    return SingleTaskModel(FrozenDict(heads), body, tuple(head_hidden), head_dropout, kernel_init)


class TabTransformer(nn.Module):
    """The network of one task up to its MLP.

    Attributes:
      cardinalities: codes per categorical column (0 = unknown included); at least one column.
      num_numeric: number of numeric columns.
      width: D.
      num_heads: attention heads.
      ff_width: hidden width of the feed-forward nets.
      num_blocks: layers.
      column_width: part of D that is the same for all codes of a column; None: D/8, rounded down.
      ff_dropout, attention_dropout: as for `TransformerLayer`.
      chunk_rows: rows per pass of a layer: 'auto', a number, or None for all (`in_row_chunks`).
      kernel_init: of linear maps; the packed query-key-value maps are Xavier-uniform.
      embedding_init: of tables and column identifiers.
    """

    cardinalities: Sequence[int]
    num_numeric: int
    width: int = 16
    num_heads: int = 4
    ff_width: int = 256
    num_blocks: int = 2
    column_width: int | None = None
    ff_dropout: float = 0.0
    attention_dropout: float = 0.0
    chunk_rows: int | str | None = "auto"
    kernel_init: Initializer = uniform_fan_in
    embedding_init: Initializer = nn.initializers.normal(0.01)

    @nn.compact
    def __call__(self, batch: Mapping[str, Any], *, train: bool = False) -> jax.Array:
        """batch: 'categorical' i32[B, C] and 'numeric' f32[B, N] -> f32[B, C D + N]."""
        check_features(batch, self.cardinalities, self.num_numeric)
        if not self.cardinalities:
            raise ValueError(
                "TabTransformer attends to categorical columns and this table has none: use FT-Transformer or an MLP"
            )
        num_columns = len(self.cardinalities)
        column_width = self.width // 8 if self.column_width is None else self.column_width
        categorical = {"categorical": batch["categorical"], "numeric": batch["numeric"][:, :0]}
        x = FeatureTokenizer(self.cardinalities, 0, self.width - column_width, self.embedding_init, name="features")(
            categorical
        )
        if column_width:
            column = self.param("column", self.embedding_init, (num_columns, column_width))
            x = jnp.concatenate([jnp.broadcast_to(column, (x.shape[0], *column.shape)), x], axis=-1)

        rows_at_once = default_chunk(num_columns) if self.chunk_rows == "auto" else self.chunk_rows
        for block in range(self.num_blocks):
            layer = TransformerLayer(
                self.num_heads,
                self.ff_width,
                self.ff_dropout,
                self.attention_dropout,
                kernel_init=self.kernel_init,
                name=f"block_{block}",
            )
            x = in_row_chunks(layer, x, None, rows_at_once, train=train)

        numeric = batch["numeric"]
        if self.num_numeric > 1:
            numeric = nn.LayerNorm(epsilon=1e-5, name="norm_numeric")(numeric)
        return jnp.concatenate([x.reshape(x.shape[0], -1), numeric], axis=-1)
