"""Masks from their definition; attention, plain and in blocks, against a loop; chunks of rows against all at once."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.nn.attention import (
    MASKS,
    QUERY_BLOCK,
    FeedForward,
    MultiHeadAttention,
    TransformerLayer,
    attend,
    in_row_chunks,
    multitask_mask,
    readable_tokens,
    softmax,
)


def random_params(module, *args, seed=0):
    """Parameters of the right shapes, every entry random: zero biases would hide a wrong index."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, s.dtype), shapes)


def quick_jit(f):
    """One compiled program instead of one per operation, compiled in half the time."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def apply(module, variables, x, mask=None, **kwargs):
    args = () if mask is None else (mask,)
    return quick_jit(lambda variables, x: module.apply(variables, x, *args, **kwargs))(variables, x)


def attention_loop(query, key, value, mask):
    """query f[q, h, d], key and value f[k, h, d], mask bool[q, k]: one query and one head at a time."""
    out = np.zeros(query.shape)
    for q in range(query.shape[0]):
        for h in range(query.shape[1]):
            weight = {}
            for k in range(key.shape[0]):
                if mask[q, k]:
                    weight[k] = math.exp(query[q, h] @ key[k, h] / math.sqrt(query.shape[2]))
            for k, w in weight.items():
                out[q, h] += w / sum(weight.values()) * value[k, h]
    return out


# Masks.


@given(num_tasks=st.integers(0, 4), num_features=st.integers(1, 4), mode=st.sampled_from(MASKS))
def test_mask_says_which_query_reads_which_key(num_tasks, num_features, mode):
    mask = multitask_mask(num_tasks, num_features, mode)
    n = num_tasks + num_features
    assert mask.shape == (n, n) and mask.dtype == bool
    for query in range(n):
        for key in range(n):
            feature_reads_task = query >= num_tasks and key < num_tasks
            task_reads_other_task = query < num_tasks and key < num_tasks and query != key
            blocked = ("FxT" in mode and feature_reads_task) or ("TxT" in mode and task_reads_other_task)
            assert mask[query, key] == (not blocked)
    assert np.diagonal(mask).all()  # every token reads itself
    assert mask[:num_tasks, num_tasks:].all()  # tasks always read features
    assert mask[num_tasks:, num_tasks:].all()  # features always read features


def test_one_task_token_has_no_other_to_be_hidden_from():
    np.testing.assert_array_equal(multitask_mask(1, 3, "TxT"), multitask_mask(1, 3, "none"))
    np.testing.assert_array_equal(multitask_mask(1, 3, "FxT_TxT"), multitask_mask(1, 3, "FxT"))


def test_a_custom_mask_is_used_as_it_is():
    custom = ((True, False, False), (True, False, True), (False, True, False))
    np.testing.assert_array_equal(multitask_mask(1, 2, custom), np.array(custom))


def test_mask_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"mask must be one of none, FxT, TxT, FxT_TxT or a bool.*got 'TxF'"):
        multitask_mask(1, 2, "TxF")
    with pytest.raises(ValueError, match=r"must be bool\[3, 3\] \(task tokens, then features\), got \(2, 2\)"):
        multitask_mask(1, 2, ((True, True), (True, True)))
    with pytest.raises(ValueError, match="Row 1 of the custom mask lets its token read nothing"):
        multitask_mask(1, 1, ((True, True), (False, False)))


@given(n=st.integers(1, 6), layers=st.integers(0, 3), seed=st.integers(0, 999))
def test_readable_tokens_are_those_on_a_path(n, layers, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((n, n)) < 0.3
    query = int(rng.integers(n))
    reached = {query}
    for _ in range(layers):  # residual connections keep a token in reach of itself
        reached |= {key for token in reached for key in range(n) if mask[token, key]}
    assert readable_tokens(mask, [query], layers) == sorted(reached)


# Attention.


@pytest.mark.parametrize("mode", [*MASKS, None])
def test_attention_equals_a_loop(mode, rng):
    batch, n, heads, width = 2, 5, 2, 3
    query, key, value = rng.normal(size=(3, batch, n, heads, width)).astype(np.float32)
    mask = None if mode is None else multitask_mask(2, 3, mode)
    out = attend(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), None if mask is None else jnp.asarray(mask))
    mask = np.ones((n, n), bool) if mask is None else mask
    for b in range(batch):
        np.testing.assert_allclose(out[b], attention_loop(query[b], key[b], value[b], mask), atol=1e-5)


LONG = 2 * QUERY_BLOCK + 37  # two whole blocks and a part of one


@pytest.fixture(scope="module")
def long_sequence():
    """Query, key, value f32[LONG, 2, 3] and a mask in which some query of every block reads a few keys only."""
    rng = np.random.default_rng(1)
    qkv = jnp.asarray(rng.normal(size=(3, LONG, 2, 3)), jnp.float32)
    mask = rng.random((LONG, LONG)) < 0.02
    return qkv, jnp.asarray(mask | np.eye(LONG, dtype=bool))


def test_blocks_of_queries_change_nothing(long_sequence):
    qkv, mask = long_sequence
    direction = jnp.asarray(np.random.default_rng(2).normal(size=(LONG, 2, 3)), jnp.float32)

    def blocked(qkv, mask):
        return attend(*qkv, mask)

    def plain(qkv, mask):  # a batch of one sequence never goes in blocks
        return attend(*qkv[:, None], mask)[0]

    def value_and_gradient(f):
        return jax.jit(jax.value_and_grad(lambda qkv: (jnp.sum(direction * f(qkv, mask)), f(qkv, mask)), has_aux=True))

    (_, out), gradient = value_and_gradient(blocked)(qkv)
    (_, expected), expected_gradient = value_and_gradient(plain)(qkv)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    np.testing.assert_allclose(out[-3:], attention_loop(*np.asarray(qkv), np.asarray(mask))[-3:], atol=1e-5)

    without_mask = jax.jit(lambda qkv: (blocked(qkv, None), plain(qkv, None)))
    np.testing.assert_allclose(*without_mask(qkv), atol=1e-5)
    if jax.default_backend() == "cpu":
        assert "while" in without_mask.lower(qkv).as_text()


def test_dropout_in_blocks_keeps_the_mean_and_draws_for_every_query_and_head():
    rate, heads = 0.25, 2
    query = jnp.zeros((LONG, heads, 1))  # every key gets the probability 1 / LONG
    value = jnp.ones((LONG, heads, 1))
    apply = jax.jit(lambda key, value: attend(query, query, value, dropout=rate, rng=key))
    out = np.asarray(apply(jax.random.key(0), value))[..., 0]
    # A sum of LONG independent terms with mean 1/LONG and variance rate / (1 - rate) / LONG^2.
    sd = math.sqrt(rate / (1 - rate) / LONG)
    assert abs(out.mean() - 1) < 5 * sd / math.sqrt(out.size)
    assert abs(out.std() / sd - 1) < 0.15
    assert abs(np.corrcoef(out[:, 0], out[:, 1])[0, 1]) < 5 / math.sqrt(LONG)  # heads
    first, second = out[:QUERY_BLOCK, 0], out[QUERY_BLOCK : 2 * QUERY_BLOCK, 0]
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(QUERY_BLOCK)  # blocks
    np.testing.assert_array_equal(out, apply(jax.random.key(0), value)[..., 0])
    assert not np.array_equal(out, apply(jax.random.key(1), value)[..., 0])
    # The way back must see the same draw: attention is linear in the values, so <gradient, value> is the output.
    total, gradient = jax.value_and_grad(lambda value: jnp.sum(apply(jax.random.key(0), value)))(value)
    np.testing.assert_allclose(jnp.sum(gradient * value), total, rtol=1e-5)
    assert np.ptp(gradient[:, 0]) > 0


def test_the_softmax_of_half_precision_is_summed_in_float32(rng):
    """Over 4,096 keys that are alike; the probabilities are as near to 1 / 4,096 as bfloat16 can tell."""
    scores = jnp.zeros((2, 4096), jnp.bfloat16)
    found = softmax(scores)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), 1 / 4096)
    scores = jnp.asarray(rng.normal(size=(8, 500)), jnp.bfloat16)
    exact = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    np.testing.assert_array_equal(softmax(scores), exact.astype(jnp.bfloat16))


def test_multi_head_attention_equals_a_loop(rng):
    n, width, heads = 4, 6, 3
    x = jnp.asarray(rng.normal(size=(2, n, width)), jnp.float32)
    mask = multitask_mask(2, 2, "TxT")
    module = MultiHeadAttention(heads)
    variables = random_params(module, x)
    out = apply(module, variables, x, mask)
    p = jax.tree.map(np.asarray, variables["params"])
    for b in range(2):
        parts = [np.asarray(x[b]) @ p["qkv"]["kernel"][:, i] + p["qkv"]["bias"][i] for i in range(3)]
        parts = [part.reshape(n, heads, -1) for part in parts]
        mixed = attention_loop(*parts, mask).reshape(n, width)
        np.testing.assert_allclose(out[b], mixed @ p["out"]["kernel"] + p["out"]["bias"], atol=1e-5)
    np.testing.assert_allclose(apply(module, variables, x, mask[:1], num_queries=1), out[:, :1], atol=1e-6)
    with pytest.raises(ValueError, match="num_heads=4 must divide the width 6"):
        MultiHeadAttention(4).init(jax.random.key(0), x)


def test_attention_dropout_is_for_training_only(rng):
    x = jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32)
    module = MultiHeadAttention(2, dropout=0.5)
    variables = random_params(module, x)
    still = apply(module, variables, x)
    np.testing.assert_array_equal(still, apply(MultiHeadAttention(2), variables, x))
    drawn = apply(module, variables, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert float(jnp.abs(drawn - still).max()) > 0.01


def test_feed_forward_with_and_without_a_gate(rng):
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    for gate in (None, nn.relu):
        module = FeedForward(5, gate=gate)
        variables = random_params(module, x)
        p = jax.tree.map(np.asarray, variables["params"])
        h = x @ p["in"]["kernel"] + p["in"]["bias"]
        if gate is None:
            h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2  # exact GELU
        else:
            h = h[..., :5] * np.maximum(h[..., 5:], 0)
        np.testing.assert_allclose(apply(module, variables, x), h @ p["out"]["kernel"] + p["out"]["bias"], atol=1e-5)


def test_a_layer_for_the_first_tokens_only(rng):
    x = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    mask = multitask_mask(2, 3, "TxT")
    variables = random_params(TransformerLayer(2, 3), x)
    whole = apply(TransformerLayer(2, 3), variables, x, mask)
    first = apply(TransformerLayer(2, 3, num_queries=2), variables, x, mask[:2])
    np.testing.assert_allclose(first, whole[:, :2], atol=1e-6)


# Chunks of rows.


class Chunked(nn.Module):
    """A layer behind `in_row_chunks`."""

    rows: int | None
    dropout: float = 0.0
    num_queries: int | None = None

    @nn.compact
    def __call__(self, x, train=False):
        layer = TransformerLayer(2, 3, self.dropout, num_queries=self.num_queries, name="layer")
        mask = multitask_mask(1, 2, "FxT")[: self.num_queries]
        return in_row_chunks(layer, x, mask, self.rows, train=train)


BATCH = 7
X = jnp.asarray(np.random.default_rng(3).normal(size=(BATCH, 3, 4)), jnp.float32)


@pytest.fixture(scope="module")
def variables():
    return random_params(Chunked(None), X)


def output_and_gradient(rows, variables):
    def loss(variables, x):
        out = Chunked(rows).apply(variables, x)
        return jnp.sum(jnp.sin(out)), out

    return quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, X)


@pytest.fixture(scope="module")
def at_once(variables):
    return output_and_gradient(None, variables)


@pytest.mark.parametrize("rows", [1, 3])
def test_row_chunks_change_nothing(rows, variables, at_once):
    (_, expected), expected_gradient = at_once
    (_, out), gradient = output_and_gradient(rows, variables)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected_gradient)


def test_row_chunks_do_not_change_the_initialisation():
    key = jax.random.key(0, impl="rbg")  # compiles faster
    chunked, whole = (quick_jit(Chunked(rows).init)(key, X) for rows in (3, None))
    jax.tree.map(np.testing.assert_array_equal, chunked, whole)


def test_row_chunks_of_a_layer_with_fewer_queries(variables, at_once):
    (_, expected), _ = at_once
    np.testing.assert_allclose(apply(Chunked(3, num_queries=1), variables, X), expected[:, :1], atol=1e-6)


def test_row_chunks_draw_dropout_anew(variables):
    same = jnp.broadcast_to(X[:1], (6, 3, 4))
    model = Chunked(2, dropout=0.5)
    out = apply(model, variables, same, train=True, rngs={"dropout": jax.random.key(0)})
    assert len(np.unique(np.asarray(out).reshape(6, -1), axis=0)) == 6


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_blocked_keys_do_not_matter(seed):
    """Whatever a token that may not be read holds, the reader's output is the same to the bit."""
    rng = np.random.default_rng(seed)
    mask = np.asarray((rng.random((4, 4)) < 0.5) | np.eye(4, dtype=bool))
    qkv = rng.normal(size=(3, 1, 4, 1, 2)).astype(np.float32)
    other = qkv.copy()
    key = int(rng.integers(4))
    other[1:, :, key] = rng.normal(size=(2, 1, 1, 2)) * 100
    out, changed = (attend(*jnp.asarray(a), jnp.asarray(mask)) for a in (qkv, other))
    for query in np.flatnonzero(~mask[:, key]):
        np.testing.assert_array_equal(out[0, query], changed[0, query])
