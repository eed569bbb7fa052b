"""Runs weightings on matrices of many sizes with two compilations: absent tasks fill them up to 10 or 64.

Letters: K tasks, P parameters; g_k the rows of J.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = {"float32": (np.float32, 1e-3), "float64": (np.float64, 1e-6)}  # and the relative error of d that is allowed


def precision(dtype):
    """A context in which JAX computes in that precision."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


@functools.cache
def jitted(function):
    return jax.jit(function)


def weights_of(weighting, matrix, losses=None, state=None, dtype="float32", at=None, size=None):
    """Weights f64[K] of one step on the matrix, and the new state.

    Args:
      weighting: a masked `Weighting`.
      matrix: f64[K, P].
      losses: f64[K]; ones if not given.
      state: of `size` tasks; the initial one if not given.
      dtype: 'float32' or 'float64'; to be called in the context of `precision(dtype)` if the state goes on.
      at: where the K tasks stand among `size`; first if not given.
      size: 10 or 64 if not given, whichever does.
    """
    num_tasks = len(matrix)
    size = (10 if num_tasks <= 10 else 64) if size is None else size
    at = np.arange(num_tasks) if at is None else np.asarray(at)
    with precision(dtype):
        rows = np.asarray(matrix, DTYPES[dtype][0])
        gramian, all_losses, present = np.zeros((size, size), rows.dtype), np.zeros(size), np.zeros(size, bool)
        gramian[np.ix_(at, at)] = rows @ rows.T
        all_losses[at] = 1.0 if losses is None else losses
        present[at] = True
        state = weighting.init(size) if state is None else state
        weights, state = jitted(weighting.weigh)(
            jnp.asarray(gramian), jnp.asarray(all_losses.astype(rows.dtype)), state, jnp.asarray(present)
        )
    assert weights.dtype == rows.dtype
    weights = np.asarray(weights, np.float64)
    assert (np.delete(weights, at) == 0).all()
    return weights[at], state


def error(matrix, weights, reference, dtype):
    """|d - d*|, in units of what is allowed: so much of |d*|, or if d* is zero of sum_k |w_k| |g_k|.

    d* counts as zero if the inner products, in this precision, do not tell |d*|^2 from 0.
    """
    kind, allowed = DTYPES[dtype]
    length, size = np.linalg.norm(reference.d), np.linalg.norm(matrix, axis=1)
    if length**2 <= 8 * np.finfo(kind).eps * reference.scale**2:
        length = max(np.abs(weights) @ size, reference.scale)
    difference = np.linalg.norm(matrix.T @ weights - reference.d)
    return difference / (allowed * length) if difference > 0 else 0.0
