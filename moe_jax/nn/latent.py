"""Latent experts (LatentMoE 2601.18089): tokens are projected down before dispatch, and outputs up after it.

    y = (sum_e g_e(x) f_e(x A)) B        x A of width d < D; the router sees x itself

What travels to experts, and each expert's matrices, shrink by d / D, which can buy more experts or choices.
"""

import jax
from flax import nnx

from moe_jax.types import Array


class Latent(nnx.Module):
    """The two projections, shared by all experts: A is `down [D, d]`, B is `up [d, D]`."""

    def __init__(self, width: int, latent_width: int, *, output_scale: float = 1.0, key: Array):
        """Draws normal weights scaled by the inverse root of their fan-in.

        Args:
          width: D.
          latent_width: d.
          output_scale: factor on `up`, for depth-scaled initialisation.
          key: consumed.

        Raises:
          ValueError: a latent width below 1.
        """
        if latent_width < 1:
            raise ValueError(f"latent_width must be at least 1, got {latent_width}; use None for experts of width D")
        down_key, up_key = jax.random.split(key)
        self.down = nnx.Param(jax.random.normal(down_key, (width, latent_width)) * width**-0.5)
        self.up = nnx.Param(jax.random.normal(up_key, (latent_width, width)) * output_scale * latent_width**-0.5)

    def enter(self, x: Array) -> Array:
        """`[..., D]` to `[..., d]`."""
        return x @ self.down[...].astype(x.dtype)

    def leave(self, x: Array) -> Array:
        """`[..., d]` to `[..., D]`."""
        return x @ self.up[...].astype(x.dtype)
