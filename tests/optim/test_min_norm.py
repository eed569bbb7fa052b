"""MGDA against its definition and a float64 reference on the rows. (The programme itself is tested in test_solvers.py.)

Letters: K tasks, P parameters; g_k rows of the Jacobian, n_k their norms; d the update.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.optim.min_norm import mgda
from mtjax.optim.solvers import min_norm_weights

from . import padded, reference
from .cases import CASES

K, P = 4, 6
METHODS = {normalize: mgda(normalize) for normalize in ("none", "l2", "loss", "loss+")}
EVERY_DTYPE = pytest.mark.parametrize("dtype", padded.DTYPES)


def run(rows, losses=None, normalize="none", dtype="float32"):
    """d and weights."""
    rows = np.asarray(rows, np.float64)
    weights, _ = padded.weights_of(METHODS[normalize].weighting, rows, losses, dtype=dtype)
    return weights @ rows, weights


def random_rows(seed, num_tasks=K, num_params=P):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_tasks, num_params)) * 10 ** rng.uniform(-1, 1, (num_tasks, 1))
    return rows.astype(np.float32), rng.uniform(0.2, 3.0, num_tasks).astype(np.float32)


@EVERY_DTYPE
def test_mgda_is_the_shortest_vector_of_the_hull_on_every_case(dtype):
    errors = {
        case: padded.error(matrix, run(matrix, dtype=dtype)[1], reference.mgda(matrix), dtype)
        for case, (matrix, _, _) in CASES.items()
    }
    assert max(errors.values()) < 1, errors


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_mgda_increases_no_loss(seed):
    """<g_k, d> >= |d|^2 >= 0 for every task, and d is in the convex hull."""
    rows, _ = random_rows(seed)
    direction, weights = run(rows)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    norm = np.linalg.norm(rows, axis=1)
    assert (rows @ direction >= direction @ direction - 1e-5 * norm * (weights @ norm)).all()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), normalize=st.sampled_from(list(METHODS)))
def test_mgda_normalizes_for_the_weights_only(seed, normalize):
    rows, losses = random_rows(seed)
    norm = np.linalg.norm(rows, axis=1)
    divisor = {"none": np.ones(K), "l2": norm, "loss": losses, "loss+": losses * norm}[normalize]
    scaled = (rows / divisor[:, None]).astype(np.float64)
    expected = np.asarray(jax.jit(min_norm_weights)(jnp.asarray(scaled @ scaled.T, jnp.float32)))
    _, weights = run(rows, losses, normalize)
    terms = weights * norm / divisor
    np.testing.assert_allclose(terms, expected * norm / divisor, atol=1e-3 * terms.sum())


@pytest.mark.parametrize("factors", [[1.0, 10.0, 0.1, 1.0], [1e-4, 1.0, 1e4, 7.0]])
def test_mgda_l2_weights_do_not_depend_on_the_length_of_a_row(factors):
    rows, _ = random_rows(0)
    _, weights = run(rows, normalize="l2")
    _, scaled = run(rows * np.array(factors)[:, None], normalize="l2")
    np.testing.assert_allclose(scaled, weights, atol=1e-4)


def test_mgda_of_two_tasks_by_hand():
    # d is the foot of the perpendicular from the origin to the line through (3, 0) and (0, 4): length 3 * 4 / 5.
    direction, weights = run([[3.0, 0.0], [0.0, 4.0]])
    np.testing.assert_allclose(weights, [16 / 25, 9 / 25], rtol=1e-5)
    np.testing.assert_allclose(direction, [48 / 25, 36 / 25], rtol=1e-5)
    # 'l2': unit rows are orthogonal, hence equal weights, which are applied to the rows as they are.
    direction, weights = run([[3.0, 0.0], [0.0, 4.0]], normalize="l2")
    np.testing.assert_allclose(weights, [0.5, 0.5], rtol=1e-5)
    np.testing.assert_allclose(direction, [1.5, 2.0], rtol=1e-5)
    # 'loss' with losses (3, 1): rows (1, 0) and (0, 4), so that w is proportional to (16, 1).
    _, weights = run([[3.0, 0.0], [0.0, 4.0]], [3.0, 1.0], "loss")
    np.testing.assert_allclose(weights, [16 / 17, 1 / 17], rtol=1e-5)
    # 'loss+': rows (1/3, 0) and (0, 1), so that w is proportional to (9, 1).
    _, weights = run([[3.0, 0.0], [0.0, 4.0]], [3.0, 1.0], "loss+")
    np.testing.assert_allclose(weights, [0.9, 0.1], rtol=1e-5)
    # A dominated task keeps no weight at all (LibMTL: 1e-3 of it).
    assert run([[1.0, 0.0], [3.0, 1.0]])[1].tolist() == [1.0, 0.0]


G = np.array([1.0, -2.0, 2.0])  # of length 3


@pytest.mark.parametrize("normalize", METHODS)
@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1.0, 1e5, 1e10])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([G], G),
        ([G, G, G], G),
        ([G, -G], 0 * G),
        ([G, 0 * G, 2 * G], 0 * G),
        ([0 * G, 0 * G], 0 * G),
    ],
    ids=["one task", "identical", "opposite", "zero row", "all zero"],
)
def test_mgda_of_degenerate_rows(rows, expected, scale, normalize):
    direction, _ = run(scale * np.array(rows), normalize=normalize)
    np.testing.assert_allclose(direction, scale * expected, atol=1e-5 * scale)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_mgda_of_collinear_rows(scale):
    for rows, expected in (([2 * G, G, 5 * G], G), ([G, 1e8 * G], G), ([G, -3 * G], 0 * G)):
        np.testing.assert_allclose(run(scale * np.array(rows))[0], scale * expected, atol=1e-5 * scale)
    # Under 'l2' opposite rows are of one length: equal weights, applied to the rows as they are.
    np.testing.assert_allclose(run(scale * np.array([G, -3 * G]), normalize="l2")[0], -scale * G, rtol=1e-5)


def test_mgda_gives_zero_divisors_all_the_weight():
    """A zero row under 'l2', a zero loss under 'loss': there is nothing shorter than a zero row."""
    rows = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    assert run(rows, normalize="l2")[1].tolist() == [0.0, 1.0, 0.0]
    assert run(np.eye(3), [1.0, 0.0, 2.0], "loss")[1].tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("normalize", METHODS)
def test_mgda_of_what_is_not_finite_is_nan(normalize, bad):
    weigh = padded.jitted(METHODS[normalize].weighting.weigh)
    present = jnp.ones(10, bool)
    for entry in ((0, 1), (2, 2)):
        assert jnp.isnan(weigh(jnp.eye(10).at[entry].set(bad), jnp.ones(10), (), present)[0]).all()
    weights = weigh(jnp.eye(10), jnp.ones(10).at[1].set(bad), (), present)[0]
    assert jnp.isnan(weights).all() == ("loss" in normalize)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), normalize=st.sampled_from(("none", "loss+")))
def test_mgda_of_the_tasks_that_are_present_is_as_without_the_others(seed, normalize):
    rows, losses = random_rows(seed)
    at = np.random.default_rng(seed).choice(10, K, replace=False)
    at.sort()
    weighting = METHODS[normalize].weighting
    alone, _ = padded.weights_of(weighting, rows, losses, size=K)
    among, _ = padded.weights_of(weighting, rows, losses, at=at)
    norm = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(among * norm, alone * norm, atol=1e-5 * (alone @ norm))


def test_mgda_refuses_another_normalization():
    with pytest.raises(ValueError) as error:
        mgda("mean")
    assert str(error.value) == "normalize must be 'none', 'l2', 'loss' or 'loss+', got 'mean'"
