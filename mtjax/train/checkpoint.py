"""Checkpoints of a run: orbax for the arrays, a JSON item beside them, and a checksum over both.

Orbax writes a checkpoint under a temporary name and renames it, so a killed process leaves no half checkpoint under a
real name. What it does not notice is a file that was damaged later; the checksum does. A checkpoint that cannot be read
or does not match is reported and the one before it is used.
"""

import json
import pathlib
import warnings
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

PyTree = Any


class Restored(NamedTuple):
    """A restored checkpoint: step, state (like the target), and the JSON record saved with it."""

    step: int
    state: PyTree
    record: dict[str, Any]


def _checksum(state: PyTree) -> int:
    """CRC-32 over the bytes of every leaf, in the order of the tree."""
    crc = 0
    for leaf in jax.tree.leaves(state):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
    return crc


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
      directory: where to keep them; created if needed.
      max_to_keep: older ones are deleted. At least 2, so that a damaged newest one leaves another.
    """

    def __init__(self, directory: pathlib.Path | str, max_to_keep: int = 2):
        import orbax.checkpoint as ocp

        if max_to_keep < 2:
            raise ValueError(f"max_to_keep must be >= 2 (a spare for a damaged checkpoint), got {max_to_keep}")
        self._ocp = ocp
        self.directory = pathlib.Path(directory).resolve()  # orbax fails late, in a thread, on relative paths
        self._max_to_keep = max_to_keep
        self._manager = self._open()

    def _open(self):
        ocp = self._ocp
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=self._max_to_keep, create=True),
            item_names=("state", "record"),
        )

    def save(self, step: int, state: PyTree, record: dict[str, Any]) -> None:
        """Starts saving; the arrays are copied first, so the caller may donate them. Overwrites nothing."""
        if step in self._manager.all_steps():
            return
        ocp = self._ocp
        record = {"checksum": _checksum(state), "content": json.dumps(record)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        self._manager.save(step, args=arguments, force=True)

    def latest_step(self) -> int | None:
        """The newest step on disk, readable or not."""
        return self._manager.latest_step()

    def restore(self, target: PyTree) -> Restored | None:
        """The newest readable checkpoint, or None if there is none.

        Args:
          target: a pytree of arrays with the structure, shapes and dtypes to restore.

        Damaged checkpoints are named in a warning, removed, and skipped.
        """
        ocp = self._ocp
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        for step in sorted(self._manager.all_steps(), reverse=True):
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(template), record=ocp.args.JsonRestore())
            try:
                loaded = self._manager.restore(step, args=arguments)
                if _checksum(loaded.state) != loaded.record["checksum"]:
                    raise ValueError("its contents do not match its checksum")
                return Restored(step, loaded.state, json.loads(loaded.record["content"]))
            except Exception as error:  # orbax and tensorstore raise many types for damaged files
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
                warnings.warn(
                    f"Checkpoint {step} in {self.directory} is damaged ({reason}); trying the one before it",
                    stacklevel=2,
                )
                # Out of the way: a later save of the same step must be able to write it again.
                self._manager.delete(step)
        return None

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(path: pathlib.Path | str, params: PyTree) -> None:
    """Writes a tree of nested dicts as npz, one array per "/"-joined path. Plain arrays, no pickle."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(leaf) for keys, leaf in leaves}
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def load_params(path: pathlib.Path | str) -> PyTree:
    """Inverse of `save_params`."""
    tree: dict[str, Any] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            *parents, leaf = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = arrays[name]
    return tree
