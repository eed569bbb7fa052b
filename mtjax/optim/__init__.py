"""Multi-objective transforms: per-task gradients in, one descent gradient out, as optax Aggregators.

By what they look at:

* losses: `linear`, `single`, `scale_invariant`, `gls`, `rlw`, `dwa`, `uncertainty`, `imtl_l`, `famo`, and with a
  preference `tchebycheff`, `stch`, `cosmos`, `pbi`;
* the Gramian: `mgda`, `pcgrad`, `gradvac`, `cagrad`, `imtl_g`, `nash_mtl`, `fairgrad`, `aligned_mtl`, `config`,
  `upgrad`, `dual_proj`, `pcd`, `krum`, `gradnorm`, `norm_balance`, `ntk_balance`, `rgw`, and with a preference `epo`,
  `pmtl`;
* entries of the Jacobian: `graddrop`, `trimmed_mean`, `moco`, `db_mtl`, `excess_mtl`, `momentum_config`;
* several batches: `modo`, `sdmgrad`, `auto_lambda`, `moml`, `forum`;
* other points, features, curvature: `sam`, `asam`, `flat_regions`, `rotograd`, `cosreg`;
* other methods (wrappers): `on_shared`, `per_group`, `at_representation`, `every`, `ema`, `cr_mogm`, `clip_weights`,
  `nonfinite`.

What each does on which input is measured in PROPERTIES.md beside this file; what it costs, in experiments/bench.
Sets of solutions are in `pareto.py`, which tasks belong together in `grouping.py`.
"""

from mtjax.optim.alignment import aligned_mtl, config, imtl_g
from mtjax.optim.balancing import gradnorm, norm_balance, ntk_balance, rgw
from mtjax.optim.bargaining import fairgrad, nash_mtl
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
from mtjax.optim.bilevel import auto_lambda, moml
from mtjax.optim.buffers import db_mtl, moco
from mtjax.optim.cagrad import cagrad
from mtjax.optim.cone import dual_proj, pcd, upgrad
from mtjax.optim.cosreg import cosreg
from mtjax.optim.elementwise import graddrop, trimmed_mean
from mtjax.optim.excess import excess_mtl
from mtjax.optim.famo import famo
from mtjax.optim.flatness import asam, flat_regions, sam
from mtjax.optim.forum import forum
from mtjax.optim.grouping import group_tasks, sampling_probabilities, task_affinity
from mtjax.optim.krum import krum
from mtjax.optim.learned_weights import imtl_l, uncertainty
from mtjax.optim.min_norm import mgda
from mtjax.optim.momentum_config import momentum_config
from mtjax.optim.pareto import (
    epo,
    hypervolume,
    hypervolume_weights,
    pmtl,
    preference_vectors,
    value_and_hypervolume_update,
    value_and_set_update,
)
from mtjax.optim.preference import cosmos, pbi, stch, tchebycheff
from mtjax.optim.representation import at_representation
from mtjax.optim.rotograd import rotations, rotograd
from mtjax.optim.routes import observe, observes, split_batch
from mtjax.optim.scalarization import dwa, gls, linear, rlw, scale_invariant, single
from mtjax.optim.stochastic import modo, sdmgrad
from mtjax.optim.surgery import gradvac, pcgrad
from mtjax.optim.wrappers import clip_weights, cr_mogm, ema, every, nonfinite, on_shared, per_group

__all__ = [
    "Aggregator",
    "Combination",
    "Diagnostics",
    "Method",
    "MethodState",
    "Weighting",
    "aligned_mtl",
    "asam",
    "at_representation",
    "auto_lambda",
    "cagrad",
    "clip_weights",
    "config",
    "cosmos",
    "cosreg",
    "cr_mogm",
    "db_mtl",
    "diagnostics",
    "dual_proj",
    "dwa",
    "ema",
    "epo",
    "every",
    "excess_mtl",
    "fairgrad",
    "famo",
    "flat_regions",
    "forum",
    "from_combination",
    "from_weighting",
    "gls",
    "graddrop",
    "gradnorm",
    "gradvac",
    "group_tasks",
    "hypervolume",
    "hypervolume_weights",
    "imtl_g",
    "imtl_l",
    "init",
    "krum",
    "linear",
    "mgda",
    "moco",
    "modo",
    "momentum_config",
    "moml",
    "nash_mtl",
    "nonfinite",
    "norm_balance",
    "ntk_balance",
    "observe",
    "observes",
    "on_shared",
    "pbi",
    "pcd",
    "pcgrad",
    "per_group",
    "pmtl",
    "preference_vectors",
    "rgw",
    "rlw",
    "rotations",
    "rotograd",
    "sam",
    "sampling_probabilities",
    "scale_invariant",
    "sdmgrad",
    "single",
    "split_batch",
    "stch",
    "task_affinity",
    "tchebycheff",
    "trimmed_mean",
    "uncertainty",
    "upgrad",
    "value_and_hypervolume_update",
    "value_and_set_update",
]
