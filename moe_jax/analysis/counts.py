"""Counting recorded assignments: the tables from which the other statistics are computed."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def group_expert_counts(
    expert_ids: ArrayLike, groups: ArrayLike, num_experts: int, num_groups: int, token_mask: ArrayLike | None = None
) -> np.ndarray:
    """Counts assignments by token group (a domain, a document, a byte value), layer and expert.

    Args:
      expert_ids: `[L, T, K]` integers in `[0, E]`; the sentinel `E` is not counted.
      groups: `[T]` integers in `[0, G)`.
      num_experts: E.
      num_groups: G.
      token_mask: `[T]` bool, False for tokens to leave out; None counts all.

    Returns:
      `[G, L, E]` int64.
    """
    expert_ids = np.asarray(expert_ids, np.int64)
    num_layers, num_tokens, _ = expert_ids.shape
    keep = np.ones(num_tokens, bool) if token_mask is None else np.asarray(token_mask, bool)
    rows = np.asarray(groups, np.int64)[keep] * num_layers + np.arange(num_layers)[:, None]  # [L, T]
    flat = rows[:, :, None] * (num_experts + 1) + expert_ids[:, keep]  # [L, T, K]
    counts = np.bincount(flat.ravel(), minlength=num_groups * num_layers * (num_experts + 1))
    return counts.reshape(num_groups, num_layers, num_experts + 1)[..., :num_experts]


def expert_counts(expert_ids: ArrayLike, num_experts: int, token_mask: ArrayLike | None = None) -> np.ndarray:
    """Counts the assignments of each expert: `[L, T, K]` integers in `[0, E]` to `[L, E]` int64."""
    groups = np.zeros(np.shape(expert_ids)[1], np.int64)
    return group_expert_counts(expert_ids, groups, num_experts, 1, token_mask)[0]
