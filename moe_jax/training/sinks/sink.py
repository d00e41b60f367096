"""What a sink is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class TrackedRun(NamedTuple):
    """What a sink should know of a run.

    Attributes:
      folder: the sink's own, inside the run's folder; it may not exist yet.
      project: the name that runs are grouped under.
      name: of the run.
      settings: the configuration, dotted key -> value.
    """

    folder: Path
    project: str
    name: str
    settings: Mapping[str, Any]


class Sink(Protocol):
    """An open sink."""

    def log(self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]) -> None:
        """Takes a step's numbers, and the arrays that they were made of, for those that can draw histograms."""

    def close(self, is_finished: bool) -> None:
        """Writes what is left; `is_finished` tells a run that came to its end from one that was stopped."""


OpenSink = Callable[[TrackedRun, int], Sink]  # (run, the step that training starts after) -> sink
