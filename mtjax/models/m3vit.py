r"""M3ViT: a vision transformer whose odd blocks have a mixture of experts in place of the MLP, with one gate per task.

    image -> patches -> block 0 (dense) -> block 1 (experts) -> block 2 (dense) -> ... -> norm -> decoder of task t
                        once for all tasks |  once per task, with the gates of that task; the experts are the same

    expert block, task t:   u = x + attention(LN x)
                            g = softmax(LN(u) W_t) over all E experts, the K largest kept and not renormalised
                            y = u + sum over the K of  g_e (W2_e gelu(W1_e LN(u) + b1_e) + b2_e)

An expert's hidden width is r D with K r equal to the dense MLP's ratio, so that a token costs what it costs in a dense
transformer. The task is known inside the trunk, which therefore runs once per task; what lies before the first gate is
the same for all tasks and is computed once. Asking for one static `task` computes one stream, one gate and one decoder;
`mtjax.models.m3vit_inference` cuts that part out and runs it expert by expert.

Task couplings (`router`): 'multi_gate' (a gate W_t per task), 'task_conditioned' (one gate that also reads a task
vector), 'single' (one gate that knows no task, hence one pass: the ablation that isolates the conditioning). `window`
restricts task t to a window of experts.

Training-only branch (`tam`): with train=True the outputs hold, besides each task, '<task>/tam_<level>' of the branches
`mtjax.nn.tam.TAM`; they want the task's own loss. They do not exist at inference or for a single `task`.

Reference: Liang et al., "M3ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning with Model-
Accelerator Co-design", NeurIPS 2022, and its code. Deviations: group instead of batch normalization in the decoders;
the noisy load compares logits with logits (`mtjax.nn.balance`); every layer has a task vector; the trunk ends in a
layer norm, and the PUP decoder normalises once more; windows of experts are spread evenly (`M3ViTConfig.visible`).

Letters: T task streams, B images, N tokens, D width, L blocks, E experts, K experts per token, r hidden ratio.

>>> model = M3ViT({"depth": 1, "edge": 1}, M3ViTConfig(ViTConfig(patch=8, width=16, depth=2, num_heads=2), experts=4))
>>> batch = {"image": jnp.zeros((1, 16, 16, 3))}
>>> outputs, params = jax.eval_shape(model.init_with_output, jax.random.key(0), batch)
>>> sorted(params["params"]["trunk"]), outputs["edge"].shape
(['block_0', 'block_1', 'norm', 'patch_embed'], (1, 16, 16, 1))
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.models.multitask_vit import Decoder, answer, asked_tasks, decode, decode_with_features
from mtjax.nn.balance import RouterStats, importance_loss, load_loss
from mtjax.nn.decoders import PUP
from mtjax.nn.moe import Dispatch
from mtjax.nn.moe_layer import MoEMlp
from mtjax.nn.routers import RouterConfig
from mtjax.nn.tam import TAM
from mtjax.nn.vit import (
    EPSILON,
    VIT_B,
    VIT_S,
    VIT_TI,
    Block,
    PatchEmbed,
    ViTConfig,
    add_branch,
    attention_half,
    recomputed,
    scan_layers,
)

RouterKind = Literal["multi_gate", "task_conditioned", "single"]


@dataclasses.dataclass(frozen=True)
class M3ViTConfig:
    """Sizes and couplings of the trunk.

    Attributes:
      vit: the dense transformer that it is made from; its `scan` runs the blocks after the first gate as one loop.
      experts: E, or one number per expert layer (after pruning).
      top_k: K.
      expert_ratio: r, an expert's hidden width over D.
      router: 'multi_gate', 'task_conditioned' or 'single'.
      every: each `every`-th block has experts: 2 for blocks 1, 3, 5, ...
      noise_std: noise of this standard deviation / E on the logits in training (rng collection 'gate').
      task_dim: width of the task vector of 'task_conditioned'.
      window: experts that a task can use, spread evenly over the E; None: all.
      gate_input: what the gate reads, 'normed' (what the experts read) or 'block_input' (what the attention read).
      dispatch: see `mtjax.nn.moe.moe_apply`.
      ghosts: gate columns whose expert was removed, one number per expert layer or one for all.
      tam: whether the training-only branch exists.
      allow_unmatched: permit K r other than the dense ratio.

    Raises:
      ValueError: a sentence that names the argument, what it should be and what it is.
    """

    vit: ViTConfig = dataclasses.field(default_factory=ViTConfig)
    experts: int | tuple[int, ...] = 16
    top_k: int = 4
    expert_ratio: float = 1.0
    router: RouterKind = "multi_gate"
    every: int = 2
    noise_std: float = 0.0
    task_dim: int = 64
    window: int | None = None
    gate_input: Literal["normed", "block_input"] = "normed"
    dispatch: Dispatch | str = "auto"
    ghosts: int | tuple[int, ...] = 0
    tam: bool = False
    allow_unmatched: bool = False

    def __post_init__(self):
        if self.router not in ("multi_gate", "task_conditioned", "single"):
            raise ValueError(f"router must be 'multi_gate', 'task_conditioned' or 'single', got {self.router!r}")
        if self.gate_input not in ("normed", "block_input"):
            raise ValueError(f"gate_input must be 'normed' or 'block_input', got {self.gate_input!r}")
        if not 1 <= self.every <= self.vit.depth:
            raise ValueError(f"every must lie in 1..{self.vit.depth}, the depth, got {self.every}")
        if not (self.allow_unmatched or math.isclose(self.top_k * self.expert_ratio, self.vit.mlp_ratio)):
            raise ValueError(
                f"top_k * expert_ratio must equal the dense mlp_ratio={self.vit.mlp_ratio}, so that a token costs the "
                f"same, got {self.top_k} * {self.expert_ratio}; pass allow_unmatched=True to compare at unequal cost"
            )
        layers = len(self.expert_blocks)
        for name in ("experts", "ghosts"):
            value = getattr(self, name)
            if not isinstance(value, int):
                object.__setattr__(self, name, tuple(value))
                if len(value) != layers:
                    raise ValueError(f"{name} must have one entry for each of the {layers} expert layers, got {value}")
                if self.vit.scan and len(set(value[1:])) > 1:
                    raise ValueError(f"A scan needs equal layers after the first; {name} differ: {value}")
        if self.window is not None and self.router == "single":
            raise ValueError("window needs a gate that knows the task, got router='single'")
        for layer in range(layers):
            self.router_config(layer, 1)  # raises for what a router refuses

    @property
    def expert_blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks with experts."""
        return tuple(range(self.every - 1, self.vit.depth, self.every))

    @property
    def groups(self) -> int:
        """Turns of the scan, groups of `every` blocks that end with experts, after the first group; 0 without scan."""
        return (self.vit.depth - self.every) // self.every if self.vit.scan else 0

    @property
    def layer_names(self) -> dict[str, list[str]]:
        """Stacked entries of a scanned trunk and their layers, for `mtjax.nn.vit.stack_layers` (with scan=True)."""
        starts = [self.every * (group + 1) for group in range(self.groups)]
        return {f"groups/block_{j}": [f"block_{s + j}" for s in starts] for j in range(self.every)} if starts else {}

    def visible(self, layer: int, num_tasks: int) -> np.ndarray | None:
        """bool[num_tasks, E] of a layer, the experts of each task's window; None: all."""
        if self.window is None:
            return None
        starts = np.round(np.linspace(0, self.num_experts(layer) - self.window, num_tasks)).astype(int)[:, None]
        experts = np.arange(self.num_experts(layer))[None]
        return (experts >= starts) & (experts < starts + self.window)

    def num_experts(self, layer: int) -> int:
        """E of the expert layer at a position."""
        return self.experts if isinstance(self.experts, int) else self.experts[layer]

    def router_config(self, layer: int, num_tasks: int) -> RouterConfig:
        """Of the expert layer at a position."""
        return RouterConfig(
            self.router,
            self.num_experts(layer),
            self.top_k,
            noise_std=self.noise_std,
            task_dim=self.task_dim,
            visible=self.visible(layer, num_tasks),
            ghosts=self.ghosts if isinstance(self.ghosts, int) else self.ghosts[layer],
        )


# The paper's command: 16 experts, 4 per token, r = 1. The published small configuration has 12 heads.
M3VIT_TI = M3ViTConfig(VIT_TI)
M3VIT_S = M3ViTConfig(dataclasses.replace(VIT_S, num_heads=12))
M3VIT_B = M3ViTConfig(VIT_B)
M3VIT_FPGA = M3ViTConfig(VIT_TI, top_k=2, expert_ratio=2.0)  # the deployed one


class ExpertBlock(nn.Module):
    """A transformer block with experts in place of the MLP.

    Attributes:
      config: of the trunk.
      layer: position among the expert layers.
      num_tasks: tasks that exist.
      drop_path: rate at which an image skips a branch in training.
    """

    config: M3ViTConfig
    layer: int
    num_tasks: int
    drop_path: float = 0.0

    @property
    def num_heads(self) -> int:
        return self.config.vit.num_heads

    @property
    def dropout(self) -> float:
        return self.config.vit.dropout

    @nn.compact
    def __call__(
        self, x: jax.Array, rate: jax.Array | None = None, *, tasks: Sequence[int], train: bool = False
    ) -> tuple[jax.Array, RouterStats]:
        """x f[T, B, N, D], or f[1, B, N, D] while streams are equal, to f[T, B, N, D] and the router's statistics."""
        config = self.config
        rate = self.drop_path if rate is None else rate
        u = attention_half(self, x, rate, train)
        normed = nn.LayerNorm(epsilon=EPSILON, name="norm_2")(u)
        experts = MoEMlp(
            router=config.router_config(self.layer, self.num_tasks),
            hidden=round(config.expert_ratio * x.shape[-1]),
            num_tasks=self.num_tasks,
            dispatch=config.dispatch,
            name="experts",
        )
        gate_x = x if config.gate_input == "block_input" else None
        branch, stats = experts(normed, tasks=tasks, train=train, gate_x=gate_x)
        return add_branch(self, jnp.broadcast_to(u, branch.shape), branch, rate, train), stats


class _Group(nn.Module):
    """`every` blocks of which the last has experts: one turn of the scan."""

    config: M3ViTConfig
    num_tasks: int

    @nn.compact
    def __call__(self, x: jax.Array, rates: jax.Array | None, *, tasks: Sequence[int], train: bool) -> Any:
        vit, last = self.config.vit, self.config.every - 1
        for j in range(last):
            block = Block(vit.num_heads, vit.mlp_ratio, vit.dropout, name=f"block_{j}")
            x = block(x, None if rates is None else rates[j], train=train)
        block = ExpertBlock(self.config, 1, self.num_tasks, name=f"block_{last}")
        return block(x, None if rates is None else rates[last], tasks=tasks, train=train)


class M3ViTTrunk(nn.Module):
    """Images to tokens of every task stream.

    Attributes:
      config: sizes.
      num_tasks: tasks that exist.
    """

    config: M3ViTConfig
    num_tasks: int

    @nn.compact
    def __call__(
        self, images: jax.Array, *, tasks: Sequence[int], train: bool = False
    ) -> tuple[jax.Array, dict[str, RouterStats]]:
        """Runs the streams of some tasks.

        Args:
          images: f[B, H, W, C].
          tasks: static; indices of the tasks asked for.
          train: whether dropout and noise are on (rng collections 'dropout' and 'gate').

        Returns:
          f[T, B, N, D], or f[1, B, N, D] if all tasks have the same ('single'); and {'block_1': RouterStats, ...}.
        """
        config, vit = self.config, self.config.vit
        rates, stats = vit.drop_path_rates, {}

        def dense(block: nn.Module, x: jax.Array, rates: jax.Array | None) -> Any:
            return block(x, rates, train=train), None

        def routed(block: nn.Module, x: jax.Array, rates: jax.Array | None) -> Any:
            return block(x, rates, tasks=tuple(tasks), train=train)

        dense, routed = recomputed(dense, vit.remat), recomputed(routed, vit.remat)
        x = PatchEmbed(vit.patch, vit.width, vit.cls_token, name="patch_embed")(images)[None]
        index = 0
        while index < vit.depth:
            if index == config.every and config.groups:
                count = config.groups * config.every
                steps = jnp.asarray(rates[index : index + count]).reshape(config.groups, config.every)
                groups = _Group(config, self.num_tasks, name="groups")
                x, every = scan_layers(routed, config.groups)(groups, x, steps if vit.drop_path else None)
                for layer, block in enumerate(config.expert_blocks[1:]):
                    stats[f"block_{block}"] = jax.tree.map(lambda leaf, layer=layer: leaf[layer], every)
                index += count
                continue
            if index in config.expert_blocks:
                layer = config.expert_blocks.index(index)
                block = ExpertBlock(config, layer, self.num_tasks, rates[index], name=f"block_{index}")
                x, stats[f"block_{index}"] = routed(block, x, None)
            else:
                sizes = (vit.num_heads, vit.mlp_ratio, vit.dropout)
                x, _ = dense(Block(*sizes, drop_path=rates[index], name=f"block_{index}"), x, None)
            index += 1
        x = nn.LayerNorm(epsilon=EPSILON, name="norm")(x)
        return x[:, :, int(vit.cls_token) :], stats


class M3ViT(nn.Module):
    """Trunk and decoders; see the module.

    Attributes:
      heads: task name -> channels.
      config: sizes of the trunk.
      decoder: see `mtjax.models.multitask_vit.decode`; PUP in the paper, and with `config.tam` a PUP it has to be.
    """

    heads: Mapping[str, int]
    config: M3ViTConfig = M3ViTConfig()
    decoder: Decoder = PUP

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, with_aux: bool = False
    ) -> Any:
        """Predicts maps.

        Args:
          batch: 'image' f[B, H, W, 3].
          task: static; compute this task's stream, gates and decoder only.
          train: dropout, gate noise and the training-only branch.
          with_aux: also return the routers' statistics.

        Returns:
          task name -> f[B, H, W, C] (and '<task>/tam_<level>', see the module); with `with_aux` a pair with
          {'block_<i>': RouterStats}, one stream per task asked for.
        """
        images, names = batch["image"], list(self.heads)
        asked = asked_tasks(self, task)
        trunk = M3ViTTrunk(self.config, len(names), name="trunk")
        tokens, stats = trunk(images, tasks=tuple(names.index(name) for name in asked), train=train)
        size, patch = images.shape[1:3], self.config.vit.patch
        branch = self.config.tam and (self.is_initializing() or (train and task is None))
        if not branch:
            outputs = decode(self.heads, self.decoder, tokens, asked, size, patch)
            return answer(outputs, task, with_aux, stats)
        outputs, levels = decode_with_features(self.heads, self.decoder, tokens, asked, size, patch)
        for level, features in enumerate(levels):
            auxiliary = TAM(self.heads, name=f"tam_{level}")(features, size)
            if train:
                outputs |= {f"{name}/tam_{level}": output for name, output in auxiliary.items()}
        return answer(outputs, task, with_aux, stats)


def m3vit_balance(weight: float = 0.01, *, config: M3ViTConfig | None = None) -> Callable:
    """M3ViT's auxiliary loss: importance and load of every gate, summed over the layers, on the loss of its task.

        w sum over layers of  CV^2(importance_t) + CV^2(load_t)

    Every task's gate is balanced by itself, which pushes each task to use all experts; `mtjax.nn.balance` has what was
    designed against that. A gate that all tasks share ('single') is balanced once and split equally between the losses.

    Args:
      weight: w.
      config: of the model; needed with `window` only, where a task is balanced over the experts of its window.

    Returns:
      `(aux, tasks) -> {task name: f[]}` for `mtjax.train.images.image_problem`; the tasks (or their names) in the order
      of the model's heads.
    """

    def regularizer(aux: Mapping[str, RouterStats], tasks: Sequence[Any]) -> dict[str, jax.Array]:
        names = [getattr(task, "name", task) for task in tasks]
        total = jnp.zeros(len(names))
        # jit returns dictionaries in the order of their keys, where block_11 comes before block_3.
        for layer, block in enumerate(sorted(int(name.removeprefix("block_")) for name in aux)):
            stats = aux[f"block_{block}"]
            visible = None if config is None else config.visible(layer, len(names))
            loss = importance_loss(stats, visible=visible) + load_loss(stats, visible=visible)
            if len(loss) not in (1, len(names)):
                raise ValueError(f"The model has {len(loss)} task streams, the tasks are {', '.join(names)}")
            total = total + (loss / len(names) if len(loss) == 1 else loss)
        return {name: weight * total[index] for index, name in enumerate(names)}

    return regularizer
