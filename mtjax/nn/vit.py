r"""Vision transformer trunk: an image becomes a sequence of patch tokens which pre-norm transformer blocks transform.

    z_0 = [cls; patches(image) W + b] + positions
    u   = z_l + attention(LN z_l),    z_{l+1} = u + MLP(LN u)

The trunk returns the tokens after every block, because dense multitask decoders read several depths; the last ones are
layer-normalised. The class token takes part in attention and is dropped from what is returned.

With `scan` the blocks are one `lax.scan` over stacked parameters: compile time then does not grow with depth. The two
parameter trees hold the same numbers (`stack_layers`, `unstack_layers`):

    unrolled  {'patch_embed', 'block_0', ..., 'block_{L-1}', 'norm'}        scan  {'patch_embed', 'blocks', 'norm'}

Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021. Kernels are Xavier-uniform.

Letters: B images, H x W pixels, C channels, P patch side, h x w grid of patches, N = h w tokens, D width, L blocks.

>>> images = jnp.zeros((2, 32, 32, 3))
>>> vit = ViT(ViTConfig(patch=8, width=16, depth=3, num_heads=2))
>>> features, params = jax.eval_shape(vit.init_with_output, jax.random.key(0), images)
>>> [f.shape for f in features], sorted(params["params"])
([(2, 16, 16), (2, 16, 16), (2, 16, 16)], ['block_0', 'block_1', 'block_2', 'norm', 'patch_embed'])
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.nn.attention import FeedForward, MultiHeadAttention

PyTree = Any
EPSILON = 1e-6  # of the layer norms
xavier = nn.initializers.xavier_uniform()
REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer.

    Attributes:
      patch: P, pixels.
      width: D.
      depth: L.
      num_heads: attention heads; must divide the width.
      mlp_ratio: hidden width of a dense MLP over D.
      cls_token: whether a class token is prepended.
      dropout: rate on attention probabilities and inside the MLPs.
      drop_path: rate at which an image skips a residual branch in training, growing linearly from 0 in the first block
        to this in the last.
      scan: run the blocks as one loop over stacked parameters.
      remat: what of a block is recomputed on the way back instead of kept in memory: 'none'; 'dots', all but what its
        dense maps return; 'full', everything. True and False are 'full' and 'none'.

    Raises:
      ValueError: if a size is not positive, the heads do not divide the width, or `remat` is unknown.
    """

    patch: int = 4
    width: int = 64
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0
    cls_token: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    scan: bool = False
    remat: bool | str = False

    def __post_init__(self):
        for name in ("patch", "width", "depth", "num_heads", "mlp_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide width={self.width}")
        if not isinstance(self.remat, bool) and self.remat not in REMAT:
            raise ValueError(f"remat must be a bool or one of {', '.join(REMAT)}, got {self.remat!r}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """One rate per block."""
        return tuple(float(rate) for rate in np.linspace(0.0, self.drop_path, self.depth))


VIT_TI = ViTConfig(patch=16, width=192, depth=12, num_heads=3, cls_token=True)
VIT_S = ViTConfig(patch=16, width=384, depth=12, num_heads=6, cls_token=True)
VIT_B = ViTConfig(patch=16, width=768, depth=12, num_heads=12, cls_token=True)
VIT_L = ViTConfig(patch=16, width=1024, depth=24, num_heads=16, cls_token=True)


def patch_grid(image_size: Sequence[int], patch: int) -> tuple[int, int]:
    """(h, w): patches along the height and width of an image.

    Raises:
      ValueError: if the patches do not tile it.
    """
    height, width = image_size
    if height % patch or width % patch:
        raise ValueError(f"patch={patch} must divide the image's height and width, got {height} x {width}")
    return height // patch, width // patch


def to_map(tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Tokens f[..., N, D] as a map f[..., h, w, D]; N = h w in row order."""
    if tokens.shape[-2] != grid[0] * grid[1]:
        raise ValueError(f"A grid of {grid[0]} x {grid[1]} needs {grid[0] * grid[1]} tokens, got {tokens.shape[-2]}")
    return tokens.reshape(*tokens.shape[:-2], *grid, tokens.shape[-1])


def drop_path(x: jax.Array, rate: jax.Array | float, rng: jax.Array) -> jax.Array:
    """Stochastic depth: zeroes the branch x f[..., N, D] of an image with probability `rate`, else scales it up."""
    keep = jax.random.bernoulli(rng, 1.0 - rate, (*x.shape[:-2], 1, 1))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(jnp.result_type(x))  # not that of a traced rate


class PatchEmbed(nn.Module):
    """Images to tokens: one affine map of every P x P patch, plus a learned position (kernel, bias, positions, cls).

    Attributes:
      patch: P.
      width: D.
      cls_token: whether a learned class token comes first.
    """

    patch: int
    width: int
    cls_token: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images f[B, H, W, C] -> f[B, N, D], f[B, N+1, D] with a class token."""
        batch, height, width, channels = images.shape
        (h, w), p = patch_grid((height, width), self.patch), self.patch
        patches = images.reshape(batch, h, p, w, p, channels).transpose(0, 1, 3, 2, 4, 5).reshape(batch * h * w, -1)
        kernel = self.param("kernel", xavier, (p * p * channels, self.width))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.width,))
        count = h * w + self.cls_token
        positions = self.param("positions", nn.initializers.truncated_normal(0.02), (count, self.width))
        tokens = (patches @ kernel + bias[None]).reshape(batch, h * w, self.width)
        if self.cls_token:
            cls = self.param("cls", nn.initializers.truncated_normal(0.02), (1, self.width))
            tokens = jnp.concatenate([jnp.broadcast_to(cls[None], (batch, 1, self.width)), tokens], axis=1)
        return tokens + positions[None]


def interpolate_positions(positions: jax.Array, grid: tuple[int, int], new_grid: tuple[int, int]) -> jax.Array:
    """Positions of another grid of patches, by bicubic interpolation; a class token's stays.

    Args:
      positions: f[h w, D], or f[1 + h w, D] with a class token first.
      grid: (h, w) they were learned on.
      new_grid: (h', w') wanted.

    Returns:
      f[h' w', D] or f[1 + h' w', D].
    """
    extra = positions.shape[0] - grid[0] * grid[1]
    if extra not in (0, 1):
        raise ValueError(
            f"A grid of {grid[0]} x {grid[1]} has {grid[0] * grid[1]} positions, or one more with a class token, "
            f"got {positions.shape[0]}"
        )
    resized = jax.image.resize(to_map(positions[extra:], grid), (*new_grid, positions.shape[-1]), "cubic")
    return jnp.concatenate([positions[:extra], resized.reshape(-1, positions.shape[-1])])


def add_branch(module: nn.Module, x: jax.Array, branch: jax.Array, rate: jax.Array | float, train: bool) -> jax.Array:
    """x + branch, the branch under `drop_path` in training; `rate` is a number or, in a scan over blocks, traced."""
    if train and not (isinstance(rate, float) and rate == 0.0):
        branch = drop_path(branch, rate, module.make_rng("dropout"))
    return x + branch


def attention_half(module: nn.Module, x: jax.Array, rate: jax.Array | float, train: bool) -> jax.Array:
    """The first half of every block here, x + attention(LN x), with the parameters 'norm_1' and 'attention'.

    Args:
      module: the block, inside its compact method; its `num_heads` and `dropout` are used.
      x: f[..., N, D].
      rate: of `drop_path`.
      train: whether dropout is on.
    """
    attention = MultiHeadAttention(module.num_heads, module.dropout, xavier, xavier, name="attention")
    normed = nn.LayerNorm(epsilon=EPSILON, name="norm_1")(x)
    return add_branch(module, x, attention(normed, train=train), rate, train)


class Block(nn.Module):
    """Pre-norm transformer block: u = x + attention(LN x);  y = u + MLP(LN u).

    Attributes:
      num_heads: attention heads.
      mlp_ratio: hidden width of the MLP over D.
      dropout: rate on attention probabilities and inside the MLP.
      drop_path: rate at which an image skips a branch in training.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """x f[..., N, D] -> f[..., N, D]; `rate` f[] replaces `drop_path` (blocks of a scan differ in it)."""
        rate = self.drop_path if rate is None else rate
        u = attention_half(self, x, rate, train)
        hidden = round(self.mlp_ratio * x.shape[-1])
        normed = nn.LayerNorm(epsilon=EPSILON, name="norm_2")(u)
        branch = FeedForward(hidden, self.dropout, xavier, name="feed_forward")(normed, train=train)
        return add_branch(self, u, branch, rate, train)


def recomputed(run: Callable, remat: bool | str, *, prevent_cse: bool = True) -> Callable:
    """`run(block, ...)` under the policy `ViTConfig.remat`; `prevent_cse` can be False inside of a scan."""
    name = {True: "full", False: "none"}.get(remat, remat)
    if name == "none":
        return run
    # Scores and mixed values of attention are products with batch dimensions: large, and cheap to have again.
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if name == "dots" else None
    return nn.remat(run, prevent_cse=prevent_cse, policy=policy)


class ViT(nn.Module):
    """The trunk; see the module.

    Attributes:
      config: sizes.
    """

    config: ViTConfig = ViTConfig()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> list[jax.Array]:
        """Tokens after every block.

        Args:
          images: f[B, H, W, C].
          train: whether dropout and drop path are on (rng collection 'dropout').

        Returns:
          L arrays f[B, N, D] without the class token; the last one is layer-normalised.
        """
        config = self.config
        x = PatchEmbed(config.patch, config.width, config.cls_token, name="patch_embed")(images)
        sizes = {"num_heads": config.num_heads, "mlp_ratio": config.mlp_ratio, "dropout": config.dropout}

        def run(block: nn.Module, x: jax.Array, rate: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            y = block(x, rate, train=train)
            return y, y

        run = recomputed(run, config.remat, prevent_cse=not config.scan)
        if config.scan:
            rates = jnp.asarray(config.drop_path_rates) if config.drop_path else None
            x, every = scan_layers(run, config.depth)(Block(**sizes, name="blocks"), x, rates)
            features = [every[index] for index in range(config.depth)]
        else:
            features = []
            for index, rate in enumerate(config.drop_path_rates):
                x, _ = run(Block(**sizes, drop_path=rate, name=f"block_{index}"), x, None)
                features.append(x)
        features[-1] = nn.LayerNorm(epsilon=EPSILON, name="norm")(features[-1])
        return [f[:, int(config.cls_token) :] for f in features]


def scan_layers(run: Any, length: int) -> Any:
    """A lifted `lax.scan`: `run(layer, carry, xs) -> (carry, ys)` over layers with stacked parameters and own rngs."""
    rngs = {"params": True, "dropout": True, "gate": True}
    return nn.scan(run, variable_axes={"params": 0}, split_rngs=rngs, length=length)


def stack_layers(params: Mapping[str, PyTree], groups: Mapping[str, Sequence[str]]) -> dict[str, PyTree]:
    """Parameters of an unrolled trunk as those of its scan.

    Args:
      params: the tree with one entry per layer.
      groups: path of a stacked entry ('blocks', 'pairs/moe') -> names of its layers, in order.

    Returns:
      The tree with the groups' layers stacked on a leading axis; everything else as it was.
    """
    members = {name for names in groups.values() for name in names}
    stacked = {name: tree for name, tree in params.items() if name not in members}
    for path, names in groups.items():
        *parents, last = path.split("/")
        inner = stacked
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return stacked


def unstack_layers(params: Mapping[str, PyTree], groups: Mapping[str, Sequence[str]]) -> dict[str, PyTree]:
    """The reverse of `stack_layers`."""
    roots = {path.split("/")[0] for path in groups}
    unstacked = {name: tree for name, tree in params.items() if name not in roots}
    for path, names in groups.items():
        tree = params
        for part in path.split("/"):
            tree = tree[part]
        for index, name in enumerate(names):
            unstacked[name] = jax.tree.map(lambda leaf, index=index: leaf[index], tree)
    return unstacked
