r"""Gated experts: the one layer behind shared bottom, OMoE, MMoE, CGC, PLE, STEM and AdaTT.

M outputs read a pool of E expert networks through gates. Three masks say who reads whom, and how:

    G[m]  = softmax over {e : V[m, e]} of  W_m u_m + b_m          u_m = sum of the streams that feed gate m
    z[m]  = sum_e (G[m, e] + R[m, e]) E_e(x[stream of e])         E_e is a constant for reader m where S[m, e]

V visibility, S stop-gradient (the gate of a detached expert still learns), R residual weight, fixed or learned. Every
published architecture is a choice of these masks and of the streams, i.e. an `ExpertLayout`; it is data, known before
compilation, so asking for some outputs only leaves out the experts, gates and streams which nothing asked for reads.

References:
  Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018 (MMoE).
  Tang et al., "Progressive Layered Extraction (PLE)", RecSys 2020. Su et al., "STEM: Unleashing the Power of
  Embeddings for Multi-task Recommendation", AAAI 2024. Li et al., "AdaTT: Adaptive Task-to-Task Fusion Network", KDD
  2023, equations 1-6 (the residual R).

Letters: P streams, M outputs, E experts, B batch, D input width, H expert output width.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtjax.nn.local_rows import pin_rows
from mtjax.nn.stacked import StackedMLP

Initializer = nn.initializers.Initializer


@dataclasses.dataclass(frozen=True)
class ExpertLayout:
    """Who reads whom in a gated-expert layer: static, hashable, checked on construction.

    Masks may be given as nested sequences or numpy arrays; they are stored as tuples.

    Attributes:
      visible: V, bool[M, E]; every output sees at least one expert.
      expert_stream: for each expert, the input stream that it reads; stream 0 by default.
      gate_stream: for each output, the stream, or the tuple of streams to sum, that its gate reads; 0 by default.
      detached: S, bool[M, E]; True where reader m treats expert e as a constant.
      residual: R, float[M, E], the fixed part of what is added to the gate after its softmax.
      learned_residual: bool[M, E]; True where R has a learned entry too, drawn from U(-1/sqrt(r), 1/sqrt(r)) with r
        such entries in the row (AdaTT).
      expert_owner: for each expert, the output that it belongs to, or None for a shared one (for diagnostics).
      shared_output: the output that belongs to no task but feeds the next level, if there is one.

    Raises:
      ValueError: a sentence that names the argument, what it should be and what it is.

    >>> cgc = ExpertLayout([[1, 0, 1], [0, 1, 1]], expert_owner=(0, 1, None))
    >>> cgc.num_outputs, cgc.num_experts, cgc.num_streams
    (2, 3, 1)
    >>> cgc.part((1,)).experts
    (1, 2)
    """

    visible: Sequence[Sequence[bool]]
    _: dataclasses.KW_ONLY
    expert_stream: Sequence[int] | None = None
    gate_stream: Sequence[int | Sequence[int]] | None = None
    detached: Sequence[Sequence[bool]] | None = None
    residual: Sequence[Sequence[float]] | None = None
    learned_residual: Sequence[Sequence[bool]] | None = None
    expert_owner: Sequence[int | None] | None = None
    shared_output: int | None = None

    def __post_init__(self):
        visible = np.asarray(self.visible)
        if visible.ndim != 2 or 0 in visible.shape:
            raise ValueError(f"visible must be a matrix bool[outputs, experts] with entries, got shape {visible.shape}")
        num_outputs, num_experts = visible.shape
        for name, kind in [
            ("visible", bool),
            ("detached", bool),
            ("residual", float),
            ("learned_residual", bool),
        ]:
            value = getattr(self, name)
            matrix = np.zeros(visible.shape, kind) if value is None else np.asarray(value)
            if matrix.shape != visible.shape:
                raise ValueError(f"{name} must have the shape of visible, {visible.shape}, got {matrix.shape}")
            if kind is bool and not np.isin(matrix, (0, 1)).all():
                raise ValueError(f"{name} must hold True and False only, got {np.unique(matrix).tolist()}")
            object.__setattr__(self, name, tuple(tuple(row) for row in matrix.astype(kind).tolist()))
        if not visible.any(1).all():
            raise ValueError(f"Output {int(np.argmin(visible.any(1)))} sees no expert; a gate needs at least one")
        defaults = {
            "expert_stream": (0,) * num_experts,
            "gate_stream": (0,) * num_outputs,
            "expert_owner": (None,) * num_experts,
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            value = default if value is None else tuple(value)
            if name != "gate_stream":
                value = tuple(None if v is None else int(v) for v in value)
            if len(value) != len(default):
                counted = "output" if name == "gate_stream" else "expert"
                raise ValueError(f"{name} must hold one entry per {counted}, {len(default)}, got {len(value)}")
            object.__setattr__(self, name, value)
        streams = tuple(tuple(np.atleast_1d(s).tolist()) for s in self.gate_stream)
        object.__setattr__(self, "gate_stream", streams)
        if min(self.expert_stream) < 0 or any(len(s) == 0 or min(s) < 0 for s in streams):
            raise ValueError(
                "Streams are counted from 0 and every gate reads at least one, got "
                f"expert_stream={self.expert_stream}, gate_stream={streams}"
            )
        outputs = [owner for owner in (*self.expert_owner, self.shared_output) if owner is not None]
        if any(not 0 <= owner < num_outputs for owner in outputs):
            raise ValueError(
                f"expert_owner and shared_output name outputs 0..{num_outputs - 1} or None, got "
                f"{self.expert_owner} and {self.shared_output}"
            )

    @property
    def num_outputs(self) -> int:
        """M."""
        return len(self.visible)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.visible[0])

    @property
    def num_streams(self) -> int:
        """P: the streams up to the last one that is read."""
        return 1 + max(*self.expert_stream, *(s for streams in self.gate_stream for s in streams))

    @property
    def gated(self) -> bool:
        """Whether any output has a choice; if none has, the layer has no gate parameters."""
        return bool((np.sum(self.visible, axis=1) > 1).any())

    @property
    def reads(self) -> np.ndarray:
        """bool[M, E]: expert e contributes to output m, by the gate or by the residual."""
        return np.asarray(self.visible) | (np.asarray(self.residual) != 0) | np.asarray(self.learned_residual)

    def part(self, outputs: Sequence[int] | None = None) -> "LayoutPart":
        """The smallest layout that computes `outputs` (all of them for None), by going backward from them.

        Args:
          outputs: outputs asked for, in the order wanted.

        Returns:
          The part, and the positions of its outputs, experts and streams in the whole.
        """
        outputs = tuple(range(self.num_outputs)) if outputs is None else tuple(outputs)
        if not outputs or any(not 0 <= m < self.num_outputs for m in outputs):
            raise ValueError(f"outputs must name some of 0..{self.num_outputs - 1}, got {outputs}")
        experts = tuple(np.flatnonzero(self.reads[list(outputs)].any(0)).tolist())
        # An output that sees one expert gives it weight 1 whatever its gate reads.
        gates = [self.gate_stream[m] if sum(self.visible[m]) > 1 else () for m in outputs]
        streams = sorted({self.expert_stream[e] for e in experts} | {s for gate in gates for s in gate})
        block = np.ix_(outputs, experts)
        owners = [self.expert_owner[e] for e in experts]
        layout = ExpertLayout(
            np.asarray(self.visible)[block],
            expert_stream=[streams.index(self.expert_stream[e]) for e in experts],
            gate_stream=[tuple(streams.index(s) for s in gate) or 0 for gate in gates],
            detached=np.asarray(self.detached)[block],
            residual=np.asarray(self.residual)[block],
            learned_residual=np.asarray(self.learned_residual)[block],
            expert_owner=[outputs.index(owner) if owner in outputs else None for owner in owners],
            shared_output=outputs.index(self.shared_output) if self.shared_output in outputs else None,
        )
        return LayoutPart(layout, outputs, experts, tuple(streams))


class LayoutPart(NamedTuple):
    """The part of a layout which some outputs need.

    Attributes:
      layout: the part as a layout of its own, renumbered; an expert of an owner left out counts as shared.
      outputs: its outputs' positions in the whole layout.
      experts: its experts' positions.
      streams: its streams' positions.
    """

    layout: ExpertLayout
    outputs: tuple[int, ...]
    experts: tuple[int, ...]
    streams: tuple[int, ...]


class GatedOutput(NamedTuple):
    """What a gated-expert layer computed (M, E of the part asked for).

    Attributes:
      z: f32[M, B, H], the outputs.
      gates: G, f32[M, B, E]; rows sum to one over the visible experts.
      weights: G + R, f32[M, B, E]; what the experts were multiplied by.
      experts: f32[E, B, H], the experts' outputs.
      layout: the layout of the part that was computed.
    """

    z: jax.Array
    gates: jax.Array
    weights: jax.Array
    experts: jax.Array
    layout: ExpertLayout


def masked_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis among the entries where `mask`; zeros, not NaN, where a whole row is masked.

    >>> masked_softmax(jnp.zeros((2, 3)), jnp.array([[True, True, False], [False, False, False]])).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    """
    mask = jnp.broadcast_to(mask, logits.shape)
    floor = jnp.finfo(logits.dtype).min  # -inf would make the gradient of a wholly masked row NaN
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, floor), axis=-1), 0.0)


def combine(weights: jax.Array, experts: jax.Array, detached: np.ndarray) -> jax.Array:
    """z[m] = sum_e weights[m, :, e] experts[e], without gradient to expert e from reader m where detached[m, e].

    Args:
      weights: f32[M, B, E].
      experts: f32[E, B, H].
      detached: static bool[M, E].

    Returns:
      f32[M, B, H].
    """
    # Two sums over one pool: a copy of the pool per reader would cost M times the memory.
    parts = []
    for mask, pool in [(~detached, experts), (detached, jax.lax.stop_gradient(experts))]:
        if mask.any():
            kept = weights if mask.all() else jnp.where(mask[:, None, :], weights, 0.0)
            parts.append(jnp.einsum("mbe,ebh->mbh", kept, pool))
    return sum(parts[1:], parts[0])


def pick(x: jax.Array, streams: Sequence[int]) -> jax.Array:
    """Rows `streams` (static) of x f32[P, B, D], without a copy where one stream, or every one in order, is read.

    Args:
      x: f32[P, B, D], or f32[B, D] when all streams are the same array.
      streams: stream of each reader.

    Returns:
      f32[len(streams), B, D], or f32[B, D] when all readers read the same.
    """
    if x.ndim == 2 or tuple(streams) == tuple(range(len(x))):
        return x
    if len(set(streams)) == 1:
        return x[streams[0]]
    return pin_rows(pin_rows(x, axis=1, whole=True)[np.asarray(streams)], axis=1, whole=True)


def _gate_input(x: jax.Array, gate_stream: Sequence[Sequence[int]]) -> jax.Array:
    """u f32[M, B, D] (f32[B, D] if all gates read the same): per gate, the sum of its streams."""
    longest = max(len(streams) for streams in gate_stream)
    first = pick(x, [streams[0] for streams in gate_stream])
    if longest == 1:
        return first
    if x.ndim == 2:  # all streams are x, so the sum is a multiple of it
        count = np.asarray([len(streams) for streams in gate_stream], x.dtype)
        return x[None] * count[:, None, None]
    total = jnp.broadcast_to(first, (len(gate_stream), *x.shape[1:]))
    for j in range(1, longest):  # streams per gate: two in STEM
        more = pick(x, [streams[j] if j < len(streams) else 0 for streams in gate_stream])
        more = jnp.broadcast_to(more, total.shape)
        has = np.asarray([j < len(streams) for streams in gate_stream])
        total = total + jnp.where(has[:, None, None], more, 0.0)
    return total


def _residual_init(learned: np.ndarray) -> Initializer:
    """U(-1/sqrt(r), 1/sqrt(r)) where `learned`, r entries in a row; 0 elsewhere."""
    bound = np.where(learned, 1.0 / np.sqrt(np.maximum(learned.sum(1, keepdims=True), 1)), 0.0)

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * jnp.asarray(bound, dtype)

    return init


class GatedExperts(nn.Module):
    """A pool of expert MLPs and the gates that mix them: x f32[P, B, D] -> z f32[M, B, H].

    Parameters: 'experts' (a `StackedMLP`, leading axis E), 'gate_kernel' [M, D, E] and 'gate_bias' [M, E] (none if no
    output has a choice), 'residual' [M, E] if any is learned. Columns of invisible experts exist but are never read.

    Attributes:
      layout: who reads whom.
      features: hidden widths of every expert; the activation follows each, the last is H.
      gate_hidden: hidden widths of the gates' own MLPs; () for the usual linear gates.
      norm: None or 'layer', inside the experts and the gates' hidden layers.
    """

    layout: ExpertLayout
    features: Sequence[int]
    gate_hidden: Sequence[int] = ()
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dropout: float = 0.0
    norm: str | None = None
    kernel_init: Initializer = nn.initializers.lecun_normal(batch_axis=(0,))

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        outputs: Sequence[int] | None = None,
        expert_mask: jax.Array | None = None,
        train: bool = False,
    ) -> GatedOutput:
        """Runs the layer, or the part of it which `outputs` need.

        Args:
          x: f32[P, B, D], the streams (of `layout.part(outputs)`, if outputs are given); f32[B, D] when all streams
            are the same, which is then never copied.
          outputs: static; the outputs wanted.
          expert_mask: bool[E] or 0/1, of the whole pool; a masked expert is removed and the gates renormalised over
            the others (an output with none left gives 0).
          train: whether dropout is on.

        Returns:
          Outputs, gates and expert outputs.
        """
        whole, (layout, rows, experts, streams) = self.layout, self.layout.part(outputs)
        if x.ndim not in (2, 3) or (x.ndim == 3 and len(x) != len(streams)):
            raise ValueError(
                f"x must be f32[B, D], or f32[{len(streams)}, B, D] with the streams {streams}, got shape {x.shape}"
            )
        every = len(experts) == whole.num_experts
        pool = StackedMLP(
            whole.num_experts,
            self.features,
            self.activation,
            self.dropout,
            self.norm,
            self.kernel_init,
            name="experts",
        )(pick(x, layout.expert_stream), None if every else experts, train=train)
        batch = pool.shape[1]

        visible = jnp.asarray(layout.visible)[:, None, :]
        kept = jnp.ones((1, 1, len(experts)), bool)
        if expert_mask is not None:
            kept = jnp.asarray(expert_mask, bool)[np.asarray(experts)][None, None, :]
            visible = visible & kept
        if whole.gated:
            gates = masked_softmax(self._logits(_gate_input(x, layout.gate_stream), rows, experts, train), visible)
        else:
            gates = jnp.broadcast_to(visible.astype(pool.dtype), (len(rows), batch, len(experts)))

        weights, residual = gates, self._residual(rows, experts)
        if residual is not None:
            weights = gates + jnp.where(kept, residual[:, None, :], 0.0).astype(gates.dtype)
        if residual is None and not whole.gated:  # one expert each, weight 1: no arithmetic, hence no rounding
            own = np.argmax(layout.visible, axis=1)
            detached = np.asarray(layout.detached)[np.arange(len(rows)), own]
            z = pick(pool, own.tolist()) if len(rows) > 1 else pool[own]
            z = jnp.broadcast_to(z, (len(rows), *pool.shape[1:]))
            if detached.any():
                z = jnp.where(detached[:, None, None], jax.lax.stop_gradient(z), z)
            z = z if expert_mask is None else z * visible.any(-1, keepdims=True)
        else:
            z = combine(weights, pool, np.asarray(layout.detached))
        return GatedOutput(z, gates, weights, pool, layout)

    def _logits(self, u: jax.Array, rows: Sequence[int], experts: Sequence[int], train: bool) -> jax.Array:
        """Gate logits f32[rows, B, experts] from u f32[rows, B, D] or f32[B, D]."""
        whole = self.layout
        if self.gate_hidden:
            u = StackedMLP(
                whole.num_outputs,
                self.gate_hidden,
                self.activation,
                self.dropout,
                self.norm,
                self.kernel_init,
                name="gate_hidden",
            )(u, rows, train=train)
        shape = (whole.num_outputs, u.shape[-1], whole.num_experts)
        kernel = self.param("gate_kernel", self.kernel_init, shape)
        bias = self.param("gate_bias", nn.initializers.zeros_init(), (shape[0], shape[2]))
        if (len(rows), len(experts)) != (shape[0], shape[2]) or tuple(rows) != tuple(range(shape[0])):
            block = np.ix_(rows, experts)
            kernel, bias = kernel[block[0], :, block[1]], bias[block]
            kernel = jnp.swapaxes(kernel, 1, 2)  # numpy puts the indexed axes first: [rows, experts, D]
        spec = "bd,mde->mbe" if u.ndim == 2 else "mbd,mde->mbe"
        return jnp.einsum(spec, u, kernel) + bias[:, None, :]

    def _residual(self, rows: Sequence[int], experts: Sequence[int]) -> jax.Array | None:
        """R f32[rows, experts], or None if it is zero everywhere."""
        fixed, learned = np.asarray(self.layout.residual), np.asarray(self.layout.learned_residual)
        block = np.ix_(rows, experts)
        if learned.any():
            values = self.param("residual", _residual_init(learned), learned.shape)
            return jnp.where(learned[block], values[block], 0.0) + jnp.asarray(fixed[block], values.dtype)
        return jnp.asarray(fixed[block]) if fixed.any() else None
