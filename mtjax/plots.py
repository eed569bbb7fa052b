"""Figures of an experiment: gain over the baseline, curves per task, gradient conflict, expert use.

Every function takes plain arrays and dicts and returns a matplotlib `Figure` that belongs to nobody: no pyplot, no
global style, no window, hence the same under any backend. `save` writes it.

>>> figure = expert_use({"MMoE": [[0.7, 0.3], [0.4, 0.6]]}, ["price", "churn"])
>>> [axes.get_title() for axes in figure.axes][:1]
['MMoE']

Letters: K tasks, S seeds, E experts, n points in time.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from mtjax.delta import DeltaM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito's palette: told apart with any colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_STYLES = ("-", "--", ":", "-.")


def save(figure: "Figure", path: str | os.PathLike, *, dpi: int = 150) -> Path:
    """Writes the figure; the suffix says the format (png, pdf, svg). The folder is made if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight", facecolor="white")
    return path


def delta_bars(gains: Mapping[str, DeltaM], *, title: str | None = None) -> "Figure":
    """Multitask gain of every model: a bar with its standard error, and a point for each task.

    Args:
      gains: model -> gain, as `delta_table` returns them; the first model is on top.
      title: for example what the baseline is.

    Returns:
      The figure.

    Raises:
      ValueError: if there is no model.
    """
    _expect(bool(gains), "delta_bars needs at least one model, got none")
    figure = _figure(7.2, 1.6 + 0.45 * len(gains))
    axes = figure.subplots()
    names = list(gains)
    y = np.arange(len(names))
    # An infinite gain (a baseline of exactly 0) has no place on an axis and is left out.
    mean = _finite([gains[name].mean for name in names])
    stderr = np.nan_to_num(_finite([gains[name].stderr for name in names]))
    colors = [_COLORS[2] if m >= 0 else _COLORS[1] for m in mean]
    axes.barh(y, mean, color=colors, alpha=0.45, height=0.7, zorder=1)
    axes.errorbar(mean, y, xerr=stderr, fmt="none", ecolor="black", elinewidth=1.2, capsize=3, zorder=3)
    tasks = list(dict.fromkeys(task for gain in gains.values() for task in gain.per_task))
    # Tasks are spread over the height of the bar, so that points of equal gain stay visible.
    spread = np.linspace(-0.22, 0.22, len(tasks)) if len(tasks) > 1 else np.zeros(1)
    for k, task in enumerate(tasks):
        values = _finite([gains[name].per_task.get(task, (math.nan,))[0] for name in names])
        color, marker = _COLORS[k % len(_COLORS)], "os^Dv"[k // len(_COLORS) % 5]
        axes.scatter(values, y + spread[k], s=18, color=color, marker=marker, edgecolors="white", linewidths=0.4)
        axes.collections[-1].set(label=task, zorder=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(y, names)
    axes.invert_yaxis()
    counts = sorted({gain.n for gain in gains.values()})
    axes.set_xlabel("Δm in %, positive is better")
    axes.grid(axis="x", alpha=0.3)
    if title:
        axes.set_title(title)
    seeds = " or ".join(map(str, counts))
    _legend_below(figure, axes, columns=4, title=f"bar: mean ± s.e. over {seeds} seeds; points: tasks")
    return figure


def task_curves(
    history: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
    *,
    metrics: Mapping[str, str] | None = None,
    xlabel: str = "step",
    title: str | None = None,
) -> "Figure":
    """A panel per task with a curve per model: the mean over seeds and a band of one standard error.

    Args:
      history: model -> task -> (steps [n], values [S, n] or [n]). NaN values leave gaps.
      metrics: task -> name of what is drawn, for the axis.
      xlabel: unit of the steps.
      title: of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: if there is nothing to draw, or steps and values differ in length.
    """
    tasks = list(dict.fromkeys(task for of_model in history.values() for task in of_model))
    _expect(bool(tasks), "task_curves needs at least one model with one task, got none")
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = _figure(3.6 * columns + 0.4, 2.7 * rows + 0.9)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    for panel, task in zip(panels, tasks, strict=False):
        panel.set_title(task, fontsize=10)
        panel.set_xlabel(xlabel)
        panel.set_ylabel((metrics or {}).get(task, ""))
        panel.grid(alpha=0.3)
        for m, (model, of_model) in enumerate(history.items()):
            if task not in of_model:
                continue
            steps, values = (np.asarray(x, np.float64) for x in of_model[task])
            values = np.atleast_2d(values)
            _expect(
                steps.ndim == 1 and values.ndim == 2 and values.shape[1] == steps.size,
                f"History of model '{model}', task '{task}' needs steps [n] and values [S, n], got shapes "
                f"{steps.shape} and {values.shape}",
            )
            color, style = _COLORS[m % len(_COLORS)], _STYLES[m // len(_COLORS) % len(_STYLES)]
            mean = values.mean(axis=0)
            panel.plot(steps, mean, style, color=color, linewidth=1.6, label=model)
            if len(values) > 1:
                stderr = values.std(axis=0, ddof=1) / math.sqrt(len(values))
                panel.fill_between(steps, mean - stderr, mean + stderr, color=color, alpha=0.2, linewidth=0)
    if title:
        figure.suptitle(title)
    _legend_below(figure, *panels, columns=4)
    return figure


def conflict_heatmap_over_time(
    steps: ArrayLike, cosine: ArrayLike, tasks: Sequence[str], *, title: str | None = None
) -> "Figure":
    """Cosines between per-task gradients: every pair over time, and the last matrix.

    Args:
      steps: [n], increasing.
      cosine: [n, K, K], for example stacked `mtjax.conflict(...).cosine`.
      tasks: K names.
      title: of the figure.

    Returns:
      The figure; red is conflict (negative cosine), blue is agreement.

    Raises:
      ValueError: if the shapes do not fit, or there are fewer than two tasks.
    """
    steps, cosine = np.asarray(steps, np.float64), np.asarray(cosine, np.float64)
    num_tasks = len(tasks)
    _expect(
        num_tasks > 1 and steps.ndim == 1 and steps.size > 0 and cosine.shape == (steps.size, num_tasks, num_tasks),
        f"conflict_heatmap_over_time needs steps [n], cosine [n, K, K] and K >= 2 task names, got shapes "
        f"{steps.shape} and {cosine.shape} and {num_tasks} names",
    )
    left, right = np.triu_indices(num_tasks, 1)
    pairs = [f"{tasks[i]} / {tasks[j]}" for i, j in zip(left, right, strict=True)]
    side = 1.6 + 0.55 * num_tasks
    figure = _figure(5.6 + side + 0.09 * max(map(len, pairs)), max(1.4 + 0.3 * len(pairs), side))
    over_time, final = figure.subplots(1, 2, width_ratios=(5.0, side))
    # Each column reaches half way to its neighbours, so that uneven steps keep their place in time.
    middle = (steps[1:] + steps[:-1]) / 2
    first, last = (middle[0] - steps[0], steps[-1] - middle[-1]) if steps.size > 1 else (0.5, 0.5)
    edges = np.concatenate([[steps[0] - first], middle, [steps[-1] + last]])
    scale = {"cmap": "RdBu", "vmin": -1.0, "vmax": 1.0}
    over_time.pcolormesh(edges, np.arange(len(pairs) + 1) - 0.5, cosine[:, left, right].T, **scale)
    over_time.set_yticks(range(len(pairs)), pairs, fontsize=8)
    over_time.invert_yaxis()
    over_time.set_xlabel("step")
    over_time.set_title("cosine of task gradients over time", fontsize=10)
    image = _heatmap(final, cosine[-1], tasks, tasks, **scale)
    final.set_title(f"at step {steps[-1]:g}", fontsize=10)
    figure.colorbar(image, ax=final, shrink=0.8, label="cosine")
    if title:
        figure.suptitle(title)
    return figure


def expert_use(
    importance: Mapping[str, ArrayLike],
    tasks: Sequence[str],
    *,
    experts: Mapping[str, Sequence[str]] | None = None,
    title: str | None = None,
) -> "Figure":
    """How much each task uses each expert, one heatmap per model or level.

    Args:
      importance: panel -> [K, E] mean gate of task k on expert e; panels may differ in E. A further row, such as the
        shared stream of PLE, is named 'shared'.
      tasks: K names.
      experts: panel -> E names; numbers by default.
      title: of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: if there is no panel or the names do not fit.
    """
    _expect(bool(importance), "expert_use needs at least one panel, got none")
    arrays = {panel: np.asarray(values, np.float64) for panel, values in importance.items()}
    labels = {}
    for panel, values in arrays.items():
        _expect(
            values.ndim == 2 and values.shape[0] in (len(tasks), len(tasks) + 1),
            f"Importance of '{panel}' must have shape [K, E] for the {len(tasks)} tasks, got {values.shape}",
        )
        labels[panel] = list((experts or {}).get(panel, map(str, range(values.shape[1]))))
        _expect(
            len(labels[panel]) == values.shape[1],
            f"Panel '{panel}' has {values.shape[1]} experts but {len(labels[panel])} names",
        )
    widest = max(values.shape[1] for values in arrays.values())
    tallest = max(values.shape[0] for values in arrays.values())
    width = 1.9 + 0.45 * widest
    columns = max(1, min(3, len(arrays), int(14 // width)))
    rows = math.ceil(len(arrays) / columns)
    figure = _figure(columns * width + 0.8, rows * (1.5 + 0.4 * tallest) + 0.3)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(arrays) :]:
        panel.set_axis_off()
    used = panels[: len(arrays)]
    largest = max(float(np.nanmax(values)) for values in arrays.values()) or 1.0
    for axes, (panel, values) in zip(used, arrays.items(), strict=True):
        names = [*tasks, "shared"][: values.shape[0]]
        image = _heatmap(axes, values, names, labels[panel], cmap="Blues", vmin=0.0, vmax=largest)
        axes.set_title(panel, fontsize=10)
        axes.set_xlabel("expert")
    figure.colorbar(image, ax=list(used), shrink=0.8, aspect=30, label="mean gate")
    if title:
        figure.suptitle(title)
    return figure


def _finite(values: Sequence[float]) -> np.ndarray:
    """Infinite values become NaN, which matplotlib leaves out."""
    array = np.asarray(values, np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure


def _legend_below(figure: "Figure", *panels: "Axes", columns: int, title: str | None = None) -> None:
    """One legend for all panels, under them."""
    entries = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        count = min(columns, len(entries))
        where = {"loc": "outside lower center", "ncols": count, "frameon": False}
        figure.legend(entries.values(), entries.keys(), title=title, fontsize=8, title_fontsize=8, **where)


def _heatmap(axes: "Axes", values: np.ndarray, rows: Sequence[str], columns: Sequence[str], **scale) -> "AxesImage":
    """A matrix with names on both sides, and the numbers in the cells while they can be read."""
    image = axes.imshow(values, aspect="auto", **scale)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    turned = max(map(len, columns)) > 3
    axes.set_xticks(
        range(len(columns)), columns, fontsize=8, rotation=40 if turned else 0, ha="right" if turned else "center"
    )
    if values.size <= 144:
        for i, j in np.ndindex(*values.shape):
            # White on dark cells: the ends of a diverging scale, the top of a sequential one.
            dark = abs(values[i, j]) > 0.65 * scale["vmax"]
            axes.text(
                j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
    return image


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
