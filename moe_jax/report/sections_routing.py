"""The part of the page about routing: load, confidence, specialisation, drops, each beside what chance alone gives."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_jax.analysis import RoutingTrace, summarise_routing
from moe_jax.report.album import Album
from moe_jax.report.contents import RunContents
from moe_jax.report.page import Section, interval, missing, number, paragraph, table
from moe_jax.report.pictures import (
    plot_domain_information,
    plot_drops,
    plot_load,
    plot_margins,
    plot_specialisation,
)

_TRACE = "recorded routing (traces/routing.npz)"
_SIGNIFICANT = 0.05


def routing_section(run: RunContents, album: Album) -> Section:
    """Shows the routing of the trained model; computes the summary from the trace if the results hold none."""
    summary = run.results.get("routing")
    if summary is None and run.trace is not None:
        summary = summarise_routing(run.trace)
    if summary is None:
        return Section("Routing", missing(_TRACE))
    markup = paragraph(
        f"{number(summary['num_tokens'])} tokens of {number(summary['num_documents'])} documents, "
        f"{summary['num_experts']} experts per layer, top-{summary['num_choices']}."
    )
    markup += _load(summary, album)
    markup += _confidence(summary, run.trace, album)
    markup += _specialisation(summary, album)
    markup += _drops(summary, album)
    return Section("Routing", markup)


def _column(summary: dict[str, Any], name: str) -> np.ndarray:
    """One entry of every layer as an array with leading `[L]`; undefined numbers become NaN."""
    return np.array([layer[name] for layer in summary["layers"]], float)


def _load(summary: dict[str, Any], album: Album) -> str:
    """Load per expert against the noise of a uniform router."""
    layers, uniform = summary["layers"], summary["uniform"]
    dead = [(layer["layer"], e) for layer in layers for e, v in enumerate(layer["verdicts"]) if v == "dead"]
    unknown = sum(verdict == "unknown" for layer in layers for verdict in layer["verdicts"])
    outside = sum(layer["experts_outside_band"] for layer in layers)
    sentence = f"{outside} of {len(layers) * summary['num_experts']} experts "
    sentence += "carry more or less than a uniform router would give them by chance. "
    if dead:
        sentence += "Dead: " + ", ".join(f"layer {layer} expert {expert}" for layer, expert in dead) + ". "
    elif not unknown:
        sentence += "No expert is dead. "
    if unknown:
        sentence += f"{unknown} unused experts are undecided: the window is too short to call them dead."
    markup = "<h3>Load</h3>" + paragraph(sentence)
    markup += album.add(
        "load",
        plot_load(
            _column(summary, "load"),
            interval=_column(summary, "load_interval"),
            band=tuple(uniform["load_band"]),
            verdicts=[layer["verdicts"] for layer in layers],
        ),
        "Load of each expert; 1 is the fair share. The shaded band holds all experts of all layers of a perfectly "
        "uniform router 95 times in 100. Whiskers: 95 % interval over documents, since tokens of one document are not "
        "independent. ∅ marks a dead expert, ? an unused one in too short a window.",
    )
    measures = ["coefficient_of_variation", "gini", "max_violation", "normalised_load_entropy", "effective_experts"]
    rows = [[f"layer {layer['layer']}", *(layer[name] for name in measures)] for layer in layers]
    rows.append(["uniform, by chance", *(uniform.get(name) for name in measures)])
    return markup + table(
        ["", "CV", "Gini", "MaxVio", "load entropy / ln E", "effective experts"],
        rows,
        caption="Imbalance, and what a perfectly uniform router shows on as many tokens.",
    )


def _confidence(summary: dict[str, Any], trace: RoutingTrace | None, album: Album) -> str:
    """Entropy and boundary margin."""
    markup = "<h3>Confidence</h3>"
    if trace is None or not trace.token_mask.any():
        markup += missing(_TRACE)
    elif np.isfinite(trace.margin).all():
        figure = plot_margins(
            trace.margin[:, trace.token_mask],
            flip_margin=summary["flip_margin"],
            entropy=trace.entropy[:, trace.token_mask],
            num_experts=summary["num_experts"],
        )
        markup += album.add(
            "margins",
            figure,
            "Left: how far the last chosen expert was ahead of the first one left out; in the shaded part, a change of "
            f"the logits by {summary['flip_margin']:g} flips the choice. Right: entropy of the router's probabilities. "
            "Vertical lines are medians.",
        )
    rows = [
        [
            f"layer {layer['layer']}",
            layer["router_entropy"]["estimate"],
            interval([layer["router_entropy"]["low"], layer["router_entropy"]["high"]]),
            layer["top_probability"],
            layer["margin_quantiles"]["0.5"],
            layer["fraction_within_flip_margin"],
        ]
        for layer in summary["layers"]
    ]
    columns = ["", "entropy, nats", "95 % interval", "mean top probability", "median margin"]
    return markup + table([*columns, f"share below {summary['flip_margin']:g}"], rows)


def _specialisation(summary: dict[str, Any], album: Album) -> str:
    """Domain specialisation against shuffled controls."""
    layers, num_layers = summary["layers"], len(summary["layers"])
    tests = {
        name: {key: np.array([layer[name][key] for layer in layers], float) for key in layers[0][name]}
        for name in ("domain_information", "domain_information_given_token")
    }
    found = [int((test["p_value"] <= _SIGNIFICANT).sum()) for test in tests.values()]
    markup = "<h3>Specialisation</h3>" + paragraph(
        f"Experts tell domains apart beyond shuffled documents in {found[0]} of {num_layers} layers; beyond what the "
        f"token alone explains, in {found[1]} of {num_layers} (p ≤ {_SIGNIFICANT}, layer by layer)."
    )
    markup += album.add(
        "specialisation",
        plot_specialisation(_column(summary, "domain_load"), summary["domains"], num_choices=summary["num_choices"]),
        "Share of each domain's tokens that an expert serves, over the share that uniform routing would give it "
        "(arXiv 2409.02060).",
    )
    plain = {key: value for key, value in tests["domain_information"].items() if key != "miller_madow"}
    markup += album.add(
        "information",
        plot_domain_information(plain, tests["domain_information_given_token"]),
        f"Mutual information of expert and domain (dots) beside {summary['num_shuffles']} shuffles (bars with their "
        "mean): left, domain labels shuffled over documents; right, given the token, shuffled within each token.",
    )
    rows = []
    for layer in layers:
        plain_test, given = layer["domain_information"], layer["domain_information_given_token"]
        rows.append(
            [
                f"layer {layer['layer']}",
                plain_test["information"],
                plain_test["null_mean"],
                plain_test["p_value"],
                given["information"],
                given["null_mean"],
                given["p_value"],
            ]
        )
    columns = ["", "MI, nats", "shuffled", "p", "MI given token, nats", "shuffled within token", "p "]
    return markup + table(columns, rows)


def _drops(summary: dict[str, Any], album: Album) -> str:
    """Drops by cause and by position."""
    layers = summary["layers"]
    empty = _column(summary, "empty_slots_by_position")
    markup = "<h3>Drops</h3>"
    if not np.nansum(empty):
        markup += paragraph("No token lost a choice: every slot of every token reached an expert.")
    else:
        markup += album.add("drops", plot_drops(empty), "Slots that hold no expert, along the sequence.")
    if any(layer["drops"] for layer in layers):
        rows = [
            [f"layer {layer['layer']}", *((layer["drops"] or {}).get(k) for k in ("kept", "capacity", "topology"))]
            for layer in layers
        ]
        markup += table(["", "kept", "lost to capacity", "lost to topology"], rows, caption="Shares of all choices.")
    return markup
