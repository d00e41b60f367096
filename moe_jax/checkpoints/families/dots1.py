"""dots.llm1 (2506.05767): Qwen3's attention, with norms of queries and keys, before DeepSeek-V3's experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.deepseek_experts import (
    bias_entry,
    expert_entries,
    read_experts,
    read_kinds,
    read_sigmoid_rule,
    write_experts,
    write_kinds,
    write_sigmoid_rule,
)
from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import (
    attention_entries,
    outer_entries,
    read_biases,
    read_body,
    write_biases,
    write_body,
)
from moe_jax.checkpoints.families.per_layer import read_layer_types, read_window, write_layer_types
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.models.config import DecoderConfig


def _read(hub: HubConfig) -> DecoderConfig:
    body, first = read_body(hub, read_kinds(hub)), hub.get("max_window_layers", int, 62)
    attention = {"qk_norm": "head", "norm_epsilon": body["norm_epsilon"], **read_biases(hub)}
    return DecoderConfig(
        attention_settings=attention,
        windows=read_layer_types(hub, read_window(hub), lambda index: index >= first),
        **read_sigmoid_rule(hub, False),
        **read_experts(hub),
        **body,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return (
        write_body(config)
        | write_biases(config)
        | write_kinds(config)
        | write_layer_types(config)
        | write_experts(config)
        | write_sigmoid_rule(config)
    )


def _table(config: DecoderConfig) -> Iterator[Entry]:
    yield from outer_entries(config)
    yield from attention_entries(config)
    yield from expert_entries(config)
    yield bias_entry(config)


DOTS1 = Family("dots1", "Dots1ForCausalLM", _read, _write, _table)
