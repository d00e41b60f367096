"""Trials: a point of the space with a seed, trained in a run folder of its own, from which its outcome is read.

Engines carry a trial's folder and configuration to where it is trained, and nothing back: what became of it lies in the
folder. So does the word to stop, which a trial looks for whenever it has evaluated itself.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from ml_collections import ConfigDict

from moe_jax.runs import RunError, read_json, read_metrics, read_progress, write_json
from moe_jax.training.sweeps.points import Point
from moe_jax.training.sweeps.space import apply

State = Literal["finished", "stopped", "failed", "unfinished"]
_STOP = "stop.json"


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is to be trained.

    Attributes:
      point: where in the space.
      seed: counted from 0.
      folder: the run folder, an absolute path.
      config: the configuration.
    """

    point: Point
    seed: int
    folder: Path
    config: ConfigDict

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
      state: "unfinished" if it was never begun, or its worker is gone.
      loss: bits per byte on the selection split; NaN without one.
      step: of the last evaluation.
      error: why it failed, or "".
    """

    state: State
    loss: float = math.nan
    step: int = 0
    error: str = ""


class TrialStopped(Exception):
    """A trial that its sweep stops early."""


def make_trials(point: Point, config: ConfigDict, seeds: int, root: Path) -> list[Trial]:
    """The trials of a point.

    Args:
      point: where in the space.
      config: the configuration that is swept.
      seeds: how many.
      root: folder of all trials.
    """
    return [
        Trial(
            point,
            seed,
            root.absolute() / f"{point.number:04d}-seed{seed}",
            apply(config, point.settings | {"seed": config.seed + seed}),
        )
        for seed in range(seeds)
    ]


def read_outcome(folder: Path) -> Outcome:
    """Reads what became of a trial, from any process."""
    try:
        progress = read_progress(folder)
    except RunError:
        return Outcome("unfinished")
    evaluations = read_evaluations(folder)
    step = max(evaluations, default=0)
    if progress.status == "failed":
        return Outcome("failed", step=step, error=progress.error or "")
    if progress.status != "finished":
        return Outcome("unfinished", step=step)
    if is_to_stop(folder) and "model_bits_per_byte" not in read_json(folder / "results.json"):
        return Outcome("stopped", evaluations[step], step)
    return Outcome("finished", read_loss(folder, "selection"), step)


def read_loss(folder: Path, split: str) -> float:
    """Bits per byte of a finished trial on a split."""
    return float(read_json(folder / "results.json")["model_bits_per_byte"][split]["all"])


def read_evaluations(folder: Path) -> dict[int, float]:
    """Step -> bits per byte on the selection split, as far as a trial has come."""
    try:
        columns = read_metrics(folder, "evaluate")
    except FileNotFoundError:
        return {}
    return dict(zip(columns["step"].tolist(), columns["bits_per_byte"].tolist(), strict=True))


def tell_to_stop(folder: Path, step: int) -> None:
    """Leaves the word to stop, because of the loss at a step."""
    write_json(folder / _STOP, {"because_of_step": step})


def is_to_stop(folder: Path) -> bool:
    """Whether the word was left."""
    return (folder / _STOP).is_file()
