"""Pictures of routing: load, margins, specialisation, drops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from moe_jax.report.pictures.canvas import (
    BLUE,
    CYCLE,
    INK,
    MARKERS,
    MUTED,
    ORANGE,
    PAPER,
    RED,
    STYLE,
    UNDER_OVER,
    WIDTH,
    add_key,
    label_outer,
    label_right,
    single,
    small_multiples,
)


def plot_load(
    load: ArrayLike,
    *,
    interval: ArrayLike | None = None,
    band: tuple[float, float] | None = None,
    verdicts: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """Draws each expert's load in units of the fair share 1 / E, one panel per layer, with the uniform router's noise.

    Args:
      load: `[L, E]` shares of the layer's assignments.
      interval: `[L, 2, E]` ends of an interval of each share.
      band: shares between which a uniform router stays.
      verdicts: `[L][E]` "alive", "dead" or "unknown".

    Returns:
      The figure.
    """
    load = np.asarray(load, float)
    num_layers, num_experts = load.shape
    columns = 1 if num_experts > 24 else min(num_layers, 2)
    with matplotlib.rc_context(STYLE):
        figure, panels = small_multiples(num_layers, columns, 1.75, sharey=True)
        experts = np.arange(num_experts)
        for layer, axes in enumerate(panels):
            ratio = load[layer] * num_experts
            low, high = (0.0, np.inf) if band is None else (band[0] * num_experts, band[1] * num_experts)
            colours = [BLUE if r < low else RED if r > high else MUTED for r in ratio]
            axes.bar(experts, ratio, width=0.66, color=colours, zorder=2)
            if interval is not None:
                ends = np.asarray(interval, float)[layer] * num_experts
                axes.vlines(experts, ends[0], ends[1], color=INK, lw=1, zorder=3)
            if band is not None:
                axes.axhspan(low, high, color=ORANGE, alpha=0.28, lw=0, zorder=1)
            axes.axhline(1, color=INK, lw=0.8, zorder=2.5)
            for expert, verdict in enumerate(verdicts[layer] if verdicts else ()):
                if verdict != "alive":
                    axes.text(expert, 0.04, "∅" if verdict == "dead" else "?", ha="center", va="bottom")
            axes.set_title(f"layer {layer}")
            axes.set_xticks(experts[:: max(num_experts // 16, 1)])
            axes.tick_params(axis="x", length=0)
            axes.set_xlim(-0.7, num_experts - 0.3)
        label_outer(panels, columns, "expert", "load / fair share")
        legend = [(RED, "above chance"), (MUTED, "within chance"), (BLUE, "below chance")]
        if band is not None:
            legend.append((ORANGE, "95 % noise of a uniform router"))
        add_key(figure, legend)
    return figure


def plot_margins(
    margins: ArrayLike, *, flip_margin: float, entropy: ArrayLike | None = None, num_experts: int
) -> Figure:
    """Draws the distribution of boundary margins, and of router entropies, per layer.

    Args:
      margins: `[L, T]` logit(k) - logit(k+1), finite.
      flip_margin: margin below which a choice is called fragile; shaded.
      entropy: `[L, T]` nats.
      num_experts: E, whose ln is the largest entropy.

    Returns:
      The figure.
    """
    margins = np.asarray(margins, float)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.5 * len(margins)), layout="constrained")
        panels = figure.subplots(1, 1 if entropy is None else 2, squeeze=False)[0]
        upper = np.quantile(margins, 0.995)
        _ridges(panels[0], margins, np.linspace(0, upper, 90))
        panels[0].axvspan(0, flip_margin, color=ORANGE, alpha=0.28, lw=0)
        for layer, values in enumerate(margins):
            share = f"{(values < flip_margin).mean():.0%} below {flip_margin:g}"
            panels[0].text(upper, -layer + 0.12, share, ha="right", color=INK)
        panels[0].set(xlabel="boundary margin, logit(k) − logit(k+1)", xlim=(0, upper))
        panels[0].set_title("How close the choice was")
        if entropy is not None:
            largest = np.log(num_experts)
            _ridges(panels[1], np.asarray(entropy, float), np.linspace(0, largest, 90))
            panels[1].axvline(largest, color=MUTED, lw=1, ls=(0, (4, 3)))
            label = f"uniform, ln {num_experts}"
            above = panels[1].get_xaxis_transform()
            panels[1].text(largest, 1.01, label, ha="right", va="bottom", color=MUTED, transform=above)
            panels[1].set(xlabel="router entropy, nats", xlim=(0, largest * 1.01))
            panels[1].set_title("How sure the router was")
    return figure


def plot_specialisation(domain_load: ArrayLike, domains: Sequence[str], *, num_choices: int) -> Figure:
    """Draws N_{e,D} / N_D over the uniform K / E (2409.02060) on a log scale, one panel per layer.

    Args:
      domain_load: `[L, D, E]` share of each domain's tokens that each expert serves; NaN for an unused domain.
      domains: `[D]` names.
      num_choices: K.

    Returns:
      The figure.
    """
    domain_load = np.asarray(domain_load, float)
    num_layers, num_domains, num_experts = domain_load.shape
    columns = 1 if num_experts > 24 else min(num_layers, 2)
    with matplotlib.rc_context(STYLE):
        figure, panels = small_multiples(num_layers, columns, 0.75 + 0.24 * num_domains, sharey=True)
        ratio = np.log2(np.maximum(domain_load * num_experts / num_choices, 2.0**-3))
        norm = TwoSlopeNorm(0, -2, 2)
        for layer, axes in enumerate(panels):
            image = axes.pcolormesh(ratio[layer], cmap=UNDER_OVER, norm=norm, edgecolors=PAPER, lw=1.2)
            axes.set_yticks(np.arange(num_domains) + 0.5, domains)
            step = max(num_experts // 16, 1)
            axes.set_xticks(np.arange(0, num_experts, step) + 0.5, np.arange(0, num_experts, step))
            axes.tick_params(length=0)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.set_ylim(num_domains, 0)
            axes.set_title(f"layer {layer}")
        label_outer(panels, columns, "expert", "")
        bar = figure.colorbar(image, ax=list(panels), extend="both", shrink=0.9, aspect=24, pad=0.015)
        bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
        bar.set_label("share / uniform share")
        bar.outline.set_visible(False)
    return figure


def plot_domain_information(
    plain: Mapping[str, ArrayLike], given_token: Mapping[str, ArrayLike] | None = None
) -> Figure:
    """Draws MI(expert; domain) per layer beside its shuffled control, and the same when the token is known.

    Args:
      plain: `information`, `null_mean`, `null_low`, `null_high`, `p_value`, each `[L]`, nats.
      given_token: the same for MI(expert; domain | token).

    Returns:
      The figure.
    """
    tests = [("What the expert tells about the domain", plain)]
    if given_token is not None:
        tests.append(("… when the token is already known", given_token))
    num_layers = len(np.asarray(plain["information"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.15 + 0.3 * num_layers), layout="constrained")
        panels = figure.subplots(1, len(tests), squeeze=False, sharey=True)[0]
        rows = np.arange(num_layers)
        for axes, (title, test) in zip(panels, tests, strict=True):
            values = {name: np.asarray(column, float) * 1000 for name, column in test.items()}
            axes.hlines(rows, values["null_low"], values["null_high"], color=ORANGE, lw=7, alpha=0.55)
            axes.plot(values["null_mean"], rows, "|", color=INK, ms=8, mew=1.2)
            axes.plot(values["information"], rows, "o", color=BLUE, ms=6)
            for row, p_value in enumerate(np.asarray(test["p_value"], float)):
                axes.annotate(
                    f"p = {p_value:.2g}",
                    (values["information"][row], row),
                    (8, 0),
                    textcoords="offset points",
                    va="center",
                )
            axes.set_title(title)
            axes.set_yticks(rows, [f"layer {row}" for row in rows])
            axes.set_ylim(num_layers - 0.5, -0.5)
            axes.set_xlim(0, 1.28 * max(values["information"].max(), values["null_high"].max(), 1e-9))
            axes.set_xlabel("mutual information, millinats")
            axes.tick_params(axis="y", length=0)
        add_key(figure, [(BLUE, "measured"), (ORANGE, "shuffled labels, 95 %")])
    return figure


def plot_drops(empty_slots: ArrayLike) -> Figure:
    """Draws the share of slots without an expert along the sequence, one line per layer.

    Args:
      empty_slots: `[L, N]` by position bin, from the first to the last of the sequence.

    Returns:
      The figure.
    """
    empty_slots = np.asarray(empty_slots, float)
    with matplotlib.rc_context(STYLE):
        figure, axes = single(2.2)
        place = (np.arange(empty_slots.shape[1]) + 0.5) / empty_slots.shape[1]
        for layer, line in enumerate(empty_slots):
            axes.plot(place, 100 * line, color=CYCLE[layer % 6], marker=MARKERS[layer % 6], ms=3.5, lw=1.3)
        finals = [(100 * line[-1], f"layer {i}", CYCLE[i % 6]) for i, line in enumerate(empty_slots)]
        axes.set(xlabel="position in the sequence", ylabel="empty slots, %", xlim=(0, 1))
        axes.set_ylim(0, max(1.0, 105 * np.nanmax(empty_slots, initial=0)))
        axes.set_xticks([0, 0.5, 1], ["start", "middle", "end"])
        label_right(figure, axes, finals)
    return figure


def _ridges(axes: Axes, values: np.ndarray, edges: np.ndarray) -> None:
    """Draws one histogram per row of `[L, T]`, stacked downwards."""
    centres = (edges[1:] + edges[:-1]) / 2
    for layer, row in enumerate(values):
        density, _ = np.histogram(row, edges)
        height = 0.8 * density / max(density.max(), 1)
        axes.fill_between(centres, -layer, -layer + height, color=BLUE, alpha=0.55, lw=0, step="mid")
        axes.plot(centres, -layer + height, color=BLUE, lw=1.1, drawstyle="steps-mid")
        axes.vlines(np.median(row), -layer, -layer + 0.85, color=INK, lw=1.1)
    axes.set_yticks([-layer for layer in range(len(values))], [f"layer {layer}" for layer in range(len(values))])
    axes.set_ylim(-len(values) + 0.95, 1.05)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
