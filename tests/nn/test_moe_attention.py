"""Mixture of attention heads against a loop over tokens and heads, and under the transforms that training uses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.moe import Dispatch
from mtjax.nn.moe_attention import MoEAttention
from mtjax.nn.routers import RouterConfig

T, B, N, D, E, K, HEAD = 2, 2, 4, 6, 5, 2, 3
TASKS = (2, 0)
X = np.random.default_rng(0).normal(size=(T, B, N, D)).astype(np.float32)
DISPATCH = {
    "auto": "auto",
    "all_experts": "all_experts",
    "drops": Dispatch("sort_capacity", capacity_factor=0.5),
}


def layer(kind="multi_gate", dispatch="auto"):
    return MoEAttention(RouterConfig(kind, E, K), head_dim=HEAD, num_tasks=3, dispatch=dispatch)


@functools.cache
def params(kind="multi_gate", seed=0):
    shapes = jax.eval_shape(functools.partial(layer(kind).init, tasks=TASKS), jax.random.key(0), X)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@functools.cache
def compiled(kind, dispatch):
    module = layer(kind, dispatch)
    return jax.jit(lambda params, x: module.apply({"params": params}, x, tasks=TASKS))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("dispatch", DISPATCH)
def test_equals_a_loop_over_tokens_and_heads(dispatch):
    p = params()
    y, stats = compiled("multi_gate", DISPATCH[dispatch])(p, X)
    assert y.shape == X.shape
    # Places at an expert are given to all first choices of all streams, then to all second choices.
    places = np.inf if dispatch != "drops" else 4  # 16 tokens * 2 / 5 experts * 0.5 = 1.6, in fours
    probs = np.stack([softmax(X[s].reshape(-1, D) @ p["router"]["kernel"][task]) for s, task in enumerate(TASKS)])
    best = np.argsort(-probs, axis=-1)[..., :K]
    room, kept = np.full(E, float(places)), np.zeros((T, B * N, K), bool)
    for k in range(K):
        for s in range(T):
            for n in range(B * N):
                room[best[s, n, k]] -= 1
                kept[s, n, k] = room[best[s, n, k]] >= 0
    for s in range(T):
        for b in range(B):
            key, value = np.split(X[s, b] @ p["key_value"]["kernel"] + p["key_value"]["bias"], 2, axis=-1)
            for n in range(N):
                expected = np.zeros(D)
                for k in range(K):
                    e = best[s, b * N + n, k]
                    query = X[s, b, n] @ p["experts"]["query_kernel"][e]
                    head = softmax(query @ key.T / np.sqrt(HEAD)) @ value
                    gate = probs[s, b * N + n, e] * kept[s, b * N + n, k]
                    expected += gate * (head @ p["experts"]["out_kernel"][e])
                np.testing.assert_allclose(y[s, b, n], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats.dropped, 1 - kept.mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert (stats.dropped > 0).any() == (dispatch == "drops")
    np.testing.assert_allclose(stats.count.sum(-1), B * N * K)


def test_streams_that_are_still_equal_are_read_once():
    p = params()
    one, _ = compiled("multi_gate", "auto")(p, X[:1])
    copies, _ = compiled("multi_gate", "auto")(p, np.repeat(X[:1], T, 0))
    np.testing.assert_allclose(one, copies, rtol=1e-4, atol=1e-4)
    program = str(jax.make_jaxpr(compiled("multi_gate", "auto"))(p, X[:1]))
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert any(f"f32[{B * N},{2 * HEAD}]" in line for line in products)  # keys and values of one stream
    single, stats = compiled("single", "auto")(params("single"), X[:1])
    assert single.shape == (1, B, N, D)
    assert stats.count.shape == (1, E)


def test_per_task_gradients_over_seeds_equal_the_reference():
    """jacrev under vmap, of the sorted dispatch and of every expert on every token."""

    def jacobian(dispatch):
        def losses(params):
            y, _ = layer(dispatch=dispatch).apply({"params": params}, X, tasks=TASKS)
            return jnp.mean(jnp.square(y), axis=(1, 2, 3))

        return jax.jit(jax.vmap(jax.jacrev(losses)))

    seeds = jax.tree.map(lambda *leaves: np.stack(leaves), params(seed=0), params(seed=1))
    sorted_way, reference = jacobian("auto")(seeds), jacobian("all_experts")(seeds)
    for left, right in zip(jax.tree.leaves(sorted_way), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)
    assert sorted_way["router"]["kernel"].shape == (2, T, 3, D, E)
    assert np.abs(sorted_way["router"]["kernel"][:, 0, 0]).max() == 0  # stream 0 is task 2: gate 0 is not its


def test_parameters_are_stacked_over_experts():
    shapes = jax.tree.map(lambda leaf: leaf.shape, params())
    assert shapes == {
        "router": {"kernel": (3, D, E)},
        "experts": {"query_kernel": (E, D, HEAD), "out_kernel": (E, HEAD, D)},
        "key_value": {"kernel": (D, 2 * HEAD), "bias": (2 * HEAD,)},
    }
