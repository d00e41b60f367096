"""GShard's top-2, whose second expert is often left out in training (Lepikhin et al. 2006.16668, Algorithm 1).

With g the softmax over the open experts, and 1 and 2 the best two of a token:

    g_1, g_2 <- g_1 / (g_1 + g_2), g_2 / (g_1 + g_2)
    training: the second expert is dispatched with probability min(1, 2 g_2); if it is not, g_1 stays what it is

A second expert of little weight adds little to the output and would take another token's place, so the gate itself
says how often it is used. To leave it out is the rule's own choice: such a token asked for one expert, and the
statistics count no drop. What is left to capacity is GShard's order in `drop_over_capacity`.

NLLB-MoE (2207.04672) serves as `second_policy="all", redistribute=True, scale=0.8`: where capacity drops one expert,
the other gets its gate too; and since a fifth of the experts' outputs were masked in training, all are scaled by the
rest. `second_expert_policy="random"` of its code in `transformers` is another rule: it draws with 2 g_2 before the
gates are normalised, and in evaluation too.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.routing.rules.top_k import top_k
from moe_jax.types import Choice, RoutingInputs


def gshard_top_2(
    inputs: RoutingInputs,
    num_choices: int,
    *,
    second_policy: str = "random",
    redistribute: bool = False,
    by_priority: bool = False,
    scale: float = 1.0,
) -> Choice:
    """The best two, their gates normalised; in training the second with probability min(1, 2 g_2).

    Args:
      inputs: the tokens' logits and constraints; without a key the second expert is always dispatched.
      num_choices: 2.
      second_policy: "random" as above, or "all" to dispatch the second expert in training too.
      redistribute: whether a token's other expert gets the gate of one that capacity drops.
      by_priority: whether tokens of larger first probability are served first, and not those that come first; under a
        capacity a token's place then depends on later ones.
      scale: factor on the gates.

    Raises:
      ValueError: an unknown policy.
    """
    if second_policy not in ("random", "all"):
        raise ValueError(f"unknown second_policy {second_policy!r}; known: random, all")
    choice = top_k(inputs, num_choices, renormalize=True, scale=scale)
    priority = choice.probabilities.max(-1) if by_priority else None
    choice = dataclasses.replace(choice, priority=priority, redistribute=redistribute)
    if second_policy == "all" or inputs.key is None:
        return choice
    ids, gates = choice.expert_ids, choice.gates
    is_used = 2.0 * gates[:, 1] > scale * jax.random.uniform(inputs.key, gates.shape[:1])
    second = jnp.where(is_used, ids[:, 1], inputs.logits.shape[-1])
    return dataclasses.replace(
        choice,
        expert_ids=jnp.stack([ids[:, 0], second], axis=-1),
        gates=jnp.stack([gates[:, 0], gates[:, 1] * is_used], axis=-1),
        scores=None,
    )
