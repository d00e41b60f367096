"""The attention router of Yuan 2.0-M32 (Wu et al. 2405.17976): experts attend to experts before one is chosen.

A token gives every expert a query, a key and a value of one number each, and the logits are what attention over the
experts makes of them:

    q, k, v = x W_q, x W_k, x W_v          each [E]
    z_e     = sum_f softmax_f(q_e k_f) v_f

so that an expert's score takes its correlation with the others into account. This is the paper's `softmax(Q K^T) V` for
one token. The authors train it as attention over the experts with as many heads as positions, each of width 1: no
position sees another, and the root of the width, which divides the scores, is 1.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.routers.router import RouterLogits, draw_kernel
from moe_jax.types import Array


class AttentionRouter(nnx.Module):
    """Logits by attention over experts: 6 D E FLOPs a token, about 3 E^2 without parameters, and `[T, E, E]` memory."""

    def __init__(self, width: int, num_experts: int, *, key: Array):
        """Draws `qkv [D, 3E]` from N(0, 1/D): all queries, then all keys, then all values.

        Args:
          width: D.
          num_experts: E.
          key: consumed.
        """
        self.qkv = nnx.Param(draw_kernel(key, width, 3 * num_experts))

    def __call__(self, x: Array, token_mask: Array | None = None, key: Array | None = None) -> RouterLogits:
        """Scores every token by itself; arguments as `Router`."""
        del token_mask, key
        queries, keys, values = jnp.split(x.astype(jnp.float32) @ self.qkv[...], 3, axis=-1)
        weights = jax.nn.softmax(queries[..., :, None] * keys[..., None, :], axis=-1)  # [B, S, E, E]
        return RouterLogits(jnp.einsum("bsef,bsf->bse", weights, values))
