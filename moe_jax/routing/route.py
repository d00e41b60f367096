"""The whole of routing: a rule between the constraints that hold for every rule and the statistics of what it did."""

from typing import get_args

import jax
import jax.numpy as jnp

from moe_jax.ops.capacity import drop_over_capacity
from moe_jax.routing.force import Force, forced_choice
from moe_jax.routing.rule import Rule, check_choices
from moe_jax.routing.scores import normalize
from moe_jax.routing.statistics import router_stats
from moe_jax.routing.topology import open_experts
from moe_jax.types import Array, RouterOutput, RoutingInputs, RoutingPlan, Topology, TraceLevel


def route(
    logits: Array,
    rule: Rule,
    *,
    num_choices: int,
    bias: Array | None = None,
    level: Array | None = None,
    noise_scale: Array | None = None,
    topology: Topology | None = None,
    token_groups: Array | None = None,
    token_mask: Array | None = None,
    token_ids: Array | None = None,
    num_sequences: int = 1,
    key: Array | None = None,
    capacity: int | None = None,
    capacity_groups: int = 1,
    stats_groups: int | None = None,
    bias_bins: int = 0,
    forced: RoutingPlan | None = None,
    force: Force = "exact",
) -> RouterOutput:
    """Routes tokens: constraints, rule, capacity, statistics.

    Args:
      logits: `[T, E]` router logits; computed in float32 whatever comes in.
      rule: an entry of `RULES`, or one's own.
      num_choices: K, static.
      bias: `[E]` float32 selection bias, or None.
      level: `[]` float32 level of the rule's controller; None means its start.
      noise_scale: `[T, E]` float32 standard deviation of logit noise, for the rules that add it; None means the rule's.
      topology: one layer's topology (`keep [G, E]`, `num_choices [G]`), or None for everything open.
      token_groups: `[T]` int32 group of each token; needed when the topology has several groups.
      token_mask: `[T]` bool, false for tokens that must take no capacity, no rows, no loss and no statistics.
      token_ids: `[T]` int32 vocabulary ids, for the rules that need them.
      num_sequences: B, static; T is B sequences of equal length, for rules that work within a sequence.
      key: consumed by rules that draw; None means evaluation, where training's noise is off.
      capacity: C, static; None drops nothing that the rule itself does not drop.
      capacity_groups: n, static; each of n equal runs of tokens is served by itself (B for sequences, 1 for all tokens
        together) and has C rows per expert.
      stats_groups: None sums statistics over all tokens; n, static, over each of n equal runs of tokens (B for
        sequences, T for tokens), which then have a leading `[n]`.
      bias_bins: N, static; bins of the statistics' histogram of required biases, which the balancer "quantile" reads. 0
        for none; 1000 is usual. A forced plan has none.
      forced: a plan that decides instead of the rule; capacity drops nothing of it.
      force: what of the plan holds: "exact" its experts and gates, "ids" its experts alone, whose gates are recomputed.

    Returns:
      The plan (`[T, K]`), the float32 logits and the statistics.

    Raises:
      ValueError: a K that E or the rule does not allow, a capacity below 1, negative bins, a mask, ids or topology of
        another shape, a topology whose groups are not told apart, a rule without the token ids that it needs, or a
        histogram of a rule that does not report its selection scores.
    """
    num_tokens, num_experts = logits.shape
    check_choices(rule, num_choices, num_experts)
    _check_numbers(
        num_tokens,
        capacity,
        bias_bins,
        {"num_sequences": num_sequences, "capacity_groups": capacity_groups, "stats_groups": stats_groups or 1},
    )
    _check_shapes(logits, topology, {"token_mask": token_mask, "token_ids": token_ids, "token_groups": token_groups})
    if rule.needs_token_ids and token_ids is None:
        raise ValueError("this rule chooses by vocabulary id: give token_ids [T]")

    is_open, limit = None, None
    if topology is not None:
        is_open, limit = open_experts(topology, token_groups, num_tokens)
    if token_mask is not None:
        everywhere = jnp.broadcast_to(token_mask[:, None], logits.shape)
        is_open = everywhere if is_open is None else is_open & everywhere
    if level is None and rule.controller is not None:
        level = jnp.float32(rule.controller.start)
    logits = logits.astype(jnp.float32)
    inputs = RoutingInputs(logits, is_open, limit, bias, level, noise_scale, token_ids, key, num_sequences)

    if forced is None:
        choice = rule.choose(inputs, num_choices)
    else:
        choice, capacity, capacity_groups = forced_choice(inputs, rule, forced, force), forced.capacity, 1
    kept_ids, gates = choice.expert_ids, choice.gates
    if choice.num_null:
        kept_ids = jnp.where(kept_ids < num_experts - choice.num_null, kept_ids, num_experts)
    if capacity is not None:
        kept_ids = drop_over_capacity(kept_ids, num_experts, capacity, choice.priority, capacity_groups)
        gates = jnp.where(kept_ids < num_experts, gates, 0.0)
        if choice.redistribute:
            gates = normalize(gates) * choice.gates.sum(-1, keepdims=True)
    asked = None
    if rule.fixed_count and forced is None:
        asked = jnp.full(num_tokens, num_choices) if limit is None else jnp.minimum(limit, num_choices)
    if bias_bins and forced is None and (choice.scores is None or asked is None):
        raise ValueError(
            f"bias_bins={bias_bins} needs a rule that takes the K best of scores plus bias and reports these scores, "
            "which this one does not; use bias_bins=0 and another balancer than quantile"
        )
    stats = router_stats(
        inputs,
        choice,
        kept_ids,
        asked=asked,
        token_mask=token_mask,
        num_groups=stats_groups,
        bias_bins=0 if forced is not None else bias_bins,
    )
    limits = (None if capacity is None else capacity * capacity_groups, choice.capacity)
    most = min((limit for limit in limits if limit is not None), default=None)
    return RouterOutput(RoutingPlan(kept_ids, gates, num_experts, most), logits, stats)


def _check_numbers(num_tokens: int, capacity: int | None, bias_bins: int, parts: dict[str, int]) -> None:
    """Refuses counts that cannot be meant."""
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}; use None for dropless routing")
    if bias_bins < 0:
        raise ValueError(f"bias_bins must not be negative, got {bias_bins}; use 0 for no histogram")
    for name, count in parts.items():
        if num_tokens % count:
            raise ValueError(f"{name}={count} does not divide the {num_tokens} tokens into equal parts")


def _check_shapes(logits: Array, topology: Topology | None, per_token: dict[str, Array | None]) -> None:
    """Refuses arrays that do not fit the logits."""
    num_tokens, num_experts = logits.shape
    for name, array in per_token.items():
        if array is not None and array.shape != (num_tokens,):
            raise ValueError(f"{name} must be [{num_tokens}] for logits {logits.shape}, got {array.shape}")
    if topology is not None and topology.keep.shape[-1] != num_experts:
        raise ValueError(
            f"topology.keep {topology.keep.shape} must end in the {num_experts} experts of the logits, "
            "zero-compute experts included"
        )


def check_rule(rule: Rule, num_choices: int, num_experts: int, name: str = "this rule", *, bias_bins: int = 0) -> None:
    """Refuses when a model is built what would otherwise fail in its first step; traces a few tokens, runs nothing.

    Args:
      rule: with its settings.
      num_choices: K.
      num_experts: E.
      name: the rule's name, for messages.
      bias_bins: as in `route`.

    Raises:
      ValueError: a K that E or the rule does not allow, settings that do not go with K and E, or bins that the rule
        cannot fill.
    """
    check_choices(rule, num_choices, num_experts, name)

    def route_and_steer(logits: Array, token_ids: Array) -> None:
        stats = route(logits, rule, num_choices=num_choices, token_ids=token_ids, bias_bins=bias_bins).stats
        if rule.controller is not None:
            rule.controller.update(jnp.float32(0), jnp.float32(0), stats, num_choices)

    logits = jax.ShapeDtypeStruct((num_experts, num_experts), jnp.float32)
    jax.eval_shape(route_and_steer, logits, jax.ShapeDtypeStruct((num_experts,), jnp.int32))


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
