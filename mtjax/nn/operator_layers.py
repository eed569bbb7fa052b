r"""Networks of operator learning, for branches and trunks: MLPs in three forms, a stacked and a convolutional branch.

All are called as `net(x, train=False)`, work on any leading axes, and name their maps alike, so that a rule on paths
can pick them: 'dense_0', 'dense_1', ... for hidden maps, 'conv_0', ... for convolutions, 'out' for the last map.

    MLP           h <- dropout(act(norm(dense(h))))                             for each hidden width
    ModifiedMLP   h <- z * u + (1 - z) * v,   z = act(dense(h))                 u, v: two encoders of the input
    ResidualMLP   h_l = act(norm(dense(h_{l-1}))) + proj(h_{l-2})               from the third hidden layer on

Layers are made by the factories `dense`, `conv` and `norm`: `functools.partial(nn.Dense, bias_init=...)` sets what is
to differ.

Letters: B batch, D input width, p outputs (of a branch or trunk: basis functions), H x W image.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtjax.nn.stacked import StackedDense, StackedMLP

Activation = Callable[[jax.Array], jax.Array]
Factory = Callable[..., nn.Module]
GlorotDense = functools.partial(nn.Dense, kernel_init=nn.initializers.glorot_normal())
GlorotConv = functools.partial(nn.Conv, kernel_size=(5, 5), padding="SAME", kernel_init=nn.initializers.glorot_normal())


def rate_of(dropout: float | Sequence[float], layer: int) -> float:
    """The dropout rate after a hidden layer: one for all, or one for each of the first layers and 0 after."""
    if isinstance(dropout, Sequence):
        return dropout[layer] if layer < len(dropout) else 0.0
    return dropout


class BeforeLast(NamedTuple):
    """A network without its last map.

    Attributes:
      hidden: f[..., w], what the last map reads.
      kernel: f[w, p] of the last map.
      bias: f[p] of the last map, None if it has none.
    """

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None


def before_last(out: nn.Module, hidden: jax.Array) -> BeforeLast:
    """The input of a dense map and its parameters, which a call on one row creates at initialisation."""
    out(hidden.reshape(-1, hidden.shape[-1])[:1])
    params = out.variables["params"]
    return BeforeLast(hidden, params["kernel"], params.get("bias"))


class FixedNorm(nn.Module):
    r"""Batch normalization with fixed moments: y = scale (x - mean) / sqrt(var + epsilon) + bias.

    The state-free form. `mean` and `var` are parameters without gradient, which `init` sets to the moments of the batch
    that it is given, over all axes but the last: initialise with a batch that stands for the data. (No weight decay on
    them.) With the moments of a finished batch normalization, this is its inference form.

    Attributes:
      epsilon: added to the variance; Keras's 1e-3.
    """

    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes, shape = tuple(range(x.ndim - 1)), (x.shape[-1],)
        mean = jax.lax.stop_gradient(self.param("mean", lambda key: x.mean(axes)))
        var = jax.lax.stop_gradient(self.param("var", lambda key: x.var(axes)))
        scale = self.param("scale", nn.initializers.ones_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        gain = scale * jax.lax.rsqrt(var + self.epsilon)
        wide = (1,) * (x.ndim - 1) + shape
        return (x - mean.reshape(wide)) * gain.reshape(wide) + bias.reshape(wide)


class MLP(nn.Module):
    """Multilayer perceptron: f[..., D] -> f[..., features[-1]].

    Attributes:
      features: widths; the last is the output's.
      activation: of hidden layers.
      output_activation: of the output; DeepXDE applies its activation to the trunk's.
      norm: factory of the normalization between map and activation, called with `name`; None: none.
      dropout: rate after hidden activations, or a sequence of rates for the first of them.
      embed: a function of the input to begin with (`mtjax.nn.embeddings`).
      dense: factory of the maps, called with the width and `name`.
    """

    features: Sequence[int]
    activation: Activation = nn.gelu
    output_activation: Activation | None = None
    norm: Factory | None = None
    dropout: float | Sequence[float] = 0.0
    embed: Activation | None = None
    dense: Factory = GlorotDense

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, split: bool = False) -> jax.Array | BeforeLast:
        x = x if self.embed is None else self.embed(x)
        for layer, width in enumerate(self.features[:-1]):
            x = self.dense(width, name=f"dense_{layer}")(x)
            if self.norm is not None:
                x = self.norm(name=f"norm_{layer}")(x)
            x = nn.Dropout(rate_of(self.dropout, layer), deterministic=not train)(self.activation(x))
        out = self.dense(self.features[-1], name="out")
        if split:
            return before_last(out, x)
        return out(x) if self.output_activation is None else self.output_activation(out(x))


class ModifiedMLP(nn.Module):
    r"""MLP whose hidden layers choose between two encodings of the input.

        u = act(dense(x)),  v = act(dense(x));    h <- z * u + (1 - z) * v,  z = act(dense(h))

    Attributes:
      features: equal hidden widths, then the output's.
      activation, output_activation, embed, dense: as in `MLP`.

    Raises:
      ValueError: if the hidden widths differ, or there is none.

    Reference: Wang, Teng and Perdikaris, "Understanding and Mitigating Gradient Flow Pathologies in Physics-informed
      Neural Networks", SIAM Journal on Scientific Computing 2021, section 2.6. In DeepONets: Wang, Wang and Perdikaris,
      "Improved Architectures and Training Algorithms for Deep Operator Networks", Journal of Scientific Computing 2022,
      whose encoders of branch and trunk are common; here each network has its own, as in that group's Burgers code.
    """

    features: Sequence[int]
    activation: Activation = nn.tanh
    output_activation: Activation | None = None
    embed: Activation | None = None
    dense: Factory = GlorotDense

    def __post_init__(self):
        if len(set(self.features[:-1])) != 1:
            raise ValueError(f"A modified MLP has hidden layers of one width, got features={tuple(self.features)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, split: bool = False) -> jax.Array | BeforeLast:
        del train
        x = x if self.embed is None else self.embed(x)
        u, v = (self.activation(self.dense(self.features[0], name=name)(x)) for name in ("encoder_u", "encoder_v"))
        for layer, width in enumerate(self.features[:-1]):
            z = self.activation(self.dense(width, name=f"dense_{layer}")(x))
            x = z * u + (1.0 - z) * v
        out = self.dense(self.features[-1], name="out")
        if split:
            return before_last(out, x)
        return out(x) if self.output_activation is None else self.output_activation(out(x))


class ResidualMLP(nn.Module):
    """MLP with a learned projection of the layer before the last one added, from the third hidden layer on.

    Attributes:
      features: widths; the last is the output's.
      activation, norm, embed, dense: as in `MLP`.

    Reference: the trunk of the plate problem in Kumar et al., "Synergistic Learning with Multi-Task DeepONet for
      Efficient PDE Problem Solving", Neural Networks 2025, and its code.
    """

    features: Sequence[int]
    activation: Activation = nn.swish
    norm: Factory | None = None
    embed: Activation | None = None
    dense: Factory = GlorotDense

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, split: bool = False) -> jax.Array | BeforeLast:
        del train
        x = x if self.embed is None else self.embed(x)
        hidden = []
        for layer, width in enumerate(self.features[:-1]):
            x = self.dense(width, name=f"dense_{layer}")(x)
            if self.norm is not None:
                x = self.norm(name=f"norm_{layer}")(x)
            x = self.activation(x)
            if layer >= 2:
                x = x + self.dense(width, name=f"proj_{layer}")(hidden[-2])
            hidden.append(x)
        out = self.dense(self.features[-1], name="out")
        return before_last(out, x) if split else out(x)


class StackedBranch(nn.Module):
    """The stacked branch: p separate MLPs with one output each, f[B, D] -> f[B, p].

    Attributes:
      num_basis: p.
      hidden: hidden widths of every MLP.
      activation: of hidden layers.
      dropout: rate after hidden activations.

    Reference: Chen and Chen, "Universal Approximation to Nonlinear Operators by Neural Networks with Arbitrary
      Activation Functions", IEEE Transactions on Neural Networks 1995; "stacked" in Lu et al., "Learning Nonlinear
      Operators via DeepONet", Nature Machine Intelligence 2021.
    """

    num_basis: int
    hidden: Sequence[int]
    activation: Activation = nn.gelu
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        glorot = nn.initializers.glorot_normal(batch_axis=(0,))
        h = StackedMLP(self.num_basis, self.hidden, self.activation, self.dropout, None, glorot, name="hidden")(
            x, train=train
        )
        return StackedDense(self.num_basis, 1, kernel_init=glorot, name="out")(h)[:, :, 0].T


class CNN(nn.Module):
    """Convolutional branch: [conv, activation, average pooling] for each entry of `channels`, then `head` on all of it.

    Attributes:
      channels: of the convolutions.
      head: network f[B, features] -> f[B, p]; its parameters are in 'head'.
      activation: after each convolution.
      pool: side of the pooling windows; 1: no pooling.
      conv: factory of convolutions, called with the channels and `name`; 5 x 5 of full size by default.
    """

    channels: Sequence[int]
    head: nn.Module
    activation: Activation = nn.relu
    pool: int = 2
    conv: Factory = GlorotConv

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """x f[B, H, W, channels] -> f[B, p]."""
        for layer, width in enumerate(self.channels):
            x = self.activation(self.conv(width, name=f"conv_{layer}")(x))
            if self.pool > 1:
                window = (self.pool,) * (x.ndim - 2)
                if min(x.shape[1:-1]) < self.pool:
                    raise ValueError(
                        f"Convolution {layer} of {len(self.channels)} leaves an image of {x.shape[1:-1]}, too small to "
                        f"be pooled by {self.pool}; use fewer channels or a larger image"
                    )
                x = nn.avg_pool(x, window, strides=window)
        return self.head(jnp.reshape(x, (x.shape[0], -1)), train=train)
