"""Llama (2302.13971): dense, grouped-query attention, SwiGLU; and the parts that most other families share with it.

SmolLM, Mistral without a window and many others are stored as this family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.rotary import read_rotary, write_rotary
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.models.config import DecoderConfig, LayerKind

LAYER = "model.layers.{layer}."
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def read_body(
    hub: HubConfig,
    kinds: LayerKind | Sequence[LayerKind] = "dense",
    *,
    epsilon: float = 1e-6,
    base: float = 10_000.0,
    share: float | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The fields of `DecoderConfig` that nearly all families name alike: sizes, norms, heads, rotary positions.

    Args:
      hub: the `config.json`.
      kinds: of each layer, or of all.
      epsilon: of the norms, where the config does not say.
      base: of the rotary positions, where the config does not say.
      share: of a head that turns, where the config does not say; None for families whose heads turn whole.
      changes: fields that the family sets otherwise.
    """
    depth, num_heads = hub.count("num_hidden_layers", most=1000), hub.count("num_attention_heads", most=4096)
    hub.expect("hidden_act", "silu")
    width = hub.count("hidden_size")
    head_width = hub.maybe("head_dim", int)
    return {
        "vocab_size": hub.count("vocab_size"),
        "width": width,
        "layers": (kinds,) * depth if isinstance(kinds, str) else tuple(kinds),
        "num_heads": num_heads,
        "num_kv_heads": hub.count("num_key_value_heads", num_heads, most=4096),
        "head_width": None if head_width in (None, width // num_heads) else head_width,
        "norm_epsilon": hub.get("rms_norm_eps", float, epsilon),
        "tie_embeddings": hub.get("tie_word_embeddings", bool, False),
        **read_rotary(hub, base, share),
        **changes,
    }


def write_body(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_body` reads."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width or config.width // config.num_heads,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        **write_rotary(config),
    }


def read_biases(hub: HubConfig, default: bool = False) -> dict[str, bool]:
    """Settings of an attention whose four projections all have a bias, or none: `attention_bias`."""
    return {"use_bias": True, "use_out_bias": True} if hub.get("attention_bias", bool, default) else {}


def write_biases(config: DecoderConfig) -> dict[str, bool]:
    """The key that `read_biases` reads."""
    return {"attention_bias": bool(config.attention_settings.get("use_bias", False))}


def outer_entries(config: DecoderConfig) -> Iterator[Entry]:
    """Embedding, last norm, read-out, and the norms of every layer."""
    every = tuple(range(len(config.layers)))
    yield Entry("model.embed_tokens.weight", "embedding", "1 v d -> v d")
    if not config.tie_embeddings:
        yield Entry("lm_head.weight", "read_out", "d v -> v d")
    if config.read_out_bias:
        yield Entry("lm_head.bias", "read_out_bias", "v -> v")
    for leaf, own in (("weight", "scale"), ("bias", "bias"))[: 2 if config.norm == "layer" else 1]:
        yield Entry(f"model.norm.{leaf}", f"norm/{own}", "d -> d")
        for theirs, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "feed_forward_norm")):
            yield Entry(f"{LAYER}{theirs}.{leaf}", f"layers/{ours}/{own}", "d -> d", layers=every)


def attention_entries(config: DecoderConfig, *, is_interleaved: bool = False) -> Iterator[Entry]:
    """Projections of grouped-query attention, with the biases and norms that the config's settings name.

    Args:
      config: ours.
      is_interleaved: whether their rotary pairs are neighbours (2i, 2i + 1), where ours are (i, i + R/2).
    """
    every, settings = tuple(range(len(config.layers))), config.attention_settings
    start, counts = 0, {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}
    for name, count in counts.items():
        theirs, turns = f"{LAYER}self_attn.{name}", is_interleaved and name != "v_proj"
        weight = Entry(f"{theirs}.weight", "layers/attention/qkv", "d h k -> (h k) d", (1, start, start + count))
        yield weight._replace(layers=every, pairs=(2, 0) if turns else None)
        if settings.get("use_bias"):
            bias = Entry(f"{theirs}.bias", "layers/attention/qkv_bias", "h k -> (h k)", (0, start, start + count))
            yield bias._replace(layers=every, pairs=(1, 0) if turns else None)
        start += count
    yield Entry(f"{LAYER}self_attn.o_proj.weight", "layers/attention/out", "h k d -> d (h k)", layers=every)
    if settings.get("use_out_bias"):
        yield Entry(f"{LAYER}self_attn.o_proj.bias", "layers/attention/out_bias", "d -> d", layers=every)
    if settings.get("qk_norm") in ("head", "all"):
        pattern = "k -> k" if settings["qk_norm"] == "head" else "h k -> (h k)"
        for theirs, ours in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            yield Entry(f"{LAYER}self_attn.{theirs}.weight", f"layers/attention/{ours}", pattern, layers=every)


def swiglu_entries(
    theirs: str,
    ours: str,
    hidden: int,
    layers: tuple[int, ...],
    *,
    experts: int | None = None,
    names: tuple[str, str, str] = GATE_UP_DOWN,
) -> Iterator[Entry]:
    """The three matrices of a SwiGLU network, or of E experts with tensors of their own.

    Args:
      theirs: what their names begin with; "{expert}" in it runs over experts.
      ours: path of the `ExpertStack`.
      hidden: F.
      layers: which have it.
      experts: E, or None for a network that every token passes.
      names: of the gate, the other half and the matrix back.
    """
    one = "" if experts else "1 "  # a network of all tokens is a stack of one
    axis = 1 if experts else 2
    gate, up, down = names
    for name, part in ((gate, (axis, 0, hidden)), (up, (axis, hidden, 2 * hidden))):
        entry = Entry(f"{theirs}.{name}.weight", f"{ours}/w_in", f"{one}d f -> f d", part)
        yield entry._replace(layers=layers, experts=experts)
    yield Entry(f"{theirs}.{down}.weight", f"{ours}/w_out", f"{one}f d -> d f", layers=layers, experts=experts)


def layers_of(config: DecoderConfig, kind: LayerKind) -> tuple[int, ...]:
    """Positions of the layers of a kind."""
    return tuple(index for index, own in enumerate(config.layers) if own == kind)


def _read(hub: HubConfig) -> DecoderConfig:
    hub.expect("mlp_bias", False)
    hub.expect("is_llama_config", True)  # SmolLM's own two keys
    hub.expect("rope_interleaved", False)
    return DecoderConfig(
        dense_hidden=hub.count("intermediate_size"), attention_settings=read_biases(hub), **read_body(hub)
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_body(config) | write_biases(config) | {"intermediate_size": config.dense_hidden}


def _table(config: DecoderConfig) -> Iterator[Entry]:
    yield from outer_entries(config)
    yield from attention_entries(config)
    layers = layers_of(config, "dense")
    yield from swiglu_entries(f"{LAYER}mlp", "layers/feed_forward/experts", config.dense_hidden, layers)


LLAMA = Family("llama", "LlamaForCausalLM", _read, _write, _table)
