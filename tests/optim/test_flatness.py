"""SAM, ASAM and task-based flat regions against their equations, written as plain loops over tasks.

Letters: K tasks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax import optim

K, RHO = 3, 0.1
PARAMS = {
    "trunk": jax.random.normal(jax.random.key(1), (3, 5)),
    "heads": tuple(jax.random.normal(jax.random.key(2 + k), (5,)) for k in range(K)),
}
X = jax.random.normal(jax.random.key(0), (8, 3))
IS_SHARED = {"trunk": True, "heads": False}


def loss_fn(params, x):
    z = jnp.tanh(x @ params["trunk"])
    return {f"task {k}": (k + 1) * jnp.mean((z @ head - k) ** 2) for k, head in enumerate(params["heads"])}


def gradient_of(task, params):
    return jax.grad(lambda p: loss_fn(p, X)[f"task {task}"])(params)


def norm(tree):
    return np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree)))


def moved(params, direction, length):
    return jax.tree.map(lambda p, d: p + length * d, params, direction)


def assert_trees_close(ours, reference, tolerance=1e-4):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), ours, reference)


def updated(method, chunk_size=None):
    return jax.jit(mtjax.value_and_update(loss_fn, method, chunk_size=chunk_size))(PARAMS, method.init(PARAMS), X)


# SAM and ASAM.


def test_sam_is_the_method_at_the_perturbed_parameters():
    summed = jax.grad(lambda p: sum(loss_fn(p, X).values()))(PARAMS)
    away = moved(PARAMS, summed, RHO / norm(summed))
    rule = optim.on_shared(optim.mgda(), IS_SHARED)
    losses, gradient, state = updated(optim.sam(rule, RHO))
    _, expected, expected_state = mtjax.value_and_update(loss_fn, rule)(away, rule.init(PARAMS), X)
    assert_trees_close((gradient, state.weights), (expected, expected_state.weights))
    np.testing.assert_allclose(losses, list(loss_fn(PARAMS, X).values()), rtol=1e-6)


def test_asam_measures_in_units_of_the_parameters():
    summed = jax.grad(lambda p: sum(loss_fn(p, X).values()))(PARAMS)
    size = jax.tree.map(lambda p: jnp.abs(p) + 0.01, PARAMS)
    scaled = jax.tree.map(jnp.multiply, size, summed)
    step = jax.tree.map(lambda t, g: t * t * g / norm(scaled), size, summed)
    rule = optim.linear("sum")
    _, gradient, _ = updated(optim.asam(rule, RHO))
    expected = jax.grad(lambda p: sum(loss_fn(p, X).values()))(moved(PARAMS, step, RHO))
    assert_trees_close(gradient, expected)


def test_sam_by_hand():
    # L = x^4 / 4 and -x at x = 1: sum of gradients 1 - 1 = 0, so nothing is perturbed; with weights of x^4 / 4 alone,
    # g = 1, theta + rho = 1.5, gradient 1.5^3 = 3.375.
    method = optim.sam(optim.linear("sum"), 0.5)
    _, still, _ = mtjax.value_and_update(lambda p: {"a": p**4 / 4, "b": -p}, method)(jnp.array(1.0), method.init(None))
    _, sharp, _ = mtjax.value_and_update(lambda p: {"a": p**4 / 4}, method)(jnp.array(1.0), method.init(None))
    assert still == 0.0 and sharp == pytest.approx(3.375)


def test_sam_around_any_route():
    """Around flat regions, and around features: what is inside runs at the perturbed point."""
    inner = optim.flat_regions(optim.mgda(), RHO)
    summed = jax.grad(lambda p: sum(loss_fn(p, X).values()))(PARAMS)
    away = moved(PARAMS, summed, 0.2 / norm(summed))
    _, gradient, _ = updated(optim.sam(inner, 0.2))
    _, expected, _ = mtjax.value_and_update(loss_fn, inner)(away, inner.init(PARAMS), X)
    assert_trees_close(gradient, expected)


# Flat regions.


def flat_by_hand(rule, shared_only):
    """Algorithm 1 of the paper, task by task."""
    rows, perturbed = [], []
    for k in range(K):
        g = gradient_of(k, PARAMS)
        if shared_only:
            step = {
                "trunk": RHO * g["trunk"] / norm(g["trunk"]),
                "heads": jax.tree.map(lambda leaf, g=g: RHO * leaf / norm(g["heads"]), g["heads"]),
            }
        else:
            step = jax.tree.map(lambda leaf, g=g: RHO * leaf / norm(g), g)
        rows.append(g)
        perturbed.append(gradient_of(k, moved(PARAMS, step, 1.0)))
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    jacobian, sam = stack(rows), stack(perturbed)
    flat = jax.tree.map(jnp.subtract, sam, jacobian)
    losses = jnp.stack(list(loss_fn(PARAMS, X).values()))
    of_loss = rule.update(jacobian, rule.init(PARAMS), PARAMS, losses=losses)[0]
    of_flat = rule.update(flat, rule.init(PARAMS), PARAMS, losses=losses)[0]
    return jax.tree.map(jnp.add, of_loss, of_flat), sam


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("name", ["linear", "mgda", "pcgrad", "uncertainty"])
def test_flat_regions_aggregate_losses_and_flatness_apart(name, chunk_size):
    rule = optim.on_shared(getattr(optim, name)(), IS_SHARED)
    losses, gradient, state = updated(optim.flat_regions(rule, RHO), chunk_size)
    expected, perturbed = flat_by_hand(rule, shared_only=True)
    assert_trees_close(gradient, expected)
    # Heads take their own SAM gradient.
    own = jax.tree.map(lambda rows: rows.sum(0), perturbed["heads"])
    assert_trees_close(gradient["heads"], own)
    np.testing.assert_allclose(losses, list(loss_fn(PARAMS, X).values()), rtol=1e-6)
    assert state.weights.shape == state.inner.flat.weights.shape == (K,)


def test_flat_regions_of_the_sum_is_one_sam_step_per_task():
    """Linear weights cannot tell losses from flatness: d = sum_k g_k^SAM."""
    _, gradient, _ = updated(optim.flat_regions(optim.linear(), RHO))
    expected, perturbed = flat_by_hand(optim.linear(), shared_only=False)
    assert_trees_close(gradient, expected)
    assert_trees_close(gradient, jax.tree.map(lambda rows: rows.sum(0), perturbed))


def test_a_radius_of_zero_is_the_method_itself():
    for wrapped in (optim.flat_regions(optim.pcgrad(), 0.0), optim.sam(optim.pcgrad(), 0.0)):
        _, gradient, _ = updated(wrapped)
        _, expected, _ = updated(optim.pcgrad())
        assert_trees_close(gradient, expected)


def test_separate_radius_of_task_specific_parameters():
    rule = optim.on_shared(optim.linear(), IS_SHARED)
    _, gradient, _ = updated(optim.flat_regions(rule, RHO, rho_specific=0.0))
    expected = jax.tree.map(jnp.zeros_like, PARAMS)
    for k in range(K):
        trunk = gradient_of(k, PARAMS)["trunk"]
        away = PARAMS | {"trunk": PARAMS["trunk"] + RHO * trunk / norm(trunk)}
        expected = jax.tree.map(jnp.add, expected, gradient_of(k, away))
    assert_trees_close(gradient, expected)


@pytest.mark.parametrize("scale", [1e-10, 1e-4, 1e4])
def test_perturbations_do_not_depend_on_the_scale_of_the_losses(scale):
    method = optim.flat_regions(optim.mgda(), RHO)
    scaled = lambda p, x: {name: scale * loss for name, loss in loss_fn(p, x).items()}  # noqa: E731
    _, gradient, _ = mtjax.value_and_update(scaled, method)(PARAMS, method.init(PARAMS), X)
    _, expected, _ = updated(method)
    assert_trees_close(jax.tree.map(lambda leaf: leaf / scale, gradient), expected, 1e-3)


def test_a_task_without_gradient_is_not_perturbed():
    method = optim.flat_regions(optim.linear(), RHO)
    _, gradient, _ = mtjax.value_and_update(lambda p: {"a": p["w"] ** 2, "b": jnp.array(0.0)}, method)(
        {"w": jnp.array(1.0)}, method.init(None)
    )
    assert gradient["w"] == pytest.approx(2.2)  # 2 (1 + rho)


def test_plain_update_takes_the_perturbed_jacobian():
    rule = optim.on_shared(optim.mgda(), IS_SHARED)
    method = optim.flat_regions(rule, RHO)
    expected, perturbed = flat_by_hand(rule, shared_only=True)
    jacobian = mtjax.value_and_jacobian(loss_fn)(PARAMS, X)[1]
    tx = optax.chain(method, optax.sgd(1.0))
    updates, state = tx.update(jacobian, tx.init(PARAMS), PARAMS, perturbed=perturbed)
    assert_trees_close(jax.tree.map(jnp.negative, updates), expected)
    assert optim.diagnostics(state).gramian.shape == (K, K)
    with pytest.raises(ValueError, match=r"needs gradients at perturbed parameters: use mtjax.value_and_update"):
        method.update(jacobian, method.init(PARAMS), PARAMS)


@pytest.mark.slow
def test_policies_look_at_both_points():
    """The loss of task 1 is finite where it is, and not where it is perturbed to."""

    def edge(p):
        return {"a": p[0] ** 2 + p[1], "b": jnp.sqrt(1.0 - p[0]), "c": p[1] ** 2}

    at = jnp.array([0.99, 1.0])
    drop = optim.flat_regions(optim.nonfinite(optim.linear("mean"), "drop_task"), 0.1)
    # sqrt's slope is negative: ascent leads away from the edge at first; the other sign leads over it.
    flipped = lambda p: edge(p) | {"b": -jnp.sqrt(1.0 - p[0])}  # noqa: E731
    _, gradient, state = mtjax.value_and_update(flipped, drop)(at, drop.init(None))
    others = lambda p: {name: value for name, value in flipped(p).items() if name != "b"}  # noqa: E731
    alone = optim.flat_regions(optim.linear("mean"), 0.1)
    _, expected, _ = mtjax.value_and_update(others, alone)(at, alone.init(None))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert state.present.tolist() == [True, False, True]
    skip = optim.flat_regions(optim.nonfinite(optim.linear("mean"), "skip_step"), 0.1)
    assert mtjax.value_and_update(flipped, skip)(at, skip.init(None))[1].tolist() == [0.0, 0.0]


@pytest.mark.slow
def test_under_scan_and_vmap():
    method = optim.flat_regions(optim.pcgrad(), RHO)
    update = mtjax.value_and_update(loss_fn, method)

    def run(params):
        def body(carry, _):
            params, state = carry
            _, gradient, state = update(params, state, X)
            return (jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient), state), None

        return jax.lax.scan(body, (params, optim.init(method, params, num_tasks=K)), None, length=2)[0][0]

    pair = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), PARAMS)
    both = jax.jit(jax.vmap(run))(pair)
    for index in range(2):
        alone = jax.jit(run)(jax.tree.map(lambda p, i=index: p[i], pair))
        assert_trees_close(jax.tree.map(lambda p, i=index: p[i], both), alone)


def test_bad_arguments():
    for make in (optim.sam, optim.asam, optim.flat_regions):
        with pytest.raises(ValueError, match=r"rho must be >= 0, got -0\.1"):
            make(optim.mgda(), -0.1)
    with pytest.raises(ValueError, match=r"flat_regions takes a method of mtjax\.optim that works on gradients at"):
        optim.flat_regions(optim.sam(optim.mgda()))
    with pytest.raises(ValueError, match=r"sam and asam take a method of mtjax\.optim"):
        optim.sam(optax.sgd(0.1))
