"""What can be done with the models of a finished run: predictions for new rows, and a file that runs without mtjax."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from candidates import MODELS, SINGLE_TASK, Config, model_shape, slug

import mtjax
from mtjax import data as sources
from mtjax.data import frames
from mtjax.train import checkpoint, command, evaluate
from mtjax.train.config import from_json

EXPORT_ROWS = 256  # rows that an exported model computes at a time


@dataclasses.dataclass
class Predict:
    """Predict the targets of new rows with a model that was trained before; averages the models of all seeds."""

    run: pathlib.Path
    """Run directory of the training."""
    data: pathlib.Path
    """CSV or Parquet file with the input columns; other columns are ignored."""
    out: pathlib.Path = pathlib.Path("predictions.csv")
    """CSV file to write, one row per input row."""
    model: str | None = None
    """Which of the trained models; by default the one with the best validation score."""


@dataclasses.dataclass
class Export:
    """Write a model that was trained before to one file that predicts with jax and numpy alone.

    Its input are encoded columns, 'categorical' i32[B, C] and 'numeric' f32[B, N] (`encoder.json` of the run says how
    they are made); it predicts in original units, averaged over the seeds.
    """

    run: pathlib.Path
    """Run directory of the training."""
    out: pathlib.Path = pathlib.Path("model.npz")
    """File to write."""
    model: str | None = None
    """Which of the trained models; by default the one with the best validation score."""
    task: str | None = None
    """Only this task, with the parameters that it needs; by default all."""


class Trained(NamedTuple):
    """A model of a finished run, and what belongs to it."""

    name: str
    model: Any
    params: Any
    tasks: Sequence[mtjax.Task]
    encoder: sources.TabularEncoder
    context: Mapping[str, np.ndarray] | None


def read_model(run: pathlib.Path, name: str | None) -> Trained:
    """A trained model of a run: that with the best validation score, or the one that is named."""
    settings = command.read_run(run)
    scores = json.loads((run / "scores.json").read_text()) if (run / "scores.json").exists() else {}
    if not scores:
        raise ValueError(f"--run {run}: no model of this run has finished training")
    name = name or max(scores, key=scores.get)
    if name not in scores:
        raise ValueError(f"--model {name}: this run trained {', '.join(scores)}")
    config = from_json(Config, settings["config"])
    encoder = sources.TabularEncoder.from_json((run / "encoder.json").read_text())
    tasks = [mtjax.Task.from_json(fields) for fields in json.loads((run / "tasks.json").read_text())]
    directory = run / "models" / slug(name)
    context = None
    if (directory / "context.npz").exists():
        with np.load(directory / "context.npz", allow_pickle=False) as arrays:
            context = dict(arrays)
    model = MODELS[name](model_shape(tasks, encoder), config)
    return Trained(name, model, checkpoint.load_params(directory / "best.npz"), tasks, encoder, context)


def predict(args: Predict) -> int:
    """Writes the predictions of a trained model on new rows; returns the exit status."""
    name, model, params, tasks, encoder, context = read_model(args.run, args.model)
    rows = encoder.encode(frames.read_table(args.data), labels=False)
    predictions = evaluate.predict(model, params, tasks, rows, context=context, per_task=name in SINGLE_TASK)
    frame = encoder.decode_predictions(predictions)
    frame.to_csv(args.out, index=False)
    print(f"{len(frame)} rows predicted by {name} -> {args.out}")
    return 0


def export(args: Export) -> int:
    """Writes a trained model to a file that runs without mtjax; returns the exit status."""
    name, model, params, tasks, encoder, context = read_model(args.run, args.model)
    names = [task.name for task in tasks]
    if args.task is not None and args.task not in names:
        raise ValueError(f"--task {args.task}: the tasks of this run are {', '.join(names)}")
    if name in SINGLE_TASK:
        if args.task is None:
            raise ValueError(f"'{name}' is one model for each task: say which by --task ({', '.join(names)})")
        params = jax.tree.map(lambda leaf: leaf[:, names.index(args.task)], params)
    columns = {"categorical": (len(encoder.cardinalities), np.int32), "numeric": (encoder.num_numeric, np.float32)}
    path = mtjax.export(
        model,
        params,
        path=args.out,
        example={column: np.zeros((1, width), dtype) for column, (width, dtype) in columns.items()},
        task=args.task,
        prepare=None if context is None else lambda batch: {**batch, "context": context},
        predict=functools.partial(mtjax.predictions, [task for task in tasks if args.task in (None, task.name)]),
        rows=EXPORT_ROWS,
        lanes=True,
    )
    print(f"{name}, {args.task or 'all tasks'}: {path.stat().st_size:,} bytes -> {path}")
    return 0
