"""A decoder-only language model with any mix of dense and mixture-of-experts layers.

Embedding, blocks (RMSNorm, grouped-query attention with rotary positions, SwiGLU or MoE), norm, linear read-out: the
architecture of Llama (2302.13971) and, with MoE layers, Mixtral (2401.04088). Neighbouring layers of one kind are
stacked in one set of arrays with a leading axis and scanned, so compile time does not grow with depth.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from moe_jax.nn.attention import Attention
from moe_jax.nn.block import Block, RMSNorm
from moe_jax.nn.expert_stack import ExpertStack, Setting
from moe_jax.nn.experts import get_expert_kind
from moe_jax.nn.feed_forward import FeedForward
from moe_jax.nn.latent import Latent
from moe_jax.nn.moe import MoELayer, StatsLevel
from moe_jax.nn.routers import Router, get_router
from moe_jax.nn.soft_moe import SoftMoELayer, SoftRouter, get_soft_router
from moe_jax.nn.zero_compute import ZeroComputeExperts, ZeroComputeKind
from moe_jax.routing import Balancer, Force, check_rule, get_rule, keep_trace
from moe_jax.types import Array, RouterOutput, RouterStats, RoutingPlan, Topology, TraceLevel

LayerKind = Literal["dense", "moe"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture; every field can be set from a config file.

    Attributes:
      vocab_size: V.
      width: D, a multiple of `num_heads`.
      layers: the kind of each layer, first to last.
      num_heads: H.
      num_kv_heads: key/value heads, a divisor of H.
      dense_hidden: hidden width of a dense layer's feed-forward.
      num_experts: E of every MoE layer.
      expert_hidden: F, the hidden width of one expert.
      expert: the kind of network of experts, shared experts and dense layers, a name in `nn.experts.EXPERTS`.
      expert_settings: settings of the kind, such as `{"use_bias": True}`.
      expert_hidden_sizes: hidden width of each of the E experts, at most `expert_hidden`; empty for all alike.
      shared_hidden: hidden width of the shared experts together, which every token passes; 0 for none.
      shared_gate: whether their output is gated.
      latent_width: width in which the routed experts work; None for D.
      zero_compute: kinds of zero-compute experts, which the router scores behind the E others.
      num_choices: K, zero-compute experts included.
      router: what gives the logits, a name in `nn.routers.ROUTERS`.
      router_settings: settings of the router, such as `{"jitter": 0.01}`.
      rule: a name in `routing.RULES`, or "soft" for Soft MoE, which mixes tokens and makes no choices: it has a router
        of its own, and neither `num_choices` nor `backend` has an effect.
      rule_settings: settings of the rule, such as `{"scale": 2.5}`, or of `nn.soft_moe.SoftRouter`.
      allow_noncausal: whether the rule may let a token's routing depend on later tokens or on other sequences: such a
        model cannot generate as it was trained, and its training loss flatters it.
      backend: a name in `dispatch.BACKENDS`.
      context: preceding tokens whose embeddings, one table per distance, are added to a token's own; 0 is the usual
        decoder. Bytes say little alone, and a short context at the input spares attention learning to look back (the
        hash n-gram embeddings of 2412.09871, section 3.2.1, without the hash).
      capacity_factor: rows per expert relative to perfect balance; None drops nothing.
      stats_level: what router statistics are summed over; below "batch" they get an axis of sequences or tokens.
      bias_bins: bins of the statistics' histogram that the balancer "quantile" reads; 1000 is usual, 0 keeps none.
      compute_dtype: dtype of activations and matmuls; parameters, router, norms' sums and read-out stay float32.
    """

    vocab_size: int = 256
    width: int = 128
    layers: tuple[LayerKind, ...] = ("dense", "moe", "moe", "moe")
    num_heads: int = 4
    num_kv_heads: int = 2
    dense_hidden: int = 256
    num_experts: int = 16
    expert_hidden: int = 48
    expert: str = "swiglu"
    expert_settings: Mapping[str, Setting] = FrozenDict()
    expert_hidden_sizes: tuple[int, ...] = ()
    shared_hidden: int = 0
    shared_gate: bool = False
    latent_width: int | None = None
    zero_compute: tuple[ZeroComputeKind, ...] = ()
    num_choices: int = 2
    router: str = "linear"
    router_settings: Mapping[str, Setting] = FrozenDict()
    rule: str = "softmax_top_k_renormalized"
    rule_settings: Mapping[str, Setting] = FrozenDict()
    allow_noncausal: bool = False
    backend: str = "blocked"
    context: int = 0
    capacity_factor: float | None = None
    stats_level: StatsLevel = "batch"
    bias_bins: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Refuses shapes that cannot work, naming the two numbers that disagree."""
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(f"width={self.width} must be num_heads={self.num_heads} times an even head width")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        for name in ("expert_settings", "router_settings", "rule_settings"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))  # hashable, as the structure must be
        get_expert_kind(self.expert, **self.expert_settings)  # an unknown one fails here
        if self.shared_gate and not self.shared_hidden:
            raise ValueError("shared_gate=True has nothing to gate: give shared_hidden, the shared experts' width")
        init_router = _router_maker(self)
        jax.eval_shape(lambda: init_router(self.width, self.total_experts, key=jax.random.key(0)))  # refuses bad values
        if not (self._rule_is_causal() or self.allow_noncausal):
            raise ValueError(
                f"rule={self.rule!r} lets a token's routing depend on later tokens or other sequences, which a "
                "language model does not have when it generates; say allow_noncausal=True if you want that"
            )
        if not self.layers or set(self.layers) - {"dense", "moe"}:
            raise ValueError(f"layers={self.layers} must be a non-empty tuple of 'dense' and 'moe'")

    def _rule_is_causal(self) -> bool:
        """Whether the rule is causal, once what it cannot do is refused."""
        if not self.is_soft:
            rule = get_rule(self.rule, **self.rule_settings)
            check_rule(rule, self.num_choices, self.total_experts, self.rule, bias_bins=self.bias_bins)
            return rule.is_causal
        if self.router != "linear" or self.capacity_factor is not None or self.bias_bins:
            raise ValueError(
                f"rule='soft' has its own router, fixed slots and no bias: leave router={self.router!r}, "
                f"capacity_factor={self.capacity_factor} and bias_bins={self.bias_bins} at their defaults"
            )
        if self.shared_hidden or self.latent_width is not None or self.zero_compute:
            raise ValueError(
                "rule='soft' goes without shared, latent and zero-compute experts: leave "
                f"shared_hidden={self.shared_hidden}, latent_width={self.latent_width} and "
                f"zero_compute={self.zero_compute} at their defaults"
            )
        return False

    @property
    def is_soft(self) -> bool:
        """Whether the MoE layers are Soft MoE."""
        return self.rule == "soft"

    @property
    def total_experts(self) -> int:
        """The experts that the router scores: E and the zero-compute ones."""
        return self.num_experts + len(self.zero_compute)

    @property
    def num_moe_layers(self) -> int:
        """L of routing: how many layers route."""
        return self.layers.count("moe")


def _router_maker(config: DecoderConfig) -> Callable[..., Any]:
    """Makes the router of an MoE layer from width, number of experts and key."""
    if config.is_soft:
        return get_soft_router(**config.rule_settings)
    return get_router(config.router, **config.router_settings)


def _init_block(config: DecoderConfig, kind: LayerKind, key: Array) -> Block:
    """One block; output projections are scaled by 1/sqrt(2 * depth), so that the residual stream starts small."""
    attention_key, feed_forward_key, router_key = jax.random.split(key, 3)
    scale = (2 * len(config.layers)) ** -0.5
    attention = Attention(config.width, config.num_heads, config.num_kv_heads, output_scale=scale, key=attention_key)
    if kind == "dense":
        return Block(attention, _init_network(config, config.dense_hidden, scale, feed_forward_key), config.width)
    router = _router_maker(config)(config.width, config.total_experts, key=router_key)
    if isinstance(router, SoftRouter):
        experts = _init_experts(config, config.width, scale, feed_forward_key)
        return Block(attention, SoftMoELayer(router, experts, stats_level=config.stats_level), config.width)
    moe = _init_moe(config, router, scale, feed_forward_key, jax.random.fold_in(key, 3))
    return Block(attention, moe, config.width)


def _init_network(config: DecoderConfig, hidden: int, scale: float, key: Array, is_gated: bool = False) -> FeedForward:
    """A network that every token passes."""
    return FeedForward(
        config.width,
        hidden,
        kind=config.expert,
        settings=config.expert_settings,
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


def _init_moe(config: DecoderConfig, router: Router, scale: float, key: Array, parts_key: Array) -> MoELayer:
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
        backend=config.backend,
        capacity_factor=config.capacity_factor,
        stats_level=config.stats_level,
        bias_bins=config.bias_bins,
    )


class Decoder(nnx.Module):
    """The language model. Called on tokens it gives logits and what every router did."""

    def __init__(self, config: DecoderConfig, *, key: Array):
        """Initialises all parameters in float32.

        Args:
          config: the architecture.
          key: consumed; `jax.vmap` over keys makes a population.
        """
        self.config = config
        embed_key, read_key, *layer_keys = jax.random.split(key, 2 + len(config.layers))
        self.embedding = nnx.Param(jax.random.normal(embed_key, (1 + config.context, config.vocab_size, config.width)))
        self.stacks = nnx.List(
            jax.vmap(lambda layer_key, kind=kind: _init_block(config, kind, layer_key))(
                jnp.stack([layer_keys[i] for i, _ in group])
            )
            for kind, group in _runs(config.layers)
        )
        self.norm = RMSNorm(config.width)
        self.read_out = nnx.Param(jax.random.normal(read_key, (config.width, config.vocab_size)) * config.width**-0.5)

    def __call__(
        self,
        tokens: Array,
        token_mask: Array | None = None,
        topology: Topology | None = None,
        token_groups: Array | None = None,
        trace: TraceLevel = "stats",
        *,
        key: Array | None = None,
        forced: RoutingPlan | None = None,
        force: Force = "exact",
    ) -> tuple[Array, RouterOutput]:
        """Next-token logits.

        Args:
          tokens: `[B, S]` int token ids.
          token_mask: `[B, S]` bool, false for padding: not attended to, not routed, not counted.
          topology: `keep [L, G, E]`, `num_choices [L, G]` over the MoE layers, or None.
          token_groups: `[B]` or `[B, S]` int32 group of each sequence or token; needed when G > 1.
          trace: how much of the routing to return.
          key: consumed by routers that draw in training; None means evaluation.
          forced: a plan `[L, T, K]` that routes instead of the rules, such as one recorded at trace level "topk".
          force: "exact" takes the plan's experts and gates, "ids" its experts, with gates from this model's logits.

        Returns:
          `[B, S, V]` float32 logits, and the router output with a leading `[L]` over the MoE layers.
        """
        x, routed = self.run_layers(
            self.embed(tokens, token_mask),
            0,
            len(self.config.layers),
            token_mask,
            topology,
            token_groups,
            trace,
            token_ids=tokens,
            key=key,
            forced=forced,
            force=force,
        )
        return self.logits(x), routed

    def embed(self, tokens: Array, token_mask: Array | None = None) -> Array:
        """`[B, S]` ids to `[B, S, D]` in the compute dtype; masked tokens and a sequence's start add no context."""
        tables = self.embedding[...].astype(self.config.compute_dtype)
        is_token = jnp.ones(tokens.shape, bool) if token_mask is None else token_mask
        x = tables[0][tokens]
        for distance in range(1, len(tables)):
            shift = ((0, 0), (distance, 0))
            earlier = tables[distance][jnp.pad(tokens, shift)[:, :-distance]]
            x += earlier * jnp.pad(is_token, shift)[:, :-distance, None]
        return x

    def layer(self, index: int) -> Block:
        """The block of layer `index`, cut out of its stack."""
        for stack, (_, group) in zip(self.stacks, _runs(self.config.layers), strict=True):
            if index <= group[-1][0]:
                position = index - group[0][0]
                return jax.tree.map(lambda leaf, position=position: leaf[position], stack)
        raise IndexError(f"layer {index} of {len(self.config.layers)}")

    def logits(self, x: Array) -> Array:
        """`[B, S, D]` after the last layer to `[B, S, V]` float32."""
        return self.norm(x).astype(jnp.float32) @ self.read_out[...]

    def run_layers(
        self,
        x: Array,
        start: int,
        stop: int,
        token_mask: Array | None = None,
        topology: Topology | None = None,
        token_groups: Array | None = None,
        trace: TraceLevel = "stats",
        *,
        token_ids: Array | None = None,
        key: Array | None = None,
        forced: RoutingPlan | None = None,
        force: Force = "exact",
    ) -> tuple[Array, RouterOutput]:
        """Layers `start` to `stop` alone, so that what several candidates share is computed once.

        Args:
          x: `[B, S, D]` entering layer `start`.
          start: first layer, static, counted over dense and MoE layers.
          stop: one past the last.
          token_mask: as in `__call__`.
          topology: over all L MoE layers of the model, as in `__call__`.
          token_groups: as in `__call__`.
          trace: as in `__call__`.
          token_ids: `[B, S]` int, what `x` began as; needed by rules that route by vocabulary id.
          key: as in `__call__`.
          forced: as in `__call__`, over all L MoE layers of the model.
          force: as in `__call__`.

        Returns:
          `[B, S, D]` and the router output of the MoE layers passed, with a leading axis; fields are None if none was.
        """
        if token_groups is not None and token_groups.ndim == 1:
            token_groups = jnp.broadcast_to(token_groups[:, None], x.shape[:2])
        outputs = []
        for stack, (kind, group) in zip(self.stacks, _runs(self.config.layers), strict=True):
            first = group[0][0]
            low, high = max(start - first, 0), min(stop - first, len(group))
            if low >= high:
                continue
            part = jax.tree.map(lambda leaf, low=low, high=high: leaf[low:high], stack)
            routed_before = self.config.layers[: first + low].count("moe")
            routing = None  # this part's share of what is given per MoE layer
            if kind == "moe":
                routing = jax.tree.map(
                    lambda leaf, a=routed_before, b=routed_before + high - low: leaf[a:b], (topology, forced)
                )
            keys = None
            if key is not None:
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(first + low, first + high))

            def body(
                x: Array, layer: tuple[Block, tuple[Topology | None, RoutingPlan | None] | None, Array | None]
            ) -> tuple[Array, RouterOutput | None]:
                block, routing, layer_key = layer
                topology, forced = routing or (None, None)
                x, routed = block(
                    x,
                    token_mask,
                    topology,
                    token_groups,
                    token_ids=token_ids,
                    key=layer_key,
                    forced=forced,
                    force=force,
                )
                return x, None if routed is None else keep_trace(routed, trace)

            x, routed = jax.lax.scan(body, x, (part, routing, keys))
            if routed is not None:
                outputs.append(routed)
        if not outputs:
            return x, RouterOutput(None, None, None)
        return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)

    def update_balance(self, stats: RouterStats, balancer: Balancer) -> None:
        """Moves the routers' balance state after an optimizer step, in place.

        Args:
          stats: sums over the whole optimizer step, with a leading `[L]`.
          balancer: moves the selection biases; see `routing.BALANCERS`.
        """
        total = jax.tree.map(lambda leaf: leaf.sum(0), stats)
        for layers, part in self._routed_stacks(stats):
            moved = jax.vmap(lambda layer, sums: layer.next_balance(sums, total, balancer))(layers, part)
            for name, value in moved.items():
                getattr(layers, name)[...] = value

    def router_penalty(self, stats: RouterStats) -> Array:
        """`[L]` losses that the rules themselves ask for, from stats `[L, ...]`; 0 for most rules."""
        penalties = [
            jax.vmap(lambda layer, sums: layer.penalty(sums))(layers, part)
            for layers, part in self._routed_stacks(stats)
        ]
        return jnp.concatenate(penalties) if penalties else jnp.zeros(self.config.num_moe_layers)

    def _routed_stacks(self, stats: RouterStats) -> Iterator[tuple[MoELayer, RouterStats]]:
        """Each stack of layers that follow a rule, with their part of the stats."""
        start = 0
        for stack, (_, group) in zip(self.stacks, _runs(self.config.layers), strict=True):
            if isinstance(stack.feed_forward, MoELayer):
                stop = start + len(group)
                yield stack.feed_forward, jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], stats)
                start = stop


def _runs(layers: tuple[LayerKind, ...]) -> list[tuple[LayerKind, list[tuple[int, LayerKind]]]]:
    """Neighbouring layers of one kind, with their positions."""
    return [(kind, list(group)) for kind, group in itertools.groupby(enumerate(layers), key=lambda item: item[1])]
