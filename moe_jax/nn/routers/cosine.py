"""The cosine router of X-MoE (Chi et al. 2204.09179): tokens and experts compared by direction in a small space.

    z_e = cos(x P, c_e) / temperature, with c_e the prototype of expert e and a learned temperature

A linear router pulls tokens towards the experts' vectors, which collapses their representations; a narrow projection
and unit length leave it only an angle to pull at.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.routers.router import RouterLogits, draw_kernel
from moe_jax.ops.norms import l2_normalize
from moe_jax.types import Array


class CosineRouter(nnx.Module):
    """Logits from cosines: 2 d (D + E) FLOPs a token, with d the width of the space of prototypes."""

    def __init__(
        self, width: int, num_experts: int, *, prototype_width: int = 16, temperature: float = 0.25, key: Array
    ):
        """Draws `projection [D, d]` and `prototypes [d, E]`; `scale []` is the inverse temperature.

        Args:
          width: D.
          num_experts: E.
          prototype_width: d; 16 is that of the authors' code.
          temperature: where it starts. Cosines of random directions have variance 1/d, so that 1/sqrt(d) gives logits
            the variance 1 of a linear router's. The scale is trained itself, not its logarithm.
          key: consumed.

        Raises:
          ValueError: a width below 1 or a temperature that is not positive.
        """
        if prototype_width < 1 or temperature <= 0:
            raise ValueError(f"prototype_width={prototype_width} and temperature={temperature} must be positive")
        projection_key, prototype_key = jax.random.split(key)
        self.projection = nnx.Param(draw_kernel(projection_key, width, prototype_width))
        self.prototypes = nnx.Param(draw_kernel(prototype_key, prototype_width, num_experts))
        self.scale = nnx.Param(jnp.float32(1 / temperature))

    def __call__(self, x: Array, token_mask: Array | None = None, key: Array | None = None) -> RouterLogits:
        """Scores every token by itself; arguments as `Router`. A token projected to zero gets zeros."""
        del token_mask, key
        tokens = l2_normalize(x.astype(jnp.float32) @ self.projection[...])
        return RouterLogits(self.scale[...] * (tokens @ l2_normalize(self.prototypes[...], axis=0)))
