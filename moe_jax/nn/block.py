"""The pre-norm transformer block: attention, then a dense or a mixture-of-experts feed-forward."""

import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.attention import Attention
from moe_jax.nn.feed_forward import FeedForward
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.soft_moe import SoftMoELayer
from moe_jax.ops.norms import rms_norm
from moe_jax.routing import Force
from moe_jax.types import Array, RouterOutput, RoutingPlan, Topology


class RMSNorm(nnx.Module):
    """`ops.norms.rms_norm` with a learned `scale [D]`."""

    def __init__(self, width: int):
        """Starts at scale 1."""
        self.scale = nnx.Param(jnp.ones((width,)))

    def __call__(self, x: Array) -> Array:
        """`[..., D]` to `[..., D]`."""
        return rms_norm(x, self.scale[...])


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, attention: Attention, feed_forward: FeedForward | MoELayer | SoftMoELayer, width: int):
        """Joins the parts; D is `width`."""
        self.attention_norm, self.attention = RMSNorm(width), attention
        self.feed_forward_norm, self.feed_forward = RMSNorm(width), feed_forward

    def __call__(
        self,
        x: Array,
        token_mask: Array | None = None,
        topology: Topology | None = None,
        token_groups: Array | None = None,
        *,
        token_ids: Array | None = None,
        key: Array | None = None,
        forced: RoutingPlan | None = None,
        force: Force = "exact",
    ) -> tuple[Array, RouterOutput | None]:
        """Arguments as `MoELayer`; the second result is None for a dense block."""
        x, normed = self.attend(x, token_mask)
        if isinstance(self.feed_forward, MoELayer | SoftMoELayer):
            mixed, routed = self.feed_forward(
                normed, token_mask, topology, token_groups, token_ids=token_ids, key=key, forced=forced, force=force
            )
            return x + mixed, routed
        return x + self.feed_forward(normed), None

    def attend(self, x: Array, token_mask: Array | None = None) -> tuple[Array, Array]:
        """The first half: the residual stream after attention, and its norm that enters the feed-forward."""
        x = x + self.attention(self.attention_norm(x), token_mask)
        return x, self.feed_forward_norm(x)
