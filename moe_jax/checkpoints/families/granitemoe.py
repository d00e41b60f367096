"""GraniteMoE (PowerMoE, 2408.13359): multipliers on embedding, residual stream, scores and logits; fused experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import LAYER, LLAMA, layers_of, read_biases, read_body, write_biases, write_body
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.checkpoints.hub.tensor_files import HubError
from moe_jax.models.config import DecoderConfig


def _read(hub: HubConfig) -> DecoderConfig:
    factors = {name: hub.get(name, float, 1.0) for name in ("attention_multiplier", "logits_scaling")}
    if not all(factor > 0 for factor in factors.values()):
        raise HubError(f"{hub.source}: {factors} must be positive")
    return DecoderConfig(
        num_experts=hub.count("num_local_experts", 8),
        num_choices=hub.count("num_experts_per_tok", 2),
        expert_hidden=hub.count("intermediate_size"),
        rule="top_k_softmax",
        attention_settings={"scale": factors["attention_multiplier"], **read_biases(hub)},
        embedding_scale=hub.get("embedding_multiplier", float, 1.0),
        residual_scale=hub.get("residual_multiplier", float, 1.0),
        logit_scale=1 / factors["logits_scaling"],
        **read_body(hub, "moe"),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    head_width = config.head_width or config.width // config.num_heads
    own = {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_choices,
        "intermediate_size": config.expert_hidden,
        "attention_multiplier": config.attention_settings.get("scale") or head_width**-0.5,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1 / config.logit_scale,
    }
    return write_body(config) | write_biases(config) | own


def _table(config: DecoderConfig) -> Iterator[Entry]:
    sparse, moe, ours = layers_of(config, "moe"), f"{LAYER}block_sparse_moe", "layers/feed_forward"
    yield from LLAMA.table(config)
    yield Entry(f"{moe}.router.layer.weight", f"{ours}/router/kernel", "d e -> e d", layers=sparse)
    yield Entry(f"{moe}.input_linear.weight", f"{ours}/experts/w_in", "e d f -> e f d", layers=sparse)
    yield Entry(f"{moe}.output_linear.weight", f"{ours}/experts/w_out", "e f d -> e d f", layers=sparse)


GRANITEMOE = Family("granitemoe", "GraniteMoeForCausalLM", _read, _write, _table)
