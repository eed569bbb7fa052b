"""MultiTab-Net: against numpy loops, what its masks isolate, one task, rows of a batch, sizes, initialisation, seeds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.models.multitab import PAPER_TEXT, PUBLISHED_RUNS, MultiTabNet
from mtjax.nn.attention import MASKS, multitask_mask
from mtjax.nn.row_mixing import ROW_MIXING

HEADS = {"a": 1, "b": 3, "c": 1}
T, CARDINALITIES, NUMERIC, WIDTH, FF = 3, (3, 2), 2, 4, 5
NUM_FEATURES = len(CARDINALITIES) + NUMERIC
BATCH = 5
RNG = np.random.default_rng(0)


def make_batch(rows, rng=RNG):
    return {
        "categorical": jnp.asarray(rng.integers(0, CARDINALITIES, (rows, len(CARDINALITIES))), jnp.int32),
        "numeric": jnp.asarray(rng.normal(size=(rows, NUMERIC)), jnp.float32),
    }


DATA = make_batch(BATCH) | {"context": make_batch(3)}


def model(**options):
    sizes = {"width": WIDTH, "num_heads": 2, "ff_width": FF, "head_hidden": (3,), "row_mixing": "none"}
    return MultiTabNet(HEADS, CARDINALITIES, NUMERIC, **sizes | options)


def random_params(net, batch=DATA, seed=0):
    """Parameters of the right shapes, every entry random: zero biases would hide a wrong index."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), batch)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, s.dtype), shapes)


def apply(net, variables, batch=DATA, **options):
    """One compiled program instead of one per operation."""
    return jax.jit(lambda variables, batch: net.apply(variables, batch, **options))(variables, batch)


# The network by the book: one row, one query and one attention head at a time.


def layer_norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def feed_forward(p, x):
    h = dense(p["in"], x)
    return dense(p["out"], h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2)


def transformer_layer(p, x, mask, heads=2):
    """x f[n, D] -> f[n, D]."""
    n, width = x.shape
    qkv = dense(p["attention"]["qkv"], layer_norm(p["norm_1"], x))
    query, key, value = (qkv[:, i * width : (i + 1) * width].reshape(n, heads, -1) for i in range(3))
    mixed = np.zeros_like(value)
    for q in range(n):
        for h in range(heads):
            scores = {k: query[q, h] @ key[k, h] / math.sqrt(width / heads) for k in range(n) if mask[q, k]}
            total = sum(math.exp(s) for s in scores.values())
            mixed[q, h] = sum(math.exp(s) / total * value[k, h] for k, s in scores.items())
    u = x + dense(p["attention"]["out"], mixed.reshape(n, width))
    return u + feed_forward(p["feed_forward"], layer_norm(p["norm_2"], u))


def token_mixer(p, flat):
    u = flat + dense(p["out"], dense(p["value"], layer_norm(p["norm_1"], flat)))
    return u + feed_forward(p["feed_forward"], layer_norm(p["norm_2"], u))


def by_the_book(net, variables, batch):
    """Outputs as arrays f[B, size]. At inference with context rows, where rows read rows."""
    p = jax.tree.map(np.asarray, variables["params"])
    across = net.row_mixing in ("flat_attention", "axial_attention")
    parts = [batch["context"], batch] if across else [batch]
    num_context = 3 if across else 0
    rows = []
    for part in parts:
        for codes, numbers in zip(np.asarray(part["categorical"]), np.asarray(part["numeric"]), strict=True):
            columns = [p["features"]["table"][codes[0]], p["features"]["table"][CARDINALITIES[0] + codes[1]]]
            columns += [
                x * w + b for x, w, b in zip(numbers, p["features"]["weight"], p["features"]["bias"], strict=True)
            ]
            rows.append(np.stack([*p["task_tokens"], *columns]))
    x = np.stack(rows)
    mask = multitask_mask(len(p["task_tokens"]), NUM_FEATURES, net.mask)
    row_mask = np.array([[j < num_context or i == j for j in range(len(x))] for i in range(len(x))])
    for block in range(net.num_blocks):
        x = np.stack([transformer_layer(p[f"features_{block}"], row, mask) for row in x])
        if net.row_mixing == "token_mixer":
            x = np.stack([token_mixer(p[f"rows_{block}"]["row"], row.ravel()).reshape(row.shape) for row in x])
        elif net.row_mixing == "flat_attention":
            flat = transformer_layer(p[f"rows_{block}"]["row"], x.reshape(len(x), -1), row_mask)
            x = flat.reshape(x.shape)
        elif net.row_mixing == "axial_attention":
            layers = [transformer_layer(p[f"rows_{block}"]["row"], x[:, n], row_mask) for n in range(x.shape[1])]
            x = np.stack(layers, axis=1)
    outputs = {}
    for t, (name, size) in enumerate(HEADS.items()):
        z = x[num_context:, t if net.multi_token else 0]
        tower, out = p["heads"]["tower"]["dense_0"], p["heads"][f"out_{size}"]
        h = np.maximum(z @ tower["kernel"][t] + tower["bias"][t], 0)
        i = [other for other in HEADS if HEADS[other] == size].index(name)
        outputs[name] = h @ out["kernel"][i] + out["bias"][i]
    return outputs


CUSTOM = tuple(map(tuple, (np.random.default_rng(5).random((7, 7)) < 0.4) | np.eye(7, dtype=bool)))
CASES = [
    *[dict(mask=mask, row_mixing="none") for mask in MASKS],
    dict(mask="TxT", row_mixing="none", num_blocks=2),
    dict(mask=CUSTOM, row_mixing="none", num_blocks=2),
    dict(mask="FxT", row_mixing="token_mixer", num_blocks=2),
    dict(mask="TxT", row_mixing="flat_attention"),
    dict(mask="FxT_TxT", row_mixing="axial_attention", num_blocks=2),
    dict(mask="TxT", row_mixing="none", multi_token=False),
    dict(mask="FxT", row_mixing="token_mixer", multi_token=False),
]


def name_of(case):
    words = [v if isinstance(v, str) else "custom" if isinstance(v, tuple) else f"{k}={v}" for k, v in case.items()]
    return "-".join(words)


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def case(request):
    """A network, its parameters and what it computes for all tasks."""
    net = model(**request.param)
    variables = random_params(net)
    return net, variables, apply(net, variables)


def test_network_equals_a_loop(case):
    net, variables, outputs = case
    expected = by_the_book(net, variables, DATA)
    assert list(outputs) == list(HEADS)
    for name, size in HEADS.items():
        assert outputs[name].shape == ((BATCH,) if size == 1 else (BATCH, size))
        np.testing.assert_allclose(outputs[name].reshape(BATCH, size), expected[name], atol=2e-5)


@pytest.mark.parametrize("task", ["b", "c"])
def test_one_task_equals_all_tasks(case, task):
    net, variables, outputs = case
    one = apply(net, variables, task=task)
    assert list(one) == [task]
    np.testing.assert_allclose(one[task], outputs[task], atol=1e-5)


def flops(net, **options):
    variables = jax.eval_shape(net.init, jax.random.key(0), DATA)
    lowered = jax.jit(lambda variables: net.apply(variables, DATA, **options)).lower(variables)
    return lowered.cost_analysis()["flops"]


def test_one_task_costs_less_where_tokens_can_be_left_out():
    """Exactly the cost of a network without the tokens that cannot reach the head asked for."""
    one_head = dict(heads={"c": 1}, chunk_rows=None)
    for options in (dict(mask="TxT"), dict(mask="FxT_TxT", num_blocks=2)):
        net = model(chunk_rows=None, **options)
        assert flops(net, task="c") < 0.6 * flops(net)
        assert flops(net, task="c") <= 1.02 * flops(net.clone(**one_head))
        axial = net.clone(row_mixing="axial_attention")
        assert flops(axial, task="c") < 0.9 * flops(axial)
    # The row mixes all tokens, so that only the other heads can be left out.
    mixed = model(chunk_rows=None, row_mixing="token_mixer")
    assert 0.9 * flops(mixed) < flops(mixed, task="c") < flops(mixed)


# Isolation. Rows of the table: mask, depth, how the flattened row is mixed; then whether the output of a task is
# independent of the other tasks' tokens. A mask constrains one attention matrix, not the model:
ISOLATED = {
    # mask, blocks: none / axial_attention, token_mixer / flat_attention
    ("none", 1): (False, False),
    ("none", 2): (False, False),
    ("FxT", 1): (False, False),  # tasks read each other directly
    ("FxT", 2): (False, False),
    ("TxT", 1): (True, False),
    ("TxT", 2): (False, False),  # task -> feature -> task
    ("FxT_TxT", 1): (True, False),
    ("FxT_TxT", 2): (True, False),
}


@pytest.mark.parametrize("row_mixing", ["none", "token_mixer", "axial_attention", "flat_attention"])
@pytest.mark.parametrize(("mask", "num_blocks"), ISOLATED)
def test_which_head_depends_on_which_task_token(mask, num_blocks, row_mixing):
    if row_mixing in ("axial_attention", "flat_attention") and mask in ("none", "FxT"):
        pytest.skip("covered by none and token_mixer")
    net = model(mask=mask, num_blocks=num_blocks, row_mixing=row_mixing, chunk_rows=None)
    variables = random_params(net)

    def outputs(tokens):
        params = variables["params"] | {"task_tokens": tokens}
        return jnp.stack([y.reshape(BATCH, -1).sum() for y in net.apply({"params": params}, DATA).values()])

    jacobian = jax.jit(jax.jacrev(outputs))(variables["params"]["task_tokens"])  # [head, token, D]
    depends = np.abs(np.asarray(jacobian)).max(-1) > 0
    isolated = ISOLATED[mask, num_blocks][row_mixing in ("token_mixer", "flat_attention")]
    np.testing.assert_array_equal(depends, np.eye(T, dtype=bool) | (not isolated))


def test_with_one_token_every_head_reads_it():
    net = model(multi_token=False, mask="FxT_TxT")
    variables = random_params(net)
    assert variables["params"]["task_tokens"].shape == (1, WIDTH)
    outputs, aux = apply(net, variables, aux=True)
    assert aux["tokens"].shape == (BATCH, 1, WIDTH) and set(outputs) == set(HEADS)
    outputs, aux = apply(model(), random_params(model()), aux=True)
    assert aux["tokens"].shape == (BATCH, T, WIDTH)


# Rows of a batch.


@pytest.mark.parametrize("row_mixing", ROW_MIXING)
def test_a_prediction_does_not_depend_on_the_other_rows_of_the_batch(row_mixing):
    net = model(row_mixing=row_mixing, num_blocks=2)
    variables = random_params(net)
    run = jax.jit(net.apply)
    outputs = run(variables, DATA)
    others = jax.tree.map(
        lambda mine, theirs: mine.at[1:].set(theirs[1:]), DATA, make_batch(BATCH) | {"context": DATA["context"]}
    )
    changed = run(variables, others)
    alone = apply(net, variables, jax.tree.map(lambda x: x[:1], DATA) | {"context": DATA["context"]})
    for name in HEADS:
        np.testing.assert_array_equal(changed[name][0], outputs[name][0])
        assert not np.array_equal(changed[name][1:], outputs[name][1:])
        np.testing.assert_allclose(alone[name][0], outputs[name][0], atol=1e-5)
    # It does depend on the context where rows read rows, and only there.
    another = run(variables, DATA | {"context": make_batch(3)})
    across = row_mixing in ("flat_attention", "axial_attention")
    assert net.needs_context == across
    assert np.array_equal(another["a"], outputs["a"]) == (not across)


@pytest.mark.parametrize("row_mixing", ["flat_attention", "axial_attention"])
def test_attention_across_rows_needs_a_context_or_the_batch(row_mixing):
    net = model(row_mixing=row_mixing)
    variables = random_params(net)
    batch = {key: DATA[key] for key in ("categorical", "numeric")}
    with pytest.raises(ValueError, match=f"row_mixing='{row_mixing}' attends to other rows: .*batch\\['context'\\]"):
        net.apply(variables, batch)
    # The published behaviour, by name: rows of the batch read each other, as in training.
    published = net.clone(inference_context="batch")
    assert not published.needs_context
    outputs = apply(published, variables, batch)
    np.testing.assert_allclose(outputs["a"], apply(net, variables, batch, train=True)["a"], atol=1e-6)
    others = jax.tree.map(lambda x, y: x.at[1:].set(y[1:]), batch, make_batch(BATCH))
    assert abs(apply(published, variables, others)["a"][0] - outputs["a"][0]) > 1e-5
    # If the context is the batch itself, context and batch agree on what the context rows are.
    same = apply(net, variables, batch | {"context": batch})
    assert same["a"].shape == (BATCH,)


def test_errors_say_what_is_wrong():
    def init(**options):
        return jax.eval_shape(model(**options).init, jax.random.key(0), DATA)

    with pytest.raises(ValueError, match="row_mixing must be one of none, .* got 'rows'"):
        init(row_mixing="rows")
    with pytest.raises(ValueError, match="inference_context must be 'explicit' or 'batch', got 'train'"):
        init(inference_context="train")
    with pytest.raises(ValueError, match="mask must be one of"):
        init(mask="FxF")
    with pytest.raises(ValueError, match="num_heads=3 must divide the width 4"):
        init(num_heads=3)
    with pytest.raises(ValueError, match="task='d' is not one of the model's tasks: a, b, c"):
        jax.eval_shape(lambda key: model().init(key, DATA, task="d"), jax.random.key(0))


def test_parameters_do_not_depend_on_the_task_asked_for():
    net = model(row_mixing="token_mixer")
    shapes = jax.eval_shape(net.init, jax.random.key(0), DATA)
    one = jax.eval_shape(lambda key: net.init(key, DATA, task="b"), jax.random.key(0))
    assert jax.tree.structure(one) == jax.tree.structure(shapes) and one == shapes


def test_row_chunks_change_nothing():
    net = model(num_blocks=2, mask="FxT")
    variables = random_params(net)
    whole, chunked = (apply(net.clone(chunk_rows=rows), variables) for rows in (None, 2))
    for name in HEADS:
        np.testing.assert_allclose(chunked[name], whole[name], atol=1e-6)


# Sizes.


def higgs(**options):
    """8 tasks; 4 categorical columns of 3 levels (here and an unknown code), 17 numeric ones; width 16, FFN 256."""
    heads = {"target": 1} | {f"mass_{k}": 1 for k in range(7)}
    return MultiTabNet(heads, (4,) * 4, 17, **options)


def num_parameters(net):
    batch = {"categorical": jnp.zeros((2, 4), jnp.int32), "numeric": jnp.zeros((2, 17))}
    shapes = jax.eval_shape(lambda key: net.init(key, batch, train=True), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def published_count(task_tokens):
    """Parameters of the public code on Higgs, layer by layer."""

    def linear(inputs, outputs):
        return inputs * outputs + outputs

    def layer(width):  # attention with packed q, k, v; output map; two layer norms; feed-forward net
        attention = linear(width, 3 * width) + linear(width, width)
        return attention + 2 * (2 * width) + linear(width, 256) + linear(256, width)

    width, numeric, categorical = 16, 17, 4
    tokens = linear(1, width) * (task_tokens + numeric) + categorical * 3 * width
    heads = 8 * (linear(width, 64) + linear(64, 1))
    return tokens + layer(width) + layer((task_tokens + numeric + categorical) * width) + heads


def test_parameter_counts_of_the_published_code():
    assert round(published_count(task_tokens=8) / 1e6, 3) == 1.123  # what its 8-token model has
    assert round(published_count(task_tokens=1) / 1e6, 3) == 0.699  # what its efficiency table says (0.70 M)
    for multi_token, task_tokens in [(True, 8), (False, 1)]:
        ours = num_parameters(higgs(row_mixing="flat_attention", multi_token=multi_token))
        # A task token is one vector here, a weight and a bias there; a categorical column has an unknown code here.
        assert ours == published_count(task_tokens) - 16 * task_tokens + 4 * 16
        # The token mixer of the published runs is the same layer whose queries and keys drop out.
        width = (task_tokens + 21) * 16
        mixer = num_parameters(higgs(row_mixing="token_mixer", multi_token=multi_token))
        assert ours - mixer == 2 * (width * width + width)


def test_presets_are_fields():
    assert model(**PAPER_TEXT).row_mixing == "flat_attention"
    assert model(**PUBLISHED_RUNS).row_mixing == "token_mixer"


# Initialisation, seeds, gradients.


def test_initialisation():
    net = higgs(width=32, row_mixing="none")
    batch = {"categorical": jnp.zeros((2, 4), jnp.int32), "numeric": jnp.zeros((2, 17))}
    params = jax.jit(net.init)(jax.random.key(0), batch)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        if path.endswith("bias"):
            assert not leaf.any(), path
        elif path.endswith("scale"):
            assert (leaf == 1).all(), path
        elif path.endswith("qkv/kernel"):  # Xavier-uniform on [D, 3D]
            bound = math.sqrt(6 / (4 * 32))
            assert 0.98 * bound < jnp.abs(leaf).max() <= bound, path
            assert abs(jnp.std(leaf) / (bound / math.sqrt(3)) - 1) < 0.05, path
        else:
            assert abs(jnp.std(leaf) / 0.01 - 1) < 5 / math.sqrt(2 * leaf.size), path


def test_seeds_are_a_vmap():
    net = model(row_mixing="token_mixer", mask="TxT")
    keys = jax.random.split(jax.random.key(0), 2)
    init = jax.jit(lambda key: net.init(key, DATA))
    seeds = jax.jit(jax.vmap(lambda key: net.init(key, DATA)))(keys)
    outputs = jax.jit(jax.vmap(net.apply, (0, None)))(seeds, DATA)
    for s in range(2):
        one = init(keys[s])
        jax.tree.map(lambda a, b, s=s: np.testing.assert_allclose(a[s], b, atol=1e-7), seeds, one)
        expected = apply(net, one)
        for name in HEADS:
            np.testing.assert_allclose(outputs[name][s], expected[name], atol=1e-6)


def test_jacobian_rows_are_the_gradients_of_the_losses():
    net = model(row_mixing="token_mixer", num_blocks=2, chunk_rows=2)
    variables = random_params(net)

    def losses(variables):
        return jnp.stack([jnp.mean(jnp.sin(y)) for y in net.apply(variables, DATA).values()])

    jacobian = jax.jit(jax.jacrev(losses))(variables)
    gradient = jax.jit(lambda variables, k: jax.grad(lambda v: losses(v)[k])(variables))
    for k in range(T):
        jax.tree.map(
            lambda row, g, k=k: np.testing.assert_allclose(row[k], g, atol=1e-6), jacobian, gradient(variables, k)
        )


def test_dropout_is_for_training_only():
    net = model(ff_dropout=0.5, attention_dropout=0.5, row_mixing="flat_attention", chunk_rows=2)
    variables = random_params(net)
    still = net.clone(ff_dropout=0.0, attention_dropout=0.0)
    np.testing.assert_array_equal(apply(net, variables)["a"], apply(still, variables)["a"])
    run = jax.jit(lambda key: net.apply(variables, DATA, train=True, rngs={"dropout": key})["a"])
    assert not np.allclose(run(jax.random.key(0)), run(jax.random.key(1)))
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))


def test_the_program_does_not_grow_with_the_number_of_tasks():
    def matrix_products(num_tasks, **options):
        net = model(**options).clone(heads={f"task_{k}": 1 for k in range(num_tasks)})
        variables = jax.eval_shape(net.init, jax.random.key(0), DATA)
        return str(jax.make_jaxpr(net.apply)(variables, DATA)).count("dot_general")

    for options in (dict(mask="TxT"), dict(row_mixing="token_mixer", num_blocks=2)):
        assert matrix_products(2, **options) == matrix_products(20, **options)
