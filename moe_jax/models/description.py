"""What a decoder is, in the figures that people ask for first."""

from __future__ import annotations

from moe_jax.models.config import DecoderConfig
from moe_jax.models.cost import model_cost

PRECISIONS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}  # bytes of a weight
_LENGTH = 4096  # tokens for which FLOPs are counted


def describe_model(config: DecoderConfig) -> dict[str, str]:
    """Names and values, in the order in which to show them.

    Args:
      config: the architecture.

    Returns:
      Sizes, parameters in all and active, the router, memory of the weights at each precision (all parameters alike,
      without scales or activations), and of the cache for one token.
    """
    cost = model_cost(config, _LENGTH)
    kinds = {kind: config.layers.count(kind) for kind in ("dense", "moe")}
    heads = f"{config.num_heads} heads of {config.head_width or config.width // config.num_heads}"
    if config.attention == "latent":
        heads = f"{config.num_heads} heads over a latent of {config.attention_settings['latent_width']}"
    elif config.num_kv_heads != config.num_heads:
        heads += f", {config.num_kv_heads} for keys and values"
    facts = {
        "layers": " + ".join(f"{count} {kind}" for kind, count in kinds.items() if count),
        "width": f"{config.width:,}",
        "attention": heads + _attention_extras(config),
        "vocabulary": f"{config.vocab_size:,}",
        "parameters": f"{cost.parameters:,}",
    }
    if kinds["moe"]:
        settings = ", ".join(f"{key}={value}" for key, value in config.rule_settings.items())
        facts |= {
            "active parameters": f"{round(cost.active_parameters):,} a token",
            "experts": f"{config.num_choices} of {config.num_experts} in a layer, hidden width {config.expert_hidden:,}"
            + (f", and {config.shared_hidden:,} shared" if config.shared_hidden else ""),
            "router": f"{config.router}, {config.rule}" + (f" ({settings})" if settings else ""),
        }
    cache = sum(layer.cache_bytes("bfloat16") for layer in cost.layers)
    facts["forward FLOPs"] = f"{cost.flops:.3g} a token, in texts of {_LENGTH:,}"
    for name, size in PRECISIONS.items():
        facts[f"weights in {name}"] = memory(cost.parameters * size)
    facts["cache in bfloat16"] = f"{memory(cache)} a token"
    return facts


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
