"""Figures on objective methods: what they show, that labels fit the page, that files stay small."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors
from PIL import Image

from mtjax import plots_objectives as plots
from mtjax.plots_objectives import Plane
from mtjax.ranks import Ranks, mean_ranks


def overflow(figure) -> float:
    """How far, in inches, anything sticks out of the page before it is trimmed."""
    figure.draw_without_rendering()
    box, page = figure.get_tightbbox(), figure.get_size_inches()
    return max(-box.x0, -box.y0, box.x1 - page[0], box.y1 - page[1])


def test_intervals_overlap_exactly_where_methods_cannot_be_told_apart(rng):
    scores = {name: rng.normal(shift, 1.0, 12) for name, shift in zip("abcdef", np.linspace(2, 0, 6), strict=True)}
    ranks = mean_ranks(scores)
    groups = {name: "losses" if name in "ace" else "Gramian" for name in "abcdef"}
    figure = plots.critical_difference(ranks, groups=groups, title="12 blocks of noise")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(ranks.mean)
    assert axes.yaxis_inverted(), "the best is on top"
    bars = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    dots = [line for line in axes.lines if len(line.get_xdata()) == 1]
    mean = list(ranks.mean.values())
    assert len(bars) == len(dots) == 6
    for i in range(6):
        for j in range(6):
            apart = abs(mean[i] - mean[j]) > ranks.critical_difference
            assert apart == (bars[i][1] < bars[j][0] or bars[j][1] < bars[i][0])
        filled = colors.to_hex(dots[i].get_markerfacecolor()) != "#ffffff"
        assert filled == (mean[i] - mean[0] <= ranks.critical_difference)
    assert {dots[i].get_color() for i in range(6)} == {"#0072B2", "#D55E00"}
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"losses", "Gramian"}
    assert f"CD = {ranks.critical_difference:.2f} at 0.05 over 12 blocks, Friedman p = " in axes.get_title()
    assert overflow(figure) < 0.05


def test_critical_difference_of_many_methods_without_groups():
    names = [f"method with a name {i}" for i in range(50)]
    ranks = Ranks({name: 1.0 + i for i, name in enumerate(names)}, 3.0, math.nan, 15, 0.05)
    figure = plots.critical_difference(ranks)
    assert not figure.legends and "Friedman" not in figure.axes[0].get_title()
    assert overflow(figure) < 0.05


def walks(rng, n: int = 30) -> np.ndarray:
    return np.cumsum(rng.normal(0, 0.1, (3, n, 2)), axis=1)


SQUARE = Plane((-3.0, 3.0), (-3.0, 3.0), "parameters", ("x", "y"), [[-1, 0], [1, 0]])


def test_trajectories_draw_starts_ends_and_counts(rng):
    paths = {name: [walks(rng), walks(rng) * 2] for name in ("Sum", "MGDA", "PCGrad")}
    grid = np.linspace(-3, 3, 20)
    hills = (grid, grid, grid[:, None] ** 2 + grid[None, :] ** 2)
    planes = [SQUARE._replace(heights=hills), Plane((-6, 6), (-6, 6), "losses")]
    arrived = {"Sum": [True, False, True], "MGDA": [True] * 3, "PCGrad": [False] * 3}
    groups = {"Sum": "losses", "MGDA": "Gramian", "PCGrad": "Gramian"}
    notes = {"MGDA": ", 12k"}
    figure = plots.trajectories(paths, planes, arrived=arrived, notes=notes, groups=groups, title="three methods")
    assert len(figure.axes) == 6
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["Sum  2/3", "MGDA  3/3, 12k", "PCGrad  0/3"]
    texts = [text.get_text() for text in figure.texts]
    assert {"three methods", "losses", "Gramian", "upper panels: parameters; lower panels: losses"} <= set(texts)
    upper, lower = figure.axes[:2]
    assert upper.get_position().y0 > lower.get_position().y1, "the planes of a method are above one another"
    # Front, then a start and an end for every path.
    marks = [line for line in upper.lines if len(line.get_xdata()) == 1]
    assert len(marks) == 6 and len(upper.lines) == 7
    points = np.array([line.get_xydata()[0] for line in marks])
    np.testing.assert_allclose(points[::2], paths["Sum"][0][:, 0])
    np.testing.assert_allclose(points[1::2], paths["Sum"][0][:, -1])
    assert [line.get_marker() for line in marks[1::2]] == ["o", "X", "o"]
    contours, drawn = upper.collections
    assert len(contours.get_segments()) > 5
    pieces = drawn.get_segments()
    assert len(pieces) == 3 * 29 and drawn.get_array()[0] < 0.05 < 0.95 < drawn.get_array()[-1]
    np.testing.assert_allclose(pieces[0], paths["Sum"][0][0, :2])
    assert upper.get_xlim() == (-3.0, 3.0) and overflow(figure) < 0.05


def test_long_paths_are_drawn_whole_in_few_pieces(rng):
    path = walks(rng, 1000)
    figure = plots.trajectories({"Sum": [path]}, [SQUARE])
    pieces = figure.axes[0].collections[-1].get_segments()
    assert len(pieces) == 3 * 48
    np.testing.assert_allclose(pieces[47][-1], path[0, -1])
    for first, second in itertools.pairwise(pieces[:48]):
        np.testing.assert_allclose(first[-1], second[0])


def test_many_methods_fill_rows_and_groups_begin_new_ones(rng):
    paths = {f"m{i}": [walks(rng, 5)] for i in range(7)}
    groups = {f"m{i}": "a" if i < 4 else "b" for i in range(7)}
    figure = plots.trajectories(paths, [SQUARE], groups=groups, columns=3)
    rows = [round(axes.get_position().y0, 4) for axes in figure.axes]
    assert rows[0] == rows[2] > rows[3] > rows[4] == rows[6]
    assert overflow(figure) < 0.05


def test_paths_that_are_not_finite_end_where_they_were_last_seen(rng):
    path = walks(rng, 6)
    path[0, 4:] = math.nan
    path[1] = math.inf
    figure = plots.trajectories({"Sum": [path]}, [SQUARE], arrived={"Sum": np.zeros(3, bool)})
    marks = [line.get_xydata()[0] for line in figure.axes[0].lines[1:]]
    assert len(marks) == 4
    np.testing.assert_allclose(marks[1], path[0, 3])
    assert overflow(figure) < 0.05


def test_save_small_writes_a_png_with_a_palette(tmp_path: Path, rng):
    figure = plots.trajectories({"Sum": [walks(rng)]}, [SQUARE])
    path = plots.save_small(figure, tmp_path / "figures" / "toy.png", colors=64)
    content = path.read_bytes()
    assert content[:4] == b"\x89PNG" and b"PLTE" in content and len(content) < 20_000


def test_save_small_keeps_the_colour_of_a_single_marker(tmp_path: Path):
    """A red point on a map of many colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    x, y = np.meshgrid(np.linspace(0, 1, 100), np.linspace(0, 1, 100))
    axes.contourf(x, y, np.sin(5 * x) + y**2, levels=40, cmap="viridis")
    axes.plot([0.5], [0.5], "o", color="#FF0000", markersize=3)
    with Image.open(plots.save_small(figure, tmp_path / "map.png")) as image:
        colors = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    assert np.abs(colors - [255, 0, 0]).max(axis=1).min() < 12


@pytest.mark.parametrize(
    ("paths", "planes", "arrived", "message"),
    [
        ({}, [SQUARE], None, "at least one method and one plane, got 0 and 1"),
        ({"Sum": []}, [SQUARE], None, r"Paths of 'Sum' must be \[S, n, 2\] for each of 1 planes, got \[\]"),
        ({"Sum": [np.zeros((3, 2))]}, [SQUARE], None, r"got \[\(3, 2\)\]"),
        ({"Sum": [np.zeros((3, 4, 2))]}, [SQUARE], {"Sum": [True]}, r"arrived\['Sum'\] must have 3 entries"),
        ({"Sum": [np.zeros((3, 4, 2))]}, [SQUARE], {}, r"arrived\['Sum'\] must have 3 entries, got None"),
    ],
)
def test_errors_are_sentences(paths, planes, arrived, message):
    with pytest.raises(ValueError, match=message):
        plots.trajectories(paths, planes, arrived=arrived)
