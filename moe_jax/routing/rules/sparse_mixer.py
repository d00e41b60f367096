"""SparseMixer-v2: experts are drawn in training, and the router learns through the draw (GRIN, 2409.12136).

Slot after slot, among the experts that are left, with z the logits and m the largest of them:

    near_e   (m - z_e) / max(|z_e|, m) <= 2 r        the experts that a jitter of strength r could have put first
    pi       softmax of z over the near experts
    D        drawn from pi in training, the best expert in evaluation
    gate     h pi_D, with the gradient of pi_D

If f is the loss as a function of the gate of expert D, the expected loss changes with the probability of the draw by
`sum_D f(pi_D) d pi_D`. Top-k training has no such term. SparseMixer (2310.00811) estimates it without running other
experts: from f(x) - f(0), integrated along the gate by a method for ODEs whose nodes are met by scaling the gate. Here
that is Heun's third-order method, a node for each draw:

    f(x) - f(0) ~ x (f'(x) / 4 + 3 f'(x / 3) / 4)        h = 1 with probability 1/4, else 1/3

The best expert always has h = 1, so that its training is not disturbed: for it the estimate is of first order, and on
the whole not always nearer to the truth than the gate's gradient without h.

Evaluation is Phi-3.5-MoE's (K = 2, r = 0.01), and its gradient the plain one. The rule is published for K = 1 and 2;
the same step gives further experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.routing.scores import CLOSED, score
from moe_jax.routing.select import biased
from moe_jax.types import Array, Choice, RoutingInputs


class Draws(NamedTuple):
    """What training draws: `gumbel [K, T, E]` picks the experts, `uniform [K, T]` the nodes of Heun's method."""

    gumbel: Array
    uniform: Array


def sparse_mixer(inputs: RoutingInputs, num_choices: int, *, jitter: float = 0.01) -> Choice:
    """K experts drawn without replacement; in evaluation the K best.

    A token's gates come from K softmaxes and do not sum to 1; where no other expert is near, a gate is 1 and has no
    gradient. The bias is added to the logits that say who is near and who is drawn, not to those of the gates, so with
    one the draw is no longer the one that the gradient assumes.

    Args:
      inputs: the tokens' logits and constraints; without a key nothing is drawn.
      num_choices: K, static.
      jitter: r; the larger, the more experts are near.

    Returns:
      The choice, slots in the order of the draws, `probabilities` those of the plain softmax.
    """
    if inputs.key is None:
        return sparse_mixer_of_draws(inputs, num_choices, None, jitter=jitter)
    gumbel_key, uniform_key = jax.random.split(inputs.key)
    shape = (num_choices, *inputs.logits.shape)
    draws = Draws(jax.random.gumbel(gumbel_key, shape), jax.random.uniform(uniform_key, shape[:2]))
    return sparse_mixer_of_draws(inputs, num_choices, draws, jitter=jitter)


def sparse_mixer_of_draws(inputs: RoutingInputs, num_choices: int, draws: Draws | None, *, jitter: float) -> Choice:
    """`sparse_mixer` as a function of what it draws; None is evaluation."""
    num_experts = inputs.logits.shape[-1]
    selection = biased(inputs.logits, inputs)
    is_left = jnp.ones(selection.shape, bool) if inputs.is_open is None else inputs.is_open
    ids, gates = [], []
    for slot in range(num_choices):
        if inputs.limit is not None:
            is_left &= (slot < inputs.limit)[:, None]
        is_near = _near_best(selection, is_left, jitter)
        drawn = selection if draws is None else selection + draws.gumbel[slot]
        expert = jnp.argmax(jnp.where(is_near, drawn, CLOSED), axis=-1)
        probabilities = jax.nn.softmax(jnp.where(is_near, inputs.logits, CLOSED), axis=-1) * is_near
        gate = jnp.take_along_axis(probabilities, expert[:, None], axis=-1)[:, 0]
        if draws is not None:
            is_first_order = (expert == probabilities.argmax(-1)) | (draws.uniform[slot] > 0.75)
            gate += jax.lax.stop_gradient(jnp.where(is_first_order, 0.0, -2 / 3) * gate)  # h pi, with the slope of pi
        ids.append(jnp.where(is_near.any(-1), expert, num_experts))
        gates.append(gate)
        is_left &= jnp.arange(num_experts)[None, :] != expert[:, None]
    expert_ids = jnp.stack(ids, axis=-1).astype(jnp.int32)
    return Choice(expert_ids, jnp.stack(gates, axis=-1), score("softmax", inputs.logits, inputs.is_open))


def _near_best(scores: Array, is_left: Array, jitter: float) -> Array:
    """`[T, E]` bool: the experts left whose score jitter could lift above the best one left."""
    best = jnp.where(is_left, scores, CLOSED).max(-1, keepdims=True)
    return is_left & (best - scores <= 2 * jitter * jnp.maximum(jnp.abs(scores), best))  # no 0/0 at zero logits
