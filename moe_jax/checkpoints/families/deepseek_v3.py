"""DeepSeek-V3 (2412.19437) and R1: DeepSeek-V2 with sigmoid scores, a selection bias, and groups by their best two.

The published weights are in 8 bits, and unpacked as they are read (`hub.block_fp8`). Behind the last layer lie those
that predict further tokens, `model.layers.61.*` in the published models: `transformers` leaves them out of the model,
and so does this import. `rope_interleave` is refused where it is false.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.deepseek_v2 import (
    expert_entries,
    latent_entries,
    read_experts,
    read_latent,
    read_scale,
    write_experts,
    write_latent,
)
from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import LAYER, layers_of, outer_entries
from moe_jax.checkpoints.hub.block_fp8 import open_block_fp8
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.models.config import DecoderConfig


def read_sigmoid_rule(hub: HubConfig, is_normalized: bool) -> dict[str, Any]:
    """The rule and its settings.

    Args:
      hub: the `config.json`.
      is_normalized: whether gates are divided by their sum, where it does not say.
    """
    hub.expect("scoring_func", "sigmoid")
    hub.expect("topk_method", "noaux_tc")
    settings = read_scale(hub)
    if not hub.get("norm_topk_prob", bool, is_normalized):
        settings["renormalize"] = False
    num_groups, open_groups = hub.count("n_group", 1), hub.count("topk_group", 1)
    if num_groups == 1:
        return {"rule": "sigmoid_top_k", "rule_settings": settings}
    settings |= {"num_groups": num_groups, "open_groups": open_groups}
    return {"rule": "group_limited_sigmoid_top_k", "rule_settings": settings}


def write_sigmoid_rule(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_sigmoid_rule` reads."""
    settings = config.rule_settings
    return {
        "n_group": settings.get("num_groups", 1),
        "topk_group": settings.get("open_groups", 1),
        "norm_topk_prob": settings.get("renormalize", True),
        "routed_scaling_factor": settings.get("scale", 1.0),
    }


def bias_entry(config: DecoderConfig, theirs: str = "mlp.gate.e_score_correction_bias") -> Entry:
    """The bias on the selection, which our layers keep as balance state."""
    sparse = layers_of(config, "moe")
    return Entry(f"{LAYER}{theirs}", "layers/feed_forward/bias", "e -> e", layers=sparse, is_float32=True)


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
