"""The training loop: several runs at once, several steps per dispatch, early stopping, checkpoints, exact resume.

A *lane* is one run: a seed and a learning rate. All lanes of a fit share one compiled step (vmap); each has its own
initialisation, its own order of rows and its own early stopping, as if it ran alone.

The loop itself is plain: per epoch it draws the order of rows, dispatches chunks of steps, evaluates, keeps the best
parameters, and saves. Everything it needs to go on is in `TrainState` and two integers, so a run that was killed and
resumed ends in the same bits as one that was not.

Letters: L lanes, K tasks, G selection groups, B batch.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtjax.data.batches import ShuffledRows
from mtjax.optim import linear
from mtjax.optim.base import Method
from mtjax.tasks import Task
from mtjax.train.checkpoint import Checkpoints
from mtjax.train.evaluate import Results, main_scores, make_evaluate
from mtjax.train.monitor import MetricsWriter, Progress, stop_on_signals
from mtjax.train.state import OptimizerFactory, TrainState, create_lanes, update_best
from mtjax.train.step import make_conflict_probe, make_train_chunk, make_train_step, supervised_loss

PyTree = Any


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      batch_size: rows per step.
      max_epochs: passes over the training rows at most.
      evals_per_epoch: evaluations on the validation rows per epoch.
      patience: evaluations without improvement before a run stops.
      weight_decay: of AdamW.
      clip_norm: global gradient norm to clip to; None does not clip.
      steps_per_dispatch: steps in one compiled call.
      checkpoint_every: steps between checkpoints; they are made at the ends of dispatches. None: at evaluations.
      eval_batch_size: rows per dispatch at evaluation.
      context_rows: training rows given as context to models with attention across rows.
      chunk_size: backward passes at once for per-task gradients; None: all.
      conflict_rows: rows on which gradient conflict of the first lane is measured at each evaluation; 0: not at all.
    """

    batch_size: int = 512
    max_epochs: int = 20
    evals_per_epoch: int = 1
    patience: int = 5
    weight_decay: float = 1e-5
    clip_norm: float | None = None
    steps_per_dispatch: int = 16
    checkpoint_every: int | None = None
    eval_batch_size: int = 4096
    context_rows: int = 512
    chunk_size: int | None = None
    conflict_rows: int = 0

    def __post_init__(self):
        for name in ("batch_size", "max_epochs", "evals_per_epoch", "patience", "steps_per_dispatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    def optimizer(self, learning_rate: jax.Array) -> optax.GradientTransformation:
        """AdamW with a constant rate, as in MultiTab's configurations."""
        adamw = optax.adamw(learning_rate, weight_decay=self.weight_decay)
        return adamw if self.clip_norm is None else optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite.

    Attributes:
      task, step, lane: where it was seen first.
      checkpoint: last step that was saved, or None.
    """

    def __init__(self, task: str, step: int, lane: str, value: float, checkpoint: int | None):
        saved = (
            "no checkpoint was saved before it" if checkpoint is None else f"last good checkpoint: step {checkpoint}"
        )
        super().__init__(f"The loss of task '{task}' became {value} at step {step} ({lane}); {saved}")
        self.task, self.step, self.lane, self.checkpoint = task, step, lane, checkpoint


@dataclasses.dataclass
class Fit:
    """What a fit returns.

    Attributes:
      state: final `TrainState`, leaves with a leading axis L.
      seeds, learning_rates: of the lanes.
      history: one record per evaluation: step, epoch, losses [L, K], metrics {task: {metric: [L]}}, and cosine [K, K]
        of lane 0 if measured.
      per_task: whether the best parameters are chosen for each task on its own (G = K).
      evaluate: `(split) -> {task: {metric: f64[L]}}`, the metrics of the best parameters of every lane.
      rows_per_s: training rows per second of all lanes together, after compilation; NaN if there was one dispatch.
      compile_s: seconds of the first dispatch; 0 if there was none.
      num_parameters: scalars in one lane's parameters.
      interrupted: True if a signal ended the fit early.
    """

    state: TrainState
    seeds: list[int]
    learning_rates: list[float]
    history: list[dict[str, Any]]
    per_task: bool
    evaluate: Callable[[Mapping[str, Any]], Results]
    rows_per_s: float
    compile_s: float
    num_parameters: int
    interrupted: bool

    @property
    def best_params(self) -> PyTree:
        """Best parameters: leaves [L, ...], or [L, K, ...] if chosen per task."""
        return _best_params(self.state, self.per_task)


def _best_params(state: TrainState, per_task: bool) -> PyTree:
    return state.best.params if per_task else jax.tree.map(lambda leaf: jnp.squeeze(leaf, 1), state.best.params)


@dataclasses.dataclass
class _Log:
    """What a run remembers besides its state: goes into every checkpoint.

    Attributes:
      history: records of evaluations.
      losses: f64[L, K], sum of the losses since the last evaluation.
      count: steps in that sum.
    """

    history: list[dict[str, Any]]
    losses: np.ndarray
    count: int

    def to_json(self) -> dict[str, Any]:
        return {"history": self.history, "losses": self.losses.tolist(), "count": self.count}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "_Log":
        return cls(record["history"], np.asarray(record["losses"]), record["count"])

    def add(self, losses: np.ndarray) -> None:
        """losses f32[L, n, K] of n steps."""
        self.losses, self.count = self.losses + losses.sum(1), self.count + losses.shape[1]

    def close(self, record: dict[str, Any]) -> dict[str, Any]:
        """Ends the period with an evaluation's record, which gets the mean losses."""
        record = {**record, "losses": (self.losses / self.count).tolist()}
        self.history.append(record)
        self.losses, self.count = np.zeros_like(self.losses), 0
        return record


class _Clock:
    """Training rows per second after the first dispatch, which compiles."""

    def __init__(self):
        self.compile_s, self._rows, self._seconds = 0.0, 0, 0.0

    def add(self, rows: int, seconds: float) -> None:
        if self.compile_s == 0.0:
            self.compile_s = seconds
        else:
            self._rows, self._seconds = self._rows + rows, self._seconds + seconds

    @property
    def rows_per_s(self) -> float:
        return self._rows / self._seconds if self._seconds else float("nan")


def inference_context(model: Any, train: Mapping[str, Any], num_rows: int) -> dict[str, np.ndarray] | None:
    """Evenly spread training rows for a model whose predictions attend to other rows; None for all others."""
    if not getattr(model, "needs_context", False):
        return None
    total = len(train["numeric"])
    rows = np.linspace(0, total - 1, min(num_rows, total)).astype(int)
    return {key: np.asarray(train[key])[rows] for key in ("categorical", "numeric")}


def fit(
    model: Any,
    tasks: Sequence[Task],
    train: Mapping[str, Any],
    validation: Mapping[str, Any],
    *,
    config: TrainConfig = TrainConfig(),
    method: Method | None = None,
    optimizer: OptimizerFactory | None = None,
    seeds: Sequence[int] = (0,),
    learning_rates: Sequence[float] | float = 1e-3,
    regularizer: Callable | None = None,
    per_task: bool = False,
    directory: pathlib.Path | str | None = None,
    resume: bool = False,
    record: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    title: str = "training",
) -> Fit:
    """Trains a model on rows in memory.

    Args:
      model: a Linen model (contract 7).
      tasks: fitted tasks.
      train, validation: splits: 'categorical', 'numeric', 'labels' and optionally 'mask', 'weight'.
      config: how to train.
      method: multi-objective method; by default the sum of the losses.
      optimizer: `learning_rate -> optax transformation`; by default `config.optimizer`.
      seeds: one lane each.
      learning_rates: one for all lanes, or one for each.
      regularizer: see `supervised_loss`.
      per_task: keep the best parameters of each task on its own: for single-task models, which are separate runs that
        merely share a program.
      directory: run directory for checkpoints and `metrics.jsonl`; None keeps nothing.
      resume: go on from the newest good checkpoint in `directory`.
      record: JSON-able description of the run, checked on resume.
      tensorboard: also write TensorBoard events.
      progress: show a progress bar.
      title: its label.

    Returns:
      A `Fit`.

    Raises:
      NonFiniteLossError: if a loss becomes NaN or infinite.
      ValueError: for arguments that do not fit, or a resume with another configuration.
    """
    method = linear("sum") if method is None else method
    optimizer = config.optimizer if optimizer is None else optimizer
    seeds = [int(seed) for seed in seeds]
    rates = [float(learning_rates)] * len(seeds) if isinstance(learning_rates, int | float) else list(learning_rates)
    if len(rates) != len(seeds):
        raise ValueError(f"learning_rates has {len(rates)} entries for {len(seeds)} seeds; give one, or one for each")
    directory = None if directory is None else pathlib.Path(directory)
    if resume and directory is None:
        raise ValueError("resume=True needs the run's directory")

    order = ShuffledRows(len(train["numeric"]), config.batch_size)
    steps_per_epoch = order.steps_per_epoch
    total_steps = steps_per_epoch * config.max_epochs
    eval_every = math.ceil(steps_per_epoch / config.evals_per_epoch)
    chunk_steps = min(config.steps_per_dispatch, eval_every)
    rows_per_step = order.batch_size * len(seeds)

    data = jax.tree.map(jnp.asarray, dict(train))
    loss_fn = supervised_loss(model, tasks, regularizer)
    run_chunk = make_train_chunk(make_train_step(loss_fn, method, optimizer, chunk_size=config.chunk_size))
    evaluate = make_evaluate(model, tasks, batch_size=config.eval_batch_size)
    context = inference_context(model, train, config.context_rows)
    probe = make_conflict_probe(loss_fn, chunk_size=config.chunk_size) if config.conflict_rows else None
    keep_best = jax.jit(jax.vmap(update_best, in_axes=(0, 0, None)), static_argnums=2, donate_argnums=0)

    def init_params(key):
        example = jax.tree.map(lambda column: column[: min(8, order.batch_size)], data)
        return model.init({"params": key, "dropout": key}, example, train=True)["params"]

    groups = len(tasks) if per_task else 1
    state = create_lanes(init_params, method, optimizer, seeds, rates, num_tasks=len(tasks), num_groups=groups)
    log = _Log([], np.zeros((len(seeds), len(tasks))), 0)
    described = {"seeds": seeds, "learning_rates": rates, "train": dataclasses.asdict(config)} | dict(record or {})
    checkpoints = None if directory is None else Checkpoints(directory / "checkpoints")
    if checkpoints is not None and resume:
        restored = checkpoints.restore(state)
        if restored is not None:
            check_same_run(described, restored.record["run"])
            state, log = restored.state, _Log.from_json(restored.record["log"])
    elif checkpoints is not None and checkpoints.latest_step() is not None:
        raise ValueError(f"{directory} already holds a run; resume it, or choose another directory")

    def save():
        position = {"epoch": step // steps_per_epoch, "offset": step % steps_per_epoch}
        checkpoints.save(step, state, {"run": described, "log": log.to_json(), "data": position})

    def validate():
        """Evaluates, keeps the best parameters, and records; returns the new state and a line for the bar."""
        results = evaluate(state.params, validation, context)
        scores = main_scores(tasks, results)
        if not per_task:
            scores = np.nanmean(scores, axis=1, keepdims=True)
        better = keep_best(state, jnp.asarray(scores, jnp.float32), config.patience)
        entry = {"step": step, "epoch": step / steps_per_epoch, "metrics": jax.tree.map(np.ndarray.tolist, results)}
        if probe is not None:
            rows = jax.tree.map(lambda column: column[: config.conflict_rows], data)
            entry["cosine"] = np.asarray(probe(better.params, rows, jax.random.key(0))).tolist()
        writer.write(log.close(entry))
        return better, "  ".join(
            f"{t.name} {t.main_metric.name} {np.nanmean(results[t.name][t.main_metric.name]):.3f}" for t in tasks
        )

    step = int(state.step[0])
    saved_step = step or None
    clock = _Clock()
    indices_epoch, indices = None, None
    with contextlib.ExitStack() as stack:
        if checkpoints is not None:
            stack.callback(checkpoints.close)  # waits for saves under way, whatever happens
        writer = MetricsWriter(directory, tensorboard=tensorboard, keep_until=step)
        stack.callback(writer.close)
        stop = stack.enter_context(stop_on_signals())
        bar = stack.enter_context(Progress(title, total_steps, step, enabled=progress))
        while step < total_steps and not _all_closed(state, config.patience) and not stop:
            epoch, offset = divmod(step, steps_per_epoch)
            if epoch != indices_epoch:
                indices_epoch, indices = epoch, order.epoch_indices(seeds, epoch)
            until = min((offset // eval_every + 1) * eval_every, steps_per_epoch)
            count = min(chunk_steps, until - offset)
            # Padded to one length, so that there is one program; the padding steps are skipped inside.
            chunk = np.pad(indices[:, offset : offset + count], ((0, 0), (0, chunk_steps - count), (0, 0)))
            began = time.perf_counter()
            state, step_metrics = run_chunk(
                state, data, jnp.asarray(chunk), jnp.asarray(np.arange(chunk_steps) < count)
            )
            losses = np.asarray(step_metrics.losses)[:, :count]
            clock.add(count * rows_per_step, time.perf_counter() - began)
            _check_finite(losses, tasks, step, seeds, rates, saved_step)
            step += count
            log.add(losses)
            note = None
            if offset + count == until:
                state, note = validate()
            bar.update(step, rows_per_step, note)
            due = step - (saved_step or 0) >= (config.checkpoint_every or eval_every)
            if checkpoints is not None and (due or stop):
                save()
                saved_step = step
        if checkpoints is not None:
            save()

    # Chosen per task, there is one set of parameters per task: another program.
    of_best = make_evaluate(model, tasks, batch_size=config.eval_batch_size, per_task=True) if per_task else evaluate
    return Fit(
        state=state,
        seeds=seeds,
        learning_rates=rates,
        history=log.history,
        per_task=per_task,
        evaluate=lambda split: of_best(_best_params(state, per_task), split, context),
        rows_per_s=clock.rows_per_s,
        compile_s=clock.compile_s,
        num_parameters=sum(leaf.size // len(seeds) for leaf in jax.tree.leaves(state.params)),
        interrupted=bool(stop),
    )


def check_same_run(asked: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises a ValueError that lists the differences between two descriptions of a run."""
    asked, saved = _flat(asked), _flat(saved)
    differing = [key for key in sorted(asked.keys() | saved.keys()) if asked.get(key) != saved.get(key)]
    if differing:
        lines = [f"  {key}: saved {saved.get(key)!r}, now {asked.get(key)!r}" for key in differing]
        raise ValueError("This run was started with another configuration and cannot be resumed:\n" + "\n".join(lines))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Path -> leaf of nested dicts; tuples and lists compare as lists, as JSON has them."""
    if isinstance(tree, Mapping):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): list(tree) if isinstance(tree, tuple) else tree}


def _all_closed(state: TrainState, patience: int) -> bool:
    return bool(np.all(np.asarray(state.best.stale) >= patience))


def _check_finite(losses, tasks, step, seeds, rates, saved_step) -> None:
    """losses f32[L, n, K] of the steps after `step`."""
    if np.isfinite(losses).all():
        return
    bad_step = int(np.argmax(~np.isfinite(losses).all(axis=(0, 2))))
    lane, task = np.argwhere(~np.isfinite(losses[:, bad_step]))[0]
    where = f"seed {seeds[lane]}, learning rate {rates[lane]:g}"
    raise NonFiniteLossError(tasks[task].name, step + bad_step, where, float(losses[lane, bad_step, task]), saved_step)
