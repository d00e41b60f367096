"""The smallest decoder that has every kind of part; tests change what they need with `dataclasses.replace`."""

from moe_jax.models.config import DecoderConfig

TINY = DecoderConfig(
    vocab_size=19,
    width=16,
    layers=("dense", "moe", "moe"),
    num_heads=2,
    num_kv_heads=1,
    dense_hidden=12,
    num_experts=4,
    expert_hidden=6,
    num_choices=2,
    backend="gather",
)
