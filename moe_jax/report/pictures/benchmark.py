"""Ratios of a benchmark's rows to their baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from moe_jax.report.pictures.canvas import CYCLE, GRID, INK, MARKERS, MUTED, STYLE, add_key, small_multiples


def plot_ratios(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the ratio of every backend to its baseline: a panel for each shape, dtype and pass.

    Args:
      rows: with `shape`, `dtype`, `pass`, `distribution`, `backend`, `baseline`, `ratio` and `ratio_iqr`; rows without
        a ratio, or against another baseline than `dense_ffn`, are left out.

    Returns:
      The figure; ratios are on a logarithmic scale, 1 is the baseline.
    """
    rows = [row for row in rows if "ratio" in row and row["baseline"] == "dense_ffn"]
    panels = list(dict.fromkeys((row["shape"], row["dtype"], row["pass"]) for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure, all_axes = small_multiples(len(panels), 2, 1.7)
        for axes, panel in zip(all_axes, panels, strict=True):
            mine = [row for row in rows if (row["shape"], row["dtype"], row["pass"]) == panel]
            routings = list(dict.fromkeys(row["distribution"] for row in mine))
            axes.axvline(1.0, color=MUTED, lw=1, ls=(0, (4, 3)))
            for row in mine:
                index = backends.index(row["backend"])
                height = routings.index(row["distribution"]) + 0.14 * (index - (len(backends) - 1) / 2)
                error = row["ratio_iqr"] / 2
                axes.errorbar(
                    row["ratio"], height, xerr=error, color=CYCLE[index], marker=MARKERS[index], ms=4, lw=1, zorder=3
                )
            axes.set_xscale("log")
            ticks = [tick for tick in (0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if _is_within(tick, mine)]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_yticks(range(len(routings)), routings)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.set_ylim(len(routings) - 0.5, -0.5)
            axes.grid(axis="x", color=GRID, lw=0.6)
            axes.set_axisbelow(True)
            shape, dtype, name = panel
            axes.set_title(f"{shape}, {dtype}, {name.replace('_', ' + ')}")
        add_key(figure, [(CYCLE[index], backend) for index, backend in enumerate(backends)])
    return figure


def _is_within(tick: float, rows: Sequence[Mapping[str, Any]]) -> bool:
    ratios = [row["ratio"] for row in rows]
    return min(0.9, min(ratios) * 0.9) <= tick <= max(1.1, max(ratios) * 1.1)
