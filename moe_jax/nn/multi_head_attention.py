"""Multi-head attention (Vaswani et al. 1706.03762) over keys and values that the caller holds.

They may be of the same tokens, of another sequence, or a cache of earlier tokens; `dot_product_attention` mixes them.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.types import Array


class MultiHeadAttention(nnx.Module):
    """H heads of width Dh: `query`, `key`, `value [D, H, Dh]`, `out [H, Dh, D]`, and biases if asked for."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        *,
        use_bias: bool = False,
        is_scaled: bool = True,
        output_scale: float = 1.0,
        key: Array,
    ):
        """Draws normal weights scaled by the inverse root of their fan-in; biases start at zero.

        Args:
          width: D.
          num_heads: H.
          head_width: Dh; H * Dh may differ from D.
          use_bias: whether all four projections have one.
          is_scaled: whether scores are divided by sqrt(Dh). T5 does without, and draws queries smaller by that instead.
          output_scale: factor on the output projection.
          key: consumed.
        """
        in_key, out_key = jax.random.split(key)
        heads = (num_heads, head_width)
        query, keys, values = jax.random.normal(in_key, (3, width, *heads)) * width**-0.5
        out = jax.random.normal(out_key, (*heads, width)) * (num_heads * head_width) ** -0.5
        self.score_scale = head_width**-0.5 if is_scaled else 1.0
        self.query = nnx.Param(query if is_scaled else query * head_width**-0.5)
        self.key, self.value, self.out = nnx.Param(keys), nnx.Param(values), nnx.Param(out * output_scale)
        self.query_bias = nnx.Param(jnp.zeros(heads)) if use_bias else None
        self.key_bias = nnx.Param(jnp.zeros(heads)) if use_bias else None
        self.value_bias = nnx.Param(jnp.zeros(heads)) if use_bias else None
        self.out_bias = nnx.Param(jnp.zeros(width)) if use_bias else None

    def keys_and_values(self, x: Array) -> tuple[Array, Array]:
        """What `[B, N, D]` can be attended to by: two `[B, N, H, Dh]`."""
        return _project(x, self.key, self.key_bias), _project(x, self.value, self.value_bias)

    def __call__(
        self, x: Array, keys: Array, values: Array, mask: Array | None = None, bias: Array | None = None
    ) -> Array:
        """Attends.

        Args:
          x: `[B, S, D]`, what asks.
          keys: `[B, N, H, Dh]`.
          values: `[B, N, H, Dh]`.
          mask: bool, broadcast to `[B, H, S, N]`; false is not attended to. A row of nothing but false mixes all.
          bias: float32, broadcast to `[B, H, S, N]`; added to the scores.

        Returns:
          `[B, S, D]`.
        """
        query = _project(x, self.query, self.query_bias)
        mixed = jax.nn.dot_product_attention(query, keys, values, bias, mask, scale=self.score_scale)
        y = jnp.einsum("bshk,hkd->bsd", mixed, self.out[...].astype(x.dtype))
        return y if self.out_bias is None else y + self.out_bias[...].astype(x.dtype)[None, None]


def _project(x: Array, weight: nnx.Param, bias: nnx.Param | None) -> Array:
    """`[B, S, D]` to `[B, S, H, Dh]`."""
    y = jnp.einsum("bsd,dhk->bshk", x, weight[...].astype(x.dtype))
    return y if bias is None else y + bias[...].astype(x.dtype)[None, None]
