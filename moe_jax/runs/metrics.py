"""Metrics of a run as columns on disk: `metrics/<stage>/<first step>-<last step>.parquet`.

A segment ends where `flush` is called and nowhere else. Flushing exactly at checkpoints and truncating to the
checkpoint on a restart makes a resumed run rewrite the same segments, bit for bit. Wall-clock times differ from run to
run: they belong in a stage of their own ("timing").

A run that was asked to stop flushes in the midst of a segment. `reopen` takes such rows back, and the next flush writes
the segment as if there had been no stop; of two segments with one first step the longer counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_jax.hosts import is_first_host
from moe_jax.runs.files import write_atomic

Columns = dict[str, np.ndarray]


class MetricsWriter:
    """Collects rows of one stage and writes them as Parquet segments.

    Scalars are stored as float64, arrays as float32 if they are float32 and as float64 otherwise: every column can hold
    NaN, which also stands for a metric that a row does not mention. Only host 0 writes.
    """

    def __init__(self, folder: str | Path, stage: str) -> None:
        """Opens a stage, which may hold the segments of an earlier process.

        Args:
          folder: the run's folder.
          stage: name of the stage, such as "train" or "search/ga-seed0".
        """
        self._folder = Path(folder) / "metrics" / stage
        self._rows: list[tuple[int, dict[str, np.ndarray]]] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        segments = _segments(self._folder)
        self._last_step = max((last for _, last in segments), default=-1)

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a row to the buffer.

        Args:
          step: its step, larger than the last row's.
          values: name -> number, or a small array of one or two axes whose shape is the same in every row.

        Raises:
          ValueError: for a step that does not grow, a metric called "step", or a changed shape.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} follows step {self._last_step}; on a restart call truncate_after first")
        row = {name: np.asarray(value) for name, value in values.items()}
        for name, value in row.items():
            if name == "step" or value.ndim > 2:
                raise ValueError(
                    f"metric {name!r} of shape {value.shape}: at most two axes, and the name 'step' is taken"
                )
            if value.shape != (before := self._shapes.setdefault(name, value.shape)):
                raise ValueError(f"metric {name!r} has shape {value.shape} at step {step}, and had {before} before")
        self._rows.append((step, row))
        self._last_step = step

    def flush(self) -> None:
        """Writes the buffered rows as one segment, atomically; without rows it does nothing."""
        if self._rows and is_first_host():
            _write_segment(self._folder, _columns(self._rows, self._shapes))
            _remove_superseded(self._folder)
        self._rows.clear()

    def truncate_after(self, step: int) -> None:
        """Drops every row, buffered or on disk, whose step is larger, so that a run can go on from a checkpoint.

        Args:
          step: the checkpoint's step; -1 drops all.
        """
        self._rows = [row for row in self._rows if row[0] <= step]
        self._last_step = min(self._last_step, step)
        if not is_first_host():
            return
        _remove_superseded(self._folder)
        for (first, last), path in _segments(self._folder).items():
            if first <= step < last:
                columns = _read_segment(path)
                _write_segment(
                    self._folder, {name: column[columns["step"] <= step] for name, column in columns.items()}
                )
            if last > step:
                path.unlink()

    def reopen(self, after: int) -> None:
        """Takes the rows behind a step back into the buffer, to be written again with those that follow.

        Args:
          after: the last step of the segment before; called after `truncate_after`.
        """
        if not is_first_host():
            return
        for (first, _), path in sorted(_segments(self._folder).items()):
            if first > after:
                columns = _read_segment(path)
                names = [name for name in columns if name != "step"]
                self._shapes |= {name: columns[name].shape[1:] for name in names}
                self._rows += [
                    (int(step), {name: columns[name][row] for name in names})
                    for row, step in enumerate(columns["step"])
                ]


def read_metrics(folder: str | Path, stage: str) -> Columns:
    """Reads the metrics of a stage.

    Args:
      folder: the run's folder.
      stage: the stage.

    Returns:
      name -> `[N]` or `[N, ...]`, one entry a row in the order of steps; "step" is int64, the rest floating, NaN where
      a row did not mention the metric.

    Raises:
      FileNotFoundError: if the stage has no metrics, naming those that have.
    """
    segments = _segments(Path(folder) / "metrics" / stage)
    if not segments:
        known = ", ".join(list_stages(folder)) or "none"
        raise FileNotFoundError(f"{folder} has no metrics of stage {stage!r}; it has: {known}")
    parts = [_read_segment(path) for _, path in sorted(segments.items())]
    examples = {name: column for part in parts for name, column in part.items()}
    return {
        name: np.concatenate([part[name] if name in part else _blank(example, len(part["step"])) for part in parts])
        for name, example in examples.items()
    }


def list_stages(folder: str | Path) -> list[str]:
    """Lists the stages that have metrics in a run's folder, sorted."""
    root = Path(folder) / "metrics"
    return sorted({str(path.parent.relative_to(root)) for path in root.rglob("*.parquet")})


def _columns(rows: list[tuple[int, dict[str, np.ndarray]]], shapes: Mapping[str, tuple[int, ...]]) -> Columns:
    """Turns rows into columns, in the order in which the names appeared."""
    columns = {"step": np.array([step for step, _ in rows], np.int64)}
    for name in dict.fromkeys(name for _, row in rows for name in row):
        values = [row[name] for _, row in rows if name in row]
        dtype = np.float32 if shapes[name] and all(value.dtype == np.float32 for value in values) else np.float64
        column = np.full((len(rows), *shapes[name]), np.nan, dtype)
        column[[i for i, (_, row) in enumerate(rows) if name in row]] = values
        columns[name] = column
    return columns


def _blank(example: np.ndarray, num_rows: int) -> np.ndarray:
    """Returns a column of NaN of an example's shape and dtype."""
    return np.full((num_rows, *example.shape[1:]), np.nan, example.dtype)


def _segments(folder: Path) -> dict[tuple[int, int], Path]:
    """Returns (first step, last step) -> file of a stage's segments; of those with one first step, the longest."""
    longest = {first: (last, path) for (first, last), path in sorted(_files(folder).items())}
    return {(first, last): path for first, (last, path) in longest.items()}


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    """Returns (first step, last step) -> file of everything that was written."""
    matches = [(re.fullmatch(r"(\d+)-(\d+)\.parquet", path.name), path) for path in folder.glob("*.parquet")]
    return {(int(match[1]), int(match[2])): path for match, path in matches if match}


def _remove_superseded(folder: Path) -> None:
    """Removes the segments that a longer one has taken in."""
    for key in _files(folder).keys() - _segments(folder).keys():
        _files(folder)[key].unlink()


def _write_segment(folder: Path, columns: Columns) -> None:
    """Writes columns as a segment named by its first and last step."""
    arrays = []
    for column in columns.values():
        array = pa.array(column.reshape(-1))
        for size in reversed(column.shape[1:]):
            array = pa.FixedSizeListArray.from_arrays(array, size)
        arrays.append(array)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays, names=list(columns)), sink, compression="zstd")
    first, last = columns["step"][0], columns["step"][-1]
    write_atomic(folder / f"{first:09d}-{last:09d}.parquet", sink.getvalue().to_pybytes())


def _read_segment(path: Path) -> Columns:
    """Reads a segment's columns."""
    columns = {}
    table = pq.ParquetFile(path).read()
    for name, chunked in zip(table.column_names, table.columns, strict=True):
        array = chunked.combine_chunks()
        shape = [len(array)]
        while pa.types.is_fixed_size_list(array.type):
            shape.append(array.type.list_size)
            array = array.flatten()
        columns[name] = array.to_numpy(zero_copy_only=False).reshape(shape)
    return columns
