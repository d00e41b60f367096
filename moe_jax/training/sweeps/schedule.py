"""The order of a sweep: asks for points, starts their trials where there is room, notes how they end.

Nothing is kept between processes but the trials' folders and the study: a trial that has ended is read, the others are
started, and a sweep that was killed anywhere goes on.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, deque
from collections.abc import Callable

import numpy as np

from moe_jax.training.sweeps.engines import Engine
from moe_jax.training.sweeps.points import Point, Points
from moe_jax.training.sweeps.trials import Outcome, Trial, is_to_stop, read_evaluations, read_outcome, tell_to_stop


@dataclasses.dataclass(frozen=True)
class Ended:
    """A trial and what became of it."""

    trial: Trial
    outcome: Outcome


class Schedule:
    """A sweep on its way."""

    def __init__(
        self,
        points: Points,
        trials_of: Callable[[Point], list[Trial]],
        engine: Engine,
        *,
        is_pruned: bool,
        retries: int,
        on_end: Callable[[Ended], None],
    ):
        """Nothing is started yet.

        Args:
          points: where in the space to train.
          trials_of: from a point to its trials.
          engine: what runs them.
          is_pruned: whether a point's first trial decides if the others run.
          retries: how often a trial whose worker was lost is started again.
          on_end: called once for each trial.
        """
        self._points, self._trials_of, self._engine = points, trials_of, engine
        self._is_pruned, self._retries, self._on_end = is_pruned, retries, on_end
        self._waiting: deque[Trial] = deque()
        self._held: dict[int, list[Trial]] = {}  # of a point whose first trial runs
        self._open: dict[int, tuple[Point, int, list[Outcome]]] = {}  # point, trials left, outcomes
        self._running: list[Trial] = []
        self._starts: Counter[str] = Counter()

    def run(self) -> None:
        """Runs until every point has ended."""
        while True:
            chosen: list[Trial] = []
            while len(chosen) < self._engine.room() and (trial := self._next()) is not None:
                chosen.append(trial)
            self._running += chosen
            self._starts.update(trial.name for trial in chosen)
            if chosen:
                self._engine.start(chosen, self._follow)
            if not self._running:
                return
            for trial, lost in self._engine.wait():
                self._running.remove(trial)
                outcome = read_outcome(trial.folder)
                if outcome.state == "unfinished" and self._starts[trial.name] <= self._retries:
                    self._waiting.appendleft(trial)
                else:
                    self._end(trial, dataclasses.replace(outcome, error=outcome.error or lost))
            for trial in self._running:
                self._follow(trial)

    def _next(self) -> Trial | None:
        """The next trial to start; those that ended in an earlier process are only noted."""
        while True:
            while self._waiting:
                trial = self._waiting.popleft()
                self._follow(trial)
                outcome = read_outcome(trial.folder)
                if outcome.state == "unfinished":
                    return trial
                self._end(trial, outcome)
            point = self._points.ask()
            if point is None:
                return None
            first, *others = self._trials_of(point)
            self._open[point.number] = (point, 1 + len(others), [])
            self._waiting.append(first)
            if self._is_pruned:
                self._held[point.number] = others
            else:
                self._waiting.extend(others)

    def _follow(self, trial: Trial) -> None:
        """Reports the losses of a point's first trial, and leaves it the word to stop if it is to."""
        if not self._is_pruned or trial.seed or is_to_stop(trial.folder):
            return
        for step, loss in read_evaluations(trial.folder).items():
            if self._points.report(trial.point, step, loss):
                tell_to_stop(trial.folder, step)
                break

    def _end(self, trial: Trial, outcome: Outcome) -> None:
        """Notes a trial's end, and its point's if it was the last."""
        self._on_end(Ended(trial, outcome))
        point, left, outcomes = self._open[trial.point.number]
        others = self._held.pop(point.number, [])
        outcomes = [*outcomes, outcome]
        if outcome.state == "finished":
            self._waiting.extend(others)
            left -= 1
        else:
            left -= 1 + len(others)
        self._open[point.number] = (point, left, outcomes)
        if not left:
            del self._open[point.number]
            loss = float(np.mean([outcome.loss for outcome in outcomes if outcome.state != "stopped"] or [math.nan]))
            is_stopped = any(outcome.state == "stopped" for outcome in outcomes)
            self._points.tell(point, loss if math.isfinite(loss) else None, is_stopped)
