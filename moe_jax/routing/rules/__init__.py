"""The routing rules, a file per family, and the table of all of them with what may be relied on.

Each rule is a pure function of `RoutingInputs` and K that gives a `Choice`; its keyword-only arguments are its
settings.
"""

from functools import partial
from typing import Any

from moe_jax.routing.pi_control import pi_controller
from moe_jax.routing.rule import Controller, Rule, bind_settings
from moe_jax.routing.rules.assignment import base, sinkhorn
from moe_jax.routing.rules.batch_prioritised import batch_prioritised_top_k
from moe_jax.routing.rules.expert_choice import expert_choice
from moe_jax.routing.rules.group_limited import group_limited_top_k
from moe_jax.routing.rules.gshard import gshard_top_2
from moe_jax.routing.rules.noisy import noisy_top_k
from moe_jax.routing.rules.null_experts import null_experts
from moe_jax.routing.rules.relu import load_weighted_l1, relu, scale_penalty
from moe_jax.routing.rules.sparse_mixer import sparse_mixer
from moe_jax.routing.rules.threshold import fixed_threshold, threshold, top_p
from moe_jax.routing.rules.top_k import top_k, top_k_softmax
from moe_jax.routing.rules.uncertainty import entropy_top_k, free_energy_top_k
from moe_jax.routing.rules.unlearned import (
    forced_skewed,
    forced_uniform,
    forced_zipf,
    hash_token_ids,
    random_experts,
)

__all__ = ["RULES", "get_rule"]


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
    # K experts for every token
    "softmax_top_k": Rule(top_k, "arXiv:2409.02060"),
    "softmax_top_k_renormalized": Rule(partial(top_k, renormalize=True), "arXiv:2505.09388", normalized=True),
    "top_k_softmax": Rule(top_k_softmax, "arXiv:2401.04088", normalized=True),
    "sigmoid_top_k": Rule(
        partial(top_k, score_function="sigmoid", renormalize=True), "arXiv:2412.19437, eq. 13", normalized=True
    ),
    "sqrt_softplus_top_k": Rule(
        partial(top_k, score_function="sqrt_softplus", renormalize=True), "arXiv:2606.19348", normalized=True
    ),
    "switch_top_1": Rule(top_k, "arXiv:2101.03961, eq. 2", only_choices=1),
    # In training it may leave a token's second expert out, gate and all.
    "gshard_top_2": Rule(gshard_top_2, "arXiv:2006.16668, Algorithm 1", only_choices=2, fixed_count=False),
    "noisy_top_k": Rule(noisy_top_k, "arXiv:1701.06538, eq. 3-5", normalized=True),
    "batch_prioritised_top_k": Rule(batch_prioritised_top_k, "arXiv:2106.05974, section 4"),
    "group_limited_softmax_top_k": Rule(group_limited_top_k, "arXiv:2405.04434"),
    "group_limited_sigmoid_top_k": Rule(
        partial(group_limited_top_k, group_score="top_2_sum", score_function="sigmoid", renormalize=True),
        "arXiv:2412.19437",
        normalized=True,
    ),
    "sparse_mixer": Rule(sparse_mixer, "arXiv:2409.12136", can_be_forced=False),
    # more experts for some tokens than for others
    "threshold": Rule(
        threshold,
        "this project; level steered as in arXiv:2512.13996",
        fixed_count=False,
        controller=pi_controller(start=0.5, low=0.0, high=1.0, kp=-0.05, ki=-0.2),
    ),
    "fixed_threshold": Rule(fixed_threshold, "this project", fixed_count=False),
    "top_p": Rule(
        top_p,
        "arXiv:2403.07652; level steered as in arXiv:2512.13996",
        fixed_count=False,
        can_be_forced=False,
        controller=pi_controller(start=0.4, low=0.0, high=1.0, kp=0.1, ki=0.2),
    ),
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
    # tokens compared with each other
    "expert_choice": Rule(expert_choice, "arXiv:2202.09368", is_causal=False, fixed_count=False, can_be_forced=False),
    "base": Rule(base, "arXiv:2103.16716", is_causal=False, only_choices=1, can_be_forced=False),
    "sinkhorn": Rule(sinkhorn, "arXiv:2202.01169", is_causal=False, can_be_forced=False),
    # nothing learned
    "hash": Rule(
        hash_token_ids,
        "arXiv:2106.04426",
        normalized=True,
        is_learned=False,
        needs_token_ids=True,
        can_be_forced=False,
    ),
    "random": Rule(random_experts, "this project", normalized=True, is_learned=False, can_be_forced=False),
    "forced_uniform": Rule(forced_uniform, "this project", normalized=True, is_learned=False, can_be_forced=False),
    "forced_zipf": Rule(forced_zipf, "this project", normalized=True, is_learned=False, can_be_forced=False),
    "forced_skewed": Rule(forced_skewed, "this project", normalized=True, is_learned=False, can_be_forced=False),
}
