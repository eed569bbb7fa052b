"""Figures of dense vision tasks: predictions beside the truth, who uses which expert, what pruning and gates do.

As in `mtjax.plots`, functions take plain arrays and dicts and return a matplotlib `Figure` that belongs to nobody;
`mtjax.plots.save` writes it. The gain over single-task models is `mtjax.plots.delta_bars`.

>>> figure = expert_use_heatmap({"block 1": [[6, 2], [4, 4]]}, ["depth", "edge"])
>>> figure.axes[0].images[0].get_array().tolist()
[[0.75, 0.25], [0.5, 0.5]]

Letters: n images, H x W pixels, T tasks, E experts, N gates, S seeds.
"""

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from mtjax.dense_tasks import DenseTask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["class_colors", "expert_use_heatmap", "gate_figure", "prediction_grid", "pruning_curve"]

# Okabe and Ito's palette, as in `mtjax.plots`: told apart with any colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_UNLABELLED = (1.0, 1.0, 1.0)
# The first classes of a scene are its large surfaces (wall, floor, ceiling): pale. Objects are saturated.
_CLASSES = (
    "#B9C6D3", "#B08D6A", "#EFE6CF", "#4C72B0", "#DD8452", "#C44E52", "#8172B3", "#55A868", "#F2C14E", "#6B6B6B",
    "#DA8BC3", "#7A4B2A", "#37B6C4", "#A6D854", "#1B4F72", "#E74C3C", "#117A65", "#F8A5C2", "#9C640C", "#5B2C6F",
)  # fmt: skip


def class_colors(count: int) -> np.ndarray:
    """The colours f[count, 3] of classes 0, 1, ...: the same class has the same colour in every figure.

    >>> class_colors(40).shape, bool((class_colors(40)[:13] == class_colors(13)).all())
    ((40, 3), True)
    """
    table = [[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in _CLASSES[:count]]
    # Beyond the table: hues a golden angle apart, which never come close to one another soon.
    more = [colorsys.hsv_to_rgb(0.61803 * k % 1, 0.45 + 0.4 * (k % 2), 0.9 - 0.3 * (k % 3 == 2)) for k in range(count)]
    return np.array([*table, *more[len(table) :]])


def prediction_grid(
    images: ArrayLike,
    labels: Mapping[str, Any],
    predictions: Mapping[str, Mapping[str, ArrayLike]],
    tasks: Sequence[DenseTask],
    *,
    classes: Mapping[str, Sequence[str]] | None = None,
    title: str | None = None,
) -> "Figure":
    """Images in rows; for each task the truth and what every model predicts, side by side.

    Classes have fixed colours and a legend of those that occur; depths of a task share one scale and colour bar over
    truth, models and images; normals are RGB = (x, y, z) / 2 + 1/2; edges and saliency are grey, dark where present.
    Pixels without a label are white, in an edge map pale red.

    Args:
      images: [n, H, W, 3], u8 or floats from 0 to 1.
      labels: task -> labels [n, ...] as in a batch.
      predictions: model -> task -> output of the model f[n, H, W, channels]; a model may lack a task.
      tasks: dense tasks of an image (not classification), in the order drawn.
      classes: segmentation task -> class names; numbers by default.
      title: of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: if there is nothing to draw, or a task cannot be drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images) or not tasks:
        raise ValueError(f"prediction_grid needs images [n, H, W, 3] and tasks, got {images.shape} and {len(tasks)}")
    for task in tasks:
        if task.kind == "classification":
            raise ValueError(f"Task '{task.name}' is a classification; prediction_grid draws pixels and boxes")
        if task.name not in labels:
            raise ValueError(f"labels must hold the task '{task.name}', got {', '.join(labels)}")
    shown = [_task_columns(task, labels[task.name], predictions, len(images)) for task in tasks]
    # A narrow empty column before every task keeps the groups apart.
    widths = [1.0]
    for columns in shown:
        widths += [0.12, *[1.0] * len(columns)]
    side, (height, width) = (1.15 if sum(widths) > 9 else 1.45), images.shape[1:3]
    tall = side * height / width
    figure = Figure(figsize=(side * sum(widths) + 0.1, tall * len(images) + 1.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0.0, hspace=0.0)
    # The colour bars have a row of their own: a bar that takes its place from panels would move them out of line.
    grid = figure.add_gridspec(
        len(images) + 1, len(widths), width_ratios=widths, height_ratios=[*[1.0] * len(images), 0.07 / tall]
    )

    for row, image in enumerate(images):
        axes = _panel(figure, grid[row, 0], "image" if row == 0 else None)
        axes.imshow(image)
    handles, start = {}, 2
    for task, columns in zip(tasks, shown, strict=True):
        panels = []
        for offset, (name, values) in enumerate(columns.items()):
            # The task's name once, over the truth.
            heading = f"{task.name}\n{name}" if offset == 0 else name
            for row in range(len(images)):
                axes = _panel(figure, grid[row, start + offset], heading if row == 0 else None)
                panels.append(axes)
                _draw(axes, task, {k: v[row] for k, v in values.items()}, images[row], _limits(task, columns))
        if task.kind == "depth":
            below = figure.add_subplot(grid[-1, start : start + len(columns)])
            bar = figure.colorbar(panels[0].images[0], cax=below, orientation="horizontal")
            bar.ax.tick_params(labelsize=7)
            bar.set_label("depth in m" if task.name == "depth" else task.name, fontsize=7)
        if task.kind == "segmentation":
            present = sorted({int(c) for v in columns.values() for c in np.unique(v["map"]) if 0 <= c < task.channels})
            names, colors = (classes or {}).get(task.name), class_colors(task.channels)
            for c in present:
                label = str(c) if names is None else names[c]
                handles.setdefault((task.name, c), Patch(facecolor=colors[c], edgecolor="0.6", label=label))
        start += 1 + len(columns)
    if handles:
        fits = max(4, int(sum(widths) * side / 0.85))
        figure.legend(
            handles=list(handles.values()),
            loc="outside lower center",
            ncols=min(len(handles), fits),
            frameon=False,
            fontsize=7,
            handlelength=1.2,
            columnspacing=1.2,
        )
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _task_columns(
    task: DenseTask, label: Any, predictions: Mapping[str, Mapping[str, ArrayLike]], count: int
) -> dict[str, dict[str, np.ndarray]]:
    """Column name -> what is drawn there, arrays with n entries: 'map', or 'boxes' and 'classes'."""
    if task.kind == "detection":
        columns = {"truth": {"boxes": np.asarray(label["boxes"]), "classes": np.asarray(label["classes"])}}
    else:
        columns = {"truth": {"map": np.asarray(label)}}
    for model, outputs in predictions.items():
        if task.name not in outputs:
            continue
        predicted = task.predict(np.asarray(outputs[task.name]))
        if task.kind == "detection":
            sure = np.asarray(predicted["scores"]) > 0.3
            kept = np.where(sure, np.asarray(predicted["classes"]), -1)
            columns[model] = {"boxes": np.asarray(predicted["boxes"]), "classes": kept}
        else:
            columns[model] = {"map": np.asarray(predicted)}
    for name, values in columns.items():
        if any(len(v) < count for v in values.values()):
            raise ValueError(f"'{name}' of task '{task.name}' must hold {count} images")
    return columns


def _limits(task: DenseTask, columns: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[float, float]:
    """Lower and upper end of the colours of a depth task: those of the truth, so that a wild model shows as such."""
    if task.kind != "depth":
        return 0.0, 1.0
    truth = np.asarray(columns["truth"]["map"], float)
    if not np.isfinite(truth).any():
        return 0.0, 1.0
    return float(np.nanmin(truth)), float(np.nanmax(truth))


def _panel(figure: "Figure", place: Any, title: str | None) -> "Axes":
    axes = figure.add_subplot(place)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.4)
    if title:
        axes.set_title(title, fontsize=8)
    return axes


def _draw(
    axes: "Axes", task: DenseTask, values: Mapping[str, np.ndarray], image: np.ndarray, limits: tuple[float, float]
) -> None:
    """One image of one column."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    if task.kind == "detection":
        axes.imshow(image, alpha=0.75)
        colors = class_colors(task.channels - 4)
        for (top, left, bottom, right), c in zip(values["boxes"], values["classes"], strict=True):
            if c >= 0:
                corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
                axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colors[c], linewidth=1.4))
        return
    shown = values["map"]
    if task.kind == "segmentation":
        picture = np.full((*shown.shape, 3), _UNLABELLED)
        known = (shown >= 0) & (shown < task.channels)
        picture[known] = class_colors(task.channels)[shown[known].astype(int)]
        axes.imshow(picture, interpolation="nearest")
    elif task.kind == "normals":
        picture = np.clip(shown.astype(float) / 2 + 0.5, 0, 1)
        picture = np.where(np.isnan(picture).any(-1, keepdims=True), _UNLABELLED, picture)
        axes.imshow(picture, interpolation="nearest")
    elif task.kind == "depth":
        colors = colormaps["viridis_r"].with_extremes(bad=_UNLABELLED)
        depth = np.ma.masked_invalid(shown.astype(float))
        axes.imshow(depth, cmap=colors, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    else:
        # Unlabelled pixels get the colour "under" the scale; a grey of it would read as a weak edge.
        grey = shown.astype(float)
        if shown.dtype.kind in "iu":
            grey = np.where(shown == task.ignore, -1.0, grey)
        colors = colormaps["gray_r"].with_extremes(under="#F3D9C9")
        axes.imshow(grey, cmap=colors, vmin=0, vmax=1, interpolation="nearest")


def expert_use_heatmap(
    usage: Mapping[str, ArrayLike], tasks: Sequence[str], *, used: float = 0.05, title: str | None = None
) -> "Figure":
    """Which experts serve which task: a panel per layer, rows are tasks, columns experts.

    Args:
      usage: layer -> f[T, E], counts, shares or EMAs of them; rows are normalised to shares of the task.
      tasks: T names.
      used: share from which an expert counts as used; the number of such experts stands at the right of a row, and the
        other cells are crossed out.
      title: of the figure.

    Returns:
      The figure; all panels have one scale.

    Raises:
      ValueError: if there is no layer or a shape does not fit.
    """
    from matplotlib.figure import Figure

    if not usage:
        raise ValueError("expert_use_heatmap needs at least one layer, got none")
    shares = {layer: np.asarray(values, float) for layer, values in usage.items()}
    for layer, values in shares.items():
        if values.ndim != 2 or len(values) != len(tasks):
            raise ValueError(f"usage['{layer}'] must be [T, E] for the {len(tasks)} tasks, got {values.shape}")
    totals = {layer: values.sum(1, keepdims=True) for layer, values in shares.items()}
    shares = {layer: values / np.where(totals[layer] > 0, totals[layer], 1.0) for layer, values in shares.items()}
    widest = max(values.shape[1] for values in shares.values())
    width = 0.75 + 0.36 * widest
    columns = max(1, min(len(shares), int(14.5 // width)))
    rows = math.ceil(len(shares) / columns)
    left = 0.3 + 0.075 * max(map(len, tasks))
    figure = Figure(
        figsize=(left + columns * width + 0.9, rows * (0.85 + 0.36 * len(tasks)) + 0.3), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(shares) :]:
        axes.set_axis_off()
    top = max(float(values.max()) for values in shares.values()) or 1.0
    for position, (axes, (layer, values)) in enumerate(zip(panels, shares.items(), strict=False)):
        image = axes.imshow(values, cmap="Blues", vmin=0.0, vmax=top, aspect="auto")
        for t, e in np.ndindex(*values.shape):
            if values[t, e] < used:
                axes.plot(e, t, "x", color="0.75", markersize=4, markeredgewidth=0.7)
            elif values.size <= 160:
                color = "white" if values[t, e] > 0.6 * top else "black"
                axes.text(e, t, f"{100 * values[t, e]:.0f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_title(layer, fontsize=9)
        axes.set_xticks(range(values.shape[1]), range(values.shape[1]), fontsize=7)
        axes.set_yticks(range(len(tasks)), tasks if position % columns == 0 else [""] * len(tasks), fontsize=8)
        for t, row in enumerate(values):
            count = int((row >= used).sum())
            axes.annotate(
                str(count), (1.0, t), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", fontsize=7, color="0.35",
            )  # fmt: skip
        axes.tick_params(length=0)
        axes.set_xlabel("expert", fontsize=8)
    high = float(figure.get_figheight())
    bar = figure.colorbar(image, ax=list(panels[: len(shares)]), shrink=min(0.9, 2.2 / high), aspect=18, pad=0.04)
    bar.set_label("share of the task in %", fontsize=7)
    bar.set_ticks(ticks := [tick for tick in (0, 0.2, 0.4, 0.6, 0.8, 1.0) if tick <= top])
    bar.set_ticklabels([f"{100 * tick:.0f}" for tick in ticks], fontsize=7)
    note = f"cells: share of the task in %; x: below {100 * used:g} %; at the right: experts used"
    figure.supxlabel(note, fontsize=7, color="0.35")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def pruning_curve(
    points: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    xlabel: str = "expert weights removed, %",
    ylabel: str = "change of the metric, %",
    reference: float | None = 0.0,
    title: str | None = None,
) -> "Figure":
    """A metric against what was cut away, a line per arm: mean and standard error over seeds.

    Args:
      points: arm -> (x [n] or [S, n], y [S, n] or [n]). With x per seed (a threshold prunes differently in each) the
        points are drawn at the mean, with error bars both ways.
      xlabel, ylabel: of the axes.
      reference: a horizontal line, for example the unpruned model; None without.
      title: of the figure.

    Raises:
      ValueError: if there is no arm, or x and y differ in length.
    """
    from matplotlib.figure import Figure

    if not points:
        raise ValueError("pruning_curve needs at least one arm, got none")
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    if reference is not None:
        axes.axhline(reference, color="0.5", linewidth=0.8, linestyle="--", zorder=1)
    seeds = set()
    for k, (arm, pair) in enumerate(points.items()):
        x, y = (np.atleast_2d(np.asarray(values, float)) for values in pair)
        if x.shape[1] != y.shape[1] or len(x) not in (1, len(y)):
            raise ValueError(f"points['{arm}'] must be x [n] or [S, n] and y [S, n], got {x.shape} and {y.shape}")
        seeds.add(len(y))
        color, order = _COLORS[k % len(_COLORS)], np.argsort(x.mean(0))
        (x_mean, x_error), (y_mean, y_error) = (_mean_and_error(values[:, order]) for values in (x, y))
        axes.errorbar(
            x_mean,
            y_mean,
            xerr=x_error if len(x) > 1 else None,
            yerr=y_error,
            color=color,
            marker=_MARKERS[k % len(_MARKERS)],
            markersize=4.5,
            linewidth=1.5,
            elinewidth=0.9,
            capsize=2,
            label=arm,
            zorder=3,
        )
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(title or "", fontsize=10)
    over = " or ".join(map(str, sorted(seeds)))
    axes.legend(fontsize=8, frameon=False, title=f"mean ± s.e. over {over} seeds", title_fontsize=7)
    return figure


def _mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the first axis; an error of 0 for one row."""
    if len(values) < 2:
        return values[0], np.zeros_like(values[0])
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))


def gate_figure(gates: Mapping[str, ArrayLike], tasks: Sequence[str], *, title: str | None = None) -> "Figure":
    """Gates that depend on the image: per layer the mean and spread of each gate, and below the entropy of each image.

    Args:
      gates: layer -> f[T, n, N], rows that sum to one, for example `GateStats.gates` of TaskExpert. A layer with one
        gate more than the smallest has the memory's last.
      tasks: T names.
      title: of the figure.

    Returns:
      The figure. Above: mean over images, in % and in colour, with the standard deviation over images under it; no
      spread means that the gate is a constant of the task. Below: entropies in nats of all images, with the line at
      log N that a uniform gate would reach.

    Raises:
      ValueError: if there is no layer or a shape does not fit.
    """
    from matplotlib.figure import Figure

    if not gates:
        raise ValueError("gate_figure needs at least one layer, got none")
    arrays = {layer: np.asarray(values, float) for layer, values in gates.items()}
    for layer, values in arrays.items():
        if values.ndim != 3 or len(values) != len(tasks):
            raise ValueError(f"gates['{layer}'] must be [T, n, N] for the {len(tasks)} tasks, got {values.shape}")
    fewest = min(values.shape[-1] for values in arrays.values())
    widest = max(values.shape[-1] for values in arrays.values())
    left = 0.3 + 0.075 * max(map(len, tasks))
    tall = 0.45 + 0.42 * len(tasks)
    figure = Figure(figsize=(left + len(arrays) * (0.35 + 0.48 * widest) + 0.6, tall + 2.2), layout="constrained")
    panels = figure.subplots(2, len(arrays), squeeze=False, height_ratios=(tall, 1.6))
    top = max(float(values.mean(1).max()) for values in arrays.values())
    for k, ((layer, values), (above, below)) in enumerate(zip(arrays.items(), panels.T, strict=True)):
        mean, spread = values.mean(1), values.std(1)
        image = above.imshow(mean, cmap="Blues", vmin=0.0, vmax=top, aspect="auto")
        for t, e in np.ndindex(*mean.shape):
            color = "white" if mean[t, e] > 0.6 * top else "black"
            label = f"{100 * mean[t, e]:.0f}\n±{100 * spread[t, e]:.0f}"
            above.text(e, t, label, ha="center", va="center", fontsize=6.5, color=color, linespacing=0.95)
        count = mean.shape[1]
        experts = [str(e) for e in range(min(count, fewest))] + ["M"] * (count - fewest)
        above.set_xticks(range(count), experts, fontsize=7)
        above.set_yticks(range(len(tasks)), tasks if k == 0 else [""] * len(tasks), fontsize=8)
        above.set_title(layer, fontsize=9)
        above.set_xlabel("expert" + (" (M: memory)" if count > fewest else ""), fontsize=8)
        above.tick_params(length=0)
        entropy = -(values * np.log(np.maximum(values, 1e-30))).sum(-1)
        below.boxplot(
            list(entropy), orientation="horizontal", widths=0.6, whis=(0, 100), patch_artist=True,
            boxprops={"facecolor": "#BFD7EA", "linewidth": 0.8}, medianprops={"color": _COLORS[1], "linewidth": 1.4},
            whiskerprops={"linewidth": 0.8}, capprops={"linewidth": 0.8},
        )  # fmt: skip
        below.axvline(math.log(count), color="0.4", linestyle="--", linewidth=0.9)
        below.set_xlim(0, 1.06 * math.log(widest))
        below.set_yticks(range(1, len(tasks) + 1), tasks if k == 0 else [""] * len(tasks), fontsize=8)
        below.invert_yaxis()
        below.set_xlabel(f"entropy in nats (line: log {count})", fontsize=8)
        below.tick_params(axis="x", labelsize=7)
        below.grid(axis="x", alpha=0.3)
    bar = figure.colorbar(image, ax=list(panels[0]), shrink=0.9, aspect=14, pad=0.02)
    bar.set_label("mean gate", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    note = "above: mean gate in %, ± its standard deviation over images; below: entropy of every image's gate"
    figure.supxlabel(note, fontsize=7, color="0.35")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure
