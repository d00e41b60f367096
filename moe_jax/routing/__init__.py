"""Routing: which experts process which token. Pure functions on arrays; no flax, no parameters.

`route` is the whole of it: a rule from `RULES` between the constraints that hold for every rule (token mask,
topology, capacity) and the statistics that every loss and picture reads. A new rule is a function with the signature
of `rules.softmax_top_k` and a line in `RULES`.
"""

from collections.abc import Callable
from typing import NamedTuple, get_args

import jax.numpy as jnp

from moe_jax.routing.balance import update_bias
from moe_jax.routing.capacity import drop_over_capacity, expert_capacity
from moe_jax.routing.rules import Choice, softmax_top_k, softmax_top_k_renormalized, switch_top_1, top_k_softmax
from moe_jax.routing.statistics import count_assignments, router_stats
from moe_jax.routing.topology import full_topology, open_experts, population_topology, single_topology
from moe_jax.types import Array, RouterOutput, RoutingPlan, Topology, TraceLevel

__all__ = [
    "RULES",
    "Choice",
    "Rule",
    "count_assignments",
    "drop_over_capacity",
    "expert_capacity",
    "full_topology",
    "get_rule",
    "keep_trace",
    "open_experts",
    "population_topology",
    "route",
    "router_stats",
    "single_topology",
    "update_bias",
]


class Rule(NamedTuple):
    """A routing rule and what may be relied on.

    Attributes:
      choose: the function, with the signature of `rules.softmax_top_k`.
      paper: where the rule comes from.
      is_causal: a token's choice depends on no later token (without capacity).
      fixed_choices: the only K the rule accepts, or None for any.
      normalized: an unmasked token's gates sum to 1.
    """

    choose: Callable[[Array, int, Array | None, Array | None, Array | None], Choice]
    paper: str
    is_causal: bool
    fixed_choices: int | None
    normalized: bool


def route(
    logits: Array,
    rule: Rule,
    *,
    num_choices: int,
    bias: Array | None = None,
    topology: Topology | None = None,
    token_groups: Array | None = None,
    token_mask: Array | None = None,
    capacity: int | None = None,
) -> RouterOutput:
    """Routes tokens: constraints, rule, capacity, statistics.

    Args:
      logits: `[T, E]` router logits; computed in float32 whatever comes in.
      rule: an entry of `RULES`, or one's own.
      num_choices: K, static.
      bias: `[E]` float32 selection bias, or None.
      topology: one layer's topology (`keep [G, E]`, `num_choices [G]`), or None for everything open.
      token_groups: `[T]` int32 group of each token; needed when the topology has several groups.
      token_mask: `[T]` bool, false for tokens that must take no capacity, no rows, no loss and no statistics.
      capacity: C, static; None drops nothing.

    Returns:
      The plan (`[T, K]`), the float32 logits and the statistics.

    Raises:
      ValueError: K larger than E, or a topology whose groups are not told apart.
    """
    num_tokens, num_experts = logits.shape
    if not 1 <= num_choices <= num_experts:
        raise ValueError(f"num_choices must be in [1, {num_experts}] for {num_experts} experts, got {num_choices}")
    logits = logits.astype(jnp.float32)
    is_open, limit = None, None
    if topology is not None:
        is_open, limit = open_experts(topology, token_groups, num_tokens)
    if token_mask is not None:
        everywhere = jnp.broadcast_to(token_mask[:, None], logits.shape)
        is_open = everywhere if is_open is None else is_open & everywhere
    choice = rule.choose(logits, num_choices, is_open, limit, bias)
    kept_ids, gates = choice.expert_ids, choice.gates
    if capacity is not None:
        kept_ids = drop_over_capacity(kept_ids, num_experts, capacity)
        gates = jnp.where(kept_ids < num_experts, gates, 0.0)
    stats = router_stats(
        logits,
        choice.probabilities,
        choice.expert_ids,
        kept_ids,
        is_open=is_open,
        limit=limit,
        token_mask=token_mask,
    )
    return RouterOutput(RoutingPlan(kept_ids, gates, num_experts, capacity), logits, stats)


def keep_trace(output: RouterOutput, level: TraceLevel) -> RouterOutput:
    """Drops what a static trace level does not ask for; unreturned arrays cost nothing once compiled.

    Args:
      output: a router's full output.
      level: "off" keeps nothing, "stats" the sums, "topk" also the plan, "full" also the logits.

    Raises:
      ValueError: an unknown level.
    """
    levels = get_args(TraceLevel)
    if level not in levels:
        raise ValueError(f"unknown trace level {level!r}; known: {', '.join(levels)}")
    depth = levels.index(level)
    return RouterOutput(
        plan=output.plan if depth >= 2 else None,
        logits=output.logits if depth >= 3 else None,
        stats=output.stats if depth >= 1 else None,
    )


def get_rule(name: str) -> Rule:
    """The rule of that name; ValueError with the known names otherwise."""
    if name not in RULES:
        raise ValueError(f"unknown routing rule {name!r}; known: {', '.join(sorted(RULES))}")
    return RULES[name]


RULES = {
    "softmax_top_k": Rule(softmax_top_k, "arXiv:2409.02060", True, None, False),
    "softmax_top_k_renormalized": Rule(softmax_top_k_renormalized, "arXiv:1701.06538", True, None, True),
    "top_k_softmax": Rule(top_k_softmax, "arXiv:2401.04088", True, None, True),
    "switch_top_1": Rule(switch_top_1, "arXiv:2101.03961, eq. 2", True, 1, False),
}
