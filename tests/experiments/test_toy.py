"""The toy landscape: its functions and its front, paths equal to a plain loop, verdicts, and the script end to end."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "objectives" / "toy.py"
KEYS = ["system", "claim", "preset", "command", "seeds", "commit", "dirty", "device", "versions", "wall_s", "rows"]


@pytest.fixture(scope="module")
def toy(load_script):
    return load_script("objectives/toy.py")


# The landscape.


def plain_losses(x1: float, x2: float) -> list[float]:
    """The functions of the papers, in plain Python, plus the shift."""
    above, below = max(math.tanh(x2 / 2), 0.0), max(math.tanh(-x2 / 2), 0.0)
    gorges = (abs((-x1 - 7) / 2 - math.tanh(-x2)), abs((-x1 + 3) / 2 + math.tanh(-x2) + 2))
    bowls = ((7 - x1) ** 2, (-7 - x1) ** 2)
    return [
        above * (math.log(max(gorge, 5e-6)) + 6) + below * ((bowl + 0.1 * (-x2 - 8) ** 2) / 10 - 20) + 21
        for gorge, bowl in zip(gorges, bowls, strict=True)
    ]


def test_losses_are_those_of_the_papers(toy, rng):
    points = [*toy.landscape.STARTS, *rng.uniform(-11, 11, (50, 2)).tolist(), (-7.0, 0.0)]
    found = toy.landscape.losses(jnp.asarray(points), (0.1, 1.0))
    expected = np.array([plain_losses(*point) for point in points]) * [0.1, 1.0]
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_the_slope_on_the_watershed_is_that_of_both_sides_together(toy):
    """The start (0, 0) lies where both halves meet. By hand, as the authors' code has it:

    dL_1/dx_2 = (log 3.5 + 6) / 2 - ((49 + 6.4) / 10 - 20) / 2 = 3.6264 + 7.23 = 10.8564, the same for L_2, and
    dL_k/dx_1 = 0, since both halves are multiplied by 0 there.
    """
    jacobian = jax.jacrev(toy.landscape.losses)(jnp.zeros(2))
    np.testing.assert_allclose(jacobian, [[0.0, 10.8564], [0.0, 10.8564]], atol=1e-3)


def test_the_front_is_stationary_and_nothing_lies_below_it(toy, rng):
    front = toy.landscape.front(201)
    inner = jnp.asarray(front.points[1:-1])
    jacobian = np.asarray(jax.vmap(jax.jacrev(toy.landscape.losses))(inner))
    share = (7 + front.points[1:-1, 0]) / 14
    combined = share[:, None] * jacobian[:, 0] + (1 - share)[:, None] * jacobian[:, 1]
    np.testing.assert_allclose(combined, 0.0, atol=1e-4)
    np.testing.assert_allclose(front.losses, toy.landscape.losses(jnp.asarray(front.points)), atol=1e-4)
    assert (np.diff(front.losses[:, 0]) < 0).all() and (np.diff(front.losses[:, 1]) > 0).all()
    # What dominates a point of the front is better in both losses by no more than rounding.
    others = np.asarray(toy.landscape.losses(jnp.asarray(rng.uniform(-11, 11, (20_000, 2)))))
    gain = (front.losses[:, None] - others[None]).min(-1)
    assert gain.max() < 0.01


def test_place_measures_distance_and_position(toy):
    front = toy.landscape.front()
    found = toy.landscape.place(front.points[[0, 700, 1400]])
    np.testing.assert_allclose(found.distance, 0.0, atol=1e-4)
    np.testing.assert_allclose(found.share, [0.0, 0.5, 1.0], atol=1e-3)
    # Above the middle of the front both losses are larger by the same.
    near = toy.landscape.place(np.array([0.0, -6.0]))
    assert 0.1 < near.distance < 2.0 and near.share == pytest.approx(0.5, abs=1e-3)
    lost = toy.landscape.place(np.array([[np.nan, 0.0], [0.0, -8.0]]))
    assert np.isnan(lost.distance[0]) and np.isnan(lost.share[0]) and lost.distance[1] < 0.2


# The table of methods.


@pytest.mark.slow
def test_every_method_of_the_table_can_be_made_with_every_setting_and_makes_a_step(toy):
    """The step abstractly: structure and shapes only."""
    params, batch = {"x": jnp.zeros(2)}, {"scale": jnp.ones((toy.BATCH, 2))}

    def loss_fn(params, batch):
        return toy.landscape.losses(params["x"], batch["scale"][0])

    for name, entry in toy.TABLE.items():
        assert entry.family in toy.methods.FAMILIES, name
        settings = entry.settings()
        assert len({repr(options) for options in settings}) == len(settings) >= 1, name
        if toy.left_out(entry):
            continue
        made = [entry.make(**options) for options in settings]
        assert all(isinstance(method, mtjax.optim.Method) for method in made), name
        method = entry.make(**toy.PUBLISHED.get(name, {}))
        state = mtjax.optim.init(method, params, num_tasks=2)
        losses, gradient, after = jax.eval_shape(mtjax.value_and_update(loss_fn, method), params, state, batch)
        assert losses.shape == (2,) and gradient["x"].shape == (2,), name
        assert jax.tree.structure(after) == jax.tree.structure(state), name


def test_names_are_found_whatever_their_case(toy):
    assert toy.methods.chosen(["PCGRAD", "sum"]) == ("PCGrad", "Sum")
    assert toy.methods.chosen(["epo"], toy.TABLE) == ("EPO",)
    assert {*toy.PUBLISHED, *toy.SMOKE.methods} <= set(toy.TABLE)
    with pytest.raises(ValueError, match="there is no 'PCGard'; did you mean 'PCGrad'"):
        toy.methods.chosen(["PCGard"])


# Paths.


def plain_adam(slope, start, rate: float, steps: int) -> np.ndarray:
    """Kingma and Ba's algorithm 1 on two numbers."""
    x, m, v = np.array(start), np.zeros(2), np.zeros(2)
    for t in range(1, steps + 1):
        g = slope(x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x


def test_paths_are_those_of_a_plain_loop(toy):
    config = toy.Config(steps=30, records=3, learning_rate=0.01, scales=(1.0, 0.1))
    found = toy.follow(mtjax.optim.linear(), config)
    assert found.points.shape == (2, 1, 5, 4, 2)
    np.testing.assert_array_equal(found.points[1, 0, :, 0], np.asarray(toy.landscape.STARTS, np.float32))

    def slope(x):
        """Central differences of the plain functions, in float64."""
        h = 1e-6
        return np.array([
            sum(w * (b - a) for w, a, b in zip((0.1, 1), plain_losses(*(x - e)), plain_losses(*(x + e)), strict=True))
            for e in (np.array([h, 0.0]), np.array([0.0, h]))
        ]) / (2 * h)  # fmt: skip

    for start in (0, 3, 4):
        for record in (1, 3):
            expected = plain_adam(slope, toy.landscape.STARTS[start], 0.01, 10 * record)
            np.testing.assert_allclose(found.points[1, 0, start, record], expected, atol=2e-4)


@pytest.mark.slow
def test_only_methods_that_draw_have_several_seeds(toy):
    config = toy.Config(steps=20, records=2, learning_rate=0.01, scales=(1.0,), seeds=3)
    drawn = toy.follow(mtjax.optim.rlw(), config).points
    assert drawn.shape == (1, 3, 5, 3, 2)
    assert (drawn[0, 0, :, -1] != drawn[0, 1, :, -1]).any() and (drawn[0, 1, :, -1] != drawn[0, 2, :, -1]).any()
    assert toy.follow(mtjax.optim.mgda(), config).points.shape == (1, 1, 5, 3, 2)


def test_the_paper_preset_has_the_published_shape(toy):
    """100,000 steps of CAGrad's code; abstractly, so that a typo in the preset cannot hide."""
    method = mtjax.optim.pcgrad()
    shape = jax.eval_shape(toy.make_paths(method, toy.PAPER), *toy.lanes(method, toy.PAPER))
    assert toy.PAPER.steps == 100_000 and shape.shape == (2, 5, 5, 1001, 2)
    assert (
        toy.DEMO.steps == 100_000
        and toy.NASH_STEPS == 35_000
        and toy.DEMO.learning_rate == toy.PAPER.learning_rate == 1e-3
    )


# Verdicts.


def ending(toy, ends) -> object:
    """Paths whose last points are `ends` [P, 2] at both scales."""
    points = np.broadcast_to(np.asarray(ends, np.float32)[None, None, :, None], (2, 1, 5, 2, 2))
    return toy.Paths(points, 35_000, 1.0, 1.0)


def test_findings_follow_the_ends(toy):
    front = toy.landscape.front().points
    middle, spread = front[[700] * 5], front[[100, 400, 700, 1000, 1300]]
    stuck = np.array([*spread[:4], (9.0, 9.0)])
    found = {
        "Sum": ending(toy, stuck),
        "PCGrad": ending(toy, spread),
        "MGDA": ending(toy, spread),
        "CAGrad": ending(toy, middle),
        "Nash-MTL": ending(toy, front[[720] * 5]),
    }
    first = found["Sum"]
    assert first.arrived().sum(-1).tolist() == [[4], [4]] and np.isnan(first.imbalance).all()
    # Positions 100, 400, 700, 1000, 1300 of 1400 lie 6/7, 3/7, 0, 3/7 and 6/7 from the middle.
    np.testing.assert_allclose(found["MGDA"].imbalance, 18 / 7 / 5, atol=2e-3)
    verdicts = {finding.claim: finding for finding in toy.findings(found, toy.DEMO)}
    assert {claim.partition(" (")[0]: finding.holds for claim, finding in verdicts.items()} == {
        "CAGrad reaches the front from all starts, descent on the sum does not": True,
        "CAGrad ends where the sum is least, MGDA and PCGrad anywhere on the front": True,
        "Sum misses the front from some starts": True,
        "PCGrad misses the front from some starts": False,
        "MGDA misses the front from some starts": False,
        "Nash-MTL reaches the front from all starts": True,
        "Nash-MTL ends nearer to the middle of the front than CAGrad": False,
        "where Nash-MTL ends does not depend on the scale of a loss": True,
    }
    missed = verdicts["Sum misses the front from some starts (loss 1 x 0.1, 35,000 steps)"]
    assert (missed.ours, missed.reason) == ("4 of 5 starts", "not all have arrived at the last step")
    only = toy.findings({"DualProj": ending(toy, spread)}, toy.Config(scales=(1.0,)))
    assert [finding.holds for finding in only] == [None]


def test_arrival_is_the_step_after_the_last_one_away(toy):
    front = toy.landscape.front().points[700]
    away = (9.0, 9.0)
    paths = np.array(
        [[front] * 4, [away, front, front, front], [away, front, away, front], [away] * 4, [front] * 3 + [away]]
    )
    found = toy.Paths(paths[None, None], 10, 1.0, 1.0)
    np.testing.assert_array_equal(found.arrival, [[[0, 10, 30, np.nan, np.nan]]])
    assert found.arrived(10).tolist() == [[[True, True, True, False, True]]]
    assert found.arrived().tolist() == [[[True, True, True, False, False]]]
    lost = toy.Paths(np.full((1, 1, 1, 3, 2), np.nan), 10, 1.0, 1.0)
    assert np.isnan(lost.arrival).all() and not lost.arrived().any() and np.isnan(lost.imbalance).all()


# The script.


@pytest.fixture(scope="module")
def smoke(toy, run_smoke) -> pathlib.Path:
    return run_smoke(toy)


def test_smoke_report(smoke, toy):
    content = json.loads((smoke / "report.json").read_text())
    assert list(content) == [*KEYS, "holds", "details"]
    assert content["system"] == "objectives_toy" and content["preset"] == "smoke" and content["seeds"] == [0, 1]
    cells = {(row["model"], row["task"], row["metric"]): row for row in content["rows"]}
    for name in toy.SMOKE.methods:
        for task in ("loss 1 x 1", "loss 1 x 0.1"):
            arrived = cells[name, task, "starts on the front"]
            assert 0 <= arrived["mean"] <= 5 and arrived["family"] == toy.TABLE[name].family
            assert arrived["n"] == (2 if name == "PCGrad" else 1)
            last = cells[name, task, "steps until all are"]["mean"]
            assert last is None or arrived["mean"] == 5
            distance = np.array(content["details"]["ends"][name][task]["distance"])
            assert distance.shape == (arrived["n"], 5)
            assert (distance < content["details"]["reached_below"]).sum(-1).mean() == arrived["mean"]
    assert content["details"]["config"]["steps"] == toy.SMOKE.steps
    assert content["claim"] == "; ".join(finding["claim"] for finding in content["details"]["findings"])


def test_smoke_figures(smoke):
    figures = {path.name: path.stat().st_size for path in (smoke / "figures").iterdir()}
    assert set(figures) == {"scale_1.png", "objectives_toy.png"} and min(figures.values()) > 5000


def test_command_line_errors_are_sentences(toy, capsys, tmp_path):
    assert toy.main(["--methods", "list"]) == 0
    assert "PCGrad" in capsys.readouterr().out
    for arguments, message in (
        (["--methods", "Nash"], "error: --methods: there is no 'Nash'"),
        (["--set", "steps=1001"], "steps a multiple of records, got 1001, 1000"),
        (["--set", "learning_rate=-1"], "learning_rate must be > 0"),
    ):
        assert toy.main([*arguments, "--run", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
