r"""Losses per example, all with one signature: `loss(output, label) -> f32[B]`.

A loss returns one number per example and never averages: weighting, missing labels and the mean over a batch
belong to `mtjax.tasks.task_losses`. `output` is what the model emits (a logit, logits, a value, a log-rate) and
`label` is in the space of that output. Labels must be finite; a missing label (NaN) is replaced *before* the
loss is called, because `0 * nan` would survive in a gradient. Half-precision outputs are computed in float32.

| loss                   | output z       | label y            | per example                         | max slope |
|------------------------|----------------|--------------------|-------------------------------------|-----------|
| `binary_cross_entropy` | logit f[B]     | 0, 1 or in between | -y log s(z) - (1 - y) log(1 - s(z)) | 1         |
| `cross_entropy`        | logits f[B, C] | class index        | log sum_c exp(z_c) - z_y            | 1         |
| `squared_error`        | value f[B]     | value              | (z - y)^2                           |           |
| `absolute_error`       | value f[B]     | value              | abs(z - y)                          | 1         |
| `huber(delta)`         | value f[B]     | value              | quadratic up to delta, then linear  | delta     |
| `poisson`              | log-rate f[B]  | count              | exp(z) - y z                        | e^30 + y  |

A loss of your own is any function of that signature; bind its options with `functools.partial` or a factory.

>>> import jax
>>> import jax.numpy as jnp
>>> logit, label = jnp.array([0.0, 2.0, -1000.0]), jnp.array([1.0, 1.0, 1.0])
>>> print(binary_cross_entropy(logit, label).round(4))
[6.931e-01 1.269e-01 1.000e+03]
>>> print(jax.grad(lambda z: binary_cross_entropy(z, label).sum())(logit).round(3))
[-0.5   -0.119 -1.   ]
>>> print(cross_entropy(jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), jnp.array([0.0, 2.0])).round(4))
[0.2395 1.0986]
>>> print(huber(delta=1.0)(jnp.array([0.5, 3.0]), jnp.array([0.0, 0.0])))
[0.125 2.5  ]

Letters: B batch, C classes, z output, y label, s the logistic function.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[jax.Array, jax.Array], jax.Array]

# exp(z) continues along its tangent above this log-rate: no count comes near e^30 = 1e13, and a slope of 1e13
# can still be squared and summed over millions of parameters in float32 (Gramians, norms) without overflow.
_MAX_LOG_RATE = 30.0


def _at_least_float32(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def binary_cross_entropy(logit: jax.Array, label: jax.Array) -> jax.Array:
    """Negative log-likelihood of a Bernoulli label: `-y log s(z) - (1 - y) log(1 - s(z))`.

    Computed from the logit, so that it is exact, and its gradient `s(z) - y` finite, for logits of any size.

    Args:
      logit: f[B], log-odds of class 1.
      label: f[B], 0 or 1, or a probability (soft label).

    Returns:
      f32[B].
    """
    return optax.losses.sigmoid_binary_cross_entropy(_at_least_float32(logit), _at_least_float32(label))


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Negative log-likelihood of a class: `log sum_c exp(z_c) - z_y`.

    Args:
      logits: f[B, C].
      label: [B], class index 0..C-1 as integer or as float; an index outside of it is not detected here
        (`Task.check_labels` does, on the host).

    Returns:
      f32[B].
    """
    index = jnp.asarray(label).astype(jnp.int32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(_at_least_float32(logits), index)


def squared_error(output: jax.Array, label: jax.Array) -> jax.Array:
    """`(z - y)^2`, without the factor 1/2 that some write.

    Args:
      output: f[B].
      label: f[B].

    Returns:
      f32[B].
    """
    return optax.losses.squared_error(_at_least_float32(output), _at_least_float32(label))


def absolute_error(output: jax.Array, label: jax.Array) -> jax.Array:
    """`abs(z - y)`; the gradient at equality is 0.

    Args:
      output: f[B].
      label: f[B].

    Returns:
      f32[B].
    """
    return jnp.abs(_at_least_float32(output) - _at_least_float32(label))


def huber(delta: float = 1.0) -> Loss:
    """Factory of the Huber loss of e = z - y: `e^2 / 2` up to `abs(e) = delta`, then `delta (abs(e) - delta / 2)`.

    Args:
      delta: error at which the loss turns linear, in units of the (scaled) label.

    Returns:
      A loss `(output f[B], label f[B]) -> f32[B]`.

    Raises:
      ValueError: if delta is not positive.

    Reference: Huber, Robust Estimation of a Location Parameter, Annals of Mathematical Statistics 35 (1964).
    """
    if not delta > 0:
        raise ValueError(f"huber needs delta > 0, the error at which the loss turns linear, got {delta}")

    def huber_loss(output: jax.Array, label: jax.Array) -> jax.Array:
        return optax.losses.huber_loss(_at_least_float32(output), _at_least_float32(label), delta=delta)

    return huber_loss


def poisson(log_rate: jax.Array, label: jax.Array, *, full: bool = False) -> jax.Array:
    """Negative log-likelihood of a Poisson count with a log link: `exp(z) - y z (+ log y!)`.

    The factorial term does not depend on the output and is left out by default, as it is elsewhere; the loss of
    a good model can then be negative. Above a log-rate of 30 (a rate of 1e13) `exp` goes on along its tangent,
    so that gradients stay finite for any output.

    Args:
      log_rate: f[B], logarithm of the expected count.
      label: f[B], count >= 0.
      full: add `log y!`, for likelihoods that are to be compared across data sets
        (`functools.partial(poisson, full=True)` is a loss of the usual signature).

    Returns:
      f32[B].
    """
    z, y = _at_least_float32(log_rate), _at_least_float32(label)
    rate = jnp.exp(jnp.minimum(z, _MAX_LOG_RATE)) * (1 + jnp.maximum(z - _MAX_LOG_RATE, 0))
    loss = rate - y * z
    return loss + jax.lax.lgamma(y + 1) if full else loss


def relative_l2(output: jax.Array, label: jax.Array) -> jax.Array:
    """`|z - y|_2 / |y|_2` of each field over the points where it has a value.

    Args:
      output: f[B, N].
      label: f[B, N], NaN = no value there (outside of the domain, padding).

    Returns:
      f32[B]; the plain norm of the error for a field that is zero everywhere. The gradient at z = y is 0.

    >>> print(relative_l2(jnp.array([[3.0, 0.0, 9.0]]), jnp.array([[3.0, 4.0, jnp.nan]])))
    [0.8]
    """
    error, label = _at_points(output, label)
    squared, size = jnp.sum(error**2, axis=-1), jnp.sum(label**2, axis=-1)
    norm = jnp.sqrt(jnp.where(squared > 0, squared, 1.0)) * (squared > 0)
    return norm / jnp.sqrt(jnp.where(size > 0, size, 1.0))


def field_mse(output: jax.Array, label: jax.Array) -> jax.Array:
    """Mean squared error of each field over the points where it has a value.

    Args:
      output: f[B, N].
      label: f[B, N], NaN = no value there.

    Returns:
      f32[B]; 0 for a field without values.
    """
    error, _ = _at_points(output, label)
    count = jnp.sum(~jnp.isnan(label), axis=-1)
    return jnp.sum(error**2, axis=-1) / jnp.maximum(count, 1)


def _at_points(output: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Error and label, 0 where there is no label; the output there gets no gradient, whatever it is."""
    present = ~jnp.isnan(label)
    label = _at_least_float32(jnp.where(present, label, 0.0))
    return _at_least_float32(jnp.where(present, output, 0.0)) - label, label
