"""Multi-objective transforms: per-task gradients in, one descent gradient out, as optax Aggregators."""

from mtjax.optim.base import (
    Aggregator,
    Diagnostics,
    Method,
    MethodState,
    Weighting,
    diagnostics,
    from_weighting,
    init,
    on_shared,
)
from mtjax.optim.gramian import mgda, pcgrad
from mtjax.optim.scalarization import linear, uncertainty

__all__ = [
    "Aggregator",
    "Diagnostics",
    "Method",
    "MethodState",
    "Weighting",
    "diagnostics",
    "from_weighting",
    "init",
    "linear",
    "mgda",
    "on_shared",
    "pcgrad",
    "uncertainty",
]
