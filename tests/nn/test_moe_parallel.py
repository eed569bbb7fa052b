"""Experts on several devices compute what one device does, in two all-to-alls of the size that the formula says."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.moe import Dispatch, moe_apply
from mtjax.nn.moe_parallel import communication_volume, moe_apply_parallel

MESHES = {"expert": ((8,), ("expert",)), "data_expert": ((2, 4), ("data", "expert"))}
FACTOR = 2.0
N, D, H, E, K = 64, 6, 5, 8, 2


def arguments():
    """Gates that no device's experts are too few for: C = 2 * 8 * 2 / 8 = 4 places for 8 tokens' 16 assignments."""
    rng = np.random.default_rng(0)
    shapes = {"kernel_in": (E, D, H), "bias_in": (E, H), "kernel_out": (E, H, D), "bias_out": (E, D)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    ids = (np.arange(N)[:, None] + np.array([[0, 3]])) % E
    ids[::8] = ids[1::8]  # not all alike
    x, values = rng.normal(size=(N, D)).astype(np.float32), rng.uniform(size=(N, K)).astype(np.float32)
    return x, values, ids.astype(np.int32), params


def loss(apply):
    def total(*args):
        y = apply(*args).y
        return jnp.mean(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 3), has_aux=True))


@functools.cache
def parallel(name, backend):
    shape, names = MESHES[name]
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))
    dispatch = Dispatch(backend, capacity_factor=FACTOR)
    return functools.partial(moe_apply_parallel, mesh=mesh, token_axes=names, dispatch=dispatch)


@functools.cache
def single():
    return loss(functools.partial(moe_apply, dispatch="all_experts"))(*arguments())


@pytest.mark.parametrize(("name", "backend"), [("expert", "einsum_capacity"), ("data_expert", "sort_capacity")])
def test_result_and_gradients_are_those_of_one_device(name, backend):
    found = loss(parallel(name, backend))(*arguments())
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(single()), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize("name", MESHES)
def test_two_all_to_alls_of_the_predicted_size(name):
    text = jax.jit(parallel(name, "sort_capacity")).lower(*arguments()).compile().as_text()
    exchanges = re.findall(r"= \(?(.*?)\)? all-to-all(?:-start)?\(", text)
    assert len(exchanges) == 2
    assert not re.search(r" (all-gather|all-reduce|collective-permute|reduce-scatter)(-start)?\(", text)
    shape, _ = MESHES[name]
    volume = communication_volume(N, K, E, D, shards=shape[-1], token_shards=8, capacity_factor=FACTOR)
    for exchange in exchanges:
        shapes = re.findall(r"f32\[([\d,]+)\]", exchange)
        assert 4 * sum(math.prod(map(int, dims.split(","))) for dims in shapes) == volume.operand
    assert volume.forward == 2 * 8 * volume.operand * (shape[-1] - 1) // shape[-1]


def test_capacity_holds_per_device():
    x, values, _, params = arguments()
    out = jax.jit(parallel("expert", "sort_capacity"))(x, values, np.tile(np.int32([[0, 1]]), (N, 1)), params)
    np.testing.assert_array_equal(out.kept, np.tile(np.arange(8)[:, None] < 4, (8, 2)))


def test_arguments_are_checked():
    x, values, ids, params = arguments()
    apply = parallel("data_expert", "sort_capacity")
    with pytest.raises(ValueError, match=r"\[N, D\] or \[T, B, N, D\]"):
        apply(x[None], values[None], ids[None], params)
    with pytest.raises(ValueError, match="4 devices must divide the number of experts, 8, and 8 devices"):
        apply(x[:12], values[:12], ids[:12], params)
    with pytest.raises(ValueError, match="and hold 'expert'"):
        apply(x, values, ids, params, token_axes=("data",))
