"""Expert choice (Zhou et al. 2202.09368): experts take tokens, so every expert has the same load.

With scores S = softmax over the experts, and n tokens, each expert takes its C = ceil(K * n / E) best ones, and a
token's gate is S itself. K is the mean number of experts of a token; some get none, some all E. A token's experts
depend on the other tokens, later ones included, so the rule is no rule for language models (`analysis.causality`).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.routing.scores import score
from moe_jax.routing.select import gather_chosen, select_top_k
from moe_jax.types import Array, Choice, RoutingInputs


def expert_choice(
    inputs: RoutingInputs, num_choices: int, *, per_sequence: bool = False, max_experts: int | None = None
) -> Choice:
    """Every expert takes its C best tokens; ties go to the earlier token.

    Only tokens with an open expert count for n, so padding takes no place. Closing an expert does not enlarge the
    others' C. A token that more experts take than `max_experts` or its `limit` allows keeps those of its highest
    scores, and the others do not choose again, so loads are equal only without such bounds (the paper bounds the
    experts of a token by a linear programme instead). The selection bias has no effect: it would raise all tokens of an
    expert alike.

    Args:
      inputs: the tokens' logits and constraints.
      num_choices: K, the mean number of experts of a token.
      per_sequence: whether experts choose within each sequence, so that sequences do not compete with each other.
      max_experts: the most experts of a token, and the number of slots, each of which costs a dispatch backend a row of
        the token's width; None means E.

    Returns:
      A choice with the best expert first, and C places for an expert in every group that chooses.
    """
    scores = score("softmax", inputs.logits, inputs.is_open)
    num_tokens, num_experts = scores.shape
    num_groups = inputs.num_sequences if per_sequence else 1
    capacity = math.ceil(num_choices * (num_tokens // num_groups) / num_experts)
    is_open = jnp.ones(scores.shape, bool) if inputs.is_open is None else inputs.is_open

    def grouped(array: Array) -> Array:  # (T, E) -> (G, T/G, E)
        return array.reshape(num_groups, -1, num_experts)

    take = jax.vmap(partial(_take_best, num_choices=num_choices, capacity=capacity))
    is_taken = take(grouped(scores), grouped(is_open)).reshape(scores.shape)
    num_slots = min(max_experts or num_experts, num_experts)
    ids = select_top_k(scores, num_slots, is_taken, inputs.limit)
    return Choice(ids, gather_chosen(scores, ids), scores, capacity=num_groups * capacity)


def _take_best(scores: Array, is_open: Array, num_choices: int, capacity: int) -> Array:
    """`[T, E]` bool, whether the expert takes the token; `capacity` bounds the places, masked tokens lessen them."""
    num_tokens, num_experts = scores.shape
    places = -(-num_choices * is_open.any(1).sum() // num_experts)
    _, tokens = jax.lax.top_k(jnp.where(is_open, scores, -1.0).T, capacity)  # [E, C]
    is_place = jnp.arange(capacity)[None, :] < jnp.minimum(places, is_open.sum(0))[:, None]
    experts = jnp.arange(num_experts)[:, None]
    return jnp.zeros((num_experts, num_tokens), bool).at[experts, tokens].set(is_place, unique_indices=True).T
