"""Per-task gradients: equal to one jax.grad per task in every mode; Gramian, combination and conflicts against NumPy.

Letters: K tasks, P parameters, B batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtjax
from mtjax.gradients import leaf_gramian, num_rows

NAMES = ("zeta", "alpha", "mid")  # not in alphabetical order: rows follow the loss function, not the names
EPS = 2.0**-23


def forward(params, x):
    hidden = jnp.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"][None])
    return {name: params["gain"] * (hidden @ params["heads"][name]) for name in NAMES}


def loss_fn(params, x, y):
    outputs = forward(params, x)
    return {
        "zeta": jnp.mean((outputs["zeta"] - y) ** 2),
        "alpha": jnp.mean(jnp.abs(outputs["alpha"] + y)),
        "mid": -jnp.mean(jnp.sin(3 * outputs["mid"])),
    }


def array_loss_fn(params, x, y):
    return jnp.stack(list(loss_fn(params, x, y).values()))


def loss_fn_with_aux(params, x, y):
    losses = loss_fn(params, x, y)
    return losses, {"outputs": forward(params, x), "batch size": len(y)}


def make_params(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 5)
    return {
        "trunk": {"w": jax.random.normal(keys[0], (4, 6), dtype), "b": jax.random.normal(keys[1], (6,), dtype)},
        "heads": {name: jax.random.normal(key, (6,), dtype) for name, key in zip(NAMES, keys[2:], strict=True)},
        "gain": jnp.asarray(0.7, dtype),
    }


PARAMS = make_params()
X = jax.random.normal(jax.random.key(1), (8, 4))
Y = jax.random.normal(jax.random.key(2), (8,))


def one_by_one(params, x, y):
    """One jax.grad for each task, stacked."""
    rows = [jax.grad(lambda p, name=name: loss_fn(p, x, y)[name])(params) for name in NAMES]
    return jax.tree.map(lambda *row: jnp.stack(row), *rows)


@pytest.fixture(scope="module")
def expected():
    return jax.jit(one_by_one)(PARAMS, X, Y)


def assert_trees_close(ours, reference, tolerance=1e-5):
    """Every leaf within `tolerance` of the largest entry of the reference leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    for pair in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        actual, desired = (np.asarray(leaf, np.float64) for leaf in pair)
        np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * max(1e-30, np.abs(desired).max()))


def as_matrix(jacobian):
    """[K, P] in float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(jacobian)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


# The Jacobian.


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 10])
@pytest.mark.parametrize("fn", [loss_fn, array_loss_fn])
def test_rows_are_the_gradients_of_the_tasks(fn, chunk_size, expected):
    losses, jacobian = jax.jit(mtjax.value_and_jacobian(fn, chunk_size=chunk_size))(PARAMS, X, Y)
    np.testing.assert_allclose(losses, array_loss_fn(PARAMS, X, Y), rtol=1e-6)
    assert_trees_close(jacobian, expected)


def test_works_without_jit_and_with_keyword_arguments(expected):
    losses, jacobian = mtjax.value_and_jacobian(loss_fn)(PARAMS, X, y=Y)
    np.testing.assert_allclose(losses, array_loss_fn(PARAMS, X, Y), rtol=1e-6)
    assert_trees_close(jacobian, expected)


def test_rows_follow_the_insertion_order_of_the_losses():
    params = jnp.array([1.0, 2.0, 3.0])
    names = ("zeta", "alpha", "mid")
    losses, jacobian = jax.jit(mtjax.value_and_jacobian(lambda p: {n: p[i] ** 2 for i, n in enumerate(names)}))(params)
    assert losses.tolist() == [1.0, 4.0, 9.0]
    assert jacobian.tolist() == [[2.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 6.0]]


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_aux_comes_through(chunk_size, expected):
    fn = jax.jit(mtjax.value_and_jacobian(loss_fn_with_aux, has_aux=True, chunk_size=chunk_size))
    (losses, aux), jacobian = fn(PARAMS, X, Y)
    assert losses.shape == (3,)
    assert aux["batch size"] == 8
    np.testing.assert_allclose(aux["outputs"]["mid"], forward(PARAMS, X)["mid"], rtol=1e-5)
    assert_trees_close(jacobian, expected)


def test_forward_pass_runs_once():
    calls = []

    def counted(params, x, y):
        calls.append(1)
        return loss_fn(params, x, y)

    mtjax.value_and_jacobian(counted, chunk_size=1)(PARAMS, X, Y)
    assert len(calls) == 1


def test_under_vmap_over_seeds():
    fn = mtjax.value_and_jacobian(loss_fn)
    stacked = jax.tree.map(lambda *leaf: jnp.stack(leaf), *[make_params(seed) for seed in range(3)])
    losses, jacobian = jax.jit(jax.vmap(fn, in_axes=(0, None, None)))(stacked, X, Y)
    for seed in range(3):
        expected_losses, expected = jax.jit(fn)(make_params(seed), X, Y)
        np.testing.assert_allclose(losses[seed], expected_losses, rtol=1e-5)
        assert_trees_close(jax.tree.map(lambda leaf, seed=seed: leaf[seed], jacobian), expected)


def auto_mesh(shape, names):
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_on_a_mesh_of_eight_devices(chunk_size, expected):
    """Batch sharded eight ways, parameters replicated: the numbers of one device."""
    mesh = auto_mesh((8,), ("data",))
    x, y = (jax.device_put(a, jax.NamedSharding(mesh, jax.P("data"))) for a in (X, Y))
    params = jax.device_put(PARAMS, jax.NamedSharding(mesh, jax.P()))
    losses, jacobian = jax.jit(mtjax.value_and_jacobian(loss_fn, chunk_size=chunk_size))(params, x, y)
    np.testing.assert_allclose(losses, array_loss_fn(PARAMS, X, Y), rtol=1e-5)
    assert_trees_close(jacobian, expected)
    method = mtjax.optim.pcgrad()
    weighted = jax.jit(mtjax.value_and_weighted_grad(loss_fn, method, chunk_size=chunk_size))
    _, gradient, state = weighted(params, method.init(params), x, y)
    assert_trees_close(gradient, mtjax.combine(expected, state.weights))
    np.testing.assert_allclose(state.gramian, mtjax.gramian(expected), rtol=1e-4, atol=1e-6)


def test_gramian_of_sharded_parameters_gathers_nothing():
    """A leaf sharded along a minor axis: each device sums its own part; only K x K numbers travel."""
    mesh = auto_mesh((2, 4), ("data", "model"))
    rows = jax.random.normal(jax.random.key(0), (3, 8, 16))
    sharded = jax.device_put(rows, jax.NamedSharding(mesh, jax.P(None, "data", "model")))
    compiled = jax.jit(leaf_gramian).lower(sharded).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(sharded), leaf_gramian(rows), rtol=1e-5)


def test_half_precision_parameters():
    """Rows keep the parameters' dtype; losses, Gramian and weights are float32."""
    params = make_params(dtype=jnp.bfloat16)
    losses, jacobian = jax.jit(mtjax.value_and_jacobian(loss_fn))(params, X, Y)
    assert losses.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(jacobian)} == {jnp.dtype(jnp.bfloat16)}
    exact = one_by_one(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), X, Y)
    assert_trees_close(jacobian, exact, 0.05)
    gramian = mtjax.gramian(jacobian)
    assert gramian.dtype == jnp.float32
    np.testing.assert_allclose(gramian, as_matrix(jacobian) @ as_matrix(jacobian).T, rtol=1e-4, atol=1e-5)


def ragged_loss_fn(params, x):
    """A layer that jax cannot vmap over its second operand alone."""
    hidden = jax.lax.ragged_dot(x, params["experts"], jnp.array([2, 5, 1], jnp.int32))
    return {name: jnp.mean((hidden @ params["heads"])[:, k] ** 2) for k, name in enumerate(NAMES)}


def test_through_a_layer_without_batching_rule():
    params = {
        "experts": jax.random.normal(jax.random.key(0), (3, 4, 5)),
        "heads": jax.random.normal(jax.random.key(1), (5, 3)),
    }
    _, jacobian = jax.jit(mtjax.value_and_jacobian(ragged_loss_fn, chunk_size=1))(params, X)
    rows = [jax.grad(lambda p, name=name: ragged_loss_fn(p, X)[name])(params) for name in NAMES]
    assert_trees_close(jacobian, jax.tree.map(lambda *row: jnp.stack(row), *rows))

    method = mtjax.optim.mgda()
    weighted = jax.jit(mtjax.value_and_weighted_grad(ragged_loss_fn, method, chunk_size=1))
    _, gradient, state = weighted(params, method.init(params), X)
    assert_trees_close(gradient, mtjax.combine(jacobian, state.weights))


@pytest.mark.parametrize(
    ("fn", "has_aux", "message"),
    [
        (lambda p: {"a": p.sum(), "b": p}, False, "The loss of task 'b' must be a scalar, got shape (2,)"),
        (lambda p: p.sum(), False, "loss_fn must return a dict of scalars or an array f32[K], got shape ()"),
        (lambda p: p[None], False, "loss_fn must return a dict of scalars or an array f32[K], got shape (1, 2)"),
        (lambda p: {}, False, "loss_fn returned an empty dict: expected one scalar loss for each task"),
        (
            lambda p: ({"a": p.sum()}, 1),
            False,
            "loss_fn returned a tuple where losses were expected; for (losses, aux) pass has_aux=True",
        ),
        (lambda p: {"a": p.sum()}, True, "With has_aux=True loss_fn must return (losses, aux), got a dict"),
    ],
)
def test_errors_of_the_loss_function(fn, has_aux, message):
    params, method = jnp.ones(2), mtjax.optim.linear()
    with pytest.raises(ValueError) as error:
        mtjax.value_and_jacobian(fn, has_aux=has_aux)(params)
    assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        mtjax.value_and_weighted_grad(fn, method, has_aux=has_aux)(params, method.init(params))
    assert str(error.value) == message


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_is_positive(chunk_size):
    for make in (
        mtjax.value_and_jacobian,
        lambda fn, **kw: mtjax.value_and_weighted_grad(fn, mtjax.optim.mgda(), **kw),
    ):
        with pytest.raises(ValueError, match=f"chunk_size must be None or >= 1, got {chunk_size}"):
            make(loss_fn, chunk_size=chunk_size)


def test_num_rows():
    assert num_rows({"a": jnp.ones((3, 2)), "b": jnp.ones(3)}) == 3
    with pytest.raises(ValueError, match="The Jacobian has no leaves: nothing to aggregate"):
        num_rows({})
    with pytest.raises(ValueError, match=r"same leading task axis; .* \['2', '3'\]\. Use value_and_jacobian"):
        num_rows({"a": jnp.ones((3, 2)), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"\['3', 'None'\]"):
        num_rows({"a": jnp.ones((3, 2)), "b": jnp.array(1.0)})


# The weighted gradient without a Jacobian. (Equality with the Jacobian's route, method by method: tests/optim.)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_weighted_gradient_with_aux_and_chunks(chunk_size, expected):
    method = mtjax.optim.mgda()
    fn = mtjax.value_and_weighted_grad(loss_fn_with_aux, method, has_aux=True, chunk_size=chunk_size)
    (losses, aux), gradient, state = jax.jit(fn)(PARAMS, method.init(PARAMS), X, Y)
    np.testing.assert_allclose(losses, array_loss_fn(PARAMS, X, Y), rtol=1e-5)
    assert aux["batch size"] == 8
    np.testing.assert_allclose(state.gramian, mtjax.gramian(expected), rtol=1e-4)
    assert_trees_close(gradient, mtjax.combine(expected, state.weights))


def test_weighted_gradient_of_a_bare_weighting(expected):
    """Any (init, weigh) pair is a method: here, weights that count the calls."""
    weighting = mtjax.optim.Weighting(init=jnp.zeros, weigh=lambda gramian, losses, state: (state + 1, state + 1))
    fn = jax.jit(mtjax.value_and_weighted_grad(loss_fn, weighting))
    _, gradient, state = fn(PARAMS, weighting.init(3), X, Y)
    assert_trees_close(gradient, mtjax.combine(expected, jnp.ones(3)))
    _, gradient, state = fn(PARAMS, state, X, Y)
    assert_trees_close(gradient, mtjax.combine(expected, jnp.full(3, 2.0)))
    assert state.tolist() == [2.0, 2.0, 2.0]


def test_weighted_gradient_refuses_a_method_without_weights():
    trimmed = mtjax.optim.Aggregator(lambda params: (), lambda jacobian, state, params=None: (jacobian, state))
    with pytest.raises(
        ValueError, match="this one needs the Jacobian itself, or gradients elsewhere: use value_and_update"
    ):
        mtjax.value_and_weighted_grad(loss_fn, trimmed)


def test_memory_of_the_weighted_gradient():
    """K = 8 tasks on a wide network: never all rows at once; and one backward pass if no Gramian is used."""
    num_tasks, width = 8, 256
    params = {"trunk": [jnp.zeros((width, width))] * 6, "heads": jnp.zeros((width, num_tasks))}
    x, tx = jnp.zeros((4, width)), mtjax.optim.pcgrad()

    def deep_loss_fn(params, x):
        for kernel in params["trunk"]:
            x = jnp.tanh(x @ kernel)
        return jnp.mean((x @ params["heads"]) ** 2, 0)

    def by_jacobian(params, state, x):
        losses, jacobian = mtjax.value_and_jacobian(deep_loss_fn)(params, x)
        return losses, *tx.update(jacobian, state, params)

    def num_bytes(fn, method):
        args = (params, mtjax.optim.init(method, params, num_tasks=num_tasks), x)
        shapes = jax.tree.leaves(jax.eval_shape(fn, *args)[1:])
        assert all(leaf.shape[:1] != (num_tasks,) or leaf.size <= num_tasks**2 for leaf in shapes)  # no K x P output
        memory = jax.jit(fn).lower(*args).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    one_gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    jacobian = num_bytes(by_jacobian, tx)
    weighted = num_bytes(mtjax.value_and_weighted_grad(deep_loss_fn, tx), tx)
    summed = num_bytes(mtjax.value_and_weighted_grad(deep_loss_fn, mtjax.optim.linear()), mtjax.optim.linear())
    assert jacobian > num_tasks * one_gradient
    assert weighted < min(0.7 * jacobian, num_tasks * one_gradient)
    assert summed < 1.2 * one_gradient


# Gramian and combination.


def random_jacobian(seed, num_tasks, dtype=np.float32):
    """A pytree with scalar, vector, matrix and 3-d parameters, of a different size for every seed in 0..2."""
    rng = np.random.default_rng(seed)
    shapes = [[()], [(2,), (), (3, 1)], [(2, 3, 2), (5,)]][seed % 3]
    leaves = [jnp.asarray(rng.normal(size=(num_tasks, *shape)), dtype) for shape in shapes]
    return {"first": leaves[0], "rest": tuple(leaves[1:])}


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), num_tasks=st.integers(1, 4))
def test_gramian_and_combination_equal_numpy(seed, num_tasks):
    jacobian = random_jacobian(seed, num_tasks)
    matrix = as_matrix(jacobian)
    norm = np.linalg.norm(matrix, axis=1)
    np.testing.assert_allclose(
        mtjax.gramian(jacobian), matrix @ matrix.T, rtol=0, atol=8 * EPS * np.outer(norm, norm).max()
    )
    weights = np.random.default_rng(seed).normal(size=num_tasks).astype(np.float32)
    combined = mtjax.combine(jacobian, jnp.asarray(weights))
    assert jax.tree.map(jnp.shape, combined) == jax.tree.map(lambda rows: rows.shape[1:], jacobian)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(combined)])
    np.testing.assert_allclose(flat, weights @ matrix, rtol=0, atol=8 * EPS * (np.abs(weights) @ np.abs(matrix)).max())


def test_combination_keeps_each_leaf_s_dtype():
    jacobian = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones((2, 3), jnp.float16), "c": jnp.ones((2,))}
    combined = mtjax.combine(jacobian, jnp.array([0.5, 2.0]))
    assert jax.tree.map(lambda leaf: (str(leaf.dtype), leaf.ravel()[0].item()), combined) == {
        "a": ("bfloat16", 2.5),
        "b": ("float16", 2.5),
        "c": ("float32", 2.5),
    }


# Conflicts.


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), num_tasks=st.integers(2, 4))
def test_conflict_equals_numpy(seed, num_tasks):
    jacobian = random_jacobian(seed, num_tasks)
    matrix = as_matrix(jacobian)
    result = mtjax.conflict(jacobian)
    conflicting = 0
    for i in range(num_tasks):
        for j in range(num_tasks):
            dot, a, b = matrix[i] @ matrix[j], np.linalg.norm(matrix[i]), np.linalg.norm(matrix[j])
            np.testing.assert_allclose(result.cosine[i, j], dot / (a * b), atol=8 * EPS)
            np.testing.assert_allclose(result.magnitude_similarity[i, j], 2 * a * b / (a**2 + b**2), rtol=8 * EPS)
            conflicting += i < j and dot < 0
    np.testing.assert_allclose(result.share, conflicting / (num_tasks * (num_tasks - 1) / 2), rtol=1e-6)
    # A Gramian is as good as the Jacobian.
    jax.tree.map(np.testing.assert_array_equal, mtjax.conflict(mtjax.gramian(jacobian)), result)


def test_conflict_by_hand():
    result = mtjax.conflict({"w": jnp.array([[1.0, 0.0], [-3.0, 4.0], [0.0, 2.0]])})
    np.testing.assert_allclose(result.cosine, [[1, -0.6, 0], [-0.6, 1, 0.8], [0, 0.8, 1]], atol=1e-6)
    np.testing.assert_allclose(result.magnitude_similarity[0], [1, 10 / 26, 4 / 5], rtol=1e-6)
    np.testing.assert_allclose(result.share, 1 / 3, rtol=1e-6)


def test_conflict_with_zero_gradients():
    result = mtjax.conflict({"w": jnp.array([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])})
    assert result.cosine.tolist() == np.eye(3).tolist()
    assert result.magnitude_similarity.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert result.share == 0.0


def test_conflict_of_one_task():
    result = mtjax.conflict({"w": jnp.array([[1.0, -1.0]])})
    assert (result.cosine.tolist(), result.magnitude_similarity.tolist(), result.share.item()) == (
        [[1.0]],
        [[1.0]],
        0.0,
    )
    assert mtjax.conflict(jnp.array([[4.0]])).share == 0.0


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_conflict_does_not_depend_on_scale(scale):
    rows = np.array([[1.0, 2.0, 0.5], [-1.0, 0.1, 3.0], [2.0, -4.0, 1.0]])
    result, expected = (mtjax.conflict({"w": jnp.asarray(s * rows, jnp.float32)}) for s in (scale, 1.0))
    for ours, reference in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-6)
    # ... nor do cosines depend on the scale of each task, over twelve orders of magnitude and more.
    mixed = mtjax.conflict({"w": jnp.asarray(np.array([[scale], [1.0], [1 / scale]]) * rows, jnp.float32)})
    np.testing.assert_allclose(mixed.cosine, expected.cosine, atol=1e-6)
    assert mixed.share == expected.share


def test_opposite_gradients_have_cosine_minus_one():
    rows = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32)
    result = mtjax.conflict({"w": jnp.asarray(np.concatenate([rows, -0.1 * rows]))})
    assert -1.0 <= result.cosine[0, 1] <= -1.0 + 1e-6
    assert result.share == 1.0
