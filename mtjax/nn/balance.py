r"""What a router did with a batch, and the losses that steer it: balance, calibration, and task-expert information.

With p the softmax over all experts, kept gate values g and top-K counts n, summed over the tokens of a stream:

    importance   CV^2(sum g_e)                      CV^2(v) = Var(v) / Mean(v)^2 over the experts
    load         CV^2(sum P(e is kept if its noise is drawn again))
    switch       E sum_e (n_e / sum n) mean p_e     1 at balance
    z            mean (logsumexp logits)^2
    information  -I(T; E) = - sum_te P(t, e) log P(t, e) / (P(t) P(e))

Balance asks every stream, hence every task, to use every expert. Minus the mutual information asks for the opposite
with no dead expert: P(e) spread, P(e | t) narrow. All losses are functions of the same statistics, so they add up
freely, and `pooled` sums the streams so that a loss balances the pool over the tasks instead of inside each.

References:
  Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017 (importance and load). Riquelme et al., "Scaling
  Vision with Sparse Mixture of Experts", NeurIPS 2021, appendix A (the smooth load used here). Fedus et al., "Switch
  Transformers", JMLR 2022. Zoph et al., "ST-MoE", 2022 (z-loss). Chen et al., "Mod-Squad: Designing Mixture of Experts
  As Modular Multi-Task Learners", CVPR 2023 (mutual information and the top-k loss).

Letters: T task streams, M tokens of a stream, E experts, K experts per token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtjax.nn.routers import HIDDEN, Routing


class RouterStats(NamedTuple):
    """One router and one batch, per stream.

    Attributes:
      importance: f32[T, E], sum over tokens of kept gate values.
      probability: f32[T, E], mean softmax.
      count: f32[T, E], tokens that chose the expert.
      load: f32[T, E], expected count if the noise of that expert alone were drawn again; `count` without noise, and
        then without gradient.
      z: f32[T], mean of (logsumexp logits)^2.
      entropy: f32[T], mean entropy of the softmax in nats.
      dropped: f32[T], share of the assignments that the dispatch dropped.
      tokens: f32[], M.
    """

    importance: jax.Array
    probability: jax.Array
    count: jax.Array
    load: jax.Array
    z: jax.Array
    entropy: jax.Array
    dropped: jax.Array
    tokens: jax.Array


def router_stats(routing: Routing, kept: jax.Array | None = None) -> RouterStats:
    """Summarises a routing.

    Args:
      routing: of T streams.
      kept: bool[T, M, K], what the dispatch did not drop; None: everything.

    Returns:
      The statistics.
    """
    values, ids, probs, logits, noisy_logits, noise_std = routing
    num_experts = probs.shape[-1]
    chosen = ids[..., None] == jnp.arange(num_experts)[None, None, None]  # [T, M, K, E]; fused into the sums below
    count = jnp.sum(chosen, axis=(1, 2), dtype=jnp.float32)
    if noise_std is None:
        load = count
    else:
        # Threshold and logits both before the softmax: M3ViT's code compares logits with softmaxed thresholds.
        worst = jnp.sum(jnp.where(chosen[:, :, -1], noisy_logits, 0.0), axis=-1, keepdims=True)
        kept_again = jax.scipy.stats.norm.cdf((logits - worst) / noise_std)
        load = jnp.sum(jnp.where(logits > HIDDEN / 2, kept_again, 0.0), axis=1)
    used = ids < num_experts
    kept = used if kept is None else used & kept
    return RouterStats(
        importance=jnp.sum(jnp.where(chosen, values[..., None], 0.0), axis=(1, 2)),
        probability=jnp.mean(probs, axis=1),
        count=count,
        load=load,
        z=jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), axis=1),
        entropy=jnp.mean(-jnp.sum(_x_log(probs, probs), axis=-1), axis=1),
        dropped=1.0 - jnp.sum(kept, axis=(1, 2)) / jnp.sum(used, axis=(1, 2)),
        tokens=jnp.asarray(ids.shape[1], jnp.float32),
    )


def pooled(stats: RouterStats) -> RouterStats:
    """The streams as one, T = 1: the losses then balance the pool over the tasks, whatever each task prefers."""

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=0, keepdims=True)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.mean(x, axis=0, keepdims=True)

    return RouterStats(
        importance=total(stats.importance),
        probability=mean(stats.probability),
        count=total(stats.count),
        load=total(stats.load),
        z=mean(stats.z),
        entropy=mean(stats.entropy),
        dropped=mean(stats.dropped),
        tokens=stats.tokens * len(stats.z),
    )


def cv_squared(x: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Squared coefficient of variation over the last axis, Var / Mean^2; 0 where the mean is 0.

    Args:
      x: f32[..., E].
      where: bool[..., E], entries that count; None: all.

    >>> cv_squared(jnp.array([[1.0, 3.0], [2.0, 2.0]])).tolist()
    [0.25, 0.0]
    """
    where = jnp.ones(x.shape, bool) if where is None else jnp.broadcast_to(where, x.shape)
    mean = jnp.mean(x, axis=-1, keepdims=True, where=where)
    safe = jnp.where(mean == 0, 1.0, mean)
    return jnp.where(mean[..., 0] == 0, 0.0, jnp.mean(jnp.square(x / safe - 1.0), axis=-1, where=where))


def importance_loss(stats: RouterStats, *, visible: jax.Array | None = None) -> jax.Array:
    """CV^2 of the importance, f32[T]; `visible` bool[T, E]: experts that the gates can address (None: all)."""
    return cv_squared(stats.importance, visible)


def load_loss(stats: RouterStats, *, visible: jax.Array | None = None) -> jax.Array:
    """CV^2 of the load, f32[T]; without noise it has no gradient. `visible` as in `importance_loss`."""
    return cv_squared(stats.load, visible)


def switch_loss(stats: RouterStats) -> jax.Array:
    """E sum_e f_e P_e, f32[T], f the share of assignments and P the mean softmax: 1 at balance."""
    share = stats.count / jnp.sum(stats.count, axis=-1, keepdims=True)
    return stats.count.shape[-1] * jnp.sum(share * stats.probability, axis=-1)


def z_loss(stats: RouterStats) -> jax.Array:
    """Mean squared logsumexp of the logits, f32[T]: keeps logits small."""
    return stats.z


def entropy_loss(stats: RouterStats) -> jax.Array:
    """Mean entropy of a token's softmax, f32[T], nats: minimised, tokens decide; maximised, they stay undecided."""
    return stats.entropy


def top_k_loss(stats: RouterStats, *, limit_k: int) -> jax.Array:
    """Squared mean probability outside a task's `limit_k` likeliest experts, f32[T]: an option of Mod-Squad."""
    best = jax.lax.stop_gradient(jax.lax.top_k(stats.probability, limit_k)[1])
    inside = jnp.any(best[..., None] == jnp.arange(stats.probability.shape[-1])[None, None], axis=-2)
    return jnp.sum(jnp.where(inside, 0.0, jnp.square(stats.probability)), axis=-1)


def _x_log(x: jax.Array, ratio: jax.Array) -> jax.Array:
    """x log(ratio) with 0 log 0 = 0 and a finite gradient there."""
    positive = (x > 0) & (ratio > 0)
    return jnp.where(positive, x * jnp.log(jnp.where(positive, ratio, 1.0)), 0.0)


def mutual_information(joint: jax.Array, *, epsilon: float = 1e-4) -> jax.Array:
    """I(T; E) of a joint distribution in nats, f32[].

        I = sum_te P(t, e) log( P(t, e) / (P(t) P(e)) + epsilon ),   P(t), P(e) = row and column sums + epsilon

    Args:
      joint: P(t, e), f32[T, E], sums to one.
      epsilon: of Mod-Squad's code; 0 is the textbook's. It moves I by a few epsilon * E.

    >>> float(mutual_information(jnp.eye(2) / 2, epsilon=0.0)) == float(jnp.log(2.0))
    True
    """
    task = jnp.sum(joint, axis=1, keepdims=True) + epsilon
    expert = jnp.sum(joint, axis=0, keepdims=True) + epsilon
    independent = task * expert
    ratio = joint / jnp.where(independent > 0, independent, 1.0) + epsilon
    return jnp.sum(_x_log(joint, ratio))


class RunningJoint(NamedTuple):
    """What is known of P(e | t), over steps whose batches hold some of the tasks only.

    Attributes:
      rows: f32[num_tasks, E], moving average of the mean softmax of each task.
      steps: f32[num_tasks], batches that held the task; a row without any counts for nothing.
    """

    rows: jax.Array
    steps: jax.Array


def running_joint(num_tasks: int, num_experts: int) -> RunningJoint:
    """The state before the first step."""
    return RunningJoint(jnp.zeros((num_tasks, num_experts)), jnp.zeros(num_tasks))


def mutual_information_loss(
    stats: RouterStats,
    tasks: Sequence[int] | jax.Array,
    joint: RunningJoint | None = None,
    *,
    decay: float = 0.99,
    epsilon: float = 1e-4,
) -> tuple[jax.Array, RunningJoint]:
    """-I(T; E): every task few experts, every expert some task.

    Tasks weigh the same. Without `joint`, P(t, e) is this batch's, as in Mod-Squad, whose steps hold every task; one
    task alone has I = 0. With it, the rows of absent tasks are remembered, and those of present ones are the moving
    average with this batch in it. The gradient goes through this batch's mean only, with factor 1 rather than
    1 - decay, so the loss's weight means the same with and without `joint`. (Later public versions of Mod-Squad's code
    do that too: the batch's mean times a constant log-ratio of the running estimate.) For its first 1 / (1 - decay)
    batches a row is the plain mean.

    Args:
      stats: of T streams, or of one that all tasks share.
      tasks: task of each stream, static or i32[T].
      joint: state; None: this batch alone.
      decay: of the moving average; 0 keeps the latest batch of each task.
      epsilon: of `mutual_information`.

    Returns:
      f32[], and the state (constant); without `joint`, this batch's rows.
    """
    tasks = jnp.asarray(tasks)
    rows = jnp.broadcast_to(stats.probability, (tasks.shape[0], stats.probability.shape[-1]))
    if joint is None:
        joint = RunningJoint(jax.lax.stop_gradient(rows), jnp.ones(len(rows)))
        return -mutual_information(rows / len(rows), epsilon=epsilon), joint
    batch = jax.lax.stop_gradient(rows)
    steps = joint.steps[tasks]
    keep = jnp.minimum(decay, steps / (steps + 1.0))[:, None]
    average = keep * joint.rows[tasks] + (1.0 - keep) * batch
    updated = RunningJoint(joint.rows.at[tasks].set(average), joint.steps.at[tasks].set(steps + 1.0))
    updated = jax.lax.stop_gradient(updated)
    weight = (updated.steps > 0) / jnp.sum(updated.steps > 0)
    table = updated.rows.at[tasks].add(rows - batch)  # adds 0, with this batch's gradient
    return -mutual_information(table * weight[:, None], epsilon=epsilon), updated
