"""Queues: what a capacity drops, gradients of both tiers, seeds and tasks by vmap, experts out of parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn import moe_queues
from mtjax.nn.moe import Dispatch, moe_apply


@pytest.mark.parametrize(("cached", "priority"), [(0, "first_choice"), (2**21, "batch")])
def test_a_capacity_drops_the_last_in_the_queue(small_moe, monkeypatch, cached, priority):
    monkeypatch.setattr(moe_queues, "CACHED", cached)  # 0: the gradient of large layers, block by block
    dispatch = Dispatch("sort_capacity", capacity_factor=0.8, priority=priority)
    x, values, ids, params = args = small_moe.problem(4)
    found, out = small_moe.evaluate.__wrapped__(dispatch)(*args)
    kept = small_moe.queue(values, ids, 16, priority)  # 40 * 3 * 0.8 / 6
    assert 0.1 < np.mean(~kept) < 0.9
    np.testing.assert_array_equal(out.kept, kept)
    np.testing.assert_allclose(out.y, small_moe.naive(*args, kept), atol=1e-5)
    expected, _ = small_moe.evaluate("all_experts")(x, np.where(kept, values, 0), ids, params)
    small_moe.assert_close(found, (expected[0], np.where(kept, expected[1], 0), expected[2]))


def test_the_gradient_of_large_layers_is_the_same(small_moe, monkeypatch):
    monkeypatch.setattr(moe_queues, "CACHED", 0)
    args = small_moe.problem(5)
    found = small_moe.evaluate.__wrapped__(small_moe.DROPLESS["capacity_overflow"])(*args)
    small_moe.assert_close(found, small_moe.evaluate("all_experts")(*args))


def test_seeds_by_vmap_and_jacobians_of_tasks(small_moe):
    (x, *_), *_ = seeds = [small_moe.problem(seed) for seed in (2, 3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(seed[1:] for seed in seeds))
    found, expected = (small_moe.jacobian(name)(x, *stacked) for name in ("capacity_overflow", "all_experts"))
    small_moe.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["sort_capacity", "capacity_overflow", "block_dropless"])
def test_experts_out_of_parts(small_moe, backend):
    for skew in (0.0, 20.0):
        x, _, ids, params = args = small_moe.problem(8, skew)
        (_, rows), gradients = small_moe.attention_like(small_moe.DROPLESS[backend])(*args)
        hidden = np.tanh(np.einsum("nd,nkdh->nkh", x, params["kernel_in"][ids]))
        np.testing.assert_allclose(rows, hidden * np.arange(1, small_moe.K + 1)[:, None], atol=1e-5)
        small_moe.assert_close(gradients, small_moe.attention_like("all_experts")(*args)[1])


def test_dtype_is_kept(small_moe):
    x, values, ids, params = small_moe.problem(9)

    @jax.jit
    def half(x, values, ids, params):
        x, params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x, params))
        return moe_apply(x, values, ids, params, dispatch="capacity_overflow").y

    y = half(x, values, ids, params)
    assert y.dtype == jnp.bfloat16
    expected = small_moe.naive(x, values, ids, params)
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=0.03 * np.abs(expected).max())


def test_gradients_over_many_blocks_are_summed_in_float32():
    """4,096 rows of one expert in blocks of 8: in bfloat16 8 and 8 and 8 ... make no more than 2,048."""
    rows, half = 4096, jnp.bfloat16
    sizes = {"kernel_in": (1, 4, 4), "bias_in": (1, 4), "kernel_out": (1, 4, 4), "bias_out": (1, 4)}
    params = {name: jnp.ones(size, half) for name, size in sizes.items()}
    queues = moe_queues.form_queues(jnp.zeros((rows, 1), jnp.int32), 1, places=0, block=8)

    def total(params):
        x, gates = jnp.ones((rows, 4), half), jnp.ones((rows, 1), half)
        return moe_queues.queued_mlp(x, gates, params, queues, jax.nn.relu).astype(jnp.float32).sum()

    gradient = jax.grad(total)(params)
    assert gradient["bias_out"].dtype == half
    np.testing.assert_array_equal(np.asarray(gradient["bias_out"], np.float32), rows)
