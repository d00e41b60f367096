"""OLMoE (2409.02060): queries and keys normalised over all heads together, softmax gates as they are."""

from __future__ import annotations

from typing import Any

from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import read_biases, read_body, write_biases, write_body
from moe_jax.checkpoints.families.qwen3_moe import QWEN3_MOE, read_experts, write_experts
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.models.config import DecoderConfig


def _read(hub: HubConfig) -> DecoderConfig:
    body = read_body(hub, "moe", epsilon=1e-5)
    settings = {"qk_norm": "all", "norm_epsilon": body["norm_epsilon"], **read_biases(hub)}
    if clip := hub.maybe("clip_qkv", float):
        settings["clip"] = clip
    return DecoderConfig(attention_settings=settings, **read_experts(hub, "intermediate_size"), **body)


def _write(config: DecoderConfig) -> dict[str, Any]:
    experts, clip = write_experts(config, "intermediate_size"), config.attention_settings.get("clip")
    return write_body(config) | write_biases(config) | experts | {"clip_qkv": clip}


OLMOE = Family("olmoe", "OlmoeForCausalLM", _read, _write, QWEN3_MOE.table)
