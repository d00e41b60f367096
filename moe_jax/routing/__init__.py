"""Routing: which experts process which token. Pure functions on arrays; no flax, no parameters.

`route` is the whole of it: a rule from `RULES` between the constraints that hold for every rule (token mask,
topology, capacity) and the statistics that every loss and picture reads. A new rule is a file with one function of
`RoutingInputs` and K, and a line in `RULES`.
"""

from functools import partial
from typing import Any

from moe_jax.ops.capacity import drop_over_capacity, expert_capacity
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
from moe_jax.routing.route import keep_trace, route
from moe_jax.routing.rule import Controller, Rule, bind_settings, check_choices
from moe_jax.routing.rules.top_k import top_k, top_k_softmax
from moe_jax.routing.scores import normalize, score
from moe_jax.routing.select import biased, gather_chosen, select_top_k
from moe_jax.routing.statistics import count_assignments, router_stats
from moe_jax.routing.topology import full_topology, open_experts, population_topology, single_topology

__all__ = [
    "BALANCERS",
    "RULES",
    "Balancer",
    "Controller",
    "Force",
    "Rule",
    "biased",
    "check_choices",
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
    "score",
    "select_top_k",
    "single_topology",
]


def get_rule(name: str, **settings: Any) -> Rule:
    """The rule of that name, with settings.

    Args:
      name: a key of `RULES`.
      settings: values for the rule's own settings, such as `scale=2.5`.

    Raises:
      ValueError: an unknown name or setting; the message lists the known ones.
    """
    if name not in RULES:
        raise ValueError(f"unknown routing rule {name!r}; known: {', '.join(sorted(RULES))}")
    return bind_settings(RULES[name], settings, name)


RULES = {
    "softmax_top_k": Rule(top_k, "arXiv:2409.02060"),
    "softmax_top_k_renormalized": Rule(partial(top_k, renormalize=True), "arXiv:2505.09388", normalized=True),
    "sigmoid_top_k": Rule(
        partial(top_k, score_function="sigmoid", renormalize=True), "arXiv:2412.19437, eq. 13", normalized=True
    ),
    "top_k_softmax": Rule(top_k_softmax, "arXiv:2401.04088", normalized=True),
    "switch_top_1": Rule(top_k, "arXiv:2101.03961, eq. 2", only_choices=1),
}
