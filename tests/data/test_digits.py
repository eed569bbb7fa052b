"""The digits: what the labels mean, nested training rows that stay balanced, noise in training labels only."""

import sys

import numpy as np
import pandas as pd
import pytest

from mtjax.data import digits

NAMES = ["digit", "odd", "large", "ink", "symmetry", "top_share"]
CLASS_TASKS = NAMES[:3]


@pytest.fixture(scope="module")
def full():
    return digits.load()


def test_shapes_and_order(full):
    assert [len(split["numeric"]) for split in (full.train, full.validation, full.test)] == [897, 300, 600]
    assert [task.name for task in full.tasks] == NAMES == list(full.train["labels"])
    assert full.num_numeric == 64 and full.cardinalities == () and full.notes == []
    assert full.train["numeric"].dtype == np.float32 and full.train["categorical"].shape == (897, 0)
    assert [task.main_metric.name for task in full.tasks] == ["accuracy"] * 3 + ["explained_variance"] * 3
    rows = np.concatenate(list(full.rows.values()))
    assert sorted(rows) == list(range(1797)), "every image is in exactly one split"
    assert "897 train / 300 validation / 600 test" in full.summary()


def test_labels_are_those_of_the_images(full):
    """A loop over the pixels, written as the table of the module says it."""
    images, classes = digits.read()
    for row in (0, 7, 599):
        image, digit = images[full.rows["test"][row]], classes[full.rows["test"][row]]
        pairs = [(image[i, j], image[i, 7 - j]) for i in range(8) for j in range(8)]
        expected = {
            "digit": digit,
            "odd": float(digit in (1, 3, 5, 7, 9)),
            "large": float(digit in (5, 6, 7, 8, 9)),
            "ink": sum(map(sum, image)) / 64 / 16,
            "symmetry": np.corrcoef(np.array(pairs).T)[0, 1],
            "top_share": sum(map(sum, image[:4])) / sum(map(sum, image)),
        }
        found = {name: full.test["labels"][name][row] for name in NAMES}
        assert found == pytest.approx(expected, abs=1e-6)
        np.testing.assert_allclose(full.test["numeric"][row].reshape(8, 8) * 6 + 5, image, atol=1e-5)


def test_mirrored_image_has_the_same_symmetry_and_upside_down_swaps_the_halves():
    images, classes = digits.read()
    before, mirrored, turned = (digits.labels(x, classes) for x in (images, images[:, :, ::-1], images[:, ::-1]))
    for name in ("ink", "symmetry", "top_share"):
        np.testing.assert_allclose(before[name], mirrored[name], atol=1e-6)
    np.testing.assert_allclose(before["top_share"] + turned["top_share"], 1.0, atol=1e-6)


def test_regression_targets_are_scaled_by_training_rows_only():
    data = digits.load(50)
    ink = data.train["labels"]["ink"].astype(np.float64)
    assert data.tasks[3].offset == pytest.approx(ink.mean()) and data.tasks[3].scale == pytest.approx(ink.std())


@pytest.mark.parametrize("rows", [10, 100, 890])
def test_fewer_rows_are_a_balanced_part_of_more(full, rows):
    data = digits.load(rows)
    np.testing.assert_array_equal(data.train["numeric"], full.train["numeric"][:rows])
    np.testing.assert_array_equal(data.rows["train"], full.rows["train"][:rows])
    for split in ("validation", "test"):
        np.testing.assert_array_equal(data.rows[split], full.rows[split])
    counts = np.bincount(data.train["labels"]["digit"].astype(int), minlength=10)
    # Classes have 174 to 183 images, so the last turns lack some of them.
    assert counts.min() == counts.max() if rows <= 840 else counts.max() - counts.min() <= 9
    for split in (data.validation, data.test):
        assert set(np.bincount(split["labels"]["digit"].astype(int))) == {len(split["numeric"]) // 10}


def test_noise_replaces_the_asked_share_of_training_class_labels_and_nothing_else(full):
    noisy = digits.load(200, label_noise=0.3)
    clean = digits.load(200)
    flips = {}
    for name in NAMES:
        before, after = clean.train["labels"][name], noisy.train["labels"][name]
        flips[name] = before != after
        assert flips[name].sum() == (60 if name in CLASS_TASKS else 0)
        for split in ("validation", "test"):
            np.testing.assert_array_equal(getattr(clean, split)["labels"][name], getattr(noisy, split)["labels"][name])
    assert set(noisy.train["labels"]["odd"]) == {0.0, 1.0} and set(noisy.train["labels"]["digit"]) == set(range(10))
    assert (flips["digit"] != flips["odd"]).any() and (flips["odd"] != flips["large"]).any(), "each by itself"
    np.testing.assert_array_equal(clean.train["numeric"], noisy.train["numeric"])
    assert noisy.notes == ["Label noise: 60 of 200 training labels of each of digit, odd, large are wrong."]
    assert digits.load(200, label_noise=0.3, tasks=["ink"]).notes == []


def test_the_same_seed_gives_the_same_rows_and_noise():
    first, again, other = (digits.load(64, label_noise=0.25, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.rows["test"], again.rows["test"])
    assert set(first.rows["test"]) != set(other.rows["test"])
    for name in NAMES:
        np.testing.assert_array_equal(first.train["labels"][name], again.train["labels"][name])
    # A task's noise does not depend on which others are asked for.
    alone = digits.load(64, label_noise=0.25, seed=3, tasks=["large", "digit"])
    assert [task.name for task in alone.tasks] == ["large", "digit"]
    np.testing.assert_array_equal(alone.train["labels"]["large"], first.train["labels"]["large"])


def test_new_images_and_predictions(full):
    images, _ = digits.read()
    index = full.rows["test"]
    table = pd.DataFrame({f"pixel_{i}_{j}": images[index, i, j] for i in range(8) for j in range(8)})
    np.testing.assert_allclose(full.encoder.encode(table)["numeric"], full.test["numeric"], atol=1e-6)
    frame = full.predictions_frame({"odd": np.full(600, 0.5), "ink": np.zeros(600)})
    assert list(frame) == ["odd_probability_odd", "ink"] and list(frame.index) == list(index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tasks=["digit", "even"]), "have no task 'even'; they have digit, odd"),
        (dict(label_noise=1.0), r"share of labels in \[0, 1\), got 1.0"),
        (dict(train_rows=898), "asks for 898 rows of the digits; expected 1 to 897"),
        (dict(train_rows=0), "asks for 0 rows"),
    ],
)
def test_errors_are_sentences(options, message):
    with pytest.raises(ValueError, match=message):
        digits.load(**options)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="The digits come with scikit-learn: pip install scikit-learn"):
        digits.read()
