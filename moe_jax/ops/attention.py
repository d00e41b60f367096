"""Attention over keys and values, as functions of arrays: who sees whom, and the mixing."""

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def attend(
    query: Array,
    key: Array,
    value: Array,
    is_visible: Array | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    bias: Array | None = None,
    sinks: Array | None = None,
) -> Array:
    """Softmax attention; H query heads share the key and value heads in equal runs (2305.13245).

    Args:
      query: `[B, Sq, H, Dh]`.
      key: `[B, Sk, Hkv, Dh]`, H a multiple of Hkv.
      value: `[B, Sk, Hkv, Dv]`.
      is_visible: bool that broadcasts to `[B, H, Sq, Sk]`; None means that all is seen.
      is_causal: whether query i sees keys up to i only, besides.
      scale: factor on the scores; None for `Dh ** -0.5`.
      bias: float32, added to the scores, `[1, H, Sq, Sk]`.
      sinks: `[H]` logit of a key that has no value, which may take attention from all others (gpt-oss, 2508.10925).

    Returns:
      `[B, Sq, H, Dv]` in the queries' dtype; the softmax is float32. A query that sees nothing gets something finite.
    """
    if sinks is None and value.shape[-1] == key.shape[-1]:
        return jax.nn.dot_product_attention(query, key, value, bias, is_visible, is_causal=is_causal, scale=scale)
    batch, num_queries, num_heads, width = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    grouped = query.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, width)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, key, preferred_element_type=jnp.float32)
    scores = (scores * (width**-0.5 if scale is None else scale)).reshape(batch, num_heads, num_queries, num_keys)
    if bias is not None:
        scores += bias
    if is_causal:
        is_past = jnp.tril(jnp.ones((num_queries, num_keys), bool))[None, None]
        is_visible = is_past if is_visible is None else is_past & is_visible
    weights = attention_weights(scores, is_visible, sinks).astype(value.dtype)
    weights = weights.reshape(batch, num_kv_heads, -1, num_queries, num_keys)
    return jnp.einsum("bhgqk,bkhd->bqhgd", weights, value).reshape(batch, num_queries, num_heads, value.shape[-1])


def attention_weights(scores: Array, is_visible: Array | None = None, sinks: Array | None = None) -> Array:
    """Softmax over keys.

    Args:
      scores: `[B, H, Sq, Sk]` float32.
      is_visible: bool that broadcasts to it; None means that all is seen.
      sinks: `[H]`; see `attend`.

    Returns:
      `[B, H, Sq, Sk]` float32; rows sum to 1, or with sinks to less.
    """
    if is_visible is not None:
        scores = jnp.where(is_visible, scores, jnp.finfo(jnp.float32).min / 2)
    top = scores.max(-1, keepdims=True)
    if sinks is None:
        weights = jnp.exp(scores - top)
        return weights / weights.sum(-1, keepdims=True)
    sink = sinks.astype(jnp.float32).reshape(1, -1, 1, 1)
    top = jnp.maximum(top, sink)
    weights = jnp.exp(scores - top)
    return weights / (weights.sum(-1, keepdims=True) + jnp.exp(sink - top))


def segment_positions(segments: Array) -> Array:
    """Positions `[B, S]` int32 that begin anew at 0 with every segment, a run of equal ids in `[B, S]`."""
    places = jnp.broadcast_to(jnp.arange(segments.shape[1])[None], segments.shape)
    is_first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return places - jax.lax.cummax(jnp.where(is_first, places, 0), axis=1)


def usable_keys(token_mask: Array | None, segments: Array | None) -> Array | None:
    """Which keys a query may see at all: those that are tokens, and of its own segment.

    Args:
      token_mask: `[B, S]` bool, false for padding, or None.
      segments: `[B, S]` int ids, or None.

    Returns:
      bool that broadcasts to `[B, 1, S, S]`; None means every key.
    """
    is_token = None if token_mask is None else token_mask[:, None, None, :]
    if segments is None:
        return is_token
    is_own = segments[:, None, :, None] == segments[:, None, None, :]
    return is_own if is_token is None else is_own & is_token


def visible_keys(query_positions: Array, key_positions: Array, window: Array, chunk: Array) -> Array:
    """Which keys a causal layer lets a query see.

    Args:
      query_positions: `[Bq, Sq]` int; Bq is B, or 1 for all alike.
      key_positions: `[Sk]` int, or `[B, Sk]` where sequences differ.
      window: `[]` int, the last keys that are seen, the query's own included.
      chunk: `[]` int; only keys of the query's own run of so many positions are seen (Llama 4).

    Returns:
      `[Bq, 1, Sq, Sk]` bool.
    """
    query = query_positions[:, None, :, None]
    key = key_positions[None, None, None, :] if key_positions.ndim == 1 else key_positions[:, None, None, :]
    return (key <= query) & (key > query - window) & (key // chunk == query // chunk)
