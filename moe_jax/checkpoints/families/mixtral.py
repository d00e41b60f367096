"""Mixtral (2401.04088): every layer has E SwiGLU experts, of which the softmax's K best are renormalised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import (
    LAYER,
    attention_entries,
    outer_entries,
    read_body,
    swiglu_entries,
    write_body,
)
from moe_jax.checkpoints.families.per_layer import in_every_layer, read_window, write_window
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.models.config import DecoderConfig


def _read(hub: HubConfig) -> DecoderConfig:
    return DecoderConfig(
        num_experts=hub.count("num_local_experts", 8),
        num_choices=hub.count("num_experts_per_tok", 2),
        expert_hidden=hub.count("intermediate_size"),
        rule="softmax_top_k_renormalized",
        windows=in_every_layer(hub, read_window(hub)),
        **read_body(hub, "moe", epsilon=1e-5, base=1e6),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_body(config) | {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_choices,
        "intermediate_size": config.expert_hidden,
        **write_window(config),
    }


def _table(config: DecoderConfig) -> Iterator[Entry]:
    every, moe = tuple(range(len(config.layers))), f"{LAYER}block_sparse_moe"
    yield from outer_entries(config)
    yield from attention_entries(config)
    yield Entry(f"{moe}.gate.weight", "layers/feed_forward/router/kernel", "d e -> e d", layers=every)
    yield from swiglu_entries(
        moe + ".experts.{expert}",
        "layers/feed_forward/experts",
        config.expert_hidden,
        every,
        experts=config.num_experts,
        names=("w1", "w3", "w2"),
    )


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _read, _write, _table)
