"""A small mixture of experts with its plain loop, shared by the tests of `mtjax.nn.moe` and the files beside it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from mtjax.nn.moe import Dispatch, moe_apply, route_tokens

N, D, H, E, K = 40, 6, 5, 6, 3
DROPLESS = {
    "all_experts": Dispatch("all_experts"),
    "sort_capacity": Dispatch("sort_capacity", capacity_factor=2.0 * E),
    "capacity_overflow": Dispatch("capacity_overflow", block=8),
    "block_dropless": Dispatch("block_dropless", block=8),
    "einsum_capacity": Dispatch("einsum_capacity", capacity_factor=2.0 * E, groups=4),
    "ragged": Dispatch("ragged"),
}


def problem(seed: int, skew: float = 1.0):
    """x, gate values, gate ids and parameters; with `skew`, experts are used unevenly, and expert 5 hardly ever."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    logits = draw(N, E) + skew * np.linspace(2, -2, E, dtype=np.float32)
    ids = np.argsort(-logits, axis=1)[:, :K].astype(np.int32)
    values = np.take_along_axis(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), ids, axis=1)
    params = {"kernel_in": draw(E, D, H), "bias_in": draw(E, H), "kernel_out": draw(E, H, D), "bias_out": draw(E, D)}
    return draw(N, D), values, ids, params


def losses(dispatch, x, values, ids, params):
    """Two losses, and y and kept."""
    out = moe_apply(x, values, ids, params, dispatch=dispatch)
    return jnp.stack([jnp.mean(jnp.sin(out.y)), jnp.mean(out.y**2)]), out


@functools.cache
def evaluate(dispatch):
    """Jitted (x, values, ids, params) -> (gradients of the sum of the losses, output)."""

    dispatch = DROPLESS.get(dispatch, dispatch) if isinstance(dispatch, str) else dispatch

    def total(*args):
        loss, out = losses(dispatch, *args)
        return jnp.sum(loss), out

    return jax.jit(jax.grad(total, argnums=(0, 1, 3), has_aux=True))


@functools.cache
def jacobian(dispatch):
    """Jitted Jacobians of the two losses for every seed, which share x."""

    dispatch = DROPLESS.get(dispatch, dispatch) if isinstance(dispatch, str) else dispatch

    def one_seed(*args):
        return jax.jacrev(lambda *args: losses(dispatch, *args)[0], argnums=(0, 1, 3))(*args)

    return jax.jit(jax.vmap(one_seed, in_axes=(None, 0, 0, 0)))


@functools.cache
def attention_like(dispatch):
    """Experts out of parts: a map of the token, a nonlinearity, the row of each choice out and in again, a map back."""

    def run(x, values, ids, params):
        routed = route_tokens(ids, E, dispatch, gate_values=values)
        rows = routed.gather(jax.tree.map(jnp.tanh, routed.linear(routed.scatter(x), params["kernel_in"])))
        rows = rows * jnp.arange(1.0, K + 1)[None, :, None]  # what differs between the choices of a token
        out = routed.linear(routed.scatter(rows), params["kernel_out"], params["bias_out"])
        return jnp.sum(jnp.sin(routed.combine(out, values))), rows

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 3), has_aux=True))


def assert_close(found, expected):
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * max(1.0, np.abs(other).max()))


def naive(x, values, ids, params, kept=None):
    """y by a loop over assignments, in float64."""
    y = np.zeros(x.shape)
    p = {name: value.astype(np.float64) for name, value in params.items()}
    for n in range(len(x)):
        for k in range(ids.shape[1]):
            e = ids[n, k]
            if e < E and (kept is None or kept[n, k]):
                z = x[n] @ p["kernel_in"][e] + p["bias_in"][e]
                y[n] += values[n, k] * (z * ndtr(z) @ p["kernel_out"][e] + p["bias_out"][e])
    return y


def queue(values, ids, places, priority):
    """kept bool[N, K] by going through the choices one after another."""
    tokens = range(len(ids)) if priority == "first_choice" else np.argsort(-values.max(1), kind="stable")
    kept, used = np.zeros(ids.shape, bool), np.zeros(E, int)
    for k in range(ids.shape[1]):
        for n in tokens:
            kept[n, k] = used[ids[n, k]] < places
            used[ids[n, k]] += 1
    return kept


@pytest.fixture(scope="session")
def small_moe():
    """Sizes and functions of this file."""
    return types.SimpleNamespace(**globals())
