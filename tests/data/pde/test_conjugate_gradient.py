"""The operator, the cycle and the iteration against dense linear algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.data.pde import conjugate_gradient as cg


def random_conductances(rng, shape, batch, *, inside=0.8):
    """Links between nodes of a random part of the grid, and a little of a boundary at each of its nodes."""
    mask = rng.uniform(size=shape) < inside
    links = []
    for axis in range(len(shape)):
        following = np.roll(mask, -1, axis)
        following[(slice(None),) * axis + (-1,)] = False
        links.append(np.where((mask & following)[..., None], rng.lognormal(0, 1, (*shape, batch)), 0))
    boundary = np.where(mask[..., None], rng.uniform(0.05, 0.5, (*shape, batch)), 0)
    return mask, links, boundary


def dense(links, boundary):
    """The matrix of one system f[nodes, nodes], entry by entry."""
    shape = boundary.shape
    index = np.arange(boundary.size).reshape(shape)
    matrix = np.diag(boundary.ravel())
    for axis, link in enumerate(links):
        for node in np.ndindex(shape):
            if node[axis] + 1 < shape[axis]:
                i, j, c = index[node], index[tuple(np.add(node, np.eye(len(shape), dtype=int)[axis]))], link[node]
                matrix[i, i] += c
                matrix[j, j] += c
                matrix[i, j] -= c
                matrix[j, i] -= c
    return matrix


SHAPES = [(13, 16), (6, 7, 8)]


@functools.cache
def example(shape):
    """Two systems with their dense matrices and float64 solutions."""
    rng = np.random.default_rng(3)
    mask, links, boundary = random_conductances(rng, shape, 2)
    right = np.where(mask[..., None], rng.normal(size=(*shape, 2)), 0)
    matrices = [dense([link[..., b] for link in links], boundary[..., b]) for b in range(2)]
    active = mask.ravel()
    solutions = np.zeros((active.size, 2))
    for b in range(2):
        solutions[active, b] = np.linalg.solve(matrices[b][np.ix_(active, active)], right[..., b].ravel()[active])
    return mask, links, boundary, right, matrices, solutions.reshape(right.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_apply_is_the_dense_matrix(shape):
    _, links, boundary, right, matrices, _ = example(shape)
    system = cg.system([jnp.asarray(link, jnp.float32) for link in links], jnp.asarray(boundary, jnp.float32))
    product = np.asarray(jax.jit(cg.apply)(system, jnp.asarray(right, jnp.float32)))
    for b in range(2):
        expected = (matrices[b] @ right[..., b].ravel()).reshape(shape)
        np.testing.assert_allclose(product[..., b], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_solution_in_float64_equals_a_direct_solver(shape):
    mask, links, boundary, right, _, solutions = example(shape)
    with jax.enable_x64(True):
        system = cg.system([jnp.asarray(link) for link in links], jnp.asarray(boundary))
        result = jax.jit(functools.partial(cg.solve, tolerance=1e-12))(system, jnp.asarray(right))
    np.testing.assert_allclose(result.solution, solutions, atol=1e-9 * np.abs(solutions).max())
    assert (np.asarray(result.solution)[~mask] == 0).all()
    assert (np.asarray(result.residual) <= 1e-12).all()
    # The residual that the iteration keeps is the true one.
    with jax.enable_x64(True):
        true, inverse = np.asarray(right - cg.apply(system, result.solution)), np.asarray(system.inverse)
    norms = [np.linalg.norm((array * inverse).reshape(-1, 2), axis=0) for array in (true, right)]
    norms = norms[0] / norms[1]
    np.testing.assert_allclose(norms, result.residual, atol=1e-13)


def test_cycle_is_symmetric_and_positive():
    shape = (13, 16)
    mask, links, boundary, *_ = example(shape)
    active = np.flatnonzero(mask)
    with jax.enable_x64(True):
        # All unit vectors at once, as one batch of right-hand sides.
        units = np.eye(mask.size)[:, active].reshape(*shape, -1)
        system = cg.system([jnp.asarray(link[..., :1]) for link in links], jnp.asarray(boundary[..., :1]))
        inverse = jax.jit(lambda system, r: cg._cycle(cg._hierarchy(system), r))(system, jnp.asarray(units))
    inverse = np.asarray(inverse).reshape(mask.size, -1)
    assert (inverse[~mask.ravel()] == 0).all()
    inverse = inverse[active]
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-12)
    assert np.linalg.eigvalsh(inverse).min() > 0


def test_systems_of_a_batch_do_not_disturb_each_other():
    """A system that is solved at once, and one without right-hand side, beside one that takes long."""
    shape = (24, 24)
    rng = np.random.default_rng(0)
    links = [np.ones((*shape, 3)), np.ones((*shape, 3))]
    links[0][-1], links[1][:, -1] = 0, 0
    boundary = np.full((*shape, 3), 1e-3)
    boundary[..., 1] = 1e6
    right = rng.normal(size=(*shape, 3))
    right[..., 2] = 0
    arrays = [jnp.asarray(a, jnp.float32) for a in (*links, boundary, right)]
    result = jax.jit(lambda a, b, c, f: cg.solve(cg.system([a, b], c), f, multigrid=False))(*arrays)
    assert result.iterations > 20 and np.isfinite(result.solution).all() and (result.residual <= 1e-6).all()
    # Neighbours with links of 1 change a node with a boundary of 1e6 by some 4e-6 of their own value.
    alone = right[..., 1] / 1e6
    np.testing.assert_allclose(result.solution[..., 1], alone, atol=1e-5 * np.abs(alone).max())
    assert (np.asarray(result.solution)[..., 2] == 0).all()


def test_iteration_stops_at_its_bound():
    _, links, boundary, right, _, _ = example((13, 16))
    arrays = [jnp.asarray(a, jnp.float32) for a in (*links, boundary, right)]
    result = jax.jit(lambda a, b, c, f: cg.solve(cg.system([a, b], c), f, max_iterations=2, multigrid=False))(*arrays)
    assert result.iterations == 2 and (result.residual > 1e-6).all()
