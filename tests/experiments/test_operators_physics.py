"""The study of physics losses: the equation on the fields of the solver, the diagonal of the kernel, the script."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax import optim
from mtjax.data.pde import fisher
from mtjax.data.pde.gaussian_process import Kernel
from mtjax.models.deeponet import DeepONet
from mtjax.nn.embeddings import PeriodicEmbedding
from mtjax.nn.operator_layers import MLP

MAIN = "relative_l2"


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("operators/physics.py")


def quick_jit(f):
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


# The equation.


def interpolated(config, values):
    """The solver's fields at any points: trigonometric in x, by polynomials in t."""
    fields = values.reshape(len(values), config.num_times, config.num_nodes)
    modes = np.fft.rfft(fields, axis=2) / config.num_nodes
    modes[:, :, 1:-1] *= 2
    knots = np.linspace(0, 1, config.num_times)

    def field(points):
        t, x = points[:, 0], points[:, 1]
        basis = [
            functools.reduce(jnp.multiply, [(t - b) / (a - b) for b in knots if b != a], jnp.ones_like(t))
            for a in knots
        ]
        phase = 2 * jnp.pi * x[:, None] * jnp.arange(modes.shape[2])[None, :]
        real = jnp.einsum("sn,bsm,nm->bn", jnp.stack(basis), jnp.asarray(modes.real, jnp.float32), jnp.cos(phase))
        return real - jnp.einsum(
            "sn,bsm,nm->bn", jnp.stack(basis), jnp.asarray(modes.imag, jnp.float32), jnp.sin(phase)
        )

    return field


def test_the_equation_has_no_residual_on_the_fields_of_the_solver(script):
    """Every form, and units in which T, L and D all matter; F4 by its exact source, not by its code."""
    kernel = Kernel("squared_exponential", length=0.4, std=1.0, period=2.0)
    config = fisher.FisherConfig(
        diffusion=0.02, horizon=3.0, length=2.0, kernel=kernel, num_nodes=32, num_times=9, substeps=4
    )
    data = fisher.generate(config, train_per_form=2, validation_per_form=0, test_per_form=0)["train"]
    rows = script.rows_of(config, data, labelled=True)
    points = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, (40, 2)), jnp.float32)
    field, part = interpolated(config, rows["values"]), {"points": points, "damping": jnp.asarray(rows["damping"])}

    @quick_jit
    def residual(coefficients, damping):
        return script.equation(config)(field, part | {"coefficients": coefficients, "damping": damping})

    coefficients, damping = jnp.asarray(rows["coefficients"]), jnp.asarray(rows["damping"])
    size = np.abs(residual(0 * coefficients, damping)).max(1)  # of the source alone
    assert (size > 0.05).all()
    np.testing.assert_array_less(np.abs(residual(coefficients, damping)).max(1), 0.01 * size)
    by_code = residual(jnp.asarray(data["inputs"]["code"]), 0 * damping)
    np.testing.assert_array_less(0.02 * size[4:], np.abs(by_code).max(1)[4:])
    np.testing.assert_array_less(np.abs(by_code).max(1)[:4], 0.01 * size[:4])


def test_rows_do_not_hold_the_fields_unless_they_are_labelled(script):
    config = fisher.FisherConfig(num_nodes=8, num_times=3)
    data = fisher.generate(config, train_per_form=2, validation_per_form=0, test_per_form=0)["train"]
    rows = script.rows_of(config, data, labelled=False)
    assert "values" not in rows and "values" in script.rows_of(config, data, labelled=True)
    a, b = data["parameters"]["a"], data["parameters"]["b"]
    np.testing.assert_allclose(rows["coefficients"][2], [a[2], 0, -a[2], 0])
    np.testing.assert_allclose(rows["coefficients"][5], [a[5], -a[5], 0, 0])
    assert rows["damping"].tolist() == b.tolist() and (b[4:] > 0).all() and (b[:4] == 0).all()
    first = script.first_of_each(rows, 3, 1)
    assert first["task"].tolist() == [0, 1, 2] and (first["inputs"] == rows["inputs"][::2]).all()


# The kernel.


@pytest.fixture(scope="module")
def tiny(script):
    """Losses of a network with few parameters, parameters, and rows of six functions."""
    config = fisher.FisherConfig(num_nodes=8, num_times=3)
    data = fisher.generate(config, train_per_form=2, validation_per_form=0, test_per_form=0)["train"]
    rows = script.rows_of(config, data, labelled=False)
    model = DeepONet(MLP((3,)), MLP((4, 3), nn.tanh, embed=PeriodicEmbedding((None, 1.0))))
    losses = script.Losses(model, config, 16)
    batch = {"inputs": rows["inputs"], "points": config.points()}
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    return losses, params, {name: jnp.asarray(column) for name, column in rows.items()}


def squares(gradients):
    """Sum of squares of each row of a Jacobian."""
    return sum(jnp.sum(leaf.reshape(leaf.shape[0], -1) ** 2, axis=1) for leaf in jax.tree.leaves(gradients))


def test_random_combinations_estimate_the_diagonal_of_the_kernel(script, tiny):
    """The mean of their squared gradients is that of all errors' squared gradients, each taken on its own."""
    losses, params, rows = tiny
    config, apply = losses.config, losses.model.apply
    lattice = (np.stack(np.meshgrid(*[np.arange(12)] * 2), -1).reshape(-1, 2) + 0.5) / 12

    def errors(params):
        def predict(points):
            return apply({"params": params}, {"inputs": rows["inputs"], "points": points})["u"]

        inside = {**rows, "points": jnp.asarray(lattice, jnp.float32)}
        return {
            "residual": script.equation(config)(predict, inside).ravel(),
            "initial": predict(jnp.asarray(config.points()[:8])).ravel(),
        }

    def sampled(key):
        return jax.tree.map(lambda *rows: jnp.stack(rows), *jax.jacrev(losses.residuals)(params, rows, key).values())

    exact = {name: squares(rows).mean() for name, rows in quick_jit(jax.jacrev(errors))(params).items()}
    keys = jax.random.split(jax.random.key(0), 2000)
    found = quick_jit(lambda keys: jax.lax.map(lambda key: squares(sampled(key)), keys))(keys).mean(0)
    assert losses.names == ("residual", "initial")
    # Two thousand draws of a relative spread of about 1.5.
    names = sorted(losses.names)  # jacrev sorts
    np.testing.assert_allclose(found, [exact[name] for name in names], rtol=0.1)
    assert exact["residual"] > 3 * exact["initial"]


def test_the_kernel_weighs_the_losses(script, tiny):
    """Without smoothing all weights times diagonals are equal; the update is that combination of the gradients."""
    losses, params, rows = tiny
    method = script.on_residuals(optim.ntk_balance("residuals", decay=0.0, every=1), losses)
    state = optim.init(method, params, num_tasks=2)

    def both(params, state):
        key = jax.random.key(3)
        return (
            mtjax.value_and_update(losses, method)(params, state, rows, key),
            mtjax.value_and_jacobian(losses)(params, rows, key),
        )

    (values, update, state), (expected, jacobian) = quick_jit(both)(params, state)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    rates = np.diagonal(state.gramian)
    np.testing.assert_allclose(state.weights, rates.mean() / rates, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        update,
        jax.tree.map(lambda leaf: jnp.tensordot(state.weights, leaf, 1), jacobian),
    )


def test_the_fixed_weight_is_on_all_but_the_residual(script):
    for num in (2, 3):
        method = script.METHODS[script.FIXED](num, 100)
        weights = method.update(jnp.eye(num), method.init(None), losses=jnp.ones(num))[0]
        assert weights.tolist() == [1.0, *[20.0] * (num - 1)]


def test_fields_are_periodic(script):
    model = script.network(script.PRESETS["demo"])
    batch = {"inputs": jnp.ones((1, 68)), "points": jnp.array([[0.3, 0.0], [0.3, 1.0], [0.3, 0.4], [0.7, 0.0]])}

    @quick_jit
    def run(key):
        return model.apply(model.init(key, batch), batch)["u"][0]

    start, end, *others = np.asarray(run(jax.random.key(0)))
    assert end == pytest.approx(start, abs=1e-5) and np.abs(np.subtract(others, start)).min() > 1e-3


# The script.


@pytest.mark.slow
def test_smoke(script, run_smoke):
    run = run_smoke(script)
    content = json.loads((run / "report.json").read_text())
    cells = {(row["model"], row["task"]): row for row in content["rows"]}
    config = script.PRESETS["smoke"]
    arms, forms = (*config.methods, script.DATA_ALONE, script.WITH_DATA), ("F1", "F2", "F4")
    assert {(arm, form) for arm in arms for form in (*forms, script.WORST)} <= cells.keys()
    for arm in arms:
        assert all(np.isfinite(cells[arm, form]["mean"]) and cells[arm, form]["n"] == 2 for form in forms)
        assert cells[arm, script.WORST]["mean"] >= max(cells[arm, form]["mean"] for form in forms) - 1e-9
    assert len({cells[arm, "F1"]["steps"] for arm in (*config.methods, script.WITH_DATA)}) == 1, "equal budgets"
    measured = content["details"]["losses_on_test"]
    assert set(measured) == set(arms) and all(
        set(losses) == {"residual", "initial"} and min(losses.values()) > 0 for losses in measured.values()
    )
    assert len(content["details"]["findings"]) == 1  # of those whose arms were trained
    figures = {path.name: path.stat().st_size for path in (run / "figures").iterdir()}
    assert set(figures) == {"fields.png", "time.png"} and min(figures.values()) > 5000


def test_command_line_errors_are_sentences(script, call_script, tmp_path):
    for setting, message in (
        ("methods=('sum','ntk')", "there is no 'ntk'"),
        ("methods=('pcgrad',)", "methods must hold 'sum'"),
        ("recipe.points_per_step=None", "points_per_step must be a number"),
        ("with_data='all'", "with_data: there is no 'all'"),
        ("labelled_per_form=5000", "labelled_per_form must be 0 to train_per_form=1000, got 5000"),
    ):
        status, _, error = call_script(script, "--run", tmp_path / "run", "--set", setting)
        assert status == 2 and message in error, error
