r"""Mod-Squad: a vision transformer made of modules, experts in the attention and in the MLP that tasks share or own.

    for every block:   x_t <- x_t + v_t                           task t's vector, on all its tokens
                       x_t <- x_t + MoA(LN x_t; gate_t)           a head is an expert: every token picks K of them
                       x_t <- x_t + MoE-MLP(LN x_t; gate_t)       K of E two-layer nets, weighed by their gate values

Each task has a gate of its own in every layer, a vector, and a head; experts belong to nobody. Because the vector
enters before the first block, the trunk runs once per task. Layout 'twice': mixture of attention heads in even blocks,
of MLPs in odd blocks, the plain counterpart in the other half of each block. An expert's hidden width is
mlp_ratio D / K, so that a token pays exactly the multiply-accumulates of the dense MLP; an attention expert has
d_h = 2 D / H channels, K = H of them are picked, and keys and values are one head that all experts share.

A batch has one of two forms:

    {'image': f[B, H, W, 3]}                      the same images for every task
    {task name: {'image': f[B, H, W, 3]}, ...}    every task its own images: T streams in one program

What is learned is modular on purpose: `mtjax.models.mod_squad_surgery` pulls one task out, and adds experts and tasks
without touching the old ones; `reach` is how a model knows which experts an old task's gate can address.

References: Chen et al., "Mod-Squad: Designing Mixture of Experts As Modular Multi-Task Learners", CVPR 2023; Chen et
al., "An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training", 2023. Layers follow the
published code of the first; the second has none, and what it adds (running joint, growth) is built from its abstract.
Deviations: nothing is added to the gates' softmax (1e-4 in the code); a task has a final layer norm of its own (one for
all dense tasks there); kernels are Xavier-uniform.

Letters: T task streams, B images, N tokens, D width, E experts, K experts per token, H heads, L blocks.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.nn.attention import FeedForward
from mtjax.nn.balance import RouterStats
from mtjax.nn.decoders import LinearUnpatch
from mtjax.nn.moe import Dispatch
from mtjax.nn.moe_attention import MoEAttention
from mtjax.nn.moe_layer import MoEMlp
from mtjax.nn.routers import RouterConfig
from mtjax.nn.vit import (
    EPSILON,
    PatchEmbed,
    ViTConfig,
    add_branch,
    attention_half,
    patch_grid,
    recomputed,
    to_map,
    xavier,
)

PyTree = Any
Decoder = Callable[..., nn.Module] | Mapping[str, Callable[..., nn.Module]]
Layout = Literal["twice", "both", "mlp", "attention"]
LAYOUTS = ("twice", "both", "mlp", "attention")


class Layer(NamedTuple):
    """One layer of experts.

    Attributes:
      name: path of its parameters in the trunk, such as 'block_1/mlp'; also the key of its statistics.
      num_experts: E.
      top_k: K.
      ghosts: gate columns whose experts were taken out.
      reach: for every task, how many experts its gate addresses, the first ones; None: all.
    """

    name: str
    num_experts: int
    top_k: int
    ghosts: int = 0
    reach: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class ModSquadConfig:
    """Sizes of the trunk.

    Attributes:
      vit: the plain transformer that it is compared with: patch, width, depth, heads, mlp_ratio.
      layout: where experts are: 'twice' (attention in even blocks, MLP in odd ones), 'both', 'mlp' or 'attention' in
        every block.
      num_experts: E of the MLP layers.
      top_k: K of the MLP layers.
      expert_hidden: hidden width of an MLP expert; None: mlp_ratio D / K, the same cost per token as the dense MLP.
        Given, it may cost less (a trained model with a smaller K), never more.
      attention_experts: E of the attention layers.
      attention_top_k: K of the attention layers; None: the number of heads.
      head_dim: d_h of an attention expert; None: 2 D / H.
      noise_std, learned_noise, zero_init: of the gates (see `RouterConfig`). Mod-Squad's start at zero and learn their
        noise, and have none when mutual information is maximised.
      dispatch: how tokens get to experts. All streams are routed together, so capacity counts over all tasks.
      counts: E of every layer of experts in order, where layers differ (after extraction); None: as above.
      ghosts: gate columns of every layer whose experts were taken out; they stay in the softmax. None: none.
      reach: for every task, how many experts of every layer its gates address, the first ones; None: all.

    Raises:
      ValueError: if sizes do not fit each other.
    """

    vit: ViTConfig = dataclasses.field(default_factory=ViTConfig)
    layout: Layout = "twice"
    num_experts: int = 16
    top_k: int = 4
    expert_hidden: int | None = None
    attention_experts: int = 12
    attention_top_k: int | None = None
    head_dim: int | None = None
    noise_std: float = 0.0
    learned_noise: bool = False
    zero_init: bool = False
    dispatch: Dispatch = dataclasses.field(default_factory=Dispatch)
    counts: tuple[int, ...] | None = None
    ghosts: tuple[int, ...] | None = None
    reach: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.vit.scan:
            raise ValueError("vit.scan: blocks differ in kind and in their number of experts, and cannot be scanned")
        dense, width = round(self.vit.mlp_ratio * self.vit.width), self.vit.width
        if self.expert_hidden is None and dense % self.top_k:
            raise ValueError(
                f"top_k={self.top_k} must divide the dense hidden width mlp_ratio * width = {dense}, so that K experts "
                "cost what the dense MLP costs"
            )
        if self.expert_hidden is not None and self.expert_hidden * self.top_k > dense:
            raise ValueError(
                f"top_k * expert_hidden = {self.top_k} * {self.expert_hidden} exceeds the dense hidden width {dense}"
            )
        if self.head_dim is None and 2 * width % self.vit.num_heads:
            raise ValueError(f"vit.num_heads={self.vit.num_heads} must divide 2 * width = {2 * width}")
        names = [name for name, _ in _layer_kinds(self)]
        for row in (self.counts, self.ghosts, *(self.reach or ())):
            if row is not None and len(row) != len(names):
                raise ValueError(f"counts, ghosts and reach need one number for each of {', '.join(names)}, got {row}")
        for layer in self.layers:
            least = min((layer.num_experts, *(layer.reach or ())))
            if not 1 <= layer.top_k <= least:
                raise ValueError(f"{layer.name} has gates that pick {layer.top_k} of {least} experts")

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of experts in order."""
        heads = self.attention_top_k or self.vit.num_heads
        sizes = {"attention": (self.attention_experts, heads), "mlp": (self.num_experts, self.top_k)}
        layers = []
        for index, (name, kind) in enumerate(_layer_kinds(self)):
            experts, top_k = sizes[kind]
            experts = experts if self.counts is None else self.counts[index]
            reach = None if self.reach is None else tuple(row[index] for row in self.reach)
            layers.append(Layer(name, experts, top_k, 0 if self.ghosts is None else self.ghosts[index], reach))
        return tuple(layers)

    @property
    def hidden(self) -> int:
        """Hidden width of an MLP expert."""
        return self.expert_hidden or round(self.vit.mlp_ratio * self.vit.width) // self.top_k

    def router(self, layer: Layer) -> RouterConfig:
        """How a layer's tokens choose."""
        visible = None
        if layer.reach is not None:
            visible = [[expert < reach for expert in range(layer.num_experts)] for reach in layer.reach]
        return RouterConfig(
            "multi_gate",
            layer.num_experts,
            layer.top_k,
            noise_std=self.noise_std,
            learned_noise=self.learned_noise,
            zero_init=self.zero_init,
            visible=visible,
            ghosts=layer.ghosts,
        )


def _layer_kinds(config: ModSquadConfig) -> list[tuple[str, str]]:
    """(name, 'attention' or 'mlp') of every layer of experts."""
    kinds = []
    for index in range(config.vit.depth):
        if config.layout in ("both", "attention") or (config.layout == "twice" and index % 2 == 0):
            kinds.append((f"block_{index}/attention", "attention"))
        if config.layout in ("both", "mlp") or (config.layout == "twice" and index % 2 == 1):
            kinds.append((f"block_{index}/mlp", "mlp"))
    return kinds


class ModSquadBlock(nn.Module):
    """A pre-norm block whose halves are mixtures of experts or plain.

    Attributes:
      config: of the trunk.
      index: of the block.
      num_tasks: gates per layer.
    """

    config: ModSquadConfig
    index: int
    num_tasks: int

    @property
    def num_heads(self) -> int:
        """Of the plain attention."""
        return self.config.vit.num_heads

    @property
    def dropout(self) -> float:
        """Of the plain halves."""
        return self.config.vit.dropout

    @nn.compact
    def __call__(self, x: jax.Array, *, tasks: tuple[int, ...], train: bool = False) -> tuple[jax.Array, dict]:
        """x f[T, B, N, D] -> the same and {layer name: RouterStats}."""
        config, vit = self.config, self.config.vit
        layers = {layer.name: layer for layer in config.layers}
        rate, stats = vit.drop_path_rates[self.index], {}

        layer = layers.get(f"block_{self.index}/attention")
        if layer is None:
            u = attention_half(self, x, rate, train)
        else:
            attention = MoEAttention(
                router=config.router(layer),
                num_tasks=self.num_tasks,
                head_dim=config.head_dim or 2 * vit.width // vit.num_heads,
                dispatch=config.dispatch,
                name="attention",
            )
            normed = nn.LayerNorm(epsilon=EPSILON, name="norm_1")(x)
            branch, stats[layer.name] = attention(normed, tasks=tasks, train=train)
            u = add_branch(self, x, branch, rate, train)

        normed = nn.LayerNorm(epsilon=EPSILON, name="norm_2")(u)
        layer = layers.get(f"block_{self.index}/mlp")
        if layer is None:
            dense = round(vit.mlp_ratio * vit.width)
            branch = FeedForward(dense, vit.dropout, xavier, name="feed_forward")(normed, train=train)
        else:
            mlp = MoEMlp(
                router=config.router(layer),
                hidden=config.hidden,
                num_tasks=self.num_tasks,
                dispatch=config.dispatch,
                name="mlp",
            )
            branch, stats[layer.name] = mlp(normed, tasks=tasks, train=train)
        return add_branch(self, u, branch, rate, train), stats


class ModSquadTrunk(nn.Module):
    """Patch embedding and blocks; one stream of tokens per task asked for.

    Attributes:
      config: sizes.
      num_tasks: tasks that have a vector and gates.
    """

    config: ModSquadConfig
    num_tasks: int

    @nn.compact
    def __call__(self, images: jax.Array, *, tasks: tuple[int, ...], train: bool = False) -> tuple[jax.Array, dict]:
        """Tokens of every stream.

        Args:
          images: f[T, B, H, W, C], or f[1, B, H, W, C] if all streams see the same: they are then embedded once.
          tasks: indices of the T streams' tasks, static.
          train: dropout and gate noise on (rng collections 'dropout', 'gate').

        Returns:
          f[T, B, N, D] after the last block, not normalised, without the class token; {layer name: RouterStats}.
        """
        config, vit = self.config, self.config.vit
        vectors = self.param("task_vectors", nn.initializers.normal(0.02), (self.num_tasks, vit.width))
        vectors = vectors[jnp.asarray(tasks)][:, None, None]
        embed = PatchEmbed(vit.patch, vit.width, vit.cls_token, name="patch_embed")
        flat = embed(images.reshape(-1, *images.shape[2:]))
        x = flat.reshape(*images.shape[:2], *flat.shape[1:])

        def run(block: nn.Module, x: jax.Array) -> tuple[jax.Array, dict]:
            return block(x + vectors, tasks=tasks, train=train)

        run = recomputed(run, vit.remat)
        stats: dict[str, RouterStats] = {}
        for index in range(vit.depth):
            x, new = run(ModSquadBlock(config, index, self.num_tasks, name=f"block_{index}"), x)
            stats |= new
        return x[..., int(vit.cls_token) :, :], stats


class PooledLinear(nn.Module):
    """The head of classification: a linear map of the mean token.

    Attributes:
      channels: C, classes.
    """

    channels: int

    @nn.compact
    def __call__(self, tokens: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        """f[..., h, w, D] -> f[..., C]; the size is ignored."""
        del size
        return nn.Dense(self.channels, kernel_init=xavier, name="out")(tokens.mean((-3, -2)))


class TaskHead(nn.Module):
    """What is a task's own after the trunk: a layer norm and a decoder.

    Attributes:
      channels: C.
      decoder: `decoder(channels=C, name=...)(map f[B, h, w, D], (H, W)) -> output`.
      patch: side of a patch, pixels.
    """

    channels: int
    decoder: Callable[..., nn.Module]
    patch: int

    @nn.compact
    def __call__(self, tokens: jax.Array, size: tuple[int, int]) -> jax.Array:
        """tokens f[B, N, D] of images of `size` (H, W) -> the task's output."""
        features = to_map(nn.LayerNorm(epsilon=EPSILON, name="norm")(tokens), patch_grid(size, self.patch))
        return self.decoder(channels=self.channels, name="decoder")(features, size)


class ModSquad(nn.Module):
    """The modular model; see the module.

    Attributes:
      config: sizes of the trunk.
      heads: task name -> channels C, in the order of gates and vectors.
      decoder: of all tasks, or by name: `LinearUnpatch`, `PooledLinear` (classification), `HeatmapHead` (detection).
    """

    config: ModSquadConfig
    heads: Mapping[str, int]
    decoder: Decoder = LinearUnpatch

    @nn.compact
    def __call__(
        self,
        batch: Mapping[str, Any],
        *,
        task: str | Sequence[str] | None = None,
        train: bool = False,
        with_aux: bool = False,
    ) -> Any:
        """Predictions at image resolution.

        Args:
          batch: {'image': f[B, H, W, 3]}, or {task name: {'image': f[B, H, W, 3]}} with images of one size and number.
          task: static; compute this task only (or these). None: all. At initialisation parameters of all are made.
          train: dropout and gate noise on.
          with_aux: also return the layers' statistics.

        Returns:
          {task name: output}; with `with_aux` a pair with {layer name: RouterStats}, whose streams are in the order of
          the tasks asked for.
        """
        asked, names = self.indices(task), tuple(self.heads)
        chosen = tuple(range(len(names))) if self.is_initializing() else asked
        images = batch_images(batch, [names[index] for index in chosen])
        tokens, stats = self._trunk(images, chosen, train)
        outputs = {}
        # The heads differ in kind and size, so this is a loop at trace time.
        for position, index in enumerate(chosen):
            output = self.head(names[index])(tokens[position], images.shape[2:4])
            if index in asked:
                outputs[names[index]] = output
        return (outputs, stats) if with_aux else outputs

    def head(self, task: str, **fields: Any) -> TaskHead:
        """The head of a task; its parameters are the model's 'head_<task>'."""
        decoder = self.decoder[task] if isinstance(self.decoder, Mapping) else self.decoder
        return TaskHead(self.heads[task], decoder, self.config.vit.patch, **{"name": f"head_{task}", **fields})

    def indices(self, task: str | Sequence[str] | None) -> tuple[int, ...]:
        """Indices of the tasks that a name, several or None (all) stand for.

        Raises:
          ValueError: if the model has no such task.
        """
        names = list(self.heads)
        wanted = names if task is None else [task] if isinstance(task, str) else list(task)
        unknown = [name for name in wanted if name not in names]
        if unknown or not wanted:
            raise ValueError(f"task must name some of {', '.join(names)}, got {task!r}")
        return tuple(names.index(name) for name in wanted)

    def _trunk(self, images: jax.Array, tasks: tuple[int, ...], train: bool) -> tuple[jax.Array, dict]:
        """The trunk's streams. Tasks of different reach never meet in a layer: whatever a new task's tokens do, they
        cannot fill an old expert's queue, and old tasks run the very program that they were trained in."""
        trunk = ModSquadTrunk(self.config, len(self.heads), name="trunk")
        reach = self.config.reach
        groups: dict[Any, list[int]] = {}
        for position, index in enumerate(tasks):
            groups.setdefault(None if reach is None else reach[index], []).append(position)
        order = [position for positions in groups.values() for position in positions]
        back = np.argsort(order)
        streams, stats = [], []
        for positions in groups.values():
            own = images if len(images) == 1 else images[np.asarray(positions)]
            group = trunk(own, tasks=tuple(tasks[position] for position in positions), train=train)
            streams.append(group[0])
            stats.append(group[1])
        if len(groups) == 1:
            return streams[0], stats[0]
        # Only the number of tokens per stream has no axis of streams.
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[back] if leaves[0].ndim else leaves[0], *stats)
        return jnp.concatenate(streams)[back], joined


def batch_images(batch: Mapping[str, Any], names: Sequence[str]) -> jax.Array:
    """f[1, B, H, W, C] if the tasks share images, f[T, B, H, W, C] of the named tasks if not."""
    if "image" in batch:
        return jnp.asarray(batch["image"])[None]
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(f"The batch has neither 'image' nor images of {', '.join(missing)}")
    return jnp.stack([jnp.asarray(batch[name]["image"]) for name in names])
