"""Figures: they draw what they are given, fit their labels into the page, and touch no global state."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from mtjax import plots
from mtjax.delta import DeltaM

TASKS = ["cancelled", "late departure", "arrival delay"]


def gains() -> dict[str, DeltaM]:
    return {
        "single-task MLP": DeltaM(0.0, 0.0, {task: (0.0, 0.0) for task in TASKS}, 3),
        "MMoE": DeltaM(-1.2, 0.4, {task: (-1.2 + k, 0.3) for k, task in enumerate(TASKS)}, 3),
        "MultiTab-Net": DeltaM(2.3, math.nan, {task: (2.3 - k, math.nan) for k, task in enumerate(TASKS)}, 3),
    }


def history(rng: np.random.Generator) -> dict:
    steps = np.arange(0, 500, 100)
    return {
        model: {task: (steps, np.cumsum(rng.random((3, 5)), axis=1)) for task in TASKS} for model in ("MMoE", "PLE")
    }


def cosine(rng: np.random.Generator, n: int = 4) -> np.ndarray:
    vectors = rng.normal(size=(n, 3, 5))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.einsum("nkd,njd->nkj", vectors, vectors)


def overflow(figure) -> float:
    """How far, in inches, anything sticks out of the page before `save` trims it."""
    figure.draw_without_rendering()
    box, page = figure.get_tightbbox(), figure.get_size_inches()
    return max(-box.x0, -box.y0, box.x1 - page[0], box.y1 - page[1])


def test_delta_bars_show_mean_error_and_tasks():
    figure = plots.delta_bars(gains(), title="gain over single-task MLPs")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [0.0, -1.2, 2.3]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(gains())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == TASKS
    assert "3 seeds" in figure.legends[0].get_title().get_text() and axes.get_title() == "gain over single-task MLPs"
    assert overflow(figure) < 0.05


def test_delta_bars_leave_infinite_gains_out():
    infinite = DeltaM(math.inf, math.nan, {"late": (math.inf, math.nan)}, 2)
    figure = plots.delta_bars(gains() | {"on a baseline of 0": infinite})
    assert overflow(figure) < 0.05 and np.isfinite(figure.axes[0].get_xlim()).all()


def test_task_curves_have_a_panel_per_task_and_a_band_over_seeds(rng):
    data = history(rng)
    del data["PLE"]["cancelled"]
    data["one seed"] = {"cancelled": ([0, 100], [0.1, math.nan])}
    figure = plots.task_curves(data, metrics={"cancelled": "auroc"}, title="validation")
    assert [axes.get_title() for axes in figure.axes] == TASKS
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2]
    assert [len(axes.collections) for axes in figure.axes] == [1, 2, 2]
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), data["MMoE"][TASKS[1]][1].mean(0))
    assert figure.axes[0].get_ylabel() == "auroc"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MMoE", "one seed", "PLE"]
    assert overflow(figure) < 0.05


def test_conflict_heatmap(rng):
    values = cosine(rng)
    figure = plots.conflict_heatmap_over_time([0, 10, 100, 1000], values, TASKS)
    over_time, final = figure.axes[:2]
    mesh = over_time.collections[0]
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(3, 4)[0], values[:, 0, 1])
    np.testing.assert_allclose(final.images[0].get_array(), values[-1])
    assert mesh.get_clim() == final.images[0].get_clim() == (-1.0, 1.0)
    labels = [label.get_text() for label in over_time.get_yticklabels()]
    assert labels[0] == "cancelled / late departure" and len(labels) == 3
    assert final.get_title() == "at step 1000"
    assert overflow(figure) < 0.05
    assert overflow(plots.conflict_heatmap_over_time([5], values[:1, :2, :2], TASKS[:2])) < 0.05


def test_expert_use(rng):
    importance = {"MMoE": rng.dirichlet(np.ones(4), 3), "PLE level 0": rng.dirichlet(np.ones(6), 4)}
    figure = plots.expert_use(importance, TASKS, experts={"MMoE": ["a", "b", "c", "d"]}, title="gates")
    first, second = figure.axes[:2]
    np.testing.assert_allclose(first.images[0].get_array(), importance["MMoE"])
    assert [label.get_text() for label in first.get_xticklabels()] == ["a", "b", "c", "d"]
    assert [label.get_text() for label in second.get_yticklabels()] == [*TASKS, "shared"]
    assert overflow(figure) < 0.05


def test_save_makes_the_folder_and_needs_no_backend(tmp_path: Path, rng):
    before = dict(matplotlib.rcParams)
    path = plots.save(plots.delta_bars(gains()), tmp_path / "figures" / "delta.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert plots.save(plots.expert_use({"m": np.eye(3)}, TASKS), tmp_path / "use.svg").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.delta_bars({}), "at least one model"),
        (lambda: plots.task_curves({}), "at least one model with one task"),
        (
            lambda: plots.task_curves({"MMoE": {"late": ([0, 1], np.zeros((3, 4)))}}),
            r"model 'MMoE', task 'late' needs steps \[n\] and values \[S, n\], got shapes \(2,\) and \(3, 4\)",
        ),
        (
            lambda: plots.conflict_heatmap_over_time([0], np.zeros((1, 2, 2)), TASKS),
            r"got shapes \(1,\) and \(1, 2, 2\) and 3 names",
        ),
        (lambda: plots.conflict_heatmap_over_time([0], np.zeros((1, 1, 1)), ["a"]), "K >= 2 task names"),
        (lambda: plots.expert_use({}, TASKS), "at least one panel"),
        (lambda: plots.expert_use({"m": np.ones((2, 4))}, TASKS), r"'m' must have shape \[K, E\] for the 3 tasks"),
        (lambda: plots.expert_use({"m": np.ones((3, 4))}, TASKS, experts={"m": ["a"]}), "4 experts but 1 names"),
    ],
)
def test_errors_are_sentences(draw, message: str):
    with pytest.raises(ValueError, match=message):
        draw()
