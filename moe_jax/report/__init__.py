"""A run folder as one self-contained page: `write_report(run_path)` writes `report.html` and `pictures/*.svg`.

The page is made from files only, so it can be made again at any time. Each part below is optional: what is missing is
named on the page as missing, never filled in. Unknown keys are ignored. Numbers that could not be computed are `null`.

    config.json        any nested mapping; shown whole
    environment.json   any nested mapping, as `moe_jax.runs` writes it; `command` is shown first
    status.json        {"status": "running|finished|failed|interrupted", "stage": str, "error": str | null}
    results.json       below
    metrics/train/     columns `step`, `loss` (nats per byte on the step's batch); optional `bits_per_byte`
    metrics/evaluate/  columns `step`, `bits_per_byte` (selection split)
    metrics/search/<method>-seed<k>/   (`search_stage` gives the name) columns `step`, `evaluations` (cumulative),
                       `best` (best search KL so far, nats per byte); a stage without `best` has no curve
    traces/routing.npz      a `moe_jax.analysis.RoutingTrace`, written by `moe_jax.analysis.save_trace`
    traces/topologies.npz   `names` [M] str, `keep` [M, L, E] bool, `num_choices` [M, L] int

`results.json` (lists "per seed" hold one number for each entry of `seeds`; a method without randomness has one):

    {"title": str, "summary": [sentence, ...], "headline": {name: number},     # headline: for `moe-jax runs` only
     "data": {"description": [sentence, ...],        # how it was split and cleaned
              "bytes": {split: {domain: int}}, "documents": {split: {domain: int}}, "digests": {name: str},
              "sources": [{"domain": str, "title": str, "origin": str, "licence": str}]},
     "model": {any name: number or string},     # parameters_total, parameters_active, num_layers, num_experts, ...
     "ngram": {"order": 5, "bits_per_byte": {"all": float, domain: float}, "selection_bits_per_byte": float},
     "model_bits_per_byte": {split: {"all": float, domain: float, "interval": [low, high]}},
     "routing": moe_jax.analysis.summarise_routing(trace, stats),    # made from the trace when absent
     "search": {
       "description": [sentence, ...],                               # what was the same for all methods
       "budget": {any name: number or string},                       # evaluations, experts_kept, seeds, ...
       "methods": [{"name": str, "kind": "evolved" | "baseline" | "reference", "genome": str, "seeds": [int],
                    "evaluations": int, "seconds": float,
                    "search_kl": [per seed], "selection_kl": [per seed],             # nats per byte to the full model
                    "test_bpb": [per seed], "test_bpb_interval": [low, high],        # interval: over test documents
                    "delta_vs_full": {"estimate": float, "interval": [low, high]},   # bits per byte, paired by document
                    "active_flops_per_token": float, "max_over_mean_load": float,
                    "comparisons": [{"against": str, "difference": float, "interval": [low, high], "p_value": float,
                                     "win_rate": float, "verdict": "better" | "worse" | "tie" | "unknown"}]}],
       "objectives": [str, str, str],                                # axis names with units, in the order of points
       "front": [{"method": str, "seed": int, "points": [[f1, f2, f3], ...]}],       # non-dominated points, minimised
       "full_model": [f1, f2, f3],
       "reference_point": [f1, f2, f3],
       "hypervolume": [{"method": str, "evaluations": int, "values": [per seed]}]},
     "heal": [{"name": str, "steps": int, "one_shot_bpb": float, "one_shot_interval": [low, high],
               "healed_bpb": float, "healed_interval": [low, high]}],
     "timing": {stage: seconds}}

Every key of a method but `name` may be absent. `kind` "reference" is the untouched model.
"""

from __future__ import annotations

import os
from pathlib import Path

from moe_jax.report.album import Album
from moe_jax.report.contents import read_contents, search_stage
from moe_jax.report.page import page
from moe_jax.report.sections_model import data_section, model_section, reproducibility_section
from moe_jax.report.sections_routing import routing_section
from moe_jax.report.sections_search import headline_section, heal_section, search_section
from moe_jax.runs import write_atomic

__all__ = ["search_stage", "write_report"]


def write_report(run_path: str | os.PathLike[str]) -> Path:
    """Writes the page of a run and its pictures, atomically.

    Args:
      run_path: the run's folder, as described above.

    Returns:
      Path of `report.html` in that folder.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: a file in it is damaged; the message names it.
    """
    run_path = Path(run_path)
    run, album = read_contents(run_path), Album(run_path)
    sections = [
        headline_section(run),
        data_section(run),
        model_section(run, album),
        routing_section(run, album),
        search_section(run, album),
        heal_section(run, album),
        reproducibility_section(run),
    ]
    subtitle = " · ".join(filter(None, ["moe_jax", f"run {run.name}", _device(run.environment)]))
    path = run_path / "report.html"
    write_atomic(path, page(run.results.get("title", f"Run {run.name}"), subtitle, sections))
    return path


def _device(environment: dict[str, object]) -> str:
    """The device in words, if it is known."""
    devices, backend = environment.get("devices"), environment.get("backend")
    return f"{backend}: {', '.join(sorted(set(map(str, devices))))}" if isinstance(devices, list) else ""
