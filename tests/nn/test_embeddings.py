"""Embeddings against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.embeddings import FlatImage, PeriodicEmbedding, RandomFourierFeatures

POINTS = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)


def test_random_fourier_features_are_constants_of_their_seed():
    features = RandomFourierFeatures(200, sigma=0.5, seed=3)
    w = features.frequencies(3)
    assert w.shape == (3, 200)
    np.testing.assert_array_equal(w, RandomFourierFeatures(200, sigma=0.5, seed=3).frequencies(3))
    assert np.abs(w - RandomFourierFeatures(200, sigma=0.5, seed=4).frequencies(3)).min() > 0
    # 600 draws of N(0, (2 pi / 2)^2): the estimate of the standard deviation is within 10 % (3.5 standard errors).
    assert abs(w.std() / np.pi - 1) < 0.1
    y = np.asarray(features(POINTS))
    phase = np.asarray(POINTS) @ w
    np.testing.assert_allclose(y, np.concatenate([np.cos(phase), np.sin(phase)], axis=-1), atol=1e-5)
    assert hash(features) == hash(RandomFourierFeatures(200, 0.5, 3))  # modules that hold one stay hashable


def test_points_may_have_any_leading_axes():
    for embedding in (RandomFourierFeatures(4), PeriodicEmbedding((1.0, None, 2.0), harmonics=2)):
        flat = embedding(POINTS)
        np.testing.assert_allclose(embedding(POINTS[None, :, None])[0, :, 0], flat, atol=1e-6)


def test_periodic_embedding_has_its_period_and_passes_the_rest():
    embedding = PeriodicEmbedding((2.0, None, 0.5), harmonics=3)
    y = embedding(POINTS)
    assert y.shape == (7, 6 + 1 + 6)
    np.testing.assert_array_equal(y[:, 6], POINTS[:, 1])
    np.testing.assert_allclose(embedding(POINTS + jnp.array([[2.0, 0.0, -1.5]])), y, atol=2e-5)
    np.testing.assert_allclose(y[:, 1], np.cos(2 * np.pi * 2 * np.asarray(POINTS[:, 0]) / 2.0), atol=1e-5)  # k = 2
    slope = jax.vmap(jax.grad(lambda x: embedding(x[None])[0, 9]))(POINTS)  # sin of the third coordinate is 10..12
    np.testing.assert_allclose(slope[:, 2], -12 * np.pi * np.sin(12 * np.pi * np.asarray(POINTS[:, 2])), atol=1e-3)


def test_flat_image_takes_every_other_pixel():
    image = jnp.arange(2 * 4 * 4 * 2).reshape(2, 4, 4, 2)
    flat = FlatImage(2)(image)
    assert flat.shape == (2, 8)
    assert flat[0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: RandomFourierFeatures(0), "num must be >= 1 and sigma > 0"),
        (lambda: RandomFourierFeatures(3, sigma=0.0), "sigma=0.0"),
        (lambda: PeriodicEmbedding((1.0, -1.0)), "periods must be positive or None"),
        (lambda: PeriodicEmbedding((1.0,), harmonics=0), "harmonics >= 1"),
        (lambda: PeriodicEmbedding((1.0,))(POINTS), "periods has 1 entries, but the points have 3"),
    ],
)
def test_wrong_arguments(build, words):
    with pytest.raises(ValueError, match=words):
        build()
