r"""Multitask MLPs for tables: one model of which shared bottom, MMoE, PLE, STEM, AdaTT, ... are wirings.

    columns -> tokens -> flattened embedding(s) x[p] -> gated-expert levels -> z[m] -> one tower per task

`Wiring` says who reads whom: it stacks layouts of `mtjax.nn.experts`, the outputs of a level being the streams of the
next. `mtjax.models.mlp_baselines` has the published wirings.

`task=` computes only what that task's tower depends on, found backward through the levels; `extract` cuts the
parameters down to it.

Letters: T tasks, P streams, M outputs of a level, E experts, B batch, D embedding width, H expert output width.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from mtjax.nn.expert_use import expert_use
from mtjax.nn.experts import ExpertLayout, GatedExperts, LayoutPart, pick
from mtjax.nn.local_rows import pin_rows
from mtjax.nn.stacked import TaskHeads
from mtjax.nn.tokenizer import FeatureTokenizer, check_features

Initializer = nn.initializers.Initializer
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Wiring:
    """Who reads whom, from the embeddings to the towers.

    Attributes:
      layouts: one per level; the streams of a level are the outputs of the level before.
      tower_reads: for each task, the outputs of the last level that its tower reads, concatenated.
      embeddings: 1, all streams of the first level are one embedding; P, each has tables of its own.
    """

    layouts: Sequence[ExpertLayout]
    tower_reads: Sequence[Sequence[int]]
    embeddings: int = 1

    def __post_init__(self):
        object.__setattr__(self, "layouts", tuple(self.layouts))
        object.__setattr__(self, "tower_reads", tuple(tuple(reads) for reads in self.tower_reads))
        if not self.layouts:
            raise ValueError("layouts must hold at least one level, got none")
        if self.embeddings not in (1, self.layouts[0].num_streams):
            raise ValueError(
                f"embeddings must be 1 or the number of streams that the first level reads, "
                f"{self.layouts[0].num_streams}, got {self.embeddings}"
            )
        for level, (below, above) in enumerate(zip(self.layouts, self.layouts[1:], strict=False)):
            if above.num_streams > below.num_outputs:
                raise ValueError(
                    f"Level {level + 1} reads {above.num_streams} streams, but level {level} has only "
                    f"{below.num_outputs} outputs"
                )
        last = self.layouts[-1].num_outputs
        if len({len(reads) for reads in self.tower_reads}) != 1 or any(
            not 0 <= m < last for reads in self.tower_reads for m in reads
        ):
            raise ValueError(
                f"tower_reads must hold equally many outputs 0..{last - 1} per task, got {self.tower_reads}"
            )

    def parts(self, tasks: Sequence[int]) -> list[LayoutPart]:
        """Per level, what the towers of `tasks` depend on; streams and outputs of neighbours match in order."""
        wanted = sorted({m for task in tasks for m in self.tower_reads[task]})
        parts = []
        for layout in reversed(self.layouts):
            parts.append(layout.part(wanted))
            wanted = parts[-1].streams
        return parts[::-1]


class StackedEmbeddings(nn.Module):
    """P embeddings of the same columns, each with its own tables: batch -> f32[P, B, columns * width]."""

    stack: int
    cardinalities: Sequence[int]
    num_numeric: int
    width: int
    embedding_init: Initializer

    @nn.compact
    def __call__(self, batch: Mapping[str, Any], streams: Sequence[int]) -> jax.Array:
        """Embeds the columns with the tables of `streams` (static) only."""
        check_features(batch, self.cardinalities, self.num_numeric)
        if not self.cardinalities and not self.num_numeric:
            raise ValueError("A table without any input column has no embedding: give cardinalities or num_numeric")
        rows, tokens = np.asarray(streams), []
        if self.cardinalities:
            shape = (self.stack, int(np.sum(self.cardinalities)), self.width)
            table = self.param("table", self.embedding_init, shape)
            offsets = np.concatenate([[0], np.cumsum(self.cardinalities)[:-1]]).astype(np.int32)
            # One gather from the whole array: taking the streams' tables first would copy them.
            looked_up = table[rows[:, None, None], (batch["categorical"] + offsets[None])[None]]
            tokens.append(pin_rows(looked_up, axis=1, whole=True))
        if self.num_numeric:
            shape = (self.stack, self.num_numeric, self.width)
            weight = self.param("weight", self.embedding_init, shape)[rows]
            bias = self.param("bias", nn.initializers.zeros_init(), shape)[rows]
            tokens.append(batch["numeric"][None, :, :, None] * weight[:, None] + bias[:, None])
        x = jnp.concatenate(tokens, axis=2)
        return x.reshape(*x.shape[:2], -1)


class GatedExpertModel(nn.Module):
    """Embedding(s), gated-expert levels, towers.

    Attributes:
      heads: task name -> output size, in the order of the wiring's tasks.
      cardinalities: codes of each categorical column, the unknown code 0 included.
      num_numeric: numeric columns.
      wiring: who reads whom; see the presets.
      features: for each level, the hidden widths of its experts.
      tower: hidden widths of the towers, () for linear heads.
      width: of a column's embedding.
      gate_hidden: hidden widths of the gates, () for linear gates. (STEM's authors use (128, 64).)
      norm: None or 'layer', in experts, gates and towers.
      kernel_init: of experts, gates and towers.
      embedding_init: of tables and numeric weights.
    """

    heads: Mapping[str, int]
    cardinalities: Sequence[int]
    num_numeric: int
    wiring: Wiring
    features: Sequence[Sequence[int]]
    tower: Sequence[int] = (64,)
    width: int = 16
    gate_hidden: Sequence[int] = ()
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dropout: float = 0.0
    norm: str | None = None
    kernel_init: Initializer = nn.initializers.lecun_normal(batch_axis=(0,))
    embedding_init: Initializer = nn.initializers.normal(0.01)

    @nn.compact
    def __call__(
        self,
        batch: Mapping[str, Any],
        *,
        task: str | None = None,
        train: bool = False,
        aux: bool = False,
        expert_mask: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, jax.Array] | tuple[dict[str, jax.Array], dict[str, Any]]:
        """Predicts every task, or one.

        Args:
          batch: with "categorical" i32[B, C] and "numeric" f32[B, N].
          task: static; compute only what this task needs.
          train: whether dropout is on (rng collection "dropout").
          aux: also return {"expert_use": {"level_0": ExpertUse, ...}} of the part computed; rows whose
            batch["weight"] is 0 do not count.
          expert_mask: level name -> bool[E]; False removes an expert and renormalises the gates.

        Returns:
          task name -> f32[B], or f32[B, size]; with aux, a pair.
        """
        names = list(self.heads)
        levels = [f"level_{level}" for level in range(len(self.wiring.layouts))]
        if task is not None and task not in names:
            raise ValueError(f"task={task!r} is not one of the model's tasks: {', '.join(names)}")
        if (len(names), len(self.features)) != (len(self.wiring.tower_reads), len(levels)):
            raise ValueError(
                f"The wiring has {len(self.wiring.tower_reads)} tasks and {len(levels)} levels, the model "
                f"{len(names)} heads and features for {len(self.features)} levels"
            )
        masks = dict(expert_mask or {})
        if not set(masks) <= set(levels):
            raise ValueError(f"expert_mask names {', '.join(masks)}; the model's levels are {', '.join(levels)}")
        asked = range(len(names)) if task is None else [names.index(task)]
        parts = self.wiring.parts(asked)
        style = dict(activation=self.activation, dropout=self.dropout, norm=self.norm, kernel_init=self.kernel_init)

        x = self._embed(batch, parts[0].streams)
        use = {}
        for name, layout, part, features in zip(levels, self.wiring.layouts, parts, self.features, strict=True):
            layer = GatedExperts(layout, features, self.gate_hidden, **style, name=name)
            out = layer(x, outputs=part.outputs, expert_mask=masks.get(name), train=train)
            if aux:
                use[name] = expert_use(
                    out.gates,
                    out.experts,
                    out.layout,
                    weights=out.weights,
                    sample_weight=batch.get("weight"),
                )
            x = out.z

        reads = [[parts[-1].outputs.index(m) for m in self.wiring.tower_reads[k]] for k in asked]
        columns = [pick(x, column) for column in zip(*reads, strict=True)]  # what towers read first, second, ...
        if any(column.ndim == 3 for column in columns):
            columns = [jnp.broadcast_to(column, (len(reads), *x.shape[1:])) for column in columns]
        z = jnp.concatenate(columns, axis=-1)
        outputs = TaskHeads(self.heads, self.tower, **style, name="heads")(z, task=task, train=train)
        return (outputs, {"expert_use": use}) if aux else outputs

    def _embed(self, batch: Mapping[str, Any], streams: Sequence[int]) -> jax.Array:
        """f32[B, D] if all streams share one embedding, else f32[len(streams), B, D]."""
        columns = (self.cardinalities, self.num_numeric, self.width)
        if self.wiring.embeddings == 1:
            tokens = FeatureTokenizer(*columns, self.embedding_init, name="tokenizer")(batch)
            return tokens.reshape(tokens.shape[0], -1)
        return StackedEmbeddings(
            self.wiring.embeddings, *columns, embedding_init=self.embedding_init, name="embeddings"
        )(batch, streams)


def extract(model: GatedExpertModel, variables: PyTree, tasks: Sequence[str]) -> tuple[GatedExpertModel, PyTree]:
    """Cuts a model and its parameters down to what some tasks need, for deployment.

    Args:
      model: any preset.
      variables: as from `model.init`.
      tasks: names to keep.

    Returns:
      A smaller model and its variables, with the same outputs for these tasks.
    """
    names = list(model.heads)
    unknown = [name for name in tasks if name not in names]
    if unknown or not tasks:
        raise ValueError(f"tasks must name some of {', '.join(names)}, got {list(tasks)}")
    asked = [k for k, name in enumerate(names) if name in tasks]
    heads = {names[k]: model.heads[names[k]] for k in asked}
    parts = model.wiring.parts(asked)
    last = parts[-1].outputs
    wiring = Wiring(
        [part.layout for part in parts],
        [[last.index(m) for m in model.wiring.tower_reads[k]] for k in asked],
        len(parts[0].streams) if model.wiring.embeddings > 1 else 1,
    )

    def cut(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array | None:
        room, *rest = (str(key.key) for key in path)
        if room == "embeddings":
            streams = np.asarray(parts[0].streams)
            return leaf[streams] if len(streams) > 1 else leaf[streams[0]]
        if room == "heads":
            out_size = rest[0].removeprefix("out_")
            stack = names if rest[0] == "tower" else [n for n in names if str(model.heads[n]) == out_size]
            kept = [i for i, name in enumerate(stack) if name in heads]
            return leaf[np.asarray(kept)] if kept else None
        if room.startswith("level_"):
            part = parts[int(room.removeprefix("level_"))]
            outputs, experts = np.asarray(part.outputs), np.asarray(part.experts)
            if rest[0] == "experts":
                return leaf[experts]
            unused = not (np.any(part.layout.learned_residual) if rest[0] == "residual" else part.layout.gated)
            if unused:  # a reader with one expert left has no gate
                return None
            return leaf[outputs] if rest[0] == "gate_hidden" else leaf[outputs][..., experts]
        return leaf

    small = _without_none(jax.tree_util.tree_map_with_path(cut, variables["params"]))
    if wiring.embeddings == 1 and "embeddings" in small:  # one embedding left: no longer a stack
        small["tokenizer"] = small.pop("embeddings")
    return model.clone(heads=FrozenDict(heads), wiring=wiring), {"params": small}


def _without_none(tree: PyTree) -> PyTree:
    """A nested dict without None leaves and without the dicts that become empty."""
    if not isinstance(tree, Mapping):
        return tree
    children = {key: _without_none(child) for key, child in tree.items() if child is not None}
    return {key: child for key, child in children.items() if not isinstance(child, Mapping) or child}
