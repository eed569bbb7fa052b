r"""DeepONet: an operator from functions to functions as a sum of learned basis functions with learned coefficients.

    G(f)(x) = sum_k b_k(f) t_k(x) + b0          branch b: samples of f -> p numbers;  trunk t: a point -> p numbers

One code serves two layouts of the query points. *Cartesian*: batch['points'] f[N, d] is one set for all functions; the
trunk runs once per batch, and the output is the product of the branch's and the trunk's matrix. *Pointwise*:
batch['points'] f[B, N, d] holds points of each function's own, padded to a common N; batch['mask'] says which count.

Where the trunk is an MLP, its last map is linear, and with many points it is less work to multiply that map with the
coefficients first, h (W b) instead of (h W) b: the same sum in another order, chosen by the sizes. (Half of the work of
a training step at the sizes of MT-DeepONet's first study; far more in the pointwise layout.)

Branch and trunk are modules (`mtjax.nn.operator_layers`, or any `net(x, train=False)`); what happens to the field after
the sum is a sequence of functions (`mtjax.nn.output_transforms`: standardisation, hard boundary values, mask).

With C > 1 outputs, a strategy says what the outputs share:

| strategy       | branch ends in | trunk ends in |                                                    |
|----------------|----------------|---------------|----------------------------------------------------|
| `independent`  | p              | p             | C networks, parameters have a leading axis C       |
| `split_both`   | C p            | C p           | the k-th group of p belongs to the k-th output     |
| `split_branch` | C p            | p             | one basis for all outputs                          |
| `split_trunk`  | p              | C p           | one set of coefficients for all outputs            |

Several tasks need no more than this where a description of the task is part of the branch's input
(`mtjax.models.mt_deeponet`). With `tasks`, each named task has a branch of its own (parameters with a leading axis K),
and the trunk is shared: the tasks' solutions have a common basis.

References:
  Lu, Jin, Pang, Zhang and Karniadakis, "Learning Nonlinear Operators via DeepONet Based on the Universal Approximation
  Theorem of Operators", Nature Machine Intelligence 2021. Lu et al., "A Comprehensive and Fair Comparison of Two Neural
  Operators", CMAME 2022, section 3.1.6 (several outputs). DeepXDE's code is the origin of the strategies' names and of
  the bias, one scalar per output; there the activation also follows the trunk's last layer (`output_activation`).

Letters: B functions, N points, d coordinates, C outputs, p basis functions, K tasks.

>>> from mtjax.nn.operator_layers import MLP
>>> model = DeepONet(branch=MLP((16, 8)), trunk=MLP((16, 8)))
>>> batch = {"inputs": jnp.zeros((4, 10)), "points": jnp.zeros((20, 2))}
>>> params = model.init(jax.random.key(0), batch)
>>> model.apply(params, batch)["u"].shape
(4, 20)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.operator_layers import MLP, ModifiedMLP, ResidualMLP
from mtjax.nn.output_transforms import Transform, apply_transforms
from mtjax.nn.stacked import task_index

STRATEGIES = ("independent", "split_both", "split_branch", "split_trunk")


def merge(coefficients: jax.Array, basis: jax.Array, *, pointwise: bool) -> jax.Array:
    """Sum over the p basis functions: coefficients times basis.

    Args:
      coefficients: f[B, p], or f[B, C, p].
      basis: f[N, p], f[N, C, p], or with `pointwise` f[B, N, p], f[B, N, C, p].
      pointwise: whether every function has a basis at points of its own.

    Returns:
      f[B, N], or f[B, N, C] if either has an axis C.

    Raises:
      ValueError: if the two do not have the same p.

    >>> merge(jnp.ones((2, 3)), jnp.ones((5, 3)), pointwise=False).shape
    (2, 5)
    """
    if coefficients.shape[-1] != basis.shape[-1]:
        raise ValueError(
            "Branch and trunk must end in the same number of basis functions per output, got "
            f"{coefficients.shape[-1]} and {basis.shape[-1]}"
        )
    left = "bcp" if coefficients.ndim == 3 else "bp"
    right = ("bn" if pointwise else "n") + ("cp" if basis.ndim == (4 if pointwise else 3) else "p")
    return jnp.einsum(f"{left},{right}->bn{'c' if 'c' in left + right else ''}", coefficients, basis)


def copies(run: Any, count: int) -> Any:
    """`run(module, x)` for `count` copies of the module, whose parameters get a leading axis; f[count, ...]."""
    return nn.vmap(
        run,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=None,
        axis_size=count,
    )


class DeepONet(nn.Module):
    """The operator network; see the module for the mathematics.

    Parameters: 'branch', 'trunk', and 'bias' f32[C] with `use_bias`.

    Attributes:
      branch: `branch(batch['inputs'], train=)` -> f[B, p].
      trunk: `trunk(points, train=)` f[..., d] -> f[..., p].
      num_outputs: C.
      strategy: what C > 1 outputs share, one of `STRATEGIES`; None for one output.
      tasks: names of tasks with a branch of their own; (): one branch.
      use_bias: whether every output has a trained scalar added, as in DeepXDE (not in MT-DeepONet).
      transforms: applied to the field, in order.

    Raises:
      ValueError: for an unknown strategy, C > 1 without one, or one without C > 1.
    """

    branch: nn.Module
    trunk: nn.Module
    num_outputs: int = 1
    strategy: str | None = None
    tasks: Sequence[str] = ()
    use_bias: bool = True
    transforms: Sequence[Transform] = ()

    def __post_init__(self):
        if self.strategy not in (None, *STRATEGIES):
            raise ValueError(f"strategy must be None or one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if (self.num_outputs > 1) != (self.strategy is not None):
            raise ValueError(
                "Several outputs need a strategy, and one output has none, got "
                f"num_outputs={self.num_outputs} and strategy={self.strategy!r}"
            )
        super().__post_init__()

    def setup(self):
        if self.use_bias:
            self.bias = self.param("bias", nn.initializers.zeros_init(), (self.num_outputs,))

    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False
    ) -> dict[str, jax.Array]:
        """Predicts the fields at the points.

        Args:
          batch: 'inputs' (what the branch reads), 'points' f[N, d] or f[B, N, d], and the columns that the transforms
            read; 'task' i32[B], positions in `tasks`, if the model has tasks and `task` is not given.
          task: static; the task of the whole batch, if the model has tasks. Only its branch is computed.
          train: whether dropout is on.

        Returns:
          {'u': f[B, N]}, f[B, N, C] for C > 1.
        """
        return {"u": self.field(self.encode(batch, task=task, train=train), batch, train=train)}

    def field(self, coefficients: jax.Array, batch: Mapping[str, Any], *, train: bool = False) -> jax.Array:
        """The field at batch['points'] from `encode`, in the order of products that is less work."""
        points = batch["points"]
        if self._maps_first(coefficients, points):
            trunk = self.trunk(points, train=train, split=True)
            # sum_p b_p (h W + d)_p = h (W b) + d b: the trunk's last map meets the coefficients, not the points.
            u = merge(coefficients @ trunk.kernel.T, trunk.hidden, pointwise=points.ndim == 3)
            if trunk.bias is not None:
                u = u + (coefficients @ trunk.bias)[:, None]
            return self._finish(u, batch)
        return self.combine(coefficients, self.basis(points, train=train), batch)

    def _maps_first(self, coefficients: jax.Array, points: jax.Array) -> bool:
        """Whether it is less work to apply the trunk's last, linear map to the coefficients than at the points."""
        linear_end = isinstance(self.trunk, MLP | ModifiedMLP | ResidualMLP)
        if not linear_end or getattr(self.trunk, "output_activation", None) is not None or self.strategy is not None:
            return False
        if len(self.trunk.features) < 2 or coefficients.shape[-1] != self.trunk.features[-1]:
            return False
        if not all(isinstance(size, int) for size in (*coefficients.shape, *points.shape)):
            return False  # sizes are not known yet: an export
        functions, (width, num_basis) = coefficients.shape[0], self.trunk.features[-2:]
        at_points = points.size // points.shape[-1]  # N, or B N
        sums = at_points * (functions if points.ndim == 2 else 1)
        return width * (functions * num_basis + sums) < num_basis * (at_points * width + sums)

    def encode(self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False) -> jax.Array:
        """Coefficients f[B, p], or f[B, C, p] where outputs have their own."""

        def run(module, x):
            return module(x, train=train)

        independent = self.strategy == "independent"
        per_output = copies(run, self.num_outputs) if independent else run
        inputs = batch["inputs"]
        if not self.tasks:
            coefficients = per_output(self.branch, inputs)
        else:
            position = task_index(dict.fromkeys(self.tasks, 1), task)
            if position is None or self.is_initializing():  # init makes the branches of all tasks whatever is asked
                coefficients = copies(per_output, len(self.tasks))(self.branch, inputs)
                coefficients = self._select(coefficients, batch, position)
            else:
                coefficients = self._one_branch(position, inputs, train)
        if independent:
            return jnp.moveaxis(coefficients, 0, 1)
        return self._split(coefficients, "branch") if self.strategy in ("split_both", "split_branch") else coefficients

    def basis(self, points: jax.Array, *, train: bool = False) -> jax.Array:
        """The trunk at points f[N, d] or f[B, N, d]: f[..., p], f[..., C, p] where outputs have their own."""

        def run(module, x):
            return module(x, train=train)

        if self.strategy == "independent":
            return jnp.moveaxis(copies(run, self.num_outputs)(self.trunk, points), 0, -2)
        values = run(self.trunk, points)
        return self._split(values, "trunk") if self.strategy in ("split_both", "split_trunk") else values

    def combine(self, coefficients: jax.Array, basis: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
        """The field from `encode` and `basis` (which may have been computed before, once for many batches)."""
        axes_of_points = basis.ndim - 1 - (self.strategy not in (None, "split_branch"))
        return self._finish(merge(coefficients, basis, pointwise=axes_of_points == 2), batch)

    def _finish(self, u: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
        """The sum over basis functions f[B, N] or f[B, N, C] -> the field."""
        if self.use_bias:
            u = u + (self.bias[0] if u.ndim == 2 else self.bias[None, None, :])
        return apply_transforms(u, batch, self.transforms)

    def _split(self, x: jax.Array, net: str) -> jax.Array:
        """f[..., C p] -> f[..., C, p]."""
        if x.shape[-1] % self.num_outputs:
            raise ValueError(
                f"With strategy {self.strategy!r} the {net} must end in a multiple of num_outputs={self.num_outputs}, "
                f"got {x.shape[-1]}"
            )
        return x.reshape(*x.shape[:-1], self.num_outputs, -1)

    def _select(self, per_task: jax.Array, batch: Mapping[str, Any], position: int | None) -> jax.Array:
        """Of f[K, (C,) B, p], each function's own task: f[(C,) B, p]."""
        if position is not None:
            return per_task[position]
        if "task" not in batch:
            raise ValueError(
                f"A model with branches for {', '.join(self.tasks)} needs batch['task'], the position of each "
                "function's task, or task=, the name of the whole batch's task"
            )
        own = jnp.arange(len(self.tasks))[:, None] == batch["task"][None, :]  # [K, B]
        own = own.reshape(len(self.tasks), *(1,) * (per_task.ndim - 3), -1, 1)
        return jnp.where(own, per_task, 0.0).sum(0)

    def _one_branch(self, position: int, inputs: Any, train: bool) -> jax.Array:
        """The branch of one task alone: its slice of the parameters, so that no other is computed."""
        module, variables = self.branch.unbind()
        own = jax.tree.map(lambda leaf: leaf[position], variables["params"])
        rngs = {"dropout": self.make_rng("dropout")} if train and self.has_rng("dropout") else {}

        def run(params):
            return module.apply({"params": params}, inputs, train=train, rngs=rngs)

        return jax.vmap(run)(own) if self.strategy == "independent" else run(own)


def predict_at(
    model: DeepONet, variables: Any, batch: Mapping[str, Any], *, task: str | None = None, chunk_size: int = 1024
) -> dict[str, jax.Array]:
    """`model.apply` at very many common points, a chunk at a time: the trunk's layers stay in the cache.

    On a CPU this takes three quarters of the time for a field at 65,536 points, and the memory of one chunk.

    Args:
      model: a DeepONet.
      variables: its variables, {'params': ...}.
      batch: 'inputs' of B functions, 'points' f[N, d], 'mask' if the transforms read it (bool[N] or bool[B, N]).
      task: see `DeepONet.__call__`.
      chunk_size: points at once.

    Returns:
      {'u': f[B, N]}, f[B, N, C] for C > 1 outputs, as `model.apply` without chunks.

    Raises:
      ValueError: for points of their own per function, or a column that has no axis of points.
    """
    points = batch["points"]
    if points.ndim != 2:
        raise ValueError(f"predict_at takes points f[N, d] that all functions share, got shape {points.shape}")
    total = len(points)
    columns = {name: batch[name] for name in batch if name not in ("inputs", "values", "task")}
    # The axis of points: the first of the points themselves and of columns f[N], else the second.
    axes = {name: 0 if name == "points" or column.ndim == 1 else 1 for name, column in columns.items()}
    for name, column in columns.items():
        if column.shape[axes[name]] != total:
            raise ValueError(f"batch['{name}'] must have an axis of {total} points, got shape {column.shape}")
    size = min(chunk_size, total)
    coefficients = model.apply(variables, batch, task=task, method="encode")
    starts = jnp.minimum(jnp.arange(0, total, size), total - size)  # the last chunk overlaps the one before

    def one(start):
        part = {n: jax.lax.dynamic_slice_in_dim(column, start, size, axes[n]) for n, column in columns.items()}
        return model.apply(variables, coefficients, part, method="field")

    u = jnp.moveaxis(jax.lax.map(one, starts), 0, 1)  # [B, chunks, size, ...]
    whole = u[:, :-1].reshape(u.shape[0], -1, *u.shape[3:])
    return {"u": jnp.concatenate([whole, u[:, -1, size * len(starts) - total :]], axis=1)}
