"""Random fields: every sampler's covariance is that of its kernel, exactly as a matrix and statistically in draws."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from mtjax.data.pde.gaussian_process import Kernel, cholesky, karhunen_loeve, spectral

NAMES = ("squared_exponential", "exponential", "matern32", "matern52")
FIELDS = 4000


def draws(sampler, seed=0, fields=FIELDS):
    keys = jax.random.split(jax.random.key(seed), fields)
    return np.asarray(jax.jit(jax.vmap(sampler))(keys)).reshape(fields, -1)


def assert_covariance_of_draws(fields, covariance):
    """The sample covariance within 5.5 standard errors: Var of an entry is (C_ii C_jj + C_ij^2) / n (Isserlis)."""
    n = len(fields)
    found = fields.T @ fields / n
    variance = np.diag(covariance)
    error = np.sqrt((variance[:, None] * variance[None, :] + covariance**2) / n)
    assert np.abs((found - covariance) / (error + 1e-6)).max() < 5.5
    assert np.abs(fields.mean(0) / np.sqrt(variance / n + 1e-12)).max() < 5.5


def modes(sampler):
    """The columns sqrt(l_m) phi_m of a Karhunen-Loeve sampler: its fields of unit coefficients."""
    size = sampler.scales.size
    units = np.eye(size, dtype=np.float32).reshape(size, *sampler.scales.shape)
    return np.asarray(jax.jit(jax.vmap(sampler.field))(units), np.float64).reshape(size, -1).T


def grid(*axes):
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


@pytest.mark.parametrize("name", NAMES)
def test_correlations_are_those_of_scipy(name):
    """Matern kernels of order 1/2, 3/2, 5/2 from the Bessel function; the squared exponential is written out."""
    distance = np.linspace(0.01, 2.0, 9)
    found = Kernel(name, length=0.3, std=1.7)(distance[:, None])
    if name == "squared_exponential":
        expected = np.exp(-(distance**2) / (2 * 0.3**2))
    else:
        nu = {"exponential": 0.5, "matern32": 1.5, "matern52": 2.5}[name]
        s = np.sqrt(2 * nu) * distance / 0.3
        expected = 2 ** (1 - nu) / special.gamma(nu) * s**nu * special.kv(nu, s)
    np.testing.assert_allclose(found, 1.7**2 * expected, rtol=1e-10)


@settings(max_examples=15)
@given(
    st.sampled_from(NAMES),
    st.floats(0.05, 2.0),
    st.sampled_from([None, 1.3]),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 100),
)
def test_kernels_are_positive_semidefinite_symmetric_and_stationary(name, length, period, separable, d, seed):
    kernel = Kernel(name, length=length, std=0.7, period=period, separable=separable)
    points = np.random.default_rng(seed).random((25, d))
    covariance = kernel.matrix(points)
    np.testing.assert_allclose(np.diag(covariance), 0.49, rtol=1e-12)
    np.testing.assert_array_equal(covariance, covariance.T)
    assert np.linalg.eigvalsh(covariance).min() > -1e-12
    np.testing.assert_allclose(kernel.matrix(points + 0.3), covariance, rtol=0, atol=1e-12)
    if period is not None:
        shifted = points + period * np.eye(d)[0]
        np.testing.assert_allclose(kernel(points - shifted), 0.49, rtol=1e-12)


def test_periodic_squared_exponential_is_mackays():
    """exp(-2 sin^2(pi dx / P) / l^2), l = 2 pi length / P; where dx is small, the plain kernel."""
    kernel = Kernel("squared_exponential", length=0.3, period=2.0)
    dx = np.linspace(-3, 3, 13)[:, None]
    own = 2 * np.pi * 0.3 / 2.0
    np.testing.assert_allclose(kernel(dx), np.exp(-2 * np.sin(np.pi * dx[:, 0] / 2.0) ** 2 / own**2), rtol=1e-12)
    plain = dataclasses.replace(kernel, period=None)
    np.testing.assert_allclose(kernel([[0.01]]), plain([[0.01]]), rtol=1e-7)


def test_length_per_axis_and_separable_forms():
    dx = np.array([[0.3, 0.4]])
    np.testing.assert_allclose(Kernel("exponential", length=(1.0, 2.0))(dx), np.exp(-np.hypot(0.3, 0.2)))
    np.testing.assert_allclose(Kernel("exponential", length=(1.0, 2.0), separable=True)(dx), np.exp(-0.5))
    together = Kernel("squared_exponential", length=0.5)(dx)
    np.testing.assert_allclose(Kernel("squared_exponential", length=0.5, separable=True)(dx), together)


def test_spher_is_the_published_sum_over_axes():
    kernel = Kernel("spher", length=0.25)
    expected = 1 - (0.1 + 0.2) / 0.5 + (0.1**3 + 0.2**3) / 13.5
    np.testing.assert_allclose(kernel([[0.1, -0.2], [0.6, 0.3]]), [expected, 0.0])


@pytest.mark.parametrize("name", NAMES)
def test_cholesky_factor_reproduces_the_covariance(name):
    points = np.random.default_rng(0).random((40, 2))
    kernel = Kernel(name, length=0.3, std=2.0)
    factor = np.asarray(cholesky(kernel, points).factor, np.float64)
    np.testing.assert_allclose(factor @ factor.T, kernel.matrix(points), atol=1e-5)
    np.testing.assert_array_equal(factor, np.tril(factor))


def test_cholesky_draws():
    points = np.random.default_rng(1).random((12, 3))
    kernel = Kernel("matern52", length=0.4, std=1.5)
    assert_covariance_of_draws(draws(cholesky(kernel, points)), kernel.matrix(points))


AXES = (np.linspace(0, 1, 7), np.linspace(0, 2, 5), np.array([0.0, 0.1, 0.5]))


@pytest.mark.parametrize(
    ("name", "separable", "d"),
    [("exponential", False, 1), ("squared_exponential", False, 2), ("matern32", True, 3), ("matern32", False, 3)],
)
def test_all_terms_give_the_whole_covariance(name, separable, d):
    axes = AXES[:d]
    kernel = Kernel(name, length=(0.3, 0.5, 0.2)[:d], std=1.3, separable=separable)
    sampler = karhunen_loeve(kernel, axes, terms=None)
    phi = modes(sampler)
    np.testing.assert_allclose(phi @ phi.T, kernel.matrix(grid(*axes)), atol=3e-6)
    assert float(sampler.captured) == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(sampler.std(), 1.3, rtol=1e-5)
    assert sampler(jax.random.key(0)).shape == tuple(len(axis) for axis in axes)


@pytest.mark.parametrize("separable", [False, True])
def test_truncation_keeps_the_largest_eigenvalues(separable):
    """Against the eigenvalues of the dense matrix: the best approximation of rank M (Eckart and Young)."""
    axes = (np.linspace(0, 1, 9), np.linspace(0, 1.5, 8))
    kernel = Kernel("exponential", length=0.4, std=0.8, separable=separable)
    covariance = kernel.matrix(grid(*axes))
    eigenvalues = np.linalg.eigvalsh(covariance)[::-1]
    sampler = karhunen_loeve(kernel, axes, terms=20)
    phi = modes(sampler)
    kept = np.linalg.svd(phi, compute_uv=False) ** 2
    np.testing.assert_allclose(kept[:20], eigenvalues[:20], rtol=1e-5)
    assert np.abs(kept[20:]).max(initial=0.0) < 1e-9
    assert np.linalg.norm(covariance - phi @ phi.T, 2) == pytest.approx(eigenvalues[20], rel=1e-4)
    assert float(sampler.captured) == pytest.approx(eigenvalues[:20].sum() / covariance.trace(), rel=1e-5)
    np.testing.assert_allclose(np.asarray(sampler.std()).ravel() ** 2, np.diag(phi @ phi.T), rtol=1e-4)


@pytest.mark.parametrize("kernel", [Kernel("matern32", length=0.3), Kernel("spher", length=0.25)], ids=lambda k: k.name)
def test_lanczos_agrees_with_the_dense_eigenproblem(kernel):
    axes = (np.linspace(0, 1, 40), np.linspace(0, 1, 36))  # 1,440 nodes: above the dense limit
    sampler = karhunen_loeve(kernel, axes, terms=12)
    from scipy import linalg

    n = 40 * 36
    exact = linalg.eigh(kernel.matrix(grid(*axes)), eigvals_only=True, subset_by_index=(n - 12, n - 1))[::-1]
    np.testing.assert_allclose(np.asarray(sampler.scales) ** 2, exact, rtol=1e-5)
    phi = modes(sampler) / np.asarray(sampler.scales)
    np.testing.assert_allclose(phi.T @ phi, np.eye(12), atol=1e-5)
    residual = kernel.matrix(grid(*axes)) @ phi - phi * exact
    assert np.abs(residual).max() < 1e-4 * exact[0]
    again = karhunen_loeve(kernel, axes, terms=12)
    np.testing.assert_array_equal(again.bases[0], sampler.bases[0])


def test_karhunen_loeve_draws():
    axes = (np.linspace(0, 1, 4), np.linspace(0, 1, 5))
    kernel = Kernel("matern52", length=0.3, std=0.6, separable=True)
    sampler = karhunen_loeve(kernel, axes, terms=15)
    phi = modes(sampler)
    assert_covariance_of_draws(draws(sampler), phi @ phi.T)


@pytest.mark.parametrize(
    ("name", "shape", "period"),
    [
        ("squared_exponential", (9,), 1.0),
        ("exponential", (4, 5), (1.0, 2.0)),
        ("matern52", (2, 3, 4), 1.5),
    ],
)
def test_spectral_draws_have_the_periodic_covariance(name, shape, period):
    kernel = Kernel(name, length=0.3, std=1.2, period=period)
    sides = np.broadcast_to(period, len(shape))
    axes = [side * np.arange(n) / n for side, n in zip(sides, shape, strict=True)]
    covariance = kernel.matrix(grid(*axes))
    sampler = spectral(kernel, shape)
    # Exactly: the circulant operator applied to every unit vector is a square root of the covariance.
    units = np.eye(covariance.shape[0]).reshape(-1, *shape)
    along = tuple(range(1, len(shape) + 1))
    root = np.fft.irfftn(np.fft.rfftn(units, axes=along) * np.asarray(sampler.root, np.float64), shape, axes=along)
    root = root.reshape(len(units), -1)
    np.testing.assert_allclose(root @ root.T, covariance, atol=2e-6)
    assert_covariance_of_draws(draws(sampler), covariance)


@functools.cache
def samplers():
    kernel = Kernel("squared_exponential", length=0.2, period=1.0)
    x = np.arange(8) / 8
    return (
        cholesky(kernel, x),
        karhunen_loeve(kernel, (x, x), terms=9),
        karhunen_loeve(Kernel("matern32", 0.2), (x, x), terms=9),
        spectral(kernel, (8, 8)),
    )


@pytest.mark.parametrize("index", range(4))
def test_samplers_are_pure_pytrees(index):
    """One key, one field, whether called, or vmapped and jitted with the sampler as an argument."""
    sampler = samplers()[index]
    keys = jax.random.split(jax.random.key(3), 2)
    plain = sampler(keys[1])
    assert plain.dtype == np.float32
    both = np.asarray(jax.jit(lambda s, keys: jax.vmap(s)(keys))(sampler, keys))
    np.testing.assert_allclose(both[1], plain, atol=1e-6)
    assert np.abs(both[0] - both[1]).max() > 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Kernel("gauss", 0.1), "Kernel 'gauss' is unknown; expected one of squared_exponential"),
        (lambda: Kernel("matern32", 0.0), "length=0.0 of the matern32 kernel must be positive"),
        (lambda: Kernel("matern32", (0.1, -1.0)), "length="),
        (lambda: Kernel("matern32", float("nan")), "length=nan"),
        (lambda: Kernel("matern32", 0.1, std=-1.0), "std=-1.0"),
        (lambda: Kernel("matern32", 0.1, period=0.0), "period=0.0"),
        (lambda: Kernel("spher", 0.1, separable=True), "no separable or periodic form"),
        (lambda: Kernel("matern32", (0.1, 0.2)).matrix(np.zeros((2, 3))), "2 values but there are 3 coordinates"),
        (lambda: cholesky(Kernel("matern32", 0.1), np.array([0.0, np.nan])), "points must be finite"),
        (lambda: cholesky(Kernel("matern32", 0.1), np.zeros(3), jitter=0.0), "not positive definite with jitter=0"),
        (lambda: karhunen_loeve(Kernel("matern32", 0.1), (np.arange(3.0),), terms=4), "number of nodes, 3"),
        (lambda: karhunen_loeve(Kernel("matern32", 0.1), (), terms=4), "axes is empty"),
        (lambda: karhunen_loeve(Kernel("matern32", 0.1), (np.zeros((2, 2)),), terms=1), "Axis 0 must be a vector"),
        (lambda: karhunen_loeve(Kernel("matern32", 0.1), (np.arange(40.0) ** 2,) * 2, terms=4), "not uniform"),
        (lambda: spectral(Kernel("matern32", 0.1), (8,)), "give the kernel a period"),
        (lambda: spectral(Kernel("matern32", 0.1, period=1.0), (8,) * 4), "1 to 3 positive numbers"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
