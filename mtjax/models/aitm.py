r"""AITM: a chain of ordered binary tasks (click -> ... -> purchase) in which each step informs the next.

With tasks in order t = 1..K, a tower per task and k the width of the towers' last layer,

    q_t = tower_t(x)            z_1 = q_1            p_{t-1} = relu(g_{t-1}(z_{t-1}))            information to hand on
    z_t = sum_{u in {p_{t-1}, q_t}} w_u h1(u)        w = softmax_u(<h2(u), h3(u)> / sqrt(k))     adaptive transfer
    logit_t = out_t(z_t)

and a calibrator that penalises probabilities which rise along the chain, as a purchase cannot be likelier than the
click before it:

    loss = sum_t BCE_t + alpha sum_{t > 1} mean_b max(sigma(logit_t) - sigma(logit_{t-1}), 0)

Reference: Xi et al., "Modeling the Sequential Dependence among Audience Multi-step Conversions with Multi-task
Learning in Targeted Display Advertising", KDD 2021 (arXiv 2105.08489). Defaults are those of the authors' TensorFlow
code: towers 128-64-32, embedding 5, alpha 0.6, linear outputs, dropout after g, maps h without bias and shared by both
candidates and all steps. Reimplementations have a linear g (`transfer_activation`), biases in h (not offered), and a
hidden layer before the outputs (`tower`).

Letters: K tasks, B batch, D width of the flattened embedding, k width of the towers' last layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.nn.stacked import StackedMLP, TaskHeads
from mtjax.nn.tokenizer import FeatureTokenizer

Initializer = nn.initializers.Initializer


class AITM(nn.Module):
    """Towers, the chain of transfers, outputs.

    Attributes:
      heads: task name -> 1, at least two tasks.
      cardinalities: codes of each categorical column, the unknown code 0 included.
      num_numeric: numeric columns.
      order: names of the tasks from the first step to the last; by default the order of `heads`.
      features: hidden widths of the tower q_t.
      tower: hidden widths between z_t and the output.
      width: of a column's embedding.
      shared_maps: whether all steps share h1, h2 and h3 (the paper), or each has its own.
      transfer_activation: of g.
      norm: None or 'layer', in towers.
    """

    heads: Mapping[str, int]
    cardinalities: Sequence[int]
    num_numeric: int
    order: Sequence[str] | None = None
    features: Sequence[int] = (128, 64, 32)
    tower: Sequence[int] = ()
    width: int = 5
    shared_maps: bool = True
    transfer_activation: Callable[[jax.Array], jax.Array] = nn.relu
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dropout: float = 0.0
    norm: str | None = None
    kernel_init: Initializer = nn.initializers.lecun_normal(batch_axis=(0,))
    embedding_init: Initializer = nn.initializers.normal(0.01)

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, aux: bool = False
    ) -> dict[str, jax.Array] | tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Predicts the chain, or one of its steps.

        Args:
          batch: with "categorical" i32[B, C] and "numeric" f32[B, N].
          task: static; compute the chain up to this task only.
          train: whether dropout is on.
          aux: also return {"transfer": f32[K - 1, B]}, the weight of p_{t-1} in z_t for the steps computed.

        Returns:
          task name -> logit f32[B]; with aux, a pair.
        """
        order = chain_order(self.heads, self.order)
        if task is not None and task not in order:
            raise ValueError(f"task={task!r} is not one of the model's tasks: {', '.join(order)}")
        steps = len(order) if task is None else order.index(task) + 1

        tokens = FeatureTokenizer(
            self.cardinalities, self.num_numeric, self.width, self.embedding_init, name="tokenizer"
        )(batch)
        x = tokens.reshape(tokens.shape[0], -1)
        style = (self.activation, self.dropout, self.norm, self.kernel_init)
        towers = StackedMLP(len(order), self.features, *style, name="towers")
        q = towers(x, None if steps == len(order) else tuple(range(steps)), train=train)  # [steps, B, k]
        z, transfer = self._chain(q, len(order) - 1, train)

        # Heads are stacked in chain order; TaskHeads answers with a dict, so the order of `heads` does not matter.
        ordered = {name: self.heads[name] for name in order}
        outputs = TaskHeads(ordered, self.tower, *style, name="heads")
        logits = outputs(z if task is None else z[-1], task=task, train=train)
        logits = {name: logits[name] for name in self.heads if name in logits}
        return (logits, {"transfer": transfer}) if aux else logits

    def _chain(self, q: jax.Array, num_transfers: int, train: bool) -> tuple[jax.Array, jax.Array]:
        """q f32[t, B, k] -> z f32[t, B, k] and the weight of what was handed on, f32[t - 1, B]."""
        count, batch, k = q.shape
        g = self.param("g_kernel", self.kernel_init, (num_transfers, k, k))
        g_bias = self.param("g_bias", nn.initializers.zeros_init(), (num_transfers, k))
        maps = self.param("h", self.kernel_init, (1 if self.shared_maps else num_transfers, k, 3 * k))
        if count == 1:
            return q, jnp.zeros((0, batch), q.dtype)
        maps = jnp.broadcast_to(maps, (num_transfers, k, 3 * k))

        keep = 1.0 - self.dropout
        handed_on = jnp.ones((count - 1, batch, k), q.dtype)
        if train and self.dropout > 0:
            drawn = jax.random.bernoulli(self.make_rng("dropout"), keep, handed_on.shape)
            handed_on = drawn.astype(q.dtype) / keep

        def step(z: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            q_t, g_t, bias_t, maps_t, handed_on_t = inputs
            p = self.transfer_activation(z @ g_t + bias_t[None, :]) * handed_on_t
            candidates = jnp.stack([p, q_t])  # [2, B, k]
            value, left, right = jnp.split(candidates @ maps_t, 3, axis=-1)  # h1, h2, h3
            w = jax.nn.softmax(jnp.sum(left * right, axis=-1) / np.sqrt(k), axis=0)  # [2, B]
            z = jnp.sum(w[..., None] * value, axis=0)
            return z, (z, w[0])

        # The chain is sequential by definition; as a scan it compiles in a time that does not grow with K.
        rest = (q[1:], *(parameter[: count - 1] for parameter in (g, g_bias, maps)), handed_on)
        _, (z, transfer) = jax.lax.scan(step, q[0], rest)
        return jnp.concatenate([q[:1], z]), transfer


def chain_order(heads: Mapping[str, int], order: Sequence[str] | None = None) -> list[str]:
    """The tasks from first to last, checked.

    Raises:
      ValueError: if there are fewer than two tasks, one is not binary, or `order` is not a permutation of them.
    """
    names = list(heads)
    if len(names) < 2 or set(heads.values()) != {1}:
        raise ValueError(f"AITM needs a chain of two or more binary tasks of size 1, got {dict(heads)}")
    order = names if order is None else list(order)
    if sorted(order) != sorted(names):
        raise ValueError(f"order must name every task once ({', '.join(names)}), got {', '.join(order)}")
    return order


def calibrator(
    outputs: Mapping[str, jax.Array],
    order: Sequence[str],
    *,
    alpha: float = 0.6,
    weight: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """AITM's label constraint: alpha mean_b max(sigma(logit_t) - sigma(logit_{t-1}), 0), to add to task t's loss.

    Args:
      outputs: task name -> logit f32[B].
      order: tasks from the first step to the last.
      alpha: strength; 0.6 in the authors' code.
      weight: f32[B]; 0 for rows that do not count.

    Returns:
      task name -> f32[]; 0 for the first task.

    >>> logits = {"click": jnp.zeros(2), "buy": jnp.array([100.0, -100.0])}
    >>> {name: float(loss) for name, loss in calibrator(logits, ["click", "buy"], alpha=1.0).items()}
    {'click': 0.0, 'buy': 0.25}
    """
    probability = jax.nn.sigmoid(jnp.stack([outputs[name] for name in order]))  # [K, B]
    excess = jnp.maximum(probability[1:] - probability[:-1], 0.0)
    weight = jnp.ones(probability.shape[1:], probability.dtype) if weight is None else weight
    total = jnp.sum(weight)
    mean = jnp.where(total > 0, excess @ weight / jnp.where(total > 0, total, 1.0), 0.0)
    return dict(zip(order, [jnp.zeros((), probability.dtype), *(alpha * mean)], strict=True))
