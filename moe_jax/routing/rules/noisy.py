"""Noisy top-k (Shazeer et al. 1701.06538): noise on the logits spreads the load and makes it differentiable.

    H_i = z_i + N(0, 1) * s_i                       eq. 4, with s = softplus(x W_noise) from the router module
    g   = softmax over the K largest H              eq. 3 and 5
    P_i = Phi((z_i - kth_excluding(H, K, i)) / s_i)          appendix A, eq. 8 and 9

P_i is the probability that expert i is among the K largest when only its own noise is drawn again; its sum over tokens
is a smooth estimate of the load. V-MoE (2106.05974) takes the fixed s = 1/E. Without a key nothing is drawn: the rule
is `top_k_softmax`, and there is no estimate.
"""

import jax
import jax.numpy as jnp

from moe_jax.routing.scores import CLOSED, score
from moe_jax.routing.select import biased, select_top_k, softmax_of_chosen
from moe_jax.types import Array, Choice, RoutingInputs

SMALLEST_SCALE = 1e-6  # softplus underflows to 0, and the estimate divides by the scale


def noisy_top_k(inputs: RoutingInputs, num_choices: int, *, noise: float = 1.0) -> Choice:
    """The K largest noisy logits, weighed by a softmax over them.

    The bias is added to the logits here, so that the estimate of the load sees it just as the selection does.

    Args:
      inputs: the tokens' logits and constraints; `noise_scale` is s, and without a key there is no noise.
      num_choices: K, static.
      noise: s in units of 1/E where the inputs have no `noise_scale`.

    Returns:
      The choice; `probabilities` are those of the clean logits, `load` is P in training and None without a key.

    Raises:
      ValueError: a scale that is not positive.
    """
    if noise <= 0:
        raise ValueError(f"noise must be positive, got {noise}; without noise this rule is top_k_softmax")
    probabilities = score("softmax", inputs.logits, inputs.is_open)
    if inputs.key is None:
        ids = select_top_k(biased(inputs.logits, inputs), num_choices, inputs.is_open, inputs.limit)
        return Choice(ids, softmax_of_chosen(inputs.logits, ids), probabilities)
    scale = inputs.noise_scale
    scale = jnp.full_like(inputs.logits, noise / inputs.logits.shape[-1]) if scale is None else scale
    scale = jnp.maximum(scale, SMALLEST_SCALE)
    noisy = inputs.logits + scale * jax.random.normal(inputs.key, inputs.logits.shape)
    ids = select_top_k(biased(noisy, inputs), num_choices, inputs.is_open, inputs.limit)
    load = win_probability(biased(inputs.logits, inputs), biased(noisy, inputs), scale, num_choices, inputs)
    return Choice(ids, softmax_of_chosen(noisy, ids), probabilities, load)


def win_probability(clean: Array, noisy: Array, scale: Array, num_choices: int, inputs: RoutingInputs) -> Array:
    """P: the probability that an expert is among a token's K largest when its own noise alone is drawn again.

    Args:
      clean: `[T, E]` logits.
      noisy: `[T, E]` the same with noise.
      scale: `[T, E]` positive standard deviation of the noise.
      num_choices: K, static; a token's limit may lower it.
      inputs: which experts are open, and the limit.

    Returns:
      `[T, E]` float32 in [0, 1]; 1 where an open expert has no rival for the last place, 0 for closed experts.
    """
    rivals = noisy if inputs.is_open is None else jnp.where(inputs.is_open, noisy, CLOSED)
    nobody = jnp.full((len(rivals), 1), CLOSED)
    largest, _ = jax.lax.top_k(jnp.concatenate([rivals, nobody], axis=-1), num_choices + 1)  # [T, K+1]
    k = jnp.full(len(rivals), num_choices) if inputs.limit is None else jnp.minimum(inputs.limit, num_choices)
    kth = jnp.take_along_axis(largest, k[:, None] - 1, axis=-1)
    threshold = jnp.where(rivals >= kth, jnp.take_along_axis(largest, k[:, None], axis=-1), kth)  # kth_excluding
    margin = jnp.clip(clean - threshold, -1e6, 1e6)  # keeps the gradient finite where nobody is left to beat
    won = jax.scipy.stats.norm.cdf(margin / scale)
    return won if inputs.is_open is None else won * inputs.is_open
