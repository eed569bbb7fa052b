r"""MIONet: operators of several input functions, whose branches are merged before the product with the trunk.

    G(f_1, ..., f_n)(x) = sum_k m(b^1(f_1), ..., b^n(f_n))_k t_k(x) + b0      m: product, sum, concatenation + network

A `MergedBranches` is a branch like any other, so a MIONet is a `DeepONet` with it, and has all that a DeepONet has:
both layouts of points, several outputs, tasks, output transforms. The two input functions of a physical problem (a
field and a source, an initial and a boundary condition) enter by batch['inputs'] = {name: f[B, ...]}.

Reference: Jin, Meng and Lu, "MIONet: Learning Multiple-Input Operators via Tensor Product", SIAM Journal on Scientific
Computing 2022 (the product without a merger; equation 2.14 is the low-rank form that is built here). Sum, concatenation
and the merging network are options of DeepXDE's `MIONetCartesianProd`; its network after the product with the trunk,
which has to run at every point of every function, is not built.

Letters: B functions, N points, p basis functions.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from mtjax.models.deeponet import DeepONet

MERGES = ("mul", "add", "cat")


class MergedBranches(nn.Module):
    """One branch per input function, merged: {name: f[B, ...]} -> f[B, p].

    Attributes:
      branches: name of the input -> its branch.
      merge: 'mul' (the paper), 'add' or 'cat'.
      merger: network after the merge; None: none. With 'cat' it is usual.

    Raises:
      ValueError: for another `merge`, or no branches.
    """

    branches: Mapping[str, nn.Module]
    merge: str = "mul"
    merger: nn.Module | None = None

    def __post_init__(self):
        if self.merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {self.merge!r}")
        if not self.branches:
            raise ValueError("branches is empty: a MIONet needs a branch for each input function")
        super().__post_init__()

    def __call__(self, inputs: Mapping[str, Any], *, train: bool = False) -> jax.Array:
        missing = [name for name in self.branches if name not in inputs]
        if missing:
            raise ValueError(f"inputs lack {missing[0]!r}; there is a branch for each of {', '.join(self.branches)}")
        outputs = [branch(inputs[name], train=train) for name, branch in self.branches.items()]
        if self.merge == "cat":
            merged = jnp.concatenate(outputs, axis=-1)
        else:
            if len({output.shape[-1] for output in outputs}) > 1:
                widths = {name: output.shape[-1] for name, output in zip(self.branches, outputs, strict=True)}
                raise ValueError(f"merge={self.merge!r} needs branches of one width, got {widths}")
            merged = functools.reduce(operator.mul if self.merge == "mul" else operator.add, outputs)
        return merged if self.merger is None else self.merger(merged, train=train)


def mionet(
    branches: Mapping[str, nn.Module],
    trunk: nn.Module,
    *,
    merge: str = "mul",
    merger: nn.Module | None = None,
    **options: Any,
) -> DeepONet:
    """A MIONet.

    Args:
      branches: name of the input function -> its branch.
      trunk: as in `DeepONet`.
      merge: 'mul', 'add' or 'cat'.
      merger: network after the merge, if wanted.
      **options: other fields of `DeepONet`.

    Returns:
      The model; its batches have 'inputs' {name: f[B, ...]}.

    >>> from mtjax.nn.operator_layers import MLP
    >>> model = mionet({"permeability": MLP((16, 8)), "source": MLP((16, 8))}, MLP((16, 8)))
    >>> batch = {"inputs": {"permeability": jnp.ones((4, 9)), "source": jnp.ones((4, 5))}, "points": jnp.ones((20, 2))}
    >>> model.init_with_output(jax.random.key(0), batch)[0]["u"].shape
    (4, 20)
    """
    return DeepONet(MergedBranches(FrozenDict(branches), merge, merger), trunk, **options)
