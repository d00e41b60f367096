"""Pictures of training: the curve against its baseline, and healing."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from moe_jax.report.pictures.canvas import (
    BLUE,
    GRID,
    INK,
    MUTED,
    RED,
    SKY,
    STYLE,
    add_key,
    label_right,
    single,
)


def plot_training(
    steps: ArrayLike,
    bits_per_byte: ArrayLike,
    *,
    held_out: tuple[ArrayLike, ArrayLike] | None = None,
    baseline: float | None = None,
    baseline_name: str = "5-gram",
) -> Figure:
    """Draws the training curve against an n-gram baseline.

    Args:
      steps: `[N]` optimiser steps.
      bits_per_byte: `[N]` of each step's batch.
      held_out: (`[M]` steps, `[M]` bits per byte) on held-out text.
      baseline: held-out bits per byte of the baseline.
      baseline_name: its name.

    Returns:
      The figure.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = single(3.1)
        steps, bits = np.asarray(steps, float), np.asarray(bits_per_byte, float)
        axes.plot(steps, bits, color=SKY, lw=0.7, alpha=0.7)
        window = max(len(bits) // 40, 1)
        smooth = np.convolve(bits, np.ones(window) / window, "valid")
        centres = np.convolve(steps, np.ones(window) / window, "valid")
        axes.plot(centres, smooth, color=BLUE, lw=1.6)
        labels = [(smooth[-1], f"training {smooth[-1]:.2f}", BLUE)]
        if held_out is not None:
            axes.plot(*held_out, color=RED, lw=1.4, marker="o", ms=3.2)
            last = float(np.asarray(held_out[1])[-1])
            labels.append((last, f"held out {last:.2f}", RED))
        if baseline is not None:
            axes.axhline(baseline, color=MUTED, lw=1, ls=(0, (4, 3)))
            labels.append((baseline, f"{baseline_name} {baseline:.2f}", MUTED))
        low, high = min(bits.min(), *(v for v, _, _ in labels)), np.quantile(bits, 0.98)
        axes.set_ylim(low - 0.05 * (high - low), high)
        label_right(figure, axes, labels)
        axes.set(xlabel="optimiser step", ylabel="bits per byte", xlim=(0, steps[-1]))
    return figure


def plot_heal(
    names: Sequence[str], one_shot: ArrayLike, healed: ArrayLike, *, intervals: ArrayLike | None = None
) -> Figure:
    """Draws the loss of each topology before and after the same short training.

    Args:
      names: `[N]` topologies.
      one_shot: `[N]` bits per byte as chosen.
      healed: `[N]` bits per byte after training.
      intervals: `[N, 2, 2]` ends for one-shot and healed.

    Returns:
      The figure.
    """
    one_shot, healed = np.asarray(one_shot, float), np.asarray(healed, float)
    with matplotlib.rc_context(STYLE):
        figure, axes = single(0.85 + 0.38 * len(names))
        rows = np.arange(len(names))
        apart = 0.13
        for row in rows:
            arrow = {"arrowstyle": "-|>", "color": MUTED, "lw": 0.8, "shrinkA": 5, "shrinkB": 5}
            axes.annotate("", (healed[row], row + apart), (one_shot[row], row - apart), arrowprops=arrow)
        for index, (values, colour, shift) in enumerate(((one_shot, RED, -apart), (healed, BLUE, apart))):
            axes.scatter(values, rows + shift, color=colour, s=30, zorder=3, marker="so"[index])
            if intervals is not None:
                ends = np.asarray(intervals, float)[:, index]
                axes.hlines(rows + shift, ends[:, 0], ends[:, 1], color=colour, lw=1.6, alpha=0.6)
        axes.set_yticks(rows, names)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("test bits per byte")
        add_key(figure, [(RED, "one-shot"), (BLUE, "healed")])
    return figure
