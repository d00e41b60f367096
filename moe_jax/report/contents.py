"""Reading what a report needs from a run folder; every part may be absent."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.analysis import RoutingTrace, load_trace
from moe_jax.runs import list_stages, read_json, read_metrics


@dataclasses.dataclass(frozen=True)
class Topologies:
    """Topologies worth a picture.

    Attributes:
      names: M names.
      keep: `[M, L, E]` bool.
      num_choices: `[M, L]` int.
    """

    names: tuple[str, ...]
    keep: np.ndarray
    num_choices: np.ndarray


@dataclasses.dataclass(frozen=True)
class RunContents:
    """What is in a run folder; an empty mapping or None stands for a file that is not there.

    Attributes:
      name: the folder's name.
      config: resolved configuration.
      environment: versions, device, commit, command.
      status: how far the run came.
      results: as the docstring of `moe_jax.report` defines.
      metrics: stage -> columns.
      trace: recorded routing.
      topologies: masks to draw.
    """

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    results: dict[str, Any]
    metrics: dict[str, dict[str, np.ndarray]]
    trace: RoutingTrace | None
    topologies: Topologies | None


def read_contents(run_path: Path) -> RunContents:
    """Reads a run folder.

    Args:
      run_path: the folder.

    Returns:
      Its contents.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: a file is damaged; the message names it.
    """
    if not run_path.is_dir():
        raise FileNotFoundError(f"{run_path} is no run folder: it does not exist")
    files = {
        name: read_json(run_path / f"{name}.json") if (run_path / f"{name}.json").exists() else {}
        for name in ("config", "environment", "status", "results")
    }
    trace_path, topologies_path = run_path / "traces" / "routing.npz", run_path / "traces" / "topologies.npz"
    return RunContents(
        name=run_path.resolve().name,
        **files,
        metrics={stage: read_metrics(run_path, stage) for stage in list_stages(run_path)},
        trace=load_trace(trace_path) if trace_path.exists() else None,
        topologies=_read_topologies(topologies_path) if topologies_path.exists() else None,
    )


def _read_topologies(path: Path) -> Topologies:
    """Reads the masks."""
    with np.load(path, allow_pickle=False) as arrays:
        if missing := [name for name in ("names", "keep", "num_choices") if name not in arrays]:
            raise ValueError(f"{path} holds no topologies: it lacks {', '.join(missing)}")
        return Topologies(tuple(map(str, arrays["names"])), arrays["keep"].astype(bool), arrays["num_choices"])


def search_stage(method: str, seed: int) -> str:
    """Names the metrics stage of a search: "search/", the method in lower case with "-" between words, its seed."""
    return f"search/{_slug(method)}-seed{seed}"


def search_curves(run: RunContents) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Collects search progress by method.

    Args:
      run: contents with stages as `search_stage` names them.

    Returns:
      method (its name in the results where one matches) -> (`[N]` evaluations, `[S, N]` best so far by seed); seeds
      that reported at different evaluations are read at all of them, from where every seed has begun.
    """
    names: dict[str, str] = {
        _slug(method["name"]): method["name"] for method in run.results.get("search", {}).get("methods", [])
    }
    seeds: dict[str, list[dict[str, np.ndarray]]] = {}
    for stage, columns in run.metrics.items():
        if "best" in columns and (match := re.fullmatch(r"search/(.+)-seed\d+", stage)):
            seeds.setdefault(names.get(str(match[1]), str(match[1])), []).append(columns)
    curves = {}
    for name in sorted(seeds, key=lambda n: list(names.values()).index(n) if n in names.values() else len(names)):
        grid = np.unique(np.concatenate([columns["evaluations"] for columns in seeds[name]]))
        grid = grid[grid >= max(columns["evaluations"][0] for columns in seeds[name])]
        best = [c["best"][np.searchsorted(c["evaluations"], grid, side="right") - 1] for c in seeds[name]]
        curves[name] = grid, np.stack(best)
    return curves


def _slug(name: str) -> str:
    """Lower-case words joined by "-"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
