"""Qwen3-MoE (2505.09388): Qwen3 with E SwiGLU experts in its sparse layers and the softmax's K best, renormalised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import (
    LAYER,
    LLAMA,
    layers_of,
    swiglu_entries,
    write_biases,
    write_body,
)
from moe_jax.checkpoints.families.per_layer import (
    in_every_layer,
    read_qwen_window,
    read_sparse_layers,
    write_sparse_layers,
    write_window,
)
from moe_jax.checkpoints.families.qwen3 import read_qwen3_body
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.models.config import DecoderConfig


def read_experts(hub: HubConfig, hidden: str) -> dict[str, Any]:
    """The experts' fields, where softmax gates may be renormalised; `hidden` is their name of F."""
    is_normalized = hub.get("norm_topk_prob", bool, False)
    return {
        "num_experts": hub.count("num_local_experts" if "num_local_experts" in hub else "num_experts"),
        "num_choices": hub.count("num_experts_per_tok"),
        "expert_hidden": hub.count(hidden),
        "rule": "softmax_top_k_renormalized" if is_normalized else "softmax_top_k",
    }


def write_experts(config: DecoderConfig, hidden: str) -> dict[str, Any]:
    """The keys that `read_experts` reads."""
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_choices,
        hidden: config.expert_hidden,
        "norm_topk_prob": config.rule == "softmax_top_k_renormalized",
    }


def expert_entries(config: DecoderConfig) -> Iterator[Entry]:
    """Routers and experts of the sparse layers."""
    sparse, moe, ours = layers_of(config, "moe"), f"{LAYER}mlp", "layers/feed_forward"
    yield Entry(f"{moe}.gate.weight", f"{ours}/router/kernel", "d e -> e d", layers=sparse)
    yield from swiglu_entries(
        moe + ".experts.{expert}", f"{ours}/experts", config.expert_hidden, sparse, experts=config.num_experts
    )


def _read(hub: HubConfig) -> DecoderConfig:
    hub.maybe("max_window_layers", int)  # without effect: the window, if on, is that of all layers
    return DecoderConfig(
        dense_hidden=hub.count("intermediate_size"),
        windows=in_every_layer(hub, read_qwen_window(hub)),
        **read_experts(hub, "moe_intermediate_size"),
        **read_qwen3_body(hub, kinds=read_sparse_layers(hub)),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return (
        write_body(config)
        | write_biases(config)
        | write_experts(config, "moe_intermediate_size")
        | write_sparse_layers(config)
        | write_window(config)
        | {"intermediate_size": config.dense_hidden, "use_sliding_window": bool(config.windows)}
    )


def _table(config: DecoderConfig) -> Iterator[Entry]:
    yield from LLAMA.table(config)
    yield from expert_entries(config)


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read, _write, _table)
