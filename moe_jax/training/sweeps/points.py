"""The points of a sweep, one after the other: a grid, or random draws. `study.py` has those that learn from losses.

A point is a function of the sweep's seed and the point's number, so a sweep that is started again gives the same ones.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from moe_jax.runs import ConfigError
from moe_jax.training.sweeps.space import Axis, Settings


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """How a space is searched.

    Attributes:
      method: "grid" (every combination), "random", or "tpe" (tree-structured Parzen estimator, by Optuna).
      points: how many; 0 for all of a grid.
      seeds: trials of each point: the seed of the swept configuration, and the ones after it.
      prune: "asha" stops trials early by asynchronous successive halving (1810.05934): at each rung, those that are not
        among the best `1 / prune_factor`. A point's first seed decides; the others run if it comes through.
      prune_after: evaluations (at checkpoints) before the first rung; each rung comes `prune_factor` times later.
      prune_factor: see there.
      reference: an axis and one of its values with which its others are compared, seed by seed; empty for none.
    """

    method: Literal["grid", "random", "tpe"] = "grid"
    points: int = 0
    seeds: int = 3
    prune: Literal["none", "asha"] = "none"
    prune_after: int = 1
    prune_factor: int = 3
    reference: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        """Refuses counts that make no sense."""
        for name, least in (("points", 0), ("seeds", 1), ("prune_after", 1), ("prune_factor", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"sweep.{name} is {getattr(self, name)}, expected at least {least}")
        if self.method != "grid" and not self.points:
            raise ValueError(f"sweep.points is 0, and {self.method!r} has no end of its own; say how many")
        if len(self.reference) not in (0, 2):
            raise ValueError(f"sweep.reference is {self.reference}, expected an axis and one of its values, or nothing")


@dataclasses.dataclass(frozen=True)
class Point:
    """Where in the space.

    Attributes:
      number: counted from 0.
      values: one for each axis, by its name.
      settings: dotted keys of the configuration, and their values.
    """

    number: int
    values: dict[str, Any]
    settings: Settings


class Points(Protocol):
    """What gives a sweep its points."""

    def ask(self) -> Point | None:
        """The next point, from number 0 in every process; None after the last."""

    def report(self, point: Point, step: int, loss: float) -> bool:
        """Notes a held-out loss on the way; whether the trial should stop."""

    def tell(self, point: Point, loss: float | None, is_stopped: bool) -> None:
        """Notes how a point ended; None if it has no loss."""


class ListedPoints:
    """Points that are known before anything is trained."""

    def __init__(self, points: Sequence[Point]):
        """Takes them in order."""
        self._left = list(reversed(points))

    def ask(self) -> Point | None:
        """The next one."""
        return self._left.pop() if self._left else None

    def report(self, point: Point, step: int, loss: float) -> bool:
        """Stops nothing."""
        return False

    def tell(self, point: Point, loss: float | None, is_stopped: bool) -> None:
        """Learns nothing."""


def list_points(axes: Sequence[Axis], config: SweepConfig, seed: int) -> list[Point]:
    """The points of a grid, or random ones.

    Args:
      axes: the space.
      config: `method` is "grid" or "random".
      seed: of the random draws.

    Raises:
      ConfigError: a grid over a range, or with fewer points than `points` asks for.
    """
    if config.method == "random":
        return [random_point(axes, seed, number) for number in range(config.points)]
    for axis in axes:
        if axis.values is None:
            raise ConfigError(
                f"config.space[{axis.name!r}] is a range, of which a grid has no points; "
                "write choice(...) with the values to try, or set config.sweep.method to 'random' or 'tpe'"
            )
    combinations = itertools.product(*(axis.values or () for axis in axes))
    points = [make_point(axes, number, values) for number, values in enumerate(combinations)]
    if config.points > len(points):
        raise ConfigError(f"config.sweep.points is {config.points}, and the grid has {len(points)}; lower it, or say 0")
    return points[: config.points or None]


def make_point(axes: Sequence[Axis], number: int, values: Sequence[Any]) -> Point:
    """A point from one value an axis."""
    settings: Settings = {}
    for axis, value in zip(axes, values, strict=True):
        settings |= axis.settings(value)
    return Point(number, {axis.name: value for axis, value in zip(axes, values, strict=True)}, settings)


def random_point(axes: Sequence[Axis], seed: int, number: int) -> Point:
    """Point `number` of the random ones."""
    random = np.random.Generator(np.random.Philox([seed, number]))
    return make_point(axes, number, [axis.at(random.random()) for axis in axes])
