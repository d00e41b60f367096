"""Weights & Biases: offline unless WANDB_MODE says otherwise; `wandb sync` of the offline folders sends it later.

A restart writes a further offline folder under the same run id and leaves out the steps that the earlier ones have, so
that none appears twice. What W&B's client still held in memory when its process was killed is missing.
"""

import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.runs import read_json, write_json
from moe_jax.training.sinks.sink import TrackedRun

BLOCK = 2**15  # bytes of a block of LevelDB's log
PIECE = struct.Struct("<IHB")  # checksum, length, kind of a piece of a record
MAGIC = b":W&B"
FIRST_PIECE = 7  # bytes of W&B's own header


class WeightsAndBiases:
    """A run of W&B's; see `sink.Sink`."""

    def __init__(self, run: TrackedRun, start: int) -> None:
        """Starts the run, or goes on with the folder's."""
        del start  # the files know which steps they have
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        named = run.folder / "run.json"
        if not named.is_file():
            write_json(named, {"id": secrets.token_hex(8)})
        is_offline = os.environ.setdefault("WANDB_MODE", "offline") == "offline"
        earlier = [step for file in run.folder.glob("wandb/*run-*/*.wandb") for step in stored_steps(file)]
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=read_json(named)["id"],
            resume=None if is_offline else "allow",
            dir=str(run.folder),
            config=dict(run.settings),
            # Neither the machine nor the person; a run's environment.json has what a result depends on.
            settings=wandb.Settings(console="off", silent=True, host="-", x_disable_meta=True, x_disable_stats=True),
        )
        self._last_step = max([*earlier, self._run.step - 1])  # online, W&B itself knows its next step

    def log(self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a step that is not stored yet, and a histogram of each array."""
        if step > self._last_step:
            finite = {name: array[np.isfinite(array)].ravel() for name, array in arrays.items()}
            histograms = {name: self._histogram(numbers) for name, numbers in finite.items() if numbers.size}
            self._run.log({**scalars, **histograms}, step=step, commit=True)

    def close(self, is_finished: bool) -> None:
        """Writes what is left."""
        self._run.finish(exit_code=0 if is_finished else 1)


def open_wandb(run: TrackedRun, start: int) -> WeightsAndBiases:
    """Opens the run."""
    return WeightsAndBiases(run, start)


def stored_steps(file: Path) -> list[int]:
    """The steps whose metrics a `.wandb` file holds."""
    return [record.history.step.num for record in read_records(file) if record.WhichOneof("record_type") == "history"]


def read_records(file: Path) -> Iterator[Any]:
    """The complete records of a `.wandb` file, messages of W&B's protocol in LevelDB's log format.

    A record is cut into pieces so that none crosses a block; kinds 1 and 4 end a record, and 0 is an unwritten rest.
    """
    from wandb.proto import wandb_internal_pb2

    data, position, record = file.read_bytes(), FIRST_PIECE, b""
    if not data.startswith(MAGIC):
        return
    while position + PIECE.size <= len(data):
        if (room := BLOCK - position % BLOCK) < PIECE.size:
            position += room
            continue
        _, length, kind = PIECE.unpack_from(data, position)
        position += PIECE.size
        if kind == 0 or position + length > len(data):
            return
        record += data[position : position + length]
        position += length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""
