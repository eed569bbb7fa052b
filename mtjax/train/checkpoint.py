"""Checkpoints of a run: orbax for the arrays, a JSON record beside them, and checksums over both.

Orbax copies the arrays and writes them in the background, under a temporary name that is changed at the end, so a
killed process leaves no half checkpoint under a real name. What it does not notice is a file that was damaged later;
the checksums do. A checkpoint that cannot be read or does not match is named in a warning, moved to
`damaged_checkpoints` beside the others, and the one before it is used. If none is left, the run starts from the
beginning: it ends in the same bits, only later.

States may be spread over a mesh and over processes, which then call every method together: each process writes and
reads its own parts, all agree on which checkpoint is good, and one moves folders. A checkpoint can be restored to
another mesh and another number of processes; its checksums do not depend on them.
"""

import contextlib
import functools
import json
import logging
import math
import pathlib
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mtjax import distributed
from mtjax.train import report
from mtjax.train.checksums import checksums
from mtjax.train.stored import check_global, check_layout, layout, loaded, stored, template

PyTree = Any
FORMAT = 2
"""Version of what is written beside the arrays."""


class CheckpointError(OSError):
    """A checkpoint could not be written: no space, no permission, no folder. The message names the last good one."""


class Restored(NamedTuple):
    """A restored checkpoint: step, state (like the target), and the JSON record saved with it."""

    step: int
    state: PyTree
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
      directory: where to keep them; created if needed.
      max_to_keep: older ones are deleted. At least 2, so that a damaged newest one leaves another.
      keep_best: the one with the highest score is kept as well.

    Raises:
      CheckpointError: if the directory cannot be made or read.
    """

    def __init__(self, directory: pathlib.Path | str, *, max_to_keep: int = 2, keep_best: bool = False):
        if max_to_keep < 2:
            raise ValueError(f"max_to_keep must be >= 2 (a spare for a damaged checkpoint), got {max_to_keep}")
        import orbax.checkpoint as ocp

        # It writes pages of tracebacks for errors that it then also raises, and which are one sentence here.
        logging.getLogger("absl").addFilter(_is_no_traceback)
        self._ocp = ocp
        self.directory = pathlib.Path(directory).resolve()  # orbax fails late, in a thread, on relative paths
        self._under_way: int | None = None  # the step that may still be being written
        self._scores: dict[int, float] = {}
        self._make_directory()
        with self._sentences("The checkpoints cannot be opened"):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_LatestAndBest(max_to_keep, self._scores),
                    # What a killed process was writing is cleaned up at the next start.
                    cleanup_tmp_directories=True,
                    # Otherwise threads wait for five minutes for a folder that could not be made.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
            )
        for step in self._manager.all_steps() if keep_best else ():
            with contextlib.suppress(Exception):  # damage is named where it matters, in `restore`
                self._note_score(step, read_content(self._folder(step))["score"])
        self._keep_best = keep_best

    def save(self, step: int, state: PyTree, record: dict[str, Any], *, score: float | None = None) -> None:
        """Starts saving; the arrays are copied first, so the caller may donate them. Overwrites nothing.

        Args:
          step: number of the checkpoint.
          state: arrays; in several processes each has to lie on a mesh of all of them.
          record: JSON-able values.
          score: higher is better, for `keep_best`; None or NaN is never the best.

        Raises:
          CheckpointError: if this checkpoint, or the one before it in the background, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        self._finish()
        check_global(state)
        ocp, score = self._ocp, None if score is None or math.isnan(score) else float(score)
        content = {
            "format": FORMAT,
            "record": record,
            "layout": layout(state),
            "checksums": checksums(state),
            "score": score,
            "code": code_version(),
        }
        text = json.dumps(content)
        sealed = {"content": text, "checksum": zlib.crc32(text.encode())}
        arrays = ocp.args.StandardSave(stored(state))
        arguments = ocp.args.Composite(state=arrays, record=ocp.args.JsonSave(sealed))
        if self._keep_best:
            self._note_score(step, score)
        with self._sentences(f"Checkpoint {step} could not be written"):
            self._manager.save(step, args=arguments, force=True)
        self._under_way = step

    def latest_step(self) -> int | None:
        """The newest step, readable or not."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the highest score among those kept, with `keep_best`; None if there is none."""
        return _best(self._scores, self._manager.all_steps())

    def restore(
        self,
        target: PyTree,
        *,
        check: Callable[[Mapping[str, Any]], None] = lambda record: None,
        step: int | None = None,
    ) -> Restored | None:
        """The newest readable checkpoint, or None if there is none.

        Args:
          target: a pytree with the structure, shapes, dtypes and shardings to restore, of arrays or
            `jax.ShapeDtypeStruct`s; NumPy arrays are restored as such.
          check: called with the record of the newest checkpoint whose record is readable; raises if it is of another
            run, which is no damage: nothing is moved.
          step: the checkpoint to restore, or the newest readable one before it; None: the newest of all.

        Raises:
          ValueError: if the checkpoint holds other arrays than `target`, or is of another version of this format, or
            whatever `check` raises.
          CheckpointError: if a save under way failed, or a damaged checkpoint cannot be moved.
        """
        self._finish()
        asked, asked_layout = template(target), layout(target)
        while (step := self._newest(step)) is not None:
            content, error = _attempt(lambda step=step: read_content(self._folder(step)))
            if distributed.agree(error is not None):
                self._put_aside(step, error)
                continue
            # Not damage, but another run: errors go to the caller.
            self._check_format(step, content)
            check(content["record"])
            check_layout(content["layout"], asked_layout)
            state, error = _attempt(lambda step=step: self._read_state(step, asked))
            if not distributed.agree(error is not None):
                # Programs over all processes, which all have read their parts.
                state = loaded(state, target)
                _, error = _attempt(lambda state=state, content=content: _check_sums(content, state))
                if not distributed.agree(error is not None):
                    self._warn_of_other_versions(step, content["code"])
                    return Restored(step, state, content["record"])
            self._put_aside(step, error)
        return None

    def close(self) -> None:
        """Waits for saves under way.

        Raises:
          CheckpointError: if one of them failed.
        """
        try:
            self._finish()
        finally:
            self._manager.close()

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def _make_directory(self) -> None:
        error = None
        if distributed.is_main():
            _, error = _attempt(lambda: self.directory.mkdir(parents=True, exist_ok=True))
        if distributed.agree(error is not None):
            reason = reason_of(error) if error else "in process 0"
            raise CheckpointError(f"The folder for checkpoints {self.directory} cannot be made ({reason})") from error

    def _finish(self) -> None:
        """Waits for the save under way; its error is the caller's."""
        step, self._under_way = self._under_way, None
        with self._sentences(f"Checkpoint {step} could not be written"):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _sentences(self, what: str) -> Iterator[None]:
        """Whatever orbax and tensorstore raise for what the file system refuses becomes one sentence."""
        try:
            yield
        except Exception as error:
            steps = steps_in(self.directory)
            last = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint before it"
            raise CheckpointError(f"{what}: {self.directory} ({reason_of(error)}); {last}") from error

    def _newest(self, until: int | None) -> int | None:
        """The newest step, not after `until`, that process 0 sees."""
        steps = [step for step in self._manager.all_steps() if until is None or step <= until]
        newest = _of_main(max(steps, default=-1))
        return None if newest < 0 else newest

    def _read_state(self, step: int, asked: PyTree) -> PyTree:
        # Without the manager, which synchronises processes: one that cannot read would leave the others waiting.
        handler = self._ocp.StandardCheckpointHandler()
        return handler.restore(self._folder(step) / "state", args=self._ocp.args.StandardRestore(asked))

    def _put_aside(self, step: int, error: Exception | None) -> None:
        """Warns, and moves a damaged checkpoint, so that a later save of the same step can write it again."""
        failed = None
        if distributed.is_main():
            before = max((other for other in self._manager.all_steps() if other < step), default=None)
            none = "there is none before it: starting from the beginning"
            reason = reason_of(error) if error else "another process cannot read it"
            then = none if before is None else f"trying step {before}"
            warnings.warn(f"Checkpoint {step} in {self.directory} is damaged ({reason}); {then}", stacklevel=3)
            _, failed = _attempt(lambda: _move_aside(self._folder(step)))
        if distributed.agree(failed is not None):
            reason = reason_of(failed) if failed else "in process 0"
            raise CheckpointError(
                f"Checkpoint {step} in {self.directory} is damaged and cannot be moved aside ({reason})"
            ) from failed
        self._scores.pop(step, None)
        self._manager.reload()

    def _note_score(self, step: int, score: float | None) -> None:
        if score is not None:
            self._scores[step] = score

    def _check_format(self, step: int, content: Mapping[str, Any]) -> None:
        """Raises a ValueError if another version of mtjax wrote this; older records did not say so."""
        found = content.get("format", 1)
        if found != FORMAT:
            age = "an older" if found < FORMAT else "a newer"
            raise ValueError(
                f"Checkpoint {step} in {self.directory} was written by {age} version of mtjax (format {found}, this "
                f"version reads {FORMAT}); go on with that version, or start the run again in another directory"
            )

    def _warn_of_other_versions(self, step: int, code: Mapping[str, Any]) -> None:
        differing = _differing_versions(code, code_version())
        if differing and distributed.is_main():
            warnings.warn(
                f"Checkpoint {step} in {self.directory} was written with other versions ({', '.join(differing)}); the "
                "run goes on, but may differ in its last bits from one that was not interrupted",
                stacklevel=3,
            )


class _LatestAndBest:
    """Which checkpoints are kept, as orbax asks: the latest few, and the best by the scores in their records.

    Orbax's own policy reads scores from a file that no checksum covers.
    """

    def __init__(self, latest: int, scores: Mapping[int, float]):
        self._latest, self._scores = latest, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        kept = {*steps[-self._latest :], _best(self._scores, steps)}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _best(scores: Mapping[int, float], steps: Sequence[int]) -> int | None:
    """The step with the highest score; the latest of equals."""
    return max((step for step in steps if step in scores), key=lambda step: (scores[step], step), default=None)


def steps_in(directory: pathlib.Path) -> list[int]:
    """The steps of finished checkpoints on disk, sorted; [] if the directory cannot be read."""
    try:
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    except OSError:
        return []


def read_content(folder: pathlib.Path) -> dict[str, Any]:
    """What lies beside the arrays of one checkpoint, its checksum verified.

    Args:
      folder: of the checkpoint.

    Returns:
      'format', 'record', 'layout' (path -> dtype and shape), 'checksums' (path -> u32), 'score' and 'code' (commit and
      versions); older checkpoints have fewer.

    Raises:
      Exception: of whatever type, if it is damaged.
    """
    import orbax.checkpoint as ocp

    sealed = ocp.JsonCheckpointHandler().restore(folder / "record")
    if zlib.crc32(sealed["content"].encode()) != sealed["checksum"]:
        raise ValueError("its record does not match its checksum")
    return json.loads(sealed["content"])


@functools.cache
def code_version() -> dict[str, Any]:
    """Command, git commit (None outside of a repository), device, and the versions of what decides about bits."""
    import importlib.metadata

    import mtjax

    where = report.provenance()
    versions = {"mtjax": mtjax.__version__, "orbax-checkpoint": importlib.metadata.version("orbax-checkpoint")}
    return where | {"versions": where["versions"] | versions}


def _differing_versions(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Phrases such as 'jax 0.10.1, now 0.12.0'."""
    was, are = saved["versions"], now["versions"]
    names = [name for name in sorted(was.keys() & are.keys()) if was[name] != are[name]]
    phrases = [f"{name} {was[name]}, now {are[name]}" for name in names]
    if saved["commit"] and now["commit"] and saved["commit"] != now["commit"]:
        phrases.append(f"mtjax at commit {saved['commit'][:8]}, now {now['commit'][:8]}")
    return phrases


def _check_sums(content: Mapping[str, Any], state: PyTree) -> None:
    """Raises a ValueError if arrays are not what was saved. All processes call it."""
    # Without some of its files orbax gives other dtypes and shapes than it was asked for.
    if layout(state) != content["layout"]:
        raise ValueError("its arrays have other types or shapes than were saved")
    sums = checksums(state)
    bad = [path for path, saved in content["checksums"].items() if sums[path] != saved]
    if bad:
        raise ValueError(f"{len(bad)} of its arrays do not match their checksums, the first is {bad[0]}")


def _of_main(value: int) -> int:
    """The value that process 0 has."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _attempt(body: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What it returns, or what it raises: an error in one process is for all of them to decide on.

    Devices or hosts without enough memory say nothing about a checkpoint; such errors go on.
    """
    try:
        return body(), None
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        return None, error


def reason_of(error: Exception) -> str:
    """The part of an error's message that says why, in a few words: orbax wraps what tensorstore says."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    system = re.search(r"([^:]+) \[os_error_code=", text)
    if system:
        return system[1].strip()
    return text.partition(" [source locations")[0].splitlines()[0][:200] if text else type(error).__name__


def _is_no_traceback(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in pathlib.Path(record.pathname).parts)


def _move_aside(folder: pathlib.Path) -> None:
    aside = folder.parent.parent / "damaged_checkpoints"
    aside.mkdir(exist_ok=True)
    place = next(p for n in range(1, 10_000) if not (p := aside / f"{folder.name}.{n}").exists())
    folder.rename(place)


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
