"""The architecture of an encoder-decoder as data, checked when it is made."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import jax
from flax.core import FrozenDict

from moe_jax.nn.expert_stack import Setting
from moe_jax.nn.experts import get_expert_kind
from moe_jax.nn.moe import StatsLevel
from moe_jax.nn.norms import NORMS
from moe_jax.nn.routers import get_router
from moe_jax.ops.capacity import Capacity, CapacityUnit
from moe_jax.ops.relative_position import check_buckets
from moe_jax.routing import check_rule, get_rule

LayerKind = Literal["dense", "moe"]
Positions = Literal["relative", "sinusoidal"]


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """The architecture; the defaults are a small Switch Transformer.

    Attributes:
      vocab_size: V, of source and target.
      width: D.
      encoder_layers: the kind of each encoder layer, first to last.
      decoder_layers: the kind of each decoder layer.
      encoder_heads: H of the encoder.
      decoder_heads: H of the decoder, in self-attention and cross-attention.
      head_width: Dh; None for D / H.
      encoder_hidden: F of the encoder, of a dense layer as of each expert.
      decoder_hidden: F of the decoder.
      expert: the kind of network of experts and dense layers, a name in `nn.experts.EXPERTS`.
      expert_settings: settings of the kind, such as `{"activation": "relu"}`.
      num_experts: E of every MoE layer.
      num_choices: K.
      router: what gives the logits, a name in `nn.routers.ROUTERS`.
      router_settings: settings of the router, such as `{"jitter": 0.01}`.
      rule: a name in `routing.RULES`; one that sees the future or other sequences may serve the encoder alone.
      rule_settings: settings of the rule.
      backend: a name in `dispatch.BACKENDS`.
      capacity: how much an expert may take, in `capacity_unit`; None drops nothing.
      capacity_unit: "balance", "share" or "tokens"; see `ops.capacity.Capacity`.
      capacity_per_sequence: whether each sequence is served by itself.
      norm: "rms" or "layer", the kind of every norm.
      norm_epsilon: of every norm.
      positions: "relative" for T5's bias on the scores of self-attention, "sinusoidal" for positions added to the
        embeddings.
      relative_buckets: rows of the bias's table.
      relative_distance: the distance from which on all share a bucket.
      attention_bias: whether attention's projections have biases.
      scale_attention: whether scores are divided by the root of the head width.
      scale_embedding: whether embeddings are multiplied by the root of D.
      scale_logits: whether what is read out is divided by the root of D.
      tie_embeddings: whether source, target and read-out share one table; else each has its own.
      pad_id: fills what comes after the end. Sinusoidal positions begin one past it, as fairseq's do.
      start_id: the decoder's first token.
      stop_ids: tokens that end a generated text.
      stats_level: what router statistics are summed over; below "batch" they get an axis of sequences or tokens.
      compute_dtype: dtype of activations and matmuls; parameters, router, norms' sums and read-out stay float32.
    """

    vocab_size: int = 256
    width: int = 128
    encoder_layers: tuple[LayerKind, ...] = ("dense", "moe")
    decoder_layers: tuple[LayerKind, ...] = ("dense", "moe")
    encoder_heads: int = 4
    decoder_heads: int = 4
    head_width: int | None = None
    encoder_hidden: int = 256
    decoder_hidden: int = 256
    expert: str = "mlp"
    expert_settings: Mapping[str, Setting] = FrozenDict(activation="relu")
    num_experts: int = 8
    num_choices: int = 1
    router: str = "linear"
    router_settings: Mapping[str, Setting] = FrozenDict()
    rule: str = "switch_top_1"
    rule_settings: Mapping[str, Setting] = FrozenDict()
    backend: str = "blocked"
    capacity: float | None = 1.25
    capacity_unit: CapacityUnit = "balance"
    capacity_per_sequence: bool = True
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    positions: Positions = "relative"
    relative_buckets: int = 32
    relative_distance: int = 128
    attention_bias: bool = False
    scale_attention: bool = False
    scale_embedding: bool = False
    scale_logits: bool = True
    tie_embeddings: bool = True
    pad_id: int = 0
    start_id: int = 0
    stop_ids: tuple[int, ...] = (1,)
    stats_level: StatsLevel = "batch"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Refuses what cannot work, naming the values that disagree."""
        for name in ("expert_settings", "router_settings", "rule_settings"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))  # hashable, as the structure must be
        for layers in (self.encoder_layers, self.decoder_layers):
            if not layers or set(layers) - {"dense", "moe"}:
                raise ValueError(f"encoder_layers and decoder_layers must be tuples of 'dense' and 'moe', got {layers}")
        self._check_shapes()
        ids = (self.pad_id, self.start_id, *self.stop_ids)
        if outside := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise ValueError(f"token ids {outside} of padding, start or stop are outside vocab_size={self.vocab_size}")
        get_expert_kind(self.expert, **self.expert_settings)  # an unknown one fails here
        init_router = get_router(self.router, **self.router_settings)
        jax.eval_shape(lambda: init_router(self.width, self.num_experts, key=jax.random.key(0)))  # refuses bad values
        self._check_routing()

    def _check_shapes(self) -> None:
        """Refuses heads and positions that do not fit the width, and unknown names of norm and positions."""
        sizes = ("vocab_size", "width", "encoder_heads", "decoder_heads", "encoder_hidden", "decoder_hidden")
        for name in (*sizes, "num_experts", *(() if self.head_width is None else ("head_width",))):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a positive number")
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; known: {', '.join(NORMS)}")
        if self.positions not in get_args(Positions):
            raise ValueError(f"unknown positions {self.positions!r}; known: {', '.join(get_args(Positions))}")
        if self.head_width is None and (self.width % self.encoder_heads or self.width % self.decoder_heads):
            raise ValueError(
                f"width={self.width} must be a multiple of encoder_heads={self.encoder_heads} and "
                f"decoder_heads={self.decoder_heads}, or head_width be given"
            )
        if self.positions == "sinusoidal" and (self.width % 2 or self.width < 4):
            raise ValueError(f"sinusoidal positions need an even width of at least 4, got {self.width}")
        if self.positions == "relative":
            for is_bidirectional in (True, False):
                check_buckets(self.relative_buckets, self.relative_distance, is_bidirectional)

    def _check_routing(self) -> None:
        """Refuses a rule that does not go with K and E, or not with a decoder, and a capacity of nothing."""
        rule = get_rule(self.rule, **self.rule_settings)
        check_rule(rule, self.num_choices, self.num_experts, self.rule)
        if not rule.is_causal and "moe" in self.decoder_layers:
            raise ValueError(
                f"rule={self.rule!r} lets a token's routing depend on later tokens or other sequences, which a decoder "
                "does not have when it generates; use it with dense decoder_layers, or take a causal rule"
            )
        if (limit := self.token_capacity) is not None:
            limit.rows(1, self.num_experts, self.num_choices)  # refuses an amount or unit without meaning

    @property
    def token_capacity(self) -> Capacity | None:
        """The three fields of capacity in one."""
        if self.capacity is None:
            return None
        return Capacity(self.capacity, self.capacity_unit, self.capacity_per_sequence)
