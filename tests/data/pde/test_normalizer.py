"""Standardisation: training rows only, inside of the mask only, back and forth, through JSON without a change."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.data.pde.normalizer import Affine, Normalizer


def batch(functions=50, seed=0, *, outputs=(), masked=False):
    rng = np.random.default_rng(seed)
    columns = {
        "inputs": {"code": rng.normal(size=(functions, 4)), "initial": 3 + 2 * rng.normal(size=(functions, 8))},
        "points": rng.random((6, 2)),
        "values": (5 + rng.normal(size=(functions, 6, *outputs)) * 4).astype(np.float32),
        "task": np.zeros(functions, np.int32),
    }
    if masked:
        columns["mask"] = rng.random((functions, 6)) > 0.4
        columns["mask"][:, 2] = False  # a point that is outside of every domain
    return columns


@pytest.mark.parametrize("per", ["point", "all"])
@pytest.mark.parametrize("outputs", [(), (2,)])
def test_training_rows_have_zero_mean_and_unit_deviation(per, outputs):
    train = batch(outputs=outputs)
    normalizer = Normalizer.fit(train, inputs=("initial",), per=per)
    found = normalizer.apply(train)
    axis = 0 if per == "point" else None
    for array in (found["inputs"]["initial"], found["values"]):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array.mean(axis), 0.0, atol=1e-6)
        np.testing.assert_allclose(array.std(axis), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(found["inputs"]["code"], train["inputs"]["code"])
    np.testing.assert_array_equal(found["points"], train["points"])


@pytest.mark.parametrize("per", ["point", "all"])
@pytest.mark.parametrize("outputs", [(), (2,)])
def test_values_outside_of_the_mask_do_not_count(per, outputs):
    """Against a loop over the points, and with other numbers outside."""
    train = batch(outputs=outputs, masked=True)
    normalizer = Normalizer.fit(train, per=per)
    for point in (0, 1, 3) if per == "point" else ():
        inside = train["values"][train["mask"][:, point], point]
        np.testing.assert_allclose(normalizer.values.mean[point], inside.mean(0), rtol=1e-5)
        np.testing.assert_allclose(normalizer.values.std[point], inside.std(0), rtol=1e-5)
    if per == "all":
        inside = train["values"][train["mask"]]
        np.testing.assert_allclose(normalizer.values.mean, inside.mean(), rtol=1e-5)
        np.testing.assert_allclose(normalizer.values.std, inside.std(), rtol=1e-5)
    outside = ~train["mask"]
    other = {**train, "values": np.where(outside.reshape(outside.shape + (1,) * len(outputs)), 1e9, train["values"])}
    again = Normalizer.fit(other, per=per)
    np.testing.assert_allclose(again.values.mean, normalizer.values.mean)
    np.testing.assert_allclose(again.values.std, normalizer.values.std)
    assert np.all(normalizer.apply(other)["values"][outside] == 0.0)


def test_other_rows_are_scaled_with_the_training_statistics():
    normalizer = Normalizer.fit(batch(), inputs=("initial",))
    test = batch(seed=1)
    found = normalizer.apply(test)["inputs"]["initial"]
    mean, std = normalizer.inputs["initial"].mean, normalizer.inputs["initial"].std
    np.testing.assert_allclose(found, (test["inputs"]["initial"] - mean) / std, rtol=1e-5, atol=1e-6)


@settings(max_examples=15)
@given(st.integers(0, 100), st.sampled_from(["point", "all"]), st.booleans())
def test_denormalize_inverts_and_json_keeps_every_bit(seed, per, masked):
    train = batch(5, seed, masked=masked)
    normalizer = Normalizer.fit(train, inputs=("initial",), per=per)
    values = train["values"] * train.get("mask", 1)
    back = normalizer.denormalize(normalizer.apply(train)["values"]) * train.get("mask", 1)
    np.testing.assert_allclose(back, values, rtol=1e-5, atol=1e-5)
    text = normalizer.to_json()
    read = Normalizer.from_json(text)
    assert read.to_json() == text and json.loads(text)
    for found, expected in ((read.values, normalizer.values), (read.inputs["initial"], normalizer.inputs["initial"])):
        np.testing.assert_array_equal(found.mean, expected.mean)
        np.testing.assert_array_equal(found.std, expected.std)


def test_predictions_of_a_network_come_back_as_jax_arrays():
    normalizer = Normalizer.fit(batch())
    found = normalizer.denormalize(jnp.zeros((3, 6)))
    assert isinstance(found, jnp.ndarray) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.tile(normalizer.values.mean, (3, 1)), rtol=1e-6)


def test_a_constant_is_not_blown_up():
    x = np.full((9, 3), 0.1, np.float32)
    x[:, 1] = np.arange(9)
    affine = Affine.fit(x)
    np.testing.assert_array_equal(affine.std[[0, 2]], 1.0)
    np.testing.assert_allclose(affine(x)[:, 0], 0.0, atol=1e-7)


def test_bad_input():
    with pytest.raises(ValueError, match="'boundary' is not among the batch's inputs: code, initial"):
        Normalizer.fit(batch(), inputs=("boundary",))
    with pytest.raises(ValueError, match="per='row'"):
        Normalizer.fit(batch(), per="row")
    with pytest.raises(ValueError, match="finite numbers"):
        Affine.fit(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="std positive"):
        Affine(np.zeros(3), np.zeros(3))
