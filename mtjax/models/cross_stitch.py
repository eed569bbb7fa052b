r"""Encoder-focused multitask learning: T vision transformers, one per task, that exchange features after some blocks.

    cross-stitch   x'_t = sum_s a[t, s] * x_s                 a f[T, T, D], one T x T mixing matrix per channel
    NDDR           x'_t = sum_s x_s K[t, s]                   K f[T, T, D, D], a 1x1 convolution of all tasks' channels

Both start near the identity: weight `own` on a task's own features, the rest shared equally by the others'. Since every
encoder feeds every other, one task's prediction needs all T encoders up to the last exchange: that is the cost which
task-conditioned experts avoid (`mtjax.macs`).

Deviations: the published layers sit between the stages of convolutional networks; NDDR follows its convolution by batch
normalisation and ReLU, left out here because the features are the residual stream of a pre-norm transformer, whose next
block normalises them and which has to keep its sign.

References: Misra et al., "Cross-stitch Networks for Multi-task Learning", CVPR 2016, eq. 1 (one matrix per channel, as
in Vandenhende et al.'s code); Gao et al., "NDDR-CNN", CVPR 2019.

Letters: T tasks, B images, N tokens, D width, L blocks.

>>> exchange_points(12), exchange_points(3)
((2, 5, 8, 11), (0, 1, 2))
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.models.multitask_vit import Decoder, answer, asked_tasks, decode, stacked_apply
from mtjax.nn.decoders import PUP
from mtjax.nn.vit import EPSILON, Block, PatchEmbed, ViTConfig


def exchange_points(depth: int, stages: int = 4) -> tuple[int, ...]:
    """Blocks that end one of (at most) `stages` equal parts of the trunk; the last block is one of them."""
    stages = min(stages, depth)
    return tuple(round((stage + 1) * depth / stages) - 1 for stage in range(stages))


def _mixing(tasks: int, own: float) -> np.ndarray:
    """[T, T]: `own` on the diagonal, rows sum to one."""
    if tasks == 1:
        return np.ones((1, 1))
    return np.where(np.eye(tasks, dtype=bool), own, (1.0 - own) / (tasks - 1))


class CrossStitch(nn.Module):
    """x'_t = sum_s a[t, s] * x_s, per channel.

    Attributes:
      own: initial weight of a task's own features.
    """

    own: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, wanted: int | None = None) -> jax.Array:
        """x f[T, B, N, D] -> f[T, B, N, D], or f[1, B, N, D] of the static position `wanted`."""
        tasks, width = x.shape[0], x.shape[-1]
        init = np.repeat(_mixing(tasks, self.own)[:, :, None], width, axis=2)
        a = self.param("mixing", lambda key: jnp.asarray(init, jnp.float32))
        a = a if wanted is None else a[wanted : wanted + 1]
        return jnp.einsum("tsd,sbnd->tbnd", a, x)


class NDDR(nn.Module):
    """x'_t = [x_1; ...; x_T] K_t: a 1x1 convolution of the concatenated features.

    Attributes:
      own: initial weight of a task's own features, on the diagonal of its part of the kernel.
    """

    own: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, wanted: int | None = None) -> jax.Array:
        """x f[T, B, N, D] -> f[T, B, N, D], or f[1, B, N, D] of the static position `wanted`."""
        tasks, width = x.shape[0], x.shape[-1]
        init = _mixing(tasks, self.own)[:, :, None, None] * np.eye(width)
        kernel = self.param("kernel", lambda key: jnp.asarray(init, jnp.float32))  # [T out, T in, D, D]
        kernel = kernel if wanted is None else kernel[wanted : wanted + 1]
        flat = jnp.moveaxis(x, 0, -2).reshape(-1, tasks * width)
        matrix = kernel.transpose(1, 2, 0, 3).reshape(tasks * width, -1)
        return jnp.moveaxis((flat @ matrix).reshape(*x.shape[1:-1], -1, width), -2, 0)


class CrossStitchViT(nn.Module):
    """T encoders with exchanges; see the module.

    Attributes:
      heads: task name -> channels.
      config: sizes of every encoder (its `scan` is not supported: exchanges sit between blocks).
      decoder: see `mtjax.models.multitask_vit.decode`.
      fusion: 'cross_stitch' or 'nddr'.
      after: blocks after which features are exchanged; None: `exchange_points(depth)`.
      own: initial weight of a task's own features.
    """

    heads: Mapping[str, int]
    config: ViTConfig = ViTConfig()
    decoder: Decoder = PUP
    fusion: Literal["cross_stitch", "nddr"] = "cross_stitch"
    after: tuple[int, ...] | None = None
    own: float = 0.9

    def __post_init__(self):
        if self.config.scan:
            raise ValueError("CrossStitchViT runs its blocks one by one; config.scan must be False")
        if self.fusion not in ("cross_stitch", "nddr"):
            raise ValueError(f"fusion must be 'cross_stitch' or 'nddr', got {self.fusion!r}")
        outside = [block for block in self.after or () if not 0 <= block < self.config.depth]
        if outside:
            raise ValueError(f"after must name blocks 0..{self.config.depth - 1}, got {outside}")
        super().__post_init__()

    @property
    def exchanges(self) -> tuple[int, ...]:
        """Blocks after which features are exchanged."""
        return exchange_points(self.config.depth) if self.after is None else tuple(sorted(self.after))

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, with_aux: bool = False
    ) -> Any:
        """Predicts maps; see `MultitaskViT`. With `task`, all encoders run up to the last exchange, then one."""
        config, copies = self.config, len(self.heads)
        images, asked = batch["image"], asked_tasks(self, task)
        chosen = None if len(asked) == copies else list(self.heads).index(asked[0])
        last = self.exchanges[-1] if self.exchanges else -1

        def embed(module: nn.Module, images: jax.Array) -> jax.Array:
            return module(images)

        def run(block: nn.Module, x: jax.Array) -> jax.Array:
            return block(x, train=train)

        # Before the last exchange every encoder is needed, after it only those of the tasks asked for.
        patch_embed = PatchEmbed(config.patch, config.width, config.cls_token, name="patch_embed")
        x = stacked_apply(embed, copies, chosen if last < 0 else None)(patch_embed, images)
        sizes = {"num_heads": config.num_heads, "mlp_ratio": config.mlp_ratio, "dropout": config.dropout}
        for index, rate in enumerate(config.drop_path_rates):
            block = Block(**sizes, drop_path=rate, name=f"block_{index}")
            x = stacked_apply(run, copies, chosen if index > last else None, in_axis=0)(block, x)
            if index in self.exchanges:
                unit = {"cross_stitch": CrossStitch, "nddr": NDDR}[self.fusion](self.own, name=f"exchange_{index}")
                x = unit(x, chosen if index == last else None)
        norm = nn.LayerNorm(epsilon=EPSILON, name="norm")
        x = stacked_apply(embed, copies, chosen, in_axis=0)(norm, x)[:, :, int(config.cls_token) :]
        outputs = decode(self.heads, self.decoder, x, asked, images.shape[1:3], config.patch)
        return answer(outputs, task, with_aux, {})
