"""Finds the runs below a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moe_jax.runs.files import read_json
from moe_jax.runs.lock import is_locked
from moe_jax.runs.progress import Progress, read_progress


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """One line of a list of runs.

    Attributes:
      path: the run's folder.
      progress: where it stands; a run without a living process is never "running".
      headline: its results in a line: the numbers of `results["headline"]`, or else the first sentence of
        `results["summary"]`; empty before there are results.
    """

    path: Path
    progress: Progress
    headline: str


def list_runs(root: str | Path = "runs") -> list[RunSummary]:
    """Lists the runs below a folder, the most recently changed first.

    Args:
      root: a folder of experiments, an experiment's folder, or a run.

    Returns:
      One summary a run; empty if there is none.

    Raises:
      RunError: if a run is damaged.
    """
    root = Path(root)
    folders = sorted(file.parent for depth in ("", "*/", "*/*/") for file in root.glob(f"{depth}status.json"))
    summaries = []
    for folder in folders:
        progress = read_progress(folder)
        if progress.status == "running" and not is_locked(folder):
            progress = dataclasses.replace(progress, status="interrupted")
        results = folder / "results.json"
        headline = _headline(read_json(results)) if results.is_file() else ""
        summaries.append(RunSummary(folder, progress, headline))
    return sorted(summaries, key=lambda summary: summary.progress.updated, reverse=True)


def _headline(results: dict[str, Any]) -> str:
    """Puts results in a line."""
    numbers = results.get("headline", {})
    line = " · ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items()
    )
    return line or next(iter(results.get("summary", [])), "")
