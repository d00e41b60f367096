"""ReLU routing (ReMoE, 2412.14711): no top-k, hence no jump, and a penalty that keeps experts few.

    g_e = ReLU(z_e)                      every expert with a positive gate is used; gates are not normalised
    L = lambda / T * sum_{t,e} f_e g_e   with f_e = E / (K T) * (tokens that use e), which has no gradient
    lambda <- lambda * alpha ^ sign(1 - K / E - S)    S the share of zero gates, lambda = 1e-8 at first, alpha = 1.2

The penalty is L1, heavier on experts of high load, so it balances too. A token with no positive gate has no expert,
and passes the layer by the residual alone. K is the mean number of experts to reach, not a bound: a token has E slots,
and early in training about half of them are filled, so leave room in memory. A linear router without bias gets sparser
than that only where its features have a mean other than 0.
"""

import jax
import jax.numpy as jnp

from moe_jax.routing.scores import score
from moe_jax.routing.select import biased, gather_chosen, select_top_k
from moe_jax.types import Array, Choice, RouterStats, RoutingInputs

_LOWEST, _HIGHEST = 1e-20, 1e4  # not in the paper: out of reach of the target, lambda would leave float32


def relu(inputs: RoutingInputs, num_choices: int) -> Choice:
    """Every open expert with a positive logit, which is its gate; best first.

    Gates are no distribution and may all be 0, so the probabilities, for entropy and other losses, are the softmax of
    the logits.

    Args:
      inputs: the tokens' logits and constraints. The bias can close an expert, where logit plus bias is not positive,
        but cannot open one, whose gate would be 0.
      num_choices: K, static; only the controller uses it.

    Returns:
      A choice with E slots.
    """
    del num_choices
    selection = biased(inputs.logits, inputs)
    is_used = (inputs.logits > 0) & (selection > 0)
    if inputs.is_open is not None:
        is_used &= inputs.is_open
    ids = select_top_k(selection, selection.shape[-1], is_used, inputs.limit)
    gates = gather_chosen(inputs.logits, ids)  # of positive logits only, so this is their ReLU
    return Choice(ids, gates, score("softmax", inputs.logits, inputs.is_open))


def scale_penalty(
    level: Array, integral: Array, stats: RouterStats, num_choices: int, *, alpha: float = 1.2
) -> tuple[Array, Array]:
    """The next lambda: larger while more than K experts a token are used, smaller while fewer are.

    Args:
      level: `[]` lambda.
      integral: `[]`, not used.
      stats: sums over one optimizer step; without tokens nothing moves.
      num_choices: K.
      alpha: the factor of one step.
    """
    too_many = jnp.sign(stats.chosen.sum() - num_choices * stats.num_tokens)  # the sign of (1 - K / E) - S
    return jnp.clip(level * alpha**too_many, _LOWEST, _HIGHEST), integral


def load_weighted_l1(level: Array, stats: RouterStats, num_choices: int) -> Array:
    """The penalty `[]` of one layer, L above, from the sums of gates and choices."""
    num_tokens = jnp.maximum(stats.num_tokens, 1.0)
    load = jax.lax.stop_gradient(stats.chosen) * (stats.chosen.shape[-1] / (num_choices * num_tokens))
    return level * jnp.sum(load * stats.gate_sums) / num_tokens
