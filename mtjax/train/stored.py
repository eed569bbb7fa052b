"""What orbax saves and restores for the leaves of a state, and how they are described.

PRNG keys are saved as their data, and a placeholder stands for arrays without elements, which orbax does not save. What
is asked for has a sharding for every array: without it orbax looks for the devices that the array was saved from.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mtjax.train.checksums import is_key, named_leaves

PyTree = Any
_NOTHING = np.zeros(1, np.uint8)


def stored(state: PyTree) -> PyTree:
    """What orbax saves."""

    def convert(leaf: Any) -> Any:
        if leaf.size == 0:
            return _NOTHING
        return jax.random.key_data(leaf) if is_key(leaf) else leaf

    return jax.tree.map(convert, state)


def template(target: PyTree) -> PyTree:
    """What orbax is asked for.

    Args:
      target: arrays or `jax.ShapeDtypeStruct`s with the shardings to restore to.

    Raises:
      ValueError: if a sharding is missing and there are several processes.
    """

    def describe(path: str, leaf: Any) -> Any:
        if leaf.size == 0:
            return _NOTHING
        if isinstance(leaf, np.ndarray):
            return leaf
        if leaf.sharding is None and jax.process_count() > 1:
            raise ValueError(f"target: {path} has no sharding, which is needed where there are several processes")
        data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=_sharding(leaf))

    described = [describe(path, leaf) for path, leaf in zip(*named_leaves(target), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(target), described)


def loaded(restored: PyTree, target: PyTree) -> PyTree:
    """A state like the target, from what orbax restored: inverse of `stored`."""

    def convert(leaf: Any, target: Any) -> Any:
        if target.size == 0:
            data = jax.eval_shape(jax.random.key_data, target) if is_key(target) else target
            leaf = empty = np.zeros(data.shape, data.dtype)
            if not isinstance(target, np.ndarray):
                leaf = jax.make_array_from_callback(empty.shape, _sharding(target), lambda part: empty[part])
        if not is_key(target):
            return leaf
        kind = []
        jax.eval_shape(lambda keys: kind.append(jax.random.key_impl(keys)), target)  # a ShapeDtypeStruct does not tell
        return jax.random.wrap_key_data(leaf, impl=kind[0])

    return jax.tree.map(convert, restored, target)


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def layout(state: PyTree) -> dict[str, str]:
    """Path -> dtype and shape of every leaf."""
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in zip(*named_leaves(state), strict=True)}


def check_layout(saved: Mapping[str, str], asked: Mapping[str, str]) -> None:
    """Raises a ValueError that names leaves which differ."""
    differing = [path for path in sorted(saved.keys() | asked.keys()) if saved.get(path) != asked.get(path)]
    if differing:
        lines = [f"  {path}: saved {saved.get(path, 'no')}, now {asked.get(path, 'no')}" for path in differing[:5]]
        more = [f"  ... and {len(differing) - 5} more"] if len(differing) > 5 else []
        raise ValueError(
            "The checkpoint is of another model, optimizer or method: its arrays differ\n" + "\n".join(lines + more)
        )


def check_global(state: PyTree) -> None:
    """Raises a ValueError if an array is not spread over all processes, where there are several."""
    if jax.process_count() == 1:
        return
    for path, leaf in zip(*named_leaves(state), strict=True):
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            raise ValueError(
                f"Cannot save {path}: there are {jax.process_count()} processes and it lies in one of them only; place "
                "the state on a mesh of all devices with mtjax.sharding.place_state"
            )
