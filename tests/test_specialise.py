"""What a program reads of its parameters: nothing else is left, and the function is the same."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.specialise import specialise

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


PARAMS = {
    "stack": {"kernel": draw(3, 4, 5), "bias": draw(3, 5)},
    "rows": draw(6, 4),
    "left": draw(2, 4),
    "right": draw(4, 8),
    "whole": draw(4, 5),
    "unused": draw(100),
}
X = draw(7, 4)


def one_of_a_stack(params, x):
    return x @ params["stack"]["kernel"][1] + params["stack"]["bias"][jnp.asarray([2])]


def by_calls(params, x):
    run = jax.checkpoint(jax.jit(lambda params, x: x @ params["stack"]["kernel"][0]))
    return run(params, x) + run(params, 2 * x)


def parts(params, x):
    return x * params["rows"][:1] + params["rows"][2:4].sum(0, keepdims=True)


def transposed(params, x):
    return {"a": x @ params["whole"], "b": (x @ params["whole"]) @ params["whole"].T}


def product(params, x):
    return x.sum() + params["left"] @ params["right"]


def parameter_itself(params, x):
    return params["whole"], x


def loop(params, x):
    return jax.lax.scan(lambda x, kernel: (x @ kernel[:, :4], None), x, params["stack"]["kernel"])[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (one_of_a_stack, {"stack/kernel": (1, 4, 5), "stack/bias": (1, 5)}),
        (by_calls, {"stack/kernel": (1, 4, 5)}),  # read twice, stored once
        (parts, {"rows": (1, 4), "rows_1": (4,)}),
        (transposed, {"whole": (4, 5)}),  # no fewer bytes: stays in the program
        (product, {"computed": (2, 8)}),  # 64 bytes, its factors have 160
        (parameter_itself, {"whole": (4, 5)}),
        (loop, {"stack/kernel": (3, 4, 5)}),
    ],
)
def test_what_is_read_is_kept_and_the_function_is_the_same(function, expected):
    values, program = specialise(function, PARAMS, X)
    assert {name: value.shape for name, value in values.items()} == expected
    for result, wanted in zip(jax.tree.leaves(program(values, X)), jax.tree.leaves(function(PARAMS, X)), strict=True):
        np.testing.assert_allclose(result, wanted, atol=1e-5)


@settings(max_examples=10)
@given(st.permutations(range(4)), st.integers(1, 4), st.integers(0, 3))
def test_any_rows_of_a_stack(order, count, axis):
    """Whatever is taken, values hold these numbers and no others, and never more than there were."""
    stack = RNG.permutation(256).reshape(4, 4, 4, 4).astype(np.float32)
    chosen = np.asarray(order[:count])

    def function(params, x):
        return jnp.moveaxis(params["stack"], axis, 0)[chosen].sum(0) * x

    def parts(params, x):
        return jnp.moveaxis(params["stack"], axis, 0)[chosen] * x

    values, program = specialise(parts, {"stack": stack}, np.float32(2.0))
    expected = np.moveaxis(stack, axis, 0)[chosen]
    np.testing.assert_array_equal(program(values, np.float32(2.0)), 2 * expected)
    np.testing.assert_array_equal(np.sort(np.ravel(values["stack"])), np.sort(expected, axis=None))
    small = specialise(function, {"stack": stack}, np.float32(2.0))[0]
    assert small["stack"].size == 64 or count == 1


def test_symbolic_sizes_effects_and_no_parameters():
    (b,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 4), jnp.float32)

    def spread(params, x):
        jax.debug.callback(lambda: None)
        return jnp.broadcast_to(params["rows"][1], x.shape) + x

    values, program = specialise(spread, PARAMS, x)
    assert {name: value.shape for name, value in values.items()} == {"rows": (1, 4)}
    assert jax.eval_shape(program, values, x).shape == (b, 4)
    assert "callback" in str(jax.make_jaxpr(program)(values, x))
    values, program = specialise(lambda params, x: 2 * x, {}, X)
    assert values == {}
    np.testing.assert_array_equal(program(values, X), 2 * X)
