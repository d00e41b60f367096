"""Points that learn from the losses before them, and trials that stop early: an Optuna study (https://optuna.org).

The study lies in an SQLite file, which the process that runs the sweep alone opens, so workers may be anywhere. Started
again after a kill, it gives the points that it has already, then new ones. The sampler is seeded anew for each point by
its number, so the points do not depend on how often the sweep was started.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.training.sweeps.points import (
    ListedPoints,
    Point,
    Points,
    SweepConfig,
    list_points,
    make_point,
    random_point,
)
from moe_jax.training.sweeps.space import Axis

_EXAMPLES = 64  # points of a space without end that are checked up front


class StudyPoints:
    """The points of a study."""

    def __init__(self, axes: Sequence[Axis], config: SweepConfig, seed: int, evaluate_every: int, file: Path):
        """Opens the study, or begins it.

        Args:
          axes: the space.
          config: how to search it; with a method other than "tpe" the study only decides which trials stop.
          seed: of the sampler.
          evaluate_every: steps from one evaluation of a trial to the next.
          file: of the database, made if missing.
        """
        import optuna

        self._optuna, self._axes, self._seed, self._evaluate_every = optuna, axes, seed, evaluate_every
        self._listed = None if config.method == "tpe" else list_points(axes, config, seed)
        self._total = config.points if self._listed is None else len(self._listed)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner: Any = optuna.pruners.NopPruner()
        if config.prune == "asha":
            pruner = optuna.pruners.SuccessiveHalvingPruner(config.prune_after, config.prune_factor)
        self._study = optuna.create_study(
            storage=f"sqlite:///{file}", study_name="sweep", pruner=pruner, direction="minimize", load_if_exists=True
        )
        self._trials: dict[int, Any] = {}

    def ask(self) -> Point | None:
        """The next point: first those of earlier processes, then a new one."""
        number = len(self._trials)
        if number >= self._total:
            return None
        known = self._study.get_trials(deepcopy=False)
        if number < len(known) and known[number].state != self._optuna.trial.TrialState.WAITING:
            trial = self._optuna.trial.Trial(self._study, known[number]._trial_id)
        else:
            trial = self._new_trial(number, is_waiting=number < len(known))
        self._trials[number] = trial
        return make_point(self._axes, number, [_decode(axis, trial.params[axis.name]) for axis in self._axes])

    def report(self, point: Point, step: int, loss: float) -> bool:
        """Notes a loss; whether the point is among those to stop."""
        trial, evaluation = self._trials[point.number], max(step // self._evaluate_every, 1)
        if not self._is_open(point):
            return False
        if evaluation not in self._frozen(point).intermediate_values:
            trial.report(loss, evaluation)
        return trial.should_prune()

    def tell(self, point: Point, loss: float | None, is_stopped: bool) -> None:
        """Notes the end, once."""
        states = self._optuna.trial.TrialState
        if not self._is_open(point):
            return
        if is_stopped:
            self._study.tell(self._trials[point.number], state=states.PRUNED)
        elif loss is None:
            self._study.tell(self._trials[point.number], state=states.FAIL)
        else:
            self._study.tell(self._trials[point.number], loss)

    def _new_trial(self, number: int, is_waiting: bool) -> Any:
        """A point that no process has asked for, unless it was killed while asking."""
        self._study.sampler = self._optuna.samplers.TPESampler(seed=(self._seed * 1_000_003 + number) % 2**32)
        if self._listed is not None and not is_waiting:
            values = self._listed[number].values
            self._study.enqueue_trial({axis.name: _encode(axis, values[axis.name]) for axis in self._axes})
        return self._study.ask({axis.name: self._distribution(axis) for axis in self._axes})

    def _distribution(self, axis: Axis) -> Any:
        """An axis in Optuna's terms; of a choice, the index, since its values may be tuples."""
        distributions = self._optuna.distributions
        if axis.values is not None:
            return distributions.CategoricalDistribution(range(len(axis.values)))
        if axis.kind.endswith("integers"):
            return distributions.IntDistribution(*axis.arguments, log=axis.is_log)
        return distributions.FloatDistribution(*axis.arguments, log=axis.is_log)

    def _frozen(self, point: Point) -> Any:
        return self._study.get_trials(deepcopy=False)[point.number]

    def _is_open(self, point: Point) -> bool:
        return not self._frozen(point).state.is_finished()


def example_points(axes: Sequence[Axis], config: SweepConfig, seed: int) -> list[Point]:
    """Points that can be checked before anything is trained: all of them, or random ones of a space without end."""
    if config.method == "tpe":
        return [random_point(axes, seed, number) for number in range(_EXAMPLES)]
    return list_points(axes, config, seed)


def open_points(axes: Sequence[Axis], config: SweepConfig, seed: int, evaluate_every: int, file: Path) -> Points:
    """What gives the points of a sweep: a list, or a study for "tpe" and for early stops; see `StudyPoints`."""
    if config.method == "tpe" or config.prune != "none":
        return StudyPoints(axes, config, seed, evaluate_every, file)
    return ListedPoints(list_points(axes, config, seed))


def _encode(axis: Axis, value: Any) -> Any:
    return value if axis.values is None else axis.values.index(value)


def _decode(axis: Axis, parameter: Any) -> Any:
    return parameter if axis.values is None else axis.values[parameter]
