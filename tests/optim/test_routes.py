"""Every route of a method gives one update: by rows, by columns, by the Jacobian, at features; NaN policies in each.

Letters: K tasks, B batch. The battery over all methods is in test_methods.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax import optim

K = 4
X = jax.random.normal(jax.random.key(0), (8, 3))
PARAMS = {
    "trunk": jax.random.normal(jax.random.key(1), (3, 5)),
    "heads": {f"task {k}": jax.random.normal(jax.random.key(2 + k), (5,)) for k in range(K)},
}


def encode(params, x, *rest):
    del rest
    return jnp.tanh(x @ params["trunk"])


def heads(params, z, x, *rest):
    del x, rest
    return {name: jnp.mean((z @ head - 1.0) ** 2) for name, head in params["heads"].items()}


loss_fn = mtjax.Staged(encode, heads)


def poisoned_loss_fn(params, x):
    """The second task's loss is infinite, and so is its gradient, through the trunk."""
    losses = loss_fn(params, x)
    bad = jnp.sum(jnp.log(jnp.abs(encode(params, x)) * 0.0))
    return losses | {"task 1": bad}


def without(params, task=1):
    """The loss function of the other tasks."""
    kept = [k for k in range(K) if k != task]
    return lambda p, x: {f"task {k}": loss_fn(p, x)[f"task {k}"] for k in kept}, kept


def assert_trees_close(ours, reference, tolerance=1e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), ours, reference)


# Weighted route, chunk by chunk.


WAYS = {"all": True, "seen": None, "named": {"trunk": True, "heads": False}}


@pytest.mark.parametrize(
    ("shared", "chunk_size"),
    [
        pytest.param(
            shared,
            size,
            id=f"{way}-{size}",
            marks=() if (way, size) in (("all", 1), ("named", 2), ("seen", 3)) else pytest.mark.slow,
        )
        for way, shared in WAYS.items()
        for size in (1, 2, 3)
    ],
)
def test_columns_of_the_gramian_equal_its_rows(shared, chunk_size):
    method = optim.on_shared(optim.mgda(), shared)
    by_rows = jax.jit(mtjax.value_and_weighted_grad(loss_fn, method))
    by_columns = jax.jit(mtjax.value_and_weighted_grad(loss_fn, method, chunk_size=chunk_size))
    expected, ours = (route(PARAMS, method.init(PARAMS), X) for route in (by_rows, by_columns))
    assert_trees_close(ours, expected, 1e-4)
    jacobian = mtjax.value_and_jacobian(loss_fn)(PARAMS, X)[1]
    assert_trees_close(ours[1], method.update(jacobian, method.init(PARAMS), PARAMS)[0], 1e-4)


def test_a_chunk_of_one_needs_hardly_more_memory_than_a_plain_step():
    """Issue's goal: within 25 % of the plain step's peak; all rows at once: at most half of K copies on top."""
    num_tasks, width = 8, 512
    params = {"trunk": [jnp.zeros((width, width))] * 8, "heads": jnp.zeros((width, num_tasks))}
    x, tx = jnp.zeros((16, width)), optim.mgda()

    def deep(params, x):
        for kernel in params["trunk"]:
            x = jnp.tanh(x @ kernel)
        return jnp.mean((x @ params["heads"]) ** 2, 0)

    def peak(function, *args):
        analysis = jax.jit(function).lower(*args).compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    plain = peak(jax.value_and_grad(lambda p, x: deep(p, x).sum()), params, x)
    copies = num_tasks * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    state = tx.init(params)
    assert peak(mtjax.value_and_weighted_grad(deep, tx, chunk_size=1), params, state, x) < 1.25 * plain
    assert peak(mtjax.value_and_weighted_grad(deep, tx), params, state, x) - plain < 0.5 * copies


def test_forward_mode_is_only_asked_for_when_chunks_are():
    """A layer with a hand-written backward pass works with all rows at once; chunks raise JAX's own error."""

    @jax.custom_vjp
    def square(z):
        return z**2

    square.defvjp(lambda z: (z**2, z), lambda z, ct: (2 * z * ct,))
    only_reverse = lambda p, x: {"a": square(p["w"]), "b": square(p["w"] - 1.0)}  # noqa: E731
    params, method = {"w": jnp.array(3.0)}, optim.mgda()
    _, gradient, _ = mtjax.value_and_weighted_grad(only_reverse, method)(params, method.init(params), X)
    assert gradient["w"] == pytest.approx(4.0)
    with pytest.raises(TypeError, match="custom_vjp"):
        mtjax.value_and_weighted_grad(only_reverse, method, chunk_size=1)(params, method.init(params), X)


# value_and_update takes everything.


def test_update_of_an_aggregator_of_another_library():
    plain = optim.Aggregator(lambda p: (), lambda j, s, p=None, **extra: (jax.tree.map(lambda r: r.sum(0), j), s))
    losses, gradient, state = mtjax.value_and_update(loss_fn, plain)(PARAMS, (), X)
    expected = jax.grad(lambda p: sum(loss_fn(p, X).values()))(PARAMS)
    assert_trees_close(gradient, expected)
    assert state == () and losses.shape == (K,)


def test_update_with_aux():
    with_aux = lambda p, x: (loss_fn(p, x), {"rows": len(x)})  # noqa: E731
    method = optim.pcgrad()
    for route in (method, optim.sam(method), optim.flat_regions(method)):
        (losses, aux), gradient, _ = mtjax.value_and_update(with_aux, route, has_aux=True)(
            PARAMS, route.init(PARAMS), X
        )
        expected = mtjax.value_and_update(loss_fn, route)(PARAMS, route.init(PARAMS), X)
        assert aux == {"rows": 8}
        assert_trees_close((losses, gradient), expected[:2])


def test_routes_refuse_a_bad_chunk_size():
    for function in (mtjax.value_and_update, mtjax.value_and_weighted_grad):
        with pytest.raises(ValueError, match="chunk_size must be None or >= 1, got 0"):
            function(loss_fn, optim.mgda(), chunk_size=0)


# At the representation.


def test_at_the_representation_equals_its_definition():
    method = optim.at_representation(optim.mgda())
    losses, gradient, state = jax.jit(mtjax.value_and_update(loss_fn, method))(PARAMS, method.init(PARAMS), X)

    z = encode(PARAMS, X)
    rows = jnp.stack([jax.grad(lambda z, k=k: heads(PARAMS, z, X)[f"task {k}"])(z) for k in range(K)])
    flat = rows.reshape(K, -1)
    np.testing.assert_allclose(state.gramian, flat @ flat.T, rtol=1e-4, atol=1e-6)
    weights = optim.mgda().weighting.weigh(flat @ flat.T, losses, (), jnp.ones(K, bool))[0]
    np.testing.assert_allclose(state.weights, weights, atol=1e-4)
    # The trunk follows the weighted loss, heads the plain sum.
    weighted = jax.grad(lambda p: sum(w * loss for w, loss in zip(weights, loss_fn(p, X).values(), strict=True)))(
        PARAMS
    )
    summed = jax.grad(lambda p: sum(loss_fn(p, X).values()))(PARAMS)
    assert_trees_close(gradient, {"trunk": weighted["trunk"], "heads": summed["heads"]}, 1e-4)


def test_at_the_representation_walks_the_trunk_back_once():
    method = optim.at_representation(optim.mgda())

    def trunk_gradients(function, *args):
        """Matrix products whose result has the shape of the trunk."""
        lines = str(jax.make_jaxpr(function)(*args)).splitlines()
        return sum("dot_general" in line and re.search(r"f32\[(3,5|5,3)\] = ", line) is not None for line in lines)

    state = optim.init(method, PARAMS, num_tasks=K)
    assert trunk_gradients(mtjax.value_and_update(loss_fn, method), PARAMS, state, X) == 1
    assert trunk_gradients(mtjax.value_and_jacobian(loss_fn, chunk_size=None), PARAMS, X) == 0  # [K, 3, 5]


def test_at_the_representation_needs_a_staged_loss():
    method = optim.at_representation(optim.mgda())
    with pytest.raises(ValueError, match=r"pass mtjax.Staged\(encode, heads\) as the loss function, got function"):
        mtjax.value_and_update(poisoned_loss_fn, method)
    with pytest.raises(ValueError, match="without a route of its own"):
        optim.at_representation(optim.sam(optim.mgda()))


# NaN policies.


def policy_routes(method):
    """name -> (params, state, x) -> (losses, gradient, state), for the poisoned losses."""
    jacobian_fn = mtjax.value_and_jacobian(poisoned_loss_fn, separate=True)

    def by_jacobian(params, state, x):
        losses, jacobian = jacobian_fn(params, x)
        return losses, *method.update(jacobian, state, params, losses=losses)

    routes = {"jacobian": by_jacobian}
    if method.weighting is not None:
        routes |= {
            "rows": mtjax.value_and_weighted_grad(poisoned_loss_fn, method),
            "columns": mtjax.value_and_weighted_grad(poisoned_loss_fn, method, chunk_size=1),
        }
    return routes


@pytest.mark.parametrize("rule", [optim.linear("mean"), optim.mgda(), optim.uncertainty()], ids=["mean", "mgda", "uw"])
@pytest.mark.parametrize("shared", [True, {"trunk": True, "heads": False}], ids=["all", "named"])
def test_a_dropped_task_might_as_well_not_be_there(rule, shared):
    others, kept = without(PARAMS)
    alone = optim.on_shared(rule, shared)
    _, expected, expected_state = mtjax.value_and_update(others, alone)(PARAMS, alone.init(PARAMS), X)
    method = optim.nonfinite(alone, "drop_task")
    for name, route in policy_routes(method).items():
        _, gradient, state = jax.jit(route)(PARAMS, method.init(PARAMS), X)
        assert_trees_close(gradient, expected, 1e-4)
        np.testing.assert_allclose(state.weights[jnp.array(kept)], expected_state.weights, atol=1e-4, err_msg=name)
        assert state.present.tolist() == [True, False, True, True]


def test_a_skipped_step_changes_nothing_but_says_so():
    method = optim.nonfinite(optim.uncertainty(), "skip_step")
    start = optim.init(method, PARAMS, num_tasks=K)
    for route in policy_routes(method).values():
        _, gradient, state = jax.jit(route)(PARAMS, start, X)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
        assert not state.present[1]  # in a common backward pass it takes others along
        jax.tree.map(np.testing.assert_array_equal, state._replace(present=start.present), start)


def test_without_a_policy_nan_is_nan():
    method = optim.mgda()
    for route in policy_routes(method).values():
        _, gradient, _ = jax.jit(route)(PARAMS, method.init(PARAMS), X)
        assert jnp.isnan(gradient["trunk"]).all()


def test_policies_leave_finite_steps_alone():
    for policy in ("drop_task", "skip_step"):
        method = optim.nonfinite(optim.mgda(), policy)
        ours = mtjax.value_and_update(loss_fn, method)(PARAMS, method.init(PARAMS), X)
        expected = mtjax.value_and_update(loss_fn, optim.mgda())(PARAMS, optim.mgda().init(PARAMS), X)
        assert_trees_close(ours, expected)


def test_dropped_at_the_representation_too():

    def poisoned_heads(params, z, x):
        return heads(params, z, x) | {"task 1": jnp.sum(jnp.log(z * 0.0))}

    staged_others = mtjax.Staged(encode, lambda p, z, x: {n: v for n, v in heads(p, z, x).items() if n != "task 1"})
    plain = optim.at_representation(optim.mgda())
    _, expected, _ = mtjax.value_and_update(staged_others, plain)(PARAMS, plain.init(PARAMS), X)
    method = optim.at_representation(optim.nonfinite(optim.mgda(), "drop_task"))
    _, gradient, _ = mtjax.value_and_update(mtjax.Staged(encode, poisoned_heads), method)(
        PARAMS, method.init(PARAMS), X
    )
    assert_trees_close(gradient, expected, 1e-4)


# Pieces.


def test_split_batch():
    first, second, third = optim.split_batch({"x": jnp.arange(6), "y": jnp.ones((6, 2))}, 3)
    assert first["x"].tolist() == [0, 1] and third["x"].tolist() == [4, 5] and second["y"].shape == (2, 2)
    with pytest.raises(ValueError, match=r"needs 3 independent batches .* 'x' has shape \(7,\)"):
        optim.split_batch({"x": jnp.arange(7)}, 3)


def test_directional_derivatives_are_the_jacobian_times_a_direction():
    direction = jax.tree.map(lambda p: jax.random.normal(jax.random.key(9), p.shape), PARAMS)
    losses, derivatives = jax.jit(mtjax.directional_derivatives(loss_fn))(PARAMS, direction, X)
    expected_losses, jacobian = mtjax.value_and_jacobian(loss_fn)(PARAMS, X)
    pairs = jax.tree.map(lambda rows, v: jnp.tensordot(rows, v, v.ndim), jacobian, direction)
    np.testing.assert_allclose(derivatives, sum(jax.tree.leaves(pairs)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    (_, aux), _ = mtjax.directional_derivatives(lambda p, x: (loss_fn(p, x), 7), has_aux=True)(PARAMS, direction, X)
    assert aux == 7


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_disjoint_examples(chunk_size):
    stacked = {"trunk": PARAMS["trunk"], "heads": jnp.stack(list(PARAMS["heads"].values()))}
    batches = jax.random.normal(jax.random.key(5), (K, 6, 3))

    def one(params, x, task):
        return jnp.mean((jnp.tanh(x @ params["trunk"]) @ params["heads"][task] - 1.0) ** 2)

    fn = jax.jit(mtjax.value_and_disjoint_jacobian(one, chunk_size=chunk_size))
    losses, jacobian = fn(stacked, batches)
    for k in range(K):
        loss, gradient = jax.value_and_grad(one)(stacked, batches[k], k)
        assert_trees_close((losses[k], jax.tree.map(lambda rows, k=k: rows[k], jacobian)), (loss, gradient))
    with pytest.raises(ValueError, match="need one leading axis of tasks"):
        mtjax.value_and_disjoint_jacobian(one)(stacked, {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))})


def test_results_do_not_depend_on_the_number_of_devices():
    """Under a `data` mesh per-task gradients are averaged over shards before the Gramian."""
    method = optim.mgda()
    step = jax.jit(mtjax.value_and_update(loss_fn, method))
    expected = step(PARAMS, optim.init(method, PARAMS, num_tasks=K), X)
    for count in (2, 8):
        mesh = jax.make_mesh(
            (count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
        )
        everywhere = jax.NamedSharding(mesh, jax.P())
        x = jax.device_put(X, jax.NamedSharding(mesh, jax.P("data")))
        params, state = jax.device_put((PARAMS, optim.init(method, PARAMS, num_tasks=K)), everywhere)
        ours = step(params, state, x)
        assert_trees_close(jax.tree.map(np.asarray, ours), jax.tree.map(np.asarray, expected), 1e-4)
