"""gpt-oss (2508.10925): biases, attention sinks, windows in every other layer, clamped SwiGLU; experts in MXFP4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import LAYER, LLAMA, layers_of, read_biases, read_body, write_biases, write_body
from moe_jax.checkpoints.families.per_layer import read_layer_types, read_window, write_layer_types
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.mxfp4 import UnpackedTensors
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.checkpoints.hub.tensor_files import HubError, Tensors
from moe_jax.models.config import DecoderConfig


def _read(hub: HubConfig) -> DecoderConfig:
    if hub.maybe("rope_parameters", dict) is None:
        hub.get("rope_scaling", dict)  # transformers would take those of the published models
    hub.expect("experts_per_token", hub.values.get("num_experts_per_tok"))  # the older name, beside the other
    hub.maybe("initial_context_length", int)  # the same as the rotary positions' original length
    packing = (hub.maybe("quantization_config", dict) or {"quant_method": "mxfp4"}).get("quant_method")
    if packing != "mxfp4":
        raise HubError(f"{hub.source}: weights packed by {packing!r} are not supported; known: 'mxfp4'")
    return DecoderConfig(
        num_experts=hub.count("num_local_experts"),
        num_choices=hub.count("num_experts_per_tok", 4),
        expert_hidden=hub.count("intermediate_size"),
        expert="gpt_oss",
        expert_settings={"alpha": hub.get("swiglu_alpha", float, 1.702), "limit": hub.get("swiglu_limit", float, 7.0)},
        router_settings={"use_bias": True},
        rule="top_k_softmax",
        attention_settings={"use_sinks": True, **read_biases(hub, default=True)},
        windows=read_layer_types(hub, read_window(hub), lambda index: index % 2 == 0),
        **read_body(hub, "moe", epsilon=1e-5, base=150_000.0),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    own = {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_choices,
        "intermediate_size": config.expert_hidden,
        "swiglu_alpha": config.expert_settings.get("alpha", 1.702),
        "swiglu_limit": config.expert_settings.get("limit", 7.0),
    }
    return write_body(config) | write_biases(config) | write_layer_types(config) | own


def _table(config: DecoderConfig) -> Iterator[Entry]:
    sparse, moe, ours, halves = layers_of(config, "moe"), f"{LAYER}mlp", "layers/feed_forward", {"two": 2}
    yield from LLAMA.table(config)
    yield Entry(f"{LAYER}self_attn.sinks", "layers/attention/sinks", "h -> h", layers=sparse)
    yield Entry(f"{moe}.router.weight", f"{ours}/router/kernel", "d e -> e d", layers=sparse)
    yield Entry(f"{moe}.router.bias", f"{ours}/router/bias", "e -> e", layers=sparse)
    gate_up, down = f"{moe}.experts.gate_up_proj", f"{moe}.experts.down_proj"  # gate and up take turns
    yield Entry(gate_up, f"{ours}/experts/w_in", "e d (two f) -> e d (f two)", sizes=halves, layers=sparse)
    yield Entry(f"{gate_up}_bias", f"{ours}/experts/b_in", "e (two f) -> e (f two)", sizes=halves, layers=sparse)
    yield Entry(down, f"{ours}/experts/w_out", "e f d -> e f d", layers=sparse)
    yield Entry(f"{down}_bias", f"{ours}/experts/b_out", "e d -> e d", layers=sparse)


def _open(tensors: Tensors, hub_config: Mapping[str, Any]) -> Tensors:
    return UnpackedTensors(tensors) if hub_config.get("quantization_config") else tensors


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", _read, _write, _table, open=_open)
