"""Checkpoints of a run: orbax for the arrays, a JSON record beside them, and checksums over both.

Orbax writes a checkpoint under a temporary name and renames it, so a killed process leaves no half checkpoint under a
real name. What it does not notice is a file that was damaged later; the checksums do. A checkpoint that cannot be read
or does not match is named in a warning, moved to `damaged_checkpoints` beside the others, and the one before it is
used. If none is left, the run starts from the beginning: it ends in the same bits, only later.
"""

import json
import pathlib
import warnings
import zlib
from collections.abc import Callable, Mapping
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


def _layout(state: PyTree) -> dict[str, str]:
    """Path -> dtype and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for keys, leaf in leaves
    }


def _check_layout(saved: Mapping[str, str], asked: Mapping[str, str]) -> None:
    """Raises a ValueError that names leaves which differ."""
    differing = [path for path in sorted(saved.keys() | asked.keys()) if saved.get(path) != asked.get(path)]
    if differing:
        lines = [f"  {path}: saved {saved.get(path, 'no')}, now {asked.get(path, 'no')}" for path in differing[:5]]
        more = [f"  ... and {len(differing) - 5} more"] if len(differing) > 5 else []
        raise ValueError(
            "The checkpoint is of another model, optimizer or method: its arrays differ\n" + "\n".join(lines + more)
        )


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
        self._manager = ocp.CheckpointManager(
            self.directory,
            # What a killed process was writing is cleaned up at the next start.
            options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True, cleanup_tmp_directories=True),
            item_names=("state", "record"),
        )

    def save(self, step: int, state: PyTree, record: dict[str, Any]) -> None:
        """Starts saving; the arrays are copied first, so the caller may donate them. Overwrites nothing."""
        if step in self._manager.all_steps():
            return
        ocp = self._ocp
        content = json.dumps({"record": record, "layout": _layout(state), "checksum": _checksum(state)})
        record = {"content": content, "checksum": zlib.crc32(content.encode())}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        self._manager.save(step, args=arguments, force=True)

    def latest_step(self) -> int | None:
        """The newest step on disk, readable or not."""
        return self._manager.latest_step()

    def restore(
        self, target: PyTree, *, check: Callable[[Mapping[str, Any]], None] = lambda record: None
    ) -> Restored | None:
        """The newest readable checkpoint, or None if there is none.

        Args:
          target: a pytree of arrays with the structure, shapes and dtypes to restore.
          check: called with the record of the newest checkpoint whose record is readable; raises if it is of another
            run, which is no damage: nothing is moved.

        Raises:
          ValueError: if the checkpoint holds other arrays than `target`, or whatever `check` raises.
        """
        ocp = self._ocp
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step, before in zip(steps, [*steps, None][1:], strict=True):
            try:
                content = self._read_record(step)
            except Exception as error:  # orbax and tensorstore raise many types for damaged files
                self._put_aside(step, before, error)
                continue
            # Not damage, but another run: errors go to the caller.
            check(content["record"])
            _check_layout(content["layout"], _layout(target))
            try:
                arguments = ocp.args.Composite(state=ocp.args.StandardRestore(template))
                state = self._manager.restore(step, args=arguments).state
                # Without some of its files orbax gives random keys as plain integers: same bytes, another layout.
                if _layout(state) != content["layout"] or _checksum(state) != content["checksum"]:
                    raise ValueError("its arrays do not match their checksum")
            except Exception as error:
                self._put_aside(step, before, error)
                continue
            return Restored(step, state, content["record"])
        return None

    def _read_record(self, step: int) -> dict[str, Any]:
        arguments = self._ocp.args.Composite(record=self._ocp.args.JsonRestore())
        record = self._manager.restore(step, args=arguments).record
        if zlib.crc32(record["content"].encode()) != record["checksum"]:
            raise ValueError("its record does not match its checksum")
        return json.loads(record["content"])

    def _put_aside(self, step: int, before: int | None, error: Exception) -> None:
        """Warns, and moves a damaged checkpoint, so that a later save of the same step can write it again."""
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        then = "there is none before it: starting from the beginning" if before is None else f"trying step {before}"
        warnings.warn(f"Checkpoint {step} in {self.directory} is damaged ({reason}); {then}", stacklevel=3)
        folder = self.directory.parent / "damaged_checkpoints"
        folder.mkdir(exist_ok=True)
        place = next(p for n in range(1, 10_000) if not (p := folder / f"{step}.{n}").exists())
        (self.directory / str(step)).rename(place)
        self._manager.reload()

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
