r"""How MT-DeepONet is trained as published: three optimizers, and which weights a transfer to a new geometry trains.

    transfer          trained                                                    frozen
    MT-DeepONet       first convolution, branch dense layers, trunk output       other convolutions, other trunk layers
    TL-DeepONet       branch dense layers, trunk output                          all convolutions, other trunk layers

A transfer is a rule on paths: `transfer_labels` says 'train' or 'freeze' for every leaf, and `fine_tune` (an
`optax.multi_transform`) makes frozen updates exactly zero, whatever the gradient.

References:
  Kumar et al., "Synergistic Learning with Multi-Task DeepONet for Efficient PDE Problem Solving", Neural Networks 2025,
  and its code. Goswami, Kontolati, Shields and Karniadakis, "Deep Transfer Operator Learning for Partial Differential
  Equations under Conditional Shift", Nature Machine Intelligence 2022 (TL-DeepONet; only its subset is here, not its
  loss on the distance between the features of source and target). Keras's Adam has an epsilon of 1e-7, and its
  piecewise schedule keeps the old rate *at* a boundary; steps count from 0.

>>> import jax.numpy as jnp
>>> layer = {"kernel": jnp.ones(2)}
>>> branch = {"conv_0": layer, "conv_1": layer, "head": {"dense_0": layer, "out": layer}}
>>> params = {"branch": branch, "trunk": {"dense_0": layer, "out": layer}}
>>> labels = transfer_labels(params)
>>> labels["branch"]["conv_0"], labels["branch"]["conv_1"], labels["trunk"]["dense_0"], labels["trunk"]["out"]
({'kernel': 'train'}, {'kernel': 'freeze'}, {'kernel': 'freeze'}, {'kernel': 'train'})
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
_KERAS_EPSILON = 1e-7


def transfer_labels(params: PyTree, unfreeze_trunk_layer: bool = False) -> PyTree:
    """The published subset: first convolution, the branch's dense layers, the trunk's output.

    Args:
      params: of a `DeepONet`, with or without the level 'params'.
      unfreeze_trunk_layer: whether the trunk's last hidden layer is trained too (an option of the published code).

    Returns:
      A pytree like `params` of 'train' and 'freeze'. A branch without convolutions is trained whole, and so is the
      output's bias, which the published network does not have.

    Raises:
      ValueError: if `params` has no 'branch' and 'trunk', or the trunk has no 'out'.
    """
    return _labels(params, first_convolution=True, unfreeze_trunk_layer=unfreeze_trunk_layer)


def tl_deeponet_labels(params: PyTree) -> PyTree:
    """The subset of TL-DeepONet: the branch's dense layers and the trunk's output; all convolutions are frozen.

    Args, returns, raises: as in `transfer_labels`.
    """
    return _labels(params, first_convolution=False, unfreeze_trunk_layer=False)


def _labels(params: PyTree, *, first_convolution: bool, unfreeze_trunk_layer: bool) -> PyTree:
    networks = params.get("params", params)
    if not {"branch", "trunk"} <= set(networks):
        raise ValueError(f"params must be those of a DeepONet, with 'branch' and 'trunk', got {', '.join(networks)}")
    if "out" not in networks["trunk"]:
        raise ValueError(f"The trunk must have a last layer 'out', got {', '.join(networks['trunk'])}")
    hidden = [name for name in networks["trunk"] if re.fullmatch(r"dense_\d+", name)]
    trained = {"out"} | ({max(hidden, key=_number)} if unfreeze_trunk_layer and hidden else set())

    def label(path, _):
        names = [entry.key for entry in path if entry.key != "params"]
        if names[0] == "trunk":
            train = names[1] in trained
        else:
            convolutions = [_number(name) for name in names if re.fullmatch(r"conv_\d+", name)]
            train = all(number == 0 and first_convolution for number in convolutions)
        return "train" if train else "freeze"

    return jax.tree_util.tree_map_with_path(label, params)


def _number(name: str) -> int:
    return int(name.rsplit("_", 1)[1])


def fine_tune(optimizer: optax.GradientTransformation, labels: PyTree) -> optax.GradientTransformation:
    """`optimizer` for leaves labelled 'train', zero updates for leaves labelled 'freeze'."""
    return optax.multi_transform({"train": optimizer, "freeze": optax.set_to_zero()}, labels)


def fisher_optimizer(learning_rate: float = 1e-3) -> optax.GradientTransformation:
    """Adam(0.9, 0.999), rate times 0.95 every 1,000 steps in a staircase; 100,000 steps of 200 functions."""
    rate = optax.exponential_decay(learning_rate, 1000, 0.95, staircase=True)
    return optax.adam(rate, 0.9, 0.999, eps=_KERAS_EPSILON)


def darcy_optimizer() -> optax.GradientTransformation:
    """Adam(0.9, 0.99), rate 1e-3, 5e-4, 1e-4 with boundaries 5,001 and 8,001; 30,000 steps of 1,000 functions."""
    return optax.adam(keras_piecewise((5001, 8001), (1e-3, 5e-4, 1e-4)), 0.9, 0.99, eps=_KERAS_EPSILON)


def transfer_optimizer(labels: PyTree) -> optax.GradientTransformation:
    """Adam(0.9, 0.99), rate 5e-4, 1e-4, 1e-5 with boundaries 2,001 and 3,001, on what `labels` train; 5,000 steps."""
    rate = keras_piecewise((2001, 3001), (5e-4, 1e-4, 1e-5))
    return fine_tune(optax.adam(rate, 0.9, 0.99, eps=_KERAS_EPSILON), labels)


def heat3d_optimizer(switch: int = 15_001) -> optax.GradientTransformation:
    """Adam(0.9, 0.95) with rate 1e-3 times 0.9 every 1,000 steps; then Lion(0.9, 0.99), 1e-5 times 0.9 every 100.

    Args:
      switch: steps of Adam; published are 15,001 of 20,000. Lion's schedule starts there.
    """
    adam = optax.adam(optax.exponential_decay(1e-3, 1000, 0.9, staircase=True), 0.9, 0.95, eps=_KERAS_EPSILON)
    # optax's Lion decays weights unless told not to.
    lion = optax.lion(optax.exponential_decay(1e-5, 100, 0.9, staircase=True), 0.9, 0.99, weight_decay=0.0)
    return switch_at(switch, adam, lion)


def small_optimizer(
    steps: int, learning_rate: float | jax.Array = 5e-3, warmup: int = 200
) -> optax.GradientTransformation:
    """Adam with a linear warm-up and a cosine to zero, for `small_deeponet` (3,000 steps of 64 functions).

    Raises:
      ValueError: unless `steps` > `warmup`.
    """
    if steps <= warmup:
        raise ValueError(f"steps must exceed the warm-up of {warmup} steps, got {steps}")
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps)
    return optax.adam(lambda count: learning_rate * shape(count))  # the rate may be traced: one per lane of a fit


def keras_piecewise(boundaries: Sequence[int], values: Sequence[float]) -> Callable:
    """A schedule: the k-th value up to and with step `boundaries[k]` (steps count from 0), the last one after.

    >>> schedule = keras_piecewise((1,), (0.5, 0.25))
    >>> [float(schedule(step)) for step in range(4)]
    [0.5, 0.5, 0.25, 0.25]
    """
    edges, rates = tuple(boundaries), tuple(values)
    if len(rates) != len(edges) + 1:
        raise ValueError(f"{len(edges)} boundaries need {len(edges) + 1} values, got {len(rates)}")

    def schedule(step):
        passed = sum((jnp.asarray(step) > edge).astype(jnp.int32) for edge in edges)
        return jnp.asarray(rates, jnp.float32)[passed]

    return schedule


class SwitchState(NamedTuple):
    """State of `switch_at`.

    Attributes:
      step: i32[], steps made.
      first: state of the first optimizer.
      second: state of the second, as `init` left it until its turn.
    """

    step: jax.Array
    first: Any
    second: Any


def switch_at(
    step: int, first: optax.GradientTransformation, second: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`first` for `step` steps, then `second`, which starts afresh: its moments and its schedule begin there."""

    def init(params):
        return SwitchState(jnp.zeros((), jnp.int32), first.init(params), second.init(params))

    def update(updates, state, params=None):
        def run_first(updates):
            result, new = first.update(updates, state.first, params)
            return result, new, state.second

        def run_second(updates):
            result, new = second.update(updates, state.second, params)
            return result, state.first, new

        result, one, two = jax.lax.cond(state.step < step, run_first, run_second, updates)
        return result, SwitchState(state.step + 1, one, two)

    return optax.GradientTransformation(init, update)
