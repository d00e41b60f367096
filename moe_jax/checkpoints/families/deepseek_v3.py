"""DeepSeek-V3 (2412.19437) and R1: DeepSeek-V2 with sigmoid scores, a selection bias, and groups by their best two.

The published weights are in 8 bits, and unpacked as they are read (`hub.block_fp8`). Behind the last layer lie those
that predict further tokens, `model.layers.61.*` in the published models: `transformers` leaves them out of the model,
and so does this import. `rope_interleave` is refused where it is false.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.deepseek_experts import (
    bias_entry,
    expert_entries,
    read_experts,
    read_sigmoid_rule,
    write_experts,
    write_sigmoid_rule,
)
from moe_jax.checkpoints.families.deepseek_v2 import latent_entries, read_latent, write_latent
from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import outer_entries
from moe_jax.checkpoints.hub.block_fp8 import open_block_fp8
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.models.config import DecoderConfig


def further_layers(config: DecoderConfig) -> tuple[str, ...]:
    """Names of what is left unread: layers behind the last, and frequencies that follow from the config."""
    return f"model.layers.{len(config.layers)}.", ".rotary_emb.inv_freq"


def _read(hub: HubConfig) -> DecoderConfig:
    hub.expect("rope_interleave", True)
    hub.maybe("quantization_config", dict)
    return DecoderConfig(**read_sigmoid_rule(hub, True), **read_experts(hub), **read_latent(hub))


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_latent(config) | write_experts(config) | write_sigmoid_rule(config) | {"rope_interleave": True}


def _table(config: DecoderConfig) -> Iterator[Entry]:
    yield from outer_entries(config)
    yield from latent_entries(config)
    yield from expert_entries(config)
    yield bias_entry(config)


DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", _read, _write, _table, open_block_fp8, further_layers)
