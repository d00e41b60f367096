"""Which experts are chosen together, over all pairs of a token's K choices.

OLMoE (2409.02060) defines co-activation as N_ij / N_i over all pairs; its published script counts neighbours in rank
only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def coactivation_counts(expert_ids: ArrayLike, num_experts: int, token_mask: ArrayLike | None = None) -> np.ndarray:
    """Counts the tokens on which two experts are both chosen.

    Args:
      expert_ids: `[L, T, K]` integers in `[0, E]`, distinct within a token except for the sentinel `E`.
      num_experts: E.
      token_mask: `[T]` bool or None.

    Returns:
      `[L, E, E]` int64, symmetric; the diagonal is the tokens of each expert.
    """
    expert_ids = np.asarray(expert_ids, np.int64)
    if token_mask is not None:
        expert_ids = expert_ids[:, np.asarray(token_mask, bool)]
    num_layers, _, num_choices = expert_ids.shape
    side = num_experts + 1
    counts = np.zeros((num_layers, side, side), np.int64)
    for i in range(num_choices):
        for j in range(num_choices):
            pairs = expert_ids[..., i] * side + expert_ids[..., j]  # [L, T]
            counts += np.stack([np.bincount(layer, minlength=side * side) for layer in pairs]).reshape(-1, side, side)
    return counts[:, :num_experts, :num_experts]


def conditional_coactivation(counts: ArrayLike) -> np.ndarray:
    """Share of expert i's tokens that also go to j, N_ij / N_i, `[L, E, E]`; NaN for an unused expert (2409.02060)."""
    counts = np.asarray(counts, np.float64)
    own = np.diagonal(counts, axis1=-2, axis2=-1)[..., None]
    return np.divide(counts, own, out=np.full_like(counts, np.nan), where=own > 0)


def coactivation_lift(counts: ArrayLike) -> np.ndarray:
    """Co-activation over what the experts' loads alone would give; 1 is chance.

    A token's choices are distinct, so expected pairs are proportional to N_i N_j for i != j and scaled to the observed
    number of pairs, which plain independence would overstate.

    Args:
      counts: `[L, E, E]` as `coactivation_counts` gives.

    Returns:
      `[L, E, E]` float64; NaN on the diagonal and where nothing is expected.
    """
    counts = np.asarray(counts, np.float64)
    own = np.diagonal(counts, axis1=-2, axis2=-1)
    off_diagonal = ~np.eye(counts.shape[-1], dtype=bool)
    products = own[..., :, None] * own[..., None, :] * off_diagonal
    pairs, total = (counts * off_diagonal).sum((-2, -1)), products.sum((-2, -1))
    scale = np.divide(pairs, total, out=np.zeros_like(pairs), where=total > 0)
    expected = scale[..., None, None] * products
    return np.divide(counts, expected, out=np.full_like(counts, np.nan), where=expected > 0)
