"""The layer: streams in and out, statistics, what a task does not use, gradients of every task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.moe import Dispatch, moe_apply
from mtjax.nn.moe_layer import MoEMlp
from mtjax.nn.routers import RouterConfig

E, K, D = 4, 2, 6
SKILLS = RouterConfig("hard_skill", E, K, skills=[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]])


@functools.cache
def layer(kind: str, dispatch: str | Dispatch = "auto"):
    config = SKILLS if kind == "hard_skill" else RouterConfig(kind, E, K)
    module = MoEMlp(config, hidden=5, num_tasks=3, dispatch=dispatch)
    x = jax.random.normal(jax.random.key(0), (1, 2, 5, D))
    return module, jax.jit(functools.partial(module.init, tasks=(0, 1, 2)))(jax.random.key(1), x), x


def run(module, variables, x, tasks):
    return jax.jit(functools.partial(module.apply, tasks=tasks))(variables, x)


def test_streams_are_computed_as_if_alone():
    module, variables, x = layer("multi_gate")
    y, stats = run(module, variables, x, (2, 0))
    assert y.shape == (2, 2, 5, D)
    for stream, task in enumerate((2, 0)):
        alone, stats_alone = run(module, variables, x, (task,))
        np.testing.assert_allclose(y[stream], alone[0], atol=1e-6)
        for together, single in zip(stats, stats_alone, strict=True):
            np.testing.assert_allclose(
                together if together.ndim == 0 else together[stream], np.squeeze(single), rtol=1e-5
            )
    assert (np.asarray(stats.count).sum(1) == 10 * K).all() and not stats.dropped.any()


def test_capacity_is_shared_between_streams():
    """Ten tokens of either stream, two experts each: together they fill four experts, alone two overflow."""
    module, variables, x = layer("hard_skill", Dispatch("sort_capacity", capacity_factor=1.0))
    _, stats = run(module, variables, x, (1, 2))
    assert not np.asarray(stats.dropped).any()
    _, stats = run(module, variables, x, (2, 2))  # 20 tokens for 2 of 4 experts with 12 places each
    np.testing.assert_allclose(np.mean(stats.dropped), 0.4)


def test_a_shared_gate_keeps_one_stream():
    module, variables, x = layer("single")
    y, stats = run(module, variables, x, (0, 1, 2))
    assert y.shape == x.shape and stats.importance.shape == (1, E)


def test_skills_average_their_experts():
    module, variables, x = layer("hard_skill")
    y, _ = run(module, variables, x, (0, 1))
    params, tokens = variables["params"], x.reshape(-1, D)

    @jax.jit
    def expert(e):
        one = jnp.full((10, 1), e, jnp.int32)
        return moe_apply(tokens, jnp.ones((10, 1)), one, params, dispatch="all_experts").y

    np.testing.assert_allclose(y[0].reshape(-1, D), expert(0), atol=1e-5)
    np.testing.assert_allclose(y[1].reshape(-1, D), (expert(0) + expert(1)) / 2, atol=1e-5)


def test_every_task_moves_its_own_gate_and_the_experts():
    module, variables, x = layer("multi_gate")

    def losses(variables):
        y, _ = module.apply(variables, x, tasks=(0, 1, 2))
        return jnp.mean(y**2, axis=(1, 2, 3))

    rows = jax.jit(jax.jacrev(losses))(variables)["params"]
    moved = np.abs(rows["router"]["kernel"]).max((2, 3)) > 0
    np.testing.assert_array_equal(moved, np.eye(3, dtype=bool))
    assert (np.abs(rows["kernel_in"]).max((1, 2, 3)) > 0).all()


def test_input_is_checked():
    module, variables, x = layer("single")
    with pytest.raises(ValueError, match=r"x must be \[T, B, N, D\]"):
        module.apply(variables, x[0], tasks=(0,))
