"""The objective methods that the experiments of this folder compare: how each is made, what it reads, what is tuned.

One line per method. Names are those of the papers, and of the command line (`--methods CAGrad Nash-MTL`); defaults are
the papers' too. `grid` holds the one hyper-parameter that is tuned where methods compete for scores (never on the toy
landscape), with its default among the values, so that every method gets a budget of the same kind.

>>> METHODS["Sum"].family, [options for options in METHODS["Sum"].settings()]
('losses', [{}])
"""

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from mtjax import optim

Family = Literal["losses", "Gramian", "entries", "batches", "flatness"]
FAMILIES: Mapping[Family, str] = {
    "losses": "Losses only: one backward pass",
    "Gramian": "Inner products of the task gradients",
    "entries": "Entries of the task gradients, or buffers of them",
    "batches": "Several batches, or a look-ahead step",
    "flatness": "Gradients at perturbed parameters",
}
"""Family -> what the method reads, as a heading."""


class Entry(NamedTuple):
    """One method.

    Attributes:
      make: keyword hyper-parameters -> a method of `mtjax.optim`; without any, that of the paper.
      family: what it reads.
      grid: name of the tuned hyper-parameter -> values; empty for methods without one.
      min_tasks: the smallest number of tasks that it is defined for.
      features: whether it works on the features of a shared trunk (`mtjax.Staged`), whose `width` `make` then needs.
    """

    make: Callable[..., optim.Method]
    family: Family
    grid: Mapping[str, Sequence[Any]] = {}
    min_tasks: int = 1
    features: bool = False

    def settings(self) -> list[dict[str, Any]]:
        """The candidates of a tuned comparison, as arguments of `make`."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


RADII = (0.01, 0.05, 0.2)
"""Radii of perturbations that a tuned comparison tries."""


def flat(base: Callable[[], optim.Method]) -> Callable[..., optim.Method]:
    """Task-based flat regions over a method with its defaults."""
    return lambda rho=0.05: optim.flat_regions(base(), rho)


METHODS: dict[str, Entry] = {
    "Sum": Entry(optim.linear, "losses"),
    "SI": Entry(optim.scale_invariant, "losses"),
    "UW": Entry(optim.uncertainty, "losses"),
    "IMTL-L": Entry(optim.imtl_l, "losses"),
    "DWA": Entry(partial(optim.dwa, window=25), "losses", {"temperature": (1.0, 2.0, 5.0)}),
    "GLS": Entry(optim.gls, "losses"),
    "RLW": Entry(optim.rlw, "losses"),
    "Tchebycheff": Entry(optim.tchebycheff, "losses"),
    "STCH": Entry(partial(optim.stch, 1.0), "losses"),
    "COSMOS": Entry(lambda lambda_=1.0: optim.cosmos(None, lambda_), "losses", {"lambda_": (0.1, 1.0, 8.0)}),
    "PBI": Entry(lambda theta=5.0: optim.pbi(None, theta), "losses", {"theta": (1.0, 5.0)}),
    "FAMO": Entry(optim.famo, "losses", {"weight_decay": (1e-3, 1e-2)}),
    "MGDA": Entry(optim.mgda, "Gramian", {"normalize": ("none", "l2", "loss+")}),
    "PCGrad": Entry(optim.pcgrad, "Gramian"),
    "GradVac": Entry(optim.gradvac, "Gramian", {"beta": (0.01, 0.5)}),
    "CAGrad": Entry(optim.cagrad, "Gramian", {"c": (0.2, 0.5, 0.8)}),
    "IMTL-G": Entry(optim.imtl_g, "Gramian"),
    "Nash-MTL": Entry(optim.nash_mtl, "Gramian"),
    "FairGrad": Entry(partial(optim.fairgrad, alpha=2.0), "Gramian", {"alpha": (1.0, 2.0, 5.0)}),
    "Aligned-MTL": Entry(optim.aligned_mtl, "Gramian", {"scale_mode": ("min", "median", "rmse")}),
    "UPGrad": Entry(optim.upgrad, "Gramian"),
    "DualProj": Entry(optim.dual_proj, "Gramian"),
    "ConFIG": Entry(optim.config, "Gramian"),
    "PCD": Entry(optim.pcd, "Gramian", {"tau": (0.02, 0.2)}),
    "CR-MOGM": Entry(lambda decay=0.9: optim.cr_mogm(optim.mgda(), decay), "Gramian", {"decay": (0.9, 0.99)}),
    "GradNorm": Entry(optim.gradnorm, "Gramian", {"alpha": (0.12, 1.5)}),
    "Norm balance": Entry(optim.norm_balance, "Gramian", {"every": (100, 1000)}),
    "NTK balance": Entry(optim.ntk_balance, "Gramian", {"every": (100, 1000)}),
    "RGW": Entry(optim.rgw, "Gramian"),
    "GradDrop": Entry(optim.graddrop, "entries"),
    "Trimmed mean": Entry(optim.trimmed_mean, "entries", min_tasks=3),
    "Krum": Entry(optim.krum, "entries", min_tasks=4),
    "M-ConFIG": Entry(partial(optim.momentum_config, b2=None), "entries"),  # its own Adam is off: one follows here
    "MoCo": Entry(optim.moco, "entries", {"gamma": (0.01, 0.1)}),
    "DB-MTL": Entry(optim.db_mtl, "entries", {"beta": (0.1, 0.9)}),
    "ExcessMTL": Entry(optim.excess_mtl, "entries", {"eta": (1e-2, 1e-1)}),
    "CosReg": Entry(optim.cosreg, "entries", {"weight": (0.1, 1.0, 10.0)}),
    "RotoGrad": Entry(optim.rotograd, "entries", features=True),
    "MoDo": Entry(optim.modo, "batches", {"gamma": (1e-3, 0.1)}),
    "SDMGrad": Entry(optim.sdmgrad, "batches", {"lambda_": (0.1, 0.3, 1.0)}),
    "Auto-Lambda": Entry(optim.auto_lambda, "batches"),
    "MOML": Entry(optim.moml, "batches"),
    "FORUM": Entry(optim.forum, "batches"),
    "SAM": Entry(lambda rho=0.05: optim.sam(optim.linear(), rho), "flatness", {"rho": RADII}),
    "ASAM": Entry(lambda rho=0.5: optim.asam(optim.linear(), rho), "flatness", {"rho": (0.1, 0.5, 2.0)}),
    "F-Sum": Entry(flat(optim.linear), "flatness", {"rho": RADII}),
    "F-MGDA": Entry(flat(optim.mgda), "flatness", {"rho": RADII}),
    "F-PCGrad": Entry(flat(optim.pcgrad), "flatness", {"rho": RADII}),
    "F-CAGrad": Entry(flat(optim.cagrad), "flatness", {"rho": RADII}),
    "F-IMTL-G": Entry(flat(optim.imtl_g), "flatness", {"rho": RADII}),
    "F-Nash-MTL": Entry(flat(optim.nash_mtl), "flatness", {"rho": RADII}),
}


def chosen(names: Sequence[str], table: Mapping[str, Entry] = METHODS) -> tuple[str, ...]:
    """The names as they stand in the table, whatever the case in which they are typed.

    Raises:
      ValueError: for a name that is none of them.

    >>> chosen(["pcgrad", "SUM"])
    ('PCGrad', 'Sum')
    """
    known = {name.lower(): name for name in table}
    for name in names:
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"did you mean '{known[near[0]]}'? " if near else ""
            raise ValueError(f"--methods: there is no '{name}'; {hint}--methods list names all of them")
    return tuple(known[name.lower()] for name in names)
