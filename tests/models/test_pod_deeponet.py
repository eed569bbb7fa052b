"""POD-DeepONet: the basis is that of the training outputs, and the network reproduces its span."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.models.pod_deeponet import PODDeepONet, pod_basis
from mtjax.nn.operator_layers import MLP
from mtjax.nn.output_transforms import apply_mask

S, N, M = 9, 12, 3
RNG = np.random.default_rng(0)
FIELDS = RNG.normal(size=(S, M)) @ (np.array([[3.0], [2.0], [1.0]]) * RNG.normal(size=(M, N))) + RNG.normal(size=N)
BASIS = pod_basis(FIELDS, M)


def test_basis_is_orthogonal_with_mean_square_one():
    np.testing.assert_allclose(BASIS.vectors.T @ BASIS.vectors / N, np.eye(M), atol=1e-5)
    np.testing.assert_allclose(BASIS.mean, FIELDS.mean(0), rtol=1e-5)
    assert np.all(BASIS.vectors[np.abs(BASIS.vectors).argmax(0), np.arange(M)] > 0)


def test_basis_diagonalises_the_covariance_and_counts_energy():
    centred = FIELDS - FIELDS.mean(0)
    covariance = centred.T @ centred / (S - 1)
    eigenvalues = np.sort(np.linalg.eigvalsh(covariance))[::-1][:M]
    phi = BASIS.vectors.astype(float)
    np.testing.assert_allclose(phi.T @ covariance @ phi / N, np.diag(eigenvalues), atol=1e-4 * eigenvalues[0])
    np.testing.assert_allclose(BASIS.energy, np.cumsum(eigenvalues) / np.trace(covariance), rtol=1e-5)
    np.testing.assert_allclose(BASIS.energy[-1], 1.0, rtol=1e-5)  # the fields have three modes


def test_fields_of_the_span_are_reproduced():
    """With the projections as the branch's output, the network returns the training outputs."""
    coefficients = (FIELDS - BASIS.mean) @ BASIS.vectors / N
    batch = {"inputs": jnp.asarray(coefficients * M, jnp.float32), **BASIS.columns()}
    model = PODDeepONet(Identity())
    np.testing.assert_allclose(model.apply({}, batch)["u"], FIELDS, rtol=1e-4, atol=1e-4)


class Identity(nn.Module):
    def __call__(self, x, *, train=False):
        del train
        return x


def test_columns_at_some_points():
    model = PODDeepONet(Identity())
    inputs = jnp.asarray(RNG.normal(size=(4, M)), jnp.float32)
    whole = model.apply({}, {"inputs": inputs, **BASIS.columns()})["u"]
    some = np.array([7, 1, 4])
    part = model.apply({}, {"inputs": inputs, **BASIS.columns(some)})["u"]
    np.testing.assert_allclose(part, whole[:, some], rtol=1e-6)


def test_learned_trunk_beside_the_basis():
    batch = {
        "inputs": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32),
        "points": jnp.asarray(RNG.normal(size=(N, 2)), jnp.float32),
        "mask": jnp.arange(N) > 2,
        **BASIS.columns(),
    }
    branch, trunk = MLP((6, M + 2), nn.tanh), MLP((6, 2), nn.tanh)
    model = PODDeepONet(branch, trunk, transforms=(apply_mask,))
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    params = jax.tree.map(lambda s: jnp.asarray(RNG.normal(size=s.shape), s.dtype), shapes)
    p = params["params"]
    assert set(p) == {"branch", "trunk", "bias"}
    b = np.asarray(branch.apply({"params": p["branch"]}, batch["inputs"]))
    t = np.asarray(trunk.apply({"params": p["trunk"]}, batch["points"]))
    field = (b[:, :M] @ BASIS.vectors.T + b[:, M:] @ t.T + np.asarray(p["bias"])) / M + BASIS.mean
    u = jax.jit(model.apply)(params, batch)["u"]
    np.testing.assert_allclose(u, np.where(batch["mask"], field, 0.0), rtol=1e-4, atol=1e-4)
    assert "bias" not in jax.eval_shape(model.clone(use_bias=False).init, jax.random.key(0), batch)["params"]


@pytest.mark.parametrize("num_modes", [0, S, N + 1])
def test_too_many_modes(num_modes):
    with pytest.raises(ValueError, match=f"num_modes must be in 1..8 for outputs of shape .9, 12., got {num_modes}"):
        pod_basis(FIELDS, num_modes)


def test_values_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"values must be a matrix f\[samples, points\], got shape \(12,\)"):
        pod_basis(FIELDS[0], 1)
