"""Gated experts: equality with a loop written from the definition, for random layouts; what the masks isolate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.nn.experts import ExpertLayout, GatedExperts, masked_softmax

BATCH, WIDTH, FEATURES = 3, 4, (5, 2)


def random_params(layer, x, seed=0):
    """Parameters of the right shapes, every entry random: zero biases would hide a wrong index."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def loop(layout, params, streams, mask=None):
    """The layer by the book: outputs, gates. streams[p]: f[B, D]."""
    p = jax.tree.map(np.asarray, params["params"])
    visible, fixed = np.asarray(layout.visible), np.asarray(layout.residual)
    learned = np.asarray(layout.learned_residual)
    mask = np.ones(visible.shape[1], bool) if mask is None else mask
    experts = []
    for e in range(visible.shape[1]):
        h = streams[layout.expert_stream[e]]
        for name in ("dense_0", "dense_1"):
            h = np.maximum(h @ p["experts"][name]["kernel"][e] + p["experts"][name]["bias"][e], 0)
        experts.append(h)
    outputs, gates = [], []
    for m in range(visible.shape[0]):
        seen = [e for e in range(visible.shape[1]) if visible[m, e] and mask[e]]
        u = sum(streams[s] for s in layout.gate_stream[m])
        z, gate = np.zeros_like(experts[0]), np.zeros((len(u), visible.shape[1]))
        for b in range(len(u)):
            weight = {}
            for e in seen:
                logit = 0.0
                if "gate_kernel" in p:
                    logit = u[b] @ p["gate_kernel"][m, :, e] + p["gate_bias"][m, e]
                weight[e] = np.exp(logit)
            for e in seen:
                gate[b, e] = weight[e] / sum(weight.values())
            for e in range(visible.shape[1]):
                r = fixed[m, e] + (p["residual"][m, e] if learned[m, e] else 0.0)
                z[b] += (gate[b, e] + r * mask[e]) * experts[e][b]
        outputs.append(z)
        gates.append(gate)
    return np.stack(outputs), np.stack(gates)


@st.composite
def layouts(draw):
    """Any masks and streams; few sizes, since every new one compiles."""
    m, e, p = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 4])), draw(st.sampled_from([1, 3]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    visible = rng.random((m, e)) < 0.6
    visible[np.arange(m), rng.integers(e, size=m)] = True
    fixed, learned = (rng.random((m, e)) < draw(st.sampled_from([0.0, 0.4])) for _ in range(2))
    return ExpertLayout(
        visible,
        expert_stream=rng.integers(p, size=e),
        gate_stream=[tuple(rng.permutation(p)[: rng.integers(1, p + 1)]) for _ in range(m)],
        detached=rng.random((m, e)) < draw(st.sampled_from([0.0, 0.5])),
        residual=np.where(fixed, 0.7, 0.0),
        learned_residual=learned,
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(layout=layouts(), same=st.booleans(), seed=st.integers(0, 100))
def test_any_layout_equals_the_loop(layout, same, seed):
    rng = np.random.default_rng(seed)
    streams = rng.normal(size=(layout.num_streams, BATCH, WIDTH)).astype(np.float32)
    if same:
        streams[:] = streams[0]
    x = jnp.asarray(streams[0] if same else streams)
    layer = GatedExperts(layout, FEATURES)
    needed = layout.part().streams  # a stream that only a gate without a choice reads is not asked for
    x = x if same else x[np.asarray(needed)]
    params = random_params(layer, x, seed)
    out = layer.apply(params, x)
    z, gates = loop(layout, params, streams)
    kept = list(layout.part().experts)
    np.testing.assert_allclose(out.z, z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.gates, gates[..., kept], atol=1e-6)
    np.testing.assert_allclose(out.gates.sum(-1), 1.0, atol=1e-6)
    assert np.all(
        np.asarray(out.gates)[~np.broadcast_to(np.asarray(out.layout.visible)[:, None], out.gates.shape)] == 0
    )

    # A part, in any order of outputs, is the same numbers.
    rows = rng.permutation(layout.num_outputs)[: rng.integers(1, layout.num_outputs + 1)].tolist()
    part = layout.part(rows)
    some = layer.apply(params, x if same else jnp.asarray(streams)[np.asarray(part.streams)], outputs=rows)
    np.testing.assert_allclose(some.z, z[rows], rtol=1e-5, atol=1e-5)

    # A removed expert: the gates renormalise over the others.
    mask = rng.random(layout.num_experts) < 0.5
    np.testing.assert_allclose(
        layer.apply(params, x, expert_mask=mask).z, loop(layout, params, streams, mask)[0], rtol=1e-5, atol=1e-5
    )


@settings(max_examples=4, deadline=None, derandomize=True)
@given(layout=layouts())
def test_gradient_reaches_what_the_masks_allow_and_nothing_else(layout):
    """d z[m] / d expert e is 0 exactly where e is not read or is detached; the gate of a detached expert learns."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, WIDTH)), jnp.float32)
    layer = GatedExperts(layout, FEATURES, activation=jnp.tanh)  # tanh: no gradient is 0 by a dead unit
    params = random_params(layer, x)
    jacobian = jax.jit(jax.jacrev(lambda p: layer.apply(p, x).z.sum((1, 2))))(params)["params"]
    flow = np.abs(jacobian["experts"]["dense_0"]["kernel"]).sum((2, 3)) > 0  # [M, E]
    np.testing.assert_array_equal(flow, layout.reads & ~np.asarray(layout.detached))
    if layout.gated:
        learns = np.abs(jacobian["gate_bias"]).sum(0) > 0
        choice = np.asarray(layout.visible) & (np.sum(layout.visible, 1, keepdims=True) > 1)
        np.testing.assert_array_equal(learns, choice)


def test_masked_softmax_of_a_row_without_entries_is_zero_with_zero_gradient():
    mask = jnp.array([[True, True, False], [False, False, False]])
    logits = jnp.array([[1.0, 2.0, 1e30], [3.0, 4.0, 5.0]])
    weights = masked_softmax(logits, mask)
    np.testing.assert_allclose(weights[0, :2], np.exp([1, 2]) / np.exp([1, 2]).sum(), rtol=1e-6)
    np.testing.assert_array_equal(weights[1], 0.0)
    gradient = jax.grad(lambda v: jnp.sum(jnp.square(masked_softmax(v, mask))))(logits)
    np.testing.assert_array_equal(gradient[1], 0.0)
    assert np.all(np.isfinite(gradient))


def test_no_choice_means_no_gate_parameters_and_no_rounding():
    layout = ExpertLayout(np.eye(2, dtype=bool), expert_stream=(0, 1), gate_stream=(0, 1))
    x = jnp.ones((2, BATCH, WIDTH))
    layer = GatedExperts(layout, FEATURES)
    params = random_params(layer, x)
    assert set(params["params"]) == {"experts"}
    out = layer.apply(params, x)
    np.testing.assert_array_equal(out.z, out.experts)
    np.testing.assert_array_equal(layer.apply(params, x, expert_mask=[True, False]).z[1], 0.0)


def test_learned_residual_starts_in_the_published_range():
    learned = np.repeat(np.eye(2, dtype=bool), [400, 100], axis=1)  # groups of 400 and of 100 experts
    layer = GatedExperts(ExpertLayout(np.ones((2, 500)), learned_residual=learned), (1,))
    values = np.abs(jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 1)))["params"]["residual"])
    np.testing.assert_array_equal(values[~learned], 0.0)
    assert 0.049 < values[0].max() <= 0.05  # 1 / sqrt(400)
    assert 0.095 < values[1].max() <= 0.1


def test_gates_with_hidden_layers_norm_and_dropout():
    layout = ExpertLayout(np.ones((2, 3)), expert_stream=(0, 1, 1), gate_stream=(0, (0, 1)))
    layer = GatedExperts(layout, FEATURES, gate_hidden=(6,), norm="layer", dropout=0.5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, BATCH, WIDTH)), jnp.float32)
    params = random_params(layer, x)
    assert params["params"]["gate_hidden"]["dense_0"]["kernel"].shape == (2, WIDTH, 6)
    full, part = jax.jit(lambda p: (layer.apply(p, x).z, layer.apply(p, x, outputs=(1,)).z))(params)
    np.testing.assert_allclose(part, full[1:], rtol=1e-5, atol=1e-6)
    train = jax.jit(lambda p, key: layer.apply(p, x, train=True, rngs={"dropout": key}).z)
    first, again, other = (train(params, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_one_stream_is_not_copied_per_expert():
    """Compiled memory: the input of 16 experts that read one stream never appears 16 times."""
    layer = GatedExperts(ExpertLayout(np.ones((2, 16))), (1,))
    x = jnp.ones((64, 500))
    params = random_params(layer, x)
    memory = jax.jit(lambda p, x: layer.apply(p, x).z).lower(params, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * x.nbytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(visible=[1, 1]), "visible must be a matrix"),
        (dict(visible=[[2, 0]]), "True and False only"),
        (dict(visible=[[1, 0], [0, 0]]), "Output 1 sees no expert"),
        (dict(visible=[[1, 1]], detached=[[1]]), "detached must have the shape of visible"),
        (dict(visible=[[1, 1]], expert_stream=(0,)), "expert_stream must hold one entry per expert, 2, got 1"),
        (dict(visible=[[1, 1]], gate_stream=(0, 1)), "gate_stream must hold one entry per output, 1, got 2"),
        (dict(visible=[[1, 1]], gate_stream=((),)), "every gate reads at least one"),
        (dict(visible=[[1, 1]], expert_owner=(0, 1)), "name outputs 0..0 or None"),
    ],
)
def test_layout_errors_are_sentences(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExpertLayout(**arguments)


def test_wrong_streams_and_outputs_are_refused():
    layer = GatedExperts(ExpertLayout(np.ones((1, 2)), expert_stream=(0, 1)), (3,))
    with pytest.raises(ValueError, match=r"f32\[2, B, D\] with the streams \(0, 1\), got shape \(3, 4, 5\)"):
        layer.init(jax.random.key(0), jnp.ones((3, 4, 5)))
    with pytest.raises(ValueError, match=r"outputs must name some of 0\.\.0"):
        layer.layout.part((1,))


def test_layouts_are_hashable_and_compare_by_value():
    first, second = (ExpertLayout(np.ones((1, 2)), expert_owner=np.array([0, 0])) for _ in range(2))
    assert first == second and hash(first) == hash(second)
