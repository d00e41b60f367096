"""Batch-prioritised routing (Riquelme et al. 2106.05974, section 4): who matters most is served first.

The choice is softmax top-k without renormalisation. What is new is who loses when capacity is short: not the token that
comes last, but the one with the lowest priority of all tokens routed together.

    max    largest gate of the token
    sum    sum of its K gates

Without a capacity the rule is `softmax_top_k` and as causal. With one, each token's place depends on all the others,
later ones and other sequences included, whatever K: a model that is to generate text should not be trained so.
"""

import dataclasses

from moe_jax.routing.rules.top_k import top_k
from moe_jax.types import Choice, RoutingInputs


def batch_prioritised_top_k(inputs: RoutingInputs, num_choices: int, *, priority: str = "max") -> Choice:
    """Softmax top-k whose tokens are served by their gates, not by their position.

    Args:
      inputs: the tokens' logits and constraints.
      num_choices: K, static.
      priority: "max" or "sum", as above; with K = 1 they are equal.

    Raises:
      ValueError: an unknown priority.
    """
    if priority not in ("max", "sum"):
        raise ValueError(f"unknown priority {priority!r}; known: max, sum")
    choice = top_k(inputs, num_choices)
    gates = choice.gates.max(-1) if priority == "max" else choice.gates.sum(-1)
    return dataclasses.replace(choice, priority=gates)
