"""Routing by a plan instead of by a rule: what was recorded, or edited, is what happens.

Replaying expert ids and recomputing gates is what reinforcement learning needs to train the experts that the sampler
used; replaying both is what a counterfactual needs. Slot order is kept too, since sums in another order round
differently.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from moe_jax.routing.rule import Rule
from moe_jax.routing.scores import score
from moe_jax.types import Array, Choice, RoutingInputs, RoutingPlan

Force = Literal["ids", "exact"]

# Far above every score, and small enough that a score added to it keeps three decimals.
_FORCING_BIAS = 1e4


def forced_choice(inputs: RoutingInputs, rule: Rule, plan: RoutingPlan, force: Force) -> Choice:
    """The choice that a plan dictates.

    Args:
      inputs: what the rule sees; its bias and limit play no role.
      rule: weighs the forced experts, if `force` is "ids".
      plan: `[T, K]`; any number of slots, empty ones anywhere. A masked token's are emptied; an expert that a topology
        closes to a token gets gate 0 under "ids".
      force: "ids" recomputes the gates from the logits, with their gradient; "exact" takes the plan's, without.

    Raises:
      ValueError: "ids" under a rule that does not let itself be forced, or a plan of another size than the logits.
    """
    num_tokens, num_experts = inputs.logits.shape
    if plan.num_experts != num_experts or plan.expert_ids.shape[0] != num_tokens:
        raise ValueError(
            f"the plan is for {plan.expert_ids.shape[0]} tokens and {plan.num_experts} experts, "
            f"the logits are for {num_tokens} and {num_experts}"
        )
    if inputs.is_open is not None:  # a masked token is not routed, whatever was recorded for it
        has_open = inputs.is_open.any(-1)[:, None]
        plan = dataclasses.replace(
            plan,
            expert_ids=jnp.where(has_open, plan.expert_ids, num_experts),
            gates=jnp.where(has_open, plan.gates, 0.0),
        )
    if force == "exact":
        return Choice(plan.expert_ids, plan.gates, score("softmax", inputs.logits, inputs.is_open))
    if not rule.can_be_forced:
        raise ValueError('this rule cannot weigh experts that it did not select; use force="exact"')
    is_forced = jnp.any(plan.expert_ids[:, :, None] == jnp.arange(num_experts)[None, None, :], axis=1)
    choice = rule.choose(
        dataclasses.replace(
            inputs,
            limit=is_forced.sum(1, dtype=jnp.int32),
            bias=jnp.where(is_forced, _FORCING_BIAS, 0.0),
            noise_scale=None,
            key=None,
        ),
        rule.only_choices or plan.expert_ids.shape[1],
    )
    return Choice(plan.expert_ids, _gates_of(choice, plan.expert_ids), choice.probabilities)


def _gates_of(choice: Choice, expert_ids: Array) -> Array:
    """Gates of `choice`, in the slots where `expert_ids [T, K]` has the same experts; 0 for experts not chosen."""
    num_experts = choice.probabilities.shape[1]
    is_same = choice.expert_ids[:, None, :] == expert_ids[:, :, None]  # [T, K, K']
    is_same &= (expert_ids < num_experts)[:, :, None]
    return jnp.sum(jnp.where(is_same, choice.gates[:, None, :], 0.0), axis=2)
