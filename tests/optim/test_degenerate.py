"""Accuracy: methods with an exact solution against it, on generic, degenerate, stationary and badly scaled gradients.

The solutions are computed in float64 on the gradients themselves (reference.py), the cases are in cases.py. A relative
error of 1e-3 is allowed in float32, 1e-6 in float64 (padded.py: of |d|, or of what cancels in d where d is zero).
"""

import functools

import numpy as np
import pytest

from mtjax import optim

from . import cases, reference
from .padded import DTYPES, error, weights_of

# name -> (the method, its exact solution)
EXACT = {
    "mgda": (optim.mgda(), reference.REFERENCES["mgda"]),
    "upgrad": (optim.upgrad(), reference.REFERENCES["upgrad"]),
    "dual_proj": (optim.dual_proj(), reference.REFERENCES["dual_proj"]),
    "cagrad": (optim.cagrad(c=0.5), functools.partial(reference.REFERENCES["cagrad"], c=0.5)),
    "nash_mtl": (optim.nash_mtl(max_norm=None), reference.REFERENCES["nash"]),
    "nash_mtl, clipped": (optim.nash_mtl(), functools.partial(reference.REFERENCES["nash"], max_norm=1.0)),
    "fairgrad": (optim.fairgrad(), functools.partial(reference.REFERENCES["fairgrad"], alpha=1.0)),
    "fairgrad, alpha 2": (optim.fairgrad(2.0), functools.partial(reference.REFERENCES["fairgrad"], alpha=2.0)),
    "imtl_g": (optim.imtl_g(), reference.REFERENCES["imtl_g"]),
    "config": (optim.config(), reference.REFERENCES["config"]),
    "krum": (optim.krum(num_byzantine=0), reference.REFERENCES["krum"]),
}
# (Aligned-MTL's rank decision makes d jump by rounding: its own bounds are in test_alignment.py. PCGrad and GradVac are
# compared with dense walks in test_surgery.py, PCD in test_cone.py.)
FEWEST = {"krum": 3}
QUADRATIC = ("mgda", "upgrad", "dual_proj")
RANK = ("imtl_g", "config")


@functools.cache
def exact(name, case):
    return EXACT[name][1](cases.CASES[case].matrix)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", EXACT)
def test_every_case_is_exact(name, dtype):
    """One test for all cases: what fails is listed. The errors are those of the weights."""
    wrong = []
    for case, entry in cases.CASES.items():
        if len(entry.matrix) < FEWEST.get(name, 1):
            continue
        expected = exact(name, case)
        weights, _ = weights_of(EXACT[name][0].weighting, entry.matrix, dtype=dtype)
        if expected.note == "a tie":  # either choice is right
            assert np.isfinite(weights).all()
            continue
        if case.startswith("nearly") and (dtype == "float32" or name not in QUADRATIC):
            # Off from degenerate by 2^-20, and rules that invert the Gramian see the square of that. Where its rank is
            # a matter of rounding d jumps; elsewhere what cancels in d is the measure.
            difference = np.linalg.norm(entry.matrix.T @ weights - expected.d)
            share = (
                difference / (DTYPES[dtype][1] * expected.scale)
                if name not in RANK
                else 2.0 * (not np.isfinite(difference))
            )
        else:
            share = error(entry.matrix, weights, expected, dtype)
        if not share <= 1.0:  # NaN is no number below 1 either
            wrong.append(f"{case}: {share:.2f} times what is allowed ({expected.note})")
    assert not wrong, "\n".join(wrong)
