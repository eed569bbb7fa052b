r"""The Gramian of dense layers without the rows of their Jacobian: from layer inputs and output gradients.

A dense layer y = x W on R inputs (examples times tokens) has the per-task gradients dW_k = x^T delta_k, with delta_k
the gradient of loss k at y. Their inner products are

    <dW_i, dW_j> = tr(delta_i^T x x^T delta_j) = <delta_i, (x x^T) delta_j>,

K R m numbers in the place of K n m, and R / n of the arithmetic: x^T delta_k is never formed. All that a method derived
from the Gramian needs of the K backward passes are then the delta_k, that is, the passes through the activations. Used
where R < n.

The same deltas give any combination of rows, sum_k w_k dW_k = x^T (sum_k w_k delta_k): one product, no further backward
pass. `losses_and_rows` finds such layers in the jaxpr of the loss function, however the model is written: weights that
are used once, by a `dot_general` without batch dimensions, at the top level of the trace (not inside `scan` or
`remat`). The rows of all other parameters are as they always are.

Rounding: inner products are known to eps sum_rs |x_r . x_s| |delta_r . delta_s|. Where the sum over examples nearly
cancels, |x^T delta|^2 << |x|^2 |delta|^2, that is fewer digits than rows written out have; the loss is bounded by the
squared condition number of x, as R < n.

Letters: K tasks, R inputs of a layer, n its input width, m its output width.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from mtjax import gradients

PyTree = Any
HIGHEST = gradients.HIGHEST


class Layer(NamedTuple):
    """A product of the trace whose weights get compressed rows.

    Attributes:
      equation: its position in the jaxpr.
      weights: index of the parameter leaf.
      position: which operand the weights are: 0 or 1.
      contracted: dimensions of the input that are summed over.
    """

    equation: int
    weights: int
    position: int
    contracted: tuple[int, ...]


class Rows(NamedTuple):
    """The rows of a Jacobian, as far as inner products and sums of them go.

    Attributes:
      left, right: pytrees like params with leaves [K, ...]; <left_i, right_j> are the inner products of rows i and j.
      combine: weights f[K] -> sum_k weights_k g_k, from what is in memory.
    """

    left: PyTree
    right: PyTree
    combine: Callable[[jax.Array], PyTree]


def find_layers(jaxpr: core.Jaxpr, num_leaves: int) -> list[Layer]:
    """The layers with fewer inputs than input features, among the first `num_leaves` inputs of a jaxpr."""
    uses: dict[Any, list] = {}
    for index, equation in enumerate(jaxpr.eqns):
        for position, var in enumerate(equation.invars):
            if not isinstance(var, core.Literal):
                uses.setdefault(var, []).append((index, position))
    for var in jaxpr.outvars:
        if not isinstance(var, core.Literal):
            uses.setdefault(var, []).append((None, None))

    layers = []
    for leaf, var in enumerate(jaxpr.invars[:num_leaves]):
        index, position = uses[var][0] if len(uses.get(var, ())) == 1 else (None, None)
        if index is None or jaxpr.eqns[index].primitive.name != "dot_general":
            continue
        equation = jaxpr.eqns[index]
        contracted, batched = equation.params["dimension_numbers"]
        x, y = equation.invars[1 - position].aval, equation.outvars[0].aval
        features = math.prod(x.shape[axis] for axis in contracted[1 - position])
        same_dtype = x.dtype == y.dtype == var.aval.dtype
        if not batched[0] and same_dtype and x.size > 0 and x.size // features < features:
            layers.append(Layer(index, leaf, position, tuple(contracted[1 - position])))
    return layers


def losses_and_rows(stacked: Callable, params: PyTree) -> tuple[jax.Array, Callable, Callable, Any, float]:
    """One forward pass, with two ways back.

    Args:
      stacked: `params -> (losses f[K], aux)`.
      params: where.

    Returns:
      losses f[K]; `pullback: f[K] -> gradient`; `rows: () -> Rows`; aux; and the share of the parameters whose rows are
      written out.
    """
    leaves, treedef = jax.tree.flatten(params)
    flat_stacked = lambda *leaves: stacked(jax.tree.unflatten(treedef, leaves))  # noqa: E731
    closed, shapes = jax.make_jaxpr(flat_stacked, return_shape=True)(*leaves)
    layers = find_layers(closed.jaxpr, len(leaves))
    tapped = {layer.weights for layer in layers}

    def run(others, taps):
        """The loss with the layers' weights held fixed and something (zero) added to their outputs."""
        rest = iter(others)
        full = [leaf if index in tapped else next(rest) for index, leaf in enumerate(leaves)]
        outputs, inputs = _evaluate(closed, full, layers, taps)
        losses, aux = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
        return losses, (aux, inputs)

    others = [leaf for index, leaf in enumerate(leaves) if index not in tapped]
    avals = [closed.jaxpr.eqns[layer.equation].outvars[0].aval for layer in layers]
    taps = [jnp.zeros(aval.shape, aval.dtype) for aval in avals]
    losses, backward, (aux, inputs) = jax.vjp(run, others, taps, has_aux=True)

    def assemble(of_others, of_layers):
        rest, found = (
            iter(of_others),
            {layer.weights: value for layer, value in zip(layers, of_layers, strict=True)},
        )
        return treedef.unflatten([found[i] if i in tapped else next(rest) for i in range(len(leaves))])

    def pullback(cotangent):
        of_others, deltas = backward(cotangent)
        weights = [
            _weight_gradient(closed.jaxpr.eqns[layer.equation], layer, x, delta)
            for layer, x, delta in zip(layers, inputs, deltas, strict=True)
        ]
        return assemble(of_others, weights)

    def rows():
        of_others, deltas = jax.vmap(backward)(jnp.eye(losses.shape[0], dtype=losses.dtype))
        pairs = [_factors(layer, x, delta) for layer, x, delta in zip(layers, inputs, deltas, strict=True)]
        left, right = (assemble(of_others, [pair[side] for pair in pairs]) for side in (0, 1))

        def combine(weights):
            weighted = gradients.combine(deltas, weights)
            found = [
                _weight_gradient(closed.jaxpr.eqns[layer.equation], layer, x, delta)
                for layer, x, delta in zip(layers, inputs, weighted, strict=True)
            ]
            return assemble(gradients.combine(of_others, weights), found)

        return Rows(left, right, combine)

    written_out = sum(leaf.size for leaf in others) / max(1, sum(leaf.size for leaf in leaves))
    return losses, pullback, rows, aux, written_out


def _evaluate(closed: core.ClosedJaxpr, args: list, layers: list[Layer], taps: list) -> tuple[list, list]:
    """Runs a jaxpr; adds each tap to its layer's output. Returns the outputs and the layers' inputs."""
    jaxpr = closed.jaxpr
    at = {layer.equation: number for number, layer in enumerate(layers)}
    inputs: list = [None] * len(layers)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(var):
        return var.val if isinstance(var, core.Literal) else env[var]

    for index, equation in enumerate(jaxpr.eqns):
        operands = [read(var) for var in equation.invars]
        params = equation.primitive.get_bind_params(equation.params)
        functions, params = params if isinstance(params, tuple) else ((), params)
        with equation.ctx.manager:
            outputs = equation.primitive.bind(*functions, *operands, **params)
        outputs = outputs if equation.primitive.multiple_results else [outputs]
        if index in at:
            inputs[at[index]] = operands[1 - layers[at[index]].position]
            outputs = [outputs[0] + taps[at[index]]]
        env.update(zip(equation.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars], inputs


def _weight_gradient(equation: Any, layer: Layer, x: jax.Array, delta: jax.Array) -> jax.Array:
    """x^T delta in the layout of the weights."""

    def product(weights):
        operands = (weights, x) if layer.position == 0 else (x, weights)
        return jax.lax.dot_general(*operands, **{**equation.params, "out_sharding": None})

    weights = equation.invars[layer.position].aval
    return jax.linear_transpose(product, jax.ShapeDtypeStruct(weights.shape, weights.dtype))(delta)[0]


def _factors(layer: Layer, x: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """|x_r| delta_kr and sum_s cos(x_r, x_s) |x_s| delta_ks, both [K, R, m]."""
    free = [axis for axis in range(x.ndim) if axis not in layer.contracted]
    features = math.prod(x.shape[axis] for axis in layer.contracted)
    flat = x.transpose(free + list(layer.contracted)).reshape(-1, features)
    num_tasks, size = delta.shape[0], flat.shape[0]
    # The output has the input's free dimensions last if the weights came first.
    delta = delta.reshape(num_tasks, size, -1) if layer.position == 1 else delta.reshape(num_tasks, -1, size).mT

    # Inputs of unit length: squares of small ones would leave the range of float32.
    largest = jnp.max(jnp.abs(flat), axis=1, keepdims=True)
    scaled = flat / jnp.where(largest > 0, largest, 1.0)
    length = jnp.linalg.norm(scaled, axis=1, keepdims=True)
    unit = scaled / jnp.where(length > 0, length, 1.0)
    left = (largest * length)[None] * delta
    cosines = jnp.broadcast_to(jnp.matmul(unit, unit.T, precision=HIGHEST)[None], (num_tasks, size, size))
    return left, jnp.matmul(cosines, left, precision=HIGHEST)
