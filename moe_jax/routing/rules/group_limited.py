"""Group-limited top-k: a token picks groups of experts first, and its K experts within them (DeepSeek-V2 and V3).

The E experts are `num_groups` runs of equal length, one on each device or node, and a token visits `open_groups` of
them, which bounds how often its activations are sent. With s the scores and b the selection bias:

    DeepSeek-V2 (2405.04434)   s softmax; a group counts by its best expert; g_e = c * s_e
    DeepSeek-V3 (2412.19437)   s sigmoid; a group counts by the sum of its best two s + b; g_e = c * s_e / sum_chosen s

The bias moves both selections and never the gates. Published settings: V2 has 3 open of 8 groups, K = 6 of E = 160 and
c = 16; V3 has 4 open of 8 groups, K = 8 of E = 256 and c = 2.5.
"""

import jax
import jax.numpy as jnp

from moe_jax.routing.scores import CLOSED, normalize, score
from moe_jax.routing.select import biased, gather_chosen, select_top_k
from moe_jax.types import Array, Choice, RoutingInputs

GROUP_SCORES = {"max": 1, "top_2_sum": 2}  # how many of a group's best experts count


def group_limited_top_k(
    inputs: RoutingInputs,
    num_choices: int,
    *,
    num_groups: int = 2,
    open_groups: int = 1,
    group_score: str = "max",
    score_function: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
) -> Choice:
    """The best groups of every token, then the K best experts in them, weighed by their scores.

    Closed experts count 0 in their group. A token may get fewer than K experts if a topology closes many of the
    groups that it picked.

    Args:
      inputs: the tokens' logits and constraints; the bias is added to the scores for both selections.
      num_choices: K, static.
      num_groups: how many groups there are, a divisor of E.
      open_groups: how many of them a token may use.
      group_score: "max" (V2) or "top_2_sum" (V3), what a group counts by.
      score_function: a key of `scores.SCORES`.
      renormalize: whether the gates of a token are divided by their sum.
      scale: c, a factor on the gates.

    Raises:
      ValueError: groups that do not divide the experts, too few of them open for K, or an unknown group score.
    """
    _check_groups(inputs.logits.shape[-1], num_choices, num_groups, open_groups, group_score)
    scores = score(score_function, inputs.logits, inputs.is_open)
    selection = biased(scores, inputs)
    if inputs.is_open is not None:
        selection = jnp.where(inputs.is_open, selection, CLOSED)
    is_reachable = in_best_groups(selection, num_groups, open_groups, GROUP_SCORES[group_score])
    is_reachable = is_reachable if inputs.is_open is None else is_reachable & inputs.is_open
    ids = select_top_k(selection, num_choices, is_reachable, inputs.limit)
    gates = gather_chosen(scores, ids)
    gates = scale * (normalize(gates) if renormalize else gates)
    return Choice(ids, gates, scores if score_function == "softmax" else normalize(scores))


def in_best_groups(selection: Array, num_groups: int, open_groups: int, num_counted: int) -> Array:
    """Which experts lie in a token's best groups.

    Args:
      selection: `[T, E]` selection scores, `CLOSED` for closed experts.
      num_groups: a divisor of E.
      open_groups: how many groups to take; ties go to the lower group.
      num_counted: a group counts by the sum of so many of its best experts.

    Returns:
      `[T, E]` bool.
    """
    groups = selection.reshape(len(selection), num_groups, -1)  # (T, E) -> (T, groups, experts of a group)
    best, _ = jax.lax.top_k(groups, min(num_counted, groups.shape[-1]))
    others = jnp.where(best[..., 1:] > CLOSED, best[..., 1:], 0.0).sum(-1)
    ids = select_top_k(best[..., 0] + others, open_groups, None, None)
    is_best = (ids[:, :, None] == jnp.arange(num_groups)[None, None, :]).any(1)
    return jnp.repeat(is_best, groups.shape[-1], axis=-1)


def _check_groups(num_experts: int, num_choices: int, num_groups: int, open_groups: int, group_score: str) -> None:
    """Refuses settings that do not fit E and K."""
    if group_score not in GROUP_SCORES:
        raise ValueError(f"unknown group_score {group_score!r}; known: {', '.join(GROUP_SCORES)}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the {num_experts} experts into equal groups")
    if not 1 <= open_groups <= num_groups:
        raise ValueError(f"open_groups must be in [1, {num_groups}] for {num_groups} groups, got {open_groups}")
    if (reachable := open_groups * num_experts // num_groups) < num_choices:
        raise ValueError(
            f"open_groups={open_groups} of num_groups={num_groups} leave a token {reachable} of {num_experts} experts, "
            f"fewer than num_choices={num_choices}; open more groups or lower K"
        )
