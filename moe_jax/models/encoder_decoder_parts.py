"""Builds the parts of an encoder-decoder from its config."""

from typing import Any

import jax

from moe_jax.models.encoder_decoder_config import EncoderDecoderConfig, LayerKind
from moe_jax.nn.encoder_decoder_blocks import DecoderBlock, EncoderBlock
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.feed_forward import FeedForward
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.multi_head_attention import MultiHeadAttention
from moe_jax.nn.norms import NORMS
from moe_jax.nn.relative_bias import RelativeBias
from moe_jax.nn.routers import get_router
from moe_jax.types import Array


def init_relative_bias(
    config: EncoderDecoderConfig, num_heads: int, is_bidirectional: bool, key: Array
) -> RelativeBias | None:
    """The position bias that a stack's layers share, if positions are relative; bidirectional for the encoder."""
    if config.positions != "relative":
        return None
    return RelativeBias(
        config.relative_buckets, config.relative_distance, num_heads, is_bidirectional=is_bidirectional, key=key
    )


def init_encoder_block(config: EncoderDecoderConfig, kind: LayerKind, key: Array) -> EncoderBlock:
    """One block; output projections are scaled by 1/sqrt(2 * depth), so that the residual stream starts small."""
    attention_key, feed_forward_key = jax.random.split(key)
    scale = (2 * len(config.encoder_layers)) ** -0.5
    return EncoderBlock(
        _init_attention(config, config.encoder_heads, scale, attention_key),
        _init_feed_forward(config, kind, config.encoder_hidden, scale, feed_forward_key),
        [NORMS[config.norm](config.width, config.norm_epsilon) for _ in range(2)],
    )


def init_decoder_block(config: EncoderDecoderConfig, kind: LayerKind, key: Array) -> DecoderBlock:
    """One block, scaled for the three sums that each makes to the residual stream."""
    attention_key, cross_key, feed_forward_key = jax.random.split(key, 3)
    scale = (3 * len(config.decoder_layers)) ** -0.5
    return DecoderBlock(
        _init_attention(config, config.decoder_heads, scale, attention_key),
        _init_attention(config, config.decoder_heads, scale, cross_key),
        _init_feed_forward(config, kind, config.decoder_hidden, scale, feed_forward_key),
        [NORMS[config.norm](config.width, config.norm_epsilon) for _ in range(3)],
    )


def _init_attention(config: EncoderDecoderConfig, num_heads: int, scale: float, key: Array) -> MultiHeadAttention:
    """Attention of a stack with `num_heads`."""
    return MultiHeadAttention(
        config.width,
        num_heads,
        config.head_width or config.width // num_heads,
        use_bias=config.attention_bias,
        is_scaled=config.scale_attention,
        output_scale=scale,
        key=key,
    )


def _init_feed_forward(
    config: EncoderDecoderConfig, kind: LayerKind, hidden: int, scale: float, key: Array
) -> FeedForward | MoELayer:
    """A dense network, or a mixture of experts of the same width."""
    router_key, experts_key = jax.random.split(key)
    network: dict[str, Any] = {"kind": config.expert, "settings": config.expert_settings, "output_scale": scale}
    if kind == "dense":
        return FeedForward(config.width, hidden, **network, key=experts_key)
    return MoELayer(
        get_router(config.router, **config.router_settings)(config.width, config.num_experts, key=router_key),
        ExpertStack(config.num_experts, config.width, hidden, **network, key=experts_key),
        num_choices=config.num_choices,
        rule=config.rule,
        rule_settings=config.rule_settings,
        backend=config.backend,
        capacity=config.token_capacity,
        stats_level=config.stats_level,
    )
