"""Fisher's equations: against scipy and closed forms, the measured order, codes, splits that share nothing."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from mtjax.data.pde import fisher, store
from mtjax.data.pde.fisher import F1, F2, F4, FisherConfig, Form
from mtjax.data.pde.gaussian_process import Kernel

CONFIG = FisherConfig()


def relative(found, expected):
    """Relative L2 distance per function."""
    difference = (found - expected).reshape(len(found), -1)
    return np.linalg.norm(difference, axis=1) / np.linalg.norm(expected.reshape(len(found), -1), axis=1)


def refined(values, factor):
    """Trigonometric interpolation of periodic values [B, X] to factor X nodes."""
    nodes = values.shape[1]
    spectrum = np.fft.rfft(values.astype(np.float64))
    spectrum[:, -1] /= 2  # the highest mode stands for two on the finer grid
    return np.fft.irfft(spectrum, factor * nodes) * factor


def reference(initial, source, config=CONFIG, factor=4):
    """scipy's DOP853 on a refined grid with eighth-order differences; the solution at the nodes [S, X]."""
    stencil = np.array([-1 / 560, 8 / 315, -1 / 5, 8 / 5, -205 / 72, 8 / 5, -1 / 5, 8 / 315, -1 / 560])
    fine = refined(initial[None], factor)[0]
    dx = config.length / len(fine)

    def rate(_, u):
        padded = np.concatenate([u[-4:], u, u[:4]])
        return config.diffusion * np.convolve(padded, stencil, mode="valid") / dx**2 + source(u)

    times = np.linspace(0, config.horizon, config.num_times)
    solved = integrate.solve_ivp(rate, (0, config.horizon), fine, "DOP853", times, rtol=1e-10, atol=1e-12)
    return solved.y.T[:, ::factor]


@functools.cache
def small():
    """Generated once: 12 nodes are not enough for accuracy, but for everything about rows and columns."""
    config = FisherConfig(num_nodes=12, num_times=3)
    sizes = {"train_per_form": 5, "validation_per_form": 3, "test_per_form": 4}
    return config, sizes, fisher.generate(config, seed=1, **sizes)


def test_generated_solutions_agree_with_scipy():
    """Every form with the defaults in float32, against the sources as the paper writes them: at most 1e-6."""
    train = fisher.generate(seed=0, train_per_form=2, validation_per_form=0, test_per_form=0)["train"]
    exact = {
        0: lambda a, b: lambda u: a * u * (1 - u),
        1: lambda a, b: lambda u: a * u * (1 - u**2),
        2: lambda a, b: lambda u: a * u * (1 - u) * np.exp(-b * (1 - u)),
    }
    a, b = (train["parameters"][name].astype(np.float64) for name in "ab")
    expected = [
        reference(train["inputs"]["initial"][i], exact[int(task)](a[i], b[i])) for i, task in enumerate(train["task"])
    ]
    found = train["values"].reshape(6, 20, 64)
    assert relative(found, np.stack(expected)).max() < 1e-6


def test_the_scheme_is_of_fourth_order():
    """Errors in float64 for steps h, h/2, h/4 against h/32."""
    config = FisherConfig(num_times=5, diffusion=1e-2)
    x = np.arange(32) / 32
    initial = 0.5 + 0.3 * np.sin(2 * np.pi * x)[None, :] + 0.1 * np.cos(4 * np.pi * x)[None, :]
    with jax.enable_x64(True):
        solutions = {
            n: fisher.solve(
                initial,
                np.array([1.0, 0.0, -1.0]),
                damping=np.array([0.5]),
                config=dataclasses.replace(config, substeps=n),
                dtype=np.float64,
            )
            for n in (4, 8, 16, 128)
        }
    errors = np.array([relative(solutions[n], solutions[128])[0] for n in (4, 8, 16)])
    orders = np.log2(errors[:-1] / errors[1:])
    assert errors[-1] > 1e-10, "the differences are above rounding"
    assert np.all((orders > 3.8) & (orders < 4.3)), orders


def test_space_is_resolved():
    """The defaults in float64 with 64 and 256 nodes agree: what is left is the time step's error."""
    initial = small_initial(4)
    code = np.array([1.0, 0.0, -1.0, 0.0])
    with jax.enable_x64(True):
        coarse = fisher.solve(initial, code, dtype=np.float64)
        fine = fisher.solve(refined(initial, 4), code, dtype=np.float64)[:, :, ::4]
    assert relative(coarse, fine).max() < 1e-7


def small_initial(functions):
    data = fisher.generate(seed=5, train_per_form=functions, validation_per_form=0, test_per_form=0)
    return data["train"]["inputs"]["initial"][:functions]


def test_a_uniform_state_follows_the_logistic_equation():
    """u' = a u (1 - u) has the solution u_0 / (u_0 + (1 - u_0) e^{-a t})."""
    start, a = np.array([0.1, 0.5, 0.9]), np.array([1.0, 0.3, 0.7])
    found = fisher.solve(np.tile(start[:, None], (1, 16)), F1.code(a, 0 * a, size=4))
    t = np.linspace(0, 4, 20)
    expected = start[:, None] / (start[:, None] + (1 - start[:, None]) * np.exp(-a[:, None] * t))
    np.testing.assert_allclose(found, np.tile(expected[:, :, None], (1, 1, 16)), rtol=1e-6)


@pytest.mark.parametrize("growth", [0.0, 0.4])
def test_without_a_reaction_every_mode_decays_by_itself(growth):
    """u_t = D u_xx + c u: cos(2 pi k x / L) is multiplied by e^{(c - D (2 pi k / L)^2) t}."""
    config = FisherConfig(length=2.0, kernel=Kernel("matern52", 0.3, period=2.0), diffusion=0.02)
    x, t = 2.0 * np.arange(16) / 16, np.linspace(0, 4, 20)
    k = np.arange(4)[:, None]
    initial = np.cos(np.pi * k * x)
    found = fisher.solve(initial, np.array([growth]), config=config)
    factor = np.exp((growth - 0.02 * (np.pi * k) ** 2) * t)
    np.testing.assert_allclose(found, factor[:, :, None] * initial[:, None, :], atol=2e-6)


@settings(max_examples=8)
@given(st.integers(0, 63), st.integers(0, 3))
def test_a_shifted_field_has_a_shifted_solution(shift, row):
    initial, solution = solved()
    moved = fisher.solve(np.roll(initial, shift, 1), F2.code(np.ones(4), np.zeros(4), size=4))
    np.testing.assert_allclose(moved[row], np.roll(solution[row], shift, 1), atol=3e-6)


@functools.cache
def solved():
    initial = small_initial(4)
    return initial, fisher.solve(initial, F2.code(np.ones(4), np.zeros(4), size=4))


def test_solutions_grow_and_stay_between_the_steady_states():
    """0 and 1 are steady, so the comparison principle keeps u between them, and the mean grows."""
    _, solution = solved()
    assert solution.min() > 0 and solution.max() < 1 + 1e-5
    assert np.all(np.diff(solution.mean(2), axis=1) > 0)


def test_coefficients_against_formulas_and_limits():
    """The closed formulas where nothing cancels, Runge-Kutta's weights h (1/6, 1/3, 1/6) where z = 0."""
    h, z = 0.1, np.array([-2.0, -7.0, -40.0])
    found = fisher.etdrk4_coefficients(z / h, h)
    e = np.exp(z)
    expected = {
        "whole": e,
        "half": np.exp(z / 2),
        "stage": h * (np.exp(z / 2) - 1) / z,
        "first": h * (-4 - z + e * (4 - 3 * z + z**2)) / z**3,
        "middle": 2 * h * (2 + z + e * (z - 2)) / z**3,
        "last": h * (-4 - 3 * z - z**2 + e * (4 - z)) / z**3,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-10, err_msg=name)
        assert getattr(found, name).dtype == np.float64
    at_zero = fisher.etdrk4_coefficients(np.array([0.0, -1e-9]), h)
    weights = {"whole": 1.0, "half": 1.0, "stage": h / 2, "first": h / 6, "middle": h / 3, "last": h / 6}
    for name, value in weights.items():
        np.testing.assert_allclose(getattr(at_zero, name), value, rtol=1e-9, err_msg=name)


@settings(max_examples=15)
@given(st.floats(0.1, 1.0), st.floats(0.0, 2.0), st.floats(0.0, 1.0))
def test_codes_are_the_published_polynomials(a, b, u):
    powers = u ** np.arange(1, 5)
    assert F1.code(a, b, size=4) @ powers == pytest.approx(a * u * (1 - u), abs=1e-12)
    assert F2.code(a, b, size=4) @ powers == pytest.approx(a * u * (1 - u**2), abs=1e-12)
    published = a * np.exp(-b) * np.array([1, b - 1, b * (b / 2 - 1), -(b**2) / 2])
    np.testing.assert_allclose(F4.code(a, b, size=4), published, rtol=1e-12, atol=1e-15)
    # The code describes F4 to second order in b u: Lagrange's remainder of the exponential.
    true = a * u * (1 - u) * np.exp(-b * (1 - u))
    remainder = a * u * (1 - u) * np.exp(-b) * (b * u) ** 3 / 6 * np.exp(b * u)
    assert abs(F4.code(a, b, size=4) @ powers - true) <= remainder + 1e-12


def test_columns_follow_the_batch_contract():
    config, sizes, data = small()
    assert list(data) == ["train", "validation", "test"]
    for split, batch in data.items():
        functions = 3 * sizes[f"{split}_per_form"]
        kinds = {key: (array.shape, array.dtype.name) for key, array in store.flatten(batch).items()}
        assert kinds == {
            "inputs/code": ((functions, 4), "float32"),
            "inputs/initial": ((functions, 12), "float32"),
            "points": ((36, 2), "float32"),
            "values": ((functions, 36), "float32"),
            "task": ((functions,), "int32"),
            "parameters/a": ((functions,), "float32"),
            "parameters/b": ((functions,), "float32"),
        }
        np.testing.assert_array_equal(batch["values"][:, :12], batch["inputs"]["initial"])
        np.testing.assert_allclose(batch["points"][12 * 2 + 5], [1.0, 5 / 12], rtol=1e-6)
        a, b = (batch["parameters"][name] for name in "ab")
        assert a.min() >= 0.1 and a.max() <= 1.0
        assert np.all(b[batch["task"] < 2] == 0) and b[batch["task"] == 2].min() >= 0.5 and b.max() <= 2.0
        for i, task in enumerate(batch["task"]):
            np.testing.assert_allclose(
                batch["inputs"]["code"][i], config.forms[task].code(a[i], b[i], size=4), rtol=1e-6, atol=1e-7
            )


def test_no_initial_field_occurs_twice():
    _, _, data = small()
    fields = np.concatenate([batch["inputs"]["initial"] for batch in data.values()])
    strengths = np.concatenate([batch["parameters"]["a"] for batch in data.values()])
    assert len(np.unique(strengths)) == len(strengths) == 36
    assert min(np.abs(x - y).max() for x, y in itertools.combinations(fields, 2)) > 0.05


def test_a_small_set_is_the_beginning_of_a_larger_one_and_seeds_differ():
    config, _, data = small()
    fewer = fisher.generate(config, seed=1, train_per_form=2, validation_per_form=1, test_per_form=0)
    for task in range(3):
        for key in ("values", "task"):
            rows = data["train"][key][data["train"]["task"] == task][:2]
            np.testing.assert_array_equal(fewer["train"][key][2 * task : 2 * task + 2], rows)
    assert fewer["test"]["values"].shape == (0, 36)
    other = fisher.generate(config, seed=2, train_per_form=2, validation_per_form=0, test_per_form=0)
    assert np.abs(other["train"]["inputs"]["initial"] - fewer["train"]["inputs"]["initial"]).min(1).max() > 0


def test_more_than_a_chunk_is_what_single_chunks_give():
    _, _, data = small()
    one = FisherConfig(num_nodes=12, num_times=3, forms=(F1,))
    steps = []
    large = fisher.generate(
        one, seed=1, train_per_form=260, validation_per_form=0, test_per_form=0, progress=lambda *a: steps.append(a)
    )
    assert steps == [(256, 260), (260, 260)]
    np.testing.assert_array_equal(large["train"]["values"][:5], data["train"]["values"][:5])
    assert len(np.unique(large["train"]["parameters"]["a"])) == 260


def test_initial_fields_have_the_law_of_the_configuration():
    """logit u_0 is the Gaussian field: its variance and its correlation at one length."""
    config = FisherConfig(num_nodes=10, num_times=2, forms=(F1,))
    data = fisher.generate(config, train_per_form=1000, validation_per_form=0, test_per_form=0)
    u = data["train"]["inputs"]["initial"].astype(np.float64)
    g = np.log(u / (1 - u))
    found = g.T @ g / len(g)
    expected = config.kernel.matrix(np.arange(10) / 10)
    error = np.sqrt((1.5**4 + expected**2) / len(g))
    assert np.abs((found - expected) / error).max() < 5


def test_a_form_of_ones_own():
    """Nagumo's bistable source -u (u - 0.3)(u - 1) beside F4, and its code is exactly its polynomial."""
    bistable = Form("bistable", (-0.3, 1.3, -1.0))
    config = FisherConfig(forms=(F4, bistable))
    data = fisher.generate(config, train_per_form=1, validation_per_form=0, test_per_form=0)["train"]
    a = data["parameters"]["a"][1].astype(np.float64)
    expected = reference(data["inputs"]["initial"][1], lambda u: -a * u * (u - 0.3) * (u - 1))
    assert relative(data["values"][1:].reshape(1, 20, 64), expected[None])[0] < 1e-6
    np.testing.assert_allclose(data["inputs"]["code"][1], a * np.array([-0.3, 1.3, -1, 0]), rtol=1e-6)
    assert FisherConfig(forms=(Form("F6", (1, 0, 0, -1), damped=True),)).code_size == 6


def test_load_is_generate_from_disk(tmp_path):
    config, sizes, data = small()
    made = fisher.load(config, seed=1, **sizes, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    read = fisher.load(config, seed=1, **sizes, folder=tmp_path)
    assert path.stat().st_mtime_ns == written and path.name.startswith("fisher-v1-")
    for batch in (made, read):
        for key, array in store.flatten(batch).items():
            np.testing.assert_array_equal(array, store.flatten(data)[key])
    fisher.load(config, seed=2, **sizes, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


INITIAL = np.full((2, 8), 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FisherConfig(diffusion=0.0), "diffusion must be positive and finite, got 0"),
        (lambda: FisherConfig(horizon=float("inf")), "horizon must be positive"),
        (lambda: FisherConfig(length=2.0), "kernel's period 1.0 must be length=2"),
        (lambda: FisherConfig(num_nodes=4), "num_nodes must be at least 8, got 4"),
        (lambda: FisherConfig(num_times=1), "num_times must be at least 2"),
        (lambda: FisherConfig(substeps=0), "substeps must be at least 1"),
        (lambda: FisherConfig(strength=(1.0, 0.1)), r"strength must be a range \(low, high\)"),
        (lambda: FisherConfig(forms=()), "forms must be at least one"),
        (lambda: FisherConfig(forms=(F1, F1)), "different names"),
        (lambda: Form("none", ()), "finite coefficients"),
        (
            lambda: fisher.solve(np.zeros(8), np.zeros(4)),
            r"initial must have the shape \[functions, nodes\], got \(8,\)",
        ),
        (lambda: fisher.solve(INITIAL, np.zeros((3, 4))), r"coefficients must have the shape \[2, q\]"),
        (lambda: fisher.solve(INITIAL, np.zeros(0)), "coefficients must have the shape"),
        (lambda: fisher.solve(INITIAL, np.zeros(4), damping=np.zeros(3)), r"damping must have the shape \[2\]"),
        (
            lambda: fisher.solve(INITIAL * [[1], [np.nan]], np.zeros(4)),
            "initial has a value .* not finite in row 1",
        ),
        (lambda: fisher.solve(INITIAL, [0, 0, np.inf, 0]), "coefficients has a value that is not finite in row 0"),
        (
            lambda: fisher.solve(INITIAL, [0.0, 9.0, 9.0, 0.0]),
            "solution of row 0 is not finite: .* blows up",
        ),
        (lambda: fisher.generate(train_per_form=0), "at least 1 to train"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
