r"""Taking experts out of a trained layer, and adding some: slicing and appending stacked arrays, nothing retrained.

A layer is a `MoEMlp` or a `MoEAttention`: a 'router', arrays stacked over experts, and what belongs to no expert.

`prune_to_task` keeps what one task uses:  expert e stays iff percent_e > threshold / K, and never fewer than K stay.
`grow_experts` gives a new task its own gate over the old experts and n new ones. Gates of old tasks cannot address the
new experts, and because the layer computes for old tasks with the old experts' slice only, it runs the same program on
the same numbers: their outputs are equal bit for bit, whatever the new experts learn, as long as `new_entries` is what
trains.

References:
  Chen et al., "Mod-Squad: Designing Mixture of Experts As Modular Multi-Task Learners", CVPR 2023 (pruning; the rule is
  the published code's).
  "An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training", 2023 (growth; there is no
  code: what the abstract does not say is this file's choice).

Letters: E experts, K experts per token, n new experts.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.nn.routers import RouterConfig
from mtjax.nn.stacked import uniform_fan_in

GATES = ("kernel", "noise_kernel")  # of a `Router`; experts on the last axis
STACKED = ("experts", "kernel_in", "bias_in", "kernel_out", "bias_out")  # of a layer; experts on the first axis


class Pruned(NamedTuple):
    """A layer for one task.

    Attributes:
      params: of the layer with `config` and num_tasks = 1; its only task is 0.
      experts: the ids that were kept, ascending.
      config: of the smaller router.
    """

    params: dict[str, Any]
    experts: tuple[int, ...]
    config: RouterConfig


class Grown(NamedTuple):
    """A layer with one task and n experts more.

    Attributes:
      params: of the layer with `config` and `num_tasks`.
      config: of the larger router.
      num_tasks: old tasks + 1; the new task is the last.
    """

    params: dict[str, Any]
    config: RouterConfig
    num_tasks: int


def experts_to_keep(
    percent: Sequence[float], *, top_k: int, threshold: float, reach: Sequence[bool] | None = None
) -> tuple[int, ...]:
    """Experts with more than threshold / K percent of a task's choices, filled up to K with the most used.

    Args:
      percent: f[E], `LoadSummary.percent` of the task.
      top_k: K.
      threshold: percent times K, as in the published code (whose default is 3).
      reach: bool[E], experts that the task can address at all; None: all.

    Returns:
      Ascending ids.

    >>> experts_to_keep([60.0, 0.5, 39.0, 0.5], top_k=2, threshold=4.0)
    (0, 2)
    >>> experts_to_keep([60.0, 0.5, 39.0, 0.5], top_k=3, threshold=4.0)
    (0, 1, 2)
    """
    percent = np.asarray(percent, np.float64)
    reach = np.ones(percent.shape, bool) if reach is None else np.asarray(reach)
    order = [e for e in np.argsort(-percent, kind="stable").tolist() if reach[e]]
    enough = sum(percent[e] > threshold / top_k for e in order)
    return tuple(sorted(order[: max(enough, top_k)]))


def prune_to_task(
    params: Mapping[str, Any],
    percent: Sequence[float],
    *,
    task: int,
    config: RouterConfig,
    threshold: float = 3.0,
    keep_denominator: bool = False,
) -> Pruned:
    """Physically removes the experts that a task hardly uses, and the gates of the other tasks.

    The gate is a softmax over all experts without renormalisation, so without the removed columns the remaining gate
    values grow: by their removed neighbours' share of the softmax, though no token chose these. `keep_denominator`
    leaves those columns (D numbers per expert) in the gate as ghosts; the pruned layer is then equal to the whole one
    on every token whose choices were all kept.

    Args:
      params: of the layer.
      percent: f[E], concrete; use of each expert by the task.
      task: the task.
      config: of the layer's router.
      threshold: see `experts_to_keep`.
      keep_denominator: as above. False is the published rule.

    Returns:
      The smaller layer.
    """
    percent = np.asarray(percent)
    if percent.shape != (config.num_experts,):
        raise ValueError(f"percent must hold one number per expert, {config.num_experts}, got shape {percent.shape}")
    tasks = _num_tasks(params, config)
    if config.kind == "single":
        task = 0  # its one gate serves every task
    if not 0 <= task < tasks:
        raise ValueError(f"task must be in 0..{tasks - 1}, got {task}")
    reach = config.addressable(tasks)[task]
    top_k = min(config.top_k, int(reach.sum()))  # a task may have fewer skills than another
    kept = experts_to_keep(percent, top_k=top_k, threshold=threshold, reach=reach)
    removed = [e for e in np.flatnonzero(reach).tolist() if e not in kept] if keep_denominator else []
    old_ghosts = range(config.num_experts, config.num_experts + config.ghosts)
    columns = np.asarray([*kept, *removed, *old_ghosts], np.int32)

    smaller = jax.tree.map(lambda leaf: leaf[np.asarray(kept)], _stacked(params))
    if "router" in params:
        router = dict(params["router"])
        for name in GATES:
            if name in router:
                kernel = router[name][..., columns]
                router[name] = kernel[task : task + 1] if config.kind == "multi_gate" else kernel
        if "task_vector" in router:
            vector = dict(router["task_vector"])
            router["task_vector"] = vector | {"rows": vector["rows"][task : task + 1]}
        smaller["router"] = router
    config = dataclasses.replace(
        config,
        num_experts=len(kept),
        top_k=len(kept) if config.kind == "hard_skill" else config.top_k,
        skills=np.ones((1, len(kept))) if config.kind == "hard_skill" else None,
        visible=None,
        ghosts=len(removed) + config.ghosts,
    )
    return Pruned({name: smaller.get(name, leaf) for name, leaf in params.items()}, kept, config)


def grow_experts(
    params: Mapping[str, Any],
    key: jax.Array,
    n: int,
    *,
    config: RouterConfig,
    copy_from: Sequence[int] | None = None,
    skills: Sequence[int] | None = None,
    init: Callable[[jax.Array, Sequence[int]], jax.Array] = uniform_fan_in,
) -> Grown:
    """Appends n experts and a task.

    Args:
      params: of the layer.
      key: for what is drawn anew.
      n: experts to append; 0 adds only a task, with a gate over the experts that are there.
      config: of the layer's router; 'single' has no gate to add.
      copy_from: n ids of experts to start from; None: drawn by `init`, biases 0.
      skills: for 'hard_skill', the experts of the new task among the E + n.
      init: (key, shape) -> array, of new kernels [n, in, out].

    Returns:
      The larger layer. With 'task_conditioned' the new task shares the gate's kernel, in new columns and a new task
      vector.
    """
    if config.kind == "single":
        raise ValueError("A 'single' gate serves all tasks; a new task with its own experts needs another kind")
    if config.ghosts:
        raise ValueError(f"Grow the whole layer, not a pruned one with ghosts={config.ghosts}")
    if n < 0 or (copy_from is not None and len(copy_from) != n):
        raise ValueError(f"n must not be negative and copy_from must name n experts, got n={n}, copy_from={copy_from}")
    if (skills is not None) != (config.kind == "hard_skill"):
        raise ValueError(f"skills is given with kind='hard_skill' and only with it, got kind={config.kind!r}")
    tasks, old = _num_tasks(params, config), config.num_experts
    copies = None if copy_from is None else tuple(copy_from)
    params = _grow_arrays(dict(params), key, n=n, config=config, copy_from=copies, init=init)
    reach = np.zeros((tasks + 1, old + n), bool)
    reach[:-1, :old] = config.addressable(tasks)
    reach[-1] = True if skills is None else np.isin(np.arange(old + n), skills)
    if config.kind == "hard_skill":
        config = dataclasses.replace(
            config, num_experts=old + n, top_k=int(reach.sum(1).max()), skills=reach, visible=None
        )
    else:
        config = dataclasses.replace(config, num_experts=old + n, visible=None if reach.all() else reach)
    return Grown(params, config, tasks + 1)


@functools.partial(jax.jit, static_argnames=("n", "config", "copy_from", "init"))
def _grow_arrays(
    params: dict[str, Any],
    key: jax.Array,
    *,
    n: int,
    config: RouterConfig,
    copy_from: tuple[int, ...] | None,
    init: Callable[[jax.Array, Sequence[int]], jax.Array],
) -> dict[str, Any]:
    """The arrays of `grow_experts`; compiled once for equal layers."""
    keys = iter(jax.random.split(key, len(jax.tree.leaves(params)) + 1))

    def append(leaf: jax.Array) -> jax.Array:
        if copy_from is not None:
            more = leaf[np.asarray(copy_from, np.int32)]
        elif leaf.ndim < 3:
            more = jnp.zeros((n, *leaf.shape[1:]), leaf.dtype)
        else:
            more = init(next(keys), (n, *leaf.shape[1:])).astype(leaf.dtype)
        return jnp.concatenate([leaf, more])

    larger = jax.tree.map(append, _stacked(params))
    router = dict(params.get("router", {}))
    fresh = (lambda key, shape: jnp.zeros(shape)) if config.zero_init else uniform_fan_in
    for name in [name for name in GATES if name in router]:  # in this order: each draws a key
        kernel = router[name]
        if config.kind == "multi_gate":  # the old gates' new columns are out of reach and never read
            kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, n)))
            router[name] = jnp.concatenate([kernel, fresh(next(keys), (1, *kernel.shape[1:]))])
        else:
            router[name] = jnp.concatenate([kernel, fresh(next(keys), (*kernel.shape[:-1], n))], axis=-1)
    if "task_vector" in router:
        rows = router["task_vector"]["rows"]
        more = uniform_fan_in(next(keys), (len(rows) + 1, rows.shape[1]))[-1:]
        router["task_vector"] = dict(router["task_vector"]) | {"rows": jnp.concatenate([rows, more])}
    if router:
        larger["router"] = router
    return {name: larger.get(name, leaf) for name, leaf in params.items()}


def new_entries(old: Any, new: Any) -> Any:
    """Which numbers of a grown tree are new: bool arrays in the shape of `new`.

    Masking the *updates*, after the optimizer, trains the new task and leaves the others' outputs as they are, bit for
    bit: `updates = jax.tree.map(lambda mask, u: jnp.where(mask, u, 0.0), masks, updates)`.

    Args:
      old, new: a layer's or a whole model's parameters before and after; what `old` does not hold is new.

    Returns:
      Pytree like `new`.
    """
    before = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(old)}

    def mark(path: Any, leaf: jax.Array) -> jax.Array:
        mask = np.ones(leaf.shape, bool)
        name = jax.tree_util.keystr(path)
        if name in before:
            mask[tuple(slice(size) for size in before[name].shape)] = False
        return jnp.asarray(mask)

    return jax.tree_util.tree_map_with_path(mark, new)


def _stacked(params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a layer's parameters that is stacked over experts."""
    stacked = {name: leaf for name, leaf in params.items() if name in STACKED}
    if not stacked:
        raise ValueError(f"params must be those of a layer with {' or '.join(STACKED[:2])}, got {sorted(params)}")
    return stacked


def _num_tasks(params: Mapping[str, Any], config: RouterConfig) -> int:
    if config.kind == "hard_skill":
        return len(config.skills)
    router = params["router"]
    if config.kind == "task_conditioned":
        return len(router["task_vector"]["rows"])
    return len(router["kernel"])  # 1 for 'single', whose tasks are all alike
