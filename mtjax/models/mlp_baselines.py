r"""The published multitask MLPs for tables, from K single-task networks to AdaTT, as wirings of one model.

T tasks come first, then one shared stream or group of experts where there is one. V is what reader t sees, S what it
sees as a constant, R what is added to its gate (`mtjax.nn.experts`):

| preset          | experts          | V                     | S              | R   | streams                       |
|-----------------|------------------|-----------------------|----------------|-----|-------------------------------|
| `single_task`   | one per task     | its own               |                |     | T, each with its own embedding|
| `shared_bottom` | 1                | it                    |                |     | 1                             |
| `omoe`          | n, one gate      | all                   |                |     | 1                             |
| `mmoe`          | n                | all                   |                |     | 1                             |
| `cgc`           | per task, shared | its own and shared    |                |     | 1                             |
| `ple`           | per task, shared | the same; shared: all |                |     | T + 1                         |
| `stem`          | per task, shared | all                   | other tasks'   |     | T + 1, each with its own      |
| `adatt`         | per task, shared | all                   |                | own | T, or T + 1 with shared ones  |

Sizes default to those of the MultiTab paper's configs (embedding width 16, experts (256, 128), towers of 64) where
it has the model. Those runs used batch normalisation in experts and towers and drew every weight from N(0, 0.01^2).
Batch statistics are mutable state, which models here do not have, so `norm` is None (default) or 'layer', and kernels
are LeCun-normal: without normalisation, weights that small start with a vanishing signal. The embeddings keep N(0,
0.01^2). MultiTab's dropout was 0.2 on ACS Income and 0 on Higgs.

References: MultiTab, arXiv 2511.09970 (sizes); Ma et al., KDD 2018 (OMoE, MMoE); Tang et al., RecSys 2020 (CGC, PLE);
Su et al., AAAI 2024 (STEM); Li et al., KDD 2023 (AdaTT).

Letters: T tasks, E experts.

>>> model = ple({"click": 1, "buy": 1}, cardinalities=(5, 3), num_numeric=2, features=((8,), (4,)))
>>> [layout.num_outputs for layout in model.wiring.layouts]
[3, 2]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax.core import FrozenDict

from mtjax.models.gated_experts import GatedExpertModel, Wiring
from mtjax.nn.experts import ExpertLayout


def single_task(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    *,
    features: Sequence[int] = (256, 128, 64),
    tower: Sequence[int] = (),
    **options: Any,
) -> GatedExpertModel:
    """K independent MLPs, embeddings included: the baseline of Delta_m.

    Args:
      heads: task name -> output size.
      cardinalities: codes of each categorical column.
      num_numeric: numeric columns.
      features: hidden widths.
      tower: hidden widths of the heads; linear by default.
      **options: other fields of `GatedExpertModel`, such as `width`, `dropout`, `norm`.

    Returns:
      The model.
    """
    tasks = range(len(heads))
    layout = ExpertLayout(np.eye(len(heads), dtype=bool), expert_stream=tasks, gate_stream=tasks, expert_owner=tasks)
    wiring = Wiring([layout], [[k] for k in tasks], embeddings=len(heads))
    return _model(heads, cardinalities, num_numeric, wiring, [features], tower=tower, **options)


def shared_bottom(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    *,
    features: Sequence[int] = (256, 128),
    **options: Any,
) -> GatedExpertModel:
    """One MLP that all towers read ("MT-MLP"): `omoe` with one expert, hence without a gate."""
    return omoe(heads, cardinalities, num_numeric, experts=1, features=features, **options)


def omoe(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    *,
    experts: int = 8,
    features: Sequence[int] = (256, 128),
    **options: Any,
) -> GatedExpertModel:
    """One-gate mixture of experts: z = sum_e softmax(W x)_e E_e(x), read by all towers.

    Args:
      heads: task name -> output size.
      cardinalities: codes of each categorical column.
      num_numeric: numeric columns.
      experts: E, all shared.
      features: hidden widths of every expert.
      **options: other fields of `GatedExpertModel`.

    Returns:
      The model.
    """
    wiring = Wiring([ExpertLayout(np.ones((1, experts), bool))], [[0]] * len(heads))
    return _model(heads, cardinalities, num_numeric, wiring, [features], **options)


def mmoe(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    *,
    experts: int = 8,
    features: Sequence[int] = (256, 128),
    **options: Any,
) -> GatedExpertModel:
    """Multi-gate mixture of experts: z_t = sum_e softmax(W_t x)_e E_e(x).

    Args:
      heads: task name -> output size.
      cardinalities: codes of each categorical column.
      num_numeric: numeric columns.
      experts: E, all shared.
      features: hidden widths of every expert.
      **options: other fields of `GatedExpertModel`.

    Returns:
      The model.
    """
    wiring = Wiring([ExpertLayout(np.ones((len(heads), experts), bool))], _own_output(len(heads)))
    return _model(heads, cardinalities, num_numeric, wiring, [features], **options)


def cgc(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    *,
    task_experts: int | Sequence[int] = 2,
    shared_experts: int = 4,
    features: Sequence[int] = (256, 128),
    **options: Any,
) -> GatedExpertModel:
    """Customised gate control: task t's gate ranges over its own and the shared experts.

    Args:
      heads: task name -> output size.
      cardinalities: codes of each categorical column.
      num_numeric: numeric columns.
      task_experts: experts per task, one number or one per task.
      shared_experts: shared experts.
      features: hidden widths of every expert.
      **options: other fields of `GatedExpertModel`.

    Returns:
      The model.
    """
    group = _groups(len(heads), task_experts, shared_experts)
    own, shared = _own(group, len(heads)), group == len(heads)
    layout = ExpertLayout(own | shared, expert_owner=_owners(group, len(heads)))
    wiring = Wiring([layout], _own_output(len(heads)))
    return _model(heads, cardinalities, num_numeric, wiring, [features], **options)


def ple(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    *,
    task_experts: int | Sequence[int] = 2,
    shared_experts: int = 4,
    features: Sequence[Sequence[int]] = ((256,), (128,)),
    tower_reads_shared: bool = False,
    **options: Any,
) -> GatedExpertModel:
    """Progressive layered extraction: stacked CGC, with a shared stream whose gate sees all experts.

    MultiTab's runs used one level, `features=((256, 128),)`, with `tower_reads_shared=True` (and one task and one
    shared expert on Higgs). STEM's authors' PLE lets the shared gate see the shared experts only; here it sees all, as
    in the paper.

    Args:
      heads: task name -> output size.
      cardinalities: codes of each categorical column.
      num_numeric: numeric columns.
      task_experts: experts per task and level, one number or one per task.
      shared_experts: shared experts per level.
      features: for each level, the hidden widths of every expert.
      tower_reads_shared: whether towers read concat(z_t, z_shared), which gives the last level a shared gate too; the
        paper's read z_t.
      **options: other fields of `GatedExpertModel`.

    Returns:
      The model.
    """
    num_tasks = len(heads)
    group = _groups(num_tasks, task_experts, shared_experts)

    def level(rows: int) -> ExpertLayout:
        sees_all = np.arange(rows)[:, None] == num_tasks
        return ExpertLayout(_own(group, rows) | (group == num_tasks) | sees_all, **_streams(group, num_tasks, rows))

    return _levels(
        heads, cardinalities, num_numeric, level, features, True, tower_reads_shared, own_embeddings=False, **options
    )


def stem(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    *,
    task_experts: int | Sequence[int] = 2,
    shared_experts: int = 4,
    features: Sequence[Sequence[int]] = ((256, 128),),
    gate_input: Literal["sum", "own"] = "sum",
    tower_reads_shared: bool = False,
    detach_shared: bool = False,
    **options: Any,
) -> GatedExpertModel:
    """STEM: tables per task and shared; a task reads other tasks' experts but does not train them.

    With one level and `tower_reads_shared=False`, the gradient of a task's loss with respect to another task's experts
    and tables is exactly 0. It is not with more levels or `tower_reads_shared=True`: the shared stream reads every
    expert with gradient.

    MultiTab's re-implementation is `gate_input='own', tower_reads_shared=True, detach_shared=True`: its loop compares
    a non-negative index with -1, so that tasks get the shared experts' outputs without gradient as well.

    Args:
      heads: task name -> output size.
      cardinalities: codes of each categorical column.
      num_numeric: numeric columns.
      task_experts: experts per task and level, one number or one per task.
      shared_experts: shared experts per level.
      features: for each level, the hidden widths of every expert.
      gate_input: what the gate of task t reads: 'sum', x_t + x_shared (the authors' code); 'own', x_t (MultiTab's).
      tower_reads_shared: whether towers read concat(z_t, z_shared); the authors' read z_t.
      detach_shared: whether task readers get the shared experts without gradient.
      **options: other fields of `GatedExpertModel`.

    Returns:
      The model.
    """
    if gate_input not in ("sum", "own"):
        raise ValueError(f"gate_input must be 'sum' or 'own', got {gate_input!r}")
    num_tasks = len(heads)
    group = _groups(num_tasks, task_experts, shared_experts)

    def level(rows: int) -> ExpertLayout:
        trained = _own(group, rows) | (not detach_shared) & (group == num_tasks)
        is_task = np.arange(rows)[:, None] < num_tasks
        streams = _streams(group, num_tasks, rows)
        if gate_input == "sum":
            streams["gate_stream"] = [(t, num_tasks) if t < num_tasks else t for t in range(rows)]
        return ExpertLayout(np.ones_like(trained), detached=~trained & is_task, **streams)

    return _levels(
        heads,
        cardinalities,
        num_numeric,
        level,
        features,
        True,
        tower_reads_shared,
        own_embeddings=True,
        **options,
    )


def adatt(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    *,
    task_experts: int | Sequence[int] = 2,
    shared_experts: int = 0,
    features: Sequence[Sequence[int]] = ((256,), (128,)),
    residual: bool = True,
    **options: Any,
) -> GatedExpertModel:
    """AdaTT: z_t = sum_e g_te E_e + sum_{e own} v_te E_e with gates over all experts, per level.

    Without shared experts this is AdaTT-sp; with them there is a shared stream too, except after the last level. As in
    the authors' code v is learned, from U(-1/sqrt(m), 1/sqrt(m)) for a group of m experts, and fixed to 1 if every
    group has one expert.

    Args:
      heads: task name -> output size.
      cardinalities: codes of each categorical column.
      num_numeric: numeric columns.
      task_experts: experts per task and level, one number or one per task.
      shared_experts: shared experts per level.
      features: for each level, the hidden widths of every expert.
      residual: whether own experts are added beside the gate (v); off for the paper's ablation.
      **options: other fields of `GatedExpertModel`.

    Returns:
      The model.
    """
    num_tasks = len(heads)
    group = _groups(num_tasks, task_experts, shared_experts)
    fixed = (np.unique(group, return_counts=True)[1] == 1).all()

    def level(rows: int) -> ExpertLayout:
        own = _own(group, rows) & residual
        return ExpertLayout(
            np.ones_like(own),
            residual=own & fixed,
            learned_residual=own & ~fixed,
            **_streams(group, num_tasks, rows),
        )

    return _levels(
        heads, cardinalities, num_numeric, level, features, shared_experts > 0, False, own_embeddings=False, **options
    )


def _model(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    wiring: Wiring,
    features: Sequence[Sequence[int]],
    **options: Any,
) -> GatedExpertModel:
    """The model with hashable fields, so that it may be a static argument of jit."""
    features = tuple(tuple(widths) for widths in features)
    options = {name: tuple(o) if isinstance(o, list) else o for name, o in options.items()}
    return GatedExpertModel(FrozenDict(heads), tuple(cardinalities), num_numeric, wiring, features, **options)


def _levels(
    heads: Mapping[str, int],
    cardinalities: Sequence[int],
    num_numeric: int,
    level: Callable[[int], ExpertLayout],
    features: Sequence[Sequence[int]],
    shared: bool,
    tower_reads_shared: bool,
    *,
    own_embeddings: bool,
    **options: Any,
) -> GatedExpertModel:
    """Stacks `level(rows)`: T + 1 rows with a shared stream, T at the last level unless towers read the shared one."""
    num_tasks = len(heads)
    last = level(num_tasks + (shared and tower_reads_shared))
    layouts = [level(num_tasks + shared)] * (len(features) - 1) + [last]
    reads = [[t, num_tasks] if tower_reads_shared else [t] for t in range(num_tasks)]
    wiring = Wiring(layouts, reads, layouts[0].num_streams if own_embeddings else 1)
    return _model(heads, cardinalities, num_numeric, wiring, features, **options)


def _groups(num_tasks: int, task_experts: int | Sequence[int], shared_experts: int) -> np.ndarray:
    """int[E]: the task of each expert, T for the shared ones, which come last."""
    counts = [task_experts] * num_tasks if isinstance(task_experts, int) else list(task_experts)
    if len(counts) != num_tasks or min(counts) < 0 or shared_experts < 0:
        raise ValueError(
            f"task_experts must be a number >= 0 or one for each of the {num_tasks} tasks, and shared_experts >= 0; "
            f"got {task_experts} and {shared_experts}"
        )
    return np.repeat(np.arange(num_tasks + 1), [*counts, shared_experts])


def _own(group: np.ndarray, rows: int) -> np.ndarray:
    """bool[rows, E]: expert e belongs to the group of output m."""
    return np.arange(rows)[:, None] == group[None, :]


def _owners(group: np.ndarray, num_tasks: int) -> list[int | None]:
    """Owner of each expert, None for the shared ones."""
    return [None if g == num_tasks else int(g) for g in group]


def _streams(group: np.ndarray, num_tasks: int, rows: int) -> dict[str, Any]:
    """Experts and gates read the stream of their group."""
    return {
        "expert_stream": group.tolist(),
        "gate_stream": list(range(rows)),
        "expert_owner": _owners(group, num_tasks),
        "shared_output": num_tasks if rows > num_tasks else None,
    }


def _own_output(num_tasks: int) -> list[list[int]]:
    """Tower t reads output t."""
    return [[t] for t in range(num_tasks)]
