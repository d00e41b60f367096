"""Sends a run's metrics to TensorBoard, MLflow or Weights & Biases, besides the run's own columnar files.

The files hold every metric of every step. A tracker shows curves, and drowns in keys: a model of 32 layers with 64
experts has 2,000 expert loads. What has an axis of experts is sent as percentiles of each layer and as a histogram,
never as a scalar for each expert; what has an axis of layers as a scalar for each layer while all keys fit into
`max_keys`, else as mean and largest.
"""

import dataclasses
import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moe_jax.runs import ConfigError
from moe_jax.training.sinks import SINKS, Sink, TrackedRun

PERCENTILES = (5, 50, 95)


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Which trackers a run is sent to; all need the extra `track`.

    Attributes:
      tensorboard: event files; see `sinks.tensorboard`.
      mlflow: an MLflow run; see `sinks.mlflow`.
      wandb: a Weights & Biases run; see `sinks.wandb`.
      project: the name that runs are grouped under.
      every: steps between two that are sent.
      max_keys: most scalars of a step.
    """

    tensorboard: bool = False
    mlflow: bool = False
    wandb: bool = False
    project: str = "moe_jax"
    every: int = 10
    max_keys: int = 100

    def __post_init__(self) -> None:
        """Refuses numbers that are not positive."""
        for name in ("every", "max_keys"):
            if getattr(self, name) < 1:
                raise ValueError(f"tracking.{name} must be at least 1, got {getattr(self, name)}")


class KeyCapWarning(UserWarning):
    """Metrics of layers are summarised because they have too many keys."""


class Tracker:
    """The sinks of a run, as a context manager: `start`, then `record` for every step.

    Left with an exception, the sinks hear that the run was stopped.
    """

    def __init__(self, config: TrackingConfig, folder: Path, settings: Mapping[str, Any]) -> None:
        """Checks that the packages are there; nothing is opened yet.

        Args:
          config: which sinks.
          folder: the run's.
          settings: the run's configuration, dotted key -> value.

        Raises:
          ConfigError: for a sink whose package is not installed.
        """
        self._config, self._sinks, self._is_warned = config, list[Sink](), False
        self._names = [name for name in SINKS if getattr(config, name)]
        self._runs = {
            name: TrackedRun(folder / "tracking" / name, config.project, folder.name, settings) for name in self._names
        }
        for name in self._names:
            if importlib.util.find_spec(name) is None:
                raise ConfigError(f"config.tracking.{name}=True needs the package {name}: pip install 'moe_jax[track]'")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close(is_finished=error is None)

    def start(self, step: int) -> None:
        """Opens the sinks; training starts after this step, which is 0 or a checkpoint's."""
        self._sinks = [SINKS[name](self._runs[name], step) for name in self._names]

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Sends a step's metrics if its turn has come.

        Args:
          step: its number; multiples of `every` are sent.
          metrics: name -> scalar, `[L]` or `[L, E]`.

        Raises:
          ConfigError: if even the summaries have more keys than `max_keys`.

        Warns:
          KeyCapWarning: once, if the metrics of layers are summarised.
        """
        if not self._sinks or step % self._config.every:
            return
        values = {name: np.asarray(value) for name, value in metrics.items()}
        scalars = self._scalars(with_percentiles(values))
        arrays = {name: value for name, value in values.items() if value.ndim}
        for sink in self._sinks:
            sink.log(step, scalars, arrays)

    def _scalars(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        most = self._config.max_keys
        scalars = by_layer(values)
        if len(scalars) <= most:
            return scalars
        summary = summarized(values)
        if len(summary) > most:
            raise ConfigError(
                f"config.tracking.max_keys={most} is too few: a step has {len(summary)} keys even with one mean and "
                f"one largest value over the layers; give at least {len(summary)}"
            )
        if not self._is_warned:
            self._is_warned = True
            warnings.warn(
                f"a step has {len(scalars)} keys, more than config.tracking.max_keys={most}: metrics of layers are "
                f"sent as mean and largest, {len(summary)} keys; the run's metrics files hold all of them",
                KeyCapWarning,
                stacklevel=3,
            )
        return summary


def with_percentiles(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replaces what has an axis of experts, `[L, E]`, by percentiles `[L]` of each layer, in multiples of the mean."""
    result = {}
    for name, value in values.items():
        if value.ndim < 2:
            result[name] = value
            continue
        with np.errstate(invalid="ignore"):
            relative = value / value.mean(-1, keepdims=True)
        for percent, row in zip(PERCENTILES, np.percentile(relative, PERCENTILES, axis=-1), strict=True):
            result[f"{name}_p{percent}"] = row
    return result


def by_layer(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Scalars, and `name/layer_i` of what has an axis `[L]`."""
    scalars = {name: float(value) for name, value in values.items() if not value.ndim}
    layers = {name: value for name, value in values.items() if value.ndim}
    return scalars | {f"{name}/layer_{i}": float(x) for name, value in layers.items() for i, x in enumerate(value)}


def summarized(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Scalars, and `name/mean` and `name/max` of what has an axis `[L]`."""
    scalars = {name: float(value) for name, value in values.items() if not value.ndim}
    for name, value in values.items():
        if value.ndim:
            scalars |= {f"{name}/mean": float(value.mean()), f"{name}/max": float(value.max())}
    return scalars
