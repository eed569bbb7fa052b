"""Dispatch without queues: one-hot groups and grouped products, under vmap and Jacobians; the kernels for TPUs."""

import jax
import numpy as np
import pytest

from mtjax.nn import moe_backends
from mtjax.nn.moe import Dispatch, moe_apply


@pytest.mark.parametrize("priority", ["first_choice", "batch"])
def test_one_hot_capacity_is_per_group(small_moe, priority):
    dispatch = Dispatch("einsum_capacity", capacity_factor=0.8, priority=priority, groups=2)
    _, values, ids, _ = args = small_moe.problem(5)
    out = jax.jit(lambda *args: moe_apply(*args, dispatch=dispatch))(*args)
    halves = (slice(20), slice(20, 40))
    kept = np.concatenate([small_moe.queue(values[half], ids[half], 8, priority) for half in halves])
    np.testing.assert_array_equal(out.kept, kept)
    np.testing.assert_allclose(out.y, small_moe.naive(*args, kept), atol=1e-5)


@pytest.mark.parametrize("backend", ["einsum_capacity", "ragged"])
def test_seeds_by_vmap_and_jacobians_of_tasks(small_moe, backend):
    (x, *_), *_ = seeds = [small_moe.problem(seed) for seed in (2, 3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(seed[1:] for seed in seeds))
    found, expected = (small_moe.jacobian(name)(x, *stacked) for name in (backend, "all_experts"))
    small_moe.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["einsum_capacity", "ragged"])
def test_experts_out_of_parts(small_moe, backend):
    for skew in (0.0, 20.0):
        x, _, ids, params = args = small_moe.problem(8, skew)
        (_, rows), gradients = small_moe.attention_like(small_moe.DROPLESS[backend])(*args)
        hidden = np.tanh(np.einsum("nd,nkdh->nkh", x, params["kernel_in"][ids]))
        np.testing.assert_allclose(rows, hidden * np.arange(1, small_moe.K + 1)[:, None], atol=1e-5)
        small_moe.assert_close(gradients, small_moe.attention_like("all_experts")(*args)[1])


def test_forward_mode_of_the_products(small_moe):
    x, values, ids, params = small_moe.problem(3)
    tangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def push(dispatch):
        return jax.jvp(lambda x: moe_apply(x, values, ids, params, dispatch=dispatch).y, (x,), (tangent,))

    found, expected = jax.jit(lambda: [push(small_moe.DROPLESS[name]) for name in ("einsum_capacity", "all_experts")])()
    small_moe.assert_close(found, expected)


@pytest.mark.slow
def test_megablox_computes_grouped_products(small_moe):
    args = small_moe.problem(1)  # interpreted: the kernel is for TPUs
    found = small_moe.evaluate(Dispatch("ragged", kernel="megablox_interpret"))(*args)
    small_moe.assert_close(found, small_moe.evaluate("all_experts")(*args))


def test_kernels_by_platform():
    assert moe_backends.default_kernel("cpu") == moe_backends.default_kernel("tpu") == "lax"
    assert moe_backends.default_kernel("gpu") == ("tokamax" if moe_backends.has_tokamax() else "lax")
