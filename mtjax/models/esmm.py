r"""ESMM: conversion rates learned on all impressions, not on clicked ones only.

Conversions are known for clicked impressions only, a selected sample, while the rate is needed for all. ESMM models

    pCTR = P(click)     pCVR = P(conversion | click)     pCTCVR = pCTR pCVR = P(click and conversion)

with two towers over one embedding and trains pCTR and pCTCVR, both defined on every impression; pCVR is served.
The product is returned as a logit, in a form that neither overflows nor cancels,

    logit(pCTCVR) = -log(exp(-a) + exp(-b) + exp(-a-b)),        a, b the logits of pCTR and pCVR

because 1 / (sigma(a) sigma(b)) - 1 is that sum. The ordinary binary losses of two tasks then train it.

Reference: Ma et al., "Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click Conversion Rate",
SIGIR 2018 (arXiv 1804.07931), equations 5 and 6; its towers are 360-200-80 on embeddings of 18.

Letters: B batch, D width of the flattened embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.stacked import TaskHeads
from mtjax.nn.tokenizer import FeatureTokenizer

Initializer = nn.initializers.Initializer


def joint_logit(a: jax.Array, b: jax.Array) -> jax.Array:
    """Logit of sigma(a) sigma(b), finite for all finite a and b.

    >>> p = jax.nn.sigmoid(joint_logit(jnp.array(0.0), jnp.array(jnp.log(3.0))))  # 1/2 * 3/4
    >>> round(float(p), 6)
    0.375
    """
    return -jnp.logaddexp(jnp.logaddexp(-a, -b), -(a + b))


class ESMM(nn.Module):
    """Two towers on a shared embedding; outputs the logits of pCTR and pCTCVR.

    The second task's label is "clicked and converted", given for every impression (0 where there was no click).

    Attributes:
      heads: the click task, then the conversion task, both of size 1.
      cardinalities: codes of each categorical column, the unknown code 0 included.
      num_numeric: numeric columns.
      tower: hidden widths of the towers.
      width: of a column's embedding.
      norm: None or 'layer'.
    """

    heads: Mapping[str, int]
    cardinalities: Sequence[int]
    num_numeric: int
    tower: Sequence[int] = (360, 200, 80)
    width: int = 18
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dropout: float = 0.0
    norm: str | None = None
    kernel_init: Initializer = nn.initializers.lecun_normal(batch_axis=(0,))
    embedding_init: Initializer = nn.initializers.normal(0.01)

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, aux: bool = False
    ) -> dict[str, jax.Array] | tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Predicts clicks, and conversions over all impressions.

        Args:
          batch: with "categorical" i32[B, C] and "numeric" f32[B, N].
          task: static; the click task alone needs one tower, the conversion task both.
          train: whether dropout is on.
          aux: also return {"conversion_given_click": f32[B]}, the logit of pCVR (not with the click task alone).

        Returns:
          {click: logit of pCTR f32[B], conversion: logit of pCTCVR f32[B]}, or the one asked for; with aux, a pair.
        """
        if len(self.heads) != 2 or set(self.heads.values()) != {1}:
            raise ValueError(
                f"ESMM needs two binary tasks, clicks then conversions, each of size 1; got {dict(self.heads)}"
            )
        click, conversion = self.heads
        if task not in (None, click, conversion):
            raise ValueError(f"task={task!r} is not one of the model's tasks: {click}, {conversion}")

        tokens = FeatureTokenizer(
            self.cardinalities, self.num_numeric, self.width, self.embedding_init, name="tokenizer"
        )(batch)
        x = tokens.reshape(tokens.shape[0], -1)
        towers = TaskHeads(
            self.heads, self.tower, self.activation, self.dropout, self.norm, self.kernel_init, name="heads"
        )
        logits = towers(x, task=click if task == click else None, train=train)

        outputs, served = {click: logits[click]}, {}
        if task != click:
            served = {"conversion_given_click": logits[conversion]}
            outputs[conversion] = joint_logit(logits[click], logits[conversion])
        outputs = outputs if task is None else {task: outputs[task]}
        return (outputs, served) if aux else outputs

    def conversion_given_click(self, batch: Mapping[str, Any]) -> jax.Array:
        """pCVR f32[B], what ESMM serves: `model.apply(variables, batch, method="conversion_given_click")`."""
        _, conversion = self.heads
        return jax.nn.sigmoid(self(batch, task=conversion, aux=True)[1]["conversion_given_click"])
