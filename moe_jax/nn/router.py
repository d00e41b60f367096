"""Routers: modules that own the parameters of a score. Selecting and weighing is in `moe_jax.routing`."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.types import Array


class Balance(nnx.Variable):
    """State of a balance rule: carried by the model, updated once per optimizer step, never trained."""


class LinearRouter(nnx.Module):
    """Logits `x W`, in float32 whatever the model computes in (Switch 2101.03961, section 2.4)."""

    def __init__(self, width: int, num_experts: int, *, key: Array):
        """Draws `W [D, E]` from N(0, 1/D); `bias [E]` starts at 0.

        Args:
          width: D.
          num_experts: E.
          key: consumed.
        """
        self.kernel = nnx.Param(jax.random.normal(key, (width, num_experts)) * width**-0.5)
        self.bias = Balance(jnp.zeros((num_experts,)))

    def __call__(self, tokens: Array) -> Array:
        """`[T, D]` to `[T, E]` float32 logits; the selection bias is not added here."""
        return tokens.astype(jnp.float32) @ self.kernel[...]
