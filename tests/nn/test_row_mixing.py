"""Row mixing: each mode against what it says it is, on numpy loops over rows and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.attention import TransformerLayer
from mtjax.nn.row_mixing import ROW_MIXING, RowMixing, TokenMixer, check_row_mixing, context_mask

ROWS, TOKENS, WIDTH, HEADS, FF = 4, 3, 2, 2, 5
X = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, TOKENS, WIDTH)), jnp.float32)


def random_params(module, *args, seed=0):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, s.dtype), shapes)


def quick_jit(f):
    """One compiled program instead of one per operation, compiled in half the time."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def apply(module, params, *args):
    return quick_jit(module.apply)({"params": params}, *args)


def test_context_rows_read_the_context_and_a_query_row_also_itself():
    expected = [
        [1, 1, 0, 0],  # context
        [1, 1, 0, 0],
        [1, 1, 1, 0],  # queries
        [1, 1, 0, 1],
    ]
    np.testing.assert_array_equal(context_mask(2, 2), np.array(expected, bool))


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"row_mixing must be one of none, token_mixer, .* got 'rows'"):
        check_row_mixing("rows")


def test_none_is_the_identity():
    assert RowMixing("none", HEADS, FF).apply({}, X) is X


def test_token_mixer_is_attention_over_a_sequence_of_one_row():
    """With one key the softmax is 1 whatever queries and keys are: only values and the output map are left."""
    layer, mixer = TransformerLayer(HEADS, FF), TokenMixer(FF)
    flat = X.reshape(ROWS, 1, TOKENS * WIDTH)  # a batch of sequences of length one
    params = random_params(layer, flat)["params"]
    value = {name: leaf[..., 2, :] for name, leaf in params["attention"]["qkv"].items()}
    kept = {name: params[name] for name in ("norm_1", "norm_2", "feed_forward")}
    mixed = apply(mixer, kept | {"value": value, "out": params["attention"]["out"]}, X)
    np.testing.assert_allclose(mixed, apply(layer, params, flat).reshape(X.shape), atol=1e-6)


def test_flat_attention_is_a_layer_over_the_flattened_rows():
    mixing = RowMixing("flat_attention", HEADS, FF)
    variables = random_params(mixing, X)
    layer = TransformerLayer(HEADS, FF)
    rows = jnp.stack([jnp.concatenate(list(row)) for row in X])
    mask = context_mask(2, 2)
    expected = apply(layer, variables["params"]["row"], rows, mask)
    out = apply(mixing, variables["params"], X, mask)
    for b in range(ROWS):
        np.testing.assert_allclose(out[b], expected[b].reshape(TOKENS, WIDTH), atol=1e-6)


def test_axial_attention_is_a_layer_over_rows_for_each_token():
    mixing = RowMixing("axial_attention", HEADS, FF)
    variables = random_params(mixing, X)
    layer = TransformerLayer(HEADS, FF)
    mask = context_mask(2, 2)
    out = apply(mixing, variables["params"], X, mask)
    one_token = quick_jit(lambda params, x: layer.apply({"params": params}, x, mask))
    for token in range(TOKENS):
        expected = one_token(variables["params"]["row"], X[:, token])
        np.testing.assert_allclose(out[:, token], expected, atol=1e-6)


# Which output [row, token] depends on which input [row, token]: (across rows, across tokens of a row).
REACH = {
    "none": (False, False),
    "token_mixer": (False, True),
    "flat_attention": (True, True),
    "axial_attention": (True, False),
}


@pytest.mark.parametrize("mode", ROW_MIXING)
def test_what_each_mode_mixes(mode):
    mixing = RowMixing(mode, HEADS, FF)
    variables = random_params(mixing, X)
    jacobian = quick_jit(jax.jacrev(lambda x: mixing.apply(variables, x)))(X)
    depends = np.abs(np.asarray(jacobian)).sum((2, 5)) > 0  # [row, token, row, token]
    across_rows, across_tokens = REACH[mode]
    same_row, same_token = np.eye(ROWS, dtype=bool), np.eye(TOKENS, dtype=bool)
    expected = (same_row | across_rows)[:, None, :, None] & (same_token | across_tokens)[None, :, None, :]
    np.testing.assert_array_equal(depends, expected)


def test_values_of_both_flattened_layers_start_alike():
    """The packed [D, 3D] Xavier initialisation has the bound sqrt(6 / 4D); the token mixer keeps the value part."""
    x = jnp.zeros((2, 10, 12))
    width = 120
    init = {mode: quick_jit(RowMixing(mode, 4, FF).init) for mode in ("token_mixer", "flat_attention")}
    key = jax.random.key(0, impl="rbg")  # compiles faster
    mixer = init["token_mixer"](key, x)["params"]["row"]
    attention = init["flat_attention"](key, x)["params"]["row"]["attention"]
    bound = np.sqrt(6 / (4 * width))
    for kernel in (mixer["value"]["kernel"], attention["qkv"]["kernel"][:, 2]):
        assert kernel.shape == (width, width)
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        assert abs(np.std(kernel) / (bound / np.sqrt(3)) - 1) < 0.02
    for kernel in (mixer["out"]["kernel"], attention["out"]["kernel"]):
        assert abs(np.std(kernel) / 0.01 - 1) < 0.03
