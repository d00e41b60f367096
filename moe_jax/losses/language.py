"""Losses over next-token distributions, per position, so that the caller decides what to average over."""

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Negative log-likelihood of `targets`.

    Args:
      logits: `[..., V]`, any float dtype; computed in float32.
      targets: `[...]` int token ids.

    Returns:
      `[...]` float32 nats.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


def kl_divergence(reference_logits: Array, logits: Array) -> Array:
    """`KL(softmax(reference_logits) || softmax(logits))` of `[..., V]` logits. Returns `[...]` float32 nats."""
    reference = jax.nn.log_softmax(reference_logits.astype(jnp.float32), axis=-1)
    other = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(reference) * (reference - other), axis=-1)


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of `values` where `mask` (same shape) is true; 0 if it never is. Returns a float32 scalar."""
    return jnp.sum(values * mask, dtype=jnp.float32) / jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)
