"""Llama 4 (Meta, 2025), its text: gates weigh what enters an expert, and most layers attend within chunks.

A layer with rotary positions (pairs are neighbours) attends within runs of `attention_chunk_size` tokens, its queries
and keys normed once they have turned; one without, usually every fourth, attends to all and scales its queries with
their position. Every `interleave_moe_layer_step`-th layer is sparse. Experts lie in one tensor, input first.

The published checkpoints are `llama4`, which reads images too: of them the text is imported, as `llama4_text`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.llama import (
    LAYER,
    attention_entries,
    layers_of,
    outer_entries,
    read_biases,
    read_body,
    swiglu_entries,
    write_biases,
    write_body,
)
from moe_jax.checkpoints.families.per_layer import FULL, read_depth
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.checkpoints.hub.tensor_files import HubError, Tensors
from moe_jax.models.config import DecoderConfig, LayerKind

CHUNKED = "chunked_attention"
TEXT = "language_model."  # what names of the text's tensors begin with beside those of images


def _read(hub: HubConfig) -> DecoderConfig:
    turns, attention = _read_turns(hub), dict[str, Any](read_biases(hub))
    body = read_body(hub, _read_kinds(hub), epsilon=1e-5, base=500_000.0)
    if hub.get("use_qk_norm", bool, True):
        attention |= {"qk_norm": "l2", "norm_epsilon": body["norm_epsilon"]}
    far = {"far_scale": hub.get("attn_scale", float, 0.1), "far_length": hub.count("floor_scale", 8192)}
    if hub.get("attn_temperature_tuning", object, True):  # true, or 4 in the first configs
        attention |= far
    hidden = hub.count("intermediate_size")
    return DecoderConfig(
        attention_settings=attention,
        turns=() if all(turns) else turns,
        chunks=_read_chunks(hub, turns),
        dense_hidden=hub.count("intermediate_size_mlp"),
        num_experts=hub.count("num_local_experts"),
        num_choices=hub.count("num_experts_per_tok", 1),
        expert_hidden=hidden,
        shared_hidden=hidden,
        gates_on_input=True,
        rule="sigmoid_top_k",
        rule_settings={"by_logits": True, "renormalize": False},
        **body,
    )


def _read_turns(hub: HubConfig) -> tuple[bool, ...]:
    """Which layers have rotary positions: those with a 1 in `no_rope_layers`, whatever its name says."""
    depth, interval = read_depth(hub), hub.count("no_rope_layer_interval", 4)
    given = hub.maybe("no_rope_layers", list) or [int((index + 1) % interval != 0) for index in range(depth)]
    if len(given) < depth or not all(turn in (0, 1) for turn in given):
        raise HubError(f"{hub.source}: no_rope_layers={given} must hold a 0 or 1 for each of {depth} layers")
    return tuple(map(bool, given[:depth]))


def _read_chunks(hub: HubConfig, turns: tuple[bool, ...]) -> tuple[int, ...]:
    """The length of each layer's chunks, 0 for none; empty where no layer has them."""
    default = [CHUNKED if turn else FULL for turn in turns]
    types = hub.get("layer_types", list, default)
    if len(types) != len(turns) or not all(kind in (FULL, CHUNKED) for kind in types):
        raise HubError(f"{hub.source}: layer_types={types} must name {len(turns)} layers, each {FULL!r} or {CHUNKED!r}")
    chunk = hub.count("attention_chunk_size", 8192)
    return tuple(chunk if kind == CHUNKED else 0 for kind in types) if CHUNKED in types else ()


def _read_kinds(hub: HubConfig) -> tuple[LayerKind, ...]:
    """Which layers are sparse: the `moe_layers`, or every `interleave_moe_layer_step`-th."""
    depth, step = read_depth(hub), hub.count("interleave_moe_layer_step", 1)
    sparse = hub.get("moe_layers", list, list(range(step - 1, depth, step)))
    return tuple("moe" if index in sparse else "dense" for index in range(depth))


def _write(config: DecoderConfig) -> dict[str, Any]:
    depth, settings = len(config.layers), config.attention_settings
    chunks = config.chunks or (0,) * depth
    written = {
        "intermediate_size": config.expert_hidden,
        "intermediate_size_mlp": config.dense_hidden,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_choices,
        "moe_layers": list(layers_of(config, "moe")),
        "no_rope_layers": [int(turn) for turn in config.turns or (True,) * depth],
        "layer_types": [CHUNKED if chunk else FULL for chunk in chunks],
        "attention_chunk_size": max(chunks) or 8192,  # transformers wants one where no layer uses it, too
        "use_qk_norm": settings.get("qk_norm") == "l2",
        "attn_temperature_tuning": bool(settings.get("far_scale")),
    }
    if settings.get("far_scale"):
        written |= {"attn_scale": settings["far_scale"], "floor_scale": settings["far_length"]}
    return write_body(config) | write_biases(config) | written


def _table(config: DecoderConfig) -> Iterator[Entry]:
    dense, sparse = layers_of(config, "dense"), layers_of(config, "moe")
    theirs, ours = f"{LAYER}feed_forward", "layers/feed_forward"
    yield from outer_entries(config)
    yield from attention_entries(config, is_interleaved=True)
    yield from swiglu_entries(theirs, f"{ours}/experts", config.dense_hidden, dense)
    yield Entry(f"{theirs}.router.weight", f"{ours}/router/kernel", "d e -> e d", layers=sparse)
    yield Entry(f"{theirs}.experts.gate_up_proj", f"{ours}/experts/w_in", "e d f -> e d f", layers=sparse)
    yield Entry(f"{theirs}.experts.down_proj", f"{ours}/experts/w_out", "e f d -> e f d", layers=sparse)
    yield from swiglu_entries(f"{theirs}.shared_expert", f"{ours}/shared/experts", config.shared_hidden, sparse)


class _TextPart:
    """The tensors of the text in a checkpoint that reads images too, named as in one of text alone."""

    def __init__(self, tensors: Tensors):
        self._tensors = tensors

    def names(self) -> list[str]:
        return [name.removeprefix(TEXT) for name in self._tensors.names() if name.startswith(TEXT)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(TEXT + name)

    def read(self, name: str) -> np.ndarray:
        return self._tensors.read(TEXT + name)


def _read_text(hub: HubConfig) -> DecoderConfig:
    text = HubConfig(hub.get("text_config", dict), f"{hub.source}: text_config")
    config = _read(text)
    text.finish()
    for key in ("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "tie_word_embeddings"):
        hub.maybe(key, object)  # of images, or told by the text's config again
    return config


def _write_text(config: DecoderConfig) -> dict[str, Any]:
    del config
    raise HubError("a checkpoint of llama4 reads images too, which ours does not; export with family 'llama4_text'")


def _open_text(tensors: Tensors, hub_config: Mapping[str, Any]) -> Tensors:
    del hub_config
    return _TextPart(tensors)


LLAMA4_TEXT = Family("llama4_text", "Llama4ForCausalLM", _read, _write, _table)
LLAMA4 = Family("llama4", "Llama4ForConditionalGeneration", _read_text, _write_text, _table, _open_text)
