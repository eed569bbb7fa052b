"""Training rows per second of MultiTab-Net in mtjax beside a plain PyTorch implementation of the same network.

    python experiments/bench/tabular.py            # both sides, all sizes, JSON under experiments/bench/results
    python experiments/bench/tabular.py --quick    # the same path with tiny sizes

Both sides run in one process, in turns, on the same data, with the same number of threads, batch size, loss, optimiser
(AdamW) and parameter shapes; each turn is a number of steps after warm-up, and the median over turns is reported.
Compilation is timed beside it, not in it. Without PyTorch the mtjax side runs alone and no ratio is printed.

Sizes: `acs` (2 tasks, 10 categorical columns, attention across the rows of the batch) and `higgs` (8 tasks, 21 columns,
token mixer) of the paper's configurations, width 16, batch 2048; and the `higgs` size with 1 to 32 task tokens, whose
time per step should grow no faster than the tokens' own share of the sequence.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import mtjax
from mtjax.models.multitab import MultiTabNet
from mtjax.train.state import TrainState
from mtjax.train.step import make_train_step, supervised_loss
from mtjax.train.loop import TrainConfig

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Size:
    """One network and its data."""

    name: str
    tasks: tuple[mtjax.Task, ...]
    cardinalities: tuple[int, ...]
    num_numeric: int
    row_mixing: str
    width: int = 16
    num_heads: int = 4
    ff_width: int = 256
    batch: int = 2048


def higgs(num_tasks: int = 8, **changes) -> Size:
    tasks = (mtjax.Task("target", "binary"), *(mtjax.Task(f"mass_{k}", "regression") for k in range(num_tasks - 1)))
    return Size(f"higgs_{num_tasks}", tasks, (4, 4, 4, 4), 17, "token_mixer", **changes)


def acs(**changes) -> Size:
    tasks = (mtjax.Task("income", "binary"), mtjax.Task("marital", "multiclass", num_classes=5))
    cards = (95, 10, 25, 531, 18, 19, 225, 3, 10, 100)
    return Size("acs", tasks, cards, 0, "flat_attention", **changes)


def make_batch(size: Size) -> dict:
    """Random columns and labels, NumPy."""
    rng = np.random.default_rng(0)
    labels = {}
    for task in size.tasks:
        values = (
            rng.normal(size=size.batch)
            if task.kind == "regression"
            else rng.integers(0, max(2, task.output_size), size.batch)
        )
        labels[task.name] = values.astype(np.float32)
    columns = [rng.integers(0, c, size.batch) for c in size.cardinalities]
    return {
        "categorical": np.stack(columns, axis=1).astype(np.int32),
        "numeric": rng.normal(size=(size.batch, size.num_numeric)).astype(np.float32),
        "labels": labels,
    }


def jax_side(size: Size, batch: dict) -> tuple[Callable[[int], float], float]:
    """A function that runs n steps and returns seconds, and the seconds of compilation."""
    model = MultiTabNet(
        mtjax.head_sizes(size.tasks),
        size.cardinalities,
        size.num_numeric,
        width=size.width,
        num_heads=size.num_heads,
        ff_width=size.ff_width,
        row_mixing=size.row_mixing,
    )
    config = TrainConfig()
    method = mtjax.optim.linear("sum")
    batch = jax.tree.map(jnp.asarray, batch)

    def init_params(key):
        return model.init({"params": key, "dropout": key}, batch, train=True)["params"]

    state = jax.jit(
        lambda seed: TrainState.create(init_params, method, config.optimizer, seed, 1e-3, num_tasks=len(size.tasks))
    )(0)
    step = make_train_step(supervised_loss(model, size.tasks), method, config.optimizer)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    compile_s = time.perf_counter() - began
    holder = [state]

    def run(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            holder[0], metrics = compiled(holder[0], batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began

    return run, compile_s


def torch_side(size: Size, batch: dict) -> Callable[[int], float]:
    """The same network in plain PyTorch: modules per column and per task, `nn.MultiheadAttention`."""
    import torch
    from torch import nn

    width, hidden = size.width, size.ff_width

    class Layer(nn.Module):
        """Pre-norm transformer layer; `attend=False` keeps values and output map only (token mixer)."""

        def __init__(self, dim, attend=True):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.attention = nn.MultiheadAttention(dim, size.num_heads, batch_first=True) if attend else None
            if not attend:
                self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.ff = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

        def forward(self, x, mask=None):
            h = self.norm_1(x)
            if self.attention is None:
                h = self.out(self.value(h))
            else:
                h = self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
            x = x + h
            return x + self.ff(self.norm_2(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(c, width) for c in size.cardinalities)
            self.affine = nn.ModuleList(nn.Linear(1, width) for _ in range(size.num_numeric))
            self.task_tokens = nn.Parameter(0.01 * torch.randn(len(size.tasks), width))
            tokens = len(size.tasks) + len(self.tables) + len(self.affine)
            self.column = Layer(width)
            self.row = Layer(tokens * width, attend=size.row_mixing == "flat_attention")
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, t.output_size)) for t in size.tasks
            )
            blocked = ~torch.from_numpy(
                mtjax.nn.attention.multitask_mask(len(size.tasks), tokens - len(size.tasks), "TxT")
            )
            self.register_buffer("mask", blocked)

        def forward(self, categorical, numeric):
            columns = [table(categorical[:, i]) for i, table in enumerate(self.tables)]
            columns += [affine(numeric[:, i : i + 1]) for i, affine in enumerate(self.affine)]
            x = torch.stack(columns, 1)
            x = torch.cat([self.task_tokens.expand(x.shape[0], -1, -1), x], 1)
            x = self.column(x, self.mask)
            flat = x.flatten(1)
            flat = self.row(flat[None])[0] if size.row_mixing == "flat_attention" else self.row(flat)
            x = flat.view_as(x)
            return [head(x[:, k]) for k, head in enumerate(self.heads)]

    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-5)
    categorical = torch.from_numpy(batch["categorical"]).long()
    numeric = torch.from_numpy(batch["numeric"])
    labels = [torch.from_numpy(batch["labels"][t.name]) for t in size.tasks]
    kinds = {
        "binary": lambda out, y: nn.functional.binary_cross_entropy_with_logits(out[:, 0], y),
        "regression": lambda out, y: nn.functional.mse_loss(out[:, 0], y),
        "multiclass": lambda out, y: nn.functional.cross_entropy(out, y.long()),
    }

    def run(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            outputs = net(categorical, numeric)
            loss = sum(kinds[t.kind](out, y) for t, out, y in zip(size.tasks, outputs, labels, strict=True))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return time.perf_counter() - began

    return run
