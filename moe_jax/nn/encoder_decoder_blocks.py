"""The pre-norm blocks of an encoder-decoder: self-attention, in the decoder cross-attention, and a feed-forward.

A decoder block always works on a cache, into which it writes keys and values of the tokens that it gets: of a whole
target at once in training, of one token at a time in generation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import nnx

from moe_jax.nn.feed_forward import FeedForward
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.multi_head_attention import MultiHeadAttention
from moe_jax.nn.norms import LayerNorm, RMSNorm
from moe_jax.types import Array, RouterOutput

Norm = RMSNorm | LayerNorm


class LayerCache(NamedTuple):
    """What a decoder layer has computed before: `[B, N, H, Dh]` of the target, `[B, S, H, Dh]` of the source."""

    keys: Array
    values: Array
    source_keys: Array
    source_values: Array


class EncoderBlock(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`, each token attending to all."""

    def __init__(self, attention: MultiHeadAttention, feed_forward: FeedForward | MoELayer, norms: Sequence[Norm]):
        """Joins the parts; a norm for each."""
        self.attention_norm, self.feed_forward_norm = norms
        self.attention, self.feed_forward = attention, feed_forward

    def __call__(
        self, x: Array, token_mask: Array | None = None, bias: Array | None = None, key: Array | None = None
    ) -> tuple[Array, RouterOutput | None]:
        """Passes a source.

        Args:
          x: `[B, S, D]`.
          token_mask: `[B, S]` bool; nobody attends to a masked token, and it is not routed.
          bias: `[1, H, S, S]` added to attention's scores.
          key: for what is random in training.

        Returns:
          `[B, S, D]`, and what the router did, None in a dense block.
        """
        normed = self.attention_norm(x)
        mask = None if token_mask is None else token_mask[:, None, None, :]
        x = x + self.attention(normed, *self.attention.keys_and_values(normed), mask, bias)
        y, routed = _feed(self.feed_forward, self.feed_forward_norm(x), token_mask, key)
        return x + y, routed


class DecoderBlock(nnx.Module):
    """As `EncoderBlock`, with `x + cross_attention(norm(x))` between the two."""

    def __init__(
        self,
        attention: MultiHeadAttention,
        cross_attention: MultiHeadAttention,
        feed_forward: FeedForward | MoELayer,
        norms: Sequence[Norm],
    ):
        """Joins the parts; a norm for each."""
        self.attention_norm, self.cross_norm, self.feed_forward_norm = norms
        self.attention, self.cross_attention, self.feed_forward = attention, cross_attention, feed_forward

    def __call__(
        self,
        x: Array,
        cache: LayerCache,
        start: Array,
        mask: Array,
        source_mask: Array | None = None,
        token_mask: Array | None = None,
        bias: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Array, LayerCache, RouterOutput | None]:
        """Passes S tokens that follow those in the cache.

        Args:
          x: `[B, S, D]`.
          cache: of this layer; room for N tokens.
          start: `[]` int32, the place in the cache of the first of them.
          mask: bool `[B, 1, S, N]`, which places each token attends to.
          source_mask: `[B, S']` bool; nobody attends to a masked token of the source.
          token_mask: `[B, S]` bool; masked tokens are not routed.
          bias: `[1, H, S, N]` added to self-attention's scores.
          key: for what is random in training.

        Returns:
          `[B, S, D]`, the cache with these tokens in it, and what the router did, None in a dense block.
        """
        normed = self.attention_norm(x)
        new_keys, new_values = self.attention.keys_and_values(normed)
        keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, new_keys, start, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(cache.values, new_values, start, axis=1)
        x = x + self.attention(normed, keys, values, mask, bias)
        cross_mask = None if source_mask is None else source_mask[:, None, None, :]
        x = x + self.cross_attention(self.cross_norm(x), cache.source_keys, cache.source_values, cross_mask)
        y, routed = _feed(self.feed_forward, self.feed_forward_norm(x), token_mask, key)
        return x + y, cache._replace(keys=keys, values=values), routed


def _feed(
    feed_forward: FeedForward | MoELayer, x: Array, token_mask: Array | None, key: Array | None
) -> tuple[Array, RouterOutput | None]:
    if isinstance(feed_forward, MoELayer):
        return feed_forward(x, token_mask, key=key)
    return feed_forward(x), None
