"""Every published wiring against a loop written from its equations; isolation; one task; extraction; seeds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.models import mlp_baselines as mlp
from mtjax.models.gated_experts import GatedExpertModel, Wiring, extract
from mtjax.nn.expert_use import ablation_utility
from mtjax.nn.experts import ExpertLayout

HEADS = {"a": 1, "b": 3, "c": 1}
COLUMNS = dict(cardinalities=(3, 2), num_numeric=2)
SMALL = dict(width=2, tower=(3,))
EXPERTS = dict(task_experts=(2, 1, 1), shared_experts=2)
OWNER = [0, 0, 1, 2, 3, 3]  # task of each expert, 3 for the shared ones
T = 3
BATCH = 4
RNG = np.random.default_rng(0)
DATA = {
    "categorical": jnp.asarray(RNG.integers([3, 2], size=(BATCH, 2)), jnp.int32),
    "numeric": jnp.asarray(RNG.normal(size=(BATCH, 2)), jnp.float32),
}


# The models by the book, one example and one expert at a time.


def dense(p, x, i):
    return x @ p["kernel"][i] + p["bias"][i]


def expert(level, e, x):
    for name in sorted(level["experts"]):
        x = np.maximum(dense(level["experts"][name], x, e), 0)
    return x


def gate(level, m, x, seen):
    """softmax over the experts in `seen`, as a dict."""
    logits = {e: x @ level["gate_kernel"][m, :, e] + level["gate_bias"][m, e] for e in seen}
    total = sum(np.exp(v) for v in logits.values())
    return {e: np.exp(v) / total for e, v in logits.items()}


def mix(weights, experts):
    return sum(w * experts[e] for e, w in weights.items())


def head(params, task, z):
    k = list(HEADS).index(task)
    z = np.maximum(dense(params["heads"]["tower"]["dense_0"], z, k), 0)
    same_size = [name for name in HEADS if HEADS[name] == HEADS[task]]
    return dense(params["heads"][f"out_{HEADS[task]}"], z, same_size.index(task))


def embed(tables, row):
    """The flattened embedding of a row."""
    tokens = [tables["table"][DATA["categorical"][row, 0]], tables["table"][3 + DATA["categorical"][row, 1]]]
    numeric = np.asarray(DATA["numeric"][row])
    return np.concatenate([*tokens, *(numeric[:, None] * tables["weight"] + tables["bias"])])


def shared_embedding(p, row):
    return [embed(p["tokenizer"], row)] * (T + 1)


def own_embeddings(p, row):
    return [embed({name: leaf[s] for name, leaf in p["embeddings"].items()}, row) for s in range(T + 1)]


def single_task(p, row):
    tables = [{name: leaf[k] for name, leaf in p["embeddings"].items()} for k in range(T)]
    return [expert(p["level_0"], k, embed(tables[k], row)) for k in range(T)]


def shared_bottom(p, row):
    return [expert(p["level_0"], 0, shared_embedding(p, row)[0])] * T


def omoe(p, row):
    x = shared_embedding(p, row)[0]
    experts = [expert(p["level_0"], e, x) for e in range(4)]
    return [mix(gate(p["level_0"], 0, x, range(4)), experts)] * T


def mmoe(p, row):
    x = shared_embedding(p, row)[0]
    experts = [expert(p["level_0"], e, x) for e in range(4)]
    return [mix(gate(p["level_0"], t, x, range(4)), experts) for t in range(T)]


def cgc(p, row, level=0, x=None, shared_gate=False):
    x = shared_embedding(p, row) if x is None else x
    level = p[f"level_{level}"]
    experts = [expert(level, e, x[OWNER[e]]) for e in range(6)]
    z = []
    for t in range(T):
        seen = [e for e in range(6) if OWNER[e] in (t, T)]
        z.append(mix(gate(level, t, x[t], seen), experts))
    if shared_gate:
        z.append(mix(gate(level, T, x[T], range(6)), experts))
    return z


def ple(p, row):
    return cgc(p, row, 1, cgc(p, row, 0, shared_gate=True))


def ple_towers_read_shared(p, row):
    z = cgc(p, row, 0, shared_gate=True)
    return [np.concatenate([z[t], z[T]]) for t in range(T)]


def stem(p, row, gate_input="sum", towers_read_shared=False):
    x, level = own_embeddings(p, row), p["level_0"]
    experts = [expert(level, e, x[OWNER[e]]) for e in range(6)]
    z = [mix(gate(level, t, x[t] + (gate_input == "sum") * x[T], range(6)), experts) for t in range(T)]
    if towers_read_shared:
        shared = mix(gate(level, T, x[T], range(6)), experts)
        z = [np.concatenate([z_t, shared]) for z_t in z]
    return z


def adatt(p, row, owner=OWNER, fixed=False):
    x = shared_embedding(p, row)
    shared_stream = T in owner
    for name in ("level_0", "level_1"):
        level = p[name]
        experts = [expert(level, e, x[owner[e]]) for e in range(len(owner))]
        z = []
        for t in range(T + (shared_stream and name == "level_0")):
            own = {e: 1.0 if fixed else level["residual"][t, e] for e in range(len(owner)) if owner[e] == t}
            z.append(mix(gate(level, t, x[t], range(len(owner))), experts) + mix(own, experts))
        x = z
    return x


TWO = ((4,), (3,))
ONE = ((4, 3),)
MULTITAB_STEM = dict(gate_input="own", tower_reads_shared=True, detach_shared=True)
MODELS = {
    "single_task": (mlp.single_task(HEADS, **COLUMNS, **SMALL, features=(4, 3)), single_task),
    "shared_bottom": (mlp.shared_bottom(HEADS, **COLUMNS, **SMALL, features=(4, 3)), shared_bottom),
    "omoe": (mlp.omoe(HEADS, **COLUMNS, **SMALL, experts=4, features=(4, 3)), omoe),
    "mmoe": (mlp.mmoe(HEADS, **COLUMNS, **SMALL, experts=4, features=(4, 3)), mmoe),
    "cgc": (mlp.cgc(HEADS, **COLUMNS, **SMALL, **EXPERTS, features=(4, 3)), cgc),
    "ple": (mlp.ple(HEADS, **COLUMNS, **SMALL, **EXPERTS, features=TWO), ple),
    "ple_multitab": (
        mlp.ple(HEADS, **COLUMNS, **SMALL, **EXPERTS, features=ONE, tower_reads_shared=True),
        ple_towers_read_shared,
    ),
    "stem": (mlp.stem(HEADS, **COLUMNS, **SMALL, **EXPERTS, features=ONE), stem),
    "stem_multitab": (
        mlp.stem(HEADS, **COLUMNS, **SMALL, **EXPERTS, features=ONE, **MULTITAB_STEM),
        lambda p, row: stem(p, row, "own", True),
    ),
    "adatt": (mlp.adatt(HEADS, **COLUMNS, **SMALL, **EXPERTS, features=TWO), adatt),
    "adatt_sp": (
        mlp.adatt(HEADS, **COLUMNS, **SMALL, task_experts=(2, 1, 1), features=TWO),
        lambda p, row: adatt(p, row, [0, 0, 1, 2]),
    ),
    "adatt_sp_one_expert": (
        mlp.adatt(HEADS, **COLUMNS, **SMALL, task_experts=1, features=TWO),
        lambda p, row: adatt(p, row, [0, 1, 2], fixed=True),
    ),
}


def random_variables(model, seed=0):
    """Variables of the right shapes, every entry random: zero biases would hide a wrong index."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), DATA)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def compute_with(model, alone):
    """variables -> outputs of all tasks, and of each of `alone` asked for by name."""
    return lambda v: (model.apply(v, DATA), {task: model.apply(v, DATA, task=task) for task in alone})


@pytest.fixture(scope="module")
def results():
    """name -> (model, variables, outputs, outputs of tasks asked for alone), compiled once per model."""
    cache = {}

    def of(name):
        if name not in cache:
            model, _ = MODELS[name]
            variables = random_variables(model)
            alone = HEADS if name == "ple" else ["b"]
            apply = jax.jit(compute_with(model, alone))
            cache[name] = (model, variables, *apply(variables))
        return cache[name]

    return of


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_the_loop(results, name):
    _, variables, outputs, _ = results(name)
    params = jax.tree.map(np.asarray, variables["params"])
    assert list(outputs) == list(HEADS)
    for row in range(BATCH):
        z = MODELS[name][1](params, row)
        for t, task in enumerate(HEADS):
            expected = head(params, task, z[t])
            np.testing.assert_allclose(np.atleast_1d(outputs[task][row]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_one_task_gives_the_same_output(results, name):
    _, _, outputs, alone = results(name)
    for task in alone:
        assert list(alone[task]) == [task]
        np.testing.assert_allclose(alone[task][task], outputs[task], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "tasks"), [("single_task", ["b"]), ("ple", ["c", "a"]), ("stem", ["a"]), ("adatt", ["b"])]
)
def test_extraction_keeps_outputs_and_drops_parameters(results, name, tasks):
    model, variables, outputs, _ = results(name)
    small, cut = extract(model, variables, tasks)
    assert jax.tree.structure(cut) == jax.tree.structure(jax.eval_shape(small.init, jax.random.key(0), DATA))
    result = jax.jit(small.apply)(cut, DATA)
    assert list(result) == sorted(tasks)
    for task in tasks:
        np.testing.assert_allclose(result[task], outputs[task], rtol=1e-5, atol=1e-5)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (cut, variables)]
    assert sizes[0] < sizes[1]
    if name == "single_task":  # a third of everything but the heads, under the names of a plain model
        assert cut["params"]["tokenizer"]["table"].shape == (5, 2)


def flops(model, **kwargs):
    """FLOPs of a forward pass, as XLA counts them."""
    variables = jax.eval_shape(model.init, jax.random.key(0), DATA)
    return jax.jit(lambda v: model.apply(v, DATA, **kwargs)).lower(variables).compile().cost_analysis()["flops"]


def test_one_task_costs_less():
    """What is left out is not computed: CGC computes 4 of 6 experts for task 'a', 3 for the others."""
    wide = dict(width=2, tower=(3,), features=(64, 64))
    model = mlp.cgc(HEADS, **COLUMNS, **EXPERTS, **wide)
    whole, a, b = flops(model), flops(model, task="a"), flops(model, task="b")
    assert a < 0.75 * whole and b < 0.6 * whole  # 4/6 and 3/6 of the experts, and less of the rest
    single = mlp.single_task(HEADS, **COLUMNS, **wide)
    assert flops(single, task="a") < 0.4 * flops(single)
    # STEM's tasks read every expert: only heads and gates are saved, and the count must not claim more.
    assert [len(part.experts) for part in MODELS["stem"][0].wiring.parts([0])] == [6]
    # PLE: the last level needs 'a' and the shared stream, whose gate reads all of the first level.
    parts = MODELS["ple"][0].wiring.parts([0])
    assert [(part.outputs, part.experts) for part in parts] == [((0, 3), (0, 1, 2, 3, 4, 5)), ((0,), (0, 1, 4, 5))]


def jacobian(model, variables):
    """d (sum of task t's output) / d parameters, tasks on the leading axis."""

    def totals(v):
        outputs = model.apply(v, DATA)
        return jnp.stack([jnp.sum(jnp.square(outputs[task])) for task in HEADS])

    return jax.jit(jax.jacrev(totals))(variables)["params"]


def depends(leaf, axes):
    """Whether any entry of the other axes is not 0."""
    other = tuple(axis for axis in range(leaf.ndim) if axis not in axes)
    return np.abs(leaf).max(other) > 0


SMOOTH = dict(activation=jnp.tanh)  # no gradient is 0 by a dead unit


def test_cgc_isolates_experts_of_other_tasks():
    model = MODELS["cgc"][0].clone(**SMOOTH)
    rows = jacobian(model, random_variables(model))["level_0"]
    own = np.asarray([[owner in (t, T) for owner in OWNER] for t in range(T)])
    np.testing.assert_array_equal(depends(rows["experts"]["dense_0"]["kernel"], (0, 1)), own)
    np.testing.assert_array_equal(depends(rows["gate_kernel"], (0, 1)), np.eye(T, dtype=bool))


def test_stem_reads_other_tasks_but_does_not_train_them():
    model = MODELS["stem"][0].clone(**SMOOTH)
    variables = random_variables(model)
    rows = jacobian(model, variables)
    own = np.asarray([[owner in (t, T) for owner in OWNER] for t in range(T)])
    streams = np.asarray([[stream in (t, T) for stream in range(T + 1)] for t in range(T)])
    np.testing.assert_array_equal(depends(rows["level_0"]["experts"]["dense_0"]["kernel"], (0, 1)), own)
    for name in ("table", "weight", "bias"):
        np.testing.assert_array_equal(depends(rows["embeddings"][name], (0, 1)), streams)
    # The gates of task t, over all experts, train with task t only.
    np.testing.assert_array_equal(depends(rows["level_0"]["gate_bias"], (0, 1)), np.eye(T, dtype=bool))
    assert depends(rows["level_0"]["gate_bias"], (0, 1, 2))[0, 0].all()
    # ... although what task 'a' predicts does depend on the tables of task 'b'.
    predict = jax.jit(lambda v: model.apply(v, DATA)["a"])
    moved = jax.tree.map(jnp.array, variables)
    moved["params"]["embeddings"]["table"] = moved["params"]["embeddings"]["table"].at[1].add(1.0)
    assert not np.allclose(predict(moved), predict(variables))


def test_multitab_stem_detaches_the_shared_experts_from_task_readers():
    """Its towers read the shared stream, through which every expert trains; its task readers train their own only."""
    layout = MODELS["stem_multitab"][0].wiring.layouts[0]
    detached = np.asarray(layout.detached)
    np.testing.assert_array_equal(~detached[:T], [[owner == t for owner in OWNER] for t in range(T)])
    assert not detached[T].any()


def test_single_tasks_share_nothing():
    model = MODELS["single_task"][0].clone(**SMOOTH)
    rows = jacobian(model, random_variables(model))
    for leaf in (rows["embeddings"]["table"], rows["level_0"]["experts"]["dense_1"]["kernel"]):
        np.testing.assert_array_equal(depends(leaf, (0, 1)), np.eye(T, dtype=bool))


def test_adatt_residual_keeps_a_task_when_its_gate_looks_elsewhere():
    """Gates that ignore all own experts: with the residual the own expert still arrives with weight 1."""
    heads = {"a": 1, "b": 1}
    options = dict(task_experts=1, features=((3,),), width=2, tower=())
    data = DATA
    both = [mlp.adatt(heads, **COLUMNS, **options, residual=residual) for residual in (True, False)]
    variables = random_variables(both[0])
    assert "residual" not in variables["params"]["level_0"]  # one expert per task: fixed to 1
    level = variables["params"]["level_0"]
    level["gate_kernel"] = jnp.zeros_like(level["gate_kernel"])
    level["gate_bias"] = jnp.array([[-100.0, 100.0], [100.0, -100.0]])

    def own_expert_matters(model):
        gradient = jax.jit(jax.grad(lambda v: jnp.sum(model.apply(v, data)["a"])))(variables)
        return bool(np.abs(gradient["params"]["level_0"]["experts"]["dense_0"]["bias"][0]).max() > 0)

    assert [own_expert_matters(model) for model in both] == [True, False]


def test_expert_use_comes_out_for_every_level_and_masks_go_in():
    model, _ = MODELS["ple"]
    variables = random_variables(model)
    batch = DATA | {"weight": jnp.array([1.0, 1.0, 1.0, 0.0])}

    @jax.jit
    def run(v):
        outputs, aux = model.apply(v, batch, aux=True)
        mask = {"level_1": jnp.arange(6) != 4}

        def loss(mask):
            return jnp.mean(jnp.square(model.apply(v, batch, expert_mask={"level_1": mask})["a"]))

        return outputs, aux, model.apply(v, batch, expert_mask=mask, aux=True)[1], ablation_utility(loss, 6)

    outputs, aux, masked, utility = run(variables)
    assert list(outputs) == list(HEADS) and set(aux["expert_use"]) == {"level_0", "level_1"}
    first, last = aux["expert_use"]["level_0"], aux["expert_use"]["level_1"]
    assert first.importance.shape == (4, 6) and last.importance.shape == (3, 6)
    np.testing.assert_allclose(first.importance.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(last.importance) > 0, MODELS["ple"][0].wiring.layouts[1].reads)
    np.testing.assert_array_equal(masked["expert_use"]["level_1"].importance[:, 4], 0)
    np.testing.assert_allclose(masked["expert_use"]["level_1"].importance.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(utility[2:4], 0)  # task 'a' does not read the experts of 'b' and 'c'
    assert np.all(np.asarray(utility)[[0, 1, 4, 5]] != 0)


def test_seeds_vmap_over_initialisation_and_application():
    normal = nn.initializers.normal(0.5)  # compiles much faster than the default's truncated normal
    model = MODELS["mmoe"][0].clone(dropout=0.5, kernel_init=normal)
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 2)  # compiles in a third of the time
    variables = jax.jit(jax.vmap(lambda key: model.init(key, DATA)))(keys)

    def run(v, key):
        return model.apply(v, DATA), model.apply(v, DATA, train=True, rngs={"dropout": key})

    outputs, dropped = jax.jit(jax.vmap(run))(variables, keys)
    assert outputs["b"].shape == (2, BATCH, 3)
    second = jax.jit(lambda v: model.apply(jax.tree.map(lambda leaf: leaf[1], v), DATA))(variables)
    np.testing.assert_allclose(outputs["a"][1], second["a"], rtol=1e-5, atol=1e-6)
    assert not np.allclose(outputs["a"][0], outputs["a"][1]) and not np.allclose(outputs["a"], dropped["a"])


@pytest.mark.parametrize("preset", [mlp.single_task, mlp.mmoe, mlp.cgc, mlp.ple, mlp.stem, mlp.adatt])
def test_one_task_one_expert(preset):
    """The degenerate case of every preset is an MLP; a table may lack either kind of column."""
    sizes = {
        mlp.single_task: {},
        mlp.mmoe: dict(experts=1),
        mlp.cgc: dict(task_experts=1, shared_experts=0),
        mlp.ple: dict(task_experts=1, shared_experts=0),
        mlp.stem: dict(task_experts=1, shared_experts=0, gate_input="own"),
        mlp.adatt: dict(task_experts=1),
    }[preset]
    deep = preset in (mlp.ple, mlp.stem, mlp.adatt)
    model = preset({"a": 2}, (), 2, **sizes, features=((4,),) if deep else (4,), width=2, tower=())
    batch = {"categorical": jnp.zeros((BATCH, 0), jnp.int32), "numeric": DATA["numeric"]}
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    shapes = jax.eval_shape(model.apply, variables, batch)
    assert shapes["a"].shape == (BATCH, 2)
    assert "gate_kernel" not in variables["params"]["level_0"]


def test_published_size_of_stem_on_higgs():
    """MultiTab's table: STEM has 1.25 M parameters on Higgs (8 tasks, 1 + 1 experts, 4 + 17 columns, batch norm).

    Layer norm has as many parameters as batch norm, so that our count must round to theirs.
    """
    heads, sizes = {str(k): 1 for k in range(8)}, dict(task_experts=1, shared_experts=1, norm="layer")
    model = mlp.stem(heads, (4,) * 4, 17, **sizes, **MULTITAB_STEM)
    batch = {"categorical": jnp.zeros((2, 4), jnp.int32), "numeric": jnp.zeros((2, 17))}
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    assert round(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) / 1e6, 2) == 1.25


def test_errors_are_sentences():
    layout = ExpertLayout(np.ones((2, 2)))
    three = ExpertLayout(np.ones((2, 3)), expert_stream=(0, 1, 2))
    with pytest.raises(ValueError, match="Level 1 reads 3 streams, but level 0 has only 2 outputs"):
        Wiring([layout, three], [[0], [1]])
    with pytest.raises(ValueError, match=r"tower_reads must hold equally many outputs 0\.\.1 per task"):
        Wiring([layout], [[0], [0, 1]])
    with pytest.raises(ValueError, match="embeddings must be 1 or the number of streams"):
        Wiring([layout], [[0]], embeddings=2)
    with pytest.raises(ValueError, match="at least one level"):
        Wiring([], [[0]])
    with pytest.raises(ValueError, match="task_experts must be a number >= 0 or one for each of the 3 tasks"):
        mlp.cgc(HEADS, **COLUMNS, task_experts=(1, 2))
    with pytest.raises(ValueError, match="gate_input must be 'sum' or 'own', got 'both'"):
        mlp.stem(HEADS, **COLUMNS, gate_input="both")

    model = MODELS["mmoe"][0]
    init = jax.random.key(0)
    with pytest.raises(ValueError, match="task='d' is not one of the model's tasks: a, b, c"):
        model.init(init, DATA, task="d")
    with pytest.raises(ValueError, match="expert_mask names level_7; the model's levels are level_0"):
        model.init(init, DATA, expert_mask={"level_7": jnp.ones(4)})
    with pytest.raises(ValueError, match="The wiring has 3 tasks and 1 levels, the model 2 heads"):
        model.clone(heads={"a": 1, "b": 1}).init(init, DATA)
    with pytest.raises(ValueError, match=r"tasks must name some of a, b, c, got \['d'\]"):
        extract(model, {}, ["d"])
    with pytest.raises(ValueError, match="built for 1 categorical and 2 numeric columns, the batch has 2 and 2"):
        mlp.single_task(HEADS, (3,), 2).init(init, DATA)
    assert isinstance(model, GatedExpertModel) and hash(model) == hash(model.clone())
