r"""Multiply-accumulates of the vision models, counted from their sizes: what one image costs at inference.

For N tokens (with the class token) of width D, a dense ratio m, K of E experts of hidden width r D:

    attention   4 N D^2 + 2 N^2 D             MLP   2 m N D^2             experts   2 K r N D^2             gate   N D E
    3x3 convolution, C to F channels on h x w   9 h w C F                 decoder   the sum over its stages

The accounting is that of the published comparisons: single-task inference, with that task's decoder and nothing of the
others', normalisation, activations, softmax and interpolation left out, and so the patch embedding unless it is asked
for (`embedding=True`; 0.3 G at 512 x 512). ViT-S/16 with PUP: 83.4 G at 512 x 512 with 21 classes and 100.1 G at
480 x 640 with 40, to which the gates of M3ViT add 0.04 G. An encoder-focused model runs all T encoders for one task.

XLA's own count is of no use here: it counts a ragged product as dense, hence every expert. `traced_macs` counts the
products of a dense program, exactly.

Letters: T tasks, N tokens, h x w grid, D width, E experts, K experts per token.

>>> from mtjax.nn.vit import VIT_S
>>> model = MultitaskViT({"segmentation": 21}, VIT_S)
>>> count(model, "segmentation", image_size=(512, 512))
Macs(embedding=301989888, blocks=31447065600, experts=0, gates=0, exchange=0, decoders=51992592384)
>>> f"{macs(model, 'segmentation', image_size=(512, 512)) / 1e9:.1f} G"
'83.4 G'
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.extend.core import jaxprs_in_params

from mtjax.models.cross_stitch import CrossStitchViT
from mtjax.models.m3vit import M3ViT
from mtjax.models.multitask_vit import MultitaskViT, SingleTaskViT, make_decoder
from mtjax.nn.decoders import PUP, ConvHead, HeatmapHead, LinearUnpatch
from mtjax.nn.stacked import task_index
from mtjax.nn.vit import ViTConfig, patch_grid


class Macs(NamedTuple):
    """Multiply-accumulates of one image, by part.

    Attributes:
      embedding: pixels to tokens.
      blocks: attention and dense MLPs.
      experts: of the tokens' K experts.
      gates: of the routers.
      exchange: between encoders.
      decoders: of the tasks asked for.
    """

    embedding: int = 0
    blocks: int = 0
    experts: int = 0
    gates: int = 0
    exchange: int = 0
    decoders: int = 0


def macs(model: nn.Module, task: str | None = None, *, image_size: tuple[int, int], embedding: bool = False) -> int:
    """Multiply-accumulates of one image.

    Args:
      model: a model that `count` knows.
      task: inference of this task alone; None: of all tasks at once.
      image_size: (H, W).
      embedding: whether the patch embedding counts.
    """
    parts = count(model, task, image_size=image_size)
    return sum(parts) - (0 if embedding else parts.embedding)


@functools.singledispatch
def count(model: nn.Module, task: str | None = None, *, image_size: tuple[int, int]) -> Macs:
    """The parts of `macs`; other models are added by `count.register`."""
    raise TypeError(f"No count for {type(model).__name__}; add one with mtjax.macs.count.register")


@functools.singledispatch
def decoder_macs(decoder: nn.Module, grid: tuple[int, int], width: int, image_size: tuple[int, int]) -> int:
    """Of a decoder on a map of tokens f[h, w, D]; others are added by `decoder_macs.register`.

    Args:
      decoder: the module.
      grid: (h, w).
      width: D.
      image_size: (H, W) that it decodes to.
    """
    raise TypeError(f"No count for the decoder {type(decoder).__name__}; add one with decoder_macs.register")


@decoder_macs.register
def _(decoder: PUP, grid: tuple[int, int], width: int, image_size: tuple[int, int]) -> int:
    total, positions, channels = 0, grid[0] * grid[1], width
    stages = decoder.stages or max(1, math.ceil(math.log2(image_size[0] / grid[0])))
    for stage in range(stages):
        total += 9 * positions * 4**stage * channels * decoder.width
        channels = decoder.width
    return total + positions * 4 ** (stages - 1) * channels * decoder.channels


@decoder_macs.register
def _(decoder: ConvHead, grid: tuple[int, int], width: int, image_size: tuple[int, int]) -> int:
    del image_size
    hidden = decoder.width or width
    return grid[0] * grid[1] * hidden * (9 * width + decoder.channels)


@decoder_macs.register
def _(decoder: LinearUnpatch, grid: tuple[int, int], width: int, image_size: tuple[int, int]) -> int:
    hidden = decoder.width or width
    return grid[0] * grid[1] * hidden * 9 * width + image_size[0] * image_size[1] * hidden * decoder.channels


@decoder_macs.register
def _(decoder: HeatmapHead, grid: tuple[int, int], width: int, image_size: tuple[int, int]) -> int:
    del image_size
    hidden = decoder.width or width
    return decoder.upsample**2 * grid[0] * grid[1] * hidden * (9 * width + decoder.channels)


def attention_macs(tokens: int, width: int) -> int:
    """Queries, keys, values and output; scores and their product with the values."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width


def mlp_macs(tokens: int, width: int, hidden: int) -> int:
    """Two products per token."""
    return 2 * tokens * width * hidden


def block_macs(tokens: int, config: ViTConfig) -> int:
    """Of a dense transformer block."""
    return attention_macs(tokens, config.width) + mlp_macs(tokens, config.width, round(config.mlp_ratio * config.width))


def _sizes(config: ViTConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """Tokens with the class token, and the embedding's multiply-accumulates."""
    h, w = patch_grid(image_size, config.patch)
    return h * w + config.cls_token, h * w * config.patch**2 * 3 * config.width


def _decoders(model: Any, config: ViTConfig, task: str | None, image_size: tuple[int, int]) -> int:
    task_index(model.heads, task)
    grid = patch_grid(image_size, config.patch)
    names = list(model.heads) if task is None else [task]
    makers = (make_decoder(model.heads, model.decoder, name) for name in names)
    return sum(decoder_macs(decoder, grid, config.width, image_size) for decoder in makers)


@count.register
def _(model: MultitaskViT, task: str | None = None, *, image_size: tuple[int, int]) -> Macs:
    tokens, embedding = _sizes(model.config, image_size)
    blocks = model.config.depth * block_macs(tokens, model.config)
    return Macs(embedding, blocks, decoders=_decoders(model, model.config, task, image_size))


@count.register
def _(model: SingleTaskViT, task: str | None = None, *, image_size: tuple[int, int]) -> Macs:
    networks = len(model.heads) if task is None else 1
    tokens, embedding = _sizes(model.config, image_size)
    blocks = networks * model.config.depth * block_macs(tokens, model.config)
    return Macs(networks * embedding, blocks, decoders=_decoders(model, model.config, task, image_size))


@count.register
def _(model: CrossStitchViT, task: str | None = None, *, image_size: tuple[int, int]) -> Macs:
    encoders, width, exchanges = len(model.heads), model.config.width, model.exchanges
    asked = encoders if task is None else 1
    shared = 1 + exchanges[-1] if exchanges else 0  # blocks that every encoder has to run
    tokens, embedding = _sizes(model.config, image_size)
    block = block_macs(tokens, model.config)
    pair = tokens * (width if model.fusion == "cross_stitch" else width**2)  # one encoder to one encoder
    outputs = (len(exchanges) - 1) * encoders + asked if exchanges else 0
    return Macs(
        embedding=embedding * (encoders if shared else asked),
        blocks=block * (encoders * shared + asked * (model.config.depth - shared)),
        exchange=pair * encoders * outputs,
        decoders=_decoders(model, model.config, task, image_size),
    )


@count.register
def _(model: M3ViT, task: str | None = None, *, image_size: tuple[int, int]) -> Macs:
    config, vit, index = model.config, model.config.vit, task_index(model.heads, task)
    tasks = tuple(range(len(model.heads))) if index is None else (index,)
    tokens, embedding = _sizes(vit, image_size)
    streams, blocks, experts, gates = 1, 0, 0, 0
    for block in range(vit.depth):
        if block not in config.expert_blocks:
            blocks += streams * block_macs(tokens, vit)
            continue
        blocks += streams * attention_macs(tokens, vit.width)
        router = config.router_config(config.expert_blocks.index(block), len(model.heads))
        columns = router.pool_size(tasks) + router.ghosts
        if config.router == "task_conditioned":  # the tokens' part, and the task vector's with its second linear map
            gates += streams * tokens * vit.width * columns
            gates += len(tasks) * config.task_dim * (config.task_dim + columns)
        else:
            gates += (1 if config.router == "single" else len(tasks)) * tokens * vit.width * columns
        streams = 1 if config.router == "single" else len(tasks)
        hidden = round(config.expert_ratio * vit.width)
        experts += streams * config.top_k * mlp_macs(tokens, vit.width, hidden)
    return Macs(embedding, blocks, experts, gates, decoders=_decoders(model, vit, task, image_size))


def traced_macs(function: Callable, *args: Any) -> int:
    """Multiply-accumulates of all products and convolutions in a program, loops unrolled; nothing is run.

    Args:
      function: of arrays.
      *args: arrays or shapes.

    >>> traced_macs(lambda a, b: a @ b, jax.ShapeDtypeStruct((2, 3), "f4"), jax.ShapeDtypeStruct((3, 5), "f4"))
    30
    """
    return _jaxpr_macs(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_macs(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, times = equation.primitive.name, 1
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            kernel = equation.invars[1].aval.shape
            per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            total += math.prod(equation.outvars[0].aval.shape) * per_output
        elif name == "scan":
            times = equation.params["length"]
        elif name == "shard_map":  # its body is the program of one device
            times = equation.params["mesh"].size
        elif name in ("while", "cond"):
            raise ValueError(f"traced_macs cannot count a program with {name}: how often it runs depends on the data")
        total += times * sum(_jaxpr_macs(inner) for inner in jaxprs_in_params(equation.params))
    return total
