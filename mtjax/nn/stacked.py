"""Stacks of equal small networks, run at once: one einsum over the stack axis instead of a Python loop.

Task heads, experts and single-task models are all "the same network N times with its own parameters". Their
parameters live in one array with a leading stack axis, so compile time and dispatch cost do not grow with N.

Letters: N stack, B batch, D input width, F output width, K tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.local_rows import pin_rows

Initializer = nn.initializers.Initializer
lecun_normal = nn.initializers.lecun_normal(batch_axis=(0,))


def uniform_fan_in(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """U(-1/sqrt(n), 1/sqrt(n)) with n = shape[-2], the inputs of a kernel, stacked or not: PyTorch's linear layers."""
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * shape[-2] ** -0.5


def task_index(heads: Mapping[str, int], task: str | None) -> int | None:
    """Position of a task among the heads; None for None.

    Raises:
      ValueError: if there is no such task.
    """
    names = list(heads)
    if task is not None and task not in names:
        raise ValueError(f"task={task!r} is not one of the model's tasks: {', '.join(names)}")
    return None if task is None else names.index(task)


def take(array: jax.Array, index: Sequence[int] | None) -> jax.Array:
    """Rows `index` (static) of a stacked parameter; all of them for None."""
    return array if index is None else array[jnp.asarray(index)]


class StackedDense(nn.Module):
    """N affine maps: y[n] = x[n] W[n] + b[n].

    Attributes:
      stack: N.
      features: F.
      kernel_init: initializer of the [N, D, F] kernel.
    """

    stack: int
    features: int
    use_bias: bool = True
    kernel_init: Initializer = lecun_normal
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array, index: Sequence[int] | None = None) -> jax.Array:
        """Applies the maps.

        Args:
          x: f32[N, B, D], or f32[B, D] when every map reads the same input (which is then not copied).
          index: static positions in the stack to compute; x then holds those rows only.

        Returns:
          f32[N, B, F], or f32[len(index), B, F].
        """
        kernel = self.param("kernel", self.kernel_init, (self.stack, x.shape[-1], self.features))
        x = pin_rows(x, axis=x.ndim - 2, whole=True)
        spec = "bd,ndf->nbf" if x.ndim == 2 else "nbd,ndf->nbf"
        y = jnp.einsum(spec, x, take(kernel, index))
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.stack, self.features))
            y = y + take(bias, index)[:, None, :]
        return pin_rows(y, axis=1, whole=True)


class StackedLayerNorm(nn.Module):
    """N layer normalisations with their own scale and bias: x f32[N, B, D] -> f32[N, B, D]."""

    stack: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, index: Sequence[int] | None = None) -> jax.Array:
        shape = (self.stack, x.shape[-1])
        scale = take(self.param("scale", nn.initializers.ones_init(), shape), index)
        bias = take(self.param("bias", nn.initializers.zeros_init(), shape), index)
        x = nn.LayerNorm(use_scale=False, use_bias=False, epsilon=self.epsilon)(x)
        return x * scale[:, None, :] + bias[:, None, :]


class StackedMLP(nn.Module):
    """N multilayer perceptrons: [dense, norm, activation, dropout] for each width in `features`.

    Attributes:
      stack: N.
      features: widths; the activation follows each of them.
      norm: None or 'layer'.
    """

    stack: int
    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dropout: float = 0.0
    norm: str | None = None
    kernel_init: Initializer = lecun_normal

    @nn.compact
    def __call__(self, x: jax.Array, index: Sequence[int] | None = None, *, train: bool = False) -> jax.Array:
        """x f32[N, B, D] or f32[B, D] -> f32[N, B, features[-1]]; `index` as in `StackedDense`."""
        if self.norm not in (None, "layer"):
            raise ValueError(f"norm must be None or 'layer', got {self.norm!r}")
        for layer, width in enumerate(self.features):
            x = StackedDense(self.stack, width, kernel_init=self.kernel_init, name=f"dense_{layer}")(x, index)
            if self.norm == "layer":
                x = StackedLayerNorm(self.stack, name=f"norm_{layer}")(x, index)
            x = nn.Dropout(self.dropout, deterministic=not train)(self.activation(x))
        return x


class TaskHeads(nn.Module):
    """One tower per task: MLP D -> hidden -> output size, computed for all tasks at once.

    Towers have equal hidden widths and are stacked; the last layers are stacked per distinct output size, so a model
    with a hundred regression tasks has one output einsum.

    Attributes:
      heads: task name -> output size.
      hidden: hidden widths, () for a linear head.
    """

    heads: Mapping[str, int]
    hidden: Sequence[int] = (64,)
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dropout: float = 0.0
    norm: str | None = None
    kernel_init: Initializer = lecun_normal

    @nn.compact
    def __call__(self, z: jax.Array, *, task: str | None = None, train: bool = False) -> dict[str, jax.Array]:
        """Runs the heads.

        Args:
          z: f32[K, B, D], one representation per task; f32[B, D] if all tasks read the same; with `task`, f32[1, B, D]
            or f32[B, D].
          task: static; compute this task's head only.

        Returns:
          task name -> f32[B] for size-1 heads, else f32[B, size].
        """
        names = list(self.heads)
        position = task_index(self.heads, task)
        index = None if position is None else (position,)
        asked = names if task is None else [task]
        h = StackedMLP(
            len(names), self.hidden, self.activation, self.dropout, self.norm, self.kernel_init, name="tower"
        )(z, index, train=train)
        outputs = {}
        for size in sorted(set(self.heads.values())):
            members = [name for name in names if self.heads[name] == size]
            # The parameters of every size exist whatever `task` is: init and apply then agree on the tree.
            dense = StackedDense(len(members), size, kernel_init=self.kernel_init, name=f"out_{size}")
            wanted = [name for name in members if name in asked]
            if wanted:
                rows = h if h.ndim == 2 else take(h, None if wanted == asked else [asked.index(n) for n in wanted])
                y = dense(rows, None if wanted == members else [members.index(name) for name in wanted])
                outputs |= {name: y[i, :, 0] if size == 1 else y[i] for i, name in enumerate(wanted)}
            elif self.is_initializing():
                dense(jnp.zeros((len(members), 1, h.shape[-1]), h.dtype))
        return {name: outputs[name] for name in asked}
