"""The parts of the page about the search: headline, methods at equal evaluations, front, masks, healing."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_jax.analysis import t_interval
from moe_jax.report.album import Album
from moe_jax.report.contents import RunContents, search_curves
from moe_jax.report.page import Section, bullets, facts, folded, interval, missing, number, paragraph, settings, table
from moe_jax.report.pictures import plot_comparison, plot_front, plot_heal, plot_masks, plot_search_curves

_OUTCOMES = {
    "better": "better than",
    "worse": "worse than",
    "tie": "a tie with",
    "unknown": "not comparable (too few seeds or documents) with",
}


def headline_section(run: RunContents) -> Section:
    """Says in plain words what came out, ties and losses included."""
    results = run.results
    markup = ""
    state = run.status.get("status", "unknown")
    if state != "finished":
        error = f" Error: {run.status['error']}." if run.status.get("error") else ""
        stage = f" in stage {run.status['stage']}" if run.status.get("stage") else ""
        markup += paragraph(f"This run is not finished: {state}{stage}.{error} Below is what it left so far.", "banner")
    losses = results.get("model_bits_per_byte", {}).get("test", {})
    cards = []
    if "all" in losses:
        ends = interval(losses.get("interval"))
        cards.append((number(losses["all"]), f"bits per byte of the model on the test split {ends}".strip()))
    if ngram := results.get("ngram"):
        cards.append((number(ngram["bits_per_byte"]["all"]), f"bits per byte of a byte {ngram['order']}-gram"))
    if evaluations := results.get("search", {}).get("budget", {}).get("evaluations"):
        cards.append((number(evaluations), "evaluations, the budget of each search"))
    if results.get("timing"):
        cards.append((f"{sum(results['timing'].values()) / 60:.1f} min", "wall-clock time in all"))
    markup += facts(cards)
    evolved = [method for method in results.get("search", {}).get("methods", []) if method.get("kind") == "evolved"]
    outcomes = [_outcome(method["name"], c) for method in evolved for c in method.get("comparisons", [])]
    markup += bullets(results.get("summary", []))
    if outcomes:
        markup += folded("Every paired comparison in words", bullets(outcomes))
    return Section("What came out", markup or missing("results (results.json)"))


def _outcome(name: str, comparison: dict[str, Any]) -> str:
    """One comparison in words."""
    sentence = f"{name} is {_OUTCOMES[comparison.get('verdict', 'unknown')]} {comparison['against']}"
    if "difference" in comparison:
        ends = interval(comparison.get("interval"))
        sentence += f": difference {number(comparison['difference'])} {ends}".rstrip() + " (lower is better)"
    return sentence + "."


def search_section(run: RunContents, album: Album) -> Section:
    """Compares the methods, at equal evaluations, on text that the search never saw."""
    search = run.results.get("search")
    if not search:
        return Section("Evolution", missing("results of the search"))
    methods = search.get("methods", [])
    evolved = [method["name"] for method in methods if method.get("kind") == "evolved"]
    markup = bullets([*search.get("description", []), _equal_evaluations(methods)])
    if "budget" in search:
        markup += folded("Budget", settings(search["budget"]))
    if curves := search_curves(run):
        markup += album.add(
            "search_curves",
            plot_search_curves(curves, emphasised=evolved),
            "Best KL to the full model on the search split: median over seeds, band from best to worst seed. "
            "Evolved methods in colour.",
        )
    else:
        markup += missing("search curves (metrics stages search/…)")
    markup += _methods(methods, evolved, album)
    markup += _front(search, evolved, album)
    if run.topologies is None:
        markup += missing("the topologies found (traces/topologies.npz)")
    else:
        topologies = run.topologies
        markup += album.add(
            "masks",
            plot_masks(topologies.names, topologies.keep, topologies.num_choices),
            "Experts that each topology keeps (filled), by layer; beside it, how many, and experts per token.",
        )
    return Section("Evolution", markup)


def _equal_evaluations(methods: list[dict[str, Any]]) -> str:
    """Says whether the comparison is one at equal evaluations, from the counts themselves."""
    counts = {m["name"]: m["evaluations"] for m in methods if m.get("kind") != "reference" and m.get("evaluations")}
    if not counts:
        return "The number of evaluations was not recorded."
    most = max(counts.values())
    fewer = [f"{name} ({number(count)})" for name, count in counts.items() if count < most]
    sentence = f"Evaluations per seed: {number(most)} for every method"
    return sentence + (f" except {', '.join(fewer)}." if fewer else ".")


def _methods(methods: list[dict[str, Any]], evolved: list[str], album: Album) -> str:
    """Pictures and tables of the methods."""
    if not methods:
        return missing("methods")
    return _cost_picture(methods, evolved, album) + _method_tables(methods) + _comparison_table(methods)


def _cost_picture(methods: list[dict[str, Any]], evolved: list[str], album: Album) -> str:
    """Draws what each topology costs against the full model; nothing if that was not measured."""
    searched = [method for method in methods if method.get("kind") != "reference"]
    drawn = [method for method in searched if method.get("delta_vs_full", {}).get("estimate") is not None]
    if not drawn:
        return ""
    deltas = [method["delta_vs_full"] for method in drawn]
    ends = np.array([delta.get("interval") or [np.nan, np.nan] for delta in deltas], float)
    figure = plot_comparison(
        [method["name"] for method in drawn],
        [delta["estimate"] for delta in deltas],
        ends[:, 0],
        ends[:, 1],
        xlabel="test bits per byte above the full model (lower is better)",
        emphasised=evolved,
        zero_label="full model",
    )
    caption = "What each topology costs on the test split; lines are 95 % intervals, paired by document."
    return album.add("methods", figure, caption)


def _method_tables(methods: list[dict[str, Any]]) -> str:
    """Quality and cost of each method."""
    quality, cost = [], []
    for method in methods:
        delta = method.get("delta_vs_full", {})
        quality.append(
            [
                method["name"],
                *(_over_seeds(method.get(key)) for key in ("search_kl", "selection_kl", "test_bpb")),
                interval(method.get("test_bpb_interval")),
                f"{number(delta.get('estimate'), digits=3)} {interval(delta.get('interval'), digits=3)}"
                if delta
                else None,
            ]
        )
        seconds = method.get("seconds")
        cost.append(
            [
                method["name"],
                method.get("genome"),
                method.get("evaluations"),
                len(method["seeds"]) if "seeds" in method else None,
                None if seconds is None else f"{seconds:.1f}",
                method.get("active_flops_per_token"),
                method.get("max_over_mean_load"),
            ]
        )
    columns = ["method", "search KL", "selection KL", "test bits per byte", "95 % interval", "above full model"]
    caption = "Quality: means over seeds, ± half of the 95 % t interval where there are several; KL in nats per byte."
    markup = table(columns, quality, caption=caption)
    columns = ["method", "genome", "evaluations", "seeds", "seconds", "expert FLOPs per token", "max / mean load"]
    return markup + table(columns, cost, caption="Cost: of the search, and of the model it found.", words=["genome"])


def _comparison_table(methods: list[dict[str, Any]]) -> str:
    """Paired comparisons, if there are any."""
    rows = [
        [
            method["name"],
            comparison["against"],
            comparison.get("difference"),
            interval(comparison.get("interval")),
            comparison.get("p_value"),
            comparison.get("win_rate"),
            comparison.get("verdict"),
        ]
        for method in methods
        for comparison in method.get("comparisons", [])
    ]
    columns = ["method", "against", "difference", "95 % interval", "p", "win rate", "verdict"]
    caption = "Paired comparisons, lower is better. An interval that contains 0 is a tie."
    return table(columns, rows, caption=caption, words=["against", "verdict"]) if rows else ""


def _over_seeds(values: list[float | None] | None) -> str | None:
    """Mean over seeds with half of its t interval, as text; undefined seeds make it undefined."""
    if not values:
        return None
    estimate = t_interval(np.array(values, float))
    if not np.isfinite(estimate.low):
        return number(estimate.estimate)
    return f"{number(estimate.estimate)} ± {number(estimate.high - estimate.estimate, digits=2)}"


def _front(search: dict[str, Any], evolved: list[str], album: Album) -> str:
    """Pareto picture and hypervolumes."""
    markup = ""
    points: dict[str, list[list[float]]] = {}
    for entry in search.get("front", []):
        points.setdefault(entry["method"], []).extend(entry["points"])
    points = {method: rows for method, rows in points.items() if rows}
    if points:
        figure = plot_front(
            {method: np.array(rows, float) for method, rows in points.items()},
            objectives=search["objectives"],
            full_model=search.get("full_model"),
            reference_point=search.get("reference_point"),
            emphasised=[name for name in evolved if name in points],
        )
        caption = (
            "Non-dominated topologies of all seeds; the lower left is best. The line joins those that no other of its "
            "method beats in both objectives of the plane."
        )
        markup += album.add("front", figure, caption)
    else:
        markup += missing("a Pareto front")
    if volumes := search.get("hypervolume"):
        estimates = [t_interval(np.array(entry["values"], float)) for entry in volumes]
        markup += album.add(
            "hypervolume",
            plot_comparison(
                [entry["method"] for entry in volumes],
                [estimate.estimate for estimate in estimates],
                [estimate.low for estimate in estimates],
                [estimate.high for estimate in estimates],
                xlabel="hypervolume (larger is better)",
                values=[np.array(entry["values"], float) for entry in volumes],
                emphasised=evolved,
            ),
            f"Hypervolume against the fixed reference point {_point(search.get('reference_point'))}: mean over seeds, "
            "95 % t interval, and single seeds as ticks.",
        )
    return markup


def _point(point: list[float] | None) -> str:
    """Writes a point."""
    return "(" + ", ".join(number(value) for value in point) + ")" if point else ""


def heal_section(run: RunContents, album: Album) -> Section:
    """Compares each topology before and after the same short training."""
    heal = run.results.get("heal")
    if not heal:
        return Section("Healing", missing("healing"))
    markup = paragraph(
        "The same short training for topologies and the untouched model. What counts is the distance to the healed "
        "full model, not to the model before."
    )
    ends = [[entry.get(f"{kind}_interval") or [np.nan, np.nan] for kind in ("one_shot", "healed")] for entry in heal]
    names = [entry["name"] for entry in heal]
    one_shot, healed = ([entry[f"{kind}_bpb"] for entry in heal] for kind in ("one_shot", "healed"))
    figure = plot_heal(names, one_shot, healed, intervals=np.array(ends, float))
    markup += album.add(
        "heal", figure, "Test bits per byte before and after healing, with 95 % intervals over documents."
    )
    rows = [
        [
            entry["name"],
            entry.get("steps"),
            entry["one_shot_bpb"],
            interval(entry.get("one_shot_interval")),
            entry["healed_bpb"],
            interval(entry.get("healed_interval")),
        ]
        for entry in heal
    ]
    columns = ["topology", "steps", "one-shot", "95 % interval", "healed", "95 % interval "]
    return Section("Healing", markup + table(columns, rows))
