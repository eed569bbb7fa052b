import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax import dense_tasks
from mtjax.collectives import collectives
from mtjax.optim.routes import observe, observes, value_and_update
from mtjax.sharding import make_mesh, place_rows
from mtjax.tasks import Task, task_losses
from mtjax.train.accumulate import accumulate, labelled, split_rows

TASKS = (Task("sold", "binary"), Task("price", "regression"), Task("never", "count"))
ROWS, KEY = 24, jax.random.key(0)


def table(rows=ROWS, dtype=np.float32):
    """Labels that are missing at random, for one task everywhere; weights of rows."""
    rng = np.random.default_rng(0)
    sold = np.where(rng.random(rows) < 0.5, np.nan, rng.random(rows) < 0.5)
    labels = {"sold": sold, "price": rng.normal(size=rows), "never": np.full(rows, np.nan)}
    columns = {"x": rng.normal(size=(rows, 3)), "labels": labels, "weight": rng.uniform(0.5, 2, size=rows)}
    columns = jax.tree.map(lambda column: jnp.asarray(column.astype(dtype)), columns)
    return columns | {"mask": {"price": jnp.asarray(rng.random(rows) < 0.3)}}


def network(width=5, depth=2, dtype=np.float32):
    rng = np.random.default_rng(1)
    sizes = [3, *[width] * depth, 3]
    return [jnp.asarray(rng.normal(size=s).astype(dtype) / s[0] ** 0.5) for s in itertools.pairwise(sizes)]


def loss_fn(params, batch, rng):
    del rng
    h = batch["x"]
    for kernel in params[:-1]:
        h = jnp.tanh(h @ kernel)
    y = h @ params[-1]
    return task_losses(TASKS, {task.name: y[:, k] for k, task in enumerate(TASKS)}, batch)


METHODS = {  # one for each route
    "sum": (mtjax.optim.linear("sum"), None),
    "pcgrad, Gramian first": (mtjax.optim.pcgrad(), None),
    "mgda, Gramian by columns": (mtjax.optim.mgda(), 1),
    "famo, losses before and after": (mtjax.optim.famo(), None),
}


@pytest.mark.parametrize("name", METHODS)
def test_updates_are_those_of_the_whole_batch(name):
    method, chunk_size = METHODS[name]

    def step(loss_fn, params, batch):
        update = value_and_update(loss_fn, method, chunk_size=chunk_size)
        losses, gradient, state = update(params, mtjax.optim.base.init(method, params, num_tasks=3), batch, KEY)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        state = observe(method, state, loss_fn(moved, batch, KEY)) if observes(method) else state
        return losses, gradient, jax.tree.map(lambda s: s if jnp.issubdtype(s.dtype, jnp.floating) else (), state)

    def both(params, batch):
        return step(loss_fn, params, batch), step(accumulate(loss_fn, 4), params, batch)

    with jax.enable_x64(True):
        whole, parts = jax.jit(both)(network(depth=1, dtype=np.float64), table(dtype=np.float64))
        # A method's state may be float32 whatever the losses are.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), whole, parts)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), whole[:1], parts[:1])


def test_jacobian_and_gramian_are_those_of_the_whole_batch_in_float32():
    params, batch = network(), table()

    def jacobian(loss_fn):
        losses, rows = mtjax.value_and_jacobian(loss_fn)(params, batch, KEY)
        return losses, rows, mtjax.gradients.gramian(rows)

    whole, *parts = jax.jit(lambda: [jacobian(loss_fn), *(jacobian(accumulate(loss_fn, m)) for m in (2, 8))])()
    assert float(whole[0][0]) > 0 and float(whole[0][2]) == 0.0  # the last task has no label anywhere
    for part in parts:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), whole, part)


def test_a_bad_task_that_is_left_out_does_not_reach_the_others():
    def with_bad(params, batch, rng):
        losses = loss_fn(params, batch, rng)
        return {"sold": losses["sold"], "bad": jnp.sqrt(0.0 * params[0].sum()), "price": losses["price"]}

    method = mtjax.optim.nonfinite(mtjax.optim.linear("sum"), "drop_task")

    def gradient(loss_fn, params, batch):
        state = mtjax.optim.base.init(method, params, num_tasks=3)
        return value_and_update(loss_fn, method)(params, state, batch, KEY)[1]

    def both(params, batch):
        return gradient(with_bad, params, batch), gradient(accumulate(with_bad, 4), params, batch)

    whole, parts = jax.jit(both)(network(depth=1), table())
    assert all(np.isfinite(leaf).all() and np.any(leaf != 0) for leaf in whole)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), whole, parts)


def test_a_mean_of_means_would_be_another_loss():
    params, batch = network(), table()
    right = accumulate(loss_fn, 4)(params, batch, KEY)
    naive = accumulate(loss_fn, 4, counts=lambda batch: jnp.ones(3))(params, batch, KEY)
    assert abs(float(right["sold"] - naive["sold"])) > 1e-3
    np.testing.assert_allclose(right["sold"], loss_fn(params, batch, KEY)["sold"], rtol=1e-5)


def test_dense_tasks_count_as_their_losses_do():
    tasks = (
        dense_tasks.segmentation(num_classes=3),
        dense_tasks.depth(),
        dense_tasks.normals(),
        dense_tasks.edge(),
        dense_tasks.detection(num_classes=2, stride=2),
        dense_tasks.classification(num_classes=4),
    )
    rng = np.random.default_rng(0)
    unlabelled = np.arange(8)[:, None, None] * np.ones((1, 4, 4)) > rng.integers(0, 16, (8, 4, 4))
    labels = {
        "segmentation": np.where(unlabelled, 255, rng.integers(0, 3, (8, 4, 4))).astype(np.uint8),
        "depth": np.where(unlabelled, np.nan, rng.random((8, 4, 4))).astype(np.float16),
        "normals": np.where(unlabelled[..., None], np.nan, rng.normal(size=(8, 4, 4, 3))).astype(np.float32),
        "edge": np.where(unlabelled, 255, rng.integers(0, 2, (8, 4, 4))).astype(np.uint8),
        "detection": {
            "boxes": np.tile(np.array([0.0, 0.0, 3.0, 2.0], np.float32), (8, 2, 1)),
            "classes": np.array([[0, 1], [1, -1], [-1, -1], [-2, -1]] * 2, np.int32),
        },
        "classification": np.array([0, 3, -1, -1, -1, 2, 1, 0], np.int32),
    }
    batch = {"image": rng.normal(size=(8, 4, 4, 3)).astype(np.float32), "labels": labels}

    def loss_fn(params, batch, rng):
        image, losses = batch["image"].astype(jnp.float32), {}
        for task in tasks:
            features = image[:, ::2, ::2] if task.kind == "detection" else image
            features = features.mean((1, 2)) if task.kind == "classification" else features
            losses[task.name] = task.weight * task.loss(features @ params[task.name], batch["labels"][task.name])
        return losses

    params = {t.name: jnp.asarray(rng.normal(size=(3, t.channels)).astype(np.float32)) for t in tasks}
    split = accumulate(loss_fn, 4, counts=labelled(tasks))
    whole, parts = jax.jit(lambda p, b: (loss_fn(p, b, KEY), split(p, b, KEY)))(params, batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), whole, parts)


def test_fields_count_functions_of_a_task():
    batch = {"values": jnp.arange(8.0), "task": jnp.array([0, 0, 0, 1, 1, 0, 0, 0])}

    def loss_fn(params, batch, rng):
        member = jax.nn.one_hot(batch["task"], 2)
        return (member * (params * batch["values"])[:, None]).sum(0) / jnp.maximum(member.sum(0), 1)

    tasks = (Task("a", "regression"), Task("b", "regression"))
    np.testing.assert_allclose(accumulate(loss_fn, 4, counts=labelled(tasks))(2.0, batch), loss_fn(2.0, batch, KEY))


def test_every_micro_batch_draws_from_a_key_of_its_own_and_keeps_the_order_of_tasks():
    def noisy(params, batch, rng):
        draw = jax.random.normal(rng)
        return {"z": draw, "a": draw**2 + 0 * batch.sum()}

    losses = accumulate(noisy, 4)(None, jnp.ones(8), KEY)
    draws = np.array([jax.random.normal(jax.random.fold_in(KEY, m)) for m in range(4)])
    assert list(losses) == ["z", "a"]  # not sorted: row k is the k-th task
    np.testing.assert_allclose(list(losses.values()), [draws.mean(), (draws**2).mean()], rtol=1e-5)


def energies(params, batch, rng):
    """Two losses of a deep narrow network: many activations, few parameters."""
    del rng
    for kernel in params:
        batch = jnp.tanh(batch @ kernel)
    return {"a": jnp.mean(batch), "b": jnp.mean(batch**2)}


def test_memory_falls_with_the_number_of_micro_batches():
    params, batch = [jnp.ones((8, 8))] * 6, jnp.ones((2048, 8))

    def temporaries(route, steps):
        function = route(accumulate(energies, steps))
        return jax.jit(function).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    def jacobian(loss_fn):
        return lambda params, batch: mtjax.value_and_jacobian(loss_fn)(params, batch, KEY)

    def gramian_first(loss_fn):
        weighting = mtjax.optim.Weighting(lambda num_tasks: (), lambda gram, losses, state: (gram.sum(0), state))
        return lambda params, batch: mtjax.value_and_weighted_grad(loss_fn, weighting)(params, (), batch, KEY)[:2]

    for route in (jacobian, gramian_first):
        whole, few, many = (temporaries(route, steps) for steps in (1, 2, 16))
        assert many < 0.3 * whole and many < few < whole, (route.__name__, whole, few, many)


def test_on_a_mesh_micro_batches_stay_where_their_rows_are():
    params, batch = [jnp.eye(8) + 0.1] * 2, np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    step = jax.jit(lambda params, batch: mtjax.value_and_jacobian(accumulate(energies, 4))(params, batch, KEY))
    expected = mtjax.value_and_jacobian(energies)(params, batch, KEY)
    mesh = make_mesh("data=8")
    with jax.set_mesh(mesh):
        rows = place_rows(batch, mesh)
        compiled = step.lower(params, rows).compile()
        on_mesh = compiled(params, rows)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), on_mesh, expected)
    assert {c.kind for c in collectives(compiled.as_text())} == {"all-reduce"}


def test_micro_batches_are_strides_of_the_batch():
    cut = split_rows({"x": jnp.arange(6)}, 3)
    assert cut["x"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_one_step_is_the_loss_function_itself():
    assert accumulate(loss_fn, 1) is loss_fn


def test_what_cannot_be_accumulated_is_refused_with_a_sentence():
    params, batch = network(), table()
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        accumulate(loss_fn, 0)
    with pytest.raises(ValueError, match="24 rows cannot be cut into steps=5"):
        accumulate(loss_fn, 5)(params, batch, KEY)
    with pytest.raises(ValueError, match="same leading axis"):
        accumulate(loss_fn, 4)(params, batch | {"context": jnp.ones(3)}, KEY)
    with pytest.raises(ValueError, match="returns losses only, got a tuple"):
        accumulate(lambda *args: (loss_fn(*args), {}), 4)(params, batch, KEY)
    with pytest.raises(ValueError, match=r"do not tell which of the labels .* pass counts=labelled"):
        accumulate(lambda *args: jnp.stack(list(loss_fn(*args).values())), 4)(params, batch, KEY)
    with pytest.raises(ValueError, match="one number for each of 3 losses, got 2"):
        accumulate(loss_fn, 4, counts=lambda batch: jnp.ones(2))(params, batch, KEY)
    image = {"labels": {"depth": jnp.ones((4, 2, 2))}}
    with pytest.raises(ValueError, match=r"'depth' is no array f\[B\].* counts=labelled"):
        accumulate(lambda *args: {"depth": 0.0}, 2)(params, image, KEY)
