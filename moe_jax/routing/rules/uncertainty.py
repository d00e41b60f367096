"""Hard tokens get K experts, easy ones a few: which is which says the router's own uncertainty.

    free_energy_top_k   F = -log sum_e exp(z_e)                high where no expert claims the token
    entropy_top_k       H = -sum_e p_e log p_e / log E         high where the router cannot decide; in [0, 1]

A token with an uncertainty above the level is hard. UAR (Chen et al., ACL 2026, long paper 1801) gives tokens of high
free energy more experts; its abstract is what this follows, while two numbers of experts and a level that a
controller steers to a mean number (`pi_control`) are this project's. Free energy as a score of how unknown an input is
comes from 2010.03759. The two differ: scaling all logits up by a common term lowers F and leaves H.
"""

import jax
import jax.numpy as jnp

from moe_jax.routing.scores import CLOSED, score
from moe_jax.routing.select import biased, gather_chosen, select_top_k
from moe_jax.types import Array, Choice, RoutingInputs


def free_energy_top_k(inputs: RoutingInputs, num_choices: int, *, few: int = 1) -> Choice:
    """The K best experts for tokens of high free energy, the `few` best for the others, weighed by softmax.

    Args:
      inputs: the tokens' logits, constraints and level; the bias is added to the probabilities for the selection.
      num_choices: K, static.
      few: the number of experts of an easy token.

    Raises:
      ValueError: `few` outside `[1, K]`.
    """
    logits = inputs.logits if inputs.is_open is None else jnp.where(inputs.is_open, inputs.logits, CLOSED)
    return _spend(-jax.nn.logsumexp(logits, axis=-1), inputs, num_choices, few)


def entropy_top_k(inputs: RoutingInputs, num_choices: int, *, few: int = 1) -> Choice:
    """The K best experts for tokens of high router entropy, the `few` best for the others, weighed by softmax.

    The entropy is a share of its maximum, the log of the number of open experts (0 if only one is). Where the router is
    flat, entropies crowd near 1 and the controller overshoots: lower its gains.

    Args:
      inputs: the tokens' logits, constraints and level; the bias is added to the probabilities for the selection.
      num_choices: K, static.
      few: the number of experts of an easy token.

    Raises:
      ValueError: `few` outside `[1, K]`.
    """
    p = score("softmax", inputs.logits, inputs.is_open)
    num_open = p.shape[-1] if inputs.is_open is None else inputs.is_open.sum(-1)
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)), axis=-1)
    return _spend(entropy / jnp.log(jnp.maximum(num_open, 2)), inputs, num_choices, few)


def _spend(uncertainty: Array, inputs: RoutingInputs, num_choices: int, few: int) -> Choice:
    """Top-k by softmax with K or `few` choices, by `uncertainty [T]`."""
    if not 1 <= few <= num_choices:
        raise ValueError(f"few must be in [1, {num_choices}], the num_choices of a hard token; got {few}")
    assert inputs.level is not None  # route fills it
    probabilities = score("softmax", inputs.logits, inputs.is_open)
    ids = select_top_k(biased(probabilities, inputs), num_choices, inputs.is_open, inputs.limit)
    is_used = (jnp.arange(num_choices) < few)[None, :] | (uncertainty > inputs.level)[:, None]
    ids = jnp.where(is_used, ids, probabilities.shape[-1])
    return Choice(ids, gather_chosen(probabilities, ids), probabilities)
