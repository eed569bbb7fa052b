r"""TaskExpert: mixture-of-experts decoders on a dense trunk, with gates per task and image and a memory of features.

After each of some blocks l of a shared vision transformer, X_l its tokens as a map:

    F_n = E_n(X_l)                       n = 1..N experts (convolution, norm, GELU), shared by all tasks
    g_t = softmax( gate_t(X_l) )         N + 1 numbers for each task *and image*, from local and global context
    z_t = sum_n g_{t,n} F_n + g_{t,N+1} R_t(M_t)            the memory is one more expert inside the softmax
    M_t <- block_t(z_t)                  ('replace'), or M_t + W_t block_t(z_t) ('residual')

The first block has no memory yet, hence N numbers. Predictions are made from the last memory: bilinear upsampling,
3 x 3 convolution, norm, GELU, 1 x 1 convolution, resized to the image.

Reference: Ye and Xu, "TaskExpert: Dynamically Assembling Multi-Task Representations with Memorial Mixture-of-Experts",
ICCV 2023. Its code was not found, so that sizes, the reader R (here 1 x 1 convolution, norm, GELU: what makes the
memory look like an expert's map) and the order inside the blocks are this project's and unverified. Layer
normalization over channels stands where the paper has batch normalization. No balancing loss is described there;
`gate_balance` is the option that MLoRE (Yang et al., CVPR 2024, weight 3e-4 to 5e-4) adds.

Letters: T task streams, B images, h x w map, H x W image, D trunk width, C' expert width, N experts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.models.static_decoders import check_layers, spaced_layers, trunk_maps
from mtjax.nn.context_gate import ContextGate
from mtjax.nn.stacked_convs import DenseHeads, StackedConv, StackedConvBlock, asked_for
from mtjax.nn.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class TaskExpertConfig:
    """Sizes of TaskExpert.

    Attributes:
      vit: the trunk.
      layers: numbers of the blocks after which a mixture is inserted; None for four, evenly spaced.
      num_experts: N.
      width: C', channels of experts, memories and heads.
      expert_side: of the experts' kernels, 1 or 3.
      gate_hidden: width inside the gates; None for the trunk's.
      memory: whether there is a feature memory. Without it the task's features are a learned, static average of those
        of the inserted layers (an untrained one is their mean), so that every layer still counts.
      memory_update: 'replace' or 'residual'.
      upsample: of the head.

    Raises:
      ValueError: if a size or name is not one of these.
    """

    vit: ViTConfig = dataclasses.field(default_factory=ViTConfig)
    layers: tuple[int, ...] | None = None
    num_experts: int = 5
    width: int = 32
    expert_side: int = 3
    gate_hidden: int | None = None
    memory: bool = True
    memory_update: str = "replace"
    upsample: int = 4

    def __post_init__(self):
        layers = spaced_layers(self.vit.depth) if self.layers is None else self.layers
        object.__setattr__(self, "layers", check_layers(layers, self.vit.depth))
        for name in ("num_experts", "width", "upsample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.expert_side not in (1, 3):
            raise ValueError(f"expert_side must be 1 or 3, got {self.expert_side}")
        if self.memory_update not in ("replace", "residual"):
            raise ValueError(f"memory_update must be 'replace' or 'residual', got {self.memory_update!r}")


class GateStats(NamedTuple):
    """Gates of one inserted layer.

    Attributes:
      gates: f[T, B, N] in the first layer and without memory, else f[T, B, N + 1] with the memory's share last; rows
        sum to one. T are the tasks asked for, in the order of the heads.
    """

    gates: jax.Array


def gate_entropy(stats: GateStats) -> jax.Array:
    """Entropy of each image's gate, -sum_n g_n log g_n, in nats: f[T, B].

    >>> print(gate_entropy(GateStats(jnp.full((1, 1, 4), 0.25))).round(3))  # log 4
    [[1.386]]
    """
    floor = jnp.finfo(stats.gates.dtype).tiny  # keeps the gradient finite at a gate that underflowed to 0
    return -(stats.gates * jnp.log(jnp.maximum(stats.gates, floor))).sum(-1)


def gate_variance(stats: GateStats) -> jax.Array:
    """Variance of each gate over the images, f[T, N]; zero where 'dynamic' gating is not happening."""
    return stats.gates.var(axis=1)


def gate_balance(stats: GateStats) -> jax.Array:
    """CV^2 of the mean gates over experts, (std / mean)^2 of mean_b g_{t,b,n}, for each task: f[T].

    >>> gate_balance(GateStats(jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]))).tolist()
    [0.0, 1.0]
    """
    mean = stats.gates.mean(axis=1)
    return mean.var(-1) / mean.mean(-1) ** 2


class MemorialMixture(nn.Module):
    """One inserted mixture: (X f[B, h, w, D], M f[T, B, h, w, C'] or None) -> (z f[T, B, h, w, C'], GateStats).

    Attributes:
      num_tasks: tasks that have parameters.
      config: sizes.
    """

    num_tasks: int
    config: TaskExpertConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array | None, *, index: tuple[int, ...] | None = None
    ) -> tuple[jax.Array, GateStats]:
        """Mixes experts and memory for the tasks `index` (static; None: all), and decodes the result."""
        config, tasks = self.config, self.num_tasks
        maps = StackedConvBlock(config.num_experts, config.width, config.expert_side, name="experts")(x)
        choices = config.num_experts + (memory is not None)
        gate = ContextGate(tasks, choices, config.gate_hidden, name="gate")
        gates = jax.nn.softmax(gate(x, tasks=index), axis=-1)
        # g F over all experts at once: the experts' maps are never copied per task.
        z = jnp.einsum("tbn,nbhwc->tbhwc", gates[..., : config.num_experts], maps)
        if memory is not None:
            read = StackedConvBlock(tasks, config.width, 1, name="read")(memory, index)
            z = z + gates[..., -1][:, :, None, None, None] * read
        return StackedConvBlock(tasks, config.width, name="decode")(z, index), GateStats(gates)


class TaskExpertDecoder(nn.Module):
    """Maps of the inserted layers to predictions; see the module.

    Attributes:
      heads: task name -> channels.
      config: sizes.
    """

    heads: Mapping[str, int]
    config: TaskExpertConfig

    @nn.compact
    def __call__(
        self, maps: Mapping[int, jax.Array], size: tuple[int, int], *, task: str | None = None
    ) -> tuple[dict[str, jax.Array], dict[str, GateStats]]:
        """maps {layer: f[B, h, w, D]} -> ({task: f[B, H, W, channels]}, {'block_<layer>': GateStats})."""
        config, tasks = self.config, len(self.heads)
        index = asked_for(self.heads, task)[1]
        memory, every, stats = None, [], {}
        for layer in config.layers:
            mixture = MemorialMixture(tasks, config, name=f"mixture_{layer}")
            z, stats[f"block_{layer}"] = mixture(maps[layer], memory, index=index)
            if not config.memory:
                every.append(z)
            elif memory is None or config.memory_update == "replace":
                memory = z
            else:
                memory = memory + StackedConv(tasks, config.width, 1, name=f"write_{layer}")(z, index)
        if not config.memory:
            weights = self.param("layer_mix", nn.initializers.zeros_init(), (tasks, len(every)))
            weights = jax.nn.softmax(weights if index is None else weights[jnp.asarray(index)], axis=-1)
            memory = jnp.einsum("tl,ltbhwc->tbhwc", weights, jnp.stack(every))
        heads = DenseHeads(self.heads, config.width, config.upsample, name="heads")
        return heads(memory, size, task=task), stats


class TaskExpert(nn.Module):
    """The model; see the module.

    With `task` the trunk and the experts, which are shared, run as always; of the gates, memories and heads only this
    task's are computed.

    Attributes:
      heads: task name -> channels.
      config: sizes.

    >>> model = TaskExpert({"depth": 1, "edge": 1}, TaskExpertConfig(ViTConfig(8, 16, 2, 2), num_experts=3, width=8))
    >>> batch = {"image": jnp.zeros((2, 16, 24, 3))}
    >>> (outputs, stats), _ = jax.eval_shape(
    ...     lambda key: model.init_with_output(key, batch, with_aux=True), jax.random.key(0)
    ... )
    >>> outputs["edge"].shape, stats["block_0"].gates.shape, stats["block_1"].gates.shape
    ((2, 16, 24, 1), (2, 2, 3), (2, 2, 4))
    """

    heads: Mapping[str, int]
    config: TaskExpertConfig = TaskExpertConfig()

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, with_aux: bool = False
    ) -> Any:
        """Predicts the tasks.

        Args:
          batch: 'image' f[B, H, W, 3].
          task: static; compute this task only.
          train: dropout of the trunk.
          with_aux: also return the gates.

        Returns:
          {task: f32[B, H, W, channels]}, or (that, {'block_<layer>': GateStats}).
        """
        maps = trunk_maps(self.config, batch["image"], train=train)
        decoder = TaskExpertDecoder(self.heads, self.config, name="decoder")
        outputs, stats = decoder(maps, batch["image"].shape[1:3], task=task)
        return (outputs, stats) if with_aux else outputs
