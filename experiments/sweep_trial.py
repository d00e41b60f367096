"""A trial of `experiments.sweep`, wherever an engine runs it."""

import time
from collections.abc import Callable
from pathlib import Path

from rich.progress import Progress

from experiments.train import train_model
from moe_jax.runs import RunFolder, enable_compilation_cache, from_json
from moe_jax.runs.bars import progress_display
from moe_jax.runs.lock import is_locked
from moe_jax.training.sweeps import TrialStopped, is_to_stop


def run_trial(folder: Path, config: str, watch: Callable[[], None]) -> None:
    """Trains a trial in its folder, in a process of its own; see `train_trial`."""
    enable_compilation_cache()
    with progress_display() as display:
        train_trial(folder, config, watch, display)


def train_trial(folder: Path, config: str, watch: Callable[[], None], display: Progress) -> None:
    """Trains a trial in its folder to its end, or to the word to stop; what it fails with is recorded there.

    Args:
      folder: the run folder.
      config: the configuration as JSON.
      watch: called after each evaluation.
      display: where bars are drawn.
    """
    while is_locked(folder):  # a worker of a sweep that was killed still has it
        time.sleep(1.0)
    known = set(display.task_ids)

    def stop_if_told(step: int | None = None) -> None:
        watch()
        if is_to_stop(folder):
            raise TrialStopped

    try:
        with RunFolder(folder, from_json(config)) as run:
            if not run.is_finished:
                try:
                    stop_if_told()
                    run.write_results(train_model(run, display, stop_if_told))
                except TrialStopped:
                    run.write_results({"title": "A trial that its sweep stopped early"})
                run.finish()
    except Exception as error:
        display.console.print(f"{folder.name} failed: {error}", soft_wrap=True, markup=False)
    for task in set(display.task_ids) - known:
        display.remove_task(task)
