r"""Which tasks help which, and which should be trained together.

The *affinity* of task i onto task j is what one step on task i does to the loss of task j, relative to that loss:

    theta_i = theta - eta g_i  (shared parameters only),      Z_ij = 1 - L_j(theta_i) / L_j(theta)

Positive: i's step helps j. Averaged over training it says which tasks belong into one network; `group_tasks` finds the
best groups under a budget, `sampling_probabilities` how often to draw each task's data.

Letters: K tasks, B groups.

Reference: Fifty et al., "Efficiently Identifying Task Groupings for Multi-Task Learning" (TAG), NeurIPS 2021.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mtjax import gradients
from mtjax.optim import sharing

PyTree = Any
MAX_TASKS = 12


def task_affinity(
    loss_fn: Callable,
    learning_rate: float,
    is_shared: Any = True,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable:
    """Inter-task affinity by look-ahead: K trial steps, each followed by a forward pass on the same batch.

    Args:
      loss_fn: as for `mtjax.value_and_jacobian`.
      learning_rate: eta of the trial step.
      is_shared: which parameters the trial steps move; see `mtjax.optim.on_shared`. (Moving a head changes its own task
        only.)
      has_aux: whether `loss_fn` returns `(losses, aux)`.
      chunk_size: trial steps at once; None: all.

    Returns:
      A function `(params, *args) -> (losses f[K], affinity f[K, K])`, row i the step on task i. Nothing is updated. A
      loss of exactly 0 cannot change relative to itself: its column is 0 where it stays 0, else -infinity.

    Raises:
      ValueError: for a learning rate that is not positive.

    >>> fn = task_affinity(lambda p: {"a": p**2, "b": (p - 2) ** 2}, 0.25)
    >>> losses, affinity = fn(jnp.array(1.0))
    >>> print(affinity.round(2))
    [[ 0.75 -1.25]
     [-1.25  0.75]]
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be > 0, got {learning_rate}")
    gradients.check_chunk_size(chunk_size)

    def task_affinity_fn(params, *args):
        losses, pullback, _ = gradients.losses_and_vjp(loss_fn, has_aux, params, args, {})
        num_tasks = losses.shape[0]
        rows = gradients.rows_of(pullback, num_tasks, chunk_size)
        shared = sharing.shared_leaves(is_shared, params, rows)

        def after(task):
            def moved(flag, p, leaf):
                return p - learning_rate * jnp.where(flag, leaf[task], jnp.zeros_like(p))

            away = jax.tree.map(moved, shared, params, rows)
            return gradients.stacked_loss(loss_fn, has_aux, args, {})(away)[0]

        tasks = jnp.arange(num_tasks)
        size = num_tasks if chunk_size is None else min(chunk_size, num_tasks)
        ahead = jax.vmap(after)(tasks) if size == num_tasks else jax.lax.map(after, tasks, batch_size=size)
        return losses, jnp.where(ahead == losses[None], 0.0, 1.0 - ahead / losses[None])

    return task_affinity_fn


def group_tasks(affinity: ArrayLike, num_groups: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The best groups of tasks under a budget of networks, by mixed-integer programming: exact.

    A network is trained on a group and serves some of its members; a task may train in several groups (as a helper) and
    is served by one. Served in group S, task j scores the mean affinity of the other members onto it; alone it scores 0
    (nothing is transferred). The total over tasks is maximised.

    Args:
      affinity: f[K, K], row i the effect of task i (`task_affinity`, averaged over training steps).
      num_groups: B, networks at most.

    Returns:
      For each group its members and the tasks that it serves, largest group first.

    Raises:
      ValueError: for more than 12 tasks (the programme has 2^K candidate groups), or a matrix that is not finite and
        square.

    >>> helps = [[0, 2, -1, -1], [2, 0, -1, -1], [-1, -1, 0, 1], [-1, -1, 3, 0]]
    >>> group_tasks(helps, num_groups=2)
    [((0, 1), (0, 1)), ((2, 3), (2, 3))]
    """
    from scipy import optimize, sparse

    values = np.asarray(affinity, np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not np.isfinite(values).all():
        raise ValueError(f"affinity must be a finite matrix [K, K], got shape {values.shape}")
    num_tasks = len(values)
    if not 1 <= num_tasks <= MAX_TASKS:
        raise ValueError(f"group_tasks takes 1 to {MAX_TASKS} tasks, got {num_tasks}: there are 2^K candidate groups")
    if num_groups < 1:
        raise ValueError(f"num_groups must be >= 1, got {num_groups}")
    candidates = [s for size in range(1, num_tasks + 1) for s in itertools.combinations(range(num_tasks), size)]
    # Variables: one for each candidate (chosen or not), then one for each (candidate, member served).
    served = [(g, j) for g, members in enumerate(candidates) for j in members]
    score = [
        values[[i for i in candidates[g] if i != j], j].mean() if len(candidates[g]) > 1 else 0.0 for g, j in served
    ]
    # Among equal totals the smaller groups: training a member that helps nobody is not free.
    sizes = np.array([len(members) for members in candidates])
    cost = np.concatenate([1e-9 * max(1.0, np.abs(values).max()) * sizes, -np.array(score)])
    total, pairs = len(candidates), len(served)
    position = total + np.arange(pairs)
    groups, tasks = np.array([g for g, _ in served]), np.array([j for _, j in served])
    ones, rows = np.ones(pairs), np.arange(pairs)
    each_once = sparse.csr_array((ones, (tasks, position)), (num_tasks, total + pairs))
    only_chosen = sparse.csr_array(
        (np.r_[ones, -ones], (np.r_[rows, rows], np.r_[position, groups])), (pairs, total + pairs)
    )
    budget = sparse.csr_array((np.ones(total), (np.zeros(total, int), np.arange(total))), (1, total + pairs))
    result = optimize.milp(
        cost,
        constraints=[
            optimize.LinearConstraint(each_once, 1, 1),
            optimize.LinearConstraint(only_chosen, -np.inf, 0),
            optimize.LinearConstraint(budget, 0, num_groups),
        ],
        integrality=np.r_[np.ones(total), np.zeros(pairs)],
        bounds=optimize.Bounds(0, 1),
    )
    if result.x is None:
        raise ValueError(f"The grouping programme was not solved: {result.message}")
    serves: dict[int, list[int]] = {}
    for (group, task), value in zip(served, result.x[total:], strict=True):
        if value > 0.5:
            serves.setdefault(group, []).append(task)
    found = [(candidates[group], tuple(sorted(mine))) for group, mine in serves.items()]
    return sorted(found, key=lambda item: (-len(item[0]), item[0]))


def sampling_probabilities(sizes: Sequence[float], temperature: float = 1.0) -> np.ndarray:
    """How often to draw each task: p_k proportional to size_k^(1 / temperature).

    Args:
      sizes: examples of each task, > 0.
      temperature: 1: proportional to size; 2: to its square root; infinity: equally often.

    Returns:
      f64[K] that sums to one.

    Raises:
      ValueError: for sizes or a temperature that are not positive.

    >>> sampling_probabilities([100, 10_000], temperature=2.0).round(3).tolist()
    [0.091, 0.909]

    Reference: Raffel et al., "Exploring the Limits of Transfer Learning" (T5), JMLR 2020, section 3.5.2.
    """
    values = np.asarray(sizes, np.float64)
    if values.ndim != 1 or not (values > 0).all() or not temperature > 0:
        raise ValueError(f"sizes and temperature must be > 0, got {values.tolist()} and {temperature}")
    log = np.log(values) / temperature
    weights = np.exp(log - log.max())
    return weights / weights.sum()
