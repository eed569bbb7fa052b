"""TaskExpert: against a naive forward pass, per-sample gates, the memory, one task at a time, matched baselines."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.models.static_decoders import (
    StaticConfig,
    StaticDecoder,
    StaticViT,
    match_width,
    parameter_count,
    spaced_layers,
)
from mtjax.models.taskexpert import (
    GateStats,
    TaskExpert,
    TaskExpertConfig,
    TaskExpertDecoder,
    gate_balance,
    gate_entropy,
    gate_variance,
)
from mtjax.nn.stacked_convs import DenseHeads
from mtjax.nn.vit import ViT, ViTConfig, to_map

HEADS = {"normals": 3, "depth": 1}
GRID = (2, 3)  # maps, and with patches of one pixel images too
VIT = ViTConfig(patch=1, width=8, depth=2, num_heads=2, mlp_ratio=1.0)
CONFIG = TaskExpertConfig(VIT, num_experts=3, width=4, memory_update="residual")
RNG = np.random.default_rng(0)
BATCH = {"image": jnp.asarray(RNG.normal(size=(3, *GRID, 3)), jnp.float32)}
MAPS = {layer: jnp.asarray(RNG.normal(size=(3, 2, 3, 8)), jnp.float32) for layer in (0, 1)}


def random_params(init, scale=0.7):
    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes)


@functools.cache
def decoder(task=None, **changes):
    """(parameters, compiled function of them and maps) of the small decoder."""
    module = TaskExpertDecoder(HEADS, dataclasses.replace(CONFIG, **changes))
    params = random_params(lambda key: module.init(key, MAPS, GRID))
    return params, jax.jit(lambda params, maps: module.apply(params, maps, GRID, task=task))


@functools.cache
def run(**changes):
    """(parameters, outputs, stats) for all tasks on `MAPS`."""
    params, compiled = decoder(**changes)
    return params["params"], *compiled(params, MAPS)


@jax.jit
def predict(params, memory):
    return DenseHeads(HEADS, CONFIG.width, CONFIG.upsample).apply({"params": params}, memory, GRID)


def conv_norm_gelu(x, params, position, side):
    """A block of a stack for one image f[h, w, C], by loops over the pixels."""
    kernel, bias = (np.asarray(params["conv"][name][position], np.float64) for name in ("kernel", "bias"))
    reach, out = side // 2, np.zeros((*x.shape[:2], kernel.shape[-1]))
    for i, j in np.ndindex(*x.shape[:2]):
        for di, dj in np.ndindex(side, side):
            row, column = i + di - reach, j + dj - reach
            if 0 <= row < x.shape[0] and 0 <= column < x.shape[1]:
                out[i, j] += x[row, column] @ kernel[di, dj]
    out = out + bias
    out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-5)
    scale, offset = (np.asarray(params["norm"][name][position], np.float64) for name in ("scale", "bias"))
    return np.asarray(jax.nn.gelu(out * scale + offset))


@pytest.mark.parametrize(
    "changes", [{}, {"memory": False}, pytest.param({"memory_update": "replace"}, marks=pytest.mark.slow)]
)
def test_equals_the_equations_image_by_image(changes):
    """Memories written by hand from the maps and the gates, then handed to the heads."""
    inner, outputs, stats = run(**changes)
    config = dataclasses.replace(CONFIG, **changes)
    written = np.zeros((len(HEADS), 3, 2, 3, CONFIG.width))
    for b, t in np.ndindex(3, len(HEADS)):
        features, held = [], None
        for layer in range(2):
            own = inner[f"mixture_{layer}"]
            x, gate = np.asarray(MAPS[layer][b]), np.asarray(stats[f"block_{layer}"].gates[t, b])
            z = sum(gate[n] * conv_norm_gelu(x, own["experts"], n, 3) for n in range(3))
            assert len(gate) == 3 + (held is not None)
            if held is not None:
                z = z + gate[3] * conv_norm_gelu(held, own["read"], t, 1)
            z = conv_norm_gelu(z, own["decode"], t, 3)
            features.append(z)
            if config.memory and layer and config.memory_update == "residual":
                write = inner["write_1"]
                held = held + z @ np.asarray(write["kernel"][t, 0, 0]) + np.asarray(write["bias"][t])
            elif config.memory:
                held = z
        if not config.memory:
            mix = np.asarray(jax.nn.softmax(inner["layer_mix"][t]))
            held = mix[0] * features[0] + mix[1] * features[1]
        written[t, b] = held
    expected = predict(inner["heads"], jnp.asarray(written, jnp.float32))
    for name, channels in HEADS.items():
        assert outputs[name].shape == (3, *GRID, channels)
        np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-3, atol=1e-3)


def test_gates_are_a_softmax_that_depends_on_task_and_image_only():
    params, compiled = decoder()
    _, _, stats = run()
    assert {name: s.gates.shape for name, s in stats.items()} == {"block_0": (2, 3, 3), "block_1": (2, 3, 4)}
    _, again = compiled(params, {layer: jnp.stack([x[1], x[1], -x[0]]) for layer, x in MAPS.items()})
    for name, (gates,) in stats.items():
        np.testing.assert_allclose(gates.sum(-1), 1.0, rtol=1e-5)
        # On the scale of the scores: random gates may be nearly one-hot.
        assert (jnp.log(gates).std(1).max(-1) > 0.1).all(), "the gates of every task change with the image"
        assert float(jnp.abs(gates[0] - gates[1]).max()) > 1e-3, "and with the task"
        np.testing.assert_allclose(again[name].gates[:, 0], gates[:, 1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(again[name].gates[:, 1], gates[:, 1], rtol=1e-4, atol=1e-5)
        assert (gate_entropy(stats[name]) < np.log(gates.shape[-1])).all()


def test_experts_are_shared_and_all_else_is_stacked_over_tasks():
    inner = jax.tree.map(jnp.shape, run()[0])
    first, second = inner["mixture_0"], inner["mixture_1"]
    assert first["experts"]["conv"]["kernel"] == (3, 3, 3, 8, 4)
    assert "read" not in first and second["read"]["conv"]["kernel"] == (2, 1, 1, 4, 4)
    assert second["decode"]["conv"]["kernel"] == (2, 3, 3, 4, 4)
    assert "layer_mix" not in inner and run(memory=False)[0]["layer_mix"].shape == (2, 2)


def poisoned(params, position, name):
    """NaN in all that belongs to other tasks than the one at `position`."""

    def poison(path, leaf):
        keys = [key.key for key in path]
        if "trunk" in keys or "experts" in keys:
            return leaf
        if "heads" in keys:
            return leaf if name in keys else jnp.full_like(leaf, jnp.nan)
        return jnp.full_like(leaf, jnp.nan).at[position].set(leaf[position])

    return jax.tree_util.tree_map_with_path(poison, params)


def test_one_task_runs_the_trunk_and_needs_nothing_of_the_other_tasks():
    model = TaskExpert(HEADS, CONFIG)
    params, compiled = decoder()
    trunk = random_params(lambda key: ViT(VIT).init(key, BATCH["image"]))["params"]
    whole = {"trunk": trunk, "decoder": params["params"]}

    @jax.jit
    def one_task(params):
        tokens = ViT(VIT).apply({"params": params["trunk"]}, BATCH["image"])
        maps = {layer: to_map(tokens[layer], GRID) for layer in (0, 1)}
        return model.apply({"params": params}, BATCH, task="depth", with_aux=True), maps

    (one, one_stats), maps = one_task(poisoned(whole, 1, "depth"))
    outputs, stats = compiled(params, maps)
    assert list(one) == ["depth"]
    np.testing.assert_allclose(one["depth"], outputs["depth"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(one_stats["block_1"].gates, stats["block_1"].gates[1:2], rtol=1e-3, atol=1e-5)
    for task in (None, "depth"):
        asked = jax.eval_shape(lambda key, task=task: model.init(key, BATCH, task=task), jax.random.key(0))
        assert jax.tree.map(jnp.shape, asked["params"]) == jax.tree.map(jnp.shape, whole), "whatever is asked"


@pytest.mark.slow
@pytest.mark.parametrize("memory", [True, False])
def test_no_layer_is_dead(memory):
    """Every mixture gets a gradient; without memory too, as the features of all inserted layers are averaged."""
    config = dataclasses.replace(CONFIG, memory=memory, expert_side=1)
    module = TaskExpertDecoder(HEADS, config)
    params = random_params(lambda key: module.init(key, MAPS, GRID), 0.3)
    loss = jax.grad(lambda params: sum(jnp.sum(y**3) for y in module.apply(params, MAPS, GRID)[0].values()))
    gradients = jax.jit(loss)(params)["params"]
    # A constant added to a layer-normalised summary changes nothing: the bias of the pooling is idle by construction.
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path({k: g for k, g in gradients.items() if k != "heads"})
        if not float(jnp.abs(g).max()) > 1e-5 and "pool_bias" not in jax.tree_util.keystr(path)
    ]
    assert dead == []


def test_statistics_of_gates():
    stats = GateStats(jnp.asarray([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [0.25, 0.75]]]))
    expected = [[np.log(2), 0.0], [-0.25 * np.log(0.25) - 0.75 * np.log(0.75)] * 2]
    np.testing.assert_allclose(gate_entropy(stats), expected, rtol=1e-6)
    np.testing.assert_allclose(gate_variance(stats), [[0.0625, 0.0625], [0.0, 0.0]], atol=1e-7)
    np.testing.assert_allclose(gate_balance(stats), [(0.25 / 0.5) ** 2, (0.25 / 0.5) ** 2], rtol=1e-6)
    # The first gate underflows to 0, where the derivative of g log g is infinite.
    gradient = jax.grad(lambda s: gate_entropy(GateStats(jax.nn.softmax(s)[None, None])).sum())(jnp.array([0.0, 90.0]))
    assert np.isfinite(gradient).all()


def test_matched_baselines_have_as_many_decoder_parameters():
    heads, size = {"segmentation": 13, "normals": 3}, (32, 32)
    full = TaskExpertConfig(layers=(1, 3))
    target = parameter_count(TaskExpertDecoder(heads, full), full, size)
    arms = [
        (StaticDecoder, StaticConfig()),
        (StaticDecoder, StaticConfig(layers=(1, 3))),
        (TaskExpertDecoder, dataclasses.replace(full, memory=False)),
    ]
    for module, config in arms:
        matched = match_width(config, target, count=lambda c, m=module: parameter_count(m(heads, c), c, size))
        assert dataclasses.replace(matched, width=config.width) == config
        count = parameter_count(module(heads, matched), matched, size)
        assert abs(count / target - 1) < 0.05, (config, matched.width, count, target)


def test_parameter_count_is_that_of_the_decoder():
    count = sum(x.size for x in jax.tree.leaves(run()[0]))
    assert parameter_count(TaskExpertDecoder(HEADS, CONFIG), CONFIG, GRID) == count


def test_match_width_finds_the_nearest():
    config = StaticConfig(VIT)
    assert match_width(config, 1000, count=lambda c: c.width**2).width == 32  # 1024; 31^2 = 961 is farther
    assert match_width(config, 990, count=lambda c: c.width**2).width == 31
    with pytest.raises(ValueError, match="No width up to 8 comes near 1000 parameters: width 8 has 64"):
        match_width(config, 1000, count=lambda c: c.width**2, largest=8)


def test_static_decoder_reads_its_layers():
    assert StaticConfig(VIT).layers == (1,) and spaced_layers(24) == (5, 11, 17, 23)
    config = StaticConfig(VIT, layers=(0, 1), width=4, depth=1, upsample=1)
    module = StaticDecoder(HEADS, config)
    params = random_params(lambda key: module.init(key, MAPS, GRID))
    outputs = jax.jit(lambda params: module.apply(params, MAPS, GRID))(params)
    assert {name: y.shape for name, y in outputs.items()} == {n: (3, *GRID, c) for n, c in HEADS.items()}
    one = jax.jit(lambda params: module.apply(params, MAPS, GRID, task="normals"))(poisoned(params, 0, "normals"))
    assert list(one) == ["normals"]
    np.testing.assert_allclose(one["normals"], outputs["normals"], rtol=1e-4, atol=1e-4)
    assert params["params"]["block_0"]["conv"]["kernel"].shape[-2] == 2 * VIT.width
    model = StaticViT(HEADS, config)
    whole = jax.eval_shape(lambda key: model.init(key, BATCH, task="depth"), jax.random.key(0))["params"]
    assert sorted(whole) == ["decoder", "trunk"]
    assert jax.tree.map(jnp.shape, whole["decoder"]) == jax.tree.map(jnp.shape, params["params"])
    assert jax.eval_shape(lambda p: model.apply({"params": p}, BATCH, with_aux=True), whole)[1] == {}


def test_seeds_and_jacobians():
    module = TaskExpertDecoder(HEADS, CONFIG)

    def losses(params):
        return jnp.stack([jnp.mean(y**2) for y in module.apply(params, MAPS, GRID)[0].values()])

    seeds = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5, *x.shape), x.dtype), run()[0])
    jacobian = jax.eval_shape(jax.vmap(jax.jacrev(losses)), {"params": seeds})
    assert jacobian["params"]["mixture_1"]["experts"]["conv"]["kernel"].shape == (5, 2, 3, 3, 3, 8, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskExpertConfig(VIT, layers=(1, 0)), r"increasing block numbers from 0 to 1, got \(1, 0\)"),
        (lambda: TaskExpertConfig(VIT, layers=(0, 2)), r"increasing block numbers from 0 to 1, got \(0, 2\)"),
        (lambda: TaskExpertConfig(expert_side=2), "expert_side must be 1 or 3, got 2"),
        (lambda: TaskExpertConfig(memory_update="add"), "'replace' or 'residual', got 'add'"),
        (lambda: TaskExpertConfig(num_experts=0), "num_experts must be at least 1, got 0"),
        (lambda: StaticConfig(depth=0), "at least 1, got 32 and 0"),
        (
            lambda: jax.eval_shape(
                lambda key: TaskExpert(HEADS, CONFIG).init(key, BATCH, task="flow"), jax.random.key(0)
            ),
            "task='flow' is not one of the model's tasks: normals, depth",
        ),
    ],
)
def test_errors_are_sentences(make, message):
    with pytest.raises(ValueError, match=message):
        make()
