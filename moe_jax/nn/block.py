"""The pre-norm transformer block: attention, then a dense or a mixture-of-experts feed-forward."""

from flax import nnx

from moe_jax.nn.attention import Attention, KeyValues
from moe_jax.nn.feed_forward import FeedForward
from moe_jax.nn.latent_attention import LatentAttention
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.norms import LayerNorm, RMSNorm
from moe_jax.nn.soft_moe import SoftMoELayer
from moe_jax.routing import Force
from moe_jax.types import Array, RouterOutput, RoutingPlan, Topology


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(
        self,
        attention: Attention | LatentAttention,
        feed_forward: FeedForward | MoELayer | SoftMoELayer,
        attention_norm: RMSNorm | LayerNorm,
        feed_forward_norm: RMSNorm | LayerNorm,
        residual_scale: float = 1.0,
    ):
        """Joins the parts; what both halves add to the stream is multiplied by `residual_scale`."""
        self.attention_norm, self.attention = attention_norm, attention
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.residual_scale = residual_scale

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
        segments: Array | None = None,
    ) -> tuple[Array, RouterOutput | None]:
        """Arguments as `MoELayer`, `segments` as `Attention`; the second result is None for a dense block."""
        x, _ = self.attend(x, token_mask, segments=segments)
        return self.feed(
            x, token_mask, topology, token_groups, token_ids=token_ids, key=key, forced=forced, force=force
        )

    def attend(
        self,
        x: Array,
        token_mask: Array | None = None,
        length: int | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, KeyValues]:
        """The first half: the residual stream after attention, and what later tokens need; arguments as `Attention`."""
        mixed, kept = self.attention(self.attention_norm(x), token_mask, length, segments)
        return self._add(x, mixed), kept

    def extend(self, x: Array, positions: Array, cache: KeyValues) -> tuple[Array, KeyValues]:
        """The first half for one new token of each sequence, `[B, 1, D]`; arguments as `Attention.extend`."""
        mixed, cache = self.attention.extend(self.attention_norm(x), positions, cache)
        return self._add(x, mixed), cache

    def feed(
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
        """The second half: the feed-forward network on the stream after attention."""
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, MoELayer | SoftMoELayer):
            mixed, routed = self.feed_forward(
                normed, token_mask, topology, token_groups, token_ids=token_ids, key=key, forced=forced, force=force
            )
            return self._add(x, mixed), routed
        return self._add(x, self.feed_forward(normed)), None

    def _add(self, x: Array, mixed: Array) -> Array:
        return x + (mixed if self.residual_scale == 1 else mixed * self.residual_scale)
