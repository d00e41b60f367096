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
from moe_jax.routing.pi_control import pi_controller
from moe_jax.routing.route import check_rule, keep_trace, route
from moe_jax.routing.rule import Controller, Rule, bind_settings, check_choices, rule_settings
from moe_jax.routing.rules.batch_prioritised import batch_prioritised_top_k
from moe_jax.routing.rules.group_limited import group_limited_top_k
from moe_jax.routing.rules.gshard import gshard_top_2
from moe_jax.routing.rules.noisy import noisy_top_k
from moe_jax.routing.rules.null_experts import null_experts
from moe_jax.routing.rules.relu import load_weighted_l1, relu, scale_penalty
from moe_jax.routing.rules.sparse_mixer import sparse_mixer
from moe_jax.routing.rules.threshold import fixed_threshold, threshold, top_p
from moe_jax.routing.rules.top_k import top_k, top_k_softmax
from moe_jax.routing.rules.uncertainty import entropy_top_k, free_energy_top_k
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
    "threshold": Rule(
        threshold,
        "this project; level steered as in arXiv:2512.13996",
        fixed_count=False,
        controller=pi_controller(start=0.5, low=0.0, high=1.0, kp=-0.05, ki=-0.2),
    ),
    "top_p": Rule(
        top_p,
        "arXiv:2403.07652; level steered as in arXiv:2512.13996",
        fixed_count=False,
        can_be_forced=False,
        controller=pi_controller(start=0.4, low=0.0, high=1.0, kp=0.1, ki=0.2),
    ),
    "fixed_threshold": Rule(fixed_threshold, "this project", fixed_count=False),
    "relu": Rule(
        relu,
        "arXiv:2412.14711",
        fixed_count=False,
        can_be_forced=False,
        controller=Controller(1e-8, scale_penalty, load_weighted_l1, over_layers=True),
    ),
    "free_energy_top_k": Rule(
        free_energy_top_k,
        "this project, after UAR (ACL 2026, long 1801)",
        fixed_count=False,
        can_be_forced=False,
        controller=pi_controller(start=-3.0, low=-30.0, high=30.0, kp=-0.2, ki=-0.3),
    ),
    "entropy_top_k": Rule(
        entropy_top_k,
        "this project",
        fixed_count=False,
        can_be_forced=False,
        controller=pi_controller(start=0.5, low=0.0, high=1.0, kp=-0.1, ki=-0.1),
    ),
    "null_experts": Rule(null_experts, "arXiv:2410.07348", fixed_count=False, can_be_forced=False),
    "null_experts_renormalized": Rule(
        partial(null_experts, renormalize=True), "arXiv:2406.13233", fixed_count=False, can_be_forced=False
    ),
    "sqrt_softplus_top_k": Rule(
        partial(top_k, score_function="sqrt_softplus", renormalize=True), "arXiv:2606.19348", normalized=True
    ),
    "batch_prioritised_top_k": Rule(batch_prioritised_top_k, "arXiv:2106.05974, section 4"),
    "group_limited_softmax_top_k": Rule(group_limited_top_k, "arXiv:2405.04434"),
    "group_limited_sigmoid_top_k": Rule(
        partial(group_limited_top_k, group_score="top_2_sum", score_function="sigmoid", renormalize=True),
        "arXiv:2412.19437",
        normalized=True,
    ),
    # In training it may leave a token's second expert out, gate and all.
    "gshard_top_2": Rule(gshard_top_2, "arXiv:2006.16668, Algorithm 1", only_choices=2, fixed_count=False),
    "noisy_top_k": Rule(noisy_top_k, "arXiv:1701.06538, eq. 3-5", normalized=True),
    "sparse_mixer": Rule(sparse_mixer, "arXiv:2409.12136", can_be_forced=False),
}
