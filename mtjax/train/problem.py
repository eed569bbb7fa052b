"""What a fit trains and how it is judged, apart from how it is trained: one description for tables, fields and others.

Letters: L lanes, K tasks, N rows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.data.streams import Stream
from mtjax.tasks import Task
from mtjax.train.evaluate import Results, make_evaluate
from mtjax.train.feed import first_rows
from mtjax.train.step import supervised_loss

PyTree = Any
Evaluator = Callable[[PyTree, Mapping[str, Any]], Results]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data and pure functions; `fit_problem` trains it.

    Attributes:
      tasks: names and metrics of what is evaluated; without `losses`, in the order of the losses.
      train: columns of N rows (a pytree whose leaves have a leading axis N) from which batches are taken, or a stream
        of batches (`mtjax.data.streams.make_stream`).
      validation: rows by which the best parameters are chosen.
      loss_fn: `(params, batch, rng) -> losses` (contract 1).
      init_params: `key -> params` of one lane.
      evaluator: `per_task -> ((params, split) -> {task: {metric: f64[L]}})`; leaves of params have a leading axis L,
        and a second one of K if `per_task`: task k is then evaluated with the k-th set.
      losses: names of the losses in their order, where they are not one to one with the tasks (the residual and the
        initial condition of an equation, evaluated on several of its forms): they are what a method weighs. None:
        those of the tasks.
      init_carry: what the losses carry from step to step, such as running estimates, at the start of a lane. `loss_fn`
        then finds it in `batch['carry']` and returns `(losses, carry)`; it is part of the state, so a resumed run has
        it. None: nothing.

    Raises:
      ValueError: if `losses` is empty or names a loss twice.
    """

    tasks: Sequence[Task]
    train: Mapping[str, Any] | Stream
    validation: Mapping[str, Any]
    loss_fn: Callable
    init_params: Callable[[jax.Array], PyTree]
    evaluator: Callable[[bool], Evaluator]
    losses: Sequence[str] | None = None
    init_carry: Callable[[], PyTree] | None = None

    def __post_init__(self):
        if self.losses is not None and not 0 < len(self.losses) == len(set(self.losses)):
            raise ValueError(f"losses must be at least one and have different names, got {tuple(self.losses)}")

    @property
    def loss_names(self) -> tuple[str, ...]:
        """What the losses are called: by their own names, or by the tasks'."""
        return tuple(task.name for task in self.tasks) if self.losses is None else tuple(self.losses)


def inference_context(model: Any, train: Mapping[str, Any] | Stream, num_context: int) -> dict[str, np.ndarray] | None:
    """Evenly spread training rows for a model whose predictions attend to other rows; None for all others."""
    if not getattr(model, "needs_context", False):
        return None
    if not isinstance(train, Mapping):
        raise ValueError("The model reads training rows at inference: it needs columns in memory, not a stream")
    total = len(train["numeric"])
    rows = np.linspace(0, total - 1, min(num_context, total)).astype(int)
    return {key: np.asarray(train[key])[rows] for key in ("categorical", "numeric")}


def table_problem(
    model: Any,
    tasks: Sequence[Task],
    train: Mapping[str, Any] | Stream,
    validation: Mapping[str, Any],
    *,
    regularizer: Callable | None = None,
    eval_batch_size: int = 4096,
    context_rows: int = 512,
) -> Problem:
    """Rows of a table.

    Args:
      model: a Linen model (contract 7).
      tasks: fitted tasks.
      train, validation: splits: 'categorical', 'numeric', 'labels' and optionally 'mask', 'weight'; `train` may be a
        stream.
      regularizer: see `supervised_loss`.
      eval_batch_size: rows per dispatch at evaluation.
      context_rows: training rows given as context to models with attention across rows.
    """
    context = inference_context(model, train, context_rows)

    def init_params(key):
        example = jax.tree.map(jnp.asarray, first_rows(train, 8))
        return model.init({"params": key, "dropout": key}, example, train=True)["params"]

    def evaluator(per_task: bool) -> Evaluator:
        evaluate = make_evaluate(model, tasks, batch_size=eval_batch_size, per_task=per_task)
        return lambda params, split: evaluate(params, split, context)

    return Problem(tasks, train, validation, supervised_loss(model, tasks, regularizer), init_params, evaluator)
