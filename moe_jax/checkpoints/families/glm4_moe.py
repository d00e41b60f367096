"""GLM-4.5 and 4.6 (2508.06471): DeepSeek-V3's experts behind grouped-query attention, of whose heads a half turns.

Queries, keys and values may have biases, and queries and keys a norm for each head. The layer behind the last, which
predicts further tokens (`model.layers.46.*` in GLM-4.5-Air), is left unread.
"""

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
from moe_jax.checkpoints.families.deepseek_v3 import further_layers
from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import attention_entries, outer_entries, read_body, write_body
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.models.config import DecoderConfig


def _read(hub: HubConfig) -> DecoderConfig:
    body = read_body(hub, read_kinds(hub), epsilon=1e-5, share=0.5)
    attention: dict[str, Any] = {}
    if hub.get("attention_bias", bool, False):
        attention["use_bias"] = True
    if hub.get("use_qk_norm", bool, False):
        attention |= {"qk_norm": "head", "norm_epsilon": body["norm_epsilon"]}
    return DecoderConfig(attention_settings=attention, **read_sigmoid_rule(hub, True), **read_experts(hub), **body)


def _write(config: DecoderConfig) -> dict[str, Any]:
    settings, body = config.attention_settings, write_body(config)
    rotary = {"partial_rotary_factor": 1.0} | body["rope_parameters"]
    return (
        body
        | write_kinds(config)
        | write_experts(config)
        | write_sigmoid_rule(config)
        | {
            "rope_parameters": rotary,
            "attention_bias": settings.get("use_bias", False),
            "use_qk_norm": settings.get("qk_norm") == "head",
        }
    )


def _table(config: DecoderConfig) -> Iterator[Entry]:
    yield from outer_entries(config)
    yield from attention_entries(config)
    yield from expert_entries(config, is_router_float32=True)
    yield bias_entry(config)


GLM4_MOE = Family("glm4_moe", "Glm4MoeForCausalLM", _read, _write, _table, ignored=further_layers)
