"""Trials in this process, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from moe_jax.runs import to_json
from moe_jax.training.sweeps.engines.engine import Work
from moe_jax.training.sweeps.trials import Trial


class HereEngine:
    """Runs a trial when it is started, and returns when it has ended."""

    def __init__(self, work: Work):
        """Takes what trains a trial."""
        self._work = work
        self._ended: list[tuple[Trial, str]] = []

    def room(self) -> int:
        """One, unless a trial waits to be taken."""
        return 0 if self._ended else 1

    def start(self, trials: list[Trial], watch: Callable[[Trial], None]) -> None:
        """Runs trials."""
        for trial in trials:
            self._work(trial.folder, to_json(trial.config), partial(watch, trial))
            self._ended.append((trial, ""))

    def wait(self) -> list[tuple[Trial, str]]:
        """Those that were run."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Nothing to give back."""
