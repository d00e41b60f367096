"""Weights & Biases: offline unless WANDB_MODE says otherwise; `wandb sync` of the offline folders sends it later.

A restart writes a further offline folder under the same run id, and leaves out the steps that the earlier ones have.
Offline there is nobody to ask for the last step, so a file beside them keeps it, written before the step is: a kill
between the two loses one step there, and none appears twice.
"""

import os
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.runs import read_json, write_json
from moe_jax.training.sinks.sink import TrackedRun


class WeightsAndBiases:
    """A run of W&B's; see `sink.Sink`."""

    def __init__(self, run: TrackedRun, start: int) -> None:
        """Starts the run, or goes on with the folder's."""
        del start
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        self._record = run.folder / "run.json"
        self._state: dict[str, Any] = (
            read_json(self._record) if self._record.is_file() else {"id": secrets.token_hex(8), "last_step": -1}
        )
        is_offline = os.environ.setdefault("WANDB_MODE", "offline") == "offline"
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=self._state["id"],
            resume=None if is_offline else "allow",
            dir=str(run.folder),
            config=dict(run.settings),
            # Neither the machine nor the person; a run's environment.json has what a result depends on.
            settings=wandb.Settings(console="off", silent=True, host="-", x_disable_meta=True, x_disable_stats=True),
        )

    def log(self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a step that the earlier folders do not have, and a histogram of each array."""
        if step <= self._state["last_step"]:
            return
        self._state["last_step"] = step
        write_json(self._record, self._state)
        finite = {name: array[np.isfinite(array)].ravel() for name, array in arrays.items()}
        histograms = {name: self._histogram(numbers) for name, numbers in finite.items() if numbers.size}
        self._run.log({**scalars, **histograms}, step=step)

    def close(self, is_finished: bool) -> None:
        """Writes what is left."""
        self._run.finish(exit_code=0 if is_finished else 1)


def open_wandb(run: TrackedRun, start: int) -> WeightsAndBiases:
    """Opens the run."""
    return WeightsAndBiases(run, start)
