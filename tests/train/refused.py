"""Saves where the file system refuses. A program, as limits and users belong to a whole process.

python refused.py: prints, as JSON, the sentences and what was left, and removes what it wrote.

full: no file may grow past 1 MB (RLIMIT_FSIZE), so that writing fails in the middle of a file, with another error
number than on a full disk. read-only: a folder without the right to write there, as a user who is not root.
"""

import json
import os
import pathlib
import resource
import shutil
import tempfile

import jax.numpy as jnp
import numpy as np

from mtjax.train.checkpoint import CheckpointError, Checkpoints

STATE = {"w": jnp.asarray(np.random.default_rng(0).integers(0, 2**32, 1 << 20, np.uint32))}  # 4 MB, not compressible


def sentence(body) -> str | None:
    """The message of the CheckpointError that it raises, None if it raises none."""
    try:
        body()
    except CheckpointError as error:
        assert isinstance(error, OSError)
        return str(error)
    return None


def intact(directory: pathlib.Path) -> int | None:
    """The newest checkpoint, if its bits are right; None if there is another one or damage."""
    restored = Checkpoints(directory).restore(STATE)
    aside = (directory.parent / "damaged_checkpoints").exists()
    return None if aside or not (restored.state["w"] == STATE["w"]).all() else restored.step


def full(directory: pathlib.Path) -> dict:
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = {}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, most))
    checkpoints = Checkpoints(directory)
    said["save"] = sentence(lambda: checkpoints.save(2, STATE, {}))  # in the background: nothing to say yet
    said["next save"] = sentence(lambda: checkpoints.save(3, STATE, {}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    said["try again"] = sentence(lambda: checkpoints.save(3, STATE, {}))
    said["close after it"] = sentence(checkpoints.close)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, most))
    checkpoints = Checkpoints(directory)
    checkpoints.save(4, STATE, {})
    said["close"] = sentence(checkpoints.close)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    said["intact"] = intact(directory)
    # With space again the run goes on.
    checkpoints = Checkpoints(directory)
    checkpoints.save(4, STATE, {})
    checkpoints.close()
    return said | {"then": intact(directory), "left": sorted(path.name for path in directory.iterdir())}


def read_only(directory: pathlib.Path) -> dict:
    user = os.geteuid()
    directory.chmod(0o555)
    try:
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        checkpoints = Checkpoints(directory)
        said = {"save": sentence(lambda: checkpoints.save(5, STATE, {})), "close": sentence(checkpoints.close)}
    finally:
        os.seteuid(user)
        directory.chmod(0o755)
    return said | {"intact": intact(directory)}


def main() -> None:
    base = pathlib.Path(tempfile.mkdtemp())
    try:
        base.chmod(0o755)
        directory = base / "run" / "checkpoints"
        checkpoints = Checkpoints(directory)
        checkpoints.save(1, STATE, {})
        checkpoints.close()
        print(json.dumps({"full": full(directory), "read-only": read_only(directory), "directory": str(directory)}))
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
