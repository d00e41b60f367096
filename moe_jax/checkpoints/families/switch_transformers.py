"""Switch Transformers (2101.03961), a T5 whose every other layer or so sends each token to one expert.

Facts of `transformers` that the config hides: a capacity is counted over each sequence, padding included, so that
left-padded sources lose other tokens there than here, where padding takes no place; a dropped token gets nothing from
the layer; an untied model has a table each for source, target and read-out, of which older files hold the first two as
one; and `dense_act_fn="gated-gelu"`, which its documentation names, does not build.
"""

from typing import Any

from moe_jax.checkpoints.families.attributes import (
    activation,
    activation_name,
    check_written,
    find_step,
    layer_kinds,
    read_attributes,
)
from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.models.encoder_decoder_config import EncoderDecoderConfig, LayerKind

MODEL_TYPE = "switch_transformers"

_HANDLED = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_decoder_layers": None,
    "num_sparse_encoder_layers": 3,
    "num_sparse_decoder_layers": 3,
    "encoder_sparse_step": None,
    "decoder_sparse_step": None,
    "num_heads": 12,
    "num_experts": 8,
    "expert_capacity": 64,
    "router_bias": False,
    "router_jitter_noise": 0.01,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dense_act_fn": "relu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": None,
    "tie_word_embeddings": True,
}
_ONLY = {
    "router_dtype": "float32",
    "is_encoder_decoder": True,
    "is_decoder": False,
    "add_cross_attention": False,
    "num_selected_experts": 1,
    "is_gated_act": False,
}
_WITHOUT_EFFECT = (  # the last line: written by older versions, read by none
    *("dropout_rate", "initializer_factor", "router_z_loss_coef", "router_aux_loss_coef", "add_router_probs"),
    *("router_ignore_padding_tokens", "n_positions"),
    *("router_type", "router_jitter", "capacity_factor", "batch_prioritized_routing", "feed_forward_proj"),
)


def _is_sparse(index: int, step: int) -> bool:
    return step == 1 or (step > 1 and index % step == 1)


def _layers(num_layers: int, num_sparse: int, step: int | None) -> tuple[LayerKind, ...]:
    """By the step, or else the number of sparse layers; where that is 0, layer 1 is sparse in `transformers` too."""
    if step is None:
        step = num_layers // num_sparse if num_sparse > 0 else num_layers
    return layer_kinds(num_layers, _is_sparse, step)


def _read(hub: HubConfig) -> EncoderDecoderConfig:
    """Our config from the content of `config.json`.

    A missing start token is taken to be the padding token, as T5's is.

    Raises:
      ValueError: attributes that are unknown or that we cannot run, by name.
    """
    a = read_attributes(hub.take_all(), MODEL_TYPE, handled=_HANDLED, only=_ONLY, without_effect=_WITHOUT_EFFECT)
    decoder_depth = a["num_layers"] if a["num_decoder_layers"] is None else a["num_decoder_layers"]
    return EncoderDecoderConfig(
        vocab_size=a["vocab_size"],
        width=a["d_model"],
        encoder_layers=_layers(a["num_layers"], a["num_sparse_encoder_layers"], a["encoder_sparse_step"]),
        decoder_layers=_layers(decoder_depth, a["num_sparse_decoder_layers"], a["decoder_sparse_step"]),
        encoder_heads=a["num_heads"],
        decoder_heads=a["num_heads"],
        head_width=a["d_kv"],
        encoder_hidden=a["d_ff"],
        decoder_hidden=a["d_ff"],
        expert_settings={"activation": activation(a["dense_act_fn"], "dense_act_fn")},
        num_experts=a["num_experts"],
        router_settings={"use_bias": a["router_bias"], "jitter": a["router_jitter_noise"]},
        capacity=a["expert_capacity"],
        capacity_unit="tokens",
        capacity_per_sequence=True,
        norm_epsilon=a["layer_norm_epsilon"],
        relative_buckets=a["relative_attention_num_buckets"],
        relative_distance=a["relative_attention_max_distance"],
        scale_logits=a["tie_word_embeddings"],
        tie_embeddings=a["tie_word_embeddings"],
        pad_id=a["pad_token_id"],
        start_id=a["pad_token_id"] if a["decoder_start_token_id"] is None else a["decoder_start_token_id"],
        stop_ids=a["eos_token_id"],
    )


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
      ValueError: what a Switch Transformer cannot be, by field.
    """
    written = {
        "model_type": MODEL_TYPE,
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_width or config.width // config.encoder_heads,
        "d_ff": config.encoder_hidden,
        "num_layers": len(config.encoder_layers),
        "num_decoder_layers": len(config.decoder_layers),
        "num_sparse_encoder_layers": config.encoder_layers.count("moe"),
        "num_sparse_decoder_layers": config.decoder_layers.count("moe"),
        "encoder_sparse_step": find_step(config.encoder_layers, _is_sparse, "encoder_layers"),
        "decoder_sparse_step": find_step(config.decoder_layers, _is_sparse, "decoder_layers"),
        "num_heads": config.encoder_heads,
        "num_experts": config.num_experts,
        "expert_capacity": config.capacity,
        "router_bias": config.router_settings.get("use_bias", False),
        "router_jitter_noise": config.router_settings.get("jitter", 0.0),
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "layer_norm_epsilon": config.norm_epsilon,
        "dense_act_fn": activation_name(config.expert_settings.get("activation", "gelu")),
        "pad_token_id": config.pad_id,
        "eos_token_id": list(config.stop_ids) if len(config.stop_ids) > 1 else next(iter(config.stop_ids), None),
        "decoder_start_token_id": config.start_id,
        "tie_word_embeddings": config.tie_embeddings,
    }
    check_written(config, _read(HubConfig(written)), MODEL_TYPE)
    return written


def _table(config: EncoderDecoderConfig) -> list[Entry]:
    """Where each tensor of `SwitchTransformersForConditionalGeneration` lives."""
    sides = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    entries = _embeddings(config)
    for side, layers in sides.items():
        entries.append(Entry(f"{side}.final_layer_norm.weight", f"{side}_norm/scale", "d -> d"))
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        entries.append(Entry(bias, f"{side}_bias/table", "n h -> n h"))
        for index, kind in enumerate(layers):
            entries += _layer(f"{side}.block.{index}.layer", f"{side}/{index}", side == "decoder", kind, config)
    return entries


def _embeddings(config: EncoderDecoderConfig) -> list[Entry]:
    shared, source, target = "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
    if config.tie_embeddings:
        return [Entry(shared, "embedding", "v d -> v d", aliases=(source, target, "lm_head.weight"))]
    return [
        Entry(source, "embedding", "v d -> v d", aliases=(shared,)),
        Entry(target, "target_embedding", "v d -> v d", aliases=(shared,)),
        Entry("lm_head.weight", "read_out", "d v -> v d"),
    ]


def _layer(theirs: str, ours: str, is_decoder: bool, kind: LayerKind, config: EncoderDecoderConfig) -> list[Entry]:
    """Sub-layers of a block, each with its norm: self-attention, in a decoder cross-attention, feed-forward."""
    entries = _attention(f"{theirs}.0.SelfAttention", f"{ours}/attention")
    entries.append(Entry(f"{theirs}.0.layer_norm.weight", f"{ours}/attention_norm/scale", "d -> d"))
    if is_decoder:
        entries += _attention(f"{theirs}.1.EncDecAttention", f"{ours}/cross_attention")
        entries.append(Entry(f"{theirs}.1.layer_norm.weight", f"{ours}/cross_norm/scale", "d -> d"))
    last = f"{theirs}.{2 if is_decoder else 1}"
    entries.append(Entry(f"{last}.layer_norm.weight", f"{ours}/feed_forward_norm/scale", "d -> d"))
    if kind == "dense":
        experts = f"{ours}/feed_forward/experts"
        entries.append(Entry(f"{last}.mlp.wi.weight", f"{experts}/w_in", "1 d f -> f d"))
        entries.append(Entry(f"{last}.mlp.wo.weight", f"{experts}/w_out", "1 f d -> d f"))
        return entries
    experts = f"{last}.mlp.experts.expert_{{expert}}"
    for name, mine, pattern in (("wi", "w_in", "d f -> f d"), ("wo", "w_out", "f d -> d f")):
        path = f"{ours}/feed_forward/experts/{mine}"
        entries.append(Entry(f"{experts}.{name}.weight", path, pattern, experts=config.num_experts))
    router = f"{last}.mlp.router.classifier"
    entries.append(Entry(f"{router}.weight", f"{ours}/feed_forward/router/kernel", "d e -> e d"))
    if config.router_settings.get("use_bias"):
        entries.append(Entry(f"{router}.bias", f"{ours}/feed_forward/router/bias", "e -> e"))
    return entries


def _attention(theirs: str, ours: str) -> list[Entry]:
    names = {"q": "query", "k": "key", "v": "value"}
    inwards = [Entry(f"{theirs}.{name}.weight", f"{ours}/{mine}", "d h k -> (h k) d") for name, mine in names.items()]
    return [*inwards, Entry(f"{theirs}.o.weight", f"{ours}/out", "h k d -> d (h k)")]


SWITCH_TRANSFORMERS = Family(
    MODEL_TYPE, "SwitchTransformersForConditionalGeneration", _read, _write, _table, kind=EncoderDecoderConfig
)
