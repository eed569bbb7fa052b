import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from mtjax.macs import Macs, count, decoder_macs, macs, traced_macs
from mtjax.models.cross_stitch import CrossStitchViT
from mtjax.models.m3vit import M3VIT_FPGA, M3VIT_S, M3ViT, M3ViTConfig
from mtjax.models.multitask_vit import MultitaskViT, SingleTaskViT
from mtjax.nn.decoders import PUP, ConvHead, HeatmapHead, LinearUnpatch
from mtjax.nn.vit import VIT_S, ViTConfig
from mtjax.sharding import make_mesh

HEADS = {"edge": 1, "normals": 3, "segmentation": 5}
SMALL = ViTConfig(patch=4, width=8, depth=4, num_heads=2, cls_token=True)
PASCAL = {"segmentation": 21, "parts": 7, "saliency": 2, "edge": 1, "normals": 3}


def giga(value, digits=2):
    return round(value / 1e9, digits)


def test_published_totals():
    """84 G on PASCAL-Context and 100 G on NYUD-v2: one task with its decoder, the patch embedding left out."""
    # 12 blocks: 1025 tokens, 12 D^2 each, and 2 N^2 D of attention.
    blocks = 12 * (1025 * 12 * 384**2 + 2 * 1025**2 * 384)
    convolutions = 9 * 256 * (1024 * 384 + 4096 * 256 + 16384 * 256 + 65536 * 256)
    parts = count(MultitaskViT(PASCAL, VIT_S), "segmentation", image_size=(512, 512))
    assert (parts.blocks, parts.decoders) == (blocks, convolutions + 65536 * 256 * 21)
    assert (giga(parts.blocks), giga(parts.decoders)) == (31.45, 51.99)
    assert giga(macs(MultitaskViT(PASCAL, VIT_S), "segmentation", image_size=(512, 512)), 1) == 83.4

    parts = count(MultitaskViT({"segmentation": 40, "depth": 1}, VIT_S), "segmentation", image_size=(480, 640))
    assert (giga(parts.blocks), giga(parts.decoders)) == (38.79, 61.30)
    assert giga(parts.blocks + parts.decoders, 1) == 100.1


@pytest.mark.parametrize("config", [M3VIT_S, dataclasses.replace(M3VIT_S, top_k=2, expert_ratio=2.0)])
def test_experts_cost_what_the_dense_mlp_costs(config):
    model, size = M3ViT(PASCAL, config), (512, 512)
    parts = count(model, "segmentation", image_size=size)
    dense = count(MultitaskViT(PASCAL, config.vit), "segmentation", image_size=size)
    assert parts.blocks + parts.experts == dense.blocks and parts.decoders == dense.decoders
    assert parts.gates == 6 * 1025 * 384 * 16 and giga(parts.gates) == 0.04
    assert giga(macs(model, "segmentation", image_size=size) - parts.gates, 1) == 83.4


def test_encoder_focused_models_run_every_encoder_for_one_task():
    size = (512, 512)
    ours = count(M3ViT(PASCAL, M3VIT_S), "segmentation", image_size=size)
    for fusion, exchange in [("cross_stitch", 384), ("nddr", 384**2)]:
        theirs = count(CrossStitchViT(PASCAL, VIT_S, fusion=fusion), "segmentation", image_size=size)
        assert theirs.blocks == 5 * (ours.blocks + ours.experts) and theirs.decoders == ours.decoders
        assert theirs.exchange == 1025 * exchange * (3 * 5 * 5 + 5)  # of the last exchange one task's row
    # One exchange in the middle: five encoders up to there, one after.
    early = count(CrossStitchViT(PASCAL, VIT_S, after=(5,)), "segmentation", image_size=size)
    assert early.blocks == (5 * 6 + 6) * (ours.blocks + ours.experts) / 12
    alone = count(SingleTaskViT(PASCAL, VIT_S), "segmentation", image_size=size)
    assert alone.blocks == ours.blocks + ours.experts


def test_all_tasks_share_what_lies_before_the_first_gate():
    one = count(M3ViT(HEADS, M3ViTConfig(SMALL)), "edge", image_size=(8, 8))
    every = count(M3ViT(HEADS, M3ViTConfig(SMALL)), image_size=(8, 8))
    attention = 4 * 5 * 64 + 2 * 25 * 8  # 5 tokens of width 8
    shared = attention + 2 * 5 * 8 * 32 + attention  # block 0 and the attention of block 1
    assert every.blocks == shared + 3 * (one.blocks - shared)
    assert (every.experts, every.gates, every.embedding) == (3 * one.experts, 3 * one.gates, one.embedding)
    single = count(M3ViT(HEADS, M3ViTConfig(SMALL, router="single")), image_size=(8, 8))
    assert single[:4] == one[:4] and single.decoders == every.decoders
    window = count(M3ViT(HEADS, M3ViTConfig(SMALL, window=4)), "edge", image_size=(8, 8))
    assert window.gates == one.gates / 4  # the first window is experts 0..3 of 16


TRACED = {
    "multitask": MultitaskViT(HEADS, SMALL, LinearUnpatch),
    "single task": SingleTaskViT(HEADS, SMALL, LinearUnpatch),
    "nddr": CrossStitchViT(HEADS, SMALL, LinearUnpatch, fusion="nddr", after=(1,)),
    # With K = E the reference dispatch computes exactly the experts that are chosen: all.
    **{
        router: M3ViT(
            HEADS,
            M3ViTConfig(SMALL, 4, 4, 1.0, router=router, task_dim=6, dispatch="all_experts"),
            LinearUnpatch,
        )
        for router in ("multi_gate", "task_conditioned", "single")
    },
    "scan": M3ViT(
        HEADS, M3ViTConfig(dataclasses.replace(SMALL, scan=True), 4, 4, 1.0, dispatch="all_experts"), LinearUnpatch
    ),
}


@pytest.mark.parametrize("task", [None, "normals"])
@pytest.mark.parametrize("name", TRACED)
def test_the_program_has_as_many_products(name, task):
    """Every product of the traced program, counted from its shapes: nothing shared is computed twice."""
    model, batch = TRACED[name], {"image": np.zeros((1, 8, 12, 3), np.float32)}
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    traced = traced_macs(lambda variables, batch: model.apply(variables, batch, task=task), variables, batch)
    assert traced == macs(model, task, image_size=(8, 12), embedding=True)


@pytest.mark.parametrize("decoder", [ConvHead(3, width=6), LinearUnpatch(3), HeatmapHead(6, upsample=2), PUP(3, 16)])
def test_decoders(decoder):
    """At the resolution of the last convolution, where nothing is left to interpolate, or without counting that."""
    tokens = np.zeros((1, 4, 6, 8), np.float32)
    variables = jax.eval_shape(lambda key: decoder.init(key, tokens, (16, 24)), jax.random.key(0))
    traced = traced_macs(lambda v: decoder.apply(v, tokens, (16, 24)), variables)
    interpolation = {
        "ConvHead": (16 * 4 * 6 + 24 * 6 * 16) * 3,  # rows, then columns, of 3 channels
        "LinearUnpatch": 0,
        "HeatmapHead": (8 * 4 * 6 + 12 * 6 * 8) * 8,  # the map before the convolution
        "PUP": (8 * 4 * 6 + 12 * 6 * 8) * 16 + (16 * 8 * 12 + 24 * 12 * 16) * 3,
    }[type(decoder).__name__]
    assert traced - interpolation == decoder_macs(decoder, (4, 6), 8, (16, 24))


def test_xla_counts_the_same_for_a_dense_model():
    """XLA counts two operations per multiply-accumulate and the elementwise ones as well: a little more than ours."""
    model = MultitaskViT({"edge": 1}, ViTConfig(patch=4, width=128, depth=1, num_heads=2), LinearUnpatch)
    batch = {"image": np.zeros((1, 16, 16, 3), np.float32)}
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    flops = jax.jit(model.apply).lower(variables, batch).cost_analysis()["flops"]
    ratio = flops / (2 * macs(model, "edge", image_size=(16, 16), embedding=True))
    assert 1.0 < ratio < 1.1


def test_unknown_models_and_loops_are_refused():
    with pytest.raises(TypeError, match="No count for Dense"):
        macs(nn.Dense(3), image_size=(8, 8))
    with pytest.raises(TypeError, match="No count for the decoder Dense"):
        decoder_macs(nn.Dense(3), (2, 2), 8, (8, 8))
    with pytest.raises(ValueError, match="cannot count a program with while"):
        traced_macs(lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x), 0.0)
    assert sum(Macs()) == 0 and M3VIT_FPGA.top_k * M3VIT_FPGA.expert_ratio == 4


def test_a_program_of_several_devices_counts_them_all():
    mesh = make_mesh("data=8")
    product = jax.shard_map(lambda a: a @ a.T, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    assert traced_macs(product, jax.ShapeDtypeStruct((16, 3), "float32")) == 8 * 2 * 3 * 2
