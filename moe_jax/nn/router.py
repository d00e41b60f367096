"""Routers: modules that own the parameters of a score. Selecting and weighing is in `moe_jax.routing`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.types import Array


class Balance(nnx.Variable):
    """State of a balance rule: carried by the model, updated once per optimizer step, never trained."""


class RouterLogits(NamedTuple):
    """What a router module gives: `logits [B, S, E]` float32, and the standard deviation of their noise, if learned."""

    logits: Array
    noise_scale: Array | None = None


class LinearRouter(nnx.Module):
    """Logits `x W`, in float32 whatever the model computes in (Switch 2101.03961, section 2.4)."""

    def __init__(self, width: int, num_experts: int, *, key: Array):
        """Draws `W [D, E]` from N(0, 1/D).

        Args:
          width: D.
          num_experts: E.
          key: consumed.
        """
        self.kernel = nnx.Param(jax.random.normal(key, (width, num_experts)) * width**-0.5)

    def __call__(self, x: Array, token_mask: Array | None = None, key: Array | None = None) -> RouterLogits:
        """Scores every token by itself.

        Args:
          x: `[B, S, D]`.
          token_mask: `[B, S]` bool; without effect here.
          key: without effect here.

        Returns:
          `[B, S, E]` float32 logits; the selection bias is not added here.
        """
        del token_mask, key
        return RouterLogits(x.astype(jnp.float32) @ self.kernel[...])
