"""What the drills train: a small MultiTab-Net with PCGrad on a stream of synthetic rows, saved every few steps.

    python experiments/drills/workload.py RUN RESULT.npz --mesh data=2,fsdp=4 [--resume] [--distributed]

RESULT.npz holds the bits of the final state. Dropout, a random order of gradients and the position of the stream are
all part of what a resumed run has to bring back.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np

import mtjax
from mtjax import distributed, sharding
from mtjax.data.prefetch import reader
from mtjax.data.sources import Columns
from mtjax.data.streams import make_stream
from mtjax.models import MultiTabNet
from mtjax.train import TrainConfig, command, fit

BATCH, ROWS, SAVE_EVERY = 32, 2048, 4
CONFIG = TrainConfig(
    batch_size=BATCH, max_epochs=2, evals_per_epoch=2, steps_per_dispatch=2, checkpoint_every=SAVE_EVERY, patience=99
)


def make_rows(count: int, seed: int) -> dict:
    """Two targets of three numbers and a category."""
    rng = np.random.default_rng(seed)
    numeric = rng.normal(size=(count, 3)).astype(np.float32)
    codes = rng.integers(1, 5, size=(count, 1)).astype(np.int32)
    signal = numeric @ np.array([1.0, -1.0, 0.5], np.float32) + 0.5 * codes[:, 0]
    labels = {"sold": (signal + rng.normal(size=count) > 1).astype(np.float32), "price": signal.astype(np.float32)}
    return {"categorical": codes, "numeric": numeric, "labels": labels}


def bits(state) -> dict[str, np.ndarray]:
    """Every leaf of a state as an array, keys as their data; gathered from all processes."""

    def plain(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    leaves = jax.tree_util.tree_leaves_with_path(sharding.to_host(jax.tree.map(plain, state)))
    return {sharding.path_of(path): leaf for path, leaf in leaves}


def train(args: argparse.Namespace) -> int:
    """Trains; returns the exit status."""
    train, validation = make_rows(ROWS, 0), make_rows(256, 1)
    if args.nudge:
        train["numeric"] = np.nextafter(train["numeric"], np.inf)
    tasks = (mtjax.Task("sold", "binary"), mtjax.Task("price", "regression"))
    tasks = tuple(task.fit(train["labels"][task.name]) for task in tasks)
    model = MultiTabNet(mtjax.head_sizes(tasks), (5,), 3, width=32, ff_width=64, ff_dropout=0.1, attention_dropout=0.1)
    mesh = sharding.current_mesh()
    index, count = (0, 1) if mesh is None else reader(mesh)
    stream = make_stream(Columns(train), batch_size=BATCH, seed=0, process_index=index, process_count=count)
    fitted = fit(
        model,
        tasks,
        stream,
        validation,
        config=CONFIG,
        method=mtjax.optim.pcgrad(),
        seeds=(0,),
        directory=args.run,
        resume=args.resume,
        progress=False,
    )
    if fitted.interrupted:
        return command.INTERRUPTED
    # Where the gradient is zero but for rounding, Adam's steps are not: parameters differ where nothing else does.
    found = bits(fitted.state) | {"losses": np.asarray([entry["losses"] for entry in fitted.history])}
    if distributed.is_main():
        np.savez(args.result, **found)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="run directory")
    parser.add_argument("result", type=pathlib.Path, help="file for the bits of the final state")
    parser.add_argument("--mesh", help="such as data=2,fsdp=4")
    parser.add_argument("--resume", action="store_true", help="go on with the run")
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    parser.add_argument("--nudge", action="store_true", help="inputs one unit in the last place larger")
    args = parser.parse_args()
    machine = command.Machine(mesh=args.mesh, distributed=args.distributed)
    return command.run_on_machine(machine, sys.argv[1:], lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
