r"""The baselines of a multitask vision transformer: one network per task, and one dense network for all.

    SingleTaskViT   output_t = head_t(trunk(image; theta_t))        nothing shared: the b of Delta_m
    MultitaskViT    output_t = head_t(trunk(image; theta))          all of the trunk shared, no task signal in it

Both have the trunk, heads and sizes that the mixture-of-experts models have, so that a difference is due to how tasks
share and not to the backbone. The single-task networks are stacked: T networks are one program which trains them at
once and compiles in the time of one.

Letters: B images of H x W pixels, T tasks, N = h w tokens, D width, C channels of a task.

>>> model = MultitaskViT({"depth": 1, "edge": 2}, ViTConfig(patch=8, width=16, depth=1, num_heads=2))
>>> batch = {"image": jnp.zeros((1, 16, 16, 3))}
>>> outputs, params = jax.eval_shape(model.init_with_output, jax.random.key(0), batch)
>>> {name: output.shape for name, output in outputs.items()}
{'depth': (1, 16, 16, 1), 'edge': (1, 16, 16, 2)}
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.decoders import PUP
from mtjax.nn.stacked import task_index
from mtjax.nn.vit import ViT, ViTConfig, patch_grid, to_map

Decoder = Callable[..., nn.Module] | Mapping[str, Callable[..., nn.Module]]


def asked_tasks(module: nn.Module, task: str | None) -> tuple[str, ...]:
    """Tasks that a call has to compute: all for None, and all at initialisation, since parameters exist for each.

    Args:
      module: a model with `heads`.
      task: static name or None.

    Returns:
      Names in the order of the heads.

    Raises:
      ValueError: if there is no such task.
    """
    index = task_index(module.heads, task)
    names = tuple(module.heads)
    return names if index is None or module.is_initializing() else (names[index],)


def make_decoder(heads: Mapping[str, int], decoder: Decoder, task: str, **options: Any) -> nn.Module:
    """The decoder of a task as a module: `decoder` itself or its entry for the task, given the task's channels."""
    make = decoder[task] if isinstance(decoder, Mapping) else decoder
    return make(channels=heads[task], **options)


def decode(
    heads: Mapping[str, int],
    decoder: Decoder,
    tokens: jax.Array | Sequence[jax.Array],
    asked: Sequence[str],
    image_size: tuple[int, int],
    patch: int,
) -> dict[str, jax.Array]:
    """Runs the decoders of some tasks, inside the compact method of a model; parameters are 'head_<task>'.

    Args:
      heads: task name -> channels C.
      decoder: makes a decoder: `decoder(channels=C, name=...)(map f[B, h, w, D], (H, W)) -> f[B, H, W, C]`, one for all
        tasks or one per task by name.
      tokens: f[T, B, N, D], one stream per task asked for, or f[1, B, N, D] which all read.
      asked: names of the T tasks.
      image_size: (H, W).
      patch: pixels per token.

    Returns:
      task name -> f[B, H, W, C].
    """
    grid, outputs = patch_grid(image_size, patch), {}
    for stream, name in enumerate(asked):
        features = to_map(tokens[stream if len(tokens) > 1 else 0], grid)
        outputs[name] = make_decoder(heads, decoder, name, name=f"head_{name}")(features, image_size)
    return outputs


def decode_with_features(
    heads: Mapping[str, int],
    decoder: Decoder,
    tokens: jax.Array,
    asked: Sequence[str],
    image_size: tuple[int, int],
    patch: int,
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """`decode` that also returns, for every stage of the decoders but the last, their features f[T, B, h', w', C].

    Raises:
      ValueError: if the decoder has no stages (only `PUP` has).
    """
    grid, outputs, features = patch_grid(image_size, patch), {}, []
    for stream, name in enumerate(asked):
        head = make_decoder(heads, decoder, name, name=f"head_{name}")
        if not isinstance(head, PUP):
            raise ValueError(
                f"A branch on the stages of the decoders needs PUP, got {type(head).__name__} for {name!r}"
            )
        maps = to_map(tokens[stream if len(tokens) > 1 else 0], grid)
        outputs[name], stages = head(maps, image_size, with_features=True)
        features.append(stages)
    if not features[0]:
        raise ValueError(f"patch={patch} leaves the decoder one stage; a branch on its stages needs at least two")
    return outputs, [jnp.stack(stage) for stage in zip(*features, strict=True)]


def answer(outputs: dict[str, jax.Array], task: str | None, with_aux: bool, aux: dict[str, Any]) -> Any:
    """What a model returns: the outputs asked for, and a pair with `aux` if that was asked for."""
    outputs = outputs if task is None else {task: outputs[task]}
    return (outputs, aux) if with_aux else outputs


class MultitaskViT(nn.Module):
    """One dense trunk that all heads read.

    Attributes:
      heads: task name -> channels.
      config: sizes of the trunk.
      decoder: see `decode`.
    """

    heads: Mapping[str, int]
    config: ViTConfig = ViTConfig()
    decoder: Decoder = PUP

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, with_aux: bool = False
    ) -> Any:
        """Predicts maps.

        Args:
          batch: 'image' f[B, H, W, 3].
          task: static; decode this task only.
          train: dropout on (rng collection 'dropout').
          with_aux: also return {}: a dense trunk has no routers.

        Returns:
          task name -> f[B, H, W, C]; with `with_aux` a pair.
        """
        images = batch["image"]
        tokens = ViT(self.config, name="trunk")(images, train=train)[-1]
        asked = asked_tasks(self, task)
        outputs = decode(self.heads, self.decoder, tokens[None], asked, images.shape[1:3], self.config.patch)
        return answer(outputs, task, with_aux, {})


class SingleTaskViT(nn.Module):
    """T networks, one per task; the trunks' parameters are stacked on a leading task axis.

    Attributes:
      heads: task name -> channels.
      config: sizes of every trunk.
      decoder: see `decode`.
    """

    heads: Mapping[str, int]
    config: ViTConfig = ViTConfig()
    decoder: Decoder = PUP

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, task: str | None = None, train: bool = False, with_aux: bool = False
    ) -> Any:
        """Predicts maps; see `MultitaskViT`. With `task` only that task's network is run."""
        images, asked = batch["image"], asked_tasks(self, task)

        def run(trunk: nn.Module, images: jax.Array) -> jax.Array:
            return trunk(images, train=train)[-1]

        copies = len(self.heads)
        chosen = None if len(asked) == copies else list(self.heads).index(asked[0])
        tokens = stacked_apply(run, copies, chosen)(ViT(self.config, name="trunk"), images)
        outputs = decode(self.heads, self.decoder, tokens, asked, images.shape[1:3], self.config.patch)
        return answer(outputs, task, with_aux, {})


def stacked_apply(run: Callable, copies: int, chosen: int | None, in_axis: int | None = None) -> Callable:
    """Lifts `run(module, x)` to a module whose parameters are stacked on a leading axis of `copies`.

    Args:
      run: applies the module.
      copies: T.
      chosen: None for all copies, or the static position of the one to run.
      in_axis: axis of x with one entry per copy that is run; None: all read the same x.

    Returns:
      `(module, x) -> f[T, ...]`, f[1, ...] for one copy.
    """
    if chosen is None:
        return nn.vmap(
            run,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axis,
            axis_size=copies,
        )
    one = nn.map_variables(run, "params", lambda params: jax.tree.map(lambda leaf: leaf[chosen], params))
    return lambda module, x: jnp.expand_dims(one(module, x if in_axis is None else jnp.squeeze(x, in_axis)), 0)
