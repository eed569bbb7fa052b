"""RotoGrad: magnitudes by hand, rotations by their objective, that gradients align, and what a step leaves alone.

Letters: K tasks, B batch, D width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax import optim
from mtjax.optim.rotograd import rotations, rotograd

K, B, D = 3, 6, 4
X = jax.random.normal(jax.random.key(0), (B, 3))
PARAMS = {"trunk": jax.random.normal(jax.random.key(1), (3, D)), "heads": jax.random.normal(jax.random.key(2), (D, K))}
STILL = optax.sgd(0.0)


def encode(params, x):
    return jnp.tanh(x @ params["trunk"])


def heads(params, z, x, scale=1.0):
    return {f"task {k}": scale * jnp.mean((z @ params["heads"][:, k] - k + x[:, 0]) ** 2) for k in range(K)}


STAGED = mtjax.Staged(encode, heads)


@functools.cache
def stepper(method, loss_fn=STAGED, chunk_size=None):
    return jax.jit(mtjax.value_and_update(loss_fn, method, chunk_size=chunk_size))


def run(method, steps=1, loss_fn=STAGED, params=PARAMS, x=X, chunk_size=None):
    """(losses, gradient, state) of the last of several updates at fixed parameters."""
    state = optim.init(method, params, num_tasks=K)
    for _ in range(steps):
        losses, gradient, state = stepper(method, loss_fn, chunk_size)(params, state, x)
    return losses, gradient, state


def assert_trees_close(ours, reference, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, reference)


def feature_rows(params=PARAMS, rotation=None):
    """dL_k/dz through the k-th rotation: [K, B, D]."""
    rotation = jnp.broadcast_to(jnp.eye(D), (K, D, D)) if rotation is None else rotation
    z = encode(params, X)

    def losses(z):
        return jnp.stack([list(heads(params, z @ rotation[k].T, X).values())[k] for k in range(K)])

    return np.asarray(jax.jacrev(losses)(z), np.float64)


# Magnitudes.


def test_magnitudes_by_hand():
    """Features are the parameters (a, b); L_1 = 3 a, L_2 = b: n = 3, 1; a_k = 1/2; C = 2; dz = 2 (1, 0) + 2 (0, 1).

    Then the slope of L_1 doubles: n / n(0) = 2, 1, a_k = 2/3, 1/3, C = (2 * 6 + 1) / 3 = 13/3.
    """
    loss_fn = mtjax.Staged(lambda p, s: p[None], lambda p, z, s: jnp.stack([3 * s * z[0, 0], z[0, 1]]))
    method = rotograd(2, STILL)
    update = jax.jit(mtjax.value_and_update(loss_fn, method))
    losses, gradient, state = update(jnp.array([1.0, 5.0]), method.init(None), 1.0)
    assert losses.tolist() == [3.0, 5.0]
    np.testing.assert_allclose(gradient, [2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(state.weights, [2 / 3, 2.0], rtol=1e-6)
    _, gradient, state = update(jnp.array([1.0, 5.0]), state, 2.0)
    np.testing.assert_allclose(gradient, [13 / 3, 13 / 3], rtol=1e-6)
    np.testing.assert_allclose(state.inner.initial_norms, [3.0, 1.0])


def test_initial_norms_are_taken_again_after_the_burn_in():
    loss_fn = mtjax.Staged(lambda p, s: p[None], lambda p, z, s: jnp.stack([s * z[0, 0], z[0, 1]]))
    method = rotograd(2, STILL, burn_in=2)
    state = method.init(None)
    for slope, expected in ((1.0, 1.0), (5.0, 1.0), (7.0, 7.0), (9.0, 7.0)):
        _, _, state = stepper(method, loss_fn)(jnp.ones(2), state, slope)
        assert state.inner.initial_norms.tolist() == [expected, 1.0]


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_one_step_in_full(chunk_size):
    """The trunk gets C sum U_k walked back; heads the plain sum of their losses; nothing is rotated at first."""
    losses, gradient, state = run(rotograd(D, STILL), chunk_size=chunk_size)
    np.testing.assert_allclose(losses, list(STAGED(PARAMS, X).values()), rtol=1e-5)
    rows = feature_rows()
    norm = np.linalg.norm(rows.reshape(K, -1), axis=1)
    direction = norm.mean() * (rows / norm[:, None, None]).sum(0)
    _, pullback = jax.vjp(lambda w: encode({"trunk": w}, X), PARAMS["trunk"])
    np.testing.assert_allclose(
        gradient["trunk"], pullback(jnp.asarray(direction, jnp.float32))[0], rtol=1e-4, atol=1e-5
    )
    own = jax.grad(lambda p: sum(heads(p, encode(PARAMS, X), X).values()))(PARAMS)["heads"]
    np.testing.assert_allclose(gradient["heads"], own, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.weights, norm.mean() / norm, rtol=1e-4)


def test_a_zero_gradient_stays_zero_and_has_no_part():
    """Of (3, 0) and (0, 0): C = 3. The norm of the second counts from when it is not zero."""
    loss_fn = mtjax.Staged(lambda p, s: p[None], lambda p, z, s: jnp.stack([3 * z[0, 0], s * z[0, 1]]))
    method = rotograd(2, STILL)
    update = stepper(method, loss_fn)
    _, gradient, state = update(jnp.ones(2), optim.init(method, None, num_tasks=2), 0.0)
    np.testing.assert_allclose(gradient, [3.0, 0.0], rtol=1e-6)
    assert state.inner.initial_norms.tolist() == [3.0, 0.0]
    _, gradient, state = update(jnp.ones(2), state, 5.0)
    np.testing.assert_allclose(gradient, [4.0, 4.0], rtol=1e-6)
    assert state.inner.initial_norms.tolist() == [3.0, 5.0]
    flat = mtjax.Staged(lambda p, s: p[None], lambda p, z, s: 0 * z[0])
    _, gradient, _ = stepper(method, flat)(jnp.ones(2), method.init(None), 0.0)
    assert not np.any(gradient)


@pytest.mark.parametrize("scale", [1e-10, pytest.param(1e10, marks=pytest.mark.slow)])
def test_the_scale_of_the_losses(scale):
    """The direction at the features, and so the trunk's, is as much longer; rotations do not notice."""
    method = rotograd(D, optax.adam(0.01))
    scaled = mtjax.Staged(encode, functools.partial(heads, scale=scale))
    _, gradient, state = run(method, 3, scaled)
    _, expected, reference = run(method, 3)
    np.testing.assert_allclose(gradient["trunk"] / scale, expected["trunk"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(rotations(state), rotations(reference), atol=1e-4)


# Rotations.


def test_rotations_are_orthogonal_and_start_at_the_identity():
    method = rotograd(D, optax.adam(0.3))
    np.testing.assert_array_equal(rotations(optim.init(method, PARAMS, num_tasks=K)), np.tile(np.eye(D), (K, 1, 1)))
    rotation = np.asarray(rotations(run(method, 20)[2]), np.float64)
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.tile(np.eye(D), (K, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(rotation), np.ones(K), atol=1e-5)
    assert np.abs(rotation - np.eye(D)).max() > 0.1


def test_a_step_on_the_rotations_descends_their_objective():
    """- sum_k <R(A_k)^T gradient at R_k z, V>, gradients in units of their norm, differentiated at the second step."""
    method = rotograd(D, optax.sgd(0.5))
    start, after = run(method, 1)[2], run(method, 2)[2]
    angles = start.inner.angles
    rows = feature_rows(rotation=rotations(start))
    units = jnp.asarray(rows / np.linalg.norm(rows.reshape(K, -1), axis=1)[:, None, None], jnp.float32)
    target = units.mean(0)
    at_rotated = jnp.einsum("kij,kbj->kbi", rotations(start), units)

    def objective(angles):
        s = (angles - angles.transpose(0, 2, 1)) / 4
        rotation = jnp.stack([jnp.linalg.inv(jnp.eye(D) + one) @ (jnp.eye(D) - one) for one in s])
        return -jnp.sum(jnp.einsum("kij,kbi->kbj", rotation, at_rotated) * target[None])

    assert jnp.abs(angles).max() > 0
    np.testing.assert_allclose(after.inner.angles, angles - 0.5 * jax.grad(objective)(angles), atol=1e-5)


def test_gradients_align():
    """Two tasks with opposite gradients at the features come to agree, and the trunk can please both."""
    loss_fn = mtjax.Staged(
        lambda p, x: p["z"] * jnp.ones((4, 1)),
        lambda p, z, x: jnp.stack([z[:, 0].sum(), z[:, 1].sum() - z[:, 0].sum()]),
    )
    method = rotograd(2, optax.adam(0.05))
    update = mtjax.value_and_update(loss_fn, method)
    params = {"z": jnp.array([[1.0, 1.0]])}

    def step(state, _):
        rotation = rotations(state)
        first, second = rotation[0].T @ jnp.array([1.0, 0.0]), rotation[1].T @ jnp.array([-1.0, 1.0]) / jnp.sqrt(2.0)
        return update(params, state, 0.0)[2], first @ second

    start = optim.init(method, params, num_tasks=2)
    _, cosines = jax.jit(lambda s: jax.lax.scan(step, s, length=200))(start)
    np.testing.assert_allclose(cosines[0], -np.sqrt(0.5), rtol=1e-5)
    assert cosines[-1] > 0.999


def test_a_trained_model_is_evaluated_through_its_rotations():
    method = rotograd(D, optax.adam(0.1))
    state = run(method, 5)[2]
    losses, _, _ = stepper(method)(PARAMS, state, X)
    z = encode(PARAMS, X)
    for k, rotation in enumerate(rotations((optax.EmptyState(), {"inside": state}))):
        np.testing.assert_allclose(losses[k], heads(PARAMS, z @ rotation.T, X)[f"task {k}"], rtol=1e-5)


def test_the_first_features_alone_may_be_rotated():
    method = rotograd(2, optax.adam(0.1))
    losses, _, state = run(method, 5)
    assert rotations(state).shape == (K, 2, 2)
    z = encode(PARAMS, X)
    losses, _, _ = stepper(method)(PARAMS, state, X)
    for k, rotation in enumerate(rotations(state)):
        seen = jnp.concatenate([z[:, :2] @ rotation.T, z[:, 2:]], axis=1)
        np.testing.assert_allclose(losses[k], heads(PARAMS, seen, X)[f"task {k}"], rtol=1e-5)


def test_one_task_is_plain_descent():
    single = mtjax.Staged(encode, lambda p, z, x: {"a": heads(p, z, x)["task 1"]})
    method = rotograd(D, optax.sgd(1.0))
    state = optim.init(method, PARAMS, num_tasks=1)
    for _ in range(2):
        _, gradient, state = stepper(method, single)(PARAMS, state, X)
    assert_trees_close(gradient, jax.grad(lambda p: single(p, X)["a"])(PARAMS))
    np.testing.assert_allclose(rotations(state), np.eye(D)[None], atol=1e-6)


# Policies, auxiliary outputs, errors.


def broken_heads(params, z, x):
    return heads(params, z, x) | {"task 1": jnp.array(jnp.nan)}


def test_an_absent_task_is_not_there():
    """The step of the two others; the rotation of the absent one stays, with its optimiser's moments."""
    two = mtjax.Staged(encode, lambda p, z, x: {k: heads(p, z, x)[k] for k in ("task 0", "task 2")})
    method = rotograd(D, optax.adam(0.1))
    state = optim.init(method, PARAMS, num_tasks=2)
    for _ in range(2):
        _, expected, state = stepper(method, two)(PARAMS, state, X)
    dropping = optim.nonfinite(method, "drop_task")
    broken = mtjax.Staged(encode, broken_heads)
    losses, gradient, ours = run(dropping, 2, broken)
    assert_trees_close(gradient, expected, 1e-4)
    np.testing.assert_allclose(rotations(ours)[np.array([0, 2])], rotations(state), atol=1e-5)
    assert np.isnan(losses[1])
    assert ours.present.tolist() == [True, False, True]

    before = run(dropping, 2)[2]
    _, _, after = stepper(dropping, broken)(PARAMS, before, X)
    for old, new in zip(jax.tree.leaves(before.inner), jax.tree.leaves(after.inner), strict=True):
        if old.ndim == 3:
            np.testing.assert_array_equal(old[1], new[1])
            assert (old[0] != new[0]).any()


def test_a_skipped_step_changes_nothing():
    method = optim.nonfinite(rotograd(D, optax.adam(0.1)), "skip_step")
    start = run(method, 2)[2]
    _, gradient, state = stepper(method, mtjax.Staged(encode, broken_heads))(PARAMS, start, X)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(np.testing.assert_array_equal, state.inner, start.inner)


def test_auxiliary_outputs_are_those_of_every_rotation():
    method = rotograd(D, optax.adam(0.1))
    with_aux = mtjax.Staged(encode, lambda p, z, x: (heads(p, z, x), z))
    state = run(method, 3)[2]
    (_, aux), _, _ = jax.jit(mtjax.value_and_update(with_aux, method, has_aux=True))(PARAMS, state, X)
    expected = jnp.einsum("kij,bj->kbi", rotations(state), encode(PARAMS, X))
    np.testing.assert_allclose(aux, expected, atol=1e-5)


def test_half_precision_features():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    method = rotograd(D)
    _, gradient, state = stepper(method)(half, method.init(None), X.astype(jnp.bfloat16))
    assert all(leaf.dtype == jnp.bfloat16 and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert state.inner.angles.dtype == jnp.float32


def test_errors():
    method = rotograd(D)
    with pytest.raises(ValueError, match=r"mtjax\.value_and_update\(mtjax\.Staged\(encode, heads\), method\)"):
        method.update(jnp.ones((2, 3)), method.init(None))
    with pytest.raises(ValueError, match=r"pass mtjax\.Staged\(encode, heads\) as the loss function, got function"):
        mtjax.value_and_update(lambda p, x: p, method)
    with pytest.raises(ValueError, match=r"rotograd\(width=5\) needs features in one array .*, got \(6, 4\)"):
        run(rotograd(D + 1))
    with pytest.raises(ValueError, match="got dict"):
        run(method, loss_fn=mtjax.Staged(lambda p, x: {"z": encode(p, x)}, lambda p, z, x: heads(p, z["z"], x)))
    for width in (0, 1.5):
        with pytest.raises(ValueError, match="width must be a number of features >= 1"):
            rotograd(width)
    with pytest.raises(ValueError, match="burn_in must be"):
        rotograd(D, burn_in=-1)
    with pytest.raises(ValueError, match="Expected the state of one rotograd after an update, found 0"):
        rotations(method.init(None))
