r"""M3ViT for one task: the parameters that one task needs, and the accelerator's order of computation.

`extract_task` cuts a trained model down physically: one gate per layer, one decoder, and, given which experts the task
uses, these experts only. Without the removal of a used expert the small model computes what the whole one computes for
that task. `queue_inference` runs a model expert by expert (`mtjax.nn.expert_queue`), with the weights of two experts
resident; changing the task changes a gate and a decoder, and no expert is loaded again.

Reference: Liang et al., "M3ViT", NeurIPS 2022 (single-task inference, reordered computation); the rule by which experts
are kept is Mod-Squad's (`mtjax.nn.expert_surgery`).

Letters: T tasks, B images, D width, E experts, K experts per token.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from mtjax.models.m3vit import M3ViT
from mtjax.nn.balance import router_stats
from mtjax.nn.expert_queue import expert_queue_apply, peak_weight_bytes
from mtjax.nn.expert_surgery import prune_to_task
from mtjax.nn.moe_layer import MoEMlp
from mtjax.nn.routers import Router
from mtjax.nn.stacked import task_index
from mtjax.nn.vit import unstack_layers

PyTree = Any
EXPERT_PARAMS = ("kernel_in", "bias_in", "kernel_out", "bias_out")


def extract_task(
    model: M3ViT,
    params: Mapping[str, PyTree],
    task: str,
    *,
    usage: Mapping[str, Any] | None = None,
    threshold: float = 3.0,
    keep_denominator: bool = True,
) -> tuple[M3ViT, dict[str, PyTree]]:
    """The single-task model inside a multitask one.

    Args:
      model: the whole model.
      params: its parameters.
      task: what to keep.
      usage: {'block_1': f[T, E] or f[E], ...}, percent of the task's choices that each expert of a layer gets
        (`mtjax.nn.expert_load`). Experts with more than threshold / K percent stay, and at least K. None: all that the
        task can address.
      threshold: see `mtjax.nn.expert_surgery.experts_to_keep`.
      keep_denominator: keep the removed experts' gate columns (D numbers each) in the softmax, so that a token none of
        whose experts was removed gets the same output as before. False is the published rule.

    Returns:
      The model and its parameters. Layers may then differ in their number of experts, so it has no scan; it has no
      training-only branch.

    Raises:
      ValueError: for an unknown task or layers without usage.
    """
    config, index = model.config, task_index(model.heads, task)
    names = [f"block_{block}" for block in config.expert_blocks]
    if usage is not None and set(usage) != set(names):
        raise ValueError(f"usage must have one entry for each of {', '.join(names)}, got {', '.join(usage) or 'none'}")
    trunk = unstack_layers(params["trunk"], config.layer_names) if config.groups else dict(params["trunk"])
    experts, ghosts = [], []
    for layer, name in enumerate(names):
        router = config.router_config(layer, len(model.heads))
        percent = np.ones(router.num_experts) if usage is None else np.asarray(usage[name])
        pruned = prune_to_task(
            trunk[name]["experts"],
            percent[index] if percent.ndim == 2 else percent,
            task=0 if config.router == "single" else index,
            config=router,
            threshold=0.0 if usage is None else threshold,
            keep_denominator=keep_denominator,
        )
        trunk[name] = dict(trunk[name]) | {"experts": pruned.params}
        experts.append(pruned.config.num_experts)
        ghosts.append(pruned.config.ghosts)
    vit = dataclasses.replace(config.vit, scan=False)
    config = dataclasses.replace(config, vit=vit, experts=tuple(experts), ghosts=tuple(ghosts), window=None, tam=False)
    small = model.clone(heads=FrozenDict({task: model.heads[task]}), config=config)
    return small, {"trunk": trunk, f"head_{task}": params[f"head_{task}"]}


def experts_of(layer: Mapping[str, PyTree]) -> dict[str, jax.Array]:
    """The stacked arrays of an expert layer's parameters, f[E, ...] each."""
    return {name: layer[name] for name in EXPERT_PARAMS}


def queue_inference(
    model: M3ViT,
    variables: Mapping[str, PyTree],
    batch: Mapping[str, Any],
    *,
    task: str | None = None,
    block: int = 32,
    threshold: float = 0.0,
) -> dict[str, jax.Array]:
    """A model's outputs with every expert layer run expert by expert; it can be jitted, not differentiated.

    Args:
      model: whole or extracted.
      variables: {'params': ...}.
      batch: 'image' f[B, H, W, 3].
      task: static, as for the model.
      block: tokens that an expert takes at a time.
      threshold: choices with a gate value not above it are skipped.

    Returns:
      task name -> f[B, H, W, C].
    """

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if not isinstance(layer, MoEMlp) or context.method_name != "__call__":
            return call(*args, **kwargs)
        x, tasks = args[0], kwargs["tasks"]
        params = layer.variables["params"]
        router = Router(layer.router, layer.num_tasks, parent=None)
        gate_x = x if kwargs.get("gate_x") is None else kwargs["gate_x"]
        routing = router.apply({"params": params["router"]}, gate_x.reshape(len(x), -1, x.shape[-1]), tasks=tasks)
        streams, _, chosen = routing.ids.shape
        tokens = jnp.broadcast_to(x, (streams, *x.shape[1:])).reshape(-1, x.shape[-1])
        y = expert_queue_apply(
            tokens,
            routing.values.reshape(-1, chosen),
            routing.ids.reshape(-1, chosen),
            experts_of(params),
            activation=layer.activation,
            block=block,
            threshold=threshold,
        )
        return y.reshape(streams, *x.shape[1:]), router_stats(routing)

    with nn.intercept_methods(intercept):
        return model.apply(variables, batch, task=task)


def expert_bytes(params: Mapping[str, PyTree], *, resident: int | None = 2) -> int:
    """Bytes of expert weights that must be in fast memory at once: of `resident` experts of the largest layer.

    Args:
      params: of a model without scan.
      resident: experts held at once, 2 in `queue_inference`; None: all experts of all layers.
    """
    layers = [
        peak_weight_bytes(experts_of(block["experts"]), resident=resident)
        for block in params["trunk"].values()
        if "experts" in block
    ]
    return sum(layers) if resident is None else max(layers)
