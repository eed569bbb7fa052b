"""IMTL-G, ConFIG and Aligned-MTL against singular value decompositions of J, their defining properties, and by hand.

Letters: K tasks, P parameters; g_k rows of J, n_k their norms, u_k = g_k / n_k; w weights, d = J^T w.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.optim.alignment import aligned_mtl, config, imtl_g

from . import cases, reference
from .cases import CASES
from .in_slots import SLOTS, direction_of, norms, weights_of

MODES = ("min", "median", "rmse")


@functools.cache
def jitted(make, *args, **kwargs):
    weigh = make(*args, **kwargs).weighting.weigh
    return jax.jit(lambda gramian, present: weigh(gramian, jnp.zeros(present.size), (), present)[0])


def units(matrix):
    return matrix / norms(matrix)[:, None]


def rank_line(matrix, dtype=np.float32):
    """Singular values below this share of the largest are zero to a Gramian of this type."""
    return np.sqrt(np.count_nonzero(norms(matrix)) * np.finfo(dtype).eps)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("make", "definition"), [(imtl_g, reference.imtl_g), (config, reference.config)])
def test_equals_the_pseudo_inverse_of_the_rows(make, definition, name):
    matrix = CASES[name].matrix
    exact = definition(matrix, rank=rank_line(matrix))
    d = direction_of(jitted(make), matrix)
    assert np.linalg.norm(d - exact.d) <= 1e-5 * exact.scale, exact.note


def aligned_error(matrix, mode, dtype):
    """|d - exact| and what rounding of the Gramian allows, K eps of its largest eigenvalue."""
    eps = np.finfo(dtype).eps
    exact = reference.aligned_mtl(matrix, mode, eps=eps)
    d = direction_of(jitted(aligned_mtl, mode), matrix, dtype=dtype)
    size = np.linalg.svd(matrix, compute_uv=False)
    kept = size[size > np.sqrt(len(matrix) * eps) * size[0]]
    if not kept.size:
        return np.linalg.norm(d), 0.0, exact.note
    length = {"min": kept[-1], "median": kept[len(kept) // 2], "rmse": np.sqrt((kept**2).mean())}[mode]
    # d is of this length for each task; the inverse square root of the least eigenvalue is the worst of it.
    relative = 4 * eps * len(matrix) * (1 + (size[0] / kept[-1]) ** 2)
    return np.linalg.norm(d - exact.d), relative * length * np.sqrt(len(matrix)), exact.note


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_aligned_equals_the_singular_value_decomposition(mode, name):
    error, allowed, note = aligned_error(CASES[name].matrix, mode, np.float32)
    assert error <= allowed or "rounding" in note


def test_in_float64():
    with jax.enable_x64(True):
        for name, case in CASES.items():
            for make, definition in ((imtl_g, reference.imtl_g), (config, reference.config)):
                exact = definition(case.matrix, rank=rank_line(case.matrix, np.float64))
                d = direction_of(jitted(make), case.matrix, dtype=np.float64)
                assert np.linalg.norm(d - exact.d) <= 1e-9 * exact.scale, (name, exact.note)
            error, allowed, note = aligned_error(case.matrix, "min", np.float64)
            assert error <= allowed or "rounding" in note, name


def independent(seed, spread=10):
    rng = np.random.default_rng(seed)
    num_tasks = int(rng.integers(1, 9))
    return cases.normal(rng, num_tasks, 24) * 2.0 ** rng.integers(-spread, spread + 1, (num_tasks, 1))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_imtl_g_has_equal_projections_and_weights_that_sum_to_one(seed):
    matrix = independent(seed)
    weights = weights_of(jitted(imtl_g), matrix)
    assert weights.sum() == pytest.approx(1.0, abs=1e-5 * np.abs(weights).sum())
    projections = units(matrix) @ (weights @ matrix)
    np.testing.assert_allclose(projections, projections.mean(), atol=1e-4 * (np.abs(weights) @ norms(matrix)))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_config_has_equal_angles_and_the_length_of_all_projections(seed):
    matrix = independent(seed)
    weights = weights_of(jitted(config), matrix)
    d, scale = weights @ matrix, np.abs(weights) @ norms(matrix)
    cosines = units(matrix) @ d
    assert (cosines > 0).all()
    np.testing.assert_allclose(cosines, cosines.mean(), atol=1e-4 * scale)
    assert (matrix @ d).sum() / (d @ d) == pytest.approx(1.0, abs=1e-4 * scale**2 / (d @ d))


def test_config_preference(rng):
    matrix, preference = cases.normal(rng, 4, 12), [1.0, 2.0, 3.0, 0.5]
    weigh = jitted(config, preference=(*preference, *[0.0] * (SLOTS - 4)))
    d = direction_of(weigh, matrix)
    cosines = units(matrix) @ d
    np.testing.assert_allclose(cosines / cosines[0], preference, rtol=1e-4)
    np.testing.assert_allclose(d, reference.config(matrix, np.array(preference)).d, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_aligned_gradients_are_orthogonal_and_equally_long(mode, rng):
    matrix = cases.normal(rng, 4, 12)
    # Row k of `aligned` is what becomes of g_k: the direction for a preference of task k alone.
    weigh = jax.jit(
        lambda gramian: jnp.stack(
            [
                aligned_mtl(mode, preference=np.eye(4)[k]).weighting.weigh(gramian, None, (), jnp.ones(4, bool))[0]
                for k in range(4)
            ]
        )
    )
    aligned = np.asarray(weigh(jnp.asarray(matrix @ matrix.T, jnp.float32)), np.float64) @ matrix
    size = np.linalg.svd(matrix, compute_uv=False)
    length = {"min": size[3], "median": size[2], "rmse": np.sqrt((size**2).mean())}[mode]
    np.testing.assert_allclose(aligned @ aligned.T, length**2 * np.eye(4), atol=1e-4 * length**2)
    # The nearest such rows: none turns away from its gradient.
    assert ((aligned * matrix).sum(1) > 0).all()


def test_aligned_mean_is_the_sum_over_the_tasks_that_are_present(rng):
    matrix = cases.normal(rng, 4, 12)
    total, mean = (direction_of(jitted(aligned_mtl, preference=p), matrix) for p in ("sum", "mean"))
    np.testing.assert_allclose(4 * mean, total, rtol=1e-5)


def test_two_tasks_by_hand():
    # u = (1, 0) and (0.6, 0.8), n = (2, 5).
    matrix = np.array([[2.0, 0.0], [3.0, 4.0]])
    # Equal projections: d = t (2, 1), as (2, 1) . u = 2 for both; on the line through the rows, (2, 0) + s (1, 4),
    # 2 + s = 8 s, s = 2/7: d = (16, 8) / 7, w = (5/7, 2/7).
    np.testing.assert_allclose(weights_of(jitted(imtl_g), matrix), [5 / 7, 2 / 7], rtol=1e-5)
    # ConFIG: along (2, 1) / sqrt 5, as long as (<g_1, .> + <g_2, .>) = (4 + 10) / sqrt 5: d = 14 / 5 (2, 1).
    np.testing.assert_allclose(direction_of(jitted(config), matrix), [5.6, 2.8], rtol=1e-5)
    # Aligned-MTL of a diagonal J: singular values 3 and 2, J's rows become 2 along the axes; all modes by hand.
    matrix = np.diag([3.0, 2.0, 6.0])
    for mode, s in (("min", 2.0), ("median", 3.0), ("rmse", np.sqrt((9 + 4 + 36) / 3))):
        np.testing.assert_allclose(direction_of(jitted(aligned_mtl, mode), matrix), [s, s, s], rtol=1e-5)
    # The lower of two.
    np.testing.assert_allclose(direction_of(jitted(aligned_mtl, "median"), matrix[:2]), [2, 2, 0], rtol=1e-5)


@pytest.mark.parametrize("scale", [2.0**-33, 2.0**33])
@pytest.mark.parametrize("make", [imtl_g, config, aligned_mtl])
def test_scale(make, scale, rng):
    matrix = cases.normal(rng, 5, 8)
    d = direction_of(jitted(make), matrix)
    np.testing.assert_allclose(direction_of(jitted(make), scale * matrix) / scale, d, rtol=1e-4, atol=1e-5)


G = np.array([1.0, -2.0, 2.0])  # of length 3
ACROSS = np.array([2.0, 2.0, 1.0])  # of length 3, orthogonal to G


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize(
    ("rows", "imtl", "conflict_free", "aligned"),
    [
        ([G], G, G, G),
        # Equal weights; ConFIG and Aligned-MTL add up: J has one singular value, 3 sqrt 3, and V^T 1 is sqrt 3.
        ([G, G, G], G, 3 * G, 3 * G),
        # C^+ 1 is (1, 1) / 2: weights 3/4 and 1/4. J has the one singular value 3 sqrt 10, V = (1, 3) / sqrt 10.
        ([G, 3 * G], 1.5 * G, 4 * G, 4 * G),
        ([G, -G], 0 * G, 0 * G, 0 * G),
        # No cosines are equal. V = (1, -3) / sqrt 10: the sum.
        ([G, -3 * G], 0 * G, 0 * G, -2 * G),
        ([G, 0 * G], G, G, G),
        ([0 * G, 0 * G], 0 * G, 0 * G, 0 * G),
        # Both projections are 1/2 + 1/2 of the shorter's; half of both lengths; the longer one's value is no zero.
        ([G, 100 * ACROSS], (100 * G + 100 * ACROSS) / 101, 101 / 2 * (G + ACROSS), G + ACROSS),
        # Beyond the line of float32, the shorter one is zero to Aligned-MTL.
        ([G, 1e8 * ACROSS], G + ACROSS, 1e8 / 2 * (G + ACROSS), 1e8 * ACROSS),
    ],
    ids=["one task", "identical", "collinear", "opposite", "opposite 1:3", "zero row", "all zero", "ratio 100", "1e8"],
)
def test_degenerate_rows(rows, imtl, conflict_free, aligned, scale):
    matrix = scale * np.array(rows)
    for make, expected in ((imtl_g, imtl), (config, conflict_free), (aligned_mtl, aligned)):
        size = max(np.linalg.norm(expected), norms(np.array(rows)).min())
        np.testing.assert_allclose(direction_of(jitted(make), matrix), scale * expected, atol=1e-5 * scale * size)


@pytest.mark.parametrize("make", [imtl_g, config, aligned_mtl])
def test_absent_tasks_change_nothing(make, rng):
    matrix = cases.normal(rng, 5, 8)
    np.testing.assert_allclose(weights_of(jitted(make), matrix), weights_of(jitted(make), matrix, slots=5), rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("make", [imtl_g, config, aligned_mtl])
def test_a_gramian_that_is_not_finite_gives_nan(bad, make):
    gramian = np.zeros((SLOTS, SLOTS), np.float32)
    gramian[:2, :2] = [[1.0, bad], [bad, 1.0]]
    assert np.isnan(jitted(make)(gramian, np.arange(SLOTS) < 2)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aligned_mtl("max"), "scale_mode must be 'min', 'median' or 'rmse', got 'max'"),
        (
            lambda: aligned_mtl(preference="max"),
            "preference must be 'sum', 'mean' or a sequence of numbers, got 'max'",
        ),
        (
            lambda: aligned_mtl(preference=[1.0]).weighting.weigh(jnp.eye(2), None, (), jnp.ones(2, bool)),
            "aligned_mtl got 1 preferences for 2 tasks",
        ),
        (
            lambda: config(preference=[1.0]).weighting.weigh(jnp.eye(2), None, (), jnp.ones(2, bool)),
            "config got 1 preferences for 2 tasks",
        ),
    ],
)
def test_errors_are_sentences(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
