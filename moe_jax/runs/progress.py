"""Where a run stands, as its `status.json` records it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moe_jax.errors import MendableError
from moe_jax.runs.files import read_json


class RunError(MendableError, RuntimeError):
    """A run that cannot start or go on; the message is one line and says what to do."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, as in its `status.json`.

    Attributes:
      status: "running", "finished", "failed" (with `error`) or "interrupted" (left without an end, or killed).
      stage: the part of the experiment, such as "train"; "" before the first.
      step: the last step of that stage that was reported.
      error: what went wrong, one line, or None.
      last_checkpoint: the newest good checkpoint, relative to the run's folder, or None.
      started: seconds since the epoch of the first start.
      updated: seconds since the epoch of the last change.
    """

    status: str
    stage: str
    step: int
    error: str | None
    last_checkpoint: str | None
    started: float
    updated: float


def read_progress(path: str | Path) -> Progress:
    """Reads where a run stands, from any process.

    Args:
      path: the run's folder.

    Returns:
      Its progress; `status` is what was recorded, so a killed run says "running" (see `list_runs`).

    Raises:
      RunError: if the folder holds no readable run.
    """
    file = Path(path) / "status.json"
    try:
        return Progress(**read_json(file))
    except FileNotFoundError:
        raise RunError(f"{path} is no run folder: it has no status.json") from None
    except (TypeError, ValueError) as error:
        raise RunError(f"{file} is damaged: {error}") from error
