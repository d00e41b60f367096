"""DeepSeek's mixture of experts (2401.06066, 2412.19437) as several families store it.

The first layers are dense. The others have small experts, and shared ones as one network of their widths together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.llama import LAYER, layers_of, swiglu_entries
from moe_jax.checkpoints.families.per_layer import read_depth
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.checkpoints.hub.tensor_files import HubError
from moe_jax.models.config import DecoderConfig, LayerKind


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
