"""FT-Transformer, TabTransformer and SAINT, one per task: against numpy loops; independence of the copies; one task."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from mtjax.models import ft_transformer, saint, tab_transformer
from mtjax.models.multitab import MultiTabNet
from mtjax.models.single_task_model import extract

HEADS = {"a": 1, "b": 3, "c": 1}
CARDINALITIES, NUMERIC, WIDTH, FF = (3, 2), 2, 8, 5
BATCH = 4
RNG = np.random.default_rng(0)


def make_batch(rows):
    return {
        "categorical": jnp.asarray(RNG.integers(0, CARDINALITIES, (rows, len(CARDINALITIES))), jnp.int32),
        "numeric": jnp.asarray(RNG.normal(size=(rows, NUMERIC)), jnp.float32),
    }


DATA = make_batch(BATCH) | {"context": make_batch(3)}
SIZES = dict(width=WIDTH, num_heads=2, ff_width=FF, head_hidden=(6,))


def random_params(net, batch=DATA, seed=0):
    """Parameters of the right shapes, every entry random: zero biases would hide a wrong index."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), batch)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, s.dtype), shapes)


def quick_jit(f):
    """One compiled program instead of one per operation, compiled in half the time."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def compiled(net, **options):
    return quick_jit(lambda variables, batch: net.apply(variables, batch, **options))


def apply(net, variables, batch=DATA, **options):
    return compiled(net, **options)(variables, batch)


# The networks of one task by the book, on all rows and all tokens.


def layer_norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def gelu(h):
    return h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2


def attention(p, x, mask=None):
    """x f[n, D] -> f[n, D], 2 heads."""
    n, width = x.shape
    parts = (dense({name: leaf[..., i, :] for name, leaf in p["qkv"].items()}, x) for i in range(3))
    query, key, value = (part.reshape(n, 2, -1) for part in parts)
    mixed = np.zeros_like(value)
    for q in range(n):
        for h in range(2):
            weight = np.exp(key[:, h] @ query[q, h] / math.sqrt(width / 2)) * (1 if mask is None else mask[q])
            mixed[q, h] = weight / weight.sum() @ value[:, h]
    return dense(p["out"], mixed.reshape(n, width))


def pre_norm_layer(p, x, mask=None):
    u = x + attention(p["attention"], layer_norm(p["norm_1"], x), mask)
    return u + dense(p["feed_forward"]["out"], gelu(dense(p["feed_forward"]["in"], layer_norm(p["norm_2"], u))))


def columns(p, codes, numbers):
    """Tokens of one row f[C + N, D]."""
    tokens = [p["table"][codes[0]], p["table"][CARDINALITIES[0] + codes[1]]]
    if "categorical_bias" in p:
        tokens = [token + bias for token, bias in zip(tokens, p["categorical_bias"], strict=True)]
    for j, x in enumerate(numbers):
        if "kernel" in p:
            hidden = np.maximum(x * p["hidden_weight"][j] + p["hidden_bias"][j], 0)
            tokens.append(hidden @ p["kernel"][j] + p["bias"][j])
        else:
            tokens.append(x * p["weight"][j] + p["bias"][j])
    return np.stack(tokens)


def rows_of(batch):
    return zip(np.asarray(batch["categorical"]), np.asarray(batch["numeric"]), strict=True)


def ft_by_the_book(p):
    z = []
    for codes, numbers in rows_of(DATA):
        x = np.concatenate([p["cls"][None], columns(p["features"], codes, numbers)])
        for block in range(2):
            layer = p[f"block_{block}"]
            assert ("norm_1" in layer) == (block > 0)
            x = x + attention(layer["attention"], layer_norm(layer["norm_1"], x) if block else x)
            h = dense(layer["feed_forward"]["in"], layer_norm(layer["norm_2"], x))
            x = x + dense(layer["feed_forward"]["out"], h[:, :FF] * np.maximum(h[:, FF:], 0))  # ReGLU
        z.append(np.maximum(layer_norm(p["norm"], x[0]), 0))
    return np.stack(z)


def tab_by_the_book(p):
    z = []
    for codes, numbers in rows_of(DATA):
        x = np.concatenate([p["column"], columns(p["features"], codes, ())], axis=1)
        for block in range(2):
            x = pre_norm_layer(p[f"block_{block}"], x)
        z.append(np.concatenate([x.ravel(), layer_norm(p["norm_numeric"], numbers)]))
    return np.stack(z)


def saint_by_the_book(p):
    """At inference: the 3 context rows first, read by all; a row reads itself too."""
    rows = [columns(p["features"], *row) for part in (DATA["context"], DATA) for row in rows_of(part)]
    x = np.stack([np.concatenate([p["cls"], row]) for row in rows])
    x = np.stack([pre_norm_layer(p["features_0"], row) for row in x])
    mask = (np.arange(len(x)) < 3)[None] | np.eye(len(x), dtype=bool)
    x = pre_norm_layer(p["rows_0"]["row"], x.reshape(len(x), -1), mask).reshape(x.shape)
    return x[3:, 0]


FT = ft_transformer.single_task_ft_transformer(HEADS, CARDINALITIES, NUMERIC, **SIZES)
TAB = tab_transformer.single_task_tab_transformer(HEADS, CARDINALITIES, NUMERIC, **SIZES)
SAINT = saint.single_task_saint(HEADS, CARDINALITIES, NUMERIC, **SIZES, numeric_hidden=3)
MODELS = {"ft": (FT, ft_by_the_book), "tab": (TAB, tab_by_the_book), "saint": (SAINT, saint_by_the_book)}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A model, its parameters, its outputs, and what the heads read, by the model and by the book."""
    model, book = MODELS[request.param]
    variables = random_params(model)
    outputs, aux = apply(model, variables, aux=True)
    copies = [jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), variables["params"]["body"]) for k in range(3)]
    return model, variables, outputs, aux["representation"], np.stack([book(p) for p in copies])


def test_copies_equal_a_loop(case):
    _, variables, outputs, representation, expected = case
    np.testing.assert_allclose(representation, expected, atol=2e-5)
    p = jax.tree.map(np.asarray, variables["params"]["heads"])
    assert list(outputs) == list(HEADS)
    for k, (name, size) in enumerate(HEADS.items()):
        tower, out = p["tower"]["dense_0"], p[f"out_{size}"]
        h = np.maximum(expected[k] @ tower["kernel"][k] + tower["bias"][k], 0)
        i = [other for other in HEADS if HEADS[other] == size].index(name)
        assert outputs[name].shape == ((BATCH,) if size == 1 else (BATCH, size))
        np.testing.assert_allclose(outputs[name].reshape(BATCH, size), h @ out["kernel"][i] + out["bias"][i], atol=1e-4)


def test_every_parameter_has_a_task_axis(case):
    _, variables, *_ = case
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.shape[0] == {"heads/out_1": 2, "heads/out_3": 1}.get(name.rsplit("/", 1)[0], 3), name


def test_one_task_equals_all_tasks(case):
    model, variables, outputs, representation, _ = case
    one, aux = apply(model, variables, task="b", aux=True)
    assert list(one) == ["b"] and aux["representation"].shape == (1, *representation.shape[1:])
    np.testing.assert_allclose(one["b"], outputs["b"], atol=1e-5)


def test_one_task_costs_a_third(case):
    model, variables, *_ = case
    model = model.clone(body=model.body.clone(chunk_rows=None))

    def flops(**options):
        lowered = jax.jit(lambda variables: model.apply(variables, DATA, **options)).lower(variables)
        return lowered.cost_analysis()["flops"]

    assert 0.25 < flops(task="c") / flops() < 0.4


def test_gradients_stay_in_the_copy_of_their_task():
    variables = random_params(TAB)

    @quick_jit
    @jax.grad
    def gradient(variables, one_hot):
        return one_hot @ jnp.stack([y.sum() for y in TAB.apply(variables, DATA).values()])

    for k in range(3):
        body = gradient(variables, jnp.eye(3)[k])["params"]["body"]
        size = np.stack([np.abs(leaf).reshape(3, -1).sum(1) for leaf in jax.tree.leaves(body)])
        assert size[:, k].any() and not np.delete(size, k, axis=1).any()


def test_extraction():
    variables = random_params(TAB)
    small, kept = extract(TAB, variables, ["c", "b"])
    assert list(small.heads) == ["b", "c"]
    smaller = apply(small, kept)
    whole = apply(TAB, variables, aux=True)[0]  # compiled already
    for name in ("b", "c"):
        np.testing.assert_allclose(smaller[name], whole[name], atol=1e-5)
    only, kept = extract(TAB, variables, ["c"])
    shapes = jax.eval_shape(only.init, jax.random.key(0), DATA)
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, shapes)
    with pytest.raises(ValueError, match=r"tasks must name some of a, b, c, got \['d'\]"):
        extract(TAB, variables, ["d"])


@pytest.mark.parametrize("name", MODELS)
def test_the_program_does_not_grow_with_the_number_of_tasks(name):
    def matrix_products(num_tasks):
        model = MODELS[name][0].clone(heads={f"task_{k}": 1 for k in range(num_tasks)})
        variables = jax.eval_shape(model.init, jax.random.key(0), DATA)
        return str(jax.make_jaxpr(model.apply)(variables, DATA)).count("dot_general")

    assert matrix_products(2) == matrix_products(20)


def test_copies_start_apart():
    """Initialisation of the authors' code: U(-1/sqrt(fan-in), 1/sqrt(fan-in)); tokens U(-1/sqrt(D), 1/sqrt(D))."""
    model = ft_transformer.single_task_ft_transformer(HEADS, (30, 10), 20, width=16, num_blocks=1)
    batch = {"categorical": jnp.zeros((1, 2), jnp.int32), "numeric": jnp.zeros((1, 20))}
    key = jax.random.key(0, impl="rbg")  # compiles faster
    params = quick_jit(model.init)(key, batch)["params"]
    fan_in = {"feed_forward/in": 16, "feed_forward/out": 256, "attention/out": 16, "tower/dense_0": 16}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "norm" in name:
            assert np.ptp(leaf) == 0, name
        elif "features" in name or name.endswith("cls"):
            assert 0.9 / 4 < np.abs(leaf).max() <= 1 / 4, name
        elif name.endswith("bias"):
            assert not leaf.any(), name
        elif "qkv" in name:
            assert 0.95 * math.sqrt(6 / 64) < np.abs(leaf).max() <= math.sqrt(6 / 64), name
        else:
            inputs = fan_in.get("/".join(name.split("/")[-3:-1]), 64)
            assert 0.9 < np.abs(leaf).max() * math.sqrt(inputs) <= 1, name
        if len(leaf) > 1 and np.ptp(leaf):
            assert not np.allclose(leaf[0], leaf[1]), name


@pytest.mark.parametrize("name", MODELS)
def test_parameters_do_not_depend_on_the_task_asked_for(name):
    model, _ = MODELS[name]
    shapes = jax.eval_shape(model.init, jax.random.key(0), DATA)
    assert jax.eval_shape(lambda key: model.init(key, DATA, task="b"), jax.random.key(0)) == shapes


def test_dropout_is_drawn_for_each_copy():
    model = TAB.clone(body=TAB.body.clone(ff_dropout=0.5, num_blocks=1))
    variables = random_params(model)
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), variables["params"]["body"])
    variables = {"params": variables["params"] | {"body": same}}
    run = quick_jit(lambda key: model.apply(variables, DATA, train=True, aux=True, rngs={"dropout": key})[1])
    z = run(jax.random.key(0))["representation"]
    assert not np.allclose(z[0], z[1]) and not np.allclose(z[1], z[2])
    np.testing.assert_array_equal(z, run(jax.random.key(0))["representation"])
    still = apply(model, variables, aux=True)[1]["representation"]
    np.testing.assert_allclose(still[0], still[1], atol=1e-6)


# What is special to each of them.


def num_parameters(model, num_categorical, num_numeric):
    batch = {"categorical": jnp.zeros((2, num_categorical), jnp.int32), "numeric": jnp.zeros((2, num_numeric))}
    shapes = jax.eval_shape(lambda key: model.init(key, batch, train=True), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def linear(inputs, outputs):
    return inputs * outputs + outputs


def test_ft_transformer_of_the_paper_counted_by_layer():
    model = ft_transformer.single_task_ft_transformer({"a": 1, "b": 1}, (5, 3), 4, **ft_transformer.PAPER)
    d, hidden = 192, 256
    tokenizer = (5 + 3) * d + 2 * d + 2 * 4 * d + d  # tables, their biases, numeric maps, [CLS]
    layer = linear(d, 3 * d) + linear(d, d) + linear(d, 2 * hidden) + linear(hidden, d) + 2 * 2 * d
    one = tokenizer + 3 * layer - 2 * d + 2 * d + linear(d, 1)  # no first norm; a last one
    assert num_parameters(model, 2, 4) == 2 * one


def test_tab_transformer_of_the_paper_counted_by_layer():
    tower = tab_transformer.paper_tower((5, 3), 4, width=32)
    assert tower == (4 * 68, 2 * 68)
    model = tab_transformer.single_task_tab_transformer({"a": 1}, (5, 3), 4, head_hidden=tower, **tab_transformer.PAPER)
    tokens = (5 + 3) * 28 + 2 * 4  # an eighth of the width says which column it is
    layer = linear(32, 96) + linear(32, 32) + linear(32, 128) + linear(128, 32) + 4 * 32
    mlp = linear(68, 272) + linear(272, 136) + linear(136, 1)
    assert num_parameters(model, 2, 4) == tokens + 6 * layer + 2 * 4 + mlp


def test_saint_of_the_paper_counted_by_layer():
    model = saint.single_task_saint({"a": 1}, (5, 3), 4, **saint.PAPER)
    tokens = (1 + 5 + 3) * 32 + 4 * (linear(1, 100) + linear(100, 32))

    def layer(width):
        return linear(width, 3 * width) + linear(width, width) + linear(width, 128) + linear(128, width) + 4 * width

    assert num_parameters(model, 2, 4) == tokens + layer(32) + layer(7 * 32) + linear(32, 1000) + linear(1000, 1)


def test_saint_is_multitab_net_with_one_task_and_no_mask():
    options = SIZES | {"row_mixing": "flat_attention", "num_blocks": 1}
    one_saint = saint.single_task_saint({"a": 1}, CARDINALITIES, NUMERIC, **options)
    multitab = MultiTabNet(FrozenDict(a=1), CARDINALITIES, NUMERIC, mask="none", **options)
    variables = random_params(one_saint)
    body = jax.tree.map(lambda leaf: leaf[0], variables["params"]["body"])
    body["task_tokens"] = body.pop("cls")
    params = body | {"heads": variables["params"]["heads"]}
    assert jax.tree.map(jnp.shape, {"params": params}) == jax.tree.map(
        jnp.shape, jax.eval_shape(multitab.init, jax.random.key(0), DATA)
    )
    out, expected = apply(one_saint, variables)["a"], apply(multitab, {"params": params})["a"]
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_saint_needs_a_context_at_inference_only_if_rows_read_rows():
    batch = {key: DATA[key] for key in ("categorical", "numeric")}
    for row_mixing, needs in [("flat_attention", True), ("token_mixer", False)]:
        model = SAINT.clone(body=SAINT.body.clone(row_mixing=row_mixing))
        assert model.needs_context == needs
        variables = jax.eval_shape(lambda key, model=model: model.init(key, batch, train=True), jax.random.key(0))
        if needs:
            with pytest.raises(ValueError, match="row_mixing='flat_attention' attends to other rows"):
                jax.eval_shape(model.apply, variables, batch)
            model = model.clone(body=model.body.clone(inference_context="batch"))
        assert jax.eval_shape(model.apply, variables, batch)["b"].shape == (BATCH, 3)
    assert not FT.needs_context and not TAB.needs_context


def test_tab_transformer_on_tables_with_few_columns():
    def representation(cardinalities, numeric):
        model = tab_transformer.single_task_tab_transformer({"a": 1}, cardinalities, numeric.shape[1], **SIZES)
        categorical = jnp.zeros((len(numeric), len(cardinalities)), jnp.int32)
        batch = {"categorical": categorical, "numeric": numeric}
        return apply(model, random_params(model, batch), batch, aux=True)[1]["representation"][0]

    assert representation((3,), jnp.zeros((2, 0))).shape == (2, WIDTH)
    # A layer norm over one number would erase it.
    numeric = jnp.asarray([[0.5], [-2.0]])
    np.testing.assert_array_equal(representation((3,), numeric)[:, -1:], numeric)
    with pytest.raises(ValueError, match="TabTransformer attends to categorical columns and this table has none"):
        representation((), numeric)


def test_unknown_task():
    with pytest.raises(ValueError, match="task='d' is not one of the model's tasks: a, b, c"):
        jax.eval_shape(lambda key: FT.init(key, DATA, task="d"), jax.random.key(0))
