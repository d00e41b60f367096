"""What runs trials: in this process, on a Ray cluster, under SLURM. An engine knows nothing of what a trial is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from moe_jax.runs import ConfigError, to_json
from moe_jax.training.sweeps.trials import Trial


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Where and how many at a time; not part of what a sweep is, so it may change from one start to the next.

    Attributes:
      workers: trials at a time on Ray and SLURM; members at a time in a compiled population.
      retries: how often a trial whose worker was lost is started again, from its newest checkpoint.
      cpus: CPU cores of a trial on Ray and SLURM.
      gpus: GPUs of a trial.
      ray_address: the cluster, such as "auto"; "" starts one on this machine.
      slurm_cluster: "slurm", or "local" for processes of this machine through the same code.
      slurm_minutes: time limit of a job.
      slurm_partition: the partition; "" for the default one.
      slurm_memory_gb: memory of a job.
      slurm_setup: a shell command to run first in each job; "" for none.
    """

    workers: int = 4
    retries: int = 2
    cpus: int = 1
    gpus: int = 0
    ray_address: str = ""
    slurm_cluster: str = "slurm"
    slurm_minutes: int = 120
    slurm_partition: str = ""
    slurm_memory_gb: int = 8
    slurm_setup: str = ""

    def __post_init__(self) -> None:
        """Refuses counts that make no sense."""
        for name, least in (("workers", 1), ("retries", 0), ("cpus", 1), ("gpus", 0), ("slurm_minutes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"launch.{name} is {getattr(self, name)}, expected at least {least}")


# (the trial's folder, its configuration as JSON, a function to call after each evaluation): trains to the end, or to
# the word to stop. An error of the trial is recorded in its folder and not raised.
Work = Callable[[Path, str, Callable[[], None]], None]


class Engine(Protocol):
    """What runs trials."""

    def room(self) -> int:
        """How many trials can be started now."""

    def start(self, trials: list[Trial], watch: Callable[[Trial], None]) -> None:
        """Starts trials; `watch` is called after each evaluation, if that happens in this process."""

    def wait(self) -> list[tuple[Trial, str]]:
        """Trials that have ended, after at most some seconds; with each, how its worker was lost, or ""."""

    def close(self) -> None:
        """Gives everything back; trials that still run are left to the cluster, or ended with this process."""


def work_of(work: Work) -> Callable[[str, str], None]:
    """The work as a function of two strings, which is all that travels."""

    def run(folder: str, config: str) -> None:
        work(Path(folder), config, lambda: None)

    return run


def require_package(name: str, engine: str) -> None:
    """Refuses an engine whose package is not installed."""
    import importlib.util

    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"engine {engine!r} needs the package {name!r}; install it: pip install 'moe_jax[scale]'")


def parcel(trial: Trial) -> tuple[str, str]:
    """What travels to a worker."""
    return str(trial.folder), to_json(trial.config)
