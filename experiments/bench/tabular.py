"""Training rows per second of MultiTab-Net in mtjax beside a plain PyTorch implementation of the same network.

    python experiments/bench/tabular.py            # both sides, all sizes, JSON under experiments/bench/results
    python experiments/bench/tabular.py --quick    # the same path with tiny sizes, no file

Both sides run in one process, in turns, on the same data, with the same number of threads, batch size, losses,
optimiser (AdamW) and network; a turn is a few steps after warm-up. The ratio is that of the medians over turns, with
the smallest and largest ratio of neighbouring turns beside it. Compilation is timed apart. Without PyTorch (extra
`bench`) the mtjax side runs alone and no ratio is printed.

Sizes: `acs` (2 tasks, 10 categorical columns, attention across the 2048 rows of the batch) and `higgs` (8 tasks, 21
columns, token mixer) of the paper's configurations, width 16, batch 2048. Then the columns of `higgs` without row
mixing and with 1 to 32 task tokens: the step should grow no faster than the arithmetic, whatever the number of heads.
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
from mtjax.nn.attention import multitask_mask
from mtjax.train.loop import TrainConfig
from mtjax.train.report import provenance
from mtjax.train.state import TrainState
from mtjax.train.step import make_train_step, supervised_loss

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
    return Size("higgs", tasks, (4, 4, 4, 4), 17, **({"row_mixing": "token_mixer"} | changes))


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
    """A function that runs n steps and returns seconds; and the seconds of tracing and compiling the step."""
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
            allowed = multitask_mask(len(size.tasks), tokens - len(size.tasks), "TxT")
            self.register_buffer("mask", ~torch.from_numpy(allowed))

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


def measure(size: Size, *, turns: int, steps: int, torch: bool) -> dict:
    """Times both sides in turns."""
    batch = make_batch(size)
    ours, compile_s = jax_side(size, batch)
    theirs = torch_side(size, batch) if torch else None
    for side in filter(None, (ours, theirs)):
        side(2)
    pairs = [(ours(steps) / steps, theirs(steps) / steps if theirs else None) for _ in range(turns)]
    row = {
        "size": size.name,
        "tasks": len(size.tasks),
        "row_mixing": size.row_mixing,
        "batch": size.batch,
        "turns": turns,
        "compile_s": round(compile_s, 2),
        "mtjax_ms": round(1e3 * statistics.median(a for a, _ in pairs), 2),
    }
    row["mtjax_rows_per_s"] = round(1e3 * size.batch / row["mtjax_ms"])
    if theirs:
        row["torch_ms"] = round(1e3 * statistics.median(b for _, b in pairs), 2)
        row["torch_rows_per_s"] = round(1e3 * size.batch / row["torch_ms"])
        row["ratio"] = round(row["torch_ms"] / row["mtjax_ms"], 2)
        row["ratio_range"] = [round(f(b / a for a, b in pairs), 2) for f in (min, max)]
    return row


def multiply_adds(num_tasks: int, size: Size) -> float:
    """Of a row's forward pass without row mixing: keys and values of all n tokens, the rest for the T that are read."""
    n, d = num_tasks + len(size.cardinalities) + size.num_numeric, size.width
    per_read_token = 2 * d * d + 2 * n * d + 2 * d * size.ff_width + (d + 1) * 64
    return 2 * n * d * d + num_tasks * per_read_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two turns, no file")
    parser.add_argument("--turns", type=int, default=9, help="turns per side")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of PyTorch")
    args = parser.parse_args()
    where = provenance(outputs=[RESULTS])
    try:
        import torch

        torch.set_num_threads(args.threads)
        torch_version = torch.__version__
    except ImportError:
        torch_version = None
        print("PyTorch is not installed (pip install 'mtjax[bench]'): timing mtjax alone")

    changes = {"batch": 64, "ff_width": 16} if args.quick else {}
    turns, steps = (2, 1) if args.quick else (args.turns, 3)
    sizes = [higgs(**changes), acs(**changes)]
    counts = (1, 8) if args.quick else (1, 2, 4, 8, 16, 32)
    rows = [measure(size, turns=turns, steps=steps, torch=torch_version is not None) for size in sizes]
    for row in rows:
        beside = f", PyTorch {row['torch_rows_per_s']:,} rows/s, ratio {row['ratio']} {row['ratio_range']}"
        print(
            f"{row['size']}: mtjax {row['mtjax_rows_per_s']:,} rows/s{beside if 'ratio' in row else ''}; "
            f"compile {row['compile_s']} s",
            flush=True,
        )
    scan = []
    for num_tasks in counts:
        size = higgs(num_tasks, row_mixing="none", **changes)
        row = measure(size, turns=turns, steps=steps, torch=False)
        row["multiply_adds_relative"] = round(multiply_adds(num_tasks, size) / multiply_adds(counts[0], size), 2)
        scan.append(row)
        row["time_relative"] = round(row["mtjax_ms"] / scan[0]["mtjax_ms"], 2)
        print(
            f"{num_tasks} task tokens: {row['mtjax_ms']} ms, {row['time_relative']} x the time and "
            f"{row['multiply_adds_relative']} x the multiply-adds of one; compile {row['compile_s']} s",
            flush=True,
        )
    if not args.quick:
        where["versions"]["torch"] = torch_version
        content = {"benchmark": "tabular", **where, "threads": args.threads}
        content |= {"beside_torch": rows, "task_tokens": scan}
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "tabular.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
