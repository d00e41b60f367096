"""Programs of several processes on this machine, which stand for hosts."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

ROOT = pathlib.Path(__file__).parent.parent
DEADLINE = 600  # seconds until a process counts as stuck


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextmanager
def started(
    command: Sequence[str], count: int, logs: pathlib.Path, devices: int = 1, is_slurm: bool = False, **variables: str
) -> Iterator[list[subprocess.Popen]]:
    """The same Python command on each of `count` hosts, killed at the end if they still run.

    Each appends to `logs`, a path without its suffix, followed by its index and ".log". With `is_slurm` they are told
    their places as SLURM tells them, by variables of the environment.
    """
    address = f"127.0.0.1:{free_port()}"
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables
    processes = []
    try:
        for index in range(count):
            hosts = [f"--hosts={address},{count},{index}"] if count > 1 else []
            own = environment
            if is_slurm:
                hosts = ["--hosts=auto"]
                own = environment | slurm | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
            with log_of(logs, index).open("a") as log:
                processes.append(
                    subprocess.Popen([sys.executable, *command, *hosts], cwd=ROOT, env=own, stdout=log, stderr=log)
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def finish(
    command: Sequence[str], count: int, logs: pathlib.Path, devices: int = 1, is_slurm: bool = False, **variables: str
) -> list[str]:
    """Runs a program to its end, which must be good, and returns what each host printed."""
    with started(command, count, logs, devices, is_slurm, **variables) as processes:
        for index, process in enumerate(processes):
            assert process.wait(DEADLINE) == 0, log_of(logs, index).read_text()
    return [log_of(logs, index).read_text() for index in range(count)]


def log_of(logs: pathlib.Path, index: int) -> pathlib.Path:
    """The file that a host prints to."""
    return logs.with_name(f"{logs.name}{index}.log")
