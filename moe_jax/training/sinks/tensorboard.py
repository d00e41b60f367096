"""TensorBoard: event files by its own writer, without TensorFlow or torch.

On a restart the new file begins with a START of the first step to come, at which TensorBoard forgets the events of
that step and later ones in older files (unless it runs with --purge_orphaned_data=false): no step appears twice.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.training.sinks.sink import TrackedRun

BUCKETS = 30


class TensorBoard:
    """An event file; see `sink.Sink`."""

    def __init__(self, run: TrackedRun, start: int) -> None:
        """Opens a new event file."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2
        self._writer = EventFileWriter(str(run.folder))
        begun = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=start + 1, session_log=begun))

    def log(self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]) -> None:
        """Writes scalars, and a histogram of each array."""
        value = self._summary.Summary.Value
        values = [value(tag=name, simple_value=number) for name, number in scalars.items()]
        values += [value(tag=name, histo=self._histogram(array)) for name, array in arrays.items()]
        self._writer.add_event(
            self._event(wall_time=time.time(), step=step, summary=self._summary.Summary(value=values))
        )
        self._writer.flush()

    def close(self, is_finished: bool) -> None:
        """Closes the file."""
        del is_finished  # an event file has no end
        self._writer.close()

    def _histogram(self, array: np.ndarray) -> Any:
        """The message of a histogram of finite numbers."""
        numbers = array[np.isfinite(array)].astype(np.float64).ravel()
        if not numbers.size:
            return self._summary.HistogramProto()
        counts, edges = np.histogram(numbers, BUCKETS)
        return self._summary.HistogramProto(
            min=numbers.min(),
            max=numbers.max(),
            num=numbers.size,
            sum=numbers.sum(),
            sum_squares=np.square(numbers).sum(),
            bucket_limit=edges[1:],
            bucket=counts,
        )


def open_tensorboard(run: TrackedRun, start: int) -> TensorBoard:
    """Opens an event file in the run's folder: `tensorboard --logdir runs` shows all runs."""
    return TensorBoard(run, start)
