"""Multi-objective transforms: per-task gradients in, one descent gradient out, as optax Aggregators."""

from mtjax.optim.base import (
    Aggregator,
    Combination,
    Diagnostics,
    Method,
    MethodState,
    Weighting,
    diagnostics,
    from_combination,
    from_weighting,
    init,
)
from mtjax.optim.flatness import asam, flat_regions, sam
from mtjax.optim.gramian import mgda, pcgrad
from mtjax.optim.learned_weights import uncertainty
from mtjax.optim.representation import at_representation
from mtjax.optim.routes import observe, observes, split_batch
from mtjax.optim.scalarization import linear
from mtjax.optim.wrappers import clip_weights, cr_mogm, ema, every, nonfinite, on_shared, per_group

__all__ = [
    "Aggregator",
    "Combination",
    "Diagnostics",
    "Method",
    "MethodState",
    "Weighting",
    "asam",
    "at_representation",
    "clip_weights",
    "cr_mogm",
    "diagnostics",
    "ema",
    "every",
    "flat_regions",
    "from_combination",
    "from_weighting",
    "init",
    "linear",
    "mgda",
    "nonfinite",
    "observe",
    "observes",
    "on_shared",
    "pcgrad",
    "per_group",
    "sam",
    "split_batch",
    "uncertainty",
]
