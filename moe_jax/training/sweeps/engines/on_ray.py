"""Trials as tasks of a Ray cluster (https://docs.ray.io), whose nodes see the sweep's folder at the same path.

Ray's own retries are off: a task whose worker or node was lost is started again by the sweep, which does that for every
engine, and goes on from the trial's newest checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from moe_jax.training.sweeps.engines.engine import LaunchConfig, Work, parcel, require_package, work_of
from moe_jax.training.sweeps.trials import Trial

_PATIENCE = 1.0  # seconds between two looks at the losses of running trials


class RayEngine:
    """Runs trials on a cluster."""

    def __init__(self, work: Work, launch: LaunchConfig):
        """Joins the cluster, or starts one on this machine.

        Args:
          work: a function of a module that the nodes can import.
          launch: `workers`, `cpus`, `gpus` and `ray_address` are read.
        """
        require_package("ray", "ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray, self._launch = ray, launch
        # Workers find the project where this process does.
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if not ray.is_initialized():
            settings: dict[str, Any] = {"include_dashboard": False, "num_gpus": launch.gpus * launch.workers}
            if launch.ray_address:
                settings = {"address": launch.ray_address}
            else:
                settings["num_cpus"] = launch.cpus * launch.workers
            ray.init(runtime_env={"env_vars": environment}, log_to_driver=False, **settings)
        self._task = ray.remote(num_cpus=launch.cpus, num_gpus=launch.gpus, max_retries=0)(work_of(work))
        self._running: dict[Any, Trial] = {}

    def room(self) -> int:
        """Workers without a trial."""
        return self._launch.workers - len(self._running)

    def start(self, trials: list[Trial], watch: Callable[[Trial], None]) -> None:
        """Submits trials."""
        for trial in trials:
            self._running[self._task.remote(*parcel(trial))] = trial

    def wait(self) -> list[tuple[Trial, str]]:
        """Those whose task has ended."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_PATIENCE)
        ended = []
        for reference in ready:
            lost = ""
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                lost = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            ended.append((self._running.pop(reference), lost))
        return ended

    def close(self) -> None:
        """Leaves the cluster; tasks that still run end with this process."""
        self._ray.shutdown()
