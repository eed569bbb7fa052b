r"""Methods that decide coordinate by coordinate, from the K entries of a column of the Jacobian.

* `graddrop` picks a sign for each coordinate at random, the likelier the more the tasks agree on it, and drops the
  entries of the other sign.
* `trimmed_mean` leaves out the largest and the smallest entries of each coordinate and averages the rest.

Neither is a weighted sum of gradients. Both commute with scaling of the whole Jacobian, and with any reordering of
coordinates (`graddrop` in distribution).

Letters: K tasks, P parameters; B batch, D width (of features).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.optim import representation
from mtjax.optim.base import Combination, Method, from_combination

PyTree = Any


def graddrop(
    seed: int = 0,
    *,
    leak: float | Sequence[float] = 0.0,
    keep: Callable[[jax.Array], jax.Array] | None = None,
    layer: bool = False,
) -> Method:
    r"""Gradient sign dropout: just pick a sign.

    For each coordinate, with g_k its entries and U uniform on [0, 1):

        P = (1 + sum_k g_k / sum_k |g_k|) / 2
        M_k = [g_k > 0] if U < f(P), else [g_k < 0]
        d = sum_k (leak_k + (1 - leak_k) M_k) g_k

    Args:
      seed: of U; the key is the state. One key for each update, one draw for each coordinate.
      leak: share of each task's gradient that is never dropped, in [0, 1]; one number, or one for each task.
      keep: f, an increasing function of [0, 1] to itself, on arrays; by default f(P) = P.
      layer: False: coordinates are those of whatever the method sees, parameters, or single features of single examples
        under `at_representation`. True: the GradDrop layer of the paper, for a `mtjax.Staged` loss function: a
        coordinate is a feature, and g_k in P and M_k is sum_b sign(z_b) g_kb, the gradient at the features multiplied
        by the sign of the activation and summed over the leading axis; M_k then multiplies g_kb of all examples b.

    Returns:
      A `Method` without weights. A column of zeros gives 0; with K = 1, d = g. With `layer` it is for
      `mtjax.value_and_update` alone, as a Jacobian does not show the activations.

    Raises:
      ValueError: for leaks outside [0, 1]; when the number of tasks is known, for another number of leaks; for the
        plain `update` of the layer.

    Reference: Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS
      2020, equation 1 and algorithm 1. TorchJD has the method on parameters, LibMTL the layer (with 1e-7 in the
      denominator). The authors' code in Lingvo is the layer, by default with its result multiplied by the ratio of its
      norm to that of the plain sum; that is not done here.

    >>> method = graddrop()
    >>> gradient, _ = method.update(jnp.array([[1.0, 0.0, 2.0], [3.0, 0.0, -2.0]]), method.init(None))
    >>> gradient[:2].tolist(), abs(gradient[2].item())  # of 2 and -2, either may be dropped
    ([4.0, 0.0], 2.0)
    """
    leaks = np.asarray(leak, float)
    if leaks.ndim > 1 or not ((leaks >= 0) & (leaks <= 1)).all():
        raise ValueError(f"leak must be one number in [0, 1] or one for each task, got {leak!r}")

    def init(num_tasks, params):
        del num_tasks, params
        return jax.random.key(seed)

    def combine(jacobian, losses, key, present, signs=None):
        del present  # rows of absent tasks are zero, and zeros change nothing
        if leaks.shape not in ((), losses.shape):
            raise ValueError(f"graddrop got {leaks.size} leaks for {losses.size} tasks")
        key, draw = jax.random.split(key)
        rows, structure = jax.tree.flatten(jacobian)
        signs = [None] * len(rows) if signs is None else jax.tree.leaves(signs)
        share = jnp.broadcast_to(jnp.asarray(leaks, losses.dtype), losses.shape)
        picked = [
            _pick_a_sign(leaf, sign, share, jax.random.fold_in(draw, index), keep)
            for index, (leaf, sign) in enumerate(zip(rows, signs, strict=True))
        ]
        return jax.tree.unflatten(structure, picked), None, key

    if not layer:
        return from_combination(Combination(init, combine))

    def refuse(jacobian, losses, key, present):
        raise ValueError(
            "graddrop(layer=True) needs the activations beside their gradients: use mtjax.value_and_update on a "
            "mtjax.Staged loss function"
        )

    def route(loss_fn, method, *, has_aux, chunk_size):
        def update(rows, state, features, *, losses):
            signed = functools.partial(combine, signs=jax.tree.map(jnp.sign, features))
            rule = from_combination(Combination(init, signed))
            rule = rule.replace(nonfinite=method.nonfinite, drop_zero=method.drop_zero)
            return rule.update(rows, state, features, losses=losses)

        seen = Method(method.init, update)
        seen.nonfinite, seen.drop_zero = method.nonfinite, method.drop_zero
        return representation._route(loss_fn, seen, has_aux=has_aux, chunk_size=chunk_size)

    return from_combination(Combination(init, refuse), route=route)


def _pick_a_sign(
    rows: jax.Array, signs: jax.Array | None, leak: jax.Array, key: jax.Array, keep: Callable | None
) -> jax.Array:
    """[K, ...] -> [...]. With `signs` [B, ...] the decision is common to the leading axis B."""
    rows = rows.astype(jnp.promote_types(jnp.float32, rows.dtype))
    seen = rows if signs is None else jnp.sum(rows * signs[None].astype(rows.dtype), axis=1, keepdims=True)
    total = jnp.sum(jnp.abs(seen), axis=0)
    purity = 0.5 * (1 + jnp.where(total == 0, 0.0, jnp.sum(seen, axis=0) / jnp.where(total == 0, 1.0, total)))
    positive = jax.random.uniform(key, purity.shape, rows.dtype) < (purity if keep is None else keep(purity))
    kept = jnp.where(positive[None], seen > 0, seen < 0)
    leak = leak.astype(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
    picked = jnp.sum((leak + (1 - leak) * kept) * rows, axis=0)
    # Compilers make a selection of the product, and what is not selected may be NaN.
    return jnp.where(jnp.isfinite(total), picked, jnp.nan)


def trimmed_mean(trim: int = 1) -> Method:
    r"""Coordinate-wise trimmed mean: without the `trim` largest and the `trim` smallest entries of each coordinate.

    d_p = mean of the sorted entries g_(trim+1),p ... g_(K-trim),p.

    A robust estimate: if at most `trim` tasks are corrupted, d_p lies between entries of tasks that are not. This
    includes corruption by NaN and infinity: NaN counts as the largest value. So up to `trim` non-finite entries of a
    coordinate are trimmed away, under the default policy too, and with more of them d_p is not finite either.

    Args:
      trim: entries to leave out at each end; 0 is the mean.

    Returns:
      A `Method` without weights. With K = 1 (and `trim` = 0), d = g. Among tasks that take part (see
      `mtjax.optim.nonfinite`), should they be fewer than 2 trim + 1 in some step, as many are left out as leave
      something: d is their median.

    Raises:
      ValueError: for a negative `trim`; when the number of tasks is known, for fewer than 2 trim + 1.

    >>> method = trimmed_mean(1)
    >>> method.update(jnp.array([[1.0], [9.0], [2.0], [jnp.nan], [4.0]]), method.init(None))[0].tolist()
    [5.0]

    Reference: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
      definition 2. TorchJD's TrimmedMean is the same. LibMTL has none.
    """
    if not (isinstance(trim, int) and trim >= 0):
        raise ValueError(f"trim must be an integer >= 0, got {trim!r}")

    def combine(jacobian, losses, state, present):
        if losses.size < 2 * trim + 1:
            raise ValueError(f"trimmed_mean(trim={trim}) needs at least {2 * trim + 1} tasks, got {losses.size}")
        remaining = jnp.sum(present)
        cut = jnp.minimum(trim, jnp.maximum(remaining - 1, 0) // 2)
        place = jnp.arange(losses.size)
        counted = (place >= cut) & (place < remaining - cut)
        number = jnp.maximum(remaining - 2 * cut, 1)

        def of_leaf(rows):
            along = lambda vector: vector.reshape(-1, *[1] * (rows.ndim - 1))  # noqa: E731
            wide = rows.astype(jnp.promote_types(jnp.float32, rows.dtype))
            # NaN is sorted last: absent tasks end up behind all that take part.
            ordered = jnp.sort(jnp.where(along(present), wide, jnp.nan), axis=0)
            return jnp.sum(jnp.where(along(counted), ordered, 0.0), axis=0) / number

        return jax.tree.map(of_leaf, jacobian), None, state

    return from_combination(Combination(lambda num_tasks, params: (), combine))
