r"""Which experts a task uses, remembered over training: moving averages, percentages, overlap between tasks.

    c_te <- 0.95 c_te + 0.05 (tokens of task t that chose expert e),     percent_te = 100 c_te / sum_e c_te

One state per layer; a model with several keeps a dictionary of them under the names of its auxiliary statistics.

Reference: Chen et al., "Mod-Squad: Designing Mixture of Experts As Modular Multi-Task Learners", CVPR 2023; the
decay and the percentages are those of the published code, in which a row starts at 0 as here (the percentages hide it).

Letters: T tasks (of a batch: streams), E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtjax.nn.balance import RouterStats


class ExpertLoad(NamedTuple):
    """Moving averages of one layer.

    Attributes:
      count: f32[num_tasks, E], top-K choices per batch.
      dropped: f32[num_tasks], share of the assignments that the dispatch dropped.
      steps: f32[num_tasks], batches that held the task.
    """

    count: jax.Array
    dropped: jax.Array
    steps: jax.Array


class LoadSummary(NamedTuple):
    """What to look at.

    Attributes:
      percent: f32[T, E], use of each expert by each task; rows sum to 100, or are 0 for a task not seen yet.
      experts_used: f32[T], experts above the threshold.
      overlap: f32[T, T], cosine between the tasks' rows.
      shared: f32[T, T], common share sum_e min(p_t, p_u) of two tasks' choices: 0 = disjoint experts, 1 = same use.
      dead: bool[E], experts that no task uses above the threshold.
      dropped: f32[T], share of assignments dropped.
    """

    percent: jax.Array
    experts_used: jax.Array
    overlap: jax.Array
    shared: jax.Array
    dead: jax.Array
    dropped: jax.Array


def expert_load(num_tasks: int, num_experts: int) -> ExpertLoad:
    """The state before the first batch."""
    return ExpertLoad(jnp.zeros((num_tasks, num_experts)), jnp.zeros(num_tasks), jnp.zeros(num_tasks))


def update_load(
    load: ExpertLoad, stats: RouterStats, tasks: Sequence[int] | jax.Array, *, decay: float = 0.95
) -> ExpertLoad:
    """Adds a batch; tasks that it does not hold keep their rows.

    Args:
      load: of one layer.
      stats: of T streams of that layer, or of one that all tasks share.
      tasks: task of each stream, static or i32[T].
      decay: of the moving averages.

    Returns:
      The new state, a constant in any gradient.
    """
    tasks = jnp.asarray(tasks)
    count = jnp.broadcast_to(stats.count, (tasks.shape[0], stats.count.shape[-1]))
    dropped = jnp.broadcast_to(stats.dropped, tasks.shape)
    # The dropped share is reported as it is, so its average starts at the first value instead of at 0.
    keep = jnp.where(load.steps[tasks] > 0, decay, 0.0)
    return jax.lax.stop_gradient(
        ExpertLoad(
            load.count.at[tasks].set(decay * load.count[tasks] + (1.0 - decay) * count),
            load.dropped.at[tasks].set(keep * load.dropped[tasks] + (1.0 - keep) * dropped),
            load.steps.at[tasks].add(1.0),
        )
    )


def use_percent(count: jax.Array) -> jax.Array:
    """Rows of counts f32[..., E] as percentages; 0 where a row is 0.

    >>> use_percent(jnp.array([[1.0, 3.0], [0.0, 0.0]])).tolist()
    [[25.0, 75.0], [0.0, 0.0]]
    """
    total = jnp.sum(count, axis=-1, keepdims=True)
    return 100.0 * count / jnp.where(total > 0, total, 1.0)


def summarise_load(load: ExpertLoad, *, threshold: float = 5.0) -> LoadSummary:
    """Percentages and what follows from them.

    Args:
      load: of one layer.
      threshold: percent of a task's choices above which it is said to use an expert.

    Returns:
      The summary.
    """
    percent = use_percent(load.count)
    used = percent > threshold
    norm = jnp.sqrt(jnp.sum(jnp.square(percent), axis=-1))
    norms = norm[:, None] * norm[None, :]
    return LoadSummary(
        percent=percent,
        experts_used=jnp.sum(used, axis=-1, dtype=jnp.float32),
        overlap=(percent @ percent.T) / jnp.where(norms > 0, norms, 1.0),
        shared=jnp.sum(jnp.minimum(percent[:, None, :], percent[None, :, :]), axis=-1) / 100.0,
        dead=~jnp.any(used, axis=0),
        dropped=load.dropped,
    )
