"""What a model is, in the figures that people ask for first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flax import nnx

from moe_jax.models.config import DecoderConfig
from moe_jax.models.cost import model_cost
from moe_jax.models.encoder_decoder_config import EncoderDecoderConfig
from moe_jax.models.structure import ModelConfig, array_shapes
from moe_jax.trees import count_parameters

PRECISIONS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}  # bytes of a weight
_LENGTH = 4096  # tokens for which FLOPs are counted


class Size(NamedTuple):
    """How many parameters a model has, and how many of them a token uses."""

    parameters: int
    active: int


def model_size(config: ModelConfig) -> Size:
    """Counts parameters from their shapes; an encoder-decoder's active ones are those of both its sides."""
    if isinstance(config, DecoderConfig):
        cost = model_cost(config, 1)
        return Size(cost.parameters, round(cost.active_parameters))
    shapes = {path: leaf for path, leaf in array_shapes(config).items() if isinstance(leaf, nnx.Param)}
    total = count_parameters(shapes)
    of_experts = count_parameters([leaf for path, leaf in shapes.items() if _is_routed(path, config)])
    return Size(total, total - of_experts + of_experts * config.num_choices // config.num_experts)


def describe_model(config: ModelConfig) -> dict[str, str]:
    """Names and values, in the order in which to show them.

    Args:
      config: the architecture.

    Returns:
      Sizes, parameters in all and active, the router, memory of the weights at each precision (all parameters alike,
      without scales or activations), and of a decoder's cache for one token.
    """
    size = model_size(config)
    facts = _describe_decoder(config) if isinstance(config, DecoderConfig) else _describe_encoder_decoder(config)
    facts["parameters"] = f"{size.parameters:,}"
    if size.active != size.parameters:
        settings = ", ".join(f"{key}={value}" for key, value in config.rule_settings.items())
        facts["active parameters"] = f"{size.active:,} a token"
        facts["router"] = f"{config.router}, {config.rule}" + (f" ({settings})" if settings else "")
    for name, of_one in PRECISIONS.items():
        facts[f"weights in {name}"] = memory(size.parameters * of_one)
    if isinstance(config, DecoderConfig):
        cost = model_cost(config, _LENGTH)
        cache = sum(layer.cache_bytes("bfloat16") for layer in cost.layers)
        facts["cache in bfloat16"] = f"{memory(cache)} a token"
        facts["forward FLOPs"] = f"{cost.flops:.3g} a token, in texts of {_LENGTH:,}"
    return facts


def _describe_decoder(config: DecoderConfig) -> dict[str, str]:
    heads = f"{config.num_heads} heads of {config.head_width or config.width // config.num_heads}"
    if config.attention == "latent":
        heads = f"{config.num_heads} heads over a latent of {config.attention_settings['latent_width']}"
    elif config.num_kv_heads != config.num_heads:
        heads += f", {config.num_kv_heads} for keys and values"
    facts = {
        "layers": _kinds(config.layers),
        "width": f"{config.width:,}",
        "attention": heads + _attention_extras(config),
        "vocabulary": f"{config.vocab_size:,}",
    }
    if config.num_moe_layers:
        shared = f", and {config.shared_hidden:,} shared" if config.shared_hidden else ""
        facts["experts"] = (
            f"{config.num_choices} of {config.num_experts} in a layer, hidden width {config.expert_hidden:,}{shared}"
        )
    return facts


def _describe_encoder_decoder(config: EncoderDecoderConfig) -> dict[str, str]:
    return {
        "encoder layers": _kinds(config.encoder_layers),
        "decoder layers": _kinds(config.decoder_layers),
        "width": f"{config.width:,}",
        "vocabulary": f"{config.vocab_size:,}",
        "experts": f"{config.num_choices} of {config.num_experts} in a layer",
    }


def _kinds(layers: Sequence[str]) -> str:
    """Layers counted by kind."""
    return " + ".join(f"{layers.count(kind)} {kind}" for kind in ("dense", "moe") if kind in layers)


def _is_routed(path: str, config: EncoderDecoderConfig) -> bool:
    """Whether a parameter belongs to the experts of an MoE layer."""
    side, *rest = path.split("/")
    layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}.get(side)
    return layers is not None and layers[int(rest[0])] == "moe" and "experts" in rest


def memory(size: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _attention_extras(config: DecoderConfig) -> str:
    """Windows and chunks, in words."""
    extras = ""
    for name, lengths in (("windows", config.windows), ("chunks", config.chunks)):
        if some := [length for length in lengths if length]:
            extras += f"; {name} of {some[0]:,} in {len(some)} of {len(lengths)} layers"
    return extras
