"""The context gate against a loop over tasks and images, and that it sees what it should."""

import functools

import jax
import numpy as np
import pytest

from mtjax.nn.context_gate import ContextGate

GATE = ContextGate(num_tasks=3, num_scores=4, hidden=6)
X = np.random.default_rng(0).normal(size=(2, 3, 2, 5)).astype(np.float32)


@functools.cache
def params():
    shapes = jax.eval_shape(GATE.init, jax.random.key(0), X)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


score = functools.partial(jax.jit, static_argnames="tasks")(
    lambda params, x, tasks=None: GATE.apply({"params": params}, x, tasks=tasks)
)


def layer_norm(x, p, t):
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normal * p["scale"][t] + p["bias"][t]


def gelu(x):
    return np.asarray(jax.nn.gelu(x, approximate=False))


def test_scores_equal_a_loop_with_the_average_last():
    p = params()
    scores = score(p, X)
    assert scores.shape == (3, 2, 4)
    for t in range(3):
        affine = lambda x, name: x @ p[name]["kernel"][t] + p[name]["bias"][t]  # noqa: B023, E731
        for b in range(2):
            positions = X[b].reshape(-1, 5)
            local = np.mean(
                [affine(gelu(layer_norm(affine(x, "local_in"), p["local_norm"], t)), "local_out") for x in positions], 0
            )
            summary = p["pool"][t, :, 0] @ positions + p["pool_bias"][t]
            summary = affine(gelu(layer_norm(summary, p["pooled_norm"], t)), "pooled_out")
            expected = affine(np.concatenate([local, summary]), "scores")
            np.testing.assert_allclose(scores[t, b], expected, rtol=1e-4, atol=1e-4)


def test_a_task_alone_has_its_row():
    np.testing.assert_allclose(score(params(), X, tasks=(2,))[0], score(params(), X)[2], rtol=1e-5, atol=1e-5)


def test_gates_depend_on_the_image_and_on_where_things_are():
    scores = np.asarray(score(params(), X))
    assert (np.abs(scores[:, 0] - scores[:, 1]) > 1e-3).all(-1).all()
    moved = score(params(), X[:, ::-1])  # the average alone would not notice
    assert np.abs(moved - scores).max() > 1e-2


def test_a_flat_input_is_refused():
    with pytest.raises(ValueError, match=r"maps \[B, h, w, C\]"):
        GATE.init(jax.random.key(0), X[0])
