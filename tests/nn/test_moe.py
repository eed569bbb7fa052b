"""Every dispatch is the same mixture of experts: values, gradients, experts of other kinds, sentences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn import moe, moe_queues
from mtjax.nn.moe import Dispatch, moe_apply, route_tokens

BACKENDS = ("sort_capacity", "capacity_overflow", "block_dropless", "einsum_capacity", "ragged")


def test_all_experts_is_the_definition(small_moe):
    args = small_moe.problem(0)
    _, out = small_moe.evaluate("all_experts")(*args)
    np.testing.assert_allclose(out.y, small_moe.naive(*args), atol=1e-5)
    assert out.kept.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_all_experts(small_moe, backend):
    for skew in (0.0, 1.0, 20.0):  # at 20 all tokens go to the same three experts
        args = small_moe.problem(1, skew)
        found = small_moe.evaluate(backend)(*args)
        assert np.asarray(found[1].kept).all()
        small_moe.assert_close(found, small_moe.evaluate("all_experts")(*args))


@pytest.mark.parametrize("backend", ["all_experts", *BACKENDS])
def test_an_id_behind_the_last_expert_is_no_expert(small_moe, backend):
    x, values, ids, params = small_moe.problem(6)
    ids = np.where(ids == 2, small_moe.E + 1, ids)
    found, out = small_moe.evaluate(backend)(x, values, ids, params)
    np.testing.assert_allclose(out.y, small_moe.naive(x, values, ids, params), atol=1e-5)
    np.testing.assert_array_equal(out.kept, ids < small_moe.E)
    assert (np.asarray(found[1])[ids > small_moe.E] == 0).all()
    assert all((np.asarray(leaf)[2] == 0).all() for leaf in jax.tree.leaves(found[2]))


@pytest.mark.parametrize("backend", ["capacity_overflow", "einsum_capacity"])
def test_tokens_are_independent_where_nothing_is_dropped(small_moe, backend):
    x, values, ids, params = small_moe.problem(7)
    order = np.random.default_rng(0).permutation(len(x))
    together = small_moe.evaluate(backend)(x, values, ids, params)[1].y
    shuffled = small_moe.evaluate(backend)(x[order], values[order], ids[order], params)[1].y
    np.testing.assert_allclose(shuffled, together[order], atol=1e-5)


def test_auto_is_what_choose_says_and_never_drops(small_moe):
    _, _, ids, _ = small_moe.problem(0, 20.0)
    routed = route_tokens(ids, small_moe.E)
    assert isinstance(routed, moe_queues.Queues) and routed.limit is None and np.asarray(routed.kept).all()
    for platform in ("cpu", "gpu", "tpu"):
        for size in (64, 1024):
            assert moe.choose(size, size, platform=platform) in ("capacity_overflow", "block_dropless", "ragged")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backend": "sorted"}, "backend must be one of"),
        ({"priority": "last"}, "priority must be one of"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive"),
        ({"block": 0}, "block and groups must be at least 1"),
    ],
)
def test_a_dispatch_is_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        Dispatch(**arguments)


def test_arguments_are_checked(small_moe):
    x, values, ids, params = small_moe.problem(0)
    with pytest.raises(ValueError, match="gate_values and gate_ids both"):
        moe_apply(x, values[:, :2], ids, params)
    with pytest.raises(ValueError, match="kernel_in must be"):
        moe_apply(x[:, :2], values, ids, params)
    with pytest.raises(ValueError, match="gate_ids must be integers"):
        route_tokens(values, small_moe.E)
    with pytest.raises(ValueError, match="at most num_experts=2"):
        route_tokens(ids, 2)
    with pytest.raises(ValueError, match="gate_values must be given"):
        route_tokens(ids, small_moe.E, Dispatch("sort_capacity", priority="batch"))
    with pytest.raises(ValueError, match="groups=3 must divide the number of tokens, 40"):
        route_tokens(ids, small_moe.E, Dispatch("einsum_capacity", groups=3))
    with pytest.raises(ValueError, match="32-bit sort key"):
        jax.eval_shape(lambda ids: route_tokens(ids, 1024), jax.ShapeDtypeStruct((2**20, 2), jnp.int32))
