"""MLflow: a run in an SQLite file of the run's folder, or in the store that MLFLOW_TRACKING_URI names.

On a restart the run of that folder goes on, and steps that it has already are left out: MLflow would keep both, and
the repeated ones are the same numbers. MLflow draws no histograms; it gets the scalars.
"""

import logging
import os
import time
from collections.abc import Mapping

import numpy as np

from moe_jax.runs import read_json, write_json
from moe_jax.training.sinks.sink import TrackedRun

LONGEST_VALUE = 6000  # characters of a parameter
MOST_PARAMETERS = 100  # in one call


class MLflow:
    """A run of MLflow's; see `sink.Sink`."""

    def __init__(self, run: TrackedRun, start: int) -> None:
        """Starts the run, or goes on with the folder's."""
        del start  # the store knows which steps it has
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
        run.folder.mkdir(parents=True, exist_ok=True)
        own_store = f"sqlite:///{(run.folder / 'mlflow.db').absolute()}"
        self._client, self._metric = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", own_store)), Metric
        named = run.folder / "run.json"
        if named.is_file():
            self._id = read_json(named)["id"]
            self._client.update_run(self._id, "RUNNING")
        else:
            experiment = self._client.get_experiment_by_name(run.project)
            experiment_id = (
                experiment.experiment_id
                if experiment
                else self._client.create_experiment(run.project, run.folder.absolute().as_uri())
            )
            self._id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
            settings = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in run.settings.items()]
            for first in range(0, len(settings), MOST_PARAMETERS):
                self._client.log_batch(self._id, params=settings[first : first + MOST_PARAMETERS])
            write_json(named, {"id": self._id})
        self._last_step = self._find_last_step()

    def log(self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the scalars of a step that the store does not have."""
        del arrays
        if step > self._last_step:
            now = int(1000 * time.time())
            metrics = [self._metric(name, number, now, step) for name, number in scalars.items()]
            self._client.log_batch(self._id, metrics=metrics)

    def close(self, is_finished: bool) -> None:
        """Records how the run ended."""
        self._client.set_terminated(self._id, "FINISHED" if is_finished else "KILLED")

    def _find_last_step(self) -> int:
        """The last step that the store has; a step is written in one transaction, so one metric speaks for all."""
        for name in self._client.get_run(self._id).data.metrics:
            return max(metric.step for metric in self._client.get_metric_history(self._id, name))
        return -1


def open_mlflow(run: TrackedRun, start: int) -> MLflow:
    """Opens the run: `mlflow ui --backend-store-uri sqlite:///<run>/tracking/mlflow/mlflow.db` shows it."""
    return MLflow(run, start)
