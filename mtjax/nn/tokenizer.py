"""Feature tokenizer: every column of a table becomes one token (MultiTab, FT-Transformer, SAINT).

    token_c(x) = table_c[x_c] (+ b_c)               categorical column with its own lookup table
    token_j(x) = x_j w_j + b_j                      numeric column with its own affine map,
              or relu(x_j u_j + a_j) W_j + b_j      with its own small MLP

There is no position embedding: a column's own table or affine map tells it from the others. All categorical tables
are rows of one array (column c starts at offset_c), so that a table of 500 columns costs one gather, not 500.

References: Gorishniy et al., "Revisiting Deep Learning Models for Tabular Data", NeurIPS 2021, section 3.3 (a bias for
every column); MultiTab (arXiv 2511.09970; none for categorical ones, the default here); Somepalli et al., "SAINT",
2021 (an MLP for each numeric column).

Letters: B batch, C categorical columns, N numeric columns, D token width, H hidden width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.nn.local_rows import pin_rows

Initializer = nn.initializers.Initializer


def check_features(batch: Mapping[str, Any], cardinalities: Sequence[int], num_numeric: int) -> None:
    """Raises a ValueError when the batch does not have the model's columns."""
    got = (batch["categorical"].shape[-1], batch["numeric"].shape[-1])
    if got != (len(cardinalities), num_numeric):
        raise ValueError(
            f"The model was built for {len(cardinalities)} categorical and {num_numeric} numeric columns, "
            f"the batch has {got[0]} and {got[1]}"
        )


class FeatureTokenizer(nn.Module):
    """Columns -> tokens f32[B, C + N, D], categorical columns first.

    Attributes:
      cardinalities: number of codes of each categorical column, the reserved unknown code 0 included.
      num_numeric: N.
      width: D.
      kernel_init: initializer of tables and numeric weights.
      bias_init: initializer of biases.
      categorical_bias: whether categorical columns have a bias b_c beside their table.
      numeric_hidden: H of the numeric columns' MLPs; None for affine maps.
    """

    cardinalities: Sequence[int]
    num_numeric: int
    width: int
    kernel_init: Initializer = nn.initializers.normal(0.01)
    bias_init: Initializer = nn.initializers.zeros_init()
    categorical_bias: bool = False
    numeric_hidden: int | None = None

    @nn.compact
    def __call__(self, batch: Mapping[str, Any]) -> jax.Array:
        """batch: 'categorical' i32[B, C] and 'numeric' f32[B, N] -> f32[B, C + N, D]."""
        check_features(batch, self.cardinalities, self.num_numeric)
        tokens = []
        if self.cardinalities:
            table = self.param("table", self.kernel_init, (int(np.sum(self.cardinalities)), self.width))
            offsets = np.concatenate([[0], np.cumsum(self.cardinalities)[:-1]]).astype(np.int32)
            looked_up = pin_rows(table[batch["categorical"] + offsets[None, :]], whole=True)
            if self.categorical_bias:
                shape = (len(self.cardinalities), self.width)
                looked_up = looked_up + self.param("categorical_bias", self.bias_init, shape)[None]
            tokens.append(looked_up)
        if self.num_numeric:
            tokens.append(self._numeric(batch["numeric"][:, :, None]))
        if not tokens:
            raise ValueError("A table without any input column has no tokens: give cardinalities or num_numeric")
        return jnp.concatenate(tokens, axis=1)

    def _numeric(self, x: jax.Array) -> jax.Array:
        """x f32[B, N, 1] -> f32[B, N, D]."""
        columns, hidden = self.num_numeric, self.numeric_hidden
        bias = self.param("bias", self.bias_init, (columns, self.width))
        if hidden is None:
            return x * self.param("weight", self.kernel_init, (columns, self.width))[None] + bias[None]
        weight = self.param("hidden_weight", self.kernel_init, (columns, hidden))
        hidden_bias = self.param("hidden_bias", self.bias_init, (columns, hidden))
        kernel = self.param("kernel", self.kernel_init, (columns, hidden, self.width))
        return jnp.einsum("bnh,nhd->bnd", nn.relu(x * weight[None] + hidden_bias[None]), kernel) + bias[None]
