"""The modular model: equality with a loop over tokens, both forms of a batch, costs, per-task gradients, seeds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.models.mod_squad import ModSquad, ModSquadConfig, PooledLinear
from mtjax.nn.decoders import HeatmapHead, LinearUnpatch
from mtjax.nn.moe import Dispatch
from mtjax.nn.vit import ViTConfig

VIT = ViTConfig(patch=4, width=16, depth=2, num_heads=2)
SIZES = {"vit": VIT, "num_experts": 5, "top_k": 2, "attention_experts": 3}
PLAIN = SIZES | {"dispatch": Dispatch("all_experts")}  # compiles fastest; the others are tested against it
SHALLOW = PLAIN | {"vit": ViTConfig(patch=4, width=16, depth=1, num_heads=2), "layout": "both"}
HEADS = {"segmentation": 3, "class": 4, "detection": 6}
DECODERS = {"segmentation": LinearUnpatch, "class": PooledLinear, "detection": HeatmapHead}
KEY = jax.random.key(0)


def images(seed, count=2):
    return jax.random.normal(jax.random.key(seed), (count, 8, 8, 3))


@functools.cache
def made(layout, **vit):
    """A model, and parameters that are all moved off their start."""
    config = ModSquadConfig(**PLAIN | {"vit": dataclasses.replace(VIT, **vit)}, layout=layout)
    model = ModSquad(config, HEADS, DECODERS)
    shapes = jax.eval_shape(model.init, KEY, {"image": images(0)})["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def forward(model, params, batch, **how):
    return jax.jit(lambda params, batch: model.apply({"params": params}, batch, **how))(params, batch)


def norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p["scale"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return np.asarray(jax.nn.gelu(x, approximate=False))


def naive_trunk(params, image, task, top_k):
    """One image through blocks of two expert layers each, token by token and expert by expert."""
    p = jax.tree.map(np.asarray, params)
    patches = image.reshape(2, 4, 2, 4, 3).transpose(0, 2, 1, 3, 4).reshape(4, -1)
    x = patches @ p["patch_embed"]["kernel"] + p["patch_embed"]["bias"]
    x = np.concatenate([p["patch_embed"]["cls"], x]) + p["patch_embed"]["positions"]
    for index in range(2):
        block = p[f"block_{index}"]
        x = x + p["task_vectors"][task]
        layer, h, y = block["attention"], norm(x, block["norm_1"]), np.zeros_like(x)
        key_value = h @ layer["key_value"]["kernel"] + layer["key_value"]["bias"]
        key, value = np.split(key_value, 2, axis=1)
        for token in range(5):
            probability = softmax(h[token] @ layer["router"]["kernel"][task])
            for expert in np.argsort(-probability)[:top_k]:
                query = h[token] @ layer["experts"]["query_kernel"][expert]
                read = softmax(query @ key.T / np.sqrt(key.shape[1])) @ value
                y[token] += probability[expert] * (read @ layer["experts"]["out_kernel"][expert])
        x = x + y
        layer, h, y = block["mlp"], norm(x, block["norm_2"]), np.zeros_like(x)
        experts = layer.get("experts", layer)
        for token in range(5):
            probability = softmax(h[token] @ layer["router"]["kernel"][task])
            for e in np.argsort(-probability)[:top_k]:
                hidden = gelu(h[token] @ experts["kernel_in"][e] + experts["bias_in"][e])
                y[token] += probability[e] * (hidden @ experts["kernel_out"][e] + experts["bias_out"][e])
        x = x + y
    return x[1:]


def test_the_trunk_is_a_loop_over_tokens_and_their_experts():
    model, params = made("both", cls_token=True)
    batch = images(3)
    outputs = forward(model, params, {"image": batch})
    for task, name in enumerate(HEADS):
        tokens = np.stack([naive_trunk(params["trunk"], np.asarray(image), task, 2) for image in batch])
        head = model.head(name, name=None, parent=None)
        expected = head.apply({"params": params[f"head_{name}"]}, jnp.asarray(tokens), (8, 8))
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-4, atol=1e-4)
    assert {name: output.shape for name, output in outputs.items()} == {
        "segmentation": (2, 8, 8, 3),
        "class": (2, 4),
        "detection": (2, 2, 2, 6),
    }


def test_streams_with_images_of_their_own_are_the_tasks_one_by_one():
    """Also: statistics are per stream, in the order asked for; recomputation of activations changes nothing."""
    model, params = made("twice")
    batch = {name: {"image": images(seed)} for seed, name in enumerate(HEADS)}
    together, stats = forward(model, params, batch, with_aux=True)
    again, _ = made("twice", remat=True)
    alone = forward(again, params, {"image": batch["class"]["image"]}, task="class")
    assert list(alone) == ["class"]
    np.testing.assert_allclose(together["class"], alone["class"], atol=1e-5)

    asked = ("detection", "segmentation")
    some, of_asked = forward(model, params, batch, task=asked, with_aux=True)
    for name in asked:
        np.testing.assert_allclose(some[name], together[name], atol=1e-5)
    assert list(of_asked) == [layer.name for layer in model.config.layers] == ["block_0/attention", "block_1/mlp"]
    for name, layer in of_asked.items():
        np.testing.assert_allclose(layer.count, stats[name].count[np.array([2, 0])])
        np.testing.assert_array_equal(layer.count.sum(1), 2 * 4 * 2)  # images, tokens, K
    shared = forward(model, params, {"image": images(1)})
    np.testing.assert_allclose(shared["class"], together["class"], atol=1e-5)
    assert np.abs(shared["detection"] - together["detection"]).max() > 1e-3


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("twice", ["block_0/attention", "block_1/mlp"]),
        ("both", ["block_0/attention", "block_0/mlp", "block_1/attention", "block_1/mlp"]),
        ("mlp", ["block_0/mlp", "block_1/mlp"]),
        ("attention", ["block_0/attention", "block_1/attention"]),
    ],
)
def test_layouts_have_experts_where_they_say_and_cost_what_the_plain_halves_cost(layout, expected):
    config = ModSquadConfig(**SIZES, layout=layout)
    assert [layer.name for layer in config.layers] == expected
    model = ModSquad(config, HEADS, DECODERS)
    trunk = jax.eval_shape(model.init, KEY, {"image": images(0)})["params"]["trunk"]
    for index in range(2):
        block = trunk[f"block_{index}"]
        assert ("experts" in block["attention"]) == (f"block_{index}/attention" in expected)
        assert ("mlp" in block) == ("feed_forward" not in block) == (f"block_{index}/mlp" in expected)
        if "mlp" in block:  # K experts together are as wide as the dense MLP
            mlp = block["mlp"]
            assert mlp.get("experts", mlp)["kernel_in"].shape == (5, 16, 4 * 16 // 2)
        if "experts" in block["attention"]:  # K (D d_h + d_h D) = 4 D^2, the plain attention's projections
            assert block["attention"]["experts"]["query_kernel"].shape == (3, 16, 2 * 16 // 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "thrice"}, "layout must be one of twice, both, mlp, attention, got 'thrice'"),
        ({"top_k": 3}, "top_k=3 must divide the dense hidden width mlp_ratio \\* width = 64"),
        ({"expert_hidden": 33}, "2 \\* 33 exceeds the dense hidden width 64"),
        ({"attention_experts": 1}, "block_0/attention has gates that pick 2 of 1 experts"),
        ({"counts": (3,)}, "need one number for each of block_0/attention, block_1/mlp, got \\(3,\\)"),
        ({"reach": ((3, 5), (3, 1))}, "block_1/mlp has gates that pick 2 of 1 experts"),
        ({"vit": ViTConfig(4, 16, 2, 2, scan=True)}, "cannot be scanned"),
    ],
)
def test_sizes_that_do_not_fit_are_explained(fields, message):
    with pytest.raises(ValueError, match=message):
        ModSquadConfig(**SIZES | fields)


def test_tasks_and_images_that_are_missing_are_named():
    model, params = made("twice")
    with pytest.raises(ValueError, match="task must name some of segmentation, class, detection, got 'depth'"):
        model.apply({"params": params}, {"image": images(0)}, task="depth")
    with pytest.raises(ValueError, match="neither 'image' nor images of class"):
        model.apply({"params": params}, {"detection": {"image": images(0)}}, task=["detection", "class"])


@pytest.mark.parametrize(
    "sizes",
    [SHALLOW, pytest.param(SHALLOW | {"dispatch": Dispatch()}, marks=pytest.mark.slow)],
    ids=["all_experts", "auto"],
)
def test_jacobian_under_vmap_over_seeds_gives_each_task_its_own_gates(sizes):
    """The gradient of one task's loss, through all experts on all tokens, is the reference."""
    heads = {"segmentation": 3, "depth": 1}
    batch = {name: {"image": images(seed, 1)} for seed, name in enumerate(heads)}

    def losses(params, batch, config=sizes):
        outputs = ModSquad(ModSquadConfig(**config), heads).apply({"params": params}, batch, train=True)
        return {name: (output**2).mean() for name, output in outputs.items()}

    init = functools.partial(ModSquad(ModSquadConfig(**SHALLOW), heads).init, train=False)
    params = jax.jit(jax.vmap(init, in_axes=(0, None)))(jax.random.split(KEY, 2), batch)["params"]
    values, rows = jax.jit(jax.vmap(mtjax.value_and_jacobian(losses), in_axes=(0, None)))(params, batch)
    assert values.shape == (2, 2) and values[0, 0] != values[1, 0]
    second = jax.tree.map(lambda leaf: leaf[1], params)
    expected = jax.jit(jax.grad(lambda p: losses(p, batch, SHALLOW)["depth"]))(second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1, 1], b, atol=2e-5), rows, expected)
    for leaf in (rows["trunk"]["block_0"]["mlp"]["router"]["kernel"], rows["trunk"]["task_vectors"]):
        size = np.abs(leaf).max(tuple(range(3, leaf.ndim)))  # [seed, task, gate]
        assert (size[:, [0, 1], [0, 1]] > 0).all() and (size[:, [0, 1], [1, 0]] == 0).all()
    assert (np.abs(rows["head_depth"]["norm"]["scale"][:, 0]) == 0).all()
