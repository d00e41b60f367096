"""The response surface of a sweep: a line, lines, a map, or a panel for each axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation

from moe_jax.report.pictures.canvas import (
    BLUE,
    CYCLE,
    INK,
    MARKERS,
    MUTED,
    RED,
    STYLE,
    WIDTH,
    add_key,
    label_log_axis,
    small_multiples,
)

_LOSS = "selection split, bits per byte"
_MAP = "viridis_r"
_SERIES = tuple(colour for colour in CYCLE if colour != RED)


def plot_sweep(sweep: Mapping[str, Any]) -> Figure:
    """Draws the loss of every point that has one.

    One axis: a line with intervals over seeds. Two: a line for each value of an axis of choices, or a map of contours
    if both axes are numbers. More: a panel for each axis, all points in each.

    Args:
      sweep: what `training.sweeps.summarise` gives.

    Returns:
      The figure; the chosen point has a red ring, and bars are 95 % intervals over seeds where there are several.
    """
    axes = sweep["axes"]
    points = [point for point in sweep["points"] if point["mean"] is not None]
    chosen = sweep["chosen"] and sweep["chosen"]["number"]
    with matplotlib.rc_context(STYLE):
        if len(axes) == 2 and all(axis["is_numeric"] for axis in axes) and _spans_a_plane(axes, points):
            return _draw_map(axes, points, chosen)
        if len(axes) == 2 and not all(axis["is_numeric"] for axis in axes):
            return _draw_lines(axes, points, chosen)
        columns = min(len(axes), 3)
        figure, panels = small_multiples(len(axes), columns, 3.0, sharey=True)
        for index, (panel, axis) in enumerate(zip(panels, axes, strict=True)):
            _draw_points(panel, axis, points, chosen, BLUE, is_joined=len(axes) == 1)
            panel.set_xlabel(axis["name"])
            if index % columns == 0:
                panel.set_ylabel(_LOSS)
    return figure


def _draw_lines(axes: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]], chosen: int | None) -> Figure:
    """A line for each value of the axis of choices that has the fewest."""
    counts = [len(_labels(axis, points)) if not axis["is_numeric"] else np.inf for axis in axes]
    series = axes[int(np.argmin(counts))]
    across = axes[1 - int(np.argmin(counts))]
    figure, (panel,) = small_multiples(1, 1, 3.2)
    names = _labels(series, points)
    positions = _labels(across, points)
    for index, name in enumerate(names):
        mine = [point for point in points if str(point["values"][series["name"]]) == name]
        shift = 0.0 if across["is_numeric"] else 0.12 * (index - (len(names) - 1) / 2)
        _draw_points(
            panel, across, mine, chosen, _SERIES[index % 5], is_joined=True, shift=shift, labels=positions, marker=index
        )
    panel.set(xlabel=across["name"], ylabel=_LOSS)
    add_key(figure, [(_SERIES[index % 5], name) for index, name in enumerate(names)])
    return figure


def _draw_points(
    panel: Axes,
    axis: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    chosen: int | None,
    colour: str,
    *,
    is_joined: bool = False,
    shift: float = 0.0,
    labels: Sequence[str] = (),
    marker: int = 0,
) -> None:
    """Means and intervals along an axis."""
    labels = labels or _labels(axis, points)
    if axis["is_numeric"]:
        x = np.array([float(point["values"][axis["name"]]) for point in points])
    else:
        x = np.array([labels.index(str(point["values"][axis["name"]])) + shift for point in points])
    order = np.argsort(x, kind="stable")
    mean = np.array([point["mean"] for point in points])
    ends = np.array([point["interval"] or (np.nan, np.nan) for point in points]).reshape(-1, 2)
    if axis["is_log"]:
        panel.set_xscale("log")
        label_log_axis(panel.xaxis, (1.0, 2.0, 5.0) if x.max() < 30 * x.min() else (1.0, 3.0))
    elif not axis["is_numeric"]:
        panel.set_xticks(range(len(labels)), labels)
    panel.vlines(x, ends[:, 0], ends[:, 1], color=colour, lw=1.6, alpha=0.6)
    if is_joined:
        panel.plot(x[order], mean[order], color=colour, lw=1.2)
    panel.scatter(x, mean, color=colour, s=28, marker=MARKERS[marker % 6], zorder=3)
    for point, left in zip(points, x, strict=True):
        if point["number"] == chosen:
            _ring(panel, left, point["mean"])


def _draw_map(axes: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]], chosen: int | None) -> Figure:
    """Filled contours between the points of two numeric axes."""
    figure = Figure(figsize=(0.75 * WIDTH, 4.2), layout="constrained")
    panel = figure.subplots()
    x, y = (np.array([float(point["values"][axis["name"]]) for point in points]) for axis in axes)
    mean = np.array([point["mean"] for point in points])
    for axis, set_scale, line in zip(
        axes, (panel.set_xscale, panel.set_yscale), (panel.xaxis, panel.yaxis), strict=True
    ):
        if axis["is_log"]:
            set_scale("log")
            label_log_axis(line)
    drawn = [np.log(values) if axis["is_log"] else values for values, axis in zip((x, y), axes, strict=True)]
    triangles = Triangulation(*drawn).triangles  # neighbours as they are seen
    scale: Any = {"cmap": _MAP, "vmin": mean.min(), "vmax": mean.max()}
    surface = panel.tricontourf(Triangulation(x, y, triangles), mean, levels=12, **scale)
    panel.scatter(x, y, c=mean, edgecolors=INK, linewidths=0.6, s=36, zorder=3, clip_on=False, **scale)
    for point, left, height in zip(points, x, y, strict=True):
        if point["number"] == chosen:
            _ring(panel, left, height)
    figure.colorbar(surface, ax=panel, label=_LOSS).outline.set_edgecolor(MUTED)
    panel.set(xlabel=axes[0]["name"], ylabel=axes[1]["name"])
    return figure


def _ring(panel: Axes, x: float, y: float) -> None:
    """Marks the chosen point."""
    panel.scatter(x, y, facecolors="none", edgecolors=RED, s=120, linewidths=1.8, zorder=4, clip_on=False)


def _labels(axis: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The values of an axis in the order in which the points have them."""
    return list(dict.fromkeys(str(point["values"][axis["name"]]) for point in points))


def _spans_a_plane(axes: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are three points that are not in a line, without which there are no contours."""
    places = np.array([[float(point["values"][axis["name"]]) for axis in axes] for point in points]).reshape(-1, 2)
    if len(places) < 3:
        return False
    centred = places - places.mean(0)
    return bool(np.linalg.matrix_rank(centred / np.maximum(np.abs(centred).max(0), 1e-300)) == 2)
