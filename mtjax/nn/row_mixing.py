"""Row mixing: what happens between tokens of one row, or between rows of a batch, after attention over columns.

SAINT and MultiTab flatten the n tokens of a row into one vector of width n D and attend across the rows of the batch.
MultiTab's published runs with rotary embeddings did something else: the rotary layer was handed a sequence of length 1,
so the softmax was over one key and each row only mixed its own tokens. Both are here under their own names:

* `token_mixer`: a residual MLP block on the flattened row, y = x + W_o W_v LN(x), then a feed-forward net. Rows never
  see each other. (What AliExpress, Higgs and the synthetic benchmark of MultiTab actually computed.)
* `flat_attention`: attention across rows on flattened tokens (the paper's text; its ACS Income runs).
* `axial_attention`: attention across rows for each token position separately, width D (MSA-transformer style).

With attention across rows a prediction depends on the rows beside it. At inference the rows to attend to are therefore
given explicitly as a *context*: context rows read each other, a query row reads the context and itself.

Letters: B rows, n tokens, D width, C context rows.

Reference: Somepalli et al., "SAINT", 2021, section 3.1; MultiTab (arXiv 2511.09970) and its code.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.attention import FeedForward, Initializer, TransformerLayer

ROW_MIXING = ("none", "token_mixer", "flat_attention", "axial_attention")
ACROSS_ROWS = ("flat_attention", "axial_attention")
WITHIN_TOKENS = ("none", "axial_attention")  # the tokens of a row are not mixed with each other


def check_row_mixing(mode: str) -> None:
    """Raises a ValueError for an unknown mode."""
    if mode not in ROW_MIXING:
        raise ValueError(f"row_mixing must be one of {', '.join(ROW_MIXING)}, got {mode!r}")


def context_mask(num_context: int, num_queries: int) -> jax.Array:
    """bool[C + B, C + B]: context rows (first) read the context; a query row reads the context and itself."""
    n = num_context + num_queries
    return (jnp.arange(n)[None, :] < num_context) | jnp.eye(n, dtype=bool)


class TokenMixer(nn.Module):
    """x f32[B, n, D] -> f32[B, n, D]: mixes the tokens of each row on its flattened vector.

    This is attention over a sequence of one row: queries and keys drop out, values and output map stay.
    """

    ff_width: int
    ff_dropout: float = 0.0
    value_init: Initializer = nn.initializers.xavier_uniform()
    kernel_init: Initializer = nn.initializers.normal(0.01)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        flat = x.reshape(x.shape[0], -1)
        width = flat.shape[-1]
        value = nn.Dense(width, kernel_init=self.value_init, name="value")(
            nn.LayerNorm(epsilon=1e-5, name="norm_1")(flat)
        )
        mixed = nn.Dense(width, kernel_init=self.kernel_init, name="out")(value)
        u = flat + nn.Dropout(self.ff_dropout, deterministic=not train)(mixed)
        feed_forward = FeedForward(self.ff_width, self.ff_dropout, self.kernel_init, name="feed_forward")
        y = u + feed_forward(nn.LayerNorm(epsilon=1e-5, name="norm_2")(u), train=train)
        return y.reshape(x.shape)


class RowMixing(nn.Module):
    """One of `ROW_MIXING` applied to x f32[B, n, D].

    Attributes:
      mode: see the module's docstring.
      num_heads, ff_width, ff_dropout, attention_dropout: as for `TransformerLayer`.
    """

    mode: str
    num_heads: int
    ff_width: int
    ff_dropout: float = 0.0
    attention_dropout: float = 0.0
    kernel_init: Initializer = nn.initializers.normal(0.01)

    @nn.compact
    def __call__(self, x: jax.Array, mask: Any = None, *, train: bool = False) -> jax.Array:
        """mask: bool[B, B], which row reads which (None: all); only used across rows."""
        check_row_mixing(self.mode)
        if self.mode == "none":
            return x
        if self.mode == "token_mixer":
            # The packed Xavier initialisation of q, k and v together has the bound sqrt(6 / (D + 3 D)).
            value_init = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
            return TokenMixer(self.ff_width, self.ff_dropout, value_init, self.kernel_init, name="row")(x, train=train)
        layer = TransformerLayer(
            self.num_heads,
            self.ff_width,
            self.ff_dropout,
            self.attention_dropout,
            kernel_init=self.kernel_init,
            name="row",
        )
        if self.mode == "flat_attention":
            return layer(x.reshape(x.shape[0], -1), mask, train=train).reshape(x.shape)
        return layer(x.swapaxes(0, 1), mask, train=train).swapaxes(0, 1)
