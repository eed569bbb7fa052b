"""MTAN-like masks and PAD-Net-like messages: the equations, one task at a time, what a task may and may not read."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import dense_tasks
from mtjax.models.mtan import MTAN, MTANConfig
from mtjax.models.pad_net import Messages, PadNet, PadNetConfig
from mtjax.nn.stacked_convs import StackedConvBlock
from mtjax.nn.vit import ViT, ViTConfig, to_map
from mtjax.train.images import image_losses

HEADS = {"segmentation": 4, "depth": 1, "normals": 3}
VIT = ViTConfig(patch=4, width=8, depth=2, num_heads=2, mlp_ratio=1.0)
MTAN_CONFIG = MTANConfig(VIT, hidden=4, head_width=8, upsample=1)
PAD_CONFIG = PadNetConfig(VIT, width=8, upsample=1)
SIZE = (8, 12)
BATCH = {"image": jnp.asarray(np.random.default_rng(0).normal(size=(2, *SIZE, 3)), jnp.float32)}
MODELS = {"mtan": MTAN(HEADS, MTAN_CONFIG), "pad_net": PadNet(HEADS, PAD_CONFIG)}


@functools.cache
def run(name):
    """(parameters, outputs, aux) for all tasks."""
    model = MODELS[name]
    shapes = jax.eval_shape(model.init, jax.random.key(0), BATCH)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), s.dtype), shapes)
    return params, *jax.jit(lambda params: model.apply(params, BATCH, with_aux=True, train=True))(params)


@pytest.mark.parametrize("name", MODELS)
def test_one_task_equals_its_part_of_all(name):
    params, outputs, aux = run(name)
    first = {f"{task}/first": c for task, c in HEADS.items()} if name == "pad_net" else {}
    assert {key: y.shape for key, y in outputs.items()} == {key: (2, *SIZE, c) for key, c in (HEADS | first).items()}
    model = MODELS[name]

    def poison(path, leaf):
        """NaN in what only other tasks own."""
        keys = [key.key for key in path]
        owned = {"masks_0", "masks_1", "gate"} & set(keys)
        if owned or "messages" in keys:
            return jnp.full_like(leaf, jnp.nan).at[1].set(leaf[1])
        others = {"segmentation", "normals", "first_segmentation", "first_normals"} & set(keys)
        return jnp.full_like(leaf, jnp.nan) if others else leaf

    poisoned = jax.tree_util.tree_map_with_path(poison, params)
    alone, its_aux = jax.jit(lambda params: model.apply(params, BATCH, task="depth", with_aux=True, train=True))(
        poisoned
    )
    assert list(alone) == ["depth"] if name == "mtan" else ["depth", "depth/first"]
    np.testing.assert_allclose(alone["depth"], outputs["depth"], rtol=1e-4, atol=1e-4)
    if name == "mtan":
        np.testing.assert_allclose(its_aux["block_1"][0], aux["block_1"][1], rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_allclose(alone["depth/first"], outputs["depth/first"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(its_aux["gates"][0], aux["gates"][1], rtol=1e-4, atol=1e-5)
    asked = jax.eval_shape(lambda key: model.init(key, BATCH, task="depth"), jax.random.key(0))
    assert jax.tree.map(jnp.shape, asked) == jax.tree.map(jnp.shape, params), "parameters exist whatever is asked"


def test_masks_follow_the_equations():
    """The second mask of each task, from the first one, by hand."""
    params, _, aux = run("mtan")
    inner = params["params"]

    @jax.jit
    def reads(params, mask):
        """The trunk's first map, and what the tasks select from it."""
        first = to_map(ViT(VIT).apply({"params": params["trunk"]}, BATCH["image"])[0], (2, 3))
        masked = (mask * first[None]).reshape(-1, 2, 3, 8)
        shared = StackedConvBlock(1, 8).apply({"params": params["shared_0"]}, masked)
        return first, shared.reshape(mask.shape)

    assert {name: mask.shape for name, mask in aux.items()} == {f"block_{i}": (3, 2, 2, 3, 8) for i in (0, 1)}
    assert all(float(mask.min()) > 0 and float(mask.max()) < 1 for mask in aux.values())
    first, selected = (np.asarray(x) for x in reads(inner, aux["block_0"]))
    own = jax.tree.map(np.asarray, inner["masks_1"])

    def norm(x, params, t):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * params["scale"][t] + params["bias"][t]

    for t in range(3):
        reduce, expand = own["reduce"]["conv"], own["expand"]
        x = np.concatenate([first, selected[t]], -1) @ reduce["kernel"][t, 0, 0] + reduce["bias"][t]
        x = np.asarray(nn.gelu(norm(x, own["reduce"]["norm"], t)))
        y = norm(x @ expand["kernel"][t, 0, 0] + expand["bias"][t], own["norm"], t)
        np.testing.assert_allclose(aux["block_1"][t], 1 / (1 + np.exp(-y)), rtol=1e-3, atol=1e-4)


def test_messages_equal_the_sum_over_the_other_tasks():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2, 4, 5, 6)), jnp.float32)
    messages = Messages(7, 3)
    params = messages.init(jax.random.key(0), x)
    kernel = params["params"]["kernel"]
    assert kernel.shape == (3, 2, 9 * 6, 7)
    conv = jax.jit(lambda k, x: nn.Conv(7, (3, 3), use_bias=False).apply({"params": {"kernel": k}}, x))
    others = [[1, 2], [0, 2], [0, 1]]
    expected = jnp.stack(
        [sum(conv(kernel[t, i].reshape(3, 3, 6, 7), x[s]) for i, s in enumerate(others[t])) for t in range(3)]
    )
    np.testing.assert_allclose(messages.apply(params, x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(messages.apply(params, x, (2,))[0], expected[2], rtol=1e-4, atol=1e-4)


def test_first_predictions_have_the_losses_of_their_tasks():
    tasks = (dense_tasks.segmentation(num_classes=4), dense_tasks.depth())
    _, outputs, _ = run("pad_net")
    rng = np.random.default_rng(3)
    labels = {
        "segmentation": jnp.asarray(rng.integers(0, 4, (2, *SIZE)), jnp.uint8),
        "depth": jnp.asarray(rng.random((2, *SIZE)), jnp.float16),
    }
    losses = image_losses(tasks, outputs, labels)
    for task in tasks:
        own, first = (task.loss(outputs[f"{task.name}{suffix}"], labels[task.name]) for suffix in ("", "/first"))
        np.testing.assert_allclose(losses[task.name], task.weight * (own + first), rtol=1e-5)


def test_first_predictions_are_not_part_of_inference():
    params = run("pad_net")[0]
    without = {key: value for key, value in params["params"].items() if not key.startswith("first_")}
    again = jax.eval_shape(lambda params: MODELS["pad_net"].apply({"params": params}, BATCH), without)
    assert again.keys() == HEADS.keys()


def test_errors_are_sentences():
    with pytest.raises(ValueError, match="at least two tasks"):
        jax.eval_shape(PadNet({"depth": 1}, PAD_CONFIG).init, jax.random.key(0), BATCH)
    with pytest.raises(ValueError, match="message_side must be 1 or 3, got 5"):
        dataclasses.replace(PAD_CONFIG, message_side=5)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        dataclasses.replace(MTAN_CONFIG, hidden=0)
    with pytest.raises(ValueError, match="increasing block numbers from 0 to 1"):
        MTANConfig(VIT, layers=(2,))
