r"""Routers: which K of E experts work on a token, and with what weight, given the token and the task it is for.

    logits = u W_g (+ noise in training),   p = softmax(logits) over all E,   keep the K largest p, not renormalised

What the gate reads, u, and which gate it is make the task couplings of the published systems:

    multi_gate          u = x, one W_g per task over the same experts (M3ViT, Mod-Squad)
    task_conditioned    u = [x, v_t], one W_g; v_t = LayerNorm(Linear(GELU(Linear(one-hot t)))) (M3ViT)
    single              u = x, one W_g for all tasks: routing knows nothing of the task (V-MoE)
    hard_skill          no gate: task t averages over the skills that a table gives it (SkillNet)

References:
  Liang et al., "M3ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning with Model-Accelerator
  Co-design", NeurIPS 2022. Chen et al., "Mod-Squad: Designing Mixture of Experts As Modular Multi-Task Learners", CVPR
  2023. Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", NeurIPS 2021 (noise of standard deviation
  1/E). Dai et al., "One Model, Multiple Modalities: A Sparsely Activated Approach for Text, Sound, Image, Video and
  Code", 2022 (SkillNet).

Letters: T task streams asked for, M tokens of a stream, D width, E experts, K experts per token, G gates, d_t width of
the task vector.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.nn.local_rows import on_own_rows
from mtjax.nn.stacked import uniform_fan_in

KINDS = ("multi_gate", "task_conditioned", "single", "hard_skill")
HIDDEN = -1e9  # logit of an expert that a gate cannot address; its softmax is exactly 0, and its square is finite


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts: static, hashable, checked on construction.

    Attributes:
      kind: 'multi_gate', 'task_conditioned', 'single' or 'hard_skill'.
      num_experts: E.
      top_k: K, experts per token; with 'hard_skill' the most skills that a task has.
      noise_std: noise of this standard deviation / E is added to the logits in training (V-MoE and M3ViT: 1).
      learned_noise: Mod-Squad's: standard deviation softplus(u W_n) + 0.01, in training; replaces `noise_std`.
      renormalise: divide the kept gate values by their sum.
      zero_init: gates start at zero (Mod-Squad). All probabilities are then equal and every token starts at experts
        0..K-1, so use it with noise or with a dispatch that never drops.
      task_dim: d_t of 'task_conditioned'.
      skills: bool[num_tasks, E] of 'hard_skill': the experts that each task averages over.
      visible: bool[num_tasks, E], the experts that a task's gate can address; None: all. M3ViT's windows of experts,
        and what keeps old tasks off experts that were added later.
      ghosts: gate columns without an expert, which enter the softmax's denominator only. They let a pruned layer
        compute what the whole one did.

    Raises:
      ValueError: a sentence that names the argument, what it should be and what it is.

    >>> RouterConfig("multi_gate", 4, 2, visible=[[1, 1, 0, 0], [1, 1, 1, 1]]).pool_size((0,))
    2
    """

    kind: str
    num_experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    noise_std: float = 0.0
    learned_noise: bool = False
    renormalise: bool = False
    zero_init: bool = False
    task_dim: int = 64
    skills: Sequence[Sequence[bool]] | None = None
    visible: Sequence[Sequence[bool]] | None = None
    ghosts: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts={self.num_experts}, got {self.top_k}")
        if self.noise_std < 0 or self.ghosts < 0:
            raise ValueError(f"noise_std and ghosts must not be negative, got {self.noise_std} and {self.ghosts}")
        for name in ("skills", "visible"):
            if getattr(self, name) is not None:
                table = np.asarray(getattr(self, name))
                if table.ndim != 2 or table.shape[1] != self.num_experts or not np.isin(table, (0, 1)).all():
                    raise ValueError(
                        f"{name} must be bool[num_tasks, {self.num_experts}], got shape {table.shape} with the values "
                        f"{np.unique(table).tolist()}"
                    )
                object.__setattr__(self, name, tuple(tuple(row) for row in table.astype(bool).tolist()))
        if (self.skills is not None) != (self.kind == "hard_skill"):
            raise ValueError(f"skills is given with kind='hard_skill' and only with it, got kind={self.kind!r}")
        if self.kind == "hard_skill":
            counts = [sum(row) for row in self.skills]
            if min(counts) < 1 or max(counts) != self.top_k:
                raise ValueError(
                    f"Every task needs a skill and top_k={self.top_k} must be the most that a task has; the rows of "
                    f"skills have {counts}"
                )
        if self.visible is not None:
            if self.kind not in ("multi_gate", "task_conditioned"):
                raise ValueError(f"visible needs a gate that knows the task, got kind={self.kind!r}")
            counts = [sum(row) for row in self.visible]
            if min(counts) < self.top_k:
                raise ValueError(f"Every task must see at least top_k={self.top_k} experts, got {counts}")

    def addressable(self, num_tasks: int) -> np.ndarray:
        """bool[num_tasks, E]: the experts that each task can use at all."""
        table = self.skills if self.kind == "hard_skill" else self.visible
        return np.ones((num_tasks, self.num_experts), bool) if table is None else np.asarray(table)

    def pool_size(self, tasks: Sequence[int]) -> int:
        """Experts 0 .. pool_size - 1 include every one that `tasks` can address.

        A layer that slices its experts to this size before it dispatches computes for old tasks, after new experts
        were appended, the very program that it computed before: the same bits.
        """
        table = self.skills if self.kind == "hard_skill" else self.visible
        if table is None:
            return self.num_experts
        return 1 + int(np.flatnonzero(np.asarray(table)[list(tasks)].any(0))[-1])


class Routing(NamedTuple):
    """Who goes where.

    Attributes:
      values: f32[T, M, K], gate values of the chosen experts.
      ids: i32[T, M, K], the chosen experts, best first; E (no expert, with value 0) where a task has fewer than K
        skills.
      probs: f32[T, M, E], the softmax that the choice was made by; 0 for experts out of reach.
      logits: f32[T, M, E], clean.
      noisy_logits: f32[T, M, E], the same array without noise.
      noise_std: f32[] or f32[T, M, E]; None where no noise was added.
    """

    values: jax.Array
    ids: jax.Array
    probs: jax.Array
    logits: jax.Array
    noisy_logits: jax.Array
    noise_std: jax.Array | None


def per_task_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x f[T or 1, M, D] times kernel f[T or 1, D, E], stream by stream: f[T, M, E]; 2-D products where it can."""
    if len(kernel) == 1:
        return (x.reshape(-1, x.shape[-1]) @ kernel[0]).reshape(*x.shape[:-1], -1)
    if len(x) == 1:
        streams, width, experts = kernel.shape
        y = x[0] @ kernel.swapaxes(0, 1).reshape(width, streams * experts)
        return y.reshape(-1, streams, experts).swapaxes(0, 1)
    return jnp.einsum("tmd,tde->tme", x, kernel)


def choose(
    logits: jax.Array,
    noisy_logits: jax.Array,
    noise_std: jax.Array | None,
    *,
    top_k: int,
    num_experts: int,
    ghosts: int = 0,
    renormalise: bool = False,
) -> Routing:
    """Softmax over all columns, then the K largest experts.

    Args:
      logits, noisy_logits: f32[T, M, n + ghosts], n <= E experts within reach, then the ghosts.
      noise_std: None, f32[] or f32[T, M, n + ghosts].
      top_k, num_experts, ghosts, renormalise: as in `RouterConfig`.

    Returns:
      The routing, its columns padded to E.
    """
    within = logits.shape[-1] - ghosts
    probs = jax.nn.softmax(noisy_logits, axis=-1)[..., :within]
    values, ids = on_own_rows(lambda rows: tuple(jax.lax.top_k(rows, top_k)), probs, axis=1)
    if renormalise:
        values = values / jnp.sum(values, axis=-1, keepdims=True)

    def pad(columns: jax.Array, fill: float) -> jax.Array:
        columns = columns[..., :within]
        missing = num_experts - within
        return columns if missing == 0 else jnp.pad(columns, ((0, 0), (0, 0), (0, missing)), constant_values=fill)

    if noise_std is not None and noise_std.ndim:
        noise_std = pad(noise_std, 1.0)
    return Routing(values, ids, pad(probs, 0.0), pad(logits, HIDDEN), pad(noisy_logits, HIDDEN), noise_std)


class Router(nn.Module):
    """Chooses experts for the tokens of each task stream.

    Parameters: 'kernel' f32[G, D (+ d_t), E + ghosts] without bias, G = num_tasks for 'multi_gate', else 1; with
    learned noise 'noise_kernel' of the same shape; for 'task_conditioned' also 'task_vector'; none for 'hard_skill'.
    They exist whatever `tasks` is asked for; only the gates of those tasks are computed. Noise is drawn from the rng
    'gate', and only with `train=True`.

    Deviations: Mod-Squad's published gates keep their noise on in evaluation and add 1e-4 to every probability; M3ViT
    computes one task vector for all layers, here every layer has its own.

    Attributes:
      config: how to choose.
      num_tasks: tasks that exist.
    """

    config: RouterConfig
    num_tasks: int

    @nn.compact
    def __call__(self, x: jax.Array, *, tasks: Sequence[int], train: bool = False) -> Routing:
        """Routes tokens.

        Args:
          x: f[T, M, D] with T = len(tasks), or f[1, M, D] while all streams are still equal.
          tasks: static; the task of each stream.
          train: whether noise is added.

        Returns:
          The routing of T streams; of one, if the gate is 'single' and x has one.
        """
        config, tasks = self.config, tuple(tasks)
        if not tasks or not all(0 <= task < self.num_tasks for task in tasks):
            raise ValueError(f"tasks must name some of 0..{self.num_tasks - 1}, got {tasks}")
        if x.ndim != 3 or len(x) not in (1, len(tasks)):
            raise ValueError(f"x must be [T, M, D] with T = 1 or {len(tasks)} (tasks {tasks}), got shape {x.shape}")
        table = config.addressable(self.num_tasks)
        if len(table) != self.num_tasks:
            raise ValueError(f"skills and visible need a row for each of {self.num_tasks} tasks, got {len(table)}")
        if config.kind == "hard_skill":
            return _skill_routing(table[list(tasks)], x.shape[1])

        pool = config.pool_size(tasks)
        columns = np.r_[:pool, config.num_experts : config.num_experts + config.ghosts]
        vectors = None
        if config.kind == "task_conditioned":
            vectors = TaskVector(self.num_tasks, config.task_dim, name="task_vector")(tasks)
        logits = self._columns("kernel", x, vectors, tasks, columns)
        reach = np.pad(table[list(tasks), :pool], ((0, 0), (0, config.ghosts)), constant_values=True)[:, None, :]
        if not reach.all():
            logits = jnp.where(reach, logits, HIDDEN)
        noisy, noise_std = logits, None
        if config.learned_noise and (train or self.is_initializing()):
            noise_std = jax.nn.softplus(self._columns("noise_kernel", x, vectors, tasks, columns)) + 0.01
        elif config.noise_std:
            noise_std = jnp.asarray(config.noise_std / config.num_experts, jnp.float32)
        if train and noise_std is not None:
            noisy = logits + noise_std * jax.random.normal(self.make_rng("gate"), logits.shape)
            noisy = noisy if reach.all() else jnp.where(reach, noisy, HIDDEN)
        return choose(
            logits,
            noisy,
            noise_std if train else None,
            top_k=config.top_k,
            num_experts=config.num_experts,
            ghosts=config.ghosts,
            renormalise=config.renormalise,
        )

    def _columns(
        self, name: str, x: jax.Array, vectors: jax.Array | None, tasks: tuple[int, ...], columns: np.ndarray
    ) -> jax.Array:
        """u W f32[T, M, len(columns)] for the gates of `tasks`."""
        config, width = self.config, x.shape[-1]
        x = x.astype(jnp.float32)
        init = nn.initializers.zeros_init() if config.zero_init else uniform_fan_in
        multiple = config.kind == "multi_gate"
        whole = config.num_experts + config.ghosts
        shape = (self.num_tasks if multiple else 1, width + (0 if vectors is None else config.task_dim), whole)
        kernel = self.param(name, init, shape)
        if len(columns) < whole:
            kernel = kernel[..., columns]
        if multiple and tasks != tuple(range(self.num_tasks)):
            kernel = kernel[np.asarray(tasks)]
        y = per_task_product(x, kernel[:, :width])
        if vectors is not None:  # [x, v] W = x W_x + v W_v: the token's part once, whatever the number of tasks
            y = y + (vectors @ kernel[0, width:])[:, None, :]
        return y


class TaskVector(nn.Module):
    """v_t = LayerNorm(Linear(GELU(Linear(one-hot t)))), f32[T, d_t] for the tasks asked for."""

    num_tasks: int
    width: int

    @nn.compact
    def __call__(self, tasks: Sequence[int]) -> jax.Array:
        rows = self.param("rows", uniform_fan_in, (self.num_tasks, self.width))  # the first kernel, a row per task
        bias = self.param("bias", nn.initializers.zeros_init(), (self.width,))
        hidden = nn.gelu(rows[np.asarray(tasks)] + bias[None], approximate=False)
        return nn.LayerNorm(epsilon=1e-6, name="norm")(nn.Dense(self.width, name="out")(hidden))


def _skill_routing(skills: np.ndarray, num_tokens: int) -> Routing:
    """Gate 1/n on each of a task's n skills, for bool[T, E]."""
    num_tasks, num_experts = skills.shape
    counts = skills.sum(1)
    most = counts.max()
    ids = np.full((num_tasks, most), num_experts, np.int32)
    for row, skill in zip(ids, skills, strict=True):
        row[: skill.sum()] = np.flatnonzero(skill)
    values = (ids < num_experts) / counts[:, None]

    def everywhere(rows: np.ndarray, dtype=jnp.float32) -> jax.Array:
        rows = jnp.asarray(rows, dtype)
        return jnp.broadcast_to(rows[:, None, :], (num_tasks, num_tokens, rows.shape[-1]))

    logits = everywhere(np.where(skills, 0.0, HIDDEN))
    probs = everywhere(skills / counts[:, None])
    return Routing(everywhere(values), everywhere(ids, jnp.int32), probs, logits, logits, None)
