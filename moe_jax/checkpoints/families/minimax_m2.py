"""MiniMax-M2: Mixtral with sigmoid scores, a selection bias, norms over all heads, and heads that turn in part.

The config of the published weights, which are in 8 bits, has keys of its predecessors (2501.08313): they are refused
where they would change something. Modules that predict further tokens are named in it, without weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.deepseek_experts import bias_entry
from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import (
    LAYER,
    attention_entries,
    outer_entries,
    read_body,
    swiglu_entries,
    write_body,
)
from moe_jax.checkpoints.families.per_layer import read_depth
from moe_jax.checkpoints.hub.block_fp8 import open_block_fp8
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.models.config import DecoderConfig

# Keys of earlier models, with the value at which they say what this family is.
FIXED = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0,
    "sliding_window": None,
}


def _read(hub: HubConfig) -> DecoderConfig:
    for key, value in FIXED.items():
        hub.expect(key, value)
    for key in ("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "shared_moe_mode"):
        hub.maybe(key, object)
    hub.maybe("quantization_config", dict)
    hub.expect("attn_type_list", [1] * read_depth(hub))  # 1: full attention
    share = 1.0
    if hub.maybe("rotary_dim", int) is not None:
        share = hub.count("rotary_dim") / hub.count("head_dim")
    body = read_body(hub, "moe", base=5e6, share=share)
    return DecoderConfig(
        num_experts=hub.count("num_local_experts"),
        num_choices=hub.count("num_experts_per_tok"),
        expert_hidden=hub.count("intermediate_size"),
        rule="sigmoid_top_k",
        attention_settings={"qk_norm": "all", "norm_epsilon": body["norm_epsilon"]},
        **body,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_body(config) | {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_choices,
        "intermediate_size": config.expert_hidden,
    }


def _table(config: DecoderConfig) -> Iterator[Entry]:
    every, moe = tuple(range(len(config.layers))), f"{LAYER}block_sparse_moe"
    ours = "layers/feed_forward"
    yield from outer_entries(config)
    yield from attention_entries(config)
    yield Entry(f"{moe}.gate.weight", f"{ours}/router/kernel", "d e -> e d", layers=every, is_float32=True)
    yield bias_entry(config, "block_sparse_moe.e_score_correction_bias")
    yield from swiglu_entries(
        moe + ".experts.{expert}",
        f"{ours}/experts",
        config.expert_hidden,
        every,
        experts=config.num_experts,
        names=("w1", "w3", "w2"),
    )


MINIMAX_M2 = Family("minimax_m2", "MiniMaxM2ForCausalLM", _read, _write, _table, open_block_fp8)
