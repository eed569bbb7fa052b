"""The PyTorch side of `objectives.py`: TorchJD 0.18 at its fastest settings, and formulas written from the papers.

TorchJD offers several ways to the same update: `autojac` with all backward passes in one vmap or one after the other,
and `autogram` (the Gramian by hooks, then a weighted backward pass). Which is fastest depends on the size, so each cell
of the benchmark tries them on one method and takes the winner for all methods that allow it. Gramian methods get
`optimize_gramian_computation=True`, and Adam is the fused one. TorchJD's UPGrad and DualProj need qpsolvers and
quadprog; CAGrad and Nash-MTL need cvxpy with clarabel and ecos. What is not installed is listed and left out.

Formulas: PCGrad on dense gradients (Yu et al. 2020, algorithm 1), K backward passes with a retained graph, which is how
LibMTL and the paper's own code do it.

Letters: K tasks, P parameters.
"""

import functools
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from objectives_measure import LEARNING_RATE, Network, Timed
from torch import nn
from torchjd import aggregation, scalarization
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac, jac_to_grad

# Names as in `experiments/objectives/methods.py`; hyper-parameters as there where TorchJD sets none.
AGGREGATORS: dict[str, Callable[[int], aggregation.Aggregator]] = {
    "MGDA": lambda num_tasks: aggregation.MGDA(),
    "PCGrad": lambda num_tasks: aggregation.PCGrad(),
    "GradVac": lambda num_tasks: aggregation.GradVac(),
    "CAGrad": lambda num_tasks: aggregation.CAGrad(c=0.5),
    "IMTL-G": lambda num_tasks: aggregation.IMTLG(),
    "Nash-MTL": lambda num_tasks: aggregation.NashMTL(n_tasks=num_tasks),
    "FairGrad": lambda num_tasks: aggregation.FairGrad(alpha=1.0),
    "Aligned-MTL": lambda num_tasks: aggregation.AlignedMTL(),
    "UPGrad": lambda num_tasks: aggregation.UPGrad(),
    "DualProj": lambda num_tasks: aggregation.DualProj(),
    "PCD": lambda num_tasks: aggregation.PCD(),
    "GradDrop": lambda num_tasks: aggregation.GradDrop(),
    "Trimmed mean": lambda num_tasks: aggregation.TrimmedMean(trim_number=max(0, (num_tasks - 1) // 4)),
    "ConFIG": lambda num_tasks: aggregation.ConFIG(),
    "ExcessMTL": lambda num_tasks: aggregation.ExcessMTL(),
}

# Largest K x P that a method is run at: beyond it one step takes minutes (an SVD of the Jacobian, K^2 passes over it).
LARGEST = {"ConFIG": 5e7, "PCGrad, dense": 2.1e8}


def make_aggregator(name: str, num_tasks: int) -> aggregation.Aggregator | str:
    """TorchJD's aggregator, or why there is none."""
    if name not in AGGREGATORS:
        return "not in TorchJD"
    try:
        return AGGREGATORS[name](num_tasks)
    except ImportError as error:
        return str(error).split(".")[0]


def is_gramian(aggregator: aggregation.Aggregator) -> bool:
    return isinstance(aggregator, aggregation.GramianWeightedAggregator)


# The device that JAX runs on.
DEVICE = "cuda" if jax.default_backend() == "gpu" else "cpu"


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


def wait() -> None:
    """Until the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(name: str, function: Callable[[], Any]) -> Timed:
    def run(steps: int) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(steps):
            function()
        wait()
        return time.perf_counter() - began

    return Timed(name, run)


class Side:
    """The network in PyTorch, with the same parameters and batch, and its steps.

    Attributes:
      chunk_size: of `autojac`: None (one vmap over all backward passes) or 1 (one after the other).
      by_hooks: whether Gramian methods go by `autogram`.
    """

    def __init__(self, network: Network):
        layers = []
        for layer in network.params:
            linear = nn.Linear(*layer["w"].shape)
            with torch.no_grad():
                linear.weight.copy_(tensor(layer["w"].T.copy()))
                linear.bias.copy_(tensor(layer["b"]))
            layers += [linear, nn.ReLU()]
        self.network = network
        self.net = nn.Sequential(*layers[:-1]).to(DEVICE)
        self.x, self.y = tensor(network.x), tensor(network.y)
        self.params = list(self.net.parameters())
        self.optimizer = torch.optim.Adam(self.params, lr=LEARNING_RATE, fused=True)
        self.chunk_size: int | None = None
        self.by_hooks = False

    def losses(self) -> torch.Tensor:
        return ((self.net(self.x) - self.y) ** 2).mean(0)

    def plain_step(self) -> None:
        self.optimizer.zero_grad()
        self.losses().sum().backward()
        self.optimizer.step()

    def jacobian(self) -> tuple[torch.Tensor, ...]:
        return jac(self.losses(), self.params, parallel_chunk_size=self.chunk_size)

    def jacobian_step(self, aggregator: aggregation.Aggregator) -> None:
        """One step by `autojac`."""
        self.optimizer.zero_grad()
        backward(self.losses(), inputs=self.params, parallel_chunk_size=self.chunk_size)
        options = {"optimize_gramian_computation": True} if is_gramian(aggregator) else {}
        jac_to_grad(self.params, aggregator, **options)
        self.optimizer.step()

    @functools.cached_property
    def hooked(self) -> tuple["Side", Engine]:
        """A network of its own for `autogram`, whose hooks stay and would slow the other routes."""
        twin = Side(self.network)
        return twin, Engine(twin.net, batch_dim=None)

    def gramian_step(self, aggregator: aggregation.GramianWeightedAggregator) -> None:
        """One step by `autogram`."""
        twin, engine = self.hooked
        losses = twin.losses()
        weights = aggregator.gramian_weighting(engine.compute_gramian(losses))
        twin.optimizer.zero_grad()
        losses.backward(weights)
        twin.optimizer.step()

    def step(self, aggregator: aggregation.Aggregator) -> None:
        """One step by the fastest route that the aggregator allows."""
        if self.by_hooks and is_gramian(aggregator):
            self.gramian_step(aggregator)
        else:
            self.jacobian_step(aggregator)

    def choose_route(self, seconds: float) -> dict[str, float]:
        """Tries the routes on MGDA and sets the fastest; returns the milliseconds of a step of each."""
        aggregator, taken = aggregation.MGDA(), {}
        for name, self.chunk_size in (("autojac, vmap", None), ("autojac, one by one", 1)):
            taken[name] = _fastest(lambda: self.jacobian_step(aggregator), seconds)
        self.chunk_size = None if taken["autojac, vmap"] <= taken["autojac, one by one"] else 1
        taken["autogram"] = _fastest(lambda: self.gramian_step(aggregator), seconds)
        self.by_hooks = min(taken, key=taken.get) == "autogram"
        if not self.by_hooks:
            del self.hooked
        return {name: round(1e3 * value, 2) for name, value in taken.items()}

    def uncertainty_step(self) -> Callable[[], None]:
        """Uncertainty weighting: the step as a function, with its learned variances and their optimiser."""
        scalarizer = scalarization.UW(self.network.num_tasks).to(DEVICE)
        optimizer = torch.optim.Adam(scalarizer.parameters(), lr=1e-3, fused=True)

        def step():
            self.optimizer.zero_grad()
            optimizer.zero_grad()
            scalarizer(self.losses()).backward()
            self.optimizer.step()
            optimizer.step()

        return step

    def dense_pcgrad_step(self) -> None:
        """PCGrad as it is usually written: K backward passes, K^2 projections of vectors of length P."""
        losses = self.losses()
        gradients = [torch.autograd.grad(loss, self.params, retain_graph=True) for loss in losses]
        rows = torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in gradients])
        pieces = dense_pcgrad(rows, np.random.default_rng(0)).split([p.numel() for p in self.params])
        for param, piece in zip(self.params, pieces, strict=True):
            param.grad = piece.view_as(param)
        self.optimizer.step()


def _fastest(function: Callable[[], None], seconds: float) -> float:
    """The shortest of a few runs, in seconds."""
    times = []
    while len(times) < 2 or (len(times) < 6 and sum(times) < seconds):
        wait()
        began = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - began)
    return min(times)


def dense_pcgrad(rows: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Sum over i of g_i, projected onto the normal planes of the g_j that it conflicts with, in random order.

    Args:
      rows: f32[K, P], the gradients.
      rng: of the orders.

    Returns:
      f32[P].
    """
    squared = (rows * rows).sum(1)
    total = torch.zeros_like(rows[0])
    for i in range(rows.shape[0]):
        mine = rows[i].clone()
        for j in rng.permutation(rows.shape[0]):
            if j == i:
                continue
            dot = torch.dot(mine, rows[j])
            if dot < 0:
                mine -= dot / squared[j] * rows[j]
        total += mine
    return total


def timed_weighting(name: str, aggregator: aggregation.GramianWeightedAggregator, gradients: np.ndarray) -> Timed:
    """Gramian -> weights."""
    rows = tensor(gradients)
    gram = rows @ rows.T
    return timed(name, lambda: aggregator.gramian_weighting(gram))


def as_matrix(jacobians: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Per-parameter Jacobians -> [K, P], which is what aggregators take."""
    return torch.cat([jacobian.flatten(1) for jacobian in jacobians], dim=1)


def too_large(name: str, network: Network) -> bool:
    return network.num_tasks * network.num_params > LARGEST.get(name, float("inf"))


def setup(threads: int) -> dict[str, str]:
    """Threads of PyTorch; returns the versions."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # Full float32 products on both sides (see `objectives.main`).
    torch.backends.cuda.matmul.allow_tf32 = False
    return {"torch": torch.__version__, "torchjd": importlib.metadata.version("torchjd")}
