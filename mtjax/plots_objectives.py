"""Figures on objective methods: mean ranks with the critical difference, and trajectories in two dimensions.

As in `mtjax.plots`, functions take plain arrays and dicts and return a matplotlib `Figure` that belongs to nobody;
`plots.save` writes it, `save_small` writes a small PNG for a repository.

>>> figure = critical_difference(mean_ranks({"a": [3.0, 3.0], "b": [2.0, 2.0], "c": [1.0, 1.0]}))
>>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
['a', 'b', 'c']

Letters: M methods, S paths of a method, n points of a path.
"""

import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mtjax.ranks import Ranks, mean_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Plane", "critical_difference", "mean_ranks", "save_small", "trajectories"]

# Okabe and Ito's palette, as in `mtjax.plots`: told apart with any colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GOOD, _BAD, _GREY, _PALE = "#009E73", "#D55E00", "#8C8C8C", "#B8B8B8"
_PIECES = 48  # colours of a path


def save_small(figure: "Figure", path: str | os.PathLike, *, dpi: int = 100, colors: int = 256) -> Path:
    """Writes a PNG with a palette of few colours: a third of the bytes, and no difference that an eye would find.

    The palette covers the colours that occur, however few pixels they have: the marker of one method keeps its own.
    """
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    image = Image.open(buffer).convert("RGB").quantize(colors, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)
    return path


def critical_difference(ranks: Ranks, *, groups: Mapping[str, str] | None = None, title: str | None = None) -> "Figure":
    """Mean ranks of methods, each with an interval of one critical difference.

    Two methods differ significantly (Nemenyi) exactly if their intervals do not overlap; those that cannot be told from
    the best are filled. The same statement as Demsar's diagram with its bars over groups of methods, for lists of any
    length.

    Args:
      ranks: from `mtjax.ranks.mean_ranks`.
      groups: method -> group, told by colour.
      title: what the blocks are.

    Returns:
      The figure, the best method on top.
    """
    from matplotlib.figure import Figure

    names, mean = list(ranks.mean), np.array(list(ranks.mean.values()))
    half = ranks.critical_difference / 2.0
    kinds = list(dict.fromkeys((groups or {}).get(name, "") for name in names))
    colors = {kind: _COLORS[i % len(_COLORS)] for i, kind in enumerate(kinds)}
    figure = Figure(figsize=(7.2, 1.7 + 0.2 * len(names)), layout="constrained")
    axes = figure.subplots()
    best = mean[0]
    # Everything whose interval reaches the best one's.
    axes.axvspan(best - half, best + half, color="#F0F0F0", zorder=0)
    for i, (name, rank) in enumerate(zip(names, mean, strict=True)):
        color = colors[(groups or {}).get(name, "")]
        axes.plot([rank - half, rank + half], [i, i], color=color, linewidth=1.6, alpha=0.55, zorder=2)
        tied = rank - best <= ranks.critical_difference
        axes.plot(rank, i, "o", color=color, markersize=5.5, markerfacecolor=color if tied else "white", zorder=3)
        axes.annotate(f"{rank:.1f}", (rank, i), (0, 3.5), textcoords="offset points", ha="center", fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.8)
    axes.set_xlabel("mean rank ± CD / 2, 1 is best: methods differ where intervals do not overlap")
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if kinds != [""]:
        for kind in kinds:
            axes.plot([], [], "o-", color=colors[kind], label=kind)
        figure.legend(loc="outside lower center", ncols=min(5, len(kinds)), frameon=False, fontsize=8)
    friedman = "" if math.isnan(ranks.p_value) else f", Friedman p = {ranks.p_value:.2g}"
    what = f"CD = {ranks.critical_difference:.2f} at {ranks.alpha:g} over {ranks.n} blocks{friedman}"
    axes.set_title(f"{title}\n{what}" if title else what, fontsize=10)
    return figure


class Plane(NamedTuple):
    """A plane in which trajectories are drawn.

    Attributes:
      xlim: left and right end.
      ylim: lower and upper end.
      label: what is drawn here, for the key.
      names: of the horizontal and the vertical axis.
      curve: [m, 2], for example the Pareto front; None without.
      heights: (x [a], y [b], values [b, a]) for contour lines; None without.
    """

    xlim: tuple[float, float]
    ylim: tuple[float, float]
    label: str = ""
    names: tuple[str, str] = ("", "")
    curve: ArrayLike | None = None
    heights: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None


def trajectories(
    paths: Mapping[str, Sequence[ArrayLike]],
    planes: Sequence[Plane],
    *,
    arrived: Mapping[str, ArrayLike] | None = None,
    notes: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
    columns: int = 10,
    title: str | None = None,
) -> "Figure":
    """Small multiples: the paths of every method in one or more planes, coloured from start (dark) to end (bright).

    Args:
      paths: method -> for each plane [S, n, 2]. Points that are not finite are left out.
      planes: one row of panels each; the panels of a method are above one another.
      arrived: method -> bool[S], which paths got where they should: their ends are green dots, the others red crosses,
        and the count is beside the name.
      notes: method -> more to say beside the name.
      groups: method -> group; groups follow each other, each begins a row and has a heading.
      columns: methods beside one another.
      title: of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: if there is nothing to draw or shapes do not fit.
    """
    _check_paths(paths, planes, arrived)
    members: dict[str, list[str]] = {}
    for method in paths:
        members.setdefault((groups or {}).get(method, ""), []).append(method)
    blocks = []
    for group, methods in members.items():
        for first in range(0, len(methods), columns):
            blocks.append((group if first == 0 else "", methods[first : first + columns]))
    columns = min(columns, max(len(methods) for _, methods in blocks))

    # Placed by hand, in inches: a layout engine takes seconds for a hundred panels.
    side, gap, name, heading, margin = 1.22, 0.05, 0.19, 0.24, 0.12
    headings = [heading if group else 0.0 for group, _ in blocks]
    block_height = name + len(planes) * (side + gap) + 0.04
    width = max(2 * margin + columns * (side + 0.06), 5.4)
    key_columns = 5 if width > 8.0 else 3
    key = 0.75 if key_columns == 5 else 0.95
    height = margin + key + len(blocks) * block_height + sum(headings) + (0.32 if title else 0.0)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    contours = [_contours(plane) for plane in planes]
    top = height - margin / 2
    if title:
        figure.text(0.5, (top - 0.06) / height, title, ha="center", va="top", fontsize=12)
        top -= 0.32
    for space, (group, methods) in zip(headings, blocks, strict=True):
        if group:
            figure.text(margin / width, (top - 0.06) / height, group, va="top", fontsize=10, fontweight="bold")
            top -= space
        for j, method in enumerate(methods):
            left = margin + j * (side + 0.06)
            for i, (plane, lines, points) in enumerate(zip(planes, contours, paths[method], strict=True)):
                bottom = top - name - (i + 1) * (side + gap) + gap
                axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
                ends = None if arrived is None else np.asarray(arrived[method], bool)
                _draw_plane(axes, plane, lines, named=j == 0)
                _draw_paths(axes, np.asarray(points, np.float64), ends)
                if i == 0:
                    count = "" if ends is None else f"  {int(ends.sum())}/{ends.size}"
                    color = "black" if ends is None else _GOOD if ends.all() else _BAD
                    note = (notes or {}).get(method, "")
                    axes.set_title(f"{method}{count}{note}", fontsize=7.5, color=color, pad=2.5)
        top -= block_height
    _draw_key(figure, planes, arrived is not None, key_columns)
    return figure


def _check_paths(paths: Mapping, planes: Sequence[Plane], arrived: Mapping | None) -> None:
    if not paths or not planes:
        raise ValueError(f"trajectories needs at least one method and one plane, got {len(paths)} and {len(planes)}")
    for method, of_planes in paths.items():
        shapes = [np.shape(points) for points in of_planes]
        if len(shapes) != len(planes) or any(len(shape) != 3 or shape[2] != 2 for shape in shapes):
            raise ValueError(f"Paths of '{method}' must be [S, n, 2] for each of {len(planes)} planes, got {shapes}")
        if arrived is not None and np.shape(arrived.get(method)) != shapes[0][:1]:
            raise ValueError(f"arrived['{method}'] must have {shapes[0][0]} entries, got {arrived.get(method)!r}")


def _contours(plane: Plane) -> list[np.ndarray]:
    """Contour lines of a plane, each [m, 2]: found once, drawn in every panel."""
    if plane.heights is None:
        return []
    from matplotlib.figure import Figure

    levels = Figure().add_subplot().contour(*plane.heights, levels=9)
    return [line for level in levels.allsegs for line in level]


def _draw_plane(axes: "Axes", plane: Plane, contours: Sequence[np.ndarray], *, named: bool) -> None:
    from matplotlib.collections import LineCollection

    axes.set(xlim=plane.xlim, ylim=plane.ylim, xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(linewidth=0.5, color=_GREY)
    axes.add_collection(LineCollection(contours, colors="#C9D3DC", linewidths=0.5, zorder=0), autolim=False)
    if plane.curve is not None:
        axes.plot(*np.asarray(plane.curve).T, color=_PALE, linewidth=3.2, solid_capstyle="round", zorder=1)
    if named:
        style = {"fontsize": 6, "color": "#555555", "transform": axes.transAxes}
        axes.text(0.97, 0.03, plane.names[0], ha="right", va="bottom", **style)
        axes.text(0.03, 0.97, plane.names[1], ha="left", va="top", **style)


def _draw_paths(axes: "Axes", points: np.ndarray, ends: np.ndarray | None) -> None:
    from matplotlib.collections import LineCollection

    kept = [path[np.isfinite(path).all(axis=1)] for path in points]
    # Pieces of one colour each, that share their end points: an eye sees no more, and thousands of segments are slow.
    pieces, time = [], []
    for path in kept:
        cuts = np.unique(np.linspace(0, len(path) - 1, _PIECES + 1).astype(int)) if len(path) else []
        pieces += [path[a : b + 1] for a, b in itertools.pairwise(cuts)]
        time += [(a + b) / 2 / (len(path) - 1) for a, b in itertools.pairwise(cuts)]
    style = {"linewidths": 1.3, "capstyle": "round", "zorder": 2}
    lines = LineCollection(pieces, cmap="plasma", array=np.array(time), **style)
    lines.set_clim(0.0, 1.15)  # the yellow end of the scale is too pale on white
    axes.add_collection(lines, autolim=False)
    for s, path in enumerate(kept):
        if not len(path):
            continue
        axes.plot(*path[0], "o", color="black", markersize=2.6, zorder=3)
        reached = ends is None or ends[s]
        style = {"marker": "o", "markersize": 3.8} if reached else {"marker": "X", "markersize": 4.6}
        color = _GREY if ends is None else _GOOD if reached else _BAD
        axes.plot(*path[-1], color=color, markeredgecolor="white", markeredgewidth=0.5, zorder=4, **style)


def _draw_key(figure: "Figure", planes: Sequence[Plane], with_ends: bool, columns: int) -> None:
    """What colours and marks mean, under the panels."""
    from matplotlib.lines import Line2D

    def mark(label, **style):
        return Line2D([], [], linestyle="", label=label, **style)

    handles = [
        Line2D([], [], color=_PALE, linewidth=3.2, label="Pareto front"),
        mark("start", marker="o", color="black", markersize=3.5),
        Line2D([], [], color="#B5367A", linewidth=1.5, label="path, from early (blue) to late (orange)"),
    ]
    if with_ends:
        handles.insert(2, mark("end on the front", marker="o", color=_GOOD, markersize=5))
        handles.insert(3, mark("end elsewhere", marker="X", color=_BAD, markersize=6))
    width, height = figure.get_size_inches()
    where = {"loc": "lower left", "bbox_to_anchor": (0.12 / width, 0.15 / height), "borderaxespad": 0.0}
    figure.legend(handles=handles, ncols=columns, fontsize=8, frameon=False, **where)
    labels = [plane.label for plane in planes if plane.label]
    if labels:
        places = {2: ["upper panels: ", "lower panels: "]}.get(len(labels), [""] * len(labels))
        text = "; ".join(place + label for place, label in zip(places, labels, strict=True))
        above = 0.46 if columns == 5 else 0.66
        figure.text(0.16 / width, above / height, text, fontsize=8, va="bottom")
