"""Trials as SLURM jobs through submitit (https://github.com/facebookincubator/submitit), or as processes here.

submitit carries a function and its arguments to a job in a pickle of its own making, below the sweep's folder; what a
job returns is not read: a trial's outcome lies in its run folder. A job that meets its time limit, or is preempted, is
queued again by submitit and goes on from its newest checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax.training.sweeps.engines.engine import LaunchConfig, Work, parcel, require_package, work_of
from moe_jax.training.sweeps.trials import Trial

_PATIENCE = 1.0  # seconds between two looks at the queue


class Requeued:
    """A trial's work as submitit wants it: a job that is interrupted is queued again with the same arguments."""

    def __init__(self, work: Work):
        """Takes what trains a trial."""
        self._work = work

    def __call__(self, folder: str, config: str) -> None:
        """Trains."""
        work_of(self._work)(folder, config)

    def checkpoint(self, folder: str, config: str) -> Any:
        """What to queue in place of the interrupted job: the trial's own checkpoints hold all that is needed."""
        import submitit

        return submitit.helpers.DelayedSubmission(Requeued(self._work), folder, config)


class SlurmEngine:
    """Runs trials as jobs."""

    def __init__(self, work: Work, launch: LaunchConfig, folder: Path):
        """Makes the executor.

        Args:
          work: a function of a module that the jobs can import.
          launch: `workers`, `cpus`, `gpus` and the `slurm_` fields are read.
          folder: where submitit keeps its scripts, pickles and logs.
        """
        require_package("submitit", "slurm")
        import submitit

        self._launch, self._work = launch, work
        self._executor = submitit.AutoExecutor(folder=folder, cluster=launch.slurm_cluster)
        settings: dict[str, Any] = {"timeout_min": launch.slurm_minutes, "cpus_per_task": launch.cpus}
        settings |= {"gpus_per_node": launch.gpus, "mem_gb": launch.slurm_memory_gb, "name": "moe_jax_sweep"}
        if launch.slurm_partition:
            settings["slurm_partition"] = launch.slurm_partition
        if launch.slurm_setup:
            settings["slurm_setup"] = [launch.slurm_setup]
        self._executor.update_parameters(**settings)
        self._running: list[tuple[Any, Trial]] = []

    def room(self) -> int:
        """Jobs that may be added to the queue."""
        return self._launch.workers - len(self._running)

    def start(self, trials: list[Trial], watch: Callable[[Trial], None]) -> None:
        """Submits trials."""
        for trial in trials:
            self._running.append((self._executor.submit(Requeued(self._work), *parcel(trial)), trial))

    def wait(self) -> list[tuple[Trial, str]]:
        """Those whose job has left the queue."""
        deadline = time.monotonic() + _PATIENCE
        while not (done := [entry for entry in self._running if entry[0].done()]) and time.monotonic() < deadline:
            time.sleep(0.1)
        self._running = [entry for entry in self._running if entry not in done]
        return [(trial, f"job {job.job_id} ended as {job.state}; its log: {job.paths.stderr}") for job, trial in done]

    def close(self) -> None:
        """Leaves the jobs to the queue; a sweep that is started again waits for those that still run."""
