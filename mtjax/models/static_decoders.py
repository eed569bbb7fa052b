r"""Static dense decoders on a vision transformer: the baselines of TaskExpert, with decoders of matched size.

    z_t = block_t( [X_l for l in layers] ),    z_t <- block_t(z_t) `depth - 1` times,    out_t = head_t(z_t)

With one layer (the last) this is a convolutional decoder per task on a shared trunk, i.e. the usual dense multitask
ViT; with several layers their maps are concatenated. Nothing depends on the image except the features themselves.

`match_width` finds the width at which a decoder has as many parameters as another, so that what is compared is the
mechanism and not the size.

Letters: T tasks, B images, h x w map, H x W image, D trunk width, C' decoder width.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.stacked_convs import DenseHeads, StackedConvBlock, asked_for
from mtjax.nn.vit import ViT, ViTConfig, patch_grid, to_map


def spaced_layers(depth: int, count: int = 4) -> tuple[int, ...]:
    """Numbers of `count` evenly spaced blocks that end with the last one (all of them if there are fewer).

    >>> spaced_layers(12), spaced_layers(24), spaced_layers(3)
    ((2, 5, 8, 11), (5, 11, 17, 23), (0, 1, 2))
    """
    count = min(depth, count)
    return tuple(round((i + 1) * depth / count) - 1 for i in range(count))


def check_layers(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The block numbers, if they increase and exist."""
    layers = tuple(layers)
    if not layers or any(not 0 <= layer < depth for layer in layers) or list(layers) != sorted(set(layers)):
        raise ValueError(f"layers must be increasing block numbers from 0 to {depth - 1}, got {layers}")
    return layers


@dataclasses.dataclass(frozen=True)
class StaticConfig:
    """Sizes of a static decoder.

    Attributes:
      vit: the trunk.
      layers: blocks that are read, concatenated; None for the last one only.
      width: C'.
      depth: 3 x 3 blocks per task before the head.
      upsample: of the head.
    """

    vit: ViTConfig = dataclasses.field(default_factory=ViTConfig)
    layers: tuple[int, ...] | None = None
    width: int = 32
    depth: int = 2
    upsample: int = 4

    def __post_init__(self):
        layers = (self.vit.depth - 1,) if self.layers is None else self.layers
        object.__setattr__(self, "layers", check_layers(layers, self.vit.depth))
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"width and depth must be at least 1, got {self.width} and {self.depth}")


class StaticDecoder(nn.Module):
    """Maps of the trunk's layers to predictions; see the module.

    Attributes:
      heads: task name -> channels.
      config: sizes.
    """

    heads: Mapping[str, int]
    config: StaticConfig

    @nn.compact
    def __call__(
        self, maps: Mapping[int, jax.Array], size: tuple[int, int], *, task: str | None = None
    ) -> dict[str, jax.Array]:
        """maps {layer: f[B, h, w, D]} -> {task: f[B, H, W, channels]}."""
        index = asked_for(self.heads, task)[1]
        x = jnp.concatenate([maps[layer] for layer in self.config.layers], axis=-1)
        for i in range(self.config.depth):
            x = StackedConvBlock(len(self.heads), self.config.width, name=f"block_{i}")(x, index)
        heads = DenseHeads(self.heads, self.config.width, self.config.upsample, name="heads")
        return heads(x, size, task=task)


class StaticViT(nn.Module):
    """A shared trunk and a static decoder per task.

    Attributes:
      heads: task name -> channels.
      config: sizes.

    >>> model = StaticViT({"depth": 1, "edge": 1}, StaticConfig(ViTConfig(8, 16, 2, 2), layers=(0, 1), width=8))
    >>> out = jax.eval_shape(model.init_with_output, jax.random.key(0), {"image": jnp.zeros((2, 16, 24, 3))})[0]
    >>> out["edge"].shape
    (2, 16, 24, 1)
    """

    heads: Mapping[str, int]
    config: StaticConfig = StaticConfig()

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, with_aux: bool = False
    ) -> Any:
        """Predicts the tasks.

        Args:
          batch: 'image' f[B, H, W, 3].
          task: static; this task's decoder only.
          train: dropout of the trunk.
          with_aux: also return statistics, of which there are none.

        Returns:
          {task: f32[B, H, W, channels]}, or (that, {}).
        """
        maps = trunk_maps(self.config, batch["image"], train=train)
        outputs = StaticDecoder(self.heads, self.config, name="decoder")(maps, batch["image"].shape[1:3], task=task)
        return (outputs, {}) if with_aux else outputs


def trunk_maps(config: Any, images: jax.Array, *, train: bool) -> dict[int, jax.Array]:
    """Runs the shared trunk, 'trunk' in the calling module, once: maps f[B, h, w, D] after the blocks of `layers`."""
    grid = patch_grid(images.shape[1:3], config.vit.patch)
    tokens = ViT(config.vit, name="trunk")(images, train=train)
    return {layer: to_map(tokens[layer], grid) for layer in config.layers}


def parameter_count(decoder: nn.Module, config: Any, size: tuple[int, int]) -> int:
    """Parameters of a decoder `(maps, size)` on a trunk `config.vit`, for images of `size`, without making them."""
    grid = patch_grid(size, config.vit.patch)
    map_ = jax.ShapeDtypeStruct((1, *grid, config.vit.width), jnp.float32)
    shapes = jax.eval_shape(
        lambda key, maps: decoder.init(key, maps, size), jax.random.key(0), {layer: map_ for layer in config.layers}
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def match_width(config: Any, target: int, *, count: Callable[[Any], int], largest: int = 4096) -> Any:
    """The configuration whose `width` makes `count` come nearest to `target`, all else equal.

    Args:
      config: a dataclass with a field `width`.
      target: parameters wanted.
      count: parameters of a configuration; must grow with the width. For a decoder:
        `lambda c: parameter_count(StaticDecoder(heads, c), c, size)`.
      largest: widest that is tried.

    Returns:
      `config` with another width.

    Raises:
      ValueError: if even width 1 has more than twice, or `largest` fewer than half of the target.
    """
    counts = {}

    def at(width: int) -> int:
        if width not in counts:
            counts[width] = count(dataclasses.replace(config, width=width))
        return counts[width]

    low, high, width = 1, largest, min(config.width, largest)
    while high - low > 1:
        low, high = (width, high) if at(width) < target else (low, width)
        # Counts are near multiples of the squared width, so that few steps are needed.
        width = round(width * math.sqrt(target / at(width)))
        width = min(max(width, low + 1), high - 1)
    best = min((low, high), key=lambda width: abs(at(width) - target))
    if not target / 2 <= at(best) <= 2 * target:
        raise ValueError(f"No width up to {largest} comes near {target} parameters: width {best} has {at(best)}")
    return dataclasses.replace(config, width=best)
