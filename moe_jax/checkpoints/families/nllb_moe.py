"""NLLB-MoE (2207.04672), a fairseq translation model whose every fourth layer sends each token to two experts.

Facts of `transformers` that the config hides: a capacity is counted over the whole batch; in evaluation it is a share
of the tokens, by default all of them, and not `expert_capacity`; gates of experts without room go to the token's other
expert unless normalised before; outputs of experts are scaled by `1 - moe_token_dropout`; norms add 1e-5. Its releases
5.0 to 5.23 send every token to experts 0 and 1, whatever the router says: `NllbMoeExperts.forward` takes the one-hot
mask of first choices for expert ids. What is meant is what 4.57 computes, and what is here.
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

MODEL_TYPE = "nllb-moe"

_HANDLED = {
    "vocab_size": 128112,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_sparse_step": 4,
    "decoder_sparse_step": 4,
    "activation_function": "relu",
    "num_experts": 128,
    "expert_capacity": 64,
    "moe_eval_capacity_token_fraction": 1.0,
    "moe_token_dropout": 0.2,
    "normalize_router_prob_before_dropping": False,
    "batch_prioritized_routing": False,
    "router_bias": False,
    "scale_embedding": True,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "tie_word_embeddings": True,
}
_ONLY = {
    "router_dtype": "float32",
    "second_expert_policy": "all",
    "router_ignore_padding_tokens": False,
    "is_encoder_decoder": True,
}
_WITHOUT_EFFECT = (
    *("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std"),
    *("router_z_loss_coef", "router_aux_loss_coef", "output_router_logits", "max_position_embeddings"),
    *("num_hidden_layers", "router_type", "router_jitter_noise"),
)


def _is_sparse(index: int, step: int) -> bool:
    return step > 0 and (index + 1) % step == 0


def _read(hub: HubConfig) -> EncoderDecoderConfig:
    """Our config from the content of `config.json`.

    Raises:
      ValueError: attributes that are unknown or that we cannot run, by name.
    """
    a = read_attributes(hub.take_all(), MODEL_TYPE, handled=_HANDLED, only=_ONLY, without_effect=_WITHOUT_EFFECT)
    share = a["moe_eval_capacity_token_fraction"]
    capacity: dict[str, Any] = {"capacity": None}
    if share < 1:
        amount, unit = (share, "share") if share > 0 else (a["expert_capacity"], "tokens")
        capacity = {"capacity": amount, "capacity_unit": unit, "capacity_per_sequence": False}
    return EncoderDecoderConfig(
        vocab_size=a["vocab_size"],
        width=a["d_model"],
        encoder_layers=layer_kinds(a["encoder_layers"], _is_sparse, a["encoder_sparse_step"]),
        decoder_layers=layer_kinds(a["decoder_layers"], _is_sparse, a["decoder_sparse_step"]),
        encoder_heads=a["encoder_attention_heads"],
        decoder_heads=a["decoder_attention_heads"],
        encoder_hidden=a["encoder_ffn_dim"],
        decoder_hidden=a["decoder_ffn_dim"],
        expert_settings={
            "activation": activation(a["activation_function"], "activation_function"),
            "use_bias": True,
        },
        num_experts=a["num_experts"],
        num_choices=2,
        router_settings={"use_bias": a["router_bias"]},
        rule="gshard_top_2",
        rule_settings={
            "second_policy": "all",
            "redistribute": not a["normalize_router_prob_before_dropping"],
            "by_priority": a["batch_prioritized_routing"],
            "scale": 1 - a["moe_token_dropout"],
        },
        **capacity,
        norm="layer",
        norm_epsilon=1e-5,
        positions="sinusoidal",
        attention_bias=True,
        scale_attention=True,
        scale_embedding=a["scale_embedding"],
        scale_logits=False,
        tie_embeddings=a["tie_word_embeddings"],
        pad_id=a["pad_token_id"],
        start_id=a["decoder_start_token_id"],
        stop_ids=a["eos_token_id"],
    )


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
      ValueError: what an NLLB-MoE cannot be, by field.
    """
    counted = config.capacity_unit == "tokens" and config.capacity is not None
    scale: Any = config.rule_settings.get("scale", 1.0)
    written = {
        "model_type": MODEL_TYPE,
        "architectures": ["NllbMoeForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "encoder_layers": len(config.encoder_layers),
        "decoder_layers": len(config.decoder_layers),
        "encoder_ffn_dim": config.encoder_hidden,
        "decoder_ffn_dim": config.decoder_hidden,
        "encoder_attention_heads": config.encoder_heads,
        "decoder_attention_heads": config.decoder_heads,
        "encoder_sparse_step": find_step(config.encoder_layers, _is_sparse, "encoder_layers"),
        "decoder_sparse_step": find_step(config.decoder_layers, _is_sparse, "decoder_layers"),
        "activation_function": activation_name(config.expert_settings.get("activation", "gelu")),
        "num_experts": config.num_experts,
        "expert_capacity": config.capacity if counted else _HANDLED["expert_capacity"],
        "moe_eval_capacity_token_fraction": -1.0 if counted else config.capacity or 1.0,
        "moe_token_dropout": round(1 - scale, 12),
        "normalize_router_prob_before_dropping": not config.rule_settings.get("redistribute", False),
        "batch_prioritized_routing": config.rule_settings.get("by_priority", False),
        "router_bias": config.router_settings.get("use_bias", False),
        "scale_embedding": config.scale_embedding,
        "pad_token_id": config.pad_id,
        "eos_token_id": list(config.stop_ids) if len(config.stop_ids) > 1 else next(iter(config.stop_ids), None),
        "decoder_start_token_id": config.start_id,
        "tie_word_embeddings": config.tie_embeddings,
    }
    check_written(config, _read(HubConfig(written)), MODEL_TYPE)
    return written


def _table(config: EncoderDecoderConfig) -> list[Entry]:
    """Where each tensor of `NllbMoeForConditionalGeneration` lives."""
    sides = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    entries = _embeddings(config)
    for side, layers in sides.items():
        entries += _norm(f"model.{side}.layer_norm", f"{side}_norm")
        for index, kind in enumerate(layers):
            theirs, ours = f"model.{side}.layers.{index}", f"{side}/{index}"
            entries += _attention(f"{theirs}.self_attn", f"{ours}/attention")
            entries += _norm(f"{theirs}.self_attn_layer_norm", f"{ours}/attention_norm")
            entries += _norm(f"{theirs}.ff_layer_norm", f"{ours}/feed_forward_norm")
            entries += _feed_forward(f"{theirs}.ffn", f"{ours}/feed_forward", kind, config)
            if side == "decoder":
                entries += _attention(f"{theirs}.cross_attention", f"{ours}/cross_attention")
                entries += _norm(f"{theirs}.cross_attention_layer_norm", f"{ours}/cross_norm")
    return entries


def _embeddings(config: EncoderDecoderConfig) -> list[Entry]:
    shared, source, target = (
        f"model.{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    )
    if config.tie_embeddings:
        return [Entry(shared, "embedding", "v d -> v d", aliases=(source, target, "lm_head.weight"))]
    return [
        Entry(source, "embedding", "v d -> v d", aliases=(shared,)),
        Entry(target, "target_embedding", "v d -> v d", aliases=(shared,)),
        Entry("lm_head.weight", "read_out", "d v -> v d"),
    ]


def _feed_forward(theirs: str, ours: str, kind: LayerKind, config: EncoderDecoderConfig) -> list[Entry]:
    one, count = ("1 ", None) if kind == "dense" else ("", config.num_experts)
    networks = theirs if kind == "dense" else f"{theirs}.experts.expert_{{expert}}"
    parts = {
        "fc1.weight": ("w_in", "d f -> f d"),
        "fc1.bias": ("b_in", "f -> f"),
        "fc2.weight": ("w_out", "f d -> d f"),
        "fc2.bias": ("b_out", "d -> d"),
    }
    entries = [
        Entry(f"{networks}.{name}", f"{ours}/experts/{mine}", f"{one}{pattern}", experts=count)
        for name, (mine, pattern) in parts.items()
    ]
    if kind == "moe":
        entries.append(Entry(f"{theirs}.router.classifier.weight", f"{ours}/router/kernel", "d e -> e d"))
        if config.router_settings.get("use_bias"):
            entries.append(Entry(f"{theirs}.router.classifier.bias", f"{ours}/router/bias", "e -> e"))
    return entries


def _attention(theirs: str, ours: str) -> list[Entry]:
    entries = []
    for name, mine in {"q": "query", "k": "key", "v": "value"}.items():
        entries.append(Entry(f"{theirs}.{name}_proj.weight", f"{ours}/{mine}", "d h k -> (h k) d"))
        entries.append(Entry(f"{theirs}.{name}_proj.bias", f"{ours}/{mine}_bias", "h k -> (h k)"))
    entries.append(Entry(f"{theirs}.out_proj.weight", f"{ours}/out", "h k d -> d (h k)"))
    entries.append(Entry(f"{theirs}.out_proj.bias", f"{ours}/out_bias", "d -> d"))
    return entries


def _norm(theirs: str, ours: str) -> list[Entry]:
    return [
        Entry(f"{theirs}.weight", f"{ours}/scale", "d -> d"),
        Entry(f"{theirs}.bias", f"{ours}/bias", "d -> d"),
    ]


NLLB_MOE = Family(MODEL_TYPE, "NllbMoeForConditionalGeneration", _read, _write, _table, kind=EncoderDecoderConfig)
