"""The train step: its two routes, regularizers, missing labels, padding steps of a chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.models.aitm import calibrator
from mtjax.optim.base import Method
from mtjax.train import TrainConfig, make_train_step, supervised_loss
from mtjax.train.state import TrainState, create_lanes
from mtjax.train.step import make_conflict_probe, make_train_chunk


def sgd(learning_rate):
    return optax.sgd(learning_rate)


@pytest.fixture(scope="module")
def problem(toy):
    """train rows, tasks, model, its loss function and parameters."""
    train = toy.make_split(64, 0)
    tasks = toy.make_tasks(train, ("sold", "price", "style"))
    model = toy.Tiny(mtjax.head_sizes(tasks))
    params = model.init(jax.random.key(0), train)["params"]
    return train, tasks, model, supervised_loss(model, tasks), params


def make_state(params, method, optimizer=sgd, num_tasks=3) -> TrainState:
    return TrainState.create(lambda key: params, method, optimizer, 0, 0.1, num_tasks=num_tasks)


def assert_close(a, b, tolerance=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def rows_one_by_one(loss_fn, params, batch):
    """The gradient of each task's loss, naively."""
    names = ("sold", "price", "style")
    return jax.jit(lambda p: [jax.grad(lambda p, k=k: loss_fn(p, batch, jax.random.key(0))[k])(p) for k in names])(
        params
    )


def test_linear_is_sgd_on_the_sum_in_one_backward_pass(problem):
    train, _, _, loss_fn, params = problem
    key = jax.random.key(0)

    def plain(params):
        return sum(loss_fn(params, train, key).values())

    gradient = jax.jit(jax.grad(plain))(params)
    step = make_train_step(loss_fn, mtjax.optim.linear("sum"), sgd)
    state = make_state(params, mtjax.optim.linear("sum"))
    new, metrics = jax.jit(step)(state, train)
    assert_close(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
    assert int(new.step) == 1 and metrics.weights.tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(metrics.losses, list(loss_fn(params, train, key).values()), rtol=1e-6)

    def products(function, *arguments):
        return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")

    assert products(step, state, train) == products(jax.value_and_grad(plain), params), "as many matrix products"


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_routes_agree(problem, chunk_size):
    """A weighting's own route, and the same method with its weighting hidden, which goes by the Jacobian."""
    train, _, _, loss_fn, params = problem
    method = mtjax.optim.pcgrad(seed=3)
    bare = Method(method.init, method.update)
    results = []
    for candidate in (method, bare):
        state = make_state(params, candidate)
        step = jax.jit(make_train_step(loss_fn, candidate, sgd, chunk_size=chunk_size))
        for _ in range(2):
            state, metrics = step(state, train)
        results.append((state, metrics))
    assert_close(results[0][0].params, results[1][0].params, 1e-5)
    assert_close(results[0][1].weights, results[1][1].weights, 1e-5)


def test_a_method_that_needs_the_entries_of_the_jacobian(problem):
    """Elementwise median of the rows, with a counter as its state."""
    train, _, _, loss_fn, params = problem

    def update(jacobian, count, params=None, *, losses=None, **extra):
        return jax.tree.map(lambda rows: jnp.median(rows, axis=0), jacobian), count + 1

    method = Method(lambda params: jnp.int32(0), update)
    new, metrics = jax.jit(make_train_step(loss_fn, method, sgd))(make_state(params, method), train)
    rows = rows_one_by_one(loss_fn, params, train)
    median = jax.tree.map(lambda *leaves: np.median(np.stack(leaves), axis=0), *rows)
    assert_close(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, median))
    assert int(new.method_state) == 1 and metrics.weights is None


def test_a_task_without_labels_has_no_gradient(problem):
    train, _, _, loss_fn, params = problem
    labels = {**train["labels"], "style": np.full(64, np.nan, np.float32)}
    step = jax.jit(make_train_step(loss_fn, mtjax.optim.linear(), sgd))
    new, metrics = step(make_state(params, mtjax.optim.linear()), {**train, "labels": labels})
    assert float(metrics.losses[2]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, new.params["head_style"], params["head_style"])


def test_rows_of_weight_zero_do_not_count(problem):
    train, _, _, loss_fn, params = problem
    weight = (np.arange(64) < 40).astype(np.float32)
    first = jax.tree.map(lambda column: column[:40], train)
    key = jax.random.key(0)
    weighted, fewer = loss_fn(params, {**train, "weight": weight}, key), loss_fn(params, first, key)
    assert_close(weighted, fewer)


def test_dropout_follows_the_step(problem, toy):
    """fold_in(rng, step): the same step gives the same bits, the next one another mask."""
    train, tasks, _, _, params = problem
    loss_fn = supervised_loss(toy.Tiny(mtjax.head_sizes(tasks), dropout=0.5), tasks)
    step = jax.jit(make_train_step(loss_fn, mtjax.optim.linear(), lambda rate: optax.set_to_zero()))
    state = make_state(params, mtjax.optim.linear(), lambda rate: optax.set_to_zero())
    second, first_metrics = step(state, train)
    _, again = step(state, train)
    _, second_metrics = step(second, train)
    np.testing.assert_array_equal(first_metrics.losses, again.losses)
    assert not np.array_equal(first_metrics.losses, second_metrics.losses), "parameters are equal, masks are not"


def test_regularizer_adds_to_the_tasks_it_names(problem):
    """AITM's calibrator: a purchase is not likelier than the click before it."""
    train, _, model, _, params = problem
    tasks = (mtjax.Task("sold", "binary"), mtjax.Task("price", "binary"))
    batch = {**train, "labels": {"sold": train["labels"]["sold"], "price": train["labels"]["sold"]}}
    key = jax.random.key(0)

    def regularizer(outputs, batch):
        return calibrator({name: outputs[name] for name in ("sold", "price")}, ["sold", "price"], alpha=0.6)

    plain = supervised_loss(model, tasks)(params, batch, key)
    with_it = supervised_loss(model, tasks, regularizer)(params, batch, key)
    outputs = {name: np.asarray(z, np.float64) for name, z in model.apply({"params": params}, batch).items()}
    p, q = (1 / (1 + np.exp(-outputs[name])) for name in ("sold", "price"))
    assert float(with_it["sold"]) == float(plain["sold"])
    np.testing.assert_allclose(with_it["price"] - plain["price"], 0.6 * np.maximum(q - p, 0).mean(), atol=1e-6)
    assert list(with_it) == ["sold", "price"]


def test_clip_norm():
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}  # norm 5
    clipped, plain = TrainConfig(clip_norm=1.0), TrainConfig()
    # Adam divides scale out in the first step, so the second step tells clipped from unclipped gradients.
    expected, _ = updates(plain.optimizer(0.1), [jax.tree.map(lambda g: g / 5, gradient), small(gradient)])
    ours, _ = updates(clipped.optimizer(0.1), [gradient, small(gradient)])
    different, _ = updates(plain.optimizer(0.1), [gradient, small(gradient)])
    assert_close(ours, expected)
    assert not np.allclose(ours["a"], different["a"])


def small(gradient):
    return jax.tree.map(lambda g: g / 10, gradient)


def updates(tx, gradients):
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state = tx.init(params)
    for gradient in gradients:
        update, state = tx.update(gradient, state, params)
    return update, state


@pytest.fixture(scope="module")
def chunked(problem, toy):
    """A function that runs a chunk over two lanes from scratch, and the chunk's rows i32[2, 4, 16]."""
    train, tasks, _, _, _ = problem
    loss_fn = supervised_loss(toy.Tiny(mtjax.head_sizes(tasks), dropout=0.3), tasks)
    method = mtjax.optim.pcgrad()
    run = make_train_chunk(make_train_step(loss_fn, method, TrainConfig().optimizer))
    model = toy.Tiny(mtjax.head_sizes(tasks), dropout=0.3)

    def fresh():
        def init(key):
            return model.init({"params": key, "dropout": key}, train, train=True)["params"]

        return create_lanes(init, method, TrainConfig().optimizer, (0, 1), (0.1, 0.2), num_tasks=3)

    data = jax.tree.map(jnp.asarray, train)
    indices = np.random.default_rng(0).integers(0, 64, size=(2, 4, 16)).astype(np.int32)
    return fresh, lambda state, rows, active: run(state, data, jnp.asarray(rows), jnp.asarray(active)), indices


def test_padding_steps_change_nothing(chunked, toy):
    fresh, run, indices = chunked
    padded, metrics, finite = run(fresh(), indices, [True, True, False, False])
    # The same two steps in two dispatches, each padded elsewhere with other rows.
    once, _, _ = run(fresh(), indices[:, [0, 3, 3, 3]], [True, False, False, False])
    twice, _, _ = run(once, indices[:, [3, 1, 2, 2]], [False, True, False, False])
    ours, theirs = toy.arrays(padded), toy.arrays(twice)
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []
    assert padded.step.tolist() == [2, 2] and finite.tolist() == [True, True]
    assert metrics.losses.shape == (2, 4, 3) and not np.asarray(metrics.losses[:, 2:]).any()


def test_the_state_is_donated(chunked):
    fresh, run, indices = chunked
    state = fresh()
    run(state, indices, [True] * 4)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_finite_tells_which_lane_diverged(chunked):
    fresh, run, indices = chunked
    state = fresh()
    state = state.replace(learning_rate=jnp.array([0.1, jnp.inf]))
    _, _, finite = run(state, indices, [True, False, False, False])
    assert finite.tolist() == [True, False]


def test_conflict_probe_is_the_cosine_of_per_task_gradients(problem):
    train, _, _, loss_fn, params = problem
    stacked = make_state(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 2]), params), mtjax.optim.linear())
    key = jax.random.key(0)
    cosine = make_conflict_probe(loss_fn)(stacked, train, key)
    rows = rows_one_by_one(loss_fn, params, train)
    flat = np.stack([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(row)]) for row in rows])
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(cosine, flat @ flat.T, atol=1e-5)
