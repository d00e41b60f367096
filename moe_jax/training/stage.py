"""Training as a stage of a run: from its newest checkpoint, with metrics and a bar; killed, it goes on bit for bit."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from rich.progress import Progress

from moe_jax.checkpoints import CheckpointStore
from moe_jax.runs import MetricsWriter, RunFolder
from moe_jax.runs.bars import bar
from moe_jax.training.loop import Batch, train
from moe_jax.training.step import TrainState, TrainStep
from moe_jax.types import Topology


def train_stage(
    run: RunFolder,
    display: Progress,
    stage: str,
    initial: TrainState,
    step: TrainStep,
    batches_from: Callable[[int], Iterable[Batch]],
    *,
    steps: int,
    checkpoint_every: int,
    note: Callable[[dict[str, np.ndarray]], str],
    topology: Topology | None = None,
    on_start: Callable[[int], None] = lambda step: None,
    on_record: Callable[[int, dict[str, np.ndarray]], None] = lambda step, values: None,
    on_save: Callable[[int, TrainState], None] = lambda step, state: None,
) -> TrainState:
    """Trains until step `steps`, from the newest checkpoint of the stage or from `initial`.

    Args:
      run: the open run folder; the stage's metrics and checkpoints go there.
      display: where the bar is drawn.
      stage: its name, such as "train" or "heal/evolved".
      initial: the state at the stage's first step.
      step: from `make_train_step`.
      batches_from: from a step to the batches of that step and all later ones.
      steps: the last step's number.
      checkpoint_every: steps between checkpoints, which are also the ends of the metrics' segments.
      note: what the bar says of a step's metrics.
      topology: trained under; see `train`.
      on_start: called with the step that training starts after, so that other records can be cut there.
      on_record: called with every step's number and metrics, as soon as they are there.
      on_save: called with step and state before a checkpoint is written.

    Returns:
      The state at step `steps`.
    """
    writer = MetricsWriter(run.path, stage)
    # Written before `save` returns, since `status.json` then names it as the last good checkpoint.
    with CheckpointStore(run.subfolder("checkpoints", *stage.split("/")), is_async=False) as store:
        last = store.latest_step()
        state = jax.tree.map(np.array, initial) if last is None else store.restore(last, initial)
        start = int(state.step)
        writer.truncate_after(start)
        on_start(start)
        if start == steps:
            return state
        with bar(display, stage, steps, start) as progress:

            def record(step: int, values: dict[str, np.ndarray]) -> None:
                writer.append(step, values)
                on_record(step, values)
                progress.show(step, note(values))

            def save(step: int, state: TrainState) -> None:
                writer.flush()
                on_save(step, state)
                store.save(step, state)
                run.report_progress(stage, step, store.path(step))

            return train(
                state,
                step,
                batches_from(start),
                checkpoint_every=checkpoint_every,
                save=save,
                record=record,
                topology=topology,
                last_saved=last,
            )
