import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import dense_tasks
from mtjax.models.m3vit import M3VIT_B, M3VIT_FPGA, M3VIT_S, M3VIT_TI, ExpertBlock, M3ViT, M3ViTConfig, m3vit_balance
from mtjax.models.m3vit_inference import experts_of, extract_task
from mtjax.nn.balance import RouterStats
from mtjax.nn.decoders import PUP, LinearUnpatch
from mtjax.nn.vit import ViTConfig, attention_half, unstack_layers
from mtjax.train.images import image_loss

from .vision_cases import Linear, random_params

HEADS = {"edge": 1, "normals": 3, "depth": 1}
VIT = ViTConfig(patch=4, width=8, depth=2, num_heads=2, cls_token=True)
CONFIG = M3ViTConfig(VIT, experts=6, top_k=2, expert_ratio=2.0, task_dim=4, dispatch="all_experts")
IMAGE = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
BATCH = {"image": IMAGE}
KINDS = {
    "multi_gate": {},
    "single": {"router": "single"},
}


@functools.cache
def model(kind):
    return M3ViT(HEADS, dataclasses.replace(CONFIG, **KINDS[kind]), Linear)


@functools.cache
def params(kind):
    return random_params(model(kind), BATCH)


@functools.cache
def program(kind):
    return jax.jit(functools.partial(model(kind).apply, with_aux=True))


@functools.cache
def outputs(kind):
    return program(kind)({"params": params(kind)}, BATCH)


def test_experts_of_a_token_in_the_words_of_the_paper():
    """Softmax over all experts, the best K kept and not renormalised, by loops over tokens and experts."""
    tree, task = params("multi_gate")["trunk"]["block_1"], 1
    x = np.random.default_rng(2).normal(size=(1, 2, 5, 8)).astype(np.float32)
    y, stats = jax.jit(functools.partial(ExpertBlock(CONFIG, 0, 3).apply, tasks=(0, 1, 2)))({"params": tree}, x)
    half = {name: tree[name] for name in ("norm_1", "attention")}
    u, expected_importance = np.asarray(jax.jit(Half().apply)({"params": half}, x))[0], np.zeros(6)
    normed = u - u.mean(-1, keepdims=True)
    normed = normed / np.sqrt((normed**2).mean(-1, keepdims=True) + 1e-6)
    normed = normed * tree["norm_2"]["scale"] + tree["norm_2"]["bias"]
    p, expected = tree["experts"], u.copy()
    for b, n in np.ndindex(u.shape[:2]):
        logits = normed[b, n] @ p["router"]["kernel"][task]
        gate = np.exp(logits) / np.exp(logits).sum()
        for e in np.argsort(-gate)[:2]:
            experts = {name: leaf[e] for name, leaf in experts_of(tree["experts"]).items()}
            hidden = jax.nn.gelu(normed[b, n] @ experts["kernel_in"] + experts["bias_in"], approximate=False)
            expected[b, n] += gate[e] * (np.asarray(hidden) @ experts["kernel_out"] + experts["bias_out"])
            expected_importance[e] += gate[e]
    np.testing.assert_allclose(y[task], expected, atol=1e-4)
    np.testing.assert_allclose(stats.importance[task], expected_importance, rtol=1e-4)


class Half(nn.Module):
    """The attention half of a block, with the parameters of one."""

    num_heads: int = 2
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x):
        return attention_half(self, x, 0.0, False)


def test_equal_gates_make_equal_streams():
    """With one gate copied to every task, the streams are those of the unconditioned model, which has only one."""
    tree = jax.tree.map(lambda leaf: leaf, params("single"))
    gate = tree["trunk"]["block_1"]["experts"]["router"]["kernel"]
    copied = jax.tree.map(lambda leaf: leaf, tree)
    copied["trunk"]["block_1"]["experts"]["router"]["kernel"] = np.repeat(gate, 3, axis=0)
    together, aux = program("multi_gate")({"params": copied}, BATCH)
    for name in HEADS:
        np.testing.assert_allclose(together[name], outputs("single")[0][name], atol=1e-5)
    np.testing.assert_allclose(aux["block_1"].count, np.repeat(outputs("single")[1]["block_1"].count, 3, 0))


@functools.cache
def scanned():
    """Six blocks: 0 and 1 by themselves, then two turns of (dense, experts); and the same unrolled."""
    deep = dataclasses.replace(CONFIG, vit=dataclasses.replace(VIT, depth=6))
    scan = dataclasses.replace(deep, vit=dataclasses.replace(deep.vit, scan=True, remat=True))
    models = [M3ViT({"edge": 1, "depth": 1}, config, Linear) for config in (scan, deep)]
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(models[0].init, jax.random.key(0), BATCH)["params"]
    stacked = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    return *models, stacked, stacked | {"trunk": unstack_layers(stacked["trunk"], scan.layer_names)}


def test_scanned_and_unrolled_trunks_agree():
    scan, deep, stacked, loose = scanned()
    assert scan.config.layer_names == {
        "groups/block_0": ["block_2", "block_4"],
        "groups/block_1": ["block_3", "block_5"],
    }
    outputs, aux = jax.jit(functools.partial(scan.apply, with_aux=True))({"params": stacked}, BATCH)
    expected, expected_aux = jax.jit(functools.partial(deep.apply, with_aux=True))({"params": loose}, BATCH)
    assert list(aux) == list(expected_aux) == ["block_1", "block_3", "block_5"]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), outputs, expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), aux, expected_aux)
    small, small_params = extract_task(scan, stacked, "depth")
    assert not small.config.vit.scan
    shapes = jax.eval_shape(small.init, jax.random.key(0), BATCH)["params"]
    assert jax.tree.map(jnp.shape, small_params) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.slow
def test_gradients_of_scanned_and_unrolled_trunks_agree():
    def energy(model, params):
        return sum(jnp.mean(jnp.sin(y)) for y in model.apply({"params": params}, BATCH).values())

    scan, deep, stacked, loose = scanned()
    gradient = jax.jit(jax.grad(functools.partial(energy, scan)))(stacked)
    expected = jax.jit(jax.grad(functools.partial(energy, deep)))(loose)
    gradient = gradient | {"trunk": unstack_layers(gradient["trunk"], scan.config.layer_names)}
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), gradient, expected)


def test_a_deeper_scan_is_no_longer_program():
    """What has to be compiled, in lines: twelve blocks are three more turns of the loop, not six more blocks."""

    def lines(depth):
        vit = dataclasses.replace(VIT, depth=depth, scan=True)
        model = M3ViT({"edge": 1}, dataclasses.replace(CONFIG, vit=vit), Linear)
        shapes = jax.eval_shape(model.init, jax.random.key(0), BATCH)
        return jax.jit(model.apply).lower(shapes, BATCH).as_text().count("\n")

    assert lines(12) < 1.05 * lines(6)


def test_gradients_per_task_and_seeds():
    """Experts learn from every task, a gate and a head from their own."""

    def losses(params):
        outputs, aux = model("multi_gate").apply({"params": params}, BATCH, train=True, with_aux=True)
        balance = m3vit_balance()(aux, list(HEADS))
        return jnp.stack([jnp.mean(jnp.square(y)) + balance[name] for name, y in outputs.items()])

    two = jax.tree.map(lambda leaf: np.stack([leaf, 1.1 * leaf]), params("multi_gate"))
    jacobian = jax.jit(jax.vmap(jax.jacrev(losses)))(two)
    jacobian = jax.tree.map(np.asarray, jacobian)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jacobian))
    gates = np.abs(jacobian["trunk"]["block_1"]["experts"]["router"]["kernel"]).max((-1, -2))  # [seed, task, gate]
    np.testing.assert_array_equal(gates > 0, np.broadcast_to(np.eye(3, dtype=bool), (2, 3, 3)))
    for leaf in experts_of(jacobian["trunk"]["block_1"]["experts"]).values():
        assert (np.abs(leaf).reshape(2, 3, -1).max(-1) > 0).all()
    heads = np.abs(jacobian["head_normals"]["out"]["kernel"]).max((-1, -2))
    np.testing.assert_array_equal(heads > 0, [[False, True, False]] * 2)


@pytest.mark.slow
def test_noise_dropout_and_drop_path_act_in_a_scan():
    vit = dataclasses.replace(VIT, depth=4, dropout=0.3, drop_path=0.3, scan=True)
    noisy = M3ViT(HEADS, dataclasses.replace(CONFIG, vit=vit, noise_std=1.0), Linear)
    variables = jax.jit(noisy.init)(jax.random.key(0), BATCH)

    @jax.jit
    def train(dropout, gate):
        return noisy.apply(variables, BATCH, train=True, rngs={"dropout": dropout, "gate": gate})["edge"]

    one, two = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(train(one, two), train(one, two))
    assert not np.allclose(train(one, two), train(two, two))
    assert not np.allclose(train(one, one), train(one, two))


def test_balance_goes_to_the_task_of_the_gate():
    def cv_squared(x):
        return np.var(x, axis=-1) / np.mean(x, axis=-1) ** 2

    def layer(streams, seed):
        draw = np.random.default_rng(seed).uniform(0.5, 2.0, (8, streams, 6)).astype(np.float32)
        return RouterStats(draw[0], draw[1], draw[2], draw[3], draw[4, :, 0], draw[5, :, 0], draw[6, :, 0], 10.0)

    # The keys are in the order in which jit returns them.
    aux = {f"block_{block}": layer(3, block) for block in (1, 11, 3)}
    losses = m3vit_balance(0.1)(aux, list(HEADS))
    expected = 0.1 * sum(cv_squared(stats.importance) + cv_squared(stats.load) for stats in aux.values())
    np.testing.assert_allclose([losses[name] for name in HEADS], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="has 3 task streams, the tasks are edge, depth"):
        m3vit_balance()(aux, ["edge", "depth"])

    # One gate for all: a third of it on every task.
    shared = {"block_1": layer(1, 0)}
    losses = m3vit_balance(0.1)(shared, list(HEADS))
    expected = 0.1 * (cv_squared(shared["block_1"].importance) + cv_squared(shared["block_1"].load)) / 3
    np.testing.assert_allclose([losses[name] for name in HEADS], np.repeat(expected, 3), rtol=1e-5)

    # Of a window, here experts 0..2, 1..3 or 2, and 3..5, only its own experts count.
    config = dataclasses.replace(CONFIG, window=3)
    assert np.flatnonzero(config.visible(0, 3)[2]).tolist() == [3, 4, 5]
    one = {"block_1": layer(3, 0)}
    losses = m3vit_balance(0.1, config=config)(one, list(HEADS))
    own = one["block_1"].importance[2, 3:], one["block_1"].load[2, 3:]
    np.testing.assert_allclose(losses["depth"], 0.1 * sum(cv_squared(x) for x in own), rtol=1e-5)


def test_training_only_branch():
    """More predictions in training, under their task's name; none, and no parameter of theirs, at inference."""
    heads = {"edge": 1, "normals": 3}
    branched = M3ViT(heads, dataclasses.replace(CONFIG, tam=True), functools.partial(PUP, width=4, groups=2))
    shapes = jax.eval_shape(branched.init, jax.random.key(0), BATCH)
    assert "tam_0" in shapes["params"] and "tam_1" not in shapes["params"]  # patch 4: two stages, one before the last

    def shape_of(**options):
        out = jax.eval_shape(functools.partial(branched.apply, **options), shapes, BATCH)
        return {name: y.shape for name, y in out.items()}

    both = {"edge": (2, 8, 8, 1), "normals": (2, 8, 8, 3)}
    assert shape_of() == both
    assert shape_of(train=True) == both | {"edge/tam_0": (2, 8, 8, 1), "normals/tam_0": (2, 8, 8, 3)}
    assert shape_of(train=True, task="edge") == {"edge": (2, 8, 8, 1)}
    without = {"params": {name: tree for name, tree in shapes["params"].items() if name != "tam_0"}}
    assert jax.eval_shape(branched.apply, without, BATCH)["edge"].shape == (2, 8, 8, 1)
    small, small_params = extract_task(branched, jax.tree.map(lambda s: jnp.zeros(s.shape), shapes["params"]), "edge")
    assert set(small_params) == {"trunk", "head_edge"} and not small.config.tam
    with pytest.raises(ValueError, match="needs PUP, got LinearUnpatch"):
        jax.eval_shape(branched.clone(decoder=LinearUnpatch).init, jax.random.key(0), BATCH)


@pytest.mark.slow
def test_losses_of_training_hold_branch_and_balance():
    """What `image_problem` differentiates: a row per task, and another value with the branch than without."""
    tasks = [dense_tasks.depth(), dense_tasks.normals()]
    heads = {task.name: task.channels for task in tasks}
    rng = np.random.default_rng(0)
    labels = {"depth": rng.uniform(1, 3, (2, 8, 8)), "normals": rng.normal(size=(2, 8, 8, 3))}
    batch = {"image": IMAGE, "labels": {name: label.astype(np.float16) for name, label in labels.items()}}
    branched = M3ViT(heads, dataclasses.replace(CONFIG, tam=True), functools.partial(PUP, width=4, groups=2))
    shapes = jax.eval_shape(branched.init, jax.random.key(0), batch)["params"]
    params = jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    loss = image_loss(branched, tasks, regularizer=m3vit_balance(100.0))
    plain = image_loss(branched.clone(config=CONFIG), tasks)

    @jax.jit
    def run(params, key):
        without = {name: tree for name, tree in params.items() if name != "tam_0"}
        return loss(params, batch, key), plain(without, batch, key)

    both, alone = run(params, jax.random.key(0))
    assert set(both) == set(alone) == {"depth", "normals"}
    assert all(both[name] > 1.5 * alone[name] > 0 for name in both)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 3}, r"top_k \* expert_ratio must equal the dense mlp_ratio=4.0"),
        ({"router": "hash"}, "router must be 'multi_gate'"),
        ({"gate_input": "image"}, "gate_input must be 'normed' or 'block_input'"),
        ({"every": 3}, r"every must lie in 1\.\.2"),
        ({"experts": (4, 4)}, "one entry for each of the 1 expert layers"),
        ({"experts": 1}, "top_k must be between 1 and num_experts=1, got 2"),
        ({"window": 3, "router": "single"}, "window needs a gate that knows the task"),
        ({"window": 1}, "at least top_k=2 experts"),
        (
            {"experts": (4, 4, 5), "vit": dataclasses.replace(VIT, depth=6, scan=True)},
            "A scan needs equal layers after the first",
        ),
    ],
)
def test_errors_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)


def test_published_sizes():
    """Twelve blocks, six of them with 16 experts of matched width; shapes of the first two."""
    two = dataclasses.replace(M3VIT_S, vit=dataclasses.replace(M3VIT_S.vit, depth=2))
    image = {"image": np.zeros((1, 64, 64, 3), np.float32)}
    tree = jax.eval_shape(M3ViT({"depth": 1}, two).init, jax.random.key(0), image)["params"]["trunk"]
    assert experts_of(tree["block_1"]["experts"])["kernel_in"].shape == (16, 384, 384)
    assert tree["block_0"]["feed_forward"]["in"]["kernel"].shape == (384, 1536)
    for config in (M3VIT_TI, M3VIT_S, M3VIT_B, M3VIT_FPGA):
        assert config.expert_blocks == (1, 3, 5, 7, 9, 11) and config.experts == 16
        assert config.top_k * config.expert_ratio == 4
