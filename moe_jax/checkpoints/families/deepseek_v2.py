"""DeepSeek-V2 (2405.04434): latent attention, small experts beside shared ones, and groups of experts picked first.

Rotary coordinates are stored as neighbours (2i, 2i + 1), and only a part of every head turns. With YaRN the scores are
scaled by the square of the magnitude besides. `norm_topk_prob` is refused where it is true: the authors' code divides
the gates by their sum then, `transformers` does not, and no published model asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.deepseek_experts import (
    expert_entries,
    read_experts,
    read_kinds,
    read_scale,
    write_experts,
    write_kinds,
)
from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import LAYER, outer_entries, read_body, write_body
from moe_jax.checkpoints.families.rotary import yarn_score_scale
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.checkpoints.hub.tensor_files import HubError
from moe_jax.models.config import DecoderConfig
from moe_jax.ops.rotary import yarn_magnitude

# Their names of the widths of latent attention.
WIDTHS = {
    "kv_lora_rank": "latent_width",
    "qk_nope_head_dim": "content_width",
    "qk_rope_head_dim": "rotary_width",
    "v_head_dim": "value_width",
}
GROUPED = {"greedy": "softmax_top_k", "group_limited_greedy": "group_limited_softmax_top_k"}


def read_latent(hub: HubConfig) -> dict[str, Any]:
    """The fields of latent attention.

    Raises:
      HubError: biases, or fewer keys and values than heads.
    """
    hub.expect("attention_bias", False)
    hub.expect("num_key_value_heads", hub.get("num_attention_heads", int), None)
    settings: dict[str, Any] = {ours: hub.count(theirs) for theirs, ours in WIDTHS.items()}
    query_width = settings["content_width"] + settings["rotary_width"]
    hub.expect("qk_head_dim", query_width)
    if hub.maybe("q_lora_rank", int) is not None:
        settings["query_width"] = hub.count("q_lora_rank")
    if scale := yarn_score_scale(hub, query_width):
        settings["scale"] = scale
    body = read_body(hub, read_kinds(hub))
    return body | {"attention": "latent", "attention_settings": settings, "head_width": None}


def write_latent(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_latent` reads.

    Raises:
      HubError: another attention, or a scale of the scores that no weight of YaRN's magnitude gives.
    """
    if config.attention != "latent":
        raise HubError(f"attention={config.attention!r} must be 'latent'")
    settings: dict[str, Any] = dict(config.attention_settings)
    written = write_body(config) | write_kinds(config) | {theirs: settings[ours] for theirs, ours in WIDTHS.items()}
    rotary = dict(written["rope_parameters"])
    if scale := settings.get("scale"):
        rotary["mscale_all_dim"] = _score_weight(config, scale)
    return written | {
        "head_dim": settings["rotary_width"],
        "q_lora_rank": settings.get("query_width"),
        "rope_parameters": rotary,
    }


def _score_weight(config: DecoderConfig, scale: float) -> float:
    """The weight of YaRN's magnitude that gives such a factor on the scores: `yarn_score_scale`, backwards."""
    settings: dict[str, Any] = dict(config.attention_settings)
    factor: Any = config.rotary_settings.get("factor", 1.0)
    query_width = settings["content_width"] + settings["rotary_width"]
    magnitude = math.sqrt(scale * math.sqrt(query_width))
    if factor <= 1:
        raise HubError(f"scale={scale} of attention's scores is not 1 / sqrt({query_width}), and no YaRN explains it")
    return round((magnitude - 1) / (yarn_magnitude(factor) - 1), 9)  # published weights are short decimals


def latent_entries(config: DecoderConfig) -> Iterator[Entry]:
    """Projections and norms of latent attention."""
    every, settings = tuple(range(len(config.layers))), dict[str, Any](config.attention_settings)
    theirs, ours = f"{LAYER}self_attn", "layers/attention"
    query = "q_proj"
    if settings.get("query_width"):
        query = "q_b_proj"
        yield Entry(f"{theirs}.q_a_proj.weight", f"{ours}/query_down", "d r -> r d", layers=every)
        yield Entry(f"{theirs}.q_a_layernorm.weight", f"{ours}/query_norm", "r -> r", layers=every)
    turned = (2, settings["content_width"])
    yield Entry(f"{theirs}.{query}.weight", f"{ours}/query", "r h k -> (h k) r", layers=every, pairs=turned)
    turned = (1, settings["latent_width"])
    yield Entry(f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}/down", "d r -> r d", layers=every, pairs=turned)
    yield Entry(f"{theirs}.kv_a_layernorm.weight", f"{ours}/norm", "r -> r", layers=every)
    yield Entry(f"{theirs}.kv_b_proj.weight", f"{ours}/up", "r h k -> (h k) r", layers=every)
    yield Entry(f"{theirs}.o_proj.weight", f"{ours}/out", "h v d -> d (h v)", layers=every)


def _read(hub: HubConfig) -> DecoderConfig:
    hub.expect("scoring_func", "softmax")
    hub.expect("norm_topk_prob", False)
    hub.expect("topk_method", *GROUPED)
    method, settings = hub.get("topk_method", str, "greedy"), read_scale(hub)
    groups = {"num_groups": hub.maybe("n_group", int) or 1, "open_groups": hub.maybe("topk_group", int) or 1}
    return DecoderConfig(
        rule=GROUPED[method],
        rule_settings=settings | (groups if method == "group_limited_greedy" else {}),
        **read_experts(hub),
        **read_latent(hub),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    methods = {rule: method for method, rule in GROUPED.items()}
    return (
        write_latent(config)
        | write_experts(config)
        | {
            "topk_method": methods.get(config.rule, "greedy"),
            "n_group": config.rule_settings.get("num_groups", 1),
            "topk_group": config.rule_settings.get("open_groups", 1),
            "routed_scaling_factor": config.rule_settings.get("scale", 1.0),
            "norm_topk_prob": False,
        }
    )


def _table(config: DecoderConfig) -> Iterator[Entry]:
    yield from outer_entries(config)
    yield from latent_entries(config)
    yield from expert_entries(config)


DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", _read, _write, _table)
