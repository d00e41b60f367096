"""The neural router: a perceptron with one hidden layer instead of a matrix.

    z = gelu(x W_in) W_out

A hidden layer of H units costs 2 H (D + E) FLOPs a token, a linear router 2 D E, so H = D E / (D + E) units, always
fewer than E, make the two equal: at that width the question is whether depth helps, and not whether FLOPs do.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.routers.router import RouterLogits, draw_kernel
from moe_jax.types import Array


class MLPRouter(nnx.Module):
    """Logits of a two-layer perceptron: 2 H (D + E) FLOPs a token."""

    def __init__(self, width: int, num_experts: int, *, hidden: int = 0, key: Array):
        """Draws `w_in [D, H]` and `w_out [H, E]` from normals of variance 1/D and 1/H.

        Args:
          width: D.
          num_experts: E.
          hidden: H; 0 takes the width whose FLOPs are nearest to a linear router's.
          key: consumed.

        Raises:
          ValueError: a negative width.
        """
        if hidden < 0:
            raise ValueError(f"hidden={hidden} must be a number of units, or 0 for the FLOPs of a linear router")
        hidden = hidden or max(1, round(width * num_experts / (width + num_experts)))
        in_key, out_key = jax.random.split(key)
        self.w_in = nnx.Param(draw_kernel(in_key, width, hidden))
        self.w_out = nnx.Param(draw_kernel(out_key, hidden, num_experts))

    def __call__(self, x: Array, token_mask: Array | None = None, key: Array | None = None) -> RouterLogits:
        """Scores every token by itself; arguments as `Router`."""
        del token_mask, key
        hidden = jax.nn.gelu(x.astype(jnp.float32) @ self.w_in[...], approximate=False)
        return RouterLogits(hidden @ self.w_out[...])
