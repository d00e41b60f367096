"""Leaves out steps whose loss or gradient norm stands far above those before, and counts them (PaLM, 2204.02311, 5.1).

A step is a spike if its loss or gradient norm is not finite, or above

    median + deviations * max(1.4826 * median |x - median|, median / 100)

of the last accepted steps: 1.4826 times the median deviation estimates the standard deviation of a normal
distribution without hearing the outliers. A spike changes nothing but the step's number: parameters, optimizer and
balance state stay. All of it is a pure function of the training state, so a resumed run leaves out the same steps.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.training.step import TrainState, TrainStep
from moe_jax.types import Array, Topology

WATCHED = ("loss", "grad_norm")


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """What counts as a spike.

    Attributes:
      window: accepted steps that a new one is compared with; until there are so many, only numbers that are not finite
        are spikes.
      deviations: how many standard deviations above the median is too far.
      most_in_a_row: after so many spikes in a row, the next step is accepted if it is finite, since the loss has
        settled elsewhere, and ends the run if it is not.
    """

    window: int = 100
    deviations: float = 6.0
    most_in_a_row: int = 10

    def __post_init__(self) -> None:
        """Refuses what could never or would always skip."""
        for name in ("window", "deviations", "most_in_a_row"):
            if getattr(self, name) <= 0:
                raise ValueError(f"spikes.{name} must be positive, got {getattr(self, name)}")


class SpikeHistory(NamedTuple):
    """What the steps before were like.

    Attributes:
      values: `[2, window]` float32, the last accepted losses and gradient norms, in a ring.
      accepted: int32, how many steps were accepted.
      skipped: int32, how many were not.
      in_a_row: int32, how many of these since the last accepted one.
    """

    values: Array
    accepted: Array
    skipped: Array
    in_a_row: Array


def watch_spikes(state: TrainState, config: SpikeConfig) -> TrainState:
    """The state with an empty history, as `skip_spikes` wants it."""
    values = jnp.zeros((len(WATCHED), config.window), jnp.float32)
    # Each number an array of its own: the loop donates them all.
    history = SpikeHistory(values, *(jnp.zeros((), jnp.int32) for _ in range(3)))
    return dataclasses.replace(state, spikes=history)


def skip_spikes(step: TrainStep, config: SpikeConfig) -> TrainStep:
    """Wraps a step so that spikes are not applied; its state comes from `watch_spikes`.

    The metrics gain `skipped` (1 for a spike) and `num_skipped` (so far); the others say what the step would have been.
    """

    def guarded(
        state: TrainState,
        tokens: Array,
        mask: Array,
        topology: Topology | None = None,
        segments: Array | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        after, metrics = step(state, tokens, mask, topology, segments)
        assert state.spikes is not None
        observed = jnp.stack([metrics[name] for name in WATCHED])
        is_skipped = _is_spike(observed, state.spikes, config) & (state.spikes.in_a_row < config.most_in_a_row)
        history = _remember(observed, state.spikes, is_skipped, config.window)
        kept = jax.tree.map(lambda old, new: jnp.where(is_skipped, old, new), state, after)
        metrics |= {"skipped": is_skipped.astype(jnp.int32), "num_skipped": history.skipped}
        return dataclasses.replace(kept, step=after.step, spikes=history), metrics

    return guarded


def _is_spike(observed: Array, history: SpikeHistory, config: SpikeConfig) -> Array:
    """Whether `[2]` observed values are too far above the history."""
    median = jnp.median(history.values, axis=1)
    deviation = 1.4826 * jnp.median(jnp.abs(history.values - median[:, None]), axis=1)
    limit = median + config.deviations * jnp.maximum(deviation, jnp.abs(median) / 100)
    is_far = (history.accepted >= config.window) & jnp.any(observed > limit)
    return is_far | ~jnp.isfinite(observed).all()


def _remember(observed: Array, history: SpikeHistory, is_skipped: Array, window: int) -> SpikeHistory:
    """The history after a step; skipped ones leave no values, or a plateau of spikes would become the measure."""
    values = history.values.at[:, history.accepted % window].set(observed)
    return SpikeHistory(
        jnp.where(is_skipped, history.values, values),
        history.accepted + ~is_skipped,
        history.skipped + is_skipped,
        jnp.where(is_skipped, history.in_a_row + 1, 0),
    )
