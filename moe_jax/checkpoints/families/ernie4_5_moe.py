"""ERNIE 4.5 (Baidu, 2025): softmax scores with a selection bias, renormalised by a sum of at least `moe_norm_min`.

Rotary pairs are neighbours. Layers from `moe_layer_start_index` to `moe_layer_end_index` are sparse where their number
is a multiple of `moe_layer_interval`. With `use_bias` all but routers and routed experts has biases. The part that
predicts further tokens, `model.mtp_*`, is left unread. `moe_capacity` is of the training only: in `transformers` no
token is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.families.deepseek_experts import bias_entry, expert_entries
from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import (
    GATE_UP_DOWN,
    LAYER,
    attention_entries,
    layers_of,
    outer_entries,
    read_body,
    write_body,
)
from moe_jax.checkpoints.families.per_layer import read_depth
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.models.config import DecoderConfig, LayerKind

# Keys of the authors' own code, with the value at which they say what this family is.
FIXED = {"moe_gate": "topk", "moe_use_aux_free": True, "use_rmsnorm": True}


def _read(hub: HubConfig) -> DecoderConfig:
    for key, value in FIXED.items():
        hub.expect(key, value)
    hub.maybe("moe_capacity", list)
    biases, hidden = hub.get("use_bias", bool, False), hub.count("moe_intermediate_size")
    num_shared, least = hub.get("moe_num_shared_experts", int), hub.get("moe_norm_min", float, 1e-12)
    return DecoderConfig(
        attention_settings={"use_bias": True, "use_out_bias": True} if biases else {},
        dense_hidden=hub.count("intermediate_size"),
        dense_settings={"use_bias": True} if biases else {},
        num_experts=hub.count("moe_num_experts"),
        num_choices=hub.count("moe_k"),
        expert_hidden=hidden,
        shared_hidden=hidden * num_shared,
        rule="softmax_top_k_renormalized",
        rule_settings={"least_sum": least} if least else {},
        read_out_bias=biases,
        **read_body(
            hub,
            _read_kinds(hub),
            epsilon=1e-5,
            base=500_000.0,
            tie_embeddings=hub.get("tie_word_embeddings", bool, True),
        ),
    )


def _read_kinds(hub: HubConfig) -> tuple[LayerKind, ...]:
    """Which layers are sparse."""
    depth, interval = read_depth(hub), hub.count("moe_layer_interval", 1)
    start, end = hub.get("moe_layer_start_index", int, 1), hub.get("moe_layer_end_index", int, -1)
    end = depth - 1 if end == -1 else end
    return tuple("moe" if start <= index <= end and (index + 1) % interval == 0 else "dense" for index in range(depth))


def _write(config: DecoderConfig) -> dict[str, Any]:
    sparse, depth = layers_of(config, "moe"), len(config.layers)
    return write_body(config) | {
        "use_bias": config.read_out_bias,
        "intermediate_size": config.dense_hidden,
        "moe_num_experts": config.num_experts,
        "moe_k": config.num_choices,
        "moe_intermediate_size": config.expert_hidden,
        "moe_num_shared_experts": config.shared_hidden // config.expert_hidden,
        "moe_norm_min": config.rule_settings.get("least_sum", 0.0),
        "moe_layer_start_index": sparse[0] if sparse else depth,
        "moe_layer_end_index": sparse[-1] if sparse else depth - 1,
        "moe_layer_interval": sparse[1] - sparse[0] if len(sparse) > 1 else 1,
    }


def _table(config: DecoderConfig) -> Iterator[Entry]:
    yield from outer_entries(config)
    yield from attention_entries(config, is_interleaved=True)
    yield from expert_entries(config, is_router_float32=True)
    yield bias_entry(config, "mlp.moe_statics.e_score_correction_bias")._replace(pattern="e -> 1 e")
    if config.dense_settings.get("use_bias"):
        mlp, ours = f"{LAYER}mlp", "layers/feed_forward"
        yield from _bias_entries(mlp, f"{ours}/experts", config.dense_hidden, layers_of(config, "dense"))
        if config.shared_hidden:
            theirs, ours = f"{mlp}.shared_experts", f"{ours}/shared/experts"
            yield from _bias_entries(theirs, ours, config.shared_hidden, layers_of(config, "moe"))


def _bias_entries(theirs: str, ours: str, hidden: int, layers: tuple[int, ...]) -> Iterator[Entry]:
    """The three biases of a network that every token passes."""
    gate, up, down = GATE_UP_DOWN
    for name, part in ((gate, (1, 0, hidden)), (up, (1, hidden, 2 * hidden))):
        yield Entry(f"{theirs}.{name}.bias", f"{ours}/b_in", "1 f -> f", part, layers=layers)
    yield Entry(f"{theirs}.{down}.bias", f"{ours}/b_out", "1 d -> d", layers=layers)


def _unread(config: DecoderConfig) -> tuple[str, ...]:
    del config
    return ("model.mtp_",)


ERNIE4_5_MOE = Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _read, _write, _table, ignored=_unread)
