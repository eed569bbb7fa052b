"""MultiTab-Bench: exact task directions, closed forms against quadrature and samples, independent splits."""

import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.data.multitab_bench import MultiTabBench, hermite_coefficients, label_quantiles

DRAW = 200_000


def labels_of(bench: MultiTabBench, rows: int = DRAW, seed: int = 1) -> np.ndarray:
    """Labels f64[n, T] of a draw."""
    batch = jax.jit(bench.sample, static_argnums=1)(jax.random.key(seed), rows)
    return np.stack([np.asarray(batch["labels"][task.name], np.float64) for task in bench.tasks], axis=1)


def quadrature_moments(bench: MultiTabBench) -> tuple[np.ndarray, np.ndarray]:
    """Mean [T] and covariance [T, T] of y by Gauss-Hermite quadrature, pair by pair: nothing shared with the code."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    weights = weights / weights.sum()
    p, size = bench.correlation_matrix, bench.num_tasks
    grid = weights[:, None] * weights[None, :]

    def polynomial(s: np.ndarray, degree: int) -> np.ndarray:
        return sum(s**k for k in range(1, degree + 1))

    mean = np.array([weights @ polynomial(nodes, degree) for degree in bench.degrees])
    covariance = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            other = p[i, j] * nodes[:, None] + np.sqrt(max(1 - p[i, j] ** 2, 0.0)) * nodes[None, :]
            y_i, y_j = polynomial(nodes[:, None], bench.degrees[i]), polynomial(other, bench.degrees[j])
            covariance[i, j] = (grid * y_i * y_j).sum() - mean[i] * mean[j] + (i == j) * bench.noise[i] ** 2
    return mean, covariance


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(tasks=st.sampled_from((1, 3, 6)), rank=st.integers(1, 6), seed=st.integers(0, 1000))
def test_directions_have_exactly_the_given_cosines(tasks, rank, seed):
    """Also for singular P, which random vectors in fewer dimensions than tasks give."""
    vectors = np.random.default_rng(seed).normal(size=(tasks, rank))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    bench = MultiTabBench(num_tasks=tasks, num_features=9, correlation=vectors @ vectors.T, seed=seed)
    weights = np.asarray(bench.weights(), np.float64)
    np.testing.assert_allclose(weights @ weights.T, vectors @ vectors.T, atol=1e-5)


@pytest.mark.parametrize("p", [-1 / 3, 0.0, 0.4, 1.0])
def test_one_number_is_the_cosine_of_all_pairs(p):
    bench = MultiTabBench(num_tasks=4, num_features=4, correlation=p)
    weights = np.asarray(bench.weights(), np.float64)
    expected = np.full((4, 4), p) + (1 - p) * np.eye(4)
    np.testing.assert_allclose(bench.correlation_matrix, expected)
    np.testing.assert_allclose(weights @ weights.T, expected, atol=1e-5)


def test_hermite_coefficients_of_the_spec():
    assert [hermite_coefficients(d)[1:] for d in (1, 2, 3, 4)] == [(1,), (1, 1), (4, 1, 1), (4, 7, 1, 1)]
    s = np.linspace(-2, 2, 9)
    series = np.polynomial.hermite_e.hermeval(s, hermite_coefficients(7))
    np.testing.assert_allclose(series, sum(s**k for k in range(1, 8)), atol=1e-9)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    degrees=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
    p=st.floats(-0.5, 1.0),
    noise=st.floats(0.0, 3.0),
)
def test_closed_forms_equal_quadrature(degrees, p, noise):
    bench = MultiTabBench(num_tasks=3, degrees=degrees, correlation=p, noise=(noise, 0.0, 1.0))
    mean, covariance = quadrature_moments(bench)
    np.testing.assert_allclose(bench.mean(), mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(bench.label_covariance(), covariance, rtol=1e-8, atol=1e-7)
    np.testing.assert_allclose(bench.variance(), np.diag(covariance), rtol=1e-8)
    correlation = bench.label_correlation()
    np.testing.assert_allclose(np.diag(correlation), 1.0)
    assert np.abs(correlation).max() <= 1 + 1e-9


def test_closed_forms_equal_samples():
    """2 10^5 rows: label correlations to 2 decimals, variances 1, 3, 24, 144 (degree 4 has heavy tails)."""
    matrix = np.full((4, 4), 0.4) + 0.6 * np.eye(4)
    matrix[0, 1] = matrix[1, 0] = -0.2
    bench = MultiTabBench(num_tasks=4, degrees=(1, 2, 3, 4), correlation=matrix, noise=0.0)
    np.testing.assert_allclose(bench.variance(), [1, 3, 24, 144])
    labels = labels_of(bench)
    np.testing.assert_allclose(labels.mean(0), bench.mean(), rtol=0.02, atol=0.02)
    np.testing.assert_allclose(labels.var(0), bench.variance(), rtol=0.06)
    np.testing.assert_allclose(np.corrcoef(labels.T), bench.label_correlation(), atol=0.012)


def test_labels_equal_a_naive_loop():
    bench = MultiTabBench(num_tasks=3, num_features=5, degrees=(1, 3, 4), noise=0.0)
    batch = bench.sample(jax.random.key(3), 50)
    x, weights = np.asarray(batch["numeric"], np.float64), np.asarray(bench.weights(), np.float64)
    for i, degree in enumerate(bench.degrees):
        s = x @ weights[i]
        expected = sum(s**k for k in range(1, degree + 1))
        np.testing.assert_allclose(batch["labels"][f"task_{i}"], expected, rtol=1e-4, atol=1e-4)


def test_noise_is_the_residual():
    quiet = MultiTabBench(num_tasks=2, noise=0.0)
    noisy = MultiTabBench(num_tasks=2, noise=(0.5, 2.0))
    residual = labels_of(noisy) - labels_of(quiet)
    np.testing.assert_allclose(residual.std(0), [0.5, 2.0], rtol=0.02)
    np.testing.assert_allclose(noisy.variance() - quiet.variance(), [0.25, 4.0])


def test_standardize_gives_zero_mean_and_unit_variance():
    bench = MultiTabBench(num_tasks=4, degrees=(1, 2, 3, 4), noise=(0.01, 1.0, 0.01, 0.01), standardize=True)
    labels = labels_of(bench)
    np.testing.assert_allclose(labels.mean(0), 0.0, atol=0.02)
    np.testing.assert_allclose(labels.std(0), 1.0, rtol=0.03)
    np.testing.assert_allclose(bench.label_correlation(), np.corrcoef(labels.T), atol=0.02)


@pytest.mark.parametrize("standardize", [False, True])
def test_class_rates_are_as_designed(standardize):
    bench = MultiTabBench(
        num_tasks=4,
        kinds=("binary", "multiclass", "multiclass", "regression"),
        degrees=(4, 3, 2, 1),
        positive_rate=0.1,
        num_classes=(2, 3, 8, 2),
        standardize=standardize,
    )
    labels = labels_of(bench)
    assert abs(labels[:, 0].mean() - 0.1) < 0.003
    for column, classes in ((1, 3), (2, 8)):
        rates = np.bincount(labels[:, column].astype(int), minlength=classes) / DRAW
        np.testing.assert_allclose(rates, 1 / classes, atol=0.004)
    assert [task.output_size for task in bench.tasks] == [1, 3, 8, 1]
    assert [cut.size for cut in bench.thresholds()] == [1, 2, 7, 0]


def test_classes_are_cut_from_the_same_y():
    """The cut points come from the distribution: they are the same whatever is drawn, and reproduce the classes."""
    bench = MultiTabBench(num_tasks=3, kinds="multiclass", num_classes=4)
    raw = MultiTabBench(num_tasks=3)
    classes, y = labels_of(bench, 500), labels_of(raw, 500)
    for i, cut in enumerate(bench.thresholds()):
        np.testing.assert_array_equal(classes[:, i], np.searchsorted(cut, y[:, i]))


@pytest.mark.parametrize("degree,noise", [(1, 0.0), (2, 0.5), (3, 0.0), (4, 0.01)])
def test_quantiles_are_those_of_the_distribution(degree, noise):
    levels = (0.05, 0.5, 0.9)
    rng = np.random.default_rng(0)
    s = rng.normal(size=1_000_000)
    y = sum(s**k for k in range(1, degree + 1)) + noise * rng.normal(size=s.size)
    found = np.array(label_quantiles(degree, noise, levels))
    np.testing.assert_allclose([(y <= cut).mean() for cut in found], levels, atol=0.002)


def test_bernoulli_labels_follow_the_sigmoid():
    settings = dict(num_tasks=2, degrees=(1, 3), standardize=True)
    bench = MultiTabBench(kinds="binary", binary_rule="bernoulli", temperature=(1.0, 0.25), **settings)
    labels, y = labels_of(bench), labels_of(MultiTabBench(**settings))
    for i, temperature in enumerate(bench.temperature):
        probability = 1 / (1 + np.exp(-y[:, i] / temperature))
        assert abs(labels[:, i].mean() - probability.mean()) < 0.005
        bins = np.digitize(probability, [0.2, 0.4, 0.6, 0.8])
        for b in range(5):
            assert abs(labels[bins == b, i].mean() - probability[bins == b].mean()) < 0.015


def test_sample_is_pure_jax():
    bench = MultiTabBench(num_tasks=2, num_features=4, kinds=("regression", "multiclass"))
    keys = jax.random.split(jax.random.key(0), 3)
    # One set of weights and one draw per seed, all at once.
    seeds = jax.jit(jax.vmap(lambda key: bench.sample(key, 6, bench.weights(key))))(keys)
    assert {leaf.dtype for leaf in jax.tree.leaves(seeds)} == {jnp.dtype("int32"), jnp.dtype("float32")}
    assert seeds["numeric"].shape == (3, 6, 4)
    eager = bench.sample(keys[1], 6, bench.weights(keys[1]))
    jax.tree.map(lambda many, one: np.testing.assert_allclose(many[1], one, atol=1e-5), seeds, eager)


def test_splits_are_independent_draws_of_the_same_weights():
    bench = MultiTabBench(num_tasks=3, num_features=6, noise=0.0, degrees=1)
    data = bench.dataset(train=64, validation=32, test=16)
    splits = [data.train, data.validation, data.test]
    assert [split["numeric"].shape for split in splits] == [(64, 6), (32, 6), (16, 6)]
    assert [split["categorical"].shape for split in splits] == [(64, 0), (32, 0), (16, 0)]
    assert data.cardinalities == () and data.num_numeric == 6
    assert [task.name for task in data.tasks] == ["task_0", "task_1", "task_2"]
    rows = np.concatenate([split["numeric"] for split in splits])
    assert len(np.unique(rows, axis=0)) == len(rows)
    # Without noise a linear task reveals its weights: they agree in all splits.
    for split in splits:
        solution, *_ = np.linalg.lstsq(split["numeric"], split["labels"]["task_1"], rcond=None)
        np.testing.assert_allclose(solution, bench.weights()[1], atol=1e-4)
    # The data set is one like any other: its encoder takes new rows, and names the columns of predictions.
    assert data.encoder.encode({f"x_{i}": [0.5] for i in range(6)})["numeric"].tolist() == [[0.5] * 6]
    assert list(data.predictions_frame({"task_0": np.zeros(16)})) == ["task_0"] and "64 train" in data.summary()
    again = bench.dataset(train=64, validation=32, test=16)
    jax.tree.map(np.testing.assert_array_equal, data.test, again.test)
    # A larger split (here of more than one block) begins with the rows of a smaller one.
    larger = bench.dataset(train=9000, validation=32, test=16).train
    assert len(np.unique(larger["numeric"], axis=0)) == 9000
    np.testing.assert_array_equal(larger["numeric"][:64], data.train["numeric"])
    np.testing.assert_array_equal(larger["labels"]["task_2"][:64], data.train["labels"]["task_2"])
    other = MultiTabBench(num_tasks=3, num_features=6, noise=0.0, degrees=1, seed=1).dataset(64, 32, 16)
    assert np.abs(other.train["numeric"] - data.train["numeric"]).max() > 0.1


def test_dataset_of_mixed_tasks():
    bench = MultiTabBench(num_tasks=3, num_features=3, kinds=("binary", "multiclass", "regression"), num_classes=3)
    data = bench.dataset(train=300, validation=20, test=20)
    for task in data.tasks:
        task.check_labels(data.train["labels"][task.name])
    assert [target.classes for target in data.encoder.targets] == [("0", "1"), ("0", "1", "2"), ()]
    with pytest.raises(ValueError, match="validation split needs at least one row, got validation=0"):
        bench.dataset(train=10, validation=0, test=10)


def test_defaults_are_the_published_benchmark():
    bench = MultiTabBench()
    assert (bench.num_tasks, bench.num_features, bench.correlation) == (7, 32, 0.4)
    assert bench.degrees == (1, 3, 2, 3, 4, 2, 3) and set(bench.noise) == {0.01} and not bench.standardize
    assert {task.scaling for task in bench.tasks} == {"none"}
    assert bench.label_correlation()[0, [2, 4]].round(2).tolist() == [0.23, 0.13]
    assert MultiTabBench(num_tasks=9).degrees == (1, 3, 2, 3, 4, 2, 3, 1, 3)


def test_configuration_is_hashable_and_json():
    import dataclasses

    bench = MultiTabBench(num_tasks=2, correlation=np.eye(2), degrees=np.array([1, 2]), noise=[0.0, 1.0])
    assert hash(bench) == hash(dataclasses.replace(bench))
    fields = json.loads(json.dumps(dataclasses.asdict(bench)))
    assert fields["correlation"] == [[1.0, 0.0], [0.0, 1.0]] and fields["degrees"] == [1, 2]


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(num_tasks=0), "num_tasks must be at least 1, got 0"),
        (dict(num_tasks=4, num_features=3), "num_features=3 is smaller than num_tasks=4"),
        (dict(num_tasks=4, correlation=-0.4), r"correlation=-0.4 is impossible .* -1/\(T-1\) = -0.3333"),
        (dict(correlation=1.5), "correlation=1.5 is impossible"),
        (dict(num_tasks=2, correlation=np.eye(3)), r"shape \(3, 3\); expected a number or a \[2, 2\] matrix"),
        (dict(num_tasks=2, correlation=[[1, 0.5], [0.2, 1]]), "correlation is not symmetric"),
        (dict(num_tasks=2, correlation=[[2, 0.5], [0.5, 1]]), "diagonal .* expected ones"),
        (
            dict(num_tasks=3, correlation=[[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]]),
            "not positive semidefinite .*no unit vectors have these cosines",
        ),
        (dict(degrees=(1, 2)), "degrees has 2 values but num_tasks=7"),
        (dict(degrees=0), "degrees holds 0; expected integers >= 1"),
        (dict(noise=-1.0), "noise holds -1.0"),
        (dict(kinds="count"), "kinds holds 'count'; expected regression, binary or multiclass"),
        (dict(num_classes=1), "num_classes holds 1"),
        (dict(positive_rate=1.0), "positive_rate holds 1.0"),
        (dict(temperature=0.0), "temperature holds 0.0"),
        (dict(binary_rule="median"), "binary_rule is 'median'"),
    ],
)
def test_errors_are_sentences(fields, message):
    with pytest.raises(ValueError, match=message):
        MultiTabBench(**fields)
