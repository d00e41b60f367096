"""What a decoder costs: exact parameters, FLOPs and parameter bytes of each layer, derived from parameter shapes.

Nothing is allocated: `jax.eval_shape` of the initialisation gives the shapes, so a change to a module is counted here
without a second formula. The conventions are the field's:

* Only matmuls count, two FLOPs per multiply-add. A row passes each matrix `[a, b]` once, 2ab FLOPs. Norms, softmax,
  rotary positions, activations, the top-k, biases, gates and the embedding's look-ups and sums count nothing.
* Attention's scores and weighted values cost 4 D a key, and a token attends to (S + 1) / 2 keys on average.
  `causal_half=False` counts the full square instead, S keys: what PaLM (2204.02311, appendix B) counts, what an
  unfused program executes, and what one decoded token costs after S - 1 others.
* The backward pass does two matmuls of equal size for every one of the forward pass, so training is three times the
  forward FLOPs; recomputation and the optimizer are left out.
* A token pays for the experts it uses, not for padding rows, dropped rows or the E / K times more of a dense backend:
  utilisation (MFU) measured on these FLOPs credits useful work only. Routers are their own entry, to leave in or out.
* Shared experts, the projections of latent experts and zero-compute experts belong to what every token passes.
  Experts made smaller by masking (`expert_hidden_sizes`) count in full, since their matrices are stored and run whole.

Active parameters are those that one token's forward pass involves, embedding tables and read-out counted whole, as
in the published "13B active" of Mixtral (2401.04088).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.config import DecoderConfig, LayerKind
from moe_jax.models.decoder import Decoder
from moe_jax.trees import count_parameters
from moe_jax.types import Array


class Part(NamedTuple):
    """One part of a model: how many `parameters` it has, and the `flops` of its matmuls for one row, forward."""

    parameters: int
    flops: int


class BytesRead(NamedTuple):
    """Parameter bytes read for a batch of tokens: `expected` under uniform routing, and `most` under any routing."""

    expected: float
    most: float


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The cost of one layer; FLOPs are forward and per token. All integers, unless `choices` is not.

    Attributes:
      kind: "dense" or "moe".
      attention: the projections to queries, keys and values, and back.
      mixing_flops: attention's scores and weighted values, averaged over the tokens of a sequence.
      norms: parameters only.
      router: what gives the logits, with Soft MoE's two mixtures; nothing in a dense layer.
      feed_forward: what every token passes whatever its experts: the network of a dense layer, shared experts.
      expert: one of the experts; nothing in a dense layer.
      num_experts: E; 0 in a dense layer.
      choices: experts that a token uses, K or a mean; 0 in a dense layer.
      cached_numbers: what decoding must keep of one token, its keys and values.
    """

    kind: LayerKind
    attention: Part
    mixing_flops: int
    norms: Part
    router: Part
    feed_forward: Part
    expert: Part
    num_experts: int
    choices: float
    cached_numbers: int

    @property
    def shared_parameters(self) -> int:
        """Parameters that every token uses."""
        return sum(part.parameters for part in (self.attention, self.norms, self.router, self.feed_forward))

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.shared_parameters + self.num_experts * self.expert.parameters

    @property
    def active_parameters(self) -> float:
        """Parameters that a token uses."""
        return self.shared_parameters + self.choices * self.expert.parameters

    @property
    def flops_by_part(self) -> dict[str, float]:
        """Forward FLOPs per token of each part that has a matmul."""
        return {
            "attention": self.attention.flops,
            "mixing": self.mixing_flops,
            "router": self.router.flops,
            "feed_forward": self.feed_forward.flops,
            "experts": self.choices * self.expert.flops,
        }

    @property
    def flops(self) -> float:
        """Forward FLOPs per token."""
        return sum(self.flops_by_part.values())

    def bytes_read(self, num_tokens: int, dtype: str) -> BytesRead:
        """Parameter bytes that the layer must read once for a batch of tokens, when no token is dropped.

        A token that picks k different experts evenly misses a given one with probability 1 - k / E, so T independent
        tokens touch E (1 - (1 - k / E)^T) experts on average, and never more than min(E, T k); k may itself be the mean
        of a random number. Activations are not counted.

        Args:
          num_tokens: T.
          dtype: of the stored parameters, for example "bfloat16".
        """
        missed = (1 - self.choices / max(self.num_experts, 1)) ** num_tokens
        size = jnp.dtype(dtype).itemsize
        return BytesRead(
            size * (self.shared_parameters + self.num_experts * (1 - missed) * self.expert.parameters),
            size * (self.shared_parameters + min(self.num_experts, num_tokens * self.choices) * self.expert.parameters),
        )

    def cache_bytes(self, dtype: str) -> int:
        """Bytes of one token's keys and values in a cache of `dtype`."""
        return self.cached_numbers * jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """The cost of a decoder: its layers, and what lies before and behind them.

    Attributes:
      layers: first to last.
      embedding: all tables; look-ups are free.
      norm: the last one.
      read_out: to the logits.
    """

    layers: tuple[LayerCost, ...]
    embedding: Part
    norm: Part
    read_out: Part

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self._outer_parameters + sum(layer.parameters for layer in self.layers)

    @property
    def active_parameters(self) -> float:
        """Parameters that a token uses; the whole embedding is counted."""
        return self._outer_parameters + sum(layer.active_parameters for layer in self.layers)

    @property
    def flops_by_part(self) -> dict[str, float]:
        """Forward FLOPs per token, each part summed over the layers, and the read-out."""
        by_layer = [layer.flops_by_part for layer in self.layers]
        summed = {part: sum(flops[part] for flops in by_layer) for part in by_layer[0]}
        return summed | {"read_out": self.read_out.flops}

    @property
    def flops(self) -> float:
        """Forward FLOPs per token."""
        return sum(self.flops_by_part.values())

    @property
    def training_flops(self) -> float:
        """Forward and backward FLOPs per token."""
        return 3 * self.flops

    @property
    def _outer_parameters(self) -> int:
        return self.embedding.parameters + self.norm.parameters + self.read_out.parameters


def model_cost(
    config: DecoderConfig,
    sequence_length: int,
    mean_choices: Sequence[float] | None = None,
    *,
    causal_half: bool = True,
) -> ModelCost:
    """Counts what a decoder costs.

    Args:
      config: the architecture.
      sequence_length: S, on which the attention's cost depends.
      mean_choices: experts that a token uses on average, for each MoE layer: those that do a matmul and were not
        dropped. None for K in every layer; with Z zero-compute experts, the share E / (E + Z) of it. For Soft MoE, an
        expert's slots over the tokens of a sequence, times E.
      causal_half: whether a token's attention costs what the tokens up to itself cost, or the full square.

    Raises:
      ValueError: a sequence without tokens, or `mean_choices` that are not one number in [0, E] for each MoE layer or,
        with Soft MoE, not given.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1")
    if mean_choices is None:
        if config.is_soft:
            raise ValueError(
                "Soft MoE (rule='soft') does the same expert work for a sequence of any length: give mean_choices, for "
                "each MoE layer num_experts * slots_per_expert / tokens of a sequence"
            )
        computed: float = config.num_choices
        if config.zero_compute:
            computed *= config.num_experts / config.total_experts
        mean_choices = [computed] * config.num_moe_layers
    if len(mean_choices) != config.num_moe_layers or not all(0 <= k <= config.num_experts for k in mean_choices):
        raise ValueError(
            f"mean_choices={mean_choices} must be one number in [0, num_experts={config.num_experts}] for each of "
            f"{config.num_moe_layers} MoE layers"
        )
    model, layers = jax.eval_shape(lambda: _parameters(config))
    twice_mean_keys = sequence_length + 1 if causal_half else 2 * sequence_length
    choices = iter(mean_choices)
    return ModelCost(
        tuple(
            _layer_cost(kind, params, next(choices) if kind == "moe" else 0, twice_mean_keys, config.is_soft)
            for kind, params in zip(config.layers, layers, strict=True)
        ),
        Part(count_parameters(model["embedding"]), 0),
        part_cost(model["norm"]),
        _read_out_cost(config, model),
    )


def part_cost(params: Any) -> Part:
    """Counts a part from its parameters' shapes: two FLOPs for each number of a matrix, none for a vector.

    Right for whatever sends a row once through each of its matrices: linear maps, networks of any depth, gated or not.

    Args:
      params: nested dicts of arrays or shapes. What lies under a key "experts" has an axis `[E]` before its own, as
        `nn.experts` stacks it, so that a bias `[E, F]` is no matrix; the result is that of all E together.
    """
    flops = 0
    for path, leaf in jax.tree.leaves_with_path(params):
        is_stacked = jax.tree_util.DictKey("experts") in path
        if len(leaf.shape) - is_stacked >= 2:
            flops += 2 * math.prod(leaf.shape)
    return Part(count_parameters(params), flops)


def active_expert_flops(config: DecoderConfig, mean_choices: Array) -> Array:
    """Forward FLOPs that a token spends in experts, `[..., L]` mean choices to `[...]` float32; works under `jit`."""
    expert_flops = max(layer.expert.flops for layer in model_cost(config, 1).layers)  # one kind of expert in a model
    return float(expert_flops) * jnp.sum(mean_choices, axis=-1)


def _parameters(config: DecoderConfig) -> tuple[Any, list[Any]]:
    """Nested dicts of the parameters: of the model, and of each layer on its own."""
    model = Decoder(config, key=jax.random.key(0))
    layers = [model.layer(index) for index in range(len(config.layers))]
    return _dict_of(model), [_dict_of(layer) for layer in layers]


def _dict_of(module: nnx.Module) -> Any:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _read_out_cost(config: DecoderConfig, params: dict[str, Any]) -> Part:
    """The read-out; tied to the embedding, it has the FLOPs and no parameters but its bias."""
    matrix = Part(0, 2 * config.width * config.vocab_size) if config.tie_embeddings else part_cost(params["read_out"])
    return matrix._replace(parameters=matrix.parameters + count_parameters(params.get("read_out_bias", {})))


def _layer_cost(
    kind: LayerKind, params: dict[str, Any], choices: float, twice_mean_keys: int, is_soft: bool
) -> LayerCost:
    """Sorts a layer's parameters into parts; what is neither attention, router nor experts is passed by every token."""
    norms = dict(params)
    attention, feed_forward = dict(norms.pop("attention")), dict(norms.pop("feed_forward"))
    router = part_cost(feed_forward.pop("router", {}))
    if is_soft:  # mixing a token into all slots, and all slots into the token, costs what its logits cost
        router = Part(router.parameters, 3 * router.flops)
    experts = feed_forward.pop("experts") if kind == "moe" else {}
    num_experts = jax.tree.leaves(experts)[0].shape[0] if experts else 0
    stack = part_cost({"experts": experts})
    num_heads, value_width, _ = attention["out"].shape
    relative_bias = count_parameters(attention.pop("relative_bias", {}))
    matrices = part_cost(attention)
    if "qkv" in attention:
        key_width, cached_numbers = value_width, (attention["qkv"].shape[1] - num_heads) * value_width
    else:  # latent attention, which keeps the latent and the shared turned key
        key_width, cached_numbers = attention["query"].shape[-1], attention["down"].shape[-1]
    return LayerCost(
        kind=kind,
        attention=matrices._replace(parameters=matrices.parameters + relative_bias),
        mixing_flops=num_heads * (key_width + value_width) * twice_mean_keys,
        norms=part_cost(norms),
        router=router,
        feed_forward=part_cost(feed_forward),
        expert=Part(*(total // max(num_experts, 1) for total in stack)),
        num_experts=num_experts,
        choices=choices,
        cached_numbers=cached_numbers,
    )
