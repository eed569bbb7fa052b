import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.models.cross_stitch import NDDR, CrossStitch, CrossStitchViT, exchange_points
from mtjax.models.multitask_vit import MultitaskViT, SingleTaskViT
from mtjax.nn.decoders import ConvHead, LinearUnpatch
from mtjax.nn.vit import ViTConfig

from .vision_cases import Linear

HEADS = {"edge": 1, "normals": 3}
CONFIG = ViTConfig(patch=4, width=8, depth=1, num_heads=2, cls_token=True)


MODELS = {
    "multitask": MultitaskViT(HEADS, CONFIG, Linear),
    "single": SingleTaskViT(HEADS, CONFIG, Linear),
    "stitch": CrossStitchViT(HEADS, ViTConfig(4, 8, depth=2, num_heads=2), Linear, after=(0,)),
    "nddr": CrossStitchViT(HEADS, CONFIG, Linear, fusion="nddr"),
}
IMAGE = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
BATCH = {"image": IMAGE}


@functools.cache
def params(name):
    """Random numbers in every parameter: no compilation of an initialisation."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), BATCH)["params"]
    return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


@functools.cache
def results(name):
    """Of two seeds at once: outputs of all tasks, of one task alone, and the Jacobian of the tasks' losses."""

    if name == "nddr":  # differs from 'stitch' in the exchange only
        run = jax.jit(lambda p: (MODELS[name].apply(p, BATCH), MODELS[name].apply(p, BATCH, task="normals"), None))
        return jax.tree.map(lambda y: np.asarray(y)[None], run({"params": params(name)}))

    def run(params):
        def losses(params):
            outputs = MODELS[name].apply({"params": params}, BATCH)
            return jnp.stack([jnp.mean(jnp.square(y)) for y in outputs.values()]), outputs

        jacobian, outputs = jax.jacrev(losses, has_aux=True)(params)
        return outputs, MODELS[name].apply({"params": params}, BATCH, task="normals"), jacobian

    two = jax.tree.map(lambda leaf: np.stack([leaf, 1.1 * leaf]), params(name))
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(two))


@pytest.mark.parametrize("name", MODELS)
def test_one_task_equals_all_tasks(name):
    model, (together, alone, _) = MODELS[name], results(name)
    assert {task: y.shape[1:] for task, y in together.items()} == {"edge": (2, 8, 8, 1), "normals": (2, 8, 8, 3)}
    assert list(alone) == ["normals"]
    np.testing.assert_allclose(alone["normals"], together["normals"], atol=1e-5)
    shapes = jax.eval_shape(functools.partial(model.init, task="normals"), jax.random.key(0), BATCH)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params(name))
    outputs, aux = jax.eval_shape(functools.partial(model.apply, with_aux=True), {"params": params(name)}, BATCH)
    assert list(outputs) == list(HEADS) and aux == {}
    with pytest.raises(ValueError, match="task='parts' is not one of the model's tasks"):
        model.apply({"params": params(name)}, BATCH, task="parts")


@pytest.mark.parametrize("name", ["multitask", "single", "stitch"])
def test_who_shares_what(name):
    """Tasks share the dense trunk wholly, single-task networks not at all, stitched ones up to the last exchange."""
    jacobian = results(name)[2]

    def reaches(leaf, axes):
        """Which task's loss reaches a leaf [seed, task, (copy,) ...] of the first seed."""
        return (np.abs(leaf[0]).reshape(*leaf.shape[1 : 1 + axes], -1).max(-1) > 0).tolist()

    assert reaches(jacobian["head_edge"]["out"]["kernel"], 1) == [True, False]
    assert reaches(jacobian["head_normals"]["out"]["kernel"], 1) == [False, True]
    own, both = [[True, False], [False, True]], [[True, True], [True, True]]
    if name == "multitask":
        assert all(any(reaches(leaf, 1)) for leaf in jax.tree.leaves(jacobian["trunk"]))
        assert reaches(jacobian["trunk"]["patch_embed"]["kernel"], 1) == [True, True]
    elif name == "single":
        for leaf in jax.tree.leaves(jacobian["trunk"]):
            assert reaches(leaf, 2) == own
    else:
        last = MODELS[name].exchanges[-1]
        for index in range(MODELS[name].config.depth):
            for leaf in jax.tree.leaves(jacobian[f"block_{index}"]["feed_forward"]):
                assert reaches(leaf, 2) == (both if index <= last else own)


def test_single_task_networks_are_plain_vits():
    tree = params("single")
    for index, (name, channels) in enumerate(HEADS.items()):
        alone = MultitaskViT({name: channels}, CONFIG, Linear)
        own = {"trunk": jax.tree.map(lambda x: x[index], tree["trunk"]), f"head_{name}": tree[f"head_{name}"]}  # noqa: B023
        expected = jax.jit(alone.apply)({"params": own}, BATCH)[name]
        np.testing.assert_allclose(results("single")[0][name][0], expected, atol=1e-5)


def test_cross_stitch_mixes_channel_by_channel(rng):
    x = rng.normal(size=(3, 2, 4, 5)).astype(np.float32)
    a = rng.normal(size=(3, 3, 5)).astype(np.float32)
    expected = np.stack([sum(a[t, s] * x[s] for s in range(3)) for t in range(3)])
    unit = CrossStitch()
    np.testing.assert_allclose(unit.apply({"params": {"mixing": a}}, x), expected, atol=1e-5)
    np.testing.assert_allclose(unit.apply({"params": {"mixing": a}}, x, 1), expected[1:2], atol=1e-5)
    init = unit.init(jax.random.key(0), x)["params"]["mixing"]
    np.testing.assert_allclose(init[:, :, 0], [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]], atol=1e-6)


def test_nddr_is_a_linear_map_of_all_channels(rng):
    x = rng.normal(size=(3, 2, 4, 5)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 5, 5)).astype(np.float32)
    expected = np.stack([sum(x[s] @ kernel[t, s] for s in range(3)) for t in range(3)])
    unit = NDDR()
    np.testing.assert_allclose(unit.apply({"params": {"kernel": kernel}}, x), expected, atol=1e-4)
    np.testing.assert_allclose(unit.apply({"params": {"kernel": kernel}}, x, 2), expected[2:], atol=1e-4)
    # Both units start as the same function.
    start = unit.apply(unit.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(start, CrossStitch().apply(CrossStitch().init(jax.random.key(0), x), x), atol=1e-5)


def test_decoders_may_differ_between_tasks():
    model = MultitaskViT(HEADS, CONFIG, {"edge": LinearUnpatch, "normals": functools.partial(ConvHead, width=4)})
    tree = jax.eval_shape(model.init, jax.random.key(0), BATCH)["params"]
    assert tree["head_edge"]["out"]["dense"]["kernel"].shape == (8, 16)
    assert tree["head_normals"]["out"]["dense"]["kernel"].shape == (4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "sum"}, "fusion must be 'cross_stitch' or 'nddr', got 'sum'"),
        ({"after": (2,)}, r"after must name blocks 0\.\.0, got \[2\]"),
        ({"config": ViTConfig(scan=True)}, "config.scan must be False"),
    ],
)
def test_errors_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        CrossStitchViT(HEADS, **{"config": CONFIG, **options})


def test_exchanges_end_equal_parts_of_the_trunk():
    assert exchange_points(12) == (2, 5, 8, 11)
    assert exchange_points(24) == (5, 11, 17, 23)
    assert exchange_points(2) == (0, 1) and exchange_points(1) == (0,)
