import dataclasses
import functools

import jax
import numpy as np
import pytest

from mtjax.models.m3vit import M3ViT, M3ViTConfig
from mtjax.models.m3vit_inference import expert_bytes, experts_of, extract_task, queue_inference
from mtjax.nn.vit import ViTConfig

from .vision_cases import Linear, random_params

HEADS = {"edge": 1, "normals": 3, "depth": 1}
VIT = ViTConfig(patch=4, width=8, depth=2, num_heads=2, cls_token=True)
CONFIG = M3ViTConfig(VIT, experts=6, top_k=2, expert_ratio=2.0, task_dim=4, dispatch="all_experts")
IMAGE = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
BATCH = {"image": IMAGE}
KINDS = {
    "multi_gate": {},
    "task_conditioned": {"router": "task_conditioned", "gate_input": "block_input"},
    "single": {"router": "single"},
    "window": {"window": 3},
}


@functools.cache
def model(kind):
    return M3ViT(HEADS, dataclasses.replace(CONFIG, **KINDS[kind]), Linear)


@functools.cache
def params(kind):
    return random_params(model(kind), BATCH)


@functools.cache
def programs(kind):
    """All tasks, one alone, its extracted model, and by queues: one program, compiled once."""
    small, small_params = extract_task(model(kind), params(kind), "normals")

    def run(variables, small_variables):
        together, aux = model(kind).apply(variables, BATCH, with_aux=True)
        others = {
            "alone": model(kind).apply(variables, BATCH, task="normals"),
            "extracted": small.apply(small_variables, BATCH),
        }
        if kind in ("multi_gate", "task_conditioned"):
            others["queues"] = queue_inference(model(kind), variables, BATCH, task="normals", block=8)
        return together["normals"], aux, others

    return small, {"params": small_params}, jax.jit(run)


@pytest.mark.parametrize("kind", KINDS)
def test_one_task_alone_and_extracted_equals_all_tasks(kind):
    small, small_variables, run = programs(kind)
    shapes = jax.eval_shape(small.init, jax.random.key(0), BATCH)
    assert jax.tree.map(np.shape, small_variables) == jax.tree.map(np.shape, shapes)
    expected, aux, others = run({"params": params(kind)}, small_variables)
    for name, outputs in others.items():
        assert list(outputs) == ["normals"]
        np.testing.assert_allclose(outputs["normals"], expected, atol=1e-5, err_msg=name)
    if kind == "window":  # experts 0..2 for the first task, 3..5 for the last, of which the second has 2..4
        count = np.asarray(aux["block_1"].count)
        assert (count[0, 3:] == 0).all() and (count[2, :3] == 0).all() and small.config.experts == (3,)


def test_other_tasks_parameters_are_no_arguments_of_a_single_task_program():
    """jit drops arguments that nothing reads; what is left are the leaves of the extracted model, and the image."""
    alone = jax.jit(functools.partial(model("multi_gate").apply, task="normals"))
    lowered = alone.lower({"params": params("multi_gate")}, BATCH)
    signature = lowered.as_text().split("func.func public @main(")[1].split(") ->")[0]
    _, small_variables, run = programs("multi_gate")
    assert signature.count("tensor<") == len(jax.tree.leaves(small_variables)) + 1
    # Gates are one stacked array, of which one task's row is read: the others may hold anything.
    poisoned = jax.tree.map(lambda leaf: leaf, params("multi_gate"))
    gates = poisoned["trunk"]["block_1"]["experts"]["router"]["kernel"].copy()
    gates[[0, 2]] = np.nan
    poisoned["trunk"]["block_1"]["experts"]["router"]["kernel"] = gates
    others = run({"params": poisoned}, small_variables)[2]
    np.testing.assert_allclose(others["alone"]["normals"], others["extracted"]["normals"], atol=1e-5)


def test_extraction_removes_unused_experts_and_nothing_changes():
    tree = jax.tree.map(lambda leaf: leaf, params("multi_gate"))
    # A gate of the second task that hardly sees experts 1, 3 and 4.
    gates = 0.05 * tree["trunk"]["block_1"]["experts"]["router"]["kernel"]
    norm = tree["trunk"]["block_1"]["norm_2"] | {
        "bias": np.eye(8)[0].astype(np.float32),
        "scale": np.full(8, 0.1, "f4"),
    }
    gates[1, 0] = [5.0, -5.0, 5.0, -5.0, -5.0, 5.0]
    block = tree["trunk"]["block_1"] | {"norm_2": norm}
    block["experts"] = block["experts"] | {"router": {"kernel": gates}}
    tree = tree | {"trunk": tree["trunk"] | {"block_1": block}}
    _, small_variables, run = programs("multi_gate")
    together, aux, _ = run({"params": tree}, small_variables)
    count = np.asarray(aux["block_1"].count)
    used = np.flatnonzero(count[1])
    assert set(used) <= {0, 2, 5} and len(used) >= 2
    percent = 100 * count / count.sum(-1, keepdims=True)
    small, small_params = extract_task(model("multi_gate"), tree, "normals", usage={"block_1": percent}, threshold=0.0)
    assert small.config.experts == (len(used),) and small.config.ghosts == (6 - len(used),)
    assert experts_of(small_params["trunk"]["block_1"]["experts"])["kernel_in"].shape == (len(used), 8, 16)
    pruned = jax.jit(small.apply)({"params": small_params}, BATCH)["normals"]
    np.testing.assert_allclose(pruned, together, atol=1e-5)
    # The published rule drops their share of the softmax, too.
    published, published_params = extract_task(
        model("multi_gate"), tree, "normals", usage={"block_1": percent[1]}, threshold=0.0, keep_denominator=False
    )
    assert published.config.ghosts == (0,)
    expected = jax.eval_shape(published.init, jax.random.key(0), BATCH)["params"]
    assert jax.tree.map(np.shape, published_params) == jax.tree.map(np.shape, expected)
    # Bytes of weights: all of the layer, or two experts.
    one = 4 * (8 * 16 + 16 + 16 * 8 + 8)
    assert expert_bytes(tree, resident=None) == 6 * one and expert_bytes(tree) == 2 * one
    with pytest.raises(ValueError, match="one entry for each of block_1, got block_3"):
        extract_task(model("multi_gate"), tree, "normals", usage={"block_3": percent})


@pytest.mark.slow
def test_a_scanned_model_by_queues():
    scanned = M3ViT(HEADS, dataclasses.replace(CONFIG, vit=dataclasses.replace(VIT, depth=6, scan=True)), Linear)
    variables = jax.jit(scanned.init)(jax.random.key(0), BATCH)
    together = jax.jit(scanned.apply)(variables, BATCH)
    queued = jax.jit(functools.partial(queue_inference, scanned))(variables, BATCH)
    small, small_params = extract_task(scanned, variables["params"], "depth")
    for name in HEADS:
        np.testing.assert_allclose(queued[name], together[name], atol=1e-5)
    extracted = jax.jit(small.apply)({"params": small_params}, BATCH)
    np.testing.assert_allclose(extracted["depth"], together["depth"], atol=1e-5)
