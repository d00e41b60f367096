"""Balance losses from sum-form router statistics.

The statistics add over micro-batches, sequences and devices, and each loss is one formula applied afterwards, so the
same code is the local, the sequence or the global-batch loss, depending on where the sum is taken. All take leading
axes `[...]` in front of the experts and return `[...]`, and all are 0 with gradient 0 where there are no tokens.

Conventions differ between code bases by constant factors. Here f is each expert's share of the assignments (it sums to
1) and P the mean probability (sums to 1), so that `load_balancing_loss` is E sum f P whatever K:

    this project, Switch (K = 1), Megatron-LM, MegaBlocks, DeepSeek-V3     E sum f P      1 when balanced
    Mixtral and OLMoE of Hugging Face transformers: f sums to K            K E sum f P    K when balanced

Divide a weight by K to take it from the first to the second. OLMoE was trained with the first and its public port has
the second (github.com/allenai/OLMoE/issues/45). Those ports also sum over all layers before they multiply f by P; here
each layer has its own loss.
"""

import jax
import jax.numpy as jnp

from moe_jax.types import Array, RouterStats


def load_fractions(stats: RouterStats) -> Array:
    """`[..., E]` share of the assignments that each expert was chosen for; sums to 1 (0 without tokens)."""
    return stats.chosen / jnp.maximum(stats.chosen.sum(-1, keepdims=True), 1.0)


def load_balancing_loss(stats: RouterStats) -> Array:
    """`E * sum_e f_e P_e` (Switch 2101.03961, eq. 4-6); 1 at perfect balance, E at total collapse.

    f is the share of assignments (no gradient), P the mean router probability. With K > 1, f counts all K choices and
    still sums to 1; the choices are those made, a selection bias included. Of statistics per sequence this is the
    sequence-wise loss of DeepSeek-V3 (2412.19437, eq. 17-20); `sum_over_groups` averages it.
    """
    fractions = jax.lax.stop_gradient(load_fractions(stats))
    return fractions.shape[-1] * jnp.sum(fractions * _mean_probabilities(stats), axis=-1)


def importance_loss(stats: RouterStats) -> Array:
    """CV^2 of the experts' summed gates (1701.06538, eq. 6-7); 0 at perfect balance, E - 1 at total collapse."""
    return _squared_variation(stats.gate_sums)


def load_loss(stats: RouterStats) -> Array:
    """CV^2 of the experts' estimated loads (1701.06538, eq. 11); 0 at perfect balance, E - 1 at total collapse.

    It has a gradient only under rules with a differentiable estimate of the load, such as noisy top-k; under the
    others the loads are counts, and it only measures.
    """
    return _squared_variation(stats.load_sums)


def router_entropy_loss(stats: RouterStats) -> Array:
    """Mean over tokens of the entropy of the router's probabilities, nats; between 0 and ln E.

    Minimising it, by a positive weight, makes each token's choice more certain and balances nothing (the local loss of
    LIMoE, 2206.02770); a negative weight keeps the router undecided.
    """
    return stats.entropy_sum / jnp.maximum(stats.num_tokens, 1.0)


def global_entropy_loss(stats: RouterStats) -> Array:
    """`ln E - H(P)` of the mean probabilities P, nats; 0 at perfect balance, ln E at total collapse.

    LIMoE's global loss (2206.02770) without its threshold, and shifted by ln E. With `router_entropy_loss` at the same
    weight the sum is ln E less the mutual information of token and expert.
    """
    p = _mean_probabilities(stats)
    return jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0) * p.shape[-1]), axis=-1)


def router_z_loss(stats: RouterStats) -> Array:
    """Mean over tokens of `logsumexp(z)^2` (ST-MoE 2202.08906, eq. 5): keeps router logits small. Returns `[...]`."""
    return stats.z_sum / jnp.maximum(stats.num_tokens, 1.0)


def sum_over_groups(losses: Array, stats: RouterStats) -> Array:
    """`sum_n tokens_n losses_n`: over all tokens it is their mean, and unlike a mean it adds over micro-batches.

    Args:
      losses: `[..., N]` a loss of each sequence or token.
      stats: with the same leading axes; groups without tokens count nothing.

    Returns:
      `[...]`; divide by `stats.num_tokens.sum(-1)` for the mean loss.
    """
    return jnp.sum(losses * stats.num_tokens, axis=-1)


def _mean_probabilities(stats: RouterStats) -> Array:
    """P `[..., E]`; sums to 1 (0 without tokens)."""
    return stats.prob_sums / jnp.maximum(stats.num_tokens, 1.0)[..., None]


def _squared_variation(sums: Array) -> Array:
    """Population variance over squared mean of `[..., E]`; no square root, whose slope at perfect balance is NaN."""
    mean = sums.mean(-1)
    variance = jnp.square(sums - mean[..., None]).mean(-1)
    return jnp.where(mean > 0, variance / jnp.where(mean > 0, mean, 1.0) ** 2, 0.0)
