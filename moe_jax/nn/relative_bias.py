"""T5's relative position bias (1910.10683): a learned number for each bucket of distances and each head.

It is added to attention's scores; all layers of a stack share one.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.ops.relative_position import relative_position_buckets
from moe_jax.types import Array


class RelativeBias(nnx.Module):
    """Owns `table [buckets, H]`."""

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int, *, is_bidirectional: bool, key: Array):
        """Draws the table from N(0, 0.01); arguments as `ops.relative_position_buckets`.

        Args:
          num_buckets: rows of the table.
          max_distance: the distance from which on all share a bucket.
          num_heads: H.
          is_bidirectional: true for an encoder.
          key: consumed.
        """
        self.max_distance, self.is_bidirectional = max_distance, is_bidirectional
        self.table = nnx.Param(0.1 * jax.random.normal(key, (num_buckets, num_heads)))

    def __call__(self, query_positions: Array, key_positions: Array) -> Array:
        """Positions `[S]` and `[N]`, int, to the bias `[1, H, S, N]` float32."""
        table = self.table[...]
        buckets = relative_position_buckets(
            key_positions[None, :] - query_positions[:, None],
            num_buckets=table.shape[0],
            max_distance=self.max_distance,
            is_bidirectional=self.is_bidirectional,
        )
        return table[buckets].transpose(2, 0, 1)[None].astype(jnp.float32)  # (S, N, H) -> (1, H, S, N)
