"""One process at a time in a run folder: a lock of the kernel, which dies with its process however that dies."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import TextIO

from moe_jax.runs.progress import RunError

LOCK = ".lock"


def take_lock(folder: Path) -> TextIO:
    """Takes the lock of a run, making its folder if it is missing.

    Args:
      folder: the run's folder.

    Returns:
      The open lock file; closing it gives the lock back.

    Raises:
      RunError: if a living process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("a")
    for wait in (0.05, 0.0):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            # `is_locked` of another process holds it for an instant.
            time.sleep(wait)
    lock.close()
    raise RunError(f"another process is working on {folder}; wait for it, or choose another --workdir")


def is_locked(folder: Path) -> bool:
    """Tells whether a living process works in a run folder."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
