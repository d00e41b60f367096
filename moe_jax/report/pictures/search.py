"""Pictures of the search: progress, fronts, methods side by side, and the topologies found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike

from moe_jax.report.pictures.canvas import (
    BLUE,
    CYCLE,
    GRID,
    INK,
    MARKERS,
    MUTED,
    STYLE,
    WIDTH,
    label_log_axis,
    label_right,
    single,
    small_multiples,
)


def plot_search_curves(curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, emphasised: Sequence[str] = ()) -> Figure:
    """Draws the best value found against evaluations: median over seeds, and the range of seeds as a band.

    Args:
      curves: name -> (`[N]` evaluations, `[S, N]` best so far, lower is better).
      emphasised: names drawn in colour; the others are grey.

    Returns:
      The figure.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = single(3.6)
        labels, last = [], 1.0
        for index, (name, (evaluations, best)) in enumerate(curves.items()):
            x, y = np.asarray(evaluations, float), np.atleast_2d(np.asarray(best, float))
            is_strong = name in emphasised or not emphasised
            colour = CYCLE[index % 6] if is_strong else MUTED
            line = (0, ()) if is_strong else [(0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2))][index % 3]
            middle = np.median(y, axis=0)
            axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.13, lw=0, step="post")
            axes.plot(x, middle, color=colour, lw=1.9 if is_strong else 1.1, ls=line, drawstyle="steps-post")
            labels.append((middle[-1], name, colour))
            last = max(last, x[-1])
        axes.set(xlabel="evaluations", ylabel="best KL to the full model, nats per byte", xscale="log", yscale="log")
        axes.set_xlim(right=last)
        label_log_axis(axes.yaxis)
        label_log_axis(axes.xaxis)
        label_right(figure, axes, labels)
    return figure


def plot_front(
    fronts: Mapping[str, ArrayLike],
    *,
    objectives: Sequence[str],
    full_model: Sequence[float] | None = None,
    reference_point: Sequence[float] | None = None,
    emphasised: Sequence[str] = (),
) -> Figure:
    """Draws points in three minimised objectives as two planes, the first objective upwards.

    Args:
      fronts: name -> `[N, 3]` points.
      objectives: names of the three with units.
      full_model: the untouched model's point, marked with a star.
      reference_point: the point from which hypervolume is measured.
      emphasised: names drawn in colour, with the step line of their non-dominated points; the others are grey.

    Returns:
      The figure.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        strong = list(emphasised) or list(fronts)
        legend = []
        for index, (name, points) in enumerate(fronts.items()):
            points = np.atleast_2d(np.asarray(points, float))
            is_strong = name in strong
            colour, marker = (CYCLE[strong.index(name) % 6] if is_strong else MUTED), MARKERS[index % 6]
            for axes, column in zip(panels, (1, 2), strict=True):
                face = (
                    {"color": colour, "lw": 0} if is_strong else {"facecolors": "none", "edgecolors": colour, "lw": 0.9}
                )
                axes.scatter(points[:, column], points[:, 0], s=24, marker=marker, zorder=3, alpha=0.9, **face)
                if is_strong and column == 1:
                    edge = _lower_left(points[:, [column, 0]])
                    axes.step(edge[:, 0], edge[:, 1], where="post", color=colour, lw=1.1, alpha=0.6)
            legend.append((colour, name, marker, is_strong))
        for axes, column in zip(panels, (1, 2), strict=True):
            if full_model is not None:
                axes.scatter(full_model[column], full_model[0], s=130, marker="*", color=INK, zorder=4)
                place = {"textcoords": "offset points", "ha": "right", "va": "top"}
                axes.annotate("full model", (full_model[column], full_model[0]), (6, -6), **place)
            if reference_point is not None:
                axes.scatter(reference_point[column], reference_point[0], s=36, marker="x", color=INK, lw=1.2)
                axes.annotate(
                    "reference",
                    (reference_point[column], reference_point[0]),
                    (-7, -3),
                    ha="right",
                    va="top",
                    textcoords="offset points",
                    color=MUTED,
                )
            axes.set_xlabel(objectives[column])
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(color=GRID, lw=0.6)
            axes.set_axisbelow(True)
            axes.margins(0.09)
        panels[0].set_ylabel(objectives[0])
        handles = [
            Line2D([], [], ls="", marker=m, color=c, mfc=c if f else "none", ms=5, label=n) for c, n, m, f in legend
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, handletextpad=0.2)
    return figure


def plot_comparison(
    names: Sequence[str],
    estimates: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    xlabel: str,
    values: Sequence[ArrayLike] | None = None,
    emphasised: Sequence[str] = (),
    zero_label: str | None = None,
) -> Figure:
    """Draws one row per method: estimate, interval, and single seeds.

    Args:
      names: `[N]` methods, drawn from top to bottom.
      estimates: `[N]`.
      low: `[N]` lower ends; NaN where there is no interval.
      high: `[N]` upper ends.
      xlabel: quantity with its unit.
      values: `[N]` arrays with one number per seed.
      emphasised: names drawn in colour.
      zero_label: label of a line at 0; None draws no line.

    Returns:
      The figure.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = single(0.75 + 0.26 * len(names))
        rows = np.arange(len(names))
        colours = [BLUE if name in emphasised else MUTED for name in names]
        if values is not None:
            for row, seeds in enumerate(values):
                seeds = np.asarray(seeds, float)
                axes.plot(seeds, np.full(len(seeds), row), "|", color=colours[row], ms=7, mew=1, alpha=0.6)
        axes.hlines(rows, low, high, colors=colours, lw=2.2)
        axes.scatter(estimates, rows, c=colours, s=30, zorder=3)
        if zero_label is not None:
            axes.axvline(0, color=INK, lw=0.8)
            axes.text(
                0, 1.0, f" {zero_label}", ha="left", va="bottom", color=MUTED, transform=axes.get_xaxis_transform()
            )
        axes.set_yticks(rows, names)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.06)
        axes.set_xlabel(xlabel)
    return figure


def plot_masks(names: Sequence[str], keep: ArrayLike, num_choices: ArrayLike) -> Figure:
    """Draws which experts each topology keeps: layers down, experts across, with each layer's count and top-k.

    Args:
      names: `[M]` topologies.
      keep: `[M, L, E]` bool.
      num_choices: `[M, L]` experts a token may use.

    Returns:
      The figure.
    """
    keep, num_choices = np.asarray(keep, bool), np.asarray(num_choices)
    num_topologies, num_layers, num_experts = keep.shape
    columns = 1 if num_experts > 24 else min(num_topologies, 2)
    with matplotlib.rc_context(STYLE):
        cell = WIDTH / columns / (1.25 * num_experts + 1.6)
        figure, panels = small_multiples(num_topologies, columns, 0.42 + cell * (num_layers + 0.2))
        for index, axes in enumerate(panels):
            for layer in range(num_layers):
                for expert in range(num_experts):
                    is_kept = keep[index, layer, expert]
                    axes.add_patch(
                        FancyBboxPatch(
                            (expert - 0.34, layer - 0.34),
                            0.68,
                            0.68,
                            boxstyle="round,pad=0,rounding_size=0.14",
                            fc=BLUE if is_kept else "none",
                            ec=BLUE if is_kept else GRID,
                            lw=0.8,
                        )
                    )
                axes.text(
                    num_experts + 0.1,
                    layer,
                    f"{keep[index, layer].sum()} · top-{num_choices[index, layer]}",
                    va="center",
                    color=MUTED,
                    size=7.5,
                )
            axes.set(xlim=(-0.7, num_experts + 0.22 * num_experts), ylim=(num_layers - 0.4, -0.6), aspect="equal")
            axes.set_yticks(range(num_layers), [f"L{layer}" for layer in range(num_layers)])
            axes.set_xticks([])
            axes.tick_params(length=0)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.set_title(names[index])
    return figure


def _lower_left(points: np.ndarray) -> np.ndarray:
    """Points of `[N, 2]` that no other beats in both coordinates, from left to right."""
    points = points[np.lexsort((points[:, 1], points[:, 0]))]
    return points[points[:, 1] <= np.minimum.accumulate(points[:, 1])]
