"""Mean ranks: the worked example of the paper, ties, directions, diverged runs."""

import math

import numpy as np
import pytest
from scipy import stats

from mtjax.ranks import mean_ranks

# AUC of four variants of C4.5 on 14 data sets (Demsar 2006, table 6); the text finds mean ranks 3.143, 2.000, 2.893 and
# 1.964, Friedman's chi-square of 9.28, and CD = 2.569 sqrt(4 * 5 / (6 * 14)) = 1.25.
C45 = [0.763, 0.599, 0.954, 0.628, 0.882, 0.936, 0.661, 0.583, 0.775, 1.000, 0.940, 0.619, 0.972, 0.957]
C45_M = [0.768, 0.591, 0.971, 0.661, 0.888, 0.931, 0.668, 0.583, 0.838, 1.000, 0.962, 0.666, 0.981, 0.978]
# In the 13th data set both of the last two print as 0.975, but the paper ranks the third variant before the fourth.
C45_CF = [0.771, 0.590, 0.968, 0.654, 0.886, 0.916, 0.609, 0.563, 0.866, 1.000, 0.965, 0.614, 0.9751, 0.946]
C45_M_CF = [0.798, 0.569, 0.967, 0.657, 0.898, 0.931, 0.685, 0.625, 0.875, 1.000, 0.962, 0.669, 0.975, 0.970]
PAPER = {"C4.5": C45, "C4.5+m": C45_M, "C4.5+cf": C45_CF, "C4.5+m+cf": C45_M_CF}


def test_the_example_of_the_paper():
    found = mean_ranks(PAPER)
    assert found.mean == pytest.approx({"C4.5": 3.143, "C4.5+m": 2.0, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}, abs=1e-3)
    assert found.critical_difference == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 14)), abs=1e-3)
    assert found.n == 14
    # The paper ignores ties. With them chi-square is divided by 1 - sum(t^3 - t) / (n (M^3 - M)): three pairs and a
    # block where all four are equal give 1 - (3 * 6 + 60) / (14 * 60) = 0.907.
    assert stats.chi2.isf(found.p_value, 3) == pytest.approx(9.28 / (1 - 78 / 840), abs=0.02)


def test_the_best_method_comes_first_and_direction_reverses_the_order(rng):
    scores = {"a": rng.random(20), "b": rng.random(20) + 2.0, "c": rng.random(20) + 1.0}
    assert mean_ranks(scores).mean == {"b": 1.0, "c": 2.0, "a": 3.0}
    assert list(mean_ranks(scores, higher_is_better=False).mean) == ["a", "c", "b"]
    assert mean_ranks(scores).p_value < 1e-6


def test_the_critical_difference_shrinks_with_blocks_and_grows_with_methods(rng):
    def cd(num_methods: int, n: int, **options) -> float:
        scores = {str(i): rng.random(n) for i in range(num_methods)}
        return mean_ranks(scores, **options).critical_difference

    assert cd(5, 40) == pytest.approx(cd(5, 10) / 2)
    # The paper's table 5a for 2 and 10 classifiers: q = 1.960 (the normal quantile) and 3.164.
    assert cd(2, 6) == pytest.approx(1.960 * math.sqrt(6 / 36), abs=1e-3)
    assert cd(10, 6) == pytest.approx(3.164 * math.sqrt(110 / 36), abs=2e-3)
    assert cd(10, 6, alpha=0.1) == pytest.approx(2.920 * math.sqrt(110 / 36), abs=2e-3)


def test_ties_share_their_ranks_and_diverged_runs_are_last():
    found = mean_ranks({"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [math.nan, 0.0]})
    assert found.mean == {"a": 1.5, "b": 1.5, "c": 3.0}
    equal = mean_ranks({name: np.ones(4) for name in "abc"})
    assert set(equal.mean.values()) == {2.0} and equal.p_value == 1.0


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"a": [1.0]}, {}, "at least two methods"),
        ({"a": [1.0], "b": [1.0, 2.0]}, {}, r"one score for each block, got \{'a': 1, 'b': 2\}"),
        ({"a": [], "b": []}, {}, "one score for each block"),
        ({"a": [1.0], "b": [2.0]}, {"alpha": 5.0}, "between 0 and 1, got 5.0"),
    ],
)
def test_errors_are_sentences(scores, options, message):
    with pytest.raises(ValueError, match=message):
        mean_ranks(scores, **options)
