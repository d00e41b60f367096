"""Balance losses from sum-form router statistics.

The statistics add over micro-batches, sequences and devices, and each loss is one formula applied afterwards, so the
same code is the local, the sequence or the global-batch loss, depending on where the sum is taken.
"""

import jax
import jax.numpy as jnp

from moe_jax.types import Array, RouterStats


def load_fractions(stats: RouterStats) -> Array:
    """`[..., E]` share of the assignments that each expert was chosen for; sums to 1 (0 without tokens)."""
    return stats.chosen / jnp.maximum(stats.chosen.sum(-1, keepdims=True), 1.0)


def load_balancing_loss(stats: RouterStats) -> Array:
    """`E * sum_e f_e P_e` (Switch 2101.03961, eq. 4-6); 1 at perfect balance, E at total collapse.

    f is the share of assignments (no gradient), P the mean router probability. With K > 1, f counts all K choices
    and still sums to 1, as in GShard's later descendants; multiply by K for the convention of Hugging Face's Mixtral.

    Args:
      stats: leading axes free, experts last.

    Returns:
      `[...]` one loss per leading index.
    """
    fractions = jax.lax.stop_gradient(load_fractions(stats))
    mean_probabilities = stats.prob_sums / jnp.maximum(stats.num_tokens, 1.0)[..., None]
    return fractions.shape[-1] * jnp.sum(fractions * mean_probabilities, axis=-1)


def router_z_loss(stats: RouterStats) -> Array:
    """Mean over tokens of `logsumexp(z)^2` (ST-MoE 2202.08906, eq. 5): keeps router logits small. Returns `[...]`."""
    return stats.z_sum / jnp.maximum(stats.num_tokens, 1.0)
