"""The last stage of `evolve_topology`'s search: choose on the selection split, report on the test split."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from experiments.topology_search import FRONTS, Found, TopologySearch
from moe_jax.evolution import LayerTopology, hypervolume, is_non_dominated
from moe_jax.evolution.population import OBJECTIVES
from moe_jax.runs.bars import bar
from moe_jax.training.evaluation import LOG2, bits_per_byte, compare_losses, document_interval
from moe_jax.types import Topology

UNTOUCHED = "untouched model"
EVOLVED = ("GA, mask", "GA, budget")
GENOMES = {"GA, budget": "budget in REAP order"}


def measure_losses(search: TopologySearch, found: Mapping[str, list[Found]]) -> dict[str, np.ndarray]:
    """`[seeds, N]` summed losses of the test split by method, the untouched model's among them; fronts are left out."""
    lab = search.lab
    topologies = {UNTOUCHED: [lab.open_topology]}
    topologies |= {name: [search.topology(run) for run in runs] for name, runs in found.items() if name not in FRONTS}
    number = sum(map(len, topologies.values()))
    with lab.timed("test"), bar(lab.display, "test split", number) as progress, ThreadPoolExecutor(2) as pool:

        def loss(topology: Topology) -> np.ndarray:
            nll, _ = lab.evaluate(search.model, lab.test, topology)
            progress.advance()
            return nll

        # Two at a time keep two cores busy.
        return {name: np.stack(list(pool.map(loss, group))) for name, group in topologies.items()}


def compare_methods(
    search: TopologySearch, found: Mapping[str, list[Found]], losses: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Compares all methods.

    Args:
      search: what `found` was found with.
      found: by method, a result per seed.
      losses: from `measure_losses`.

    Returns:
      `results["search"]` of the report's schema, and beside it `chosen`: name and seed of the evolved topology and of
      the baseline with the lowest KL on the selection split.
    """
    lab, test = search.lab, search.lab.test
    num_bytes = test.num_bytes
    mean = {name: loss.mean(axis=0) for name, loss in losses.items()}
    single = {name: runs for name, runs in found.items() if name not in FRONTS}
    with lab.timed("test"), bar(lab.display, "selection split, fronts", 2) as progress:
        methods = _describe(search, single)
        progress.advance()
        fronts = _fronts(search, found)
        progress.advance()
    for row in methods:
        loss = mean[row["name"]]
        row["test_bpb"] = (losses[row["name"]].sum(axis=1) / num_bytes.sum() / LOG2).tolist()
        row["test_bpb_interval"] = list(document_interval(test, loss, num_bytes)[1:])
        estimate, *ends = document_interval(test, loss - mean[UNTOUCHED], num_bytes)
        row["delta_vs_full"] = {"estimate": estimate, "interval": ends}
        if row["kind"] == "evolved":
            row["comparisons"] = [
                {"against": rival, **compare_losses(test, loss, mean[rival], num_bytes)}
                for rival in single
                if rival not in EVOLVED
            ]
    full = bits_per_byte(test, mean[UNTOUCHED], num_bytes)
    reference = {
        "name": UNTOUCHED,
        "kind": "reference",
        "test_bpb": [full["all"]],
        "test_bpb_interval": full["interval"],
    }
    return {
        "description": [
            "Every population search starts with the same four one-shot masks beside random ones (as budgets the four "
            "are one, the equal budget), repairs the same way, and spends "
            f"{search.study.evaluations} evaluations a seed on the same text of the search split.",
            "Local search starts each chain from REAP's mask. Greedy removal counts every evaluation and stops at the "
            "same number; removals left over then follow its last complete ranking.",
        ],
        "budget": {
            "evaluations": search.study.evaluations,
            "experts_kept": search.study.total,
            "experts": search.study.mask.config.num_moe_layers * lab.model.num_experts,
            "seeds": search.config.seeds,
        },
        "methods": [reference, *methods],
        "chosen": {kind: _best_on_selection(methods, kind) for kind in ("evolved", "baseline")},
        **fronts,
    }


def _describe(search: TopologySearch, found: Mapping[str, list[Found]]) -> list[dict[str, Any]]:
    """What is known of the methods without the test split."""
    topologies = [LayerTopology(run.keep, run.num_choices) for runs in found.values() for run in runs]
    lab, config = search.lab, search.config
    on_search = iter(search.objectives(topologies, lab.subset("search", config.search_per_domain)))
    on_selection = iter(search.objectives(topologies, lab.subset("selection", config.selection_per_domain)))
    rows = []
    for name, runs in found.items():
        selection = np.concatenate([next(on_selection) for _ in runs])
        rows.append(
            {
                "name": name,
                "kind": "evolved" if name in EVOLVED else "baseline",
                "genome": GENOMES.get(name, "mask"),
                "seeds": list(range(len(runs))),
                "evaluations": int(runs[0].evaluations),
                "seconds": float(np.mean([run.seconds for run in runs])),
                "search_kl": [float(next(on_search)[0, 0]) for _ in runs],
                "selection_kl": selection[:, 0].tolist(),
                "active_flops_per_token": float(selection[:, 1].mean()),
                "max_over_mean_load": float(selection[:, 2].mean()),
            }
        )
    return rows


def _best_on_selection(methods: list[dict[str, Any]], kind: str) -> tuple[str, int]:
    """Name and seed of the lowest selection KL among the methods of a kind."""
    ranked = [(kl, m["name"], seed) for m in methods if m["kind"] == kind for seed, kl in enumerate(m["selection_kl"])]
    return min(ranked)[1:]


def _fronts(search: TopologySearch, found: Mapping[str, list[Found]]) -> dict[str, Any]:
    """Fronts chosen on the selection split and measured on the test split, with their hypervolumes."""
    lab, config, ladder = search.lab, search.config, search.study.ladder
    runs = [(name, seed, run) for name in FRONTS for seed, run in enumerate(found[name])]
    runs.append(("saliency ladder", 0, Found(*map(np.asarray, ladder), np.asarray(0), np.asarray(0.0))))
    candidates = [LayerTopology(run.keep, run.num_choices) for _, _, run in runs]
    on_selection = search.objectives(candidates, lab.subset("selection", config.selection_per_domain))
    chosen = [
        jax.tree.map(lambda side, points=points: side[is_non_dominated(points)], topologies)
        for topologies, points in zip(candidates, on_selection, strict=True)
    ]
    untouched = jax.tree.map(lambda side: side[-1:], candidates[-1])
    full, *fronts = search.objectives([untouched, *chosen], lab.subset("test", config.front_per_domain))
    reference = np.array([config.reference_kl, 1.001 * full[0, 1], config.reference_load])
    volumes: dict[str, dict[str, Any]] = {}
    for (name, _, run), points in zip(runs, fronts, strict=True):
        row = volumes.setdefault(name, {"method": name, "evaluations": int(run.evaluations), "values": []})
        row["values"].append(hypervolume(points, reference) / float(np.prod(reference)))
    return {
        "objectives": list(OBJECTIVES),
        "front": [
            {"method": name, "seed": seed, "points": points.tolist()}
            for (name, seed, _), points in zip(runs, fronts, strict=True)
        ],
        "full_model": full[0].tolist(),
        "reference_point": reference.tolist(),
        "hypervolume": list(volumes.values()),
    }
