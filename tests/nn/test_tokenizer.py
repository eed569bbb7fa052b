"""The tokenizer against a loop over rows and columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtjax.nn.tokenizer import FeatureTokenizer, check_features

WIDTH = 3


def tokens_by_hand(p, batch, cardinalities, num_numeric):
    """f[B, C + N, D], one column of one row at a time; `table` holds the columns' tables one after the other."""
    p = jax.tree.map(np.asarray, p)
    rows = []
    for categorical, numeric in zip(np.asarray(batch["categorical"]), np.asarray(batch["numeric"]), strict=True):
        tokens, start = [], 0
        for c, cardinality in enumerate(cardinalities):
            own_table = p["table"][start : start + cardinality]
            bias = p["categorical_bias"][c] if "categorical_bias" in p else 0
            tokens.append(own_table[categorical[c]] + bias)
            start += cardinality
        for j in range(num_numeric):
            if "kernel" in p:
                hidden = np.maximum(numeric[j] * p["hidden_weight"][j] + p["hidden_bias"][j], 0)
                tokens.append(hidden @ p["kernel"][j] + p["bias"][j])
            else:
                tokens.append(numeric[j] * p["weight"][j] + p["bias"][j])
        rows.append(tokens)
    return np.array(rows)


@settings(deadline=None, max_examples=10)
@given(
    cardinalities=st.lists(st.integers(1, 3), max_size=2),
    num_numeric=st.integers(0, 2),
    options=st.sampled_from([{}, {"categorical_bias": True}, {"numeric_hidden": 4}]),
    seed=st.integers(0, 99),
)
def test_tokens_equal_a_loop(cardinalities, num_numeric, options, seed):
    if not cardinalities and not num_numeric:
        return
    rng = np.random.default_rng(seed)
    batch = {
        "categorical": jnp.asarray(rng.integers(0, cardinalities or 1, (4, len(cardinalities))), jnp.int32),
        "numeric": jnp.asarray(rng.normal(size=(4, num_numeric)), jnp.float32),
    }
    module = FeatureTokenizer(tuple(cardinalities), num_numeric, WIDTH, **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch)
    variables = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    out = module.apply(variables, batch)
    assert out.shape == (4, len(cardinalities) + num_numeric, WIDTH)
    expected = tokens_by_hand(variables["params"], batch, cardinalities, num_numeric)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_initialisation():
    batch = {"categorical": jnp.zeros((1, 2), jnp.int32), "numeric": jnp.zeros((1, 50))}
    p = FeatureTokenizer((100, 50), 50, 20).init(jax.random.key(0), batch)["params"]
    assert {name: leaf.shape for name, leaf in p.items()} == {
        "table": (150, 20),
        "weight": (50, 20),
        "bias": (50, 20),
    }
    for name in ("table", "weight"):
        assert abs(np.std(p[name]) / 0.01 - 1) < 0.06
    assert not p["bias"].any()


def test_errors_say_what_is_wrong():
    batch = {"categorical": jnp.zeros((1, 2), jnp.int32), "numeric": jnp.zeros((1, 3))}
    sentence = "built for 2 categorical and 1 numeric columns, the batch has 2 and 3"
    with pytest.raises(ValueError, match=sentence):
        check_features(batch, (3, 3), 1)
    with pytest.raises(ValueError, match=sentence):
        FeatureTokenizer((3, 3), 1, WIDTH).init(jax.random.key(0), batch)
    empty = {"categorical": jnp.zeros((1, 0), jnp.int32), "numeric": jnp.zeros((1, 0))}
    with pytest.raises(ValueError, match="without any input column has no tokens"):
        FeatureTokenizer((), 0, WIDTH).init(jax.random.key(0), empty)
