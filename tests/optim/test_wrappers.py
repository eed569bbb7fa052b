"""Wrappers: groups, periods, averages, bounds, and policies for non-finite rows, each against a plain loop.

Letters: K tasks, N groups.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax import optim

K = 3
PARAMS = {"a": {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, "c": jnp.zeros(3)}


def jacobian_of(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(K, *p.shape)), p.dtype), PARAMS)


def loss_fn(params, x):
    outputs = jnp.tanh(x @ params["trunk"]) @ params["heads"]
    return jnp.mean((outputs - 1.0) ** 2, axis=0)


NET = {"trunk": jax.random.normal(jax.random.key(1), (4, 5)), "heads": jax.random.normal(jax.random.key(2), (5, K))}
X = jax.random.normal(jax.random.key(0), (8, 4))


# per_group.


@pytest.mark.parametrize(
    ("group", "groups"),
    [
        ("leaf", [["a/w"], ["a/b"], ["c"]]),
        ("module", [["a/w", "a/b"], ["c"]]),
        (lambda path: path != "a/b", [["a/w", "c"], ["a/b"]]),
    ],
    ids=["leaf", "module", "function"],
)
def test_each_group_has_its_own_instance(group, groups):
    jacobian, losses = jacobian_of(0), jnp.ones(K)
    method = optim.per_group(optim.mgda(), group)
    gradient, state = method.update(jacobian, method.init(PARAMS), PARAMS, losses=losses)
    named = {"a/w": jacobian["a"]["w"], "a/b": jacobian["a"]["b"], "c": jacobian["c"]}
    ours = {"a/w": gradient["a"]["w"], "a/b": gradient["a"]["b"], "c": gradient["c"]}
    for members in groups:
        part = {name: named[name] for name in members}
        expected, _ = optim.mgda().update(part, optim.mgda().init(None))
        for name in members:
            np.testing.assert_allclose(ours[name], expected[name], atol=1e-5)
    assert state.inner.weights.shape == (len(groups), K)


def test_groups_draw_and_remember_apart():
    """PCGrad's orders differ between groups, and a stateful rule keeps one state for each."""
    method = optim.per_group(optim.pcgrad(seed=1))
    state = optim.init(method, PARAMS, num_tasks=K)
    keys = jax.random.key_data(state.inner.inner)
    assert len(np.unique(np.asarray(keys), axis=0)) == 3
    averaged = optim.per_group(optim.ema(optim.mgda(), 0.5))
    state = optim.init(averaged, PARAMS, num_tasks=K)
    for seed in range(2):
        _, state = averaged.update(jacobian_of(seed), state, PARAMS)
    assert state.inner.inner.count.tolist() == [2, 2, 2]


def test_per_group_refuses_what_it_cannot_wrap():
    with pytest.raises(ValueError, match="group must be 'leaf', 'module' or a function of the path, got 'layer'"):
        optim.per_group(optim.mgda(), "layer")
    with pytest.raises(ValueError, match=r"per_group takes a method of mtjax\.optim that is derived from a Weighting"):
        optim.per_group(optim.flat_regions(optim.mgda()))


# every.


def test_weights_serve_until_the_next_run():
    method, bare = optim.every(optim.mgda(), 3), optim.mgda()
    state = optim.init(method, PARAMS, num_tasks=K)
    for step in range(7):
        jacobian = jacobian_of(step)
        gradient, state = method.update(jacobian, state, PARAMS)
        if step % 3 == 0:
            weights = bare.update(jacobian, bare.init(None))[1].weights
        np.testing.assert_allclose(state.weights, weights, atol=1e-6)
        expected = mtjax.combine(jacobian, weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_updates_in_between_cost_one_backward_pass(chunk_size):
    """The Gramian is behind a branch that is not taken: its flops run at every third step only."""
    method = optim.every(optim.mgda(), 3)
    step = jax.jit(mtjax.value_and_weighted_grad(loss_fn, method, chunk_size=chunk_size))
    state = optim.init(method, NET, num_tasks=K)
    text = step.lower(NET, state, X).as_text()
    assert "stablehlo.case" in text or "stablehlo.if" in text
    reference = optim.init(method, NET, num_tasks=K)
    for _ in range(4):
        losses, gradient, state = step(NET, state, X)
        jacobian = mtjax.value_and_jacobian(loss_fn)(NET, X)[1]
        expected, reference = method.update(jacobian, reference, NET, losses=losses)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, expected)
        np.testing.assert_allclose(state.gramian, reference.gramian, atol=1e-4)


def test_every_refuses_other_periods():
    for n in (0, 1.5):
        with pytest.raises(ValueError, match="every needs an integer n >= 1"):
            optim.every(optim.mgda(), n)


# ema.


@pytest.mark.parametrize("of", ["weights", "gramian"])
def test_moving_average(of):
    method, decay = optim.ema(optim.mgda(), 0.8, of=of), 0.8
    state, average = optim.init(method, PARAMS, num_tasks=K), None
    rule = optim.mgda().weighting.weigh
    for step in range(4):
        jacobian = jacobian_of(step)
        _, state = method.update(jacobian, state, PARAMS)
        gramian = mtjax.gramian(jacobian)
        new = gramian if of == "gramian" else rule(gramian, jnp.ones(K), (), jnp.ones(K, bool))[0]
        average = new if average is None else decay * average + (1 - decay) * new
        expected = average if of == "weights" else rule(average, jnp.ones(K), (), jnp.ones(K, bool))[0]
        np.testing.assert_allclose(state.weights, expected, atol=1e-5)
        np.testing.assert_allclose(state.gramian, gramian, rtol=1e-5)


def test_cr_mogm_by_hand():
    # MGDA of (1, 0), (0, 2): weights (0.8, 0.2); of (2, 0), (0, 1): (0.2, 0.8). 0.9 * 0.8 + 0.1 * 0.2 = 0.74.
    method = optim.cr_mogm(optim.mgda(), 0.9)
    _, state = method.update(jnp.array([[1.0, 0.0], [0.0, 2.0]]), method.init(None))
    np.testing.assert_allclose(state.weights, [0.8, 0.2], atol=1e-6)
    _, state = method.update(jnp.array([[2.0, 0.0], [0.0, 1.0]]), state)
    np.testing.assert_allclose(state.weights, [0.74, 0.26], atol=1e-6)


def test_ema_refuses_other_arguments():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1.0"):
        optim.ema(optim.mgda(), 1.0)
    with pytest.raises(ValueError, match="of must be 'weights' or 'gramian', got 'rows'"):
        optim.ema(optim.mgda(), of="rows")
    with pytest.raises(ValueError, match="this one looks at losses only"):
        optim.ema(optim.linear(), of="gramian")


# clip_weights.


def test_weights_are_clipped():
    given = optim.linear([-1.0, 0.5, 4.0])
    rows = jnp.eye(3)
    for method, expected in (
        (optim.clip_weights(given), [0.0, 0.5, 4.0]),
        (optim.clip_weights(given, -0.5, 2.0), [-0.5, 0.5, 2.0]),
        (optim.clip_weights(given, keep_sum=True), [0.0, 0.5 * 3.5 / 4.5, 4 * 3.5 / 4.5]),
        (optim.clip_weights(given, -2.0, -2.0), [-2.0, -2.0, -2.0]),
        (optim.clip_weights(given, 0.0, 0.0, keep_sum=True), [0.0, 0.0, 0.0]),
    ):
        np.testing.assert_allclose(method.update(rows, method.init(None))[0], expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"minimum <= maximum, got 2\.0 and 1\.0"):
        optim.clip_weights(given, 2.0, 1.0)


# nonfinite. (Through the routes: test_routes.py; for every method: test_methods.py.)


def test_dropping_tasks_without_a_gradient():
    """A task without labels in the batch has a zero row, which MGDA takes for a stationary point."""
    rows = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    for drop_zero, expected in ((False, [0.0, 0.0]), (True, [0.8, 0.4])):
        method = optim.nonfinite(optim.mgda(), "drop_task", drop_zero=drop_zero)
        gradient, state = method.update(rows, method.init(None))
        np.testing.assert_allclose(gradient, expected, atol=1e-6)
        assert state.present.tolist() == [True, not drop_zero, True]


def test_an_infinite_loss_drops_its_task_as_an_infinite_gradient_does():
    rows = jnp.array([[1.0, 0.0], [5.0, 5.0], [0.0, 2.0]])
    method = optim.nonfinite(optim.mgda(), "drop_task")
    for losses, given in (([1.0, jnp.inf, 1.0], rows), ([1.0, 1.0, 1.0], rows.at[1, 1].set(-jnp.inf))):
        gradient, state = method.update(given, method.init(None), losses=jnp.array(losses))
        np.testing.assert_allclose(gradient, [0.8, 0.4], atol=1e-6)
        assert state.present.tolist() == [True, False, True]


def test_no_task_left():
    for rule in (optim.mgda(), optim.linear("mean"), optim.pcgrad(), optim.uncertainty()):
        method = optim.nonfinite(rule, "drop_task")
        gradient, state = method.update(jnp.full((2, 3), jnp.nan), method.init(None), losses=jnp.ones(2))
        assert gradient.tolist() == [0.0, 0.0, 0.0] and not state.present.any()


def test_a_whole_chain_skips_a_step():
    tx = optim.nonfinite(optax.chain(optim.mgda(), optax.adamw(0.1, weight_decay=0.1)), "skip_step")
    params = {"w": jnp.ones(2)}
    good, bad = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}, {"w": jnp.array([[1.0, jnp.nan], [0.0, 2.0]])}
    update = jax.jit(lambda rows, state: tx.update(rows, state, params))
    _, state = update(good, optim.init(tx, params, num_tasks=2))
    updates, skipped = update(bad, state)
    assert updates["w"].tolist() == [0.0, 0.0]
    jax.tree.map(np.testing.assert_array_equal, skipped, state)
    updates, _ = update(good, skipped)
    assert (updates["w"] != 0).all()
    updates, _ = tx.update(good, state, params, losses=jnp.array([jnp.inf, 1.0]))
    assert updates["w"].tolist() == [0.0, 0.0]


def test_nonfinite_refuses_other_arguments():
    with pytest.raises(ValueError, match="policy must be 'propagate', 'drop_task' or 'skip_step', got 'ignore'"):
        optim.nonfinite(optim.mgda(), "ignore")
    with pytest.raises(ValueError, match="drop_zero goes with policy 'drop_task'"):
        optim.nonfinite(optim.mgda(), "skip_step", drop_zero=True)
    with pytest.raises(ValueError, match="Around a chain only 'skip_step' makes sense"):
        optim.nonfinite(optax.chain(optim.mgda(), optax.sgd(0.1)), "drop_task")
    unmasked = optim.from_weighting(optim.Weighting(lambda k: (), lambda g, losses, s: (jnp.ones_like(losses), s)))
    with pytest.raises(ValueError, match="drop_task needs a weighting that takes `present`"):
        optim.nonfinite(unmasked, "drop_task")


def test_wrappers_nest():
    method = optim.on_shared(
        optim.nonfinite(optim.every(optim.clip_weights(optim.pcgrad(), 0.0, 2.0), 2)), lambda path: path != "c"
    )
    jacobian = jacobian_of(3)
    gradient, state = method.update(jacobian, method.init(PARAMS), PARAMS)
    np.testing.assert_allclose(gradient["c"], jacobian["c"].sum(0), rtol=1e-6)
    assert (state.weights >= 0).all() and (state.weights <= 2).all() and state.inner.count == 1


def test_a_method_made_of_others_is_wrapped_inside():
    for wrapper in (optim.on_shared, optim.nonfinite):
        with pytest.raises(ValueError, match="This method is made of others: wrap the method inside it instead"):
            wrapper(optim.flat_regions(optim.mgda()))
