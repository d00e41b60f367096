"""Causal grouped-query attention (Ainslie et al. 2305.13245) with rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.ops.rotary import rotate
from moe_jax.types import Array


class Attention(nnx.Module):
    """H query heads share `num_kv_heads` keys and values; projections are fused into one matmul."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, *, output_scale: float = 1.0, key: Array):
        """Draws normal weights scaled by the inverse root of their fan-in.

        Args:
          width: D, a multiple of H.
          num_heads: H, a multiple of `num_kv_heads`.
          num_kv_heads: key and value heads.
          output_scale: factor on the output projection.
          key: consumed.
        """
        head_width = width // num_heads
        in_key, out_key = jax.random.split(key)
        heads = num_heads + 2 * num_kv_heads
        self.qkv = nnx.Param(jax.random.normal(in_key, (width, heads, head_width)) * width**-0.5)
        self.out = nnx.Param(jax.random.normal(out_key, (num_heads, head_width, width)) * output_scale * width**-0.5)

    def __call__(self, x: Array, token_mask: Array | None = None) -> Array:
        """Attends within each sequence.

        Args:
          x: `[B, S, D]`.
          token_mask: `[B, S]` bool; nobody attends to a masked token.

        Returns:
          `[B, S, D]`.
        """
        num_heads = self.out.shape[0]
        num_kv_heads = (self.qkv.shape[1] - num_heads) // 2
        qkv = jnp.einsum("bsd,dhk->bshk", x, self.qkv[...].astype(x.dtype))
        query, key, value = jnp.split(qkv, [num_heads, num_heads + num_kv_heads], axis=2)
        positions = jnp.arange(x.shape[1])
        mixed = jax.nn.dot_product_attention(
            rotate(query, positions),
            rotate(key, positions),
            value,
            mask=None if token_mask is None else token_mask[:, None, None, :],
            is_causal=True,
        )
        return jnp.einsum("bshk,hkd->bsd", mixed, self.out[...].astype(x.dtype))
