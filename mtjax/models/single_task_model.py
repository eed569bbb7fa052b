"""Single-task models: the same body K times, each copy with its own parameters and its own task.

    z[k] = body(batch; theta_k),    output_k = head_k(z[k])

The copies' parameters are stacked on a leading task axis, so that K models are one program whose compile time does not
grow with K. Nothing is shared: the gradient of a task's loss is zero outside its own slice.

A body is any module `(batch, train=) -> f32[B, D]`: `mtjax.models.ft_transformer.FTTransformer`, ...

Letters: K tasks, B batch, D width of the representation that the head reads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import FrozenDict

from mtjax.nn.stacked import TaskHeads, task_index, uniform_fan_in

Initializer = nn.initializers.Initializer
PyTree = Any


class SingleTaskModel(nn.Module):
    """K independent networks, one per task.

    Attributes:
      heads: task name -> output size.
      body: the network up to its head.
      head_hidden: hidden widths of the heads, () for linear heads.
      head_dropout: dropout rate in the heads.
      kernel_init: initializer of the heads' kernels.
    """

    heads: Mapping[str, int]
    body: nn.Module
    head_hidden: Sequence[int] = (64,)
    head_dropout: float = 0.0
    kernel_init: Initializer = uniform_fan_in

    @property
    def needs_context(self) -> bool:
        """Whether inference needs batch['context']."""
        return getattr(self.body, "needs_context", False)

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, aux: bool = False
    ) -> Any:
        """Runs the networks.

        Args:
          batch: what the body reads: 'categorical' i32[B, C], 'numeric' f32[B, N], and 'context' where it needs that.
          task: static; run this task's network only.
          train: dropout on (rng collection 'dropout').
          aux: also return {'representation': f32[K, B, D]}, what the heads read.

        Returns:
          task name -> f32[B] or f32[B, size]; with `aux` a pair (outputs, aux).
        """
        z = self._representations(batch, task_index(self.heads, task), train)
        heads = TaskHeads(
            self.heads, self.head_hidden, dropout=self.head_dropout, kernel_init=self.kernel_init, name="heads"
        )
        outputs = heads(z, task=task, train=train)
        return (outputs, {"representation": z}) if aux else outputs

    def _representations(self, batch: Mapping[str, Any], copy: int | None, train: bool) -> jax.Array:
        """f32[K, B, D], or f32[1, B, D] of one copy, run on its slice of the parameters."""

        def run(body: nn.Module, batch: Mapping[str, Any]) -> jax.Array:
            return body(batch, train=train)

        if copy is None or self.is_initializing():  # every copy's parameters exist whatever `copy` is
            z = nn.vmap(
                run,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=None,
                axis_size=len(self.heads),
            )(self.body, batch)
            return z if copy is None else z[copy : copy + 1]
        one = nn.map_variables(run, "params", lambda params: jax.tree.map(lambda leaf: leaf[copy], params))
        return one(self.body, batch)[None]


def extract(model: SingleTaskModel, variables: PyTree, tasks: Sequence[str]) -> tuple[SingleTaskModel, PyTree]:
    """Cuts a model and its parameters down to some tasks, for deployment.

    Args:
      model: the model.
      variables: as from `model.init`.
      tasks: names to keep.

    Returns:
      A smaller model and its variables, with the same outputs for these tasks.
    """
    kept = [task_index(model.heads, name) for name in model.heads if name in tasks]
    unknown = [name for name in tasks if name not in model.heads]
    if unknown or not kept:
        raise ValueError(f"tasks must name some of {', '.join(model.heads)}, got {list(tasks)}")
    heads = {name: size for name, size in model.heads.items() if name in tasks}

    def cut(tree: PyTree, positions: Sequence[int]) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[np.asarray(positions)], tree)

    params = {"body": cut(variables["params"]["body"], kept), "heads": {}}
    for name, tree in variables["params"]["heads"].items():
        if name == "tower":
            params["heads"][name] = cut(tree, kept)
            continue
        members = [task for task, size in model.heads.items() if name == f"out_{size}"]
        positions = [i for i, task in enumerate(members) if task in heads]
        if positions:
            params["heads"][name] = cut(tree, positions)
    return model.clone(heads=FrozenDict(heads)), {"params": params}
