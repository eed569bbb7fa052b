"""The models that `multitab.py` compares, and the sizes and budgets they share.

Every model is built from the same `Config`, so that a comparison is one of architectures: equal widths, equal tuning
grid, equal budget. The names are those of the command line.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import mtjax
from mtjax.models import ft_transformer, mlp_baselines, multitab, saint, tab_transformer
from mtjax.train.loop import TrainConfig

DEMO_TRAIN = TrainConfig(batch_size=512, max_epochs=6, patience=2, conflict_rows=512)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and budgets. `--set width=16 train.batch_size=1024` overrides any field.

    Attributes:
      rows: train, validation and test rows of embedded data; None takes all.
      width: token width of transformers, embedding width of MLP models.
      num_heads: attention heads.
      ff_width: hidden width of feed-forward nets.
      num_blocks: blocks of MultiTab-Net.
      dropout: rate in feed-forward nets, attention and MLPs.
      mlp: hidden widths of MLPs and experts (a single-task MLP has `head` in addition).
      head: hidden width of task heads.
      mmoe_experts: experts of MMoE and OMoE.
      task_experts: experts per task of PLE, CGC, STEM and AdaTT.
      shared_experts: shared experts of the same.
      learning_rates: the tuning grid, the same for every model.
      seeds: number of seeds.
      bench_seeds: number of seeds of the MultiTab-Bench sweep; a difference of differences needs more.
      bench_tasks: numbers of tasks in the MultiTab-Bench sweep.
      bench_features: its number of input columns.
      train: see `TrainConfig`.
    """

    rows: tuple[int, ...] | None = (12_288, 6_144, 12_288)
    width: int = 8
    num_heads: int = 2
    ff_width: int = 64
    num_blocks: int = 1
    dropout: float = 0.0
    mlp: tuple[int, ...] = (128, 64)
    head: int = 64
    mmoe_experts: int = 8
    task_experts: int = 2
    shared_experts: int = 4
    learning_rates: tuple[float, ...] = (1e-3, 4e-3)
    seeds: int = 3
    bench_seeds: int = 5
    bench_tasks: tuple[int, ...] = (2, 4, 8)
    bench_features: int = 16
    train: TrainConfig = DEMO_TRAIN

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {self.seeds}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates must hold at least one number > 0, got {self.learning_rates}")
        if self.rows is not None and (len(self.rows) != 3 or min(self.rows) < 1):
            raise ValueError(f"rows must be (train, validation, test) or None, got {self.rows}")


DEMO = Config()
SMOKE = Config(
    rows=(512, 256, 256),
    ff_width=16,
    mlp=(16, 8),
    head=8,
    mmoe_experts=2,
    task_experts=1,
    shared_experts=1,
    learning_rates=(4e-3,),
    seeds=2,
    bench_seeds=2,
    bench_tasks=(2,),
    train=TrainConfig(batch_size=128, max_epochs=2, conflict_rows=64),
)
# Higgs of the paper: 8 tasks, width 16, batch 2048, constant rate 1e-3, no dropout, patience 5, 5 seeds.
PAPER = Config(
    rows=None,
    width=16,
    num_heads=4,
    ff_width=256,
    mlp=(256, 128),
    task_experts=1,
    shared_experts=1,
    learning_rates=(1e-4, 1e-3),
    seeds=5,
    bench_tasks=(7,),
    bench_features=32,
    train=TrainConfig(batch_size=2048, max_epochs=100, patience=5, eval_batch_size=16_384),
)
PRESETS = {"smoke": SMOKE, "demo": DEMO, "paper": PAPER}


def _multitab(**fields):
    def build(shape, c: Config):
        dropout = {"ff_dropout": c.dropout, "attention_dropout": c.dropout}
        sizes = {"width": c.width, "num_heads": c.num_heads, "ff_width": c.ff_width, "head_hidden": (c.head,)}
        return multitab.MultiTabNet(*shape, num_blocks=c.num_blocks, **sizes, **dropout, **fields)

    return build


def _mlp(preset, features, **sizes):
    """`features`: Config -> widths of the preset; `sizes`: its other arguments by the names of Config fields."""

    def build(shape, c: Config):
        tower = () if preset is mlp_baselines.single_task else (c.head,)
        experts = {name: getattr(c, field) for name, field in sizes.items()}
        return preset(*shape, features=features(c), width=c.width, dropout=c.dropout, tower=tower, **experts)

    return build


def _transformer(preset):
    def build(shape, c: Config):
        dropout = {"ff_dropout": c.dropout, "attention_dropout": c.dropout, "head_dropout": c.dropout}
        sizes = {"width": c.width, "num_heads": c.num_heads, "ff_width": c.ff_width, "head_hidden": (c.head,)}
        return preset(*shape, **sizes, **dropout)

    return build


def _one_level(c: Config):
    return [c.mlp]


def _level_per_width(c: Config):
    return [(width,) for width in c.mlp]


_GROUPS = {"task_experts": "task_experts", "shared_experts": "shared_experts"}
MODELS = {
    "single-task MLP": _mlp(mlp_baselines.single_task, lambda c: (*c.mlp, c.head)),
    "shared bottom": _mlp(mlp_baselines.shared_bottom, lambda c: c.mlp),
    "MMoE": _mlp(mlp_baselines.mmoe, lambda c: c.mlp, experts="mmoe_experts"),
    "PLE": _mlp(mlp_baselines.ple, _level_per_width, **_GROUPS),
    "MultiTab-Net": _multitab(),
    "MultiTab-Net, one token": _multitab(multi_token=False),
    "MultiTab-Net, no mask": _multitab(mask="none"),
    "MultiTab-Net, FxT": _multitab(mask="FxT"),
    "MultiTab-Net, FxT_TxT": _multitab(mask="FxT_TxT"),
    "MultiTab-Net, flat attention": _multitab(row_mixing="flat_attention"),
    "MultiTab-Net, axial attention": _multitab(row_mixing="axial_attention"),
    "MultiTab-Net, no row mixing": _multitab(row_mixing="none"),
    "OMoE": _mlp(mlp_baselines.omoe, lambda c: c.mlp, experts="mmoe_experts"),
    "CGC": _mlp(mlp_baselines.cgc, lambda c: c.mlp, **_GROUPS),
    "STEM": _mlp(mlp_baselines.stem, _one_level, **_GROUPS),
    "AdaTT": _mlp(mlp_baselines.adatt, _level_per_width, **_GROUPS),
    "FT-Transformer": _transformer(ft_transformer.single_task_ft_transformer),
    "TabTransformer": _transformer(tab_transformer.single_task_tab_transformer),
    "SAINT": _transformer(saint.single_task_saint),
}
SINGLE_TASK = ("single-task MLP", "FT-Transformer", "TabTransformer", "SAINT")


def model_shape(tasks: Sequence[mtjax.Task], data: Any) -> tuple[Mapping[str, int], tuple[int, ...], int]:
    """heads, cardinalities, num_numeric: what a model needs to know of the data."""
    return mtjax.head_sizes(tasks), tuple(data.cardinalities), data.num_numeric


def slug(name: str) -> str:
    """The name of a model as that of a folder."""
    return name.lower().replace(", ", "-").replace(" ", "_")
