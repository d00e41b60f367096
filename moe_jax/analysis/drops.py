"""Assignments that reached no expert: how many, why, and where in the sequence.

Under a capacity limit, tokens are usually served in order, so late positions lose more often.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.types import RouterStats


class DropRates(NamedTuple):
    """Shares of all requested slots (K per token), each `[L]` float64; NaN without tokens.

    Attributes:
      kept: reached an expert.
      capacity: lost because the expert was full.
      topology: lost because the topology leaves fewer experts than choices.
    """

    kept: np.ndarray
    capacity: np.ndarray
    topology: np.ndarray


def drop_rates(stats: RouterStats) -> DropRates:
    """Shares of kept and lost assignments by cause.

    Args:
      stats: sums over tokens with a leading `[L]`.

    Returns:
      The shares of `kept + dropped_capacity + dropped_topology`.
    """
    kept = np.asarray(stats.kept, np.float64).sum(-1)
    capacity, topology = (np.asarray(a, np.float64) for a in (stats.dropped_capacity, stats.dropped_topology))
    total = kept + capacity + topology
    nan = np.full_like(total, np.nan)
    return DropRates(*(np.divide(part, total, out=nan.copy(), where=total > 0) for part in (kept, capacity, topology)))


def empty_slots_by_position(
    expert_ids: ArrayLike,
    position: ArrayLike,
    num_experts: int,
    num_positions: int,
    token_mask: ArrayLike | None = None,
) -> np.ndarray:
    """Share of a token's K slots that hold no expert, by position in the sequence.

    Args:
      expert_ids: `[L, T, K]` integers in `[0, E]`.
      position: `[T]` integers in `[0, num_positions)`.
      num_experts: E.
      num_positions: length of the sequences.
      token_mask: `[T]` bool or None.

    Returns:
      `[L, num_positions]` float64; NaN at a position without tokens.
    """
    empty = (np.asarray(expert_ids) == num_experts).mean(-1)  # [L, T]
    position = np.asarray(position)
    if token_mask is not None:
        empty, position = empty[:, np.asarray(token_mask, bool)], position[np.asarray(token_mask, bool)]
    tokens = np.bincount(position, minlength=num_positions).astype(np.float64)
    sums = np.stack([np.bincount(position, weights, num_positions) for weights in empty])
    return np.divide(sums, tokens[None], out=np.full(sums.shape, np.nan), where=tokens[None] > 0)
