"""How balance rules converge and oscillate: MaxVio over time, and speed against quiet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moe_jax.report.pictures.canvas import CYCLE, GRID, INK, MARKERS, MUTED, ORANGE, PURPLE, RED, STYLE, WIDTH

# of the rates of a method, slowest first
SPEEDS = ("#8fc1de", "#0072b2", PURPLE, RED)
COLUMNS = 4
COLOURS, MARKS = (*CYCLE, INK, MUTED), MARKERS + "X*"


def plot_balance_lab(
    rows: Sequence[Mapping[str, Any]], traces: Mapping[str, np.ndarray], *, chance: float, jump: int
) -> Figure:
    """Draws every method at its rates, as `experiments.balance_lab` measures them.

    Args:
      rows: one per method and rate, slowest first, with keys `method`, `kind` ("bias" and "loss" are drawn), `rate`,
        `seeds`, `max_violation`, `recover` (steps), `recover_interval` and `recover_never` (seeds).
      traces: method -> `[R, steps]` MaxVio; "no balance" is among them.
      chance: MaxVio of a uniform router.
      jump: step of the jump, half of all steps.

    Returns:
      The figure: a panel per method above, the trade-off of balancers and of losses below.
    """
    kinds = {row["method"]: row["kind"] for row in rows}
    moving = [name for name, kind in kinds.items() if kind in ("bias", "loss")]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 9.0), layout="constrained")
        (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.85, 1))
        panels = above.subplots(-(-len(moving) // COLUMNS), COLUMNS, sharex=True, sharey=True, squeeze=False).flat
        for axes, name in zip(panels, moving, strict=False):
            rates = [row["rate"] for row in rows if row["method"] == name]
            _draw_trace(axes, name, rates, traces, chance, jump)
        above.supxlabel("step; the stream jumps in the middle", color=MUTED, fontsize=8.5)
        above.supylabel("MaxVio", color=MUTED, fontsize=8.5)
        above.legend(
            handles=[
                *(Line2D([], [], color=colour, lw=1.6) for colour in SPEEDS),
                Line2D([], [], color=MUTED, lw=1, ls=(0, (4, 3))),
                Patch(color=ORANGE, alpha=0.4),
            ],
            labels=["slowest rate", "", "", "fastest rate", "no balance", "by chance and below"],
            loc="outside upper left",
            ncols=6,
            frameon=False,
            handlelength=1.4,
            columnspacing=1.0,
        )
        pair = below.subplots(1, 2, sharex=True, sharey=True)
        titles = {"bias": "Balancers: a bias on the selection", "loss": "Losses: an offset on the logits"}
        for axes, (kind, title) in zip(pair, titles.items(), strict=True):
            _draw_trade_off(axes, [row for row in rows if row["kind"] == kind], chance, jump)
            axes.set_title(title)
            axes.set_xlabel("steps to recover from the jump")
        pair[0].set_ylabel("MaxVio when settled")
    return figure


def _draw_trace(
    axes: Axes, name: str, rates: Sequence[float], traces: Mapping[str, np.ndarray], chance: float, jump: int
) -> None:
    """One method: a line per rate, over the unbalanced stream and the band of chance."""
    axes.axhspan(1e-3, chance, color=ORANGE, alpha=0.28, lw=0)
    axes.plot(traces["no balance"][0], color=MUTED, lw=0.9, ls=(0, (4, 3)))
    for trace, colour in zip(traces[name], SPEEDS, strict=False):
        axes.plot(trace, color=colour, lw=1.1)
    axes.axvline(jump, color=GRID, lw=0.8, zorder=0)
    axes.set(yscale="log", ylim=(0.06, 25), xlim=(0, traces[name].shape[1]))
    _label_plainly(axes.yaxis, (0.1, 0.3, 1, 3, 10))
    axes.set_xticks((0, jump, 2 * jump))
    axes.set_title(name, fontsize=8)
    for place, (rate, colour) in enumerate(zip(rates, SPEEDS, strict=False)):
        axes.text(0.06 + 0.25 * place, 0.92, f"{rate:g}", color=colour, fontsize=7, transform=axes.transAxes)


def _draw_trade_off(axes: Axes, rows: Sequence[Mapping[str, Any]], chance: float, phase: int) -> None:
    """A line per method through its rates; larger marks are faster rates, hollow ones never recovered."""
    axes.axhspan(1e-3, chance, color=ORANGE, alpha=0.28, lw=0)
    for index, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = [row for row in rows if row["method"] == name]
        x, y = [row["recover"] for row in mine], [row["max_violation"] for row in mine]
        colour, marker = COLOURS[index], MARKS[index]
        axes.plot(x, y, color=colour, lw=1, alpha=0.6)
        for place, row in enumerate(mine):
            low, high = np.clip(row["recover_interval"], 1, phase)
            axes.hlines(y[place], low, high, color=colour, lw=1, alpha=0.5)
            face = "none" if row["recover_never"] == row["seeds"] else colour
            axes.plot(x[place], y[place], marker, ms=3.2 + 1.3 * place, color=colour, mfc=face, zorder=3)
        axes.plot([], [], color=colour, marker=marker, ms=5, lw=1, label=name)
    axes.set(xscale="log", yscale="log", xlim=(4, 1.15 * phase), ylim=(0.09, 8))
    ticks = [tick for tick in (5, 10, 20, 50, 100) if tick < 0.7 * phase]
    _label_plainly(axes.xaxis, (*ticks, phase), {phase: "never"})
    _label_plainly(axes.yaxis, (0.1, 0.3, 1, 3))
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=7.5, loc="upper left", labelcolor=INK, handlelength=1.6)


def _label_plainly(axis: Any, values: Sequence[float], names: Mapping[float, str] | None = None) -> None:
    """Ticks of a log axis at these values, written as plain numbers or by name."""
    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FuncFormatter(lambda value, _: (names or {}).get(value, f"{value:g}")))
    axis.set_minor_locator(NullLocator())
