"""Qwen3 (2505.09388), dense: Llama with every head's queries and keys normalised."""

from __future__ import annotations

from typing import Any

from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import LLAMA, read_biases, read_body, write_biases, write_body
from moe_jax.checkpoints.families.per_layer import read_layer_types, read_qwen_window, write_layer_types
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.models.config import DecoderConfig


def read_qwen3_body(hub: HubConfig, **changes: Any) -> dict[str, Any]:
    """`read_body` with Qwen3's attention."""
    body = read_body(hub, **changes)
    settings = {"qk_norm": "head", "norm_epsilon": body["norm_epsilon"], **read_biases(hub)}
    return body | {"attention_settings": settings}


def _read(hub: HubConfig) -> DecoderConfig:
    first = hub.count("max_window_layers", 28)
    return DecoderConfig(
        dense_hidden=hub.count("intermediate_size"),
        windows=read_layer_types(hub, read_qwen_window(hub), lambda index: index >= first),
        **read_qwen3_body(hub),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return (
        write_body(config)
        | write_biases(config)
        | write_layer_types(config)
        | {"intermediate_size": config.dense_hidden, "use_sliding_window": bool(config.windows)}
    )


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read, _write, LLAMA.table)
