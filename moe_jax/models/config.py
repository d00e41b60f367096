"""The architecture of a decoder, as data: every field can be set from a config file, and is checked when it is."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from moe_jax.nn.attention import Attention, Rotation
from moe_jax.nn.expert_stack import Setting
from moe_jax.nn.experts import EXPERTS, get_expert_kind
from moe_jax.nn.latent_attention import LatentAttention
from moe_jax.nn.moe import StatsLevel
from moe_jax.nn.norms import NORMS
from moe_jax.nn.routers import ROUTERS, get_router
from moe_jax.nn.soft_moe import get_soft_router
from moe_jax.nn.zero_compute import ZeroComputeKind
from moe_jax.ops.rotary import ROTARIES
from moe_jax.routing import check_rule, get_rule, rule_settings
from moe_jax.routing.rule import check_settings, settings_of
from moe_jax.types import Array

LayerKind = Literal["dense", "moe"]
AttentionKind = Literal["grouped_query", "latent"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture; every field can be set from a config file.

    Attributes:
      vocab_size: V.
      width: D, a multiple of `num_heads` unless `head_width` is given.
      layers: the kind of each layer, first to last.
      num_heads: H.
      num_kv_heads: key/value heads, a divisor of H.
      head_width: Dh, even; None for D / H.
      attention: "grouped_query", or "latent" for DeepSeek's, which has its widths in the settings.
      attention_settings: settings of `nn.attention.Attention` or `nn.latent_attention.LatentAttention`, such as
        `{"qk_norm": "head"}`.
      rotary: a name in `ops.rotary.ROTARIES`.
      rotary_settings: its settings, such as `{"base": 1e6}`, and `share`, the part of a head that turns.
      windows: for each layer, how many of the last tokens attention sees, 0 for all; empty for all in every layer.
      chunks: for each layer, the length of the runs of tokens that attention stays within, 0 for none; empty for none.
      turns: for each layer, whether it has rotary positions; empty for all layers.
      norm: "rms" or "layer", the kind of every norm.
      norm_epsilon: of every norm.
      dense_hidden: hidden width of a dense layer's feed-forward.
      num_experts: E of every MoE layer.
      expert_hidden: F, the hidden width of one expert.
      expert: the kind of network of experts, a name in `nn.experts.EXPERTS`.
      expert_settings: settings of the kind, such as `{"use_bias": True}`.
      dense_expert: the kind of network of shared experts and dense layers; empty for that of the experts.
      dense_settings: settings of that kind; empty for those of the experts if they are of the same kind.
      expert_hidden_sizes: hidden width of each of the E experts, at most `expert_hidden`; empty for all alike.
      shared_hidden: hidden width of the shared experts together, which every token passes; 0 for none.
      shared_gate: whether their output is gated.
      latent_width: width in which the routed experts work; None for D.
      gates_on_input: whether gates weigh what enters an expert and not what leaves it (Llama 4).
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
      tie_embeddings: whether the read-out is the embedding.
      read_out_bias: whether the logits have a trained bias.
      embedding_scale: factor on embedded tokens.
      residual_scale: factor on what a layer's two halves add to the residual stream (Granite).
      logit_scale: factor on the logits.
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
    head_width: int | None = None
    attention: AttentionKind = "grouped_query"
    attention_settings: Mapping[str, Setting] = FrozenDict()
    rotary: str = "plain"
    rotary_settings: Mapping[str, Setting] = FrozenDict()
    windows: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    turns: tuple[bool, ...] = ()
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    dense_hidden: int = 256
    num_experts: int = 16
    expert_hidden: int = 48
    expert: str = "swiglu"
    expert_settings: Mapping[str, Setting] = FrozenDict()
    dense_expert: str = ""
    dense_settings: Mapping[str, Setting] = FrozenDict()
    expert_hidden_sizes: tuple[int, ...] = ()
    shared_hidden: int = 0
    shared_gate: bool = False
    latent_width: int | None = None
    gates_on_input: bool = False
    zero_compute: tuple[ZeroComputeKind, ...] = ()
    num_choices: int = 2
    router: str = "linear"
    router_settings: Mapping[str, Setting] = FrozenDict()
    rule: str = "softmax_top_k_renormalized"
    rule_settings: Mapping[str, Setting] = FrozenDict()
    allow_noncausal: bool = False
    backend: str = "blocked"
    tie_embeddings: bool = False
    read_out_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    context: int = 0
    capacity_factor: float | None = None
    stats_level: StatsLevel = "batch"
    bias_bins: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Refuses shapes that cannot work, naming the two numbers that disagree."""
        for field in dataclasses.fields(self):
            if field.name.endswith("_settings"):  # hashable, as the structure must be
                object.__setattr__(self, field.name, FrozenDict(getattr(self, field.name)))
        if not self.layers or set(self.layers) - {"dense", "moe"}:
            raise ValueError(f"layers={self.layers} must be a non-empty tuple of 'dense' and 'moe'")
        self._check_attention()
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; known: {', '.join(NORMS)}")
        get_expert_kind(self.expert, **self.expert_settings)  # an unknown one fails here
        get_expert_kind(self.dense_network[0], **self.dense_network[1])
        if self.shared_gate and not self.shared_hidden:
            raise ValueError("shared_gate=True has nothing to gate: give shared_hidden, the shared experts' width")
        init_router = make_router(self)
        jax.eval_shape(lambda: init_router(self.width, self.total_experts, key=jax.random.key(0)))  # refuses bad values
        if not (self._rule_is_causal() or self.allow_noncausal):
            raise ValueError(
                f"rule={self.rule!r} lets a token's routing depend on later tokens or other sequences, which a "
                "language model does not have when it generates; say allow_noncausal=True if you want that"
            )

    def _check_attention(self) -> None:
        """Refuses unknown settings, and per-layer facts that are not one for each layer."""
        if self.attention == "grouped_query":
            self._check_heads()
        if self.rotary not in ROTARIES:
            raise ValueError(f"unknown rotary {self.rotary!r}; known: {', '.join(ROTARIES)}")
        known = settings_of(ROTARIES[self.rotary]).keys() | {"share"}
        check_settings(self.rotary_settings, known, f"rotary {self.rotary!r}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"unknown attention {self.attention!r}; known: {', '.join(ATTENTIONS)}")
        given_here = {"head_width", "rotation", "pattern", "output_scale", "key"}
        known = settings_of(ATTENTIONS[self.attention].__init__).keys() - given_here
        check_settings(self.attention_settings, known, f"attention {self.attention!r}")
        for name in ("windows", "chunks", "turns"):
            facts = getattr(self, name)
            if facts and (len(facts) != len(self.layers) or min(facts) < 0 or self.attention == "latent"):
                raise ValueError(
                    f"{name}={facts} must be one non-negative value for each of {len(self.layers)} layers, or empty, "
                    "as it must be with latent attention"
                )
        jax.eval_shape(lambda: make_attention(self, None, 1.0, jax.random.key(0)))  # refuses bad values

    def _check_heads(self) -> None:
        """Refuses heads that do not fit."""
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be num_heads={self.num_heads} times an even head width")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if (self.head_width or self.width // self.num_heads) % 2:
            raise ValueError(
                f"width={self.width} must be num_heads={self.num_heads} times an even head width, or head_width="
                f"{self.head_width} an even number"
            )

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
        if self.shared_hidden or self.latent_width is not None or self.zero_compute or self.gates_on_input:
            raise ValueError(
                "rule='soft' goes without shared, latent and zero-compute experts, and has no gates: leave "
                f"shared_hidden={self.shared_hidden}, latent_width={self.latent_width}, "
                f"zero_compute={self.zero_compute} and gates_on_input={self.gates_on_input} at their defaults"
            )
        return False

    @property
    def dense_network(self) -> tuple[str, Mapping[str, Setting]]:
        """Kind and settings of the network of shared experts and dense layers."""
        if self.dense_expert in ("", self.expert):
            return self.expert, self.dense_settings or self.expert_settings
        return self.dense_expert, self.dense_settings

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

    @property
    def patterns(self) -> np.ndarray | None:
        """`[layers, 3]` int32 window, chunk and whether positions turn, of each layer; None where none is special."""
        if not (self.windows or self.chunks or self.turns):
            return None
        depth = len(self.layers)
        columns = (self.windows or (0,) * depth, self.chunks or (0,) * depth, self.turns or (1,) * depth)
        return np.array(columns, np.int32).T

    @property
    def runs(self) -> list[tuple[LayerKind, range]]:
        """Neighbouring layers of one kind: the kind, and their positions."""
        runs, start = [], 0
        for kind, group in itertools.groupby(self.layers):
            stop = start + len(list(group))
            runs.append((kind, range(start, stop)))
            start = stop
        return runs


def spelled_out(config: DecoderConfig) -> dict[str, dict[str, Any]]:
    """The settings of a config by field, with the defaults of those that it does not mention."""
    defaults = {
        "attention_settings": settings_of(ATTENTIONS[config.attention].__init__),
        "rotary_settings": settings_of(ROTARIES[config.rotary]) | {"share": 1.0},
        "expert_settings": settings_of(EXPERTS[config.expert]),
        "router_settings": settings_of(ROUTERS[config.router].__init__),
        "rule_settings": {} if config.is_soft else rule_settings(get_rule(config.rule)),
    }
    return {name: known | dict(getattr(config, name)) for name, known in defaults.items()}


def make_router(config: DecoderConfig) -> Callable[..., Any]:
    """What makes the router of an MoE layer from width, number of experts and key."""
    if config.is_soft:
        return get_soft_router(**config.rule_settings)
    return get_router(config.router, **config.router_settings)


def make_attention(
    config: DecoderConfig, pattern: Array | None, output_scale: float, key: Array
) -> Attention | LatentAttention:
    """A layer's attention; `pattern [3]` is its row of `DecoderConfig.patterns`."""
    rotation = Rotation(config.rotary, tuple(sorted(config.rotary_settings.items())))
    settings: dict[str, Any] = dict(config.attention_settings)
    if config.attention == "latent":
        return LatentAttention(
            config.width, config.num_heads, rotation=rotation, output_scale=output_scale, key=key, **settings
        )
    return Attention(
        config.width,
        config.num_heads,
        config.num_kv_heads,
        head_width=config.head_width,
        rotation=rotation,
        pattern=pattern,
        output_scale=output_scale,
        key=key,
        **settings,
    )


ATTENTIONS: dict[str, type[nnx.Module]] = {"grouped_query": Attention, "latent": LatentAttention}
