"""Losses: pure functions on logits and on sum-form router statistics."""

from moe_jax.losses.balance import load_balancing_loss, load_fractions, router_z_loss
from moe_jax.losses.language import cross_entropy, kl_divergence, masked_mean

__all__ = [
    "cross_entropy",
    "kl_divergence",
    "load_balancing_loss",
    "load_fractions",
    "masked_mean",
    "router_z_loss",
]
