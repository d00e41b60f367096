"""Phi-3.5-MoE (GRIN, 2409.12136): SparseMixer routing, norms with mean and bias, rotary positions of LongRoPE.

Stored as Mixtral is, with biases. Texts longer than the original length turn by LongRoPE's long factors, as they did in
`transformers` 4; version 5 no longer passes the length on and always takes the short ones.
"""

from __future__ import annotations

from typing import Any

from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import read_biases, read_body, write_biases, write_body
from moe_jax.checkpoints.families.mixtral import MIXTRAL
from moe_jax.checkpoints.families.per_layer import in_every_layer, read_window, write_window
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.tensor_files import HubError
from moe_jax.models.config import DecoderConfig


def _read(hub: HubConfig) -> DecoderConfig:
    hub.expect("num_experts_per_tok", 2)  # transformers routes to two whatever it says
    hub.maybe("input_jitter_noise", float)  # in training only
    body = read_body(hub, "moe", epsilon=1e-5, base=1e6)
    if body["rotary"] not in ("plain", "longrope"):
        raise HubError(f"{hub.source}: rotary positions {body['rotary']!r} are not supported; known: default, longrope")
    jitter = hub.get("router_jitter_noise", float, 0.01)  # in evaluation, too: who is near
    if not 0 <= jitter < 1:
        raise HubError(f"{hub.source}: router_jitter_noise must be in [0, 1), got {jitter}")
    return DecoderConfig(
        num_experts=hub.count("num_local_experts", 16),
        num_choices=2,
        expert_hidden=hub.count("intermediate_size"),
        rule="sparse_mixer",
        rule_settings={"jitter": jitter},
        norm="layer",
        read_out_bias=hub.get("lm_head_bias", bool, False),
        attention_settings=read_biases(hub),
        windows=in_every_layer(hub, read_window(hub)),
        **body,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    own = {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_choices,
        "intermediate_size": config.expert_hidden,
        "router_jitter_noise": config.rule_settings.get("jitter", 0.01),
        "lm_head_bias": config.read_out_bias,
    }
    return write_body(config) | write_biases(config) | write_window(config) | own


PHIMOE = Family("phimoe", "PhimoeForCausalLM", _read, _write, MIXTRAL.table)
