"""MultiTab-Net: task tokens, multitask masked attention over columns, and mixing across the flattened row.

    tokens = [task_1 .. task_T, column_1 .. column_F]
    block:  tokens <- inter-feature layer(tokens, multitask mask);  tokens <- row mixing(tokens)
    output_t = head_t(tokens_t)

What the masks isolate, and what they do not: a mask constrains one attention matrix. With `TxT` alone, information
flows task -> feature -> task as soon as there are two blocks, and mixing the flattened row (`token_mixer`,
`flat_attention`) joins all tokens at any depth. Only with `FxT_TxT` (at depth 1, `TxT`) and no mixing of the flattened
row (`none`, `axial_attention`) does the output of one task not depend on another's token.
tests/models/test_multitab.py shows this with Jacobians.

Two variants of the published work are on offer, both by name: `PAPER_TEXT` attends across rows (`flat_attention`), and
`PUBLISHED_RUNS` mixes tokens within the row (`token_mixer`), which is what the public code computed in all
configurations with rotary embeddings (see `mtjax.nn.row_mixing`). Here a task token is one vector; the code's is the
sum of a weight and a bias, which Adam moves twice as fast.

Reference: "MultiTab: A Scalable Foundation for Multitask Learning on Tabular Data", AAAI 2026 (arXiv 2511.09970), and
its code. There: losses are summed without weights and regression targets are not standardised (here: `Task.scaling`).

Letters: B batch, T task tokens, F feature tokens, n = T + F, D width, C context rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mtjax.nn.attention import (
    Initializer,
    TransformerLayer,
    default_chunk,
    in_row_chunks,
    multitask_mask,
    readable_tokens,
)
from mtjax.nn.row_mixing import ACROSS_ROWS, WITHIN_TOKENS, RowMixing, check_row_mixing, context_mask
from mtjax.nn.stacked import TaskHeads, task_index
from mtjax.nn.tokenizer import FeatureTokenizer

PAPER_TEXT: Mapping[str, Any] = {"row_mixing": "flat_attention", "mask": "TxT"}
PUBLISHED_RUNS: Mapping[str, Any] = {"row_mixing": "token_mixer", "mask": "TxT"}
INFERENCE_CONTEXTS = ("explicit", "batch")


def needs_context(row_mixing: str, inference_context: str) -> bool:
    """Whether inference needs batch['context']: rows attend to each other, and not to those of their batch.

    Raises:
      ValueError: for an unknown choice of either.
    """
    check_row_mixing(row_mixing)
    if inference_context not in INFERENCE_CONTEXTS:
        raise ValueError(f"inference_context must be 'explicit' or 'batch', got {inference_context!r}")
    return row_mixing in ACROSS_ROWS and inference_context == "explicit"


def with_context(
    batch: Mapping[str, Any], row_mixing: str, inference_context: str, train: bool
) -> tuple[Mapping[str, Any], Any, int]:
    """Rows to run, their row mask (None: all read all), and how many of the first are context.

    Raises:
      ValueError: if rows attend to each other, it is inference, and no context was given.
    """
    context = batch.get("context")
    if not needs_context(row_mixing, inference_context) or train:
        return batch, None, 0
    if context is None:
        raise ValueError(
            f"row_mixing='{row_mixing}' attends to other rows: at inference give those rows as batch['context'] "
            "(a dict with 'categorical' and 'numeric', e.g. a sample of the training rows), or choose "
            "inference_context='batch' to let the rows of the batch read each other, as the published code does"
        )
    rows = {key: jnp.concatenate([context[key], batch[key]]) for key in ("categorical", "numeric")}
    num_context = context["numeric"].shape[0]
    return rows, context_mask(num_context, batch["numeric"].shape[0]), num_context


class MultiTabNet(nn.Module):
    """The MultiTab network.

    Attributes:
      heads: task name -> output size.
      cardinalities: codes per categorical column (0 = unknown included).
      num_numeric: number of numeric columns.
      width: D (16 in most published configurations, 8 on AliExpress).
      num_heads: attention heads, over columns and over rows.
      ff_width: hidden width of the feed-forward nets.
      num_blocks: blocks of [inter-feature, row mixing] (1 in every published configuration).
      mask: 'none', 'FxT', 'TxT', 'FxT_TxT' or a custom bool[n, n] as nested tuples (`multitask_mask`).
      row_mixing: 'none', 'token_mixer', 'flat_attention' or 'axial_attention' (`mtjax.nn.row_mixing`).
      multi_token: one task token per task, or one for all heads.
      inference_context: with attention across rows, where the rows to read come from at inference: 'explicit'
        (batch['context']) or 'batch' (the published behaviour: predictions then depend on the batch).
      head_hidden: hidden widths of the heads.
      ff_dropout, attention_dropout: dropout rates.
      chunk_rows: rows per pass of the inter-feature layer: 'auto', a number, or None for all (`in_row_chunks`).
      kernel_init: of tables, tokens and linear maps; the packed query-key-value maps are Xavier-uniform.
    """

    heads: Mapping[str, int]
    cardinalities: Sequence[int]
    num_numeric: int
    width: int = 16
    num_heads: int = 4
    ff_width: int = 256
    num_blocks: int = 1
    mask: str | Sequence[Sequence[bool]] = "TxT"
    row_mixing: str = "token_mixer"
    multi_token: bool = True
    inference_context: str = "explicit"
    head_hidden: Sequence[int] = (64,)
    ff_dropout: float = 0.0
    attention_dropout: float = 0.0
    chunk_rows: int | str | None = "auto"
    kernel_init: Initializer = nn.initializers.normal(0.01)

    @property
    def needs_context(self) -> bool:
        """Whether inference needs batch['context']."""
        return needs_context(self.row_mixing, self.inference_context)

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, aux: bool = False
    ) -> Any:
        """Runs the network.

        Args:
          batch: 'categorical' i32[B, C], 'numeric' f32[B, N], and 'context' for attention across rows at inference.
          task: static; compute this task's output only.
          train: dropout on (rng collection 'dropout'); rows attend to the batch.
          aux: also return {'tokens': f32[B, T, D]}, the task tokens that the heads read.

        Returns:
          task name -> f32[B] or f32[B, size]; with `aux` a pair (outputs, aux).
        """
        position = task_index(self.heads, task)
        num_task_tokens = len(self.heads) if self.multi_token else 1
        rows, row_mask, num_context = with_context(batch, self.row_mixing, self.inference_context, train)

        features = FeatureTokenizer(
            self.cardinalities, self.num_numeric, self.width, self.kernel_init, name="features"
        )(rows)
        task_tokens = self.param("task_tokens", self.kernel_init, (num_task_tokens, self.width))
        x = jnp.concatenate([jnp.broadcast_to(task_tokens, (features.shape[0], *task_tokens.shape)), features], axis=1)
        mask = multitask_mask(num_task_tokens, features.shape[1], self.mask)

        # The tokens that the heads read, and (where only attention mixes tokens) the only ones that can reach them.
        read = list(range(num_task_tokens)) if position is None or not self.multi_token else [position]
        only_read_last = self.row_mixing in WITHIN_TOKENS
        if only_read_last:
            kept = read + [token for token in readable_tokens(mask, read, self.num_blocks) if token not in read]
            if kept != list(range(len(mask))):
                x, mask = x[:, jnp.asarray(kept)], mask[kept][:, kept]
            read = list(range(len(read)))

        x = nn.Dropout(self.ff_dropout, deterministic=not train)(x)
        sizes = (self.num_heads, self.ff_width, self.ff_dropout, self.attention_dropout)
        rows_at_once = default_chunk(x.shape[1]) if self.chunk_rows == "auto" else self.chunk_rows
        for block in range(self.num_blocks):
            num_queries = len(read) if only_read_last and block == self.num_blocks - 1 else None
            layer = TransformerLayer(
                *sizes, kernel_init=self.kernel_init, num_queries=num_queries, name=f"features_{block}"
            )
            layer_mask = mask[:num_queries]
            x = in_row_chunks(layer, x, None if layer_mask.all() else layer_mask, rows_at_once, train=train)
            mixing = RowMixing(self.row_mixing, *sizes, self.kernel_init, name=f"rows_{block}")
            x = mixing(x, row_mask, train=train)

        tokens = x[num_context:, read[0] : read[0] + len(read)]
        z = tokens.swapaxes(0, 1) if self.multi_token else tokens[:, 0]
        outputs = TaskHeads(
            self.heads, self.head_hidden, dropout=self.ff_dropout, kernel_init=self.kernel_init, name="heads"
        )(z, task=task, train=train)
        return (outputs, {"tokens": tokens}) if aux else outputs
