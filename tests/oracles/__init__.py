"""Routing one token at a time in plain Python: slow, obvious, and the judge of the fast version.

Each rule has an oracle, a function of a `Case` and K (and the rule's settings) that gives what `Rule.choose` gives; a
family of rules has a file. `route_loop` adds capacity and statistics around it, as `moe_jax.routing.route` does.
"""

from tests.oracles import assignment, expert_choice, top_k, unlearned
from tests.oracles.case import Case, route_loop

__all__ = ["ORACLES", "Case", "route_loop"]

ORACLES = {
    "softmax_top_k": top_k.softmax_top_k,
    "softmax_top_k_renormalized": top_k.softmax_top_k_renormalized,
    "sigmoid_top_k": top_k.sigmoid_top_k,
    "top_k_softmax": top_k.softmax_top_k_renormalized,
    "switch_top_1": top_k.softmax_top_k,
    "expert_choice": expert_choice.expert_choice,
    "base": assignment.base,
    "sinkhorn": assignment.sinkhorn,
    "hash": unlearned.hash_token_ids,
    "random": unlearned.random_experts,
    "forced_uniform": unlearned.forced_uniform,
    "forced_zipf": unlearned.forced_zipf,
    "forced_skewed": unlearned.forced_skewed,
}
