"""Surgery on the modular model: extraction computes what the whole one did, growth leaves old bits alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax.models.mod_squad import ModSquad, ModSquadConfig, PooledLinear
from mtjax.models.mod_squad_surgery import extract, grow, train_only, trainable, with_top_k
from mtjax.nn.decoders import LinearUnpatch
from mtjax.nn.moe import Dispatch
from mtjax.nn.vit import ViTConfig
from mtjax.train.heterogeneous import expert_usage

HEADS = {"segmentation": 3, "class": 4}
DECODERS = {"segmentation": LinearUnpatch, "class": PooledLinear}
CONFIG = ModSquadConfig(
    ViTConfig(patch=4, width=16, depth=1, num_heads=2),
    layout="both",
    num_experts=8,
    top_k=2,
    attention_experts=6,
    dispatch=Dispatch("all_experts"),  # compiles fastest
)
IMAGES = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))


@functools.cache
def made(backend="all_experts"):
    model = ModSquad(dataclasses.replace(CONFIG, dispatch=Dispatch(backend)), HEADS, DECODERS)
    shapes = jax.eval_shape(model.init, jax.random.key(0), {"image": IMAGES})["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


@functools.cache
def usage():
    return expert_usage(*made(), {"image": IMAGES})


PROGRAMS = {}  # a model with heads by name has no hash


def outputs(model, params, task=None):
    def run(params):
        return model.apply({"params": params}, {"image": IMAGES}, task=task)

    program = PROGRAMS.setdefault((repr(model), task), jax.jit(run))
    return jax.tree.map(np.asarray, program(params))


def size(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_the_extracted_model_computes_what_the_whole_one_did_and_is_smaller():
    model, params = made()
    small, own = extract(model, params | {"log_scales": jnp.zeros(2)}, "class", usage(), threshold=0.0)
    used = {name: int((share[1] > 0).sum()) for name, share in usage().items()}
    assert [layer.num_experts for layer in small.config.layers] == list(used.values())
    assert sum(used.values()) < 8 + 6  # so that there was something to take out
    whole = outputs(model, params, "class")
    np.testing.assert_allclose(outputs(small, own)["class"], whole["class"], atol=1e-6)
    expert = 4 * (16 * 32 + 32 + 32 * 16 + 16)  # bytes of one of the MLP's
    gone = expert * (8 - used["block_0/mlp"])
    assert size(own) < size(params) - gone
    assert set(own) == {"trunk", "head_class"} and list(small.heads) == ["class"]
    assert own["trunk"]["task_vectors"].shape == (1, 16)

    # Without the ghosts in the softmax every gate value is larger, as in the published code.
    bare, theirs = extract(model, params, "class", usage(), threshold=0.0, ghosts=False)
    assert size(theirs) < size(own)
    assert np.abs(outputs(bare, theirs)["class"] - whole["class"]).max() > 1e-4


def test_never_fewer_experts_than_a_token_picks():
    small, own = extract(*made(), "class", usage(), threshold=1e6)
    assert [layer.num_experts for layer in small.config.layers] == [2, 2]
    most = np.argsort(-usage()["block_0/attention"][1], kind="stable")[:2]
    kept = made()[1]["trunk"]["block_0"]["attention"]["experts"]["query_kernel"][np.sort(most)]
    np.testing.assert_array_equal(own["trunk"]["block_0"]["attention"]["experts"]["query_kernel"], kept)


@functools.cache
def grown(backend="all_experts"):
    decoder = {"channels": 1, "image_size": (8, 8), "decoder": LinearUnpatch}
    return grow(*made(backend), "depth", 3, jax.random.key(1), **decoder)


@pytest.mark.parametrize(
    "backend", ["all_experts", *(pytest.param(b, marks=pytest.mark.slow) for b in ("auto", "sort_capacity"))]
)
def test_old_tasks_keep_their_bits_through_growth_and_the_new_tasks_training(backend):
    """With 'sort_capacity' old tokens are dropped before and after, and no new one takes a place in a queue."""
    model, params = made(backend)
    larger, start = grown(backend)
    assert list(larger.heads) == ["segmentation", "class", "depth"]
    assert [layer.num_experts for layer in larger.config.layers] == [9, 11]
    mask = trainable(larger, start, "depth")
    optimizer = train_only(optax.adamw(1e-2, weight_decay=0.1), mask)

    def loss(params):
        return (larger.apply({"params": params}, {"image": IMAGES}, task="depth")["depth"] - 1.0).mean() ** 2

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), length=5)
        return params, values

    trained, values = train(start)
    assert values[-1] < values[0]
    alone = outputs(model, params, "class")["class"]
    for now in (start, trained):
        assert np.abs(outputs(larger, now, "class")["class"] - alone).max() == 0
    # Together with the new task in one program.
    before, after, new = outputs(model, params), outputs(larger, trained), outputs(larger, start)["depth"]
    for task in HEADS:
        assert np.abs(after[task] - before[task]).max() == 0
    assert np.abs(after["depth"] - new).max() > 1e-3

    # What changed is what the mask says, and the new experts did learn.
    changed = jax.tree.map(lambda a, b: np.asarray(a != b), start, trained)
    jax.tree.map(lambda moved, may: np.testing.assert_array_equal(moved & ~may, False), changed, mask)
    attention = changed["trunk"]["block_0"]["attention"]
    assert attention["experts"]["query_kernel"][6:].any() and attention["router"]["kernel"][2].all()
    assert changed["trunk"]["task_vectors"].all(1).tolist() == [False, False, True]


def test_what_trains_is_what_was_asked_for():
    larger, params = grown()
    params = params | {"log_scales": jnp.zeros(1)}

    def count(which, **options):
        mask = trainable(larger, params, "depth", which, **options)
        return jax.tree.map(lambda m, p: int(np.broadcast_to(m, p.shape).sum()), mask, params)

    def total(tree):
        return sum(jax.tree.leaves(tree))

    expert, head, gates = 2 * 16 * 16, total(count("new")["head_depth"]), 16 * (9 + 11)
    mlp_expert = 16 * 32 + 32 + 32 * 16 + 16
    assert total(count("router_and_head")) == head + gates + 16 + 1
    assert total(count("new")) == head + gates + 16 + 1 + 3 * expert + 3 * mlp_expert
    share = {"block_0/attention": np.eye(9)[:3], "block_0/mlp": np.eye(11)[[0, 1, 4]]}
    used = count("used", usage=share)  # the one expert, filled up to K = 2
    assert total(used) == head + gates + 16 + 1 + 2 * expert + 2 * mlp_expert
    assert total(count("new")["head_class"]) == 0 and count("new")["log_scales"] == 1
    with pytest.raises(ValueError, match="usage is given with which='used' and only with it"):
        trainable(larger, params, "depth", "used")


def test_a_task_may_come_without_experts_and_leave_with_the_new_ones():
    model, params = made()
    decoder = {"channels": 1, "image_size": (8, 8), "decoder": LinearUnpatch}
    larger, more = grow(model, params, "depth", 0, jax.random.key(1), **decoder)
    assert larger.config.reach is None and [layer.num_experts for layer in larger.config.layers] == [6, 8]
    np.testing.assert_array_equal(outputs(larger, more, "class")["class"], outputs(model, params, "class")["class"])
    with pytest.raises(ValueError, match="already has a task 'class'"):
        grow(model, params, "class", 1, jax.random.key(1), **decoder)
    with pytest.raises(ValueError, match="has a decoder per task; give that of 'depth'"):
        grow(model, params, "depth", 1, jax.random.key(1), channels=1, image_size=(8, 8))

    # The new task of a grown model, extracted: all its choices, old and new experts.
    larger, more = grown()
    counted = expert_usage(larger, more, {"depth": {"image": IMAGES}})
    assert np.isnan(counted["block_0/mlp"][0]).all()
    small, own = extract(larger, more, "depth", counted, threshold=0.0)
    np.testing.assert_allclose(outputs(small, own)["depth"], outputs(larger, more, "depth")["depth"], atol=1e-6)


def test_fewer_experts_per_token_take_the_same_parameters():
    model, params = made()
    same, less = with_top_k(model, top_k=2), with_top_k(model, top_k=1, attention_top_k=1)
    np.testing.assert_array_equal(outputs(same, params, "class")["class"], outputs(model, params, "class")["class"])
    assert less.config.hidden == model.config.hidden
    assert [layer.top_k for layer in less.config.layers] == [1, 1]
    shapes = [jax.eval_shape(m.init, jax.random.key(0), {"image": IMAGES}) for m in (model, less)]
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])
    counts = expert_usage(less, params, {"image": IMAGES})
    first = {name: share.max(1) for name, share in counts.items()}
    assert all((share <= 1).all() for share in first.values())
    assert np.abs(outputs(less, params, "class")["class"] - outputs(model, params, "class")["class"]).max() > 1e-4
