"""Runs functions `(gramian, present) -> weights` on matrices of all sizes with one compilation.

A matrix takes the first of 64 tasks, the others being absent. (For `Weighting`s and both precisions: padded.py.)

Letters: K tasks, P parameters.
"""

import numpy as np

SLOTS = 64


def weights_of(weigh, matrix, slots=SLOTS, dtype=np.float32):
    matrix = np.asarray(matrix)
    rows = np.zeros((slots, matrix.shape[1]), dtype)
    rows[: len(matrix)] = matrix
    weights = np.asarray(weigh(rows @ rows.T, np.arange(slots) < len(matrix)), np.float64)
    assert not weights[len(matrix) :].any()
    return weights[: len(matrix)]


def direction_of(weigh, matrix, **kwargs):
    return weights_of(weigh, matrix, **kwargs) @ matrix


def norms(matrix):
    return np.linalg.norm(matrix, axis=1)
