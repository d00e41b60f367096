"""Qwen1.5-MoE and Qwen2-MoE (2407.10671): a gated shared expert beside the routed ones, biases on queries to values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import LAYER, LLAMA, layers_of, read_body, swiglu_entries, write_body
from moe_jax.checkpoints.families.per_layer import (
    read_layer_types,
    read_qwen_window,
    read_sparse_layers,
    write_layer_types,
    write_sparse_layers,
)
from moe_jax.checkpoints.families.qwen3_moe import expert_entries, read_experts, write_experts
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.models.config import DecoderConfig


def _read(hub: HubConfig) -> DecoderConfig:
    last = hub.count("max_window_layers", 28)
    return DecoderConfig(
        dense_hidden=hub.count("intermediate_size"),
        shared_hidden=hub.count("shared_expert_intermediate_size"),
        shared_gate=True,
        attention_settings={"use_bias": True} if hub.get("qkv_bias", bool, True) else {},
        windows=read_layer_types(hub, read_qwen_window(hub), lambda index: index % 2 == 0 and index < last),
        **read_experts(hub, "moe_intermediate_size"),
        **read_body(hub, read_sparse_layers(hub)),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    own = {
        "intermediate_size": config.dense_hidden,
        "shared_expert_intermediate_size": config.shared_hidden,
        "qkv_bias": bool(config.attention_settings.get("use_bias", False)),
        "use_sliding_window": bool(config.windows),
    }
    experts = write_experts(config, "moe_intermediate_size")
    return write_body(config) | experts | write_sparse_layers(config) | write_layer_types(config) | own


def _table(config: DecoderConfig) -> Iterator[Entry]:
    yield from LLAMA.table(config)
    yield from expert_entries(config)
    sparse, shared, ours = layers_of(config, "moe"), f"{LAYER}mlp.shared_expert", "layers/feed_forward/shared"
    yield from swiglu_entries(shared, f"{ours}/experts", config.shared_hidden, sparse)
    yield Entry(f"{shared}_gate.weight", f"{ours}/gate", "d 1 -> 1 d", layers=sparse)


QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", _read, _write, _table)
