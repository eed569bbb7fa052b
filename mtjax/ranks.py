r"""Comparing many methods on many blocks by ranks: Friedman's test and Nemenyi's critical difference.

A block is whatever the methods are compared on under equal conditions: a data set, a task, a task and a seed. In each
block the best method has rank 1 and ties share the mean of their ranks. With M methods and n blocks, two mean ranks
differ at level alpha if they are further apart than

    CD = q_alpha sqrt( M (M + 1) / (6 n) ),     q_alpha = (1 - alpha) quantile of the studentized range / sqrt(2).

Blocks are taken as independent. Tasks of one data set, or seeds of one split, are not quite: say in the experiment what
a block is, and read p-values with that in mind.

Letters: M methods, n blocks.

>>> found = mean_ranks({"a": [0.9, 0.8, 0.7], "b": [0.5, 0.6, 0.7], "c": [0.1, 0.2, 0.3]})
>>> {method: round(rank, 2) for method, rank in found.mean.items()}, round(found.critical_difference, 2)
({'a': 1.17, 'b': 1.83, 'c': 3.0}, 1.91)

Reference: Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 2006, section 3.2.2.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Ranks(NamedTuple):
    """Mean ranks of methods.

    Attributes:
      mean: method -> mean rank over the blocks, best (smallest) first.
      critical_difference: the smallest difference of two mean ranks that is significant (Nemenyi).
      p_value: of Friedman's test that all methods are equal; NaN for two methods or fewer than two blocks.
      n: number of blocks.
      alpha: level of the critical difference.
    """

    mean: dict[str, float]
    critical_difference: float
    p_value: float
    n: int
    alpha: float


def mean_ranks(scores: Mapping[str, ArrayLike], *, higher_is_better: bool = True, alpha: float = 0.05) -> Ranks:
    """Mean ranks, Friedman's test and the critical difference.

    Args:
      scores: method -> one score per block [n], in the same order for all methods. Where blocks differ in direction
        (error and accuracy), sign the scores first. NaN (a run that diverged) ranks last.
      higher_is_better: whether the largest score of a block is the best.
      alpha: level of the critical difference.

    Returns:
      The ranks.

    Raises:
      ValueError: with fewer than two methods, no block, or rows of different lengths.
    """
    lengths = {method: np.size(values) for method, values in scores.items()}
    if len(lengths) < 2 or len(set(lengths.values())) != 1 or min(lengths.values()) < 1:
        raise ValueError(f"mean_ranks needs at least two methods with one score for each block, got {lengths}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is a level between 0 and 1, got {alpha}")
    from scipy import stats

    table = np.array([np.asarray(values, np.float64).ravel() for values in scores.values()])
    cost = -table if higher_is_better else table
    ranks = stats.rankdata(np.where(np.isnan(cost), np.inf, cost), axis=0)
    num_methods, n = ranks.shape
    quantile = stats.studentized_range.ppf(1.0 - alpha, num_methods, np.inf) / np.sqrt(2.0)
    difference = float(quantile * np.sqrt(num_methods * (num_methods + 1) / (6.0 * n)))
    p_value = np.nan
    # Where every block is one tie the statistic is 0/0: nothing speaks against equality.
    if num_methods > 2 and n > 1:
        p_value = float(stats.friedmanchisquare(*ranks).pvalue) if np.ptp(ranks, axis=0).any() else 1.0
    order = np.argsort(ranks.mean(axis=1), kind="stable")
    names = list(scores)
    return Ranks({names[i]: float(ranks[i].mean()) for i in order}, difference, p_value, n, alpha)
