"""Derivatives against closed forms and reverse mode at each point; residuals of manufactured solutions; losses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax import optim, physics
from mtjax.models.deeponet import DeepONet
from mtjax.models.separable_deeponet import SeparableDeepONet, SeparableTrunk
from mtjax.nn.operator_layers import MLP
from mtjax.nn.output_transforms import hard_boundary

B, N = 3, 5
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(B, 4)), jnp.float32)
POINTS = jnp.asarray(RNG.uniform(size=(N, 2)), jnp.float32)
OWN_POINTS = jnp.asarray(RNG.uniform(size=(B, N, 2)), jnp.float32)
RATES = np.array([0.5, 1.0, 2.0], np.float32)


def wave(points):
    """exp(-a t) sin(pi x) for three rates a; points (t, x), own ones of each function or common ones."""
    t, x = points[..., 0], points[..., 1]
    t, x = (value[None] if value.ndim == 1 else value for value in (t, x))
    return jnp.exp(-RATES[:, None] * t) * jnp.sin(jnp.pi * x)


@pytest.mark.parametrize("points", [POINTS, OWN_POINTS], ids=["cartesian", "pointwise"])
def test_derivatives_of_a_closed_form(points):
    d = jax.jit(lambda x: physics.derivatives(wave, x, first=(0,), second=(1,)))(points)
    t, x = (np.broadcast_to(points[..., i], (B, N)) for i in (0, 1))
    decay = np.exp(-RATES[:, None] * t)
    np.testing.assert_allclose(d.value, decay * np.sin(np.pi * x), atol=1e-5)
    np.testing.assert_allclose(d.first[0], -RATES[:, None] * decay * np.sin(np.pi * x), atol=1e-5)
    np.testing.assert_allclose(d.first[1], np.pi * decay * np.cos(np.pi * x), atol=1e-5)
    np.testing.assert_allclose(d.second[1], -(np.pi**2) * decay * np.sin(np.pi * x), atol=1e-4)
    assert set(d.first) == {0, 1} and set(d.second) == {1}


def parabola(batch):
    """A distance that is a function of the points, so that it is differentiated too."""
    x = batch["points"][..., 1]
    return x * (1 - x)


def quick_jit(f):
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def network(hard=True):
    model = DeepONet(
        MLP((7, 3), nn.tanh), MLP((6, 6, 3), nn.tanh), transforms=(hard_boundary(parabola),) if hard else ()
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), {"inputs": INPUTS, "points": POINTS})
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


@pytest.mark.parametrize("points", [POINTS, OWN_POINTS], ids=["cartesian", "pointwise"])
def test_derivatives_of_a_network_equal_reverse_mode_at_each_point(points):
    model, params = network()

    def at(function, point):
        batch = {"inputs": INPUTS[function][None], "points": point[None]}
        return model.apply(params, batch)["u"][0, 0]

    def each(function, row):
        return jax.vmap(lambda x: (at(function, x), jax.grad(at, 1)(function, x), jax.hessian(at, 1)(function, x)))(row)

    def both(points):
        field = physics.field_of(model.apply, params, {"inputs": INPUTS})
        rows = jnp.broadcast_to(points, (B, N, 2))
        return physics.derivatives(field, points, first=(0,), second=(0, 1)), jax.vmap(each)(jnp.arange(B), rows)

    d, (value, gradient, hessian) = jax.jit(both)(points)
    np.testing.assert_allclose(d.value, value, rtol=1e-4, atol=1e-5)
    for axis in (0, 1):
        np.testing.assert_allclose(d.first[axis], gradient[..., axis], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(d.second[axis], hessian[..., axis, axis], rtol=1e-3, atol=1e-3)


def test_the_branch_runs_once_and_has_no_tangent():
    model, params = network(hard=False)

    def run(points):
        field = physics.field_of(model.apply, params, {"inputs": INPUTS})
        d = physics.derivatives(field, points, second=(0, 1))
        return d.value, d.second

    text = str(jax.make_jaxpr(run)(POINTS))
    # Products with an output f[3, 7] or f[3, 3]: the branch's two layers, whatever the number of derivatives.
    assert text.count(":f32[3,7] = dot_general") == 1
    assert text.count(":f32[5,6] = dot_general") == 2  # and the values of the trunk's hidden layers


def test_derivatives_along_the_axes_of_a_grid():
    trunk = SeparableTrunk((MLP((5, 6), nn.tanh), MLP((5, 6), nn.tanh)), rank=2)
    model = SeparableDeepONet(MLP((4, 3), nn.tanh), trunk)
    axes = (jnp.linspace(0, 1, 3), jnp.linspace(0, 1, 4))
    nodes = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), {"inputs": INPUTS, "axes": axes})
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)

    def both(axes, nodes):
        field = physics.field_of(model.apply, params, {"inputs": INPUTS})
        return [physics.derivatives(field, place, first=(0,), second=(1,)) for place in (axes, nodes)]

    grid, scattered = jax.jit(both)(axes, nodes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grid, scattered)


def test_heat_equation_has_no_residual_on_its_solution():
    """exp(-a t) sin(pi x) solves u_t = D u_xx with a = D pi^2."""
    for k, rate in enumerate(RATES):
        residual = physics.diffusion_reaction(float(rate / np.pi**2))
        r = residual(wave, {"points": POINTS})
        np.testing.assert_allclose(r[k], 0, atol=2e-5)
        assert np.abs(np.delete(r, k, axis=0)).max() > 0.05


def test_diffusion_reaction_with_a_source():
    """The residual is linear in the source, and zero for the source that makes `wave` a solution."""
    a, u = RATES[:, None], np.asarray(wave(POINTS))
    source = -a * u + 0.01 * np.pi**2 * u - u * (1 - u)
    residual = physics.diffusion_reaction(0.01, reaction=lambda u, part: part["rate"] * u * (1 - u))
    part = {"points": POINTS, "rate": 1.0}
    np.testing.assert_allclose(residual(wave, {**part, "source": jnp.asarray(source)}), 0, atol=1e-5)
    np.testing.assert_allclose(residual(wave, part), source, atol=1e-5)
    np.testing.assert_allclose(
        residual(wave, {**part, "source": jnp.ones(N)}), source - 1, atol=1e-5
    )  # one source for all functions


def hill(points):
    return (jnp.sin(jnp.pi * points[..., 0]) * jnp.sin(jnp.pi * points[..., 1]))[None]


def test_steady_problem_in_two_dimensions():
    residual = physics.diffusion_reaction(0.5, time_axis=None, space_axes=(0, 1))
    np.testing.assert_allclose(residual(hill, {"points": POINTS}), np.pi**2 * np.asarray(hill(POINTS)), atol=1e-4)


def test_darcy_with_a_manufactured_solution():
    """u = sin(pi x) sin(pi y), K = 1 + x y^2: -div(K grad u) = 2 pi^2 K u - y^2 u_x - 2 x y u_y."""
    x, y = np.asarray(POINTS).T
    k, slope = 1 + x * y**2, np.stack([y**2, 2 * x * y], axis=-1)
    u_x, u_y = np.pi * np.cos(np.pi * x) * np.sin(np.pi * y), np.pi * np.sin(np.pi * x) * np.cos(np.pi * y)
    source = 2 * np.pi**2 * k * np.asarray(hill(POINTS))[0] - slope[:, 0] * u_x - slope[:, 1] * u_y
    part = {
        "points": POINTS,
        "permeability": jnp.asarray(k)[None],
        "permeability_gradient": jnp.asarray(slope, jnp.float32)[None],
    }
    residual = physics.darcy()
    np.testing.assert_allclose(residual(hill, {**part, "source": jnp.asarray(source)}), 0, atol=1e-4)
    np.testing.assert_allclose(residual(hill, part)[0], source - 1, atol=1e-4)  # the source is 1 unless given


def parts():
    edge = jnp.asarray(np.stack([np.linspace(0, 1, 4), np.array([0.0, 1.0, 0.0, 1.0])], -1), jnp.float32)
    start = jnp.asarray(np.stack([np.zeros(4), np.linspace(0.2, 0.8, 4)], -1), jnp.float32)
    return {
        "inputs": INPUTS,
        "data": {"points": OWN_POINTS, "values": wave(OWN_POINTS), "mask": jnp.arange(N) < 4},
        "boundary": {"points": edge, "values": jnp.zeros(4)},
        "residual": {"points": POINTS},
        "initial": {"points": start, "values": jnp.sin(jnp.pi * start[:, 1])},
    }


def test_losses_of_the_parts_in_a_fixed_order():
    model, params = network(hard=False)
    loss_fn = physics.physics_losses(model.apply, physics.diffusion_reaction(0.1))
    batch = parts()

    def order(*names):
        found = []  # jit and eval_shape return dicts with sorted names
        jax.eval_shape(lambda p: found.extend(loss_fn(p, {name: batch[name] for name in ("inputs", *names)})), params)
        return found

    assert order("data", "boundary", "residual", "initial") == ["residual", "initial", "boundary", "data"]
    assert order("boundary", "residual") == ["residual", "boundary"]
    with pytest.raises(ValueError, match="some of the parts residual, initial, boundary, data, got inputs"):
        order()
    loss = loss_fn(params, {"inputs": INPUTS, "data": batch["data"]})["data"]
    u = model.apply(params, {"inputs": INPUTS, "points": OWN_POINTS})["u"]
    np.testing.assert_allclose(loss, np.mean(np.asarray(u - wave(OWN_POINTS))[:, :4] ** 2), rtol=1e-4)


def test_masked_mean_square():
    error = jnp.array([[1.0, jnp.inf], [3.0, 2.0]])
    mask = jnp.array([[True, False], [True, True]])
    assert float(physics.mean_square(error, mask)) == pytest.approx(14 / 3)
    assert float(physics.mean_square(error, mask & False)) == 0
    assert float(physics.mean_square(error[1:])) == pytest.approx(6.5)


METHODS = {
    "ntk_balance": optim.ntk_balance(every=2),
    "gradnorm": optim.gradnorm(0.5, optax.sgd(0.05)),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_optim_train_on_the_parts(name):
    model = DeepONet(MLP((4, 3), nn.tanh), MLP((5, 3), nn.tanh))
    shapes = jax.eval_shape(model.init, jax.random.key(0), {"inputs": INPUTS, "points": POINTS})
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    loss_fn = physics.physics_losses(model.apply, physics.diffusion_reaction(0.1))
    method, adam = METHODS[name], optax.adam(1e-2)
    batch = parts()
    update = mtjax.value_and_update(loss_fn, method)

    def train(params):
        def step(carry, _):
            params, state, moments = carry
            losses, gradient, state = update(params, state, batch)
            updates, moments = adam.update(gradient, moments)
            return (optax.apply_updates(params, updates), state, moments), losses

        start = (params, optim.init(method, params, num_tasks=4), adam.init(params))
        (_, state, _), losses = jax.lax.scan(step, start, length=60)
        return losses, state

    losses, state = quick_jit(train)(params)
    assert losses.shape == (60, 4) and np.all(np.isfinite(losses))
    assert losses[-1].sum() < 0.5 * losses[0].sum()
    weights = np.asarray(optim.diagnostics(state).weights)
    assert weights.shape == (4,) and np.all(weights > 0)
    assert np.ptp(weights) > 0.01


@pytest.mark.parametrize("options", [{}, {"first": (2,)}, {"second": (0, -1)}])
def test_axes_that_the_points_do_not_have(options):
    with pytest.raises(ValueError, match=r"must name axes 0..1 of the points, at least one"):
        physics.derivatives(wave, POINTS, **options)
