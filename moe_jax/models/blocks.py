"""Builds the blocks of a decoder from its config."""

import jax

from moe_jax.models.config import DecoderConfig, LayerKind, make_attention, make_router
from moe_jax.models.execution import ONE_DEVICE, Execution
from moe_jax.nn.block import Block
from moe_jax.nn.expert_stack import ExpertStack
from moe_jax.nn.feed_forward import FeedForward
from moe_jax.nn.latent import Latent
from moe_jax.nn.moe import MoELayer
from moe_jax.nn.norms import NORMS
from moe_jax.nn.routers import Router
from moe_jax.nn.soft_moe import SoftMoELayer, SoftRouter
from moe_jax.nn.zero_compute import ZeroComputeExperts
from moe_jax.types import Array, DispatchFn


def init_block(
    config: DecoderConfig, kind: LayerKind, pattern: Array | None, key: Array, execution: Execution = ONE_DEVICE
) -> Block:
    """One block; output projections are scaled by 1/sqrt(2 * depth), so that the residual stream starts small.

    Args:
      config: the architecture.
      kind: of the layer.
      pattern: `[3]`, its row of `config.patterns`, or None.
      key: consumed.
      execution: over which devices experts run.
    """
    attention_key, feed_forward_key, router_key = jax.random.split(key, 3)
    scale = (2 * len(config.layers)) ** -0.5
    attention = make_attention(config, pattern, scale, attention_key)
    feed_forward: FeedForward | MoELayer | SoftMoELayer
    if kind == "dense":
        feed_forward = _init_network(config, config.dense_hidden, scale, feed_forward_key)
    else:
        router = make_router(config)(config.width, config.total_experts, key=router_key)
        if isinstance(router, SoftRouter):
            experts = _init_experts(config, config.width, scale, feed_forward_key)
            feed_forward = SoftMoELayer(router, experts, stats_level=config.stats_level)
        else:
            backend = execution.dispatch(config.backend)
            feed_forward = _init_moe(config, router, backend, scale, feed_forward_key, jax.random.fold_in(key, 3))
    first, second = (NORMS[config.norm](config.width, config.norm_epsilon) for _ in range(2))
    return Block(attention, feed_forward, first, second, config.residual_scale)


def _init_network(config: DecoderConfig, hidden: int, scale: float, key: Array, is_gated: bool = False) -> FeedForward:
    """A network that every token passes."""
    kind, settings = config.dense_network
    return FeedForward(
        config.width,
        hidden,
        kind=kind,
        settings=settings,
        is_gated=is_gated,
        output_scale=scale,
        key=key,
    )


def _init_experts(config: DecoderConfig, width: int, scale: float, key: Array) -> ExpertStack:
    """The experts of a layer, for rows of the given width."""
    return ExpertStack(
        config.num_experts,
        width,
        config.expert_hidden,
        kind=config.expert,
        settings=config.expert_settings,
        hidden_sizes=config.expert_hidden_sizes,
        output_scale=scale,
        key=key,
    )


def _init_moe(
    config: DecoderConfig, router: Router, backend: str | DispatchFn, scale: float, key: Array, parts_key: Array
) -> MoELayer:
    """A mixture of experts: the stack from one key, the parts that most configs do without from the other."""
    shared_key, latent_key, zero_compute_key = jax.random.split(parts_key, 3)
    shared = latent = zero_compute = None
    width, stack_scale = config.width, scale
    if config.shared_hidden:
        shared = _init_network(config, config.shared_hidden, scale, shared_key, config.shared_gate)
    if config.latent_width is not None:
        latent = Latent(config.width, config.latent_width, output_scale=scale, key=latent_key)
        width, stack_scale = config.latent_width, 1.0
    if config.zero_compute:
        zero_compute = ZeroComputeExperts(config.zero_compute, config.width, key=zero_compute_key)
    return MoELayer(
        router,
        _init_experts(config, width, stack_scale, key),
        shared=shared,
        latent=latent,
        zero_compute=zero_compute,
        num_choices=config.num_choices,
        rule=config.rule,
        rule_settings=config.rule_settings,
        backend=backend,
        gates_on_input=config.gates_on_input,
        capacity_factor=config.capacity_factor,
        stats_level=config.stats_level,
        bias_bins=config.bias_bins,
    )
