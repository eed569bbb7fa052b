r"""MTAN-like attention: each task selects from the features of a shared trunk by soft masks at several depths.

At each selected block l of a shared vision transformer, with u_l the map that enters it and p_l the one that leaves it:

    a_t = sigmoid( norm( W''_t GELU( norm( W'_t [u_l; e_t] ) ) ) )      mask in (0, 1), one number per pixel and channel
    e_t <- f_l( a_t * p_l )                                             f_l: 3 x 3 convolution, norm, GELU, shared

e_t is absent from the first mask. The last e_t is the task's feature; all of them are what the published network pools
and hands on. The masks are the only parameters a task has in the trunk.

Reference: Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, equations 1 and 2, which
builds on SegNet. On a transformer all maps have one size, so that f does not pool, and u and p are the input and output
of a block instead of two convolutions of a stage. Layer normalization over channels instead of batch normalization, and
GELU instead of ReLU.

Letters: T task streams, B images, h x w map, H x W image, D width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.models.static_decoders import check_layers, spaced_layers
from mtjax.nn.stacked import StackedLayerNorm
from mtjax.nn.stacked_convs import DenseHeads, StackedConv, StackedConvBlock, asked_for
from mtjax.nn.vit import ViT, ViTConfig, patch_grid, to_map


@dataclasses.dataclass(frozen=True)
class MTANConfig:
    """Sizes of the attention network.

    Attributes:
      vit: the trunk.
      layers: numbers of the blocks that are masked; None for four, evenly spaced.
      hidden: channels between the two convolutions of a mask.
      head_width: channels of the heads.
      upsample: of the heads.
    """

    vit: ViTConfig = dataclasses.field(default_factory=ViTConfig)
    layers: tuple[int, ...] | None = None
    hidden: int = 32
    head_width: int = 32
    upsample: int = 4

    def __post_init__(self):
        layers = spaced_layers(self.vit.depth) if self.layers is None else self.layers
        object.__setattr__(self, "layers", check_layers(layers, self.vit.depth))
        for name in ("hidden", "head_width", "upsample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class TaskMasks(nn.Module):
    """Masks of all tasks at one depth: 1 x 1 convolution, norm, GELU, 1 x 1 convolution, norm, sigmoid.

    Attributes:
      num_tasks: tasks that have parameters.
      hidden: channels in between.
      features: channels of the mask.
    """

    num_tasks: int
    hidden: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, index: tuple[int, ...] | None = None) -> jax.Array:
        """x f[T, B, h, w, C], or f[B, h, w, C] when all tasks read the same -> f[T, B, h, w, features] in (0, 1)."""
        x = StackedConvBlock(self.num_tasks, self.hidden, 1, name="reduce")(x, index)
        y = StackedConv(self.num_tasks, self.features, 1, name="expand")(x, index)
        flat = StackedLayerNorm(self.num_tasks, name="norm")(y.reshape(len(y), -1, self.features), index)
        return nn.sigmoid(flat).reshape(y.shape)


class MTAN(nn.Module):
    """The model; see the module.

    Attributes:
      heads: task name -> channels.
      config: sizes.

    >>> model = MTAN({"depth": 1, "edge": 1}, MTANConfig(ViTConfig(8, 16, 3, 2), layers=(0, 2), hidden=8, head_width=8))
    >>> batch = {"image": jnp.zeros((2, 16, 24, 3))}
    >>> (outputs, masks), _ = jax.eval_shape(
    ...     lambda key: model.init_with_output(key, batch, with_aux=True), jax.random.key(0)
    ... )
    >>> outputs["edge"].shape, {name: mask.shape for name, mask in masks.items()}
    ((2, 16, 24, 1), {'block_0': (2, 2, 2, 3, 16), 'block_2': (2, 2, 2, 3, 16)})
    """

    heads: Mapping[str, int]
    config: MTANConfig = MTANConfig()

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, with_aux: bool = False
    ) -> Any:
        """Predicts the tasks.

        Args:
          batch: 'image' f[B, H, W, 3].
          task: static; the trunk, and this task's masks and head only.
          train: dropout of the trunk.
          with_aux: also return the masks.

        Returns:
          {task: f32[B, H, W, channels]}, or (that, {'block_<layer>': masks f[T, B, h, w, D]}).
        """
        config, images = self.config, batch["image"]
        grid, width = patch_grid(images.shape[1:3], config.vit.patch), config.vit.width
        tokens = ViT(config.vit, name="trunk")(images, train=train)
        index = asked_for(self.heads, task)[1]
        selected, aux = None, {}
        for layer in config.layers:
            # The first block's input, patches without context, would tell a mask little: its output stands in.
            before, after = to_map(tokens[max(0, layer - 1)], grid), to_map(tokens[layer], grid)
            reads = before
            if selected is not None:
                shared = jnp.broadcast_to(before[None], (len(selected), *before.shape))
                reads = jnp.concatenate([shared, selected], axis=-1)
            mask = TaskMasks(len(self.heads), config.hidden, width, name=f"masks_{layer}")(reads, index)
            aux[f"block_{layer}"] = mask
            masked = (mask * after[None]).reshape(-1, *after.shape[1:])
            conv = StackedConvBlock(1, width, name=f"shared_{layer}")  # one convolution for the streams of all tasks
            selected = conv(masked)[0].reshape(mask.shape)
        heads = DenseHeads(self.heads, config.head_width, config.upsample, name="heads")
        outputs = heads(selected, images.shape[1:3], task=task)
        return (outputs, aux) if with_aux else outputs
