"""Routing one token at a time in plain Python: slow, obvious, and the judge of the fast version.

Each rule has an oracle, a function of a `Case` and K (and the rule's settings) that gives ids, gates and probabilities,
and a priority where the rule has one; a family of rules has a file. `route_loop` adds capacity and statistics around
it, as `moe_jax.routing.route` does.
"""

from tests.oracles import (
    assignment,
    batch_prioritised,
    expert_choice,
    group_limited,
    gshard,
    noisy,
    null_experts,
    relu,
    sparse_mixer,
    threshold,
    top_k,
    uncertainty,
    unlearned,
)
from tests.oracles.case import Case, route_loop

__all__ = ["ORACLES", "Case", "route_loop"]

ORACLES = {
    "softmax_top_k": top_k.softmax_top_k,
    "softmax_top_k_renormalized": top_k.softmax_top_k_renormalized,
    "sigmoid_top_k": top_k.sigmoid_top_k,
    "top_k_softmax": top_k.softmax_top_k_renormalized,
    "switch_top_1": top_k.softmax_top_k,
    "threshold": threshold.threshold,
    "top_p": threshold.top_p,
    "fixed_threshold": threshold.fixed_threshold,
    "relu": relu.relu,
    "free_energy_top_k": uncertainty.free_energy_top_k,
    "entropy_top_k": uncertainty.entropy_top_k,
    "null_experts": null_experts.null_experts,
    "null_experts_renormalized": null_experts.null_experts_renormalized,
    "sqrt_softplus_top_k": top_k.sqrt_softplus_top_k,
    "batch_prioritised_top_k": batch_prioritised.batch_prioritised_top_k,
    "group_limited_softmax_top_k": group_limited.group_limited_softmax_top_k,
    "group_limited_sigmoid_top_k": group_limited.group_limited_sigmoid_top_k,
    "gshard_top_2": gshard.gshard_top_2,
    "noisy_top_k": noisy.noisy_top_k,
    "sparse_mixer": sparse_mixer.sparse_mixer,
    "expert_choice": expert_choice.expert_choice,
    "base": assignment.base,
    "sinkhorn": assignment.sinkhorn,
    "hash": unlearned.hash_token_ids,
    "random": unlearned.random_experts,
    "forced_uniform": unlearned.forced_uniform,
    "forced_zipf": unlearned.forced_zipf,
    "forced_skewed": unlearned.forced_skewed,
}
