import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.expert_queue import expert_queue_apply, peak_weight_bytes

N, D, H, E, K = 23, 6, 5, 7, 2


@functools.cache
def experts():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"kernel_in": (E, D, H), "bias_in": (E, H), "kernel_out": (E, H, D), "bias_out": (E, D)}
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def naive(x, values, ids, p, threshold=0.0):
    y = np.zeros_like(x)
    for n in range(len(x)):
        for value, expert in zip(values[n], ids[n], strict=True):
            if expert < E and value > threshold:
                hidden = x[n] @ p["kernel_in"][expert] + p["bias_in"][expert]
                hidden = np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
                y[n] += value * (hidden @ p["kernel_out"][expert] + p["bias_out"][expert])
    return y


run = functools.cache(lambda **options: jax.jit(functools.partial(expert_queue_apply, **options)))


@pytest.mark.parametrize("case", ["mixed", "one expert", "last expert only", "no expert"])
def test_equals_a_loop_over_tokens(rng, case):
    x = rng.normal(size=(N, D)).astype(np.float32)
    values = rng.uniform(0.05, 1.0, (N, K)).astype(np.float32)
    ids = np.stack([rng.permutation(E - 2)[:K] for _ in range(N)]).astype(np.int32)  # two experts stay empty
    if case == "one expert":
        ids[:] = [3, E]  # E: no expert
    if case == "last expert only":
        ids[:] = [E - 1, E]
    if case == "no expert":
        ids[:] = E
    p = {name: np.asarray(leaf) for name, leaf in experts().items()}
    y = run(block=4)(x, values, ids, experts())
    np.testing.assert_allclose(y, naive(x, values, ids, p), atol=1e-5)


def test_threshold_skips_assignments(rng):
    x = rng.normal(size=(N, D)).astype(np.float32)
    values = rng.uniform(0.0, 1.0, (N, K)).astype(np.float32)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(N)]).astype(np.int32)
    p = {name: np.asarray(leaf) for name, leaf in experts().items()}
    y = run(block=4, threshold=0.5)(x, values, ids, experts())
    np.testing.assert_allclose(y, naive(x, values, ids, p, 0.5), atol=1e-5)
    assert not np.allclose(y, naive(x, values, ids, p))


def test_an_expert_without_tokens_is_never_fetched(rng):
    poisoned = {name: leaf.at[5].set(jnp.nan) for name, leaf in experts().items()}
    x = rng.normal(size=(N, D)).astype(np.float32)
    values = np.full((N, K), 0.5, np.float32)
    ids = np.stack([rng.permutation(5)[:K] for _ in range(N)]).astype(np.int32)
    y = run(block=4)(x, values, ids, poisoned)
    assert np.isfinite(y).all()


def test_two_experts_are_resident():
    one = (D * H + H + H * D + D) * 4
    assert peak_weight_bytes(experts()) == 2 * one
    assert peak_weight_bytes(experts(), resident=None) == E * one
    assert peak_weight_bytes(experts(), resident=20) == E * one
