"""Where two runs of a model began to route differently, and how close that choice was.

Small numerical differences (another backend, precision, batch or device) leave logits almost equal and yet change which
experts a token gets, wherever the boundary margin is smaller than the difference. From there on the token's hidden
state is another, and later flips follow from the first one: only a token's first flip tells about its cause.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.analysis.confidence import boundary_margin
from moe_jax.types import RouterOutput, RoutingPlan


class RoutingFlips(NamedTuple):
    """How two routings of the same tokens differ. A flip is another set of experts; order and gates do not count.

    Attributes:
      flipped: `[L]` int64 tokens whose experts differ, in each layer.
      first: `[L]` int64 tokens that flip in this layer for the first time; they sum to the tokens that differ at all.
      layer: `[T]` int64 layer of each token's first flip, L for a token without one.
      margin: `[T]` float32 boundary margin of the first routing at the first flip; NaN without a flip.
    """

    flipped: np.ndarray
    first: np.ndarray
    layer: np.ndarray
    margin: np.ndarray


def find_flips(before: RouterOutput, after: RouterOutput, token_mask: ArrayLike | None = None) -> RoutingFlips:
    """Compares two routings layer by layer.

    Args:
      before: of a model with L MoE layers, at trace level "full".
      after: of the same tokens, at "topk" or "full".
      token_mask: `[T]` bool, false for tokens that do not count; None counts all.

    Returns:
      The flips; masked tokens have none.

    Raises:
      ValueError: plans or logits were not kept, or the two are not of one shape.
    """
    if not (isinstance(before.plan, RoutingPlan) and isinstance(after.plan, RoutingPlan)) or before.logits is None:
        raise ValueError('find_flips needs plan and logits of the first routing, the plan of the second: trace="full"')
    ids, other = (np.sort(np.asarray(plan.expert_ids), axis=-1) for plan in (before.plan, after.plan))
    if ids.ndim != 3 or ids.shape != other.shape:
        raise ValueError(f"the plans must both have expert ids [L, T, K], got {ids.shape} and {other.shape}")
    num_layers, _, num_choices = ids.shape
    differs = (ids != other).any(axis=-1)  # [L, T]
    if token_mask is not None:
        differs &= np.asarray(token_mask, bool)[None]
    layer = np.where(differs.any(axis=0), differs.argmax(axis=0), num_layers)
    margins = np.asarray(boundary_margin(before.logits, num_choices))  # [L, T]
    is_flipped = layer < num_layers
    at_first = np.take_along_axis(margins, np.minimum(layer, num_layers - 1)[None], axis=0)[0]
    return RoutingFlips(
        flipped=differs.sum(axis=1),
        first=np.bincount(layer, minlength=num_layers + 1)[:num_layers],
        layer=layer,
        margin=np.where(is_flipped, at_first, np.float32(np.nan)),
    )
