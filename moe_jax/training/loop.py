"""The training loop: steps, metrics, checkpoints, and a stop with a name when numbers stop being numbers."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.models.execution import Remat
from moe_jax.runs import RunError
from moe_jax.training.mesh import place_batch, replicated
from moe_jax.training.step import TrainState, TrainStep
from moe_jax.types import Topology


class Batch(Protocol):
    """What a batch must offer."""

    @property
    def tokens(self) -> np.ndarray:
        """`[B, S+1]` int32 token ids."""

    @property
    def mask(self) -> np.ndarray:
        """`[B, S+1]` bool, false for padding."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long to train.

    Attributes:
      steps: optimizer steps.
      checkpoint_every: steps between checkpoints, which are also the ends of the metrics' segments.
      keep_newest: how many of the newest checkpoints stay; at least 2, so that one may be found damaged.
      keep_every: checkpoints of steps that are multiples of it stay for good; 0 for none.
      heal_steps: further steps for a pruned topology, and for the untouched model beside it.
      remat: what the backward pass computes once more instead of keeping it; see `models.execution.Execution`. Values
        do not depend on it, memory and time do.
    """

    steps: int = 600
    checkpoint_every: int = 100
    keep_newest: int = 2
    keep_every: int = 0
    heal_steps: int = 40
    remat: Remat = "none"

    def __post_init__(self) -> None:
        """Refuses lengths that are not positive."""
        for name in ("steps", "checkpoint_every", "heal_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        if self.keep_newest < 2 or self.keep_every < 0:
            raise ValueError(
                f"training.keep_newest={self.keep_newest} must be at least 2, and training.keep_every="
                f"{self.keep_every} at least 0"
            )


class NonFiniteError(RunError):
    """A loss or a fitness became NaN or infinite; the message names step, cause and the last good checkpoint."""


def train(
    state: TrainState,
    step: TrainStep,
    batches: Iterable[Batch],
    *,
    checkpoint_every: int,
    save: Callable[[int, TrainState], None],
    record: Callable[[int, dict[str, np.ndarray]], None],
    topology: Topology | None = None,
    last_saved: int | None = None,
    mesh: Mesh | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Runs one step per batch.

    Args:
      state: where to start; its buffers are donated.
      step: from `make_train_step`, not yet jitted.
      batches: one per step; their order is the caller's.
      checkpoint_every: `save` is called at multiples of this step and at the end.
      save: `(step, state)`; called only after every metric up to that step was found finite.
      record: `(step, metrics)`, steps counted from 1, every step, in order.
      topology: trained under, `keep [L, 1, E]`; None for everything open.
      last_saved: the checkpoint that `state` came from, for the error message.
      mesh: over which batches are split; the state lies on it already and stays where it lies. None for one device.
      is_stopping: asked after every step; True ends the loop there, saved like any other end.

    Returns:
      The final state.

    Raises:
      NonFiniteError: loss or gradient norm is NaN or infinite; nothing of that step is saved.
    """
    shardings = None if mesh is None else (jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh))
    compiled = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    number = int(state.step)
    for batch in batches:
        rows: Sequence[Any] = (batch.tokens, batch.mask)
        if mesh is not None:
            rows = [place_batch(mesh, array) for array in rows]
        state, metrics = compiled(state, *rows, topology)
        number += 1
        values = jax.tree.map(np.asarray, jax.device_get(metrics))
        _require_finite(number, values, last_saved)
        record(number, values)
        if number % checkpoint_every == 0:
            save(number, state)
            last_saved = number
        if is_stopping():
            break
    if last_saved != number:
        save(number, state)
    return state


def _require_finite(step: int, metrics: dict[str, np.ndarray], last_saved: int | None) -> None:
    for name in ("cross_entropy", "balance_loss", "z_loss", "loss", "grad_norm"):
        if name in metrics and not np.isfinite(metrics[name]).all():
            good = (
                "there is no checkpoint yet" if last_saved is None else f"the last good checkpoint is step {last_saved}"
            )
            raise NonFiniteError(
                f"{name} is {metrics[name]} at step {step}; {good}. "
                "Lower optimizer.learning_rate or raise loss.z, then run again."
            )
