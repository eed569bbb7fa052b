"""The two contracts: transforms compose with optax, keep any pytree, jit, vmap and scan; shared leaves; diagnostics.

Letters: K tasks. What holds for every method is in test_methods.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

import mtjax
from mtjax.optim import base

K = 3
PARAMS = {"trunk": {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}, "heads": (jnp.ones(3), jnp.ones(3), jnp.ones(3))}
X = jax.random.normal(jax.random.key(0), (16, 4))


def loss_fn(params, x):
    """Head k belongs to task k only."""
    hidden = jnp.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"][None])
    return {f"task {k}": jnp.mean((hidden @ head - k + 1) ** 2) for k, head in enumerate(params["heads"])}


def jacobian_of(params=PARAMS):
    return jax.jit(mtjax.value_and_jacobian(loss_fn))(params, X)


def assert_trees_close(ours, reference, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), ours, reference)


def largest_weight(temperature=1.0):
    """A method as a user would add it, in a file of its own: softmax of the losses, counting its updates."""

    def weigh(gramian, losses, count):
        del gramian
        return jax.nn.softmax(losses / temperature), count + 1

    return mtjax.optim.from_weighting(
        mtjax.optim.Weighting(lambda num_tasks: jnp.zeros((), jnp.int32), weigh, needs_gramian=False, needs_losses=True)
    )


# The transform is an optax aggregator.


def test_a_method_is_an_optax_aggregator():
    method = mtjax.optim.pcgrad()
    assert isinstance(method, aggregating.Aggregator)
    assert isinstance(method, optax.GradientTransformationExtraArgs)


def test_inside_a_chain():
    losses, jacobian = jacobian_of()
    tx = optax.chain(mtjax.optim.mgda(), optax.clip_by_global_norm(1e-3), optax.adamw(1e-2))
    updates, state = tx.update(jacobian, tx.init(PARAMS), PARAMS, losses=losses)
    method, rest = mtjax.optim.mgda(), optax.chain(optax.clip_by_global_norm(1e-3), optax.adamw(1e-2))
    gradient, method_state = method.update(jacobian, method.init(PARAMS), PARAMS)
    expected, _ = rest.update(gradient, rest.init(PARAMS), PARAMS)
    assert_trees_close(updates, expected)
    assert_trees_close(mtjax.optim.diagnostics(state), mtjax.optim.diagnostics(method_state))


def test_inside_process_with_transforms_before_and_after():
    """Rows normalised one by one, then aggregated, then descended."""
    losses, jacobian = jacobian_of()

    def unit_rows(rows, params):
        del params
        norm = jnp.sqrt(jnp.diagonal(mtjax.gramian(rows)))
        return jax.tree.map(lambda leaf: leaf / norm.reshape(-1, *[1] * (leaf.ndim - 1)), rows)

    method, normalise = mtjax.optim.mgda(), optax.with_extra_args_support(optax.stateless(unit_rows))
    tx = aggregating.process(normalise, method, optax.sgd(0.1))
    updates, state = tx.update(jacobian, tx.init(PARAMS), PARAMS, losses=losses)
    gradient, _ = method.update(unit_rows(jacobian, None), method.init(PARAMS))
    assert_trees_close(updates, jax.tree.map(lambda g: -0.1 * g, gradient))
    np.testing.assert_allclose(jnp.diagonal(mtjax.optim.diagnostics(state).gramian), np.ones(K), rtol=1e-5)


def test_extra_arguments_of_other_transforms_are_ignored():
    losses, jacobian = jacobian_of()
    method = mtjax.optim.uncertainty()
    plain = method.update(jacobian, method.init(PARAMS), PARAMS, losses=losses)
    extra = method.update(jacobian, method.init(PARAMS), PARAMS, losses=losses, value=1.0, grad=None, batch={"x": X})
    jax.tree.map(np.testing.assert_array_equal, plain, extra)


def test_params_are_optional():
    _, jacobian = jacobian_of()
    method = mtjax.optim.linear("mean")
    gradient, _ = method.update(jacobian, method.init(None))
    assert_trees_close(gradient, jax.tree.map(lambda rows: rows.mean(0), jacobian))


def test_losses_are_required_where_declared():
    losses, jacobian = jacobian_of()
    for method in (mtjax.optim.uncertainty(), mtjax.optim.mgda("loss"), mtjax.optim.mgda("loss+"), largest_weight()):
        with pytest.raises(ValueError, match="weighs tasks by their losses: call update"):
            method.update(jacobian, method.init(PARAMS), PARAMS)
        method.update(jacobian, method.init(PARAMS), PARAMS, losses=losses)
        # A dict of scalars will do, in the order of the rows.
        named = dict(zip(("z", "a", "m"), losses, strict=True))
        _, state = method.update(jacobian, method.init(PARAMS), PARAMS, losses=named)
        _, expected = method.update(jacobian, method.init(PARAMS), PARAMS, losses=losses)
        assert state.weights.tolist() == expected.weights.tolist()


def test_number_of_losses_must_be_that_of_the_rows():
    _, jacobian = jacobian_of()
    method = mtjax.optim.uncertainty()
    with pytest.raises(ValueError, match=r"losses has shape \(2,\), but the Jacobian has 3 rows"):
        method.update(jacobian, method.init(PARAMS), losses=jnp.ones(2))


@pytest.mark.parametrize("shape", [(3, 2), (3, 3)])
def test_the_gradient_of_a_sum_is_not_taken_for_a_jacobian(shape):
    """Also where the leading axes happen to agree, so that it would pass for one."""
    params = {"w": jnp.ones(shape), "b": jnp.ones(3)}
    summed = jax.grad(lambda p: (p["w"] ** 2).sum() + p["b"].sum())(params)
    method = mtjax.optim.pcgrad()
    with pytest.raises(ValueError) as error:
        method.update(summed, method.init(params), params)
    assert str(error.value) == (
        "The Jacobian of parameter 'b' must have shape (K, 3), got (3,). Use value_and_jacobian, not jax.grad, to get "
        "per-task gradients"
    )


@pytest.mark.parametrize(
    "params",
    [
        jnp.ones(3),
        jnp.array(2.0),
        {"a": {"b": {"c": jnp.ones((2, 2))}}, "scalar": jnp.array(1.0)},
        (jnp.ones((2, 1, 3)), [jnp.array(1.0), None, jnp.ones(1)]),
        {"half": jnp.ones(3, jnp.bfloat16), "float16": jnp.ones((), jnp.float16), "single": jnp.ones((1, 2))},
    ],
)
def test_any_pytree_of_any_dtype(params):
    rng = np.random.default_rng(0)
    jacobian = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(K, *p.shape)), p.dtype), params)
    for method in (mtjax.optim.linear(), mtjax.optim.mgda(), mtjax.optim.on_shared(mtjax.optim.pcgrad())):
        gradient, _ = method.update(jacobian, method.init(params), params)
        assert jax.tree.structure(gradient) == jax.tree.structure(params)
        assert jax.tree.map(lambda g: (g.shape, g.dtype), gradient) == jax.tree.map(
            lambda p: (p.shape, p.dtype), params
        )


# State.


def test_state_is_deferred_until_the_number_of_tasks_is_known():
    losses, jacobian = jacobian_of()
    method = mtjax.optim.uncertainty()
    state = method.init(PARAMS)
    assert jax.tree.leaves(state) == []
    assert repr(state) == "Deferred(until the number of tasks is known)"
    assert jax.tree.structure(state) == jax.tree.structure(method.init(PARAMS))
    _, updated = method.update(jacobian, state, losses=losses)
    ready = mtjax.optim.init(method, PARAMS, num_tasks=K)
    assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, ready)
    assert_trees_close(method.update(jacobian, ready, losses=losses)[1], updated)


def make_step(tx, counter=None):
    def step(params, state):
        if counter is not None:
            counter.append(1)  # runs while tracing only
        losses, jacobian = mtjax.value_and_jacobian(loss_fn)(params, X)
        updates, state = tx.update(jacobian, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    return step


def test_jitted_loop_traces_at_most_twice_and_scan_does_the_same():
    tx = optax.chain(mtjax.optim.pcgrad(seed=1), optax.adam(1e-2))
    traces = []
    step = jax.jit(make_step(tx, traces))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        params, state = step(params, state)
    assert len(traces) == 2  # once with the deferred state, once with arrays
    step(PARAMS, tx.init(PARAMS))
    assert len(traces) == 2  # a fresh state has the structure of the first one

    ready, traces_ready = mtjax.optim.init(tx, PARAMS, num_tasks=K), []
    scanned, _ = jax.jit(
        lambda p, s: jax.lax.scan(lambda c, _: (make_step(tx, traces_ready)(*c), None), (p, s), length=5)
    )(PARAMS, ready)
    assert_trees_close(scanned[0], params)
    assert jax.tree.structure(scanned[1]) == jax.tree.structure(state) == jax.tree.structure(ready)


def test_losses_decrease():
    tx = optax.chain(mtjax.optim.mgda(), optax.sgd(0.2))
    state = mtjax.optim.init(tx, PARAMS, num_tasks=K)
    (params, _), _ = jax.lax.scan(lambda c, _: (make_step(tx)(*c), None), (PARAMS, state), length=30)
    before, after = (jnp.stack(list(loss_fn(p, X).values())) for p in (PARAMS, params))
    assert (after <= before).all()  # a common descent direction: no task pays for another
    assert after.sum() < 0.9 * before.sum()


def test_state_survives_flattening_to_arrays():
    """What a checkpoint does: leaves out (keys as their data), leaves in, and the next update is the same."""
    _, jacobian = jacobian_of()
    tx = optax.chain(mtjax.optim.pcgrad(seed=3), optax.adam(1e-2))
    _, state = tx.update(jacobian, tx.init(PARAMS), PARAMS)
    leaves, structure = jax.tree.flatten(state)
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    assert any(is_key)
    stored = [np.asarray(jax.random.key_data(leaf) if key else leaf) for leaf, key in zip(leaves, is_key, strict=True)]
    loaded = [
        jax.random.wrap_key_data(leaf) if key else jnp.asarray(leaf) for leaf, key in zip(stored, is_key, strict=True)
    ]
    template = mtjax.optim.init(tx, PARAMS, num_tasks=K)
    assert jax.tree.structure(template) == structure
    first, second = (
        tx.update(jacobian, s, PARAMS)[0] for s in (state, jax.tree.unflatten(jax.tree.structure(template), loaded))
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_vmap_over_seeds_from_the_first_step():
    tx = optax.chain(mtjax.optim.mgda(), optax.sgd(0.1))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), PARAMS)
    states = jax.vmap(tx.init)(stacked)
    params, states = jax.jit(jax.vmap(make_step(tx)))(stacked, states)
    params, states = jax.jit(jax.vmap(make_step(tx)))(params, states)
    assert states[0].weights.shape == (3, K)
    step = jax.jit(make_step(tx))
    for seed, factor in enumerate((1.0, 2.0, -1.0)):
        single = jax.tree.map(lambda leaf, factor=factor: factor * leaf, PARAMS)
        single, _ = step(*step(single, tx.init(single)))
        assert_trees_close(jax.tree.map(lambda leaf, seed=seed: leaf[seed], params), single, rtol=1e-4, atol=1e-5)


# Shared and task-specific parameters.

BY_PATH = {
    "predicate": lambda path: path.startswith("trunk/"),
    "prefix tree": {"trunk": True, "heads": False},
    "whole tree": {"trunk": {"w": True, "b": True}, "heads": (False, False, False)},
    "arrays of bools": {"trunk": np.array(True), "heads": jnp.array(False)},
    "from the Jacobian": None,
}


@pytest.mark.parametrize("spec", BY_PATH)
def test_on_shared_aggregates_the_trunk_and_sums_the_heads(spec):
    _, jacobian = jacobian_of()
    method = mtjax.optim.on_shared(mtjax.optim.mgda(), BY_PATH[spec])
    gradient, state = jax.jit(method.update)(jacobian, method.init(PARAMS), PARAMS)
    inner = mtjax.optim.mgda()
    trunk, inner_state = inner.update(jacobian["trunk"], inner.init(PARAMS))
    assert_trees_close(gradient["trunk"], trunk)
    assert_trees_close(gradient["heads"], jax.tree.map(lambda rows: rows.sum(0), jacobian["heads"]))
    assert_trees_close(state, inner_state)


@pytest.mark.parametrize("spec", BY_PATH)
def test_on_shared_without_a_jacobian_is_the_same(spec):
    _, jacobian = jacobian_of()
    for inner in (mtjax.optim.mgda(), mtjax.optim.linear("mean"), largest_weight()):
        method = mtjax.optim.on_shared(inner, BY_PATH[spec])
        losses, gradient, state = jax.jit(mtjax.value_and_weighted_grad(loss_fn, method))(
            PARAMS, method.init(PARAMS), X
        )
        expected, expected_state = method.update(jacobian, method.init(PARAMS), PARAMS, losses=losses)
        assert_trees_close(gradient, expected)
        assert_trees_close(state.weights, expected_state.weights)


def test_default_detection_sees_who_depends_on_a_leaf():
    """One row: task-specific. Two rows: shared. No row, as of a head without labels in the batch: nothing to add."""
    jacobian = {
        "own": jnp.array([[1.0], [0.0], [0.0]]),
        "two": jnp.array([[1.0], [3.0], [0.0]]),
        "none": jnp.zeros((3, 1)),
    }
    method = mtjax.optim.on_shared(mtjax.optim.linear("mean"))
    gradient, state = method.update(jacobian, method.init(None))
    assert jax.tree.map(lambda g: round(g.item(), 6), gradient) == {"own": 1.0, "two": round(4 / 3, 6), "none": 0.0}
    assert state.gramian.tolist() == [[1, 3, 0], [3, 9, 0], [0, 0, 0]]


def test_on_shared_needs_a_method():
    with pytest.raises(ValueError, match=r"on_shared takes a method of mtjax.optim \(apply it before optax.chain\)"):
        mtjax.optim.on_shared(optax.sgd(0.1))


# A new method needs no more than its own file.


def test_a_new_method_works_through_both_routes():
    losses, jacobian = jacobian_of()
    method = largest_weight(0.5)
    gradient, state = method.update(jacobian, method.init(PARAMS), PARAMS, losses=losses)
    np.testing.assert_allclose(state.weights, jax.nn.softmax(losses / 0.5), rtol=1e-6)
    expected = jax.tree.map(lambda rows: jnp.einsum("k,k...->...", state.weights, rows), jacobian)
    assert_trees_close(gradient, expected)
    assert state.inner == 1

    fn = jax.jit(mtjax.value_and_weighted_grad(loss_fn, method))
    _, weighted, weighted_state = fn(PARAMS, method.init(PARAMS), X)
    assert_trees_close(weighted, gradient)
    assert_trees_close(weighted_state.weights, state.weights)
    assert jnp.isnan(weighted_state.gramian).all()  # it said that it does without
    assert weighted_state.conflicts == -1
    _, _, third = fn(PARAMS, weighted_state, X)
    assert third.inner == 2


# Diagnostics.


def test_diagnostics_are_found_in_nested_states():
    losses, jacobian = jacobian_of()
    method = mtjax.optim.pcgrad()
    tx = optax.chain(optax.chain(method, optax.clip(1.0)), optax.masked(optax.adam(0.1), True))
    _, state = tx.update(jacobian, tx.init(PARAMS), PARAMS, losses=losses)
    found = mtjax.optim.diagnostics({"optimizer": state, "step": 3})
    gramian = mtjax.gramian(jacobian)
    np.testing.assert_allclose(found.gramian, gramian, rtol=1e-6)
    assert found.conflicts == sum(gramian[i, j] < 0 for i in range(K) for j in range(i))
    combined = mtjax.combine(jacobian, found.weights)
    assert_trees_close(combined, method.update(jacobian, method.init(PARAMS))[0])


def test_errors_of_diagnostics():
    method = mtjax.optim.pcgrad()
    with pytest.raises(ValueError, match=r"Expected the state of one mtjax\.optim method, found 0"):
        mtjax.optim.diagnostics(optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match=r"Expected the state of one mtjax\.optim method, found 2"):
        mtjax.optim.diagnostics(optax.chain(method, method).init(PARAMS))
    with pytest.raises(ValueError, match="made no update yet"):
        mtjax.optim.diagnostics(optax.chain(method, optax.sgd(0.1)).init(PARAMS))


def test_materialize_leaves_other_states_alone():
    state = optax.adam(0.1).init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, base.materialize(state, K), state)
