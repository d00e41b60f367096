"""Training as a stage of a run: from its newest checkpoint, with metrics and a bar; killed, it goes on bit for bit."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh
from rich.progress import Progress

from moe_jax.checkpoints import CheckpointStore, Restored
from moe_jax.runs import MetricsWriter, RunFolder
from moe_jax.runs.bars import bar
from moe_jax.runs.stop import Stopped, listening
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
    mesh: Mesh | None = None,
    keep_newest: int = 2,
    keep_every: int = 0,
) -> TrainState:
    """Trains until step `steps`, from the newest checkpoint of the stage or from `initial`.

    Args:
      run: the open run folder; the stage's metrics and checkpoints go there.
      display: where the bar is drawn.
      stage: its name, such as "train" or "heal/evolved".
      initial: the state at the stage's first step; on a mesh its buffers are donated.
      step: from `make_train_step`.
      batches_from: from a step to the batches of that step and all later ones.
      steps: the last step's number.
      checkpoint_every: steps between checkpoints, which are also the ends of the metrics' segments.
      note: what the bar says of a step's metrics.
      topology: trained under; see `train`.
      on_start: called with the step that training starts after, so that other records can be cut there.
      on_record: called with every step's number and metrics, as soon as they are there.
      on_save: called with step and state before a checkpoint is written.
      mesh: where the state lies and over which batches are split; None for one device.
      keep_newest: how many of the newest checkpoints stay.
      keep_every: steps whose multiples' checkpoints stay for good; 0 for none.

    Returns:
      The state at step `steps`.

    Raises:
      Stopped: a signal asked for it; the state is saved.
    """
    writer = MetricsWriter(run.path, stage)
    folder = run.subfolder("checkpoints", *stage.split("/"))
    with CheckpointStore(folder, keep_newest, keep_every=keep_every) as store:
        restored = _restore(run, display, stage, store, initial)
        if restored is not None:
            state = restored.tree
        elif mesh is not None:
            state = initial
        else:
            state = jax.tree.map(np.array, initial)
        start = int(state.step)
        writer.truncate_after(start)
        on_start(start)
        if start == steps:
            return state
        writer.reopen(after=start - start % checkpoint_every)
        unreported: list[int] = []

        def report() -> None:
            # `status.json` names a checkpoint once it is whole.
            if unreported and not store.is_saving():
                saved = unreported.pop()
                run.report_progress(stage, saved, store.path(saved))

        def record(step: int, values: dict[str, np.ndarray]) -> None:
            writer.append(step, values)
            on_record(step, values)
            progress.show(step, note(values))
            report()

        def save(step: int, state: TrainState) -> None:
            writer.flush()
            if step % checkpoint_every == 0 or step == steps:  # not where a signal ends the process
                on_save(step, state)
            store.wait()
            report()
            store.save(step, state)
            unreported.append(step)

        with bar(display, stage, steps, start) as progress, listening() as request:
            state = train(
                state,
                step,
                batches_from(start),
                checkpoint_every=checkpoint_every,
                save=save,
                record=record,
                topology=topology,
                last_saved=None if restored is None else start,
                mesh=mesh,
                is_stopping=request.is_due,
            )
            store.wait()
            report()
        if request.is_granted:
            raise Stopped(request.exit_code)
        return state


def _restore(
    run: RunFolder, display: Progress, stage: str, store: CheckpointStore, initial: TrainState
) -> Restored | None:
    """The newest checkpoint that is whole; says which newer ones are not, and puts the run back to it."""
    restored = store.restore_newest(initial)
    if restored is not None and restored.damaged:
        for warning in restored.warnings:
            display.console.print(f"{stage}: {warning}", soft_wrap=True)
        run.report_progress(stage, restored.step, store.path(restored.step))
    return restored
