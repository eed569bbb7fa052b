"""Dense losses: equal to loops over pixels, blind to pixels without labels, with finite gradients everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from mtjax import dense_losses as dl

B, H, W, C = 3, 4, 5, 4
LOSSES = {
    "cross_entropy": (dl.cross_entropy(), C),
    "l1": (dl.l1, 1),
    "normals_l1": (dl.normals_l1, 3),
    "normals_cosine": (dl.normals_cosine, 3),
    "balanced_bce": (dl.balanced_bce(0.9), 1),
    "balanced_bce_by_image": (dl.balanced_bce(), 1),
    "dice": (dl.dice(), 1),
}


def example(name, seed=0):
    """Output f[B, H, W, channels], label and bool[B, H, W]: about a third of the pixels has no label."""
    rng = np.random.default_rng(seed)
    output = rng.normal(size=(B, H, W, LOSSES[name][1])).astype(np.float32)
    valid = rng.random((B, H, W)) < 0.7
    if name == "cross_entropy":
        label = np.where(valid, rng.integers(0, C, (B, H, W)), 255).astype(np.uint8)
    elif name == "l1":
        label = np.where(valid, rng.uniform(0.5, 5, (B, H, W)), np.nan).astype(np.float16)
    elif name.startswith("normals"):
        vector = rng.normal(size=(B, H, W, 3))
        vector /= np.linalg.norm(vector, axis=-1, keepdims=True)
        label = np.where(valid[..., None], vector, np.nan).astype(np.float16)
    else:
        label = np.where(valid, rng.random((B, H, W)) < 0.3, 255).astype(np.uint8)
    return output, label, valid


def of_pixel(name, z, y, positive_weight):
    """The loss of one pixel, in float64."""
    match name:
        case "cross_entropy":
            return special.logsumexp(z) - z[y]
        case "l1":
            return abs(z[0] - y)
        case "normals_l1":
            return np.abs(z / np.linalg.norm(z) - y).sum()
        case "normals_cosine":
            return 1 - z @ y / np.linalg.norm(z)
    return (
        -positive_weight * np.log(special.expit(z[0])) if y else -(1 - positive_weight) * np.log(special.expit(-z[0]))
    )


def naive(name, output, label, valid):
    """Sum over labelled pixels / their number, pixel by pixel."""
    total, count = 0.0, 0
    for b in range(B):
        positives, labelled = (label[b][valid[b]] == 1).sum(), valid[b].sum()
        if name == "dice":
            if labelled:
                s, y = special.expit(output[b, ..., 0][valid[b]]), label[b][valid[b]]
                total += 1 - (2 * (s * y).sum() + 1) / (s.sum() + y.sum() + 1)
                count += 1
            continue
        weight = 0.9 if name == "balanced_bce" else 1 - positives / max(labelled, 1)
        for i, j in np.argwhere(valid[b]):
            total += of_pixel(
                name,
                output[b, i, j].astype(np.float64),
                label[b, i, j].astype(np.float64 if label.dtype.kind == "f" else int),
                weight,
            )
            count += 1
    return total / max(count, 1)


@functools.cache
def value_and_grad(name):
    return jax.jit(jax.value_and_grad(lambda z, y: dl.batch_mean(LOSSES[name][0](z, y))))


@pytest.mark.parametrize("name", LOSSES)
def test_mean_over_labelled_pixels(name):
    output, label, valid = example(name)
    value, gradient = value_and_grad(name)(output, label)
    assert float(value) == pytest.approx(naive(name, output, label, valid), rel=1e-5)
    # What has no label may be anything.
    spoiled = np.where(valid[..., None], output, np.array([np.nan, np.inf, -np.inf])[np.arange(H) % 3][:, None, None])
    again, gradient_again = value_and_grad(name)(spoiled.astype(np.float32), label)
    assert float(again) == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(gradient_again, gradient, rtol=1e-5, atol=1e-7)
    assert (np.asarray(gradient)[~valid] == 0).all() and (np.asarray(gradient)[valid] != 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_without_labels_loss_and_gradient_are_zero(name):
    output, label, _ = example(name)
    nothing = np.full_like(label, np.nan if label.dtype.kind == "f" else 255)
    value, gradient = value_and_grad(name)(np.full_like(output, np.inf), nothing)
    assert float(value) == 0 and (np.asarray(gradient) == 0).all()


def test_every_labelled_pixel_weighs_the_same():
    output, label, _ = example("l1")
    pixels = dl.l1(jnp.asarray(output), jnp.asarray(label))
    halves = [dl.l1(jnp.asarray(output[rows]), jnp.asarray(label[rows])) for rows in (slice(0, 1), slice(1, None))]
    for whole, parts in zip(pixels, zip(*halves, strict=True), strict=True):
        np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-6)
    assert float(dl.batch_mean(pixels)) == pytest.approx(float(pixels.total.sum() / pixels.count.sum()))


@pytest.mark.parametrize("name", ["normals_l1", "normals_cosine"])
def test_normals_do_not_depend_on_length_and_leave_zero(name):
    output, label, _ = example(name)
    value, _ = value_and_grad(name)(output, label)
    longer, _ = value_and_grad(name)(output * 50, label)
    assert float(longer) == pytest.approx(float(value), rel=1e-4)
    # A head that starts from zeros has to leave them: the gradient is finite, and a step against it turns to the label.
    one = np.full((B, H, W, 3), [0.6, 0.0, 0.8], np.float32)
    _, gradient = value_and_grad(name)(np.zeros_like(output), one)
    assert np.isfinite(gradient).all()
    cosine = (-np.asarray(gradient) * one).sum(-1) / np.linalg.norm(gradient, axis=-1)
    assert (cosine > 0.7).all()


def test_labels_of_images():
    # log 3 each; the image without a label does not count.
    pixels = dl.cross_entropy(-1)(jnp.zeros((3, 3)), jnp.array([0, -1, 2]))
    np.testing.assert_allclose(pixels.total, [np.log(3), 0, np.log(3)], rtol=1e-6)
    assert pixels.count.tolist() == [1, 0, 1]


def test_half_precision_is_computed_in_float32():
    output, label, valid = example("cross_entropy")
    half = output.astype(np.float16)
    value = dl.batch_mean(dl.cross_entropy()(jnp.asarray(half), jnp.asarray(label)))
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(naive("cross_entropy", half.astype(np.float32), label, valid), rel=1e-5)


def test_positive_weights_that_make_no_sense():
    with pytest.raises(ValueError, match="positive_weight must be between 0 and 1, or None to balance, got 20"):
        dl.balanced_bce(20)
