r"""How a gated layer uses its experts: cheap batch reductions, returned by models beside their outputs.

With the mean gate I[m, e] = mean_b G[m, b, e] of reader m and H(p) = -sum_e p_e log p_e:

    a reader that ignores its input      entropy == example_entropy
    an expert that nobody needs          dead, ablation utility <= 0
    a shared expert taken over by one    degeneration -> 1
    a task that avoids its own experts   reliance << 1
    experts that do the same             redundancy -> 1

Gates mislead when experts' outputs differ in scale, which is what `contribution` corrects for.

References: Wang et al., "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou", 2024 (expert
collapse, degradation, underfitting); Kornblith et al., "Similarity of Neural Network Representations", ICML 2019 (CKA).

Letters: M readers (outputs of the layer), T of them tasks, E experts, B batch, H expert output width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.nn.experts import ExpertLayout


class ExpertUse(NamedTuple):
    """Expert use of one gated layer over one batch. "Among what it sees": visible experts only.

    Attributes:
      importance: f32[M, E], I = mean gate of reader m on expert e.
      contribution: f32[M, E], mean share of expert e in the sum of norms |w_{m,e}| ||E_e|| which reader m adds up, w
        the gate plus any residual.
      entropy: f32[M], H(I_m) / log(experts that m sees): 1 = uniform; 0 if it sees only one.
      example_entropy: f32[M], mean_b H(G[m, b]) / log(experts that m sees). `entropy` minus this is how far routing
        depends on the input.
      effective_experts: f32[M], exp(H(I_m)), between 1 and the experts that m sees.
      dead: f32[E], 1 where max_m I[m, e] < 0.1 / E; its mean is the share of dead experts.
      load_cv2: f32[], variance over mean squared, across experts, of the load sum_m I[m, e].
      degeneration: f32[E], 1 - H(I[., e] / sum_t I[t, e]) / log T_e over the T_e tasks that see e: 1 = one task owns
        the expert, 0 = all use it alike. 1 where a single task sees it; 0 where no task uses it.
      reliance: f32[M], gate mass of m on its own experts over their share of the experts that it sees: 1 = as under a
        uniform gate. 0 for a reader that owns none.
      zero_rate: f32[E], share of exactly zero outputs (a ReLU expert above 0.9 has collapsed).
      scale_dispersion: f32[], max_e / min_e of the standard deviation of experts' outputs; inf if one is constant.
      mean_dispersion: f32[], max_e / min_e of |mean| of experts' outputs; inf if one is 0.
      gate_divergence: f32[M, M], Jensen-Shannon divergence of I between readers over log 2: 0 = same, 1 = disjoint.
      redundancy: f32[E, E], mean_b |cos(E_e(x_b), E_f(x_b))|.
    """

    importance: jax.Array
    contribution: jax.Array
    entropy: jax.Array
    example_entropy: jax.Array
    effective_experts: jax.Array
    dead: jax.Array
    load_cv2: jax.Array
    degeneration: jax.Array
    reliance: jax.Array
    zero_rate: jax.Array
    scale_dispersion: jax.Array
    mean_dispersion: jax.Array
    gate_divergence: jax.Array
    redundancy: jax.Array


def _entropy(p: jax.Array) -> jax.Array:
    """H over the last axis in nats, with 0 log 0 = 0 and a finite gradient there."""
    return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1.0), 0.0)


def _sqrt(x: jax.Array) -> jax.Array:
    """Square root of x >= 0 whose gradient at 0 is 0, not NaN (a dead ReLU expert has norm 0)."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def _dispersion(values: jax.Array) -> jax.Array:
    """max / min of non-negative values; inf if only the minimum is 0, 1 if all are."""
    low, high = jnp.min(values), jnp.max(values)
    return jnp.where(low > 0, high / jnp.where(low > 0, low, 1.0), jnp.where(high > 0, jnp.inf, 1.0))


def expert_use(
    gates: jax.Array,
    expert_outputs: jax.Array,
    layout: ExpertLayout,
    *,
    weights: jax.Array | None = None,
    sample_weight: jax.Array | None = None,
) -> ExpertUse:
    """Summarises gates and expert outputs of one batch.

    Args:
      gates: G, f32[M, B, E], rows summing to one over the visible experts.
      expert_outputs: f32[E, B, H].
      layout: of the layer (of the part computed, `GatedOutput.layout`, if only some outputs were).
      weights: f32[M, B, E], what multiplies the experts if that is not the gates alone (AdaTT).
      sample_weight: f32[B]; 0 for rows that do not count, such as padding.

    Returns:
      The statistics; all but `dead` and `zero_rate` can be differentiated.

    >>> layout = ExpertLayout(np.ones((2, 2)))
    >>> uniform = jnp.full((2, 3, 2), 0.5)
    >>> use = expert_use(uniform, jnp.ones((2, 3, 4)), layout)
    >>> use.entropy.tolist(), use.degeneration.tolist(), float(use.redundancy[0, 1])
    ([1.0, 1.0], [0.0, 0.0], 1.0)
    """
    num_outputs, batch, num_experts = gates.shape
    visible = np.asarray(layout.visible)
    if visible.shape != (num_outputs, num_experts) or expert_outputs.shape[:2] != (num_experts, batch):
        raise ValueError(
            f"gates {gates.shape}, expert_outputs {expert_outputs.shape} and a layout of {visible.shape} do not fit; "
            "expected [M, B, E], [E, B, H] and (M, E)"
        )
    weights = gates if weights is None else weights
    share = jnp.ones(batch, gates.dtype) if sample_weight is None else sample_weight.astype(gates.dtype)
    share = _divide(share, jnp.sum(share))  # f32[B], the weight of each example in a mean over the batch

    importance = jnp.einsum("mbe,b->me", gates, share)
    norms = _sqrt(jnp.sum(jnp.square(expert_outputs), -1)).T  # [B, E]
    parts = jnp.abs(weights) * norms[None]
    contribution = jnp.einsum("mbe,b->me", _divide(parts, jnp.sum(parts, -1, keepdims=True)), share)

    nats = _entropy(importance)
    seen = visible.sum(1)
    most = jnp.asarray(np.log(np.maximum(seen, 1)), gates.dtype)
    example_nats = jnp.einsum("mb,b->m", _entropy(gates), share)

    load = jnp.sum(importance, 0)
    tasks = np.asarray([m for m in range(num_outputs) if m != layout.shared_output], np.int32)
    by_task = importance[tasks]  # [T, E]; the shared stream is no task
    readers = visible[tasks].sum(0)
    spread = _entropy(_divide(by_task, jnp.sum(by_task, 0, keepdims=True)).T)
    degeneration = 1.0 - _divide(spread, jnp.asarray(np.log(np.maximum(readers, 1)), gates.dtype))
    degeneration = jnp.where(jnp.sum(by_task, 0) > 0, degeneration, 0.0)

    own = np.asarray([[o == m for o in layout.expert_owner] for m in range(num_outputs)]) & visible
    fair = jnp.asarray(own.sum(1) / seen, gates.dtype)
    reliance = _divide(jnp.sum(jnp.where(own, importance, 0.0), 1), fair)

    width = expert_outputs.shape[-1]
    mean = jnp.einsum("ebh,b->e", expert_outputs, share) / width
    variance = jnp.einsum("ebh,b->e", jnp.square(expert_outputs - mean[:, None, None]), share) / width
    zero_rate = jnp.einsum("ebh,b->e", (expert_outputs == 0).astype(gates.dtype), share) / width

    middle = (importance[:, None, :] + importance[None, :, :]) / 2
    divergence = (_entropy(middle) - (nats[:, None] + nats[None, :]) / 2) / np.log(2.0)

    unit = _divide(expert_outputs, norms.T[..., None])
    cosine = jnp.einsum("ebh,fbh->bef", unit, unit)
    return ExpertUse(
        importance=importance,
        contribution=contribution,
        entropy=_divide(nats, most),
        example_entropy=_divide(example_nats, most),
        effective_experts=jnp.exp(nats),
        dead=(jnp.max(importance, 0) < 0.1 / num_experts).astype(gates.dtype),
        load_cv2=_divide(jnp.var(load), jnp.square(jnp.mean(load))),
        degeneration=degeneration,
        reliance=reliance,
        zero_rate=zero_rate,
        scale_dispersion=_dispersion(_sqrt(variance)),
        mean_dispersion=_dispersion(jnp.abs(mean)),
        gate_divergence=jnp.maximum(divergence, 0.0),
        redundancy=jnp.einsum("bef,b->ef", jnp.abs(cosine), share),
    )


def linear_cka(expert_outputs: jax.Array) -> jax.Array:
    r"""Linear CKA between experts: ||X_e^T X_f||_F^2 / (||X_e^T X_e||_F ||X_f^T X_f||_F) with centred columns.

    Unlike `ExpertUse.redundancy` it does not change when an expert's units are rotated, at E^2 B H^2 operations.

    Args:
      expert_outputs: f32[E, B, H].

    Returns:
      f32[E, E] in [0, 1]; 0 against a constant expert.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> linear_cka(jnp.stack([x, 3.0 * x[:, ::-1]])).round(4).tolist()  # the same up to a rotation and a scale
    [[1.0, 1.0], [1.0, 1.0]]
    """
    centred = expert_outputs - jnp.mean(expert_outputs, axis=1, keepdims=True)
    cross = jnp.sum(jnp.square(jnp.einsum("ebh,fbk->efhk", centred, centred)), axis=(-2, -1))
    own = jnp.sqrt(jnp.diagonal(cross))
    return _divide(cross, own[:, None] * own[None, :])


def ablation_utility(loss: Callable[[jax.Array], Any], num_experts: int) -> Any:
    """How much worse the loss gets when an expert is removed and the gates are renormalised over the others.

    Args:
      loss: expert mask bool[E] -> a loss, or a pytree of losses such as one per task; typically
        `lambda mask: losses(model.apply(variables, batch, expert_mask={"level_0": mask}))`.
      num_experts: E.

    Returns:
      Like the loss with a leading axis E: loss without expert e minus loss with all; positive = the expert is needed.

    >>> ablation_utility(lambda mask: jnp.sum(jnp.where(mask, jnp.array([0.0, -2.0]), 0.0)), 2).tolist()
    [0.0, 2.0]
    """
    masks = ~np.eye(num_experts, dtype=bool)
    full = loss(jnp.ones(num_experts, bool))
    without = jax.vmap(loss)(jnp.asarray(masks))
    return jax.tree.map(lambda a, b: a - jnp.expand_dims(b, 0), without, full)
