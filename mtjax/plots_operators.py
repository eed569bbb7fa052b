"""Figures of operator learning: fields beside their predictions, errors against the number of examples.

Letters: H x W grid, S seeds.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtjax.plots_objectives import save_small

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["compare_fields", "error_curves", "save_small"]

_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def compare_fields(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    extent: Sequence[float] = (0.0, 1.0, 0.0, 1.0),
    xlabel: str = "x",
    ylabel: str = "y",
    title: str | None = None,
) -> "Figure":
    """Truth, prediction and error, a row for each name.

    Args:
      panels: name -> (truth f[H, W], prediction f[H, W]); NaN where there is no domain. Row 0 is drawn at the bottom.
      extent: left, right, bottom, top of the coordinates.
      xlabel, ylabel: of the axes.
      title: of the figure.

    Returns:
      The figure; truth and prediction share a scale, the error has its own, symmetric about zero.

    Raises:
      ValueError: if a pair differs in shape, or there is none.
    """
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("panels must hold at least one pair of fields")
    figure = Figure(figsize=(8.4, 0.7 + 2.1 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 3, squeeze=False, sharex=True, sharey=True)
    for line, (name, pair) in zip(grid, panels.items(), strict=True):
        truth, predicted = (np.asarray(field, float) for field in pair)
        if truth.ndim != 2 or truth.shape != predicted.shape:
            raise ValueError(f"panels['{name}'] must be two fields [H, W], got {truth.shape} and {predicted.shape}")
        error = np.where(np.isnan(truth), np.nan, predicted - truth)
        relative = np.sqrt(np.nansum(error**2) / np.nansum(truth**2))
        low, high, off = np.nanmin(truth), np.nanmax(truth), np.nanmax(np.abs(error))
        shown = (
            (truth, f"{name}: truth", {"vmin": low, "vmax": high, "cmap": "viridis"}),
            (
                np.where(np.isnan(truth), np.nan, predicted),
                "prediction",
                {"vmin": low, "vmax": high, "cmap": "viridis"},
            ),
            (error, f"error ({100 * relative:.1f} %)", {"vmin": -off, "vmax": off, "cmap": "RdBu_r"}),
        )
        for axes, (values, label, colors) in zip(line, shown, strict=True):
            image = axes.imshow(values, origin="lower", extent=extent, aspect="auto", **colors)
            axes.set_title(label, fontsize=9)
            axes.tick_params(labelsize=7)
            figure.colorbar(image, ax=axes, shrink=0.85).ax.tick_params(labelsize=7)
        line[0].set_ylabel(ylabel, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def error_curves(
    curves: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    *,
    xlabel: str = "examples",
    ylabel: str = "relative L2 error, %",
    title: str | None = None,
) -> "Figure":
    """Error against the number of examples, a panel for each target, a line for each way: mean and all seeds.

    Args:
      curves: target -> way -> (number of examples [n], error f[n, S]); zero examples are drawn at the left edge.
      xlabel, ylabel: of the axes.
      title: of the figure.

    Raises:
      ValueError: if there is no target.
    """
    from matplotlib.figure import Figure

    if not curves:
        raise ValueError("curves must hold at least one target")
    figure = Figure(figsize=(0.8 + 3.1 * len(curves), 3.4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (target, ways) in zip(panels, curves.items(), strict=True):
        for (way, pair), color in zip(ways.items(), _COLORS, strict=False):
            count, errors = (np.asarray(values, float) for values in pair)
            # A symmetric logarithm: no example is a place on the axis.
            axes.plot(count, errors.mean(1), marker="o", markersize=4, color=color, label=way)
            axes.plot(np.repeat(count, errors.shape[1]), errors.ravel(), ".", color=color, alpha=0.4, markersize=3)
        every = sorted({int(n) for count, _ in ways.values() for n in count})
        axes.set_xscale("symlog", linthresh=max(1, min((n for n in every if n), default=1)))
        axes.set_yscale("log")
        axes.set_xticks(every, [str(n) for n in every])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        ticks = [tick for tick in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200) if low <= tick <= high]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.grid(alpha=0.3)
        axes.set_title(target, fontsize=9)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel(ylabel, fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure
