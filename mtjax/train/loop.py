"""The training loop: several runs at once, several steps per dispatch, early stopping, checkpoints, exact resume.

A *lane* is one run: a seed and a learning rate. All lanes of a fit share one compiled step (vmap); each has its own
initialisation, its own order of rows and its own early stopping, as if it ran alone.

The loop itself is plain: per epoch it draws the order of rows, dispatches chunks of steps, evaluates, keeps the best
parameters, and saves. Everything it needs to go on is in `TrainState` and a small JSON record, so a run that was killed
and resumed ends in the same bits as one that was not.

Letters: L lanes, K tasks, G selection groups, B batch.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtjax import distributed, dryrun, sharding
from mtjax.optim import linear
from mtjax.optim.base import Method
from mtjax.tasks import Task
from mtjax.train.accumulate import accumulate, labelled
from mtjax.train.checkpoint import Checkpoints
from mtjax.train.evaluate import Results, main_scores, num_rows, selection_scores, undefined_scores
from mtjax.train.feed import Chunk, InputClock, make_feed
from mtjax.train.monitor import MetricsWriter, Progress, stop_on_signals
from mtjax.train.precision import compute_in
from mtjax.train.problem import Problem, table_problem
from mtjax.train.profiling import profile_window
from mtjax.train.runlog import RunLog, check_same_run
from mtjax.train.state import OptimizerFactory, TrainState, create_lanes, update_best_lanes
from mtjax.train.step import make_conflict_probe, make_train_chunk, make_train_step

PyTree = Any


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      batch_size: rows per step.
      max_epochs: passes over the training rows at most.
      evals_per_epoch: evaluations on the validation rows per epoch; below 1 (0.1: every tenth epoch) for small data.
      patience: evaluations without improvement before a run stops.
      weight_decay: of AdamW.
      clip_norm: norm of the update direction to clip to, over all parameters of a lane (single-task models that share a
        program are clipped together); None does not clip.
      steps_per_dispatch: steps in one compiled call.
      checkpoint_every: steps between checkpoints; they are made at the ends of dispatches. None: at evaluations.
      eval_batch_size: rows per dispatch at evaluation.
      context_rows: training rows given as context to models with attention across rows.
      chunk_size: backward passes at once for per-task gradients; None: all.
      conflict_rows: rows on which gradient conflict of the first lane is measured at each evaluation; 0: not at all.
      accumulate: micro-batches per step, one after the other: exact for every method, with the activations of one
        micro-batch in memory (`mtjax.train.accumulate`).
      max_to_keep: checkpoints to keep; at least 2, so that a damaged newest one leaves another.
      keep_best: also keep the checkpoint with the best mean validation score, whatever its age. (The state holds the
        best parameters anyway; this keeps all that belongs to them.)
      compute_dtype: 'float32', or 'bfloat16' for products; parameters, optimiser, per-task gradients and Gramians stay
        float32 (`mtjax.train.precision`).
    """

    batch_size: int = 512
    max_epochs: int = 20
    evals_per_epoch: float = 1
    patience: int = 5
    weight_decay: float = 1e-5
    clip_norm: float | None = None
    steps_per_dispatch: int = 16
    checkpoint_every: int | None = None
    eval_batch_size: int = 4096
    context_rows: int = 512
    chunk_size: int | None = None
    conflict_rows: int = 0
    accumulate: int = 1
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    max_to_keep: int = 2
    keep_best: bool = False

    def __post_init__(self):
        counts = ("batch_size", "max_epochs", "patience", "steps_per_dispatch")
        for name in (*counts, "eval_batch_size", "context_rows", "checkpoint_every", "chunk_size", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not self.evals_per_epoch > 0:
            raise ValueError(f"evals_per_epoch must be > 0, got {self.evals_per_epoch}")
        for name in ("weight_decay", "conflict_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be > 0, or None for no clipping, got {self.clip_norm}")
        if self.max_to_keep < 2:
            raise ValueError(f"max_to_keep must be >= 2, got {self.max_to_keep}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype must be 'float32' or 'bfloat16', got {self.compute_dtype!r}")

    def next_evaluation(self, step: int, steps_per_epoch: int) -> int:
        """The step of the next evaluation after `step`: several within an epoch, or one after several epochs."""
        if self.evals_per_epoch < 1:
            period = round(1 / self.evals_per_epoch) * steps_per_epoch
            return min((step // period + 1) * period, steps_per_epoch * self.max_epochs)
        epoch, offset = divmod(step, steps_per_epoch)
        every = math.ceil(steps_per_epoch / self.evals_per_epoch)
        return epoch * steps_per_epoch + min((offset // every + 1) * every, steps_per_epoch)

    def loss(self, problem: Problem) -> Callable:
        """The problem's losses in the chosen precision, over micro-batches if asked for."""
        loss_fn = compute_in(problem.loss_fn, self.compute_dtype)
        if self.accumulate == 1:
            return loss_fn
        # What the losses of a problem without labels are means over: all rows.
        has_labels = not isinstance(problem.train, Mapping) or {"labels", "task"} & problem.train.keys()
        return accumulate(loss_fn, self.accumulate, counts=labelled(problem.tasks) if has_labels else lambda batch: {})

    def optimizer(self, learning_rate: jax.Array) -> optax.GradientTransformation:
        """AdamW with a constant rate, as in MultiTab's configurations."""
        adamw = optax.adamw(learning_rate, weight_decay=self.weight_decay)
        return adamw if self.clip_norm is None else optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite, or the parameters did.

    Attributes:
      task: whose loss it was; None if the parameters were seen first, after a finite loss.
      step: number of updates before it.
      lane: seed and learning rate, as text.
      checkpoint: last step that was saved, or None. Nothing is saved after the loss or the parameters went bad.
    """

    def __init__(self, task: str | None, step: int, lane: str, value: str, checkpoint: int | None):
        what = "The parameters" if task is None else f"The loss of task '{task}'"
        saved = (
            "no checkpoint was saved before it" if checkpoint is None else f"last good checkpoint: step {checkpoint}"
        )
        super().__init__(f"{what} became {value} at step {step} ({lane}); {saved}")
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
      input_rows_per_s: rows per second that the input can give to a lane.
      input_wait: share of the time in which the device waited for input, at most.
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
    input_rows_per_s: float = math.nan
    input_wait: float = 0.0

    @property
    def best_params(self) -> PyTree:
        """Best parameters: leaves [L, ...], or [L, K, ...] if chosen per task."""
        return _best_params(self.state, self.per_task)


@functools.partial(jax.jit, static_argnums=1)
def _best_params(state: TrainState, per_task: bool) -> PyTree:
    return state.best.params if per_task else jax.tree.map(lambda leaf: jnp.squeeze(leaf, 1), state.best.params)


def fit(
    model: Any,
    tasks: Sequence[Task],
    train: Mapping[str, Any],
    validation: Mapping[str, Any],
    *,
    config: TrainConfig = TrainConfig(),
    regularizer: Callable | None = None,
    **options: Any,
) -> Fit:
    """Trains a model on rows of a table in memory.

    Args:
      model: a Linen model (contract 7).
      tasks: fitted tasks.
      train, validation: splits: 'categorical', 'numeric', 'labels' and optionally 'mask', 'weight'; `train` may be a
        stream of such rows (`mtjax.data.streams`).
      config: how to train.
      regularizer: see `supervised_loss`.
      **options: everything else that `fit_problem` takes.

    Returns:
      A `Fit`.

    Raises:
      ValueError, NonFiniteLossError: as `fit_problem`.
    """
    problem = table_problem(
        model,
        tasks,
        train,
        validation,
        regularizer=regularizer,
        eval_batch_size=config.eval_batch_size,
        context_rows=config.context_rows,
    )
    return fit_problem(problem, config=config, **options)


def fit_problem(
    problem: Problem,
    *,
    config: TrainConfig = TrainConfig(),
    method: Method | None = None,
    optimizer: OptimizerFactory | None = None,
    seeds: Sequence[int] = (0,),
    learning_rates: Sequence[float] | float = 1e-3,
    per_task: bool = False,
    start: PyTree | None = None,
    lane_rows: np.ndarray | None = None,
    directory: pathlib.Path | str | None = None,
    resume: bool = False,
    record: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    title: str = "training",
) -> Fit:
    """Trains what a `Problem` describes, on the ambient mesh (`jax.set_mesh(mtjax.sharding.make_mesh(...))`) if any.

    In several processes all of them call this with the same arguments; process 0 alone writes metrics and progress.

    Args:
      problem: data, losses, initialisation and evaluation.
      config: how to train.
      method: multi-objective method; by default the sum of the losses.
      optimizer: `learning_rate -> optax transformation`; by default `config.optimizer`.
      seeds: one lane each.
      learning_rates: one for all lanes, or one for each.
      per_task: keep the best parameters of each task on its own: for single-task models, which are separate runs that
        merely share a program.
      start: parameters to start from instead of `problem.init_params`, leaves [L, ...]: fine-tuning.
      lane_rows: i[L, n], the rows that each lane trains on (lanes are then separate runs on data of their own); None:
        all rows.
      directory: run directory for checkpoints and `metrics.jsonl`; None keeps nothing.
      resume: go on from the newest good checkpoint in `directory`; without any, start from the beginning.
      record: JSON-able description of the run, checked on resume.
      tensorboard: also write TensorBoard events.
      progress: show a progress bar.
      title: its label.

    Returns:
      A `Fit`.

    Raises:
      DryRunDone: in a process that only describes the run (`mtjax.dryrun`), after printing what a step takes.
      NonFiniteLossError: if a loss or the parameters become NaN or infinite; no checkpoint holds such a state. (Losses
        may under a method wrapped in `mtjax.optim.nonfinite` with another policy than 'propagate'.)
      ValueError: for arguments that do not fit, a directory that already holds a run (without `resume`), or a resume
        of a run with another configuration or model.
    """
    method = linear("sum") if method is None else method
    optimizer = config.optimizer if optimizer is None else optimizer
    seeds = [int(seed) for seed in seeds]
    rates = [float(learning_rates)] * len(seeds) if isinstance(learning_rates, int | float) else list(learning_rates)
    if len(rates) != len(seeds):
        raise ValueError(f"learning_rates has {len(rates)} entries for {len(seeds)} seeds; give one, or one for each")
    lanes = [f"seed {seed}, learning rate {rate:g}" for seed, rate in zip(seeds, rates, strict=True)]
    directory = None if directory is None else pathlib.Path(directory)
    if resume and directory is None:
        raise ValueError("resume=True needs the run's directory")

    if dryrun.in_child():
        result = dryrun.dry_run(
            problem, method=method, optimizer=optimizer, config=config, seeds=len(seeds), per_task=per_task, title=title
        )
        print(dryrun.report(result), flush=True)
        raise dryrun.DryRunDone(result)
    tasks, mesh = problem.tasks, sharding.current_mesh()
    feed = make_feed(problem.train, config.batch_size, seeds, lane_rows, mesh)
    steps_per_epoch = feed.steps_per_epoch
    total_steps = steps_per_epoch * config.max_epochs
    eval_every = config.next_evaluation(0, steps_per_epoch)
    chunk_steps = min(config.steps_per_dispatch, eval_every)
    rows_per_step = feed.batch_size * len(seeds)

    how = {"chunk_size": config.chunk_size, "carries": problem.init_carry is not None}
    loss_fn = config.loss(problem)
    train_step = make_train_step(loss_fn, method, optimizer, **how)
    evaluate = problem.evaluator(False)
    probe = make_conflict_probe(problem.loss_fn, **how) if config.conflict_rows else None

    names, groups = problem.loss_names, len(tasks) if per_task else 1
    state = create_lanes(
        problem.init_params,
        method,
        optimizer,
        seeds,
        rates,
        num_tasks=len(names),
        num_groups=groups,
        start=start,
        init_carry=problem.init_carry,
    )
    where = None if mesh is None else sharding.shardings(state, mesh)
    run_chunk = make_train_chunk(train_step, take=feed.take, shared=feed.shared, out_shardings=where)
    log = RunLog.empty(len(seeds), len(names))
    described = {
        "seeds": seeds,
        "learning_rates": rates,
        "tasks": [task.to_json() for task in tasks],
        "rows": [feed.total_rows, num_rows(problem.validation)],
        "train": dataclasses.asdict(config),
        **({} if problem.losses is None else {"losses": list(names)}),
        **feed.describe(),
        **dict(record or {}),
    }
    checkpoints = None
    if directory is not None:
        how_many = {"max_to_keep": config.max_to_keep, "keep_best": config.keep_best}
        checkpoints = Checkpoints(directory / "checkpoints", **how_many)
    if checkpoints is not None and resume:
        restored = checkpoints.restore(state, check=lambda saved: check_same_run(described, saved["run"]))
        if restored is not None:
            state, log = restored.state, RunLog.from_json(restored.record["log"])
            feed.seek(restored.step, restored.record["data"])
    elif checkpoints is not None and checkpoints.latest_step() is not None:
        raise ValueError(f"{directory} already holds a run; resume it, or choose another directory")

    def save():
        score = scored.get(step)  # of the evaluation at this step, if there was one
        checkpoints.save(step, state, {"run": described, "log": log.to_json(), "data": position}, score=score)

    def next_chunk(step: int) -> tuple[Chunk, int, int]:
        """Input of the dispatch from `step` on, its number of steps, and the step of the next evaluation."""
        until = config.next_evaluation(step, steps_per_epoch)
        count = min(chunk_steps, until - step)
        # Padded to one length, so that there is one program; the padding steps are skipped inside.
        return clock.prepare(feed, step, count, chunk_steps), count, until

    def validate():
        """Evaluates, keeps the best parameters, and records; returns the new state and a line for the bar."""
        results = evaluate(state.params, problem.validation)
        # Labels do not change: what is undefined at the first evaluation always is.
        undefined = undefined_scores(tasks, log.history[0]["metrics"] if log.history else results)
        if not log.history:
            _warn_undefined(tasks, undefined, per_task)
        scores = selection_scores(main_scores(tasks, results), undefined, per_task=per_task, step=step)
        scored[step] = float(scores.mean())
        better = update_best_lanes(state, np.asarray(scores, np.float32), config.patience)
        measured = {task: {name: v.tolist() for name, v in metrics.items()} for task, metrics in results.items()}
        entry = {"step": step, "epoch": step / steps_per_epoch, "metrics": measured}
        if probe is not None:
            rows = feed.sample(config.conflict_rows)
            entry["cosine"] = sharding.to_host(probe(better, rows, jax.random.key(0))).tolist()
        writer.write(log.close(entry))
        return better, "  ".join(f"{t.name} {np.mean(results[t.name][t.main_metric.name]):.3f}" for t in tasks)

    step = int(sharding.to_host(state.step)[0])
    position, clock, scored = {}, InputClock(), {}
    saved_step = step or None
    with contextlib.ExitStack() as stack:
        if checkpoints is not None:
            stack.callback(checkpoints.close)  # waits for saves under way, whatever happens
        stack.callback(feed.close)
        main = distributed.is_main()
        writer = MetricsWriter(directory if main else None, tensorboard=tensorboard, history=log.history)
        stack.callback(writer.close)
        asked = stack.enter_context(stop_on_signals())
        stop = False
        window = stack.enter_context(profile_window())
        bar = stack.enter_context(Progress(title, total_steps, step, enabled=progress and main))
        ahead, run_step = None, run_chunk
        while step < total_steps and _open(state, config.patience).any() and not stop:
            chunk, count, until = next_chunk(step) if ahead is None else ahead
            window.step(step)
            began = time.perf_counter()
            active = np.arange(chunk_steps) < count
            if distributed.process_count() > 1 and run_step is run_chunk:
                # Collectives wait less long for each other than one process may compile longer than another.
                run_step = run_chunk.lower(state, feed.data, chunk.steps, active).compile()
                distributed.barrier("compiled", timeout_s=3600)
            state, step_metrics, finite = run_step(state, feed.data, chunk.steps, active)
            if step + count < total_steps:  # while the device computes
                ahead = next_chunk(step + count)
                clock.note(device_was_done=step_metrics.losses.is_ready())
            losses = sharding.to_host(step_metrics.losses)[:, :count]
            seconds = time.perf_counter() - began
            log.add(losses, rows=count * rows_per_step, seconds=seconds)
            clock.add(seconds)
            if main and (slow_input := clock.warning()):
                warnings.warn(slow_input, stacklevel=2)
            open_ = _open(state, config.patience)
            # A method that leaves out bad tasks or steps answers for its losses; parameters must be finite either way.
            checked = losses if getattr(method, "nonfinite", "propagate") == "propagate" else np.zeros_like(losses)
            _check_finite(checked, sharding.to_host(finite), open_, names, step, lanes, saved_step)
            step, position = step + count, chunk.position
            note = None
            if step == until:
                state, note = validate()
            bar.update(step, log.rows_per_s, note)
            stop = distributed.agree(bool(asked))
            due = step - (saved_step or 0) >= (config.checkpoint_every or eval_every)
            if checkpoints is not None and (due or stop):
                save()
                saved_step = step
        if checkpoints is not None:
            save()
        if main and progress and feed.shared:
            print(
                f"{title}: input at {clock.rows_per_s:,.0f} rows/s; the device waited for it at most "
                f"{clock.waiting:.0%} of the time"
            )

    # Chosen per task, there is one set of parameters per task: another program.
    of_best = problem.evaluator(True) if per_task else evaluate
    return Fit(
        state=state,
        seeds=seeds,
        learning_rates=rates,
        history=log.history,
        per_task=per_task,
        evaluate=lambda split: of_best(_best_params(state, per_task), split),
        rows_per_s=log.rows_per_s,
        compile_s=log.compile_s,
        num_parameters=sum(leaf.size // len(seeds) for leaf in jax.tree.leaves(state.params)),
        interrupted=stop,
        input_rows_per_s=clock.rows_per_s,
        input_wait=clock.waiting,
    )


def _warn_undefined(tasks: Sequence[Task], undefined: np.ndarray, per_task: bool) -> None:
    """Says which tasks have no validation score, undefined bool[K], and what that means."""
    names = ", ".join(f"'{task.name}'" for task, absent in zip(tasks, undefined, strict=True) if absent)
    if names:
        latest = per_task or undefined.all()
        effect = "its best parameters are its latest" if latest else "the other tasks alone choose the best parameters"
        warnings.warn(
            f"Task {names}: the main metric has no value on the validation rows (no labels, or all alike), so {effect}",
            stacklevel=3,
        )


def _open(state: TrainState, patience: int) -> np.ndarray:
    """bool[L, G]: which groups are still being selected for."""
    return sharding.to_host(state.best.stale) < patience


def _check_finite(losses, finite_params, open_, names, step, lanes, saved_step) -> None:
    """Raises for losses f32[L, n, K], called `names`, of the steps after `step`, or parameters after them (bool[L]).

    Lanes that have stopped early go on beside the others, but nothing depends on them any more.
    """
    bad = ~np.isfinite(losses) & open_[:, None, :]
    if bad.any():
        position = int(np.argmax(bad.any(axis=(0, 2))))
        lane, task = np.argwhere(bad[:, position])[0]
        value = f"{losses[lane, position, task]}"
        raise NonFiniteLossError(names[task], step + position, lanes[lane], value, saved_step)
    bad = ~finite_params & open_.all(axis=1)
    if bad.any():
        raise NonFiniteLossError(None, step + losses.shape[1], lanes[np.argmax(bad)], "NaN or infinite", saved_step)
