"""MMoE's generator: exact cosine, labels equal to the definition, relatedness that rises with rho."""

import jax
import numpy as np
import pytest

from mtjax.data.mmoe_synthetic import MMoESynthetic


@pytest.mark.parametrize("rho", [-1.0, 0.0, 0.5, 1.0])
def test_weights_have_the_given_cosine_and_norm(rho):
    weights = np.asarray(MMoESynthetic(rho=rho).parameters().weights, np.float64)
    np.testing.assert_allclose(weights @ weights.T, 0.09 * np.array([[1, rho], [rho, 1]]), atol=1e-6)


def test_labels_equal_a_naive_loop():
    generator = MMoESynthetic(num_features=7, num_sines=3, noise=0.0)
    weights, alpha, beta = (np.asarray(p, np.float64) for p in generator.parameters())
    batch = generator.sample(jax.random.key(0), 20)
    for k in range(2):
        s = np.asarray(batch["numeric"], np.float64) @ weights[k]
        expected = s + sum(np.sin(alpha[i] * s + beta[i]) for i in range(3))
        np.testing.assert_allclose(batch["labels"][f"task_{k}"], expected, atol=1e-5)


def test_label_correlation_rises_with_rho():
    def correlation(rho: float, **fields) -> float:
        labels = MMoESynthetic(rho=rho, **fields).sample(jax.random.key(5), 20_000)["labels"]
        return np.corrcoef(labels["task_0"], labels["task_1"])[0, 1]

    found = [correlation(rho) for rho in (0.0, 0.5, 0.9, 1.0)]
    assert abs(found[0]) < 0.03 and np.diff(found).min() > 0.05
    # At rho = 1 the tasks differ by noise only.
    np.testing.assert_allclose(correlation(1.0, noise=0.0), 1.0, atol=1e-6)
    # Without sine terms the labels are linear: their correlation is rho.
    assert abs(correlation(0.5, num_sines=0, noise=0.0) - 0.5) < 0.02


def test_splits_are_independent_draws():
    data = MMoESynthetic(num_features=4).dataset(train=30, validation=20, test=10)
    rows = np.concatenate([split["numeric"] for split in (data.train, data.validation, data.test)])
    assert rows.shape == (60, 4) and len(np.unique(rows, axis=0)) == 60
    assert [task.kind for task in data.tasks] == ["regression", "regression"]


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(rho=1.2), "rho=1.2 is no cosine"),
        (dict(num_features=1), "num_features must be at least 2"),
        (dict(noise=-0.1), "expected num_sines >= 0, noise >= 0"),
    ],
)
def test_errors_are_sentences(fields, message):
    with pytest.raises(ValueError, match=message):
        MMoESynthetic(**fields)
