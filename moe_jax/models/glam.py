"""GLaM (Du et al. 2112.06905) as an architecture: its weights were never released.

Every other layer has 64 experts, of which a token uses two (GShard's rule, 2006.16668). The networks of experts have
two matrices; those of the layers between are gated linear units, of three. Positions enter as a relative bias of each
layer's own, here in T5's buckets. Sizes are those of the paper's Table 4, from which the totals of its Table 1 follow
with a vocabulary of 32,000; the paper names a SentencePiece vocabulary of 256,000. Both tables are restated from
memory.
"""

from typing import Any

from moe_jax.models.config import DecoderConfig

# name -> layers, width, hidden width of a network, heads, width of a head
SIZES = {
    "0.1B/64E": (12, 768, 3072, 12, 64),
    "1.7B/64E": (24, 2048, 8192, 16, 128),
    "8B/64E": (32, 4096, 16384, 32, 128),
    "64B/64E": (64, 8192, 32768, 128, 128),
}


def glam_config(size: str, **changes: Any) -> DecoderConfig:
    """The architecture of a size.

    Args:
      size: a key of `SIZES`: active parameters, about, and experts.
      changes: fields of `DecoderConfig` to set otherwise, such as `width=64`.

    Returns:
      The config. GShard's rule draws the second expert in training, and drops what exceeds an expert's capacity.

    Raises:
      ValueError: an unknown size, or a field that `DecoderConfig` refuses.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r} of GLaM; known: {', '.join(SIZES)}")
    depth, width, hidden, num_heads, head_width = SIZES[size]
    fields: dict[str, Any] = {
        "vocab_size": 256_000,
        "width": width,
        "layers": ("dense", "moe") * (depth // 2),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_width": head_width,
        "attention_settings": {"bias_buckets": 32},
        "turns": (False,) * depth,
        "dense_hidden": hidden,
        "dense_expert": "geglu",
        "num_experts": 64,
        "expert_hidden": hidden,
        "expert": "mlp",
        "expert_settings": {"activation": "gelu"},
        "num_choices": 2,
        "rule": "gshard_top_2",
        "capacity_factor": 2.0,
        "backend": "gather",
        "tie_embeddings": True,
    }
    return DecoderConfig(**(fields | changes))
