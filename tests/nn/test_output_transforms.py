"""Output transforms: the algebra, the shapes of columns, exactness on the boundary and outside of the domain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.output_transforms import apply_mask, apply_transforms, hard_boundary, like, standardised

RNG = np.random.default_rng(0)
U = jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)
U3 = jnp.asarray(RNG.normal(size=(2, 4, 3)), jnp.float32)
MEAN, STD = np.arange(4.0, dtype=np.float32), np.array([1.0, 2.0, 0.5, 3.0], np.float32)


@pytest.mark.parametrize("u", [U, U3], ids=["one output", "three outputs"])
@pytest.mark.parametrize("shape", [(4,), (2, 4), (1, 4)])
def test_columns_go_along_the_points(u, shape):
    column = np.broadcast_to(MEAN, shape)
    expected = np.broadcast_to(MEAN, (2, 4)) if u.ndim == 2 else np.broadcast_to(MEAN[:, None], (2, 4, 3))
    np.testing.assert_array_equal(np.broadcast_to(like(column, u), u.shape), expected)


def test_columns_of_each_output():
    column = RNG.normal(size=(1, 4, 3))
    np.testing.assert_array_equal(np.broadcast_to(like(column, U3), U3.shape)[1], jnp.asarray(column)[0])
    for wrong in (np.zeros(3), np.zeros((3, 4)), np.zeros((2, 4, 2)), np.zeros(1), np.zeros((2, 1))):
        with pytest.raises(ValueError, match="which does not fit u of shape"):
            like(wrong, U3)
    with pytest.raises(ValueError, match=r"has shape \(2, 4, 1\), which does not fit u of shape \(2, 4\)"):
        like(np.zeros((2, 4, 1)), U)


def test_standardised_from_arrays_or_from_the_batch():
    expected = np.asarray(U) * STD + MEAN
    np.testing.assert_allclose(standardised(MEAN, STD)(U, {}), expected, rtol=1e-6)
    batch = {"output_mean": MEAN, "output_std": STD}
    np.testing.assert_allclose(standardised()(U, batch), expected, rtol=1e-6)
    np.testing.assert_allclose(standardised(lambda b: 2 * b["output_mean"], STD)(U, batch), expected + MEAN, rtol=1e-6)


def test_hard_boundary_is_exact_where_the_distance_is_zero():
    batch = {"distance": jnp.array([0.0, 0.5, 0.0, 1.0]), "g": jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)}
    u = hard_boundary(value=lambda b: b["g"])(1e6 * U, batch)
    np.testing.assert_array_equal(u[:, [0, 2]], batch["g"][:, [0, 2]])
    np.testing.assert_allclose(u[:, 1], batch["g"][:, 1] + 0.5e6 * U[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(hard_boundary()(U, batch)[:, 3], U[:, 3])


def test_mask_is_exactly_zero_outside_and_blocks_gradients():
    batch = {"mask": jnp.array([[True, False, True, True], [False, True, True, True]])}
    u, pull = jax.vjp(lambda u: apply_mask(u, batch), U.at[0, 1].set(jnp.inf))
    np.testing.assert_array_equal(u, np.where(batch["mask"], U, 0.0))
    np.testing.assert_array_equal(pull(jnp.ones_like(U))[0], np.asarray(batch["mask"], np.float32))
    assert apply_mask(U3, batch).shape == U3.shape


def test_a_missing_column_is_named():
    for transform, name in ((apply_mask, "mask"), (hard_boundary(), "distance"), (standardised(), "output_mean")):
        with pytest.raises(ValueError, match=f"reads batch.'{name}'., but the batch has points, inputs"):
            transform(U, {"points": 0, "inputs": 1})


def test_order_matters_and_is_kept():
    batch = {"mask": jnp.array([True, False, True, True])}
    masked_last = apply_transforms(U, batch, [standardised(MEAN, STD), apply_mask])
    masked_first = apply_transforms(U, batch, [apply_mask, standardised(MEAN, STD)])
    assert not masked_last[:, 1].any() and np.all(masked_first[:, 1] == MEAN[1])
    assert apply_transforms(U, batch, ()) is U
