"""MultiTab-Net against numpy loops; what its masks isolate; one task; rows of a batch; sizes; initialisation; seeds."""

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
    sizes = {"width": WIDTH, "num_heads": 2, "ff_width": FF, "head_hidden": (12,), "row_mixing": "none"}
    return MultiTabNet(HEADS, CARDINALITIES, NUMERIC, **sizes | options)


def random_params(net, batch=DATA, seed=0):
    """Parameters of the right shapes, every entry random: zero biases would hide a wrong index."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), batch)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 2, s.dtype), shapes)


def quick_jit(f):
    """One compiled program instead of one per operation, compiled in half the time."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def apply(net, variables, batch=DATA, **options):
    return quick_jit(lambda variables, batch: net.apply(variables, batch, **options))(variables, batch)


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
    normed, qkv = layer_norm(p["norm_1"], x), p["attention"]["qkv"]
    parts = (dense({name: leaf[..., i, :] for name, leaf in qkv.items()}, normed) for i in range(3))
    query, key, value = (part.reshape(n, heads, -1) for part in parts)
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
TABLE = [
    dict(mask=mask, num_blocks=num_blocks, row_mixing=row_mixing)
    for row_mixing in ("none", "token_mixer")
    for mask in MASKS
    for num_blocks in (1, 2)
]
CASES = [
    *TABLE,
    dict(mask="TxT", num_blocks=1, row_mixing="axial_attention"),
    dict(mask="FxT_TxT", num_blocks=2, row_mixing="axial_attention"),
    dict(mask="FxT_TxT", num_blocks=1, row_mixing="flat_attention"),
    dict(mask=CUSTOM, num_blocks=2),
    dict(mask="TxT", multi_token=False),
    dict(mask="FxT", multi_token=False, row_mixing="token_mixer"),
]


def name_of(options):
    return "-".join(str(v) if k in ("mask", "row_mixing", "num_blocks") else k for k, v in options.items())


@pytest.fixture(scope="module", params=CASES, ids=lambda case: name_of(case | {"mask": str(case["mask"])[:7]}))
def case(request):
    """A network, its parameters, its outputs, and its outputs when task token j = 0, 1, .. is another vector."""
    net = model(**request.param)
    variables = random_params(net)
    params = variables["params"]
    tokens = params["task_tokens"]
    # (Not shifted by a constant: layer norm would not see that.)
    other = tokens[None] + jnp.eye(len(tokens))[:, :, None] * jnp.arange(WIDTH)[None, None, :]

    @quick_jit
    @jax.vmap
    def run(tokens):
        return net.apply({"params": params | {"task_tokens": tokens}}, DATA)

    outputs = run(jnp.concatenate([tokens[None], other]))
    return net, variables, {k: v[0] for k, v in outputs.items()}, {k: v[1:] for k, v in outputs.items()}


def test_network_equals_a_loop(case):
    net, variables, outputs, _ = case
    expected = by_the_book(net, variables, DATA)
    assert list(outputs) == list(HEADS)
    for name, size in HEADS.items():
        assert outputs[name].shape == ((BATCH,) if size == 1 else (BATCH, size))
        np.testing.assert_allclose(outputs[name].reshape(BATCH, size), expected[name], atol=2e-5)


def test_one_task_equals_all_tasks(case):
    net, variables, outputs, _ = case
    if net.row_mixing == "token_mixer" and net.mask != "FxT":
        pytest.skip("mixing the row needs all tokens, whatever the mask: one mask is enough")
    one = apply(net, variables, task="b")
    assert list(one) == ["b"]
    np.testing.assert_allclose(one["b"], outputs["b"], atol=2e-5)


# Isolation: whether the output of a task is independent of the other tasks' tokens. A mask constrains one attention
# matrix, not the model: `none`, `axial_attention` leave tokens apart, `token_mixer`, `flat_attention` mix the row.
ISOLATED = {
    # mask, blocks: tokens apart, row mixed
    ("none", 1): (False, False),
    ("none", 2): (False, False),
    ("FxT", 1): (False, False),  # tasks read each other directly
    ("FxT", 2): (False, False),
    ("TxT", 1): (True, False),
    ("TxT", 2): (False, False),  # task -> feature -> task
    ("FxT_TxT", 1): (True, False),
    ("FxT_TxT", 2): (True, False),
}


def is_isolated(net):
    return ISOLATED[net.mask, net.num_blocks][net.row_mixing in ("token_mixer", "flat_attention")]


def test_which_head_depends_on_which_task_token(case):
    net, _, outputs, with_other_token = case
    if (net.mask, net.num_blocks) not in ISOLATED:
        pytest.skip("a custom mask isolates what it says; equality with the loop covers it")
    changed = [
        [np.abs(other - outputs[name]).max() > 1e-5 for other in np.asarray(with_other_token[name])] for name in HEADS
    ]
    if not net.multi_token:  # every head reads the one token
        assert np.array(changed).shape == (T, 1) and np.all(changed)
        return
    np.testing.assert_array_equal(changed, np.eye(T, dtype=bool) | (not is_isolated(net)))


@pytest.mark.parametrize(
    "options",
    [
        dict(mask="TxT", num_blocks=1),
        dict(mask="TxT", num_blocks=2),
        dict(mask="FxT_TxT", num_blocks=2),
        dict(mask="FxT_TxT", num_blocks=1, row_mixing="token_mixer"),
    ],
    ids=name_of,
)
def test_jacobian_of_heads_with_respect_to_task_tokens(options):
    """The same by derivatives: exactly zero where isolated, not zero elsewhere."""
    net = model(**options)
    variables = random_params(net)

    @quick_jit
    @jax.jacrev
    def jacobian(tokens):
        outputs = net.apply({"params": variables["params"] | {"task_tokens": tokens}}, DATA)
        return jnp.stack([y.sum() for y in outputs.values()])

    size = np.abs(np.asarray(jacobian(variables["params"]["task_tokens"]))).max(-1)  # [head, token]
    np.testing.assert_array_equal(size > 0, np.eye(T, dtype=bool) | (not is_isolated(net)))


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


# Rows of a batch.


@pytest.mark.parametrize("row_mixing", ROW_MIXING)
def test_a_prediction_does_not_depend_on_the_other_rows_of_the_batch(row_mixing):
    net = model(row_mixing=row_mixing)
    variables = random_params(net)
    run = quick_jit(net.apply)
    outputs = run(variables, DATA)
    another = make_batch(BATCH) | {"context": make_batch(3)}
    others = {key: DATA[key].at[1:].set(another[key][1:]) for key in ("categorical", "numeric")}
    changed = run(variables, others | {"context": DATA["context"]})
    for name in HEADS:
        np.testing.assert_array_equal(changed[name][0], outputs[name][0])
        assert not np.array_equal(changed[name][1:], outputs[name][1:])
    # It does depend on the context where rows read rows, and only there.
    changed = run(variables, DATA | {"context": another["context"]})
    across = row_mixing in ("flat_attention", "axial_attention")
    assert net.needs_context == across
    assert np.array_equal(changed["a"], outputs["a"]) == (not across)


@pytest.mark.parametrize("row_mixing", ["flat_attention", "axial_attention"])
def test_attention_across_rows_needs_a_context_or_the_batch(row_mixing):
    net = model(row_mixing=row_mixing)
    variables = random_params(net)
    batch = {key: DATA[key] for key in ("categorical", "numeric")}
    sentence = rf"row_mixing='{row_mixing}' attends to other rows: at inference give .* as batch\['context'\]"
    with pytest.raises(ValueError, match=sentence):
        net.apply(variables, batch)
    # The published behaviour, by name: rows of the batch read each other at inference as they do in training.
    published = net.clone(inference_context="batch")
    assert not published.needs_context
    run = quick_jit(published.apply)
    outputs = run(variables, batch)
    np.testing.assert_allclose(outputs["a"], apply(net, variables, batch, train=True)["a"], atol=1e-5)
    others = jax.tree.map(lambda x, y: x.at[1:].set(y[1:]), batch, make_batch(BATCH))
    assert abs(run(variables, others)["a"][0] - outputs["a"][0]) > 1e-5


def test_errors_say_what_is_wrong():
    def init(**options):
        return jax.eval_shape(model(**options).init, jax.random.key(0), DATA)

    with pytest.raises(ValueError, match=r"row_mixing must be one of none, .* got 'rows'"):
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


def test_task_tokens_are_an_auxiliary_output():
    for net, tokens in [(model(), T), (model(multi_token=False), 1)]:
        variables = jax.eval_shape(net.init, jax.random.key(0), DATA)
        outputs, aux = jax.eval_shape(lambda v, net=net: net.apply(v, DATA, aux=True), variables)
        assert list(outputs) == list(HEADS) and aux["tokens"].shape == (BATCH, tokens, WIDTH)


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


def test_initialisation_of_several_seeds():
    net = higgs(width=32, row_mixing="none")
    batch = {"categorical": jnp.zeros((2, 4), jnp.int32), "numeric": jnp.zeros((2, 17))}

    def init(key):
        return net.init(key, batch)["params"]

    seeds = quick_jit(jax.vmap(init))(jax.random.split(jax.random.key(0), 2))
    for path, leaf in jax.tree_util.tree_leaves_with_path(seeds):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("bias"):
            assert not leaf.any(), name
        elif name.endswith("scale"):
            assert (leaf == 1).all(), name
        elif name.endswith("qkv/kernel"):  # Xavier-uniform on [D, 3D]
            bound = math.sqrt(6 / (4 * 32))
            assert 0.98 * bound < jnp.abs(leaf).max() <= bound, name
            assert abs(jnp.std(leaf) / (bound / math.sqrt(3)) - 1) < 0.05, name
            assert not np.allclose(leaf[0], leaf[1])
        else:
            assert abs(jnp.std(leaf) / 0.01 - 1) < 5 / math.sqrt(2 * leaf.size), name


def test_seeds_are_a_vmap():
    net = model(row_mixing="token_mixer")
    seeds = [random_params(net, seed=seed) for seed in range(2)]
    outputs = quick_jit(jax.vmap(net.apply, (0, None)))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds), DATA)
    run = quick_jit(net.apply)
    for s, variables in enumerate(seeds):
        for name, expected in run(variables, DATA).items():
            np.testing.assert_allclose(outputs[name][s], expected, atol=1e-5)


def test_jacobian_rows_are_the_gradients_of_the_losses():
    net = model(mask="FxT", chunk_rows=2)
    variables = random_params(net)

    def losses(variables):
        return jnp.stack([jnp.mean(jnp.sin(y)) for y in net.apply(variables, DATA).values()])

    jacobian = jax.jit(jax.jacrev(losses))(variables)
    gradient = jax.jit(jax.grad(lambda variables, one_hot: one_hot @ losses(variables)))
    for k in range(T):
        row = gradient(variables, jnp.eye(T)[k])
        jax.tree.map(lambda j, g, k=k: np.testing.assert_allclose(j[k], g, atol=1e-5), jacobian, row)


def test_dropout_is_for_training_only():
    net = model(ff_dropout=0.5, attention_dropout=0.5, chunk_rows=2)
    variables = random_params(net)
    run = quick_jit(lambda key: net.apply(variables, DATA, train=True, rngs={"dropout": key})["a"])
    drawn = run(jax.random.key(0))
    assert not np.allclose(drawn, run(jax.random.key(1)))
    np.testing.assert_array_equal(drawn, run(jax.random.key(0)))
    np.testing.assert_allclose(apply(net, variables)["a"], by_the_book(net, variables, DATA)["a"][:, 0], atol=2e-5)


def test_the_program_does_not_grow_with_the_number_of_tasks():
    def matrix_products(num_tasks, **options):
        net = model(**options).clone(heads={f"task_{k}": 1 for k in range(num_tasks)})
        variables = jax.eval_shape(net.init, jax.random.key(0), DATA)
        return str(jax.make_jaxpr(net.apply)(variables, DATA)).count("dot_general")

    for options in (dict(mask="TxT"), dict(row_mixing="token_mixer", num_blocks=2)):
        assert matrix_products(2, **options) == matrix_products(20, **options)
