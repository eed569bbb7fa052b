r"""Weights of pretrained vision transformers, from a local safetensors file of timm or Hugging Face.

| `mtjax.nn.vit`               | timm                | Hugging Face (E: embeddings, L.i: encoder.layer.i)      |
|------------------------------|---------------------|---------------------------------------------------------|
| patch_embed/kernel, bias     | patch_embed.proj    | E.patch_embeddings.projection                           |
| patch_embed/positions        | pos_embed           | E.position_embeddings                                   |
| patch_embed/cls              | cls_token           | E.cls_token                                             |
| block_i/norm_1               | blocks.i.norm1      | L.i.layernorm_before                                    |
| block_i/attention/qkv        | blocks.i.attn.qkv   | L.i.attention.attention.query, .key, .value             |
| block_i/attention/out        | blocks.i.attn.proj  | L.i.attention.output.dense                              |
| block_i/norm_2               | blocks.i.norm2      | L.i.layernorm_after                                     |
| block_i/feed_forward/in      | blocks.i.mlp.fc1    | L.i.intermediate.dense                                  |
| block_i/feed_forward/out     | blocks.i.mlp.fc2    | L.i.output.dense                                        |
| norm                         | norm                | layernorm                                               |

Matrices are transposed to [in, out]; the convolution over patches f[D, C, P, P] becomes the matrix f[P P C, D]; query,
key and value are packed as [D, 3, D]; positions are interpolated to another grid, the class token's stays. Classifiers
and poolers are dropped, and the class token too if the model has none. Everything else must match: an error lists what
is missing, unexpected or of another shape.

Images must be normalised as those weights expect: most of timm's and Hugging Face's ViT by mean and deviation 1/2 in
each channel, DeiT's by ImageNet's. Hugging Face's layer norms have epsilon 1e-12, here it is 1e-6 as in timm.

Letters: P patch side, C channels, D width, h x w grid of patches, N = h w tokens.

>>> import jax
>>> weights = {"blocks.0.norm1.weight": np.ones(8), "pos_embed": np.ones((1, 17, 8)), "head.weight": np.ones((10, 8))}
>>> jax.tree.map(np.shape, to_tree(weights))
{'block_0': {'norm_1': {'scale': (8,)}}, 'patch_embed': {'positions': (17, 8)}}
"""

import fnmatch
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mtjax.nn.vit import interpolate_positions, stack_layers

Grid = tuple[int, int]
Params = Mapping[str, Any]

DROPPED = r"(head|head_drop|fc_norm|pre_logits|classifier|pooler)\..*"
# Names of a module, as patterns, and its path here.
_MODULES = {
    r"patch_embed\.proj|embeddings\.patch_embeddings\.projection": "patch_embed",
    r"blocks\.(\d+)\.norm1|encoder\.layer\.(\d+)\.layernorm_before": "block_{}/norm_1",
    r"blocks\.(\d+)\.norm2|encoder\.layer\.(\d+)\.layernorm_after": "block_{}/norm_2",
    r"blocks\.(\d+)\.attn\.qkv": "block_{}/attention/qkv",
    r"blocks\.(\d+)\.attn\.proj|encoder\.layer\.(\d+)\.attention\.output\.dense": "block_{}/attention/out",
    r"blocks\.(\d+)\.mlp\.fc1|encoder\.layer\.(\d+)\.intermediate\.dense": "block_{}/feed_forward/in",
    r"blocks\.(\d+)\.mlp\.fc2|encoder\.layer\.(\d+)\.output\.dense": "block_{}/feed_forward/out",
    r"norm|layernorm": "norm",
}
_TOKENS = {r"pos_embed|embeddings\.position_embeddings": "positions", r"cls_token|embeddings\.cls_token": "cls"}
_SEPARATE = re.compile(r"(encoder\.layer\.\d+\.attention\.attention)\.(query|key|value)\.(weight|bias)")


def load(
    path: str | os.PathLike,
    params: Params,
    *,
    grid: Grid | None = None,
    file_grid: Grid | None = None,
    keep: Sequence[str] = (),
    unused: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The parameters of a trunk with the weights of a file in them.

    Args:
      path: of a .safetensors file; any floating-point type.
      params: the trunk's initial parameters, with the layout of `mtjax.nn.vit.ViT`, of its scan, or of a trunk whose
        blocks have other parts beside or instead (then see `keep` and `unused`).
      grid: (h, w) of the trunk's patches, `patch_grid(image size, patch)`; None: that of the file if it has as many
        patches, else a square.
      file_grid: (h, w) the weights were trained on; None: a square.
      keep: patterns of parameters that stay as they are if the file lacks them; M3ViT's trunk needs '*/experts/*'.
      unused: patterns of weights, named as here, that are dropped if the trunk has no place for them; M3ViT's needs
        '*/feed_forward/*'.
      groups: layers of a scan, as for `mtjax.nn.vit.stack_layers`; None: {'blocks': all} if the trunk has 'blocks'.

    Returns:
      A new tree like `params`, its leaves in the types they had.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if the package safetensors is not installed.
      ValueError: if weights are missing, unexpected or of another shape, or the grids do not fit.
    """
    tree = to_tree(read(path))
    target = {"/".join(key): leaf for key, leaf in flatten_dict(dict(params)).items()}
    if "patch_embed/positions" in target and "positions" in tree.get("patch_embed", {}):
        tree["patch_embed"] = _fitted_positions(tree["patch_embed"], target, grid, file_grid)
    if groups is None and "blocks" in params:
        names = sorted((name for name in tree if name.startswith("block_")), key=lambda name: int(name[6:]))
        groups = {"blocks": names}
    tree = tree if groups is None else stack_layers(tree, groups)
    given = {"/".join(key): leaf for key, leaf in flatten_dict(tree).items()}

    missing = [name for name in target if name not in given and not _matches(name, keep)]
    unexpected = [name for name in given if name not in target and not _matches(name, unused)]
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(target[name].shape)}"
        for name in given
        if name in target and given[name].shape != target[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"{path} does not hold the weights of this trunk; {'; '.join(problems)}")
    leaves = {name: jnp.asarray(given[name], leaf.dtype) if name in given else leaf for name, leaf in target.items()}
    return unflatten_dict({tuple(name.split("/")): leaf for name, leaf in leaves.items()})


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, as float32.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if the package safetensors is not installed.
      ValueError: if it is not a safetensors file.
    """
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("Weights are read by the package safetensors: pip install safetensors") from error
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"No file {path}; expected the weights of a vision transformer, model.safetensors")
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or it is cut: {error}") from error


def to_tree(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Weights by their names in timm or Hugging Face as the parameters of `mtjax.nn.vit.ViT`.

    Args:
      tensors: name -> array; a common prefix 'vit.', 'deit.', 'model.' or 'module.' is taken off.

    Returns:
      The tree of the file's own sizes, classifiers and poolers dropped.

    Raises:
      ValueError: for a name that a vision transformer does not have, or a query, key or value without the other two.
    """
    tensors = {re.sub(r"^(module\.|model\.|vit\.|deit\.)+", "", name): array for name, array in tensors.items()}
    flat, strange = {}, []
    for name, array in _packed(tensors).items():
        if re.fullmatch(DROPPED, name):
            continue
        path = _path(name)
        if path is None:
            strange.append(name)
        else:
            flat[path] = _converted(path, np.asarray(array, np.float32))
    if strange:
        listed = ", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
        raise ValueError(
            f"These weights are not of a plain vision transformer of timm or Hugging Face: it has no {listed}"
        )
    return unflatten_dict(flat)


def _packed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Separate query, key and value weights [D, D] as one [3 D, D] with timm's name, biases alike."""
    packed = dict(tensors)
    for stem, kind in sorted({match.group(1, 3) for match in map(_SEPARATE.fullmatch, tensors) if match}):
        names = [f"{stem}.{part}.{kind}" for part in ("query", "key", "value")]
        lacking = [name for name in names if name not in tensors]
        if lacking:
            raise ValueError(f"The weights hold {names[0]} or its companions, but no {lacking[0]}")
        index = stem.split(".")[2]
        packed[f"blocks.{index}.attn.qkv.{kind}"] = np.concatenate([packed.pop(name) for name in names])
    return packed


def _path(name: str) -> tuple[str, ...] | None:
    """Where a weight lives here; None if nowhere."""
    for pattern, token in _TOKENS.items():
        if re.fullmatch(pattern, name):
            return ("patch_embed", token)
    module, _, kind = name.rpartition(".")
    for pattern, path in _MODULES.items():
        match = re.fullmatch(pattern, module)
        if match and kind in ("weight", "bias"):
            index = next((group for group in match.groups() if group is not None), None)
            parts = path.format(index).split("/")
            weight = "scale" if parts[-1].startswith("norm") else "kernel"
            return (*parts, weight if kind == "weight" else "bias")
    return None


def _converted(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] in ("positions", "cls"):
        return array.reshape(-1, array.shape[-1])
    if path == ("patch_embed", "kernel") and array.ndim == 4:
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    array = array.T if path[-1] == "kernel" else array
    return array.reshape(*array.shape[:-1], 3, -1) if path[-2] == "qkv" else array


def _fitted_positions(
    embed: Mapping[str, np.ndarray], target: Mapping[str, Any], grid: Grid | None, file_grid: Grid | None
) -> dict[str, np.ndarray]:
    """The patch embedding with positions of the trunk's grid, and without a class token that the trunk lacks."""
    embed, extra = dict(embed), int("cls" in embed)
    count = target["patch_embed/positions"].shape[0] - int("patch_embed/cls" in target)
    if extra and "patch_embed/cls" not in target:
        embed.pop("cls")
        embed["positions"], extra = embed["positions"][1:], 0
    given = embed["positions"].shape[0] - extra
    if given == count and grid is None and file_grid is None:
        return embed
    file_grid = _square(given, "file_grid") if file_grid is None else file_grid
    grid = (file_grid if given == count else _square(count, "grid")) if grid is None else grid
    for name, (h, w), patches in (("grid", grid, count), ("file_grid", file_grid, given)):
        if h * w != patches:
            raise ValueError(f"{name}={(h, w)} has {h * w} patches, but there are positions for {patches}")
    embed["positions"] = np.asarray(interpolate_positions(jnp.asarray(embed["positions"]), file_grid, grid))
    return embed


def _square(count: int, name: str) -> Grid:
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} positions are no square grid of patches; pass {name}=(h, w)")
    return side, side


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
