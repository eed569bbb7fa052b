r"""PAD-Net-like distillation: a first prediction per task, then gated messages between the features of the tasks.

On the last map X of a shared vision transformer:

    F_t   = block_t(X),     first_t = W_t F_t                        features, and a first prediction trained by them
    G_t   = sigmoid( conv_t(F_t) )                                   what the receiver lets in
    O_t   = F_t + G_t * sum_{s != t} conv_{t,s}(F_s)                 messages from the other tasks
    out_t = head_t(O_t)

In training the first predictions are outputs too, '<task>/first', and get the loss of their task: nothing else would
make F_s a feature *of task s*. Asking for one task still needs the features of all; only gates, first predictions and
heads of the others are saved. That is the price of decoder-focused models.

Reference: Xu, Ouyang, Wang and Sebe, "PAD-Net: Multi-Tasks Guided Prediction-and-Distillation Network for Simultaneous
Depth Estimation and Scene Parsing", CVPR 2018, the distillation with attention-guided message passing ("module C").
Messages are made from the features under the first predictions, as other reimplementations do. The head upsamples by
interpolation instead of deconvolution; layer normalization over channels instead of batch normalization.

Letters: T tasks, B images, h x w map, H x W image, D trunk width, C' decoder width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.models.static_decoders import trunk_maps
from mtjax.nn.decoders import resize_bilinear
from mtjax.nn.stacked import take
from mtjax.nn.stacked_convs import DenseHeads, StackedConv, StackedConvBlock, asked_for, neighbours
from mtjax.nn.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class PadNetConfig:
    """Sizes of the distillation network.

    Attributes:
      vit: the trunk; its last block is read.
      width: C'.
      message_side: of the kernels of gates and messages, 1 or 3.
      upsample: of the heads.
    """

    vit: ViTConfig = dataclasses.field(default_factory=ViTConfig)
    width: int = 32
    message_side: int = 3
    upsample: int = 4

    def __post_init__(self):
        for name in ("width", "upsample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.message_side not in (1, 3):
            raise ValueError(f"message_side must be 1 or 3, got {self.message_side}")

    @property
    def layers(self) -> tuple[int, ...]:
        """The block that is read."""
        return (self.vit.depth - 1,)


class Messages(nn.Module):
    """F f[T, B, h, w, C'] -> sum_{s != t} conv_{t,s}(F_s) for the receivers t asked for, f[len(index), B, h, w, C'].

    The kernel [T receivers, T - 1 sources, side^2 C', C'] holds the other tasks in order. With zeros where a task would
    send to itself, all messages are one product of two matrices.

    Attributes:
      features: C'.
      side: of the kernels.
    """

    features: int
    side: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, index: tuple[int, ...] | None = None) -> jax.Array:
        tasks, grid = len(x), x.shape[1:4]
        patches = jnp.moveaxis(neighbours(x, self.side), 0, -2)  # [B, h, w, T, side^2 C']
        channels = patches.shape[-1]
        # Scaled down, as a receiver adds up T - 1 messages.
        init = nn.initializers.variance_scaling(1 / max(1, tasks - 1), "fan_in", "truncated_normal", batch_axis=(0, 1))
        kernel = take(self.param("kernel", init, (tasks, tasks - 1, channels, self.features)), index)
        receivers = np.arange(tasks) if index is None else np.asarray(index)
        sources = np.arange(tasks)[None]
        # Where source s stands among the others of receiver t; the last place, of zeros, is its own.
        place = np.where(sources == receivers[:, None], tasks - 1, sources - (sources > receivers[:, None]))
        kernel = jnp.concatenate([kernel, jnp.zeros_like(kernel[:, :1])], axis=1)
        kernel = kernel[np.arange(len(receivers))[:, None], place]
        weight = jnp.moveaxis(kernel.reshape(len(kernel), tasks * channels, self.features), 0, 1)
        flat = patches.reshape(-1, tasks * channels) @ weight.reshape(tasks * channels, -1)
        return jnp.moveaxis(flat.reshape(*grid, len(kernel), self.features), -2, 0)


class PadNet(nn.Module):
    """The model; see the module.

    Attributes:
      heads: task name -> channels; at least two.
      config: sizes.

    >>> model = PadNet({"depth": 1, "normals": 3}, PadNetConfig(ViTConfig(8, 16, 2, 2), width=8))
    >>> batch = {"image": jnp.zeros((2, 16, 24, 3))}
    >>> outputs, _ = jax.eval_shape(lambda key: model.init_with_output(key, batch, train=True), jax.random.key(0))
    >>> {name: y.shape for name, y in outputs.items()}
    {'depth': (2, 16, 24, 1), 'depth/first': (2, 16, 24, 1), 'normals': (2, 16, 24, 3), 'normals/first': (2, 16, 24, 3)}
    """

    heads: Mapping[str, int]
    config: PadNetConfig = PadNetConfig()

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, with_aux: bool = False
    ) -> Any:
        """Predicts the tasks.

        Args:
          batch: 'image' f[B, H, W, 3].
          task: static; this task's first prediction, gate and head only (the features of all tasks are needed).
          train: also return the first predictions; dropout of the trunk.
          with_aux: also return what the receivers let in.

        Returns:
          {task: f32[B, H, W, channels]}, in training with '<task>/first' of the same shapes; or a pair of this and
          {'gates': f[T, B, h, w, C']}. Entries are those of the tasks asked for.
        """
        config, images = self.config, batch["image"]
        tasks, size = len(self.heads), images.shape[1:3]
        if tasks < 2:
            raise ValueError(f"heads must name at least two tasks to exchange messages, got {list(self.heads)}")
        names, index = asked_for(self.heads, task)
        (x,) = trunk_maps(config, images, train=train).values()
        features = StackedConvBlock(tasks, config.width, name="features")(x)
        first = {}
        for position, (name, channels) in enumerate(self.heads.items()):
            predict = nn.Dense(channels, name=f"first_{name}")
            if (train and name in names) or self.is_initializing():
                row = features[position]
                y = predict(row.reshape(-1, config.width)).reshape(*row.shape[:-1], channels)
                first[f"{name}/first"] = resize_bilinear(y, size)
        own = features if index is None else features[jnp.asarray(index)]
        gates = nn.sigmoid(StackedConv(tasks, config.width, config.message_side, name="gate")(own, index))
        distilled = own + gates * Messages(config.width, config.message_side, name="messages")(features, index)
        heads = DenseHeads(self.heads, config.width, config.upsample, name="heads")
        outputs = heads(distilled, size, task=task)
        if train:
            outputs |= {f"{name}/first": first[f"{name}/first"] for name in names}
        return (outputs, {"gates": gates}) if with_aux else outputs
