"""DeepSeek-V2 (2405.04434): latent attention, small experts beside shared ones, and groups of experts picked first.

Rotary coordinates are stored as neighbours (2i, 2i + 1), and only a part of every head turns. With YaRN the scores are
scaled by the square of the magnitude besides. `norm_topk_prob` is refused where it is true: the authors' code divides
the gates by their sum then, `transformers` does not, and no published model asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import (
    LAYER,
    layers_of,
    outer_entries,
    read_body,
    swiglu_entries,
    write_body,
)
from moe_jax.checkpoints.families.per_layer import read_depth
from moe_jax.checkpoints.families.rotary import yarn_score_scale
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.checkpoints.hub.tensor_files import HubError
from moe_jax.models.config import DecoderConfig, LayerKind
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


def read_kinds(hub: HubConfig) -> tuple[LayerKind, ...]:
    """The first `first_k_dense_replace` layers are dense, the others sparse."""
    hub.expect("moe_layer_freq", 1)
    num_dense = hub.get("first_k_dense_replace", int)
    return tuple("dense" if index < num_dense else "moe" for index in range(read_depth(hub)))


def write_kinds(config: DecoderConfig) -> dict[str, Any]:
    """The key that `read_kinds` reads."""
    return {"first_k_dense_replace": len(layers_of(config, "dense"))}


def read_experts(hub: HubConfig) -> dict[str, Any]:
    """Numbers and widths of dense networks, experts and shared experts."""
    hub.expect("mlp_bias", False)
    hidden = hub.count("moe_intermediate_size")
    return {
        "dense_hidden": hub.count("intermediate_size"),
        "num_experts": hub.count("n_routed_experts"),
        "num_choices": hub.count("num_experts_per_tok"),
        "expert_hidden": hidden,
        "shared_hidden": hidden * hub.count("n_shared_experts", most=1000),
    }


def write_experts(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_experts` reads.

    Raises:
      HubError: shared experts that are no whole number of the others.
    """
    if not config.shared_hidden or config.shared_hidden % config.expert_hidden:
        raise HubError(
            f"shared_hidden={config.shared_hidden} must be one or more times expert_hidden={config.expert_hidden}"
        )
    return {
        "intermediate_size": config.dense_hidden,
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.num_choices,
        "moe_intermediate_size": config.expert_hidden,
        "n_shared_experts": config.shared_hidden // config.expert_hidden,
    }


def expert_entries(config: DecoderConfig, *, is_router_float32: bool = False) -> Iterator[Entry]:
    """Dense networks, routers, experts and shared experts; some checkpoints have their routers in float32."""
    dense, sparse, ours = layers_of(config, "dense"), layers_of(config, "moe"), "layers/feed_forward"
    mlp = f"{LAYER}mlp"
    yield from swiglu_entries(mlp, f"{ours}/experts", config.dense_hidden, dense)
    router = Entry(f"{mlp}.gate.weight", f"{ours}/router/kernel", "d e -> e d", layers=sparse)
    yield router._replace(is_float32=is_router_float32)
    yield from swiglu_entries(
        mlp + ".experts.{expert}", f"{ours}/experts", config.expert_hidden, sparse, experts=config.num_experts
    )
    if config.shared_hidden:
        yield from swiglu_entries(f"{mlp}.shared_experts", f"{ours}/shared/experts", config.shared_hidden, sparse)


def read_scale(hub: HubConfig) -> dict[str, Any]:
    """The factor on the gates as a setting of a rule; none where it is 1."""
    scale = hub.get("routed_scaling_factor", float, 1.0)
    return {} if scale == 1 else {"scale": scale}


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
