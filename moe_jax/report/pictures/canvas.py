"""What all pictures share: inks, colours, panels and labels.

Figures have transparent backgrounds and few named inks, so that the page can swap these for its own light and dark
ones (`INKS`). Colours are Okabe and Ito's, which colour-blind readers can tell apart; shapes or labels repeat what
colour says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, MUTED, GRID = "#1f2733", "#66707d", "#dde1e6"
PAPER = "#fdfdfc"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
# name of the CSS property -> the colour that stands for it in a figure
INKS = {"ink": INK, "muted": MUTED, "grid": GRID, "paper": PAPER, "blue": BLUE, "red": RED, "sky": SKY}
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "osD^vP"
# Its ends differ from BLUE and RED, which the page replaces by its theme: a scale must not change in one place only.
UNDER_OVER = LinearSegmentedColormap.from_list("under_over", ["#006aa8", "#8fc1de", "#eef0f2", "#f0b48c", "#cc5700"])
# matplotlib types its settings by a literal of all names, which no plain dict matches.
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "hatch.linewidth": 0.7,
}
WIDTH = 8.6  # inches


def single(height: float) -> tuple[Figure, Axes]:
    """Makes a full-width figure with one panel."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def small_multiples(
    num_panels: int, columns: int, row_height: float, *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Makes small multiples, filled row by row, without empty frames."""
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(WIDTH, 0.3 + row_height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axes in panels[num_panels:]:
        axes.set_axis_off()
    return figure, panels[:num_panels]


def label_outer(panels: Sequence[Axes], columns: int, xlabel: str, ylabel: str) -> None:
    """Labels the left column and the lowest panel of each column."""
    for index, axes in enumerate(panels):
        if index % columns == 0:
            axes.set_ylabel(ylabel)
        if index + columns >= len(panels):
            axes.set_xlabel(xlabel)


def add_key(figure: Figure, entries: Sequence[tuple[str, str]]) -> None:
    """Adds a line of coloured squares with their meaning above the panels."""
    handles = [Patch(color=colour, label=label) for colour, label in entries]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(entries),
        frameon=False,
        handlelength=0.9,
        handleheight=0.9,
        handletextpad=0.5,
    )


def label_right(figure: Figure, axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes labels to the right of the axes at their heights, moved apart where they would overlap."""
    figure.draw_without_rendering()
    inches = axes.get_window_extent().height / figure.dpi
    gap = 0.155 / inches
    heights = axes.transData.transform([(axes.get_xlim()[1], value) for value, _, _ in labels])
    heights = axes.transAxes.inverted().transform(heights)[:, 1]
    order = np.argsort(heights)
    placed = heights[order].copy()
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap)
    overflow = placed[-1] - 1.0
    if overflow > 0:
        placed[-1] -= overflow
        for index in range(len(placed) - 2, -1, -1):
            placed[index] = min(placed[index], placed[index + 1] - gap)
    for index, place in zip(order, placed, strict=True):
        _, text, colour = labels[index]
        axes.annotate(
            text,
            (1.0, heights[index]),
            (1.02, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            va="center",
            ha="left",
            arrowprops={"arrowstyle": "-", "color": GRID, "lw": 0.7, "shrinkA": 1, "shrinkB": 0},
        )


def label_log_axis(axis: Axis, subs: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Labels a log axis with plain decimals at some places of a decade, so that a part of one has labels too."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
