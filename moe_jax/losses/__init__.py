"""Losses: pure functions on logits and on sum-form router statistics."""

from moe_jax.losses.balance import (
    global_entropy_loss,
    importance_loss,
    load_balancing_loss,
    load_fractions,
    load_loss,
    router_entropy_loss,
    router_z_loss,
    sum_over_groups,
)
from moe_jax.losses.language import cross_entropy, kl_divergence, masked_mean

__all__ = [
    "cross_entropy",
    "global_entropy_loss",
    "importance_loss",
    "kl_divergence",
    "load_balancing_loss",
    "load_fractions",
    "load_loss",
    "masked_mean",
    "router_entropy_loss",
    "router_z_loss",
    "sum_over_groups",
]
