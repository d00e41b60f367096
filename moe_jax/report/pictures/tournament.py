"""The ranking of a tournament."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from moe_jax.report.pictures.canvas import BLUE, GRID, INK, MUTED, RED, SKY, STYLE, single


def plot_ranking(names: Sequence[str], bits_per_byte: Sequence[ArrayLike], *, reference: str) -> Figure:
    """Draws every contestant's seeds and their mean, best above.

    Args:
      names: `[N]` contestants in order.
      bits_per_byte: `[N]` arrays, one number per seed.
      reference: the contestant whose mean is drawn through.

    Returns:
      The figure.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = single(0.9 + 0.24 * len(names))
        seeds = [np.asarray(values, float) for values in bits_per_byte]
        means = [values.mean() for values in seeds]
        axes.axvline(means[names.index(reference)], color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        for row, (name, values) in enumerate(zip(names, seeds, strict=True)):
            colour = RED if name == reference else BLUE
            axes.scatter(values, np.full(len(values), row), color=SKY, s=16, zorder=2)
            axes.scatter(means[row], row, color=colour, s=34, marker="D", zorder=3)
            axes.annotate(f"{means[row]:.3f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", color=INK)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"test bits per byte; dots: seeds, diamonds: means, dashed: {reference}")
    return figure
