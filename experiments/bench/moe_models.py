"""Whole models in `moe.py`: a step beside that of a dense transformer, inference of one task, compile time.

    step      forward, and forward and backward, of a transformer with experts and one gate beside the dense one, and of
              one with a gate per task (a pass per task) beside a network per task
    extract   inference of one task: the whole model asked for it, the extracted one, that cut to half of the experts
    compile   a training step of 6 and of 12 blocks, as a scan and unrolled

Letters: T tasks, E experts, K experts per token.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import moe_cases as cases
import numpy as np
from operators_measure import in_turns, say

from mtjax import macs
from mtjax.models.m3vit import M3ViT, M3ViTConfig
from mtjax.models.m3vit_inference import extract_task
from mtjax.models.multitask_vit import MultitaskViT, SingleTaskViT
from mtjax.nn.decoders import LinearUnpatch
from mtjax.nn.vit import ViTConfig

HEADS = {"segmentation": 13, "depth": 1, "normals": 3, "edge": 1}


def sizes_of(quick: bool) -> tuple[M3ViTConfig, int, int]:
    """Configuration, image size in pixels, and images."""
    if quick:
        return M3ViTConfig(ViTConfig(4, 8, 2, 2), experts=4, top_k=2, expert_ratio=2.0), 8, 2
    return M3ViTConfig(ViTConfig(4, 128, 6, 4), experts=16, top_k=4, expert_ratio=1.0), 32, 16


def fresh(model: Any, images: jax.Array) -> Any:
    return jax.jit(model.init)(jax.random.key(0), {"image": images})["params"]


def loss(model: Any, params: Any, images: jax.Array) -> jax.Array:
    return sum(jnp.mean(jnp.square(output)) for output in model.apply({"params": params}, {"image": images}).values())


def step(sizes: Any) -> list[dict]:
    """Each pair costs as many multiply-adds, apart from the gates."""
    config, side, count = sizes_of(sizes.quick)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(count, side, side, 3)), jnp.float32)
    one_gate = dataclasses.replace(config, router="single")
    pairs = {
        "one pass": (
            {"dense ViT": MultitaskViT(HEADS, config.vit, LinearUnpatch)},
            {"experts, one gate": M3ViT(HEADS, one_gate, LinearUnpatch)},
        ),
        "a pass per task": (
            {"a dense ViT per task": SingleTaskViT(HEADS, config.vit, LinearUnpatch)},
            {"experts, gate per task": M3ViT(HEADS, config, LinearUnpatch)},
        ),
    }
    rows = []
    for pair, models in pairs.items():
        named = {name: model for side_ in models for name, model in side_.items()}
        for name, backward in {"forward": False, "forward and backward": True}.items():
            functions = []
            for label, model in named.items():
                run = functools.partial(loss, model)
                functions.append(
                    cases.timed(
                        label, jax.grad(run) if backward else run, (fresh(model, images), images), sizes.seconds
                    )
                )
            base = next(iter(named))
            counted = {label: macs.macs(model, image_size=(side, side)) for label, model in named.items()}
            rows += beside(base, functions, sizes, {"shape": pair, "pass": name}, {"macs": counted})
    return rows


def extract(sizes: Any) -> list[dict]:
    """The first task; the whole model asked for it is the base."""
    config, side, count = sizes_of(sizes.quick)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(count, side, side, 3)), jnp.float32)
    model, task = M3ViT(HEADS, config, LinearUnpatch), next(iter(HEADS))
    params = fresh(model, images)
    half = np.where(np.arange(config.experts) < config.experts // 2, 200.0 / config.experts, 0.0)
    usage = {f"block_{block}": np.tile(half, (len(HEADS), 1)) for block in config.expert_blocks}
    models = {
        "whole model, one task": (model, params, task),
        "extracted": (*extract_task(model, params, task), task),
        "extracted, half of the experts": (*extract_task(model, params, task, usage=usage), task),
        "whole model, all tasks": (model, params, None),
    }
    functions = [
        cases.timed(
            name,
            lambda params, images, of=of, asked=asked: of.apply({"params": params}, {"image": images}, task=asked),
            (own, images),
            sizes.seconds,
        )
        for name, (of, own, asked) in models.items()
    ]
    bytes_ = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(own)) for name, (_, own, _) in models.items()}
    where = {"shape": f"{count} images", "pass": "forward"}
    return beside(functions[0].name, functions, sizes, where, {"bytes": bytes_})


def beside(
    base: str, functions: Sequence[Any], sizes: Any, where: dict[str, str], more: dict[str, dict[str, float]]
) -> list[dict]:
    """Rows of what is timed in turns, with ratios to one of them."""
    results = in_turns(functions, turns=sizes.turns, patience=sizes.patience)
    rows = []
    for name, result in results.items():
        row = {**where, "dispatch": name, **result, "dropped": None}
        row |= {key: values[name] for key, values in more.items()}
        row |= {
            "ratio": result["ms"] / results[base]["ms"],
            "cpu_ratio": result["cpu_ms"] / max(results[base]["cpu_ms"], 1e-9),
            "quiet": result["quiet"] and results[base]["quiet"],
        }
        say(f"{where['shape']}, {where['pass']}: {name}: {row['ms']} ms, {row['ratio']:.2f} x {base}")
        rows.append(row)
    return rows


def compile_time(sizes: Any) -> list[dict]:
    """Seconds to compile a gradient; nothing is run."""
    config, side, count = sizes_of(sizes.quick)
    images = jax.ShapeDtypeStruct((count, side, side, 3), jnp.float32)
    rows = []
    for depth in (2, 4) if sizes.quick else (6, 12):
        for scan in (True, False):
            vit = dataclasses.replace(config.vit, depth=depth, scan=scan)
            model = M3ViT(HEADS, dataclasses.replace(config, vit=vit), LinearUnpatch)
            params = jax.eval_shape(model.init, jax.random.key(0), {"image": images})["params"]
            taken = []
            for _ in range(1 if sizes.quick else 3):
                jax.clear_caches()
                taken.append(cases.compile_seconds(jax.grad(functools.partial(loss, model)), (params, images)))
            rows.append({"blocks": depth, "scan": scan, "compile_s": round(min(taken), 2)})
            say(f"compile, {depth} blocks, scan {scan}: {rows[-1]['compile_s']} s")
    return rows
