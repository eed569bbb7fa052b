"""Sets of rendered scenes: generated in batches under one compiled program, cached on disk, split without overlap.

    data = rooms.load(RoomsConfig(train=512))
    data['train']['image']                    u8[n, H, W, 3]
    data['train']['labels']['segmentation']   u8[n, H, W], 255 = ignored
    data['train']['labels']['depth']          f16[n, H, W], metres, NaN in the holes of the sensor
    data['train']['labels']['normals']        f16[n, H, W, 3], unit, camera frame (x right, y down, z forward)
    data['train']['labels']['edge']           u8[n, H, W], 0 or 1
    data['train']['instances']                u8[n, H, W], 0 = stuff
    data['train']['focal']                    f32[n], focal length in half widths of the image

The key of scene i of a split is fold_in(fold_in(fold_in(key(seed), stream), split), i).

Letters: B scenes of a batch, H height, W width.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.data.pde import records
from mtjax.data.pde.store import cached
from mtjax.data.rooms import config as names
from mtjax.data.rooms import grammar, labels, person, render, scene, street
from mtjax.data.rooms.config import RoomsConfig, Style
from mtjax.data.rooms.scene import Array

Split = dict[str, Any]
SPLITS = ("train", "validation", "test")
_UNIFORMS = 896
_PIXELS_AT_ONCE = 1 << 15
_MAKERS = {
    "rooms": scene.room,
    "object": scene.single_object,
    "person": person.room_with_person,
    "street": street.street,
}
STEREO_BASE = 0.22
"""Distance of the two cameras of the street variant in metres."""


def load(config: RoomsConfig, folder: str | os.PathLike | None = None, progress: bool = True) -> dict[str, Split]:
    """The splits of a set: read from disk if they are there, else rendered and written.

    Args:
      config: what to render.
      folder: where the files are kept; None: $MTJAX_DATA, else ~/.cache/mtjax.
      progress: shows a bar while rendering.

    Returns:
      {'train' | 'validation' | 'test': {'image', 'labels': {task: array}, 'instances', 'focal'}}, as in the module's
      description; the tasks are those of the variant, TASKS[config.variant], and the extras that were asked for.
    """
    return cached(
        f"rooms-{config.variant}", config, functools.partial(generate, config), folder=folder, show_progress=progress
    )


def generate(config: RoomsConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Split]:
    """Renders the splits of a set; `progress(done, total)` is called after every batch."""
    program = _program(config.variant, config.shape, config.supersample, config.extras)
    batch = batch_size(config)
    total, done = sum(config.splits.values()), 0
    data = {}
    for split, count in config.splits.items():
        # Wrong labels are for training only: what is measured is measured on right ones.
        noise = (config.label_noise, config.unlabelled) if split == "train" else (0.0, 0.0)
        arguments = (dataclasses.asdict(config.style), noise)
        layout = jax.eval_shape(program, scene_keys(config, split, np.arange(batch)), *arguments)
        columns = jax.tree.map(lambda x, count=count: np.empty((count, *x.shape[1:]), x.dtype), layout)
        for first in range(0, count, batch):
            rows = slice(first, min(first + batch, count))
            made = jax.device_get(program(scene_keys(config, split, np.arange(first, first + batch)), *arguments))
            for column, part in zip(jax.tree.leaves(columns), jax.tree.leaves(made), strict=True):
                column[rows] = part[: rows.stop - first]
            done += rows.stop - first
            progress(done, total)
        data[split] = columns
    return data


def batch_size(config: RoomsConfig) -> int:
    """Scenes that are rendered at once: as many as keep an array of rays in a core's cache."""
    rays = config.shape[0] * config.shape[1] * config.supersample**2
    return max(1, min(32, _PIXELS_AT_ONCE // rays))


def scene_keys(config: RoomsConfig, split: str, indices: np.ndarray) -> Array:
    """Keys [n] of scenes; different for every seed, stream, split and index."""
    key = jax.random.fold_in(jax.random.key(config.seed), config.stream)
    key = jax.random.fold_in(key, SPLITS.index(split))
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(indices, jnp.uint32))


@functools.lru_cache(maxsize=8)
def _program(variant: str, shape: tuple[int, int], supersample: int, extras: tuple[str, ...]) -> Callable[..., Split]:
    """program(keys [B], style, (label noise, unlabelled)) -> columns; styles are arguments, so they share a program."""

    def one(key: Array, style: dict[str, Any], noise: tuple[Any, Any]) -> Split:
        # Where products are rounded to bfloat16 by default, surfaces would move by centimetres.
        with jax.default_matmul_precision("highest"):
            return render_scene(key, style, noise, variant=variant, shape=shape, supersample=supersample, extras=extras)

    return jax.jit(jax.vmap(one, (0, None, None)))


def render_scene(
    key: Array,
    style: dict[str, Any],
    noise: tuple[Any, Any],
    *,
    variant: str,
    shape: tuple[int, int],
    supersample: int,
    extras: tuple[str, ...],
) -> Split:
    """One scene with all its labels.

    Args:
      key: of the scene.
      style: fields of a Style.
      noise: probabilities of a wrong and of an ignored label of an object.
      variant, shape, supersample, extras: of the configuration.
    """
    height, width = shape
    fine = (height * supersample, width * supersample)
    bits = jax.random.bits(key, (_UNIFORMS + 2 * fine[0] * fine[1],), jnp.uint32)
    draw = scene.Uniforms((bits[:_UNIFORMS] >> 8).astype(jnp.float32) * 2.0**-24)
    made = _MAKERS[variant](draw, style)
    sky = names.STREET_CLASSES.index("sky") if variant == "street" else None
    seen = render.see(made, fine, sky=sky)

    noise_bits = bits[_UNIFORMS:].reshape(2, -1)
    octets = jnp.stack([(noise_bits >> shift) & 255 for shift in (0, 8, 16, 24)], 1).astype(jnp.float32)  # [2, 4, N]
    # The sum of two uniform bytes has a standard deviation of 104.5.
    sensor = (octets[0, :3] + octets[1, :3] - 255.0) / 104.5
    speckle = (octets[0, 3] * 256 + octets[1, 3]) / 65536
    gain, gamma = draw.between(0.8, 1.3), draw.between(0.55, 0.85)
    picture = render.photograph(seen.colour, sensor * supersample, gain, gamma, style).reshape(3, *fine)
    cells = picture.reshape(3, height, supersample, width, supersample)
    image = jnp.mean(cells, (2, 4))

    def centre(values: Array) -> Array:
        """Values of the central ray of every pixel, [..., H, W]."""
        middle = supersample // 2
        return values.reshape(*values.shape[:-1], *fine)[..., middle::supersample, middle::supersample]

    seen = jax.tree.map(centre, seen)
    segmentation = _with_wrong_labels(draw, seen, noise, names.THINGS[variant])
    identity = seen.label * labels.PANOPTIC_DIVISOR + seen.instance
    contour = labels.contours(identity)
    occlusion = labels.occlusions(seen.depth, seen.surface)
    edge = contour | occlusion | labels.creases(seen.normal, seen.surface, seen.curved)
    holes = labels.depth_holes(seen.depth, seen.facing, jnp.mean(image, 0), centre(speckle), made.camera.focal)
    pixels = width / 2 * made.camera.focal
    columns = {
        "segmentation": segmentation.astype(jnp.uint8),
        "depth": jnp.where(holes, jnp.nan, seen.depth).astype(jnp.float16),
        "normals": jnp.moveaxis(seen.normal, 0, -1).astype(jnp.float16),
        "edge": edge.astype(jnp.uint8),
        "parts": seen.part.astype(jnp.uint8),
        "saliency": labels.salient(seen.instance, scene.MAX_OBJECTS),
        "disparity": jnp.where(jnp.isinf(seen.depth), jnp.nan, pixels * STEREO_BASE / seen.depth).astype(jnp.float16),
        "classification": made.target - grammar.FIRST_OBJECT,
        "shading": seen.facing.astype(jnp.float16),
        "contour": contour.astype(jnp.uint8),
        "occlusion": occlusion.astype(jnp.uint8),
        "texture_edge": labels.sobel(jnp.mean(image, 0)).astype(jnp.float16),
        "curvature": jnp.moveaxis(seen.curvature, 0, -1).astype(jnp.float16),
    }
    return {
        "image": jnp.round(jnp.moveaxis(image, 0, -1) * 255).astype(jnp.uint8),
        "labels": {task: columns[task] for task in (*names.TASKS[variant], *extras)},
        "instances": seen.instance.astype(jnp.uint8),
        "focal": made.camera.focal,
    }


def _with_wrong_labels(
    draw: scene.Uniforms, seen: render.Seen, noise: tuple[Any, Any], things: tuple[int, ...]
) -> Array:
    """Classes i32[H, W] in which some objects have another object class or the ignored one."""
    count = scene.MAX_OBJECTS + 1
    chance, pick = draw(count), jnp.asarray(things)[jnp.floor(draw(count) * len(things)).astype(jnp.int32)]
    changed = jnp.where(chance < noise[0], pick, jnp.where(chance < noise[0] + noise[1], labels.IGNORED, -1))
    changed = jnp.where(jnp.arange(count) == 0, -1, changed)[seen.instance]
    return jnp.where(changed >= 0, changed, seen.label)


HETEROGENEOUS = {
    "classification": ("object", Style(contrast=0.5, saturation=(0.2, 0.9))),
    "segmentation": ("rooms", Style()),
    "detection": ("rooms", Style(textures=(0.2, 0.1, 0.4, 0.3), pitch=(-35.0, 8.0), focal=(0.8, 1.2))),
    "depth": ("rooms", Style(textures=(0.7, 0.3, 0.0, 0.0), ambient=(0.3, 0.6), focal=(0.8, 1.0), noise=0.03)),
    "normals": ("rooms", Style(textures=(0.3, 0.0, 0.1, 0.6), saturation=(0.0, 0.4), height=(0.3, 0.6))),
}
"""Variant and style of the single-task sets of `heterogeneous`."""


def heterogeneous(
    config: RoomsConfig,
    tasks: Sequence[str] = tuple(HETEROGENEOUS),
    *,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Split]]:
    """Single-task sets that share no image: every task has its own keys, textures and cameras.

    Args:
      config: sizes and seed; its variant, stream and style are replaced by those of the task (HETEROGENEOUS).
      tasks: among 'classification' (i32[n], of OBJECT_CLASSES), 'segmentation', 'detection' ({'boxes' f32[n, 7, 4],
        'classes' i32[n, 7]}, class -1 = no object), 'depth', 'normals'.
      folder, progress: as in `load`.

    Returns:
      {task: {'train' | 'validation' | 'test': {'image', 'label'}}}

    Raises:
      ValueError: for a task that is unknown.
    """
    unknown = set(tasks) - set(HETEROGENEOUS)
    if unknown:
        raise ValueError(f"tasks holds {sorted(unknown)}; known are {', '.join(HETEROGENEOUS)}")
    sets = {}
    for task in tasks:
        variant, style = HETEROGENEOUS[task]
        # The streams after that of the joint set, by the task and not by what else is asked for.
        stream = config.stream + 1 + list(HETEROGENEOUS).index(task)
        own = dataclasses.replace(config, variant=variant, style=style, stream=stream, extras=())
        data = load(own, folder=folder, progress=progress)
        sets[task] = {split: {"image": part["image"], "label": _label(task, part)} for split, part in data.items()}
    return sets


def _label(task: str, split: Split) -> Any:
    if task != "detection":
        return split["labels"][task]
    found, classes = labels.boxes(
        split["instances"], split["labels"]["segmentation"], things=names.THINGS["rooms"], count=scene.MAX_OBJECTS
    )
    return {"boxes": found, "classes": classes}


def to_records(
    config: RoomsConfig, *, folder: str | os.PathLike, cache: str | os.PathLike | None = None, version: str = "1.0.0"
) -> Any:
    """Writes the set as a tensorflow-datasets builder, readable without TensorFlow; returns the builder.

    Args:
      config: what to render, or to read from the cache.
      folder: where tensorflow-datasets keeps its data sets.
      cache: folder of `load`.
      version: of the builder, 'major.minor.patch'; give another one to another configuration of the variant.
    """
    text = (
        f"Rendered scenes, {config}. Depth in metres and disparity in pixels, NaN where there is none; normals in the "
        "camera's frame (x right, y down, z forward); 255 is the ignored class."
    )
    data = load(config, folder=cache, progress=False)
    return records.write(
        f"rooms_{config.variant}",
        data,
        folder=folder,
        version=version,
        description=text,
        task_names=names.TASKS[config.variant],
    )
