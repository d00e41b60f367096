"""Routing: which experts process which token. Pure functions on arrays; no flax, no parameters.

`route` is the whole of it: a rule from `RULES` between the constraints that hold for every rule (token mask,
topology, capacity) and the statistics that every loss and picture reads. A new rule is a file with one function of
`RoutingInputs` and K, and a line in the table of `routing.rules`.
"""

from moe_jax.ops.capacity import Capacity, drop_over_capacity, expert_capacity
from moe_jax.routing.balance import (
    BALANCERS,
    Balancer,
    get_balancer,
    move_bias_by_sign,
    move_bias_by_sign_in_groups,
    move_bias_in_proportion,
    move_bias_to_quantile,
)
from moe_jax.routing.force import Force
from moe_jax.routing.route import check_rule, keep_trace, route
from moe_jax.routing.rule import Controller, Rule, check_choices, rule_settings
from moe_jax.routing.rules import RULES, get_rule
from moe_jax.routing.scores import normalize, score
from moe_jax.routing.select import biased, gather_chosen, select_top_k
from moe_jax.routing.statistics import count_assignments, router_stats
from moe_jax.routing.topology import full_topology, open_experts, population_topology, single_topology

__all__ = [
    "BALANCERS",
    "RULES",
    "Balancer",
    "Capacity",
    "Controller",
    "Force",
    "Rule",
    "biased",
    "check_choices",
    "check_rule",
    "count_assignments",
    "drop_over_capacity",
    "expert_capacity",
    "full_topology",
    "gather_chosen",
    "get_balancer",
    "get_rule",
    "keep_trace",
    "move_bias_by_sign",
    "move_bias_by_sign_in_groups",
    "move_bias_in_proportion",
    "move_bias_to_quantile",
    "normalize",
    "open_experts",
    "population_topology",
    "route",
    "router_stats",
    "rule_settings",
    "score",
    "select_top_k",
    "single_topology",
]
