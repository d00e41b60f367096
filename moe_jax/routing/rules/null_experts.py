"""Null experts: choices of which some lead nowhere, so that tokens use different numbers of true experts.

The router has E columns; the last `num_null` are null experts that compute nothing. A token takes the K best columns
by p = softmax(z) over all of them, and the true ones among these, S, process it:

    null_experts                g_e = p_e               MoE++ (2410.07348), its zero expert
    null_experts, renormalize   g_e = p_e / sum_S p     AdaMoE (2406.13233)

MoE++'s released code renormalises as AdaMoE does. A token may be left with no true expert.

How many true experts a token has on average is a matter of balance. AdaMoE's loss is that of Switch with the load of
each null expert replaced by their mean, since it does not matter which of them takes a choice. `RouterStats.chosen`
holds just that, so every balance loss and balancer treats null experts as AdaMoE does, and at perfect balance a token
has `K * (E - num_null) / E` true experts. Experts that copy their input or are a constant, which MoE++ has too,
compute something: they are kinds of expert, not this rule.
"""

import jax
import jax.numpy as jnp

from moe_jax.routing.scores import CLOSED, score
from moe_jax.routing.select import biased, gather_chosen, select_top_k
from moe_jax.types import Choice, RoutingInputs


def null_experts(inputs: RoutingInputs, num_choices: int, *, num_null: int = 1, renormalize: bool = False) -> Choice:
    """The K best columns by softmax, of which the last `num_null` compute nothing.

    Args:
      inputs: the tokens' logits and constraints; the bias is added to the probabilities for the selection. The limit
        counts null choices as well.
      num_choices: K, static; null choices included.
      num_null: null experts among the E columns. The layer's stack has E experts; these are never read.
      renormalize: whether the gates of the true experts are divided by their sum. A lone true expert's gate is then 1,
        and only the balance loss teaches the router about that token.

    Returns:
      A choice in which null choices keep their ids, with gate 0; `route` empties their slots.

    Raises:
      ValueError: a `num_null` that leaves no true expert.
    """
    num_experts = inputs.logits.shape[-1]
    if not 0 <= num_null < num_experts:
        raise ValueError(f"num_null must be in [0, {num_experts - 1}] for {num_experts} columns, got {num_null}")
    probabilities = score("softmax", inputs.logits, inputs.is_open)
    ids = select_top_k(biased(probabilities, inputs), num_choices, inputs.is_open, inputs.limit)
    is_true = ids < num_experts - num_null
    if renormalize:  # softmax over the true ones alone is the same, and safe where null experts have nearly all of p
        gates = jax.nn.softmax(jnp.where(is_true, gather_chosen(inputs.logits, ids), CLOSED), axis=-1) * is_true
    else:
        gates = jnp.where(is_true, gather_chosen(probabilities, ids), 0.0)
    return Choice(ids, gates, probabilities, num_null=num_null)
