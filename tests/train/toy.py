"""A tiny training problem, shared by the tests of this folder; also a program for tests that kill it.

python toy.py RUN_DIRECTORY RESULT.npz [--resume] [--mesh SPEC] [--distributed]
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import mtjax
from mtjax import distributed, sharding
from mtjax.train import Fit, TrainConfig, command, fit

NUM_CODES, NUM_NUMERIC = 4, 3


def make_split(num_rows: int, seed: int) -> dict[str, Any]:
    """Rows with a binary target, a regression target (30 % missing), three classes, and a count."""
    rng = np.random.default_rng(seed)
    numeric = rng.normal(size=(num_rows, NUM_NUMERIC)).astype(np.float32)
    codes = rng.integers(1, NUM_CODES, size=(num_rows, 1)).astype(np.int32)
    signal = numeric @ np.array([1.0, -1.0, 0.5], np.float32) + 0.5 * codes[:, 0]
    labels = {
        "sold": (signal + rng.normal(size=num_rows) > 1).astype(np.float32),
        "price": np.where(rng.random(num_rows) < 0.3, np.nan, 100 + 20 * signal).astype(np.float32),
        "style": np.clip(np.floor(signal), 0, 2).astype(np.float32),
        "visits": rng.poisson(np.exp(0.3 * signal)).astype(np.float32),
    }
    return {"categorical": codes, "numeric": numeric, "labels": labels}


def make_tasks(train: Mapping[str, Any], names: tuple[str, ...] = ("sold", "price")) -> tuple[mtjax.Task, ...]:
    """Tasks on these rows."""
    all_tasks = (
        mtjax.Task("sold", "binary"),
        mtjax.Task("price", "regression"),
        mtjax.Task("style", "multiclass", num_classes=3),
        mtjax.Task("visits", "count"),
    )
    return tuple(task.fit(train["labels"][task.name]) for task in all_tasks if task.name in names)


class Tiny(nn.Module):
    """The smallest multitask model: a shared layer with dropout and a linear head per task."""

    heads: Mapping[str, int]
    width: int = 8
    dropout: float = 0.0

    @nn.compact
    def __call__(self, batch, *, task=None, train=False, aux=False):
        x = jnp.concatenate([jax.nn.one_hot(batch["categorical"][:, 0], NUM_CODES), batch["numeric"]], axis=1)
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.tanh(nn.Dense(self.width, name="shared")(x)))
        outputs = {}
        for name, size in self.heads.items():
            y = nn.Dense(size, name=f"head_{name}")(h)
            outputs[name] = y[:, 0] if size == 1 else y
        return outputs if task is None else {task: outputs[task]}


class Separate(nn.Module):
    """One network per task, sharing nothing; leaves are stacked over tasks."""

    heads: Mapping[str, int]

    @nn.compact
    def __call__(self, batch, *, task=None, train=False, aux=False):
        x = batch["numeric"]
        hidden = self.param("hidden", nn.initializers.lecun_normal(), (len(self.heads), x.shape[1], 8))
        head = self.param("head", nn.initializers.lecun_normal(), (len(self.heads), 8, 1))
        y = jnp.einsum("kbh,kho->kb", jnp.tanh(jnp.einsum("bd,kdh->kbh", x, hidden)), head)
        outputs = {name: y[k] for k, name in enumerate(self.heads)}
        return outputs if task is None else {task: outputs[task]}


class Contextual(nn.Module):
    """Reads other rows: those of the batch in training, batch['context'] otherwise."""

    heads: Mapping[str, int]
    needs_context = True

    @nn.compact
    def __call__(self, batch, *, task=None, train=False, aux=False):
        others = batch["numeric"] if train else batch["context"]["numeric"]
        x = batch["numeric"] - others.mean(axis=0, keepdims=True)
        return {name: nn.Dense(1, name=name)(x)[:, 0] for name in self.heads if task in (None, name)}


def plain(leaf: Any) -> Any:
    """A PRNG key as its data; everything else as it is."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def arrays(tree: Any) -> dict[str, np.ndarray]:
    """Path -> array of every leaf, PRNG keys as their data."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(plain(leaf)) for path, leaf in leaves}


# A run with everything that a resumed one must bring back: dropout, a method with a key of its own, two lanes, early
# stopping, epochs that are not a multiple of anything, a checkpoint every three steps or so.
CONFIG = TrainConfig(
    batch_size=16, max_epochs=8, evals_per_epoch=2, patience=3, steps_per_dispatch=2, checkpoint_every=3
)


def train_toy(
    directory: pathlib.Path | None,
    *,
    resume: bool = False,
    config: TrainConfig = CONFIG,
    width: int = 8,
    **options: Any,
) -> Fit:
    """Trains `Tiny`."""
    train, validation = make_split(120, 0), make_split(50, 1)
    tasks = make_tasks(train)
    arguments = dict(method=mtjax.optim.pcgrad(), seeds=(0, 1), learning_rates=(3e-2, 1e-2), progress=False)
    model = Tiny(mtjax.head_sizes(tasks), width, dropout=0.2)
    options = arguments | options
    return fit(model, tasks, train, validation, config=config, directory=directory, resume=resume, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("result")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--mesh")
    parser.add_argument("--distributed", action="store_true")
    arguments = parser.parse_args()
    on_mesh = {"width": 256} if arguments.mesh else {}  # large enough to be split

    def body() -> int:
        fitted = train_toy(arguments.run, resume=arguments.resume, **on_mesh)
        if fitted.interrupted:
            return command.INTERRUPTED
        found = arrays(sharding.to_host(jax.tree.map(plain, fitted.state)))
        if distributed.is_main():
            np.savez(arguments.result, history=json.dumps(fitted.history), **found)
        return 0

    machine = command.Machine(mesh=arguments.mesh, distributed=arguments.distributed)
    sys.exit(command.run_on_machine(machine, sys.argv[1:], body))
