import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.tam import TAM, insert_zeros, share_mask, side_by_side

HEADS = {"edge": 1, "normals": 3}
rng = np.random.default_rng(0)
FEATURES = rng.normal(size=(2, 1, 5, 6, 4)).astype(np.float32)  # an odd height


@functools.cache
def params():
    shapes = jax.eval_shape(lambda key: TAM(HEADS).init(key, FEATURES, (10, 12)), jax.random.key(0))["params"]
    return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


@functools.cache
def jacobian():
    """Outputs, and the gradient of each task's auxiliary prediction at the features f[task, T, B, h, w, C]."""

    def run(features):
        outputs = TAM(HEADS).apply({"params": params()}, features, (10, 12))
        return jnp.stack([jnp.sum(jnp.sin(y)) for y in outputs.values()]), outputs

    return jax.jit(jax.jacrev(run, has_aux=True))(FEATURES)


def test_every_task_is_predicted_from_all_tasks():
    gradients, outputs = jacobian()
    assert {name: y.shape for name, y in outputs.items()} == {"edge": (1, 10, 12, 1), "normals": (1, 10, 12, 3)}
    assert (np.abs(gradients).reshape(2, 2, -1).max(-1) > 1e-3).all()


def test_tasks_get_the_mask_or_its_complement(rng):
    mask = rng.uniform(size=(2, 3, 3, 4)).astype(np.float32)
    for tasks, first in [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]:
        features = rng.normal(size=(tasks, 2, 3, 3, 4)).astype(np.float32)
        shared = share_mask(features, mask)
        for t in range(tasks):
            weight = mask / first if t < first else (1 - mask) / (tasks - first)
            np.testing.assert_allclose(shared[t], features[t] * weight, atol=1e-6)


def test_inserted_zeros_make_a_transposed_convolution(rng):
    x = rng.normal(size=(1, 3, 4, 2)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 2, 5)).astype(np.float32)
    dimensions = ("NHWC", "HWIO", "NHWC")
    padded = insert_zeros(jnp.asarray(x))
    assert padded.shape == (1, 6, 8, 2)
    dense = jax.lax.conv_general_dilated(padded, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
    expected = jax.lax.conv_general_dilated(  # stride 2 from the output's side
        x, kernel, (1, 1), ((1, 2), (1, 2)), lhs_dilation=(2, 2), dimension_numbers=dimensions
    )
    np.testing.assert_allclose(dense, expected, atol=1e-5)


def test_features_lie_side_by_side():
    x = np.arange(2 * 3 * 2).reshape(2, 1, 1, 3, 2)
    np.testing.assert_array_equal(side_by_side(x)[0, 0, 1], [2, 3, 8, 9])


def test_features_of_all_tasks_are_needed():
    with pytest.raises(ValueError, match="one map per task, 2, got 1"):
        TAM(HEADS).init(jax.random.key(0), FEATURES[:1], (10, 12))
