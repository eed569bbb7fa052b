r"""Surgery on the modular model: pull a task out, make it cheaper, add tasks and experts without touching the old ones.

    extract      the experts that a task uses, its gates, its vector, its head: a small single-task model
    grow         n more experts per layer and a new task whose gates see old and new ones; old gates see the old only
    with_top_k   the same parameters with fewer experts per token

Everything slices and appends stacked arrays, from (model, params) to (model', params'). Which experts a task uses comes
from counting (`mtjax.train.heterogeneous.expert_usage`) or from the moving averages of training (`usage_of`).

Extraction keeps expert e of a layer iff its percentage of the task's choices is above threshold / K, and never fewer
than K (the most used). The softmax of a gate runs over all experts, so a gate keeps the columns of the experts that
were taken out ("ghosts"): a few numbers, with which the small model computes what the whole one did, to rounding, as
long as no expert is missed. (Mod-Squad's code drops them, which makes every gate value larger: `ghosts=False`.)

Growth keeps old outputs *bit-identical*: an old task's gate cannot address a new expert, its tokens never meet a new
task's in a layer, and `trainable` masks the updates of everything old. Asked for old tasks, the grown model runs the
program that the old one ran; asked for all tasks at once, XLA may fuse this larger program in another way, so its old
outputs can differ from the old model's in the last bit, but not from its own before the new task's training. What a new
task trains is one of

    'new'                the new experts, its gates, vector and head
    'router_and_head'    its gates, vector and head; all experts stay as they are
    'used'               these, and the experts that it uses: other tasks that use them change too

To give a task fewer parameters, `extract` it (after some training of its gates) and go on; to make it cheaper,
`with_top_k`. All can be combined.

References: Chen et al., "Mod-Squad", CVPR 2023 (extraction: the published code); Chen et al., "An Efficient
General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training", 2023, for transfer and continual learning
(no code; built from the abstract).

Letters: T tasks, E experts of a layer, K experts per token, D width, n new experts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtjax.models.mod_squad import Decoder, ModSquad
from mtjax.nn.expert_surgery import experts_to_keep, grow_experts, prune_to_task

PyTree = Any
Usage = Mapping[str, np.ndarray]
Which = Literal["new", "router_and_head", "used"]


def extract(
    model: ModSquad, params: PyTree, task: str, usage: Usage, *, threshold: float = 3.0, ghosts: bool = True
) -> tuple[ModSquad, PyTree]:
    """The single-task model of the experts that a task uses.

    Args:
      model, params: a modular model; what `params` holds beside the model's own is left out.
      task: its name.
      usage: {layer name: f[T, E]}, shares as from `expert_usage`.
      threshold: an expert stays iff it has more than threshold / K percent of the choices; at least K stay. 0 keeps
        whatever was used at all; Mod-Squad's default is 3.
      ghosts: keep the gate columns of removed experts in the softmax (see the module).

    Returns:
      A model with this task, and its parameters.
    """
    (index,) = model.indices(task)
    trunk = _copy(params["trunk"])
    counts, remaining = [], []
    for layer in model.config.layers:
        pruned = prune_to_task(
            _layer(trunk, layer.name),
            100 * np.asarray(usage[layer.name][index]),
            task=index,
            config=model.config.router(layer),
            threshold=threshold,
            keep_denominator=ghosts,
        )
        _replace(trunk, layer.name, pruned.params)
        counts.append(pruned.config.num_experts)
        remaining.append(pruned.config.ghosts)
    trunk["task_vectors"] = trunk["task_vectors"][index : index + 1]
    config = dataclasses.replace(model.config, counts=tuple(counts), ghosts=tuple(remaining), reach=None)
    decoder = {task: model.decoder[task]} if isinstance(model.decoder, Mapping) else model.decoder
    head = f"head_{task}"
    small = ModSquad(config, {task: model.heads[task]}, decoder)
    return small, {"trunk": trunk, head: params[head]}


def grow(
    model: ModSquad,
    params: PyTree,
    task: str,
    num_experts: int,
    key: jax.Array,
    *,
    channels: int,
    image_size: tuple[int, int],
    decoder: Any | None = None,
) -> tuple[ModSquad, PyTree]:
    """A new task, and new experts in every layer that only it can address.

    Args:
      model, params: a modular model; what `params` holds beside the model's own is left out.
      task: name of the new task.
      num_experts: n, appended to every layer; 0 adds the task only.
      key: for what is drawn anew.
      channels: of the new head.
      image_size: (H, W), pixels.
      decoder: of the new head; None: the model's, if it has one for all tasks.

    Returns:
      The larger model, whose last task is the new one, and its parameters. Old tasks' outputs are the same bits.

    Raises:
      ValueError: if the task exists, or it is not said which decoder it has.
    """
    if task in model.heads:
        raise ValueError(f"The model already has a task '{task}'; give the new one another name")
    if decoder is None and isinstance(model.decoder, Mapping):
        raise ValueError(f"The model has a decoder per task; give that of '{task}'")
    config, old_tasks = model.config, len(model.heads)
    key_vector, key_head, key_layers = jax.random.split(key, 3)
    trunk = _copy(params["trunk"])
    counts = tuple(layer.num_experts for layer in config.layers)
    for layer, own in zip(config.layers, jax.random.split(key_layers, len(counts)), strict=True):
        grown = grow_experts(_layer(trunk, layer.name), own, num_experts, config=config.router(layer))
        _replace(trunk, layer.name, grown.params)
    vector = 0.02 * jax.random.normal(key_vector, (1, config.vit.width))
    trunk["task_vectors"] = jnp.concatenate([trunk["task_vectors"], vector])

    larger = tuple(count + num_experts for count in counts)
    reach = ((counts,) * old_tasks if config.reach is None else config.reach) + (larger,)
    config = dataclasses.replace(config, counts=larger, reach=None if all(row == larger for row in reach) else reach)
    decoders: Decoder = model.decoder
    if decoder is not None:
        old = model.decoder if isinstance(model.decoder, Mapping) else dict.fromkeys(model.heads, model.decoder)
        decoders = {**old, task: decoder}
    new = ModSquad(config, {**model.heads, task: channels}, decoders)
    grid = [side // config.vit.patch for side in image_size]
    tokens = jnp.zeros((1, grid[0] * grid[1], config.vit.width))
    head = new.head(task, name=None, parent=None).init(key_head, tokens, image_size)["params"]
    heads = {f"head_{name}": params[f"head_{name}"] for name in model.heads}
    return new, {"trunk": trunk, **heads, f"head_{task}": head}


def trainable(
    model: ModSquad,
    params: PyTree,
    task: str,
    which: Which = "new",
    *,
    usage: Usage | None = None,
    threshold: float = 3.0,
) -> PyTree:
    """What a task trains when everything else is to stay as it is.

    Args:
      model, params: the (grown) model; whatever `params` holds beside the model's own trains.
      task: its name.
      which: see the module.
      usage: with 'used', shares as from `expert_usage`.
      threshold: with 'used', as in `extract`.

    Returns:
      Booleans in the structure of params, every leaf of a shape that broadcasts to the parameter's: True trains.
    """
    if which not in ("new", "router_and_head", "used"):
        raise ValueError(f"which must be 'new', 'router_and_head' or 'used', got {which!r}")
    if (which == "used") != (usage is not None):
        raise ValueError(f"usage is given with which='used' and only with it, got which={which!r}")
    (index,) = model.indices(task)
    layers = {layer.name: layer for layer in model.config.layers}
    is_task = np.arange(len(model.heads)) == index

    def experts(name: str) -> np.ndarray:
        layer = layers[name]
        if which == "used":
            percent = 100 * np.asarray(usage[name][index])
            return np.isin(
                np.arange(layer.num_experts), experts_to_keep(percent, top_k=layer.top_k, threshold=threshold)
            )
        if which == "router_and_head" or layer.reach is None:
            return np.zeros(layer.num_experts, bool)
        own, others = layer.reach[index], [reach for k, reach in enumerate(layer.reach) if k != index]
        return (np.arange(layer.num_experts) >= max(others)) & (np.arange(layer.num_experts) < own)

    def mark(path: Any, leaf: jax.Array) -> np.ndarray:
        keys = [entry.key for entry in path]
        if keys[0] != "trunk":
            return np.full((1,) * leaf.ndim, keys[0] == f"head_{task}" or not keys[0].startswith("head_"))
        rows = np.zeros(1, bool)
        if "router" in keys or keys[-1] == "task_vectors":
            rows = is_task
        elif "/".join(keys[1:3]) in layers and "key_value" not in keys:
            rows = experts("/".join(keys[1:3]))
        return rows.reshape(-1, *[1] * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(mark, params)


def train_only(optimizer: optax.GradientTransformation, mask: PyTree) -> optax.GradientTransformation:
    """The optimizer, whose updates are 0 wherever the mask is False: momentum and weight decay included.

    >>> optimizer = train_only(optax.adamw(0.1), {"w": np.array([True, False])})
    >>> params = {"w": jnp.ones(2)}
    >>> updates, _ = optimizer.update({"w": jnp.ones(2)}, optimizer.init(params), params)
    >>> (updates["w"] != 0).tolist()
    [True, False]
    """

    def update(updates, params):
        del params
        return jax.tree.map(lambda keep, u: jnp.where(keep, u, jnp.zeros_like(u)), mask, updates)

    return optax.chain(optimizer, optax.stateless(update))


def with_top_k(model: ModSquad, *, top_k: int | None = None, attention_top_k: int | None = None) -> ModSquad:
    """The model for the same parameters with fewer experts per token; an expert is a unit of cost. Fine-tune after.

    Args:
      model: a modular model.
      top_k: K of the MLP layers; None: as it is.
      attention_top_k: K of the attention layers; None: as it is.
    """
    config = model.config
    changes: dict[str, Any] = {"expert_hidden": config.hidden}
    if top_k is not None:
        changes["top_k"] = top_k
    if attention_top_k is not None:
        changes["attention_top_k"] = attention_top_k
    return model.clone(config=dataclasses.replace(config, **changes))


def _copy(tree: PyTree) -> PyTree:
    """Dictionaries anew, arrays as they are."""
    return jax.tree.map(lambda leaf: leaf, tree)


def _layer(trunk: PyTree, name: str) -> PyTree:
    """A layer's parameters, by its name 'block/half'."""
    block, half = name.split("/")
    return trunk[block][half]


def _replace(trunk: PyTree, name: str, params: PyTree) -> None:
    """Puts other parameters in their place."""
    block, half = name.split("/")
    trunk[block][half] = params
